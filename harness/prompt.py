"""What an agent is told: the human's instructions, then what only the loop knows. Pure text from plain data."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

from harness.contract import Domain
from harness.desk import DESCRIPTION_FILE
from harness.ledger import Row, believed_scores, best_estimate
from harness.screen import one_line

LAST_ROWS = 20
NEAR_MISSES = 10  # lowest discards
KEPT = 30  # newest kept changes
DEAD_ENDS = 15  # newest of them
DEAD_END_SIGMAS = 3  # a loss that two single runs tell from chance
UNSETTLED = 5  # newest crashes, and discards that say little
PLATEAU = 15  # experiments without a keep


@dataclass(frozen=True)
class Background:
    """What the loop knows beyond the rows of the ledger."""

    sigma: float  # noise of one run, in the unit of the score
    busy: set[str]  # commits (7 characters) that were discarded on a busy machine, every run of them
    merged: set[str]  # commits that gained on a former champion, and were run again on a later one
    verdicts: list[str]  # the latest experiments beside their bases, a table each


def standing(rows: list[Row], domain: Domain) -> str:
    """Where a run stands, in one line: the best so far, and how many rows it took."""
    scored = [row for row in rows if row.status != "crash"]
    if not scored:
        return "No run yet: the baseline comes first."
    kept = [row for row in rows if row.status == "keep"] or scored[:1]
    best = best_estimate(rows, kept[-1].commit)
    baseline = best_estimate(rows, rows[0].commit)
    counts = []
    for status in ("keep", "discard", "crash"):
        counts.append(f"{sum(row.status == status for row in rows)} {status}")
    change = "" if baseline is None else f", {best - baseline:+.6f} to the baseline"
    return f"Best {domain.metric} {best:.6f} ({kept[-1].commit}){change}; rows: {', '.join(counts)}."


def write_prompt(
    instructions: str,
    rows: list[Row],
    background: Background,
    running: Iterable[str],
    refusal: str,
    task: str,
    domain: Domain,
) -> str:
    """The whole prompt. `task` is what this proposal starts from beyond the champion, `refusal` why the last failed."""
    parts = [instructions.rstrip(), "---", "# This experiment"]
    parts.append(f"loop.py calls you for one proposal. {standing(rows, domain)}")
    parts.append("The ledger's last rows:\n\n" + domain.columns + "".join(map(str, rows[-LAST_ROWS:])).rstrip())
    parts += memory(rows, background, domain)
    if background.verdicts:
        tables = "\n\n".join(background.verdicts)
        parts.append(f"The latest verdicts, each run beside its base (why did it win or lose?):\n\n{tables}")
    running = list(running)
    if running:
        listed = "\n".join(f"- {one_line(description)}" for description in running)
        parts.append(f"Running or waiting now, the verdict unknown (propose something else):\n\n{listed}")
    if refusal:
        parts.append(f"The last proposal was refused: {refusal}")
    if task:
        parts.append(task)
    parts.append(
        f"Now: edit {domain.editable} once, one idea. Write one line that describes it to {DESCRIPTION_FILE}. "
        "Do not train, do not commit, touch no other file. Then stop."
    )
    return "\n\n".join(parts) + "\n"


def memory(rows: list[Row], background: Background, domain: Domain) -> list[str]:
    """What was kept, what was nearly kept, what led nowhere, and whether the neighbourhood is exhausted.

    An experiment counts once, however often it ran, with the score that is believed of it.
    """
    experiments = _experiments(rows)
    kept = [row for row in experiments if row.status == "keep"]
    discarded = [row for row in experiments if row.status == "discard"]
    near = sorted(discarded, key=_score, reverse=not domain.lower_is_better)[:NEAR_MISSES]
    dead = []
    for row, difference in _clear_losses(rows, experiments, background, domain):
        if row not in near:
            dead.append(f"{difference:+.6f} to the best of then: {row.description}")
    unsettled = []
    for row in experiments:
        if row.status == "crash":
            unsettled.append(f"it crashed: {row.description}")
        elif row.status == "discard" and row.commit in background.busy:
            unsettled.append(f"the machine was busy: {row.description}")

    parts = []
    kept_lines = [str(row).rstrip() for row in kept[-KEPT:]]
    near_lines = [str(row).rstrip() for row in near]
    sections = (
        ("Kept so far:", kept_lines, ""),
        ("Near misses, the best of what was discarded (two may go together):", near_lines, ""),
        ("Dead ends, clearly worse (try something else):", dead[-DEAD_ENDS:], "- "),
        ("Not settled, and no dead ends (a mended or changed form may work):", unsettled[-UNSETTLED:], "- "),
    )
    for title, lines, bullet in sections:
        if lines:
            parts.append(f"{title}\n\n" + "\n".join(f"{bullet}{line}" for line in lines))
    since_keep = _settled_since_keep(rows, background)
    if since_keep >= PLATEAU:
        parts.append(
            f"Nothing was kept in the last {since_keep} experiments: leave this neighbourhood, try something else."
        )
    return parts


def _experiments(rows: list[Row]) -> list[Row]:
    """One row for each commit but the baseline's, in the order of their first runs; crash if no run gave a score."""
    believed = believed_scores(rows)
    status: dict[str, str] = {}
    for row in rows:
        if row.status == "keep" or status.get(row.commit, "crash") == "crash":
            status[row.commit] = row.status
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.commit, row)
    found = []
    for commit, row in first.items():
        if commit == rows[0].commit:
            continue
        score = statistics.fmean(believed[commit]) if commit in believed else 0.0
        found.append(replace(row, score=score, status=status[commit]))
    return found


def _clear_losses(
    rows: list[Row], experiments: list[Row], background: Background, domain: Domain
) -> list[tuple[Row, float]]:
    """Discards that lost clearly to the champion of their time, and the difference to its score."""
    believed = believed_scores(rows)
    champions: dict[str, str] = {}  # commit -> the champion when its first row was written
    champion = ""
    for row in rows:
        champions.setdefault(row.commit, champion)
        if row.status == "keep":
            champion = row.commit
    found = []
    for row in experiments:
        base = champions[row.commit]
        says_little = row.commit in background.busy or row.commit in background.merged
        if row.status != "discard" or says_little or base not in believed:
            continue
        base_score = statistics.fmean(believed[base])
        if domain.gain(row.score, base_score) > DEAD_END_SIGMAS * background.sigma:
            found.append((row, row.score - base_score))
    return found


def _settled_since_keep(rows: list[Row], background: Background) -> int:
    """How many experiments the present champion has outlasted, crashes and those that say little aside."""
    kept = [row.commit for row in rows if row.status == "keep"]
    begin = 0
    if kept:
        begin = next(number for number, row in enumerate(rows) if row.commit == kept[-1] and row.status == "keep")
    commits = {row.commit for row in rows[begin:] if row.status != "crash"}
    return len(commits - {*kept} - background.busy - background.merged)


def _score(row: Row) -> float:
    return row.score


def crash_task(editable: str, log_end: str) -> str:
    return (
        f"{editable} now holds an experiment that crashed: mend it, or restore it and try another idea. "
        f"The end of its log:\n\n{log_end}"
    )


def conflict_task(description: str, own_diff: str, champion_diff: str) -> str:
    return (
        f"The experiment '{description}' does not merge with the new champion. If it still makes sense, do it again "
        f"on the file as it is now. Its diff:\n\n{own_diff}\n\nWhat the champion changed meanwhile:\n\n{champion_diff}"
    )
