"""Which of the kept changes are real: the champion without each of them, on fresh seeds.

A change is taken back from the champion's file. Where later changes stand on it, its own commit and the one before it
are compared instead. Every run is a line of runs.jsonl: a stopped ablation goes on, and `--replicates 5` after
`--replicates 3` adds two. Functions of a ratchet (loop.py), which executes and records.
"""

import difflib
import math
import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from harness.compare import align
from harness.console import UserError, duration, one_line, say
from harness.edit import Edit, compile_problem, fingerprint, syntax_size
from harness.ledger import Ledger, Run
from harness.replicates import fresh_seed

CHAMPION = "champion"  # a side; the others are `without 7`, or `before 7` and `with 7`, by the number of a change's run
APPLY_TRIES = 4  # candidates of --apply, each with half of the last one's removals


@dataclass(frozen=True)
class Contribution:
    """What one change adds to the champion, in the unit of the score; None where a side crashed or is not measured."""

    run: Run  # of the change
    is_beside_base: bool  # measured as its commit beside the commit before it: later changes stand on it
    gain: float | None
    standard_error: float | None

    @property
    def word(self) -> str:
        if self.gain is None:
            return "not measured"
        if self.standard_error is None:
            return "noise unknown"
        if abs(self.gain) <= 2 * self.standard_error:
            return "within noise"
        return "carries" if self.gain > 0 else "harms"


# ---------------------------------------------------------------------------------------------------------------------
# What to measure


def group_of(commit: str) -> str:
    """The name of the ablation of a champion."""
    return f"ablation {commit[:12]}"


def take_back(repository, source: bytes, after: bytes, before: bytes) -> bytes | None:
    """A source without the change from `before` to `after`; None where later changes stand on it.

    Git's three-way merge takes edits of neighbouring lines for a conflict, as two hyperparameters in one block are. So
    where it fails, each changed block is looked for in the source, and replaced if it stands there once.
    """
    merged = repository.merge(source, after, before)
    if merged is not None:
        return merged
    lines = source.splitlines(keepends=True)
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        block = new[j1:j2]
        places = [at for at in range(len(lines)) if block and lines[at : at + len(block)] == block]
        if len(places) != 1:
            return None
        lines[places[0] : places[0] + len(block)] = old[i1:i2]
    return b"".join(lines)


def find_sides(tag) -> dict[str, str]:
    """Side -> the commit that is measured for it."""
    champion = tag.champion
    sides = {CHAMPION: champion}
    crashed = {run.group for run in tag.ledger.runs if run.purpose == "ablation" and run.status == "crash"}
    for change in changes_in_branch(tag.ledger):
        number = change.run.number
        has_crashed = f"{group_of(champion)}/without {number}" in crashed
        commit = "" if has_crashed else _commit_without(tag, champion, change.run)
        if commit:
            sides[f"without {number}"] = commit
        elif commit is not None:
            sides |= {f"before {number}": change.run.base, f"with {number}": change.run.commit}
    return sides


def changes_in_branch(ledger: Ledger):
    return [change for change in ledger.changes() if change.is_in_branch]


def _commit_without(tag, champion: str, run: Run) -> str | None:
    """A commit of the champion without a change, "" where that cannot be, None where the champion has it no more."""
    ref = f"{tag.refs}ablation/{champion[:12]}/{run.number:04d}"
    if commit := tag.repository.commit_of(ref):
        return commit
    own = tag.source(champion)
    source = take_back(tag.repository, own, tag.source(run.commit), tag.source(run.base))
    if source is None or compile_problem(source, tag.domain.editable):
        return ""
    if fingerprint(source) == fingerprint(own):
        return None
    return tag.repository.commit(champion, source, f"without run {run.number:04d}: {run.description}", ref)


def order_runs(sides: list[str], replicates: int) -> list[str]:
    """The sides in the order of their runs, the champion in alternation with the others.

    Many are compared with the champion, so it runs √K times as often as each of K (Dunnett 1955,
    doi 10.1080/01621459.1955.10501294).
    """
    others = [side for _ in range(replicates) for side in sides if side != CHAMPION]
    compared = sum(side.startswith("without") for side in sides)
    count = math.ceil(replicates * math.sqrt(compared))
    places = [(len(others) * (number + 0.5) / count, CHAMPION) for number in range(count)]
    places += [(place + 0.5, side) for place, side in enumerate(others)]
    return [side for _, side in sorted(places, key=lambda pair: pair[0])]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def ablate(ratchet, replicates: int, workers: int = 1) -> str:
    """Measure what is still to be measured of the champion's ablation; its group. UserError where there is nothing to
    ablate."""
    tag = ratchet.tag
    if not changes_in_branch(tag.ledger):
        raise UserError("no change is in the branch: there is nothing to ablate", 2)
    group = group_of(tag.champion)
    has_told = False
    while True:
        sides = find_sides(tag)
        done = Counter(run.group.partition("/")[2] for run in tag.ledger.runs if run.group.startswith(group))
        left = []
        for side in order_runs(list(sides), replicates):
            if done[side]:
                done[side] -= 1
            else:
                left.append(side)
        if not left:
            return group
        if not has_told:
            has_told = True
            _tell_plan(tag.ledger, sides, left, workers)
        # A side that crashes makes other sides, so once more.
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda side: _measure(ratchet, group, side, sides[side]), left))  # noqa: B023


def _tell_plan(ledger: Ledger, sides: dict[str, str], left: list[str], workers: int) -> None:
    changes = len({side.split()[-1] for side in sides if side != CHAMPION})
    usual = statistics.median(run.seconds for run in ledger.runs if run.score is not None)
    time_words = duration(len(left) * usual / workers)
    say(f"ablation of {changes} changes: {len(left)} runs, {left.count(CHAMPION)} of the champion, about {time_words}")


def _measure(ratchet, group: str, side: str, commit: str) -> None:
    seed = fresh_seed()
    run = Run(0, commit, seed=seed, purpose="ablation", group=f"{group}/{side}", description=f"{side}, seed {seed}")
    with ratchet.runner.device() as device:
        run = ratchet.run_once(run, device)
    if run.status == "crash" and side == CHAMPION:
        raise UserError(f"the champion {commit[:7]} crashed: {run.reason} ({ratchet.tag.folder(run.number)}/run.log)")
    with ratchet.lock:
        ratchet.record([run], "measured")


# ---------------------------------------------------------------------------------------------------------------------
# What it says


def read_contributions(ledger: Ledger, group: str) -> list[Contribution]:
    """Of the changes that an ablation has measured, in the order in which they were kept."""
    scores: dict[str, list[float]] = {}
    for run in ledger.runs:
        name, _, side = run.group.partition("/")
        if name == group:
            scores.setdefault(side, []).extend([] if run.score is None else [run.score])
    numbers = sorted({int(side.split()[-1]) for side in scores if side != CHAMPION})
    found = []
    for number in numbers:
        is_beside_base = f"with {number}" in scores or f"before {number}" in scores
        sides = (f"before {number}", f"with {number}") if is_beside_base else (f"without {number}", CHAMPION)
        less, more = (scores.get(side, []) for side in sides)
        gain, error = ledger.difference(less, more)
        found.append(Contribution(ledger[number], is_beside_base, gain, error))
    return found


def ablation_text(tag, group: str) -> str:
    """The table of an ablation: what each change contributes, and below it their sum beside the whole gain."""
    ledger = tag.ledger
    domain = ledger.domain
    found = read_contributions(ledger, group)
    if not found:
        return f"{group}: nothing is measured yet"
    rows = [[group, f"contribution, {domain.unit}", "± 2 errors", "", "lines", "description"]]
    for one in found:
        gain = "" if one.gain is None else f"{one.gain:+.{domain.score_digits}f}"
        error = "" if one.standard_error is None else domain.score_text(2 * one.standard_error)
        word = f"{one.word}, beside its base" if one.is_beside_base else one.word
        lines = tag.repository.count_lines(one.run.base, one.run.commit)
        rows.append([f"run {one.run.number:04d}", gain, error, word, lines, one_line(one.run.description, 80)])
    text = align(rows, right=(1, 2, 4))
    total = sum(one.gain for one in found if one.gain is not None)
    champions = [run.score for run in ledger.runs if run.group == f"{group}/{CHAMPION}" and run.score is not None]
    if champions:
        whole = domain.gain(ledger.believed(ledger.baseline), statistics.fmean(champions))
        text.append(
            f"the contributions add up to {total:+.{domain.score_digits}f}; the champion's {len(champions)} fresh runs "
            f"are {whole:+.{domain.score_digits}f} from the baseline's believed score"
        )
    compared = sum(not one.is_beside_base and one.standard_error is not None for one in found)
    if compared:
        # Fewer, since they share the champion's runs (Slepian 1962, Šidák 1967); more, since sigma is an estimate.
        chance = 1 - statistics.NormalDist().cdf(2) ** compared
        nights = f"at least one would still be said to carry in about {chance:.0%} of nights"
        text.append(f"if none of these {compared} had an effect, {nights}")
    return "\n".join(text)


# ---------------------------------------------------------------------------------------------------------------------
# --apply


def apply(ratchet, replicates: int) -> None:
    """Take out every change that does not carry, and keep that as a simplification if it loses at most one sigma on
    fresh seeds; else put the half back that contributed most, and try again."""
    tag = ratchet.tag
    found = read_contributions(tag.ledger, group_of(tag.champion))
    idle = [one for one in found if one.word in ("within noise", "harms")]
    idle.sort(key=lambda one: one.gain)
    for _ in range(APPLY_TRIES):
        source, taken = without_all(tag, idle)
        if not taken:
            say("every change carries, makes the code shorter, or stands below one that does: nothing is taken out")
            return
        numbers = ", ".join(str(one.run.number) for one in sorted(taken, key=lambda one: one.run.number))
        description = f"simplify: without the changes of {'runs' if len(taken) > 1 else 'run'} {numbers}"
        edit = Edit(source, tag.champion, description, pairs=replicates)
        if ratchet.experiment(edit).status == "keep":
            return
        idle = [one for one in idle if one not in taken[len(taken) // 2 :]]


def without_all(tag, idle: list[Contribution]) -> tuple[bytes, list[Contribution]]:
    """The champion's file without these changes, and those that were taken out, by their contribution. One that made
    the code shorter is worth that, unless it harms."""
    source = tag.source(tag.champion)
    taken = []
    for one in sorted(idle, key=lambda one: -one.run.number):  # the latest first: it may stand on an earlier one
        without = take_back(tag.repository, source, tag.source(one.run.commit), tag.source(one.run.base))
        if without is None or compile_problem(without, tag.domain.editable):
            continue
        if one.word == "harms" or syntax_size(without) <= syntax_size(source):
            source = without
            taken.append(one)
    return source, [one for one in idle if one in taken]
