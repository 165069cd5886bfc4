"""TPE, an agent without a model: Optuna turns all hyperparameters of the editable file at once.

    uv run --extra tpe loop.py --agent tpe
    uv run --extra tpe loop.py --agent claude --suggest tpe    # three suggestions in a model's prompt
    python -P harness/tpe.py TAG minimize             # in a worktree: one edit of its train.py
    python -P harness/tpe.py TAG minimize COMMIT      # prints three suggestions for that commit's train.py

The ranges lie around the values in the baseline's train.py. A trial is a run's score with the values in that run's
train.py, whoever wrote it. The study is made from the ledger for every proposal and kept nowhere. Runs without a
verdict are told as running, so that several workers get different proposals; crashes as failed, from which Optuna
learns nothing but that they are no score. A program of its own, as knob_search.py: finding the block that counts
evaluates a condition that an agent may have written.
"""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    # As in loop.py: the package harness is the one that this file is in.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import harness  # noqa: F401

    sys.path.pop(0)

from harness.console import UserError, one_line, say
from harness.edit import CANNOT_PARSE, fingerprint
from harness.knob_search import EDITABLE, NOTHING_TO_TURN, PATTERNS, NothingToTurn, read_hyperparameters, with_values
from harness.machine import variables_for_agent
from harness.repository import Repository
from harness.tag import Tag

FACTOR = 4  # numbers stay between the baseline's value / FACTOR and * FACTOR
LARGEST_COUNTED = 16  # whole numbers up to here take every value, larger ones are doubled and halved
TRIES = 200  # proposals by Optuna before the hyperparameters count as exhausted
SUGGESTIONS = 3  # in a language model's prompt
SUGGEST_SECONDS = 120  # that they may take


def make_range(name: str, value: object):
    """Optuna's distribution around a baseline's value; None for what is not turned: tuples, other text, 0."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(value, bool):
        return CategoricalDistribution((False, True))
    if isinstance(value, str) and value and set(value) <= set("SL"):
        return CategoricalDistribution(tuple(dict.fromkeys((*PATTERNS, value))))
    if isinstance(value, int) and value > 0:
        return IntDistribution(max(1, value // FACTOR), value * FACTOR, log=True)
    if isinstance(value, float) and name.endswith(("RATIO", "FRAC")) and 0 <= value <= 1:
        return FloatDistribution(0.0, 1.0)
    if isinstance(value, float) and 0 < value < math.inf:
        return FloatDistribution(_three_digits(value / FACTOR), _three_digits(value * FACTOR), log=True)
    return None


def round_value(baselines: object, value: object) -> object:
    """Three digits of a fraction; of a large whole number the nearest doubling: kernels want powers of two."""
    if isinstance(value, float):
        return _three_digits(value)
    if isinstance(baselines, int) and baselines > LARGEST_COUNTED:
        return int(baselines * 2.0 ** round(math.log2(value / baselines)))
    return value


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def _is_in(distribution, value: object) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except ValueError:  # of another type
        return False


class Search:
    """A study of the hyperparameters that a baseline has."""

    def __init__(self, baseline: bytes, profile: str, direction: str, seed: int | None = None):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.profile = profile
        self.baselines = {name: one.value for name, one in self._read(baseline).items()}
        ranges = {name: make_range(name, value) for name, value in self.baselines.items()}
        self.ranges = {name: one for name, one in ranges.items() if one is not None}
        self.study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=seed))
        self.seen: set[str] = set()  # fingerprints of what was told or proposed

    def tell(self, source: bytes, mark: str, state: str, score: float | None = None) -> None:
        """A run of this file: COMPLETE, FAIL or RUNNING. Of its values those count that lie in their ranges."""
        import optuna

        found = self._read(source)
        ranges = {name: one for name, one in self.ranges.items() if name in found and _is_in(one, found[name].value)}
        values = {name: found[name].value for name in ranges}
        state = optuna.trial.TrialState[state]
        self.study.add_trial(optuna.create_trial(state=state, value=score, params=values, distributions=ranges))
        self.seen.add(mark)

    def propose(self, source: bytes) -> Iterator[tuple[bytes, str]]:
        """Edits of this file that are new, with their descriptions, until none is found. May raise NothingToTurn."""
        places = self._read(source)
        ranges = {name: one for name, one in self.ranges.items() if name in places}
        if not ranges:
            problem = f"{EDITABLE} has no hyperparameter to turn that the baseline has too"
            raise NothingToTurn(f"{problem}: use an agent with a model")
        for _ in range(TRIES):
            changed = {}
            for name, value in self.study.ask(ranges).params.items():
                value = round_value(self.baselines[name], value)
                if value != places[name].value:
                    changed[name] = value
            edited = with_values(source.decode(), places, changed).encode()
            mark = fingerprint(edited)
            if changed and mark not in self.seen:
                self.seen.add(mark)
                yield edited, ", ".join(f"{name} {places[name].value} -> {value}" for name, value in changed.items())

    def _read(self, source: bytes) -> dict:
        try:
            return read_hyperparameters(source.decode(), self.profile, with_booleans=True)
        except CANNOT_PARSE:
            return {}


def search_ledger(tag: Tag, direction: str, profile: str) -> Search:
    """The study of all that a tag's ledger holds."""
    ledger = tag.ledger
    search = Search(tag.repository.read(ledger.baseline, str(EDITABLE)), profile, direction)
    for run in ledger.runs:
        source = tag.repository.read(run.commit, str(EDITABLE))
        if run.counts:
            search.tell(source, run.fingerprint, "COMPLETE", run.score)
        elif run.status == "crash":
            search.tell(source, run.fingerprint, "FAIL")
    decided = {run.commit for run in ledger.runs}
    # One that was cut off by a kill stays here: it costs a little of the space around its values.
    for commit in set(tag.repository("for-each-ref", "--format=%(objectname)", tag.refs).split()) - decided:
        source = tag.repository.read(commit, str(EDITABLE))
        search.tell(source, fingerprint(source), "RUNNING")
    return search


def suggest(tag: Tag, profile: str) -> list[str]:
    """What TPE would change in the champion: `DEPTH 1 -> 2, MATRIX_LR 0.04 -> 0.031`. [] where it fails, and said."""
    try:
        child = subprocess.run(
            [sys.executable, "-P", __file__, tag.name, tag.domain.direction, tag.champion],
            cwd=tag.checkout,
            env=variables_for_agent(profile),
            capture_output=True,
            text=True,
            timeout=SUGGEST_SECONDS,
            start_new_session=True,  # Ctrl-C is for the loop
        )
    except subprocess.TimeoutExpired:
        say(f"note: TPE has no suggestions after {SUGGEST_SECONDS} s")
        return []
    if child.returncode:
        say(f"note: TPE has no suggestions: {one_line(child.stderr[-300:])}")
    return child.stdout.splitlines()


def main() -> int:
    name, direction, *commits = sys.argv[1:]
    try:
        repository = Repository(Path.cwd(), str(EDITABLE), "program.md")
        tag = Tag(repository, name, None)  # of the domain only the direction matters
        source = repository.read(commits[0] if commits else repository.head(), str(EDITABLE))
        search = search_ledger(tag, direction, os.environ.get("AUTORESEARCH_PROFILE", "climbmix"))
        edits = list(itertools.islice(search.propose(source), SUGGESTIONS if commits else 1))
        if not edits:
            raise UserError("every change at hand has been tried: the hyperparameters are exhausted")
    except (UserError, NothingToTurn) as error:
        print(f"error: {error}", file=sys.stderr)
        return NOTHING_TO_TURN if isinstance(error, NothingToTurn) else 1
    except ModuleNotFoundError as error:  # the environment was put back to that of a tag begun without the extra
        print(f"error: {error}: start another --tag with 'uv run --extra tpe loop.py'", file=sys.stderr)
        return NOTHING_TO_TURN
    print("\n".join(description for _, description in edits))
    if not commits:
        EDITABLE.write_bytes(edits[0][0])
        Path("experiment.txt").write_text(edits[0][1] + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
