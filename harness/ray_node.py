"""What a node of a Ray cluster does with a job, in a process of its own that imports nothing of Ray.

The Ray worker (ray_driver.py) writes this package into a folder, starts this process there, writes the errand to its
standard input and leaves that pipe open. The pipe is the leash: it closes when the worker, the node's Ray or the loop
has died, in whatever way. Then this process ends the run with everything that the run has started, which Ray's own
cleanup does not reach.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pickle
import platform
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from harness import environment
from harness.bench import MAX_RECORD_BYTES, Job, Outcome, Place, Unavailable, measure, unpack
from harness.contract import Description, Domain
from harness.files import open_regular, write_atomically
from harness.processes import LOG_CAP, TAIL_CAP, sweep
from harness.screen import UserError, one_line

FILE_CAPS = {  # bytes of each file that come back
    "run.log": LOG_CAP + TAIL_CAP + 4096,
    "result.json": MAX_RECORD_BYTES,
    "score.log": 2**20,
}


@dataclass(frozen=True)
class Errand:
    """A job, and what a node must know beside it."""

    job: Job
    mark: str  # of the run's processes
    session: str  # of the loop: what a node remembers for it
    python: str  # the loop's Python: in the domain's commands it stands for the node's
    versions: dict[str, str]  # of the loop's packages
    variables: dict[str, str | None]  # as the loop has them: Ray sets them to values of its own
    compile_cache: Path | None = None  # on the loop's own machine; None: one for each node


@dataclass(frozen=True)
class Answer:
    """What comes back: the outcome, and the files of the run's folder."""

    outcome: Outcome
    files: dict[str, bytes]


def installed_versions() -> dict[str, str]:
    """Package -> version, and Python's own."""
    versions = {"python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        with contextlib.suppress(Exception):  # a broken one is nobody's concern here
            versions[distribution.metadata["Name"].lower()] = distribution.version
    return versions


def main(folder: str) -> None:
    """Read an errand from standard input, do it, write what came of it to standard output.

    The folder holds this package and is removed at the end. In both directions the data is a pickled dict of plain
    values, so that the Ray worker can read it: it has Ray, and none of these classes.
    """
    try:
        _detach()
        request = pickle.load(sys.stdin.buffer)
        stop = threading.Event()
        threading.Thread(target=_watch_leash, args=(stop,), daemon=True).start()
        reply = _carry_out(pickle.loads(request["errand"]), request["known"], request["device"], Path(folder), stop)
        if not stop.is_set():
            sys.stdout.buffer.write(pickle.dumps(reply))
            sys.stdout.buffer.flush()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _detach() -> None:
    """Be nobody's child. Ray kills the children of a worker that ends, and this process must outlive the worker by the
    moment that it takes to end the run."""
    if os.fork():
        os._exit(0)
    os.setsid()
    # Ray's worker hands its own signals down; the runs get the usual ones.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def _watch_leash(stop: threading.Event) -> None:
    sys.stdin.buffer.read()
    stop.set()


def _carry_out(errand: Errand, known: dict[str, bytes], device: str, folder: Path, stop: threading.Event) -> dict:
    """The reply: `refused` (why this node cannot, or ""), `busy` (its device, if that alone is why), `known` (its
    devices' descriptions), `answer`."""
    _set_variables(errand)
    job = replace(errand.job, domain=_localized(errand.job.domain, errand.python))
    try:
        if device in known:
            facts = pickle.loads(known[device])
        else:
            facts = _ask_own_judge(job, device, folder)
            if problem := _differs(errand, facts):
                return _refused(problem)
        descriptions = {name: pickle.dumps(facts) for name in facts.devices}
        device = device or next(iter(facts.devices))
        if problem := environment.busy_device(facts, device):
            return _refused(problem) | {"busy": device, "known": descriptions}
        answer = _measure(errand, replace(job, facts=facts), device, folder, stop)
    except (UserError, OSError) as error:
        return _refused(one_line(str(error), 500))
    finally:
        sweep(errand.mark)
    # Without this run's folder the same reason reads the same from run to run, and is told once.
    refusal = _refusal(answer.outcome).replace(str(folder), str(folder.parent))
    return {"refused": refusal, "busy": "", "known": descriptions, "answer": pickle.dumps(answer)}


def _refused(reason: str) -> dict:
    return {"refused": reason, "busy": "", "known": {}, "answer": b""}


def _set_variables(errand: Errand) -> None:
    """The node's own environment, less what Ray's worker added to it; OMP_NUM_THREADS and its like are the loop's."""
    for name in [name for name in os.environ if name.startswith("RAY_") or name == "SPT_NOENV"]:
        del os.environ[name]
    for name, value in errand.variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _localized(domain: Domain, python: str) -> Domain:
    """The domain with this node's Python in its commands."""
    commands = {}
    for entry in dataclasses.fields(domain):
        if entry.name.endswith("_command"):
            words = getattr(domain, entry.name)
            commands[entry.name] = tuple(sys.executable if word == python else word for word in words)
    return replace(domain, **commands)


def _ask_own_judge(job: Job, device: str, folder: Path) -> Description:
    """What this node's judge says of it. Raises UserError."""
    tree = folder / "judge"
    unpack(job.tree, tree)
    variables = environment.variables_for_training(job.facts.profile)
    if job.facts.device == "cuda":
        variables["CUDA_VISIBLE_DEVICES"] = device
    return environment.ask_judge(job.domain, tree, variables)


def _differs(errand: Errand, facts: Description) -> str:
    """Why a score from this node would not compare with the baseline's, "" if it would."""
    baseline = errand.job.facts
    if not facts.prepared:
        remedy = f"run 'AUTORESEARCH_PROFILE={baseline.profile} uv run prepare.py' there"
        return f"no data in {facts.cache} ({facts.problem}): {remedy}"
    if facts.device_name != baseline.device_name:
        return f"its device is {facts.device_name}, the baseline's {baseline.device_name}: leave it out of this cluster"
    if facts.digest != baseline.digest:
        remedy = f"copy {baseline.cache} of the loop's machine there, or prepare it there from the same data"
        digests = f"digest {facts.digest[:12]}, the loop's is {baseline.digest[:12]}"
        return f"other data in {facts.cache}: {digests}: {remedy}"
    own = installed_versions()
    names = [name for name, version in errand.versions.items() if own.get(name, version) != version]
    if names:
        listed = ", ".join(f"{name} {own[name]} (the loop has {errand.versions[name]})" for name in names[:3])
        return f"other packages: {listed}: run 'uv sync --extra ray' of the same commit there"
    return ""


def _refusal(outcome: Outcome) -> str:
    """Why another node should try: this one lacks something, which is not the idea's fault."""
    if isinstance(outcome, Unavailable) and outcome.retries is None:
        return outcome.reason
    return ""


def _measure(errand: Errand, job: Job, device: str, folder: Path, stop: threading.Event) -> Answer:
    base = _own_folder()
    packages = _as_first_seen(base / f"packages-{errand.session}.json", lambda: environment.Packages.installed().files)
    data = _as_first_seen(base / f"data-{errand.session}.json", lambda: environment.look_at_data(job.facts))
    output = folder / "output"
    output.mkdir()
    place = Place(
        output=output,
        scratch=folder / "bench",
        compile_cache=errand.compile_cache or base / "compile_cache",
        mark=errand.mark,
        device=device,
        packages=environment.Packages(packages),
        data=data,
    )
    outcome = measure(job, place, stop)
    return Answer(outcome, _read_files(output))


def _as_first_seen(path: Path, look: Callable[[], environment.Listing]) -> environment.Listing:
    """What the first run of this session met on this node: the later ones must meet the same."""
    listing = environment.load_listing(path)
    if listing is None:
        listing = look()
        write_atomically(path, json.dumps(listing), has_other_writers=True)  # runs on other devices of the node
    return listing


def _own_folder() -> Path:
    """This user's folder on the node, kept from run to run. OSError if it is somebody else's."""
    path = Path(tempfile.gettempdir(), f"autoresearch-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    if path.lstat().st_uid != os.getuid() or path.is_symlink():
        raise OSError(f"{path} belongs to somebody else: remove it, or set another TMPDIR for 'ray start'")
    return path


def _read_files(output: Path) -> dict[str, bytes]:
    files = {}
    for name, cap in FILE_CAPS.items():
        with contextlib.suppress(OSError), open_regular(output / name) as file:
            files[name] = file.read(cap)
    return files
