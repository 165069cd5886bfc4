"""Whether a session has done enough (--patience, --target), and what a person is told meanwhile (--notify)."""

import time

from harness.notify import Notifier
from harness.prompt import standing
from harness.screen import duration, say
from harness.store import Store

LONG_WAIT = 1800  # seconds of waiting after which a person is told


class Watch:
    """Sees every verdict of a session. Its only decision is `enough`: no new candidate begins."""

    def __init__(self, store: Store, patience: float, target: float | None, command: str):
        self.enough = ""  # why no new candidate begins; "": they may
        self.why_ended = ""  # the session, for the person who is told
        self._store = store
        self._patience = patience  # experiments without a keep
        self._target = target
        self._without_keep = 0  # experiments that were decided since the last keep
        self._has_told_wait = False
        self._notifier = Notifier(command, store.home / "notify.log")

    def take_keep(self, commit: str, former: str, run: int, description: str) -> None:
        """An experiment was kept; `former` was the champion before it."""
        self._without_keep = 0
        domain = self._store.domain
        score = self._store.estimate(commit)
        gain = domain.gain(self._store.estimate(former), score)
        self._tell(f"kept {domain.metric} {score:.6f} (gain {gain:.6f} {domain.unit}, run {run:04d}): {description}")

    def take_no_keep(self) -> None:
        """An experiment was discarded, or crashed."""
        self._without_keep += 1
        if self._without_keep >= self._patience:
            self._end(f"no keep in {self._without_keep} experiments (--patience)")

    def look_for_target(self) -> None:
        score = self._store.estimate(self._store.champion)
        if self._target is None or score is None:
            return
        if self._store.domain.gain(self._target, score) >= 0:
            self._end(f"the champion's {score:.6f} reaches --target {self._target:g}")

    def look_for_long_wait(self, waits: dict[str, float]) -> None:
        """Tell of a long wait, once each. `waits`: what the loop waits for -> time.monotonic() since when."""
        if not waits:
            self._has_told_wait = False
            return
        what = min(waits, key=waits.get)
        seconds = time.monotonic() - waits[what]
        if seconds > LONG_WAIT and not self._has_told_wait:
            self._has_told_wait = True
            self._tell(f"waiting for {duration(seconds)} {what}")

    def close(self) -> None:
        """The session is over."""
        self._tell(f"the loop ended: {self.why_ended}")
        self._notifier.close()

    def _end(self, reason: str) -> None:
        """As Ctrl-C once does: what runs is finished, nothing new begins."""
        if not self.enough:
            self.enough = reason
            say(f"enough: {reason}; finishing what runs, then stopping")

    def _tell(self, news: str) -> None:
        """The text may go to a stranger's server: it holds no path, no log and no error's text."""
        self._notifier.tell(f"{self._store.branch}: {news}\n{standing(self._store.rows, self._store.domain)}")
