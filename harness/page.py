"""The picture of a ledger: every run a dot, the kept ones labelled, the running best a line."""

import itertools
import math
import warnings
from pathlib import Path

from harness.contract import Domain
from harness.ledger import Row

GREEN = "#2e7d32"
GREY = "#bbbbbb"
RED = "#c0392b"
MAX_LABELS = 30  # more would not be legible
LABEL_CHARS = 45
LABEL_ANGLE = 35  # degrees
LABEL_HEIGHT = 13  # pixels of a line of text
LABEL_CHAR_WIDTH = 6.0  # pixels
LABEL_RISE = 300  # pixels that a label may be raised to be clear of others


def plot(rows: list[Row], path: Path, domain: Domain) -> None:
    """Draw the ledger to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, since it takes a second to import
    from matplotlib.figure import Figure

    kept = [(i, row) for i, row in enumerate(rows) if row.status == "keep"]
    if not kept:
        kept = [(i, row) for i, row in enumerate(rows) if row.status == "discard"][:1]
    discarded = [(i, row.score) for i, row in enumerate(rows) if row.status == "discard"]
    crashed = [i for i, row in enumerate(rows) if row.status == "crash"]
    bottom, top = _frame([row.score for _, row in kept], domain.lower_is_better)
    worst = top if domain.lower_is_better else bottom

    figure = Figure(figsize=(14, 7), dpi=110)
    axes = figure.add_axes((0.06, 0.08, 0.93, 0.87))
    axes.set(xlim=(-0.02 * len(rows) - 0.5, 1.18 * len(rows)), ylim=(bottom, top))  # room for the last label
    axes.plot(*_columns(discarded), "o", color=GREY, markersize=4, label="discarded")
    axes.plot(crashed, [worst] * len(crashed), "x", color=RED, markersize=6, label="crashed", clip_on=False)
    points = [(i, row.score) for i, row in kept]
    axes.step(*_columns([*points, (len(rows) - 1, points[-1][1])]), where="post", color=GREEN, label="best")
    axes.plot(*_columns(points), "o", color=GREEN, markersize=6, label="kept")
    _label(axes, _labelled(kept, domain))

    outside = sum(not bottom <= score <= top for _, score in discarded)
    note = f" ({outside} of the discarded are outside the frame)" if outside else ""
    direction = "lower" if domain.lower_is_better else "higher"
    axes.set_xlabel(f"run{note}")
    axes.set_ylabel(f"{domain.score_name} ({direction} is better)")
    axes.set_title(f"{len(rows)} runs, {len(kept)} kept: {points[0][1]:.4f} to {points[-1][1]:.4f}")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right" if domain.lower_is_better else "lower right")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font lacks is drawn as a box
        FigureCanvasAgg(figure).print_png(path)


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _frame(scores: list[float], lower_is_better: bool) -> tuple[float, float]:
    """The range of the vertical axis. Most failures are far on the worse side: they would flatten the rest."""
    low = min(scores)
    high = max(scores)
    room = (high - low) or 0.01 * abs(high) or 0.01
    if lower_is_better:
        return low - 0.10 * room, high + 0.25 * room
    return low - 0.25 * room, high + 0.35 * room


def _labelled(kept: list[tuple[int, Row]], domain: Domain) -> list[tuple[int, float, str]]:
    """The first kept row and those with the largest gains."""
    gains = {}
    for (_, before), (i, after) in itertools.pairwise(kept):
        gains[i] = domain.gain(before.score, after.score)
    largest = sorted(gains, key=gains.__getitem__, reverse=True)[:MAX_LABELS]
    named = {kept[0][0], *largest}
    return [(i, row.score, row.description[:LABEL_CHARS]) for i, row in kept if i in named]


def _label(axes, points: list[tuple[int, float, str]]) -> None:
    """A slanted label at each point, from the right; raised, with a thin line, until it is clear of those before."""
    slope = math.radians(LABEL_ANGLE)
    along = (math.cos(slope), math.sin(slope))
    across = (-math.sin(slope), math.cos(slope))
    placed: list[tuple[float, float, float]] = []  # distance across the text, its begin and end along it
    for x, y, text in reversed(points):
        pixel_x, pixel_y = axes.transData.transform((x, y))
        left = pixel_x + 7
        bottom = pixel_y + 9
        for raised in range(0, LABEL_RISE, 2):
            offset = across[0] * left + across[1] * (bottom + raised)
            begin = along[0] * left + along[1] * (bottom + raised)
            end = begin + LABEL_CHAR_WIDTH * len(text)
            if not any(abs(offset - o) < LABEL_HEIGHT and begin < e and b < end for o, b, e in placed):
                break
        placed.append((offset, begin, end))
        line = {"arrowstyle": "-", "color": GREEN, "linewidth": 0.5, "relpos": (0, 0), "shrinkB": 0}
        axes.annotate(
            text,
            (x, y),
            axes.transData.inverted().transform((left, bottom + raised)),
            rotation=LABEL_ANGLE,
            rotation_mode="anchor",
            ha="left",
            va="bottom",
            fontsize=8,
            parse_math=False,
            arrowprops=line if raised else None,
        )
