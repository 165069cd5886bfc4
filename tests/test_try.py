"""`loop.py try`: an agent that loops by itself edits the checkout, and waits for a verdict or does not."""

import os
import signal
import subprocess

import pytest
from conftest import Checkout, ended, errors, wait_for


@pytest.fixture
def night(checkout: Checkout) -> Checkout:
    """A checkout on its branch, with a baseline."""
    checkout.git("checkout", "-q", "-b", "autoresearch/t")
    checkout.loop("try", "baseline")
    assert checkout.rows() == [[checkout.rows()[0][0], "1.080000", "0.5", "keep", "baseline"]]
    return checkout


def test_gain_moves_the_branch_and_a_loss_puts_the_champion_back(night: Checkout):
    night.write("prepare.py", "raise SystemExit(9)")  # what an agent did to other files is put back
    night.git("add", "-A")
    night.set_knob(DEPTH=6)
    out = night.loop("try", "deeper").stdout
    assert "1.060000" in out and "keep" in out
    assert night.git("log", "-1", "--format=%s") == "run 0002: deeper"
    night.set_knob(DEPTH=2)
    out = night.loop("try", "flat").stdout
    assert "1.100000" in out and "discard" in out
    assert "DEPTH = 6" in (night.path / "train.py").read_text()
    assert night.git("status", "--porcelain", "--untracked-files=no") == ""
    night.set_knob(DEPTH="1/0")
    out = night.loop("try", "broken", code=1).stdout
    assert "ZeroDivisionError" in out and night.statuses() == ["keep", "keep", "discard", "crash"]
    night.replace("train.py", "start_clock()", "start_clock()\nassert prepare.text('fail', '') == ''")
    night.set_knob(DEPTH=7)
    (night.cache / "fail").write_text("the machine's fault")
    night.loop("try", "unlucky", code=1)
    (night.cache / "fail").unlink()
    assert "keep" in night.loop("try", "--again", "5").stdout  # a crash can be run again, and lead
    assert "1.050000" in night.loop("report").stdout
    night.loop("--tag", "t", "--agent-cmd", night.agent('knob("DEPTH", 8)'), "--max-experiments", "1")
    assert night.statuses()[4:] == ["crash", "keep", "keep"]  # a run goes on from there


def test_first_try_needs_the_branch_of_a_run_and_runs_the_baseline_too(checkout: Checkout):
    (error,) = errors(checkout.loop("try", "x", code=2))
    assert "this checkout is not on the branch of a run: 'git checkout -b autoresearch/" in error
    checkout.git("checkout", "-q", "-b", "autoresearch/t")
    checkout.set_knob(DEPTH=6)
    checkout.hold.touch()
    process = checkout.popen("try", "  ")
    wait_for(checkout.orphans)
    (checkout.path / "STOP").touch()
    wait_for(lambda: not (checkout.path / "STOP").exists())
    checkout.hold.unlink()
    ended(process)
    assert checkout.statuses() == ["keep"] and "DEPTH = 6" in (checkout.path / "train.py").read_text()
    checkout.loop("try", "  ")
    assert [row[3:] for row in checkout.rows()] == [["keep", "baseline"], ["keep", "DEPTH 4 -> 6"]]


def test_refused_edit_stays_where_it_is(night: Checkout):
    (error,) = [line for line in night.loop("try", "x", code=2).stdout.splitlines() if line]
    assert error.startswith("error: refused: train.py is the champion's")
    night.set_knob(DEPTH="(")
    assert "does not compile" in night.loop("try", "x", code=2).stdout
    assert "DEPTH = (" in (night.path / "train.py").read_text()
    (night.path / "train.py").unlink()
    (night.path / "train.py").symlink_to("prepare.py")
    assert "'git checkout -- train.py' restores it" in night.loop("try", "x", code=2).stderr
    night.git("checkout", "--", "train.py")
    night.replace("loop.py", "gain > 0 and not", "True or gain > 0 and not")  # the rules
    night.set_knob(DEPTH=2)
    (error,) = errors(night.loop("try", "worse", code=2))
    assert "loop.py is not the champion's: 'git checkout HEAD -- loop.py harness' puts them back" in error
    night.git("checkout", "HEAD", "--", "loop.py", "harness")
    night.loop("try", "worse")
    assert night.statuses() == ["keep", "discard"]


def test_experiment_survives_its_waiter_and_status_tells_the_verdict(night: Checkout):
    night.hold.touch()
    night.set_knob(DEPTH=6)
    process = night.popen("try", "deeper")
    wait_for(lambda: night.orphans())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    waiter = night.popen("status", "--wait")
    with pytest.raises(subprocess.TimeoutExpired):
        waiter.wait(2)
    night.set_knob(DEPTH=7)  # the agent is at its next idea already
    night.hold.unlink()
    out, _ = waiter.communicate(timeout=60)
    assert "1.060000" in out and night.statuses() == ["keep", "keep"]
    wait_for(lambda: "DEPTH = 7" in (night.path / "train.py").read_text() and not night.orphans())


def test_again_base_and_audit_measure_on_fresh_seeds_and_a_former_champion_takes_the_title_back(night: Checkout):
    """The lucky edit is good on seed 42 alone; run again, it is worse than the baseline."""
    night.set_knob(DEPTH=3)
    night.loop("try", "flat")
    night.set_knob(DEPTH=9)  # an edit that must survive
    assert "1.090000" in night.loop("try", "--again", "2").stdout
    night.loop("try", "--base")
    runs = night.runs()
    assert [run.status for run in runs] == ["keep", "discard", "discard", "keep"]
    assert [run.purpose for run in runs[2:]] == ["replicate", "replicate"]
    assert len({run.seed for run in runs}) == 3
    assert "DEPTH = 9" in (night.path / "train.py").read_text()
    assert "there is no such run" in night.loop("try", "--again", "77", code=2).stderr

    night.set_knob(DEPTH=4)
    night.replace("train.py", "* (seed - 42))", "* (seed - 42) + (0.1 if seed != 42 else -0.1))")
    assert "keep" in night.loop("try", "lucky").stdout
    doubts = errors(night.loop("audit", "--replicates", "1", code=1))
    assert any("champion: believed 0.980000, its fresh runs give 1.180000" in doubt for doubt in doubts), doubts
    out = night.loop("try", "--base").stdout
    assert "is believed better now" in out and "'uv run loop.py try --again 1'" in out
    night.loop("try", "--again", "1")
    assert "lucky" not in night.git("log", "-1", "--format=%s")
    assert "else -0.1" not in (night.path / "train.py").read_text()
