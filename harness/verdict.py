"""What stands beside a score: the marks that make it weaker, how it differs from its base, and why that may be so.

`explain` and what calls it read the run folders; the rest are pure functions.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from harness.contract import Domain, Record
from harness.curve import Point, Training, loss_at_share, point_at_total, read_batch_of, read_training, unit_of
from harness.ledger import (
    Noise,
    believed_scores,
    find_noise,
    is_less_code,
    lines_of_code,
    scores_by_commit,
    standard_error,
    wants_simpler_rule,
)
from harness.screen import duration, one_line
from harness.store import Run, Store

BUSY_SHARE = 0.10  # of the machine, used by others: over it a score is weak
LONG_FACTOR = 2  # a start-up or an evaluation that takes this many times what is usual,
LONG_EXTRA = 30  # and so many seconds more, is marked: compilation may explain it, training off the clock too
LIKE_ITS_BASE = 1.25  # times the base's: up to here nothing new is marked
EXTRA_SHARE = 0.1  # of the time budget: those seconds are not more than this,
LEAST_EXTRA = 2  # but so many: a busy machine is slow at small things
LATEST = 3  # verdicts that an agent is told
LOOK_BACK = 30  # rows among which they are looked for
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the budget, at which the training losses are compared
CLEAR_PACE = 0.05  # of the base's steps: fewer or more than this is slower or faster
CLEAR_LOSS = 0.01  # of the base's training loss: higher or lower than this is worse or better
SAME_STAGE = 0.1  # of the budget: runs further apart are at other learning rates, so their losses do not compare
LITTLE_BUSY = 0.03  # of the machine, used by others: up to here it is not worth a row
LISTED_SCORES = 5  # newest, of a commit that ran more often

# ---------------------------------------------------------------------------------------------------------------------
# What makes a score weak


def find_marks(record: Record, run: Run, usual: list[tuple[str, Run]], time_budget: float) -> tuple[str, ...]:
    """What a person should know before believing the score of a run. `usual`: see usual_runs."""
    marks = _busy_marks(record)
    startups = [(name, other.startup_seconds) for name, other in usual]
    if words := _usual_words(run.startup_seconds, startups, time_budget):
        marks.append(f"it took {duration(run.startup_seconds)} to start, {words}: compilation, or a head start")
    evaluations = [(name, other.evaluation_seconds) for name, other in usual]
    if words := _usual_words(run.evaluation_seconds, evaluations, time_budget):
        reasons = "compilation, a slower network, or training after the clock"
        marks.append(f"it took {duration(run.evaluation_seconds)} to evaluate, {words}: {reasons}")
    if record.export_problem:
        marks.append(f"the network could not be exported: {one_line(record.export_problem, 90)}")
    return tuple(marks)


def _usual_words(seconds: float | None, usual: list[tuple[str, float | None]], time_budget: float) -> str:
    """`its base 10 s`: the least of the usual times, where this one is far over it; "" where it is not.

    What a base needed too was marked in its own run: compiling, once kept, is not marked for ever.
    """
    known = [(other, name) for name, other in usual if other is not None and other >= 0]  # a clock may be set back
    if seconds is None or not known:
        return ""
    least, name = min(known)
    extra = max(LEAST_EXTRA, min(LONG_EXTRA, EXTRA_SHARE * time_budget))
    of_base = usual[0][1] or 0.0
    is_long = seconds > LONG_FACTOR * least + extra and seconds > LIKE_ITS_BASE * of_base
    return f"{name} {duration(least)}" if is_long else ""


def usual_runs(store: Store, run: Run) -> list[tuple[str, Run]]:
    """With whose times those of a run are compared, and what a person calls them: its base and the baseline.

    The baseline too: a little more from keep to keep would never be far more than the base's.
    """
    base = base_run(store, run)
    if base is None:
        return []
    of_baseline = [other for other in store.runs_of(store.baseline) if other.is_scored]
    return [("its base", base), *(("the baseline", other) for other in of_baseline)]


def _busy_marks(measured: Record | Run) -> list[str]:
    """What others did on the machine meanwhile, where it was enough to make the score weak."""
    marks = []
    if measured.busy_others is not None and measured.busy_others > BUSY_SHARE:
        marks.append(f"others used {measured.busy_others:.0%} of the machine: this score is weak")
    if measured.device_others:
        marks.append(f"{measured.device_others} other processes were on the device: this score is weak")
    return marks


def is_weak(run: Run) -> bool:
    """Whether others used so much of the machine, or the device, that the score says little."""
    return bool(_busy_marks(run))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of a run


def number(run: Run, key: str) -> float | None:
    """A finite number that a run printed in its summary; None where there is none."""
    try:
        value = float(run.summary[key])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def pace(run: Run, batch: int | None, domain: Domain) -> float | None:
    """Tokens a second (or what the domain's batches are made of): the steps that the run says, by the loop's clock."""
    steps = number(run, domain.steps)
    if steps is None or batch is None or not run.training_seconds:
        return None
    return steps * batch / run.training_seconds


def recorded_pace(store: Store, run: Run) -> float | None:
    """The pace of a run, its batch taken from its log."""
    return pace(run, read_batch_of(store.folder(run.number), store.domain), store.domain)


def mean_pace(store: Store, runs: list[Run]) -> tuple[float | None, float | None]:
    """Steps and tokens a second, the means over some runs; None where no run says so."""
    steps = []
    paces = []
    for run in runs:
        steps.append(number(run, store.domain.steps))
        paces.append(recorded_pace(store, run))
    return mean_of_known(steps), mean_of_known(paces)


def mean_of_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def compare(run: Run, base: Run | None, domain: Domain) -> str:
    """One line: the score of a run and, where the base's is known, the difference and what may explain it."""
    text = f"{domain.metric} {run.score:.6f}"
    if base is None or not base.score:
        return f"{text}, {duration(run.seconds)}"
    text += f" ({run.score - base.score:+.6f} to run {base.number:04d} of its base)"
    steps = number(run, domain.steps)
    steps_of_base = number(base, domain.steps)
    if steps and steps_of_base:
        text += f", {steps:.0f} steps ({steps / steps_of_base - 1:+.0%})"
    text += f", {run.memory_gb:.1f} GB ({run.memory_gb - base.memory_gb:+.1f})"
    return f"{text}, {duration(run.seconds)}"


# ---------------------------------------------------------------------------------------------------------------------
# What is believed


@dataclass(frozen=True)
class Beliefs:
    """What the whole ledger says: a single run is held against it. Commits are 7 characters."""

    scores: dict[str, list[float]]  # commit -> all its scores
    believed: dict[str, list[float]]  # commit -> those whose mean is believed
    noise: Noise

    @property
    def sigma(self) -> float:
        """The noise of one run."""
        return self.noise.sigma

    def score(self, commit: str) -> float | None:
        """What is believed of a commit."""
        scores = self.believed.get(commit[:7])
        return statistics.fmean(scores) if scores else None

    def difference(self, commit: str, base: str) -> float | None:
        """Between what is believed of the two: it decides."""
        score = self.score(commit)
        score_of_base = self.score(base)
        return None if score is None or score_of_base is None else score - score_of_base

    def two_errors(self, commit: str, base: str) -> float:
        """Two standard errors of the difference."""
        return 2 * standard_error(self.believed[base[:7]], self.believed[commit[:7]], self.sigma)

    def is_over_noise(self, commit: str, base: str) -> bool:
        return abs(self.difference(commit, base)) > self.two_errors(commit, base)


def read_beliefs(store: Store) -> Beliefs:
    rows = store.rows
    noise = find_noise(rows, store.profile, store.domain)
    return Beliefs(scores_by_commit(rows), believed_scores(rows), noise)


# ---------------------------------------------------------------------------------------------------------------------
# The verdict: a run beside its base


@dataclass(frozen=True)
class Side:
    """One of the two runs that a verdict compares."""

    run: Run
    training: Training


def explain(store: Store, run: Run, beliefs: Beliefs | None = None, with_commands: bool = False) -> list[str]:
    """The table of a run beside its base, then what it means, in a few lines of text.

    A champion that was measured again stands beside its own earlier run. `with_commands`: the reader may run loop.py.
    """
    if run.decision == "crash":
        return list(run.marks)
    beliefs = beliefs or read_beliefs(store)
    base = base_run(store, run)
    other = base or earlier_run(store, run)
    lines = []
    if other is None:
        lines.append(compare(run, None, store.domain))
    else:
        sides = [Side(each, read_training(store.folder(each.number), store.domain)) for each in (run, other)]
        lines += table(*sides, store.domain)
    lines += what_is_believed(store, run, base, beliefs)
    if base is not None:
        swing = max(speed_swing(store, commit) for commit in (run.commit, base.commit))
        lines += [why_not_simpler(store, run), in_a_word(*sides, store.domain, swing)]
    elif other is not None:
        differ = f"the same code as run {other.number:04d}: only seed and machine differ"
        lines.append(f"{differ}; noise of one run {beliefs.sigma:.2g}")
    lines += [mark for mark in run.marks if mark not in _busy_marks(run)]
    lines.append(weakness(store, run, other, with_commands))
    return [line for line in lines if line]


def what_is_believed(store: Store, run: Run, base: Run | None, beliefs: Beliefs) -> list[str]:
    """For a commit that ran more than once: the mean that is believed. Then the change that decides, and the noise."""
    lines = []
    has_means = False
    if base is not None and len(beliefs.scores.get(base.commit[:7], [])) > 1:
        has_means = True
        numbers = numbers_of_believed(store, base.commit, beliefs)
        of_runs = f"run {numbers[0]}" if len(numbers) == 1 else f"mean of runs {', '.join(numbers)}"
        lines.append(f"base believed {beliefs.score(base.commit):.6f}: {of_runs}")
    if len(beliefs.scores.get(run.commit[:7], [])) > 1:
        has_means = True
        lines.append(_scores_of_repeated(store, run, beliefs))
    change = beliefs.difference(run.commit, base.commit) if base is not None else None
    if change is not None:
        name = "change that decides" if has_means else "change"
        noise = f"noise of one run {beliefs.sigma:.2g}" + (", assumed" if beliefs.noise.is_assumed else "")
        errors = f"2 standard errors {beliefs.two_errors(run.commit, base.commit):.2g}"
        if beliefs.is_over_noise(run.commit, base.commit):
            word = "over the noise"
        else:
            is_better = store.domain.gain(beliefs.score(base.commit), beliefs.score(run.commit)) > 0
            word = f"within noise{why_kept(run, is_better)}"
        lines.append(f"{name} {change:+.6f}, {errors} ({noise}): {word}")
    return lines


def why_kept(run: Run, is_better: bool) -> str:
    """The rule by which a change within noise was kept; "" where it was not, or is not believed better any more."""
    if run.decision != "keep":
        return ""
    if is_better:
        return "; better is kept all the same"
    return "; kept as a simplification" if wants_simpler_rule(run.description) else ""


def why_not_simpler(store: Store, run: Run) -> str:
    """Why an experiment that asked for the rule of simplicity was not kept by it; "" where it did not ask."""
    if run.decision != "discard" or not run.base or not wants_simpler_rule(run.description):
        return ""
    editable = store.domain.editable
    before, after = (store.repository.read(commit, editable) for commit in (run.base, run.commit))
    counts = f"{lines_of_code(after):,} lines of code, its base {lines_of_code(before):,}"
    if not is_less_code(before, after):
        return f"not simpler: {counts} (comments, blank lines and joined lines do not count)"
    return f"simpler, {counts}, but it would give away more than the noise that is left"


def numbers_of_believed(store: Store, commit: str, beliefs: Beliefs) -> list[str]:
    """The runs whose scores are believed, `0008` and so on, the newest few: they are the last ones of their commit."""
    runs = [run for run in store.runs_of(commit) if run.is_decided and run.is_scored]
    count = len(beliefs.believed[commit[:7]])
    numbers = [f"{run.number:04d}" for run in runs[-count:]]
    if len(numbers) > LISTED_SCORES:
        return ["...", *numbers[-LISTED_SCORES:]]
    return numbers


def _scores_of_repeated(store: Store, run: Run, beliefs: Beliefs) -> str:
    """All scores of a commit that ran more than once, and which of them are believed."""
    commit = run.commit[:7]
    scores = beliefs.scores[commit]
    listed = ", ".join(f"{score:.6f}" for score in scores[-LISTED_SCORES:])
    if len(scores) > LISTED_SCORES:
        listed = f"..., {listed}"
    how = "the mean of all"
    if len(beliefs.believed[commit]) < len(scores):
        low = "low" if store.domain.lower_is_better else "high"
        first = next(row for row in store.rows if row.commit == commit and row.status != "crash")
        why = f"it was picked for being {low}" if first.status == "keep" else "it is why this ran again"
        how = f"the mean of its repeats (the first run is left out: {why})"
    return f"{commit} ran {len(scores)} times: {listed}; believed: {beliefs.score(commit):.6f}, {how}"


def weakness(store: Store, run: Run, other: Run | None, with_commands: bool) -> str:
    """One line about what a busy machine makes doubtful, and what to run; "" where nothing is."""
    weak = [each for each in (run, other) if each is not None and is_weak(each)]
    if not weak:
        return ""
    names = " and ".join(f"run {each.number:04d}" for each in weak)
    text = f"weak: the machine was busy during {names}"
    if other is None:
        text = _busy_marks(run)[0]
    if not with_commands:
        return text
    commands = list(dict.fromkeys(repeat_command(store, each.commit, each.number) for each in weak))
    order = ", one after the other" if len(commands) > 1 else ""
    return f"{text}; measure again{order}: {', '.join(commands)}"


def repeat_command(store: Store, commit: str, number: int = 0) -> str:
    """The command that measures a commit once more, by the number of its first run; `number` where that is unknown."""
    if commit == store.champion:
        return "uv run loop.py try --base"
    if commit in store.attempts.values():
        number = store.first_number(commit)
    return f"uv run loop.py try --again {number}"


def latest_verdicts(store: Store, beliefs: Beliefs) -> list[str]:
    """The newest scored experiments, oldest first: their rows, and how they stand beside their bases."""
    texts = []
    for row in reversed(store.rows[-LOOK_BACK:]):
        commit = store.full_commit(row.commit)
        runs = [run for run in store.runs_of(commit) if run.base and run.is_decided and run.is_scored]
        if row.status != "crash" and runs and not any(text.startswith(row.commit) for text in texts):
            texts.append("\n".join([str(row).rstrip(), *explain(store, runs[-1], beliefs)]))
        if len(texts) == LATEST:
            break
    return texts[::-1]


def discarded_when_busy(store: Store) -> set[str]:
    """Commits (7 characters) that were discarded, and whose every run was disturbed by others."""
    disturbed: dict[str, bool] = {}
    for run in store.read_runs():
        if run.decision == "discard":
            commit = run.commit[:7]
            disturbed[commit] = disturbed.get(commit, True) and is_weak(run)
    return {commit for commit, is_so in disturbed.items() if is_so}


def base_run(store: Store, run: Run) -> Run | None:
    """The run of its base that came last before it: the machine has had the least time to change since.

    A base that was only measured later, beside the candidate, is better than none.
    """
    if not run.base:
        return None
    runs = [other for other in store.runs_of(run.base) if other.is_scored]
    earlier = [other for other in runs if other.number < run.number]
    if earlier:
        return earlier[-1]
    return runs[-1] if runs else None


def earlier_run(store: Store, run: Run) -> Run | None:
    """The run of the same commit that came last before it."""
    earlier = [other for other in store.runs_of(run.commit) if other.is_scored and other.number < run.number]
    return earlier[-1] if earlier else None


def table(candidate: Side, base: Side, domain: Domain) -> list[str]:
    """Score, speed, cost and training loss of two runs; a star at what only the run itself says."""
    sides = (candidate, base)
    runs = (candidate.run, base.run)
    rows = [_row(domain.metric, candidate.run.score, base.run.score, "{:.6f}".format, _difference("{:+.6f}"))]
    rows.append(_row("steps *", *(number(run, domain.steps) for run in runs), _count, _percent))
    if domain.batch_pattern:
        paces = [pace(side.run, side.training.batch, domain) for side in sides]
        rows.append(_row(f"{unit_of(domain)} a second *", *paces, _count, _percent))
    rows.append(_amount_row("start-up seconds", *(run.startup_seconds for run in runs)))
    for key, name in domain.explanations:
        rows.append(_amount_row(f"{name} *", *(number(run, key) for run in runs)))
    rows.append(_amount_row("peak memory, GB *", *(run.memory_gb for run in runs)))
    rows += _others_rows(*runs)
    rows += _loss_rows(candidate.training, base.training, domain)
    rows = [row for row in rows if row is not None]
    head = ("", f"run {candidate.run.number:04d}", f"base {base.run.number:04d}", "change")
    if candidate.run.commit == base.run.commit:
        head = (*head[:2], f"run {base.run.number:04d}", "change")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(3)]
    widths.append(max(len(row[3]) for row in (head, *rows) if not row[3].startswith("(")))
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in (1, 2, 3))]
        lines.append("  ".join(cells).rstrip())
    if any(row[0].endswith("*") for row in rows):
        lines.append("* the run's own words, not the judge's")
    return lines


def _others_rows(candidate: Run, base: Run) -> list[tuple | None]:
    """What others did on machine and device meanwhile, where it was more than a little for one of both."""
    rows = []
    shares = (candidate.busy_others, base.busy_others)
    if max(share or 0 for share in shares) > LITTLE_BUSY:
        rows.append(_row("machine used by others", *shares, "{:.0%}".format, _always("")))
    counts = (candidate.device_others, base.device_others)
    if any(counts):
        rows.append(_row("others on the device", *counts, _count, _always("")))
    return rows


def _loss_rows(candidate: Training, base: Training, domain: Domain) -> list[tuple | None]:
    """Training loss at equal time, and at equal tokens: where the shorter of both ended."""
    loss = "{:.4f}".format
    change = _difference("{:+.4f}")
    rows = []
    for share in SHARES:
        losses = (loss_at_share(candidate.points, share), loss_at_share(base.points, share))
        rows.append(_row(f"loss at {share:.0%} of time *", *losses, loss, change))
    points = at_equal_total(candidate, base)
    if points is not None:
        of_candidate, of_base = points
        total = _amount(min(candidate.total, base.total))
        if not is_same_stage(points):
            shares = f"at {of_candidate.share:.0%} and {of_base.share:.0%} of the time"
            change = _always(f"({shares}: not comparable)")
        rows.append(_row(f"loss at {total} {unit_of(domain)} *", of_candidate.loss, of_base.loss, loss, change))
    return rows


def at_equal_total(candidate: Training, base: Training) -> tuple[Point, Point] | None:
    """Both curves where the shorter one ended, in tokens say; None where that is not known."""
    if candidate.total is None or base.total is None:
        return None
    total = min(candidate.total, base.total)
    points = (point_at_total(candidate, total), point_at_total(base, total))
    return None if None in points else points


def is_same_stage(points: tuple[Point, Point]) -> bool:
    """Whether both runs had used about the same share of their time.

    Learning rates fall towards the end of the budget, and the loss with them: a run that is at its end looks better
    than one in the middle, whatever its edit does.
    """
    return abs(points[0].share - points[1].share) <= SAME_STAGE


def speed_swing(store: Store, commit: str) -> float:
    """By what share the fastest run of a commit outpaced its slowest. That is the machine's doing: the code was one."""
    paces = [recorded_pace(store, run) for run in store.runs_of(commit) if run.is_scored]
    known = [value for value in paces if value]
    return max(known) / min(known) - 1 if known else 0.0


def in_a_word(candidate: Side, base: Side, domain: Domain, swing: float = 0.0) -> str:
    """`slower`, `worse`, both, or `faster`, with the reason; "" where the curves do not say it clearly.

    A budget is a time: a candidate may lose because it makes fewer steps, or because each step teaches it less. The
    two are told apart at equal tokens, where that can be compared: there the slower run is nearer to the end of its
    learning rate, so that it looks a little better than it is. On a busy machine, or one whose speed changes by itself
    (`swing`, see speed_swing), nobody knows why a run was slow.
    """
    points = at_equal_total(candidate.training, base.training)
    if points is None:
        return ""
    unit = unit_of(domain)
    change = candidate.training.total / base.training.total - 1
    amount = f"{abs(change):.0%} {'more' if change > 0 else 'fewer'} {unit}"
    if abs(change) > CLEAR_PACE and (is_weak(candidate.run) or is_weak(base.run)):
        return f"{amount}: the edit or the machine, these two runs cannot tell"
    if CLEAR_PACE < abs(change) <= swing:
        return f"{amount}: the edit or the machine, whose speed differed by {swing:.0%} between runs of the same code"
    is_comparable = is_same_stage(points)
    loss_change = points[0].loss - points[1].loss
    limit = CLEAR_LOSS * abs(points[1].loss)
    is_worse = is_comparable and loss_change > limit
    is_better = is_comparable and loss_change < -limit
    if domain.gain(base.run.score, candidate.run.score) > 0:
        if change > CLEAR_PACE and not is_better:
            return f"faster: {amount} than its base"
        return ""
    if change < -CLEAR_PACE and is_worse:
        return f"slower and worse: {amount} than its base, and a higher loss at equal {unit}"
    if change < -CLEAR_PACE:
        return f"slower: {amount} than its base"
    if is_worse and change <= CLEAR_PACE:
        return f"worse: a higher loss at equal {unit}, and not slower"
    return ""


def _row(name: str, new: float | None, old: float | None, write: Callable, change: Callable) -> tuple | None:
    """Name, candidate, base, change; None where neither is known. `write` and `change` make the texts."""
    if new is None and old is None:
        return None
    cells = ["-" if value is None else write(value) for value in (new, old)]
    is_known = new is not None and old is not None
    return (name, *cells, change(new, old) if is_known else "")


def _amount_row(name: str, new: float | None, old: float | None) -> tuple | None:
    """A row of seconds or GB; None where it would say no more than zero and zero."""
    if not any(round(value or 0, 1) for value in (new, old)):
        return None
    return _row(name, new, old, "{:,.1f}".format, _difference("{:+,.1f}"))


def _always(text: str) -> Callable[[float, float], str]:
    """The same text, whatever the two numbers are."""
    return lambda new, old: text


def _difference(layout: str) -> Callable[[float, float], str]:
    return lambda new, old: layout.format(new - old)


def _percent(new: float, old: float) -> str:
    return f"{new / old - 1:+.0%}" if old else ""


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _amount(value: float) -> str:
    """1,234,567 as 1.2M: for a heading."""
    if value >= 1e9:
        return f"{value / 1e9:.1f}B"
    return f"{value / 1e6:.1f}M" if value >= 1e6 else f"{value:,.0f}"
