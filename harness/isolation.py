"""What a run sees and can change of the machine, by bubblewrap where that is installed. Agents are not isolated.

A run sees the machine's files read-only, a /tmp and a /dev/shm of its own, no network and no other process; what it
starts ends with it. The hidden files of the home folder, where programs keep keys and caches, are out of its sight
unless it needs them. It can write to its own folder, and to what `wrap` is told. AUTORESEARCH_ISOLATION=off switches it
off.
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from harness.console import one_line

PROBE_SECONDS = 20  # for bubblewrap to start and end
OFF = "AUTORESEARCH_ISOLATION is off"
INSTALL = "'apt install bubblewrap' or your system's package of it"


_given_up: list[str] = []  # why isolation was switched off in this process


def problem() -> str:
    """Why runs are not isolated on this machine, "" if they are."""
    return _given_up[0] if _given_up else _why_it_fails()


def give_up(reason: str) -> None:
    """Isolate no run of this process."""
    _given_up.append(reason)


@functools.cache
def _why_it_fails() -> str:
    if os.environ.get("AUTORESEARCH_ISOLATION") == "off":
        return OFF
    if sys.platform != "linux":
        return "bubblewrap is for Linux"
    if not shutil.which("bwrap"):
        return f"bubblewrap is not installed: {INSTALL}"
    with tempfile.TemporaryDirectory() as folder:
        command = wrap([sys.executable, "-c", "pass"], Path(folder))
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=PROBE_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            said = one_line(getattr(error, "stderr", "") or str(error))
            return f"bubblewrap does not work here: {said}"
    return ""


def wrap(command: Iterable[str], folder: Path, writable: Iterable[Path] = (), readable: Iterable[Path] = ()):
    """The command and its arguments, to be run isolated. It may write to `folder` and to the existing `writable` files
    or folders, and read the existing `readable` ones wherever they lie."""
    words = ["bwrap", "--ro-bind", "/", "/", "--dev-bind", "/dev", "/dev", "--proc", "/proc"]
    words += ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--die-with-parent"]
    empty = [*filter(Path.is_dir, (Path("/tmp"), Path("/dev/shm"))), *_hidden()]
    for path in empty:
        words += ["--tmpfs", path] if path.is_dir() else ["--ro-bind", "/dev/null", path]
    binds = [("--ro-bind", path) for path in (*_python_folders(), *_hub_folders(), *readable)]
    binds += [("--bind", path) for path in (*writable, folder)]
    for kind, given in binds:
        path = _below_real_home(given)
        places = {path.resolve()}
        if any(path.is_relative_to(one) for one in empty):  # elsewhere a link leads there by itself
            places.add(path)
        for place in places:
            if place.is_absolute() and place.exists():
                words += [kind, path.resolve(), place]
    return [str(word) for word in [*words, "--", *command]]


def _below_real_home(path: Path) -> Path:
    """Where the way to the home folder has a link, bubblewrap cannot bind onto what lies behind it."""
    home = Path.home()
    return home.resolve() / path.relative_to(home) if path.is_relative_to(home) else path


def _hidden() -> list[Path]:
    """The hidden files and folders of the home folder; links lead elsewhere."""
    home = Path.home().resolve()
    if not home.is_dir() or home == Path("/"):
        return []
    return [path for path in sorted(home.glob(".*")) if not path.is_symlink() and (path.is_dir() or path.is_file())]


def _python_folders() -> list[Path]:
    """The interpreter and its packages."""
    places = [sys.prefix, sys.base_prefix, *filter(os.path.isdir, sys.path)]
    return [Path(place).absolute() for place in dict.fromkeys(places)]


def _hub_folders() -> list[Path]:
    """What was fetched from a hub before, attention kernels say."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home, "hub")
    places = [hub, os.environ.get("KERNELS_CACHE") or hub]
    return [Path(place).expanduser().absolute() for place in dict.fromkeys(places)]
