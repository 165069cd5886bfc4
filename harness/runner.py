"""One run on this machine: a Run that says what to execute goes in, what was measured comes out. It decides nothing.

`measure` unpacks the commit into a fresh folder, so whatever an agent did to other files of its worktree, the evaluator
that runs is the commit's. `Runner` gives devices to workers, and repeats what came to nothing by the machine's fault.
Everything that travels pickles: ray_runner.py calls the same `measure` on other machines.
"""

import contextlib
import io
import json
import math
import os
import queue
import re
import shutil
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from harness import isolation, machine
from harness.compare import training_facts
from harness.console import UserError, one_line, say
from harness.domain import (
    STARTED_SUFFIX,
    STOPPED_SUFFIX,
    ContractError,
    Description,
    Domain,
    Record,
    read_record,
)
from harness.files import open_regular, read_text, remove_folder
from harness.ledger import Run
from harness.processes import Ending, run_child, sweep

CLOCK_TOLERANCE = 2.0  # seconds by which the loop's clock around the training may exceed the evaluator's
BUDGET_FACTOR = 1.01  # of the budget, that a run may train, and the tolerance
MAX_MEMORY_MB = 1e7  # MiB, ten terabytes: more cannot be
MAX_RECORD_BYTES = 2**20
COMPILED_KEPT = 4  # commits whose compilers' files are kept: the champion's are in use, others may become it
FREE_MEMORY_TOLERANCE = 1.0  # GB by which a GPU's free memory may differ from what it was at the start
SUSPECT_RETRIES = 2  # of a run that came to nothing by the machine's fault, or by a doing of its own
RETRY_SECONDS = 10  # between looks at a machine that must recover
WAITED = re.compile(r"^waiting: another run holds", re.MULTILINE)  # in a log: the evaluator's own word


class MachineFault(Exception):
    """No run, by no fault of the idea: it is made again. `is_suspect`: the edit may be the cause all the same."""

    def __init__(self, reason: str, is_suspect: bool = False):
        super().__init__(reason)
        self.is_suspect = is_suspect

    def __reduce__(self):
        return MachineFault, (str(self), self.is_suspect)


class Stopped(Exception):
    """The loop ends: this run is not made, and leaves no line."""


@dataclass(frozen=True)
class Job:
    """A run to be made. Picklable; holds everything that a worker on another machine needs."""

    run: Run
    archive: bytes  # every file of the commit, as a tar
    facts: Description  # what the evaluator said at the start: this run must agree
    domain: Domain
    baseline: dict[str, str] = field(default_factory=dict)  # of the summary, which this run must print too

    @property
    def is_audit(self) -> bool:
        return self.run.purpose == "audit"


@dataclass(frozen=True)
class Place:
    """Where on a machine a job is measured."""

    output: Path  # folder of the run: run.log and result.json are written here
    scratch: Path  # folder in which the run's own folder is made
    compile_cache: Path
    mark: str  # of all processes of the tag; a run's have one that begins so
    device: str  # a key of the description's devices


class _Crashed(Exception):
    """Becomes a run with the status crash; the message is its reason."""


# ---------------------------------------------------------------------------------------------------------------------
# One run


def measure(job: Job, place: Place, stop: threading.Event) -> Run:
    """Make one run. Leaves run.log and, if the evaluator scored, result.json in `place.output`.

    Raises MachineFault where there is no run to speak of, Stopped where `stop` was set.
    """
    sweep(f"{place.mark}:run:{place.device}")  # what an earlier run left on this device, the killed loop's last one say
    try:
        for problem in (machine.lacking_disk(place.output), machine.busy_device(job.facts, place.device)):
            if problem:
                raise MachineFault(problem)
        (place.output / "result.json").unlink(missing_ok=True)  # of an earlier try: not this one's
        place.scratch.mkdir(parents=True, exist_ok=True)
        # A fresh folder for every run: one that cannot be removed stands in nobody's way.
        folder = Path(tempfile.mkdtemp(dir=place.scratch, prefix=f"{job.run.number:04d}-"))
        try:
            return _measure_in(folder, job, place, stop)
        finally:
            remove_folder(folder)
    except (OSError, subprocess.SubprocessError) as error:
        raise MachineFault(f"the run could not be made: {one_line(str(error))}") from error


def _measure_in(folder: Path, job: Job, place: Place, stop: threading.Event) -> Run:
    tree = folder / "tree"
    unpack(job.archive, tree)
    for name in ("tmp", "record"):
        (folder / name).mkdir()
    _take_compiled(job, place, folder)
    others = machine.OthersMeter(place.mark)
    clock = _Clock(_result(folder))
    run = replace(job.run, started_at=time.time(), is_isolated=not isolation.problem())
    log = place.output / "run.log"

    def watch() -> None:
        clock.look()
        others.look()

    ending = _run_command(job.domain.train_command, tree, log, folder, job, place, stop, watch)
    if ending.problem == "stopped":
        raise Stopped
    run = replace(run, seconds=ending.seconds, busy_others=others.fraction())
    text = read_text(log)
    with contextlib.suppress(OSError), open_regular(_result(folder)) as file:
        (place.output / "result.json").write_bytes(file.read(MAX_RECORD_BYTES))
    try:
        run = _check_output(run, job, folder, text, ending, clock)
    except _Crashed as crash:
        remove_folder(folder)  # a disk that this run alone had filled is its own fault
        if ending.problem.startswith("timeout") and WAITED.search(text):
            raise MachineFault(f"another run held the device: {ending.problem}", is_suspect=True) from crash
        _look_for_fault(job, place, folder)
        return replace(run, status="crash", reason=str(crash))
    _check_comparable(job, run)
    _keep_compiled(job, place, folder)
    return _score_again(run, job, place, folder, stop) if job.is_audit else run


def unpack(archive: bytes, folder: Path, without: str = "") -> None:
    """Write the files of a commit."""
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [member for member in tar.getmembers() if member.name != without]
        filters = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}  # from Python 3.11.4 on
        tar.extractall(folder, members, **filters)


def _result(folder: Path) -> Path:
    """Where the evaluator leaves its record, the marks of its clock and an exported network."""
    return folder / "record" / "result.json"


class _Clock:
    """The loop's own clock around the training: when the evaluator's two marks appear."""

    def __init__(self, result: Path):
        self.began_at = time.monotonic()
        self.started_at: float | None = None
        self.stopped_at: float | None = None
        self.recorded_at: float | None = None
        self._result = result

    def look(self) -> None:
        now = time.monotonic()
        if self.started_at is None and self._result.with_name(self._result.name + STARTED_SUFFIX).exists():
            self.started_at = now
        if self.stopped_at is None and self._result.with_name(self._result.name + STOPPED_SUFFIX).exists():
            self.stopped_at = now
        if self.recorded_at is None and self._result.exists():
            self.recorded_at = now


def _run_command(
    command: tuple[str, ...],
    cwd: Path,
    log: Path,
    folder: Path,
    job: Job,
    place: Place,
    stop: threading.Event,
    watch: Callable[[], None] = lambda: None,
) -> Ending:
    """Run one of the domain's commands under the job's limit. An audit's scores on two splits and exports."""
    variables = machine.variables_for_training(job.facts.profile) | {
        "AUTORESEARCH_RESULT": str(_result(folder)),
        "AUTORESEARCH_SEED": str(job.run.seed),
        "AUTORESEARCH_AUDIT": str(int(job.is_audit)),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
        "TMPDIR": str(folder / "tmp"),
        "PYTHONDONTWRITEBYTECODE": "1",  # nothing that a run compiles is there for the next one
    }
    if job.facts.device == "cuda":
        variables["CUDA_VISIBLE_DEVICES"] = place.device
    if not isolation.problem():
        lock = _make_lock(job.facts.devices[place.device].get("lock", ""))
        command = isolation.wrap(command, folder, writable=lock, readable=[Path(job.facts.cache)])
    return run_child(
        command,
        cwd=cwd,
        env=variables,
        mark=f"{place.mark}:run:{place.device}:{job.run.number}",
        log=log,
        limit=(3 if job.is_audit else 2) * job.facts.time_budget + job.domain.startup_allowance,
        stop=stop,
        watch=watch,
    )


def _make_lock(name: str) -> list[Path]:
    """The device's lock, which a run opens: there, for every user; [] where the evaluator names none."""
    if not name:
        return []
    lock = Path(name)
    if not lock.parent.exists():
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.parent.chmod(0o777)
    if not lock.exists():
        lock.touch()
        lock.chmod(0o666)
    return [lock]


# The compilers' files: a run starts from those of the commit that it edits, and keeps its own. So what a discarded run
# left among them meets no later one, and an audit meets none.


def _take_compiled(job: Job, place: Place, folder: Path) -> None:
    kept = place.compile_cache / (job.run.base or job.run.commit)
    if kept.is_dir() and not job.is_audit:
        os.utime(kept)
        shutil.copytree(kept, folder / "compiled", symlinks=True)


def _keep_compiled(job: Job, place: Place, folder: Path) -> None:
    if job.is_audit:
        return
    place.compile_cache.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # it ran before, and began with a copy of these
        (folder / "compiled").rename(place.compile_cache / job.run.commit)
    with contextlib.suppress(OSError):  # another worker removes the same ones
        for old in sorted(place.compile_cache.iterdir(), key=lambda path: path.lstat().st_mtime)[:-COMPILED_KEPT]:
            if old.name not in (job.run.base, job.run.commit):
                remove_folder(old)


# What a run said: what was printed is held against the record, and the evaluator's clock against the loop's own


def _check_output(run: Run, job: Job, folder: Path, log: str, ending: Ending, clock: _Clock) -> Run:
    """The run with what it measured. Raises _Crashed with the reason where that cannot be believed."""
    domain = job.domain
    summary = parse_summary(log, domain.metric)
    is_scored = domain.metric in summary and _result(folder).exists()
    if ending.problem and not is_scored:  # a run that was scored is scored, however it ended
        raise _Crashed(crash_reason(log, ending.problem))
    printed = _printed_number(log, summary, domain.metric)
    memory_mb = _printed_number(log, summary, domain.memory)
    if not 0 <= memory_mb <= MAX_MEMORY_MB:
        raise _Crashed(f"{domain.memory} {memory_mb:g} cannot be")
    record = _read_record(_result(folder), printed, domain)
    _check_record(job, record, printed)
    if clock.started_at is None or clock.stopped_at is None:
        raise _Crashed("the evaluator left no mark of its clock")
    training_seconds = clock.stopped_at - clock.started_at
    if training_seconds > record.training_seconds + CLOCK_TOLERANCE:
        said = f"the evaluator counted {record.training_seconds:.1f} s"
        raise _Crashed(f"trained for {training_seconds:.1f} s by the loop's clock, {said}")
    longest = max(training_seconds, record.training_seconds)
    if longest > job.facts.time_budget * BUDGET_FACTOR + CLOCK_TOLERANCE:
        raise _Crashed(f"trained for {longest:.1f} s, the budget is {job.facts.time_budget:g} s")
    return replace(
        run,
        score=round(record.score, domain.score_digits),
        test_score=_rounded(record.test_score, domain),
        memory_mb=memory_mb,
        startup_seconds=clock.started_at - clock.began_at,
        training_seconds=training_seconds,
        evaluation_seconds=(clock.recorded_at or clock.stopped_at) - clock.stopped_at,
        summary=summary,
        record={key: value for key, value in asdict(record).items() if value is not None},
        **training_facts(log, domain, record.training_seconds),
    )


def _rounded(score: float | None, domain: Domain) -> float | None:
    return None if score is None else round(score, domain.score_digits)


def parse_summary(log: str, metric: str) -> dict[str, str]:
    """The `key: value` lines that stand together with the last one of the metric."""
    blocks = re.findall(r"(?:^\w+:.*\n?)+", re.sub(r"\r\n?", "\n", log), re.MULTILINE)
    of_metric = re.compile(rf"^{re.escape(metric)}:", re.MULTILINE)
    block = next((block for block in reversed(blocks) if of_metric.search(block)), "")
    return {key: value.strip() for key, value in re.findall(r"^(\w+):(.*)$", block, re.MULTILINE)}


def _printed_number(log: str, summary: dict[str, str], key: str) -> float:
    """The one finite number that a run printed as `key: number`. Raises _Crashed for anything else."""
    times = len(re.findall(rf"^{re.escape(key)}:", log, re.MULTILINE))
    if key not in summary:
        raise _Crashed(f"no {key} printed")
    if times > 1:
        raise _Crashed(f"{key} printed {times} times")
    with contextlib.suppress(ValueError):
        value = float(summary[key])
        if math.isfinite(value):
            return value
    raise _Crashed(f"{key} is {one_line(summary[key], 40)!r}, not a finite number")


ERROR_LINE = re.compile(r"error:|[\w.]*(Error|Exception|Refused|Exceeded|Causal|Interrupt)\b(:|$)")


def crash_reason(log: str, problem: str) -> str:
    """The line that says best why a run ended: the exception's or `error:` line, else the signal in words, else the
    last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log) if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    if problem.startswith("timeout"):
        return problem
    if errors:
        return f"{one_line(errors[-1], 120)} ({problem})"
    if problem == "killed by SIGKILL":
        return "out of memory: killed by the kernel (SIGKILL)"
    if problem.startswith("killed"):
        return problem
    return f"{one_line(lines[-1], 120)} ({problem})" if lines else f"no output ({problem})"


def _read_record(path: Path, printed: float, domain: Domain) -> Record:
    try:
        with open_regular(path) as file:
            return read_record(json.loads(file.read(MAX_RECORD_BYTES)), domain)
    except ContractError as error:
        raise _Crashed(str(error)) from None
    except (OSError, ValueError, RecursionError):
        raise _Crashed(f"printed {domain.metric} {printed:g}, but the evaluator left no record") from None


def _check_record(job: Job, record: Record, printed: float) -> None:
    """Raises _Crashed unless record, output and job agree."""
    domain = job.domain
    lowest, highest = domain.score_range
    if abs(record.score - printed) > 10**-domain.score_digits:
        texts = [domain.score_text(score) for score in (printed, record.score)]
        raise _Crashed(f"printed {domain.metric} {texts[0]}, the evaluator measured {texts[1]}")
    if not lowest <= record.score <= highest:
        raise _Crashed(f"{domain.metric} {record.score:g} is outside of {lowest:g} to {highest:g}")
    facts = job.facts
    expected = {
        "profile": facts.profile,
        "split": domain.split,
        "seed": job.run.seed,
        "rows": facts.rows.get(domain.split),
        "digest": facts.digest,
        "prepare_sha256": facts.prepare_sha256,
    }
    for key, value in expected.items():
        found = getattr(record, key)
        if found != value:
            raise _Crashed(f"the record's {key} is {found!r:.40}, not {value!r:.40}")


def _check_comparable(job: Job, run: Run) -> None:
    """Raises MachineFault for another device, or another value of a summary line that must stay.

    Once it may be the machine's fault, such as a kernel that could not be loaded; again and again it is the edit's.
    """
    name = run.record["device_name"]
    if name != job.facts.device_name:
        raise MachineFault(f"it ran on a {name}, the baseline on a {job.facts.device_name}", is_suspect=True)
    for key, value in job.baseline.items():
        found = run.summary.get(key, "nothing")
        if found != value:
            raise MachineFault(f"{key} is {found}, the baseline's is {value}", is_suspect=True)


def _look_for_fault(job: Job, place: Place, folder: Path) -> None:
    """Raises MachineFault where a crash may be the machine's fault: disk, data, device."""
    if problem := machine.lacking_disk(place.output):
        raise MachineFault(problem)
    tree = folder / "again"
    unpack(job.archive, tree)
    variables = machine.variables_for_training(job.facts.profile)
    if job.facts.device == "cuda":
        variables["CUDA_VISIBLE_DEVICES"] = place.device
    try:
        facts = machine.describe(job.domain, tree, variables)
    except UserError as error:
        raise MachineFault(f"the evaluator does not answer: {error}", is_suspect=True) from error
    if not facts.prepared:
        raise MachineFault(f"the data is not as it was: {facts.problem}")
    if place.device not in facts.devices:
        raise MachineFault(f"device {place.device} is gone: the evaluator finds {facts.device_name}")
    before = job.facts.devices[place.device].get("free_gb", 0.0)
    now = facts.devices[place.device].get("free_gb", 0.0)
    if now < before - FREE_MEMORY_TOLERANCE:
        # Unified memory counts the page cache, and a desktop may start a game: this says less than it seems to.
        raise MachineFault(f"device {place.device} has {now:.1f} GB free, at the start {before:.1f}", is_suspect=True)


# An audit: the exported network in a process that runs none of the candidate's code


def _score_again(run: Run, job: Job, place: Place, folder: Path, stop: threading.Event) -> Run:
    record = run.record
    if not job.domain.score_command:
        return replace(run, problem="the evaluator has no score command")
    if not record.get("exported"):
        return replace(run, problem=one_line(record.get("export_problem") or "the evaluator exported no network"))
    tree = folder / "clean"
    unpack(job.archive, tree, without=job.domain.editable)
    network = _result(folder).with_name(Path(record["exported"]).name)
    log = place.output / "score.log"
    ending = _run_command((*job.domain.score_command, str(network)), tree, log, folder, job, place, stop)
    if ending.problem == "stopped":
        raise Stopped
    text = read_text(log)
    if ending.problem:
        return replace(run, problem=crash_reason(text, ending.problem))
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError, TypeError, LookupError):
            said = json.loads(line)
            keys = [key for key in (job.domain.metric, job.domain.test_metric) if key]
            scores = [_rounded(float(said[key]), job.domain) for key in keys]
            return replace(run, clean_score=scores[0], clean_test_score=scores[1] if len(scores) > 1 else None)
    return replace(run, problem="the score command printed no scores")


# ---------------------------------------------------------------------------------------------------------------------
# Devices for workers


class Runner:
    """Gives free devices to workers, and repeats a run that came to nothing by the machine's fault.

    One kind of device a subclass: `attempt` makes a run on it.
    """

    def __init__(self, stop: threading.Event):
        self.stop = stop  # ends every run at once
        self.is_stopping = lambda: False  # whether nothing new may begin
        self.devices: list = []
        self.waiting = ""  # what the machine lacks, as a person was last told
        self.waiting_since = 0.0  # time.time()
        self._free: queue.Queue = queue.Queue()

    def add_device(self, device) -> None:
        self.devices.append(device)
        self._free.put(device)

    @contextlib.contextmanager
    def device(self) -> Iterator:
        """A device of one's own, as soon as one is free. Raises Stopped where the loop ends before."""
        while True:
            if self.stop.is_set() or self.is_stopping():
                raise Stopped
            with contextlib.suppress(queue.Empty):
                device = self._free.get(timeout=0.2)
                break
        try:
            yield device
        finally:
            self._free.put(device)

    def make(self, job: Job, device) -> Run:
        """The run, measured or crashed. Waits as long as the machine cannot make it; raises Stopped."""
        suspicions = 0
        while True:
            try:
                run = self.attempt(job, device)
                self.waiting = ""
                return run
            except MachineFault as fault:
                suspicions += fault.is_suspect
                if suspicions > SUSPECT_RETRIES:  # it came back as often as it may: the edit's own fault
                    self.waiting = ""
                    return replace(job.run, status="crash", reason=str(fault))
                self._wait(str(fault))

    def wait_for_disk(self, folder: Path) -> None:
        """Wait until the disk of a folder has room; raises Stopped."""
        problem = machine.lacking_disk(folder)
        while problem:
            self._wait(problem)
            problem = machine.lacking_disk(folder)
            self.waiting = problem

    def _wait(self, reason: str) -> None:
        if reason != self.waiting:
            self.waiting_since = time.time()
            self.waiting = reason
            say(f"waiting: {reason}")
        self.stop.wait(RETRY_SECONDS)
        if self.stop.is_set() or self.is_stopping():
            raise Stopped

    def attempt(self, job: Job, device) -> Run:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing that this runner started is left."""


class LocalRunner(Runner):
    """The devices of this machine. What a worker holds is only the right to run: after a fault it gets another device,
    if one is idle."""

    def __init__(self, tag, facts: Description, workers: int, stop: threading.Event):
        super().__init__(stop)
        self._tag = tag
        self._idle: queue.Queue = queue.Queue()
        for device in list(facts.devices)[:workers]:
            self._idle.put(device)
            self.add_device(device)
        if len(self.devices) < workers:
            found = len(self.devices)
            say(f"note: {workers} workers, {found} device{'s' * (found > 1)} here: as many runs at a time")

    def attempt(self, job: Job, device: str) -> Run:
        tag = self._tag
        place = Place(
            output=tag.folder(job.run.number),
            scratch=tag.home / "scratch",
            compile_cache=tag.compile_cache,
            mark=tag.mark,
            device=self._idle.get(),
        )
        try:
            return measure(job, place, self.stop)
        finally:
            self._idle.put(place.device)
