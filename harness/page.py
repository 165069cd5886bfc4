"""The page report.html, one file that loads nothing: how text gets onto it, safely and cut to size.

Everything that an agent or a run wrote goes through `clean` and is escaped. The page's own policy forbids the browser
to load anything, or to run any script but the one in the template (page.html). What the page says is in morning.py.

jinja2 and its markupsafe are imported where they are used: they take a moment, and most commands write no page.
"""

import base64
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

TEMPLATE = Path(__file__).with_name("page.html")
LINE_CHARS = 400  # of one line of a diff or a log
TERMINAL_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")
CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff"
DIRECTIONS = r"\u200e\u200f\u2028-\u202e\u2066-\u2069"
UNSHOWABLE = re.compile(f"[{CONTROLS}{DIRECTIONS}]")
ADDED = "+"
REMOVED = "-"


def read_template() -> str:
    """The template, for `render`. A loop reads it at its start: later an agent may have edited the file."""
    return TEMPLATE.read_text()


def render(template: str, **values) -> str:
    """The page. Plain strings are escaped; what is markup already, such as a picture, is of type Markup."""
    import jinja2

    undefined = jinja2.StrictUndefined
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=undefined)
    environment.filters["digest"] = digest
    return environment.from_string(template).render(**values)


def digest(text: str) -> str:
    """A script's digest, as the page's policy names the one script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()


def clean(text: str) -> str:
    """The text without what a browser would not show as it is: escape sequences, control and direction characters."""
    text = TERMINAL_CODES.sub("", text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return UNSHOWABLE.sub("\ufffd", text)


def shorten_lines(text: str) -> str:
    """Clean text whose lines are cut where they are very long."""
    lines = []
    for line in clean(text).split("\n"):
        if len(line) > LINE_CHARS:
            line = f"{line[:LINE_CHARS]}… ({len(line) - LINE_CHARS:,} more characters)"
        lines.append(line)
    return "\n".join(lines)


def bytes_on_page(text: str) -> int:
    """Bytes that a text takes once it is escaped."""
    from markupsafe import escape

    return len(str(escape(text)).encode())


def cut_to(text: str, limit: float, keep_end: bool = False) -> str:
    """Whole lines from the beginning, or the end, of a text: as many as take at most `limit` bytes on the page."""
    if bytes_on_page(text) <= limit:
        return text
    lines = text.split("\n")
    taken: list[str] = []
    size = 0
    for line in reversed(lines) if keep_end else lines:
        size += bytes_on_page(line) + 1
        if size > limit:
            break
        taken.append(line)
    left_out = f"… {len(lines) - len(taken):,} more lines"
    if keep_end:
        return "\n".join([left_out, *reversed(taken)])
    return "\n".join([*taken, left_out])


def fair_limit(sizes: Iterable[int], total: float) -> float:
    """The limit for each of these sizes at which they take at most `total` together; small ones stay whole."""
    left = total
    waiting = sorted(sizes)
    while waiting:
        share = left / len(waiting)
        if waiting[0] > share:
            return share
        left -= waiting.pop(0)
    return total


def diff_markup(text: str):
    """A diff with its added and removed lines marked."""
    from markupsafe import Markup, escape

    lines = []
    for line in text.split("\n"):
        safe = str(escape(line))
        if line.startswith(ADDED):
            safe = f"<ins>{safe}</ins>"
        elif line.startswith(REMOVED):
            safe = f"<del>{safe}</del>"
        lines.append(safe)
    return Markup("\n".join(lines))
