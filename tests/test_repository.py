"""Git alone: real repositories, real locks left behind by real crashes."""

import contextlib
import os
import subprocess
import sys

import pytest

from harness import repository
from harness.console import UserError
from harness.repository import Repository
from harness.runner import unpack


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(repository, "LOCK_PATIENCE", 0.4)


@pytest.fixture
def git(checkout):
    return Repository(checkout.path, "train.py", "program.md")


@pytest.mark.parametrize("name", ["index.lock", "refs/heads/autoresearch/t.lock"])
def test_lock_left_by_a_crash_is_removed(checkout, git, name, capsys):
    lock = checkout.path / ".git" / name
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text("")
    commit = checkout.git("rev-parse", "HEAD")
    git.reset(checkout.path, commit, "autoresearch/t")
    assert capsys.readouterr().err == f"note: removed {lock}, left by a git that was killed\n"
    assert not lock.exists() and checkout.git("rev-parse", "autoresearch/t") == commit


def test_lock_of_a_living_git_is_waited_for_then_told(checkout, git, tmp_path):
    """A git that runs elsewhere, `git log` in a pager say, holds no lock here."""
    lock = checkout.path / ".git/index.lock"
    head = checkout.git("rev-parse", "HEAD")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").symlink_to(sys.executable)  # a git that takes its time
    for place, told in ((checkout.outside, ""), (checkout.path, "is held: end the git that holds it, or remove")):
        lock.write_text("")
        with subprocess.Popen([tmp_path / "bin/git", "-c", "import time; time.sleep(60)"], cwd=place) as holder:
            try:
                with pytest.raises(UserError, match=told) if told else contextlib.nullcontext():
                    git.reset(checkout.path, head, "autoresearch/t")
                assert lock.exists() == bool(told)
            finally:
                holder.kill()


def test_merge_joins_edits_apart_and_refuses_edits_of_one_line(git):
    base, ours = b"first\na\nb\nlast\n", b"one\na\nb\nlast\n"
    other = b"other\na\nb\nlast\n"
    assert git.merge(ours, base, b"first\na\nb\nseven\n") == b"one\na\nb\nseven\n"
    assert git.merge(ours, base, other) is None
    assert git.merge(ours, base, other, theirs_win=True) == other


def test_worktree_is_made_anew_after_a_crash_in_the_middle(checkout, git):
    place = checkout.path / ".autoresearch" / "t" / "1"
    admin = checkout.path / ".git/worktrees/1"
    commit = checkout.git("rev-parse", "HEAD")
    for crash in (
        lambda: None,
        lambda: (admin / "locked").write_text("initializing"),  # git locks a worktree while it makes it
        lambda: (admin / "index.lock").write_text(""),
        lambda: (place / ".git").unlink(),
        lambda: (admin / "commondir").write_text(""),  # a git that was killed left it half made
    ):
        git.add_worktree(place, commit)
        crash()
        git.remove_half_made_worktrees()  # as every start does
        (place / "checkpoint.pt").write_text("of an earlier session")
        git.add_worktree(place, commit)
        assert checkout.git("-C", str(place), "status", "--porcelain") == ""
        assert checkout.git("-C", str(place), "rev-parse", "HEAD") == commit
        names = checkout.git("ls-tree", "--name-only", "HEAD").split()
        assert {path.name for path in place.iterdir()} - {".git"} == set(names)
    assert checkout.git("symbolic-ref", "HEAD") == "refs/heads/main"


@pytest.mark.parametrize("kind", ["folder", "symlink"])
def test_reset_restores_whatever_replaced_a_file_and_spares_program_and_untracked_files(checkout, git, kind):
    path = checkout.path / "train.py"
    commit = checkout.git("rev-parse", "HEAD")
    for name in ("prepare.py", "program.md", "untracked.txt"):
        (checkout.path / name).write_text("changed")
    checkout.git("rm", "-q", "--cached", "loop.py")
    path.unlink()
    if kind == "folder":
        (path / "inside").mkdir(parents=True)
    else:
        path.symlink_to(checkout.outside / "elsewhere")
    assert git.changed_files(checkout.path, commit) == ["loop.py", "prepare.py", "train.py"]
    git.reset(checkout.path, commit, "autoresearch/t")
    assert git.changed_files(checkout.path, commit) == [] and not path.is_symlink()
    assert not (checkout.outside / "elsewhere").exists()
    assert [(checkout.path / name).read_text() for name in ("program.md", "untracked.txt")] == ["changed"] * 2
    assert checkout.git("symbolic-ref", "HEAD") == "refs/heads/autoresearch/t"


def test_commit_replaces_one_file_of_the_parents_tree(checkout, git):
    """Whatever lies in checkout and index; with any bytes, without hooks; and the archive holds it all."""
    (checkout.path / "run.sh").write_text("#!/bin/sh\n")
    (checkout.path / "run.sh").chmod(0o755)
    (checkout.path / "link").symlink_to("run.sh")
    (checkout.path / "a name\twith\nall").write_bytes(bytes(range(256)))
    parent = checkout.commit("a tree of every kind")
    (checkout.path / "prepare.py").write_text("an agent's edit, staged")
    checkout.git("add", "-A")
    hook = checkout.path / ".git/hooks/reference-transaction"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    for source in (b"DEPTH = 5\r\n", b"\nno newline at the end\x00\xff", b""):
        commit = git.commit(parent, source, "run 0001: \u00e9", "refs/autoresearch/t/0001")
        assert checkout.git("diff", "--name-only", parent, commit) == "train.py"
        assert git.read(commit, "train.py") == source
        found = checkout.git("log", "-1", "--format=%P %an %cn %s", "refs/autoresearch/t/0001")
        assert found == f"{parent} autoresearch autoresearch run 0001: \u00e9"
    assert checkout.git("diff", "--cached", "--name-only", parent) == "prepare.py"  # the index is the agent's
    tree = checkout.outside / "tree"
    unpack(git.archive(commit), tree)
    assert (tree / "a name\twith\nall").read_bytes() == bytes(range(256)) and (tree / "train.py").read_bytes() == b""
    assert os.readlink(tree / "link") == "run.sh" and os.access(tree / "run.sh", os.X_OK)
