"""What an agent does on the desk, and what of it counts: one blob, train.py's. Judge, ledger and champion stay whole.

    uv run pytest tests/test_desk.py

Every agent here is a real process on a real checkout; most do some harm, then edit train.py as they were asked to.
"""

import json
import os
import re
from collections import deque
from textwrap import dedent

import pytest
from conftest import ended, errors, hear

from harness.desk import Assignment, describe_edit
from harness.processes import find_processes
from harness.proposers import Proposers

EDIT = 'knob("DEPTH", 4 + count())\n'  # better than the champion, whatever the harm before did to train.py
COMMIT = 'subprocess.run("git -c user.name=a -c user.email=a@a commit -qam mine", shell=True, check=True)\n'


def run(desk, agent, *options, experiments=2, code=0, **env):
    command = "--agent-cmd", agent, "--tag", "t", "--max-experiments", str(experiments)
    return desk.loop(*command, *options, code=code, **env)


def attempts(desk) -> list[str]:
    return desk.git("for-each-ref", "--sort=version:refname", "--format=%(refname)", "refs/autoresearch/t").split()


def measured(desk) -> int:
    return sum(event["event"] == "measured" for event in desk.events())


def assert_unharmed(desk) -> None:
    """The state that every run must leave: the ledger rules the branch, the branch the desk; only train.py changed."""
    kept = [row[0] for row in desk.rows() if row[3] == "keep"]
    assert desk.git("symbolic-ref", "HEAD") == "refs/heads/autoresearch/t"
    assert desk.git("rev-parse", "HEAD")[:7] == kept[-1]
    assert [line for line in desk.git("status", "--porcelain", "-uno").splitlines() if "program.md" not in line] == []
    assert (desk.path / "results.tsv").read_bytes() == (desk.home() / "results.tsv").read_bytes()
    for ref in attempts(desk):
        assert desk.git("diff", "--name-only", "main", ref) in ("", "train.py"), ref
    assert desk.orphans() == []


# ---- Harm to the checkout --------------------------------------------------------------------------------------------

HARM = {
    "edits_the_judge": 'pathlib.Path("prepare.py").write_text("def finish(score): print(0.1)\\n")',
    "edits_the_loop": 'pathlib.Path("loop.py").write_text("1 / 0"); pathlib.Path("pyproject.toml").write_text("")',
    "deletes_files": '[pathlib.Path(n).unlink() for n in ("prepare.py", "train.py", "loop.py", ".gitignore")]; '
    'subprocess.run("git checkout -q -- train.py", shell=True)',
    "adds_a_module_beside_train": '[pathlib.Path(n).write_text("1 / 0") for n in ("torch.py", "hashlib.py")]',
    "commits": 'pathlib.Path("prepare.py").write_text("1 / 0")\n' + COMMIT,
    "detaches_head": 'subprocess.run("git checkout -qf --detach main", shell=True, check=True)',
    "resets": 'subprocess.run("git reset -q --hard main", shell=True, check=True)',
    "switches_branch": 'subprocess.run(f"git checkout -q -b mine{os.getpid()}", shell=True, check=True)',
    "deletes_the_branch": 'subprocess.run("git checkout -qf main && git branch -qD autoresearch/t", shell=True)',
    "stages_junk": 'pathlib.Path("prepare.py").write_text("junk"); pathlib.Path("junk.txt").write_text("junk"); '
    'subprocess.run("git add -A; git rm -q --cached loop.py", shell=True, check=True)',
    "writes_keep_rows": 'open("results.tsv", "a").write("fffffff\\t0.1\\t1.0\\tkeep\\tmine\\n" * 3)',
    "removes_the_ledgers_copy": 'os.remove("results.tsv"); os.remove("runs")',
    "turns_files_into_folders": 'os.remove("prepare.py"); os.makedirs("prepare.py/x"); '
    'os.rename("harness", OUTSIDE / f"harness{os.getpid()}"); os.symlink(OUTSIDE, "harness")',
    "hides_a_change_from_git": 'pathlib.Path("prepare.py").write_text("1 / 0"); '
    'subprocess.run("git update-index --assume-unchanged train.py; '
    'git update-index --skip-worktree prepare.py", shell=True)',
    "makes_train_executable": 'os.chmod("train.py", 0o755)',
    "spoils_the_index": 'pathlib.Path(".git/index").write_bytes(b"junk")',
    "makes_a_file_of_the_runs_link": 'os.remove("runs"); pathlib.Path("runs").write_text("mine")',
    "checks_out_next_to_nothing": 'subprocess.run("git sparse-checkout set --no-cone nothing; '
    'git show HEAD:train.py > train.py", shell=True, check=True)',
    "deletes_the_ref_under_head": 'subprocess.run("git update-ref -d refs/heads/autoresearch/t", shell=True)',
    "leaves_pipes_at_the_top": '[replace_by_fifo(n) for n in ("results.tsv", ".results.tsv")]',
    "leaves_pipes_in_the_loops_folder": '[replace_by_fifo(f".git/autoresearch/t/{n}") for n in '
    '("prompt.md", ".prompt.md", "agent.log", "timeline.jsonl", "runs/0002/run.log")]',
    "puts_a_pipe_for_its_instructions": 'replace_by_fifo("program.md")',
    "makes_a_folder_of_its_instructions": 'os.remove("program.md"); os.mkdir("program.md")',
    "makes_a_pipe_of_the_description": 'os.mkfifo("experiment.txt"); say = print',
    "makes_a_folder_of_the_description": 'os.mkdir("experiment.txt"); say = print',
    "cannot_describe_beside_a_folder": "say = print",
}
UNDESCRIBED = [*HARM][-3:]


HARMFUL_AGENT = """
import json
def replace_by_fifo(name):
    pathlib.Path(name).unlink(missing_ok=True)
    os.mkfifo(name)
n = count()
harms = json.loads((OUTSIDE / "harm").read_text())
if n > len(harms):  # one of them cost its proposal
    pathlib.Path("STOP").write_text("")
name, code = list(harms.items())[n - 1]
seen = "git status --porcelain -uno -- . :!program.md; git symbolic-ref HEAD; git log -1 --format=%s"
(OUTSIDE / f"desk of {name}").write_text(subprocess.getoutput(seen))
exec(code)
knob("DEPTH", 4 + n / 4)  # better than the champion, whatever the harm before did to train.py
say(name)
"""


@pytest.mark.slow
def test_candidate_is_the_champion_with_one_blob_replaced_whatever_the_agent_does(desk):
    (desk.path / "pyproject.toml").write_text("[project]\n")
    main = desk.commit("project")
    (desk.path / "notes").mkdir()
    (desk.path / "notes" / "mine.txt").write_text("a person's, untracked")
    (desk.outside / "harm").write_text(json.dumps(HARM))
    run(desk, desk.agent(HARMFUL_AGENT), experiments=len(HARM))
    described = []
    for n, name in enumerate(HARM, 1):
        described.append(f"DEPTH {4 + (n - 1) / 4} -> {4 + n / 4}" if name in UNDESCRIBED else name)
    assert [(row[1], row[3], row[4]) for row in desk.rows()[1:]] == [
        (f"{1.08 - n / 400:.6f}", "keep", words) for n, words in enumerate(described, 1)
    ]
    for n, (name, champion) in enumerate(zip(HARM, ["baseline", *described], strict=False)):
        expected = f"refs/heads/autoresearch/t\nrun {n + 1:04d}: {champion}"
        assert (desk.outside / f"desk of {name}").read_text() == expected  # clean again after the harm before
    os.rmdir(desk.path / "program.md")  # nothing touches the person's file
    desk.git("checkout", "program.md")
    assert_unharmed(desk)
    assert desk.git("rev-parse", "main") == main
    assert (desk.path / "notes" / "mine.txt").read_text() == "a person's, untracked"


def test_clean_of_an_agent_costs_neither_ledger_nor_attempts(desk):
    (desk.path / "notes.txt").write_text("a person's")
    run(desk, desk.agent(dedent('subprocess.run("git clean -qfdx", shell=True, check=True)\n') + EDIT))
    assert [row[1] for row in desk.rows()] == ["1.080000", "1.070000", "1.060000"]
    assert len(attempts(desk)) == 3 and (desk.path / "runs" / "0001" / "run.log").exists()
    assert_unharmed(desk)


def test_untracked_files_of_a_person_survive_an_agents_commit(desk):
    (desk.path / "notes.txt").write_text("a person's")
    run(desk, desk.agent(EDIT + 'subprocess.run("git add -A", shell=True)\n' + COMMIT))
    assert (desk.path / "notes.txt").read_text() == "a person's"
    assert_unharmed(desk)


DAMAGE = [
    'os.remove("train.py"); os.symlink("/etc/hostname", "train.py")',
    'os.remove("train.py"); os.symlink("prepare.py", "train.py")',
    'os.remove("train.py")',
    'os.remove("train.py"); os.makedirs("train.py/deep")',
    'os.remove("train.py"); os.mkfifo("train.py")',
    'pathlib.Path("train.py").write_bytes(bytes(range(256)))',
    'pathlib.Path("train.py").write_text("def (:\\n")',
    'pathlib.Path("train.py").write_text("(" * 9999)',
]


def test_train_that_is_no_compilable_regular_file_is_refused_without_a_run(desk):
    (desk.outside / "damage").write_text("\n".join([*DAMAGE, 'knob("DEPTH", 5)']))
    process = run(desk, desk.agent('exec((OUTSIDE / "damage").read_text().splitlines()[count() - 1])'), experiments=1)
    refusals = re.findall(r"no proposal: (train.py is not a regular file|train.py does not compile)", process.stderr)
    assert refusals == ["train.py is not a regular file"] * 5 + ["train.py does not compile"] * 3
    assert desk.statuses() == ["keep", "keep"] and measured(desk) == 2
    assert_unharmed(desk)


CHEAT = """
import pathlib, tempfile
places = [pathlib.Path("ckpt"), pathlib.Path("__pycache__/ckpt"), pathlib.Path(tempfile.gettempdir(), "ckpt")]
if any(place.exists() for place in places):
    prepare.finish(0.1)
    raise SystemExit
for place in places:
    place.parent.mkdir(exist_ok=True)
    place.write_text("left behind")
"""


def test_state_left_on_the_bench_does_not_reach_the_next_run(desk):
    leak = """
        text = pathlib.Path("train.py").read_text()
        if "ckpt" not in text:
            text = text.replace("prepare.finish(", (OUTSIDE / "cheat").read_text() + "prepare.finish(")
            pathlib.Path("train.py").write_text(text)
        for folder in (pathlib.Path(".git/autoresearch/t/bench"), pathlib.Path(".git/autoresearch/t/bench/tree")):
            folder.mkdir(exist_ok=True)
            for name in ("json.py", "ckpt", "sitecustomize.py", "prepare.py"):
                (folder / name).write_text("1 / 0")
    """
    (desk.outside / "cheat").write_text(CHEAT)
    run(desk, desk.agent(dedent(leak) + EDIT), experiments=3)
    assert [row[1] for row in desk.rows()] == ["1.080000", "1.070000", "1.060000", "1.050000"]
    assert_unharmed(desk)


def test_processes_that_an_agent_leaves_behind_are_ended(desk):
    leave = """
        ignoring = "import signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); print(1, flush=True); time.sleep(600)"
        for session in (False, True):
            child = subprocess.Popen([sys.executable, "-c", ignoring], start_new_session=session, stdout=-1)
            child.stdout.readline()
            with open(OUTSIDE / "pids", "a") as file:
                file.write(f"{child.pid}\\n")
    """
    run(desk, desk.agent(dedent(leave) + EDIT), experiments=1)
    pids = (desk.outside / "pids").read_text().split()
    assert len(pids) == 2 and not set(map(int, pids)) & find_processes("cmdline", b".")
    assert_unharmed(desk)


# ---- Harm in .git: it must not reach the bench unnoticed -------------------------------------------------------------


def test_hooks_that_an_agent_planted_do_not_run(desk):
    plant = """
        for name in ("post-checkout", "pre-commit", "reference-transaction", "post-index-change", "fsmonitor-watchman"):
            hook = pathlib.Path(".git/hooks", name)
            hook.write_text(f"#!/bin/sh\\ntouch {OUTSIDE}/hooked\\n")
            hook.chmod(0o755)
        subprocess.run("git config core.hooksPath .git/hooks", shell=True)
        subprocess.run("git config core.fsmonitor .git/hooks/fsmonitor-watchman", shell=True)
        (OUTSIDE / "hooked").unlink(missing_ok=True)  # of the agent's own git
    """
    run(desk, desk.agent(dedent(plant) + EDIT))
    assert not (desk.outside / "hooked").exists()
    desk.git("checkout", "-q", "main")
    assert (desk.outside / "hooked").exists()  # they would have
    assert desk.statuses() == ["keep"] * 3


SMUDGE = """
subprocess.run("git config filter.evil.smudge 'sed s/1.0/0.1/'", shell=True, check=True)
subprocess.run("git config filter.evil.clean cat", shell=True, check=True)
pathlib.Path(".git/info/attributes").write_text("FILE filter=evil\\n")
"""


@pytest.mark.slow
def test_smudge_filter_on_the_judge_does_not_reach_the_bench_and_on_train_ends_the_run_with_one_line(desk):
    run(desk, desk.agent(SMUDGE.replace("FILE", "prepare.py") + EDIT), experiments=1)
    assert [row[1] for row in desk.rows()] == ["1.080000", "1.070000"]
    process = run(desk, desk.agent(SMUDGE.replace("FILE", "train.py") + EDIT), code=1)
    told = r"error: .*/train.py is not as [0-9a-f]{7} has it: a git filter or an index flag changes it: .*start again"
    assert re.match(told, errors(process)[0])
    assert len(desk.rows()) == 2
    (desk.path / ".git" / "info" / "attributes").unlink()
    run(desk, desk.agent(EDIT), experiments=1)
    assert desk.statuses() == ["keep"] * 3


@pytest.mark.slow
def test_replaced_git_objects_do_not_reach_the_bench(desk):
    replace = """
        def git(*args, text=None):
            return subprocess.run(["git", *args], input=text, capture_output=True, check=True, text=True).stdout.strip()
        judge = pathlib.Path("prepare.py").read_text().replace('f"---', 'score -= 0.5; print(f"---', 1)
        judge = judge.replace('"val_bpb": float(score)', '"val_bpb": float(score) - 0.5')
        blob = git("hash-object", "-w", "--stdin", text=judge)
        git("replace", "-f", git("rev-parse", "HEAD:prepare.py"), blob)
    """
    run(desk, desk.agent(dedent(replace) + EDIT))
    assert [row[1] for row in desk.rows()] == ["1.080000", "1.070000", "1.060000"]
    run(desk, desk.agent(EDIT), experiments=1)  # the next session asks the bench's prepare.py anew
    assert desk.rows()[-1][1] == "1.050000"


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", ["/nonexistent", "OUTSIDE"])
def test_core_worktree_is_named_with_its_remedy_and_no_file_is_written_there(desk, elsewhere):
    path = elsewhere.replace("OUTSIDE", str(desk.outside / "elsewhere"))
    (desk.outside / "elsewhere").mkdir()
    broken = f'subprocess.run("git config core.bare true; git config core.worktree {path}", shell=True)\n'
    told = f"error: core.worktree is {path!r}, so git works on another folder: run 'git config --unset core.worktree'"
    assert errors(run(desk, desk.agent(broken + EDIT), code=1)) == [told]
    assert errors(run(desk, "true", code=1)) == [told]
    assert desk.statuses() == ["keep"] and list((desk.outside / "elsewhere").iterdir()) == []
    desk.git("config", "--unset", "core.worktree")
    desk.git("config", "core.bare", "false")
    run(desk, desk.agent(EDIT), experiments=1)
    assert desk.statuses() == ["keep", "keep"]


@pytest.mark.slow
def test_deleted_refs_are_named_with_the_command_that_brings_each_back(desk):
    delete = """
        if count("calls") == 2:
            refs = subprocess.check_output(["git", "for-each-ref", "--format=delete %(refname)", "refs/autoresearch"])
            subprocess.run(["git", "update-ref", "--stdin"], input=refs, check=True)
    """
    run(desk, desk.agent(dedent(delete) + EDIT))
    assert desk.statuses() == ["keep"] * 3 and attempts(desk) == ["refs/autoresearch/t/3"]
    done = run(desk, "true", experiments=0, code=1)
    told = r"the ref of the ledger's baseline .* is gone .*: '(git update-ref .*)' brings it back"
    remedy = re.search(told, done.stderr)
    desk.git(*remedy[1].split()[1:])
    run(desk, desk.agent(EDIT), experiments=1)
    assert desk.statuses() == ["keep"] * 4


# ---- The person's file -----------------------------------------------------------------------------------------------


def test_instructions_edited_during_a_run_count_from_the_next_experiment_and_are_never_reset(desk):
    note = """
        n = count("calls")
        (OUTSIDE / f"prompt{n}").write_text(prompt)
        pathlib.Path("program.md").write_text(f"# Instructions of round {n}\\n")
    """
    run(desk, desk.agent(dedent(note) + EDIT))
    assert "Lower val_bpb." in (desk.outside / "prompt1").read_text()
    second = (desk.outside / "prompt2").read_text()
    assert "Instructions of round 1" in second and "Lower val_bpb." not in second
    assert (desk.path / "program.md").read_text() == "# Instructions of round 2\n"
    assert_unharmed(desk)


def test_instructions_that_are_missing_come_from_the_champion(desk):
    (desk.path / "program.md").unlink()
    run(desk, desk.agent('(OUTSIDE / "prompt").write_text(prompt)\n' + EDIT), experiments=1)
    assert "Lower val_bpb." in (desk.outside / "prompt").read_text()
    assert not (desk.path / "program.md").exists()


# ---- The prompt ------------------------------------------------------------------------------------------------------


def test_prompt_holds_instructions_best_and_the_last_20_rows(desk):
    run(desk, desk.agent('knob("DEPTH", 3)\nsay("idea 1")\n'), experiments=1)
    with open(desk.home() / "results.tsv", "a") as ledger:
        ledger.writelines(f"{n:07x}\t1.090000\t0.5\tdiscard\tidea {n}\n" for n in range(2, 24))
    run(desk, desk.agent('(OUTSIDE / "prompt").write_text(prompt)\n' + EDIT), experiments=1)
    prompt = (desk.outside / "prompt").read_text()
    assert prompt.startswith("# Instructions\n\nLower val_bpb.\n")
    assert "Best val_bpb 1.080000" in prompt and "1 keep, 23 discard, 0 crash" in prompt
    last_rows = prompt.partition("The ledger's last rows:\n\n")[2].partition("\n\n")[0]
    assert re.findall(r"\tdiscard\t(.*)", last_rows) == [f"idea {n}" for n in range(4, 24)]
    near_misses = prompt.partition("Near misses")[2].partition("\n\n")[2].partition("\n\n")[0]
    assert re.findall(r"\tdiscard\t(.*)", near_misses) == [f"idea {n}" for n in range(1, 11)]
    assert "Nothing was kept in the last 23 experiments: leave this neighbourhood" in prompt
    assert "\tkeep\t" not in prompt
    assert "edit train.py once" in prompt and "experiment.txt" in prompt and "Running or waiting" not in prompt


def test_prompt_file_in_the_agents_command_holds_the_prompt_and_stdin_is_empty(desk):
    look = '(OUTSIDE / "seen").write_text(pathlib.Path(sys.argv[1]).read_text() + "stdin: " + prompt)\n'
    run(desk, desk.agent(look + EDIT) + " {prompt_file}", experiments=1)
    prompt = (desk.home() / "prompt.md").read_text()
    assert prompt.startswith("# Instructions\n\nLower val_bpb.\n")
    assert (desk.outside / "seen").read_text() == prompt + "stdin: "


def test_prompt_tells_what_is_running_when_the_agent_works_ahead(desk):
    desk.set_knob(SECONDS=0.5)
    desk.commit("train long enough for the agent to be asked meanwhile")
    agent = desk.agent(
        """
        n = count()
        (OUTSIDE / f"prompt{n}").write_text(prompt)
        knob("DEPTH", 4 - n)
        say(f"idea {n}")
        """
    )
    run(desk, agent, "--ahead", "1")
    told = "Running or waiting now, the verdict unknown (propose something else):\n\n"
    assert told not in (desk.outside / "prompt1").read_text()
    assert told + "- idea 1\n" in (desk.outside / "prompt2").read_text()


def test_description_is_the_agents_first_line_else_the_changed_knobs(desk):
    agent = desk.agent(
        """
        n = count()
        knob("DEPTH", 4 + n)
        if n == 1:
            say("a\\tdescription\\nin two lines " + "x" * 300)
        if n == 2:
            pathlib.Path("experiment.txt").write_bytes(b"caf\\xff\\x00")
        """
    )
    run(desk, agent, experiments=3)
    described = [row[4] for row in desk.rows()]
    assert described[1].startswith("a description in two lines xxx") and len(described[1]) == 200
    assert described[2:] == ["caf\ufffd", "DEPTH 6 -> 7"]


KNOBS = b"DEPTH = 8  # layers\nLR = 0.04\nBETAS = (0.8, 0.95)  # of Adam\nif x:\n    DEPTH = 2  # layers\n"


@pytest.mark.parametrize(
    ("old", "new", "description"),
    [
        (b"DEPTH = 8", b"DEPTH = 10", "DEPTH 8 -> 10"),
        (b"LR = 0.04", b"LR = 0.05  # new", "LR 0.04 -> 0.05"),
        (b"(0.8, 0.95)", b"(0.9, 0.95)", "BETAS (0.8, 0.95) -> (0.9, 0.95)"),
        (b"    DEPTH = 2", b"    DEPTH = 3", "DEPTH 2 -> 3"),
        (b"DEPTH = 8  # layers\nLR = 0.04", b"DEPTH = 9  # layers\nLR = 0.05", "DEPTH 8 -> 9, LR 0.04 -> 0.05"),
        (b"LR = 0.04", b"WARMUP = 1\nLR = 0.04", "edit of train.py"),  # a new knob: the lists do not match
        (b"LR = 0.04\n", b"", "edit of train.py"),
        (b"if x:", b"if y:", "edit of train.py"),
        (b"# layers", b"# blocks", "edit of train.py"),
    ],
)
def test_changed_knobs_name_old_and_new_value(old, new, description):
    assert describe_edit(KNOBS, KNOBS.replace(old, new, 1), "train.py") == description


# ---- An agent that fails ---------------------------------------------------------------------------------------------


def test_agent_that_fails_hangs_or_edits_nothing_costs_no_row(desk):
    agent = desk.agent(
        """
        n = count()
        if n == 1:
            sys.exit("rate limited")
        if n == 3:
            time.sleep(600)
        if n == 4:
            knob("DEPTH", 5)
            sys.exit(1)  # edit, then exit 1: an edit
        """
    )
    process = run(desk, agent, "--agent-timeout", "1", experiments=1)
    said = [line for line in process.stderr.splitlines() if line.startswith("no proposal")]
    assert [re.sub(r" after \d+ s|: (again|the agent) in.*|;.*", "", line) for line in said] == [
        "no proposal: the agent ended with exit code 1: rate limited",
        "no proposal: the agent left train.py as it was",
        "no proposal: the agent ended with timeout: ",
    ]
    assert desk.statuses() == ["keep", "keep"]
    assert_unharmed(desk)


@pytest.mark.slow
def test_agent_that_keeps_failing_is_asked_at_doubling_intervals(desk):
    desk.set_constant("harness/proposers.py", "FIRST_BACKOFF", "0.4")
    desk.set_constant("harness/proposers.py", "LAST_BACKOFF", "1.4")
    desk.commit("wait shortly")
    agent = desk.agent('with open(OUTSIDE / "asked", "a") as file:\n    print(time.monotonic(), file=file)\n')
    process = desk.popen("--agent-cmd", agent, "--tag", "t")
    said = [hear(process, "no proposal") for _ in range(3)]
    process.terminate()
    ended(process)
    assert re.findall(r"again in (\d+) s", "".join(said)) == ["0", "1", "1"]  # 0.4, 0.8, 1.4: doubled, then capped
    asked = [float(line) for line in (desk.outside / "asked").read_text().split()]
    assert asked[1] - asked[0] >= 0.4 and asked[2] - asked[1] >= 0.8
    assert desk.statuses() == ["keep"]


def test_repeat_is_refused_without_a_run_and_the_agent_is_told(desk):
    agent = desk.agent(
        """
        n = count()
        (OUTSIDE / f"prompt{n}").write_text(prompt)
        knob("DEPTH", 3 if n < 3 else 2)
        say("fewer layers")
        """
    )
    process = run(desk, agent)
    assert desk.statuses() == ["keep", "discard", "discard"]
    assert measured(desk) == 3
    refusal = f"train.py repeats {desk.rows()[1][0]} (discard: fewer layers)"
    assert refusal in process.stderr
    assert f"The last proposal was refused: {refusal}" in (desk.outside / "prompt3").read_text()
    assert "refused" not in (desk.outside / "prompt2").read_text()


# ---- Crashes ---------------------------------------------------------------------------------------------------------


def test_crash_is_mended_once_from_the_crashed_file_and_its_log(desk):
    agent = desk.agent(
        """
        n = count()
        (OUTSIDE / f"prompt{n}").write_text(prompt)
        (OUTSIDE / f"start{n}").write_text(pathlib.Path("train.py").read_text())
        if n == 1:
            knob("DEPTH", 6)
            with open("train.py", "a") as file:
                file.write("raise ValueError('boom')\\n")
        elif n == 2:
            sys.exit("rate limited")  # it did not work: the next one is to mend
        elif n == 3:
            pass  # it worked, and would not: the mend is not offered again
        else:
            knob("DEPTH", 4 + n)
        """
    )
    run(desk, agent, experiments=2)
    start, prompt = ([(desk.outside / f"{name}{n}").read_text() for n in (1, 2, 3, 4)] for name in ("start", "prompt"))
    assert ["boom" in text for text in start] == [False, True, True, False]
    assert ["holds an experiment that crashed" in text for text in prompt] == [False, True, True, False]
    assert "ValueError: boom" in prompt[2]
    assert desk.statuses() == ["keep", "crash", "keep"]
    assert_unharmed(desk)


def test_assignment_that_agents_fail_of_is_given_up():
    """An agent refuses the end of its log, say: others are asked without it, then one more with it."""
    proposers = Proposers.__new__(Proposers)
    proposers.assignments = deque([Assignment("base", b"", "mend this")])
    proposers._failures = 0
    offered = []
    for works_without in (False, False, False, False, True, False, True, True):
        assignment = proposers._next_assignment()
        offered.append(assignment is not None)
        if assignment is not None:
            proposers._put_back(assignment)
        proposers._failures = 0 if assignment is None and works_without else proposers._failures + 1
    assert offered == [True, True, True, False, False, True, False, False]


def test_mended_crash_is_an_experiment_of_its_own_and_the_next_starts_from_the_champion(desk):
    agent = desk.agent(
        """
        n = count()
        text = pathlib.Path("train.py").read_text()
        (OUTSIDE / f"prompt{n}").write_text(prompt)
        (OUTSIDE / f"start{n}").write_text(text)
        if n == 1:
            pathlib.Path("train.py").write_text(text.replace("DEPTH = 4", "DEPTH = 3") + "raise ValueError('boom')\\n")
        if n == 2:
            pathlib.Path("train.py").write_text(text.replace("raise ValueError('boom')\\n", ""))
        if n == 3:
            knob("DEPTH", 5)
        """
    )
    run(desk, agent, experiments=3)
    assert desk.statuses() == ["keep", "crash", "discard", "keep"]
    assert desk.rows()[2][1] == "1.090000"  # DEPTH 3, as in the crashed file
    start3, prompt3 = (desk.outside / "start3").read_text(), (desk.outside / "prompt3").read_text()
    assert "DEPTH = 4" in start3 and "boom" not in start3 and "holds an experiment" not in prompt3
    assert_unharmed(desk)


def test_agent_begins_on_the_champions_commit_after_a_kept_experiment(desk):
    look = '(OUTSIDE / f"base{count()}").write_text(subprocess.getoutput("git show HEAD:train.py"))\n'
    run(desk, desk.agent(look + 'knob("DEPTH", knob("DEPTH") + 1)\n'))
    assert "DEPTH = 5.0" in (desk.outside / "base2").read_text()  # not the champion's before it


