"""The machine: what a child is told of it, and what must be there before a run. Its faults are never an idea's."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import site
import subprocess
import sysconfig
from pathlib import Path

from harness.contract import ContractError, Description, Domain, read_description
from harness.files import is_locked, remove_folder, write_atomically
from harness.processes import run_in_foreground
from harness.screen import UserError, listed, one_line

MIN_FREE_GB = 1.0  # GB that the disk must have free before a run
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|_PAT$", re.IGNORECASE)  # names withheld from training
OF_A_RUN = (  # the loop sets these anew for each child: what its own environment says of them is not handed on
    "AUTORESEARCH_RESULT", "AUTORESEARCH_AUDIT", "AUTORESEARCH_SEED", "AUTORESEARCH_MARK",
)  # fmt: skip


def variables_for_agent(profile: str) -> dict[str, str]:
    """The environment of an agent: the person's own, and the profile of the run."""
    kept = {key: value for key, value in os.environ.items() if key not in OF_A_RUN}
    return kept | {"AUTORESEARCH_PROFILE": profile}


def variables_for_training(profile: str = "") -> dict[str, str]:
    """The environment of the judge and of a run: no keys, tokens or secrets, and nothing that changes Python."""
    kept = {}
    for key, value in os.environ.items():
        changes_python = key.startswith("PYTHON")
        if key not in OF_A_RUN and not changes_python and not SECRET.search(key):
            kept[key] = value
    if profile:
        kept["AUTORESEARCH_PROFILE"] = profile
    return kept


# What the judge says


def ask_judge(domain: Domain, place: Path, variables: dict[str, str]) -> Description:
    """The description of the judge in a folder. UserError with its own last line if it gives none."""
    child = subprocess.run(domain.describe_command, cwd=place, env=variables, capture_output=True, text=True)
    if child.returncode == -signal.SIGINT:  # Ctrl-C at a terminal goes to the judge too
        raise KeyboardInterrupt
    if child.returncode:
        lines = child.stderr.strip().splitlines() or ["the judge cannot describe itself"]
        raise UserError(one_line(lines[-1].removeprefix("error: "), 500), 2 if child.returncode == 2 else 1)
    try:
        return read_description(json.loads(child.stdout.splitlines()[-1]))
    except (ValueError, IndexError) as error:
        said = str(error) if isinstance(error, ContractError) else "it is not a JSON object"
        raise UserError(f"{' '.join(domain.describe_command)} printed no description: {said}") from error


def prepare_data(domain: Domain, place: Path, variables: dict[str, str], is_stopped) -> None:
    """Let the judge make the missing data; what it prints is for the person."""
    run_in_foreground(domain.prepare_command, cwd=place, env=variables, is_stopped=is_stopped)


# What must be there before a run


def changed_data(facts: Description) -> str:
    """The first file of the data that is not as it was prepared, "" if all are."""
    for name, digest in facts.files.items():
        path = Path(facts.cache, name)
        try:
            with open(path, "rb") as file:
                is_same = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            is_same = False
        if not is_same:
            return str(path)
    return ""


def lacking_disk(folder: Path) -> str:
    """What the disk of a folder lacks, "" if it has room."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb >= MIN_FREE_GB:
        return ""
    return f"{free_gb:.1f} GB free on the disk of {folder}, {MIN_FREE_GB} GB needed"


def busy_device(facts: Description, device: str) -> str:
    """Who holds a device, "" if nobody does."""
    if device not in facts.devices or not is_locked(Path(facts.devices[device].lock)):
        return ""
    return f"another run holds the device {facts.device_name} ({facts.devices[device].lock})"


# The compile cache: kept between runs, so that a run finds compiled what it has in common with those before

COMPILER_FOLDERS = re.compile(
    r"inductor|inductor/(triton|fxgraph|aotautograd|locks|[0-9a-z]{2})|triton|triton/([A-Z2-7]{52}|[0-9]+)"
)
COMPILER_FILES = re.compile(r"inductor/(fit.*|[^/]+\.(py|lock|tmp))")  # train.py's own note, and work in progress


def remove_foreign_files(compile_cache: Path) -> None:
    """Remove what no compiler puts at the top of its folder: a run may have left weights there for the next one."""
    for pattern in ("*", "*/*"):
        for path in compile_cache.glob(pattern):
            name = path.relative_to(compile_cache).as_posix()
            is_folder = path.is_dir() and not path.is_symlink()
            if is_folder and not COMPILER_FOLDERS.fullmatch(name):
                remove_folder(path)
            elif not is_folder and not COMPILER_FILES.fullmatch(name):
                path.unlink(missing_ok=True)


# Installed packages: a run that changes them would reach into every later one


class Packages:
    """Installed packages and Python's own library as names, sizes and times of files, to be compared later."""

    def __init__(self, files: dict[str, tuple[int, int]]):
        self.files = files  # path -> size, modification time in ns

    @classmethod
    def installed(cls) -> "Packages":
        """As they are now: about 20,000 files in a tenth of a second. Python's own caches are left out."""
        paths = sysconfig.get_paths()
        roots = {paths["purelib"], paths["platlib"], paths["stdlib"]}
        if site.ENABLE_USER_SITE:
            roots.add(site.getusersitepackages())
        files: dict[str, tuple[int, int]] = {}
        for root in sorted(roots):
            folders = [root]
            while folders:
                _list_folder(folders.pop(), files, folders)
        return cls(files)

    @classmethod
    def load(cls, path: Path) -> "Packages | None":
        """As they were saved; None where they were not, or not whole."""
        with contextlib.suppress(OSError, ValueError):
            return cls({name: tuple(facts) for name, facts in json.loads(path.read_bytes()).items()})
        return None

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(self.files))

    def difference(self, now: "Packages") -> str:
        """The names of the files that were added, removed or changed, "" if none."""
        names = set(self.files) ^ set(now.files)
        names |= {name for name in set(self.files) & set(now.files) if self.files[name] != now.files[name]}
        return listed(names)


def _list_folder(folder: str, files: dict, folders: list[str]) -> None:
    """Add a folder's files to `files` and its folders to `folders`."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in ("__pycache__", "site-packages"):  # those in use are roots of their own
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
                continue
            facts = entry.stat(follow_symlinks=False)
            files[entry.path] = (facts.st_size, facts.st_mtime_ns)
