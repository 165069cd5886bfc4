"""What a start finds and must not lose, blame or believe: what kills, persons, agents and other code left behind.

    uv run pytest tests/test_opening.py
"""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import BASELINE, DEEPER, Desk, ended, errors, has_event, wait_for

from harness.ledger import Row
from harness.opening import Use, check_data, check_packages, false_rows, open_tag
from harness.screen import UserError
from harness.store import Run

ONE = "--tag", "t", "--max-experiments", "1", "--agent-cmd"


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


@pytest.mark.slow
def test_tag_that_an_older_loop_began_is_refused_and_nothing_is_changed(desk):
    """Its attempts were numbered from 0 and its run folders lay elsewhere."""
    desk.git("update-ref", "refs/autoresearch/t/0", "HEAD")
    (desk.home() / "experiments" / "0000").mkdir(parents=True)
    ledger = desk.home() / "results.tsv"
    head = desk.git("rev-parse", "HEAD")[:7]
    ledger.write_text(f"commit\tval_bpb\tmemory_gb\tstatus\tdescription\n{head}\t1.0\t1.0\tkeep\tbaseline\n")
    before = ledger.read_text(), desk.git("for-each-ref")
    remedy = "choose another --tag; 'uv run loop.py report LEDGER' still reads its results.tsv"
    assert errors(desk.loop(*BASELINE, code=2)) == [f"error: tag t was begun by an older loop.py: {remedy}"]
    assert before == (ledger.read_text(), desk.git("for-each-ref"))
    assert desk.git("symbolic-ref", "--short", "HEAD") == "main"
    assert "best 1.000000" in desk.loop("report", str(ledger)).stdout
    desk.loop("--tag", "u", *BASELINE[2:])
    assert desk.statuses("u") == ["keep"]


# ---- Profile, data and cache -----------------------------------------------------------------------------------------


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
    assert errors(done) == ["error: unknown profile 'mine'"]


@pytest.mark.parametrize(
    ("what", "told"), [("profile", "profile fake, this is other"), ("data", "digest dddddddddddd, this is eeee")]
)
def test_resume_under_another_profile_or_other_data_is_refused(desk, what, told):
    desk.replace("prepare.py", '"d" * 64', 'os.environ.get("FAKE_DIGEST", "d" * 64)')
    desk.commit("data of any digest")
    agent = desk.agent(DEEPER)
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    before = (desk.home() / "results.tsv").read_bytes(), desk.git("for-each-ref")
    env = {"AUTORESEARCH_PROFILE": "other"} if what == "profile" else {"FAKE_DIGEST": "e" * 64}
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1", **env, code=1)
    assert len(errors(done)) == 1 and f"tag t was begun under {told}" in errors(done)[0]
    assert before == ((desk.home() / "results.tsv").read_bytes(), desk.git("for-each-ref"))


def test_training_data_is_known_again_by_its_content(store, tmp_path):
    """Not by its times: a cache may be copied, prepared anew or enlarged between sessions."""
    facts = SimpleNamespace(cache=str(tmp_path / "cache"), files={"notes.json": "", "tokens/val.tokens": ""})
    tokens = tmp_path / "cache" / "tokens"
    tokens.mkdir(parents=True)
    for name in ("val.tokens", "a.tokens", "b.tokens", "c.part"):
        (tokens / name).write_bytes(b"x" * 10**6)
    (tmp_path / "cache" / "more.json").touch()
    assert set(check_data(store, facts)) == {"tokens/a.tokens", "tokens/b.tokens"}
    for name in ("a.tokens", "new.tokens", "val.tokens"):
        (tokens / name).write_bytes(b"x" * 10**6)
    (tokens / "b.tokens").unlink()
    assert set(check_data(store, facts)) == {"tokens/a.tokens", "tokens/new.tokens"}
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    facts.cache = str(tmp_path / "copy")
    check_data(store, facts)
    for content in (b"x" * (10**6 + 1), b"x" * (10**6 - 1) + b"y", b"y" + b"x" * (10**6 - 1)):
        (tmp_path / "copy" / "tokens" / "new.tokens").write_bytes(content)
        with pytest.raises(UserError) as refused:
            check_data(store, facts)
        assert f"changed since tag t began ({tmp_path}/copy/tokens/new.tokens): put it back" in str(refused.value)
    store.data.write_text("[1]")  # damaged: as if there were none
    check_data(store, facts)


def test_pipe_in_place_of_the_packages_is_replaced(store):
    os.mkfifo(store.packages)
    check_packages(store)
    assert store.packages.is_file()
    check_packages(store)


# ---- What a kill leaves ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_baseline_that_crashes_ends_with_one_line_and_is_mended(desk):
    good = (desk.path / "train.py").read_text()
    (desk.path / "train.py").write_text(good + "raise RuntimeError('no kernel')\n")
    desk.commit("broken")
    agent = desk.agent(DEEPER)
    for number in (1, 2):  # a restart without a mend tells the same
        done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1", code=1)
        log = desk.home() / "runs" / f"{number:04d}" / "run.log"
        assert errors(done) == [f"error: the baseline crashed: RuntimeError: no kernel (exit code 1) (log {log})"]
        assert desk.rows() == []
    (desk.path / "train.py").write_text(good)
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1", code=1)
    assert errors(done) == ["error: train.py has uncommitted changes: commit them or run 'git stash', then start again"]
    mended = desk.commit("mended")
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    assert desk.statuses() == ["keep", "keep"], done.stderr
    assert desk.git("rev-parse", f"{desk.rows()[0][0]}^") == mended


def test_edit_that_a_killed_loop_left_is_saved_and_the_desk_is_clean(desk):
    names = "prepare.py", "train.py"
    desk.loop(*BASELINE)
    for name in (*names, "program.md"):  # the last is a person's
        with open(desk.path / name, "a") as file:
            file.write("# half an edit\n")
    edited = [(desk.path / name).read_bytes() for name in names]
    done = desk.loop(*BASELINE)
    saved = desk.home() / "interrupted.diff"
    told = f"note: prepare.py, train.py differed from the champion; the difference is saved in {saved}"
    assert told in done.stderr.splitlines()
    assert desk.git("status", "--porcelain") == "M program.md"
    desk.git("apply", str(saved))
    assert [(desk.path / name).read_bytes() for name in names] == edited


def test_every_start_restores_the_ledgers_copy_and_the_link_to_the_runs(desk):
    table, link = desk.path / "results.tsv", desk.path / "runs"
    desk.loop(*BASELINE)
    for harm in ("missing", "wrong"):
        table.unlink()
        link.unlink()
        if harm == "wrong":
            table.write_text("an agent's own\n")
            link.symlink_to(desk.outside)
        desk.loop(*BASELINE)
        assert table.read_text() == (desk.home() / "results.tsv").read_text() and len(desk.rows()) == 1, harm
        assert link.readlink() == desk.home() / "runs", harm


@pytest.mark.slow
def test_torn_last_line_is_cut_at_the_next_start(night):
    rows = night.rows()
    for torn in ("abcdef0", "abcdef0\t0.9", "abcdef0\t0.900000\t1.0\tkeep\thalf a σ"):
        with open(night.home() / "results.tsv", "ab") as file:
            file.write(torn.encode()[:-1])
        assert "abcdef0" not in night.loop("status", "--tag", "t").stdout
        night.loop(*BASELINE)
        assert night.rows() == rows
    night.loop(*ONE, night.agent(DEEPER))
    assert night.rows()[:1] == rows and night.statuses() == ["keep"] * 2


@pytest.mark.slow
def test_torn_timeline_and_run_hide_nothing_else(night):
    with open(night.home() / "timeline.jsonl", "a") as file:
        file.write('{"at": 1.0, "ev')
    (night.home() / "runs" / "0001" / "run.json").write_text('{"number": 1, "com')
    night.loop(*ONE, night.agent(DEEPER))
    assert night.statuses() == ["keep", "keep"]
    assert "runs an hour" in night.loop("report", "--tag", "t").stdout


@pytest.mark.slow
def test_runs_that_a_kill_left_are_ended_and_their_numbers_are_not_given_again(night):
    night.hold.touch()
    process = night.popen(*ONE, night.agent(DEEPER))
    wait_for(has_event(night, "training", 2))
    wait_for(lambda: any("train.py" in command for command in night.orphans()))
    process.kill()
    process.wait()
    night.hold.unlink()
    night.loop(*ONE, night.agent(DEEPER))
    assert night.orphans() == [] and night.statuses() == ["keep", "keep"]
    assert sorted(path.name for path in (night.home() / "runs").iterdir()) == ["0001", "0002", "0003"]
    assert night.git("log", "-1", "--format=%s") == "run 0003: DEPTH 4 -> 5.0"


@pytest.mark.slow
def test_ledger_that_cannot_be_read_is_never_taken_for_an_empty_one(night):
    ledger = night.home() / "results.tsv"
    kept = ledger.with_name("kept")
    ledger.rename(kept)
    os.mkfifo(ledger)
    for command in (BASELINE, ("status", "--tag", "t"), ("report", "--tag", "t")):
        assert errors(night.loop(*command, code=1)) == [f"error: {ledger} is not a regular file"]
    kept.rename(ledger)
    night.loop(*ONE, night.agent(DEEPER))
    assert night.statuses() == ["keep", "keep"]


def test_ledger_whose_champion_is_in_no_ref_is_refused(night):
    with open(night.home() / "results.tsv", "a") as file:
        file.write("fffffff\t0.900000\t1.0\tkeep\tof another clone\n")
    gone = "the ref of the ledger's last kept commit fffffff is gone from refs/autoresearch/t/"
    told = f"error: {gone}: choose another --tag"
    for command in (["--agent-cmd", "true"], ["audit"]):
        assert errors(night.loop(*command, "--tag", "t", code=1)) == [told]
    assert len(night.rows()) == 2
    night.loop("status", "--tag", "t")


# ---- What is not to be believed --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_row_that_its_runs_record_does_not_bear_out_is_marked_at_every_start_and_in_the_report(night):
    """An agent that loops by itself edits the loop.py that records its `try`."""
    night.set_knob(DEPTH=5)
    night.replace("loop.py", "score=round(outcome.record.score, 6),", "score=0.123,")
    night.loop("try", "deeper")
    assert night.rows()[1][1] == "0.123000"
    told = f"row {night.rows()[1][0]} says 0.123000, the record of its run says 1.070000"
    assert f"warning: {told}" in night.loop(*BASELINE).stderr.splitlines()
    assert f"mark: {told}" in night.loop("report", "--tag", "t").stdout.splitlines()


def test_row_whose_record_is_of_another_judge_device_or_seed_is_marked(store):
    """An edited loop.py ran something else than it says."""

    def record(commit: str, score: float, **changes) -> Path:
        run = Run(store.new_folder(), commit * 40, "", 42, "x", "experiment", score=score, decision="keep")
        store.write_run(run)
        facts = {"val_bpb": score, "profile": "p", "split": "val", "rows": 7, "seed": 42, "digest": "d"}
        facts |= {"files": {"a": "b"}, "prepare_sha256": "s", "device_name": "cpu"}
        path = store.folder(run.number) / "result.json"
        path.write_text(json.dumps(facts | changes))
        store.rows.append(Row(commit * 7, score, 1.0, "keep", "x"))
        return path

    first = record("a", 1.0)
    record("a", 1.1)  # the baseline once more
    record("b", 0.9, cache="/elsewhere")
    assert false_rows(store) == []
    record("c", 0.8, prepare_sha256="t")
    record("d", 0.7, device_name="H100")
    record("e", 0.6, seed=7)
    record("f", 0.5).write_text("[" * 99999)
    by_score = ["row fffffff says 0.500000, and no run of it left a record"]
    by_seed = ["row eeeeeee: the record of run 0006 has seed 7, its run was given 42"]
    by_device = ["row ddddddd: the record of run 0005 has device_name 'H100', the baseline's 'cpu'"]
    by_judge = ["row ccccccc: the record of run 0004 has prepare_sha256 't', the baseline's 's'"]
    assert false_rows(store) == by_judge + by_device + by_seed + by_score
    of_an_older_judge = json.loads(first.read_text())
    del of_an_older_judge["prepare_sha256"]
    first.write_text(json.dumps(of_an_older_judge))
    assert false_rows(store) == by_device + by_seed + by_score


def test_champion_that_changes_more_than_the_editable_file_is_refused_before_anything_of_it_runs(store):
    """An edited loop.py committed a judge of its own: every later session, and the audit, would ask that one."""
    git = store.repository

    def commit(name: str, text: str) -> str:
        (git.checkout / name).write_text(text)
        git("add", "-A")
        git("commit", "-q", "-m", name)
        return git.head()

    commit("train.py", "DEPTH = 4\n")
    start = commit("prepare.py", "the judge\n")
    baseline = store.commit(store.new_folder(), None, "baseline", "fake", "d", parent=start)
    honest = store.commit(store.new_folder(), b"DEPTH = 5\n", "deeper", "fake", "d", parent=baseline)
    rigged = commit("prepare.py", "another judge\n")
    git("update-ref", f"{store.refs}3", rigged)
    store.append([Row(name[:7], 1.0, 1.0, "keep", "x") for name in (baseline, honest, rigged)])
    store.load()
    with pytest.raises(UserError) as refused:
        open_tag(store, Use.UNTOUCHED, lambda: False)
    what = f"the champion {rigged[:7]} changes prepare.py, an experiment changes train.py alone"
    remedy = f"take its rows out of {store.ledger}, or begin another --tag at {baseline[:7]}"
    assert str(refused.value) == f"{what}: {remedy}"
    assert not store.bench.exists()


@pytest.mark.slow
def test_start_up_far_over_the_bases_is_marked_in_verdict_status_and_report(desk):
    """Training before the clock looks like a long compilation."""
    desk.set_constant("harness/verdict.py", "LEAST_EXTRA", "0.3")
    desk.commit("an impatient eye")
    body = 'path = pathlib.Path("train.py"); path.write_text("import time; time.sleep(1)\\n" + path.read_text())\n'
    done = desk.loop(*ONE, desk.agent(body + DEEPER))
    mark = "it took 1 s to start, its base 0 s: compilation, or a head start"
    assert f"    {mark}" in done.stderr.splitlines()
    assert mark in desk.loop("status", "--wait").stdout.splitlines()
    assert f"mark: run 0002: {mark}" in desk.loop("report").stdout.splitlines()


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


# ---- try, status and audit -------------------------------------------------------------------------------------------


def test_first_try_that_does_not_compile_costs_no_run(desk):
    desk.git("checkout", "-q", "-b", "autoresearch/t")
    (desk.path / "train.py").write_text("DEPTH = (\n")
    done = desk.loop("try", "half an edit", code=2)
    assert "refused: train.py does not compile" in done.stdout
    assert not (desk.home() / "runs").exists()


@pytest.mark.slow
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
    assert done.stdout.splitlines()[-1] == "log runs/0001/run.log"
    assert sorted(path.name for path in (desk.home() / "runs").iterdir()) == ["0001"]


def test_try_saves_what_a_person_edited_beside_train(night):
    night.set_knob(DEPTH=5)
    (night.path / "prepare.py").write_text("mine\n")
    night.loop("try", "deeper")
    saved = (night.home() / "interrupted.diff").read_text()
    assert "+mine" in saved and "DEPTH" not in saved
    assert night.statuses() == ["keep", "keep"]


def test_status_wait_is_not_content_with_the_baseline_before_a_try(desk):
    desk.git("checkout", "-q", "-b", "autoresearch/t")
    desk.set_knob(SECONDS=0.5)
    desk.commit("slower")
    desk.set_knob(DEPTH=5)
    trying = desk.popen("try", "deeper")
    wait_for(has_event(desk, "training"))
    done = desk.loop("status", "--wait")
    assert done.stdout.splitlines()[0].endswith("\tkeep\tdeeper")
    ended(trying)


def test_audit_without_a_ledger_begins_nothing(desk):
    done = desk.loop("audit", "--tag", "t", code=1)
    assert errors(done) == ["error: there are no rows to audit: 'uv run loop.py --agent random' starts a run"]
    assert "autoresearch" not in desk.git("for-each-ref") and desk.git("symbolic-ref", "--short", "HEAD") == "main"


@pytest.mark.slow
def test_status_report_and_audit_of_a_tag_leave_any_checkout_as_it_is(night):
    night.git("checkout", "-q", "main")
    night.set_knob(DEPTH=7)
    (night.path / "results.tsv").write_text("of another tag\n")
    for command in (["status"], ["report"], ["audit", "--replicates", "1"]):
        night.loop(*command, "--tag", "t")
    assert night.git("symbolic-ref", "--short", "HEAD") == "main"
    assert night.git("status", "--porcelain") == "M train.py" and "DEPTH = 7" in (night.path / "train.py").read_text()
    assert (night.path / "results.tsv").read_text() == "of another tag\n"
    assert len(night.rows()) == 1
