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
    ray_runner.LEFT_OUT_SECONDS = 5
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

        if not self.cluster:
            self.temporary = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))  # a socket's path is short
            (self.temporary / "ray").mkdir()
            os.environ["RAY_TMPDIR"] = str(self.temporary)
            self.cluster = Cluster()
        env = self.env | variables
        return self.cluster.add_node(num_gpus=gpus, num_cpus=1, env_vars=env, include_dashboard=False)

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
        wait_for(lambda: words in self.output.read_text() or self.loops[-1].poll() is not None, seconds=seconds)
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
    for name, value in (field.env | {"RAY_TMPDIR": ""}).items():
        monkeypatch.setenv(name, value)
    yield field
    field.end()


def wait_for(condition, seconds: float = 90.0):
    """As conftest's, which `drive` cannot import: it empties the environment of the loop's variables."""
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


def test_node_whose_scores_would_not_compare_is_told_why_and_what_to_do(field: Field):
    facts = machine.describe(DOMAIN, field.path, machine.variables_for_training("fake"))
    versions = ray_runner.installed_versions()
    session = ray_runner.Session(facts, DOMAIN, "mark", sys.executable, versions, None, None)
    assert ray_runner._misfit(session, facts) == ""
    for changes, told in (
        ({"device_name": "A100"}, "its device is A100, the baseline's H100: leave it out of this cluster"),
        ({"digest": "e" * 64}, f"other data in {field.cache}: digest eeeeeeeeeeee, the loop's is dddddddddddd: copy "),
    ):
        assert ray_runner._misfit(session, replace(facts, **changes)).startswith(told)
    older = replace(session, versions=versions | {"pytest": "1.0"})
    told = f"other packages: pytest {versions['pytest']} (the loop has 1.0): run 'uv sync --extra ray' of the same"
    assert ray_runner._misfit(older, facts).startswith(told)


@pytest.mark.slow
def test_loop_on_a_cluster_outlives_what_it_loses(field: Field):
    field.node(0)  # the loop's own node has no GPU
    first = field.node(1, NODE_API_KEY="withheld")
    (field.cache / "hold").touch()
    (field.cache / "daemon").write_text("yes")

    # A killed loop leaves no training, and the next one ends what hid.
    loop = field.loop(runs=9)
    pids = wait_for(lambda: len(field.training()) >= 2 and field.training())
    (daemon,) = (pid for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep"))
    loop.kill()
    wait_for(lambda: field.training() == [daemon], seconds=10)
    (field.cache / "daemon").unlink()
    loop = field.loop(workers=2, runs=999, SOME_API_KEY="withheld")
    (pid,) = wait_for(lambda: daemon not in field.training() and field.training())
    assert "Ray on" in field.hear("nodes 2, GPUs 1")

    # Its actor sees the node's variables, and the training none of them.
    actor = field.actor()
    assert b"withheld" in Path(f"/proc/{actor}/environ").read_bytes()
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    withheld = (b"RAY_", b"PYTHONPATH", b"OMP_")
    assert not [entry for entry in environ if b"withheld" in entry or entry.startswith(withheld)]

    # A lost actor's run is made again; so is a lost node's, on one that joined late.
    os.kill(actor, signal.SIGKILL)
    wait_for(lambda: pid not in field.training(), seconds=10)
    (again,) = wait_for(field.training)
    assert "was lost" in field.hear(first.node_id[:6])
    late_cache = field.folder / "late cache"
    late_cache.mkdir()
    (late_cache / "hold").touch()
    late = field.node(1, AUTORESEARCH_CACHE=str(late_cache))
    refusal = f"no data in {late_cache} (no manifest): run 'AUTORESEARCH_PROFILE=fake uv run prepare.py' there"
    said = field.hear(refusal)
    assert re.search(rf"node \S+ \([\d.]+, {late.node_id[:6]}\) is left out: {re.escape(refusal)}", said)
    (late_cache / "data").touch()  # it is asked again
    wait_for(lambda: len(field.training()) == 2)  # the second worker's
    field.cluster.remove_node(first, allow_graceful=False)
    wait_for(lambda: again not in field.training(), seconds=10)
    (late_cache / "hold").unlink()
    for number in (1, 2):
        said = field.hear(f"run {number}: ")
        assert re.search(rf"run {number}: .*1.25 .*on .*, {late.node_id[:6]}\)", said)
    assert said.count(refusal) == 1
    assert "val_bpb: 1.25" in (field.tag.folder(1) / "run.log").read_text()
    assert (field.tag.folder(2) / "result.json").exists()
    assert not (field.tag.folder(1) / "score.log").exists()

    # SIGTERM, which Ray has not taken from the loop, ends it and its runs.
    (late_cache / "hold").touch()
    wait_for(field.training)
    loop.terminate()
    said = field.hear("the end")
    assert said.count("stopped") == 2 and not field.training() and loop.wait() == 0

    # A cluster that goes away ends the loop with one line.
    address = field.cluster.address
    loop = field.loop(workers=2, runs=2)
    wait_for(field.training)
    field.cluster.shutdown()
    wait_for(lambda: not field.training(), seconds=10)
    said = field.hear("the end")
    assert f"error: Ray on {address} is gone: the same command goes on once it is back" in said
    assert loop.wait() == 0 and "Traceback" not in said and not field.of_ray()
    loop = field.loop(address=address)
    wait_for(lambda: loop.poll() is not None)
    told = f"UserError: no Ray cluster at {address}: nobody answers there; 'ray start --address={address}'"
    assert told in field.output.read_text()


@pytest.mark.slow
def test_ray_of_this_machine_is_the_loops_alone(field: Field):
    (field.cache / "hold").touch()
    field.env.pop("RAY_AUTH_MODE")
    os.environ.pop("RAY_AUTH_MODE")
    field.env["RAY_gcs_rpc_server_reconnect_timeout_s"] = "2"  # what a killed loop leaves of Ray ends after that
    (field.cache / "seconds").write_text("0.2")
    loop = field.loop(devices=2, workers=2, runs=999, address="")
    wait_for(lambda: len(field.training()) == 2)
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [line.split()[3] for line in listening for pid in field.of_ray() if f"pid={pid}," in line]
    assert ours and all("127.0.0.1" in address for address in ours), ours
    assert b"RAY_AUTH" not in Path(f"/proc/{field.training()[0]}/environ").read_bytes()
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in field.of_ray()]
    (folder,) = {found[0] for command in commands if (found := re.search(rb"/tmp/ar-\w+", command))}
    (field.cache / "hold").unlink()
    wait_for(lambda: field.output.read_text().count(" 1.25 ") >= 2)
    (field.cache / "hold").touch()
    wait_for(lambda: len(field.training()) == 2)
    loop.kill()
    wait_for(lambda: not field.training(), seconds=10)
    said = field.output.read_text()
    assert "Ray on this machine: nodes 1, GPUs 2" in said
    assert [line for line in said.splitlines() if not re.match(r"run \d|Ray on", line)] == []
    wait_for(lambda: not field.of_ray())  # what the killed loop left of Ray
    shutil.rmtree(folder)
