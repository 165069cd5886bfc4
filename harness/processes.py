"""Children: started with a mark in their environment, limited, ended for certain. Nothing here knows why they run.

A coding agent's tools, and what a training run starts, may move to sessions of their own, where killing the process
group does not reach them. But they keep their environment. So every child carries a mark, and `sweep` ends whatever
carries it. A child whose loop is killed dies with it (PR_SET_PDEATHSIG, by util-linux's setpriv; without that, as on
macOS, it goes on to its own end).
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.files import open_regular

MARK = "AUTORESEARCH_MARK"  # the variable that holds a child's mark
POLL_SECONDS = 0.1  # between looks at a child
KILL_GRACE = 2  # seconds from TERM to KILL
LOG_LIMIT = 16 * 2**20  # bytes of output: more of it ends a child


@dataclass(frozen=True)
class Ending:
    """How a child ended."""

    problem: str  # "" after exit code 0; "exit code 1", "killed by SIGSEGV", "timeout after 360 s", "stopped", ...
    seconds: float  # that it ran


def run_child(
    command,
    *,
    cwd: Path,
    env: dict[str, str],
    mark: str,
    log: Path,
    limit: float,
    stop: threading.Event,
    stdin: Path | None = None,
    quiet_limit: float | None = None,
    watch: Callable[[], None] = lambda: None,
) -> Ending:
    """Run a command in a session of its own until it ends, `limit` seconds pass, it says nothing for `quiet_limit`
    seconds or more than LOG_LIMIT bytes, or the event `stop` is set.

    Its output goes to the file `log`. `watch` is called ten times a second. No process that the child started is left.
    Raises OSError if the command does not start.
    """
    begin = heard_at = time.monotonic()
    too_long = f"over {LOG_LIMIT // 2**20} MiB of output"
    log.unlink(missing_ok=True)  # a new file: what still writes to the old one meets nobody
    with open_regular(stdin) if stdin else open(os.devnull) as source, open(log, "ab") as output:
        process = subprocess.Popen(
            [*_die_with_parent(), *command],
            cwd=cwd,
            env=env | {MARK: mark, "PWD": str(cwd)},  # opencode takes its folder from PWD
            stdin=source,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        problem = ""
        said = 0
        while not problem and not _ends_within(process, POLL_SECONDS):
            watch()
            now = time.monotonic()
            before, said = said, os.fstat(output.fileno()).st_size
            heard_at = now if said != before else heard_at
            if stop.is_set():
                problem = "stopped"
            elif now - begin > limit:
                problem = f"timeout after {now - begin:.0f} s"
            elif said > LOG_LIMIT:
                problem = too_long
            elif quiet_limit is not None and now - heard_at > quiet_limit:
                problem = f"no output for {quiet_limit:.0f} s"
        _end_group(process)
        watch()
        seconds = time.monotonic() - begin
        sweep(mark)
        if os.fstat(output.fileno()).st_size > LOG_LIMIT:
            output.truncate(LOG_LIMIT)
            problem = problem or too_long
    return Ending(problem or _problem_of(process.returncode), seconds)


@functools.cache
def _die_with_parent() -> list[str]:
    """The words before a command that let it die with the thread that starts it, [] where setpriv is missing or old."""
    words = [shutil.which("setpriv"), "--pdeathsig", "KILL", "--"]
    is_able = words[0] and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if is_able else []


def _problem_of(code: int) -> str:
    """An exit code in words. Shells and bubblewrap give 128 and the signal that killed what they started."""
    number = -code if code < 0 else code - 128
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(number).name}"
    return f"exit code {code}" if code else ""


def _ends_within(process: subprocess.Popen, seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return True
    return False


def _end_group(process: subprocess.Popen) -> None:
    """TERM, then KILL, to the child's group; to its stragglers too, where the leader has ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        _ends_within(process, KILL_GRACE)


def find_processes(file: str, pattern: bytes) -> set[int]:
    """Ids of the processes whose /proc/ID/<file> matches, this one and zombies aside; none where there is no /proc."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and re.search(pattern, (folder / file).read_bytes()):
                found.add(int(folder.name))
    return found


def find_marked(mark: str) -> set[int]:
    """Ids of the processes with this mark, or with one that begins `mark:`."""
    return find_processes("environ", rb"(^|\0)%b(:[^\0]*)?\0" % re.escape(f"{MARK}={mark}").encode())


def sweep(mark: str) -> None:
    """End every process with this mark, or with one that begins `mark:`, in whatever session it hides."""
    # Several times: a process may start another one between our look and the signal.
    for number in (signal.SIGTERM, *[signal.SIGKILL] * 5):
        pids = find_marked(mark)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + KILL_GRACE
        while pids and time.monotonic() < deadline:
            time.sleep(0.02)
            pids = find_marked(mark)
        if not pids:
            return
