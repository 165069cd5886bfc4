"""loop.py as a person meets it: real git, real processes, a fake evaluator. One worker unless a test says otherwise."""

import json
import re
import signal
import subprocess
import sys

import pytest
from conftest import BASELINE, DEEPER, Checkout, ended, errors, hear, wait_for

ONE = "--tag", "t", "--max-experiments", "1", "--agent-cmd"


def test_night_keeps_what_is_better_and_drops_the_rest(checkout: Checkout):
    """Baseline first; a gain moves branch and checkout; a loss and a crash leave them where they were."""
    agent = checkout.agent("""
        n = count()
        if n == 1:
            knob("DEPTH", 5)
        elif n == 2:
            knob("DEPTH", 3)
        else:
            knob("DEPTH", "1/0")
        say(f"idea {n}")
    """)
    done = checkout.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "3")
    rows = checkout.rows()
    assert [row[3] for row in rows] == ["keep", "keep", "discard", "crash"]
    assert [row[1] for row in rows] == ["1.080000", "1.070000", "1.090000", "0.000000"]
    assert [row[4] for row in rows[:3]] == ["baseline", "idea 1", "idea 2"]
    assert rows[3][4] == "ZeroDivisionError: division by zero (exit code 1): idea 3"
    assert rows[1][2] == "0.5"
    kept = checkout.git("rev-parse", "refs/heads/autoresearch/t")
    assert kept.startswith(rows[1][0])
    assert checkout.git("symbolic-ref", "HEAD") == "refs/heads/autoresearch/t"
    assert "DEPTH = 5" in (checkout.path / "train.py").read_text()
    assert checkout.git("status", "--porcelain", "--untracked-files=no") == ""
    assert checkout.git("log", "-1", "--format=%s %an", kept) == "run 0002: idea 1 autoresearch"
    assert checkout.git("show", "--name-only", "--format=", kept) == "train.py"
    assert "best" in done.stderr.lower() and "all experiments are done" in done.stderr
    folder = checkout.path / "runs" / "0002"
    assert "DEPTH = 5" in (folder / "change.diff").read_text()
    assert "val_bpb" in (folder / "run.log").read_text()
    assert json.loads((folder / "result.json").read_text())["val_bpb"] == 1.07
    assert (checkout.path / "results.tsv").read_text() == (checkout.home() / "results.tsv").read_text()
    assert checkout.orphans() == []
    assert not (checkout.path / ".autoresearch" / "t" / "1").exists()


def test_runs_jsonl_alone_carries_the_state(checkout: Checkout):
    checkout.loop(*ONE, checkout.agent(DEEPER))
    before = (checkout.path / "results.tsv").read_text()
    for path in (checkout.path / "results.tsv", checkout.home() / "results.tsv"):
        path.unlink()
    checkout.loop(*BASELINE)
    assert (checkout.path / "results.tsv").read_text() == before
    first, second = checkout.runs()
    assert (first.purpose, second.purpose, second.base) == ("baseline", "experiment", first.commit)
    assert second.record["weights_sha256"] == "w" * 64
    assert first.packages["pytest"]


def test_torn_last_line_is_cut_and_a_broken_one_is_named(checkout: Checkout):
    checkout.loop(*BASELINE)
    path = checkout.home() / "runs.jsonl"
    with open(path, "a") as file:
        file.write('{"number": 2, "comm')
    checkout.loop(*BASELINE)
    assert len(path.read_text().splitlines()) == 1
    path.write_text("no run\n" + path.read_text())
    (error,) = errors(checkout.loop(*BASELINE, code=1))
    assert "runs.jsonl:1 is not a run" in error and "mend or delete that line" in error


def test_tag_of_an_older_loop_is_refused_and_its_ledger_can_still_be_read(checkout: Checkout):
    checkout.home().mkdir(parents=True)
    old = checkout.home() / "results.tsv"
    old.write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\nabc1234\t1.0\t0.5\tkeep\tbaseline\n")
    (error,) = errors(checkout.loop(*BASELINE, code=2))
    assert "begun by an older loop.py: choose another --tag" in error
    assert "1.000000" in checkout.loop("report", str(old)).stdout


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ("knob('DEPTH', '(')", "train.py does not compile"),
        ("pathlib.Path('train.py').unlink(); os.mkfifo('train.py')", "train.py is not a regular file"),
        ("pathlib.Path('train.py').unlink(); os.symlink('prepare.py', 'train.py')", "train.py is not a regular file"),
        ("pathlib.Path('train.py').unlink(); os.mkdir('train.py')", "train.py is not a regular file"),
        ("open('train.py', 'a').write('# a comment')", "train.py is the champion's"),
        ("pass", "left train.py as it was"),
    ],
)
def test_edit_that_is_not_worth_a_run_costs_no_row(checkout: Checkout, edit: str, reason: str):
    agent = checkout.agent(f"""
        if count() == 1:
            {edit}
        else:
            knob("DEPTH", 5)
    """)
    done = checkout.loop(*ONE, agent)
    assert reason in done.stderr
    assert checkout.statuses() == ["keep", "keep"]


def test_repeat_by_syntax_tree_is_refused_and_the_agent_is_told(checkout: Checkout):
    agent = checkout.agent("""
        n = count()
        (OUTSIDE / f"prompt{n}").write_text(prompt)
        knob("DEPTH", 3 if n < 3 else 5)
        if n == 2:
            with open("train.py", "a") as file:
                file.write("# another comment\\n\\n'and words'\\n")
        say(f"idea {n}")
    """)
    checkout.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "2")
    assert [row[4] for row in checkout.rows()] == ["baseline", "idea 1", "idea 3"]
    assert "repeats run 2 (discard: idea 1)" in (checkout.outside / "prompt3").read_text()


def test_crash_is_handed_to_the_next_proposal_once(checkout: Checkout):
    """The agent finds the crashed file and its log; when the mend crashes too, it gets the champion's file again."""
    agent = checkout.agent("""
        n = count()
        (OUTSIDE / f"start{n}").write_text(pathlib.Path("train.py").read_text() + prompt)
        text = pathlib.Path("train.py").read_text()
        pathlib.Path("train.py").write_text(f"raise SystemExit('no such table {n}')\\n" + text)
    """)
    checkout.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "3")
    starts = [(checkout.outside / f"start{n}").read_text() for n in (1, 2, 3)]
    assert [text.count("raise SystemExit") for text in starts] == [0, 1, 0]
    assert "an experiment that crashed" in starts[1]
    assert checkout.statuses() == ["keep", "crash", "crash", "crash"]


def test_crash_task_survives_an_agent_that_does_nothing_once(checkout: Checkout):
    agent = checkout.agent("""
        n = count()
        (OUTSIDE / f"start{n}").write_text(pathlib.Path("train.py").read_text())
        if n == 1:
            text = pathlib.Path("train.py").read_text()
            pathlib.Path("train.py").write_text("raise SystemExit(3)\\n" + text)
        elif n == 3:
            text = pathlib.Path("train.py").read_text().replace("raise SystemExit(3)", "")
            pathlib.Path("train.py").write_text(text)
            knob("DEPTH", 5)
    """)
    checkout.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "2")
    assert "SystemExit" in (checkout.outside / "start3").read_text()
    assert checkout.statuses() == ["keep", "crash", "keep"]


def test_agents_that_fail_rest_and_say_what_they_said(checkout: Checkout):
    agent = checkout.agent("""
        if count() < 3:
            print("no more credit on this planet")
            sys.exit(7)
        knob("DEPTH", 5)
    """)
    done = checkout.loop(*ONE, agent)
    assert done.stderr.count("no more credit on this planet") == 2
    assert checkout.statuses() == ["keep", "keep"]


def test_agents_other_edits_are_undone_and_said(checkout: Checkout):
    agent = checkout.agent("""
        pathlib.Path("prepare.py").write_text("raise SystemExit(9)")
        pathlib.Path("new.py").write_text("")
        knob("DEPTH", 5)
    """)
    done = checkout.loop(*ONE, agent)
    assert "prepare.py" in done.stderr and "undone" in done.stderr
    assert checkout.statuses() == ["keep", "keep"]
    assert checkout.runs()[1].touched == ("prepare.py",)
    assert checkout.git("show", "--name-only", "--format=", "autoresearch/t") == "train.py"


def test_agent_that_installs_a_package_has_its_edit_refused_and_the_night_goes_on(checkout: Checkout, tmp_path):
    """uv is a stand-in here: what it is asked for is what counts, the real environment stays as it is."""
    packages = tmp_path / "packages"
    calls = tmp_path / "uv-calls"
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nrm -rf {packages}/evil-1.0.dist-info\n')
    uv.chmod(0o755)
    agent = checkout.agent(f"""
        if count() == 1:
            folder = pathlib.Path({str(packages)!r}, "evil-1.0.dist-info")
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: evil\\nVersion: 1.0\\n")
        knob("DEPTH", knob("DEPTH") + count())
    """)
    packages.mkdir()
    env = {"PYTHONPATH": str(packages), "PATH": f"{uv.parent}:{checkout.env['PATH']}"}
    done = checkout.loop(*ONE, agent, **env)
    assert "evil none -> 1.0" in done.stderr
    assert "pip uninstall" in calls.read_text() and "evil" in calls.read_text()
    assert checkout.statuses() == ["keep", "keep"]


def test_another_profile_device_or_data_is_refused_in_one_line(checkout: Checkout):
    checkout.loop(*BASELINE)
    (error,) = errors(checkout.loop(*BASELINE, code=2, AUTORESEARCH_PROFILE="other"))
    assert "begun with profile 'fake', this is 'other'" in error and "--tag" in error
    (error,) = errors(checkout.loop(*BASELINE, code=2, FAKE_DEVICE_NAME="tpu"))
    assert "device_name 'cpu', this is 'tpu'" in error


def test_run_with_another_attention_kernel_is_made_again_and_then_a_crash(checkout: Checkout):
    agent = checkout.agent("""
        text = pathlib.Path("train.py").read_text().replace("* (seed - 42))", "* (seed - 42), attention='slow')")
        pathlib.Path("train.py").write_text(text)
    """)
    done = checkout.loop(*ONE, agent)
    assert "attention is slow, the baseline's is sdpa" in done.stderr
    assert checkout.statuses() == ["keep", "crash"]
    assert checkout.rows()[1][4].startswith("attention is slow")


def test_simplification_is_kept_within_the_noise_and_strings_count(checkout: Checkout):
    checkout.replace("train.py", "# ---- The rest", "EXTRA = [1, 2, 3, 4, 5, 6, 7, 8]\n# ---- The rest")
    checkout.commit("something to remove")
    agent = checkout.agent("""
        n = count()
        text = pathlib.Path("train.py").read_text()
        if n == 1:
            hidden = "exec('EXTRA = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]')"
            text = text.replace("EXTRA = [1, 2, 3, 4, 5, 6, 7, 8]", hidden)
        else:
            text = text.replace("EXTRA = [1, 2, 3, 4, 5, 6, 7, 8]\\n", "")
        pathlib.Path("train.py").write_text(text)
        say(f"simplify: idea {n}")
    """)
    checkout.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "2")
    assert checkout.statuses() == ["keep", "discard", "keep"]


def test_floor_discards_with_its_reason_first(checkout: Checkout):
    checkout.replace("loop.py", "floors={}", 'floors={"accuracy": 0.9}')
    checkout.replace("train.py", "* (seed - 42))", "* (seed - 42), accuracy=0.95 if DEPTH == 4 else 0.5)")
    checkout.commit("a floor")
    checkout.loop(*ONE, checkout.agent(DEEPER))
    assert checkout.rows()[1][1:] == [
        "1.070000", "0.5", "discard", "accuracy 0.5 is below its floor 0.9: DEPTH 4 -> 5.0",
    ]  # fmt: skip


def test_approval_decides_whether_a_gain_stands(checkout: Checkout):
    """It gets the run as JSON. What waits for it is pending; a kill asks again at the next start."""
    asked = checkout.outside / "asked"
    answer = checkout.outside / "answer"
    approve = f"cat >> {asked}; while [ ! -e {answer} ]; do sleep 0.05; done; exit $(cat {answer})"
    command = *ONE, checkout.agent(DEEPER), "--approve", approve
    process = checkout.popen(*command)
    wait_for(lambda: asked.exists() and asked.read_text().endswith("}"))
    assert checkout.runs()[-1].status == "pending" and checkout.statuses() == ["keep"]
    process.kill()
    process.communicate()
    question = json.loads(asked.read_text())
    assert question["score"] == 1.07 and question["diff"].endswith("0002/change.diff")
    answer.write_text("0")
    checkout.loop(*BASELINE, "--approve", approve)
    assert checkout.statuses() == ["keep", "keep"]
    answer.write_text("1")
    checkout.loop(*command)
    assert checkout.rows()[2][3:] == ["discard", "not approved: DEPTH 5.0 -> 6.0"]


def test_confirm_keeps_a_real_gain_and_no_lucky_one(checkout: Checkout):
    """The lucky edit looks good on the first seed alone."""
    agent = checkout.agent("""
        if count() == 1:
            text = pathlib.Path("train.py").read_text()
            text = text.replace("* (seed - 42))", "* (seed - 42) - 0.05 * (seed == 42))")
            pathlib.Path("train.py").write_text(text)
        else:
            knob("DEPTH", 12)
    """)
    checkout.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "2", "--confirm", "2")
    experiments = [run for run in checkout.runs() if run.purpose == "experiment"]
    assert [run.status for run in experiments] == ["discard", "keep"]
    assert experiments[0].reason == "not confirmed on fresh seeds"
    seeds = [run.seed for run in checkout.runs() if run.purpose == "replicate"]
    assert len(set(seeds)) >= 3 and 42 not in seeds


def test_profile_without_a_known_noise_runs_its_baseline_twice(checkout: Checkout):
    checkout.replace("loop.py", ', "fake": 0.0004}', "}")
    checkout.commit("a profile of one's own")
    checkout.loop(*BASELINE)
    assert [row[3] for row in checkout.rows()] == ["keep", "keep"]
    first, second = checkout.runs()
    assert first.seed == 42 and second.seed != 42


def test_training_sees_no_key_and_nothing_that_changes_python(checkout: Checkout):
    checkout.replace("train.py", "import os, time", "import os, sys, time\nprint(sorted(os.environ), sys.path[0])")
    checkout.commit("look")
    secrets = {"ANTHROPIC_API_KEY": "x", "HF_TOKEN": "x", "MY_PASSWORD": "x", "PYTHONPATH": str(checkout.outside)}
    checkout.loop(*BASELINE, **secrets)
    log = (checkout.home() / "runs" / "0001" / "run.log").read_text()
    assert "AUTORESEARCH_SEED" in log
    assert not re.search("API_KEY|HF_TOKEN|PASSWORD|PYTHONPATH", log)


def test_evaluator_of_the_commit_scores_whatever_an_agent_left(checkout: Checkout):
    """Files, hooks and settings that an agent leaves in its worktree do not reach the run."""
    agent = checkout.agent("""
        hook = pathlib.Path(subprocess.check_output(["git", "rev-parse", "--git-common-dir"], text=True).strip())
        (hook / "hooks" / "post-checkout").write_text("#!/bin/sh\\ntouch " + str(OUTSIDE / "hooked"))
        (hook / "hooks" / "post-checkout").chmod(0o755)
        pathlib.Path("json.py").write_text("raise SystemExit(9)")
        pathlib.Path(".gitattributes").write_text("train.py filter=evil\\n")
        subprocess.run(["git", "config", "filter.evil.clean", "sed s/DEPTH/depth/"])
        knob("DEPTH", 5)
    """)
    checkout.loop(*ONE, agent)
    assert checkout.statuses() == ["keep", "keep"]
    assert not (checkout.outside / "hooked").exists()


def test_processes_that_an_agent_or_a_run_leaves_are_ended(checkout: Checkout):
    hide = "subprocess.Popen(['sleep', '600'], start_new_session=True)"
    agent = checkout.agent(f"""
        {hide}
        text = pathlib.Path("train.py").read_text()
        pathlib.Path("train.py").write_text(text.replace("import os, time", "import os, subprocess, time\\n{hide}"))
        knob("DEPTH", 5)
    """)
    checkout.loop(*ONE, agent)
    assert checkout.statuses() == ["keep", "keep"]
    assert checkout.orphans() == []


# How a person stops it


def test_ctrl_c_once_finishes_what_runs(checkout: Checkout):
    checkout.loop(*BASELINE)
    checkout.hold.touch()
    process = checkout.popen("--tag", "t", "--agent-cmd", checkout.agent(DEEPER))
    hear(process, "run 0002")
    process.send_signal(signal.SIGINT)
    hear(process, "finishing what runs")
    checkout.hold.unlink()
    ended(process)
    assert checkout.statuses() == ["keep", "keep"]


@pytest.mark.parametrize("signals", [[signal.SIGINT, signal.SIGINT], [signal.SIGTERM]])
def test_ctrl_c_twice_or_term_stops_now(checkout: Checkout, signals):
    checkout.loop(*BASELINE)
    checkout.hold.touch()
    process = checkout.popen("--tag", "t", "--agent-cmd", checkout.agent(DEEPER))
    hear(process, "run 0002")
    for number in signals[:-1]:
        process.send_signal(number)
        hear(process, "finishing what runs")
    process.send_signal(signals[-1])
    done = ended(process)
    assert "stopped" in done.stderr
    assert checkout.statuses() == ["keep"] and checkout.orphans() == []
    checkout.hold.unlink()
    checkout.loop("--tag", "t", "--agent-cmd", checkout.agent(DEEPER), "--max-experiments", "1")
    assert checkout.statuses() == ["keep", "keep"] and checkout.runs()[1].number == 3


def test_stop_file_hours_patience_and_target_end_a_night(checkout: Checkout):
    worse = checkout.agent('knob("DEPTH", 3 - count() * 0.1)')
    done = checkout.loop("--tag", "t", "--agent-cmd", worse, "--patience", "2")
    assert "no keep in 2 experiments (--patience)" in done.stderr and checkout.statuses()[1:] == ["discard"] * 2
    done = checkout.loop("--tag", "t", "--agent-cmd", checkout.agent(DEEPER), "--target", "1.065")
    assert "reaches --target 1.065" in done.stderr and checkout.rows()[-1][1] == "1.060000"
    done = checkout.loop("--tag", "t", "--agent-cmd", checkout.agent(DEEPER), "--hours", "0")
    assert "--hours 0 are over" in done.stderr
    agent = checkout.agent(DEEPER + '\nopen(os.environ["CHECKOUT"] + "/STOP", "w")')
    checkout.loop("--tag", "t", "--agent-cmd", agent, CHECKOUT=str(checkout.path))


def test_hangup_and_a_terminal_that_goes_away_end_nothing(checkout: Checkout):
    checkout.hold.touch()
    process = checkout.popen(*ONE, checkout.agent(DEEPER))
    hear(process, "run 0001")
    process.send_signal(signal.SIGHUP)
    process.stderr.close()
    process.stdout.close()
    checkout.hold.unlink()
    assert process.wait(30) == 0
    assert checkout.statuses() == ["keep", "keep"]


def test_silent_agent_is_ended_at_the_time_limit_and_costs_no_row(checkout: Checkout):
    agent = checkout.agent("""
        if count() == 1:
            time.sleep(600)
        knob("DEPTH", 5)
    """)
    done = checkout.loop(*ONE, agent, "--agent-timeout", "0.5")
    assert "timeout after" in done.stderr and checkout.statuses() == ["keep", "keep"]


def test_notify_hears_of_a_keep_and_of_the_end(checkout: Checkout):
    heard = checkout.outside / "heard"
    checkout.loop(*ONE, checkout.agent(DEEPER), "--notify", f"cat >> {heard}")
    text = heard.read_text()
    assert "kept val_bpb 1.070000 (run 0002)" in text and "the loop ended: all experiments are done" in text


# The checkout of a person


def test_persons_files_stay_as_they_are_while_the_branch_moves(checkout: Checkout):
    checkout.loop(*BASELINE)
    (checkout.path / "prepare.py").write_text((checkout.path / "prepare.py").read_text() + "# mine\n")
    (checkout.path / "notes.txt").write_text("mine")
    checkout.loop(*ONE, checkout.agent(DEEPER))
    assert checkout.statuses() == ["keep", "keep"]
    assert (checkout.path / "prepare.py").read_text().endswith("# mine\n")
    assert checkout.git("rev-parse", "autoresearch/t").startswith(checkout.rows()[1][0])


def test_first_start_wants_a_clean_checkout_and_a_free_branch(checkout: Checkout):
    checkout.set_knob(DEPTH=7)
    (error,) = errors(checkout.loop(*BASELINE, code=1))
    assert "train.py has uncommitted changes: commit them or run 'git stash'" in error
    checkout.git("checkout", "-q", "-b", "autoresearch/t")
    checkout.commit("elsewhere")
    checkout.git("checkout", "-q", "main")
    (error,) = errors(checkout.loop(*BASELINE, code=2))
    assert "branch autoresearch/t exists" in error and "another --tag" in error


def test_instructions_edited_by_a_person_count_at_once_and_are_never_reset(checkout: Checkout):
    agent = checkout.agent("""
        (OUTSIDE / "prompt").write_text(prompt)
        knob("DEPTH", 5)
    """)
    (checkout.path / "program.md").write_text("Try depth.\n")
    checkout.loop(*ONE, agent)
    assert (checkout.outside / "prompt").read_text().startswith("Try depth.")
    assert (checkout.path / "program.md").read_text() == "Try depth.\n"


def test_second_loop_on_a_tag_is_refused_while_the_first_runs(checkout: Checkout):
    checkout.hold.touch()
    process = checkout.popen(*BASELINE)
    hear(process, "run 0001")
    (error,) = errors(checkout.loop(*BASELINE, code=2))
    assert "tag t is busy" in error
    status = checkout.loop("status", "--tag", "t").stdout
    assert "baseline" in status
    checkout.hold.unlink()
    ended(process)


def test_file_system_without_locks_is_one_line_that_says_where_the_lock_can_live(checkout: Checkout):
    (checkout.outside / "sitecustomize.py").write_text(
        "import errno, fcntl, os\nreal = fcntl.flock\n"
        "def flock(file, how):\n"
        "    if '.git' in os.readlink(f'/proc/self/fd/{file.fileno()}'):\n"
        "        raise OSError(errno.ENOLCK, 'No locks available')\n"
        "    return real(file, how)\n"
        "fcntl.flock = flock\n"
    )
    env = {"PYTHONPATH": str(checkout.outside)}
    (error,) = errors(checkout.loop(*BASELINE, code=2, **env))
    assert "its file system has no locks" in error and "export AUTORESEARCH_LOCKS=FOLDER" in error
    locks = {"AUTORESEARCH_LOCKS": str(checkout.outside / "locks")}
    checkout.loop(*BASELINE, **env, **locks)
    assert "no locks" in checkout.loop("status", "--tag", "t", code=2, **env).stderr
    assert checkout.loop("status", "--tag", "t", **env, **locks).stdout


def test_check_makes_one_run_and_leaves_nothing(checkout: Checkout):
    subprocess.run([sys.executable, "prepare.py"], cwd=checkout.path, env=checkout.env, check=True)
    out = checkout.loop("check", "--agent-cmd", "true").stdout
    assert "profile: fake" in out and "run: val_bpb 1.080000" in out and out.endswith("all is there\n")
    assert checkout.git("branch", "--list", "autoresearch/*") == ""
    assert not (checkout.path / ".git" / "autoresearch" / "check").exists()
    checkout.set_knob(DEPTH="1/0")
    checkout.commit("broken")
    assert "ZeroDivisionError" in checkout.loop("check", code=1).stderr
