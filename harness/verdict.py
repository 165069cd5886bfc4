"""What stands beside a score: the marks that make it weaker, how it differs from its base, and why that may be so.

`explain` and what calls it read the run folders; the rest are pure functions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from harness.contract import Domain, Record
from harness.curve import Point, Training, loss_at_share, point_at_total, read_batch_of, read_training, unit_of
from harness.screen import duration, one_line
from harness.store import Run, Store

BUSY_SHARE = 0.10  # of the machine, used by others: over it a score is weak
STARTUP_FACTOR = 2  # a start-up this many times the base's,
STARTUP_EXTRA = 30  # and this many seconds longer, is marked: compilation may explain it, training before the clock too
LATEST = 3  # verdicts that an agent is told
LOOK_BACK = 30  # rows among which they are looked for
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the budget, at which the training losses are compared
CLEAR_PACE = 0.05  # of the base's steps: fewer or more than this is slower or faster
CLEAR_LOSS = 0.01  # of the base's training loss: higher or lower than this is worse or better

# ---------------------------------------------------------------------------------------------------------------------
# What makes a score weak


def find_marks(record: Record, startup_seconds: float, base: Run | None) -> tuple[str, ...]:
    """What a person should know before believing the score of a run."""
    marks = []
    if record.busy_others is not None and record.busy_others > BUSY_SHARE:
        marks.append(f"others used {record.busy_others:.0%} of the machine: this score is weak")
    if record.device_others:
        marks.append(f"{record.device_others} other processes were on the device: this score is weak")
    if base is not None and base.startup_seconds is not None:
        limit = STARTUP_FACTOR * base.startup_seconds + STARTUP_EXTRA
        if startup_seconds > limit:
            usual = duration(base.startup_seconds)
            taken = duration(startup_seconds)
            marks.append(f"it took {taken} to start, its base {usual}: compilation, or a head start")
    if record.export_problem:
        marks.append(f"the network could not be exported: {one_line(record.export_problem, 90)}")
    return tuple(marks)


def is_weak(run: Run) -> bool:
    """Whether others used so much of the machine, or the device, that the score says little."""
    return (run.busy_others or 0) > BUSY_SHARE or bool(run.device_others)


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


def mean_pace(store: Store, runs: list[Run]) -> tuple[float | None, float | None]:
    """Steps and tokens a second, the means over some runs; None where no run says so."""
    steps = []
    paces = []
    for run in runs:
        steps.append(number(run, store.domain.steps))
        paces.append(pace(run, read_batch_of(store.folder(run.number), store.domain), store.domain))
    return mean_of_known(steps), mean_of_known(paces)


def mean_of_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def compare(run: Run, base: Run | None, domain: Domain) -> str:
    """One line: the score of a run and, where the base's is known, the difference and what may explain it."""
    text = f"{domain.metric} {run.score:.6f}"
    if base is None or not base.score:
        return f"{text}, {duration(run.seconds)}"
    text += f" ({run.score - base.score:+.6f} to its base)"
    steps = number(run, domain.steps)
    steps_of_base = number(base, domain.steps)
    if steps and steps_of_base:
        text += f", {steps:.0f} steps ({steps / steps_of_base - 1:+.0%})"
    text += f", {run.memory_gb:.1f} GB ({run.memory_gb - base.memory_gb:+.1f})"
    return f"{text}, {duration(run.seconds)}"


# ---------------------------------------------------------------------------------------------------------------------
# The verdict: a run beside its base


@dataclass(frozen=True)
class Side:
    """One of the two runs that a verdict compares."""

    run: Run
    score: float  # the base's is what is believed of all its runs
    training: Training


def explain(store: Store, run: Run) -> list[str]:
    """The table of a run beside its base, then what it means in a word, then the marks; a few lines of text."""
    base = base_run(store, run)
    lines = []
    if run.decision != "crash" and base is not None:
        score = store.estimate(base.commit)
        candidate_side = Side(run, run.score, read_training(store.folder(run.number), store.domain))
        base_side = Side(
            base, base.score if score is None else score, read_training(store.folder(base.number), store.domain)
        )
        lines += table(candidate_side, base_side, store.domain)
        if word := in_a_word(candidate_side, base_side, store.domain):
            lines.append(word)
    elif run.decision != "crash":
        lines.append(compare(run, None, store.domain))
    lines += run.marks
    if base is not None and is_weak(base):
        lines.append(f"its base, run {base.number:04d}, was measured on a busy machine: the difference is weak")
    return lines


def latest_verdicts(store: Store) -> list[str]:
    """The newest scored experiments, oldest first: their rows, and how they stand beside their bases."""
    texts = []
    for row in reversed(store.rows[-LOOK_BACK:]):
        runs = [run for run in store.runs_of(store.full(row.commit)) if run.base and run.decision and run.score]
        if row.status != "crash" and runs and not any(text.startswith(row.commit) for text in texts):
            texts.append("\n".join([str(row).rstrip(), *explain(store, runs[-1])]))
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
    """The run of its base that came last before it: of all of them the machine was most likely as it was then."""
    if not run.base:
        return None
    runs = [other for other in store.runs_of(run.base) if other.score and other.purpose != "audit"]
    earlier = [other for other in runs if other.number < run.number]
    return (earlier or runs or [None])[-1]


def table(candidate: Side, base: Side, domain: Domain) -> list[str]:
    """Score, speed, cost and training loss of both; a star at what only the run itself says."""
    rows = [_row(domain.metric, candidate.score, base.score, "{:.6f}".format, _difference("{:+.6f}"))]
    rows.append(_row("steps *", number(candidate.run, domain.steps), number(base.run, domain.steps), _count, _percent))
    if domain.batch_pattern:
        paces = [pace(side.run, side.training.batch, domain) for side in (candidate, base)]
        rows.append(_row(f"{unit_of(domain)} a second *", *paces, _count, _percent))
    plain = "{:,.1f}".format
    change = _difference("{:+,.1f}")
    rows.append(_row("start-up seconds", candidate.run.startup_seconds, base.run.startup_seconds, plain, change))
    for key, name in domain.explanations:
        rows.append(_row(f"{name} *", number(candidate.run, key), number(base.run, key), plain, change))
    rows.append(_row("peak memory, GB *", candidate.run.memory_gb, base.run.memory_gb, plain, change))
    rows += _loss_rows(candidate.training, base.training, domain)
    rows = [row for row in rows if row is not None]
    head = ("", f"run {candidate.run.number:04d}", f"base {base.run.commit[:7]}", "change")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(4)]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in (1, 2, 3))]
        lines.append("  ".join(cells).rstrip())
    if any(row[0].endswith("*") for row in rows):
        lines.append("* the run's own words: the judge did not measure them")
    return lines


def _loss_rows(candidate: Training, base: Training, domain: Domain) -> list[tuple | None]:
    """Training loss at equal time, and at equal tokens: where the shorter of both ended."""
    loss = "{:.4f}".format
    change = _difference("{:+.4f}")
    rows = []
    for share in SHARES:
        losses = (loss_at_share(candidate.points, share), loss_at_share(base.points, share))
        rows.append(_row(f"loss at {share:.0%} of the time *", *losses, loss, change))
    points = at_equal_total(candidate, base)
    if points is not None:
        of_candidate, of_base = points
        total = _amount(min(candidate.total, base.total))
        rows.append(_row(f"loss at {total} {unit_of(domain)} *", of_candidate.loss, of_base.loss, loss, change))
        shares = (of_candidate.share, of_base.share)
        rows.append(_row("  reached at this share of the time *", *shares, "{:.0%}".format, lambda new, old: ""))
    return rows


def at_equal_total(candidate: Training, base: Training) -> tuple[Point, Point] | None:
    """Both curves where the shorter one ended, in tokens say; None where that is not known."""
    if candidate.total is None or base.total is None:
        return None
    total = min(candidate.total, base.total)
    points = (point_at_total(candidate, total), point_at_total(base, total))
    return None if None in points else points


def in_a_word(candidate: Side, base: Side, domain: Domain) -> str:
    """`slower`, `worse`, both, or `faster`, with the reason; "" where the curves do not say it clearly.

    A budget is a time: a candidate may lose because it makes fewer steps, or because each step teaches it less. The
    two are told apart at equal tokens. Learning rates fall towards the end of the budget, so there the shorter run,
    which is at its end, has the advantage: `worse` alone is said only of runs about as long as their base.
    """
    points = at_equal_total(candidate.training, base.training)
    if points is None:
        return ""
    change = candidate.training.total / base.training.total - 1
    loss_change = points[0].loss - points[1].loss
    is_worse = loss_change > CLEAR_LOSS * abs(points[1].loss)
    is_better = loss_change < -CLEAR_LOSS * abs(points[1].loss)
    unit = unit_of(domain)
    if domain.gain(base.score, candidate.score) > 0:
        if change > CLEAR_PACE and not is_better:
            return f"faster: {change:.0%} more {unit} than its base, and no better at equal {unit}"
        return ""
    if change < -CLEAR_PACE and is_worse:
        return f"slower and worse: {-change:.0%} fewer {unit} than its base, and a higher loss at equal {unit}"
    if change < -CLEAR_PACE:
        return f"slower: {-change:.0%} fewer {unit} than its base, and no higher loss at equal {unit}"
    if is_worse and change <= CLEAR_PACE:
        return f"worse: a higher loss at equal {unit}, and not slower"
    return ""


def _row(name: str, new: float | None, old: float | None, show: Callable, change: Callable) -> tuple | None:
    """Name, candidate, base, change; None where neither is known."""
    if new is None and old is None:
        return None
    cells = ["-" if value is None else show(value) for value in (new, old)]
    return (name, *cells, "" if new is None or old is None else change(new, old))


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
