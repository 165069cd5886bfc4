"""plumbing.py alone: real processes in sessions of their own, real signals, real git with real locks left behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from conftest import wait_for

import plumbing
from plumbing import Git, UserError, duration, flock_now, processes, run_child, say, show, sweep, tail, write_atomically


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(plumbing, "KILL_GRACE", 0.5)
    monkeypatch.setattr(Git, "LOCK_PATIENCE", 0.4)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


class Child:
    """Python code run by run_child in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.log, self.mark, self.stop = folder, folder / "run.log", str(folder), threading.Event()
        self.ticks: list[float] = []

    def run(
        self, code: str, limit: float = 30.0, log: Path | None = None, stdin: str = os.devnull, ready: str = ""
    ) -> str:
        """How it ended. Where it prints a word when it is `ready`, its time stands still until it has."""

        def tick(seconds: float) -> None:
            self.ticks.append(seconds)
            if ready:
                wait_for(lambda: self.log.exists() and ready in self.log.read_text())

        return run_child(
            [sys.executable, "-c", "import os, signal, subprocess, sys, time\n" + code],
            cwd=self.folder, env=dict(os.environ), mark=self.mark, log=log or self.log, limit=limit,
            stop=self.stop, tick=tick, stdin=stdin,
        )  # fmt: skip

    def left(self) -> set[int]:
        return processes("environ", re.escape(self.mark).encode())


@pytest.fixture
def child(tmp_path):
    return Child(tmp_path)


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("print('fine')", ""),
        ("sys.exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
    ],
)
def test_run_child_tells_how_it_ended(child, code, ended):
    assert child.run(code) == ended
    assert child.left() == set()


def test_run_child_merges_output_in_order(child):
    code = "for i in range(3):\n    print(i, flush=True); print(i, file=sys.stderr, flush=True)"
    assert child.run(code) == ""
    assert child.log.read_text() == "0\n0\n1\n1\n2\n2\n"


def test_run_child_gives_prompt_and_closes_it(child):
    (child.folder / "prompt").write_text("p" * 400_000)
    assert child.run("print(len(sys.stdin.read()), os.environ['PWD'])", stdin=str(child.folder / "prompt")) == ""
    assert child.log.read_text() == f"400000 {child.folder}\n"


def test_timeout_is_wall_clock_and_ends_a_child_that_ignores_term(child):
    begin = time.monotonic()
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)"
    assert child.run(code, limit=0.5, ready="deaf") == f"timeout after {child.ticks[-1]:.0f} s"
    *before, last = child.ticks
    assert before == sorted(before) and max(before, default=0) <= 0.5 < last < time.monotonic() - begin
    assert child.log.read_text() == "deaf\n" and child.left() == set()


def test_timeout_gives_the_child_time_to_end_by_itself(child, monkeypatch):
    monkeypatch.setattr(plumbing, "KILL_GRACE", 10)
    code = """
def end(*_):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(60)
"""
    assert child.run(code, limit=0.3, ready="up").startswith("timeout")
    assert child.log.read_text() == "up\nsaved\n"


def test_stop_ends_a_child_at_once(child):
    threading.Timer(0.3, child.stop.set).start()
    begin = time.monotonic()
    assert child.run("time.sleep(60)") == "stopped"
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("ending", ["", "; os._exit(1)", "; time.sleep(60)"])
def test_grandchild_in_its_own_session_dies(child, ending):
    grandchild = "import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)"
    code = f"""
up = subprocess.Popen([sys.executable, "-c", {grandchild + "; time.sleep(60)"!r}],
                      start_new_session=True, stdout=subprocess.PIPE)
up.stdout.readline(); print("up", flush=True){ending}
"""
    child.run(code, limit=0.3, ready="up")
    assert child.left() == set() and child.log.read_text() == "up\n"


def test_grandchild_that_holds_the_pipe_without_the_mark_delays_nothing(child):
    escaped = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    code = f"p = subprocess.Popen({escaped!r}, env={{}}, start_new_session=True)\nprint(p.pid, flush=True)"
    begin = time.monotonic()
    assert child.run(code) == ""
    assert time.monotonic() - begin < 5
    found = re.search(r"\d+", child.log.read_text())
    os.kill(int(found[0]), signal.SIGKILL)  # what no mark finds, the test ends


def test_sweep_spares_processes_of_another_mark(child):
    def start(mark: str) -> subprocess.Popen:
        return subprocess.Popen(["sleep", "60"], env=os.environ | {plumbing.MARK: mark}, start_new_session=True)

    ours, others = [start(child.mark) for _ in range(3)], [start(child.mark + "x"), start("x" + child.mark)]
    sweep(child.mark)
    try:
        assert [process.wait(5) for process in ours] == [-signal.SIGTERM] * 3
        assert [process.poll() for process in others] == [None, None]
    finally:
        for process in others:
            process.kill()
            process.wait()


def flood(child: Child, megabytes: int) -> None:
    code = f"""
block = b"x" * 99 + b"\\n"
sys.stdout.buffer.write(b"first line\\n")
for _ in range({megabytes}):
    sys.stdout.buffer.write(block * 10000)
sys.stdout.buffer.write(b"last line\\n")
"""
    tracemalloc.start()
    try:
        assert child.run(code, limit=300) == ""
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20
    text = child.log.read_bytes()
    assert len(text) < plumbing.LOG_CAP + plumbing.TAIL_CAP + 65536 + 100
    assert text.startswith(b"first line\n") and text.endswith(b"\nlast line\n")
    cut = int(re.search(rb"\[\.\.\. (\d+) bytes cut \.\.\.\]", text)[1])
    note = len(f"\n[... {cut} bytes cut ...]\n")
    assert len(text) - note + cut == megabytes * 10**6 + len("first line\nlast line\n")


def test_output_of_50_megabytes_is_capped(child):
    flood(child, 50)


@pytest.mark.slow
def test_output_of_a_gigabyte_is_capped(child):
    flood(child, 1000)


def test_output_up_to_the_cap_is_kept_whole(child):
    size = plumbing.LOG_CAP + plumbing.TAIL_CAP // 2
    assert child.run(f"sys.stdout.write('y' * {size})") == ""
    assert child.log.read_bytes() == b"y" * size


def test_log_on_a_full_disk_does_not_stop_the_child(child):
    assert child.run("print('x' * 10**6, flush=True); open('done', 'w')", log=Path("/dev/full")) == ""
    assert (child.folder / "done").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Screen and files


def test_say_and_show_survive_a_lost_stderr(monkeypatch):
    with open(os.devnull) as closed:
        pass
    for stderr in (None, closed):
        monkeypatch.setattr(sys, "stderr", stderr)
        say("nobody hears this")
        show("nor sees this")


def test_write_atomically_replaces_and_leaves_nothing(tmp_path):
    for text in ("one\n", "two\n"):
        write_atomically(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tail_is_the_last_lines_whatever_their_ends(tmp_path):
    (tmp_path / "log").write_bytes(b"a\nstep 1\rstep 2\r\n\xff last \n\n")
    assert tail(tmp_path / "log", 2) == "step 2\n� last"
    assert tail(tmp_path / "missing", 2) == ""
    (tmp_path / "long").write_text("z" * 10**6)
    assert tail(tmp_path / "long", 1) == "z" * 300


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h"), (36000, "10.0 h")],
)
def test_duration_changes_its_unit_at_two_minutes_and_at_two_hours(seconds, text):
    assert duration(seconds) == text


def test_flock_now_is_exclusive_until_its_holder_dies(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(plumbing.__file__).parent)!r}); import plumbing, time\n"
        f"file = open({str(tmp_path / 'lock')!r}, 'a'); print(plumbing.flock_now(file), flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "True\n"
        with open(tmp_path / "lock") as file:
            assert not flock_now(file)
            holder.kill()
            holder.wait()
            assert flock_now(file)
    finally:
        holder.kill()
        holder.communicate()


# ---------------------------------------------------------------------------------------------------------------------
# Git


@pytest.fixture
def git(desk):
    return Git(desk.path, "train.py", spared="program.md")


LOCKS = ["index.lock", "HEAD.lock", "refs/heads/autoresearch/t.lock"]


@pytest.mark.parametrize("name", LOCKS)
def test_lock_left_by_a_crash_is_removed(desk, git, name, capsys):
    lock = desk.path / ".git" / name
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text("")
    commit = desk.git("rev-parse", "HEAD")
    git.reset_desk("autoresearch/t", commit)
    assert capsys.readouterr().err == f"note: removed {lock}, left by a git that was killed\n"
    assert not lock.exists() and desk.git("rev-parse", "autoresearch/t") == commit


@pytest.mark.parametrize("place", ["desk", "outside"])
def test_lock_of_a_living_git_is_waited_for_then_told(desk, git, tmp_path, place):
    """A git that runs elsewhere, `git log` in a pager say, holds no lock here."""
    lock = desk.path / ".git/index.lock"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").symlink_to(sys.executable)  # a git that takes its time
    holder = subprocess.Popen([tmp_path / "bin/git", "-c", "import time; time.sleep(60)"], cwd=tmp_path / place)
    lock.write_text("")
    try:
        told = f"^{re.escape(str(lock))} is held: end the git that holds it, or remove"
        with pytest.raises(UserError, match=told) if place == "desk" else contextlib.nullcontext():
            git.reset_desk("autoresearch/t", desk.git("rev-parse", "HEAD"))
        assert lock.exists() == (place == "desk")
    finally:
        holder.kill()
        holder.wait()
    git.reset_desk("autoresearch/t", desk.git("rev-parse", "HEAD"))


def test_lock_released_in_time_is_no_matter(desk, git, monkeypatch, capsys):
    monkeypatch.setattr(Git, "LOCK_PATIENCE", 30)
    lock = desk.path / ".git/index.lock"
    lock.write_text("")
    threading.Timer(0.5, lock.unlink).start()
    git.reset_desk("autoresearch/t", desk.git("rev-parse", "HEAD"))
    assert capsys.readouterr().err == ""


def test_failure_of_git_is_one_line_for_a_person(git):
    with pytest.raises(UserError, match=r"^git cat-file failed: fatal: .*nonsense.*$") as caught:
        git.read("nonsense", "train.py")
    assert "\n" not in str(caught.value)
    assert git("rev-parse", "--verify", "--quiet", "nonsense", default="none") == "none"


def test_ctrl_c_does_not_reach_git(desk, git):
    """The terminal signals the whole foreground group; a git that dies of it would look like a failure."""
    (desk.outside / "slow").write_text("#!/bin/sh\necho $$ > pid\nexec sleep 1\n")
    (desk.outside / "slow").chmod(0o755)
    thread = threading.Thread(target=lambda: git("-c", f"alias.slow=!{desk.outside}/slow", "slow"))
    thread.start()
    pid = int(wait_for(lambda: (desk.path / "pid").exists() and (desk.path / "pid").read_text()))
    group = os.getpgid(pid)
    thread.join()
    assert group != os.getpgrp()


def test_commit_replaces_one_blob_of_the_parents_tree(desk, git, tmp_path):
    parent = desk.git("rev-parse", "HEAD")
    (desk.path / "prepare.py").write_text("an agent's edit, staged")
    desk.git("add", "-A")
    (tmp_path / "new.py").write_bytes(b"DEPTH = 5\r\n")
    commit = git.commit(parent, tmp_path / "new.py", "message", "refs/autoresearch/t/1")
    assert desk.git("diff", "--name-only", parent, commit) == "train.py"
    assert git.read(commit, "train.py") == b"DEPTH = 5\r\n"
    assert desk.git("log", "-1", "--format=%P %an %s", commit) == f"{parent} autoresearch message"
    assert desk.git("rev-parse", "refs/autoresearch/t/1") == commit


def test_place_leaves_nothing_of_an_earlier_run(desk, git):
    bench, commit = desk.home() / "bench", desk.git("rev-parse", "HEAD")
    for _ in range(2):
        git.place(bench, commit)
        names = {path.name for path in bench.iterdir()} - {".git"}
        assert names == set(desk.git("ls-tree", "--name-only", "HEAD").split())
        (bench / "__pycache__").mkdir()
        (bench / "__pycache__/prepare.cpython-312.pyc").write_text("poison")
        (bench / "checkpoint.pt").write_text("weights")
        (bench / "prepare.py").write_text("edited")
        (bench / "results.tsv").symlink_to("/etc/passwd")
    assert desk.git("worktree", "list").count("\n") == 1


@pytest.mark.parametrize(
    "state", ["initializing", "no gitdir", "empty commondir", "index lock", "half a folder", "no files"]
)
def test_place_after_a_crash_in_the_middle(desk, git, state):
    bench, commit = desk.home() / "bench", desk.git("rev-parse", "HEAD")
    git.place(bench, commit)
    admin = desk.path / ".git/worktrees/bench"
    if state == "initializing":  # git locks a worktree while it makes it
        (admin / "locked").write_text("initializing")
    elif state == "no gitdir":
        (admin / "locked").write_text("initializing")
        (admin / "gitdir").unlink()
    elif state == "empty commondir":  # with one of these, git refuses every worktree of the repository
        (admin / "commondir").write_text("")
    elif state == "index lock":
        (admin / "index.lock").write_text("")
    elif state == "half a folder":
        (bench / ".git").unlink()
    else:
        for path in [path for path in bench.iterdir() if path.is_file()]:
            path.unlink()
    for _ in range(2):
        git.place(bench, commit)
        assert desk.git("-C", str(bench), "status", "--porcelain") == ""
        assert desk.git("-C", str(bench), "rev-parse", "HEAD") == commit


def test_reset_desk_spares_program_and_untracked_files(desk, git):
    commit = desk.git("rev-parse", "HEAD")
    for name in ("train.py", "prepare.py", "program.md", "untracked.txt"):
        (desk.path / name).write_text("changed")
    desk.git("rm", "-q", "--cached", "loop.py")
    assert git.changed(commit) == ["loop.py", "prepare.py", "train.py"]
    git.reset_desk("autoresearch/t", commit)
    assert git.changed(commit) == []
    assert [(desk.path / name).read_text() for name in ("program.md", "untracked.txt")] == ["changed"] * 2
    assert desk.git("symbolic-ref", "HEAD") == "refs/heads/autoresearch/t"


@pytest.mark.parametrize("kind", ["folder", "symlink", "deleted"])
def test_reset_desk_restores_whatever_replaced_the_file(desk, git, kind):
    path, commit = desk.path / "train.py", desk.git("rev-parse", "HEAD")
    path.unlink()
    if kind == "folder":
        path.mkdir()
        (path / "inside").write_text("x")
    elif kind == "symlink":
        path.symlink_to(desk.outside / "elsewhere")
    git.reset_desk("autoresearch/t", commit)
    assert path.is_file() and not path.is_symlink() and path.read_bytes() == git.read(commit, "train.py")
    assert not (desk.outside / "elsewhere").exists()
