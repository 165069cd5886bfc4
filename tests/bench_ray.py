"""How many devices one loop feeds: experiments an hour on Ray against the ideal, and the loop's CPU for each.

    uv run tests/bench_ray.py [--devices 8 64] [--train-seconds 30 3] [--rounds 3] [--run-seconds 300]

The training sleeps and the proposer is a line of shell; loop.py, git, Ray and its processes are real, on one machine.
The rate is taken between the end of the first round (every device has made a run) and the last run's end; the ideal is
a run every --train-seconds on every device. The processors are shared by all the workers that a cluster would spread
over its nodes, so the second figure is the one that scales: CPU seconds an experiment of the loop itself with its git
and its proposers (its start included, so that few rounds say too much), of its process with Ray, and of Ray's head
(GCS and one raylet).
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import Desk, wait_for

from harness.processes import find_processes

PROPOSER = """\
sed -i "s/^LR = .*/LR = 0.9$(od -An -N6 -tu8 /dev/urandom | tr -d ' ')/" train.py
"""
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def parts_of(desk: Desk, loop: int) -> dict[str, list[int]]:
    """The processes whose CPU time is counted."""
    inside = str(desk.path).encode()
    heads = find_processes("cmdline", rb"gcs_server\0|raylet/raylet\0")
    heads = {pid for pid in heads if str(desk.cache).encode() in Path(f"/proc/{pid}/environ").read_bytes()}
    drivers = find_processes("cmdline", inside + rb"/harness/ray_driver")
    return {"loop": [loop], "driver": [*drivers], "Ray": [*heads]}


def measure(devices: int, train_seconds: float, rounds: int) -> tuple[float, dict[str, float]]:
    """Share of the ideal rate, and CPU seconds an experiment by part."""
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(Path(folder))
        desk.replace("prepare.py", "DEVICES = 4", f"DEVICES = {devices}")
        desk.replace("prepare.py", '"time_budget": 1', f'"time_budget": {train_seconds}')
        desk.replace("prepare.py", '"training_seconds": 0.5', f'"training_seconds": {train_seconds}')
        desk.set_knob(SECONDS=train_seconds)
        desk.set_constant("loop.py", "STARTUP_ALLOWANCE", "300")
        desk.commit("sleep")
        script = desk.outside / "propose.sh"
        script.write_text(PROPOSER)
        count = devices * rounds
        args = ("--tag", "t", "--agent-cmd", f"sh {script}", "--ahead", "1", "--max-experiments", str(count))
        process = desk.popen(*args, "--workers", str(devices), "--ray", "")
        rows = desk.home() / "results.tsv"

        def has_rows(number: int) -> bool:
            assert process.poll() is None, process.communicate()
            return rows.exists() and rows.read_text().count("\n") > number

        seconds = 60 + 3 * (rounds + 1) * (train_seconds + devices)
        wait_for(lambda: has_rows(1), seconds)  # the baseline
        parts = parts_of(desk, process.pid)
        before = {name: sum(map(cpu_seconds, pids)) for name, pids in parts.items()}
        before["loop"] = 0.0  # it proposes while the baseline runs: its start counts too
        wait_for(lambda: has_rows(count), seconds)  # all but the last
        after = {name: sum(map(cpu_seconds, pids)) for name, pids in parts.items()}
        _, errors = process.communicate(timeout=120)
        ended = [event["at"] for event in desk.events() if event["event"] == "measured"]
        desk.end()
    assert len(ended) == count + 1, errors
    rate = (count - devices) / (ended[-1] - ended[devices])  # the baseline is the first
    return rate / (devices / train_seconds), {name: (after[name] - before[name]) / (count - 1) for name in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--train-seconds", type=float, nargs="+", default=[30.0, 3.0])
    parser.add_argument("--rounds", type=int, default=3, help="runs a device (default 3)")
    parser.add_argument("--run-seconds", type=float, default=300, help="of a real run, for the last column")
    args = parser.parse_args()
    print("devices  training  an hour   of ideal    CPU s an experiment: loop, driver, Ray    devices at 300 s")
    for train_seconds in args.train_seconds:
        for devices in args.devices:
            share, cpu = measure(devices, train_seconds, args.rounds)
            hourly = share * devices / train_seconds * 3600
            serial = max(cpu["loop"], cpu["driver"])  # each is one thread that decides
            parts = "  ".join(f"{seconds:6.3f}" for seconds in cpu.values())
            line = f"{devices:7d} {train_seconds:7.0f} s {hourly:8.0f} {share:10.1%}    {parts:>40}"
            print(f"{line} {args.run_seconds / serial:12.0f}", flush=True)


if __name__ == "__main__":
    main()
