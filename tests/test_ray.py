"""Many devices on one ratchet: Ray on this machine, and clusters of fake nodes with fake GPUs, which lose workers and
nodes, and go away. loop.py, Ray and its processes are the real ones; the judge and the training are stand-ins.
"""

import fcntl
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, Desk, ended, errors, hear, start_piped, wait_for

from harness import environment, ray_driver, ray_fleet, ray_node
from harness.bench import Crash, Job, Unavailable
from harness.contract import Description, Device
from harness.processes import find_processes
from harness.screen import UserError
from loop import DOMAIN

IDEAS = 'knob("LR", 0.2 + count() / 100)'  # for Desk.agent: proposals that are worse, each another
OF_RAY = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


GPUS = """\
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")
    devices = {name: {"lock": str(CACHE / name), "free_gb": 9.0} for name in names}"""
OF_THE_CACHE = """

def digest():
    path = CACHE / "digest"
    return path.read_text() if path.exists() else "d" * 64

def device_name():
    path = CACHE / "device"
    return path.read_text() if path.exists() else "cpu"
"""


class FakeCluster:
    """Ray nodes on this machine. One call of `add` is one node, with an environment of its own."""

    def __init__(self, desk: Desk):
        from ray.cluster_utils import Cluster

        self.desk = desk
        self.folder = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # Ray's sockets need short paths
        self.cluster = Cluster()

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, gpus: int, port: int | None = None, **variables: str):
        variables = self.desk.env | variables
        for name in [name for name in os.environ if name.startswith("AUTORESEARCH_")]:
            variables.setdefault(name, "")
        options = {"gcs_server_port": port} if port else {}
        return self.cluster.add_node(
            num_gpus=gpus, num_cpus=2, env_vars=variables, include_dashboard=False, temp_dir=self.folder, **options
        )

    def end(self) -> None:
        self.cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def gpu_desk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk whose stand-in judge names GPUs; digest and name of the device come from files of the cache."""
    desk.replace("prepare.py", '"device": "cpu"', '"device": "cuda"')
    desk.replace("prepare.py", '"device_name": "cpu", "devices"', '"device_name": device_name(), "devices"')
    text, count = re.subn(r"    devices = .*", GPUS, (desk.path / "prepare.py").read_text())
    assert count == 1
    assert '"d" * 64' in text
    (desk.path / "prepare.py").write_text(text.replace('"d" * 64', "digest()") + OF_THE_CACHE)
    desk.set_constant("harness/ray_driver.py", "REST_SECONDS", "3")
    desk.set_constant("harness/ray_driver.py", "LOSS_REST_SECONDS", "1")
    desk.set_constant("harness/ray_fleet.py", "RETRY_SECONDS", "0.5")
    desk.commit("GPUs")
    for name, value in OF_RAY.items():
        monkeypatch.setenv(name, value)
        desk.env[name] = value
    return desk


@pytest.fixture
def fakes(gpu_desk: Desk):
    fakes = FakeCluster(gpu_desk)
    yield fakes
    fakes.end()


def training(desk: Desk, number: int | None = None, tag: str = "t") -> list[int]:
    """Ids of the processes of runs, of one or of all."""
    suffix = f":{number}\0" if number else ""
    pattern = re.escape(f"AUTORESEARCH_MARK={desk.home(tag)}:run:").encode() + rb"[0-9a-f]+" + suffix.encode()
    return sorted(find_processes("environ", rb"(^|\0)" + pattern))


def of_ray(desk: Desk) -> list[int]:
    """Ids of whatever runs of a session's Ray and its driver."""
    return sorted(find_processes("environ", rb"(^|\0)" + re.escape(f"AUTORESEARCH_CACHE={desk.cache}".encode())))


def workers(desk: Desk) -> list[int]:
    """Ids of the Ray workers that hold a job of this desk now; other tests have theirs beside it."""
    return sorted(find_processes("cmdline", rb"^ray::carry_out") & set(of_ray(desk)))


def name_of(node) -> str:
    """As the loop calls it."""
    return f"{socket.gethostname()} ({node.node_ip_address}, {node.node_id[:6]})"


def test_more_workers_without_the_extra_are_refused_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["loop.py", "--agent", "random", "--workers", "4"])
    with pytest.raises(UserError) as refused:
        ray_fleet.check_extra(4, "")
    command = "uv run --extra ray loop.py --agent random --workers 4"
    assert str(refused.value) == f"--workers 4 needs Ray, which is not installed: '{command}'"
    assert refused.value.code == 2
    ray_fleet.check_extra(1, "")
    ray_fleet.check_extra(4, "off")
    with pytest.raises(UserError, match="--ray here:6379 needs Ray"):
        ray_fleet.check_extra(1, "here:6379")


FACTS = Description(
    profile="fake", reason="test", time_budget=1.0, cache="/cache", prepared=True, problem=None, digest="d" * 64,
    rows={}, files={}, device="cuda", device_name="H100", devices={"0": Device("/lock", 9.0)}, prepare_sha256="p",
)  # fmt: skip


def test_node_whose_scores_would_not_compare_is_told_why():
    job = Job(1, "c" * 40, "idea", 42, (), FACTS, DOMAIN, time_limit=1.0)
    errand = ray_node.Errand(job, "mark", "session", sys.executable, ray_node.installed_versions(), {})
    assert ray_node._differs(errand, FACTS) == ""
    empty = replace(FACTS, prepared=False, problem="no manifest", digest=None)
    told = "no data in /cache (no manifest): run 'AUTORESEARCH_PROFILE=fake uv run prepare.py' there"
    assert ray_node._differs(errand, empty) == told
    told = "its device is A100, the baseline's H100: leave it out of this cluster"
    assert ray_node._differs(errand, replace(FACTS, device_name="A100")) == told
    told = "other data in /cache: digest eeeeeeeeeeee, the loop's is dddddddddddd: copy "
    assert ray_node._differs(errand, replace(FACTS, digest="e" * 64)).startswith(told)
    older = replace(errand, versions={**errand.versions, "torch": "1.0", "of-the-loop-alone": "1"})
    told = f"other packages: torch {errand.versions['torch']} (the loop has 1.0): run 'uv sync --extra ray'"
    assert ray_node._differs(older, FACTS).startswith(told)
    assert ray_node._refusal(Unavailable("its disk is full")) == "its disk is full"
    for own_fault in (Unavailable("another kernel", retries=1), Crash("boom", "", 1.0)):
        assert ray_node._refusal(own_fault) == ""


def test_node_holds_every_run_of_a_session_against_what_its_first_met(tmp_path, monkeypatch):
    shard = tmp_path / "tokens" / "shard_00001.tokens"
    shard.parent.mkdir()
    shard.write_bytes(b"text")
    monkeypatch.setattr(ray_node, "_own_folder", lambda: tmp_path)
    places = []
    monkeypatch.setattr(ray_node, "measure", lambda job, place, stop: places.append(place))
    facts = replace(FACTS, cache=str(tmp_path), files={"tokens/validation.tokens": "d" * 64})
    job = Job(1, "c" * 40, "idea", 42, (), facts, DOMAIN, time_limit=1.0)
    for session in ("one", "one", "two"):
        folder = tmp_path / f"run{len(places)}"
        folder.mkdir()
        errand = ray_node.Errand(job, "mark", session, sys.executable, {}, {})
        ray_node._measure(errand, job, "0", folder, threading.Event())
        shard.write_bytes(b"another text")  # by the run
    first, second, other_session = (place.data for place in places)
    assert second == first != other_session
    changed = environment.changed_training_data(second, environment.look_at_data(facts), facts)
    assert changed == str(shard)
    assert places[0].packages.difference(places[1].packages) == ""


@pytest.fixture
def driver(monkeypatch) -> ray_driver.Driver:
    """The driver without Ray: what it tells is in `said`, what it sends stays on its node."""
    said = []
    ray = SimpleNamespace(remote=lambda **_: lambda function: function)
    driver = ray_driver.Driver(ray, {"takes_gpu": False, "known": {}}, lambda *message: said.append(message))
    driver.said = said
    driver.send = lambda flight, node_id, node: node.running.update({flight.number: ""})
    return driver


def test_job_goes_to_the_freest_node_and_made_again_to_one_that_has_not_had_it(driver):
    driver.nodes = {"a": ray_driver.Node("a", 4, 0, {"cpu0": b"", "cpu1": b""}), "b": ray_driver.Node("b", 4, 0)}
    assert [driver.slots(node) for node in driver.nodes.values()] == [2, 1]  # b has not told its devices yet
    assert driver.slots(ray_driver.Node("c", 0.5, 4)) == 0
    driver.waiting.extend(ray_driver.Flight(number, b"", "") for number in (1, 2, 3, 4))
    driver.place()
    assert {name: list(node.running) for name, node in driver.nodes.items()} == {"a": [1, 2], "b": [3]}
    assert [flight.number for flight in driver.waiting] == [4] and not driver.said
    driver.waiting.clear()
    driver.nodes["a"].running.clear()
    driver.nodes["b"].running.clear()
    driver.waiting.append(ray_driver.Flight(1, b"", ""))
    driver.place()
    assert list(driver.nodes["b"].running) == [1]
    for node in driver.nodes.values():
        node.rests_until = time.monotonic() + 60
    driver.waiting.append(ray_driver.Flight(5, b"", ""))
    driver.place()
    assert driver.said == [("lost", 5, "no node of the cluster has a CPU", False)] and driver.slots_in_all() == 0


def test_refusal_of_a_node_sends_the_job_elsewhere_and_the_only_nodes_goes_to_the_loop(driver):
    node = ray_driver.Node("a", 4, 0, {"cpu0": b"old"})
    driver.nodes = {"a": node}
    flight = ray_driver.Flight(1, b"", "", "a")
    reply = {"answer": b"its disk is full", "refused": "its disk is full", "busy": "", "known": {}}
    driver.take_reply(flight, node, reply)
    assert driver.said == [("done", 1, b"its disk is full")] and not node.is_resting()
    driver.nodes["b"] = ray_driver.Node("b", 4, 0)
    for _ in range(2):
        driver.take_reply(flight, node, reply)
    assert driver.said[1:] == [("say", "node a is left out: its disk is full")]  # once
    assert node.is_resting() and node.known == {} and [one.number for one in driver.waiting] == [1, 1]


def test_gpu_that_somebody_else_uses_rests_and_its_node_does_not(driver):
    node = ray_driver.Node("a", 4, 2)
    driver.nodes = {"a": node}
    driver.takes_gpu = True
    held = []
    driver.submit = lambda task, device, seconds, **share: held.append((device, share["node"])) or len(held)
    reply = {"answer": b"", "refused": "another run holds 0", "busy": "0", "known": {}}
    driver.take_reply(ray_driver.Flight(1, b"", "", "a"), node, reply)
    assert held == [("0", "a")] and not node.is_resting() and driver.slots_in_all() == 1
    assert driver.said == [("lost", 1, "node a: another run holds 0", False)]
    driver.ray.nodes = lambda: [{"NodeID": "a", "Alive": True}]
    driver.ray.wait = lambda references, **_: (references, [])
    driver.look_at_nodes()
    assert driver.slots_in_all() == 2 and not driver.holds


def test_run_that_loses_three_workers_is_a_crash_and_no_more_run_than_was_asked_for(monkeypatch):
    fleet = ray_fleet.RayFleet.__new__(ray_fleet.RayFleet)
    fleet._losses, fleet._places, fleet._flying, fleet._lock = {}, {}, {}, threading.Lock()
    outcomes = []
    for is_worker in (True, False, True, True):
        fleet._flying[7] = future = Future()
        fleet._take_loss(7, "gone", is_worker)
        outcomes.append(future.result())
    assert outcomes == [Unavailable("gone")] * 3 + [Crash("gone, the 3rd time", "", 0.0)]
    fleet._workers = 2
    for fleet._slots, capacity in ((0, 0), (1, 1), (5, 2)):
        assert fleet.capacity == capacity
    for name in ("MY_API_KEY", "PYTHONPATH"):
        monkeypatch.setenv(name, "withheld")
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    for variables in (ray_fleet._variables(""), ray_fleet._variables("x")):
        assert "withheld" not in variables.values()
        assert variables["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert ray_fleet._variables("")["RAY_AUTH_MODE"] == "token"
    assert ray_fleet._variables("")["RAY_AUTH_TOKEN"] != ray_fleet._variables("")["RAY_AUTH_TOKEN"]


def test_session_on_this_machine_ends_with_its_loop_and_goes_on(desk: Desk):
    desk.hold.touch()
    tag = "a-tag-whose-name-is-too-long-for-the-path-of-a-socket-below-it"
    args = ("--tag", tag, "--agent-cmd", desk.agent(IDEAS), "--max-experiments", "3", "--workers", "4", "--ray", "")
    process = desk.popen(*args, SOME_API_KEY="secret")
    (pid,) = wait_for(lambda: training(desk, 1, tag), 60)
    assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [line.split()[3] for line in listening for owner in of_ray(desk) if f"pid={owner}," in line]
    assert ours
    assert all("127.0.0.1" in address for address in ours), ours

    process.kill()
    wait_for(lambda: not training(desk, tag=tag), 10)
    wait_for(lambda: not of_ray(desk), 10)
    process.communicate()
    desk.hold.unlink()
    done = desk.loop(*args, timeout=90)
    assert "Ray on this machine: 1 node, 4 devices" in done.stderr
    assert desk.statuses(tag) == ["keep"] + ["discard"] * 3
    assert "val_bpb:" in (desk.home(tag) / "runs" / "0003" / "run.log").read_text()
    assert not of_ray(desk)
    assert list((desk.home(tag) / "ray").glob("session_*"))


@pytest.mark.slow
def test_lost_workers_and_nodes_and_unfit_ones_cost_no_row(gpu_desk: Desk, fakes: FakeCluster, tmp_path: Path):
    desk = gpu_desk
    caches = {name: tmp_path / name for name in ("other data", "other device", "no data")}
    prepare = [sys.executable, "prepare.py"]
    for name in ("other data", "other device"):
        subprocess.run(prepare, cwd=desk.path, env=desk.env | {"AUTORESEARCH_CACHE": str(caches[name])}, check=True)
    (caches["other data"] / "digest").write_text("e" * 64)
    (caches["other device"] / "device").write_text("A100")
    fakes.add(0)  # the loop's own node has no GPU
    leaving = fakes.add(1, NODE_API_KEY="withheld", RAY_AUTH_TOKEN="withheld")
    # The unfit ones have the most room, so they are asked first.
    unfit = {name: fakes.add(2 + place, AUTORESEARCH_CACHE=str(caches[name])) for place, name in enumerate(caches)}
    desk.hold.touch()
    args = ("--tag", "t", "--agent-cmd", desk.agent(IDEAS), "--max-experiments", "4", "--workers", "3")
    process = desk.popen(*args, "--ray", fakes.address)

    reasons = {
        "no data": f"no data in {caches['no data']} (no manifest): run 'AUTORESEARCH_PROFILE=fake uv run prepare.py'",
        "other device": "its device is A100, the baseline's cpu: leave it out of this cluster",
        "other data": "digest eeeeeeeeeeee, the loop's is dddddddddddd: copy",
    }
    for name, reason in reasons.items():
        told = hear(process, "is left out", 60)
        assert unfit[name].node_id[:6] in told
        assert reason in told
    wait_for(lambda: training(desk, 1), 60)
    (worker,) = wait_for(lambda: workers(desk))
    assert b"withheld" in Path(f"/proc/{worker}/environ").read_bytes()
    for pid in training(desk, 1):
        assert b"withheld" not in Path(f"/proc/{pid}/environ").read_bytes()
    os.kill(worker, signal.SIGKILL)
    assert leaving.node_id[:6] in hear(process, "was lost")
    wait_for(lambda: not training(desk), 10)
    on_the_leaving = wait_for(lambda: training(desk, 1), 60)
    assert re.search(r"run 0001 baseline on \S+ \(", desk.loop("status", "--tag", "t").stdout)

    late = fakes.add(2)
    fakes.cluster.remove_node(leaving, allow_graceful=False)
    wait_for(lambda: not set(on_the_leaving) & set(training(desk)), 10)
    wait_for(lambda: f"baseline on {name_of(late)}" in str(desk.events()), 60)
    desk.hold.unlink()
    done = ended(process, timeout=90)
    assert desk.statuses() == ["keep"] + ["discard"] * 4
    assert len({row[4] for row in desk.rows()}) == 5
    assert "is left out" not in done.stderr, "the same node is not told twice"


@pytest.mark.slow
def test_killed_loop_and_driver_leave_no_training_and_the_restart_goes_on(gpu_desk: Desk, fakes: FakeCluster):
    desk = gpu_desk
    fakes.add(1)
    fakes.add(2)
    args = ("--tag", "t", "--agent-cmd", desk.agent(IDEAS), "--workers", "3", "--ray", fakes.address)
    process = desk.popen(*args, "--max-experiments", "40")
    wait_for(lambda: (desk.home() / "results.tsv").exists() and len(desk.rows()) >= 3, 60)
    desk.hold.touch()
    wait_for(lambda: len(training(desk)) == 3, 30)
    before = desk.rows()
    (driver,) = find_processes("cmdline", re.escape(str(desk.path / "harness" / "ray_driver.py").encode()))
    process.kill()
    os.kill(driver, signal.SIGKILL)
    killed_at = time.monotonic()
    wait_for(lambda: not training(desk), 10)
    assert time.monotonic() - killed_at < 10
    process.communicate()
    desk.hold.unlink()
    done = desk.loop(*args, "--max-experiments", "2", timeout=90)
    assert not errors(done)
    rows = desk.rows()
    assert rows[: len(before)] == before
    assert len(rows) == len(before) + 2
    assert len({row[0] for row in rows}) == len(rows)


@pytest.mark.slow
def test_ctrl_c_lets_runs_end_once_and_ends_them_twice(gpu_desk: Desk, fakes: FakeCluster):
    desk = gpu_desk
    fakes.add(2)
    args = ("--tag", "t", "--agent-cmd", desk.agent(IDEAS), "--workers", "2", "--ray", fakes.address)
    for presses in (1, 2):
        rows = len(desk.rows()) if presses == 2 else 0
        desk.hold.touch()
        process = desk.popen(*args)
        if presses == 1:
            wait_for(lambda: training(desk, 1), 60)
            desk.hold.unlink()
            wait_for(lambda: len(desk.rows()) >= 3, 60)
            desk.hold.touch()
        wait_for(lambda: len(training(desk)) == 2, 60)
        process.send_signal(signal.SIGINT)
        hear(process, "finishing what runs")
        if presses == 1:
            rows = len(desk.rows())
            desk.hold.unlink()
            done = ended(process, timeout=60)
            assert len(desk.rows()) == rows + 2
        else:
            process.send_signal(signal.SIGINT)
            done = ended(process, timeout=30)
            assert "what was in flight is dropped" in done.stderr
            assert len(desk.rows()) == rows
        assert not training(desk)


@pytest.mark.slow
def test_cluster_that_goes_away_is_waited_for_and_said_once(gpu_desk: Desk, fakes: FakeCluster):
    desk = gpu_desk
    desk.env["RAY_gcs_rpc_server_reconnect_timeout_s"] = "2"
    fakes.add(1)
    desk.hold.touch()
    port = fakes.address.rpartition(":")[2]
    args = ("--tag", "t", "--agent-cmd", desk.agent(IDEAS), "--workers", "1", "--max-experiments", "2")
    process = desk.popen(*args, "--ray", fakes.address)
    wait_for(lambda: training(desk, 1), 60)
    fakes.cluster.shutdown()
    hear(process, "waiting: Ray on", 60)
    wait_for(lambda: not training(desk), 10)
    time.sleep(3)  # in which it looks for the cluster several times
    status = desk.loop("status", "--tag", "t").stdout
    assert "autoresearch/t: waiting: " in status
    desk.hold.unlink()
    again = FakeCluster(desk)
    try:
        again.add(1, port=int(port))
        done = ended(process, timeout=90)
    finally:
        again.end()
    assert "is back: 1 node, 1 device" in done.stderr
    assert "waiting: Ray" not in done.stderr
    assert desk.statuses() == ["keep", "discard", "discard"]


@pytest.mark.slow
def test_node_with_a_full_disk_is_left_out(gpu_desk: Desk, fakes: FakeCluster, tmp_path: Path):
    desk = gpu_desk
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(small)], capture_output=True)
    if mount.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        fakes.add(0)
        full = fakes.add(2, TMPDIR=str(small))
        fakes.add(1)
        args = ("--tag", "t", "--agent-cmd", desk.agent(IDEAS), "--workers", "1", "--max-experiments", "2")
        done = desk.loop(*args, "--ray", fakes.address, timeout=90)
        (told,) = [line for line in done.stderr.splitlines() if "is left out" in line]
        assert full.node_id[:6] in told
        assert "0.0 GB free on the disk of" in told
        assert desk.statuses() == ["keep", "discard", "discard"]
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.slow
def test_no_cluster_at_an_address_is_one_line(gpu_desk: Desk):
    done = gpu_desk.loop("--agent", "random", "--tag", "t", "--ray", "127.0.0.1:9", code=1, timeout=120)
    (error,) = errors(done)
    assert error.startswith("error: no Ray cluster at 127.0.0.1:9: ") and "did not start within" not in error


@pytest.mark.slow
def test_run_that_kills_what_measures_it_is_a_crash_and_a_gpu_held_by_others_rests_alone(
    gpu_desk: Desk, fakes: FakeCluster
):
    desk = gpu_desk
    desk.set_constant("harness/ray_driver.py", "BUSY_REST_SECONDS", "600")
    desk.commit("a longer rest")
    fakes.add(2)
    agent = """
        killer = "os.kill(os.getppid(), 9); time.sleep(60)\\n"
        text = pathlib.Path("train.py").read_text().replace(killer, "")  # a crash is mended from where it stands
        number = count()
        pathlib.Path("train.py").write_text(text + killer if number == 1 else text)
        knob("LR", 0.2 + number / 100)
    """
    with open(desk.cache / "0", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        args = ("--tag", "t", "--agent-cmd", desk.agent(agent), "--max-experiments", "3", "--workers", "1")
        done = desk.loop(*args, "--ray", fakes.address, timeout=90)
    assert sorted(desk.statuses()) == ["crash", "discard", "discard", "keep"]
    (crash,) = [row for row in desk.rows() if row[3] == "crash"]
    assert "was lost (the process that measures was killed), the 3rd time" in crash[4]
    # GPU 0 comes first, at every run, unless it rests.
    assert done.stderr.count("another run holds the device") == 1
    assert "is left out" not in done.stderr


SRUN = """\
#!/bin/bash
# As srun: the command once for every node, each with the number of its task.
while [[ $1 == -* ]]; do shift; done
for task in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_PROCID=$task "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do
    wait "$task" || code=$?
done
exit ${code:-0}
"""


@pytest.mark.slow
def test_slurm_script_gives_the_loop_every_node_and_leaves_nothing(desk: Desk, tmp_path: Path):
    """Slurm itself is a stand-in: two tasks on this machine, Ray nodes beside each other."""
    desk.replace("prepare.py", "DEVICES = 4", "DEVICES = 1")
    desk.commit("one CPU")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    (programs / "srun").chmod(0o755)
    job = str(os.getpid())
    variables = {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(desk.path),
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NUM_NODES": "2",
        "TAG": "t",
        "LOOP_ARGS": "--max-experiments 4 --workers 4",
    }
    process = start_piped(["bash", str(ROOT / "docs" / "slurm.sbatch")], desk.env | variables)
    try:
        wait_for(lambda: (desk.home() / "results.tsv").exists() and desk.rows(), 90)
        desk.hold.touch()
        wait_for(lambda: len(training(desk)) == 2, 60)
        assert not any(b"RAY_AUTH_TOKEN" in Path(f"/proc/{pid}/environ").read_bytes() for pid in training(desk))
        status = desk.loop("status", "--tag", "t").stdout
        assert len(set(re.findall(r" on \S+ \((.*?)\)", status))) == 2, status
        assert len(training(desk)) == 2, "a CPU node runs one job at a time"
        desk.hold.unlink()
        done = ended(process, timeout=60)
        assert len(desk.rows()) >= 5  # a gain may be run again
        assert not errors(done)
        wait_for(lambda: not desk.processes(f"SLURM_JOB_ID={job}"), 10)
    finally:
        desk.end()
        shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)
