"""What report.html, the page for the morning, says: everything of a tag that a person may want to see, cut to size.

Of a long ledger the page shows what was kept, the near misses and the newest rows, and says what it leaves out. Diffs,
logs and verdicts together take at most DETAIL_BYTES. Functions named ..._values give values of the template, page.html.

markupsafe is imported where it is used: it comes with jinja2, and most commands write no page (see page.py).
"""

import contextlib
import fcntl
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import page, picture
from harness.contract import Domain
from harness.curve import read_training, unit_of
from harness.files import open_to_append, read_head, read_tail, read_text, write_atomically
from harness.ledger import Row
from harness.report import Findings, busy_sentence, gain_words, kept_sentence
from harness.screen import UserError, duration, one_line
from harness.store import Run, Store
from harness.verdict import BUSY_SHARE, Beliefs, explain, read_beliefs

PAGE_NAME = "report.html"
AUDIT_NAME = "audit.txt"  # what the last audit printed, in the tag's folder
REFRESH_SECONDS = 60

NEWEST_ROWS = 300
NEAR_MISSES = 20  # best of the discarded
MOST_KEPT = 300  # largest gains of more
MOST_CURVES = 150
MOST_BARS = 400
MOST_WAITS = 5
DETAIL_BYTES = 1_700_000  # that all diffs, logs and verdicts together may take on the page
READ_BYTES = 100_000  # of one diff
LOG_LINES = 40
LONGEST_WORDS = 300  # characters of a description
SAMPLE_CHARS = 2000


@dataclass(frozen=True)
class Entry:
    """A row of the ledger, its run where that is known, and what the page tells of it."""

    index: int
    row: Row
    run: Run | None


def write_page(
    store: Store | None, findings: Findings, checkout: Path, domain: Domain, is_live: bool, template: str
) -> Path:
    """Write report.html into a checkout; return its path. With `is_live` the page reloads itself."""
    path = checkout / PAGE_NAME
    write_atomically(path, compose(store, findings, domain, is_live, template), has_other_writers=True)
    return path


@contextlib.contextmanager
def page_lock(store: Store | None) -> Iterator[None]:
    """Held while picture and page are written: two writers at once would tear them."""
    if store is None or not store.home.is_dir():
        yield
        return
    with open_to_append(store.home / "page.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compose(store: Store | None, findings: Findings, domain: Domain, is_live: bool, template: str) -> str:
    """The page's text."""
    from markupsafe import Markup

    entries = find_entries(store, findings.rows)
    shown = choose_entries(entries, findings, domain)
    names = {}
    if store is not None:
        names = {"baseline": first_run(entries, findings.kept[0].commit)}
        if len(findings.kept) > 1:
            names["champion"] = first_run(entries, findings.kept[-1].commit)
    named = {name: run for name, run in names.items() if run is not None}
    values = {
        "refresh_seconds": REFRESH_SECONDS if is_live else 0,
        "title": store.branch if store is not None else "ledger",
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "unit": unit_of(domain),
        "sigma": f"{findings.sigma:.6f} {domain.unit}",
        "sigma_source": findings.sigma_source,
        "early": f"{picture.EARLY_SHARE:.0%}",
        "warnings": [clean_line(warning) for warning in findings.warnings],
        "progress_svg": Markup(picture.progress_svg(findings.rows, domain, findings.sigma)),
        "pace": pace_lines(store, findings),
        "samples": find_samples(named, domain),
    }
    values |= overview_values(findings, domain)
    values |= kept_values(findings, domain)
    values |= whole_change_values(store, findings)
    values |= curve_values(store, named, shown, domain)
    values |= audit_values(store)
    values |= machine_values(store, entries)
    values |= rows_values(store, entries, shown, domain)
    return page.render(template, **values)


def keep_audit(store: Store, text: str, doubts: list[str]) -> None:
    """Keep what an audit printed, for the page."""
    lines = [text, *(f"error: {doubt}" for doubt in doubts)]
    write_atomically(store.home / AUDIT_NAME, "\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Which rows, and which runs they are


def find_entries(store: Store | None, rows: list[Row]) -> list[Entry]:
    """Every row with its run: the n-th row of a commit is the n-th of its runs that was decided."""
    runs: dict[str, list[Run]] = {}
    for run in store.read_runs() if store is not None else []:
        if run.is_decided:
            runs.setdefault(run.commit[:7], []).append(run)
    entries = []
    for index, row in enumerate(rows):
        waiting = runs.get(row.commit)
        entries.append(Entry(index, row, waiting.pop(0) if waiting else None))
    return entries


def first_run(entries: list[Entry], commit: str) -> Run | None:
    for entry in entries:
        if entry.row.commit == commit and entry.row.status != "crash":
            return entry.run
    return None


def choose_entries(entries: list[Entry], findings: Findings, domain: Domain) -> list[Entry]:
    """The newest rows, the near misses, and what was kept."""
    gains = {change.commit: change.gain for change in findings.kept}
    kept = [entry for entry in entries if entry.row.status == "keep"]
    kept.sort(key=lambda entry: gains.get(entry.row.commit, 0.0), reverse=True)
    misses = [entry for entry in entries if entry.row.status == "discard"]
    misses.sort(key=lambda entry: entry.row.score, reverse=not domain.lower_is_better)
    chosen = entries[:1] + entries[-NEWEST_ROWS:] + kept[:MOST_KEPT] + misses[:NEAR_MISSES]
    by_index = {entry.index: entry for entry in chosen}
    return [by_index[index] for index in sorted(by_index, reverse=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the page


def clean_line(text: str) -> str:
    """What an agent or a run wrote, fit for one line of the page."""
    return one_line(page.clean(text), LONGEST_WORDS)


def overview_values(findings: Findings, domain: Domain) -> dict:
    rows = findings.rows
    first = findings.kept[0]
    best = findings.kept[-1]
    counts = [f"{sum(row.status == status for row in rows):,} {status}" for status in ("keep", "discard", "crash")]
    gain = gain_words(first.score, best.score, domain)
    overview = [
        f"Baseline {first.score:.6f}, {gain}. {kept_sentence(findings.kept)}",
        f"{len(rows):,} rows: {', '.join(counts)}.",
    ]
    return {"headline": f"Best {domain.metric} {best.score:.6f}", "overview": overview}


def kept_values(findings: Findings, domain: Domain) -> dict:
    """The table of what was kept, with steps and tokens a second where the runs say them: a faster host is no gain."""
    first, *changes = findings.kept
    largest = sorted(changes, key=lambda change: change.gain, reverse=True)[:MOST_KEPT]
    in_table = {change.commit for change in (first, *largest)}
    heads = ["commit", domain.metric, "gain", ""]
    speeds = []
    if any(change.steps is not None for change in findings.kept):
        heads.append("steps")
        speeds.append("steps")
    if domain.batch_pattern and any(change.pace is not None for change in findings.kept):
        heads.append(f"{unit_of(domain)}/s")
        speeds.append("pace")
    table = []
    for change in findings.kept:
        if change.commit not in in_table:
            continue
        cells = [clean_line(change.commit), f"{change.score:.6f}", "", ""]
        if change is not first:
            cells[2:] = [f"{change.gain:.6f}", "resolved" if change.resolved else "within noise"]
        for name in speeds:
            value = getattr(change, name)
            cells.append("-" if value is None else f"{value:,.0f}")
        table.append([*cells, clean_line(change.description)])
    left_out = len(changes) - len(largest)
    note = f"{left_out:,} smaller gains are left out here; results.tsv has them." if left_out else ""
    return {"kept_heads": [*heads, "description"], "kept": table, "kept_left_out": note}


def whole_change_values(store: Store | None, findings: Findings) -> dict:
    """The diff from baseline to champion; nothing where a commit of the ledger is not in this repository."""
    difference = b""
    if store is not None and len(findings.kept) > 1 and store.baseline:
        with contextlib.suppress(UserError):
            difference = store.repository.diff(store.baseline, store.champion)[:READ_BYTES]
    if not difference:
        return {"whole_diff": ""}
    text = difference.decode(errors="replace")
    return {"whole_diff": page.diff_markup(page.cut_to(page.shorten_lines(text), READ_BYTES))}


def pace_lines(store: Store | None, findings: Findings) -> list[tuple[str, str]]:
    """What the timeline tells. Cost and sessions only where the loop called agents: else each `try` is a session."""
    events = store.read_timeline() if store is not None else []
    runs = [event["seconds"] for event in events if event["event"] == "measured"]
    sessions = sum(event["event"] == "session" for event in events)
    told = [("pace", findings.pace or "unknown")]
    if findings.spent:
        told.append(("cost", findings.spent))
    if runs:
        told.append(("runs", f"{len(runs):,}, {duration(sum(runs))} in all, a run {duration(statistics.median(runs))}"))
    if findings.spent:
        told.append(("sessions", f"{sessions:,}"))
    return told


def curve_values(store: Store | None, named: dict[str, Run], shown: list[Entry], domain: Domain) -> dict:
    """Loss curves of baseline and champion, and the lines of other runs to choose from."""
    nothing = {"curves_svg": "", "choices": [], "choices_left_out": ""}
    if store is None or not domain.curve_pattern:
        return nothing
    from markupsafe import Markup

    trainings = [(name, read_training(store.folder(run.number), domain)) for name, run in named.items()]
    curves = picture.Curves(trainings, unit_of(domain))
    if not curves.named:
        return nothing
    others = [entry for entry in shown if entry.run is not None and entry.run not in named.values()]
    choices = []
    for entry in others[:MOST_CURVES]:
        lines = curves.lines(read_training(store.folder(entry.run.number), domain))
        if any(lines):
            name = f"{entry.run.number:04d} {entry.row.status} {clean_line(entry.row.description)}"
            choices.append({"name": one_line(name, 90), "lines": lines})
    left_out = len(others) - MOST_CURVES
    note = f"The curves of {left_out:,} older runs are left out." if left_out > 0 else ""
    return {"curves_svg": Markup(curves.svg()), "choices": choices, "choices_left_out": note}


def find_samples(named: dict[str, Run], domain: Domain) -> list[dict]:
    """What the models of baseline and champion wrote, where the domain has such a thing."""
    samples = []
    for name, run in named.items():
        text = page.clean(str(run.summary.get(domain.sample, ""))) if domain.sample else ""
        if text:
            title = f"{name} {clean_line(run.commit[:7])}, {domain.metric} {run.score:.6f}"
            samples.append({"name": title, "text": text[:SAMPLE_CHARS]})
    return samples


def audit_values(store: Store | None) -> dict:
    path = store.home / AUDIT_NAME if store is not None else None
    text = page.shorten_lines(read_text(path)).rstrip() if path is not None else ""
    if not text:
        return {"audit": "", "audit_when": ""}
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    return {"audit": text, "audit_when": f"printed {when}"}


def machine_values(store: Store | None, entries: list[Entry]) -> dict:
    """How busy others kept the machine, and what the loop had to wait for."""
    known = [entry.run for entry in entries if entry.run is not None and entry.run.busy_others is not None]
    busy = []
    for run in known[-MOST_BARS:]:
        share = min(1.0, max(0.0, run.busy_others))
        name = f"run {run.number:04d}: {share:.0%}"
        busy.append({"name": name, "height": round(100 * share), "is_much": share > BUSY_SHARE})
    text = busy_sentence(known) or "How busy others kept it is unknown: no run's record says it."
    waits = []
    for event in store.read_timeline() if store is not None else []:
        if event["event"] == "waiting":
            when = time.strftime("%m-%d %H:%M", time.localtime(event["at"]))
            waits.append(f"{when}, run {event['run']:04d} waited: {clean_line(event['description'])}")
    return {"machine": text, "busy": busy, "waits": waits[-MOST_WAITS:]}


# ---------------------------------------------------------------------------------------------------------------------
# The rows


def rows_values(store: Store | None, entries: list[Entry], shown: list[Entry], domain: Domain) -> dict:
    """The chosen rows with what a person may unfold, and a sentence about the others."""
    beliefs = read_beliefs(store) if store is not None else None
    texts = [read_details(store, entry, beliefs, place < MOST_CURVES) for place, entry in enumerate(shown)]
    sizes = [page.bytes_on_page(text) for details in texts for text in details.values()]
    limit = page.fair_limit(sizes, DETAIL_BYTES)
    rows = []
    for entry, details in zip(shown, texts, strict=True):
        rows.append(row_values(entry, details, beliefs, limit))
    left_out = ""
    if len(shown) < len(entries):
        indices = {entry.index for entry in shown}
        hidden = [entry.row.status for entry in entries if entry.index not in indices]
        counts = [f"{hidden.count(status):,} {status}" for status in ("keep", "discard", "crash")]
        left_out = f"{len(hidden):,} of {len(entries):,} rows are left out ({', '.join(counts)}): results.tsv has them "
        left_out += f"all. Shown are the newest {NEWEST_ROWS}, the {NEAR_MISSES} nearest misses, and of what was kept "
        left_out += f"the {MOST_KEPT} largest gains."
    return {"rows": rows, "rows_left_out": left_out}


def read_details(store: Store | None, entry: Entry, beliefs: Beliefs | None, with_verdict: bool) -> dict[str, str]:
    """Verdict, diff and end of the log of a row's run. A verdict reads two logs: only newer rows have one."""
    if store is None or entry.run is None:
        return {}
    folder = store.folder(entry.run.number)
    verdict = explain(store, entry.run, beliefs) if with_verdict else entry.run.marks
    return {
        "verdict": page.shorten_lines("\n".join(verdict)),
        "diff": page.shorten_lines(read_head(folder / "change.diff", READ_BYTES)).rstrip(),
        "log": page.shorten_lines(read_tail(folder / "run.log", LOG_LINES)),
    }


def row_values(entry: Entry, details: dict[str, str], beliefs: Beliefs | None, limit: float) -> dict:
    """One row. Each of its details takes at most `limit` bytes."""
    row = entry.row
    run = entry.run
    is_crash = row.status == "crash"
    facts = ""
    change = None
    if run is not None:
        change = beliefs.difference(run.commit, run.base) if run.base and not is_crash else None
        facts = f"seed {run.seed}, {duration(run.seconds)}"
        if run.busy_others is not None:
            facts += f", others used {run.busy_others:.0%} of the machine"
    number = f"{run.number:04d}" if run is not None else str(entry.index + 1)
    return {
        "number": number,
        "status": row.status,
        "score": "" if is_crash else f"{row.score:.6f}",
        "change": "" if change is None else f"{change:+.6f}",
        "description": clean_line(row.description),
        "commit": clean_line(row.commit),
        "memory": f"{row.memory_gb:.1f}",
        "facts": facts,
        "has_details": any(details.values()),
        "verdict": page.cut_to(details.get("verdict", ""), limit),
        "diff": page.diff_markup(page.cut_to(details.get("diff", ""), limit)),
        "log": page.cut_to(details.get("log", ""), limit, keep_end=True),
    }
