"""What the loop costs: idle time of the devices between runs, and how much one deciding thread can settle.

    uv run tests/bench_loop.py [--experiments 10] [--rows 15000]

1. Sessions of loop.py with 1 and with 16 workers, an agent that answers at once and a training that sleeps; git, the
   agents' and the runs' processes are real. Busy is the share of the time in which a device trains, from the end of the
   baseline to the launch of the last run (goal: 97 %); overhead is the rest, for each experiment. The fakes share the
   processors of this machine with the loop: 16 workers train longer, so that they fit.
2. The deciding thread alone: candidates and results that are there at once, after a short ledger and after a long one.
3. `loop.py report` of a long ledger.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import BASELINE, Desk
from test_loop_workers import FACTS

import loop
from harness.bench import Measurement
from harness.commands import Options
from harness.contract import Record
from harness.desk import Assignment, Proposal
from harness.interrupts import Interrupts
from harness.ledger import Row
from harness.repository import Repository
from harness.store import Run, Store

INSTANT_AGENT = """
knob("DEPTH", time.time_ns() % 10**12 + os.getpid())  # worse, and never twice the same
say("idea")
"""


def measure_session(workers: int, train_seconds: float, experiments: int) -> tuple[float, float]:
    """Share of the time in which a device was busy; seconds for each experiment in which it was not."""
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(Path(folder))
        desk.set_knob(SECONDS=train_seconds)
        desk.replace("prepare.py", "DEVICES = 4", f"DEVICES = {workers}")
        desk.replace("prepare.py", '"time_budget": 1', f'"time_budget": {train_seconds}')
        desk.replace("prepare.py", '"training_seconds": 0.5', f'"training_seconds": {train_seconds}')
        desk.set_constant("loop.py", "STARTUP_ALLOWANCE", "300")
        desk.commit("sleep")
        desk.loop(*BASELINE, timeout=600)
        command = ["--tag", "t", "--agent-cmd", desk.agent(INSTANT_AGENT), "--workers", str(workers), "--ahead", "1"]
        done = desk.loop(*command, "--max-experiments", str(experiments), timeout=3600)
        events = desk.events()
        assert len(desk.rows()) == experiments + 1, done.stderr
    session = max(i for i, event in enumerate(events) if event["event"] == "session")
    launched = [event["at"] for event in events[session:] if event["event"] == "training"]
    begin = launched[workers - 1]  # every device has had its first
    end = launched[-1]
    busy = 0.0
    for event in events[session:]:
        if event["event"] == "measured":
            busy += max(0.0, min(event["at"], end) - max(event["at"] - event["seconds"], begin))
    wall = (end - begin) * workers
    return busy / wall, (wall - busy) / (experiments - workers)


class InstantFleet:
    """Every tenth edit is a gain."""

    capacity = 16

    def submit(self, job) -> Future:
        score = 1 - 1e-5 * job.number if job.number % 10 == 0 else 2.0
        record = Record(score, "fake", "val", job.seed, 0.5, 7, "d" * 64, {}, "p" * 64, "cpu")
        future: Future = Future()
        future.set_result(Measurement(record, {}, 0.5, 1.0, 0.1, 0.5))
        return future

    def place(self, number: int) -> str:
        return ""

    def close(self) -> None:
        pass


class InstantAgents:
    """An edit that merges with every other."""

    failing_since = None

    def __init__(self, store: Store):
        self.store = store
        self.asked: dict[Future, Proposal] = {}
        self.assignments: deque[Assignment] = deque()

    def ask(self, running: list[str]) -> bool:
        if len(self.asked) == 16:
            return False
        champion = self.store.champion
        source = self.store.repository.read(champion, "train.py").replace(b"\nX = ", b"\nX = %d#" % time.time_ns())
        future: Future = Future()
        future.set_result(None)
        self.asked[future] = Proposal(source, champion, "idea")
        return True

    def take(self, future: Future, pending: set[bytes]) -> Proposal:
        return self.asked.pop(future)

    def have_spent_all(self) -> bool:
        return False

    def remember_refusal(self, refusal: str) -> None:
        pass

    def clear_idle(self) -> None:
        pass


def settled_a_second(num_rows: int, experiments: int) -> tuple[float, float]:
    """Experiments a second that the deciding thread takes from proposal to row, with `num_rows` rows before; seconds
    to open the tag."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder).resolve()
        (checkout / "train.py").write_text("\nX = 0\n" + "# a line of code\n" * 1000)
        (checkout / "program.md").write_text("do it")
        for command in ("init -q -b main", "add -A", "-c user.name=x -c user.email=x@y commit -q -m start"):
            subprocess.run(["git", *command.split()], cwd=checkout, check=True)
        write_history(Store(Repository(checkout, "train.py", "program.md"), "t", loop.DOMAIN), num_rows)
        begin = time.perf_counter()
        store = Store(Repository(checkout, "train.py", "program.md"), "t", loop.DOMAIN)
        options = Options(workers=16, ahead=1, max_experiments=experiments)
        interrupts = Interrupts(checkout / "STOP")
        ratchet = loop.Ratchet(store, FACTS, InstantFleet(), InstantAgents(store), options, interrupts)
        ratchet.plan_stale_gains()
        opened = time.perf_counter()
        ratchet.run()
        rows = len(store.rows) - num_rows
        return rows / (time.perf_counter() - opened), opened - begin


def write_history(store: Store, num_rows: int) -> None:
    """A tag with so many rows, each with its commit, ref and run.json, all of them discards but the first."""
    start = store.repository.head()
    source = store.repository.read(start, "train.py")
    lines = []
    for number in range(1, num_rows + 1):
        edit = source + b"# %d\n" % number
        message = f"run {number:04d}: idea"
        lines.append(
            f"commit {store.refs}{number}\ncommitter x <x@y> now\ndata {len(message)}\n{message}\nfrom {start}\n"
        )
        lines.append(f"M 100644 inline train.py\ndata {len(edit)}\n{edit.decode()}\n")
    git = ["git", "fast-import", "--quiet", "--date-format=now"]
    subprocess.run(git, input="".join(lines), text=True, cwd=store.repository.checkout, check=True)
    subprocess.run(["git", "pack-refs", "--all"], cwd=store.repository.checkout, check=True)
    store.load()
    rows = []
    for number, commit in sorted(store.attempts.items()):
        status = "keep" if number == 1 else "discard"
        run = Run(number, commit, start, 42, "idea", "experiment", decision=status, score=1.0)
        store.folder(number).mkdir(parents=True)
        (store.folder(number) / "run.json").write_text(json.dumps(dataclasses.asdict(run)))
        rows.append(Row(commit[:7], 1.0, 0.5, status, "idea"))
    store.rows = rows
    store.mend_ledger()


def report_seconds(num_rows: int) -> float:
    """Wall time of `loop.py report` on a ledger of which every twentieth row was kept."""
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(Path(folder))
        ledger = Path(folder, "ledger.tsv")
        statuses = itertools.cycle(["keep", *["discard"] * 19])
        rows = [Row(f"{n:07x}", 1 - 1e-5 * n, 44.0, next(statuses), f"change {n}") for n in range(num_rows)]
        ledger.write_text(loop.DOMAIN.columns + "".join(map(str, rows)))
        started = time.perf_counter()
        done = desk.loop("report", str(ledger))
        assert done.stdout.startswith(f"{num_rows} rows"), done.stderr
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=10, help="for each worker")
    parser.add_argument("--rows", type=int, default=15_000, help="of the long ledger")
    args = parser.parse_args()
    print(f"{os.cpu_count()} processors")
    for workers, train_seconds in ((1, 3.0), (16, 20.0)):
        experiments = workers * (args.experiments if workers == 1 else 3)
        share, overhead = measure_session(workers, train_seconds, experiments)
        print(
            f"{workers:2} workers, {experiments} runs of {train_seconds:g} s: devices busy {share:.1%}, "
            f"overhead {1000 * overhead:.0f} ms an experiment"
        )
    for num_rows in (1, args.rows):
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # what the loop says of each run
            rate, opening = settled_a_second(num_rows, 100)
        print(f"after {num_rows} rows: {rate:.1f} experiments settled a second; the tag opens in {opening:.2f} s")
    few = report_seconds(15)
    many = report_seconds(args.rows)
    print(f"report of 15 rows {few:.2f} s, of {args.rows} rows {many:.2f} s")


if __name__ == "__main__":
    main()
