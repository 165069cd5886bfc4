"""Git alone: real repositories, real locks left behind by real crashes."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import wait_for

import loop
from harness import repository
from harness.ledger import Row
from harness.repository import Repository, git_hash
from harness.screen import UserError
from harness.store import Store


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(repository, "LOCK_PATIENCE", 0.4)


@pytest.fixture
def git(desk):
    return Repository(desk.path, "train.py", "program.md")


def test_checkout_of_another_user_is_an_error_with_gits_own_remedy(desk, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # no safe.directory of the person's
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(UserError) as caught:
        Repository(desk.path, "train.py", "program.md")
    told, command = str(caught.value).split(", or run: ")
    assert told == f"{desk.path} belongs to another user, so git refuses it: make a clone of your own"
    subprocess.run(command, shell=True, check=True)
    Repository(desk.path, "train.py", "program.md")


LOCKS = ["index.lock", "HEAD.lock", "refs/heads/autoresearch/t.lock"]


@pytest.mark.parametrize("name", LOCKS)
def test_lock_left_by_a_crash_is_removed(desk, git, name, capsys):
    lock = desk.path / ".git" / name
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text("")
    commit = desk.git("rev-parse", "HEAD")
    git.reset(desk.path, commit, "autoresearch/t")
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
            git.reset(desk.path, desk.git("rev-parse", "HEAD"), "autoresearch/t")
        assert lock.exists() == (place == "desk")
    finally:
        holder.kill()
        holder.wait()
    git.reset(desk.path, desk.git("rev-parse", "HEAD"), "autoresearch/t")


def test_lock_released_in_time_is_no_matter(desk, git, monkeypatch, capsys):
    monkeypatch.setattr(repository, "LOCK_PATIENCE", 30)
    lock = desk.path / ".git/index.lock"
    lock.write_text("")
    threading.Timer(0.5, lock.unlink).start()
    git.reset(desk.path, desk.git("rev-parse", "HEAD"), "autoresearch/t")
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


def test_commit_replaces_one_blob_of_the_parents_tree(desk, git):
    """Whatever lies in checkout and index; with any bytes, without hooks and filters, and again under the same ref."""
    (desk.path / "sub").mkdir()
    (desk.path / "sub/run.sh").write_text("#!/bin/sh\n")
    (desk.path / "sub/run.sh").chmod(0o755)
    (desk.path / "link").symlink_to("sub/run.sh")
    (desk.path / "a name\twith\nall").write_bytes(bytes(range(256)))
    (desk.path / ".gitattributes").write_text("* text eol=crlf\n")
    (desk.path / "module").mkdir()  # a submodule that is not checked out has no file to give
    desk.git("update-index", "--add", "--cacheinfo", f"160000,{desk.git('rev-parse', 'HEAD')},module")
    parent = desk.commit("a tree of every kind")
    assert " commit " in desk.git("ls-tree", parent, "module") and "module" not in [b.path for b in git.tree(parent)]
    (desk.path / "prepare.py").write_text("an agent's edit, staged")
    desk.git("add", "-A")
    for hook in ("pre-commit", "commit-msg", "reference-transaction"):
        (desk.path / ".git/hooks" / hook).write_text("#!/bin/sh\nexit 1\n")
        (desk.path / ".git/hooks" / hook).chmod(0o755)
    for source in (b"DEPTH = 5\r\n", b"\nno newline at the end\x00\xff", b"", b"data 4\nfrom x"):
        commit = git.commit(parent, source, "run 0001: é\n\nAutoresearch-profile: fake", "refs/autoresearch/t/1")
        assert desk.git("diff", "--name-only", parent, commit) == "train.py"
        assert git.read(commit, "train.py") == source
        assert (
            desk.git("log", "-1", "--format=%P %an %cn %s", commit) == f"{parent} autoresearch autoresearch run 0001: é"
        )
        assert git.trailer(commit, "Autoresearch-profile") == "fake"
        assert desk.git("rev-parse", "refs/autoresearch/t/1") == commit
        assert git.candidate_tree(parent, source) == git.tree(commit)
        assert all(blob.is_intact() for blob in git.tree(commit))
    assert desk.git("diff", "--cached", "--name-only", parent) == "prepare.py"  # the index is as the agent left it
    same = git.commit(parent, None, "baseline", "refs/autoresearch/t/2")
    assert git.tree(same) == git.tree(parent)
    modes = {blob.path: blob.mode for blob in git.tree(parent)}
    assert modes["link"] == "120000" and modes["sub/run.sh"] == "100755" and modes["train.py"] == "100644"


def test_difference_is_whole_though_settings_and_attributes_would_hide_it(desk, git):
    old = git.head()
    new = git.commit(old, b"DEPTH = 5\n", "deeper", "refs/autoresearch/t/1")
    desk.git("config", "diff.hide.textconv", "echo")
    attributes = desk.path / ".git" / "info" / "attributes"
    attributes.parent.mkdir(exist_ok=True)
    for attribute in ("-diff", "diff=hide"):
        attributes.write_text(f"train.py {attribute}\n")
        assert b"\n+DEPTH = 5\n" in git.diff(old, new)
    desk.git("config", "diff.external", "true")
    assert b"\n+DEPTH = 5\n" in git.diff(old, new)
    assert git.differing_files(old, new) == ["train.py"] and git.differing_files(old, old) == []


def test_blob_is_intact_only_with_its_own_data():
    blob = repository.Blob("a", "100644", git_hash(b"data", 40), b"data")
    assert blob.is_intact() and not repository.Blob("a", "100644", blob.blob, b"date").is_intact()
    long_name = subprocess.run(["sha256sum"], input=b"blob 4\0data", capture_output=True).stdout.split()[0].decode()
    assert repository.Blob("a", "100644", long_name, b"data").is_intact()


def test_merge_joins_edits_apart_and_refuses_edits_of_one_line(git):
    lines = [f"line {i}\n" for i in range(9)]

    def edited(**changes: str) -> bytes:
        return "".join(changes.get(f"l{i}", line) for i, line in enumerate(lines)).encode()

    base = edited()
    assert git.merge(edited(l1="one\n"), base, edited(l7="seven\n")) == edited(l1="one\n", l7="seven\n")
    assert git.merge(edited(l1="one\n"), base, edited(l1="other\n")) is None
    assert git.merge(edited(l1="one\n"), base, edited(l1="one\n")) == edited(l1="one\n")


@pytest.mark.parametrize(
    "state", ["none", "initializing", "no gitdir", "pipe", "empty commondir", "index lock", "half a folder", "no files"]
)
def test_worktree_is_made_anew_after_a_crash_in_the_middle(desk, git, state):
    place = desk.home() / "desks/1/desk"
    commit = desk.git("rev-parse", "HEAD")
    git.add_worktree(place, commit)
    admin = desk.path / ".git/worktrees/desk"
    if state == "initializing":  # git locks a worktree while it makes it
        (admin / "locked").write_text("initializing")
    elif state == "no gitdir":
        (admin / "locked").write_text("initializing")
        (admin / "gitdir").unlink()
    elif state == "pipe":  # whoever reads it waits for ever
        (admin / "gitdir").unlink()
        os.mkfifo(admin / "gitdir")
    elif state == "empty commondir":  # with one of these, git refuses every worktree of the repository
        (admin / "commondir").write_text("")
    elif state == "index lock":
        (admin / "index.lock").write_text("")
    elif state == "half a folder":
        (place / ".git").unlink()
    elif state == "no files":
        for path in [path for path in place.iterdir() if path.is_file()]:
            path.unlink()
    (place / "checkpoint.pt").write_text("of an earlier session")
    for _ in range(2):
        git.add_worktree(place, commit)
        assert desk.git("-C", str(place), "status", "--porcelain") == ""
        assert desk.git("-C", str(place), "rev-parse", "HEAD") == commit
        assert {path.name for path in place.iterdir()} - {".git"} == set(
            desk.git("ls-tree", "--name-only", "HEAD").split()
        )
    assert desk.git("symbolic-ref", "HEAD") == "refs/heads/main"


def test_git_that_a_ctrl_c_met_before_it_began_is_started_again(git, tmp_path, monkeypatch):
    """The stand-in kills itself once, as a terminal's signal does between git's fork and its own session."""
    stand_in = tmp_path / "bin" / "git"
    stand_in.parent.mkdir()
    once = "if mkdir killed 2>/dev/null; then kill -INT $$; fi"
    stand_in.write_text(f'#!/bin/sh\ncd {tmp_path} && {once}; cd - >/dev/null; exec {shutil.which("git")} "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    assert len(git.head()) == 40
    assert (tmp_path / "killed").exists()


def test_branch_moves_under_a_checkout_only_if_no_person_works_there(desk, git):
    store = Store(git, "t", loop.DOMAIN)
    store.home.mkdir(parents=True)

    def keep(number: int) -> str:
        former = store.champion
        commit = store.commit(number, b"DEPTH = %d\n" % number, "deeper", "fake", "d", parent=former)
        store.append([Row(commit[:7], 1.0 - number / 100, 0.5, "keep", "deeper")])
        store.move_branch(former)
        return commit

    desk.git("checkout", "-q", "-b", "autoresearch/t")
    (desk.path / "prepare.py").write_text("a person's edit")
    first = keep(1)
    assert (desk.path / "prepare.py").read_text() == "a person's edit"
    assert "DEPTH = 4" in (desk.path / "train.py").read_text()
    assert desk.git("rev-parse", "autoresearch/t") == first
    desk.git("checkout", "-q", "-f", "autoresearch/t")
    second = keep(2)  # the checkout goes along
    assert (desk.path / "train.py").read_text() == "DEPTH = 2\n" and git.changed_files(second) == []
    desk.git("checkout", "-q", "main")
    third = keep(3)  # it shows another branch
    assert desk.git("symbolic-ref", "--short", "HEAD") == "main"
    assert desk.git("rev-parse", "autoresearch/t") == third
    assert desk.git("status", "--porcelain", "--untracked-files=no") == ""


def test_reset_spares_program_and_untracked_files(desk, git):
    commit = desk.git("rev-parse", "HEAD")
    for name in ("train.py", "prepare.py", "program.md", "untracked.txt"):
        (desk.path / name).write_text("changed")
    desk.git("rm", "-q", "--cached", "loop.py")
    assert git.changed_files(commit) == ["loop.py", "prepare.py", "train.py"]
    git.reset(desk.path, commit, "autoresearch/t")
    assert git.changed_files(commit) == []
    assert [(desk.path / name).read_text() for name in ("program.md", "untracked.txt")] == ["changed"] * 2
    assert desk.git("symbolic-ref", "HEAD") == "refs/heads/autoresearch/t"


@pytest.mark.parametrize("kind", ["folder", "symlink", "deleted"])
def test_reset_restores_whatever_replaced_the_file(desk, git, kind):
    path, commit = desk.path / "train.py", desk.git("rev-parse", "HEAD")
    path.unlink()
    if kind == "folder":
        path.mkdir()
        (path / "inside").write_text("x")
    elif kind == "symlink":
        path.symlink_to(desk.outside / "elsewhere")
    git.reset(desk.path, commit, "autoresearch/t")
    assert path.is_file() and not path.is_symlink() and path.read_bytes() == git.read(commit, "train.py")
    assert not (desk.outside / "elsewhere").exists()


def test_worktree_is_whole_though_an_agent_made_the_checkout_sparse(desk, git):
    desk.git("sparse-checkout", "set", "--no-cone", "nothing")
    place = desk.outside / "worktree"
    git.add_worktree(place, git.head())
    assert (place / "prepare.py").exists() and (place / "harness").is_dir()
