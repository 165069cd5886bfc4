"""What a start finds and must not lose or blame: branches, a person's edits and commits, profiles, a half-judged gain.

    uv run pytest tests/test_loop_start.py
"""

import os

import pytest
from conftest import BASELINE, DEEPER, Desk, ended, errors, wait_for


@pytest.fixture
def night(desk) -> Desk:
    """A desk whose tag `t` has its baseline."""
    desk.loop(*BASELINE)
    return desk


# ---- Branches and commits --------------------------------------------------------------------------------------------


def test_new_tag_whose_branch_is_elsewhere_is_refused(desk):
    desk.git("branch", "autoresearch/t")
    tip = desk.git("rev-parse", "HEAD")
    desk.set_knob(LR=0.2)
    desk.commit("a commit that the branch has not")
    done = desk.loop(*BASELINE, code=2)
    told = f"error: branch autoresearch/t exists, at {tip[:7]}: check it out, or choose another --tag"
    assert errors(done) == [told]
    assert desk.git("rev-parse", "autoresearch/t") == tip and desk.git("symbolic-ref", "--short", "HEAD") == "main"


def test_persons_commit_on_the_branch_is_named_before_the_branch_leaves_it(night):
    (night.path / "notes.md").write_text("what I saw\n")
    commit = night.commit("notes")
    done = night.loop(*BASELINE)
    note = f"note: autoresearch/t was at {commit[:7]}, no experiment's: 'git branch NAME {commit[:7]}' keeps it"
    assert note in done.stderr
    assert night.git("rev-parse", "autoresearch/t").startswith(night.rows()[-1][0])


def test_start_after_an_ordinary_stop_notes_nothing(night):
    assert "note:" not in night.loop(*BASELINE).stderr


# ---- Profile and cache -----------------------------------------------------------------------------------------------


def test_relative_cache_is_relative_to_where_the_loop_was_started(desk):
    desk.loop(*BASELINE, AUTORESEARCH_CACHE="../elsewhere")
    assert (desk.path.parent / "elsewhere" / "manifest.json").exists()


def test_resume_under_another_profile_is_refused_before_its_data_is_prepared(night):
    cache = night.path.parent / "other"
    done = night.loop(*BASELINE, AUTORESEARCH_PROFILE="other", AUTORESEARCH_CACHE=str(cache), code=1)
    assert not cache.exists()
    assert errors(done)[0].startswith("error: tag t was begun under profile fake, this is other: set AUTORESEARCH_")


def test_profile_that_the_tags_judge_lacks_is_said_to_be_missing_there(night):
    done = night.loop(*BASELINE, AUTORESEARCH_PROFILE="mine", code=2)
    told = f"error: unknown profile 'mine' (so says prepare.py as of {night.rows()[0][0]})"
    assert errors(done) == [told]


# ---- The agent -------------------------------------------------------------------------------------------------------


def test_agent_that_is_gone_for_a_while_is_waited_for(desk):
    script, kept = desk.outside / "agent", desk.outside / "kept"
    script.write_text(f"#!/bin/sh\nmv {script} {kept}\nexec {desk.agent(DEEPER)}\n")
    script.chmod(0o755)
    process = desk.popen("--tag", "t", "--agent-cmd", str(script), "--max-experiments", "2")
    gone = next(line for line in process.stderr if "no proposal" in line)
    os.rename(kept, script)
    ended(process)
    assert "the agent does not start: " in gone
    assert desk.statuses() == ["keep"] * 3


def test_instructions_that_are_not_utf_8_reach_the_agent(desk):
    (desk.path / "program.md").write_bytes(b"Lower \xff val_bpb.\n")
    desk.commit("a slip of the editor")
    agent = desk.agent('(OUTSIDE / "prompt").write_text(prompt); ' + DEEPER)
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    assert (desk.outside / "prompt").read_text().startswith("Lower \ufffd val_bpb.")


def test_gain_whose_second_run_was_cut_off_may_be_tried_again(night):
    options = "--tag", "t", "--agent-cmd", night.agent('knob("DEPTH", 3)'), "--max-experiments", "1"
    night.loop(*options)
    ledger = night.home() / "results.tsv"
    ledger.write_text(ledger.read_text().rstrip("\n") + ", within noise: run again\n")  # as a kill leaves it
    night.loop(*options)
    assert night.statuses() == ["keep", "discard", "discard"]


# ---- try, status and audit -------------------------------------------------------------------------------------------


def test_first_try_that_does_not_compile_costs_no_run(desk):
    desk.git("checkout", "-q", "-b", "autoresearch/t")
    (desk.path / "train.py").write_text("DEPTH = (\n")
    done = desk.loop("try", "half an edit", code=2)
    assert "refused: train.py does not compile" in done.stdout
    assert desk.rows() == []


def test_status_wait_after_a_refused_try_tells_the_refusal_and_no_old_verdict(night):
    (night.path / "train.py").write_text("DEPTH = (\n")
    refused = night.loop("try", "half an edit", code=2).stdout
    assert refused.startswith("error: refused: train.py does not compile")
    assert night.loop("status", "--wait").stdout == refused
    night.git("checkout", "train.py")
    night.set_knob(DEPTH=5)
    night.loop("try", "deeper")
    assert night.loop("status", "--wait").stdout.splitlines()[0].endswith("\tkeep\tdeeper")


def test_first_try_of_the_unchanged_file_runs_in_the_folder_that_it_told(desk):
    desk.git("checkout", "-q", "-b", "autoresearch/t")
    done = desk.loop("try", "baseline")
    assert "running as runs/0001" in done.stderr and done.stdout.splitlines()[-1] == "log runs/0001/run.log"
    assert sorted(path.name for path in (desk.home() / "experiments").iterdir()) == ["0001"]


def test_try_saves_what_a_person_edited_beside_train(night):
    night.set_knob(DEPTH=5)
    (night.path / "prepare.py").write_text("mine\n")
    night.loop("try", "deeper")
    saved = (night.home() / "experiments/0002/interrupted.diff").read_text()
    assert "+mine" in saved and "DEPTH" not in saved
    assert night.statuses() == ["keep", "keep"]


def test_status_wait_is_not_content_with_the_baseline_before_a_try(desk):
    desk.git("checkout", "-q", "-b", "autoresearch/t")
    desk.set_knob(SECONDS=0.5)
    desk.commit("slower")
    desk.set_knob(DEPTH=5)
    trying = desk.popen("try", "deeper")
    wait_for(lambda: (desk.home() / "experiments" / "0001").exists())
    done = desk.loop("status", "--wait")
    assert done.stdout.splitlines()[0].endswith("\tkeep\tdeeper")
    ended(trying)


def test_audit_without_a_ledger_begins_nothing(desk):
    done = desk.loop("audit", "--tag", "t", code=1)
    assert errors(done) == ["error: there are no rows to audit: 'uv run loop.py --agent random' starts a run"]
    assert "autoresearch" not in desk.git("for-each-ref") and desk.git("symbolic-ref", "--short", "HEAD") == "main"


def test_report_names_the_baseline_though_it_ran_again(desk):
    desk.loop(*BASELINE, "--replicates", "2")
    assert "  baseline (seed 42)\n" in desk.loop("report").stdout
