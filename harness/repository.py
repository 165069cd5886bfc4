"""Git, as the loop uses it: without hooks and filters, under an identity of its own. It knows no tag and no ledger.

`repository("rev-parse", "HEAD")` runs any command; what is done in several places, or in several steps, has a method.
"""

import contextlib
import functools
import os
import re
import shlex
import shutil
import tempfile
import threading
import time
from pathlib import Path

from harness.console import UserError, say
from harness.files import remove_folder
from harness.processes import find_processes

OPTIONS = (  # of every git command, so that neither a person's settings nor an agent's change what it does
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.autocrlf=false",
    "core.useReplaceRefs=false",
    "core.sparseCheckout=false",
    "user.name=autoresearch",
    "user.email=autoresearch@localhost",
)
WHOLE_DIFF = ("--no-ext-diff", "--no-textconv", "--no-color")  # of git diff: no setting of an agent's hides an edit
LOCK_PATIENCE = 10  # seconds that another git process may hold a lock


class Repository:
    """The repository of one checkout. Methods that write files take the checkout or a worktree as `place`."""

    def __init__(self, checkout: Path, editable: str, instructions: str):
        if not shutil.which("git"):
            raise UserError("git is not installed: install it (Debian: apt-get install git)")
        import git  # not above: where there is no git, this import fails

        self.checkout = checkout
        self.editable = editable
        # Never reset: a person edits the first at any time, and behind a mirror of packages uv rewrites the other.
        self.left_alone = (instructions, "uv.lock")
        self._worktrees = threading.Lock()  # one `git worktree` at a time: each removes what another has half made
        self._failure = git.CommandError
        self._runner = git.Git
        self._command = ["git"]
        for option in OPTIONS:
            self._command += ["-c", option]
        self._check_checkout()
        self.common = Path(self("rev-parse", "--path-format=absolute", "--git-common-dir"))
        # What a commit holds never changes, and the same few commits are read for every run: a git process takes 5 ms.
        self.read = functools.lru_cache(64)(self._read)
        self.archive = functools.lru_cache(4)(self._archive)

    def __call__(self, *args: str, cwd: Path | None = None, raw: bool = False, default=None, env=None):
        """The output of one git command (bytes if raw); `default` if it fails. A held lock is waited for."""
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                return self._runner(cwd or self.checkout).execute(
                    [*self._command, *args],
                    stdout_as_string=not raw,
                    strip_newline_in_stdout=not raw,
                    start_new_session=True,  # Ctrl-C is for the loop, not for its git
                    env=env,
                )
            except self._failure as error:
                message = error.stderr.removeprefix("\n  stderr: '").rstrip("'") or str(error)
            lock = re.search(r"'([^']+\.lock)': File exists", message)
            if lock and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            if lock and self._is_abandoned():
                Path(lock[1]).unlink(missing_ok=True)
                say(f"note: removed {lock[1]}, left by a git that was killed")
                continue
            if lock:
                raise UserError(f"{lock[1]} is held: end the git that holds it, or remove that file")
            if default is not None:
                return default
            raise UserError(f"git {args[0]} failed: {' '.join(message.split())}")

    def _is_abandoned(self) -> bool:
        """Whether no git runs in this repository, so that a lock which stands there was left by one that was killed."""
        if not Path("/proc/self").exists():
            return False
        for pid in find_processes("cmdline", rb"^([^\0]*/)?git\0"):
            with contextlib.suppress(OSError):
                folder = Path(os.readlink(f"/proc/{pid}/cwd"))
                if {self.checkout, self.common.parent} & {folder, *folder.parents}:
                    return False
        return True

    def _check_checkout(self) -> None:
        """Raises UserError unless the checkout is the top level of a repository that has a commit."""
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

    # Reading

    def head(self) -> str:
        return self("rev-parse", "HEAD")

    def head_branch(self) -> str:
        """The branch that the checkout shows, "" if none."""
        return self("symbolic-ref", "--short", "--quiet", "HEAD", default="")

    def commit_of(self, name: str) -> str:
        """The commit that a ref names, "" if there is none."""
        return self("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", default="")

    def _read(self, commit: str, path: str) -> bytes:
        """A file of a commit (its full name: a branch would move). Called as `read`, which remembers."""
        return self("cat-file", "blob", f"{commit}:{path}", raw=True)

    def _archive(self, commit: str) -> bytes:
        """Every file of a commit, as a tar archive. Called as `archive`, which remembers."""
        return self("archive", "--format=tar", commit, raw=True)

    def diff(self, old: str, new: str) -> bytes:
        return self("diff", *WHOLE_DIFF, "--text", old, new, raw=True)

    def count_lines(self, old: str, new: str) -> str:
        """`+3 -1`: the lines of one changed file that were added and removed."""
        added, removed, _ = self("diff", *WHOLE_DIFF, "--text", "--numstat", old, new, default="\t\t").split("\t")
        return f"+{added} -{removed}"

    def changed_files(self, place: Path, commit: str) -> list[str]:
        """Tracked files of a checkout that differ from a commit, those that are left alone aside."""
        names = set(self("diff", "--name-only", "--no-renames", "-z", commit, "--", cwd=place).split("\0"))
        return sorted(names - {"", *self.left_alone})

    # Writing: commits and refs

    def commit(self, parent: str, source: bytes, message: str, ref: str) -> str:
        """A commit of the parent's tree with the editable file replaced, kept under `ref`."""
        with tempfile.TemporaryDirectory(dir=self.common) as folder:
            path = Path(folder, "source")
            path.write_bytes(source)
            blob = self("hash-object", "-w", "--no-filters", str(path))
            index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}  # of its own: several workers commit
            self("read-tree", parent, env=index)
            self("update-index", "--add", "--cacheinfo", f"100644,{blob},{self.editable}", env=index)
            tree = self("write-tree", env=index)
        commit = self("commit-tree", tree, "-p", parent, "-m", message)
        self("update-ref", ref, commit)
        return commit

    def merge(self, ours: bytes, base: bytes, theirs: bytes, theirs_win: bool = False) -> bytes | None:
        """Three-way merge of the editable file's text. Where the changes overlap, None, or theirs."""
        with tempfile.TemporaryDirectory(dir=self.common) as folder:
            paths = []
            for name, data in (("ours", ours), ("base", base), ("theirs", theirs)):
                path = Path(folder, name)
                path.write_bytes(data)
                paths.append(str(path))
            options = ["-p", "-q", "--theirs"] if theirs_win else ["-p", "-q"]
            merged = self("merge-file", *options, *paths, raw=True, default=b"")
        return merged or None

    # Writing: files of a checkout

    def reset(self, place: Path, commit: str, branch: str = "") -> None:
        """Put index and tracked files to a commit, and HEAD on the branch there, or detached.

        Untracked files, and those that are left alone, stay as they are.
        """
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
        self("restore", "--worktree", "--", ".", *(f":(exclude){name}" for name in self.left_alone), cwd=place)
        if path.is_symlink() or path.read_bytes() != self.read(commit, self.editable):
            remedy = "'git check-attr filter' and 'git ls-files -v' show which; take it away and start again"
            raise UserError(f"{path} is not as {commit[:7]} has it: a git filter or an index flag changes it: {remedy}")

    def add_worktree(self, place: Path, commit: str) -> None:
        """A worktree with a detached HEAD, made anew."""
        remove_folder(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        # Twice --force: though the folder of that name is missing, and though its entry is locked.
        with self._worktrees:
            self("worktree", "add", "--force", "--force", "--detach", "--quiet", str(place), commit)

    def remove_worktree(self, place: Path) -> None:
        """Remove a worktree with all that an agent left in it; one that is not there is no error."""
        with self._worktrees:
            self("worktree", "remove", "--force", "--force", str(place), default="")
        remove_folder(place)

    def remove_half_made_worktrees(self) -> None:
        """Entries that a git which was killed left half written: they would stop every later `git worktree`."""
        for entry in (self.common / "worktrees").glob("*"):
            files = [entry / name for name in ("gitdir", "commondir", "HEAD")]
            if not all(file.exists() and file.stat().st_size for file in files):
                remove_folder(entry)


def leave_git_variables() -> None:
    """Forget GIT_* variables: set by a hook or an alias, they would point git elsewhere."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        del os.environ[name]
