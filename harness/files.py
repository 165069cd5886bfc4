"""Files that others may break: read without a hang, written whole, locked."""

import contextlib
import fcntl
import os
import re
import stat
from pathlib import Path


def open_regular(path: Path):
    """Open a regular file to read bytes. OSError for anything else: a run may leave a pipe there, which never ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(f"{path} is not a regular file")
    return file


def read_text(path: Path) -> str:
    """The text of a regular file, "" where there is none; what is not UTF-8 is replaced."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        return file.read().decode(errors="replace")
    return ""


def read_tail(path: Path, lines: int) -> str:
    """The last lines of a log, each cut to 300 characters; "" where there is none."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - 300 * lines))
        text = file.read().decode(errors="replace").strip()
        return "\n".join(line[:300] for line in re.split(r"[\r\n]+", text)[-lines:])
    return ""


def write_atomically(path: Path, text: str) -> None:
    """Put a text into a file so that a reader, or a power cut, meets the old one or the new one whole."""
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def take_lock(file) -> bool:
    """Take the flock on an open file if nobody else has it."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def is_locked(path: Path) -> bool:
    """Whether somebody holds the flock on a file; never waits."""
    with contextlib.suppress(OSError), open(path) as file:
        return not take_lock(file)
    return False
