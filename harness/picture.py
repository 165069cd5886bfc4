"""Pictures of a ledger and of the training: progress.png, and the same and loss curves as SVG for report.html.

In the picture of a ledger every run is a dot and the best so far a green line; the largest gains are labelled. Where
the best commit ran more than once, the line is the mean of the scores that are believed. The band around it is one
sigma wide on either side: a single run cannot tell apart what lies within it. The loss curves stand at equal time and
at equal tokens.

matplotlib and numpy are imported where they are used: they take a second, and most commands draw nothing.
"""

import itertools
import math
import re
import statistics
import warnings
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path

from harness.contract import Domain
from harness.curve import Training
from harness.files import write_atomically
from harness.ledger import Row, believed_scores
from harness.screen import one_line

PICTURE_NAME = "progress.png"
GREEN = "#2e7d32"
GREY = "#9e9e9e"
RED = "#c0392b"
BLUE = "#2b6cb0"
INK = "#010203"  # in an SVG: the page's own colour of text
PAGE_COLOURS = {  # -> a variable of the page's style
    GREEN: "var(--kept)",
    GREY: "var(--discarded)",
    RED: "var(--crashed)",
    BLUE: "var(--baseline)",
    INK: "currentColor",
}

MANY_DOTS = 1000  # more are drawn smaller, and in an SVG as one embedded image
MOST_LABELS = 40  # tried, the largest gains first
CROSS_INSET = 0.015  # of the frame's height, between a crash's cross and the edge
LABEL_CHARS = (45, 28, 16)  # of a description: what does not fit is tried again, cut shorter
LABEL_ANGLE = 35  # degrees
LABEL_REACH = 250  # pixels that a label may be moved from its point
LABEL_STEP = 14  # pixels between the places that are tried
LABEL_MARGIN = 2.0  # pixels around a label that stay free
LEADER_GAP = 2.5  # pixels between two thin lines
FONT_SIZE = 8  # points


@dataclass(frozen=True)
class Best:
    """A commit that was the best from its run on."""

    at: int  # number of its first row, from 1
    score: float
    gain: float  # on the one before; 0 for the first
    description: str


def plot(rows: list[Row], path: Path, domain: Domain, sigma: float) -> None:
    """Draw the ledger to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(rows, domain, sigma, size=(14, 7), ink="black")
    picture = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font lacks is drawn as a box
        FigureCanvasAgg(figure).print_png(picture)
    write_atomically(path, picture.getvalue(), has_other_writers=True)


def progress_svg(rows: list[Row], domain: Domain, sigma: float) -> str:
    """The same as an element of a page, in the page's colours."""
    figure = draw(rows, domain, sigma, size=(11, 5.8), ink=INK)
    return _to_svg(figure, "progress", f"every run: {domain.score_name} over runs")


def draw(rows: list[Row], domain: Domain, sigma: float, size: tuple[float, float], ink: str):
    """The figure, on a canvas that can measure its text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bests = find_bests(rows, domain)
    kept = [(number, row.score) for number, row in enumerate(rows, 1) if row.status == "keep"]
    scores_in_view = [best.score for best in bests] + [score for _, score in kept]
    bottom, top = _frame(scores_in_view, sigma, domain.lower_is_better)

    figure = Figure(figsize=size, dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.065, 0.085, 0.92, 0.86))
    last = len(rows) + 0.5  # the line of the best ends half a run after the last: a single run has a line too
    axes.set(xlim=(0.5 - 0.02 * last, 1.18 * last + 0.5), ylim=(bottom, top))  # room for the last labels
    outside = _draw_failures(axes, rows, bottom, top, domain.lower_is_better)
    steps = [(best.at, best.score) for best in bests]
    steps.append((last, bests[-1].score))
    _draw_best(axes, steps, sigma)
    axes.plot(*_columns(kept), "o", color=GREEN, markersize=4 if len(rows) > MANY_DOTS else 6, label="kept")
    _write_around(axes, rows, bests, outside, domain, ink)

    corner = "upper right" if domain.lower_is_better else "lower right"
    below_crosses = (1, 1 - 2 * CROSS_INSET if domain.lower_is_better else 2 * CROSS_INSET)
    legend = axes.legend(loc=corner, bbox_to_anchor=below_crosses, facecolor="none", edgecolor="none", labelcolor=ink)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font lacks is drawn as a box
        _Labels(figure, axes, legend, steps, kept, domain.lower_is_better, ink).place(bests)
    return figure


def _draw_failures(axes, rows: list[Row], bottom: float, top: float, lower_is_better: bool) -> int:
    """A dot for each discarded run, a cross at the worse edge for each crash; return how many dots are out of view."""
    discarded = [(number, row.score) for number, row in enumerate(rows, 1) if row.status == "discard"]
    crashed = [number for number, row in enumerate(rows, 1) if row.status == "crash"]
    inside = [(number, score) for number, score in discarded if bottom <= score <= top]
    is_crowded = len(rows) > MANY_DOTS
    grey_size = 2 if is_crowded else 4
    alpha = 0.5 if is_crowded else 0.9
    style = {"color": GREY, "markersize": grey_size, "alpha": alpha, "markeredgewidth": 0, "rasterized": is_crowded}
    axes.plot(*_columns(inside), "o", label="discarded", **style)
    worst_edge = top if lower_is_better else bottom
    worst = worst_edge + CROSS_INSET * (bottom + top - 2 * worst_edge)  # so far inside that no cross is cut
    red_size = 3 if is_crowded else 6
    style = {"color": RED, "markersize": red_size, "rasterized": is_crowded}
    axes.plot(crashed, [worst] * len(crashed), "x", label="crashed", **style)
    return len(discarded) - len(inside)


def _draw_best(axes, steps: list[tuple[float, float]], sigma: float) -> None:
    """The best so far as a line of steps, in its band."""
    xs, ys = _columns(steps)
    low = [y - sigma for y in ys]
    high = [y + sigma for y in ys]
    band = f"±{sigma:.2g}: what one run cannot tell apart"
    axes.fill_between(xs, low, high, step="post", color=GREEN, alpha=0.18, linewidth=0, label=band)
    axes.step(xs, ys, where="post", color=GREEN, linewidth=1.5, label="best")


def _write_around(axes, rows: list[Row], bests: list[Best], outside: int, domain: Domain, ink: str) -> None:
    """Title, names and ticks of the axes. `outside`: discarded runs out of view."""
    note = f" ({outside} of the discarded are outside the frame)" if outside else ""
    direction = "lower" if domain.lower_is_better else "higher"
    axes.set_xlabel(f"run{note}", color=ink)
    axes.set_ylabel(f"{domain.score_name} ({direction} is better)", color=ink)
    word = "run" if len(rows) == 1 else "runs"
    changes = len({row.commit for row in rows if row.status == "keep"} - {rows[0].commit})
    kept_words = "1 change kept" if changes == 1 else f"{changes} changes kept"
    title = f"{len(rows)} {word}, {kept_words}: {bests[0].score:.4f} to {bests[-1].score:.4f}"
    axes.set_title(title, color=ink)
    axes.tick_params(colors=ink)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xticks(_run_ticks(axes.xaxis.get_major_locator().tick_values(1, max(2, len(rows))), len(rows)))
    axes.grid(color=ink, alpha=0.12)
    for spine in axes.spines.values():
        spine.set_color(ink)


def find_bests(rows: list[Row], domain: Domain) -> list[Best]:
    """The champions one after the other; the first scored row where nothing was kept."""
    scores = believed_scores(rows)
    is_kept = any(row.status == "keep" for row in rows)
    wanted = "keep" if is_kept else "discard"
    bests: list[Best] = []
    champion = ""
    for i, row in enumerate(rows, 1):
        if row.status != wanted or row.commit == champion:
            continue
        champion = row.commit  # a former one may come back
        score = statistics.fmean(scores[row.commit])
        gain = domain.gain(bests[-1].score, score) if bests else 0.0
        bests.append(Best(i, score, gain, one_line(row.description)))
        if not is_kept:
            break
    return bests


def _run_ticks(round_numbers: list[float], last: int) -> list[float]:
    """The first run, and the round numbers that are far enough from it; none after the last, where only labels are."""
    step = round_numbers[1] - round_numbers[0]
    return [1, *(number for number in round_numbers if 1 + step / 2 <= number <= last)]


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _frame(scores: list[float], sigma: float, lower_is_better: bool) -> tuple[float, float]:
    """The range of the vertical axis. Most failures are far on the worse side: they would flatten the rest."""
    low = min(scores)
    high = max(scores)
    room = max(high - low, 4 * sigma) or 0.01 * abs(high) or 0.01
    if lower_is_better:
        return low - 0.10 * room - sigma, high + 0.20 * room + sigma
    return low - 0.20 * room - sigma, high + 0.10 * room + sigma


# ---------------------------------------------------------------------------------------------------------------------
# Curves of the training

CURVE_POINTS = 80  # of one run, as far as a picture shows them
EARLY_SHARE = 0.05  # of the budget: the steep fall before it is cut off
BEYOND = 1.15  # of the longest curve that is drawn at first: room for others


class Curves:
    """Loss over time and over what was taken in (tokens, say), for a few runs; and the same scales for any other."""

    def __init__(self, named: list[tuple[str, Training]], unit: str):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(11, 4.2), dpi=72)
        FigureCanvasAgg(self.figure)
        self.named = [(name, training) for name, training in named if len(training.points) > 1]
        longest = max((training.total or 0 for _, training in self.named), default=0)
        self.scale = 1e6 if longest >= 1e6 else 1.0
        headings = ["% of the time"]
        if longest:
            headings.append(f"million {unit}" if self.scale > 1 else unit)
        self.axes = [self.figure.add_subplot(1, len(headings), place + 1) for place in range(len(headings))]
        for axes, heading, limit in zip(self.axes, headings, (100.0, longest / self.scale * BEYOND), strict=False):
            axes.set_xlabel(heading, color=INK)
            axes.set_xlim(0, limit)
            axes.set_ylim(*self._limits())
            axes.tick_params(colors=INK)
            axes.grid(color=INK, alpha=0.12)
            for spine in axes.spines.values():
                spine.set_color(INK)
        self.axes[0].set_ylabel("training loss", color=INK)
        self.figure.subplots_adjust(left=0.07, right=0.985, top=0.97, bottom=0.13, wspace=0.14)

    def _limits(self) -> tuple[float, float]:
        later = []
        for _, training in self.named:
            later += [point.loss for point in training.points if point.share >= EARLY_SHARE]
        low = min(later, default=0.0)
        high = max(later, default=1.0)
        room = (high - low) or 0.01 * abs(high) or 0.01
        return low - 0.08 * room, high + 0.02 * room

    def svg(self) -> str:
        """The named curves as an element of a page, with an empty line in each part for one more run."""
        for (name, training), colour in zip(self.named, (BLUE, GREEN), strict=False):
            for axes, points in zip(self.axes, self._coordinates(training), strict=True):
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=name)
        self.axes[0].legend(loc="upper right", facecolor="none", edgecolor="none", labelcolor=INK)
        lines = "".join(f'<polyline class="chosen" id="chosen{place}"/>' for place in range(len(self.axes)))
        return _to_svg(self.figure, "curves", "training loss").replace("</svg>", f"{lines}</svg>")

    def lines(self, training: Training) -> list[str]:
        """The same curves of any run: for each part the points of an SVG polyline."""
        height = self.figure.get_figheight() * 72
        found = []
        for axes, points in zip(self.axes, self._coordinates(training), strict=True):
            box = axes.bbox
            words = []
            for x, y in axes.transData.transform(points) if points else ():
                if box.x0 <= x <= box.x1:
                    words.append(f"{x:.1f},{height - min(max(y, box.y0), box.y1):.1f}")
            found.append(" ".join(words))
        return found

    def _coordinates(self, training: Training) -> list[list[tuple[float, float]]]:
        """The points for each part, thinned."""
        stride = max(1, math.ceil(len(training.points) / CURVE_POINTS))
        points = training.points[::stride]
        if training.points and points[-1] != training.points[-1]:
            points = [*points, training.points[-1]]
        found = [[(100 * point.share, point.loss) for point in points]]
        if len(self.axes) > 1:
            batch = training.batch
            known = points if batch else []
            found.append([(point.step * batch / self.scale, point.loss) for point in known])
        return found


def _to_svg(figure, name: str, title: str) -> str:
    """A figure as one element, without fonts, dates or addresses; colours are those of the page's style."""
    from matplotlib import rc_context

    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    text = StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify_threshold": 1.0}
    with rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font lacks: the page has other fonts
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z0-9]+_[0-9]+"', "", svg)  # two pictures on a page would share them
    view = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = f'<svg {view} role="img" aria-label="{title}">' + svg[svg.index(">") + 1 :]
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg


# ---------------------------------------------------------------------------------------------------------------------
# Labels


class _Labels:
    """Slanted labels beside their points, each where it covers neither line, points, legend nor another label.

    All labels have one slant, so in coordinates along and across the text each is an upright rectangle. Everything else
    that must stay visible is a cloud of points: a label may hold none of them.
    """

    def __init__(self, figure, axes, legend, steps, kept, lower_is_better: bool, ink: str):
        import numpy as np

        self.np = np
        self.axes = axes
        self.ink = ink
        self.up = 1 if lower_is_better else -1  # the empty side of the line
        self.renderer = figure.canvas.get_renderer()
        slope = math.radians(LABEL_ANGLE * self.up)
        self.turn = np.array([[math.cos(slope), -math.sin(slope)], [math.sin(slope), math.cos(slope)]])
        box = axes.get_window_extent(self.renderer)
        self.low = np.array([box.x0, box.y0]) + 3
        self.high = np.array([box.x1, box.y1]) - 3
        corners = [(x, y) for (x, y), (_, after) in zip(steps[1:], steps, strict=False) for y in (after, y)]
        line = axes.transData.transform([steps[0], *corners])
        self.cloud = np.concatenate([_along(np, line, 3.0), axes.transData.transform(kept or steps[:1])]) @ self.turn
        legend_box = legend.get_window_extent(self.renderer)
        self.legend = _grid(np, legend_box.x0, legend_box.y0, legend_box.x1, legend_box.y1) @ self.turn
        self.leaders = np.empty((0, 2))
        self.boxes: list[tuple[float, float, float, float]] = []  # along and across: begin, bottom, end, top
        distances = np.arange(0, LABEL_REACH, LABEL_STEP)
        moves = [(dx, dy * self.up) for dx in distances for dy in distances]
        near = [move for move in moves if math.hypot(*move) < LABEL_REACH]
        self.moves = sorted(near, key=lambda move: math.hypot(*move))

    def place(self, bests: list[Best]) -> None:
        """Label the first and then the largest gains, as many as there is room for."""
        later = sorted(bests[1:], key=lambda best: best.gain, reverse=True)
        for best in [bests[0], *later][:MOST_LABELS]:
            for length in LABEL_CHARS:
                if self.place_one(best, cut(best.description, length)):
                    break

    def place_one(self, best: Best, text: str) -> bool:
        """Draw the label at the nearest free place, with a thin line to its point; return whether there was one."""
        from matplotlib.font_manager import FontProperties

        if not text:
            return True
        np = self.np
        font = FontProperties(size=FONT_SIZE)
        width, height, _ = self.renderer.get_text_width_height_descent(text, font, False)
        point = self.axes.transData.transform((best.at, best.score))
        start = point + np.array([6.0, 7.0 * self.up])
        size = np.array([width, height])
        rise = 0 if self.up > 0 else -height  # the text stands on its anchor, or hangs from it
        for move in self.moves:
            anchor = start + move
            begin = anchor @ self.turn + (0, rise)
            end = begin + size
            corners = np.array([begin, (end[0], begin[1]), (begin[0], end[1]), end]) @ self.turn.T
            if (corners < self.low).any() or (corners > self.high).any():
                continue
            rectangle = (*(begin - LABEL_MARGIN), *(end + LABEL_MARGIN))
            leader = _along(np, np.array([point + (anchor - point) * 0.15, anchor]), 3.0)[:-1] @ self.turn
            if self.is_free(rectangle, leader):
                self.draw(best, text, anchor, is_moved=any(move))
                self.boxes.append(rectangle)
                if any(move):
                    self.leaders = np.concatenate([self.leaders, leader])
                return True
        return False

    def is_free(self, rectangle: tuple[float, float, float, float], leader) -> bool:
        begin, bottom, end, top = rectangle
        for other in self.boxes:
            is_beside = end < other[0] or other[2] < begin or top < other[1] or other[3] < bottom
            if not is_beside or self.holds(other, leader):
                return False
        gaps = self.leaders[:, None, :] - leader[None, :, :]
        if (self.np.abs(gaps).max(axis=2) < LEADER_GAP).any():
            return False
        return not any(self.holds(rectangle, points) for points in (self.cloud, self.legend, self.leaders))

    def holds(self, rectangle: tuple[float, float, float, float], points) -> bool:
        begin, bottom, end, top = rectangle
        along = points[:, 0]
        across = points[:, 1]
        return bool(((along > begin) & (along < end) & (across > bottom) & (across < top)).any())

    def draw(self, best: Best, text: str, anchor, is_moved: bool) -> None:
        to_data = self.axes.transData.inverted()
        if is_moved:
            ends = [(best.at, best.score), tuple(to_data.transform(anchor))]
            self.axes.plot(*zip(*ends, strict=True), color=GREEN, linewidth=0.5, alpha=0.7)
        self.axes.text(
            *to_data.transform(anchor),
            text,
            rotation=LABEL_ANGLE * self.up,
            rotation_mode="anchor",
            ha="left",
            va="bottom" if self.up > 0 else "top",
            fontsize=FONT_SIZE,
            color=self.ink,
            parse_math=False,
        )


def _along(np, corners, step: float):
    """Points on the line through the corners, at most `step` pixels apart."""
    pieces = [corners[:1]]
    for begin, end in itertools.pairwise(corners):
        count = max(1, math.ceil(float(np.hypot(*(end - begin))) / step))
        pieces.append(begin + (end - begin) * (np.arange(1, count + 1) / count)[:, None])
    return np.concatenate(pieces)


def _grid(np, left: float, bottom: float, right: float, top: float):
    """Points all over a box, closer together than a label is high."""
    xs, ys = np.meshgrid(np.arange(left, right, 6), np.arange(bottom, top, 6))
    return np.column_stack([xs.ravel(), ys.ravel()])


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
