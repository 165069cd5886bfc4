"""What a person sees while the loop works, and how they stop it: messages, the live line, durations, Ctrl-C.

Nothing here knows what the loop does.
"""

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

ERROR_CHARS = 600  # an error line is cut to this
NAMES_LISTED = 5  # that a message gives


class UserError(Exception):
    """Something that a person can mend; exit code 1, or 2 for usage and refusal."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class StopNow(Exception):
    """The second Ctrl-C, or SIGTERM: everything ends at once."""


# Messages

_writing = threading.Lock()  # workers speak at the same time


def say(text: str) -> None:
    """A line on stderr, over a live line if one is there. A terminal that went away ends nothing."""
    _write(text + "\n")


def show_live_line(text: str) -> None:
    """The live line, rewritten in place; for a terminal only."""
    _write(text[: shutil.get_terminal_size().columns - 1])


def is_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def _write(text: str) -> None:
    with _writing:
        try:
            clear_line = "\r\033[K" if is_terminal() else ""
            print(clear_line + text, end="", file=sys.stderr, flush=True)
        except OSError:
            # What cannot be written stays in the buffer and would fail the exit: go on with a new one.
            sys.stderr = os.fdopen(2, "w", closefd=False)
        except (ValueError, AttributeError):  # it is closed, or there was none from the start
            pass


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def listed(names: Iterable[str]) -> str:
    """`a, b and 3 more`: sorted, not more than a line holds."""
    names = sorted(names)
    more = f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else ""
    return ", ".join(names[:NAMES_LISTED]) + more


# Control characters, what UTF-8 cannot hold, and marks that turn the direction of text, in which words can hide.
UNPRINTABLE = re.compile(r"[\x00-\x20\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")


def one_line(text: str, limit: int = 200) -> str:
    """Fit for a cell of the ledger."""
    whole = text.encode(errors="replace").decode()  # JSON may hold half a character
    return " ".join(UNPRINTABLE.sub(" ", whole).split())[:limit].rstrip()


# Ctrl-C once, or a file STOP: finish what runs. Ctrl-C twice, or SIGTERM: stop now


class Interrupts:
    """A context in which signals are only noted; `heed` acts on them. The main thread calls it now and then."""

    def __init__(self, stop_file: Path):
        self.is_stopping = False  # no new experiment begins
        self.stop = threading.Event()  # ends every child at once
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
            self._finish()
        while self._heeded < len(self._sent):
            number = self._sent[self._heeded]
            self._heeded += 1
            if number == signal.SIGTERM or self.is_stopping:
                self.is_stopping = True
                self.stop.set()
                raise StopNow
            self._finish()

    def _finish(self) -> None:
        if not self.is_stopping:
            say("finishing what runs, then stopping (Ctrl-C again: stop now)")
        self.is_stopping = True
