"""What is researched, and what its judge must say: the one typed definition that the whole harness reads.

`Domain` is the block at the top of loop.py that a fork changes. `Description` and `Record` are the judge's two JSON
objects, read from a child's output and from a file; whatever does not fit raises ContractError with the key.
"""

import dataclasses
import re
import types
import typing
from dataclasses import dataclass


class ContractError(ValueError):
    """The judge said something that its contract does not have."""


@dataclass(frozen=True)
class Domain:
    """Everything that a fork for another problem changes. Commands run in a folder that holds the candidate's tree."""

    metric: str  # key of the summary and of the judge's record, a column of the ledger
    test_metric: str  # key of the record in an audit: the same score on the sealed split
    lower_is_better: bool
    unit: str  # of the score, for people
    score_name: str  # of the score, for people: the label of an axis
    score_range: tuple[float, float]  # a score outside it cannot be
    memory: str  # key of the summary: peak memory, MiB
    split: str  # the record's name for the data that a run is scored on, a key of the description's rows
    editable: str  # the one file that the agent edits
    instructions: str  # the human's file: read anew for every proposal, never touched
    same_in_every_run: tuple[str, ...]  # keys of the summary that must say what they said in the baseline's run
    explanations: tuple[tuple[str, str], ...]  # numbers of the summary that may explain a score: (key, name for people)
    describe_command: tuple[str, ...]  # prints a Description as JSON
    prepare_command: tuple[str, ...]  # makes the data, where the description says that it is missing; () for none
    train_command: tuple[str, ...]  # one run: prints a summary, leaves a Record
    verify_hint: str  # what a person runs to look at data that is not as it was prepared
    score_command: tuple[str, ...]  # scores the network that an audit exported, its file's name appended; () for none
    assumed_sigma: dict[str, float]  # by profile: noise of one run where no commit ran twice
    default_sigma: float  # of any other profile
    steps: str = ""  # key of the summary: how many steps the training made; "": there are none
    curve_pattern: str = ""  # of a log line that is a point of the training curve: groups step, percent, loss; "": none
    batch_pattern: str = ""  # of the log line that says how much one step takes in: group size; "": none
    batch_unit: str = "tokens"  # of that size
    sample: str = ""  # key of the summary: text that the trained model wrote, for people; "": there is none

    def __post_init__(self):
        for pattern, groups in ((self.curve_pattern, {"step", "percent", "loss"}), (self.batch_pattern, {"size"})):
            missing = groups - set(re.compile(pattern).groupindex)
            if pattern and missing:
                names = ", ".join(sorted(missing))
                raise ValueError(f"the pattern {pattern!r} has no group {names}: name it (?P<...>)")

    @property
    def columns(self) -> str:
        """The first line of a ledger."""
        return f"commit\t{self.metric}\tmemory_gb\tstatus\tdescription\n"

    def gain(self, before: float, after: float) -> float:
        """How much better `after` is, in the unit of the score; negative where it is worse."""
        return before - after if self.lower_is_better else after - before

    def sigma_of(self, profile: str) -> float:
        return self.assumed_sigma.get(profile, self.default_sigma)


@dataclass(frozen=True)
class Device:
    """Something that one run at a time may train on."""

    lock: str  # path: the judge holds a flock on it while a run trains
    free_gb: float  # GB of its memory that are free; 0 where that means nothing


@dataclass(frozen=True)
class Description:
    """What the judge says of itself, of the data and of this machine."""

    profile: str
    reason: str  # why this profile
    time_budget: float  # seconds of training
    cache: str  # folder of the files below
    prepared: bool
    problem: str | None  # why the data is not prepared
    digest: str | None  # of everything that a score depends on
    rows: dict[str, int]  # scored in each split
    files: dict[str, str]  # name in the cache -> SHA-256
    device: str  # cuda, mps, cpu
    device_name: str  # two runs compare only on devices of one name
    devices: dict[str, Device]  # value of CUDA_VISIBLE_DEVICES (off CUDA any name) -> the device
    prepare_sha256: str  # of the judge's own source


@dataclass(frozen=True)
class Record:
    """What the judge measured in one run. `score` and `test_score` stand under the domain's own keys."""

    score: float
    profile: str
    split: str
    seed: int
    training_seconds: float  # by the judge's clock
    rows: int
    digest: str
    files: dict[str, str]
    prepare_sha256: str
    device_name: str
    tokens: int | None = None  # that were scored
    bytes: int | None = None  # that those tokens stand for
    busy_others: float | None = None  # share of the processors that others used meanwhile, 0 to 1
    device_others: int | None = None  # other processes on the device
    weights_sha256: str | None = None  # of the model that was scored
    cache: str | None = None  # folder of the data that it read; None: the judge does not say
    test_score: float | None = None
    test_rows: int | None = None
    exported: str | None = None  # audit: the network as data, a file beside the record
    export_problem: str | None = None  # audit: why there is none


STARTED_SUFFIX = ".started"  # beside the record: the judge makes this empty file when its clock starts,
STOPPED_SUFFIX = ".stopped"  # and this one when it stops. Their times are the loop's own clock around the training


def read_description(data: object) -> Description:
    values = _checked(Description, data, "the judge's description")
    return Description(**values)


def read_record(data: object, domain: Domain) -> Record:
    """A record with the domain's own keys. Raises ContractError for a missing key or a value of another type."""
    keys = {"score": domain.metric, "test_score": domain.test_metric}
    return Record(**_checked(Record, data, "the judge's record", keys))


def _checked(kind: type, data: object, what: str, keys: dict[str, str] | None = None) -> dict:
    """The values for a dataclass, each of its annotated type; other keys are left out.

    keys: field -> the key under which its value stands, where that is another than the field's name.
    """
    if not isinstance(data, dict):
        raise ContractError(f"{what} is not a JSON object")
    keys = keys or {}
    hints = typing.get_type_hints(kind)
    values = {}
    for entry in dataclasses.fields(kind):
        key = keys.get(entry.name, entry.name)
        if key in data:
            values[entry.name] = _converted(hints[entry.name], data[key], f"{what}: {key}")
        elif entry.default is dataclasses.MISSING:
            raise ContractError(f"{what} has no {key}")
    return values


def _converted(hint, value: object, what: str):
    """The value, if it is of the type that the annotation names: a plain type, a dict, `X | None` or a dataclass."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = typing.get_args(hint)[0]
    if dataclasses.is_dataclass(hint):
        return hint(**_checked(hint, value, what))
    if typing.get_origin(hint) is dict:
        _, of_values = typing.get_args(hint)
        if not isinstance(value, dict):
            raise ContractError(f"{what} is {value!r:.40}, not an object")
        return {key: _converted(of_values, entry, f"{what}[{key!r}]") for key, entry in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if not is_right:
        raise ContractError(f"{what} is {value!r:.40}, not of type {hint.__name__}")
    return value
