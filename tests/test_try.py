"""`loop.py try`: one experiment for an agent that loops by itself, on the ledger that `loop.py run` uses too.

uv run pytest tests/test_try.py
"""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ended, errors, hear, wait_for

from harness.commands import how_to_go_back
from harness.ledger import Row
from harness.store import Store


@pytest.fixture
def desk(desk):
    """A desk on the branch of tag t."""
    desk.git("checkout", "-q", "-b", "autoresearch/t")
    return desk


def attempt(desk, words="deeper", code=0, **knobs):
    desk.set_knob(**knobs)
    return desk.loop("try", words, code=code)


def is_training(desk, description: str):
    """True once the last event of the timeline is this experiment's training."""
    try:
        last = desk.events()[-1]
    except (FileNotFoundError, IndexError, ValueError):
        return False
    return last["event"] == "training" and last["description"] == description


def start_held(desk, description: str) -> subprocess.Popen:
    """A `try` that waits for its training, which goes on until desk.hold is removed."""
    desk.hold.touch()
    waiter = desk.popen("try", description)
    hear(waiter, "running; ")
    wait_for(lambda: is_training(desk, description))
    return waiter


def test_try_prints_row_best_comparison_and_log(desk):
    process = attempt(desk, "raise depth to 5", DEPTH=5)
    row, best, *compared, log = process.stdout.splitlines()
    assert row.split("\t")[1:] == ["1.070000", "0.5", "keep", "raise depth to 5"]
    assert best.startswith(f"Best val_bpb 1.070000 ({row[:7]}), -0.010000 to the baseline")
    assert compared[0].split() == ["run", "0002", "base", "0001", "change"]
    assert compared[1].split() == ["val_bpb", "1.070000", "1.080000", "-0.010000"]
    if compared[2].startswith("start-up seconds  "):  # on a busy machine it takes a moment
        del compared[2]
    assert compared[2].split()[-3:] == ["0.5", "0.5", "+0.0"]
    assert compared[3] == "* the run's own words, not the judge's"
    noise = "2 standard errors 0.0011 (noise of one run 0.0004, assumed)"
    assert compared[4:] == [f"change -0.010000, {noise}: over the noise"]
    assert log == "log runs/0002/run.log" and "val_bpb:" in (desk.path / "runs/0002/run.log").read_text()
    assert [row[4] for row in desk.rows()] == ["baseline", "raise depth to 5"]  # the baseline came first
    assert len(process.stderr.splitlines()) == 1
    assert desk.git("rev-parse", "HEAD")[:7] == row[:7]


def test_try_on_another_branch_names_the_command_that_goes_to_the_runs(desk):
    """Which makes the branch only where there is none of this name."""
    desk.git("checkout", "-q", "main")
    branch = desk.loop("status").stdout.split(":")[0]  # autoresearch/<today>
    assert f"'git checkout -b {branch}' makes one" in desk.loop("try", "x", code=2).stderr
    desk.git("branch", branch)
    assert f"'git checkout {branch}' goes to it" in desk.loop("try", "x", code=2).stderr


def test_try_that_is_not_better_puts_the_champion_back(desk):
    attempt(desk, DEPTH=5)
    process = attempt(desk, "shallower", DEPTH=3)
    assert process.stdout.split("\t")[3] == "discard"
    assert "DEPTH = 5" in (desk.path / "train.py").read_text()
    assert desk.git("status", "--porcelain", "-uno") == ""


def test_try_that_crashes_exits_1_with_the_reason(desk):
    with open(desk.path / "train.py", "a") as file:
        file.write("raise ValueError('boom')\n")
    process = attempt(desk, "a bad idea", code=1)
    assert process.stdout.splitlines()[0].endswith("\tcrash\tValueError: boom (exit code 1): a bad idea")
    assert "boom" not in (desk.path / "train.py").read_text()
    mend = "'git apply runs/0002/change.diff' brings the edit back, to mend it"
    assert process.stdout.splitlines()[2:] == ["'tail -n 50 runs/0002/run.log' tells why", mend]
    desk.git("apply", "runs/0002/change.diff")
    assert "boom" in (desk.path / "train.py").read_text()


def test_try_with_an_unchanged_file_runs_the_baseline_once(desk):
    assert attempt(desk, "baseline").stdout.split("\t")[3] == "keep"
    process = attempt(desk, "nothing new", code=2)
    assert "train.py is the champion's" in process.stdout + process.stderr
    assert len(desk.rows()) == 1


@pytest.fixture
def moody(desk):
    """A desk whose runs with DEPTH = 5 score badly while a file `busy` exists, which the judge records."""
    busy = 'DEPTH == 5 and (prepare.CACHE / "busy").exists()'
    desk.replace(
        "train.py", "prepare.finish(1.0 + ", f"busy = {busy}\nWIDTH = 1\nprepare.finish(1.1 + busy / 10 - WIDTH / 50 + "
    )
    desk.replace("train.py", "(seed - 42))", "(seed - 42), busy_others=0.4 * busy)")
    desk.commit("a run that others disturb")
    (desk.cache / "busy").touch()
    return desk


def test_attempt_that_lost_to_a_busy_machine_is_run_again_by_its_number(moody):
    desk = moody
    verdict = attempt(desk, "deeper", DEPTH=5).stdout
    row, _, *_, advice, _log = verdict.splitlines()
    assert row.split("\t")[1::2] == ["1.250000", "discard"] and "machine used by others  " in verdict
    assert advice == "weak: the machine was busy during run 0002; measure again: uv run loop.py try --again 2"

    refused = attempt(desk, "deeper once more", code=2, DEPTH=5).stdout
    remedy = "'uv run loop.py try --again 2' runs it once more"
    assert refused == f"error: refused: train.py repeats {row[:7]} (discard: deeper): {remedy}\n"
    desk.git("checkout", "train.py")
    attempt(desk, "wider", WIDTH=2)
    champion = desk.rows()[-1][0]

    (desk.cache / "busy").unlink()
    desk.set_knob(DEPTH=9)  # the agent's next idea
    again = desk.loop("try", "--again", "0002")
    rows = desk.rows()
    assert [row[3] for row in rows] == ["keep", "discard", "keep", "discard", "keep"]
    assert rows[3][:2] == [row[:7], "1.150000"] and rows[3][4].startswith("deeper (again, seed ")
    assert rows[3][4].endswith("runs again on the present one")  # its base is not the champion any more
    assert rows[4][1::3] == ["1.130000", "deeper"] and desk.git("show", "HEAD:train.py").count("DEPTH = 5") == 1
    assert again.stdout.startswith(rows[4][0]) and "run 0005  base 0003" in again.stdout
    assert json.loads((desk.path / "runs/0003/run.json").read_text())["commit"].startswith(champion)
    assert "DEPTH = 9" in (desk.path / "train.py").read_text()  # it was not touched

    base = desk.loop("try", "--base").stdout
    assert desk.rows()[-1][:4] == rows[4][:4] and f"{rows[4][0]} ran 2 times: 1.130000, 1.130000; believed: " in base
    assert "run 0006  run 0005" in base and "the same code as run 0005" in base
    assert "DEPTH = 9" in (desk.path / "train.py").read_text()
    seeds = [json.loads((desk.path / f"runs/000{number}/run.json").read_text())["seed"] for number in (2, 4, 6)]
    assert seeds[0] == 42 and len(set(seeds)) == 3

    for number in ("99", "-1"):
        error = errors(desk.loop("try", "--again", number, code=2))[0]
        assert error == f"error: --again {number}: there is no such run, this tag has runs 1 to 6"
    assert len(desk.rows()) == 6


def test_former_champion_is_not_advised_for_what_a_simplification_may_give_away(store, monkeypatch):
    monkeypatch.setattr(Store, "profile", "pocket")
    monkeypatch.setattr(store, "description", lambda commit: "simplify: less")
    commits = {1: "b" * 40, 2: "c" * 40}
    store.attempts = commits
    store._commits = {commit[:7]: commit for commit in commits.values()}
    sigma = store.domain.assumed_sigma["pocket"]
    for loss, is_advised in ((sigma / 2, False), (2 * sigma, True)):
        store.rows[:] = [Row("b" * 7, 1.0, 0.0, "keep", "baseline"), Row("c" * 7, 1.0 + loss, 0.0, "keep", "x")]
        assert how_to_go_back(store).startswith(f"bbbbbbb, a former best, is believed better by {loss}") == is_advised
    monkeypatch.setattr(store, "description", lambda commit: "deeper")
    store.rows[1:] = [Row("c" * 7, 1.001, 0.0, "keep", "x")]
    assert how_to_go_back(store).endswith("and makes it the best if that holds")
    store.rows[1:] = [Row("c" * 7, 0.9, 0.0, "keep", "x")]
    assert how_to_go_back(store) == ""


@pytest.mark.slow
def test_former_champion_takes_the_title_back_from_one_that_was_only_lucky(desk):
    luck = "(DEPTH == 5) * (0.1 if seed != 42 else -0.1)"
    desk.replace("train.py", "prepare.finish(1.0 + ", f"prepare.finish(1.0 + {luck} + ")
    desk.commit("luck of the first seed")
    lucky = attempt(desk, "lucky", DEPTH=5).stdout
    assert lucky.split("\t")[3] == "keep" and "former best" not in lucky
    baseline, champion = [row[0] for row in desk.rows()]

    measured_again = desk.loop("try", "--base").stdout
    assert measured_again.split("\t")[1] == "1.170000"
    advice = f"{baseline}, a former best, is believed better by 0.090000 (1.080000): 'uv run loop.py try --again 1' "
    assert measured_again.splitlines()[-1].startswith(advice)
    assert desk.git("rev-parse", "HEAD").startswith(champion)

    back = desk.loop("try", "--again", "1").stdout
    assert back.split("\t")[3] == "keep" and "former best" not in back
    assert desk.git("rev-parse", "HEAD").startswith(baseline) and "DEPTH = 4" in (desk.path / "train.py").read_text()
    told = desk.loop("report").stdout
    kept = [line.split()[0] for line in told.splitlines() if line.startswith((baseline, champion))]
    assert kept == [baseline, champion, baseline] and f"best 1.080000 ({baseline})" in told


@pytest.mark.slow
def test_crash_baseline_and_detached_attempt_are_run_again(moody):
    desk = moody
    assert "begin with 'uv run loop.py try baseline'" in errors(desk.loop("try", "--base", code=2))[0]
    with open(desk.path / "train.py", "a") as file:
        file.write("assert not busy, 'boom'\n")
    attempt(desk, "fragile", code=1, DEPTH=5)
    (desk.cache / "busy").unlink()
    assert desk.loop("try", "--again", "2").stdout.split("\t")[3] == "keep"  # its first score decides
    assert desk.loop("try", "--again", "1").stdout.split("\t")[3] == "discard"  # the baseline is the champion no more
    champion = desk.git("rev-parse", "HEAD")
    assert [row[3] for row in desk.rows()] == ["keep", "crash", "keep", "discard"]

    desk.hold.touch()
    waiter = desk.popen("try", "--again", "3")
    hear(waiter, "running; ")
    wait_for(lambda: desk.events()[-1]["event"] == "training")
    os.killpg(waiter.pid, signal.SIGKILL)
    wait = desk.popen("status", "--wait")
    desk.hold.unlink()
    assert ended(wait).stdout.split("\t")[3] == "keep"
    wait_for(lambda: "no loop is running" in desk.loop("status").stdout)
    assert desk.git("rev-parse", "HEAD") == champion and len(desk.rows()) == 5
    desk.loop("audit", "--replicates", "1")
    assert "was part of an audit" in errors(desk.loop("try", "--again", "6", code=2))[0]


def test_try_of_a_file_that_does_not_compile_is_refused_and_the_edit_stays(desk):
    attempt(desk, "baseline")
    (desk.path / "train.py").write_text("def (:\n")
    process = attempt(desk, "typo", code=2)
    assert "refused: train.py does not compile" in process.stdout + process.stderr
    assert (desk.path / "train.py").read_text() == "def (:\n"  # for the agent to mend
    assert len(desk.rows()) == 1


def test_try_on_a_branch_that_is_no_runs_says_how_to_make_one(desk):
    desk.git("checkout", "-q", "main")
    done = desk.loop("try", "x", code=2)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "git checkout -b autoresearch/" in errors(done)[0]


@pytest.mark.parametrize("make", ["missing", "link", "folder"])
def test_try_of_what_is_no_regular_file_is_refused(desk, make):
    path = desk.path / "train.py"
    path.unlink()
    if make == "link":
        path.symlink_to("prepare.py")
    if make == "folder":
        path.mkdir()
    done = desk.loop("try", "x", code=2)
    assert done.stderr == "error: train.py is not a regular file: 'git checkout -- train.py' restores it\n"


@pytest.mark.parametrize("words", ["two\nlines\tand a tab", b"not \xff UTF-8", "-- --dashes", "x" * 500])
def test_description_of_any_text_is_one_cell(desk, words):
    desk.set_knob(DEPTH=5)
    desk.loop("try", *(["--"] if words[:1] == "-" else []), words)
    assert len(desk.rows()) == 2 and all(len(row) == 5 for row in desk.rows())
    assert 0 < len(desk.rows()[1][4]) <= 200


def test_other_files_that_the_agent_touched_are_put_back(desk):
    judge = (desk.path / "prepare.py").read_text()
    attempt(desk, "baseline")
    (desk.path / "prepare.py").write_text("1 / 0")
    (desk.path / "harness" / "random_search.py").unlink()
    (desk.path / "program.md").write_text("a person's new instructions\n")
    (desk.path / "notes.txt").write_text("untracked")
    attempt(desk, DEPTH=5)
    assert (desk.path / "prepare.py").read_text() == judge and (desk.path / "harness" / "random_search.py").exists()
    assert (desk.path / "program.md").read_text() == "a person's new instructions\n"
    assert (desk.path / "notes.txt").read_text() == "untracked"
    assert desk.git("diff", "--name-only", "main", "HEAD") == "train.py"


@pytest.mark.slow
def test_edits_made_while_the_experiment_runs_survive(desk):
    attempt(desk, "baseline")
    desk.set_knob(DEPTH=5)
    waiter = start_held(desk, "deeper")
    desk.set_knob(DEPTH=6)
    desk.hold.unlink()
    ended(waiter)
    assert desk.rows()[-1][1] == "1.070000"  # what was there when try began
    assert "DEPTH = 6" in (desk.path / "train.py").read_text()
    assert attempt(desk, "deeper still").stdout.split("\t")[1] == "1.060000"


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_experiment_survives_its_waiter_and_status_tells_the_verdict(desk, number):
    attempt(desk, "baseline")
    desk.set_knob(DEPTH=5)
    waiter = start_held(desk, "deeper")
    os.killpg(waiter.pid, number)  # as an agent's shell tool does
    assert waiter.wait(10) == -number
    assert "loop.py status --wait" in errors(desk.loop("try", "impatient", code=2))[0]
    now = desk.loop("status").stdout
    assert "run 0002 deeper, " in now
    wait = desk.popen("status", "--wait")
    with pytest.raises(subprocess.TimeoutExpired):  # it has not begun, or it waits
        wait.wait(0.7)
    desk.hold.unlink()
    row, best, *_, log = ended(wait).stdout.splitlines()
    assert row.split("\t")[3:] == ["keep", "deeper"] and "Best val_bpb 1.070000" in best and log.endswith("run.log")
    assert (desk.path / log.removeprefix("log ")).exists()
    wait_for(lambda: "no loop is running" in desk.loop("status").stdout)
    wait_for(lambda: not desk.orphans())
    assert desk.git("rev-parse", "HEAD")[:7] == row[:7]


def test_status_wait_after_the_experiment_has_ended_tells_the_last_verdict(desk):
    attempt(desk, "deeper", DEPTH=5)
    assert desk.loop("status", "--wait").stdout.split("\t")[3] == "keep"


def test_run_is_refused_while_an_experiment_of_try_runs(desk):
    attempt(desk, "baseline")
    desk.set_knob(DEPTH=5)
    waiter = start_held(desk, "deeper")
    done = desk.loop("--agent-cmd", "true", "--max-experiments", "1", code=2)
    assert "busy" in errors(done)[0]
    desk.hold.unlink()
    ended(waiter)


@pytest.mark.slow
def test_run_and_try_continue_each_others_ledger(desk):
    attempt(desk, "deeper", DEPTH=5)
    agent = desk.agent('knob("DEPTH", int(knob("DEPTH")) + 1)\n')
    desk.loop("--agent-cmd", agent, "--max-experiments", "1")
    attempt(desk, "deeper still", DEPTH=7)
    desk.loop("--agent-cmd", agent, "--max-experiments", "1")
    assert [row[1] for row in desk.rows()] == ["1.080000", "1.070000", "1.060000", "1.050000", "1.040000"]
    assert desk.statuses() == ["keep"] * 5
    log = desk.git("log", "--format=%s", "main..HEAD").splitlines()
    assert len(log) == 5 and log[-1] == "run 0001: baseline"


def test_try_after_the_agent_moved_head_stays_on_the_runs_branch(desk):
    attempt(desk, "baseline")
    desk.set_knob(DEPTH=5)
    desk.git("commit", "-qam", "an agent's own commit")
    desk.loop("try", "deeper")
    assert desk.rows()[-1][1] == "1.070000"
    assert subprocess.getoutput(f"git -C {desk.path} log --format=%s -2").splitlines()[1].endswith("baseline")


def test_try_that_ends_without_a_row_tells_why_and_not_an_old_verdict(desk):
    attempt(desk, "baseline")
    (desk.cache / "val.bin").write_bytes(b"spoilt")
    process = attempt(desk, "deeper", code=1, DEPTH=5)
    assert process.stdout.startswith("error: ") and "val.bin is not as it was prepared" in process.stdout
    assert len(process.stdout.splitlines()) == 1
    assert "DEPTH = 5" in (desk.path / "train.py").read_text()  # the edit is not lost


def test_row_written_between_start_and_lock_is_not_lost(desk):
    attempt(desk, "baseline")
    second = """
import loop
from harness import commands
store = commands.open_store(loop.Path.cwd(), loop.DOMAIN, "t")  # it has read the ledger
row = store.rows[0]
with open(store.ledger, "a") as ledger:  # the loop before it records, and ends
    ledger.write(str(loop.replace(row, description="again")))
with store.locked():
    assert [row.description for row in store.rows] == ["baseline", "again"]
    store.mend_ledger()
"""
    subprocess.run([sys.executable, "-c", second], cwd=desk.path, env=desk.env, check=True)
    assert [row[4] for row in desk.rows()] == ["baseline", "again"]
