"""One tag's folder, <git common dir>/autoresearch/<tag>/, where no reset or clean of an agent reaches.

    results.tsv        the ledger
    runs/NNNN/         a run: run.json, run.log, change.diff, result.json; a row's run, its ref, its commit's message
                       and its live line carry the same number
    timeline.jsonl     what happened when: from it `status` tells where a run stands, and how busy the devices were
    packages.json      the installed packages as they were when the tag began
    data.json          samples of the training data as it was then
    desks/             the agents' worktrees, where there is more than one worker
    bench/             folders of runs in flight

Ledger, refs and run.json are the whole state: kill the loop anywhere and start it again. Only one thread writes here:
the deciding one of the process that holds the tag's lock.
"""

import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harness.contract import Domain
from harness.costs import Cost
from harness.files import is_locked, open_regular, open_to_append, read_text, take_lock, write_atomically
from harness.ledger import Row, best_estimate, fresh_scores, parse_ledger, scores_by_commit
from harness.repository import Repository
from harness.screen import UserError, say

PROFILE_TRAILER = "Autoresearch-profile"
DIGEST_TRAILER = "Autoresearch-digest"


@dataclass(frozen=True)
class Run:
    """What run.json says. From `decision` on, fields are empty until the run has ended."""

    number: int
    commit: str
    base: str  # the commit that its edit changes; "" for the baseline
    seed: int
    description: str
    purpose: str  # baseline, experiment, repeat, second look, audit
    again_of: int = 0  # the run whose gain on a former champion is run again here
    decision: str = ""  # keep, discard, crash, audit; stale: a gain on a former champion
    score: float = 0.0
    memory_gb: float = 0.0
    seconds: float = 0.0  # wall time of the whole run
    startup_seconds: float | None = None
    training_seconds: float | None = None
    evaluation_seconds: float | None = None
    summary: dict[str, str] = field(default_factory=dict)
    marks: tuple[str, ...] = ()  # what makes the score weaker than it looks
    busy_others: float | None = None  # share of the processors that others used meanwhile, 0 to 1
    device_others: int | None = None  # other processes on the device

    @property
    def is_decided(self) -> bool:
        """Whether it has a verdict, and so a row; an audit's run never has."""
        return bool(self.decision) and self.purpose != "audit"

    @property
    def is_scored(self) -> bool:
        """Whether it gave a score that counts; an audit's does not."""
        return bool(self.score) and self.purpose != "audit"


class Store:
    """Loads a tag's state and appends to it. Reading changes nothing."""

    def __init__(self, repository: Repository, tag: str, domain: Domain):
        self.repository = repository
        self.domain = domain
        self.tag = tag
        self.branch = f"autoresearch/{tag}"
        self.refs = f"refs/autoresearch/{tag}/"
        self.home = repository.common / "autoresearch" / tag
        self.ledger = self.home / "results.tsv"
        self.runs = self.home / "runs"
        self.bench = self.home / "bench"
        self.desks = self.home / "desks"
        self.timeline = self.home / "timeline.jsonl"
        self.packages = self.home / "packages.json"
        self.data = self.home / "data.json"
        self.moving = self.home / "moving"  # exists while the checkout is on its way to a new champion
        self.compile_cache = repository.common / "autoresearch" / "compile_cache"
        self.rows: list[Row] = []
        self.attempts: dict[int, str] = {}  # number of its first run -> commit
        self._commits: dict[str, str] = {}  # 7 characters of a commit -> commit
        self._blobs: dict[str, str] = {}  # commit -> git's name for its editable file
        self._runs: dict[int, Run] | None = None  # by number; None: not read yet
        self._highest: int | None = None  # number that a run ever had; None: not looked for yet
        self.load()

    # Loading

    def load(self) -> None:
        """Rows and attempts as they stand; a torn last line is no row. OSError for a ledger that cannot be read."""
        text = ""
        if self.ledger.exists():
            with open_regular(self.ledger) as file:
                text = file.read().decode(errors="replace")
        whole_lines = text[: text.rfind("\n") + 1]
        self.rows, _ = parse_ledger(whole_lines)
        self.attempts = {}
        listing = self.repository("for-each-ref", "--format=%(refname:lstrip=3) %(objectname)", self.refs)
        for line in listing.splitlines():
            number, commit = line.split()
            self.attempts[int(number)] = commit
        self._commits = {commit[:7]: commit for commit in self.attempts.values()}
        self._runs = None
        self._highest = None

    def check(self) -> None:
        """Raises UserError for a state that no loop can go on from."""
        if 0 in self.attempts:
            remedy = "choose another --tag; 'uv run loop.py report LEDGER' still reads its results.tsv"
            raise UserError(f"tag {self.tag} was begun by an older loop.py: {remedy}", 2)
        first = self.rows[0].commit if self.rows else ""
        for commit, what in ((self._last_kept(), "last kept commit"), (first, "baseline")):
            if not commit or commit in self._commits:
                continue
            runs = [run for run in self.read_runs() if run.commit.startswith(commit)]
            remedy = "choose another --tag"
            if runs:
                remedy = f"'git update-ref {self.refs}{runs[0].number} {runs[0].commit}' brings it back"
            raise UserError(f"the ref of the ledger's {what} {commit} is gone from {self.refs}: {remedy}")

    def _last_kept(self) -> str:
        for row in reversed(self.rows):
            if row.status == "keep":
                return row.commit
        return ""

    @property
    def baseline(self) -> str:
        """The first attempt, "" before there is one."""
        return self.attempts[min(self.attempts)] if self.attempts else ""

    @property
    def champion(self) -> str:
        """The commit of the last `keep` row; before there is one the baseline; before that what HEAD shows."""
        kept = self._last_kept()
        if kept:
            return self._commits.get(kept, kept)
        return self.baseline or self.repository.head()

    def better_former(self) -> str:
        """The former champion that is believed better than the present one, the best of them; "" if none is."""
        best = self.champion
        for row in self.rows:
            commit = self.full_commit(row.commit)
            if row.status == "keep" and commit and self.domain.gain(self.estimate(best), self.estimate(commit)) > 0:
                best = commit
        return "" if best == self.champion else best

    def first_number(self, commit: str) -> int:
        """The number of a commit's first run."""
        return min(number for number, attempt in self.attempts.items() if attempt == commit)

    def full_commit(self, short: str) -> str:
        """The commit that the ledger names by 7 characters."""
        return self._commits.get(short, "")

    def find_attempt(self, blob: str) -> Row | None:
        """The first row whose commit has this blob as its editable file."""
        missing = [commit for commit in self._commits.values() if commit not in self._blobs]
        self._blobs |= dict(zip(missing, self.repository.blobs_of(missing), strict=True))
        commits = {commit[:7] for commit, blob_of_commit in self._blobs.items() if blob_of_commit == blob}
        if not commits:
            return None
        return next((row for row in self.rows if row.commit in commits), None)

    def description(self, commit: str) -> str:
        """What an attempt changes, as its commit says it."""
        subject = self.repository("log", "-1", "--format=%s", commit)
        return re.sub(r"^run \d+: ", "", subject)

    def scores(self, commit: str) -> list[float]:
        return scores_by_commit(self.rows).get(commit[:7], [])

    def fresh_scores(self, commit: str) -> list[float]:
        return fresh_scores(self.rows, commit[:7])

    def estimate(self, commit: str) -> float | None:
        return best_estimate(self.rows, commit[:7])

    def trailer(self, key: str) -> str:
        """What the baseline's commit says of profile or digest."""
        return self.repository.trailer(self.baseline or self.champion, key)

    @property
    def profile(self) -> str:
        """The profile that the tag was begun under, "" before its first run."""
        return self.trailer(PROFILE_TRAILER) if self.attempts else ""

    def read_runs(self) -> list[Run]:
        """Every run.json that can be read, by number."""
        if self._runs is None:
            self._runs = {}
            for number in self._folder_numbers():
                run = read_run(self.folder(number))
                if run is not None:
                    self._runs[number] = run
        return list(self._runs.values())

    def _folder_numbers(self) -> list[int]:
        return sorted(int(path.name) for path in self.runs.glob("[0-9]*") if path.name.isdigit())

    def runs_of(self, commit: str) -> list[Run]:
        """The runs of one commit, by number."""
        return [run for run in self.read_runs() if run.commit == commit]

    # Writing

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the tag's lock: one loop at a time. The state is read again, another loop may have written it."""
        self.home.mkdir(parents=True, exist_ok=True)
        with open_to_append(self.home / "lock") as lock:
            if not take_lock(lock):
                raise UserError(f"tag {self.tag} is busy: 'uv run loop.py status --wait' waits for the verdict", 2)
            self.load()
            yield

    def is_busy(self) -> bool:
        return is_locked(self.home / "lock")

    def next_number(self) -> int:
        """A number that no run of this tag ever had."""
        if self._highest is None:
            self._highest = max([0, *self.attempts, *self._folder_numbers()])
        return self._highest + 1

    def folder(self, number: int) -> Path:
        return self.runs / f"{number:04d}"

    def new_folder(self) -> int:
        """Make the folder of the next run; return its number."""
        self.runs.mkdir(exist_ok=True)
        number = self.next_number()
        self.folder(number).mkdir()
        self._highest = number
        return number

    def commit(
        self, number: int, source: bytes | None, description: str, profile: str, digest: str, parent: str
    ) -> str:
        """A candidate: the parent's tree with one blob replaced, kept for ever under a ref of its run's number."""
        trailers = f"{PROFILE_TRAILER}: {profile}\n{DIGEST_TRAILER}: {digest}"
        message = f"run {number:04d}: {description}\n\n{trailers}"
        commit = self.repository.commit(parent, source, message, f"{self.refs}{number}")
        self.attempts[number] = commit
        self._commits[commit[:7]] = commit
        if source is not None:
            self._blobs[commit] = self.repository.hash_of_data(source)
        return commit

    def forget_baseline(self) -> None:
        """Drop a baseline that crashed: the next start begins from HEAD, which a person mends."""
        for number in sorted(self.attempts):
            self.repository("update-ref", "-d", f"{self.refs}{number}")
        self.load()

    def append(self, rows: list[Row]) -> None:
        """Append the rows of one experiment, durably, in one write."""
        with open_to_append(self.ledger) as file:
            file.write("".join(map(str, rows)))
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def mend_ledger(self) -> None:
        """Write the ledger anew from its rows: the header, and no torn line."""
        write_atomically(self.ledger, self.domain.columns + "".join(map(str, self.rows)))

    def publish(self, place: Path) -> None:
        """The ledger's copy and a link to the run folders, at the top level of a checkout."""
        link = place / "runs"
        try:
            write_atomically(place / "results.tsv", read_text(self.ledger))
            if link.is_symlink() and os.readlink(link) != str(self.runs):
                link.unlink()
            if not link.is_symlink() and not link.exists():
                link.symlink_to(self.runs)
        except OSError as error:
            say(f"warning: no copy of the ledger {self.ledger} in {place} ({error})")

    def check_out_champion(self) -> None:
        """Put the checkout to the champion. A kill half-way leaves the file `moving`: the next start finishes it."""
        self.moving.touch()
        self.repository.reset(self.repository.checkout, self.champion, self.branch)
        self.moving.unlink()

    def move_branch(self, former: str) -> None:
        """The branch follows the champion. A checkout that shows it goes along, unless a person changed files there."""
        if self.repository.head_branch() == self.branch and not self.repository.changed_files(former):
            self.check_out_champion()
        else:
            self.repository("update-ref", f"refs/heads/{self.branch}", self.champion)

    def note(
        self, event: str, run: int = 0, description: str = "", seconds: float = 0.0, cost: Cost | None = None
    ) -> None:
        """A line of the timeline; with the cost of an agent's call, its unknown parts are null."""
        entry = {"at": time.time(), "event": event, "run": run, "description": description, "seconds": seconds}
        if cost is not None:
            entry |= dataclasses.asdict(cost)
        with contextlib.suppress(OSError), open_to_append(self.timeline) as file:
            file.write(json.dumps(entry) + "\n")

    def read_timeline(self) -> list[dict]:
        """The timeline; lines torn by a crash are left out."""
        events = []
        for line in read_text(self.timeline).splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
        return events

    def write_run(self, run: Run) -> None:
        write_atomically(self.folder(run.number) / "run.json", json.dumps(dataclasses.asdict(run), indent=1))
        if self._runs is not None:
            self._runs[run.number] = run


def read_run(folder: Path) -> Run | None:
    """The run.json of a folder; None where it is missing or damaged."""
    with contextlib.suppress(ValueError, TypeError):
        return Run(**json.loads(read_text(folder / "run.json")))
    return None
