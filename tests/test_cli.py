"""Bad input gets one `error:` line and exit code 1 or 2, never a traceback; the help and the exit codes."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import BASELINE

import loop
from harness import cli
from harness.ledger import Run


@pytest.fixture
def command(checkout, monkeypatch, capsys):
    """Calls a command in this process, where no signal and no import matters: its output, or the one line that tells
    why it failed; then it prints nothing for a script to read."""

    def call(*args: str, code: int, **env: str) -> SimpleNamespace:
        with monkeypatch.context() as patch:
            for name, value in (checkout.env | env).items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["loop.py", *args])
            try:
                found = cli.main(loop.DOMAIN, checkout.path, loop.Ratchet)
            except SystemExit as error:  # argparse's
                found = error.code
        out, err = capsys.readouterr()
        assert found == code and not (code and out), err
        (error,) = [line for line in err.splitlines() if "error: " in line] if code else [""]
        return SimpleNamespace(stdout=out, error=error)

    return call


@pytest.mark.parametrize(("extra", "args", "told"), [
    ("ray", ["--agent", "random", "--ray", "head:6379"], "--ray head:6379 needs Ray, which is not installed"),
    ("tpe", ["--agent", "tpe"], "tpe is not installed"),
])  # fmt: skip
def test_missing_extra_is_refused_with_the_command_that_brings_it(command, monkeypatch, extra, args, told):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    remedy = f"'uv run --extra {extra} loop.py {shlex.join(args)}'"
    assert command(*args, code=2).error.startswith(f"error: {told}: {remedy}")


def test_agent_that_cannot_start_and_an_unknown_profile_are_refused_before_anything_is_made(checkout, command):
    assert "no agent given" in command(code=2).error
    assert "starts no program that is installed" in command("--agent-cmd", "no-such-agent", "--tag", "t", code=2).error
    error = command("--agent-cmd", "true", "--tag", "t", code=2, AUTORESEARCH_PROFILE="tiny").error
    assert error == "error: unknown profile 'tiny'"  # in the evaluator's own words
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "main"


def test_python_without_the_packages_and_a_machine_without_git_are_an_error(checkout):
    command = [sys.executable, "-S", str(checkout.path / "loop.py"), "status"]  # -S: no site-packages
    process = subprocess.run(command, env=checkout.env, capture_output=True, text=True)
    expected = f"error: {sys.executable} has no package 'git': start this with 'uv run' in place of python\n"
    assert (process.returncode, process.stderr) == (1, expected)
    done = checkout.loop("--agent-cmd", sys.executable, code=1, PATH=str(checkout.outside))
    assert "git is not installed" in done.stderr


def test_folder_that_is_no_repository_with_a_commit_of_its_own_is_an_error(checkout, command):
    shutil.rmtree(checkout.path / ".git")
    assert "is not the top level of a git repository" in command("--agent-cmd", "true", code=1).error
    checkout.git("init", "-q")
    assert "has no commit at HEAD: run 'git add -A && git commit" in command("--agent-cmd", "true", code=1).error


def test_tag_is_a_branch_name_and_defaults_to_the_current_branchs_else_to_today(checkout, command):
    for tag in ("a b", "..", "a/b", "x.lock", "é\x07", 101 * "x"):
        assert "is not a valid branch name" in command("status", f"--tag={tag}", code=2).error
    assert re.match(r"autoresearch/[a-z]{3}\d\d: ", command("status", code=0).stdout)
    checkout.git("checkout", "-q", "-b", "autoresearch/mine")
    assert command("status", code=0).stdout.startswith("autoresearch/mine: ")


RUN = ["--agent-cmd", "true"]
NO_SENSE = [
    (["--max-experiments", "many"], "argument --max-experiments: invalid int value: 'many'"),
    (["--ray", "head", *RUN], "--ray 'head': give HOST:PORT of a cluster; without --ray runs are made here"),
    (["--workers", "0", *RUN], "--workers 0: give 1 or more"),
    (["try"], "one of the arguments description --again --base is required"),
    (["try", "an idea", "--base"], "argument --base: not allowed with argument description"),
    (["--max-usd", "5", "--agent", "codex"], "codex reports no dollars: claude, vibe, opencode, kilo, pi do"),
    (["--target", "nan", *RUN], "--target nan: give a val_bpb from 0.01 to 100"),
    (["frobnicate"], "no command 'frobnicate': use one of run, try, status, report, audit, ablate, check"),
    (["status", "--agent", "x"], "unrecognized arguments: --agent x"),
]


def test_arguments_that_make_no_sense_are_a_usage_error_and_help_names_every_command(command):
    for args, told in NO_SENSE:
        assert command(*args, code=2).error.endswith(told)
    told = command("--help", code=0).stdout
    assert all(f"    {name} " in told for name in ("run", "try", "status", "report", "audit", "check"))


def test_terminal_that_is_not_utf_8_and_a_reader_that_has_read_enough_are_no_errors(checkout, tag):
    tag.append(Run(1, "1234567", purpose="baseline", status="keep", score=1.0, description="gr\u00f6\u00dfer"))
    nowhere = dict.fromkeys(("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"), "/nonexistent")  # as in a git hook
    assert "gr??er" in checkout.loop("status", "--tag", "t", PYTHONIOENCODING="ascii", **nowhere).stdout
    process = checkout.popen("status", "--tag", "t", PYTHONUNBUFFERED="1")
    process.stdout.close()
    assert (process.wait(20), process.stderr.read()) == (0, "")


def test_places_that_cannot_be_written_are_an_error_or_a_warning_for_a_mere_copy(checkout, command):
    home = checkout.path / ".git" / "autoresearch"
    home.write_text("a file where the loop's folder should be")
    command("--agent-cmd", "true", "--tag", "t", code=1)
    home.unlink()
    (checkout.path / "results.tsv").mkdir()
    assert "or its copy could not be written" in checkout.loop("run", *BASELINE).stderr
    assert checkout.statuses() == ["keep"]


def test_preparation_that_fails_is_an_error_with_its_problem(checkout):
    making = '(CACHE / "manifest.json").write_text('
    checkout.replace("prepare.py", making, f'sys.exit("error: no network")\n    {making}')
    checkout.commit("a preparation that fails")
    done = checkout.loop("--agent-cmd", "true", "--tag", "t", code=1)
    assert done.stderr.splitlines()[1:] == ["error: no network", "error: the preparation failed: no manifest"]


def test_harness_of_this_checkout_wins_over_an_installed_one_and_files_beside_it_shadow_nothing(checkout):
    """An installed package `harness`, and a json.py and a git.py that an agent left in the checkout."""
    installed = checkout.outside / "harness"
    installed.mkdir()
    (installed / "__init__.py").write_text("1 / 0")
    for name in ("json.py", "git.py", "numpy.py", "matplotlib.py", "ledger.py", "report.py"):
        (checkout.path / name).write_text("1 / 0")
    checkout.loop("status", "--tag", "t", PYTHONPATH=str(checkout.outside))
    checkout.commit("files that shadow")
    checkout.loop(*BASELINE)
    checkout.loop("report", "--tag", "t")
    assert checkout.statuses() == ["keep"]
