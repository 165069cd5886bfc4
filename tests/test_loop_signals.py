"""A night that is asked to stop, and a night that is not: Ctrl-C, TERM, a file STOP, --hours; a lost terminal."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DEEPER, Desk, ended, errors, has_event, wait_for


def start_slow(desk: Desk, seconds: float, *options: str) -> subprocess.Popen:
    """A loop whose third run trains so many seconds; returns when that run trains."""
    agent = desk.agent(f'{DEEPER}; knob("SECONDS", {seconds} if count() > 1 else 0)')
    process = desk.popen("--tag", "t", "--agent-cmd", agent, *options)
    wait_for(has_event(desk, "training", 3))
    return process


def test_ctrl_c_once_finishes_the_experiment(desk):
    process = start_slow(desk, 1)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert done.returncode == 0 and errors(done) == []
    assert "finishing this experiment, then stopping (Ctrl-C again: stop now)" in done.stderr
    assert desk.statuses() == ["keep"] * 3
    assert desk.orphans() == []


@pytest.mark.parametrize("signals", [[signal.SIGINT, signal.SIGINT], [signal.SIGTERM]])
@pytest.mark.parametrize("mode", ["--ahead", "--no-ahead"])
def test_ctrl_c_twice_or_term_stops_now(desk, signals, mode):
    process = start_slow(desk, 60, mode)
    begin = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)  # two signals at once would be one
    done = ended(process)
    assert time.monotonic() - begin < 15
    assert done.returncode == 0 and errors(done) == []
    assert "stopped: the experiment in flight is dropped" in done.stderr
    assert desk.statuses() == ["keep"] * 2
    assert desk.git("rev-parse", "HEAD").startswith(desk.rows()[-1][0])
    assert desk.git("status", "--porcelain", "--untracked-files=no") == "" and desk.orphans() == []


def test_ctrl_c_in_the_whole_foreground_group_hurts_neither_agent_nor_git(desk):
    """As a terminal sends it: to every process of the group."""
    process = start_slow(desk, 1, "--ahead")
    wait_for(lambda: any("train.py" in command for command in desk.orphans()))  # it has a session of its own by then
    os.killpg(process.pid, signal.SIGINT)
    done = ended(process)
    assert done.returncode == 0 and errors(done) == []
    assert desk.statuses() == ["keep"] * 3


def test_term_ends_the_first_preparation(desk):
    source = (desk.path / "prepare.py").read_text()
    main = 'if __name__ == "__main__":\n'
    slow = '    import time\n    (CACHE.parent / "pid").write_text(str(os.getpid()))\n    time.sleep(60)\n'
    (desk.path / "prepare.py").write_text(source.replace(main, main + slow))
    desk.commit("data that takes long")
    process = desk.popen("--tag", "t", "--agent-cmd", desk.agent("count()"))
    pid = wait_for(lambda: (path := desk.cache.parent / "pid").exists() and path.read_text())
    process.send_signal(signal.SIGTERM)
    done = ended(process)
    assert done.returncode == 0 and errors(done) == []
    assert not Path("/proc", pid).exists()


def test_ctrl_c_ends_a_backoff(desk):
    desk.set_constant("loop.py", "BACKOFF", "60, 60")
    desk.commit("patience")
    process = desk.popen("--tag", "t", "--agent-cmd", desk.agent("count()"))
    wait_for(lambda: (desk.outside / "count").exists() and has_event(desk, "the agent proposes")())
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert done.returncode == 0 and desk.statuses() == ["keep"]


def test_hangup_is_ignored(desk):
    process = start_slow(desk, 1, "--max-experiments", "2")
    process.send_signal(signal.SIGHUP)
    done = ended(process)
    assert done.returncode == 0 and desk.statuses() == ["keep"] * 3


def test_terminal_that_goes_away_ends_nothing(desk):
    """The loop runs on a terminal, live line and all; then the window is closed."""
    ours, theirs = pty.openpty()
    agent = desk.agent(f'n = count(); {DEEPER}; knob("SECONDS", 1 if n == 2 else 0)')
    process = subprocess.Popen(
        [sys.executable, str(desk.path / "loop.py"), "--tag", "t", "--agent-cmd", agent, "--max-experiments", "3"],
        cwd=desk.path, env=desk.env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, 0x540E, 0),  # TIOCSCTTY: it is the controlling terminal
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while b" | best " not in seen:
        seen += os.read(ours, 65536)
    os.close(ours)
    assert process.wait(20) == 0
    assert desk.statuses() == ["keep"] * 4


@pytest.mark.parametrize("how", ["closed pipe", "closed descriptor"])
def test_stderr_that_is_closed_ends_nothing(desk, how):
    command = [sys.executable, "loop.py", "--tag", "t", "--agent-cmd", desk.agent(DEEPER), "--max-experiments", "2"]
    options = {"cwd": desk.path, "env": desk.env, "start_new_session": True}
    if how == "closed pipe":
        process = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
        process.stderr.close()
    else:
        process = subprocess.Popen(["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", *command], **options)
    assert process.wait(30) == 0
    assert desk.statuses() == ["keep"] * 3


@pytest.mark.parametrize("mode", ["--ahead", "--no-ahead"])
def test_stop_file_finishes_the_experiment(desk, mode):
    (desk.path / "STOP").touch()  # an old one stops nothing
    process = start_slow(desk, 1, mode)
    (desk.path / "STOP").touch()
    done = ended(process)
    assert done.returncode == 0 and desk.statuses() == ["keep"] * 3
    assert not (desk.path / "STOP").exists()


def test_hours_end_a_night(desk):
    done = desk.loop("--tag", "t", "--agent-cmd", desk.agent(DEEPER), "--hours", str(1.5 / 3600))
    assert done.returncode == 0
    assert len(desk.rows()) >= 2 and desk.orphans() == []


def test_stop_is_heeded_between_replicates(desk):
    desk.set_knob(SECONDS=0.5)
    desk.commit("slower")
    process = desk.popen("--tag", "t", "--agent-cmd", desk.agent(DEEPER), "--replicates", "50")
    wait_for(has_event(desk, "training"))
    process.send_signal(signal.SIGINT)
    assert ended(process).returncode == 0
    assert len(desk.rows()) == 1
