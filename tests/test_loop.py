"""loop.py as a person meets it: real git, real processes, a fake evaluator, one worker.

Two nights are scripted, step by step, and the first tests look at what they left."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import BASELINE, DEEPER, Checkout, ended, errors, hear, wait_for

ONE = "--tag", "t", "--max-experiments", "1", "--agent-cmd"

# What an agent does in its n-th call. It keeps what it found: the file, then the prompt.
IDEAS = [
    "knob('DEPTH', 5)",
    "knob('DEPTH', 3)",
    "knob('DEPTH', 3); path.write_text(path.read_text() + '# another comment\\n\\n\"and words\"\\n')",
    "knob('DEPTH', '1/0')",
    "pass",
    "knob('DEPTH', '2/0')",
    "say(''); knob('DEPTH', 6)",
    "say('simplify: in a string'); path.write_text(text.replace(EXTRA, f'exec({EXTRA!r})'))",
    "say('simplify: without it'); path.write_text(text.replace(EXTRA, ''))",
    "knob('DEPTH', 7); [pathlib.Path(name).write_text('raise SystemExit(9)') for name in OTHER]",
]
WORTHLESS = [  # what an agent leaves, and what it hears: none of it costs a row
    ("knob('DEPTH', '(')", "train.py does not compile"),
    ("open('train.py', 'a').write('# a comment')", "train.py is the champion's"),
    ("print('no more credit on this planet'); sys.exit(7)", "no more credit on this planet"),
    ("install_evil(); knob('DEPTH', 5)", "evil none -> 1.0"),
]


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """Eight experiments of IDEAS, with a floor that DEPTH 6 falls below."""
    night = Checkout(tmp_path_factory.mktemp("night"))
    extra = "EXTRA = [1, 2, 3, 4, 5, 6, 7, 8]\n"
    night.replace("train.py", "# ---- The rest", f"{extra}# ---- The rest")
    night.replace("train.py", "* (seed - 42))", "* (seed - 42), accuracy=0.5 if DEPTH == 6 else 0.95)")
    night.replace("loop.py", "floors={}", 'floors={"accuracy": 0.9}')
    for name in ("pyproject.toml", "uv.lock"):
        night.write(name, "# of the project\n")
    night.commit("something to remove, a floor, and the list of packages")
    agent = night.agent(f"""
        EXTRA = {extra!r}
        OTHER = "prepare.py", "pyproject.toml", "uv.lock", "new.py"
        n = count()
        path = pathlib.Path("train.py")
        text = path.read_text()
        (OUTSIDE / f"found{{n}}").write_text(text + prompt)
        say(f"idea {{n}}")
        exec(({IDEAS!r} + ["knob('LR', n)"] * n)[n - 1])
    """)
    night.said = night.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "8", timeout=120).stderr
    yield night
    night.end()


def test_night_keeps_what_is_better_and_drops_the_rest(night: Checkout):
    """Baseline first; a gain moves branch and checkout; a loss and a crash leave them where they were."""
    rows = night.rows()
    words = ["baseline", "idea 1", "idea 2", "idea 4", "idea 6", "DEPTH 5 -> 6", "in a string", "without it", "idea 10"]
    kinds = ["keep", "keep", "discard", "crash", "crash", "discard", "discard", "keep", "keep"]
    assert [row[3] for row in rows] == kinds
    assert [float(row[1]) for row in rows] == [1.08, 1.07, 1.09, 0, 0, 1.06, 1.07, 1.07, 1.05]
    assert [row[4].rpartition(": ")[2] for row in rows] == words
    kept = night.git("rev-parse", "refs/heads/autoresearch/t")
    assert kept.startswith(rows[-1][0])
    assert night.git("symbolic-ref", "HEAD") == "refs/heads/autoresearch/t"
    assert "DEPTH = 7" in (night.path / "train.py").read_text()
    assert night.git("status", "--porcelain", "--untracked-files=no") == ""
    assert night.git("log", "-1", "--format=%s %an", kept) == "run 0009: idea 10 autoresearch"
    assert "Best val_bpb" in night.said
    folder = night.path / "runs" / "0002"
    assert "DEPTH = 5" in (folder / "change.diff").read_text()
    assert "val_bpb" in (folder / "run.log").read_text()
    assert json.loads((folder / "result.json").read_text())["val_bpb"] == 1.07
    assert (night.path / "results.tsv").read_text() == (night.home() / "results.tsv").read_text()
    assert night.runs()[0].record["weights_sha256"] == "w" * 64 and night.runs()[0].packages["pytest"]
    assert night.orphans() == []
    assert not (night.path / ".autoresearch" / "t" / "1").exists()


def test_repeat_and_crash_are_told_to_the_next_proposal_once(night: Checkout):
    """A repeat by syntax tree is refused. A crash is handed back until it was mended once: call 5 does nothing, so the
    task stays; call 6 crashes too, so call 7 has the champion's file again."""
    found = [(night.outside / f"found{call}").read_text() for call in range(1, 11)]
    assert "repeats run 3 (discard: idea 2)" in found[3]
    assert "idea 3" not in (night.path / "results.tsv").read_text()
    assert night.rows()[3][4] == "ZeroDivisionError: division by zero (exit code 1): idea 4"
    assert ["DEPTH = 1/0" in text for text in found[3:7]] == [False, True, True, False]
    assert "an experiment that crashed" in found[4] and "an experiment that crashed" not in found[6]
    assert "DEPTH = 5" in found[6]


def test_floor_discards_a_gain_and_a_simplification_is_kept_within_the_noise_strings_counted(night: Checkout):
    assert [row[3:] for row in night.rows()[5:8]] == [
        ["discard", "accuracy 0.5 is below its floor 0.9: DEPTH 5 -> 6"],
        ["discard", "no simplification: its code says no less: simplify: in a string"],
        ["keep", "simplify: without it"],
    ]


def test_agents_edits_of_evaluator_and_packages_are_undone_and_said_and_its_gain_counts(night: Checkout):
    assert "the agent also changed prepare.py, pyproject.toml: undone" in night.said
    assert night.runs()[-1].touched == ("prepare.py", "pyproject.toml")
    assert night.git("show", "--name-only", "--format=", "autoresearch/t") == "train.py"
    assert (night.path / "uv.lock").read_text() == "# of the project\n" and not (night.path / "new.py").exists()


@pytest.fixture(scope="module")
def rough_night(tmp_path_factory):
    """WORTHLESS; then an agent that hides things and gains; then a run with another attention kernel.

    uv is a stand-in here: what it is asked for is what counts, the real environment stays as it is.
    """
    night = Checkout(tmp_path_factory.mktemp("rough"))
    packages = night.outside / "packages"
    packages.mkdir()
    uv = night.outside / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/bin/sh\necho "$@" >> {night.outside}/uv-calls\nrm -rf {packages}/evil-1.0.dist-info\n')
    uv.chmod(0o755)
    env = {"PYTHONPATH": str(packages), "PATH": f"{uv.parent}:{night.env['PATH']}"}
    agent = night.agent(f"""
        def install_evil():
            folder = pathlib.Path({str(packages)!r}, "evil-1.0.dist-info")
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: evil\\nVersion: 1.0\\n")

        n = count()
        path = pathlib.Path("train.py")
        hide = "subprocess.Popen(['sleep', '600'], start_new_session=True)"
        if n <= {len(WORTHLESS)}:
            exec({[left for left, _ in WORTHLESS]}[n - 1])
        elif n == {len(WORTHLESS) + 1}:
            exec(hide)
            git = pathlib.Path(subprocess.check_output(["git", "rev-parse", "--git-common-dir"], text=True).strip())
            (git / "hooks" / "post-checkout").write_text("#!/bin/sh\\ntouch " + str(OUTSIDE / "hooked"))
            (git / "hooks" / "post-checkout").chmod(0o755)
            pathlib.Path("json.py").write_text("raise SystemExit(9)")
            pathlib.Path(".gitattributes").write_text("train.py filter=evil\\n")
            subprocess.run(["git", "config", "filter.evil.clean", "sed s/DEPTH/depth/"])
            path.write_text(path.read_text().replace("import prepare", "import prepare, subprocess; " + hide))
            knob("DEPTH", 5)
        else:
            path.write_text(path.read_text().replace("* (seed - 42))", "* (seed - 42), attention='slow')"))
    """)
    command = ["--tag", "t", "--agent-cmd", agent, "--max-experiments", "2"]
    night.said = night.loop(*command, timeout=120, **env).stderr
    yield night
    night.end()


def test_edit_that_is_not_worth_a_run_costs_no_row_and_is_named(rough_night: Checkout):
    for _, reason in WORTHLESS:
        assert reason in rough_night.said, reason
    assert [run.number for run in rough_night.runs()] == [1, 2, 3]
    calls = (rough_night.outside / "uv-calls").read_text()
    assert "pip uninstall" in calls and "evil" in calls


def test_nothing_that_an_agent_or_a_run_left_lives_on_or_reaches_a_run(rough_night: Checkout):
    """Processes, files, hooks and settings; the evaluator is the commit's. Another attention kernel is tried again."""
    assert rough_night.statuses() == ["keep", "keep", "crash"]
    assert rough_night.orphans() == []
    assert not (rough_night.outside / "hooked").exists()
    assert rough_night.said.count("attention is slow, the baseline's is sdpa") > 1
    assert rough_night.rows()[2][4].startswith("attention is slow")


def test_tag_goes_on_from_runs_jsonl_alone_and_only_where_scores_compare(checkout: Checkout):
    checkout.loop(*BASELINE)
    before = (checkout.path / "results.tsv").read_text()
    (checkout.path / "results.tsv").unlink()
    runs = checkout.home() / "runs.jsonl"
    with open(runs, "a") as file:
        file.write('{"number": 2, "comm')  # torn by a kill
    checkout.loop(*BASELINE)
    assert (checkout.path / "results.tsv").read_text() == before
    assert len(runs.read_text().splitlines()) == 1
    for name, told in {"device": "device_name 'cpu', this is 'other'", "digest": "digest 'dddd"}.items():
        (checkout.cache / name).write_text("other")
        (error,) = errors(checkout.loop(*BASELINE, code=2))
        assert f"begun with {told}" in error and "--tag" in error
        (checkout.cache / name).unlink()
    (error,) = errors(checkout.loop(*BASELINE, code=2, AUTORESEARCH_PROFILE="other"))
    assert "begun with profile 'fake', this is 'other'" in error
    shutil.rmtree(checkout.home() / "runs")  # somebody needed room: no number is used twice all the same
    checkout.loop(*ONE, checkout.agent(DEEPER))
    assert [run.number for run in checkout.runs()] == [1, 2]
    runs.write_text("no run\n" + runs.read_text())
    (error,) = errors(checkout.loop(*BASELINE, code=1))
    assert "runs.jsonl:1 is not a run" in error and "mend or delete that line" in error
    runs.unlink()  # as an older loop.py left it
    old = checkout.home() / "results.tsv"
    (error,) = errors(checkout.loop(*BASELINE, code=2))
    assert "begun by an older loop.py: choose another --tag" in error
    assert "1.080000" in checkout.loop("report", str(old)).stdout
    assert "unknown: nothing ran twice" in checkout.loop("report", str(old), AUTORESEARCH_PROFILE="other").stdout


def test_approval_decides_whether_a_gain_stands(checkout: Checkout):
    """It gets the run as JSON. What waits for it is pending; a kill asks again at the next start."""
    asked = checkout.outside / "asked"
    answer = checkout.outside / "answer"
    approve = f"cat >> {asked}; while [ ! -e {answer} ]; do sleep 0.05; done; exit $(cat {answer})"
    command = *ONE, checkout.agent('knob("DEPTH", 10 + count())'), "--approve", approve
    process = checkout.popen(*command, "--confirm", "2")
    wait_for(lambda: asked.exists() and asked.read_text().endswith("}"))
    assert [run.status for run in checkout.runs()[4:]] == ["pending"] * 3 and checkout.statuses() == ["keep"] * 4
    process.kill()
    process.communicate()
    question = json.loads(asked.read_text())
    assert question["score"] == 1.01 and question["diff"].endswith("0003/change.diff")
    assert "waits for approval" in checkout.loop(*BASELINE, code=2).stderr  # nobody is there to give it
    assert checkout.runs()[-1].status == "pending"
    assert "that run waits for approval" in checkout.loop("try", "--again", "5", code=2).stderr
    answer.write_text("0")
    checkout.loop(*BASELINE, "--approve", approve)
    assert checkout.statuses() == ["keep"] * 7
    answer.write_text("1")
    checkout.loop(*command)
    assert checkout.rows()[7][3:] == ["discard", "not approved: DEPTH 11 -> 12"]
    checkout.git("checkout", "-q", "autoresearch/t")
    checkout.loop("try", "--again", "8")  # a repeat does not get around the person
    assert checkout.statuses()[7:] == ["discard", "discard"]


def test_confirm_keeps_a_real_gain_and_no_lucky_or_small_one_and_a_waiter_hears_of_that_run(checkout: Checkout):
    """Lucky edits look good on the first seed alone, one of them with less code; the small gain is one error large."""
    agent = checkout.agent("""
        path = pathlib.Path("train.py")
        n = count()
        if n == 1:
            path.write_text(path.read_text().replace("(seed - 42))", "(seed - 42) - 0.05 * (seed == 42))"))
        elif n == 2:
            path.write_text(re.sub("LR - .*", "LR) / 100 + 0.1 * (seed != 42) - 0.03)", path.read_text()))
            say("simplify: lucky too")
        else:
            knob("DEPTH", 8 if n == 3 else 12)
    """)
    command = "--tag", "t", "--agent-cmd", agent, "--confirm", "2", "--max-experiments"
    checkout.loop(*command, "3")
    checkout.hold.touch()
    loop = checkout.popen(*command, "1")
    hear(loop, "run 0014")
    waiter = checkout.popen("status", "--wait", "--tag", "t")
    with pytest.raises(subprocess.TimeoutExpired):
        waiter.wait(2)
    checkout.hold.unlink()
    ended(loop)
    lucky, simpler, small, real = [run for run in checkout.runs() if run.purpose == "experiment"]
    assert [run.reason for run in (lucky, small)] == ["not confirmed on fresh seeds"] * 2 and real.status == "keep"
    assert simpler.score < 1.08 and simpler.reason.startswith("no simplification: it loses over one sigma")
    pairs = []
    for experiment in (lucky, simpler, small, real):
        fresh = [run for run in checkout.runs() if run.group == f"confirm {experiment.number}"]
        pairs.append(len(fresh) // 2)
        assert all(run.seed != 42 for run in fresh)
    assert pairs == [1, 1, 2, 2]  # no gain on the first seed ends it
    assert f"run {real.number:04d} keep" in ended(waiter).stdout


def test_person_stops_a_night_once_at_once_and_by_closing_the_terminal(checkout: Checkout):
    heard = checkout.outside / "heard"
    command = ["--tag", "t", "--agent-cmd", checkout.agent(DEEPER), "--notify", f"cat >> {heard}"]
    checkout.hold.touch()

    # Ctrl-C once finishes what runs. Meanwhile a second loop is refused, and a person can look.
    process = checkout.popen(*command)
    hear(process, "run 0001")
    (error,) = errors(checkout.loop(*BASELINE, code=2))
    assert "tag t is busy" in error
    assert "baseline" in checkout.loop("status", "--tag", "t").stdout
    process.send_signal(signal.SIGINT)
    hear(process, "finishing what runs")
    checkout.hold.unlink()
    ended(process)
    assert checkout.statuses() == ["keep"]

    # Ctrl-C twice, or SIGTERM, stops now.
    checkout.hold.touch()
    for number, signals in ((2, [signal.SIGINT, signal.SIGINT]), (3, [signal.SIGTERM])):
        process = checkout.popen(*command)
        hear(process, f"run {number:04d}")
        wait_for(lambda n=number: checkout.processes(f"AUTORESEARCH_MARK={checkout.home()}:run:cpu0:{n}"))
        for one in signals[:-1]:
            process.send_signal(one)
            hear(process, "finishing what runs")
        os.killpg(process.pid, signals[-1])  # as a terminal does: agent and git get it too
        assert "stopped" in ended(process).stderr
        assert checkout.statuses() == ["keep"] and checkout.orphans() == []
    assert heard.read_text().count("the loop ended: stopped by request\n") == 3

    # A terminal that goes away ends nothing.
    process = checkout.popen(*command, "--max-experiments", "1")
    hear(process, "run 0004")
    process.send_signal(signal.SIGHUP)
    process.stderr.close()
    process.stdout.close()
    checkout.hold.unlink()
    assert process.wait(30) == 0
    assert checkout.statuses() == ["keep", "keep"] and checkout.runs()[1].number == 4


def test_patience_target_hours_dollars_and_the_stop_file_end_a_night_and_notify_hears_of_it(checkout: Checkout):
    worse = checkout.agent('knob("DEPTH", 3 - count() * 0.1)')
    done = checkout.loop("--tag", "t", "--agent-cmd", worse, "--patience", "2")
    assert "no keep in 2 experiments (--patience)" in done.stderr and checkout.statuses()[1:] == ["discard"] * 2
    heard = checkout.outside / "heard"
    command = ["--tag", "t", "--agent-cmd", checkout.agent(DEEPER)]
    done = checkout.loop(*command, "--target", "1.075", "--notify", f"cat >> {heard}")
    assert "reaches --target 1.075" in done.stderr and checkout.rows()[-1][1] == "1.070000"
    assert "kept val_bpb 1.070000 (run 0004)" in heard.read_text() and "the loop ended: " in heard.read_text()
    assert "--hours 0 are over" in checkout.loop(*command, "--hours", "0").stderr
    bill = '{"type": "result", "total_cost_usd": 0.75, "usage": {"input_tokens": 9, "output_tokens": 9}}'
    dear = checkout.agent(f"print({bill!r})\n{DEEPER}")
    done = checkout.loop("--tag", "t", "--agent-cmd", dear, "--max-usd", "1", "--max-experiments", "5")
    assert "--max-usd 1 is spent" in done.stderr and "Its agents cost 1.50 dollars." in done.stderr
    assert [run.cost.get("usd") for run in checkout.runs()[-2:]] == [0.75] * 2
    asks = f"print({bill!r})\nif 'left train.py as it was: May I?' in prompt:\n    {DEEPER}"
    checkout.loop(*ONE, checkout.agent(asks.replace('"result",', '"result", "result": "May I?",')))
    assert checkout.runs()[-1].cost["usd"] == 1.5  # of both calls
    agent = checkout.agent(DEEPER + '\nopen(os.environ["CHECKOUT"] + "/STOP", "w")')
    checkout.loop("--tag", "t", "--agent-cmd", agent, CHECKOUT=str(checkout.path))
    assert not (checkout.path / "STOP").exists()
    refused = checkout.agent("print('Error: 401, log in again'); sys.exit(1)")  # whatever the nights before have kept
    (error,) = errors(checkout.loop("--tag", "t", "--agent-cmd", refused, code=1))
    assert error.startswith("error: the agent was refused: ")


def test_persons_files_and_branch_stay_as_they_are_and_their_instructions_count_at_once(checkout: Checkout):
    deeper = checkout.agent('(OUTSIDE / "prompt").write_text(prompt)\n' + DEEPER)
    checkout.loop(*BASELINE)
    (checkout.path / "prepare.py").write_text((checkout.path / "prepare.py").read_text() + "# mine\n")
    (checkout.path / "notes.txt").write_text("mine")
    (checkout.path / "program.md").write_text("Try depth.\n")
    assert "the checkout has edits of yours" in checkout.loop(*ONE, deeper).stderr
    assert (checkout.outside / "prompt").read_text().startswith("Try depth.")
    assert (checkout.path / "prepare.py").read_text().endswith("# mine\n")
    assert (checkout.path / "notes.txt").read_text() == "mine"
    assert "DEPTH = 4 " in (checkout.path / "train.py").read_text()  # it follows the branch only if nobody works there
    checkout.git("checkout", "-q", "-f", "main")
    checkout.loop(*ONE, deeper)
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "main"
    assert checkout.git("rev-parse", "autoresearch/t").startswith(checkout.rows()[2][0])


def test_lock_file_that_uv_rewrote_behind_a_mirror_stops_nothing_and_stays(checkout: Checkout):
    checkout.write("uv.lock", "# of the project\n")
    checkout.commit("a lock file")
    checkout.write("uv.lock", "# rewritten\n")
    checkout.loop(*ONE, checkout.agent(DEEPER))
    assert "DEPTH = 5" in (checkout.path / "train.py").read_text()
    checkout.set_knob(DEPTH=6)
    assert "uv.lock" not in checkout.loop("try", "deeper").stdout
    assert checkout.statuses() == ["keep"] * 3 and (checkout.path / "uv.lock").read_text() == "# rewritten\n"


def test_first_start_wants_a_clean_checkout_and_a_free_branch(checkout: Checkout):
    checkout.set_knob(DEPTH=7)
    (error,) = errors(checkout.loop(*BASELINE, code=2))
    assert "train.py has uncommitted changes: commit them or run 'git stash'" in error
    checkout.git("checkout", "-q", "-b", "autoresearch/t")
    checkout.commit("elsewhere")
    checkout.git("checkout", "-q", "main")
    (error,) = errors(checkout.loop(*BASELINE, code=2))
    assert "branch autoresearch/t exists" in error and "another --tag" in error


def test_file_system_without_locks_is_one_line_that_says_where_the_lock_can_live(checkout: Checkout):
    (checkout.outside / "sitecustomize.py").write_text("""
import errno, fcntl, os
real = fcntl.flock
def flock(file, how):
    if ".git" in os.readlink(f"/proc/self/fd/{file.fileno()}"):
        raise OSError(errno.ENOLCK, "No locks available")
    return real(file, how)
fcntl.flock = flock
""")
    env = {"PYTHONPATH": str(checkout.outside)}
    (error,) = errors(checkout.loop(*BASELINE, code=2, **env))
    assert "its file system has no locks" in error and "export AUTORESEARCH_LOCKS=FOLDER" in error
    checkout.loop(*BASELINE, **env, AUTORESEARCH_LOCKS=str(checkout.outside / "locks"))
    assert "no locks" in checkout.loop("status", "--tag", "t", code=2, **env).stderr


def test_check_makes_one_run_and_leaves_nothing(checkout: Checkout):
    subprocess.run([sys.executable, "prepare.py"], cwd=checkout.path, env=checkout.env, check=True)
    out = checkout.loop("check", "--agent-cmd", "true").stdout
    assert "profile: fake" in out and "run: val_bpb 1.080000" in out and out.endswith("all is there\n")
    assert checkout.git("branch", "--list", "autoresearch/*") == ""
    assert not list((checkout.path / ".git" / "autoresearch").glob("check*"))
    checkout.set_knob(DEPTH="1/0")
    checkout.commit("broken")
    assert "ZeroDivisionError" in checkout.loop("check", code=1).stderr
    assert "DEPTH = 1/0" in (checkout.path / "run.log").read_text()
    with open(checkout.cache / "cpu0.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = checkout.popen("check")
        hear(process, "waiting: another run holds the device")
        process.send_signal(signal.SIGINT)
        assert "all is there" not in ended(process).stdout
