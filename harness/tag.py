"""One tag: its branch, refs, lock and folder <git common dir>/autoresearch/<tag>/. What its ledger means: ledger.py.

    runs.jsonl         the state: a line a run that was decided (ledger.py)
    results.tsv        its rendering, copied to the checkout
    runs/NNNN/         a run: run.log, change.diff, result.json
    compiled/          the compilers' files of the newest commits
    status.json        what a running loop does at this moment; gone when it ends
    lock               held by the loop

No reset or clean of the checkout reaches it. Kill the loop anywhere: runs.jsonl, the refs and the run folders are all
that the next one needs.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from harness.console import UserError, one_line, say
from harness.domain import Domain
from harness.files import open_regular, read_text, write_atomically
from harness.ledger import Ledger, Run, append_runs, cut_torn_line, read_runs, render
from harness.repository import Repository

LOCK_TRIES = 10  # in half a second
TAG_BYTES = 100  # a tag is the name of folders and files
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of flock, on some network file systems


class Tag:
    """A tag's state. Reading changes nothing; only the process that holds the lock writes."""

    def __init__(self, repository: Repository, name: str, domain: Domain):
        self.repository = repository
        self.checkout = repository.checkout
        self.domain = domain
        self.name = name
        self.branch = f"autoresearch/{name}"
        self.refs = f"refs/autoresearch/{name}/"
        self.home = repository.common / "autoresearch" / name
        self.runs = self.home / "runs"
        self.worktrees = self.checkout / ".autoresearch" / name
        self.compile_cache = self.home / "compiled"
        self.mark = str(self.home)  # of every process of this tag
        self.load()

    def load(self) -> None:
        """Read the ledger anew: another process may have appended to it."""
        if (self.home / "results.tsv").exists() and not (self.home / "runs.jsonl").exists():
            remedy = f"choose another --tag; 'uv run loop.py report {self.home / 'results.tsv'}' still reads it"
            raise UserError(f"tag {self.name} was begun by an older loop.py: {remedy}", 2)
        self.ledger = Ledger(self.domain, read_runs(self.home / "runs.jsonl"))

    # Commits

    @property
    def champion(self) -> str:
        """The champion's commit; before the baseline has run, what the checkout's HEAD shows."""
        return self.ledger.champion or self.repository.head()

    def commit(self, number: int, source: bytes, description: str, parent: str) -> str:
        """A candidate: the parent's tree with one file replaced, kept for ever under a ref of its run's number."""
        return self.repository.commit(parent, source, f"run {number:04d}: {description}", f"{self.refs}{number:04d}")

    def source(self, commit: str) -> bytes:
        """The edited file of a commit."""
        return self.repository.read(commit, self.domain.editable)

    def show_champion(self) -> None:
        """The branch follows the champion. A checkout that shows it goes along, unless a person changed files there."""
        repository = self.repository
        is_shown = repository.head_branch() == self.branch
        if is_shown and not self._has_persons_edits():
            repository.reset(self.checkout, self.champion, self.branch)
            return
        repository("update-ref", f"refs/heads/{self.branch}", self.champion)
        if is_shown:
            say("note: the checkout has edits of yours: its files stay as they are")

    def _has_persons_edits(self) -> bool:
        """Whether a person edited tracked files here. That the checkout still shows an earlier champion does not count:
        a loop was killed between moving the branch and writing the files."""
        changed = self.repository.changed_files(self.checkout, self.champion)
        if changed != [self.domain.editable]:
            return bool(changed)
        with contextlib.suppress(OSError), open_regular(self.checkout / self.domain.editable) as file:
            found = file.read()
            kept = {run.commit for run in self.ledger.runs if run.status == "keep"}
            return all(self.source(commit) != found for commit in kept)
        return True

    # Runs

    def new_folder(self) -> int:
        """Make the folder of the next run; return its number, which no run of this tag ever had."""
        self.runs.mkdir(parents=True, exist_ok=True)
        folders = [int(path.name) for path in self.runs.glob("[0-9]*") if path.name.isdigit()]
        numbers = [run.number for run in self.ledger.runs]
        number = max([0, *folders, *numbers]) + 1
        self.folder(number).mkdir()
        return number

    def folder(self, number: int) -> Path:
        return self.runs / f"{number:04d}"

    def append(self, *runs: Run) -> None:
        """Decide runs: from here on no kill undoes it. Then the renderings."""
        append_runs(self.home / "runs.jsonl", runs)
        self.ledger = Ledger(self.domain, [*self.ledger.runs, *runs])
        self.publish()

    def publish(self) -> None:
        """results.tsv, its copy in the checkout, and a link to the run folders there."""
        link = self.checkout / "runs"
        try:
            text = render(self.ledger)
            write_atomically(self.home / "results.tsv", text)
            write_atomically(self.checkout / "results.tsv", text)
            if link.is_symlink() and os.readlink(link) != str(self.runs):
                link.unlink()
            if not link.is_symlink() and not link.exists():
                link.symlink_to(self.runs)
        except OSError as error:
            say(f"warning: {self.home / 'results.tsv'} or its copy could not be written ({error})")

    # The lock, and what a loop does at this moment

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the tag's lock: one loop at a time. The state is read again, another loop may have written it."""
        self.home.mkdir(parents=True, exist_ok=True)
        with open(self._lock_path(), "a") as file:
            for _ in range(LOCK_TRIES):  # a `status` that asks whether the lock is held takes it for a moment
                if self._try_lock(file):
                    break
                time.sleep(0.05)
            else:
                raise UserError(f"tag {self.name} is busy: 'uv run loop.py status --wait' waits for the verdict", 2)
            cut_torn_line(self.home / "runs.jsonl")
            self.load()
            yield

    def is_busy(self) -> bool:
        """Whether a loop holds the lock. UserError where the file system cannot tell."""
        with contextlib.suppress(FileNotFoundError), open_regular(self._lock_path()) as file:
            return not self._try_lock(file)
        return False

    def _lock_path(self) -> Path:
        elsewhere = os.environ.get("AUTORESEARCH_LOCKS")
        if not elsewhere:
            return self.home / "lock"
        Path(elsewhere).mkdir(parents=True, exist_ok=True)
        return Path(elsewhere) / f"tag-{hashlib.sha256(self.mark.encode()).hexdigest()[:16]}.lock"

    def _try_lock(self, file) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            remedy = "export AUTORESEARCH_LOCKS=FOLDER, a folder on a local disk, for every command on this tag"
            problem = f"{self._lock_path()}: its file system has no locks ({error.strerror})"
            raise UserError(f"{problem}: {remedy}", 2) from error

    def write_live(self, state: dict) -> None:
        """Tell `status` what the loop does. Nothing depends on it."""
        with contextlib.suppress(OSError):
            write_atomically(self.home / "status.json", json.dumps(state))

    def read_live(self) -> dict:
        """What a running loop does at this moment, {} where none runs."""
        with contextlib.suppress(ValueError):
            return json.loads(read_text(self.home / "status.json"))
        return {}

    def clear_live(self) -> None:
        with contextlib.suppress(OSError):
            (self.home / "status.json").unlink()


def open_tag(checkout: Path, domain: Domain, name: str | None) -> Tag:
    """The tag of this name, else the current branch's, else today's date."""
    repository = Repository(checkout, domain.editable, domain.instructions)
    today = time.strftime("%b%d").lower()
    branch = repository.head_branch()
    if not name:
        name = branch.removeprefix("autoresearch/") if branch.startswith("autoresearch/") else today
    is_name = repository("check-ref-format", "--branch", f"autoresearch/{name}", default="")
    if "/" in name or len(os.fsencode(name)) > TAG_BYTES or not is_name:
        shown = one_line(name, TAG_BYTES)
        raise UserError(f"--tag {shown!r} is not a valid branch name: use letters, digits and '-', say {today}", 2)
    return Tag(repository, name, domain)
