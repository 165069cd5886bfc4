"""`loop.py try`: one experiment for an agent that loops by itself, on the ledger that `loop.py run` uses too.

    uv run pytest tests/test_loop_try.py
"""

import os
import signal
import subprocess
import sys

import pytest
from conftest import wait_for


@pytest.fixture
def branch(desk):
    """A desk on the branch of tag t."""
    desk.git("checkout", "-q", "-b", "autoresearch/t")
    return desk


def attempt(desk, words="deeper", code=0, **knobs):
    desk.set_knob(**knobs)
    process = desk.loop("try", words, timeout=30)
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    return process


def is_training(desk, description: str):
    """True once the last event of the timeline is this experiment's training."""
    try:
        last = desk.events()[-1]
    except (FileNotFoundError, IndexError, ValueError):
        return False
    return last["event"] == "training" and last["description"] == description


def test_try_prints_verdict_best_and_log_in_three_lines(branch):
    process = attempt(branch, "raise depth to 5", DEPTH=5)
    row, best, log = process.stdout.splitlines()
    assert row.split("\t")[1:] == ["1.070000", "0.5", "keep", "raise depth to 5"]
    assert best.startswith(f"Best val_bpb 1.070000 ({row[:7]}), -0.010000 to the baseline")
    assert log == "log runs/0001/run.log" and "val_bpb:" in (branch.path / "runs/0001/run.log").read_text()
    assert [row[4] for row in branch.rows()] == ["baseline", "raise depth to 5"]  # the baseline came first
    assert len(process.stderr.splitlines()) == 1
    assert branch.git("rev-parse", "HEAD")[:7] == row[:7]


def test_try_that_is_not_better_puts_the_champion_back(branch):
    attempt(branch, DEPTH=5)
    process = attempt(branch, "shallower", DEPTH=3)
    assert process.stdout.split("\t")[3] == "discard"
    assert "DEPTH = 5" in (branch.path / "train.py").read_text()
    assert branch.git("status", "--porcelain", "-uno") == ""


def test_try_that_crashes_exits_1_with_the_reason(branch):
    with open(branch.path / "train.py", "a") as file:
        file.write("raise ValueError('boom')\n")
    process = attempt(branch, "a bad idea", code=1)
    assert process.stdout.splitlines()[0].endswith("\tcrash\tValueError: boom (exit code 1): a bad idea")
    assert "boom" not in (branch.path / "train.py").read_text()


def test_try_with_an_unchanged_file_runs_the_baseline_once(branch):
    assert attempt(branch, "baseline").stdout.split("\t")[3] == "keep"
    process = attempt(branch, "nothing new", code=2)
    assert "train.py is the champion's" in process.stdout + process.stderr
    assert len(branch.rows()) == 1


def test_try_of_a_repeat_is_refused_and_names_the_row(branch):
    attempt(branch, "fewer layers", DEPTH=3)
    process = attempt(branch, "fewer layers again", code=2, DEPTH=3)
    row = branch.rows()[1]
    assert f"refused: train.py repeats {row[0]} (discard: fewer layers)" in process.stdout + process.stderr
    assert len(branch.rows()) == 2


def test_try_of_a_file_that_does_not_compile_is_refused_and_the_edit_stays(branch):
    attempt(branch, "baseline")
    (branch.path / "train.py").write_text("def (:\n")
    process = attempt(branch, "typo", code=2)
    assert "refused: train.py does not compile" in process.stdout + process.stderr
    assert (branch.path / "train.py").read_text() == "def (:\n"  # for the agent to mend
    assert len(branch.rows()) == 1


def test_try_on_a_branch_that_is_no_runs_says_how_to_make_one(desk):
    process = desk.loop("try", "x")
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: ") and "git checkout -b autoresearch/" in process.stderr
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("make", ["missing", "link", "folder"])
def test_try_of_what_is_no_regular_file_is_refused(branch, make):
    path = branch.path / "train.py"
    path.unlink()
    if make == "link":
        path.symlink_to("prepare.py")
    if make == "folder":
        path.mkdir()
    process = branch.loop("try", "x")
    assert process.returncode == 2
    assert process.stderr == "error: train.py is not a regular file: 'git checkout -- train.py' restores it\n"


@pytest.mark.parametrize("words", ["two\nlines\tand a tab", b"not \xff UTF-8", "-- --dashes", "x" * 500])
def test_description_of_any_text_is_one_cell(branch, words):
    branch.set_knob(DEPTH=5)
    process = branch.popen("try", *(["--"] if words[:1] == "-" else []), words)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert len(branch.rows()) == 2 and all(len(row) == 5 for row in branch.rows())
    assert 0 < len(branch.rows()[1][4]) <= 200


def test_other_files_that_the_agent_touched_are_put_back(branch):
    judge = (branch.path / "prepare.py").read_text()
    attempt(branch, "baseline")
    (branch.path / "prepare.py").write_text("1 / 0")
    (branch.path / "agents" / "random_search.py").unlink()
    (branch.path / "program.md").write_text("a person's new instructions\n")
    (branch.path / "notes.txt").write_text("untracked")
    attempt(branch, DEPTH=5)
    assert (branch.path / "prepare.py").read_text() == judge and (branch.path / "agents" / "random_search.py").exists()
    assert (branch.path / "program.md").read_text() == "a person's new instructions\n"
    assert (branch.path / "notes.txt").read_text() == "untracked"
    assert branch.git("diff", "--name-only", "main", "HEAD") == "train.py"


def test_edits_made_while_the_experiment_runs_survive(branch):
    attempt(branch, "baseline")
    branch.set_knob(DEPTH=5, SECONDS=0.8)
    process = branch.popen("try", "deeper")
    wait_for(lambda: is_training(branch, "deeper"))
    branch.set_knob(DEPTH=6, SECONDS=0.0)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert branch.rows()[-1][1] == "1.070000"  # what was there when try began
    assert "DEPTH = 6" in (branch.path / "train.py").read_text()
    assert attempt(branch, "deeper still").stdout.split("\t")[1] == "1.060000"


def test_experiment_survives_its_waiter_and_status_tells_the_verdict(branch):
    attempt(branch, "baseline")
    branch.set_knob(DEPTH=5, SECONDS=1.5)
    waiter = branch.popen("try", "deeper")
    wait_for(lambda: is_training(branch, "deeper"))
    os.killpg(waiter.pid, signal.SIGKILL)  # as an agent's shell tool does
    waiter.wait()
    second = branch.loop("try", "impatient")
    assert second.returncode == 2 and second.stdout == ""
    assert "busy" in second.stderr and "loop.py status --wait" in second.stderr
    now = branch.loop("status")
    assert "training" in now.stdout and "deeper" in now.stdout and now.returncode == 0
    verdict = branch.loop("status", "--wait")
    row, best, log = verdict.stdout.splitlines()
    assert row.split("\t")[3:] == ["keep", "deeper"] and "Best val_bpb 1.070000" in best and log.endswith("run.log")
    assert (branch.path / log.removeprefix("log ")).exists()
    waiter.communicate()
    wait_for(lambda: "no loop is running" in branch.loop("status").stdout)
    wait_for(lambda: not branch.orphans())
    assert branch.git("rev-parse", "HEAD")[:7] == row[:7]


def test_status_wait_after_the_experiment_has_ended_tells_the_last_verdict(branch):
    attempt(branch, "deeper", DEPTH=5)
    verdict = branch.loop("status", "--wait")
    assert verdict.returncode == 0 and verdict.stdout.split("\t")[3] == "keep"


def test_run_is_refused_while_an_experiment_of_try_runs(branch):
    attempt(branch, "baseline")
    branch.set_knob(DEPTH=5, SECONDS=1.0)
    waiter = branch.popen("try", "deeper")
    wait_for(lambda: is_training(branch, "deeper"))
    process = branch.loop("--agent-cmd", "true", "--max-experiments", "1")
    assert process.returncode == 2 and "busy" in process.stderr
    assert waiter.communicate(timeout=30) and waiter.returncode == 0


def test_run_and_try_continue_each_others_ledger(branch):
    attempt(branch, "deeper", DEPTH=5)
    agent = branch.agent('knob("DEPTH", int(knob("DEPTH")) + 1)\n')
    process = branch.loop("--agent-cmd", agent, "--max-experiments", "1")
    assert process.returncode == 0, process.stderr
    attempt(branch, "deeper still", DEPTH=7)
    process = branch.loop("--agent-cmd", agent, "--max-experiments", "1")
    assert process.returncode == 0, process.stderr
    assert [row[1] for row in branch.rows()] == ["1.080000", "1.070000", "1.060000", "1.050000", "1.040000"]
    assert branch.statuses() == ["keep"] * 5
    log = branch.git("log", "--format=%s", "main..HEAD").splitlines()
    assert len(log) == 5 and log[-1].endswith(": baseline")


def test_try_heeds_the_confirm_rule_of_a_run_that_measured_the_noise(branch):
    branch.set_knob(NOISE=0.01)
    branch.commit("noise")
    process = branch.loop("--agent-cmd", "false", "--replicates", "3", "--max-experiments", "0")
    assert process.returncode == 0, process.stderr
    attempt(branch, "one more layer", DEPTH=5)
    assert [row[3:] for row in branch.rows()[3:]] == [
        ["discard", "one more layer (seed 42), within noise: run again"],
        ["discard", "one more layer (seed 43)"],
    ]


def test_try_after_the_agent_moved_head_stays_on_the_runs_branch(branch):
    attempt(branch, "baseline")
    branch.set_knob(DEPTH=5)
    branch.git("commit", "-qam", "an agent's own commit")
    process = branch.loop("try", "deeper")
    assert process.returncode == 0, process.stderr
    assert branch.rows()[-1][1] == "1.070000"
    assert subprocess.getoutput(f"git -C {branch.path} log --format=%s -2").splitlines()[1].endswith("baseline")


def test_try_that_ends_without_a_row_tells_why_and_not_an_old_verdict(branch):
    attempt(branch, "baseline")
    (branch.cache / "val.bin").write_bytes(b"spoilt")
    process = attempt(branch, "deeper", code=1, DEPTH=5)
    assert process.stdout.startswith("error: ") and "val.bin is not as it was prepared" in process.stdout
    assert len(process.stdout.splitlines()) == 1
    assert "DEPTH = 5" in (branch.path / "train.py").read_text()  # the edit is not lost


def test_row_written_between_start_and_lock_is_not_lost(branch):
    attempt(branch, "baseline")
    second = """
import argparse, loop
ratchet = loop.Ratchet("t", argparse.Namespace())  # it has read the ledger
with open(ratchet.ledger, "a") as ledger:  # the loop before it records, and ends
    ledger.write(f"{ratchet.rows[0].commit}\\t1.080000\\t0.5\\tkeep\\treplicate\\n")
with ratchet.locked():
    ratchet.open(trying=True)
"""
    subprocess.run([sys.executable, "-c", second], cwd=branch.path, env=branch.env, check=True)
    assert [row[4] for row in branch.rows()] == ["baseline", "replicate"]
