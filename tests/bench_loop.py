"""What the loop itself costs, with a fake evaluator and an agent that answers at once. Prints figures, asserts nothing.

    uv run python tests/bench_loop.py [EXPERIMENTS] [SECONDS]     # default: 12 experiments of 5 seconds

Overhead: wall seconds of an experiment beyond its training, with one worker. Busy: the fraction of the time in which
the device trains, with one worker more that proposes ahead. CPU: seconds of the loop's own process an experiment.
"""

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import Checkout


def night(folder: Path, experiments: int, seconds: float, ahead: int) -> tuple[float, float, float]:
    """Wall seconds between the end of the baseline and of the last run, seconds of training in them, CPU seconds."""
    checkout = Checkout(folder)
    checkout.replace("train.py", "prepare.start_clock()", f"time.sleep({seconds})\nprepare.start_clock()")
    checkout.commit("a run takes its time")
    agent = checkout.agent('knob("LR", 0.2 + count() / 1000)')
    checkout.loop("--tag", "t", "--agent-cmd", "true", "--max-experiments", "0", timeout=600)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    options = ("--tag", "t", "--agent-cmd", agent, "--max-experiments", str(experiments), "--ahead", str(ahead))
    checkout.loop(*options, timeout=600 + 10 * experiments * seconds)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    runs = [run for run in checkout.runs() if run.purpose == "experiment"]
    wall = runs[-1].started_at + runs[-1].seconds - runs[0].started_at
    return wall, sum(run.seconds for run in runs), cpu


def main() -> None:
    experiments = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 5.0
    print(f"{experiments} experiments of {seconds:g} s, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    for ahead in (0, 1):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            wall, trained, cpu = night(Path(folder), experiments, seconds, ahead)
        overhead = (wall - trained) / experiments
        words = f"overhead {overhead:.2f} s an experiment, device busy {trained / wall:.1%}"
        print(f"--ahead {ahead}: {words}, CPU of loop, agents and runs {cpu / experiments:.2f} s an experiment")


if __name__ == "__main__":
    main()
