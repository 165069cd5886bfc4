"""Bad input gets one `error:` line and exit code 1 or 2, never a traceback; the help and the exit codes.

    uv run pytest tests/test_commands.py
"""

import os
import re
import shutil
import stat
import subprocess
import sys

import pytest
from conftest import BASELINE, errors


def refused(desk, *args, code, **env) -> str:
    """The one error line of a command that must fail, and that prints nothing for a script to read."""
    done = desk.loop(*args, code=code, **env)
    assert len(errors(done)) == 1 and done.stdout == "", done.stderr
    return errors(done)[0]


# ---- Which agent -----------------------------------------------------------------------------------------------------


def test_run_without_an_agent_lists_the_installed_ones(desk):
    error = refused(desk, code=2)
    assert "no agent given" in error and "--agent NAME (installed here: " in error and "random" in error
    assert "--agent-cmd" in error


def test_unknown_agent_is_named_and_the_installed_ones_listed(desk):
    error = refused(desk, "--agent", "hal9000", code=2)
    assert "unknown agent 'hal9000'" in error and "random" in error


def test_agent_command_that_cannot_be_started_is_refused_before_anything_is_made(desk):
    for command in ("", "'unfinished", "no-such-agent --yes"):
        refused(desk, "--agent-cmd", command, "--tag", "t", code=2)
    assert not desk.home().exists() and desk.git("symbolic-ref", "--short", "HEAD") == "main"


def test_explicit_run_and_bare_options_are_the_same_command(desk):
    for words in (("run",), ()):
        desk.loop(*words, *BASELINE)
    assert desk.statuses() == ["keep"]


# ---- Where it is started ---------------------------------------------------------------------------------------------


def test_python_without_the_packages_is_an_error_that_names_uv_run(desk):
    command = [sys.executable, "-S", str(desk.path / "loop.py"), "status"]  # -S: no site-packages
    process = subprocess.run(command, env=desk.env, capture_output=True, text=True)
    expected = f"error: {sys.executable} has no package 'git': start this with 'uv run' in place of python\n"
    assert (process.returncode, process.stderr) == (1, expected)


def test_folder_that_is_no_git_repository_is_an_error(desk):
    shutil.rmtree(desk.path / ".git")
    assert "is not the top level of a git repository" in refused(desk, "--agent-cmd", "true", code=1)


def test_copy_inside_another_repository_is_an_error(desk):
    inner = desk.path / "inner"
    shutil.copytree(desk.path, inner, ignore=shutil.ignore_patterns(".git", "inner"))
    process = subprocess.run(
        [sys.executable, inner / "loop.py", "status"], env=desk.env, capture_output=True, text=True, cwd=inner
    )
    assert process.returncode == 1 and "is not the top level of a git repository" in process.stderr


def test_repository_without_a_commit_is_an_error(desk):
    shutil.rmtree(desk.path / ".git")
    desk.git("init", "-q")
    assert "has no commit at HEAD: run 'git add -A && git commit" in refused(desk, "--agent-cmd", "true", code=1)


def test_machine_without_git_is_an_error(desk):
    for command in (["--agent-cmd", sys.executable], ["try", "x"], ["status"]):
        assert "git is not installed" in refused(desk, *command, code=1, PATH=str(desk.outside))


def test_dirty_files_at_the_first_start_are_an_error_that_names_them(desk):
    for file in ("train.py", "prepare.py"):
        with open(desk.path / file, "a") as text:
            text.write("# mine\n")
    error = refused(desk, "--agent-cmd", "true", "--tag", "t", code=1)
    assert "prepare.py, train.py has uncommitted changes: commit them or run 'git stash'" in error
    assert (desk.path / "train.py").read_text().endswith("# mine\n")
    assert desk.git("symbolic-ref", "--short", "HEAD") == "main" and not (desk.home() / "results.tsv").exists()


def test_checkout_with_other_line_ends_is_an_error_whose_commands_mend_it(desk):
    """As Git for Windows is installed: every file differs, and `git stash` finds nothing."""
    desk.git("config", "core.autocrlf", "true")
    desk.git("read-tree", "--empty")
    desk.git("reset", "-q", "--hard")
    for name in desk.git("ls-files").splitlines():
        os.utime(desk.path / name, (1e9, 1e9))
    desk.git("update-index", "--refresh")  # an old checkout: git need not look into the files any more
    error = refused(desk, *BASELINE, code=1)
    assert error.startswith("error: .gitignore, harness/__init__.py, ") and " more has uncommitted changes: " in error
    commands = error.split("'")[-2]
    assert commands.startswith("git config core.autocrlf false && ")
    subprocess.run(commands, shell=True, cwd=desk.path, check=True, capture_output=True)
    desk.loop(*BASELINE)


def test_dirty_instructions_and_untracked_files_are_no_error(desk):
    (desk.path / "program.md").write_text("mine\n")
    (desk.path / "notes.txt").write_text("mine\n")
    desk.loop(*BASELINE)


# ---- Tags, profiles, numbers -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tag_that_is_no_branch_name_is_refused(desk):
    for tag in ("a b", "..", "a/b", "x.lock", "a~1", "a:b", "é\x07", "@{", 101 * "x"):
        assert "is not a valid branch name" in refused(desk, "status", f"--tag={tag}", code=2)
    assert "is not a valid branch name" in refused(desk, "--agent-cmd", "true", "--tag=..", code=2)


def test_tag_defaults_to_the_current_branchs_else_to_today(desk):
    assert re.match(r"autoresearch/[a-z]{3}\d\d: ", desk.loop("status").stdout)
    desk.git("checkout", "-q", "-b", "autoresearch/mine")
    assert desk.loop("status").stdout.startswith("autoresearch/mine: ")


def test_unknown_profile_is_refused_with_the_judges_own_words(desk):
    assert refused(desk, "--agent-cmd", "true", code=2, AUTORESEARCH_PROFILE="tiny") == "error: unknown profile 'tiny'"


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
    (["--max-usd", "5", "--agent", "codex"], "--max-usd 5: codex reports no dollars: claude, opencode do"),
    (["--patience", "0", "--agent-cmd", "true"], "--patience 0: give 1 or more"),
    (["--target", "nan", "--agent-cmd", "true"], "--target nan: give a val_bpb from 0.01 to 100"),
    (["--notify", " ", "--agent-cmd", "true"], "--notify ' ': give a shell command"),
    (["frobnicate"], "no command 'frobnicate': use one of run, try, status, report, audit"),
    (["status", "--agent", "x"], "unrecognized arguments: --agent x"),
]


def test_arguments_that_make_no_sense_are_a_usage_error(desk):
    for args, told in NO_SENSE:
        assert desk.loop(*args, code=2).stderr.splitlines()[-1].endswith(f"error: {told}")


def test_help_names_every_command(desk):
    told = desk.loop("--help").stdout
    assert all(f"    {name} " in told for name in ("run", "try", "status", "report", "audit"))


# ---- What a person reads it with -------------------------------------------------------------------------------------


def test_terminal_that_is_not_utf_8_and_a_reader_that_has_read_enough_are_no_errors(desk):
    desk.home().mkdir(parents=True)
    row = "1234567\t1.000000\t0.0\tkeep\tgrößer\n"
    (desk.home() / "results.tsv").write_text(f"commit\tval_bpb\tmemory_gb\tstatus\tdescription\n{row}")
    assert "gr??er" in desk.loop("status", "--tag", "t", PYTHONIOENCODING="ascii").stdout
    for unbuffered in ("", "1"):  # written at the exit, or at once
        process = desk.popen("status", "--tag", "t", PYTHONUNBUFFERED=unbuffered)
        process.stdout.close()
        assert (process.wait(20), process.stderr.read()) == (0, "")


# ---- Places that cannot be written -----------------------------------------------------------------------------------


def test_home_that_cannot_be_made_is_an_error(desk):
    (desk.path / ".git" / "autoresearch").write_text("a file where the loop's folder should be")
    refused(desk, "--agent-cmd", "true", "--tag", "t", code=1)


def test_file_or_pipe_in_place_of_the_bench_is_removed(desk):
    desk.home().mkdir(parents=True)
    os.mkfifo(desk.home() / "bench")
    desk.loop(*BASELINE)
    assert desk.statuses() == ["keep"]


def test_ledgers_copy_that_cannot_be_written_is_only_a_warning(desk):
    (desk.path / "results.tsv").mkdir()
    (desk.path / "results.tsv" / "mine.txt").write_text("a person's")
    done = desk.loop(*BASELINE)
    assert "warning: no copy of the ledger" in done.stderr
    assert desk.statuses() == ["keep"] and (desk.path / "results.tsv" / "mine.txt").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_checkout_that_is_read_only_is_an_error(desk):
    mode = stat.S_IMODE((desk.path / ".git").stat().st_mode)
    (desk.path / ".git").chmod(0o555)
    refused(desk, "--agent-cmd", "true", "--tag", "t", code=1)
    (desk.path / ".git").chmod(mode)


def test_preparation_that_fails_is_an_error_with_its_problem(desk):
    making = '(CACHE / "tokens").mkdir('
    desk.replace("prepare.py", making, f'sys.exit("error: no network")\n    {making}')
    desk.commit("a preparation that fails")
    done = desk.loop("--agent-cmd", "true", "--tag", "t", code=1)
    assert done.stderr.splitlines()[1:] == ["error: no network", "error: the preparation failed: no manifest"]


def test_variables_of_a_git_hook_do_not_lead_the_loop_elsewhere(desk):
    desk.loop("status", GIT_DIR="/nonexistent", GIT_WORK_TREE="/nonexistent", GIT_INDEX_FILE="/nonexistent")


@pytest.mark.slow
def test_harness_of_this_checkout_wins_over_an_installed_one_and_the_desks_files_shadow_nothing(desk):
    """An installed package `harness`, and a json.py and a git.py that an agent left on the desk."""
    installed = desk.outside / "harness"
    installed.mkdir()
    (installed / "__init__.py").write_text("1 / 0")
    for name in ("json.py", "git.py", "numpy.py", "matplotlib.py", "ledger.py", "report.py"):
        (desk.path / name).write_text("1 / 0")
    desk.loop("status", "--tag", "t", PYTHONPATH=str(desk.outside))
    desk.commit("files that shadow")
    desk.loop(*BASELINE)
    desk.loop("report", "--tag", "t")
    assert desk.statuses() == ["keep"]
