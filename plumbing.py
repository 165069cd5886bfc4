"""plumbing.py: what loop.py does to the outside. The only place that touches git, or starts and ends processes.

Nothing here knows what an experiment is. A desk is the checkout that an agent edits, a bench a worktree of one commit.
"""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MARK = "AUTORESEARCH_MARK"  # in every child's environment, so that a process which escapes a group kill is found
KILL_GRACE = 2              # seconds from TERM to KILL
LOG_CAP = 8 * 2**20         # bytes kept of a log's head
TAIL_CAP = 256 * 2**10      # bytes kept of what follows


class UserError(Exception):
    """Something that a person can mend; exit code 1, or 2 for usage and refusal."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


# ---------------------------------------------------------------------------------------------------------------------
# The screen and files


def say(text: str, end: str = "\n") -> None:
    """A line on stderr, over a live line if one is there; a terminal that went away ends nothing."""
    try:
        print(("\r\033[K" if sys.stderr.isatty() else "") + text, end=end, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = os.fdopen(2, "w", closefd=False)  # without the text that cannot be written: it would fail the exit
    except (ValueError, AttributeError):  # it is closed, or was so from the start
        pass


def show(text: str) -> None:
    """The live line: rewritten in place, on a terminal only."""
    if sys.stderr and not sys.stderr.closed and sys.stderr.isatty():
        say(text[: shutil.get_terminal_size().columns - 1], end="")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # or a power cut may leave an empty file under the name
    os.replace(temporary, path)


def tail(path: Path, lines: int) -> str:
    """The last lines of a log, each cut to 300 characters."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 300 * lines))
        text = re.split(r"[\r\n]+", file.read().decode(errors="replace").strip())
        return "\n".join(line[:300] for line in text[-lines:])
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Processes: started with a mark, ended for certain


def processes(file: str, pattern: bytes) -> set[int]:
    """Ids of the other processes, zombies aside, whose /proc/ID/<file> matches (none where there is no /proc)."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and re.search(pattern, (folder / file).read_bytes()):
                found.add(int(folder.name))
    return found


def sweep(mark: str) -> None:
    """End every process that carries the mark, in whatever session it hides: TERM, then KILL until none is left."""
    entry = rb"(^|\0)%b\0" % re.escape(f"{MARK}={mark}").encode()
    for number in (signal.SIGTERM, *[signal.SIGKILL] * 5):
        for pid in (pids := processes("environ", entry)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        patience = time.monotonic() + KILL_GRACE
        while pids and time.monotonic() < patience:
            time.sleep(0.02)
            pids = processes("environ", entry)
        if not pids:
            return


def drain(stream, path: Path) -> None:
    """Copy a child's output to a file: its first LOG_CAP bytes as they come, of the rest the last TAIL_CAP."""
    kept, cut, rest = 0, 0, b""
    with open(path, "wb", buffering=0) as log:
        while chunk := stream.read1(65536):
            with contextlib.suppress(OSError):  # not even a full disk may stop the child's pipe
                if kept < LOG_CAP:
                    kept += log.write(chunk)
                else:
                    rest, cut = (rest + chunk)[-TAIL_CAP:], cut + len(chunk)
        with contextlib.suppress(OSError):
            log.write((f"\n[... {cut - len(rest)} bytes cut ...]\n".encode() if cut > len(rest) else b"") + rest)


def run_child(command, *, cwd, env, mark, log, limit, stop, tick, stdin=os.devnull) -> str:
    """Run a command in a session of its own until it ends, `limit` seconds pass or the event `stop` is set.

    Leaves no process behind. Returns "" after exit code 0, else how it ended: `exit code 1`, `killed by SIGSEGV`,
    `timeout after 360 s`, `stopped`. `tick(seconds)` is called a few times a second.
    """
    begin, reason, ended = time.monotonic(), "", threading.Event()
    env = env | {MARK: mark, "PWD": str(cwd)}  # opencode takes its folder from PWD
    with open(stdin, "rb") as source:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    reader = threading.Thread(target=drain, args=(process.stdout, log), daemon=True)
    reader.start()
    threading.Thread(target=lambda: (process.wait(), ended.set()), daemon=True).start()
    while not reason and not ended.wait(0.2):
        tick(seconds := time.monotonic() - begin)
        reason = "stopped" if stop.is_set() else f"timeout after {seconds:.0f} s" if seconds > limit else ""
    for number in (signal.SIGTERM, signal.SIGKILL):  # the group's stragglers too, after a normal exit
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        ended.wait(KILL_GRACE)
    sweep(mark)
    reader.join(KILL_GRACE)
    if not reason and (code := process.returncode):
        reason = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    return reason


def watch(command, *, cwd, stop) -> None:
    """Run a command whose output is for the person to see, until it ends or the event `stop` is set."""
    with subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if stop.wait(0.2):
                process.terminate()


def flock_now(file) -> bool:
    """Take the lock on an open file if nobody else has it."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Git: no hooks, the loop's own identity


class Git:
    OPTIONS = (
        "core.hooksPath=/dev/null", "core.fsmonitor=false", "core.autocrlf=false", "core.useReplaceRefs=false",
        "user.name=autoresearch", "user.email=autoresearch@localhost",
    )  # fmt: skip
    LOCK_PATIENCE = 10  # seconds that another git process may hold a lock

    def __init__(self, desk: Path, editable: str, spared: str):
        if not shutil.which("git"):
            raise UserError("git is not installed: install it (Debian: apt-get install git)")
        import git  # not above: where there is no git, this import fails

        self.desk, self.editable, self.spared = desk, editable, spared
        self.failure, self.runner = git.CommandError, git.Git
        self.command = ["git", *(word for option in self.OPTIONS for word in ("-c", option))]
        top = self("rev-parse", "--show-toplevel", default="")
        if not top or Path(top).resolve() != desk:
            raise UserError(f"{desk} is not the top level of a git repository: clone the project, or 'git init'")
        if not self("rev-parse", "--verify", "--quiet", "HEAD", default=""):
            raise UserError(f"the git repository {desk} has no commit: run 'git add -A && git commit -m start'")
        self.common = Path(self("rev-parse", "--path-format=absolute", "--git-common-dir"))

    def __call__(self, *args: str, cwd: Path | None = None, env=None, raw: bool = False, default=None):
        """The output of one git command (bytes if raw); `default` if it fails. A held lock is waited for.

        A lock that outlives every git process which ran here when it was met was left by a crash, and is removed.
        """
        patience, holders = time.monotonic() + self.LOCK_PATIENCE, None
        while True:
            try:
                return self.runner(cwd or self.desk).execute(
                    [*self.command, *args], env=env, stdout_as_string=not raw, strip_newline_in_stdout=not raw,
                    start_new_session=True,  # Ctrl-C is for the loop, not for its git
                )  # fmt: skip
            except self.failure as error:
                told = error.stderr.removeprefix("\n  stderr: '").rstrip("'") or str(error)
                if lock := re.search(r"'([^']+\.lock)': File exists", told):
                    holders = self.processes() if holders is None else holders & self.processes()
                elif default is None:
                    raise UserError(f"git {args[0]} failed: {' '.join(told.split())}") from None
                else:
                    return default
            if time.monotonic() > patience:
                if holders or not Path("/proc/self").exists():
                    raise UserError(f"{lock[1]} is held: end the git that holds it, or remove the file")
                Path(lock[1]).unlink(missing_ok=True)
                say(f"note: removed {lock[1]}, left by a git that was killed")
                patience, holders = time.monotonic() + self.LOCK_PATIENCE, None
            time.sleep(0.2)

    def processes(self) -> set[int]:
        """Ids of the git processes that run in this checkout."""
        found = set()
        for pid in processes("cmdline", rb"^([^\0]*/)?git\0"):
            with contextlib.suppress(OSError):
                place = Path(os.readlink(f"/proc/{pid}/cwd"))
                if {self.desk, self.common.parent} & {place, *place.parents}:
                    found.add(pid)
        return found

    def read(self, commit: str, path: str) -> bytes:
        return self("cat-file", "blob", f"{commit}:{path}", raw=True)

    def commit(self, parent: str, file: Path | None, message: str, ref: str) -> str:
        """A commit of the parent's tree with the editable file's blob replaced, kept under `ref`."""
        with tempfile.TemporaryDirectory() as folder:  # an index of its own; a crash leaves no lock on another
            env = {"GIT_INDEX_FILE": f"{folder}/index"}
            self("read-tree", parent, env=env)
            if file:
                blob = self("hash-object", "-w", "--no-filters", "--", str(file))
                self("update-index", "--cacheinfo", f"100644,{blob},{self.editable}", env=env)
            tree = self("write-tree", env=env)
        commit = self("commit-tree", tree, "-p", parent, "-m", message)
        self("update-ref", ref, commit)
        return commit

    def changed(self, commit: str) -> list[str]:
        """Tracked files of the desk that differ from the commit, the spared one aside."""
        names = self("diff", "--name-only", "--no-renames", "-z", commit, "--").split("\0")
        return [name for name in names if name not in ("", self.spared)]

    def reset_desk(self, branch: str, commit: str) -> None:
        """HEAD on the branch, branch and tracked files at the commit; the spared file and untracked ones stay."""
        path = self.desk / self.editable
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        self("symbolic-ref", "HEAD", f"refs/heads/{branch}")
        self("update-ref", f"refs/heads/{branch}", commit)
        self("read-tree", commit)  # a new index: the old one may be broken, or hide a change
        self("update-index", "-q", "--refresh", default="")  # what did not change is not written anew
        self("restore", "--worktree", "--", ".", f":(exclude){self.spared}")
        if path.is_symlink() or path.read_bytes() != self.read(commit, self.editable):
            raise UserError(f"{path} cannot be set to {commit[:7]}: a git filter or an index flag changes it")

    def place(self, bench: Path, commit: str) -> None:
        """The bench, made anew: exactly the commit's files, byte for byte, and nothing that an earlier run left."""
        shutil.rmtree(bench, ignore_errors=True)
        for path in (self.common / "worktrees").glob("*/gitdir"):  # a half-made one would stop every git worktree
            with contextlib.suppress(OSError):  # another tag's loop may be at the same
                if path.read_text().strip() == f"{bench}/.git":
                    shutil.rmtree(path.parent)
        self("worktree", "add", "--force", "--force", "--detach", "--quiet", str(bench), commit)  # though it is missing
        entries = [e.split("\t", 1) for e in self("ls-tree", "-r", "-z", commit).split("\0") if e.startswith("100")]
        found = self("hash-object", "--no-filters", "--", *(path for _, path in entries), cwd=bench).split()
        for (meta, path), blob in zip(entries, found, strict=True):
            if not meta.endswith(blob):
                raise UserError(f"{path} on the bench is not {commit[:7]}'s: a git filter or attribute changes it")
