"""What the loop itself costs, with a fake evaluator and an agent that answers at once. Prints figures, asserts nothing.

    uv run tests/bench_loop.py [EXPERIMENTS] [SECONDS] [DEVICES]     # default: 12 experiments of 5 seconds on 1 device

Overhead: wall seconds of an experiment beyond its training. Busy: the fraction of the time in which the devices train.
Both without and with workers more that propose ahead. CPU: seconds of loop, agents and runs an experiment. Devices
beyond one are fake GPUs of Ray on this machine, whose processors all of them share.
"""

import os
import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import Checkout


def night(folder: Path, experiments: int, seconds: float, devices: int, ahead: int) -> tuple[float, float, float]:
    """Wall seconds from the first experiment's start to the last one's end, their training seconds, CPU seconds."""
    checkout = Checkout(folder)
    checkout.replace("train.py", "prepare.start_clock()", f"time.sleep({seconds})\nprepare.start_clock()")
    checkout.commit("a run takes its time")
    if devices > 1:
        (checkout.cache / "kind").write_text("cuda")
        checkout.env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(devices)))
    agent = checkout.agent('knob("LR", 0.2 + count() / 1000)')
    checkout.loop("--tag", "t", "--agent-cmd", "true", "--max-experiments", "0", timeout=600)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    options = ["--tag", "t", "--agent-cmd", agent, "--max-experiments", str(experiments), "--ahead", str(ahead)]
    if devices > 1:
        options += ["--workers", str(devices), "--ray", ""]
    checkout.loop(*options, timeout=600 + 10 * experiments * seconds)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    runs = [run for run in checkout.runs() if run.purpose == "experiment"]
    wall = max(run.started_at + run.seconds for run in runs) - min(run.started_at for run in runs)
    return wall, sum(run.seconds for run in runs), cpu


def main() -> None:
    given = sys.argv[1:] + ["12", "5", "1"][len(sys.argv) - 1 :]
    experiments, seconds, devices = int(given[0]), float(given[1]), int(given[2])
    print(f"{experiments} experiments of {seconds:g} s on {devices} devices, {os.cpu_count()} cores")
    for ahead in (0, devices):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            wall, trained, cpu = night(Path(folder), experiments, seconds, devices, ahead)
        overhead = (wall * devices - trained) / experiments
        words = f"overhead {overhead:.2f} s an experiment, devices busy {trained / wall / devices:.1%}"
        print(f"--ahead {ahead}: {words}, CPU of loop, agents and runs {cpu / experiments:.2f} s an experiment")


if __name__ == "__main__":
    main()
