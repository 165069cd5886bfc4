"""Whether a session has done enough (--patience, --target), and what a person is told (--notify). It ends no run.

The command of --notify runs through the shell, gets the text on standard input, and has a minute (where `timeout` is
installed). What it prints, and its exit code if that is not 0, goes to notify.log; it never blocks or ends the loop.
"""

import contextlib
import shutil
import socket
import subprocess
import time

from harness.console import duration, say
from harness.ledger import Run
from harness.tag import Tag

TIME_LIMIT = "60"  # seconds that a command may take
LAST_WAIT = 5  # seconds that the end of a session waits for the last command
RUN = '"$@" || { code=$?; echo "$(date): exit code $code"; }'  # in bash $(date) changes $?
LONG_WAIT = 1800  # seconds of waiting after which a person is told


class Watch:
    """Sees every verdict of a session. Its only decision is `enough`: no new experiment begins."""

    def __init__(self, tag: Tag, patience: float, target: float | None, command: str | None):
        self.enough = ""  # why no new experiment begins; "": they may
        self._tag = tag
        self._patience = patience  # experiments without a keep
        self._target = target
        self._command = command
        self._without_keep = 0
        self._has_told_wait = False

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

    def tell(self, news: str) -> subprocess.Popen | None:
        """Begin to tell a person, and return at once."""
        if not self._command:
            return None
        text = f"{socket.gethostname()}: {self._tag.branch}: {news}\n{self._tag.ledger.standing()}\n"
        limit = ["timeout", TIME_LIMIT] if shutil.which("timeout") else []
        with contextlib.suppress(OSError), open(self._tag.home / "notify.log", "a") as log:
            options = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            child = subprocess.Popen(["sh", "-c", RUN, "sh", *limit, "sh", "-c", self._command], **options)
            with child.stdin:
                child.stdin.write(text.encode(errors="replace"))
            return child
        return None

    def close(self, reason: str) -> None:
        """The session is over: tell it, and wait a few seconds for the command."""
        child = self.tell(f"the loop ended: {reason}")
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(LAST_WAIT)
