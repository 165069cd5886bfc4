"""Git, as the loop uses it: without hooks and filters, under an identity of its own, past locks of a killed git.

`repository("rev-parse", "HEAD")` runs any command; what is done in several places, or in several steps, has a method.
"""

import contextlib
import functools
import hashlib
import os
import re
import shlex
import shutil
import signal
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from harness.files import read_text, remove_folder
from harness.processes import find_processes
from harness.screen import UserError, say

OPTIONS = (  # of every git command, so that neither a person's settings nor an agent's change what it does
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.autocrlf=false",
    "core.useReplaceRefs=false",
    "core.sparseCheckout=false",
    "user.name=autoresearch",
    "user.email=autoresearch@localhost",
)
WHOLE_DIFF = ("--no-ext-diff", "--no-textconv")  # of git diff: no setting of an agent's hides an edit
LOCK_PATIENCE = 10  # seconds that another git process may hold a lock
TREES_KEPT = 4  # in memory: champions of now and a little while ago
FILES_KEPT = 64


@dataclass(frozen=True)
class Blob:
    """One file of a commit's tree."""

    path: str
    mode: str  # 100644, 100755 or 120000 (a symbolic link, whose target is the data)
    blob: str  # git's name for the data
    data: bytes

    def is_intact(self) -> bool:
        """Whether the data is what its name says: git's hash of it."""
        return git_hash(self.data, len(self.blob)) == self.blob


def git_hash(data: bytes, digits: int) -> str:
    """Git's name for a blob, in a repository whose names have 40 digits (SHA-1) or 64 (SHA-256)."""
    kind = "sha256" if digits == 64 else "sha1"
    return hashlib.new(kind, b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class Repository:
    """The repository of one checkout. Methods that write files take the checkout or a worktree as `place`."""

    def __init__(self, checkout: Path, editable: str, instructions: str):
        if not shutil.which("git"):
            raise UserError("git is not installed: install it (Debian: apt-get install git)")
        import git  # not above: where there is no git, this import fails

        self.checkout = checkout
        self.editable = editable
        self.instructions = instructions
        self._failure = git.CommandError
        self._runner = git.Git
        self._command = ["git"]
        for option in OPTIONS:
            self._command += ["-c", option]
        self._check_checkout()
        self.common = Path(self("rev-parse", "--path-format=absolute", "--git-common-dir"))
        self._name_digits = len(self.head())
        # What a commit holds never changes, and the same few commits are read for every run: a git process takes 5 ms.
        self.read = functools.lru_cache(FILES_KEPT)(self._read)
        self.tree = functools.lru_cache(TREES_KEPT)(self._tree)

    def _check_worktree(self) -> None:
        """Raises UserError where a setting that an agent made sends git to the files of another folder."""
        listing = self("config", "--get-regexp", r"^core\.(worktree|bare)$", default="")
        settings = dict(line.split(" ", 1) for line in listing.splitlines() if " " in line)
        if elsewhere := settings.get("core.worktree"):
            remedy = "run 'git config --unset core.worktree'"
            raise UserError(f"core.worktree is {elsewhere!r}, so git works on another folder: {remedy}")
        if settings.get("core.bare") == "true":
            raise UserError("core.bare is true, so git knows no checkout: run 'git config core.bare false'")

    def _check_checkout(self) -> None:
        """Raises UserError unless the checkout is the top level of a repository that has a commit."""
        self._check_worktree()
        try:
            top = self("rev-parse", "--show-toplevel")
        except UserError as error:
            top = ""
            if "dubious ownership" in str(error):
                place = shlex.quote(str(self.checkout))
                remedy = f"make a clone of your own, or run: git config --global --add safe.directory {place}"
                raise UserError(f"{self.checkout} belongs to another user, so git refuses it: {remedy}") from error
        if not top or Path(top).resolve() != self.checkout:
            remedy = "clone the project, or run 'git init'"
            raise UserError(f"{self.checkout} is not the top level of a git repository: {remedy}")
        if not self("rev-parse", "--verify", "--quiet", "HEAD^{commit}", default=""):
            remedy = "run 'git add -A && git commit -m start', or check a branch out"
            raise UserError(f"the git repository {self.checkout} has no commit at HEAD: {remedy}")

    def __call__(self, *args: str, cwd: Path | None = None, raw: bool = False, default=None, stdin=None):
        """The output of one git command (bytes if raw); `default` if it fails. A held lock is waited for.

        A lock is stale, and removed, once every git process that was running here when we met it has exited.
        """
        deadline = time.monotonic() + LOCK_PATIENCE
        holders = None
        while True:
            try:
                if stdin is not None:
                    stdin.seek(0)
                return self._runner(cwd or self.checkout).execute(
                    [*self._command, *args],
                    istream=stdin,
                    stdout_as_string=not raw,
                    strip_newline_in_stdout=not raw,
                    start_new_session=True,  # Ctrl-C is for the loop, not for its git
                )
            except self._failure as error:
                if error.status == -signal.SIGINT:
                    continue  # a terminal's Ctrl-C met it before it had a session of its own: it has done nothing yet
                message = error.stderr.removeprefix("\n  stderr: '").rstrip("'") or str(error)
            lock = re.search(r"'([^']+\.lock)': File exists", message)
            if lock is None and default is not None:
                return default
            if lock is None:
                raise UserError(f"git {args[0]} failed: {' '.join(message.split())}")
            running = self._git_processes()
            holders = running if holders is None else holders & running
            if time.monotonic() > deadline:
                if holders or not Path("/proc/self").exists():
                    raise UserError(f"{lock[1]} is held: end the git that holds it, or remove the file")
                Path(lock[1]).unlink(missing_ok=True)
                say(f"note: removed {lock[1]}, left by a git that was killed")
                deadline = time.monotonic() + LOCK_PATIENCE
                holders = None
            time.sleep(0.2)

    def _git_processes(self) -> set[int]:
        """Ids of the git processes that run in this repository."""
        found = set()
        for pid in find_processes("cmdline", rb"^([^\0]*/)?git\0"):
            with contextlib.suppress(OSError):
                folder = Path(os.readlink(f"/proc/{pid}/cwd"))
                if {self.checkout, self.common.parent} & {folder, *folder.parents}:
                    found.add(pid)
        return found

    # Reading

    def head_branch(self) -> str:
        """The branch that the checkout shows, "" if none."""
        return self("symbolic-ref", "--short", "--quiet", "HEAD", default="")

    def head(self) -> str:
        return self("rev-parse", "HEAD")

    def _read(self, commit: str, path: str) -> bytes:
        """A file of a commit (its full name: a branch would move). Called as `read`, which remembers."""
        return self("cat-file", "blob", f"{commit}:{path}", raw=True)

    def blobs_of(self, commits: list[str]) -> list[str]:
        """Git's name for the editable file of each commit."""
        if not commits:
            return []
        names = "".join(f"{commit}:{self.editable}\n" for commit in commits)
        return self._feed(names.encode(), "cat-file", "--batch-check=%(objectname)").decode().splitlines()

    def hash_of_data(self, data: bytes) -> str:
        """Git's name for these bytes as a blob."""
        return git_hash(data, self._name_digits)

    def diff(self, old: str, new: str) -> bytes:
        """The difference of two commits, as text though an attribute calls a file binary."""
        return self("diff", *WHOLE_DIFF, "--text", old, new, raw=True)

    def differing_files(self, old: str, new: str) -> list[str]:
        """The files that are not the same in two commits."""
        names = self("diff-tree", "-r", "--name-only", "--no-renames", "-z", old, new).split("\0")
        return [name for name in names if name]

    def trailer(self, commit: str, key: str) -> str:
        return self("log", "-1", f"--format=%(trailers:key={key},valueonly)", commit).strip()

    def candidate_tree(self, parent: str, source: bytes) -> tuple[Blob, ...]:
        """The tree of the commit that `commit` makes of a parent and a source, without a call of git."""
        edited = Blob(self.editable, "100644", self.hash_of_data(source), source)
        return tuple(edited if blob.path == self.editable else blob for blob in self.tree(parent))

    def _tree(self, commit: str) -> tuple[Blob, ...]:
        """Every file of a commit, with its data. Called as `tree`, which remembers."""
        listing = self("ls-tree", "-r", "-z", commit)
        entries = []
        for line in filter(None, listing.split("\0")):
            facts, path = line.split("\t", 1)
            mode, kind, blob = facts.split()
            if kind == "blob":  # not a submodule
                entries.append((path, mode, blob))
        names = "".join(f"{blob}\n" for _, _, blob in entries)
        stream = self._feed(names.encode(), "cat-file", "--batch")
        blobs = []
        for path, mode, blob in entries:
            header, _, stream = stream.partition(b"\n")
            size = int(header.split()[2])
            blobs.append(Blob(path, mode, blob, stream[:size]))
            stream = stream[size + 1 :]
        return tuple(blobs)

    def _feed(self, data: bytes, *args: str) -> bytes:
        """The output of one git command that reads this data."""
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            return self(*args, raw=True, stdin=file)

    def changed_files(self, commit: str) -> list[str]:
        """Tracked files of the checkout that differ from a commit, the instructions aside."""
        names = set(self("diff", "--name-only", "--no-renames", "-z", commit, "--").split("\0"))
        if self.converts_line_ends():
            # The person's git has noted sizes and times of the files that it wrote: with them git finds no change.
            names |= {blob.path for blob in self.tree(commit) if self._differs(blob)}
        return sorted(names - {"", self.instructions})

    def _differs(self, blob: Blob) -> bool:
        """Whether a file of the checkout has other bytes."""
        path = self.checkout / blob.path
        return path.is_file() and path.read_bytes() != blob.data

    def converts_line_ends(self) -> bool:
        """Whether the person's git writes CRLF into a checkout (the default of Git for Windows)."""
        values = self("config", "--get-all", "core.autocrlf", default="").splitlines()
        persons_own = values[:-1]  # the last one is from OPTIONS
        return persons_own[-1:] == ["true"]

    # Writing: commits and refs

    def commit(self, parent: str, source: bytes | None, message: str, ref: str) -> str:
        """A commit of the parent's tree, the editable file replaced if a source is given, kept under `ref`."""
        text = message.encode()
        who = b"autoresearch <autoresearch@localhost> now"
        lines = [b"commit %s" % ref.encode(), b"mark :1", b"committer " + who, b"data %d" % len(text), text]
        lines.append(b"from %s" % parent.encode())
        if source is not None:
            lines += [b"M 100644 inline %s" % self.editable.encode(), b"data %d" % len(source), source]
        lines += [b"", b"get-mark :1", b"done", b""]
        # One process for blob, tree, commit and ref, and no index in which a crash would leave a lock.
        options = ("--quiet", "--done", "--force", "--date-format=now")
        return self._feed(b"\n".join(lines), "fast-import", *options).decode().strip()

    def merge(self, ours: bytes, base: bytes, theirs: bytes) -> bytes | None:
        """Three-way merge of the editable file's text; None if the changes overlap."""
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for name, data in (("ours", ours), ("base", base), ("theirs", theirs)):
                path = Path(folder, name)
                path.write_bytes(data)
                paths.append(str(path))
            merged = self("merge-file", "-p", "-q", *paths, raw=True, default=b"")
        return merged or None

    # Writing: files of a checkout

    def reset(self, place: Path, commit: str, branch: str = "") -> None:
        """Put index and tracked files to a commit, and HEAD on the branch there, or detached.

        The instructions and untracked files stay as they are.
        """
        self._check_worktree()
        path = place / self.editable
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        if branch:
            self("symbolic-ref", "HEAD", f"refs/heads/{branch}", cwd=place)
            self("update-ref", f"refs/heads/{branch}", commit, cwd=place)
        else:
            self("update-ref", "--no-deref", "HEAD", commit, cwd=place)
        self("read-tree", commit, cwd=place)  # a new index: the old one may be broken, or hide a change
        self("update-index", "-q", "--refresh", cwd=place, default="")  # what did not change is not written anew
        self("restore", "--worktree", "--", ".", f":(exclude){self.instructions}", cwd=place)
        if path.is_symlink() or path.read_bytes() != self.read(commit, self.editable):
            remedy = "'git check-attr filter' and 'git ls-files -v' show which; take it away and start again"
            raise UserError(f"{path} is not as {commit[:7]} has it: a git filter or an index flag changes it: {remedy}")

    def add_worktree(self, place: Path, commit: str) -> None:
        """A worktree with a detached HEAD, made anew."""
        remove_folder(place)
        # The entry of a half-made worktree would make every later `git worktree` fail.
        for path in (self.common / "worktrees").glob("*/gitdir"):
            with contextlib.suppress(OSError):  # another tag's loop may be removing it too
                is_regular = stat.S_ISREG(path.lstat().st_mode)  # git reads these too, and waits at a pipe for ever
                if not is_regular or read_text(path).strip() == f"{place}/.git":
                    remove_folder(path.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        # Twice --force: though the folder of that name is missing, and though its entry is locked.
        self("worktree", "add", "--force", "--force", "--detach", "--quiet", str(place), commit)
