"""What an agent is told: the human's instructions, then what only the loop knows. Pure text; it reaches no agent here.

Everything is cut to a number of lines, whatever the ledger's length.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from harness.agents import DESCRIPTION_FILE
from harness.console import one_line
from harness.domain import Domain
from harness.ledger import Ledger, Run

LAST_ROWS = 20
KEPT = 30  # newest kept changes
NEAR_MISSES = 10  # best discards
DEAD_ENDS = 15  # newest of them
DEAD_END_SIGMAS = 3  # a loss that two single runs tell from chance
UNSETTLED = 5  # newest crashes, and discards on a busy machine
PLATEAU = 15  # experiments without a keep
SECOND_LOOKS = 3  # discards on former champions that are worth another look
SECOND_LOOK_EVERY = 20  # experiments, and after a large keep
LARGE_KEEP_SIGMAS = 3
LOOKED_THROUGH = 50  # nearest discards whose lines are compared: a comparison takes milliseconds
RUNNING = 50  # newest
TASK_CHARS = 20_000  # of a crash's log, of a diff


def write_prompt(
    instructions: str,
    ledger: Ledger,
    running: list[str],
    verdicts: list[str],
    refusal: str,
    crash_log: str,
    suggestions: Iterable[str],
    read: Callable[[str], bytes],
) -> str:
    """The whole prompt. `refusal` is why the last proposal was no experiment, `crash_log` the end of the log of the
    crash that is to be mended, `suggestions` are TPE's; `read` gives the editable file of a commit."""
    domain = ledger.domain
    rows = "".join([domain.columns, *[run.row(domain) for run in ledger.rows[-LAST_ROWS:]]]).rstrip()
    parts = [
        instructions.rstrip(),
        "---",
        "# This experiment",
        f"loop.py calls you for one proposal. {ledger.standing()}",
        f"The ledger's last rows (results.tsv has all, runs/ the newest logs and diffs):\n\n{rows}",
        *memory(ledger),
    ]
    if looks := second_looks(ledger, read):
        title = (
            "Worth another look on the present champion: of what was discarded on former ones the nearest, in lines "
            "that the champion has not changed since (runs/ or git show has the diff):"
        )
        parts.append(f"{title}\n\n{''.join(_bullets(looks)).rstrip()}")
    if suggestions:
        ideas = "by chance before ten runs have scores; take one, a part of one, or your own idea"
        title = f"TPE, told all runs, would change {domain.editable} so ({ideas}):"
        parts.append(f"{title}\n\n{''.join(_bullets(suggestions)).rstrip()}")
    if verdicts:
        tables = "\n\n".join(text[:TASK_CHARS] for text in verdicts)
        parts.append(f"The latest verdicts, each run beside its base (why did it win or lose?):\n\n{tables}")
    if running:
        words = "".join(_bullets(one_line(description) for description in running[-RUNNING:])).rstrip()
        parts.append(f"Running or waiting now, the verdict unknown (propose something else):\n\n{words}")
    if refusal:
        parts.append(f"The last proposal was no experiment: {one_line(refusal, 500)}")
    if crash_log:
        task = (
            f"{domain.editable} now holds an experiment that crashed: mend it, or restore it and try another idea. "
            "Describe the whole change, not the mend."
        )
        parts.append(f"{task} The end of its log:\n\n{crash_log[-TASK_CHARS:]}")
    parts.append(
        f"Now: edit {domain.editable} once, one idea. Write one line that describes it to {DESCRIPTION_FILE}. "
        "Do not train, do not commit, touch no other file, install nothing. Then stop."
    )
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Experiment:
    """One commit, however often it ran."""

    run: Run  # the first of those that decided its status
    status: str  # keep if it ever was, else discard, else crash
    score: float | None  # that is believed
    loss: float | None  # by which it is believed worse than its base; None where one of them is not known
    is_busy: bool  # others used the machine during all of its runs

    def row(self, domain: Domain) -> str:
        return replace(self.run, score=self.score).row(domain)


def memory(ledger: Ledger) -> list[str]:
    """What was kept, what was nearly kept, what led nowhere, and whether the neighbourhood is exhausted."""
    domain = ledger.domain
    experiments = _experiments(ledger)
    kept = [one for one in experiments if one.status == "keep"]
    discarded = [one for one in experiments if one.status == "discard" and one.score is not None]
    near = sorted(discarded, key=lambda one: one.score, reverse=not domain.lower_is_better)[:NEAR_MISSES]
    dead = []
    for one in discarded:
        is_clear = None not in (ledger.sigma, one.loss) and one.loss > DEAD_END_SIGMAS * ledger.sigma
        if is_clear and not one.is_busy and one not in near:
            dead.append(f"{_words(one.run)}: {_beside_base(ledger, one)}")
    unsettled = []
    for one in experiments:
        if one.status == "crash":
            unsettled.append(f"it crashed: {': '.join(filter(None, (one.run.reason, one.run.description)))}")
        elif one.status == "discard" and one.is_busy:
            unsettled.append(f"the machine was busy: {one.run.description}")
    sections = (
        ("Kept so far:", [one.row(domain) for one in kept[-KEPT:]]),
        ("Near misses, the best of what was discarded (two may go together):", [one.row(domain) for one in near]),
        (
            "Dead ends, clearly worse than the best of their time (try something else; a champion that has changed "
            "since in what they depend on may reopen one):",
            _bullets(dead[-DEAD_ENDS:]),
        ),
        ("Not settled, and no dead ends (a mended or changed form may work):", _bullets(unsettled[-UNSETTLED:])),
    )
    parts = [f"{title}\n\n{''.join(lines).rstrip()}" for title, lines in sections if lines]
    since_keep = _settled_since_keep(ledger, experiments)
    if since_keep >= PLATEAU:
        parts.append(
            f"Nothing was kept in the last {since_keep} experiments: leave this neighbourhood, try something else."
        )
    return parts


def _experiments(ledger: Ledger) -> list[Experiment]:
    """In the order of their first runs; without the baseline, and gains on a former champion, which ran again."""
    by_commit: dict[str, list[Run]] = {}
    for run in ledger.rows:
        if run.commit != ledger.baseline and not run.is_stale:
            by_commit.setdefault(run.commit, []).append(run)
    found = []
    for commit, runs in by_commit.items():
        statuses = {run.status for run in runs}
        status = next(status for status in ("keep", "discard", "crash") if status in statuses)
        decisive = [run for run in runs if run.status == status]
        first = min(decisive, key=lambda run: run.number)
        score = ledger.believed(commit)
        base_score = ledger.believed(first.base)
        loss = None if None in (score, base_score) else ledger.domain.gain(score, base_score)
        found.append(Experiment(first, status, score, loss, all(run.is_busy for run in decisive)))
    return found


def second_looks(ledger: Ledger, read: Callable[[str], bytes]) -> list[str]:
    """The discards that the present champion makes most worth another look: nearest to their base at their time, in
    lines that the champion has not changed since. [] but for every 20th experiment, and after a large keep."""
    experiments = _experiments(ledger)
    if len(experiments) % SECOND_LOOK_EVERY and not _is_large_keep(ledger, experiments[-1]):
        return []
    discarded = [one for one in experiments if one.status == "discard" and one.loss is not None]
    on_former = [one for one in discarded if one.run.base != ledger.champion]
    found: list[str] = []
    for one in sorted(on_former, key=lambda one: one.loss)[:LOOKED_THROUGH]:
        if len(found) == SECOND_LOOKS:
            break
        base = read(one.run.base)
        of_champion = changed_lines(base, read(ledger.champion))
        if changed_lines(base, read(one.run.commit)).isdisjoint(of_champion):
            found.append(f"{one.run.commit[:7]} {_words(one.run)}: {_beside_base(ledger, one)}")
    return found


def _is_large_keep(ledger: Ledger, one: Experiment) -> bool:
    """Whether an experiment made the present champion, by a gain that two single runs tell from chance."""
    if one.run.commit != ledger.champion or None in (ledger.sigma, one.loss):
        return False
    return -one.loss > LARGE_KEEP_SIGMAS * ledger.sigma


def _beside_base(ledger: Ledger, one: Experiment) -> str:
    """`0.012000 worse than abc1234 (a deeper model)`."""
    base = ledger.first_run_of(one.run.base)
    how = "worse" if one.loss >= 0 else "better"
    return f"{ledger.domain.score_text(abs(one.loss))} {how} than {base.commit[:7]} ({one_line(base.description, 60)})"


def changed_lines(old: bytes, new: bytes) -> set[int]:
    """The old file's lines that the new one changes; of what it inserts, the line before which that stands."""
    matcher = difflib.SequenceMatcher(None, old.splitlines(), new.splitlines(), autojunk=False)
    changed: set[int] = set()
    for kind, begin, end, _, _ in matcher.get_opcodes():
        if kind != "equal":
            changed.update(range(begin, max(end, begin + 1)))
    return changed


def _settled_since_keep(ledger: Ledger, experiments: list[Experiment]) -> int:
    """How many experiments the present champion has outlasted, crashes and those that say little aside."""
    champion = ledger.first_run_of(ledger.champion)
    since = champion.number if champion else 0
    return sum(one.status == "discard" and one.run.number > since and not one.is_busy for one in experiments)


def _words(run: Run) -> str:
    return f"{run.reason}: {run.description}" if run.reason else run.description


def _bullets(lines: Iterable[str]) -> list[str]:
    return [f"- {one_line(line, 400)}\n" for line in lines]
