"""What the loop costs: the share of wall time in which training or evaluation runs, and its overhead per experiment.

    uv run tests/bench_loop.py [--experiments 20] [--agent-seconds 2] [--train-seconds 3]

The agent and the training are fakes that sleep; loop.py, git and the processes are real. The goal with --ahead is above
95% at 2 s and 3 s. Overhead is wall time outside agent and training (with --ahead: outside training), per experiment.
Last, `loop.py report` of a ledger of 15,000 rows, against one of 15.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import Desk

from ledger import COLUMNS, Row

AGENT = """
    started = time.time()
    n = count()
    if n % 3:
        knob("NOISE", n)  # no better: discarded, as most are
    else:
        knob("DEPTH", knob("DEPTH") + 1)  # better: kept, so the edit that waits is merged
    say(f"idea {n}")
    time.sleep(AGENT_SECONDS)
    print(time.time() - started)
"""


def measure(mode: str, args: argparse.Namespace) -> tuple[float, float, float]:
    """Wall seconds of all experiments after the baseline, busy share, overhead in milliseconds per experiment."""
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(Path(folder))
        desk.set_knob(SECONDS=args.train_seconds)
        desk.set_constant("loop.py", "STARTUP_ALLOWANCE", "300")
        desk.commit("sleep")
        agent = desk.agent(AGENT.replace("AGENT_SECONDS", str(args.agent_seconds)))
        count = str(args.experiments)
        done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", count, mode, timeout=3600)
        events = desk.events()
        assert sum(event["event"] == "measured" for event in events) == args.experiments + 1, done.stderr
        logs = sorted((desk.home() / "experiments").glob("*/agent.log"))
        proposing = sum(float(log.read_text()) for log in logs) if mode == "--no-ahead" else 0.0
    first = next(i for i, event in enumerate(events) if event["event"] == "measured")
    wall = sum(b["at"] - a["at"] for a, b in itertools.pairwise(events[first:]) if b["event"] != "stopped")
    busy = sum(event["seconds"] for event in events[first + 1 :] if event["event"] == "measured")
    return wall, busy / wall, 1000 * (wall - busy - proposing) / args.experiments


def report_seconds(num_rows: int) -> float:
    """Wall time of `loop.py report` on a ledger of which every twentieth row was kept."""
    with tempfile.TemporaryDirectory() as folder:
        desk, ledger = Desk(Path(folder)), Path(folder, "ledger.tsv")
        statuses = itertools.cycle(["keep", *["discard"] * 19])
        rows = [Row(f"{n:07x}", 1 - 1e-5 * n, 44.0, next(statuses), f"change {n}") for n in range(num_rows)]
        ledger.write_text(COLUMNS + "".join(map(str, rows)))
        started = time.perf_counter()
        done = desk.loop("report", str(ledger))
        assert done.stdout.startswith(f"{num_rows} rows"), done.stderr
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=5)
    parser.add_argument("--agent-seconds", type=float, default=2.0)
    parser.add_argument("--train-seconds", type=float, default=3.0)
    args = parser.parse_args()
    print(f"{args.experiments} experiments, agent {args.agent_seconds} s, training {args.train_seconds} s")
    print(f"{'':10} {'wall':>8} {'busy':>7} {'overhead':>14}")
    for mode in ("--ahead", "--no-ahead"):
        wall, share, overhead = measure(mode, args)
        print(f"{mode:10} {wall:6.1f} s {share:7.1%} {overhead:8.0f} ms each")
    few, many = report_seconds(15), report_seconds(15_000)
    print(f"report of 15 rows {few:.2f} s, of 15,000 rows {many:.2f} s: {many / few:.1f} times")


if __name__ == "__main__":
    main()
