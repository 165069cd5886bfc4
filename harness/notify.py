"""Tells a person what happened, by a command of their own: `loop.py run --notify 'mail -s autoresearch me@here'`.

The text comes on the command's standard input. The command runs through the shell, in a session of its own, so that
Ctrl-C does not reach it. A second process, this file run as a program, holds it to its time limit, also when the loop
has ended. What it prints, and why it failed, goes to a log. It never blocks or ends the loop.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TIME_LIMIT = 60  # seconds that a command may take
LAST_WAIT = 5  # seconds that the end of a session waits for commands that still run
OUTPUT_CAP = 4000  # bytes kept of what a command prints
LOG_CAP = 2**20  # bytes: a longer log is begun anew


class Notifier:
    """Runs the command for every text that it is told; without a command it does nothing."""

    def __init__(self, command: str, log: Path):
        self._command = command
        self._log = log
        self._running: list[subprocess.Popen] = []

    def tell(self, text: str) -> None:
        """Begin to tell a text, and return at once. The name of this machine stands before it."""
        if not self._command:
            return
        self._running = [process for process in self._running if process.poll() is None]
        watcher = [sys.executable, "-I", "-S", __file__, str(TIME_LIMIT), str(self._log), self._command]
        try:
            with tempfile.TemporaryFile() as file:
                file.write(f"{socket.gethostname()}: {text.strip()}\n".encode(errors="replace"))
                file.seek(0)
                process = subprocess.Popen(
                    watcher,
                    stdin=file,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
        except OSError as error:  # a full disk, too many processes
            write_line(self._log, f"{self._command}: {error}")
            return
        self._running.append(process)

    def close(self) -> None:
        """Wait a few seconds for what still runs; it goes on without the loop."""
        deadline = time.monotonic() + LAST_WAIT
        for process in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


def write_line(log: Path, text: str) -> None:
    """Append a line to the log, with date and time. A log that cannot be written is no reason to fail."""
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):
        if log.exists() and log.stat().st_size > LOG_CAP:
            log.unlink()
        # An agent may have left a pipe there that nobody reads: opening it must not wait.
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{when} {' '.join(text.split())}\n")


def run_and_log(command: str, log: Path, limit: float) -> int:
    """Run a command on our standard input, end it after `limit` seconds, log what it printed and how it failed."""
    try:
        process = subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        write_line(log, f"{command}: {error}")
        return 1

    def give_up() -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        write_line(log, f"{command}: ended after {limit:g} s")
        os._exit(1)  # something that hides in another session may hold its output open for ever

    alarm = threading.Timer(limit, give_up)
    alarm.daemon = True
    alarm.start()
    output = process.stdout.read(OUTPUT_CAP)
    while process.stdout.read(2**16):  # what is too long for the log
        pass
    code = process.wait()
    alarm.cancel()
    said = output.decode(errors="replace").strip()
    if code:
        write_line(log, f"{command}: exit code {code}: {said}")
    elif said:
        write_line(log, f"{command}: {said}")
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(run_and_log(sys.argv[3], Path(sys.argv[2]), float(sys.argv[1])))
