"""The agents without a model: they turn hyperparameters of the editable file, and change no code.

    uv run loop.py --agent random                              # one hyperparameter at a time
    uv run --extra tpe loop.py --agent tpe                     # one or two, by Optuna
    uv run --extra tpe loop.py --agent claude --suggest tpe    # three suggestions in a model's prompt
    python -P harness/knob_search.py random train.py TAG minimize       # in a worktree: one edit of its train.py
    python -P harness/knob_search.py tpe train.py TAG minimize COMMIT   # prints three suggestions for that commit

Both draw from the same values around those in the baseline's file. What was tried is read from the ledger for every
proposal and kept nowhere. To Optuna a trial is a run's score with the values in that run's file, whoever wrote it;
a crash is a failed one, and a run without a verdict a running one, so that several workers get different proposals.
A program of its own: finding the block that counts evaluates a condition that an agent may have written.
"""

import ast
import itertools
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # As in loop.py: the package harness is the one that this file is in.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import harness  # noqa: F401

    sys.path.pop(0)

from harness.console import UserError, one_line, say
from harness.edit import CANNOT_PARSE, fingerprint
from harness.machine import variables_for_agent
from harness.processes import MARK
from harness.repository import Repository
from harness.tag import Tag

BANNER = re.compile(r"^# ?[-=#]{3}.*\n(?:#.*\n){0,2}", re.MULTILINE)  # a rule, and comments below it
KNOBS_TITLE = re.compile(r"\b(knobs|hyper-?parameters)\b", re.IGNORECASE)  # in the banner above the block
# They change no step's loss, only memory and speed; and compilation takes minutes that no budget counts.
NEUTRAL = ("DEVICE_BATCH_SIZE", "LOSS_CHUNK", "COMPILE")
PATTERNS = ("L", "SL", "SSL", "SSSL", "SSSSL")
FACTORS = [4 ** (step / 16) for step in range(-16, 17)]  # of a baseline's number: log-uniform from a fourth to fourfold
DOUBLINGS = (0.25, 0.5, 1, 2, 4)  # of a large whole number: kernels want powers of two
LARGEST_COUNTED = 16  # whole numbers up to here are no large ones
TRIES = 200  # draws before the hyperparameters count as exhausted
NOTHING_TO_TURN = 3  # exit code: no later call will find anything either
STARTUP = 10  # scored runs before Optuna draws, which else draws these from all values: far too large networks
SUGGESTIONS = 3  # in a language model's prompt
SUGGEST_SECONDS = 120  # that they may take

# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing hyperparameters


@dataclass(frozen=True)
class Hyperparameter:
    """The literal value of a line `NAME = value`, and where it stands."""

    value: object
    line: int  # from 0
    begin: int  # byte of the line at which the value begins
    end: int


def read_hyperparameters(source: str, profile: str) -> dict[str, Hyperparameter]:
    """Name -> the assignment in the block that counts under the profile: the last one that is executed."""
    banners = [*BANNER.finditer(source)]
    begin = next((banner.end() for banner in banners if KNOBS_TITLE.search(banner.group())), len(source))
    end = next((banner.start() for banner in banners if banner.start() >= begin), len(source))
    found: dict[str, Hyperparameter] = {}
    lines_above = "\n" * source[:begin].count("\n")  # blank: the numbers of the block's lines stay
    _collect(ast.parse(lines_above + source[begin:end]).body, profile, found)
    return {name: one for name, one in found.items() if name not in NEUTRAL}


def _collect(statements: list[ast.stmt], profile: str, found: dict[str, Hyperparameter]) -> None:
    """Add the hyperparameters of these statements; of an `if` those of the branch that is taken."""
    for node in statements:
        if isinstance(node, ast.If):
            branch = node.body if _is_taken(node.test, profile) else node.orelse
            _collect(branch, profile, found)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            value = node.value
            try:
                literal = ast.literal_eval(value)
            except ValueError:  # computed from others
                continue
            if isinstance(literal, int | float | str) and value.lineno == value.end_lineno:
                place = (value.lineno - 1, value.col_offset, value.end_col_offset)
                found[node.targets[0].id] = Hyperparameter(literal, *place)


def _is_taken(test: ast.expr, profile: str) -> bool:
    """Whether this machine takes a branch. A condition that asks more than profile and device is taken as false."""
    code = compile(ast.Expression(test), "condition", "eval")
    try:
        return bool(eval(code, {"PROFILE": profile}))
    except NameError:
        pass
    try:
        from harness import device  # not above: it imports torch, which takes seconds, and few profiles need it

        return bool(eval(code, vars(device) | {"PROFILE": profile}))
    except Exception:  # whatever an agent wrote there
        return False


def with_values(source: str, hyperparameters: dict[str, Hyperparameter], values: dict[str, object]) -> str:
    """The source with other values."""
    lines = source.split("\n")
    # From the last to the first: two may stand on one line.
    for name in sorted(values, key=lambda name: hyperparameters[name].begin, reverse=True):
        place = hyperparameters[name]
        line = lines[place.line].encode()  # ast counts bytes
        text = f'"{values[name]}"' if isinstance(values[name], str) else repr(values[name])
        lines[place.line] = (line[: place.begin] + text.encode() + line[place.end :]).decode()
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The space, and what was tried of it


def possible_values(name: str, value: object) -> tuple:
    """All that may stand in place of a baseline's value, in order; () where nothing else may: other text, 0."""
    if isinstance(value, bool):
        return (False, True)
    if isinstance(value, str) and value and set(value) <= set("SL"):
        return tuple(dict.fromkeys((*PATTERNS, value)))
    if isinstance(value, int) and value > LARGEST_COUNTED:
        return tuple(int(value * factor) for factor in DOUBLINGS)
    if isinstance(value, int) and value > 0:
        return tuple(sorted({max(1, round(value * factor)) for factor in FACTORS}))
    if isinstance(value, float) and name.endswith(("RATIO", "FRAC")) and 0 <= value <= 1:
        return tuple(hundredths / 100 for hundredths in range(101))
    if isinstance(value, float) and 0 < value < math.inf:
        return tuple(float(f"{value * factor:.3g}") for factor in FACTORS)
    return ()


def nearest(values: tuple, value: object) -> int | None:
    """The place among the possible values that is nearest to a value; None where it lies outside of them."""
    if type(value) is not type(values[0]) or not min(values) <= value <= max(values):
        return None
    if isinstance(value, str):
        return values.index(value) if value in values else None
    return min(range(len(values)), key=lambda place: abs(values[place] - value))


Space = dict[str, tuple]  # name -> possible values
Draw = Callable[[Space], dict[str, int]]  # for some names the place of a value


class Search:
    """The space around a baseline's values, and what was tried of it so far."""

    def __init__(self, baseline: bytes, profile: str):
        self.profile = profile
        self.trials: list[tuple[dict[str, int], str, float | None]] = []  # places of values, state, score
        space = {name: possible_values(name, one.value) for name, one in self._read(baseline).items()}
        self.space = {name: values for name, values in space.items() if values}
        self._seen: set[str] = set()  # fingerprints of what was tried or proposed

    def tell(self, source: bytes, state: str, score: float | None = None, mark: str = "") -> None:
        """A run of this file: COMPLETE, FAIL or RUNNING. `mark`: its fingerprint, where that is known."""
        found = self._read(source)
        places = {name: nearest(values, found[name].value) for name, values in self.space.items() if name in found}
        places = {name: place for name, place in places.items() if place is not None}
        self.trials.append((places, state, score))
        self._seen.add(mark or fingerprint(source))

    def propose(self, source: bytes, draw: Draw) -> Iterator[tuple[bytes, str]]:
        """Edits of this file that are new, with their descriptions, until none is found. May raise UserError."""
        found = self._read(source)
        space = {name: values for name, values in self.space.items() if name in found}
        if not space:
            where = "lines NAME = value, as the baseline has, under a banner that says 'Knobs' or 'Hyperparameters'"
            problem = f"the file has no hyperparameter to turn ({where}): use an agent with a model"
            raise UserError(problem, NOTHING_TO_TURN)
        for _ in range(TRIES):
            places = draw(space)
            drawn = {name: values[places[name]] for name, values in space.items() if name in places}
            changed = {name: value for name, value in drawn.items() if value != found[name].value}
            if not changed:
                continue
            edited = with_values(source.decode(), found, changed).encode()
            mark = fingerprint(edited)
            if mark not in self._seen:
                self._seen.add(mark)
                yield edited, ", ".join(f"{name} {found[name].value} -> {value}" for name, value in changed.items())

    def _read(self, source: bytes) -> dict[str, Hyperparameter]:
        try:
            return read_hyperparameters(source.decode(), self.profile)
        except CANNOT_PARSE:
            return {}


def random_draw(rng: random.Random) -> Draw:
    """One hyperparameter at a time."""

    def draw(space: Space) -> dict[str, int]:
        name = rng.choice(list(space))
        return {name: rng.randrange(len(space[name]))}

    return draw


def tpe_draw(search: Search, direction: str, seed: int | None = None) -> Draw:
    """One or two at a time, to values that Optuna's tree-structured Parzen estimator thinks best after what was tried;
    before STARTUP runs have scores, one by chance."""
    rng = random.Random(seed)
    if sum(state == "COMPLETE" for _, state, _ in search.trials) < STARTUP:
        return random_draw(rng)
    import optuna  # takes a second
    from optuna.distributions import CategoricalDistribution, IntDistribution

    def distributions(names: Iterable[str]) -> dict:
        found = {}
        for name in names:
            values = search.space[name]
            has_order = not isinstance(values[0], bool | str)
            last = len(values) - 1
            found[name] = IntDistribution(0, last) if has_order else CategoricalDistribution(range(last + 1))
        return found

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=seed))
    for places, state, score in search.trials:
        state = optuna.trial.TrialState[state]
        options = {"params": places, "distributions": distributions(places)}
        study.add_trial(optuna.create_trial(state=state, value=score, **options))

    def draw(space: Space) -> dict[str, int]:
        names = rng.sample(list(space), min(len(space), rng.choice((1, 2))))
        return study.ask(distributions(names)).params

    return draw


def search_ledger(tag: Tag, profile: str) -> Search:
    """The search after all that a tag's ledger holds."""
    read, name = tag.repository.read, tag.repository.editable
    search = Search(read(tag.ledger.baseline, name), profile)
    for run in tag.ledger.runs:
        source = read(run.commit, name)
        if run.counts:
            search.tell(source, "COMPLETE", run.score, run.fingerprint)
        elif run.status == "crash":
            search.tell(source, "FAIL", None, run.fingerprint)
    # One that was cut off by a kill stays here: it costs a little of the space around its values. One without a folder
    # is of a former night of this name.
    for line in tag.repository("for-each-ref", "--format=%(objectname) %(refname:lstrip=-1)", tag.refs).splitlines():
        commit, number = line.split()
        if int(number) not in tag.ledger and tag.folder(int(number)).is_dir():
            search.tell(read(commit, name), "RUNNING")
    return search


def suggest(tag: Tag, profile: str) -> list[str]:
    """What TPE would change in the champion: `DEPTH 1 -> 2, MATRIX_LR 0.04 -> 0.031`. [] where it fails, and said."""
    command = [sys.executable, "-P", __file__, "tpe", tag.domain.editable, tag.name, tag.domain.direction, tag.champion]
    options = {"capture_output": True, "text": True, "start_new_session": True}  # Ctrl-C is for the loop
    env = variables_for_agent(profile) | {MARK: f"{tag.mark}:suggest"}
    options |= {"cwd": tag.checkout, "env": env, "timeout": SUGGEST_SECONDS}
    try:
        return subprocess.run(command, check=True, **options).stdout.splitlines()
    except subprocess.SubprocessError as error:
        said = str(error.stderr or error)
        say(f"note: TPE has no suggestions: {one_line(said[-200:])}")
        return []


def main() -> int:
    agent, editable, name, direction, *commits = sys.argv[1:]
    try:
        repository = Repository(Path.cwd(), editable, "program.md")
        tag = Tag(repository, name, None)  # of the domain only the direction matters
        search = search_ledger(tag, os.environ.get("AUTORESEARCH_PROFILE", "climbmix"))
        draw = tpe_draw(search, direction) if agent == "tpe" else random_draw(random.Random())
        source = repository.read(commits[0] if commits else repository.head(), editable)
        edits = list(itertools.islice(search.propose(source, draw), SUGGESTIONS if commits else 1))
        if not edits:
            raise UserError("every change at hand has been tried: the hyperparameters are exhausted")
    except (UserError, ImportError) as error:  # Optuna is missing where the environment was put back without the extra
        print(f"error: {error}", file=sys.stderr)
        return error.code if isinstance(error, UserError) else NOTHING_TO_TURN
    print("\n".join(description for _, description in edits))
    if not commits:
        Path(editable).write_bytes(edits[0][0])
        Path("experiment.txt").write_text(edits[0][1] + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
