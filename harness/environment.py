"""The machine: what a child is told of it, and what must be there before a run. Its faults are never an idea's."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import site
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

from harness.contract import ContractError, Description, Domain, read_description
from harness.files import is_locked, open_regular, remove_folder, write_atomically
from harness.processes import run_in_foreground
from harness.screen import UserError, listed, one_line

MIN_FREE_GB = 1.0  # GB that the disk must have free before a run
SAMPLE_BYTES = 2**16  # of a training file, read at each of three places
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
            with open_regular(Path(os.path.realpath(path))) as file:  # a person may keep it elsewhere, and link to it
                is_same = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            is_same = False
        if not is_same:
            return str(path)
    return ""


Listing = dict[str, tuple[int, int]]  # path or name of a file -> its size, modification time in ns


def load_listing(path: Path) -> Listing | None:
    """A listing as it was saved; None where it was not, or not whole."""
    with contextlib.suppress(OSError, ValueError), open_regular(path) as file:
        return {name: tuple(facts) for name, facts in json.loads(file.read()).items()}
    return None


def training_files(facts: Description) -> dict[str, Path]:
    """The files that stand beside the described ones and are of their kind: no digest of the description covers them.

    Name in the cache -> path. Those at its top level are left out: a preparation may write its notes there anew.
    Elsewhere it adds files, and changes none.
    """
    found = {}
    for folder, suffix in {(Path(name).parent, Path(name).suffix) for name in facts.files}:
        if folder == Path("."):
            continue
        for path in Path(facts.cache, folder).glob("*"):
            name = f"{folder}/{path.name}"
            if path.suffix == suffix and name not in facts.files:
                found[name] = path
    return found


def look_at_data(facts: Description) -> Listing:
    """The training files. To be compared within a session."""
    return {name: _size_and_time(path) for name, path in training_files(facts).items()}


def sample_data(facts: Description) -> dict[str, str]:
    """Training file -> digest of its size, beginning, middle and end: another file in its place has another one.

    To be compared between sessions, before which a person may have copied the cache, or prepared it anew.
    """
    found = {}
    for name, path in training_files(facts).items():
        with contextlib.suppress(OSError), open_regular(Path(os.path.realpath(path))) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            for place in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                file.seek(place)
                digest.update(file.read(SAMPLE_BYTES))
            found[name] = digest.hexdigest()
    return found


def changed_training_data(before: dict, now: dict, facts: Description) -> str:
    """The files that were changed or removed, "" if none; those that came since are a preparation's."""
    return listed(str(Path(facts.cache, name)) for name in before if now.get(name) != before[name])


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
WEIGHTS = re.compile(r".*\.(pt|pth|ckpt|bin|npy|npz|pkl|pickle|safetensors|tokens)", re.IGNORECASE)
MAX_COMPILED_BYTES = 2**26  # of one file: a kernel has kilobytes
MAX_COMPILED_LEVELS = 8  # of folders
TRAINS_NOTE = "inductor/fit.json"  # train.py's own, in which a device batch is remembered
MAX_NOTE_BYTES = 2**16


def remove_foreign_files(compile_cache: Path) -> None:
    """Remove what no compiler puts into its folder: a run may have left weights there, or a pipe, for the next one."""
    for parent, folders, names in os.walk(compile_cache):
        place = Path(parent).relative_to(compile_cache)
        is_top = len(place.parts) < 2
        for name in list(folders):
            path = Path(parent, name)
            is_foreign = is_top and not COMPILER_FOLDERS.fullmatch((place / name).as_posix())
            is_deep = len(place.parts) == MAX_COMPILED_LEVELS
            if (is_foreign or is_deep) and not path.is_symlink():
                folders.remove(name)
                remove_folder(path)
            elif path.is_symlink():
                names.append(name)
        for name in names:
            path = Path(parent, name)
            with contextlib.suppress(OSError):  # a run beside this one may be replacing it
                if not _is_compilers(place / name, path.lstat(), is_top):
                    path.unlink()


def _is_compilers(name: Path, facts: os.stat_result, is_top: bool) -> bool:
    """Whether a file may be a compiler's, or the one note of train.py, by its name in the cache."""
    if not stat.S_ISREG(facts.st_mode):
        return False
    if is_top:
        return name.as_posix() == TRAINS_NOTE and facts.st_size <= MAX_NOTE_BYTES
    return facts.st_size <= MAX_COMPILED_BYTES and not WEIGHTS.fullmatch(name.name)


# Python and the installed packages: a run that changes them would reach into every later one


class Packages:
    """Installed packages and Python's own library as names, sizes and times of files, to be compared later."""

    def __init__(self, files: Listing):
        self.files = files

    @classmethod
    def installed(cls) -> "Packages":
        """As they are now: about 20,000 files in a tenth of a second. Python's own caches are left out."""
        paths = sysconfig.get_paths()
        roots = {paths["purelib"], paths["platlib"], paths["stdlib"]}
        is_virtual = sys.prefix != sys.base_prefix
        if site.ENABLE_USER_SITE or not is_virtual:  # PYTHONNOUSERSITE is not handed on to a run
            roots.add(site.getusersitepackages())
        files: Listing = {}
        for root in sorted(roots):
            folders = [root]
            while folders:
                _list_folder(folders.pop(), files, folders)
        for path in _files_of_python():
            files[path] = _size_and_time(path)
        return cls(files)

    @classmethod
    def load(cls, path: Path) -> "Packages | None":
        """As they were saved; None where they were not, or not whole."""
        files = load_listing(path)
        return None if files is None else cls(files)

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(self.files))

    def difference(self, now: "Packages") -> str:
        """The names of the files that were added, removed or changed, "" if none."""
        names = set(self.files) ^ set(now.files)
        names -= _files_of_python() - set(self.files)  # an older loop did not look at them
        names |= {name for name in set(self.files) & set(now.files) if self.files[name] != now.files[name]}
        return listed(names)


def _files_of_python() -> set[str]:
    """The interpreter, what configures it, and the archive that goes before its library; some may not exist."""
    library = Path(sysconfig.get_paths()["stdlib"])
    archive = library.with_name(f"python{sys.version_info.major}{sys.version_info.minor}.zip")
    return {os.path.realpath(sys.executable), os.path.join(sys.prefix, "pyvenv.cfg"), str(archive)}


def _size_and_time(path: str | Path) -> tuple[int, int]:
    """Size and modification time in ns; (0, 0) for a file that does not exist."""
    with contextlib.suppress(OSError):
        facts = os.stat(path)
        return (facts.st_size, facts.st_mtime_ns)
    return (0, 0)


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
