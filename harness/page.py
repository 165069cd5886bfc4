"""progress.png and report.html: every run in one picture, all of a tag in one file. The figures are the ledger's.

Both are drawn by matplotlib and jinja2, which take a second to import: they are imported where they are used.
Everything that an agent or a run wrote is escaped, and the page has no scripts and loads nothing.
"""

import contextlib
import math
import os
import re
import subprocess
import sys
import time
import warnings
from io import BytesIO, StringIO
from pathlib import Path

from harness.ablation import ablation_text
from harness.compare import Point, read_curve, verdict
from harness.console import duration, one_line
from harness.domain import Domain
from harness.files import read_tail, read_text, write_atomically
from harness.ledger import Change, Ledger, Run
from harness.processes import MARK
from harness.report import audit_text, choose_changes, report_text

# ---------------------------------------------------------------------------------------------------------------------
# Pictures

GREEN = "#2e7d32"
GREY = "#8a8a8a"
RED = "#c0392b"
BLUE = "#2b6cb0"
INK = "#010203"
COLOURS_ON_PAGE = {
    GREEN: "var(--kept)",
    GREY: "var(--quiet)",
    RED: "var(--crash)",
    BLUE: "var(--baseline)",
    INK: "currentColor",
}
NUMBERED = 28  # kept changes that the picture names, the largest gains of more
NUMBER_LEVELS = 4  # distances from their points at which numbers stand in turn: neighbours seldom meet
MANY_RUNS = 1000  # more are drawn smaller, in an SVG as an image
EARLY = 0.05  # of the budget: the steep fall of the loss before it is cut off


def draw_progress(ledger: Ledger, path: Path) -> None:
    """Draw every run, the best so far, and the kept changes by their numbers, which a table beside it explains."""
    picture = BytesIO()
    figure = _figure(14, 7)
    axes = figure.add_axes((0.06, 0.085, 0.6, 0.86))
    _draw_night(axes, ledger)
    _write_table(figure, ledger.changes(), ledger.domain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font lacks is drawn as a box
        figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue(), has_other_writers=True)


def progress_svg(ledger: Ledger) -> str:
    """The picture without its table, in the page's colours; "" for no runs."""
    if not ledger.rows:
        return ""
    figure = _figure(11, 6)
    _draw_night(figure.add_axes((0.075, 0.09, 0.915, 0.85)), ledger)
    return _as_svg(figure, "every run, and the best so far")


def curves_svg(curves: dict[str, list[Point]]) -> str:
    """Training loss over the budget of the named runs; "" where no log tells it."""
    known = {name: points for name, points in curves.items() if len(points) > 1}
    if not known:
        return ""
    figure = _figure(11, 4)
    axes = figure.add_axes((0.06, 0.13, 0.93, 0.84))
    for (name, points), colour in zip(known.items(), (BLUE, GREEN), strict=False):
        points = points[:: math.ceil(len(points) / 300)]
        fractions = [100 * point.fraction for point in points]
        axes.plot(fractions, [point.loss for point in points], color=colour, label=name)
    later = [point.loss for points in known.values() for point in points if point.fraction >= EARLY]
    if later:
        room = 0.05 * (max(later) - min(later) or 1.0)
        axes.set_ylim(min(later) - room, max(later) + room)
    _label(axes, "% of the budget", "training loss")
    axes.legend(facecolor="none", edgecolor="none", labelcolor=INK)
    return _as_svg(figure, "training loss of baseline and champion")


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    return figure


def _label(axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK, loc="left")
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.1)
    axes.spines[:].set_color(INK)


def _draw_night(axes, ledger: Ledger) -> None:
    """Every run, and the champions with sigma around what is believed of them now."""
    domain = ledger.domain
    rows = ledger.rows
    changes = ledger.changes()
    steps = _champions(ledger)
    low, high = _limits(ledger, steps)
    axes.set(xlim=(0.5 - 0.02 * len(rows), 1.02 * len(rows) + 1), ylim=(low, high))
    _draw_runs(axes, ledger, low, high)
    title = f"runs: {len(rows):,}, kept changes: {sum(change.is_in_branch for change in changes):,}"
    if steps:
        xs, ys = zip(*steps, (len(rows) + 0.5, steps[-1][1]), strict=True)
        axes.step(xs, ys, where="post", color=GREEN, linewidth=1.5, label="best, as it is believed now", zorder=1)
        if sigma := ledger.sigma:
            band = ([y - sigma for y in ys], [y + sigma for y in ys])
            name = f"± sigma ({sigma:.2g})"
            axes.fill_between(xs, *band, step="post", color=GREEN, alpha=0.15, linewidth=0, label=name, zorder=0)
        title += f", {domain.metric} {domain.score_text(ys[0])} to {domain.score_text(ys[-1])}"
    axes.set_title(title, color=INK)
    _label(axes, "run", f"{domain.score_name} ({'lower' if domain.lower_is_better else 'higher'} is better)")
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if rows:  # below the axes, so that it covers no point
        style = {"frameon": False, "labelcolor": INK, "fontsize": 8, "columnspacing": 1.2, "handletextpad": 0.3}
        axes.figure.legend(loc="lower right", ncols=8, borderaxespad=0.1, **style)
    places = {run.commit: place for place, run in reversed(list(enumerate(rows, 1)))}
    line = {"arrowstyle": "-", "color": GREEN, "alpha": 0.5, "linewidth": 0.6, "shrinkA": 4, "shrinkB": 2}
    for number, change in choose_changes(changes, NUMBERED):
        distance = 12 + 13 * (number % NUMBER_LEVELS)  # points, on the better side
        offset = (0, -distance if domain.lower_is_better else distance)
        place = (places[change.run.commit], change.score)
        style = {"ha": "center", "va": "center", "fontsize": 8, "color": INK, "arrowprops": line}
        axes.annotate(str(number), place, offset, textcoords="offset points", **style)


def _champions(ledger: Ledger) -> list[tuple[int, float]]:
    """Where a new commit took the lead, and what is believed of it now. A repeat of the champion is no new one."""
    steps = []
    champion = ""
    for place, run in enumerate(ledger.rows, 1):
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


def _draw_runs(axes, ledger: Ledger, low: float, high: float) -> None:
    """A mark for every run, those out of the frame at its edge, a crash at the worse one."""
    inset = 0.015 * (high - low)
    worst = high - inset if ledger.domain.lower_is_better else low + inset
    is_crowded = len(ledger.rows) > MANY_RUNS
    kinds = {"discarded": [], "out of the frame": [], "repeated": [], "kept": [], "crashed": []}
    for place, run in enumerate(ledger.rows, 1):
        if run.score is None:
            kinds["crashed"].append((place, worst))
        elif not low <= run.score <= high:
            kinds["out of the frame"].append((place, min(max(run.score, low + inset), high - inset)))
        elif run.purpose == "replicate":
            kinds["repeated"].append((place, run.score))
        else:
            kinds["kept" if run.status == "keep" else "discarded"].append((place, run.score))
    marks = {"discarded": ("o", GREY), "out of the frame": ("d", GREY), "repeated": (".", BLUE)}
    marks |= {"kept": ("o", GREEN), "crashed": ("x", RED)}
    for name, points in kinds.items():
        mark, colour = marks[name]
        style = {"color": colour, "markersize": 2.5 if is_crowded else 5, "rasterized": is_crowded, "clip_on": False}
        if points:
            label = f"{name} ({len(points):,})"
            axes.plot(*zip(*points, strict=True), mark, label=label, alpha=0.85, zorder=2, **style)


def _write_table(figure, changes: list[Change], domain: Domain) -> None:
    """The numbers' legend, on the right."""
    numbered = choose_changes(changes, NUMBERED)
    lines = [("kept changes: gain, and what they are" if numbered else "no change was kept yet", INK)]
    for number, change in numbered:
        words = one_line(change.run.description, 200)
        words = words if len(words) <= 44 else f"{words[:43]}…"
        colour = INK if change.is_significant and change.is_in_branch else GREY
        lines.append((f"{number:>4} {change.gain:+.{domain.score_digits}f}  {words}", colour))
    if any(colour == GREY for _, colour in lines):
        lines.append(("grey: within the noise, or no longer in the branch", GREY))
    if len(changes) > len(numbered):
        lines.append((f"the {len(changes) - len(numbered):,} smallest gains are left out", GREY))
    for place, (text, colour) in enumerate(lines):
        position = (0.672, 0.93 - 0.0295 * place)
        figure.text(*position, text, fontsize=7.5, family="monospace", color=colour, parse_math=False)


def _as_svg(figure, title: str) -> str:
    """A figure as one element: no fonts, no dates, no addresses, the colours of the page's style."""
    from matplotlib import rc_context

    for part in (figure, *figure.axes):
        part.patch.set_visible(False)
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


# ---------------------------------------------------------------------------------------------------------------------
# report.html

TEMPLATE = Path(__file__).with_name("page.html")
PAGE_SECONDS = 60  # between two rewrites; a live page reloads itself as often
NEWEST = 300  # runs that are shown, beside those of the largest gains
DIFF_CHARS = 8000  # of a run's diff
LOG_LINES = 25
LONGEST_TEXT = 20_000  # characters of any other text
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

    audit, doubts = audit_text(ledger, group) if (group := ledger.last_group("audit")) else ("", [])
    firsts = {}
    for name, commit in (("baseline", ledger.baseline), ("champion", ledger.champion)):
        if commit and commit not in [run.commit for run in firsts.values()]:
            run = ledger.runs_of(commit)[0]
            firsts[f"{name}, run {run.number:04d}, {ledger.domain.metric} {ledger.domain.score_text(run.score)}"] = run
    curves = {}
    for name, run in firsts.items() if tag is not None else ():
        curves[name] = read_curve(read_text(tag.folder(run.number) / "run.log"), ledger.domain)
    kept = {change.run.number for _, change in choose_changes(ledger.changes())}
    newest = {run.number for run in ledger.runs[-NEWEST:]}
    chosen = [run for run in reversed(ledger.runs) if run.number in kept | newest]
    values = {
        "title": tag.branch if tag is not None else "a ledger",
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "refresh": PAGE_SECONDS if tag is not None and tag.is_busy() and tag.read_live() else 0,
        "standing": ledger.standing(),
        "progress": Markup(progress_svg(ledger)),
        "report": report_text(ledger),
        "curves": Markup(curves_svg(curves)),
        "samples": [(name, run.summary.get(ledger.domain.sample)) for name, run in firsts.items()],
        "audit": audit,
        "doubts": doubts,
        "ablation": ablation_text(tag, group) if tag is not None and (group := ledger.last_group("ablation")) else "",
        "runs": [_run_values(ledger, run, tag) for run in chosen],
        "left_out": len(ledger.runs) - len(chosen),
        "newest": NEWEST,
    }
    environment = jinja2.Environment(
        autoescape=True, finalize=_show, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text()).render(**values)


def _show(value: object) -> object:
    """Every value of the page that is no markup: without what a browser would not show as it is (terminal codes,
    control and direction characters), and not longer than a page can hold."""
    from markupsafe import Markup

    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = TERMINAL_CODES.sub("", value[:LONGEST_TEXT])
    return UNSHOWABLE.sub("", re.sub(r"\r\n?", "\n", text))


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
        text = read_text(tag.folder(run.number) / "change.diff", first=DIFF_CHARS)
        kinds = {"+": "ins", "-": "del"}
        diff = [(kinds.get(line[:1], ""), line[:400]) for line in text.rstrip().splitlines()]
        log = read_tail(tag.folder(run.number) / "run.log", LOG_LINES)
    return {
        "number": f"{run.number:04d}",
        "status": "stale" if run.is_stale else run.status,
        "purpose": "" if run.purpose == "experiment" else run.purpose,
        "score": "" if run.score is None else ledger.domain.score_text(run.score),
        "description": one_line(run.description, 300),
        "facts": ", ".join(facts),
        "is_busy": run.is_busy,
        "verdict": verdict(ledger, run) if tag is not None else run.reason,
        "diff": diff,
        "log": log,
    }


# ---------------------------------------------------------------------------------------------------------------------
# While a loop runs


class PageWriter:
    """Has picture and page of a tag rewritten by a child of the lowest priority, `loop.py report`, now and then and at
    the end. It can neither slow the loop nor end it: a failure is a line of page.log."""

    def __init__(self, tag):
        loop = Path(__file__).resolve().parents[1] / "loop.py"
        self.command = ["nice", "-n", "19", sys.executable, str(loop), "report", "--tag", tag.name]
        self._tag = tag
        self._child: subprocess.Popen | None = None
        self._began_at = time.monotonic()
        self._runs = len(tag.ledger.runs)  # when the last rewrite began

    def refresh(self) -> None:
        """Begin a rewrite if runs came, none is going on and the last one is long enough ago. Never waits."""
        is_busy = self._child is not None and self._child.poll() is None
        is_due = len(self._tag.ledger.runs) != self._runs and time.monotonic() - self._began_at >= PAGE_SECONDS
        if is_due and not is_busy:
            self._begin()

    def close(self) -> None:
        """Begin the last rewrite, for which nobody waits. To be called once the loop's status is cleared: by that the
        page knows that it is not to reload itself any more."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        if self._tag.ledger.runs:
            self._begin()

    def _begin(self) -> None:
        self._began_at = time.monotonic()
        self._runs = len(self._tag.ledger.runs)
        with contextlib.suppress(OSError), open(self._tag.home / "page.log", "wb") as log:
            self._child = subprocess.Popen(
                self.command,
                cwd=self._tag.checkout,
                env=os.environ | {MARK: f"{self._tag.mark}:page"},  # what it uses is not others'
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # Ctrl-C is not for it
            )
