"""A run beside its base: what its log tells of the training, the verdict on it, and that verdict in one line.

What others used of the machine, and how far the speed of one and the same code drifts, is said where it may explain a
difference. Numbers from a log are the run's own words; the score, the seconds and the tokens scored are measured.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from harness.console import duration
from harness.domain import Domain
from harness.ledger import STALE, Ledger, Run

MAX_LOG_CHARS = 8_000_000  # of a log's beginning, and as many of its end: a run may print anything
TOO_MANY = 10**15  # steps, or tokens a step: no run makes so many
TOO_FAR = 0.05  # of the budget beyond the first or the last point of a curve: there it says nothing
LONGEST_GAP = 0.35  # of the budget between two points
BUSY = 0.1  # of the processors used by others: from here on a score says less
SAME_SPEED = 0.005  # a smaller difference is none

# ---------------------------------------------------------------------------------------------------------------------
# What a log tells of the training


@dataclass(frozen=True)
class Point:
    """A line of the training curve."""

    step: int
    fraction: float  # of the budget, 0 to 1
    loss: float  # nats per token


def training_facts(log: str, domain: Domain, training_seconds: float | None) -> dict[str, float | None]:
    """The fields of a Run that its log tells: steps, tokens_per_second, loss_half, loss_end; None where it does not."""
    log = _cut(log)
    steps = _printed_steps(log, domain)
    batch = _batch(log, domain)
    curve = read_curve(log, domain)
    speed = None
    if steps and batch and training_seconds:
        speed = steps * batch / training_seconds
    return {
        "steps": steps,
        "tokens_per_second": speed,
        "loss_half": loss_at(curve, 0.5),
        "loss_end": loss_at(curve, 1.0),
    }


def read_curve(log: str, domain: Domain) -> list[Point]:
    """The training curve. A line that is no number, or goes back, is left out."""
    points: list[Point] = []
    for match in re.finditer(domain.curve_pattern, _cut(log)) if domain.curve_pattern else ():
        try:
            point = Point(int(match["step"]), float(match["percent"]) / 100, float(match["loss"]))
        except (ValueError, TypeError):  # not a number, or a group that took no part
            continue
        is_sound = point.step < TOO_MANY and 0 <= point.fraction <= 1 and math.isfinite(point.loss)
        goes_on = not points or (point.step > points[-1].step and point.fraction >= points[-1].fraction)
        if is_sound and goes_on:
            points.append(point)
    return points


def loss_at(curve: list[Point], fraction: float) -> float | None:
    """The loss at a fraction of the budget, on the line between two points; None where the curve has none near it."""
    before = max((point for point in curve if point.fraction <= fraction), key=_fraction, default=None)
    after = min((point for point in curve if point.fraction >= fraction), key=_fraction, default=None)
    if before and after and after.fraction - before.fraction <= LONGEST_GAP:
        part = (fraction - before.fraction) / (after.fraction - before.fraction or 1)
        return before.loss + part * (after.loss - before.loss)
    ends = [point for point in (before, after) if point and abs(point.fraction - fraction) <= TOO_FAR]
    return ends[0].loss if ends else None


def _fraction(point: Point) -> float:
    return point.fraction


def unit_of(domain: Domain) -> str:
    """What a training takes in, for people."""
    return domain.batch_unit if domain.batch_pattern else "steps"


def _cut(log: str) -> str:
    if len(log) <= 2 * MAX_LOG_CHARS:
        return log
    return f"{log[:MAX_LOG_CHARS]}\n{log[-MAX_LOG_CHARS:]}"


def _printed_steps(log: str, domain: Domain) -> float | None:
    """What the summary says, the last lines of a log."""
    if not domain.steps:
        return None
    found = re.findall(rf"^{re.escape(domain.steps)}:[ \t]*(\S{{1,30}})", log, re.MULTILINE)
    return _number(found[-1]) if found else None


def _batch(log: str, domain: Domain) -> float | None:
    """How much one step takes in; 1 where the domain only counts steps."""
    if not domain.batch_pattern:
        return 1
    match = re.search(domain.batch_pattern, log)
    return _number((match["size"] or "").replace(",", "")) if match else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < TOO_MANY else None


# ---------------------------------------------------------------------------------------------------------------------
# One line


def headline(ledger: Ledger, run: Run) -> str:
    """What the loop says when a run is decided."""
    name = f"run {run.number:04d} {'stale' if run.is_stale else run.status}"
    if run.score is None:
        return f"{name}: {run.reason} ({run.description})"
    parts = [f"{ledger.domain.metric} {ledger.domain.score_text(run.score)}"]
    others = _beside(ledger, run)
    if others:
        parts[0] += f", {_difference_words(ledger, run)}"
    if run.steps:
        steps = mean_of_known(other.steps for other in others)
        change = f" ({run.steps / steps - 1:+.0%})" if steps else ""
        parts.append(f"{run.steps:,.0f} steps{change}")
    reason = f"; {run.reason}" if run.reason else ""
    return f"{name}: {', '.join(parts)}, {duration(run.seconds)}{reason} ({run.description})"


def _difference_words(ledger: Ledger, run: Run) -> str:
    """`0.014000 better ± 0.028000`, two standard errors."""
    gain, error = _gain(ledger, run)
    size = f"{ledger.domain.score_text(abs(gain))} {'better' if gain > 0 else 'worse'}"
    return f"{size} ± {ledger.domain.score_text(2 * error) if error is not None else 'unknown'}"


def _gain(ledger: Ledger, run: Run) -> tuple[float, float | None]:
    """The difference that decides, and its standard error: what is believed of the commit against what is believed of
    its base. A repeat without a base stands against the mean of its commit's earlier runs."""
    sigma = ledger.sigma
    if run.base and run.status != "pending":
        gain = ledger.domain.gain(ledger.believed(run.base), ledger.believed(run.commit))
        return gain, ledger.standard_error(run.base, run.commit)
    others = _beside(ledger, run)
    gain = ledger.domain.gain(statistics.fmean(other.score for other in others), run.score)
    return gain, None if sigma is None else sigma * math.sqrt(1 + 1 / len(others))


def _beside(ledger: Ledger, run: Run) -> list[Run]:
    """The runs that a run is compared with: its base's, or those of its commit that were decided before it."""
    if run.base:
        return ledger.runs_of(run.base)
    return [other for other in ledger.runs_of(run.commit) if other.number < run.number]


# ---------------------------------------------------------------------------------------------------------------------
# The verdict


def verdict(ledger: Ledger, run: Run) -> str:
    """A run beside its base: the table, and in a few sentences what the difference means. Nobody needs the log then."""
    lines = [f"run {run.number:04d} {'stale' if run.is_stale else run.status}: {run.description}"]
    if run.score is None:
        return "\n".join(lines + _crash_lines(run))
    others = _beside(ledger, run)
    lines += _table(ledger, run, others)
    if others:
        lines += _difference_lines(ledger, run)
        lines.append(_speed_line(ledger, run, others))
    else:
        lines += _baseline_lines(ledger, run)
    lines += [_busy_line(ledger, run), _former_line(ledger, run)]
    if run.touched:
        lines.append(f"other files that were edited are as before: {', '.join(run.touched)}")
    return "\n".join(line for line in lines if line)


def _crash_lines(run: Run) -> list[str]:
    folder = f"runs/{run.number:04d}"
    lines = [run.reason, f"'tail -n 50 {folder}/run.log' tells more"]
    if run.base:
        lines.append(f"'git apply -3 {folder}/change.diff' brings the edit back, to mend it")
    return lines


def _difference_lines(ledger: Ledger, run: Run) -> list[str]:
    """How the run differs from its base, by the noise; what is believed of a commit that ran more often; the rule."""
    domain = ledger.domain
    gain, error = _gain(ledger, run)
    noise = ledger.noise()
    lines = []
    scores = ledger.scores(run.commit)
    words = _difference_words(ledger, run)
    if len(scores) > 1 and run.status != "pending":
        selected = "" if len(ledger.believed_scores(run.commit)) == len(scores) else " but the first, which selected it"
        believed = domain.score_text(ledger.believed(run.commit))
        lines.append(f"{run.commit[:7]} ran {len(scores)} times: believed {believed}, the mean of all{selected}")
        words = f"by what is believed: {words}" if run.base else words
    if error is None:
        lines.append(f"{words}: sigma, the standard deviation between seeds, is {noise.source}")
    else:
        word = "more than the noise" if abs(gain) > 2 * error else "within the noise"
        lines.append(f"{words} (2 standard errors): {word} (sigma {noise.sigma:.2g}, {noise.source})")
    if run.is_stale:
        again = next((other for other in ledger.runs if other.again_of == run.number), None)
        lines.append(f"{STALE}{f': run {again.number:04d}' if again else ''}")
    elif run.reason:
        lines.append(f"{run.status} because: {run.reason}")
    elif run.status == "pending":
        lines.append("a gain that waits for approval: it is kept once the command given by --approve exits 0")
    elif run.status == "keep" and run.base and error is not None and gain <= 2 * error:
        lines.append("kept as a simplification" if gain <= 0 else "kept: the plain rule keeps what scored better")
    return lines


def _speed_line(ledger: Ledger, run: Run, others: list[Run]) -> str:
    """How much faster or slower, and whether that is the edit's doing: a machine's speed drifts by itself."""
    speed = mean_of_known(other.tokens_per_second for other in others)
    if not speed or not run.tokens_per_second:
        return ""
    unit = unit_of(ledger.domain)
    change = run.tokens_per_second / speed - 1
    if abs(change) < SAME_SPEED:
        return f"speed: as many {unit} a second"
    words = f"speed: {abs(change):.1%} {'more' if change > 0 else 'fewer'} {unit} a second"
    sigma = ledger.speed_sigma()
    if sigma is None:
        return f"{words}, by the edit or the machine: no commit ran twice to tell"
    drift = f"the same code differs by {sigma:.1%} (standard deviation)"
    if abs(change) <= 2 * sigma * math.sqrt(1 + 1 / len(others)):
        return f"{words}, no more than the machine does by itself: {drift}"
    if not run.base:
        word = "fast" if change > 0 else "slow"
        return f"{words} than earlier runs of the same code: the machine was {word}; {drift}"
    if any(is_busy(one) for one in (run, *others)):
        return f"{words}, by the edit or the busy machine"
    return f"{words}, by the edit: {drift}"


def _baseline_lines(ledger: Ledger, run: Run) -> list[str]:
    """Of a first run: where its time went, and what else it says of itself, the size of the model among it."""
    domain = ledger.domain
    lines = []
    if run.training_seconds is not None:
        times = (run.startup_seconds or 0, run.training_seconds, run.evaluation_seconds or 0)
        lines.append("start-up {:.1f} s, training {:.1f} s (the budget), evaluation {:.1f} s".format(*times))
    shown = (domain.metric, domain.memory, domain.steps, domain.sample)
    said = [f"{key} {value:.40}" for key, value in run.summary.items() if key not in shown]
    if said:
        lines.append(f"it says: {', '.join(said)}")
    noise = ledger.noise()
    size = f"{noise.sigma:.2g}, " if noise.sigma is not None else ""
    lines.append(f"sigma, the standard deviation between seeds, is {size}{noise.source}")
    return lines


def is_busy(run: Run) -> bool:
    return run.busy_others is not None and run.busy_others > BUSY


def _busy_line(ledger: Ledger, run: Run) -> str:
    """What others on the machine make doubtful, and what to run."""
    if is_busy(run):
        again = "--base" if run.commit == ledger.champion else f"--again {run.number}"
        who = f"others used {run.busy_others:.0%} of the machine during this run"
        return f"{who}: its score is weak ('uv run loop.py try {again}' measures it once more)"
    of_base = ledger.runs_of(run.base) if run.base else []
    if of_base and all(is_busy(other) for other in of_base):
        return "others kept the machine busy when the base was measured: the difference is weak"
    return ""


def _former_line(ledger: Ledger, run: Run) -> str:
    """That this verdict moved the champion back, or that a former champion is believed better now."""
    if run.status != "keep":
        return ""
    domain = ledger.domain
    before = ""
    was_kept = False
    for other in ledger.runs:
        if other.number == run.number:
            break
        if other.status == "keep" and other.counts:
            before = other.commit
            was_kept = was_kept or before == run.commit
    if was_kept and before != run.commit:
        scores = " against ".join(domain.score_text(ledger.believed(commit)) for commit in (run.commit, before))
        after = "what was kept after it has left the branch"
        return f"the champion goes back from {before[:7]} to {run.commit[:7]}, believed {scores}: {after}"
    is_repeat = run.commit == ledger.champion and not run.base
    former = ledger.better_former() if is_repeat else ""
    if not former:
        return ""
    first = ledger.first_run_of(former)
    believed = domain.score_text(ledger.believed(former))
    remedy = f"'uv run loop.py try --again {first.number}' measures it, and goes back to it if it stays so"
    return f"run {first.number:04d}, a former champion, is believed better now ({believed}): {remedy}"


# The table


def _table(ledger: Ledger, run: Run, others: list[Run]) -> list[str]:
    """Score, steps, speed, memory and training loss; a base that ran often stands there with its means."""
    domain = ledger.domain
    before = None
    heading = ["", f"run {run.number:04d}", "", ""]
    if others:
        before = ledger.believed(run.base) if run.base else statistics.fmean(other.score for other in others)
        name = f"base {run.base[:7]}" if run.base else "same code before"
        heading[2:] = [name if len(others) == 1 else f"{name}, mean of {len(others)}", "change"]
    unit = unit_of(domain)
    steps = mean_of_known(other.steps for other in others)
    speed = mean_of_known(other.tokens_per_second for other in others)
    memory = mean_of_known(other.memory_mb / 1024 for other in others)
    digits = domain.score_digits
    rows = [
        _row(domain.metric, run.score, before, f"{{:.{digits}f}}", lambda new, old: f"{new - old:+.{digits}f}"),
        _row("steps", run.steps, steps, "{:,.0f}", _percent),
        _row(f"{unit} a second", run.tokens_per_second, speed, "{:,.0f}", _percent),
        _row("peak memory, GB", run.memory_mb / 1024, memory, "{:.1f}", lambda new, old: f"{new - old:+.1f}"),
        _loss_row("at half", run, others, "loss_half"),
        _loss_row("at the end", run, others, "loss_end"),
    ]
    return align([heading, *(row for row in rows if row)], right=(1, 2, 3))


def _row(name: str, new: float | None, old: float | None, layout: str, change: Callable) -> list[str]:
    """Name, run, base, change; empty where neither is known."""
    if new is None and old is None:
        return []
    cells = ["" if value is None else layout.format(value) for value in (new, old)]
    return [name, *cells, "" if None in (new, old) else change(new, old)]


def _loss_row(when: str, run: Run, others: list[Run], name: str) -> list[str]:
    """Nats per token and, where the evaluator counted tokens and bytes, bits per byte, to hold against the score."""
    new = getattr(run, name)
    old = mean_of_known(getattr(other, name) for other in others)
    row = _row(f"training loss {when}, nats", new, old, "{:.4f}", lambda new, old: f"{new - old:+.4f}")
    per_nat = _bits_per_nat(run)
    if not row or not per_nat:
        return row
    scaled = [None if loss is None else loss * per_nat for loss in (new, old)]
    bits = _row(" (bits a byte)", *scaled, " ({:.4f})", lambda new, old: f" ({new - old:+.4f})")
    return [nats + cell for nats, cell in zip(row, bits, strict=True)]


def _bits_per_nat(run: Run) -> float | None:
    """Bits per byte of the scored text for a nat per token."""
    tokens = run.record.get("tokens")
    length = run.record.get("bytes")
    return tokens / length / math.log(2) if tokens and length else None


def align(rows: list[list[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows of cells as lines, every column as wide as its widest cell, empty ones left out; those named in `right` end
    in line."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            if width:
                cells.append(cell.rjust(width) if column in right else cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return lines


def mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _percent(new: float, old: float) -> str:
    return f"{new / old - 1:+.1%}" if old else ""
