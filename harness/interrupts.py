"""How a person stops a loop. Ctrl-C once, or a file STOP: finish what runs. Ctrl-C twice, or SIGTERM: stop now.

A signal is noted at once. The deciding thread acts on it, by `heed`, between two looks at its results.
"""

import contextlib
import signal
import threading
from pathlib import Path

from harness.screen import say


class StopNow(Exception):
    """The second Ctrl-C, or SIGTERM."""


class Interrupts:
    """A context in which signals are only noted; `heed` acts on them."""

    def __init__(self, stop_file: Path):
        self.is_stopping = False  # no new experiment begins
        self.stop = threading.Event()  # ends every child
        self._stop_file = stop_file
        self._sent: list[int] = []
        self._heeded = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        # A handler may run in the middle of a print or with a lock held: it does nothing but append.
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, lambda number, frame: self._sent.append(number))
        self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal ends nothing
        with contextlib.suppress(OSError):
            self._stop_file.unlink()  # an old one
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def were_sent(self) -> bool:
        return bool(self._sent)

    def heed(self) -> None:
        """Act on what was sent. Raises StopNow where everything is to end at once."""
        if self._stop_file.is_file():
            with contextlib.suppress(OSError):
                self._stop_file.unlink()
            self._ask_to_stop()
        while self._heeded < len(self._sent):
            number = self._sent[self._heeded]
            self._heeded += 1
            if number == signal.SIGTERM or self.is_stopping:
                self.stop.set()
                raise StopNow
            self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        if not self.is_stopping:
            say("finishing what runs, then stopping (Ctrl-C again: stop now)")
        self.is_stopping = True
