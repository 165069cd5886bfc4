"""One run on this machine: measure(Job, Place) -> Measurement, or Crash (the idea's fault), or Unavailable (the
machine's). What goes in and what comes out is plain data that pickles: a job may be measured on another machine.

A job carries the candidate's whole tree. The bench is a fresh folder with exactly those files. So whatever an agent did
to other files of its checkout, the judge that runs is the one of the tree.
"""

import contextlib
import dataclasses
import json
import math
import re
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

from harness import environment
from harness.contract import STARTED_SUFFIX, STOPPED_SUFFIX, ContractError, Description, Domain, Record, read_record
from harness.files import open_regular, read_text, remove_folder
from harness.processes import Ending, run_child
from harness.repository import Blob
from harness.screen import UserError, one_line

CLOCK_TOLERANCE = 2.0  # seconds by which the loop's clock around the training may exceed the judge's
MAX_MEMORY_MB = 1e7  # MiB, ten terabytes: more cannot be
MAX_RECORD_BYTES = 2**20
LOG_END_LINES = 50  # of a crash, for the agent that mends it
FREE_MEMORY_TOLERANCE = 1.0  # GB by which a GPU's free memory may differ from what it was at the start
PAUSE_TOLERANCE = 1.0  # seconds that a run may have been stopped or asleep
JUMP_TOLERANCE = 1.0  # seconds by which the wall clock may be set during a run, as NTP does now and then
SUSPECT_RETRIES = 2  # of a run that came to nothing by the machine's fault, or by a doing of its own
DO_NOT_COMPARE = "Scores from now on do not compare with those before"


@dataclass(frozen=True)
class Job:
    """A run to be made. Picklable; holds everything that a worker on another machine needs."""

    number: int  # of the run
    commit: str
    description: str
    seed: int
    tree: tuple[Blob, ...]
    facts: Description  # what the judge said when the tag began: this run must agree
    domain: Domain
    time_limit: float  # seconds of wall time
    audit: bool = False  # score the sealed split too, and once more in a process that runs none of the agent's code
    baseline_values: dict[str, str] = field(default_factory=dict)  # of the summary, which this run must print too


@dataclass(frozen=True)
class Place:
    """Where on a machine a job is measured."""

    output: Path  # folder of the run: run.log and result.json are written here
    scratch: Path  # folder in which the bench is made
    compile_cache: Path
    mark: str  # of the run's processes
    device: str  # a key of the description's devices
    packages: environment.Packages | None = None  # as they must be
    data: environment.Listing | None = None  # the training files as they must be; None: as the run finds them


@dataclass(frozen=True)
class Measurement:
    """A run with a score that can be believed."""

    record: Record
    summary: dict[str, str]  # what the run printed after `---`
    memory_gb: float  # GiB
    seconds: float  # wall time of the whole run
    startup_seconds: float | None  # by the loop's clock: until the judge's clock started
    training_seconds: float | None  # by the loop's clock
    evaluation_seconds: float | None = None  # by the loop's clock: from the end of training to the record
    rescored: tuple[float, float] | None = None  # audit: both scores of the exported network, by the score command
    rescore_problem: str = ""  # audit: why there are none


@dataclass(frozen=True)
class Crash:
    """A run without a believable result, by its own fault."""

    reason: str  # one line, for the ledger
    log_end: str  # the last lines of its log
    seconds: float


@dataclass(frozen=True)
class Unavailable:
    """No run, by no fault of the idea: it is made again."""

    reason: str
    is_permanent: bool = False  # it does not mend itself: the loop ends with the reason
    retries: int | None = None  # how often it is made again before it counts as a crash; None: for ever


Outcome = Measurement | Crash | Unavailable


class _Crashed(Exception):
    """Becomes a Crash; the message is its reason."""


class _ClocksDiffer(_Crashed):
    """By the marks of its clock the run trained longer than the judge says."""


def measure(job: Job, place: Place, stop: threading.Event) -> Outcome:
    """Make one run. Leaves run.log and, if the judge scored, result.json in `place.output`.

    The judge writes its record on the bench, which is new: a record of an earlier run, or of an earlier try of this
    one, is not there to be believed.
    """
    if problem := _missing_before(job, place):
        return problem
    try:
        (place.output / "result.json").unlink(missing_ok=True)  # of an earlier try: not this one's
        environment.remove_foreign_files(place.compile_cache)
        place.scratch.mkdir(parents=True, exist_ok=True)
        # A fresh folder for every run: one that cannot be removed stands in nobody's way.
        bench = Path(tempfile.mkdtemp(dir=place.scratch, prefix=f"{job.number:04d}-"))
        try:
            outcome = _measure_on(bench, job, place, stop)
            _keep_record(bench, place)
            return outcome
        finally:
            remove_folder(bench)
    except (OSError, subprocess.SubprocessError) as error:
        return Unavailable(f"the run could not be made: {one_line(str(error))}")


def _changed_data(job: Job) -> Unavailable | None:
    """Data that is not as it was prepared: no later score would compare with the earlier ones."""
    if path := environment.changed_data(job.facts):
        remedy = f"look with '{job.domain.verify_hint}'"
        return Unavailable(f"{path} is not as it was prepared: {remedy}", is_permanent=True)
    return None


def _missing_before(job: Job, place: Place) -> Unavailable | None:
    """What the machine lacks before a run."""
    if problem := _changed_data(job):
        return problem
    problem = environment.lacking_disk(place.output) or environment.busy_device(job.facts, place.device)
    return Unavailable(problem) if problem else None


def _measure_on(bench: Path, job: Job, place: Place, stop: threading.Event) -> Outcome:
    tree = bench / "tree"
    unpack(job.tree, tree)
    for name in ("tmp", "record"):
        (bench / name).mkdir()
    log = place.output / "run.log"
    data = environment.look_at_data(job.facts) if place.data is None else place.data
    ending = _run(job.domain.train_command, tree, log, bench, job, place, stop)
    # Looked at after the run: whether the run itself or an agent before it changed them, this score does not count.
    if change := _changed_packages(place):
        reason = f"the installed packages changed: {change}"
        return Unavailable(f"{reason}. {DO_NOT_COMPARE}", is_permanent=True)
    if change := environment.changed_training_data(data, environment.look_at_data(job.facts), job.facts):
        return Unavailable(f"the training data changed: {change}. {DO_NOT_COMPARE}", is_permanent=True)
    if ending.problem == "stopped":
        return Unavailable("stopped")
    if ending.paused_seconds > PAUSE_TOLERANCE:
        reason = f"the run stood still for {ending.paused_seconds:.0f} s (stopped, or the machine slept)"
        has_slept = ending.asleep_seconds > PAUSE_TOLERANCE  # which no edit brings about; it can stop itself for ever
        return Unavailable(reason, retries=None if has_slept else SUSPECT_RETRIES)

    text = read_text(log)
    try:
        measurement = _believe(job, bench, text, ending)
    except _Crashed as crash:
        jump = ending.clock_jump_seconds
        if isinstance(crash, _ClocksDiffer) and abs(jump) > JUMP_TOLERANCE:
            return Unavailable(f"the machine's clock was set by {jump:+.0f} s during the run", retries=SUSPECT_RETRIES)
        _keep_record(bench, place)
        # The bench goes before the disk is looked at: a disk that this run alone had filled is its own fault.
        remove_folder(bench)
        last_lines = [line[:300] for line in text.splitlines()[-LOG_END_LINES:]]
        return _missing_after(job, place) or Crash(str(crash), "\n".join(last_lines), ending.seconds)
    if problem := _differs_from_baseline(job, place, measurement):
        return problem
    if job.audit:
        measurement = _score_again(bench, job, place, measurement, stop)
    return measurement


def _run(
    command: tuple[str, ...], folder: Path, log: Path, bench: Path, job: Job, place: Place, stop: threading.Event
) -> Ending:
    """Run one of the domain's commands in a folder of the bench, under the job's limit."""
    return run_child(
        command,
        cwd=folder,
        env=_variables(job, place, bench),
        mark=place.mark,
        log=log,
        limit=job.time_limit,
        stop=stop,
    )


def unpack(tree: tuple[Blob, ...], folder: Path, without: str = "") -> None:
    """Write the files of a tree, byte for byte. OSError for data that is not what its name says."""
    folder.mkdir(parents=True)
    for blob in tree:
        if blob.path == without:
            continue
        if not blob.is_intact():
            raise OSError(f"{blob.path} does not have the content of its blob {blob.blob[:7]}")
        path = folder / blob.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if blob.mode == "120000":
            path.symlink_to(blob.data.decode())
            continue
        path.write_bytes(blob.data)
        if blob.mode == "100755":
            path.chmod(0o755)


def _variables(job: Job, place: Place, bench: Path) -> dict[str, str]:
    variables = environment.variables_for_training(job.facts.profile)
    # What earlier runs left among the compilers' files reaches no audit.
    compile_cache = bench / "compiled" if job.audit else place.compile_cache
    variables |= {
        "AUTORESEARCH_RESULT": str(_result(bench)),
        "AUTORESEARCH_SEED": str(job.seed),
        "AUTORESEARCH_AUDIT": str(int(job.audit)),
        "TORCHINDUCTOR_CACHE_DIR": str(compile_cache / "inductor"),
        "TRITON_CACHE_DIR": str(compile_cache / "triton"),
        "TMPDIR": str(bench / "tmp"),
    }
    if job.facts.device == "cuda":
        variables["CUDA_VISIBLE_DEVICES"] = place.device
    return variables


def _result(bench: Path) -> Path:
    """Where the judge leaves its record, the marks of its clock and an exported network."""
    return bench / "record" / "result.json"


def _keep_record(bench: Path, place: Place) -> None:
    """Copy the record, if there is one, to the run's folder; of one that is too large only the beginning."""
    with contextlib.suppress(OSError), open_regular(_result(bench)) as file:
        (place.output / "result.json").write_bytes(file.read(MAX_RECORD_BYTES))


def _changed_packages(place: Place) -> str:
    if place.packages is None:
        return ""
    return place.packages.difference(environment.Packages.installed())


def _missing_after(job: Job, place: Place) -> Unavailable | None:
    """What the machine lacks after a run that crashed: then the crash may be its fault."""
    if problem := _changed_data(job):
        return problem
    if problem := environment.lacking_disk(place.output):
        return Unavailable(problem)
    if job.facts.device != "cuda":
        return None
    with tempfile.TemporaryDirectory(dir=place.scratch) as folder:
        tree = Path(folder, "tree")
        unpack(job.tree, tree)
        Path(folder, "tmp").mkdir()
        try:
            facts = environment.ask_judge(job.domain, tree, _variables(job, place, Path(folder)))
        except UserError as error:
            return Unavailable(f"the device does not answer: {error}")
    free_gb = facts.devices[place.device].free_gb if place.device in facts.devices else 0.0
    was_free_gb = job.facts.devices[place.device].free_gb
    if free_gb < was_free_gb - FREE_MEMORY_TOLERANCE:
        return Unavailable(f"GPU {place.device} has {free_gb:.1f} GB free, at the start it had {was_free_gb:.1f}")
    return None


def _differs_from_baseline(job: Job, place: Place, measurement: Measurement) -> Unavailable | None:
    """Another device, or another value of a summary line that must stay: the two scores would not compare."""
    device_name = measurement.record.device_name
    if device_name != job.facts.device_name:
        reason = f"it ran on a {device_name}, the baseline on a {job.facts.device_name}"
        return _missing_after(job, place) or Unavailable(reason, retries=SUSPECT_RETRIES)
    for key, baseline_value in job.baseline_values.items():
        value = measurement.summary.get(key, "nothing")
        if value != baseline_value:
            # Once it may be the machine's fault, such as a kernel that could not be loaded; twice it is the edit's.
            return Unavailable(f"{key} is {value}, the baseline's is {baseline_value}", retries=1)
    return None


def _score_again(
    bench: Path, job: Job, place: Place, measurement: Measurement, stop: threading.Event
) -> Measurement:
    """Score the exported network in a process of its own, in a folder without the edited file."""
    record = measurement.record
    if not job.domain.score_command:
        return dataclasses.replace(measurement, rescore_problem="the judge has no score command")
    if record.exported is None:
        problem = record.export_problem or "the judge exported no network"
        return dataclasses.replace(measurement, rescore_problem=one_line(problem))
    judge = bench / "judge"
    unpack(job.tree, judge, without=job.domain.editable)
    log = place.output / "score.log"
    network = _result(bench).parent / Path(record.exported).name
    ending = _run((*job.domain.score_command, str(network)), judge, log, bench, job, place, stop)
    text = read_text(log)
    if ending.problem:
        return dataclasses.replace(measurement, rescore_problem=f"{crash_reason(text)} ({ending.problem})")
    scores = _printed_scores(text, job.domain)
    problem = "" if scores else "the score command printed no scores"
    return dataclasses.replace(measurement, rescored=scores, rescore_problem=problem)


def _printed_scores(text: str, domain: Domain) -> tuple[float, float] | None:
    """Both scores in the last JSON object of a score command's output."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError, TypeError, LookupError):
            said = json.loads(line)
            scores = (float(said[domain.metric]), float(said[domain.test_metric]))
            return scores if all(map(math.isfinite, scores)) else None
    return None


# What a run said: what was printed is held against the judge's record, and the judge's clock against the loop's own


def _believe(job: Job, bench: Path, log: str, ending: Ending) -> Measurement:
    """The measurement of a run that can be believed. Raises _Crashed with the reason where it cannot."""
    domain = job.domain
    if ending.problem.startswith("timeout"):
        raise _Crashed(ending.problem)
    if ending.problem:
        raise _Crashed(f"{crash_reason(log)} ({ending.problem})")
    printed = printed_number(log, domain.metric)
    memory_mb = printed_number(log, domain.memory)
    if not 0 <= memory_mb <= MAX_MEMORY_MB:
        raise _Crashed(f"{domain.memory} {memory_mb:g} cannot be")
    record = _read_record(_result(bench), printed, domain)
    _check_record(job, record, printed)
    started_at = _clock_mark_time(bench, STARTED_SUFFIX)
    stopped_at = _clock_mark_time(bench, STOPPED_SUFFIX)
    training_seconds = stopped_at - started_at
    recorded_at = _result(bench).lstat().st_mtime
    _check_clocks(job, record, training_seconds)
    return Measurement(
        record=record,
        summary=parse_summary(log),
        memory_gb=memory_mb / 1024,
        seconds=ending.seconds,
        startup_seconds=started_at - ending.began_at,
        training_seconds=training_seconds,
        evaluation_seconds=recorded_at - stopped_at,
    )


def printed_number(log: str, key: str) -> float:
    """The one finite number that a run printed as `key: number`. Raises _Crashed for anything else."""
    found = re.findall(rf"^{re.escape(key)}:[ \t]*(.*)$", log, re.MULTILINE)
    if not found:
        raise _Crashed(f"no {key} printed")
    if len(found) > 1:
        raise _Crashed(f"{key} printed {len(found)} times")
    with contextlib.suppress(ValueError):
        value = float(found[0])
        if math.isfinite(value):
            return value
    raise _Crashed(f"{key} is {one_line(found[0], 40)!r}, not a finite number")


def parse_summary(log: str) -> dict[str, str]:
    """The `key: value` lines after the last line `---`."""
    _, line, summary = f"\n{log}".rpartition("\n---\n")
    if not line:
        return {}
    return dict(re.findall(r"^(\w+):[ \t]*(.*)$", summary, re.MULTILINE))


def crash_reason(log: str) -> str:
    """The line that says best why a run ended: the last exception or `error:` line, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error:|[\w.]*(Error|Exception|Refused|Exceeded|Causal)\b", line)]
    if errors:
        return one_line(errors[-1], 120)
    return one_line(lines[-1], 120) if lines else "no output"


def _read_record(path: Path, printed: float, domain: Domain) -> Record:
    try:
        with open_regular(path) as file:
            data = json.loads(file.read(MAX_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        raise _Crashed(f"printed {domain.metric} {printed:g}, but the evaluator left no record") from None
    try:
        return read_record(data, domain)
    except ContractError as error:
        raise _Crashed(str(error)) from None


def _check_record(job: Job, record: Record, printed: float) -> None:
    """Raises _Crashed for a record of another run, other data or another judge, or a score that cannot be."""
    expected = {
        "profile": job.facts.profile,
        "split": job.domain.split,
        "seed": job.seed,
        "rows": job.facts.rows.get(job.domain.split),
        "digest": job.facts.digest,
        "files": job.facts.files,
        "prepare_sha256": job.facts.prepare_sha256,
    }
    if record.cache is not None:
        expected["cache"] = job.facts.cache
    for key, want in expected.items():
        had = getattr(record, key)
        if had != want:
            had_text = one_line(repr(had), 30)
            want_text = one_line(repr(want), 30)
            raise _Crashed(f"the evaluator's record has {key} {had_text}, this run was to have {want_text}")
    if job.audit and record.test_score is None:
        raise _Crashed(f"the evaluator's record has no {job.domain.test_metric}, this run was an audit's")
    metric = job.domain.metric
    scores = {metric: record.score}
    if job.audit:
        scores[job.domain.test_metric] = record.test_score
    lowest, highest = job.domain.score_range
    for name, score in scores.items():
        if not lowest <= score <= highest:  # NaN too
            raise _Crashed(f"{name} {score:g} cannot be: it is between {lowest:g} and {highest:g}")
    if not abs(record.score - printed) <= 1e-6:
        raise _Crashed(f"printed {metric} {printed:g} is not the evaluator's {record.score:g}")


def _clock_mark_time(bench: Path, suffix: str) -> float:
    """When the judge made one of its clock's marks, time.time()."""
    path = _result(bench).with_name(_result(bench).name + suffix)
    try:
        return path.lstat().st_mtime
    except OSError:
        raise _Crashed(f"the judge's clock left no mark {path.name}") from None


def _check_clocks(job: Job, record: Record, training_seconds: float) -> None:
    """Raises _Crashed for a run that trained longer than the budget, by the judge's clock or by the loop's own."""
    limit = 1.01 * job.facts.time_budget + 0.5
    if not record.training_seconds <= limit:
        raise _Crashed(f"trained for {record.training_seconds:.1f} s, the budget is {job.facts.time_budget:g} s")
    if training_seconds > record.training_seconds + CLOCK_TOLERANCE + 0.02 * job.facts.time_budget:
        clocks = f"{training_seconds:.1f} s went by, it says {record.training_seconds:.1f} s"
        raise _ClocksDiffer(f"trained longer than the judge's clock says: {clocks}")
