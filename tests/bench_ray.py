"""How many devices one loop feeds on Ray: runs an hour against the ideal, and the loop's CPU seconds for each.

    uv run tests/bench_ray.py [--devices 8 64] [--train-seconds 30] [--rounds 3]

The training sleeps. RayRunner, Ray and its processes are real, on one machine with that many fake GPUs. Threads that
make runs stand in for the loop's workers: what an agent, git and the verdict cost is not in here.

Runs an hour are counted from the end of the first round, when every device has made a run, to the end of the last run.
The ideal is a run every --train-seconds on every device. All devices share this machine's processors; on a cluster they
are spread over its nodes. CPU seconds are those of this process, Ray's driver included, from the first round on.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_ray_runner import Field, make_job

from harness import machine, runner
from harness.ray_runner import RayRunner

runner.CLOCK_TOLERANCE = 60.0  # with few processors a training may wake late from its sleep: that is no crash here


def measure(folder: Path, devices: int, train_seconds: float, rounds: int) -> tuple[float, float]:
    """Runs an hour, and CPU seconds of this process for each run."""
    field = Field(folder)
    os.environ["AUTORESEARCH_CACHE"] = str(field.cache)
    (field.cache / "seconds").write_text(str(train_seconds))
    facts = machine.describe(field.tag.domain, field.path, machine.variables_for_training("fake"))
    facts = dataclasses.replace(facts, devices={str(number): facts.devices["0"] for number in range(devices)})
    ray_runner = RayRunner(field.tag, facts, devices, "", threading.Event())
    numbers = iter(range(1, devices * rounds + 1))
    ends: list[float] = []
    cpu: list[float] = []

    def work() -> None:
        for number in numbers:
            with ray_runner.device() as device:
                run = ray_runner.measure(make_job(field.tag, facts, number), device)
            assert run.score is not None, run.reason
            ends.append(time.monotonic())
            cpu.append(time.process_time())

    threads = [threading.Thread(target=work) for _ in range(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ray_runner.close()
    counted = len(ends) - devices
    return 3600 * counted / (ends[-1] - ends[devices - 1]), (cpu[-1] - cpu[devices - 1]) / counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--train-seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3, help="runs a device (default 3)")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2 are needed, because the first one is not counted")
    print(f"{os.cpu_count()} processors, {args.train_seconds:g} s a run")
    print("devices  runs an hour  of the ideal  loop, CPU s each")
    for devices in args.devices:
        with tempfile.TemporaryDirectory() as folder:
            hourly, cpu = measure(Path(folder), devices, args.train_seconds, args.rounds)
        ideal = 3600 * devices / args.train_seconds
        print(f"{devices:7d}{hourly:14.0f}{hourly / ideal:14.1%}{cpu:17.3f}", flush=True)


if __name__ == "__main__":
    main()
