"""RayRunner on Ray of this machine and on clusters of fake nodes with fake GPUs, which lose workers and nodes, and go
away. Ray, its processes and the runner are the real ones; evaluator and training are stand-ins, and so is the loop
(`drive`).
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness import machine, ray_runner
from harness.console import UserError
from harness.domain import Domain
from harness.ledger import Run
from harness.processes import find_processes, sweep
from harness.ray_runner import RayRunner, check_ray
from harness.repository import Repository
from harness.runner import Job, Stopped
from harness.tag import Tag

PREPARE = """
import json, os, pathlib, sys
CACHE = pathlib.Path(os.environ["AUTORESEARCH_CACHE"])  # what this node is like stands in files there
def text(name, default):
    return (CACHE / name).read_text() if (CACHE / name).exists() else default
def describe():
    prepared = (CACHE / "data").exists()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    return {
        "profile": "fake", "reason": "test", "time_budget": 60, "cache": str(CACHE), "prepared": prepared,
        "problem": None if prepared else "no manifest", "digest": text("digest", "d" * 64), "rows": {"val": 7},
        "device": "cuda", "device_name": text("device", "H100"),
        "devices": {name: {"lock": str(CACHE / name), "free_gb": 9.0} for name in names}, "prepare_sha256": "p",
    }
if __name__ == "__main__":
    print(json.dumps(describe()))
"""
TRAIN = """
import json, os, pathlib, subprocess, sys, time
import prepare
result = os.environ["AUTORESEARCH_RESULT"]
pathlib.Path(result + ".started").touch()
if prepare.text("daemon", ""):  # it hides a process: only the mark tells whose it is
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
time.sleep(float(prepare.text("seconds", "0")))
while (prepare.CACHE / "hold").exists():  # a test wants to meet it here
    time.sleep(0.02)
pathlib.Path(result + ".stopped").touch()
record = {
    "val_bpb": 1.25, "profile": "fake", "split": "val", "seed": int(os.environ["AUTORESEARCH_SEED"]), "rows": 7,
    "training_seconds": 60, "digest": "d" * 64, "device_name": "H100", "prepare_sha256": "p",
}
pathlib.Path(result).write_text(json.dumps(record))
print("---\\nval_bpb: 1.250000\\npeak_vram_mb: 512.0")
"""
pytestmark = pytest.mark.xdist_group("ray")  # one cluster after another: two cores carry no more
DOMAIN = Domain(
    metric="val_bpb", test_metric="", lower_is_better=True, unit="bpb", score_name="bits", score_range=(0.01, 100),
    editable="train.py", instructions="program.md", describe_command=(sys.executable, "prepare.py"),
    prepare_command=(), train_command=(sys.executable, "train.py"), score_command=(), verify_hint="", split="val",
    same_in_every_run=(), assumed_sigma={},
)  # fmt: skip
OF_RAY = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def make_job(tag: Tag, facts, number: int) -> Job:
    tag.folder(number).mkdir(parents=True, exist_ok=True)
    return Job(Run(number, "c" * 40, seed=40 + number), tag.repository.archive(tag.champion), facts, DOMAIN)


def drive(path: str, address: str, devices: int, workers: int, runs: int) -> None:
    """Stands in for the loop, in a process of its own: threads that make runs and print them, until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    tag = Tag(Repository(Path(path), "train.py", "program.md"), "t", DOMAIN)
    facts = machine.describe(DOMAIN, Path(path), machine.variables_for_training("fake"))
    facts = replace(facts, devices={str(number): facts.devices["0"] | {"lock": ""} for number in range(devices)})
    numbers = iter(range(1, runs + 1))
    runner = RayRunner(tag, facts, workers, address, stop)

    def work() -> None:
        try:
            for number in numbers:
                with runner.device() as device:
                    run = runner.measure(make_job(tag, facts, number), device)
                print(f"run {number}: {run.status} {run.score} {run.reason} on {run.node}", flush=True)
        except Stopped:
            print("stopped", flush=True)
        except UserError as error:
            print(f"error: {error}", flush=True)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # a signal reaches a main thread that does not wait for ever
            thread.join(0.1)
    runner.close()
    print("the end", flush=True)


class Field:
    """A checkout, its cache, a cluster where one is asked for, and the hands of a test."""

    def __init__(self, folder: Path):
        self.path = folder / "checkout"
        self.cache = folder / "cache"
        self.env = OF_RAY | {"RAY_AUTH_MODE": "disabled", "AUTORESEARCH_CACHE": str(self.cache)}
        self.folder = folder
        self.cluster = None
        self.loops: list[subprocess.Popen] = []
        for path in (self.path, self.cache):
            path.mkdir()
        (self.path / "prepare.py").write_text(PREPARE)
        (self.path / "train.py").write_text(TRAIN)
        (self.path / "program.md").write_text("Lower it.\n")
        (self.cache / "data").touch()
        for command in ("init -q -b main", "add -A", "-c user.name=p -c user.email=p@localhost commit -q -m start"):
            subprocess.run(["git", *command.split()], cwd=self.path, check=True)
        self.tag = Tag(Repository(self.path, "train.py", "program.md"), "t", DOMAIN)

    def node(self, gpus: int, **variables: str):
        """One more node, with an environment of its own."""
        from ray.cluster_utils import Cluster

        Path("/tmp/ray").mkdir(exist_ok=True)  # where Ray notes the newest cluster, whatever temp_dir says
        self.cluster = self.cluster or Cluster()
        self.temporary = getattr(self, "temporary", None) or tempfile.mkdtemp(prefix="rt-", dir="/tmp")
        return self.cluster.add_node(
            num_gpus=gpus, num_cpus=1, env_vars=self.env | variables, include_dashboard=False, temp_dir=self.temporary
        )

    def other_cache(self, name: str, **files: str) -> Path:
        cache = self.folder / name
        cache.mkdir()
        for file, text in files.items():
            (cache / file).write_text(text)
        return cache

    def loop(self, *, devices: int = 1, workers: int = 1, runs: int = 1, address: str | None = None, **variables: str):
        """Start `drive`, on the cluster unless an address is given."""
        address = self.cluster.address if address is None else address
        call = f"{str(self.path)!r}, {address!r}, {devices}, {workers}, {runs}"
        here = Path(__file__).parent
        code = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]; import test_ray_runner"
        code += f"; test_ray_runner.drive({call})"
        self.output = self.folder / f"loop{len(self.loops)}.log"
        with open(self.output, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=self.path,
                env=os.environ | self.env | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.loops.append(process)
        return process

    def hear(self, words: str, seconds: float = 90.0) -> str:
        """Wait until the newest loop has said this; all that it has said."""
        wait_for(lambda: words in self.output.read_text() or self.loops[-1].poll() is not None, seconds)
        text = self.output.read_text()
        assert words in text, text
        return text

    def training(self) -> list[int]:
        """Ids of the processes of runs."""
        pattern = re.escape(f"AUTORESEARCH_MARK={self.tag.mark}:").encode() + rb"[^\0]*run:"
        return sorted(find_processes("environ", pattern))

    def of_ray(self) -> list[int]:
        """Ids of whatever runs with this field's cache: Ray's processes and the loop."""
        return sorted(find_processes("environ", re.escape(f"AUTORESEARCH_CACHE={self.folder}/").encode()))

    def actor(self) -> int:
        (pid,) = find_processes("cmdline", rb"^ray::Actor") & set(self.of_ray())
        return pid

    def end(self) -> None:
        for loop in self.loops:
            loop.kill()
            loop.wait()
        if self.cluster:
            self.cluster.shutdown()
            shutil.rmtree(self.temporary, ignore_errors=True)
        sweep(self.tag.mark)


@pytest.fixture
def field(tmp_path: Path, monkeypatch):
    field = Field(tmp_path)
    for name, value in field.env.items():
        monkeypatch.setenv(name, value)
    yield field
    field.end()


def wait_for(condition, seconds: float = 90.0):
    """Poll until the condition is true; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.02)
    return value


def test_missing_extra_is_refused_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["loop.py", "--agent", "random", "--workers", "4"])
    with pytest.raises(UserError) as refused:
        check_ray(4, "")
    command = "uv run --extra ray loop.py --agent random --workers 4"
    assert (str(refused.value), refused.value.code) == (
        f"--workers 4 needs Ray, which is not installed: '{command}'",
        2,
    )
    with pytest.raises(UserError, match="--ray here:6379 needs Ray"):
        check_ray(1, "here:6379")


@pytest.mark.slow
def test_lost_actor_and_node_make_the_run_again_and_a_late_node_is_used(field: Field):
    field.node(0)  # the loop's own node has no GPU
    first = field.node(1, NODE_API_KEY="withheld")
    (field.cache / "hold").touch()
    field.loop(workers=2, runs=2, SOME_API_KEY="withheld")
    (pid,) = wait_for(field.training)
    assert "Ray on" in field.hear("nodes 2, GPUs 1")
    actor = field.actor()
    assert b"withheld" in Path(f"/proc/{actor}/environ").read_bytes()
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert not [
        entry for entry in environ if b"withheld" in entry or entry.startswith((b"RAY_", b"PYTHONPATH", b"OMP_"))
    ]

    os.kill(actor, signal.SIGKILL)
    wait_for(lambda: pid not in field.training(), 10)
    (again,) = wait_for(field.training)
    assert "was lost" in field.hear(first.node_id[:6])

    late = field.node(1)
    wait_for(lambda: len(field.training()) == 2)  # the second worker's
    field.cluster.remove_node(first, allow_graceful=False)
    wait_for(lambda: again not in field.training(), 10)
    (field.cache / "hold").unlink()
    said = field.hear("the end")
    assert sorted(re.findall(r"run (\d): .*1.25 .*on .*, (\w{6})\)", said)) == [
        ("1", late.node_id[:6]),
        ("2", late.node_id[:6]),
    ]
    assert "val_bpb: 1.25" in (field.tag.folder(1) / "run.log").read_text()
    assert (field.tag.folder(2) / "result.json").exists()
    assert not (field.tag.folder(1) / "score.log").exists()


@pytest.mark.slow
def test_unfit_nodes_are_left_out_and_told_once_and_asked_again(field: Field, monkeypatch, capfd):
    def package(version: str) -> str:
        folder = field.folder / f"site{version}"
        (folder / f"faked-{version}.dist-info").mkdir(parents=True)
        (folder / f"faked-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: faked\nVersion: {version}\n"
        )
        return str(folder)

    monkeypatch.syspath_prepend(package("1.0"))
    caches = {
        "other data": field.other_cache("other-data", data="", digest="e" * 64),
        "other device": field.other_cache("other-device", data="", device="A100"),
        "no data": field.other_cache("no-data"),
    }
    nodes = {name: field.node(1, AUTORESEARCH_CACHE=str(cache)) for name, cache in caches.items()}
    nodes["other packages"] = field.node(1, PYTHONPATH=package("2.0"))
    reasons = {
        "no data": f"no data in {caches['no data']} (no manifest): run 'AUTORESEARCH_PROFILE=fake uv run prepare.py'",
        "other device": "its device is A100, the baseline's H100: leave it out of this cluster",
        "other data": f"other data in {caches['other data']}: digest eeeeeeeeeeee, the loop's is dddddddddddd: copy",
        "other packages": "other packages: faked 2.0 (the loop has 1.0): run 'uv sync --extra ray' of the same commit",
    }
    monkeypatch.setattr(ray_runner, "LEFT_OUT_SECONDS", 15)
    facts = machine.describe(DOMAIN, field.path, machine.variables_for_training("fake"))
    stop = threading.Event()
    said = ""

    def has_said(words: str) -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return words in said

    runner = RayRunner(field.tag, facts, 2, field.cluster.address, stop)
    try:
        for name, reason in reasons.items():
            wait_for(lambda reason=reason: has_said(reason))
            assert re.search(rf"node \S+ \([\d.]+, {nodes[name].node_id[:6]}\) is left out: {re.escape(reason)}", said)
        assert not runner.devices
        (caches["no data"] / "data").touch()
        with runner.device() as device:
            run = runner.measure(make_job(field.tag, facts, 1), device)
        assert (run.score, run.status) == (1.25, "") and nodes["no data"].node_id[:6] in run.node
        # Its data goes while it is in use: the run waits for a place, and is no crash.
        (caches["no data"] / "data").unlink()
        (caches["other device"] / "device").unlink()
        with runner.device() as device:
            run = runner.measure(make_job(field.tag, facts, 2), device)
        assert run.status == "" and (
            nodes["other device"].node_id[:6] in run.node or nodes["no data"].node_id[:6] in run.node
        )
        has_said("")
        assert all(said.count(reason) == 1 for reason in reasons.values()), said
    finally:
        stop.set()
        runner.close()


@pytest.mark.slow
def test_killed_loop_leaves_no_training_and_the_next_run_ends_what_hid(field: Field):
    field.node(2)
    (field.cache / "hold").touch()
    (field.cache / "daemon").write_text("yes")
    loop = field.loop(workers=2, runs=9)
    pids = wait_for(lambda: len(field.training()) >= 4 and field.training())
    daemons = {pid for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep")}
    assert len(daemons) == 2
    loop.kill()
    wait_for(lambda: set(field.training()) == daemons, 10)
    (field.cache / "daemon").unlink()

    loop = field.loop(workers=2, runs=9)
    wait_for(lambda: len(field.training()) == 2 and not daemons & set(field.training()))
    loop.terminate()  # Ray has not taken the signal from the loop
    said = field.hear("the end")
    assert said.count("stopped") == 2 and not field.training() and loop.wait() == 0


@pytest.mark.slow
def test_cluster_that_goes_away_ends_the_loop_with_one_line(field: Field):
    field.node(1)
    (field.cache / "hold").touch()
    address = field.cluster.address
    loop = field.loop(workers=2, runs=2)
    wait_for(field.training)
    field.cluster.shutdown()
    wait_for(lambda: not field.training(), 10)
    said = field.hear("the end")
    assert f"error: Ray on {address} is gone: the same command goes on once it is back" in said
    assert loop.wait() == 0 and "Traceback" not in said and not field.of_ray()

    loop = field.loop(address=address)
    wait_for(lambda: loop.poll() is not None)
    assert (
        f"UserError: no Ray cluster at {address}: nobody answers there; 'ray start --address={address}'"
        in field.output.read_text()
    )


@pytest.mark.slow
def test_ray_of_this_machine_is_the_loops_alone(field: Field):
    (field.cache / "hold").touch()
    field.env.pop("RAY_AUTH_MODE")
    os.environ.pop("RAY_AUTH_MODE")
    loop = field.loop(devices=2, workers=2, runs=3, address="")
    wait_for(lambda: len(field.training()) == 2)
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [line.split()[3] for line in listening for pid in field.of_ray() if f"pid={pid}," in line]
    assert ours and all("127.0.0.1" in address for address in ours), ours
    assert b"RAY_AUTH" not in Path(f"/proc/{field.training()[0]}/environ").read_bytes()
    (folder,) = {
        found[0]
        for pid in field.of_ray()
        if (found := re.search(rb"/tmp/ar-\w+", Path(f"/proc/{pid}/cmdline").read_bytes()))
    }
    loop.kill()
    wait_for(lambda: not field.training(), 10)

    (field.cache / "hold").unlink()
    field.loop(devices=2, workers=2, runs=3, address="")
    said = field.hear("the end")
    assert "Ray on this machine: nodes 1, GPUs 2" in said and said.count(" 1.25 ") == 3
    assert [line for line in said.splitlines() if not re.match(r"run \d|Ray on|the end", line)] == []
    wait_for(lambda: not field.of_ray())  # what the killed loop left of Ray too
    shutil.rmtree(folder)
