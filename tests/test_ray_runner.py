"""loop.py on clusters of fake nodes with fake GPUs, which lose workers and nodes, and go away. Loop, Ray and processes
are the real ones; evaluator and training are stand-ins.

    uv run pytest tests/test_ray_runner.py -m "slow or not slow"
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from queue import Queue
from threading import Event

import pytest
from conftest import ROOT, Checkout, ended, errors, hear, wait_for

from harness import machine, ray_runner
from harness.processes import find_processes
from harness.runner import Stopped
from loop import DOMAIN

pytestmark = pytest.mark.xdist_group("ray")  # one cluster after another: two cores carry no more
RAY_ENVIRONMENT = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
LONG = 90.0  # seconds: Ray starts a process in some, and this machine may be busy


class Field:
    """A checkout whose evaluator finds GPUs, and a cluster where one is asked for."""

    def __init__(self, checkout: Checkout):
        self.checkout = checkout
        self.cluster = None
        (checkout.cache / "kind").write_text("cuda")
        (checkout.cache / "manifest.json").write_text("{}")
        hide = "subprocess.Popen(['sleep', '1000'], start_new_session=True)"  # only the mark tells whose it is
        daemon = f"import subprocess\nif prepare.text('daemon', ''):\n    {hide}\nwhile "
        checkout.replace("train.py", "while ", daemon)
        checkout.set_constant("harness/ray_runner.py", "LEFT_OUT_SECONDS", "3")
        checkout.commit("a process that hides, short waits")

    def node(self, gpus: int, **variables: str):
        """One more node, with an environment of its own."""
        from ray.cluster_utils import Cluster

        if not self.cluster:
            self.temporary = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))  # a socket's path is short
            (self.temporary / "ray").mkdir()
            os.environ["RAY_TMPDIR"] = str(self.temporary)
            self.cluster = Cluster()
        env = self.checkout.env | variables
        return self.cluster.add_node(num_gpus=gpus, num_cpus=1, env_vars=env, include_dashboard=False)

    def loop(self, address: str, tag: str = "t", **variables: str) -> subprocess.Popen:
        """Two workers without end on the cluster there."""
        agent = self.checkout.agent('knob("DEPTH", 4 + count() / 1000)')
        options = ("--tag", tag, "--agent-cmd", agent, "--workers", "2", "--ahead", "0", "--ray", address)
        return self.checkout.popen(*options, **variables)

    def training(self) -> list[int]:
        """Ids of the processes of runs."""
        mark = re.escape(f"AUTORESEARCH_MARK={self.checkout.home().parent}/").encode()
        return sorted(find_processes("environ", mark + rb"[^\0]*run:"))

    def of_ray(self) -> list[int]:
        """Ids of whatever runs with this field's caches: Ray's processes and the loop."""
        return self.checkout.processes(f"AUTORESEARCH_CACHE={self.checkout.cache.parent}/")

    def end(self) -> None:
        if self.cluster:
            self.cluster.shutdown()
            shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def field(checkout, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "")
    field = Field(checkout)
    yield field
    field.end()


def test_node_whose_scores_would_not_compare_is_told_why_and_what_to_do(field: Field, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(field.checkout.cache))
    facts = machine.describe(DOMAIN, field.checkout.path, machine.variables_for_training("fake"))
    versions = ray_runner.installed_versions()
    terms = ray_runner.Terms(facts, DOMAIN, "mark", sys.executable, versions, None)
    older = replace(terms, versions=versions | {"pytest": "1.0"})
    for asking, changes, told in (
        (terms, {}, ""),
        (terms, {"device_name": "A100"}, "its device is A100, the baseline's cpu: leave it out of this cluster"),
        (terms, {"digest": "e" * 64}, f"other data in {facts.cache}: digest eeeeeeeeeeee, the loop's is dddd"),
        (older, {}, f"other packages: pytest {versions['pytest']} (the loop has 1.0): run 'uv sync "),
    ):
        refusal = ray_runner._misfit(asking, replace(facts, **changes))
        assert refusal.startswith(told) and bool(refusal) == bool(told)


def test_what_has_begun_is_finished_on_a_free_actor_though_nothing_new_may_begin():
    runner = object.__new__(ray_runner.RayRunner)
    runner._is_gone, runner.stop, runner.is_stopping, runner._seats = False, Event(), lambda: True, Queue()
    runner._seats.put("seat")
    assert runner._next_seat() == "seat"
    with pytest.raises(Stopped):
        runner._next_seat()


@pytest.mark.slow
def test_installed_packages_are_the_same_before_and_after_ray_is_imported():
    code = "from harness import machine; before = machine.installed_packages()\n"
    code += "import ray; assert machine.installed_packages() == before"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    assert "optuna" in machine.EXTRA_PACKAGES and not machine.EXTRA_PACKAGES & machine.installed_packages().keys()


@pytest.mark.slow
def test_loop_on_a_cluster_outlives_what_it_loses(field: Field, monkeypatch):
    checkout = field.checkout
    checkout.env |= RAY_ENVIRONMENT
    for name, value in checkout.env.items():
        monkeypatch.setenv(name, value)
    field.node(0)  # the loop's own node has no GPU
    first = field.node(1, NODE_API_KEY="withheld")
    address = field.cluster.address
    checkout.hold.touch()
    (checkout.cache / "daemon").write_text("yes")

    # A killed loop leaves no training, and the next one ends what hid.
    loop = field.loop(address)
    (daemon,) = wait_for(lambda: find_processes("cmdline", rb"^sleep") & set(field.training()), LONG)
    loop.kill()
    loop.communicate()
    wait_for(lambda: field.training() == [daemon], LONG)
    (checkout.cache / "daemon").unlink()
    loop = field.loop(address, SOME_API_KEY="withheld")
    hear(loop, "nodes 2, GPUs 1", LONG)
    (pid,) = wait_for(lambda: daemon not in field.training() and field.training(), LONG)

    # Its actor sees the node's variables, and the training none of them.
    (actor,) = find_processes("cmdline", rb"^ray::Actor") & set(field.of_ray())
    assert b"withheld" in Path(f"/proc/{actor}/environ").read_bytes()
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    withheld = (b"RAY_", b"PYTHONPATH", b"OMP_")
    assert not [entry for entry in environ if b"withheld" in entry or entry.startswith(withheld)]

    # A lost actor's run is made again.
    os.kill(actor, signal.SIGKILL)
    assert first.node_id[:6] in hear(loop, "was lost", LONG)
    (again,) = wait_for(lambda: pid not in field.training() and field.training(), LONG)

    # A lost node's run is made again on one that joins late, once that has the data: it is told and asked again.
    late_cache = checkout.cache.parent / "late cache"
    late_cache.mkdir()
    (late_cache / "hold").touch()
    (late_cache / "kind").write_text("cuda")
    late = field.node(1, AUTORESEARCH_CACHE=str(late_cache))
    refusal = f"no data in {late_cache} (no manifest): run 'AUTORESEARCH_PROFILE=fake uv run prepare.py' there"
    said = hear(loop, refusal, LONG)
    assert re.search(rf"node \S+ \([\d.]+, {late.node_id[:6]}\) is left out: ", said)
    (late_cache / "manifest.json").write_text("{}")
    field.cluster.remove_node(first, allow_graceful=False)
    wait_for(lambda: field.training() and again not in field.training(), LONG)
    (late_cache / "hold").unlink()
    wait_for(lambda: len(checkout.runs()) >= 2, LONG)
    for run in checkout.runs():
        assert run.node.endswith(f", {late.node_id[:6]})") and run.score < 1.1
        assert (checkout.home() / "runs" / f"{run.number:04d}" / "run.log").exists()

    # SIGTERM, which Ray has not taken from the loop, ends it and its runs.
    (late_cache / "hold").touch()
    wait_for(field.training, LONG)
    time.sleep(0.5)  # it may have been the end of a run
    loop.terminate()
    said = ended(loop, timeout=LONG).stderr
    assert "stopped: what was in flight is dropped" in said and said.count(refusal) == 1 and not field.training()

    # A cluster that goes away ends the loop with one line.
    loop = field.loop(address, "u")
    hear(loop, "run 00", LONG)
    wait_for(field.training, LONG)
    field.cluster.shutdown()
    gone = f"error: Ray on {address} is gone: the same command goes on once it is back"
    assert errors(ended(loop, 1, LONG)) == [gone]
    assert not field.of_ray()
    told = f"error: no Ray cluster at {address}: nobody answers there; 'ray start --address={address}'"
    assert errors(ended(field.loop(address, "u"), 1, LONG))[0].startswith(told)
