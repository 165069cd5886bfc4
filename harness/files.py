"""Files where agents and runs can write: read without a hang, written whole, locked. It knows nothing of contents."""

import contextlib
import fcntl
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

STAY_ON_THIS_DISK = "--one-file-system" if sys.platform == "linux" else "-x"  # for rm: a run may have mounted something


def open_regular(path: Path):
    """Open a regular file to read bytes. OSError for anything else: a run may leave a pipe there, which never ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, first: int = -1, last: int = 0) -> str:
    """The text of a regular file, or only its `first` or `last` bytes; "" where there is none. What is not UTF-8 is
    replaced."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        if last:
            file.seek(max(0, os.fstat(file.fileno()).st_size - last))
        return file.read(last or first).decode(errors="replace")
    return ""


def read_tail(path: Path, lines: int, width: int = 300) -> str:
    """The last lines of a log, each cut to `width` characters; "" where there is none."""
    text = read_text(path, last=4 * width * lines).strip()  # a character has up to four bytes
    return "\n".join(line[:width] for line in re.split(r"[\r\n]+", text)[-lines:])


def write_atomically(path: Path, content: str | bytes, has_other_writers: bool = False) -> None:
    """Put a text or bytes into a file so that a reader, or a power cut, meets the old one or the new one whole.

    Where other processes may write the same file meanwhile, each has a temporary file of its own.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}" if has_other_writers else f".{path.name}")
    try:
        temporary.unlink(missing_ok=True)  # a killed writer's
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # a full disk, or a folder in place of the file
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def remove_folder(path: Path) -> None:
    """Remove a folder as far as that is possible; what cannot be removed stays.

    By rm, since Python's own rmtree ends with a RecursionError at a thousand folders in one another.
    """
    subprocess.run(["rm", "-rf", STAY_ON_THIS_DISK, "--", str(path)], stdin=subprocess.DEVNULL, capture_output=True)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the flock on a file; never waits."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
