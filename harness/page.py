"""progress.png and report.html: every run in one picture, and everything about a tag in one file that loads nothing.

Both are drawn by matplotlib and jinja2, which take a second to import: they are imported where they are used.
Everything that an agent or a run wrote is escaped, and the page has no scripts. `PageWriter` has a running loop's page
rewritten by a child of the lowest priority, which is `loop.py report`.
"""

import itertools
import math
import re
import subprocess
import sys
import time
import warnings
from io import BytesIO, StringIO
from pathlib import Path

from harness.ablation import ablation_text
from harness.compare import Point, is_busy, read_curve, verdict
from harness.console import ERROR_CHARS, duration, one_line, say
from harness.domain import Domain
from harness.files import open_to_append, read_head, read_tail, read_text, write_atomically
from harness.ledger import Change, Ledger, Run
from harness.report import (
    audit_text,
    better_elsewhere,
    busy_text,
    changes_table,
    choose_changes,
    cost_text,
    kept_text,
    next_lines,
    noise_lines,
    pace_text,
)

# ---------------------------------------------------------------------------------------------------------------------
# progress.png

GREEN = "#2e7d32"
GREY = "#8a8a8a"
RED = "#c0392b"
BLUE = "#2b6cb0"
INK = "#010203"  # in the page: its own colour of text
COLOURS_ON_PAGE = {
    GREEN: "var(--kept)",
    GREY: "var(--quiet)",
    RED: "var(--crash)",
    BLUE: "var(--baseline)",
    INK: "currentColor",
}
NUMBERED = 28  # kept changes that the picture names, the largest gains of more
MANY_RUNS = 1000  # more are drawn smaller, in an SVG as an image
LABEL_GAP = (5, 7)  # pixels around a number
LABEL_LEVELS = 14  # rows below the line in which a number looks for room


def draw_progress(ledger: Ledger, path: Path) -> None:
    """Draw every run, the best so far, and the kept changes by their numbers, which a table beside it explains."""
    picture = BytesIO()
    figure = _draw(ledger, has_table=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font lacks is drawn as a box
        figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue(), has_other_writers=True)


def progress_svg(ledger: Ledger) -> str:
    """The picture without its table, in the page's colours."""
    return _as_svg(_draw(ledger, has_table=False), "every run, and the best so far")


def _draw(ledger: Ledger, has_table: bool):
    """The figure; with a table of the numbered changes on its right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    domain = ledger.domain
    rows = ledger.rows
    changes = ledger.changes()
    figure = Figure(figsize=(14, 7) if has_table else (11, 6), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.06, 0.085, 0.6, 0.86) if has_table else (0.075, 0.09, 0.915, 0.85))
    steps = _champions(ledger, rows)
    low, high = _limits(ledger, steps)
    axes.set(xlim=(0.5 - 0.02 * len(rows), 1.02 * len(rows) + 1), ylim=(low, high))
    dots = _draw_runs(axes, ledger, rows, low, high)
    if steps:
        xs, ys = zip(*steps, (len(rows) + 0.5, steps[-1][1]), strict=True)
        axes.step(xs, ys, where="post", color=GREEN, linewidth=1.5, label="best, as it is believed now", zorder=1)
        sigma = ledger.sigma
        if sigma is not None:
            band = ([y - sigma for y in ys], [y + sigma for y in ys])
            name = f"± sigma ({sigma:.2g})"
            axes.fill_between(xs, *band, step="post", color=GREEN, alpha=0.15, linewidth=0, label=name, zorder=0)
    in_branch = sum(change.is_in_branch for change in changes)
    title = f"runs: {len(rows):,}, kept changes: {in_branch:,}"
    if steps:
        title += f", {domain.metric} {domain.score_text(steps[0][1])} to {domain.score_text(steps[-1][1])}"
    axes.set_title(title, color=INK)
    axes.set_xlabel("run", color=INK, loc="left")
    axes.set_ylabel(f"{domain.score_name} ({'lower' if domain.lower_is_better else 'higher'} is better)", color=INK)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _colour(axes)
    # Below the axes, so that it covers no point.
    style = {"frameon": False, "labelcolor": INK, "fontsize": 8, "columnspacing": 1.2, "handletextpad": 0.3}
    if rows:
        figure.legend(loc="lower right", ncols=8, borderaxespad=0.1, **style)
    numbered = choose_changes(changes, NUMBERED)
    places = {run.commit: place for place, run in reversed(list(enumerate(rows, 1)))}
    spots = [(str(number), places[change.run.commit], change.score) for number, change in numbered]
    risers = []
    for (_, before), (x, after) in itertools.pairwise(steps):
        risers += [(x, before + part / 10 * (after - before)) for part in range(11)]
    _write_numbers(axes, spots, dots + steps + risers, -1 if domain.lower_is_better else 1)
    if has_table:  # after the numbers, which draw the figure to know where they are
        _write_table(figure, numbered, len(changes), domain)
    return figure


def _colour(axes) -> None:
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.1)
    axes.spines[:].set_color(INK)


def _champions(ledger: Ledger, rows: list[Run]) -> list[tuple[int, float]]:
    """Where a new commit took the lead, and what is believed of it now. A repeat of the champion is no new one."""
    steps = []
    champion = ""
    for place, run in enumerate(rows, 1):
        if run.status == "keep" and run.commit != champion:
            champion = run.commit
            steps.append((place, ledger.believed(champion)))
    return steps


def _limits(ledger: Ledger, steps: list[tuple[int, float]]) -> tuple[float, float]:
    """The range of the scores that is shown: far failures would flatten the rest. Room for numbers is on the better
    side."""
    ranked = [run.score for run in ledger.rows if run.score is not None]
    ranked.sort(reverse=not ledger.domain.lower_is_better)
    usual = ranked[len(ranked) // 50 : 1 + 3 * len(ranked) // 4]  # a few lucky ones and the worst quarter left out
    scores = usual + [score for _, score in steps]
    if not scores:
        return 0.0, 1.0
    span = max(max(scores) - min(scores), 3 * (ledger.sigma or 0)) or 0.01 * abs(scores[0]) or 0.01
    better, worse = 0.2 * span, 0.1 * span
    below, above = (better, worse) if ledger.domain.lower_is_better else (worse, better)
    return min(scores) - below, max(scores) + above


def _draw_runs(axes, ledger: Ledger, rows: list[Run], low: float, high: float) -> list[tuple[float, float]]:
    """A mark for every run, those out of the frame at its edge, a crash at the worse one; return where they are."""
    inset = 0.015 * (high - low)
    worst = high - inset if ledger.domain.lower_is_better else low + inset
    is_crowded = len(rows) > MANY_RUNS
    size = 2.5 if is_crowded else 5
    kinds = {"discarded": [], "out of the frame": [], "repeat of a best": [], "kept": [], "crashed": []}
    champion = ""
    for place, run in enumerate(rows, 1):
        is_repeat = run.status == "keep" and run.commit == champion
        if run.status == "keep":
            champion = run.commit
        if run.score is None:
            kinds["crashed"].append((place, worst))
        elif not low <= run.score <= high:
            kinds["out of the frame"].append((place, min(max(run.score, low + inset), high - inset)))
        elif is_repeat:
            kinds["repeat of a best"].append((place, run.score))
        else:
            kinds["kept" if run.status == "keep" else "discarded"].append((place, run.score))
    marks = {"discarded": ("o", GREY), "out of the frame": ("d", GREY), "repeat of a best": (".", BLUE)}
    marks |= {"kept": ("o", GREEN), "crashed": ("x", RED)}
    for name, points in kinds.items():
        mark, colour = marks[name]
        if points:
            style = {"color": colour, "markersize": size + (name == "kept"), "rasterized": is_crowded}
            label = f"{name} ({len(points):,})"
            axes.plot(*zip(*points, strict=True), mark, alpha=0.85, label=label, zorder=2, clip_on=False, **style)
    return [point for points in kinds.values() for point in points]


def _write_numbers(axes, spots: list[tuple[str, int, float]], points: list[tuple[float, float]], side: int) -> None:
    """Each number on the better side of its point, so far away that it covers neither a point nor another number."""
    import numpy as np

    axes.figure.canvas.draw()  # from now on a place in the data is a place in pixels
    taken = axes.transData.transform(points) if points else np.empty((0, 2))
    for text, x, y in spots:
        at = axes.transData.transform((x, y))
        size = np.array([8.0 * len(text), 13.0])
        for level in range(1, LABEL_LEVELS):
            middle = at + np.array([0.0, side * 14.0 * level])
            is_free = (np.abs(taken - middle) > size / 2 + LABEL_GAP).any(axis=1).all()
            if is_free:
                break
        else:
            continue
        # The number's own place is taken for later ones, at as many points as it is wide.
        along = np.linspace(-0.5, 0.5, 2 + len(text))
        taken = np.concatenate([taken, middle + np.outer(along, (size[0], 0.0))])
        style = {"arrowstyle": "-", "color": GREEN, "alpha": 0.5, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            text, (x, y), axes.transData.inverted().transform(middle), ha="center", va="center", fontsize=8, color=INK,
            arrowprops=style if level > 1 else None,
        )  # fmt: skip


def _write_table(figure, numbered: list[tuple[int, Change]], total: int, domain: Domain) -> None:
    """The numbers' legend, on the right."""
    heading = "kept changes: gain, and what they are"
    if total > len(numbered):
        heading = f"the {len(numbered)} largest of {total:,} gains"
    if not total:
        heading = "no change was kept yet"
    lines = [(heading, INK)]
    for number, change in numbered:
        sign = "+" if change.gain > 0 else "-"
        gain = f"{sign}{domain.score_text(abs(change.gain))}"
        words = one_line(change.run.description, 200)
        words = words if len(words) <= 44 else f"{words[:43]}…"
        colour = INK if change.is_significant and change.is_in_branch else GREY
        lines.append((f"{number:>4} {gain}  {words}", colour))
    if any(colour == GREY for _, colour in lines):
        lines.append(("grey: within the noise, or no longer in the branch", GREY))
    for place, (text, colour) in enumerate(lines):
        position = (0.672, 0.93 - 0.0295 * place)
        figure.text(*position, text, fontsize=7.5, family="monospace", color=colour, parse_math=False)


def _as_svg(figure, title: str) -> str:
    """A figure as one element: no fonts, no dates, no addresses, the colours of the page's style."""
    from matplotlib import rc_context

    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    view = re.search(r'viewBox="[^"]*"', svg)[0]
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[a-zA-Z0-9]+_[0-9]+"', "", body)  # two pictures on a page would share them
    for colour, variable in COLOURS_ON_PAGE.items():
        body = body.replace(colour, variable)
    return f'<svg {view} role="img" aria-label="{title}">{body}'


def curves_svg(curves: dict[str, list[Point]]) -> str:
    """Training loss over the budget of the named runs; "" where no log tells it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = {name: points for name, points in curves.items() if len(points) > 1}
    if not known:
        return ""
    figure = Figure(figsize=(11, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.06, 0.13, 0.93, 0.84))
    for (name, points), colour in zip(known.items(), (BLUE, GREEN), strict=False):
        points = points[:: math.ceil(len(points) / 300)]
        fractions = [100 * point.fraction for point in points]
        axes.plot(fractions, [point.loss for point in points], color=colour, label=name)
    later = [point.loss for points in known.values() for point in points if point.fraction >= EARLY]
    if later:
        room = max(later) - min(later) or 1.0
        axes.set_ylim(min(later) - 0.05 * room, max(later) + 0.05 * room)
    axes.set_xlabel("% of the budget", color=INK)
    axes.set_ylabel("training loss, nats", color=INK)
    _colour(axes)
    axes.legend(facecolor="none", edgecolor="none", labelcolor=INK)
    return _as_svg(figure, "training loss of baseline and champion")


# ---------------------------------------------------------------------------------------------------------------------
# report.html

TEMPLATE = Path(__file__).with_name("page.html")
PAGE_SECONDS = 60  # at least between two beginnings of a rewrite; a live page reloads itself as often
REST = 20  # times as long as the last rewrite took: a long ledger costs no more of the machine
NEWEST = 300  # runs that are shown
NEAR_MISSES = 20  # of the older ones the best discards,
MOST_KEPT = 100  # and the largest gains
DIFF_CHARS = 8000  # of a run's diff
LOG_LINES = 25
SAMPLE_CHARS = 2000
LONGEST_TEXT = 20_000  # characters of any other text
EARLY = 0.05  # of the budget: the steep fall of the loss before it is cut off
TERMINAL_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")
UNSHOWABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def write_page(ledger: Ledger, path: Path, tag=None) -> None:
    """Write report.html. Without a tag (a results.tsv) it has no logs and diffs; while a loop tells what it
    does on the tag it reloads itself."""
    write_atomically(path, compose(ledger, tag), has_other_writers=True)


def compose(ledger: Ledger, tag=None) -> str:
    """The page's text."""
    import jinja2
    from markupsafe import Markup

    changes = ledger.changes()
    ablation = ablation_text(tag, group) if tag is not None and (group := ledger.last_group("ablation")) else ""
    audit, doubts = audit_text(ledger, group) if (group := ledger.last_group("audit")) else ("", [])
    chosen = choose_runs(ledger, changes)
    named = {"baseline": ledger.baseline, "champion": ledger.champion}
    if ledger.baseline == ledger.champion:
        del named["champion"]
    firsts = {name: ledger.first_run_of(commit) for name, commit in named.items() if commit}
    sides = {f"{name}, run {run.number:04d}": run for name, run in firsts.items()}
    curves = {}
    if tag is not None:
        for name, run in sides.items():
            curves[name] = read_curve(read_text(tag.folder(run.number) / "run.log"), ledger.domain)
    is_known = bool(ledger.champion)
    values = {
        "title": tag.branch if tag is not None else "a ledger",
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "refresh": PAGE_SECONDS if tag is not None and tag.is_busy() and tag.read_live() else 0,
        "standing": ledger.standing(),
        "overview": [*better_elsewhere(ledger), kept_text(changes)] if is_known else [],
        "progress": Markup(progress_svg(ledger)) if ledger.rows else "",
        "kept": _show_table(changes_table(ledger, choose_changes(changes, MOST_KEPT))) if is_known else [],
        "kept_left_out": max(0, len(changes) - MOST_KEPT),
        "noise": noise_lines(ledger, changes),
        "facts": [text for text in (pace_text(ledger), cost_text(ledger)) if text],
        "next": next_lines(ledger, changes) if tag is not None else [],
        "curves": Markup(curves_svg(curves)),
        "samples": _samples(sides, ledger.domain),
        "audit": audit,
        "doubts": doubts,
        "ablation": ablation,
        "machine": _machine_lines(ledger),
        "runs": [_run_values(ledger, run, tag) for run in chosen],
        "left_out": len(ledger.runs) - len(chosen),
        "newest": NEWEST,
    }
    environment = jinja2.Environment(
        autoescape=True, finalize=_show, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text()).render(**values)


def choose_runs(ledger: Ledger, changes: list[Change]) -> list[Run]:
    """The newest runs, the largest gains and the nearest misses of older ones, newest first."""
    older = [run for run in ledger.runs[:-NEWEST] if run.status == "discard" and run.score is not None]
    older.sort(key=lambda run: run.score, reverse=not ledger.domain.lower_is_better)
    kept = [change.run for _, change in choose_changes(changes, MOST_KEPT)]
    chosen = {run.number for run in [*ledger.runs[:1], *ledger.runs[-NEWEST:], *kept, *older[:NEAR_MISSES]]}
    return [run for run in reversed(ledger.runs) if run.number in chosen]


def _show(value: object) -> object:
    """Every value of the page that is no markup: without what a browser would not show as it is (terminal codes,
    control and direction characters), and not longer than a page can hold."""
    from markupsafe import Markup

    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = TERMINAL_CODES.sub("", value[:LONGEST_TEXT])
    return UNSHOWABLE.sub("", re.sub(r"\r\n?", "\n", text))


def _show_table(table: list[list[str]]) -> list[list[str]]:
    """Without the columns that are empty in every row."""
    columns = [column for column in range(len(table[0])) if any(row[column] for row in table)]
    return [[row[column] for column in columns] for row in table]


def _samples(sides: dict[str, Run], domain: Domain) -> list[tuple[str, str]]:
    """What the models wrote."""
    samples = []
    for name, run in sides.items():
        text = run.summary.get(domain.sample, "")
        if text.strip():
            samples.append((f"{name}, {domain.metric} {domain.score_text(run.score)}", text[:SAMPLE_CHARS]))
    return samples


def _machine_lines(ledger: Ledger) -> list[str]:
    lines = [text for text in (busy_text(ledger.runs),) if text]
    first = ledger.first_run
    if first is not None and first.record.get("device_name"):
        lines.append(f"device: {one_line(str(first.record['device_name']))}, profile {one_line(ledger.profile)}")
    measured = [run for run in ledger.runs if run.started_at and run.score is not None]
    bare = sum(not run.is_isolated for run in measured)
    if measured:
        lines.append(f"{bare:,} of {len(measured):,} runs were not isolated" if bare else "every run was isolated")
    if nodes := {run.node for run in ledger.runs if run.node}:
        lines.append(f"{len(nodes):,} nodes: {one_line(', '.join(sorted(nodes)))}")
    return lines


def _run_values(ledger: Ledger, run: Run, tag) -> dict:
    """A row, and what unfolds below it."""
    facts = [f"commit {run.commit[:7]}", f"seed {run.seed}", f"{run.memory_mb / 1024:.1f} GB"]
    if run.seconds:
        facts.append(duration(run.seconds))
    if run.node:
        facts.append(f"on {run.node}")
    if run.started_at:
        facts.append(time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started_at)))
    diff = []
    log = ""
    if tag is not None:
        folder = tag.folder(run.number)
        text = read_head(folder / "change.diff", DIFF_CHARS + 1)
        diff = [(_kind(line), line[:400]) for line in text[:DIFF_CHARS].rstrip().split("\n")]
        if len(text) > DIFF_CHARS:
            diff.append(("", f"… more in runs/{run.number:04d}/change.diff"))
        log = read_tail(folder / "run.log", LOG_LINES)
    is_scored = run.score is not None
    return {
        "number": f"{run.number:04d}",
        "status": "stale" if run.is_stale else run.status,
        "purpose": "" if run.purpose == "experiment" else run.purpose,
        "score": ledger.domain.score_text(run.score) if is_scored else "",
        "description": one_line(run.description, 300),
        "facts": ", ".join(facts),
        "is_busy": is_busy(run),
        "verdict": verdict(ledger, run) if tag is not None else run.reason,
        "diff": diff,
        "log": log,
    }


def _kind(line: str) -> str:
    return {"+": "ins", "-": "del"}.get(line[:1], "")


# ---------------------------------------------------------------------------------------------------------------------
# While a loop runs


class PageWriter:
    """Has picture and page of a tag rewritten by a child, `loop.py report`, now and then and at the end.

    It can neither slow the loop nor end it: the child has the lowest priority, and a failure is said once.
    """

    def __init__(self, tag):
        loop = Path(__file__).resolve().parents[1] / "loop.py"
        self._command = ["nice", "-n", "19", sys.executable, str(loop), "report", "--tag", tag.name]
        self._cwd = tag.checkout
        self._log = tag.home / "page.log"
        self._child: subprocess.Popen | None = None
        self._began_at = -math.inf
        self._pause = float(PAGE_SECONDS)
        self._runs = len(tag.ledger.runs)  # when the last rewrite began
        self._ledger = tag.ledger
        self._has_failed = False

    def refresh(self) -> None:
        """Begin a rewrite if runs came, none is going on and the last one is long enough ago. Never waits."""
        if self._child is not None and self._child.poll() is not None:
            self._pause = max(PAGE_SECONDS, REST * (time.monotonic() - self._began_at))
            if self._child.returncode:
                self._complain(read_tail(self._log, 1, ERROR_CHARS))
            self._child = None
        is_due = len(self._ledger.runs) != self._runs and time.monotonic() - self._began_at >= self._pause
        if self._child is None and is_due:
            self._begin()

    def close(self) -> None:
        """Begin the last rewrite, for which nobody waits. To be called once the loop's status is cleared: by that the
        page knows that it is not to reload itself any more."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        if self._ledger.runs:
            self._begin()

    def _begin(self) -> None:
        self._began_at = time.monotonic()
        self._runs = len(self._ledger.runs)
        try:
            self._log.unlink(missing_ok=True)
            with open_to_append(self._log) as log:
                self._child = subprocess.Popen(
                    self._command,
                    cwd=self._cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is not for it
                )
        except OSError as error:
            self._complain(str(error))

    def _complain(self, reason: str) -> None:
        if not self._has_failed:
            say(f"warning: report.html is not rewritten: {reason}")
        self._has_failed = True
