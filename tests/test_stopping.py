"""A night that is asked to stop, and a night that is not: Ctrl-C, TERM, a file STOP, --hours; a lost terminal.

    uv run pytest tests/test_stopping.py
"""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import DEEPER, Desk, ended, errors, has_event, hear, wait_for

MODES = [pytest.param("--ahead=0", marks=pytest.mark.slow), "--ahead=1"]


def start_held(desk: Desk, *options: str) -> subprocess.Popen:
    """A loop whose third run, of the second idea, trains until desk.hold is removed; returns when that run trains.

    The same in both modes: what is proposed ahead while the first idea trains repeats that, and is proposed anew.
    """
    agent = desk.agent(f"""
        if knob("DEPTH") == 5 and count("held") == 1:
            HOLD.touch()
        {DEEPER}
    """)
    process = desk.popen("--tag", "t", "--agent-cmd", agent, *options)
    wait_for(has_event(desk, "training", 3))
    return process


def assert_at_rest(desk: Desk, rows: int) -> None:
    """So many rows, all kept; branch and files at the last one; no process left."""
    assert desk.statuses() == ["keep"] * rows
    assert desk.git("symbolic-ref", "--short", "HEAD") == "autoresearch/t"
    assert desk.git("rev-parse", "HEAD").startswith(desk.rows()[-1][0])
    assert desk.git("status", "--porcelain", "--untracked-files=no") == "" and desk.orphans() == []


def test_ctrl_c_once_finishes_the_experiment(desk):
    process = start_held(desk)
    process.send_signal(signal.SIGINT)
    hear(process, "finishing what runs, then stopping (Ctrl-C again: stop now)")
    desk.hold.unlink()
    assert errors(ended(process)) == []
    assert_at_rest(desk, rows=3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("signals", [[signal.SIGINT, signal.SIGINT], [signal.SIGTERM]])
def test_ctrl_c_twice_or_term_stops_now(desk, signals, mode):
    process = start_held(desk, mode)
    for number in signals[:-1]:
        process.send_signal(number)
        hear(process, "Ctrl-C again: stop now")  # two signals at once would be one
    process.send_signal(signals[-1])
    done = ended(process, timeout=8)  # the training would be ended after 10 s
    assert errors(done) == [] and "stopped: what was in flight is dropped" in done.stderr
    assert_at_rest(desk, rows=2)


def test_ctrl_c_that_the_judge_hears_too_is_no_error(desk):
    """A terminal sends it to every process of the group, and the judge dies of it."""
    desk.replace("prepare.py", "def describe():\n", "def describe():\n    os.kill(os.getpid(), 2)\n")
    desk.commit("a judge that dies of Ctrl-C")
    assert ended(desk.popen("--tag", "t", "--agent-cmd", "true")).stderr == "stopped\n"


@pytest.mark.parametrize("mode", MODES)
def test_term_while_an_agent_hangs_stops_now(desk, mode):
    agent = desk.agent('knob("DEPTH", 5)\ncount()\ntime.sleep(60)')
    process = desk.popen("--tag", "t", "--agent-cmd", agent, mode)
    wait_for(has_event(desk, "measured"))
    wait_for((desk.outside / "count").exists)
    process.send_signal(signal.SIGTERM)
    assert errors(ended(process)) == []
    assert_at_rest(desk, rows=1)


def test_ctrl_c_in_the_whole_foreground_group_hurts_neither_agent_nor_git(desk):
    """As a terminal sends it: to every process of the group."""
    process = start_held(desk, "--ahead", "1")
    wait_for(lambda: any("train.py" in command for command in desk.orphans()))  # it has a session of its own by then
    os.killpg(process.pid, signal.SIGINT)
    hear(process, "Ctrl-C again: stop now")
    desk.hold.unlink()
    assert errors(ended(process)) == []
    assert_at_rest(desk, rows=3)


def test_term_ends_the_first_preparation(desk):
    main = 'if __name__ == "__main__":\n'
    slow = '    import time\n    (CACHE.parent / "pid").write_text(str(os.getpid()))\n    time.sleep(60)\n'
    desk.replace("prepare.py", main, main + slow)
    desk.commit("data that takes long")
    process = desk.popen("--tag", "t", "--agent-cmd", desk.agent("count()"))
    pid = wait_for(lambda: (path := desk.cache.parent / "pid").exists() and path.read_text())
    process.send_signal(signal.SIGTERM)
    assert errors(ended(process)) == []
    assert not Path("/proc", pid).exists()


def test_ctrl_c_ends_a_backoff(desk):
    desk.set_constant("harness/proposers.py", "FIRST_BACKOFF", "60")
    desk.set_constant("harness/proposers.py", "LAST_BACKOFF", "60")
    desk.commit("patience")
    process = desk.popen("--tag", "t", "--agent-cmd", desk.agent("count()"))
    hear(process, "no proposal")
    process.send_signal(signal.SIGINT)
    ended(process)
    assert_at_rest(desk, rows=1)


def test_hangup_is_ignored(desk):
    process = start_held(desk, "--max-experiments", "2")
    process.send_signal(signal.SIGHUP)
    desk.hold.unlink()
    ended(process)
    assert_at_rest(desk, rows=3)


def test_terminal_that_goes_away_ends_nothing(desk):
    """The loop runs on a terminal, live line and all; then the window is closed."""
    ours, theirs = pty.openpty()
    agent = desk.agent(f'n = count(); {DEEPER}; knob("SECONDS", 1 if n == 2 else 0)')
    process = subprocess.Popen(
        [sys.executable, str(desk.path / "loop.py"), "--tag", "t", "--agent-cmd", agent, "--max-experiments", "3"],
        cwd=desk.path, env=desk.env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # it is the controlling terminal
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while b" | run 0003 " not in seen:
        seen += os.read(ours, 65536)
    os.close(ours)
    assert process.wait(20) == 0
    assert_at_rest(desk, rows=4)


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
    assert_at_rest(desk, rows=3)


@pytest.mark.parametrize("mode", MODES)
def test_stop_file_finishes_the_experiment(desk, mode):
    (desk.path / "STOP").touch()  # an old one stops nothing
    process = start_held(desk, mode)
    (desk.path / "STOP").touch()
    desk.hold.unlink()
    ended(process)
    assert_at_rest(desk, rows=3)
    assert not (desk.path / "STOP").exists()


@pytest.mark.slow
def test_hours_end_a_night_after_the_experiment_in_flight(desk):
    """They count from the start of the loop: how many experiments fit into them is the machine's affair."""
    desk.set_knob(DEPTH=-999)
    desk.commit("more to gain than there is time for")
    command = "--tag", "t", "--agent-cmd", desk.agent(DEEPER)
    desk.loop(*command, "--max-experiments", "0")
    begin = time.monotonic()
    done = desk.loop(*command, "--hours", str(1 / 3600), timeout=20)
    assert time.monotonic() - begin >= 1 and "dropped" not in done.stderr
    assert_at_rest(desk, rows=sum(event["event"] == "training" for event in desk.events()))


def test_ctrl_c_finishes_every_run_of_an_experiment_that_has_begun(desk):
    """Its rows are written together, so a verdict is never half there."""
    desk.hold.touch()
    process = desk.popen("--tag", "t", "--agent-cmd", desk.agent(DEEPER), "--confirm")
    wait_for(has_event(desk, "training"))
    process.send_signal(signal.SIGINT)
    hear(process, "Ctrl-C again: stop now")
    assert desk.rows() == []
    desk.hold.unlink()
    ended(process)
    assert_at_rest(desk, rows=2)
