"""The machine: a child's environment, what a run needs of it, who else uses the processors. Devices: runner.py."""

import contextlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from harness import isolation
from harness.console import UserError, listed, one_line, say
from harness.domain import ContractError, Description, Domain, read_description
from harness.files import is_locked
from harness.processes import find_marked

DESCRIBE_SECONDS = 600  # that the evaluator may take to describe itself: a driver may hang
LOOK_SECONDS = 0.5  # between looks at what processes used
MIN_FREE_GB = 1.0  # GB that the disk must have free before a run
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|_PAT$", re.IGNORECASE)  # names withheld from training
RUN_VARIABLES = (  # the loop sets these anew for each child: what its own environment says of them is not handed on
    "AUTORESEARCH_RESULT", "AUTORESEARCH_AUDIT", "AUTORESEARCH_SEED", "AUTORESEARCH_MARK",
)  # fmt: skip
EXTRA_PACKAGES = {  # what the extras ray and tpe bring may come and go: a tag takes up --ray or --agent tpe later
    "alembic", "attrs", "colorlog", "jsonschema", "jsonschema-specifications", "mako", "msgpack", "optuna", "protobuf",
    "ray", "referencing", "rpds-py", "sqlalchemy",
}  # fmt: skip


def variables_for_agent(profile: str) -> dict[str, str]:
    """The environment of an agent: the person's own, and the profile of the run."""
    kept = {key: value for key, value in os.environ.items() if key not in RUN_VARIABLES}
    return kept | {"AUTORESEARCH_PROFILE": profile}


def variables_for_training(profile: str = "") -> dict[str, str]:
    """The environment of the evaluator and of a run: no keys, tokens or secrets, and nothing that changes Python, or
    that Ray gave its worker."""
    kept = {}
    for key, value in os.environ.items():
        if key not in RUN_VARIABLES and not key.startswith(("PYTHON", "RAY_")) and not SECRET.search(key):
            kept[key] = value
    if profile:
        kept["AUTORESEARCH_PROFILE"] = profile
    return kept


# What the evaluator says


def describe(domain: Domain, place: Path, variables: dict[str, str], is_isolated: bool = False) -> Description:
    """The description by the evaluator in a folder. UserError with its own last line if it gives none."""
    command = isolation.wrap(domain.describe_command, place) if is_isolated else domain.describe_command
    options = {"capture_output": True, "text": True, "timeout": DESCRIBE_SECONDS}
    options["start_new_session"] = True  # Ctrl-C is for the loop
    try:
        child = subprocess.run(command, cwd=place, env=variables, **options)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the evaluator said nothing of itself in {DESCRIBE_SECONDS} s") from error
    if child.returncode:
        lines = child.stderr.strip().splitlines() or ["the evaluator cannot describe itself"]
        reason = re.sub(r"^(error|[\w.]*UserError): ", "", lines[-1])
        raise UserError(one_line(reason, 500), 2 if child.returncode == 2 else 1)
    try:
        return read_description(json.loads(child.stdout.splitlines()[-1]))
    except (ValueError, IndexError) as error:
        said = str(error) if isinstance(error, ContractError) else "it is not a JSON object"
        raise UserError(f"{' '.join(domain.describe_command)} printed no description: {said}") from error


def try_isolation(domain: Domain, place: Path, variables: dict[str, str], facts: Description) -> None:
    """Give isolation up, and say so, where the evaluator does not find its GPUs inside: a driver may need more."""
    if facts.device == "cpu" or isolation.problem():
        return
    try:
        found = describe(domain, place, variables, is_isolated=True)
        problem = "" if found.devices.keys() == facts.devices.keys() else f"it finds {found.device_name}"
    except UserError as error:
        problem = f"the evaluator says: {error}"
    if problem:
        isolation.give_up(f"inside bubblewrap {problem}, outside {facts.device_name}")


def prepare_data(domain: Domain, place: Path, variables: dict[str, str], is_stopped) -> None:
    """Let the evaluator make the missing data; what it prints is for the person."""
    with subprocess.Popen(domain.prepare_command, cwd=place, env=variables, stdin=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if is_stopped():
                process.terminate()
            time.sleep(0.1)


# What must be there before a run


def lacking_disk(folder: Path) -> str:
    """What the disk of a folder lacks, "" if it has room."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    return "" if free_gb >= MIN_FREE_GB else f"{free_gb:.1f} GB free on the disk of {folder}, {MIN_FREE_GB} GB needed"


def busy_device(facts: Description, device: str) -> str:
    """Who holds a device, "" if nobody does."""
    lock = facts.devices.get(device, {}).get("lock", "")
    return f"another run holds the device {facts.device_name} ({lock})" if is_locked(Path(lock)) else ""


def installed_packages() -> dict[str, str]:
    """Name -> version of every distribution that Python finds, those of extras aside."""
    # Once it is imported, Ray has folders of its own inside site-packages on the path.
    packages = sysconfig.get_paths()["purelib"]
    places = [place for place in sys.path if not place.startswith(packages + os.sep)]
    found = {str(one.name).lower(): one.version for one in importlib.metadata.distributions(path=places) if one.name}
    return {name: version for name, version in found.items() if name not in EXTRA_PACKAGES}


def changed_packages(before: dict[str, str]) -> list[str]:
    """`name 1.0 -> 2.0` for every distribution that is not as it was."""
    if not before:
        return []
    now = installed_packages()
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return [f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}" for name in names]


def restore_packages(before: dict[str, str]) -> None:
    """Put the environment back by uv, and no more of it than what changed. UserError if that fails."""
    changes = changed_packages(before)
    now = installed_packages()
    added = sorted(now.keys() - before.keys())
    other = sorted(f"{name}=={version}" for name, version in before.items() if now.get(name) != version)
    commands = []
    if added:
        commands.append(["uv", "pip", "uninstall", "--python", sys.executable, *added])
    if other:
        commands.append(["uv", "pip", "install", "--no-deps", "--python", sys.executable, *other])
    for command in commands:
        try:
            options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "start_new_session": True}
            subprocess.run(command, check=True, **options)
        except (OSError, subprocess.CalledProcessError) as error:
            said = one_line(getattr(error, "stderr", "") or str(error))
            problem = f"the installed packages changed ({listed(changes)}) and could not be put back: {said}"
            raise UserError(f"{problem}. Put them back and start again, or choose another --tag") from error
    importlib.invalidate_caches()
    say(f"note: the installed packages were put back ({listed(changes)})")


# Who else uses the processors


class OthersMeter:
    """Measures what others use of the processors: what anyone uses, without this process and all that carry its mark.

    `look` is to be called often. Bubblewrap does not wait for what it started, so the seconds of an ended process are
    in no parent's clock: what it used after the last look counts as others'.
    """

    def __init__(self, mark: str):
        self.own_seconds = 0.0  # CPU time of these, as far as it was seen
        self._mark = mark
        self._began_at = time.monotonic()
        self._looked_at = -math.inf
        self._by_process = self._read_own()
        self._busy_before = _busy_seconds()

    def look(self) -> None:
        """Add up what our processes used since the last look, unless that was a moment ago."""
        if time.monotonic() - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        now = self._read_own()
        for pid, seconds in now.items():
            self.own_seconds += max(0.0, seconds - self._by_process.get(pid, 0.0))
        self._by_process = now

    def fraction(self) -> float | None:
        """Of the processors, that others used; None where that cannot be known (not Linux)."""
        busy = _busy_seconds()
        if busy is None or self._busy_before is None:
            return None
        capacity = (time.monotonic() - self._began_at) * len(os.sched_getaffinity(0))
        return min(max((busy - self._busy_before - self.own_seconds) / capacity, 0.0), 1.0)

    def _read_own(self) -> dict[int, float]:
        return {pid: _cpu_seconds(pid) for pid in (os.getpid(), *find_marked(self._mark))}


def _busy_seconds() -> float | None:
    """CPU seconds that anyone used: on the processors that this process may use if these are some of them, else in
    this control group if there is one, else on the machine; None: not on Linux."""
    cores = os.sched_getaffinity(0) if sys.platform == "linux" else set()
    with contextlib.suppress(OSError):
        found = re.search(r"^usage_usec (\d+)$", Path("/sys/fs/cgroup/cpu.stat").read_text(), re.MULTILINE)
        if found and len(cores) == os.cpu_count():
            return int(found[1]) / 1e6
    with contextlib.suppress(OSError):
        busy = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *words = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
                # user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in the first two already
                ticks = [int(word) for word in words[:8]]
                busy += sum(ticks) - ticks[3] - ticks[4]
        return busy / os.sysconf("SC_CLK_TCK")
    return None


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process, without its children's; 0 for one that is gone."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, words[11:13])) / os.sysconf("SC_CLK_TCK")
    return 0.0
