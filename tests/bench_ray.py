"""How many devices one loop feeds: experiments an hour on Ray against the ideal, and the loop's CPU for each.

    uv run tests/bench_ray.py [--devices 8 64] [--train-seconds 30 3] [--rounds 3] [--run-seconds 300]

The training sleeps, the proposer is a line of shell, and every edit is a loss. loop.py, git, Ray and its processes are
real, on one machine.

Experiments an hour are counted from the end of the first round, when every device has made a run, to the end of the
last run. The ideal is a run every --train-seconds on every device. The workers of all devices share the processors of
this machine; on a cluster they are spread over its nodes. Where runs are short and devices many, these processors are
the limit, and not the loop. So the second figure is the one that scales.

CPU seconds for each experiment, without the start of the session:

    loop      loop.py with its git and its proposers
    driver    the loop's process that has Ray
    Ray       the processes of Ray's head: GCS and one raylet

One thread of the loop decides, and one thread of the driver places jobs. The last column is --run-seconds divided by
the larger of their two figures: so many devices, with runs that long, would keep that thread busy all the time.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import Desk, has_event, wait_for

from harness.processes import find_processes

PROPOSER = """\
sed -i "s/^LR = .*/LR = 0.9$(od -An -N6 -tu8 /dev/urandom | tr -d ' ')/" train.py
"""
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(part: str, pids: set[int]) -> float:
    """User and system time of a part's processes; of the loop, also of its children that have ended.

    The children of a raylet are workers, which on a cluster run on its nodes.
    """
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        user, system, user_of_children, system_of_children = map(int, fields[11:15])
        ticks += user + system
        if part == "loop":
            ticks += user_of_children + system_of_children
    return ticks / TICKS


def find_parts(desk: Desk, loop: int) -> dict[str, set[int]]:
    """Ids of the processes whose CPU time is counted, by part."""
    drivers = find_processes("cmdline", re.escape(str(desk.path).encode()) + rb"/harness/ray_driver")
    heads = find_processes("cmdline", rb"gcs_server\0|raylet/raylet\0")
    heads &= find_processes("environ", re.escape(str(desk.cache).encode()))
    assert len(drivers) == 1, drivers
    assert len(heads) == 2, heads
    return {"loop": {loop}, "driver": drivers, "Ray": heads}


def make_desk(folder: Path, devices: int, train_seconds: float) -> Desk:
    desk = Desk(folder)
    desk.replace("prepare.py", "DEVICES = 4", f"DEVICES = {devices}")
    desk.replace("prepare.py", '"time_budget": 1', f'"time_budget": {train_seconds}')
    desk.replace("prepare.py", '"training_seconds": 0.5', f'"training_seconds": {train_seconds}')
    desk.set_knob(SECONDS=train_seconds)
    desk.set_constant("loop.py", "STARTUP_ALLOWANCE", "300")
    # With few processors a training may wake late from its sleep. That is no crash here.
    desk.set_constant("harness/bench.py", "CLOCK_TOLERANCE", "60.0")
    desk.commit("sleep")
    return desk


def start_loop(desk: Desk, devices: int, count: int, log: Path) -> subprocess.Popen:
    """Start loop.py with a worker for every device. It writes to a file: a pipe that nobody empties would stop it."""
    script = desk.outside / "propose.sh"
    script.write_text(PROPOSER)
    command = [sys.executable, str(desk.path / "loop.py"), "--tag", "t", "--agent-cmd", f"sh {script}", "--ahead", "1"]
    command += ["--max-experiments", str(count), "--workers", str(devices)]
    with open(log, "w") as output:
        return subprocess.Popen(
            command,
            cwd=desk.path,
            env=desk.env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def measure_session(desk: Desk, devices: int, train_seconds: float, count: int) -> tuple[float, dict[str, float]]:
    """Experiments an hour, and CPU seconds for each by part, in a session of a baseline and `count` experiments."""
    log = desk.outside / "loop.log"
    process = start_loop(desk, devices, count, log)
    ledger = desk.home() / "results.tsv"
    longest_wait = 120 + 3 * (count / devices + 1) * (train_seconds + devices)  # seconds

    def wait_for_loop(condition) -> None:
        def is_met() -> bool:
            assert process.poll() is None, log.read_text()
            return condition()

        wait_for(is_met, longest_wait)

    def has_all_rows_but_one() -> bool:
        return ledger.exists() and ledger.read_text().count("\n") > count  # the first line is the heading

    wait_for_loop(has_event(desk, "session"))  # nobody was asked for a proposal yet
    parts = find_parts(desk, process.pid)
    before = {name: cpu_seconds(name, pids) for name, pids in parts.items()}
    wait_for_loop(has_all_rows_but_one)
    after = {name: cpu_seconds(name, pids) for name, pids in parts.items()}
    code = process.wait(120)
    assert code == 0, log.read_text()
    assert desk.statuses() == ["keep"] + ["discard"] * count, log.read_text()

    ended = [event["at"] for event in desk.events() if event["event"] == "measured"]  # the first is the baseline
    hourly = 3600 * (count - devices) / (ended[-1] - ended[devices])
    runs = count  # that were settled between the two looks: the baseline, and all experiments but one
    return hourly, {name: (after[name] - before[name]) / runs for name in parts}


def measure(devices: int, train_seconds: float, rounds: int) -> tuple[float, dict[str, float]]:
    """See measure_session. Nothing of the session is left, however it ends."""
    with tempfile.TemporaryDirectory() as folder:
        desk = make_desk(Path(folder), devices, train_seconds)
        try:
            return measure_session(desk, devices, train_seconds, devices * rounds)
        finally:
            desk.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--train-seconds", type=float, nargs="+", default=[30.0, 3.0])
    parser.add_argument("--rounds", type=int, default=3, help="runs a device (default 3)")
    parser.add_argument("--run-seconds", type=float, default=300, help="of a real run, for the last column")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2 are needed, because the first one is not counted")
    print(f"{os.cpu_count()} processors; CPU seconds are for each experiment\n")
    print("                 experiments an hour             CPU seconds          devices that one")
    print(f"devices training  found    ideal  share     loop  driver     Ray   loop feeds at {args.run_seconds:g} s")
    for train_seconds in args.train_seconds:
        for devices in args.devices:
            hourly, cpu = measure(devices, train_seconds, args.rounds)
            ideal = 3600 * devices / train_seconds
            fed = args.run_seconds / max(cpu["loop"], cpu["driver"])
            rates = f"{hourly:7.0f}{ideal:9.0f}{hourly / ideal:7.1%}"
            parts = f"{cpu['loop']:9.3f}{cpu['driver']:8.3f}{cpu['Ray']:8.3f}"
            print(f"{devices:7d}{train_seconds:7g} s{rates}{parts}{fed:22.0f}", flush=True)


if __name__ == "__main__":
    main()
