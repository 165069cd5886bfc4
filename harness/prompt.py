"""What an agent is told: the human's instructions, then what only the loop knows. Pure text from plain data."""

from collections.abc import Iterable

from harness.contract import Domain
from harness.desk import DESCRIPTION_FILE
from harness.ledger import Row, best_estimate
from harness.screen import one_line

LAST_ROWS = 20
NEAR_MISSES = 10  # lowest discards
KEPT_ROWS = 30  # newest keeps
PLATEAU = 15  # experiments without a keep


def summary(rows: list[Row], domain: Domain) -> str:
    """Best so far and what it took, in one line."""
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
    instructions: str, rows: list[Row], running: Iterable[str], refusal: str, task: str, domain: Domain
) -> str:
    """The whole prompt. `task` is what this proposal starts from beyond the champion, `refusal` why the last failed."""
    parts = [instructions.rstrip(), "---", "# This experiment"]
    parts.append(f"loop.py calls you for one proposal. {summary(rows, domain)}")
    parts.append("The ledger's last rows:\n\n" + domain.columns + "".join(map(str, rows[-LAST_ROWS:])).rstrip())
    parts += _memory(rows, domain)
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


def _memory(rows: list[Row], domain: Domain) -> list[str]:
    """What was kept, what nearly was, and whether the neighbourhood is exhausted."""
    parts = []
    kept = [row for row in rows if row.status == "keep"][1:]
    if kept:
        listed = "".join(map(str, kept[-KEPT_ROWS:])).rstrip()
        parts.append(f"Kept so far:\n\n{listed}")
    discarded = [row for row in rows if row.status == "discard"]
    discarded.sort(key=lambda row: row.score, reverse=not domain.lower_is_better)
    if discarded:
        listed = "".join(map(str, discarded[:NEAR_MISSES])).rstrip()
        parts.append(f"Near misses, the best of what was discarded (two may go together):\n\n{listed}")
    since_keep = 0
    for row in reversed(rows):
        if row.status == "keep":
            break
        since_keep += 1
    if since_keep >= PLATEAU:
        parts.append(f"Nothing was kept in the last {since_keep} runs: leave this neighbourhood, try something else.")
    return parts


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
