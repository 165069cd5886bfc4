"""Whether a session has done enough (--patience, --target), and what a person is told meanwhile (--notify).

The command of --notify runs through the shell, gets the text on standard input, and has a minute. Its failures go to
notify.log; it never blocks or ends the loop.
"""

import socket
import subprocess
import threading
import time

from harness.console import duration, say
from harness.ledger import Run
from harness.tag import Tag

TIME_LIMIT = 60  # seconds that a command may take
LAST_WAIT = 5  # seconds that the end of a session waits for commands that still run
LONG_WAIT = 1800  # seconds of waiting after which a person is told


class Watch:
    """Sees every verdict of a session. Its only decision is `enough`: no new experiment begins."""

    def __init__(self, tag: Tag, patience: float, target: float | None, command: str):
        self.enough = ""  # why no new experiment begins; "": they may
        self._tag = tag
        self._patience = patience  # experiments without a keep
        self._target = target
        self._command = command
        self._without_keep = 0
        self._has_told_wait = False
        self._threads: list[threading.Thread] = []

    def see(self, run: Run) -> None:
        """A run was decided. A gain on a former champion runs again, and counts then."""
        if run.purpose == "experiment" and run.status == "keep":
            self._without_keep = 0
            score = self._tag.domain.score_text(self._tag.ledger.best)
            self.tell(f"kept {self._tag.domain.metric} {score} (run {run.number:04d}): {run.description}")
        elif run.purpose == "experiment" and run.status in ("discard", "crash") and not run.is_stale:
            self._without_keep += 1
            if self._without_keep >= self._patience:
                self._end(f"no keep in {self._without_keep} experiments (--patience)")
        self.look_for_target()

    def look_for_target(self) -> None:
        best = self._tag.ledger.best
        if self._target is not None and best is not None and self._tag.domain.gain(self._target, best) >= 0:
            self._end(f"the champion's {self._tag.domain.score_text(best)} reaches --target {self._target:g}")

    def look_for_wait(self, what: str, since: float) -> None:
        """Tell of a long wait, once. `what`: what the loop waits for, "" for nothing; since: time.time()."""
        if not what:
            self._has_told_wait = False
        elif time.time() - since > LONG_WAIT and not self._has_told_wait:
            self._has_told_wait = True
            self.tell(f"waiting for {duration(time.time() - since)}: {what}")

    def _end(self, reason: str) -> None:
        if not self.enough:
            self.enough = reason
            say(f"enough: {reason}; finishing what runs, then stopping")

    def tell(self, news: str) -> None:
        """Begin to tell a person, and return at once."""
        if self._command:
            text = f"{socket.gethostname()}: {self._tag.branch}: {news}\n{self._tag.ledger.standing()}\n"
            thread = threading.Thread(target=self._run_command, args=(text,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _run_command(self, text: str) -> None:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        try:
            done = subprocess.run(
                self._command, shell=True, input=text.encode(errors="replace"), timeout=TIME_LIMIT, **options
            )
            problem = f"exit code {done.returncode}: {done.stdout[:1000].decode(errors='replace')}"
            is_fine = done.returncode == 0
        except (OSError, subprocess.SubprocessError) as error:
            problem = str(error)
            is_fine = False
        if not is_fine:
            with open(self._tag.home / "notify.log", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(problem.split())}\n")

    def close(self, reason: str) -> None:
        """The session is over: tell it, and wait a few seconds for what still runs."""
        self.tell(f"the loop ended: {reason}")
        deadline = time.monotonic() + LAST_WAIT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
