"""The training curve of a run, as its log tells it: the run's own words, which no judge measured.

A run may print anything, millions of lines too. So reading is bounded, and what does not fit is left out. Which lines
are points of the curve is the domain's: `curve_pattern`, with the groups step, percent and loss. `batch_pattern`, with
the group size, finds how much one step takes in (tokens, say). A domain may leave out both.
"""

import contextlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from harness.contract import Domain
from harness.files import open_regular

MAX_LOG_BYTES = 24 * 2**20  # of one log: more than the loop keeps of it
HEAD_BYTES = 2**20  # of a log: what is printed before the training begins
MAX_POINTS = 4096  # of one curve: a longer one is thinned
TOO_MANY = 10**15  # steps, or tokens a step: no run makes so many
TOO_FAR = 0.05  # of the budget, beyond the first or the last point: there the curve says nothing
LONGEST_GAP = 0.35  # of the budget, between two points


@dataclass(frozen=True)
class Point:
    """One line of the log."""

    step: int
    share: float  # of the budget, 0 to 1
    loss: float


@dataclass(frozen=True)
class Training:
    """What a log tells of the training."""

    points: list[Point]  # steps and shares rise
    batch: int | None = None  # how much one step takes in, 1 where the domain only counts steps; None: not known

    @property
    def total(self) -> int | None:
        """How much all steps took in, as far as the curve goes."""
        if not self.points or self.batch is None:
            return None
        return self.points[-1].step * self.batch


def read_training(folder: Path, domain: Domain) -> Training:
    """The training of the run with this folder; an empty curve where there is no log, or the domain has no curves."""
    if not domain.curve_pattern:
        return Training([])
    text = _read_log(folder / "run.log")
    batch = read_batch(text, domain.batch_pattern) if domain.batch_pattern else 1
    return Training(read_curve(text, domain.curve_pattern), batch)


def unit_of(domain: Domain) -> str:
    """What a training takes in."""
    return domain.batch_unit if domain.batch_pattern else "steps"


def read_batch_of(folder: Path, domain: Domain) -> int | None:
    """How much one step of a run takes in: only the head of its log is read."""
    if not domain.batch_pattern:
        return 1
    with contextlib.suppress(OSError), open_regular(folder / "run.log") as file:
        return read_batch(file.read(HEAD_BYTES).decode(errors="replace"), domain.batch_pattern)
    return None


def _read_log(path: Path) -> str:
    """A log, or head and tail of a very long one. "" where there is none."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= MAX_LOG_BYTES:
            return file.read(MAX_LOG_BYTES).decode(errors="replace")
        head = file.read(MAX_LOG_BYTES // 2)
        file.seek(size - MAX_LOG_BYTES // 2)
        return (head + b"\n" + file.read(MAX_LOG_BYTES // 2)).decode(errors="replace")
    return ""


def read_curve(text: str, pattern: str) -> list[Point]:
    """The points in a log, at most MAX_POINTS. Lines that are no number, or go back in step or share, are left out."""
    points: list[Point] = []
    last = None
    count = 0
    stride = 1  # every so many points are kept; doubles whenever there are too many
    for match in re.finditer(pattern, text) if pattern else ():
        point = _read_point(match)
        if point is None or (last is not None and (point.step <= last.step or point.share < last.share)):
            continue
        last = point
        if count % stride == 0:
            points.append(point)
        count += 1
        if len(points) >= MAX_POINTS:
            points = points[::2]
            stride *= 2
    if last is not None and points[-1] != last:
        points.append(last)
    return points


def _read_point(match: re.Match) -> Point | None:
    try:
        point = Point(int(match["step"]), float(match["percent"]) / 100, float(match["loss"]))
    except (ValueError, TypeError):  # not a number, or a group that took no part
        return None
    is_sound = 0 <= point.step < TOO_MANY and 0 <= point.share <= 1 and math.isfinite(point.loss)
    return point if is_sound else None


def read_batch(text: str, pattern: str) -> int | None:
    """How much one step takes in, from the first line that says so; None where none does."""
    match = re.search(pattern, text) if pattern else None
    if match is None:
        return None
    try:
        size = int(match["size"].replace(",", ""))
    except (ValueError, AttributeError):  # not a number, or a group that took no part
        return None
    return size if 0 < size < TOO_MANY else None


def loss_at_share(curve: list[Point], share: float) -> float | None:
    """The loss at a share of the budget; None where the curve has no point near it."""
    if not curve:
        return None
    first = curve[0]
    last = curve[-1]
    if share <= first.share:
        return first.loss if first.share - share <= TOO_FAR else None
    if share >= last.share:
        return last.loss if share - last.share <= TOO_FAR else None
    index = next(index for index, point in enumerate(curve) if point.share >= share)
    before = curve[index - 1]
    part = (share - before.share) / (curve[index].share - before.share)
    point = _between(before, curve[index], part)
    return None if point is None else point.loss


def point_at_step(curve: list[Point], step: float) -> Point | None:
    """Loss and share of the budget at a step; None before the first point and after the last."""
    if not curve or not curve[0].step <= step <= curve[-1].step:
        return None
    index = next(index for index, point in enumerate(curve) if point.step >= step)
    if curve[index].step == step:
        return curve[index]
    before = curve[index - 1]
    part = (step - before.step) / (curve[index].step - before.step)
    return _between(before, curve[index], part)


def point_at_total(training: Training, total: float) -> Point | None:
    """Loss and share of the budget once so much was taken in (tokens, say); None where that is not known."""
    if training.batch is None:
        return None
    return point_at_step(training.points, total / training.batch)


def _between(before: Point, after: Point, part: float) -> Point | None:
    """Linear between two points; None where they are too far apart."""
    gap = after.share - before.share
    if gap > LONGEST_GAP:
        return None
    step = before.step + part * (after.step - before.step)
    loss = before.loss + part * (after.loss - before.loss)
    return Point(round(step), before.share + part * gap, loss)
