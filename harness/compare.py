"""A run beside its base: what its log tells of the training, and its verdict as people read it. It decides nothing.

Numbers from a log are the run's own words; the score, the seconds and the tokens scored are measured.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from harness.console import duration
from harness.domain import Domain
from harness.ledger import STALE, Ledger, Run, wants_simpler

TOO_MANY = 10**15  # steps, or tokens a step: no run makes so many
TOO_FAR = 0.05  # of the budget: a point of the curve so far away tells nothing

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
    steps = None
    if domain.steps:  # what the summary says, the last lines of a log
        printed = re.findall(rf"^{re.escape(domain.steps)}:[ \t]*(\S{{1,30}})", log, re.MULTILINE)
        steps = _number(printed[-1]) if printed else None
    batch = 1.0  # where the domain only counts steps
    if domain.batch_pattern:
        match = re.search(domain.batch_pattern, log)
        batch = _number((match["size"] or "").replace(",", "")) if match else None
    speed = None
    if steps and batch and training_seconds:
        speed = steps * batch / training_seconds
    curve = read_curve(log, domain)
    return {
        "steps": steps,
        "tokens_per_second": speed,
        "loss_half": loss_at(curve, 0.5),
        "loss_end": loss_at(curve, 1.0),
    }


def read_curve(log: str, domain: Domain) -> list[Point]:
    """The training curve. A line that is no number, or goes back, is left out."""
    points: list[Point] = []
    for match in re.finditer(domain.curve_pattern, log) if domain.curve_pattern else ():
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
    """The loss of the point that is nearest to a fraction of the budget; None where none is near."""
    nearest = min(curve, key=lambda point: abs(point.fraction - fraction), default=None)
    return nearest.loss if nearest and abs(nearest.fraction - fraction) <= TOO_FAR else None


def unit_of(domain: Domain) -> str:
    """What a training takes in, for people."""
    return domain.batch_unit if domain.batch_pattern else "steps"


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < TOO_MANY else None


# ---------------------------------------------------------------------------------------------------------------------
# The difference


def headline(ledger: Ledger, run: Run) -> str:
    """What the loop says when a run is decided."""
    name = f"run {run.number:04d} {'stale' if run.is_stale else run.status}"
    if run.score is None:
        return f"{name}: {run.reason} ({run.description})"
    parts = [f"{ledger.domain.metric} {ledger.domain.score_text(run.score)}"]
    others = _beside(ledger, run)
    if others:
        parts.append(_difference_words(ledger, run))
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
    if run.base and run.is_decided:
        return ledger.difference(ledger.believed_scores(run.base), ledger.believed_scores(run.commit))
    return ledger.difference([other.score for other in _beside(ledger, run)], [run.score])


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
        folder = f"runs/{run.number:04d}"
        lines += [run.reason, f"'tail -n 50 {folder}/run.log' tells more"]
        if run.purpose == "experiment":
            lines.append(f"'git apply -3 {folder}/change.diff' brings the edit back, to mend it")
        return "\n".join(lines)
    others = _beside(ledger, run)
    lines += _table(ledger, run, others)
    if others:
        lines += [_noise_line(ledger, run), _rule_line(ledger, run)]
    else:
        lines += _baseline_lines(ledger, run)
    if run.is_busy:
        again = "--base" if run.commit == ledger.champion else f"--again {run.number}"
        who = f"others used {run.busy_others:.0%} of the processors during this run"
        lines.append(f"{who}: its score is weak ('uv run loop.py try {again}' measures it once more)")
    if run.commit == ledger.champion and not run.base:
        lines.append(former_text(ledger))
    if run.touched:
        lines.append(f"other files that were edited are as before: {', '.join(run.touched)}")
    return "\n".join(line for line in lines if line)


def _noise_line(ledger: Ledger, run: Run) -> str:
    """How the run differs from its base, by the noise; what is believed of a commit that ran more often."""
    gain, error = _gain(ledger, run)
    noise = ledger.noise
    words = _difference_words(ledger, run)
    scores = ledger.scores(run.commit)
    if len(scores) > 1 and run.is_decided:
        selected = "" if len(ledger.believed_scores(run.commit)) == len(scores) else " but the first, which selected it"
        believed = ledger.domain.score_text(ledger.believed(run.commit))
        words = f"{run.commit[:7]} ran {len(scores)} times: believed {believed}, the mean of all{selected}: {words}"
    if error is None:
        return f"{words}: sigma, the standard deviation between seeds, is {noise.source}"
    word = "more than the noise" if abs(gain) > 2 * error else "within the noise"
    return f"{words} (2 standard errors): {word} (sigma {noise.sigma:.2g}, {noise.source})"


def _rule_line(ledger: Ledger, run: Run) -> str:
    """Why it was decided so, where the difference does not say it."""
    gain, error = _gain(ledger, run)
    if run.is_stale:
        again = next((other for other in ledger.runs if other.again_of == run.number), None)
        return f"{STALE}{f': run {again.number:04d}' if again else ''}"
    if run.reason:
        return f"{run.status} because: {run.reason}"
    if not run.is_decided:
        return "a gain that waits for approval: it is kept once the command given by --approve exits 0"
    if run.status == "keep" and run.base and gain <= 0:
        is_simpler = wants_simpler(run.description)
        return "kept as a simplification" if is_simpler else "kept at first, and worse by all that is known now"
    if run.status == "keep" and run.base and error is not None and gain <= 2 * error:
        return "kept: the plain rule keeps what scored better"
    return ""


def _baseline_lines(ledger: Ledger, run: Run) -> list[str]:
    """Of a first run: where its time went, and what else it says of itself, the size of the model among it."""
    domain = ledger.domain
    lines = []
    if run.training_seconds is not None:
        times = (run.startup_seconds or 0, run.training_seconds, run.evaluation_seconds or 0)
        lines.append("start-up {:.1f} s, training {:.1f} s (the budget), evaluation {:.1f} s".format(*times))
    shown = (domain.metric, domain.memory, domain.steps, domain.sample)
    said = [f"{key} {value:.40}" for key, value in run.summary.items() if key not in shown]
    return [*lines, f"it says: {', '.join(said)}"] if said else lines


def former_text(ledger: Ledger) -> str:
    """Which former champion is believed better now, "" if none is."""
    former = ledger.better_former()
    if not former:
        return ""
    first = ledger.first_run_of(former)
    score = ledger.domain.score_text(ledger.believed(former))
    remedy = f"'uv run loop.py try --again {first.number}' measures it, and goes back to it if it stays so"
    return f"run {first.number:04d}, a former champion, is believed better now ({score}): {remedy}"


# The table


def _table(ledger: Ledger, run: Run, others: list[Run]) -> list[str]:
    """Score, steps, speed, memory and training loss; a base that ran often stands there with its means."""
    domain = ledger.domain
    heading = ["", f"run {run.number:04d}", "", ""]
    before = None
    if others:
        before = ledger.believed(run.base) if run.base else statistics.fmean(other.score for other in others)
        name = f"base {run.base[:7]}" if run.base else "same code before"
        heading[2:] = [name if len(others) == 1 else f"{name}, {len(others)} runs", "change"]

    def row(name: str, field: str, layout: str, change: Callable, scale: float = 1.0) -> list[str]:
        new = getattr(run, field)
        old = before if field == "score" else mean_of_known(getattr(other, field) for other in others)
        cells = ["" if value is None else layout.format(value * scale) for value in (new, old)]
        return [name, *cells, "" if None in (new, old) else change(new * scale, old * scale)]

    def difference(digits: int) -> Callable:
        return lambda new, old: f"{new - old:+.{digits}f}"

    rows = [
        row(domain.metric, "score", f"{{:.{domain.score_digits}f}}", difference(domain.score_digits)),
        row("steps", "steps", "{:,.0f}", _percent),
        row(f"{unit_of(domain)} a second", "tokens_per_second", "{:,.0f}", _percent),
        row("peak memory, GB", "memory_mb", "{:.1f}", difference(1), scale=1 / 1024),
        row("training loss at half", "loss_half", "{:.4f}", difference(4)),
        row("training loss at the end", "loss_end", "{:.4f}", difference(4)),
    ]
    return align([heading, *(cells for cells in rows if any(cells[1:]))], right=(1, 2, 3))


def _percent(new: float, old: float) -> str:
    return f"{new / old - 1:+.1%}" if old else ""


def align(rows: list[list[str]], right: Iterable[int] = ()) -> list[str]:
    """A heading and rows of cells as lines, every column as wide as its widest cell; those named in `right` end in
    line, and those without a cell below the heading are left out."""
    shown = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in shown}
    lines = []
    for row in rows:
        cells = [row[n].rjust(widths[n]) if n in right else row[n].ljust(widths[n]) for n in shown]
        lines.append("  ".join(cells).rstrip())
    return lines


def mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
