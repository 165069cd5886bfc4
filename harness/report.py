"""What a person reads: `uv run loop.py status`, `report` and `audit`, as text.

The status is one screen about a run in progress. The report tells what was kept, what each change gained and whether
that gain is larger than the noise. The audit gives the honest number: baseline and champion again, on seeds that the
run never used, on the validation split and on the sealed test split, scored once more by a judge in a clean process.
"""

import itertools
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from harness import picture
from harness.contract import Domain
from harness.costs import spending
from harness.curve import unit_of
from harness.files import read_tail
from harness.ledger import (
    GIVEN_AWAY_SIGMAS,
    Row,
    believed_scores,
    find_noise,
    given_away,
    is_resolved,
    parse_ledger,
    scores_by_commit,
    sigma_to_give_away,
    wants_simpler_rule,
)
from harness.opening import false_rows
from harness.prompt import standing
from harness.screen import ERROR_CHARS, UserError, duration, say
from harness.store import Run, Store
from harness.verdict import BUSY_SHARE, explain, mean_of_known, mean_pace

POLL_SECONDS = 0.2
SHOWN_MARKS = 5  # at the end of a report: the page has them all

# ---------------------------------------------------------------------------------------------------------------------
# status


def print_status(store: Store, wait: bool) -> int:
    """Print where the run stands; with `wait`, wait for the verdict on the experiment that runs now and print that."""
    rows_before = len(store.rows)
    if wait:
        _wait_for_verdict(store, rows_before)
        if store.rows:
            print(verdict_text(store))
            return 0
    state = _what_runs(store) if store.is_busy() else "no loop is running"
    print(f"{store.branch}: {state}")
    print(standing(store.rows, store.domain))
    if store.rows:
        events = store.read_timeline()
        print(_pace(events))
        spent = spending(events, _number_kept(store.rows))
        if spent:
            print(spent)
        print()
        for row in store.rows[-10:]:
            print(str(row).rstrip())
    return 0


def _wait_for_verdict(store: Store, rows_before: int) -> None:
    """Return once a row came that decides more than the baseline, or no loop runs any more.

    A gain on a former champion is no verdict yet: it runs again on the present one.
    """
    size = 0
    while store.is_busy():
        stale = {run.commit[:7] for run in store.read_runs() if run.decision == "stale"}
        new = store.rows[rows_before:]
        if any(row.commit not in (store.rows[0].commit, *stale) for row in new):
            return
        time.sleep(POLL_SECONDS)
        now = store.ledger.stat().st_size if store.ledger.exists() else 0
        if now != size:
            size = now
            store.load()
    store.load()


def _what_runs(store: Store) -> str:
    """What runs now and for how long, from the timeline."""
    running: dict[int, dict] = {}
    waiting: dict[int, dict] = {}
    last = None
    for event in store.read_timeline():
        last = event
        if event["event"] in ("session", "stopped"):
            running.clear()
            waiting.clear()
        elif event["event"] in ("training", "measured", "waiting"):
            running.pop(event["run"], None)
            waiting.pop(event["run"], None)
        if event["event"] == "training":
            running[event["run"]] = event
        elif event["event"] == "waiting":
            waiting[event["run"]] = event
    if last is None or last["event"] == "stopped":  # the session that is busy now has not begun a run
        return "starting"
    parts = []
    for number, event in sorted(running.items()):
        parts.append(f"run {number:04d} {event['description']}, {duration(time.time() - event['at'])}")
    for event in waiting.values():
        parts.append(f"waiting: {event['description']}, {duration(time.time() - event['at'])}")
    if not parts:
        return f"no run in flight, {duration(time.time() - last['at'])}"
    return "; ".join(parts)


def _pace(events: list[dict]) -> str:
    """Runs an hour and the share of wall time in which something ran, over all sessions of a timeline."""
    runs = [event["seconds"] for event in events if event["event"] == "measured"]
    wall = 0.0
    for before, after in itertools.pairwise(events):
        if after["event"] != "session":
            wall += max(0.0, after["at"] - before["at"])
    wall = wall or 1e-9
    return f"{len(runs) / wall * 3600:.1f} runs an hour, {sum(runs) / wall:.2f} devices busy on average"


def _number_kept(rows: list[Row]) -> int:
    """Kept changes; the baseline is none."""
    kept = {row.commit for row in rows if row.status == "keep"}
    return max(0, len(kept) - 1)


def verdict_text(store: Store) -> str:
    """The last row and what it means, for an agent that waited for it; or why the newest `try` made none."""
    log = store.home / "try.log"
    refused = read_tail(log, 1, ERROR_CHARS)
    if refused.startswith("error: "):
        return refused
    row = store.rows[-1]
    lines = [str(row).strip(), standing(store.rows, store.domain)]
    runs = [run for run in store.runs_of(store.full_commit(row.commit)) if run.is_decided]
    if runs:
        lines += explain(store, runs[-1], with_commands=True)
    # A gain on a former champion that could not be run again on the present one.
    lines += [line for line in read_tail(log, 20, ERROR_CHARS).splitlines() if line.startswith("dropped: ")]
    if runs and runs[-1].decision == "crash":
        lines += _how_to_mend(runs[-1])
    elif runs:
        lines.append(f"log runs/{runs[-1].number:04d}/run.log")
    return "\n".join(lines)


def _how_to_mend(run: Run) -> list[str]:
    """Where a crash tells its reason, and how its edit comes back."""
    folder = f"runs/{run.number:04d}"
    lines = [f"'tail -n 50 {folder}/run.log' tells why"]
    if run.base:
        lines.append(f"'git apply {folder}/change.diff' brings the edit back, to mend it")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# report: read, compute, print, plot


@dataclass(frozen=True)
class Kept:
    """A kept change."""

    commit: str
    score: float
    gain: float  # on the one before; 0 for the baseline
    resolved: bool  # larger than the noise
    description: str
    steps: float | None = None  # the mean of its runs; None where none says so
    pace: float | None = None  # tokens a second, the same


@dataclass(frozen=True)
class Findings:
    """Everything that the report prints."""

    rows: list[Row]
    kept: list[Kept]
    sigma: float
    sigma_source: str
    given_away: float
    given_away_limit: float
    has_simpler: bool
    pace: str
    spent: str  # by the agents
    busy: str  # how busy others kept the machine
    warnings: list[str]


def print_report(store: Store | None, ledger: str | None, checkout: Path, domain: Domain) -> Findings:
    """Print the table of kept changes and draw progress.png, of a tag or of any ledger file; return what was found."""
    rows, path, bad = read_rows(store, ledger, checkout)
    if bad:
        say(f"warning: {bad} lines of {path} are no rows and were left out")
    findings = compute(store, rows, path, domain)
    print_findings(findings, domain)
    picture_path = checkout / picture.PICTURE_NAME
    picture.plot(rows, picture_path, domain, findings.sigma)
    print(f"picture: {picture_path}")
    return findings


def read_rows(store: Store | None, ledger: str | None, checkout: Path) -> tuple[list[Row], Path, int]:
    """The rows, where they were read, and how many lines were none."""
    if ledger:
        path = Path(ledger)
    elif store is not None and store.ledger.exists():
        path = store.ledger
    else:
        path = checkout / "results.tsv"
    try:
        rows, bad = parse_ledger(path.read_text(errors="replace"))
    except OSError as error:
        remedy = "'uv run loop.py --agent random' makes one"
        raise UserError(f"no ledger at {path} ({error.strerror}): {remedy}") from error
    return rows, path, bad


def compute(store: Store | None, rows: list[Row], path: Path, domain: Domain) -> Findings:
    """What the rows tell."""
    scores = scores_by_commit(rows)
    if not scores:
        raise UserError(f"{path} holds no scored row yet: 'uv run loop.py status' tells what is running")
    profile = store.profile if store is not None else ""
    noise = find_noise(rows, profile, domain)
    events = store.read_timeline() if store is not None else []
    return Findings(
        rows=rows,
        kept=_kept_changes(rows, noise.sigma, domain, store),
        sigma=noise.sigma,
        sigma_source=noise.source,
        given_away=given_away(rows, domain),
        given_away_limit=GIVEN_AWAY_SIGMAS * sigma_to_give_away(rows, domain.sigma_of(profile)),
        has_simpler=any(row.status == "keep" and wants_simpler_rule(row.description) for row in rows),
        pace=_pace(events) if events else "",
        spent=spending(events, _number_kept(rows)),
        busy=busy_sentence(_decided_runs(store)),
        warnings=_warnings(store),
    )


def _kept_changes(rows: list[Row], sigma: float, domain: Domain, store: Store | None = None) -> list[Kept]:
    """The champions, one after the other. One that was measured again counts once, one that came back counts twice."""
    descriptions: dict[str, str] = {}
    champions: list[str] = []
    for row in rows:
        if row.status != "keep":
            continue
        descriptions.setdefault(row.commit, row.description)
        if row.commit not in champions[-1:]:
            champions.append(row.commit)
    if not champions:
        first = next(row for row in rows if row.status != "crash")
        champions.append(first.commit)
        descriptions[first.commit] = "none kept"
    kept = []
    before = None
    believed = believed_scores(rows)
    for commit in champions:
        description = descriptions[commit]
        scores = believed[commit]
        score = statistics.fmean(scores)
        gain = 0.0 if before is None else domain.gain(kept[-1].score, score)
        resolved = before is not None and is_resolved(before, scores, sigma, domain)
        steps, pace = _speed_of(store, commit)
        kept.append(Kept(commit, score, gain, resolved, description, steps, pace))
        before = scores
    return kept


def _speed_of(store: Store | None, commit: str) -> tuple[float | None, float | None]:
    """Steps and tokens a second of a commit's runs; None in a ledger without run folders."""
    if store is None:
        return None, None
    runs = [run for run in store.runs_of(store.full_commit(commit)) if run.is_scored]
    return mean_pace(store, runs)


def _decided_runs(store: Store | None) -> list[Run]:
    runs = store.read_runs() if store is not None else []
    return [run for run in runs if run.is_decided]


def busy_sentence(runs: list[Run]) -> str:
    """How busy others kept the machine, in a sentence; "" where no record says it."""
    shares = [run.busy_others for run in runs if run.busy_others is not None]
    if not shares:
        return ""
    much = sum(share > BUSY_SHARE for share in shares)
    text = f"Others used {statistics.median(shares):.0%} of the processors in the median run"
    if not much:
        return f"{text}, and over {BUSY_SHARE:.0%} in none of {len(shares):,} runs."
    return f"{text}, and over {BUSY_SHARE:.0%} in {much:,} of {len(shares):,} runs: those scores are weak."


def kept_sentence(kept: list[Kept]) -> str:
    """How many changes were kept, in a sentence. The first of `kept` is the baseline."""
    changes = len(kept) - 1
    if not changes:
        return "Nothing was kept yet."
    resolved = sum(change.resolved for change in kept)
    were = "1 change was" if changes == 1 else f"{changes:,} changes were"
    return f"{were} kept, {resolved:,} of them resolved."


def gain_words(first: float, best: float, domain: Domain) -> str:
    """What all kept changes together gained on the baseline; a loss is called one, not a negative gain."""
    gain = domain.gain(first, best)
    amount = f"{abs(gain):.6f} {domain.unit} ({abs(gain) / (abs(first) or 1):.2%})"
    return f"worse than the baseline by {amount}" if gain < 0 else f"gain {amount}"


def _warnings(store: Store | None) -> list[str]:
    """Rows that no record of a run bears out, and the marks of kept runs, newest first."""
    if store is None:
        return []
    warnings = false_rows(store)
    for run in reversed(store.read_runs()):
        if run.decision == "keep":
            warnings += [f"run {run.number:04d}: {mark}" for mark in run.marks]
    return warnings


def print_findings(findings: Findings, domain: Domain) -> None:
    rows = findings.rows
    counts = []
    for status in ("keep", "discard", "crash"):
        count = sum(row.status == status for row in rows)
        counts.append(f"{count} {status} ({count / len(rows):.0%})")
    print(f"{len(rows)} rows: {', '.join(counts)}")
    if findings.pace:
        print(findings.pace)
    first = findings.kept[0]
    best = findings.kept[-1]
    gain = gain_words(first.score, best.score, domain)
    print(f"best {best.score:.6f} ({best.commit}), baseline {first.score:.6f}, {gain}")
    print(kept_sentence(findings.kept))
    print()
    speeds = speed_columns([(change.steps, change.pace) for change in findings.kept], domain)
    print(f"{'kept':8} {domain.metric:>8} {'gain':>9}  {'':12}{speeds[0]} description")
    print(f"{first.commit:8} {first.score:8.6f} {'':9}  {'':12}{speeds[1]} {first.description}")
    for change, speed in zip(findings.kept[1:], speeds[2:], strict=True):
        word = "resolved" if change.resolved else "within noise"
        print(f"{change.commit:8} {change.score:8.6f} {change.gain:9.6f}  {word:12}{speed} {change.description}")
    print()
    print(f"noise of one run: {findings.sigma:.6f} {domain.unit} ({findings.sigma_source})")
    print("resolved: the gain is over 2 standard errors")
    if findings.has_simpler:
        limit = findings.given_away_limit
        print(f"given away for simplicity: {findings.given_away:.6f} of at most {limit:.6f} {domain.unit}")
    if findings.spent:
        print(findings.spent)
    if findings.busy:
        print(findings.busy)
    for warning in findings.warnings[:SHOWN_MARKS]:
        print(f"mark: {warning}")
    more = len(findings.warnings) - SHOWN_MARKS
    if more > 0:
        print(f"and {more:,} more: report.html lists them")


def speed_columns(speeds: list[tuple[float | None, float | None]], domain: Domain) -> list[str]:
    """Steps and tokens a second as columns of a table, the heading first; "" for each where nothing is known."""
    headings = ("steps", f"{unit_of(domain)}/s")
    lines = [""] * (len(speeds) + 1)
    for column, heading in enumerate(headings):
        values = [speed[column] for speed in speeds]
        if all(value is None for value in values) or (column == 1 and not domain.batch_pattern):
            continue
        cells = [heading, *("-" if value is None else f"{value:,.0f}" for value in values)]
        width = max(map(len, cells))
        lines = [f"{line} {cell:>{width}}" for line, cell in zip(lines, cells, strict=True)]
    return [f"{line} " if line else "" for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# audit

ROUNDING = {"cpu": 1e-5}  # relative difference of the two scores that rounding may make, by device
ROUNDING_ELSEWHERE = 2e-3  # other kernels, and bfloat16


@dataclass(frozen=True)
class Audited:
    """One run of an audit."""

    name: str  # "baseline 1234567"
    score: float
    test_score: float
    clean_score: float | None  # of the exported network, by the judge in a process of its own
    clean_test_score: float | None
    problem: str  # why there are no clean scores
    was_refused: bool  # there is an exported network, and the clean process gave it no scores
    believed: float | None  # score of its commit by the ledger; None: it has none
    device: str
    steps: float | None = None  # as the run says
    pace: float | None = None  # tokens a second, as the run says


def audit_text(audited: list[Audited], domain: Domain) -> str:
    """Both splits, mean and deviation over the seeds, in the run's process and in the clean one, beside the ledger.

    The gain is that of the clean process, where every run has its scores.
    """
    names = list(dict.fromkeys(run.name for run in audited))
    replicates = sum(run.name == names[0] for run in audited)
    headings = f"{'validation ' + domain.unit:>21} {'sealed test ' + domain.unit:>21}"
    seeds = "1 fresh seed" if replicates == 1 else f"{replicates} fresh seeds"
    speeds = speed_columns([_mean_speed([run for run in audited if run.name == name]) for name in names], domain)
    lines = [f"{'':27} {headings}{speeds[0]}   ({seeds} each)"]
    means = {}
    has_clean_scores = all(run.clean_score is not None for run in audited)
    for name, speed in zip(names, speeds[1:], strict=True):
        runs = [run for run in audited if run.name == name]
        columns = ([run.score for run in runs], [run.test_score for run in runs])
        lines.append(f"{name:27} {_cells(columns)}{speed}".rstrip())
        clean = [run for run in runs if run.clean_score is not None]
        if clean:
            clean_columns = ([run.clean_score for run in clean], [run.clean_test_score for run in clean])
            lines.append(f"{'  in a clean process':27} {_cells(clean_columns)}")
            if has_clean_scores:
                columns = clean_columns
        means[name] = [statistics.fmean(column) for column in columns]
        for problem in dict.fromkeys(run.problem for run in runs if run.problem):
            count = sum(run.problem == problem for run in runs)
            lines.append(f"{'  not in a clean process':27} {problem} ({count} of {len(runs)})")
        if runs[0].believed is not None:
            lines.append(f"{'  believed in the ledger':27} {runs[0].believed:>21.6f}")
    if len(names) > 1:
        before, after = means.values()
        gains = [domain.gain(old, new) for old, new in zip(before, after, strict=True)]
        lines.append(f"{'gain':27} {gains[0]:>21.6f} {gains[1]:>21.6f}")
    else:
        lines.append("nothing was kept: the baseline is the champion")
    return "\n".join(lines)


def _mean_speed(runs: list[Audited]) -> tuple[float | None, float | None]:
    return mean_of_known([run.steps for run in runs]), mean_of_known([run.pace for run in runs])


def _cells(columns: tuple[list[float], list[float]]) -> str:
    cells = []
    for scores in columns:
        text = f"{statistics.fmean(scores):.6f}"
        if len(scores) > 1 and all(map(math.isfinite, scores)):
            text += f" ± {statistics.stdev(scores):.6f}"
        cells.append(f"{text:>21}")
    return " ".join(cells)


def find_doubts(audited: list[Audited]) -> list[str]:
    """The runs whose own score the clean process did not bear out, a line each."""
    doubts = []
    for run in audited:
        if run.was_refused:
            why = f"the clean process refused its network ({run.problem})"
            doubts.append(f"{run.name}: {why}: do not believe its score")
        if run.clean_score is None:
            continue
        tolerance = ROUNDING.get(run.device, ROUNDING_ELSEWHERE)
        pairs = ((run.score, run.clean_score), (run.test_score, run.clean_test_score))
        if not all(abs(of_run - of_network) <= tolerance * abs(of_network) for of_run, of_network in pairs):  # NaN too
            own = f"{run.score:.6f} and {run.test_score:.6f} in its own process"
            clean = f"{run.clean_score:.6f} and {run.clean_test_score:.6f} in a clean one"
            doubts.append(f"{run.name} scored {own}, {clean}: believe neither")
    return doubts
