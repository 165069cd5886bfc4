"""report.py: what a person reads, `uv run loop.py status`, `report` and `audit`.

The status is one screen about a run in progress. The report tells what was kept, what each change gained and whether
that gain is larger than the noise, and draws progress.png. The audit gives the honest number: baseline and champion
again, on seeds that the run never used, on the validation split and on the sealed test split.
"""

import contextlib
import itertools
import json
import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ledger import AGAIN, ASSUMED_SIGMA, Row, is_resolved, noise, parse_ledger, scores
from plumbing import UserError, duration, flock_now, say, tail

if TYPE_CHECKING:
    from loop import Ratchet


def status(ratchet: "Ratchet", wait: bool) -> int:
    """Print where the run stands; with `wait`, wait for the verdict on the experiment that runs now and print that."""
    before, size = len(ratchet.rows), 0
    while (busy := is_busy(ratchet)) and wait and not has_verdict(ratchet.rows, before):
        time.sleep(0.2)
        if ratchet.ledger.exists() and ratchet.ledger.stat().st_size != size:
            size = ratchet.ledger.stat().st_size
            ratchet.load()
    if wait and ratchet.rows:
        print(verdict(ratchet))
        return 0
    print(f"{ratchet.branch}: {where(ratchet) if busy else 'no loop is running'}\n{ratchet.summary()}")
    if ratchet.rows:
        print(pace(events(ratchet)), "", *(str(row).rstrip() for row in ratchet.rows[-10:]), sep="\n")
    return 0


def has_verdict(rows: list[Row], before: int) -> bool:
    """True if a row came after which its experiment is over: no baseline before it, no gain that is run again."""
    return any(row.commit != rows[0].commit and not row.description.endswith(AGAIN) for row in rows[before:])


def events(ratchet: "Ratchet") -> list[dict]:
    """The timeline that a run writes; lines torn by a crash are left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in ratchet.timeline.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def is_busy(ratchet: "Ratchet") -> bool:
    with contextlib.suppress(OSError), open(ratchet.home / "lock") as lock:
        return not flock_now(lock)
    return False


def where(ratchet: "Ratchet") -> str:
    """What the loop is at, and since when."""
    if not (timeline := events(ratchet)):
        return "starting"
    words = [timeline[-1][key] for key in ("event", "run", "description")]
    return " ".join(filter(None, words)) + f", {duration(time.time() - timeline[-1]['at'])}"


def verdict(ratchet: "Ratchet") -> str:
    """The last row and what it means, for an agent that waited for it; or why the newest `try` made none."""
    newest = max(ratchet.runs.glob("[0-9]*"), default=ratchet.runs)
    if (told := tail(newest / "loop.log", 1)).startswith("error: "):
        return told
    run = next((event["run"] for event in reversed(events(ratchet)) if event["event"] == "measured"), "runs")
    return f"{str(ratchet.rows[-1]).strip()}\n{ratchet.summary()}\nlog {run}/run.log"


def report(ratchet: "Ratchet | None", ledger: str | None) -> int:
    """Print the table of kept changes and draw progress.png; of a run, or of any ledger file."""
    desk = Path(__file__).resolve().parent
    path = Path(ledger) if ledger else ratchet.ledger if ratchet.ledger.exists() else desk / "results.tsv"
    try:
        rows, bad = parse_ledger(path.read_text(errors="replace"))
    except OSError as error:
        raise UserError(f"no ledger at {path} ({error.strerror}): 'uv run loop.py --agent random' makes one") from error
    if bad:
        say(f"warning: {bad} lines of {path} are no rows and were left out")
    if not (values := scores(rows)):
        raise UserError(f"{path} holds no scored row yet: 'uv run loop.py status' tells what is running")
    kept: dict[str, str] = {}
    for row in rows:
        if row.status == "keep":
            kept.setdefault(row.commit, row.description)
    kept = kept or {next(iter(values)): "none kept"}
    first, best = next(iter(kept)), next(reversed(kept))
    count = {kind: sum(row.status == kind for row in rows) for kind in ("keep", "discard", "crash")}
    print(f"{len(rows)} rows: " + ", ".join(f"{n} {kind} ({n / len(rows):.0%})" for kind, n in count.items()))
    if ratchet and events(ratchet):
        print(pace(events(ratchet)))
    low, high = statistics.fmean(values[best]), statistics.fmean(values[first])
    gain = high - low
    print(f"best {low:.6f} ({best}), baseline {high:.6f}, gain {gain:.6f} bpb ({gain / (high or 1):.2%})\n")

    profile = ratchet.trailer("profile") if ratchet else ""
    profile = profile if profile in ASSUMED_SIGMA else "climbmix"
    measured = noise(rows)
    sigma = measured or ASSUMED_SIGMA[profile]
    print(f"{'kept':8} {'val_bpb':>8} {'gain':>9}  {'':12} description")
    print(f"{first:8} {high:8.6f} {'':9}  {'':12} {kept[first]}")
    for before, commit in itertools.pairwise(kept):
        gain = statistics.fmean(values[before]) - statistics.fmean(values[commit])
        word = "resolved" if is_resolved(values[before], values[commit], sigma) else "within noise"
        print(f"{commit:8} {statistics.fmean(values[commit]):8.6f} {gain:9.6f}  {word:12} {kept[commit]}")
    assumed = f"assumed, as measured for {profile}; --replicates 3 measures it here"
    source = "from commits that were run more than once" if measured else assumed
    print(f"\nnoise of one run: {sigma:.6f} bpb ({source})\nresolved: the gain is over 2 standard errors")
    plot(rows, desk / "progress.png")
    print(f"picture: {desk / 'progress.png'}")
    return 0


def pace(events: list[dict]) -> str:
    """Runs an hour and the share of wall time in which training or evaluation ran, over all sessions of a timeline."""
    runs = [event["seconds"] for event in events if event["event"] == "measured"]
    wall = sum(max(0, b["at"] - a["at"]) for a, b in itertools.pairwise(events) if b["event"] != "session") or 1e-9
    return f"{len(runs) / wall * 3600:.1f} runs an hour, training or evaluating {sum(runs) / wall:.1%} of the time"


def plot(rows: list[Row], path: Path) -> None:
    """Every run a dot, the kept ones labelled, the running best a step line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, since it takes a second to import
    from matplotlib.figure import Figure

    kept = [(i, row) for i, row in enumerate(rows) if row.status == "keep"]
    kept = kept or [(i, row) for i, row in enumerate(rows) if row.status == "discard"][:1]
    others = [(i, row.val_bpb) for i, row in enumerate(rows) if row.status == "discard"]
    crashed = [i for i, row in enumerate(rows) if row.status == "crash"]
    low, high = min(row.val_bpb for _, row in kept), max(row.val_bpb for _, row in kept)
    room = (high - low) or 0.01 * abs(high) or 0.01
    low, high = low - 0.10 * room, high + 0.25 * room  # most failures are far above: they would flatten the rest

    figure = Figure(figsize=(14, 7), dpi=110)
    axes = figure.add_axes((0.06, 0.08, 0.93, 0.87))
    axes.set(xlim=(-0.02 * len(rows) - 0.5, 1.18 * len(rows)), ylim=(low, high))  # room on the right for the last label
    axes.plot([i for i, _ in others], [y for _, y in others], "o", color="#bbbbbb", markersize=4, label="discarded")
    axes.plot(crashed, [high] * len(crashed), "x", color="#c0392b", markersize=6, label="crashed", clip_on=False)
    steps = [*kept, (len(rows) - 1, kept[-1][1])]
    axes.step([i for i, _ in steps], [row.val_bpb for _, row in steps], where="post", color="#2e7d32", label="best")
    axes.plot([i for i, _ in kept], [row.val_bpb for _, row in kept], "o", color="#2e7d32", markersize=6, label="kept")
    gains = {i: old.val_bpb - new.val_bpb for (_, old), (i, new) in itertools.pairwise(kept)}
    named = {kept[0][0], *sorted(gains, key=gains.get, reverse=True)[:30]}  # more would not be legible
    label(axes, [(i, row.val_bpb, row.description[:45]) for i, row in kept if i in named])
    above = sum(y > high for _, y in others)
    axes.set_xlabel("run" + (f" ({above} of the discarded are above the frame)" if above else ""))
    axes.set_ylabel("validation bits per byte (lower is better)")
    axes.set_title(f"{len(rows)} runs, {len(kept)} kept: {kept[0][1].val_bpb:.4f} to {kept[-1][1].val_bpb:.4f}")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right")
    FigureCanvasAgg(figure).print_png(path)


def label(axes, points: list[tuple[int, float, str]]) -> None:
    """A slanted label at each point, from the right; raised, with a thin line, until it is clear of those before."""
    slope, height, width = math.radians(35), 13, 6.0  # of the text, pixels a line and a character
    along, across = (math.cos(slope), math.sin(slope)), (-math.sin(slope), math.cos(slope))
    placed: list[tuple[float, float, float]] = []  # distance across the text, its begin and end along it
    for x, y, text in reversed(points):
        px, py = axes.transData.transform((x, y))
        left, bottom = px + 7, py + 9
        for raised in range(0, 300, 2):
            off, start = (u * left + v * (bottom + raised) for u, v in (across, along))
            stop = start + width * len(text)
            if not any(abs(off - o) < height and start < end and begin < stop for o, begin, end in placed):
                break
        placed.append((off, start, stop))
        line = {"arrowstyle": "-", "color": "#2e7d32", "linewidth": 0.5, "relpos": (0, 0), "shrinkB": 0}
        place = axes.transData.inverted().transform((left, bottom + raised))
        axes.annotate(text, (x, y), place, rotation=35, rotation_mode="anchor", ha="left", va="bottom", fontsize=8,
                      parse_math=False, arrowprops=line if raised else None)  # fmt: skip


def print_audit(found: dict[str, list[tuple[float, float]]]) -> None:
    """Mean and deviation over the seeds, on both splits; `found` is the baseline's scores and the champion's."""
    replicates = len(next(iter(found.values())))
    print(f"{'':17} {'validation bpb':>21} {'sealed test bpb':>21}   ({replicates} fresh seeds each)")
    means = []
    for name, pairs in found.items():
        columns = list(zip(*pairs, strict=True))
        means.append([statistics.fmean(column) for column in columns])
        cells = [f"{statistics.fmean(column):.6f}" for column in columns]
        if replicates > 1:
            cells = [f"{cell} ± {statistics.stdev(column):.6f}" for cell, column in zip(cells, columns, strict=True)]
        print(f"{name:17} {cells[0]:>21} {cells[1]:>21}")
    gains = [before - after for before, after in zip(*means, strict=True)]
    print(f"{'gain':17} {gains[0]:>21.6f} {gains[1]:>21.6f}")
