"""What is researched: types of the block in loop.py and of an evaluator's two JSON objects. Their values stand there.

A fork changes `Domain`'s values. Whatever an evaluator says that does not fit raises ContractError with the key.
"""

import dataclasses
import math
from dataclasses import dataclass, field


class ContractError(ValueError):
    """The evaluator said something that its contract does not have."""


@dataclass(frozen=True)
class Domain:
    """Everything that a fork for another problem changes. Commands run in a folder that holds the candidate's tree."""

    # The score
    metric: str  # key of the summary and of the record, a column of the ledger
    test_metric: str  # key of the record in an audit: the same score on the held-out test split; "": there is none
    lower_is_better: bool
    unit: str  # of the score, for people
    score_name: str  # of the score, for people: the label of an axis
    score_range: tuple[float, float]  # a score outside it cannot be

    # The files and the commands
    editable: str  # the one file that the agent edits
    instructions: str  # the human's file: read anew for every proposal, never touched
    describe_command: tuple[str, ...]  # prints a Description as JSON
    prepare_command: tuple[str, ...]  # makes the data, where the description says that it is missing; () for none
    train_command: tuple[str, ...]  # one run: prints a summary, leaves a Record
    score_command: tuple[str, ...]  # scores the network that an audit exported, its file's name appended; () for none

    # When two runs compare, and when a score counts
    split: str  # the record's name for the data that a run is scored on, a key of the description's rows
    same_in_every_run: tuple[str, ...]  # keys of the summary that must say what they said in the baseline's run
    assumed_sigma: dict[str, float]  # by profile: standard deviation between seeds where no commit ran twice yet
    startup_allowance: float = 300  # seconds: a run may take 2 * its budget + this, an audit's 3 * and this
    rescore_tolerance: float = 1e-3  # by which a clean process may score an audited network differently
    floors: dict[str, float] = field(default_factory=dict)  # other keys of the record -> the least that each must be
    approve: str = ""  # a shell command that must exit 0 before a keep stands: the run as JSON on its standard input

    # What a person reads
    memory: str = "peak_vram_mb"  # key of the summary: peak memory, MiB
    score_digits: int = 6  # decimals of a score in the ledger
    steps: str = ""  # key of the summary: how many steps the training made; "": there are none
    curve_pattern: str = ""  # of a log line that is a point of the training curve: groups step, percent, loss; "": none
    batch_pattern: str = ""  # of the log line that says how much one step takes in: group size; "": none
    batch_unit: str = "tokens"  # of that size
    sample: str = ""  # key of the summary: text that the trained model wrote; "": there is none

    @property
    def columns(self) -> str:
        """The first line of a ledger."""
        return f"commit\t{self.metric}\tmemory_gb\tstatus\tdescription\n"

    def gain(self, before: float, after: float) -> float:
        """How much better `after` is, in the unit of the score; negative where it is worse."""
        return before - after if self.lower_is_better else after - before

    @property
    def direction(self) -> str:
        """As Optuna calls it."""
        return "minimize" if self.lower_is_better else "maximize"

    def score_text(self, score: float) -> str:
        return f"{score:.{self.score_digits}f}"


@dataclass(frozen=True)
class Description:
    """What the evaluator says of itself, of the data and of this machine."""

    profile: str
    reason: str  # why this profile
    time_budget: float  # seconds of training
    cache: str  # folder of the data
    prepared: bool
    problem: str | None  # why the data is not prepared
    digest: str | None  # of everything that a score depends on
    rows: dict[str, int]  # scored in each split
    device: str  # cuda, mps, cpu
    device_name: str  # two runs compare only on devices of one name
    devices: dict[str, dict]  # CUDA_VISIBLE_DEVICES (off CUDA any name) -> lock: a path, free_gb: GB of free memory
    prepare_sha256: str = ""  # of the evaluator's own source


@dataclass(frozen=True)
class Record:
    """What the evaluator measured in one run. `score` and `test_score` stand under the domain's own keys."""

    score: float
    profile: str
    split: str
    seed: int
    training_seconds: float  # by the evaluator's clock
    rows: int
    digest: str
    device_name: str
    prepare_sha256: str = ""
    test_score: float | None = None
    test_rows: int | None = None
    tokens: int | None = None  # that were scored
    bytes: int | None = None  # that those tokens stand for
    weights_sha256: str | None = None
    exported: str | None = None  # audit: the network as data, a file beside the record
    export_problem: str | None = None  # audit: why there is none
    floors: dict = field(default_factory=dict)  # the domain's other numbers


STARTED_SUFFIX = ".started"  # beside the record: the evaluator makes this empty file when its clock starts,
STOPPED_SUFFIX = ".stopped"  # and this one when it stops: by these two the loop measures the training itself


def read_description(data: object) -> Description:
    return _build(Description, data, "the evaluator's description")


def read_record(data: object, domain: Domain) -> Record:
    """A record with the domain's own keys. Raises ContractError for a missing key or a number that cannot be."""
    what = "the evaluator's record"
    if not isinstance(data, dict):
        raise ContractError(f"{what} is not a JSON object")
    values = {**data, "score": data.get(domain.metric), "test_score": data.get(domain.test_metric)}
    values["floors"] = {key: data.get(key) for key in domain.floors}
    record = _build(Record, values, what)
    for key, value in ((domain.metric, record.score), ("training_seconds", record.training_seconds)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ContractError(f"{what}: {key} is {value!r:.40}, not a finite number")
    return record


def _build(kind: type, data: object, what: str):
    """A dataclass from the keys that it knows; others are left out."""
    if not isinstance(data, dict):
        raise ContractError(f"{what} is not a JSON object")
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    for name, entry in known.items():
        is_needed = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if is_needed and name not in data:
            raise ContractError(f"{what} has no {name}")
    return kind(**{name: value for name, value in data.items() if name in known})
