"""Processes and files alone, and the command that tells a person: real processes, real signals."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import wait_for

from harness import processes, watch
from harness.files import open_regular, read_tail, read_text
from harness.processes import Ending, find_processes, run_child, sweep
from harness.watch import Watch


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(processes, "KILL_GRACE", 0.5)


@pytest.fixture
def child(tmp_path):
    """Runs Python code by run_child in a folder of its own: child.run(code)."""
    child = SimpleNamespace(folder=tmp_path, log=tmp_path / "run.log", mark=str(tmp_path), stop=threading.Event())

    def run(code: str, limit: float = 30.0, stdin: Path | None = None) -> Ending:
        command = [sys.executable, "-c", "import os, signal, sys, time\n" + code]
        options = {"env": dict(os.environ), "mark": child.mark, "log": child.log, "limit": limit, "stop": child.stop}
        ending = run_child(command, cwd=tmp_path, stdin=stdin, **options)
        assert find_processes("environ", re.escape(child.mark).encode()) == set()  # nothing is left, ever
        return ending

    child.run = run
    return child


def test_child_gets_its_prompt_or_nothing_to_read_and_tells_how_it_ended(child):
    (child.folder / "prompt").write_text("p" * 400_000)
    assert child.run("print(len(sys.stdin.read()), os.environ['PWD'])", stdin=child.folder / "prompt").problem == ""
    assert child.log.read_text() == f"400000 {child.folder}\n"
    for code, ended in {
        "sys.exit(3 + len(sys.stdin.read()))": "exit code 3",
        "os.kill(os.getpid(), signal.SIGSEGV)": "killed by SIGSEGV",
        "for i in range(2): print(i, flush=True); print(i, file=sys.stderr, flush=True)": "",
    }.items():
        assert child.run(code).problem == ended
    assert child.log.read_text() == "0\n0\n1\n1\n"  # in order
    threading.Timer(0.3, child.stop.set).start()
    assert child.run("time.sleep(60)").problem == "stopped"


def test_child_runs_where_setpriv_is_too_old_for_what_it_is_asked(child, monkeypatch):
    monkeypatch.setattr(processes.shutil, "which", lambda name: "false")
    processes._die_with_parent.cache_clear()
    assert child.run("print('ran')").problem == "" and child.log.read_text() == "ran\n"
    processes._die_with_parent.cache_clear()


@pytest.mark.parametrize(
    ("on_term", "grace", "log"),
    [("lambda *_: print('deaf', flush=True)", 0.5, "up\ndeaf\n"), ("lambda *_: sys.exit('saved')", 10, "up\nsaved\n")],
)
def test_timeout_ends_a_child_which_may_first_end_by_itself(child, monkeypatch, on_term, grace, log):
    monkeypatch.setattr(processes, "KILL_GRACE", grace)
    begin = time.monotonic()
    code = f"signal.signal(signal.SIGTERM, {on_term})\nprint('up', flush=True)\nwhile True: time.sleep(60)"
    ending = child.run(code, limit=1)
    assert ending.problem == "timeout after 1 s"
    assert 1 < ending.seconds <= time.monotonic() - begin < 9
    assert child.log.read_text() == log


def test_sweep_spares_processes_of_another_mark(child, monkeypatch):
    monkeypatch.setattr(processes, "KILL_GRACE", 10)  # a busy machine needs its time to end three
    def start(mark: str) -> subprocess.Popen:
        return subprocess.Popen(["sleep", "60"], env=os.environ | {processes.MARK: mark}, start_new_session=True)

    ours = [start(child.mark), start(child.mark), start(child.mark + ":7")]  # a role's mark, and one of its runs'
    others = [start(child.mark + "x"), start("x" + child.mark)]
    assert os.getpid() not in find_processes("cmdline", b"")  # a loop that an agent started may carry a mark
    sweep(child.mark)
    try:
        assert [process.wait(5) for process in ours] == [-signal.SIGTERM] * 3
        assert [process.poll() for process in others] == [None, None]
    finally:
        for process in others:
            process.kill()
            process.wait()


def test_endless_output_ends_a_child_and_its_log_is_cut(child, monkeypatch):
    monkeypatch.setattr(processes, "LOG_LIMIT", 2**20)
    assert child.run("print('first')\nwhile True: print('x' * 9999)").problem == "over 1 MiB of output"
    assert child.log.stat().st_size == 2**20 and child.log.read_bytes().startswith(b"first\n")


def test_reading_is_forgiving_and_never_hangs(tmp_path):
    (tmp_path / "log").write_bytes(b"a\nstep 1\rstep 2\r\n\xff last \n\n")
    assert read_tail(tmp_path / "log", 2) == "step 2\n\ufffd last"
    (tmp_path / "wide").write_text("𝕫" * 1000)
    assert read_tail(tmp_path / "wide", 1) == "𝕫" * 300
    os.mkfifo(tmp_path / "pipe")  # opened for reading it would wait for a writer for ever
    (tmp_path / "link").symlink_to(tmp_path / "log")
    descriptors = len(os.listdir("/proc/self/fd"))
    for name in ("missing", "pipe", "link", "."):
        assert read_tail(tmp_path / name, 2) == read_text(tmp_path / name) == ""
        with pytest.raises(OSError):
            open_regular(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_command_that_tells_a_person_never_holds_the_loop_up_and_its_failure_is_logged(tag, monkeypatch):
    monkeypatch.setattr(watch, "TIME_LIMIT", "1")
    begin = time.monotonic()
    for command in ("read line; echo $line; exit 7", "sleep 60", "exec <&-; nowhere"):
        Watch(tag, 9, None, command).tell("kept")
    assert time.monotonic() - begin < 1
    log = tag.home / "notify.log"
    wait_for(lambda: all(f"exit code {code}\n" in read_text(log) for code in (7, 124, 127)))
    assert f": {tag.branch}: kept\n" in log.read_text()
    Watch(tag, 9, None, f"cat > {tag.home}/heard").close("enough")
    assert "the loop ended: enough\n" in (tag.home / "heard").read_text()  # waited for
