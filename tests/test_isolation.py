"""What a run can leave, see and reach: with bubblewrap nothing, without it what trust.md says."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from conftest import BASELINE, wait_for

from harness import isolation
from harness.machine import OthersMeter
from harness.processes import find_processes, run_child

NAUGHTY = """
import json, os, pathlib, socket, subprocess, sys
import prepare

prepare.start_clock()
DEPTH = 4
home = pathlib.Path.home()
name = "weights-" + prepare.CACHE.parent.name
places = {
    "/tmp": pathlib.Path("/tmp", name),
    "/dev/shm": pathlib.Path("/dev/shm", name),
    "the home folder": home / name,
    "the cache folder": home / ".cache" / name,
    "the data": prepare.CACHE / name,
    "the compilers' files": pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], name),
    "its own TMPDIR": pathlib.Path(os.environ["TMPDIR"], name),
}
met = [place for place, path in places.items() if path.exists()]
for path in places.values():
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text("learned before")
    except OSError:
        pass
try:
    socket.create_connection(("127.0.0.1", int((prepare.CACHE / "port").read_text())), 2).close()
    has_network = True
except OSError:
    has_network = False
if (prepare.CACHE / "daemon").exists():
    subprocess.Popen(["sleep", (prepare.CACHE / "daemon").read_text()], env={}, start_new_session=True)
seen = {
    "met": met,
    "left": [place for place, path in places.items() if path.exists()],
    "network": has_network,
    "keys": [path for path in (".netrc", ".config/keys") if (home / path).is_file()],
    "python": os.access(json.__file__, os.W_OK),
    "others": sum(entry.isdigit() for entry in os.listdir("/proc")) > 8,
}
print("seen:", json.dumps(seen))
while (prepare.CACHE / "hold").exists():
    pass
prepare.finish(1.0 - DEPTH / 100)
"""


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.delenv("AUTORESEARCH_ISOLATION")
    isolation._why_it_fails.cache_clear()
    yield
    isolation._why_it_fails.cache_clear()
    isolation._given_up.clear()


@pytest.fixture
def naughty(checkout):
    """A checkout whose train.py leaves weights, looks for some, and reaches out; every place is cleaned afterwards."""
    home = Path(tempfile.mkdtemp(prefix="home-", dir="/var/tmp"))  # of /tmp a run has its own
    checkout.env["HOME"] = str(home)
    (home / ".config").mkdir()
    for name in (".netrc", ".config/keys"):
        (home / name).write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        (checkout.cache / "port").write_text(str(server.getsockname()[1]))
        checkout.write("train.py", NAUGHTY)
        checkout.commit("naughty")
        yield checkout
    for folder in ("/tmp", "/dev/shm"):
        with contextlib.suppress(FileNotFoundError):
            Path(folder, f"weights-{checkout.cache.parent.name}").unlink()
    shutil.rmtree(home)


@pytest.fixture
def isolated(naughty, switched_on):
    """The same with bubblewrap, and a daemon that hides in every run: its command line, found nowhere else."""
    if why := isolation.problem():
        pytest.skip(why)
    naughty.env["AUTORESEARCH_ISOLATION"] = "on"
    naughty.daemon = "100000.5" + str(time.time_ns())
    (naughty.cache / "daemon").write_text(naughty.daemon)
    return naughty


def seen(checkout, number: int) -> dict:
    log = (checkout.home() / "runs" / f"{number:04d}" / "run.log").read_text()
    return json.loads(next(line for line in log.splitlines() if line.startswith("seen: "))[6:])


def test_isolated_run_leaves_nothing_and_sees_no_keys_network_or_process(isolated):
    crash = "import os; os.kill(os.getpid(), 11)"
    edits = ['knob("DEPTH", 5)', f'open("train.py", "w").write({crash!r})']
    agent = isolated.agent(f"exec({edits}[count() - 1])")
    isolated.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "2")
    assert isolated.statuses() == ["keep", "keep", "crash"]
    assert isolated.rows()[2][4] == "killed by SIGSEGV: edit of train.py"
    assert all(run.is_isolated for run in isolated.runs())
    for number in (1, 2):
        found = seen(isolated, number)
        # A kept run's compilers' files are what the next one starts from.
        assert found["met"] == ([] if number == 1 else ["the compilers' files"])
        assert "the data" not in found["left"] and "its own TMPDIR" in found["left"]
        assert not found["network"] and not found["keys"] and not found["others"] and not found["python"]
    assert not find_processes("cmdline", isolated.daemon.encode())
    assert not list(isolated.cache.glob("weights*")) + list(Path(isolated.env["HOME"]).glob("**/weights*"))


def test_processors_that_a_run_uses_are_not_said_to_be_used_by_others(tmp_path):
    if why := isolation.problem():
        pytest.skip(why)
    command = [sys.executable, "-c", "import time\nwhile time.process_time() < 2: pass"]
    command = isolation.wrap(command, tmp_path)
    meter = OthersMeter(str(tmp_path))
    options = {"mark": f"{tmp_path}:run", "log": tmp_path / "log", "limit": 60, "stop": threading.Event()}
    run_child(command, cwd=tmp_path, env=dict(os.environ), watch=meter.look, **options)
    assert 1 < meter.own_seconds < 3


def test_environment_and_data_behind_links_are_found_inside(monkeypatch):
    if why := isolation.problem():
        pytest.skip(why)
    for place in ("/tmp", "/var/tmp"):  # the first is empty inside
        with tempfile.TemporaryDirectory(dir=place) as name:
            Path(name, "real").mkdir()
            Path(name, "real", "data").write_text("found")
            link = Path(name, "link")
            link.symlink_to("real")
            command = isolation.wrap(["cat", str(link / "data")], Path.cwd(), readable=[link])
            assert subprocess.run(command, capture_output=True, text=True).stdout == "found"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # the home is a link, as on many clusters
        Path(name, "disk", ".cache").mkdir(parents=True)
        Path(name, "disk", ".cache", "hub").symlink_to("/usr")
        home = Path(name, "home")
        home.symlink_to(Path(name, "disk"))
        monkeypatch.setenv("HOME", str(home))
        (home / "run").mkdir()
        look = ["sh", "-c", "ls -A ~/.cache && touch ~/run/left"]
        command = isolation.wrap(look, home / "run", readable=[home / ".cache/hub"])
        assert subprocess.run(command, capture_output=True, text=True).stdout == "hub\n"
        assert (home / "run/left").exists()


def test_run_without_bubblewrap_is_said_not_to_be_isolated_and_meets_no_files_of_a_discarded_run(naughty):
    worse = naughty.agent('knob("DEPTH", 3 - count() / 10)')
    naughty.loop("--tag", "t", "--agent-cmd", worse, "--max-experiments", "2")
    assert naughty.statuses() == ["keep", "discard", "discard"]
    assert not naughty.runs()[0].is_isolated
    assert seen(naughty, 1)["keys"] == [".netrc", ".config/keys"] and seen(naughty, 1)["network"]
    compiled = naughty.home() / "compiled"
    assert sorted(path.name[:7] for path in compiled.iterdir()) == sorted(row[0] for row in naughty.rows())
    for path in compiled.glob(f"{naughty.rows()[0][0]}*/weights*"):
        path.unlink()  # the baseline's own
    naughty.loop("--tag", "t", "--agent-cmd", naughty.agent('knob("DEPTH", 2)'), "--max-experiments", "1")
    assert "the compilers' files" not in seen(naughty, 4)["met"]


def test_kill_of_the_loop_ends_a_process_that_hides(isolated):
    isolated.hold.touch()
    loop = isolated.popen(*BASELINE)
    wait_for(lambda: find_processes("cmdline", isolated.daemon.encode()))
    loop.send_signal(signal.SIGKILL)
    loop.wait()
    wait_for(lambda: not find_processes("cmdline", isolated.daemon.encode()))


def test_machine_whose_gpu_is_out_of_sight_inside_runs_without_isolation(isolated):
    (isolated.cache / "daemon").unlink()
    outside = Path("/tmp", f"gpu-{isolated.cache.parent.name}")  # inside there is another /tmp
    isolated.replace("prepare.py", 'text("kind", "cpu")', f'"cuda" if pathlib.Path("{outside}").exists() else "cpu"')
    isolated.commit("a GPU")
    outside.touch()
    loop = isolated.loop(*BASELINE)
    outside.unlink()
    assert "note: runs are not isolated (inside bubblewrap it finds cpu, outside cpu)" in loop.stderr
    assert not isolated.runs()[0].is_isolated


def test_reason_why_nothing_is_isolated_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert isolation.problem() == "bubblewrap is not installed: 'apt install bubblewrap' or your system's package of it"
    isolation._why_it_fails.cache_clear()
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert isolation.problem() == "bubblewrap does not work here: bwrap: No permissions to create new namespace"
