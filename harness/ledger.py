"""runs.jsonl, and all that follows from it: champion, believed scores, noise, standing. It runs and decides nothing.

runs.jsonl has a line for every run that was decided, with all that is known of it, appended and fsynced. results.tsv is
its rendering for people. `Ledger` answers every question about them.
sigma is the standard deviation of the score between seeds of one and the same code, in the unit of the score.
"""

import dataclasses
import functools
import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from harness.console import UserError, one_line
from harness.domain import Domain

BUSY = 0.1  # of the processors used by others: from here on a score says less
ASSUMED_DEGREES = 4  # of freedom that a profile's assumed sigma counts for: two or three runs measure sigma badly
STATUSES = ("keep", "discard", "crash")
MEASURED = ("audit", "ablation")  # purposes of runs that decide nothing, and are no lines of results.tsv
STALE = "gained on a former champion; runs again on the present one"


@dataclass(frozen=True)
class Run:
    """A line of runs.jsonl: one run, decided. Unknown keys of a line are left out, missing ones have the default."""

    number: int  # of its folder, never used twice
    commit: str
    base: str = ""  # the commit that it is compared with; "" for the baseline, runs of the champion, and MEASURED ones
    seed: int = 42
    purpose: str = "experiment"  # baseline, experiment, replicate (a commit once more), audit, ablation
    status: str = ""  # keep, discard, crash; pending (a gain that waits for approval); measured (a purpose of MEASURED)
    description: str = ""
    reason: str = ""  # why it crashed, or was discarded although it gained
    is_stale: bool = False  # it gained on a former champion, and is to run again on the present one
    is_refused: bool = False  # it gained, and was not approved
    again_of: int = 0  # the stale run whose edit runs again here
    group: str = ""  # which audit, ablation (after a "/" which side of it), confirmation, or the baseline's repeats
    fingerprint: str = ""  # of the edited file's syntax tree
    score: float | None = None
    test_score: float | None = None  # audit: on the held-out test split
    clean_score: float | None = None  # audit: of the exported network, in a process that runs none of its code
    clean_test_score: float | None = None
    problem: str = ""  # audit: why there are no clean scores
    memory_mb: float = 0.0  # MiB
    started_at: float = 0.0  # time.time()
    seconds: float = 0.0  # wall time of the whole run
    startup_seconds: float | None = None  # by the loop's clock, as the next two
    training_seconds: float | None = None
    evaluation_seconds: float | None = None
    steps: float | None = None
    tokens_per_second: float | None = None
    loss_half: float | None = None  # training loss at half of the budget, nats per token
    loss_end: float | None = None
    busy_others: float | None = None  # fraction of the processors that others used meanwhile
    is_isolated: bool = False
    node: str = ""  # on a cluster
    touched: tuple[str, ...] = ()  # other files that the agent changed: undone
    cost: dict = field(default_factory=dict)  # of the agent's calls since its last run: calls, tokens_in, ..., usd
    summary: dict[str, str] = field(default_factory=dict)  # what the run printed after `---`
    record: dict = field(default_factory=dict)  # the evaluator's
    packages: dict[str, str] = field(default_factory=dict)  # of the baseline: distribution -> version

    @property
    def is_decided(self) -> bool:
        """Not while it waits for an approval."""
        return self.status != "pending"

    @property
    def is_busy(self) -> bool:
        """Whether others used much of the machine meanwhile."""
        return self.busy_others is not None and self.busy_others > BUSY

    @property
    def counts(self) -> bool:
        """Whether its score is one of those by which commits are compared; one of MEASURED is not."""
        return self.score is not None and self.purpose in ("baseline", "experiment", "replicate")

    def row(self, domain: Domain) -> str:
        """Its line of results.tsv."""
        words = f"{self.reason}: {self.description}" if self.reason else self.description
        score = domain.score_text(self.score or 0.0)
        memory_gb = self.memory_mb / 1024
        return f"{self.commit[:7]}\t{score}\t{memory_gb:.1f}\t{self.status}\t{one_line(words, 300)}\n"


@dataclass(frozen=True)
class Noise:
    """sigma, and where the figure comes from. None: nothing is known of it."""

    sigma: float | None
    source: str


@dataclass(frozen=True)
class Change:
    """A kept change, beside the champion before it."""

    run: Run  # the first of its runs
    score: float  # that is believed
    gain: float
    standard_error: float | None
    is_in_branch: bool  # False: a later verdict went back to a champion before it

    @property
    def is_significant(self) -> bool:
        return self.standard_error is not None and self.gain > 2 * self.standard_error


class Ledger:
    """The decided runs of one tag, in the order of their decisions. It never changes: a verdict makes a new one."""

    def __init__(self, domain: Domain, runs: Iterable[Run] = (), profile: str = ""):
        self.domain = domain
        self._profile = profile  # of a results.tsv, which does not say it
        self._by_number: dict[int, Run] = {}
        for run in runs:  # one whose number is known already (it waited for approval) takes the earlier line's place
            self._by_number.pop(run.number, None)
            self._by_number[run.number] = run
        self.runs = list(self._by_number.values())
        deciding = [run for run in self.runs if run.purpose not in MEASURED and run.is_decided]
        self._kept = [run for run in deciding if run.status == "keep"]
        self._of_commit: dict[str, list[Run]] = {}
        for run in sorted(deciding, key=lambda run: run.number):  # what waited is decided after its fresh runs
            self._of_commit.setdefault(run.commit, []).append(run)

    # What was run

    def __getitem__(self, number: int) -> Run:
        """The run of this number; KeyError if there is none."""
        return self._by_number[number]

    def __contains__(self, number: int) -> bool:
        return number in self._by_number

    @property
    def rows(self) -> list[Run]:
        """The runs that are lines of results.tsv."""
        return [run for run in self.runs if run.status in STATUSES and run.purpose not in MEASURED]

    @property
    def profile(self) -> str:
        return self._profile or (self.runs[0].record.get("profile", "") if self.runs else "")

    @property
    def baseline(self) -> str:
        """The first kept commit, "" before there is one."""
        return self._kept[0].commit if self._kept else ""

    @property
    def champion(self) -> str:
        """The commit of the last `keep`, "" before there is one."""
        return self._kept[-1].commit if self._kept else ""

    @property
    def baseline_run(self) -> Run | None:
        """The baseline's first run: profile, device, digest and packages of every later run must be as in it."""
        return self._kept[0] if self._kept else None

    def runs_of(self, commit: str) -> list[Run]:
        """The runs of a commit whose scores count."""
        return [run for run in self._of_commit.get(commit, []) if run.counts]

    def first_run_of(self, commit: str) -> Run | None:
        """The experiment that made a commit."""
        return next(iter(self._of_commit.get(commit, [])), None)

    def find_repeat(self, fingerprint: str) -> Run | None:
        """The first run with the same syntax tree."""
        return next((run for run in self.runs if run.fingerprint == fingerprint), None)

    def last_group(self, purpose: str) -> str:
        """The newest audit or ablation, "" before there is one."""
        groups = [run.group.partition("/")[0] for run in self.runs if run.purpose == purpose]
        return groups[-1] if groups else ""

    def stale_gains(self) -> list[Run]:
        """Gains on former champions that a loop which was stopped has not run again."""
        again = {run.again_of for run in self.runs}
        return [run for run in self.runs if run.is_stale and not run.group and run.number not in again]

    def pending(self) -> list[Run]:
        """Gains that wait for an approval, each by its first run."""
        return [run for run in self.runs if not (run.is_decided or run.group)]

    # What is believed

    def scores(self, commit: str) -> list[float]:
        """Every score of a commit that counts, in order."""
        return [run.score for run in self.runs_of(commit)]

    def believed_scores(self, commit: str) -> list[float]:
        """The scores by which a commit is compared: all of the baseline's; of another all but the first, if it ran
        more than once.

        The first score chose the commit to be run again, because it was good, or bad on a busy machine. Later ones did
        not, and all of these count: running a commit until one score is lucky does not help.
        """
        scores = self.scores(commit)
        is_selected = commit != self.baseline and len(scores) > 1
        return scores[1:] if is_selected else scores

    def believed(self, commit: str) -> float | None:
        """The mean of the believed scores."""
        scores = self.believed_scores(commit)
        return statistics.fmean(scores) if scores else None

    @property
    def best(self) -> float | None:
        """The champion's believed score."""
        return self.believed(self.champion)

    def _repeats(self, with_busy: bool) -> list[list[float]]:
        """The scores of every commit that ran more than once, runs of MEASURED too."""
        of_commit: dict[str, list[float]] = {}
        for run in self.runs:
            if run.score is not None and run.is_decided and (with_busy or not run.is_busy):
                of_commit.setdefault(run.commit, []).append(run.score)
        return [scores for scores in of_commit.values() if len(scores) > 1]

    @functools.cached_property
    def noise(self) -> Noise:
        """sigma from all repeats, pooled with what is assumed of the profile. A busy machine adds to it: runs on one do
        not count where others ran twice."""
        repeated = self._repeats(with_busy=False) or self._repeats(with_busy=True)
        degrees = sum(len(scores) - 1 for scores in repeated)
        squares = sum(statistics.variance(scores) * (len(scores) - 1) for scores in repeated)
        assumed = self.domain.assumed_sigma.get(self.profile)
        if assumed is None and degrees == 0:
            return Noise(None, "unknown: nothing ran twice here ('uv run loop.py try --base' runs the best once more)")
        if degrees == 0:
            return Noise(assumed, f"as measured before for {self.profile}; nothing ran twice here")
        measured = f"{degrees} repeat{'s' if degrees > 1 else ''} of commits here"
        if assumed is None:
            return Noise(math.sqrt(squares / degrees), f"from {measured}")
        pooled = math.sqrt((squares + ASSUMED_DEGREES * assumed**2) / (degrees + ASSUMED_DEGREES))
        return Noise(pooled, f"from {measured}, pooled with {assumed:g} as measured before for {self.profile}")

    @property
    def sigma(self) -> float | None:
        return self.noise.sigma

    def difference(self, before: list[float], after: list[float]) -> tuple[float | None, float | None]:
        """By how much the mean of `after` is better, and the standard error of that; None where it is not known."""
        if not before or not after:
            return None, None
        gain = self.domain.gain(statistics.fmean(before), statistics.fmean(after))
        sigma = self.sigma
        return gain, None if sigma is None else sigma * math.sqrt(1 / len(before) + 1 / len(after))

    # What was kept

    def lineage(self) -> list[str]:
        """The commits of the branch: the baseline, the kept changes that the champion stands on, the champion."""
        commits = []
        commit = self.champion
        while commit and commit not in commits:
            commits.append(commit)
            run = self.first_run_of(commit)
            commit = run.base if run else ""
        return commits[::-1]

    def changes(self) -> list[Change]:
        """Every kept change, in order; a commit that was kept again counts once."""
        branch = set(self.lineage())
        found = []
        seen = {self.baseline}
        before = self.baseline
        for kept in self._kept:
            run = self.first_run_of(kept.commit)
            if kept.commit not in seen:
                seen.add(kept.commit)
                base = run.base or before
                gain, error = self.difference(self.believed_scores(base), self.believed_scores(kept.commit))
                found.append(Change(run, self.believed(kept.commit), gain, error, kept.commit in branch))
            before = kept.commit
        return found

    def better_former(self) -> str:
        """The former champion that is believed better than the present one, the best of them; "" if none is."""
        best = self.champion
        for commit in {run.commit for run in self._kept}:
            if self.domain.gain(self.believed(best), self.believed(commit)) > 0:
                best = commit
        return "" if best == self.champion else best

    def given_away(self) -> float:
        """What the kept simplifications cost so far, in the unit of the score."""
        changes = [change for change in self.changes() if wants_simpler(change.run.description)]
        return sum(max(0.0, -change.gain) for change in changes)

    # In one line

    def standing(self) -> str:
        """`Best val_bpb 1.354 (abc1234), 0.348 better than the baseline; 37 runs, 14 changes in the branch, ...`."""
        if not self._kept:
            return "No run yet: the baseline comes first."
        best = self.best
        gain = self.domain.gain(self.believed(self.baseline), best)
        against = f", {self.domain.score_text(abs(gain))} {'better' if gain >= 0 else 'worse'} than the baseline"
        in_branch = len(self.lineage()) - 1
        rows = self.rows
        crashes = sum(run.status == "crash" for run in rows)
        changes = f"{in_branch} change{'' if in_branch == 1 else 's'} in the branch"
        return (
            f"Best {self.domain.metric} {self.domain.score_text(best)} ({self.champion[:7]})"
            f"{against if in_branch else ''}; {len(rows)} runs, {changes}, {crashes} crashed."
        )


def wants_simpler(description: str) -> bool:
    """Whether a description asks for the other rule: less code at a score within the noise."""
    return description.lower().startswith("simplify:")


# ---------------------------------------------------------------------------------------------------------------------
# The rules


def is_simpler_keep(ledger: Ledger, loss: float) -> bool:
    """Whether a candidate with less code may stay: it loses no more than one sigma, and all such keeps together no
    more than two. `loss`: how much worse it is; where sigma is unknown, it must not be worse."""
    if loss <= 0:
        return True
    sigma = ledger.sigma
    return sigma is not None and loss <= sigma and ledger.given_away() + loss <= 2 * sigma


def broken_floor(run: Run, domain: Domain) -> str:
    """The first number of the record below its floor, "" if none is."""
    for key, least in domain.floors.items():
        value = run.record.get("floors", {}).get(key)
        if not isinstance(value, int | float) or not value >= least:  # NaN too
            return f"{key} {value} is below its floor {least:g}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_runs(path: Path) -> list[Run]:
    """The lines of runs.jsonl, but for a torn last one. UserError for a line in the middle that is none."""
    if not path.exists():
        return []
    runs = []
    for number, line in enumerate(_whole_lines(path.read_bytes()).splitlines(), 1):
        try:
            runs.append(_run_from(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}:{number} is not a run ({error}): mend or delete that line") from error
    return runs


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def cut_torn_line(path: Path) -> None:
    """Cut off what a loop that was killed had begun to append. Only for the holder of the tag's lock."""
    if path.exists():
        data = path.read_bytes()
        if data != _whole_lines(data):
            os.truncate(path, len(_whole_lines(data)))


_FIELDS = {entry.name for entry in dataclasses.fields(Run)}


def _run_from(values: dict) -> Run:
    known = {key: value for key, value in values.items() if key in _FIELDS}
    known["touched"] = tuple(known.get("touched", ()))
    return Run(**known)


def append_runs(path: Path, runs: Iterable[Run]) -> None:
    """Append their lines at once, durably: after this call they are decided, whatever is killed."""
    lines = b""
    for run in runs:
        values = dataclasses.asdict(run).items()
        told = {key: value for key, value in values if value is not False and value not in (None, "", (), {})}
        lines += json.dumps(told).encode() + b"\n"
    with open(path, "ab") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def render(ledger: Ledger) -> str:
    """results.tsv."""
    return ledger.domain.columns + "".join(run.row(ledger.domain) for run in ledger.rows)


def parse_tsv(text: str, domain: Domain, profile: str) -> tuple[Ledger, int]:
    """The ledger of any five-column results.tsv, and the number of lines that are none. Forgiving: a hand may have
    written them, or the original's agent. A row's base is the last kept row before it. `profile`: whose sigma is
    assumed."""
    runs = []
    bad = 0
    champion = ""
    seen = set()
    for line in filter(str.strip, text.splitlines()):
        cells = line.split("\t", 4) if line.count("\t") > 2 else line.split(None, 4)
        try:
            commit, score, memory_gb, status = cells[0].strip(), float(cells[1]), float(cells[2]), cells[3].strip()
        except (ValueError, IndexError):
            bad += cells[0].strip().lower() != "commit"
            continue
        status = status.lower()
        if not math.isfinite(score) or status not in STATUSES:
            bad += 1
            continue
        purpose = "replicate" if commit in seen else "experiment" if champion else "baseline"
        run = Run(
            number=len(runs) + 1,
            commit=commit,
            base=champion if purpose == "experiment" else "",
            purpose=purpose,
            status=status,
            description="".join(cells[4:]).strip(),
            score=None if status == "crash" else score,
            memory_mb=1024 * memory_gb,
        )
        runs.append(run)
        seen.add(commit)
        if status == "keep":
            champion = commit
    return Ledger(domain, runs, profile), bad
