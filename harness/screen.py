"""What a person sees while the loop works: messages on stderr, the live line, durations."""

import os
import re
import shutil
import sys
from collections.abc import Iterable

ERROR_CHARS = 600  # an error line is cut to this
NAMES_LISTED = 5  # that a message gives


class UserError(Exception):
    """Something that a person can mend; exit code 1, or 2 for usage and refusal."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def say(text: str) -> None:
    """A line on stderr, over a live line if one is there. A terminal that went away ends nothing."""
    _write(text + "\n")


def show_live_line(text: str) -> None:
    """The live line: rewritten in place, on a terminal only."""
    if is_terminal():
        _write(text[: shutil.get_terminal_size().columns - 1])


def is_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def _write(text: str) -> None:
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
    """`a, b and 3 more`: in their order, not more than a line holds."""
    names = sorted(names)
    more = f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else ""
    return ", ".join(names[:NAMES_LISTED]) + more


def one_line(text: str, limit: int = 200) -> str:
    """Fit for a cell of the ledger: no tab, newline or other control character, nothing that UTF-8 cannot hold."""
    printable = re.sub(r"[\x00-\x20\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", text)
    return " ".join(printable.split())[:limit].rstrip()
