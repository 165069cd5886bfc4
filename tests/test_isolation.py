"""What a run can leave, see and reach: with bubblewrap nothing, without it what trust.md says."""

import contextlib
import json
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from conftest import BASELINE, DEEPER, wait_for

from harness import isolation
from harness.processes import find_processes

NAUGHTY = '''
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
'''


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.delenv("AUTORESEARCH_ISOLATION")
    isolation._why_it_fails.cache_clear()
    yield
    isolation._why_it_fails.cache_clear()
    isolation._given_up.clear()


@pytest.fixture
def isolated(checkout, switched_on):
    """A scratch checkout whose runs are isolated, with a home that holds keys."""
    if why := isolation.why_not():
        pytest.skip(why)
    checkout.env["AUTORESEARCH_ISOLATION"] = "on"
    return checkout


@pytest.fixture
def naughty(checkout):
    """A checkout whose train.py leaves weights, looks for some, and reaches out; every place is cleaned afterwards."""
    home = Path(checkout.env["HOME"])
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


def seen(checkout, number: int) -> dict:
    log = (checkout.home() / "runs" / f"{number:04d}" / "run.log").read_text()
    return json.loads(next(line for line in log.splitlines() if line.startswith("seen: "))[6:])


def test_isolated_run_leaves_nothing_and_sees_no_keys_network_or_process(isolated, naughty):
    second = "100000.5" + str(time.time_ns())  # seconds: an argument that no other process has
    (naughty.cache / "daemon").write_text(second)
    naughty.loop("--tag", "t", "--agent-cmd", naughty.agent(DEEPER), "--max-experiments", "2")
    assert naughty.statuses() == ["keep", "keep", "keep"]
    assert all(run.is_isolated for run in naughty.runs())
    for number in (1, 2, 3):
        found = seen(naughty, number)
        # A kept run's compilers' files are what the next one starts from.
        assert found["met"] == ([] if number == 1 else ["the compilers' files"])
        assert "the data" not in found["left"] and "its own TMPDIR" in found["left"]
        assert not found["network"] and not found["keys"] and not found["others"] and not found["python"]
    assert not find_processes("cmdline", second.encode())
    assert not list(naughty.cache.glob("weights*")) + list(Path(naughty.env["HOME"]).glob("**/weights*"))


def test_run_meets_no_compilers_files_of_a_discarded_run(naughty):
    """With and without bubblewrap."""
    worse = naughty.agent('knob("DEPTH", 3 - count() / 10)')
    naughty.loop("--tag", "t", "--agent-cmd", worse, "--max-experiments", "2")
    assert naughty.statuses() == ["keep", "discard", "discard"]
    marker = naughty.home().parent / "compile_cache" / naughty.rows()[0][0]
    kept = [path.name[:7] for path in marker.parent.iterdir()]
    assert sorted(kept) == sorted(row[0] for row in naughty.rows())
    for path in marker.parent.glob(f"{naughty.rows()[0][0]}*/weights*"):
        path.unlink()  # the baseline's own
    naughty.loop("--tag", "t", "--agent-cmd", naughty.agent('knob("DEPTH", 2)'), "--max-experiments", "1")
    assert "the compilers' files" not in seen(naughty, 4)["met"]


def test_run_without_bubblewrap_is_said_not_to_be_isolated(naughty):
    naughty.loop(*BASELINE)
    assert not naughty.runs()[0].is_isolated
    assert seen(naughty, 1)["keys"] == [".netrc", ".config/keys"] and seen(naughty, 1)["network"]


def test_kill_of_the_loop_ends_a_process_that_hides(isolated, naughty):
    second = "100000.5" + str(time.time_ns())
    (naughty.cache / "daemon").write_text(second)
    naughty.hold.touch()
    loop = naughty.popen(*BASELINE)
    wait_for(lambda: find_processes("cmdline", second.encode()))
    loop.send_signal(signal.SIGKILL)
    loop.wait()
    wait_for(lambda: not find_processes("cmdline", second.encode()))


def test_signal_that_ends_an_isolated_run_is_named(isolated):
    crash = isolated.agent('pathlib.Path("train.py").write_text("import os\\nos.kill(os.getpid(), 11)\\n")')
    isolated.loop("--tag", "t", "--agent-cmd", crash, "--max-experiments", "1")
    assert isolated.rows()[1][3:] == ["crash", "killed by SIGSEGV: edit of train.py"]


def test_machine_whose_gpu_is_out_of_sight_inside_runs_without_isolation(isolated):
    marker = Path("/tmp", f"gpu-{isolated.cache.parent.name}")
    marker.touch()
    text = (isolated.path / "prepare.py").read_text()
    text = text.replace("DEVICES = 4", f"DEVICES = 4 if pathlib.Path({str(marker)!r}).exists() else 0")
    isolated.write("prepare.py", text.replace('"device": "cpu"', '"device": "cuda"'))
    isolated.commit("a GPU")
    try:
        loop = isolated.loop(*BASELINE)
    finally:
        marker.unlink()
    assert "note: runs are not isolated (inside bubblewrap it finds cpu, outside cpu)" in loop.stderr
    assert not isolated.runs()[0].is_isolated


def test_reason_why_nothing_is_isolated_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert isolation.why_not() == "bubblewrap is not installed: 'apt install bubblewrap' or your system's package of it"
    isolation._why_it_fails.cache_clear()
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("AUTORESEARCH_ISOLATION", raising=False)
    assert isolation.why_not() == "bubblewrap does not work here: bwrap: No permissions to create new namespace"
