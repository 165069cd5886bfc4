"""Bad input gets one `error:` line and exit code 1 or 2, never a traceback; the help and the exit codes.

    uv run pytest tests/test_cli.py
"""

import os
import re
import shutil
import stat
import subprocess
import sys

import pytest
from conftest import BASELINE, errors


def refused(checkout, *args, code, **env) -> str:
    """The one error line of a command that must fail, and that prints nothing for a script to read."""
    done = checkout.loop(*args, code=code, **env)
    assert len(errors(done)) == 1 and done.stdout == "", done.stderr
    return errors(done)[0]


# ---- Which agent -----------------------------------------------------------------------------------------------------


def test_run_without_an_agent_lists_the_installed_ones(checkout):
    error = refused(checkout, code=2)
    assert "no agent given" in error and "--agent NAME (installed here: " in error and "random" in error
    assert "--agent-cmd" in error


def test_unknown_agent_is_named_and_the_installed_ones_listed(checkout):
    error = refused(checkout, "--agent", "hal9000", code=2)
    assert "unknown agent 'hal9000'" in error and "random" in error


def test_agent_command_that_cannot_be_started_is_refused_before_anything_is_made(checkout):
    for command in ("", "'unfinished", "no-such-agent --yes"):
        refused(checkout, "--agent-cmd", command, "--tag", "t", code=2)
    assert not checkout.home().exists() and checkout.git("symbolic-ref", "--short", "HEAD") == "main"


def test_explicit_run_and_bare_options_are_the_same_command(checkout):
    for words in (("run",), ()):
        checkout.loop(*words, *BASELINE)
    assert checkout.statuses() == ["keep"]


# ---- Where it is started ---------------------------------------------------------------------------------------------


def test_python_without_the_packages_is_an_error_that_names_uv_run(checkout):
    command = [sys.executable, "-S", str(checkout.path / "loop.py"), "status"]  # -S: no site-packages
    process = subprocess.run(command, env=checkout.env, capture_output=True, text=True)
    expected = f"error: {sys.executable} has no package 'git': start this with 'uv run' in place of python\n"
    assert (process.returncode, process.stderr) == (1, expected)


def test_folder_that_is_no_git_repository_is_an_error(checkout):
    shutil.rmtree(checkout.path / ".git")
    assert "is not the top level of a git repository" in refused(checkout, "--agent-cmd", "true", code=1)


def test_copy_inside_another_repository_is_an_error(checkout):
    inner = checkout.path / "inner"
    shutil.copytree(checkout.path, inner, ignore=shutil.ignore_patterns(".git", "inner"))
    process = subprocess.run(
        [sys.executable, inner / "loop.py", "status"], env=checkout.env, capture_output=True, text=True, cwd=inner
    )
    assert process.returncode == 1 and "is not the top level of a git repository" in process.stderr


def test_repository_without_a_commit_is_an_error(checkout):
    shutil.rmtree(checkout.path / ".git")
    checkout.git("init", "-q")
    assert "has no commit at HEAD: run 'git add -A && git commit" in refused(checkout, "--agent-cmd", "true", code=1)


def test_machine_without_git_is_an_error(checkout):
    for command in (["--agent-cmd", sys.executable], ["try", "x"], ["status"]):
        assert "git is not installed" in refused(checkout, *command, code=1, PATH=str(checkout.outside))


def test_dirty_instructions_and_untracked_files_are_no_error(checkout):
    (checkout.path / "program.md").write_text("mine\n")
    (checkout.path / "notes.txt").write_text("mine\n")
    checkout.loop(*BASELINE)


# ---- Tags, profiles, numbers -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tag_that_is_no_branch_name_is_refused(checkout):
    for tag in ("a b", "..", "a/b", "x.lock", "a~1", "a:b", "é\x07", "@{", 101 * "x"):
        assert "is not a valid branch name" in refused(checkout, "status", f"--tag={tag}", code=2)
    assert "is not a valid branch name" in refused(checkout, "--agent-cmd", "true", "--tag=..", code=2)


def test_tag_defaults_to_the_current_branchs_else_to_today(checkout):
    assert re.match(r"autoresearch/[a-z]{3}\d\d: ", checkout.loop("status").stdout)
    checkout.git("checkout", "-q", "-b", "autoresearch/mine")
    assert checkout.loop("status").stdout.startswith("autoresearch/mine: ")


def test_unknown_profile_is_refused_with_the_evaluators_own_words(checkout):
    error = refused(checkout, "--agent-cmd", "true", code=2, AUTORESEARCH_PROFILE="tiny")
    assert error == "error: unknown profile 'tiny'"


NO_SENSE = [
    (["--max-experiments", "many"], "argument --max-experiments: invalid int value: 'many'"),
    (["--hours", "x"], "argument --hours: invalid float value: 'x'"),
    (["--agent-timeout", ""], "argument --agent-timeout: invalid float value: ''"),
    (["audit", "--replicates", "1.5"], "argument --replicates: invalid int value: '1.5'"),
    (["--workers", "0", "--agent-cmd", "true"], "--workers 0: give 1 or more"),
    (["--ahead", "-1", "--agent-cmd", "true"], "--ahead -1: give 0 or more"),
    (["--hours", "nan", "--agent-cmd", "true"], "--hours nan: give 0 or more"),
    (["try"], "one of the arguments description --again --base is required"),
    (["try", "an idea", "--base"], "argument --base: not allowed with argument description"),
    (["try", "--again", "x"], "argument --again: invalid int value: 'x'"),
    (["--max-usd", "-1", "--agent-cmd", "true"], "--max-usd -1.0: give 0 or more"),
    (
        ["--max-usd", "5", "--agent", "codex"],
        "--max-usd 5: codex reports no dollars: claude, vibe, opencode, kilo, pi do",
    ),
    (["--patience", "0", "--agent-cmd", "true"], "--patience 0: give 1 or more"),
    (["--target", "nan", "--agent-cmd", "true"], "--target nan: give a val_bpb from 0.01 to 100"),
    (["--notify", " ", "--agent-cmd", "true"], "--notify ' ': give a shell command"),
    (["--confirm", "-1", "--agent-cmd", "true"], "--confirm -1: give 0 or more"),
    (["frobnicate"], "no command 'frobnicate': use one of run, try, status, report, audit, ablate, check"),
    (["status", "--agent", "x"], "unrecognized arguments: --agent x"),
]


def test_arguments_that_make_no_sense_are_a_usage_error(checkout):
    for args, told in NO_SENSE:
        assert checkout.loop(*args, code=2).stderr.splitlines()[-1].endswith(f"error: {told}")


def test_help_names_every_command(checkout):
    told = checkout.loop("--help").stdout
    assert all(f"    {name} " in told for name in ("run", "try", "status", "report", "audit", "check"))


# ---- What a person reads it with -------------------------------------------------------------------------------------


def test_terminal_that_is_not_utf_8_and_a_reader_that_has_read_enough_are_no_errors(checkout):
    checkout.home().mkdir(parents=True)
    line = '{"number": 1, "commit": "1234567", "status": "keep", "purpose": "baseline", "score": 1.0,'
    line += ' "description": "gr\u00f6\u00dfer"}'
    (checkout.home() / "runs.jsonl").write_text(line + "\n")
    assert "gr??er" in checkout.loop("status", "--tag", "t", PYTHONIOENCODING="ascii").stdout
    for unbuffered in ("", "1"):  # written at the exit, or at once
        process = checkout.popen("status", "--tag", "t", PYTHONUNBUFFERED=unbuffered)
        process.stdout.close()
        assert (process.wait(20), process.stderr.read()) == (0, "")


# ---- Places that cannot be written -----------------------------------------------------------------------------------


def test_home_that_cannot_be_made_is_an_error(checkout):
    (checkout.path / ".git" / "autoresearch").write_text("a file where the loop's folder should be")
    refused(checkout, "--agent-cmd", "true", "--tag", "t", code=1)


def test_ledgers_copy_that_cannot_be_written_is_only_a_warning(checkout):
    (checkout.path / "results.tsv").mkdir()
    (checkout.path / "results.tsv" / "mine.txt").write_text("a person's")
    done = checkout.loop(*BASELINE)
    assert "or its copy could not be written" in done.stderr
    assert checkout.statuses() == ["keep"] and (checkout.path / "results.tsv" / "mine.txt").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_checkout_that_is_read_only_is_an_error(checkout):
    mode = stat.S_IMODE((checkout.path / ".git").stat().st_mode)
    (checkout.path / ".git").chmod(0o555)
    refused(checkout, "--agent-cmd", "true", "--tag", "t", code=1)
    (checkout.path / ".git").chmod(mode)


def test_preparation_that_fails_is_an_error_with_its_problem(checkout):
    making = '(CACHE / "manifest.json").write_text('
    checkout.replace("prepare.py", making, f'sys.exit("error: no network")\n    {making}')
    checkout.commit("a preparation that fails")
    done = checkout.loop("--agent-cmd", "true", "--tag", "t", code=1)
    assert done.stderr.splitlines()[1:] == ["error: no network", "error: the preparation failed: no manifest"]


def test_variables_of_a_git_hook_do_not_lead_the_loop_elsewhere(checkout):
    checkout.loop("status", GIT_DIR="/nonexistent", GIT_WORK_TREE="/nonexistent", GIT_INDEX_FILE="/nonexistent")


@pytest.mark.slow
def test_harness_of_this_checkout_wins_over_an_installed_one_and_the_desks_files_shadow_nothing(checkout):
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
