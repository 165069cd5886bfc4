"""Children: started with a mark in their environment, watched, and ended for certain. Nothing here knows why they run.

A coding agent's tools, and what a training run starts, may move to sessions of their own, where killing the process
group does not reach them. But they keep their environment. So every child carries a mark, and `sweep` ends whatever
carries it.
"""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from harness.files import new_file, open_regular

MARK = "AUTORESEARCH_MARK"  # the variable that holds a child's mark
POLL_SECONDS = 0.2  # between looks at a child
KILL_GRACE = 2  # seconds from TERM to KILL
MOST_STARTS = 3  # of a child that a Ctrl-C kills before it begins
KILLED_BY_CTRL_C = "killed by SIGINT"
LOG_CAP = 8 * 2**20  # bytes kept of a log's head
TAIL_CAP = 256 * 2**10  # bytes kept of what follows


@dataclass(frozen=True)
class Ending:
    """How a child ended."""

    problem: str  # "" after exit code 0; "exit code 1", "killed by SIGSEGV", "timeout after 360 s", "stopped"
    began_at: float  # time.time() when it was started
    seconds: float  # that it ran
    paused_seconds: float  # of these it was stopped (SIGSTOP), or the machine slept
    asleep_seconds: float = 0.0  # of these the machine slept
    clock_jump_seconds: float = 0.0  # by which the wall clock was set meanwhile: by NTP, or after a pause of the VM


def run_child(command, *, cwd: Path, env: dict, mark: str, log: Path, limit: float, stop, stdin=os.devnull) -> Ending:
    """Run a command in a session of its own until it ends, `limit` seconds pass or the event `stop` is set.

    Its output goes to the file `log`, its head and its tail where it is long. No process that it started is left.
    Raises OSError if the command does not start.
    """
    for _ in range(MOST_STARTS):
        ending = _run_once(command, cwd=cwd, env=env, mark=mark, log=log, limit=limit, stop=stop, stdin=stdin)
        # A terminal's Ctrl-C kills a child that has been forked but is not in its own session yet: it never began.
        never_began = ending.problem == KILLED_BY_CTRL_C and log.stat().st_size == 0
        if not never_began:
            break
    return ending


def _run_once(command, *, cwd: Path, env: dict, mark: str, log: Path, limit: float, stop, stdin) -> Ending:
    began_at = time.time()
    begin = time.monotonic()
    output = new_file(log, buffering=0)
    with _open_input(stdin) as source:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env | {MARK: mark, "PWD": str(cwd)},  # opencode takes its folder from PWD
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    reader = threading.Thread(target=_drain, args=(process.stdout, output), daemon=True)
    reader.start()
    ended = threading.Event()
    threading.Thread(target=_wait_for, args=(process, ended), daemon=True).start()

    clock = _PauseClock(process.pid)
    problem = ""
    while not problem and not ended.wait(POLL_SECONDS):
        clock.look()
        seconds = time.monotonic() - begin
        if stop.is_set():
            problem = "stopped"
        elif seconds - clock.paused_seconds > limit:
            problem = f"timeout after {seconds:.0f} s"
    _end_group(process.pid, ended)
    sweep(mark)
    reader.join(KILL_GRACE)
    if not problem and process.returncode > 0:
        problem = f"exit code {process.returncode}"
    elif not problem and process.returncode < 0:
        problem = f"killed by {signal.Signals(-process.returncode).name}"
    seconds = time.monotonic() - begin
    clock_jump_seconds = time.time() - began_at - seconds - clock.asleep_seconds
    return Ending(problem, began_at, seconds, clock.paused_seconds, clock.asleep_seconds, clock_jump_seconds)


def _open_input(path):
    return open(path, "rb") if str(path) == os.devnull else open_regular(path)


def _wait_for(process: subprocess.Popen, ended: threading.Event) -> None:
    process.wait()
    ended.set()


def _end_group(group: int, ended: threading.Event) -> None:
    """TERM, then KILL, to a process group; to its stragglers too, where the leader has ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
        ended.wait(KILL_GRACE)


def _drain(stream, log) -> None:
    """Copy a child's output to an open file: its first LOG_CAP bytes as they come, of the rest the last TAIL_CAP."""
    written = 0
    rest = b""
    rest_bytes = 0
    with log:
        while chunk := stream.read1(65536):
            if written >= LOG_CAP:
                rest = (rest + chunk)[-TAIL_CAP:]
                rest_bytes += len(chunk)
                continue
            with contextlib.suppress(OSError):  # not even a full disk may stop the child's pipe
                written += log.write(chunk)
        with contextlib.suppress(OSError):
            if rest_bytes > len(rest):
                log.write(f"\n[... {rest_bytes - len(rest)} bytes cut ...]\n".encode())
            log.write(rest)


class _PauseClock:
    """Seconds for which a child did not run by no fault of its own: SIGSTOP, or a laptop that slept."""

    def __init__(self, pid: int):
        self.paused_seconds = 0.0
        self.asleep_seconds = 0.0  # of these
        self._stat = Path(f"/proc/{pid}/stat")
        self._slept = _seconds_asleep()
        self._looked = time.monotonic()

    def look(self) -> None:
        now = time.monotonic()
        slept = _seconds_asleep()
        if self._is_stopped():
            self.paused_seconds += now - self._looked
        if slept - self._slept > 1:  # second: the two clocks drift by less
            self.paused_seconds += slept - self._slept
            self.asleep_seconds += slept - self._slept
            self._slept = slept
        self._looked = now

    def _is_stopped(self) -> bool:
        with contextlib.suppress(OSError, IndexError):
            state = self._stat.read_bytes().rpartition(b")")[2].split()[0]
            return state in (b"T", b"t")
        return False


def _seconds_asleep() -> float:
    """Grows while the machine sleeps, when the monotonic clock stands still."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return time.time() - time.monotonic()


def find_processes(file: str, pattern: bytes) -> set[int]:
    """Ids of the processes whose /proc/ID/<file> matches, this one and zombies aside; none where there is no /proc."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and re.search(pattern, (folder / file).read_bytes()):
                found.add(int(folder.name))
    return found


def sweep(mark: str) -> None:
    """End every process with this mark, or with one that begins `mark:`, in whatever session it hides."""
    pattern = rb"(^|\0)%b(:[^\0]*)?\0" % re.escape(f"{MARK}={mark}").encode()
    # Several times: a process may start another one between our look and the signal.
    for number in (signal.SIGTERM, *[signal.SIGKILL] * 5):
        pids = find_processes("environ", pattern)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + KILL_GRACE
        while pids and time.monotonic() < deadline:
            time.sleep(0.02)
            pids = find_processes("environ", pattern)
        if not pids:
            return


def run_in_foreground(command, *, cwd: Path, env: dict, is_stopped) -> None:
    """Run a command whose output is for the person to see; TERM once `is_stopped()` is true."""
    with subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if is_stopped():
                process.terminate()
            time.sleep(POLL_SECONDS)
