"""harness/agents.py without a real CLI: what an agent finds, what counts of what it leaves, its words and its cost.

Every agent here is a real process in a real worktree.
"""

import json
import os
import re
import sys
import threading

import pytest
from agent_fixtures import TRAIN, Lab
from conftest import FAKE_PREPARE

from harness import agents
from harness.agents import AGENTS, Agent, Cost, NoProposal, agent_environment, choose_agent
from harness.console import UserError
from harness.edit import Edit
from harness.processes import find_marked

EDIT = 'knob("DEPTH", 8); say("raise depth")\n'
EDITED = TRAIN.replace("DEPTH = 4", "DEPTH = 8").encode()


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path, dict(os.environ))
    yield lab
    assert find_marked(lab.tag.mark) == set()


def test_proposal_is_the_edited_file_with_its_description_and_other_changes_are_told_and_gone(lab):
    other = lab.propose('pathlib.Path("prepare.py").write_text("1"); git("commit -qam mine")\n' + EDIT)
    assert other == Edit(EDITED, lab.champion, "raise depth", touched=("prepare.py",))
    assert lab.worktree.cost == agents.UNKNOWN
    found = lab.propose('assert not pathlib.Path("experiment.txt").exists(); git("diff --quiet HEAD"); knob("LR", 0.2)')
    assert isinstance(found, Edit), found
    assert (found.description, found.touched) == ("LR 0.1 -> 0.2", ())
    assert lab.propose('knob("LR", 0.3)', TRAIN.replace("= 4", "= 9")).description == "DEPTH 4 -> 9, LR 0.1 -> 0.3"
    assert lab.propose('say(repr(os.environ["CUDA_VISIBLE_DEVICES"])); knob("LR", 0.3)').description == "''"
    crashed = TRAIN + "1 / 0\n"  # where there is one, the agent begins from it, and leaving it is no edit
    assert lab.propose("pass", start=crashed).kind == "unchanged"
    assert lab.propose(EDIT, start=crashed).source == EDITED + b"1 / 0\n"


def test_agent_finds_ledger_newest_runs_and_its_own_venv_inside_its_worktree(lab, monkeypatch):
    monkeypatch.setattr(agents, "RUNS_COPIED", 3)
    lab.add_run(log="x" * 100_000 + "the end\n", status="discard", description="wider", score=1.6)
    look = """
        assert "wider" in pathlib.Path("results.tsv").read_text()
        log = pathlib.Path("runs/0002/run.log").read_text()
        assert len(log) == 65536 and log.endswith("the end\\n")
        os.makedirs(".venv/bin")
        knob("DEPTH", len(os.listdir("runs")))
    """
    assert b"DEPTH = 2" in lab.propose(look).source
    for number in range(3, 6):
        lab.add_run(log=f"log {number}")
    (lab.tag.folder(4) / "run.log").write_text("it went on")
    lab.propose(EDIT)
    assert sorted(os.listdir(lab.file("runs"))) == ["0003", "0004", "0005"] and lab.file(".venv/bin").is_dir()
    assert lab.file("runs/0004/run.log").read_text() == "it went on"


def test_prompt_comes_on_standard_input_or_as_a_file_inside_the_worktree(lab):
    whole = 'Quote "it", $HOME, `ls`, \\n and ü.\n' * 3000  # 100 kB
    agent = lab.agent('(OUTSIDE / "seen").write_text("".join(map(str, sys.argv[1:])) + prompt)\n' + EDIT)
    lab.propose(agent, prompt=whole)
    assert (lab.outside / "seen").read_text() == whole
    lab.propose(Agent(f"{agent.command} 'Read {{prompt_file}}.'"), prompt=whole)
    path = lab.file("prompt.md")
    assert (lab.outside / "seen").read_text() == f"Read {path}." and path.read_text() == whole
    lab.propose(agent)
    assert not path.exists()


@pytest.mark.parametrize(("body", "description"), [
    ('knob("DEPTH", 8); say("a\\tline\\nor two \\u202e" + "x" * 300)', "a line or two " + "x" * 186),
    ('knob("DEPTH", 8); os.mkfifo("experiment.txt")', "DEPTH 4 -> 8"),
    ('open("train.py", "a").write("1\\n"); os.symlink("/etc/hostname", "experiment.txt")', "edit of train.py"),
])  # fmt: skip
def test_description_is_one_clean_line_of_the_agents_or_the_changed_constants(lab, body, description):
    assert lab.propose(body).description == description


HARM = {
    "deletes everything": 'subprocess.run("rm -rf * .git .gitignore", shell=True); '
    f'pathlib.Path("train.py").write_text({TRAIN!r})',
    "removes git's entry of the worktree": 'import shutil; '
    'shutil.rmtree(subprocess.getoutput("git rev-parse --absolute-git-dir"))',
    "commits": 'pathlib.Path("prepare.py").write_text("1"); git("commit -qam mine"); git("checkout -q -b mine$$")',
    "hides a change": 'pathlib.Path("prepare.py").write_text("1"); git("update-index --skip-worktree prepare.py")',
    "leaves a lock": 'pathlib.Path(subprocess.getoutput("git rev-parse --git-path index.lock")).touch()',
    "puts pipes": 'os.remove("results.tsv"); [os.mkfifo(n) for n in ("results.tsv", ".train.py", "prompt.md")]',
    "replaces the runs": 'subprocess.run("rm -rf runs", shell=True); os.symlink(OUTSIDE, "runs")',
    "hides processes": "hide(False); hide(True)",
    "nests repositories": 'os.mkdir("nested"); git("init -q nested"); os.chmod("train.py", 0o755)',
}
LOOK = """
import json
def hide(session):
    code = "import signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); print(1, flush=True); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=session, stdout=subprocess.PIPE).stdout.readline()
left = sorted(set(os.listdir(".")) - {".git", "program.md"})
(OUTSIDE / "left").write_text(json.dumps([left, pathlib.Path("prepare.py").read_text()]))
"""


def test_whatever_an_agent_does_its_edit_counts_and_the_next_begins_clean(lab, monkeypatch):
    monkeypatch.setattr("harness.repository.LOCK_PATIENCE", 0.2)
    before = lab.persons_state()
    names = {*lab.git("ls-tree", "--name-only", "HEAD").split(), "results.tsv", "runs"} - {"program.md"}
    after = "nothing"
    for name, harm in (HARM | {"nothing": "pass"}).items():
        proposal = lab.propose(f"{LOOK}\n{harm}\n{EDIT}")
        assert isinstance(proposal, Edit), (name, proposal)
        assert (proposal.source, proposal.description) == (EDITED, "raise depth"), name
        assert lab.persons_state() == before and find_marked(lab.tag.mark) == set(), name
        left, prepare = json.loads((lab.outside / "left").read_text())
        assert left == sorted(names) and prepare == FAKE_PREPARE, after
        assert not list(lab.outside.glob("0*")), name  # no run was copied through a link
        after = name


def test_train_that_is_no_regular_file_or_too_large_is_a_refused_edit(lab):
    for damage, told in (
        ('os.remove("train.py"); os.symlink("/etc/hostname", "train.py")', "train.py is not a regular file"),
        ('os.remove("train.py"); os.makedirs("train.py/deep")', "train.py is not a regular file"),
        ('pathlib.Path("train.py").write_bytes(b"#" * 40_000_000)', "train.py is over 4 MiB"),
    ):
        assert lab.propose(damage) == NoProposal(told, "bad edit")


def test_silent_slow_or_stopped_agent_is_ended_and_only_a_whole_edit_counts(lab, monkeypatch):
    monkeypatch.setattr(agents, "QUIET_LIMIT", 1)
    silent = "print('thinking', flush=True); time.sleep(600)\n"
    assert lab.propose(lab.agent(EDIT + silent, streams=True)).source == EDITED
    assert lab.propose(lab.agent(silent, streams=True)).reason == "the agent ended with no output for 1 s: thinking"
    assert lab.propose(lab.agent("time.sleep(1.2)\n" + EDIT)).source == EDITED  # a CLI that prints at its end
    assert lab.propose(lab.agent("for _ in 'abcd': time.sleep(0.5); print(1, flush=1)\n" + EDIT, streams=True)).source
    answer = lab.propose("time.sleep(600)", limit=0.5)
    assert answer.kind == "failed" and re.fullmatch("the agent ended with timeout after . s", answer.reason)
    assert lab.propose(Agent("/nonexistent/agent")).kind == "failed"
    with monkeypatch.context() as patch:
        patch.setattr(lab.worktree, "folder", lab.outside / "agent1.py" / "1")  # no room for its worktree, say
        assert lab.propose(EDIT).kind == "failed"
    assert [agents.rest_seconds("failed", n) for n in (1, 2, 99)] == [5, 10, 600]
    threading.Timer(1, lab.stop.set).start()
    assert isinstance(lab.propose(EDIT + "time.sleep(600)"), NoProposal)


def test_environment_hides_that_one_cli_starts_another_and_starts_clean_unless_a_person_says_otherwise():
    env = agent_environment({"CLAUDECODE": "1", "CLAUDE_CODE_SESSION_ID": "x", "ANTHROPIC_API_KEY": "k"})
    assert {"CLAUDECODE", "CLAUDE_CODE_SESSION_ID"}.isdisjoint(env)
    assert (env["ANTHROPIC_API_KEY"], env["CLAUDE_CODE_SAFE_MODE"]) == ("k", "1")
    assert json.loads(env["OPENCODE_CONFIG_CONTENT"]) == {"formatter": False}
    for config in ('{"formatter": {}, "model": "m"}', "{ // a comment\n}"):
        env = agent_environment({"CLAUDE_CODE_SAFE_MODE": "0", "OPENCODE_CONFIG_CONTENT": config})
        assert (env["CLAUDE_CODE_SAFE_MODE"], env["OPENCODE_CONFIG_CONTENT"]) == ("0", config)


CHECKS = {  # name: what its check says (answer, exit code) to who is logged out, and in; measured
    "claude": (('{"loggedIn": false}', 1), ('{"loggedIn": true, "authMethod": "api_key"}', 0)),
    "codex": (("Not logged in", 1), ("Logged in using ChatGPT", 0)),
    "vibe": (("Error: Missing MISTRAL_API_KEY environment variable", 1), ("Error: Session not found", 1)),
    "gemini": (("Please set an Auth method in your ~/.gemini/settings.json", 41), ("No previous sessions found.", 0)),
}


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """An empty PATH and HOME; what is called makes a stand-in for a CLI there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("CODEX_API_KEY", "CODEX_ACCESS_TOKEN", "CODEX_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("IS_SANDBOX", "1")

    def install(name: str, answer: str = "", code: int = 0, seconds: int = 0) -> None:
        body = f"import time\nprint({answer!r})\ntime.sleep({seconds})\nraise SystemExit({code})\n"
        (folder / name).write_text(f"#!{sys.executable}\n{body}")
        (folder / name).chmod(0o755)

    return install


def refusal(name: str | None, command: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        choose_agent(name, command)
    assert error.value.code == 2
    return str(error.value)


def test_agent_that_is_missing_unknown_or_not_logged_in_is_refused_with_the_remedy(tools):
    for name, agent in AGENTS.items():
        if agent.has_model:
            assert refusal(name).startswith(f"{name} is not installed: {agent.install}")
    tools("pi")
    assert refusal("clod").endswith('use --agent NAME (installed here: pi, random, tpe) or --agent-cmd "COMMAND"')
    assert refusal(None).startswith("no agent given: ")
    assert choose_agent("random", None).has_model is False
    for command in ("", "'open", "nowhere --flag"):
        assert "starts no program that is installed" in refusal(None, command)
    assert choose_agent(None, "pi -p 'x y'").command == "pi -p 'x y'"
    for name, (logged_out, logged_in) in CHECKS.items():
        tools(name, *logged_out)
        line = refusal(name)
        assert line.startswith(f"{name} is not logged in: ") and "export" in line
        tools(name, *logged_in)
        assert choose_agent(name, None) is AGENTS[name]


def test_log_in_that_no_check_sees_passes_and_claude_as_root_does_not(tools, tmp_path, monkeypatch):
    tools("codex", "Not logged in", 1)
    (tmp_path / ".codex").mkdir()
    (tmp_path / ".codex/config.toml").write_text('model_provider = "mine"')
    assert choose_agent("codex", None)  # whose check knows no provider of a person's own
    tools("claude", '{"loggedIn": false}', seconds=60)
    monkeypatch.setattr(agents, "CHECK_SECONDS", 0.1)
    assert choose_agent("claude", None)  # a check that hangs refuses nobody
    monkeypatch.delenv("IS_SANDBOX")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "IS_SANDBOX=1" in refusal("claude")


# What CLIs print in JSON, shortened by what is not read


def line(type: str | None, **event) -> str:
    return json.dumps(event | {"type": type} if type else event)


DENIED = {"result": "No.", "permission_denials": [{"tool_name": "Edit"}, {"tool_name": "Write"}]}
UNAUTHORIZED = {"is_error": True, "api_error_status": 401, "result": "No."}
LIMIT = "You've hit your usage limit. Upgrade to Pro or try again at 9:43 PM."
FORBIDDEN = {"name": "APIError", "data": {"message": "no", "statusCode": 403}}
OVERCOME = line("error", message="Reconnecting... 429") + "\n" + line("item.completed", item={"text": "I would not."})
FAILURES = [  # output, exit code, kind, what the reason ends with
    (line("result", **UNAUTHORIZED), 1, "hopeless", "with exit code 1: 401: No."),
    (line("result", **DENIED), 0, "failed", "was not allowed to use Edit, Write: No."),
    (line("result", is_error=True, subtype="error_max_turns"), 1, "failed", "exit code 1: error_max_turns"),
    (line("turn.failed", error={"message": LIMIT}), 1, "rate limit", LIMIT),
    (line("error", error=FORBIDDEN), 0, "hopeless", "the agent failed: 403: no"),
    (line("error", error="429 insufficient_quota"), 1, "hopeless", "exit code 1: 429 insufficient_quota"),
    (OVERCOME, 0, "unchanged", "the agent left train.py as it was: I would not."),
    (line("text", part={"text": "the API says 429"}), 1, "failed", "the API says 429"),  # a model's own words
    (line("result", is_error=True, result="cut \ud83d"), 1, "failed", "exit code 1: cut ?"),  # in half an emoji
    ("Starting\nError: 429 Too many requests\n}\n", 1, "rate limit", "Starting Error: 429 Too many requests"),
    ("", 7, "failed", "the agent ended with exit code 7"),
]


def test_failure_is_told_in_the_clis_own_words_and_sorted_and_an_edit_before_counts(lab):
    for output, code, kind, end in FAILURES:
        answer = lab.propose(f"print({output!r}); sys.exit({code})")
        assert (answer.kind, answer.reason[-len(end) :]) == (kind, end)
    assert lab.propose(f"print({output!r}); knob('DEPTH', 8); sys.exit({code})").source == EDITED


def test_json_left_in_the_answer_folder_is_read_and_the_log_ends_with_the_last_words(lab):
    export = json.dumps({"error": {"message": "Invalid API key", "code": "x"}, "usage": {}, "cost_usd": None}, indent=1)
    agent = lab.agent(f'pathlib.Path(sys.argv[1], "export.json").write_text({export!r}); sys.exit(1)')
    answer = lab.propose(Agent(f"{agent.command} {{answer}}"))
    assert (answer.kind, answer.reason) == ("hopeless", "the agent ended with exit code 1: Invalid API key")
    assert lab.worktree.log.read_text().endswith("\n\nInvalid API key\n")
    assert lab.propose("pass").kind == "unchanged"  # the export of the call before is gone


CLAUDE = (
    '{"type":"assistant","message":{"role":"assistant","content":[],"usage":{"input_tokens":2,"output_tokens":1}}}\n'
    '{"type":"result","result":"Done.","total_cost_usd":0.3125,"usage":{"input_tokens":2,"output_tokens":2},"modelUsage":'
    '{"opus":{"inputTokens":20,"outputTokens":200,"cacheReadInputTokens":3000,"cacheCreationInputTokens":40},'
    '"haiku":{"inputTokens":5,"outputTokens":6,"cacheReadInputTokens":0,"cacheCreationInputTokens":0}}}'
)
CODEX = '{"type":"turn.completed","usage":{"input_tokens":1200,"cached_input_tokens":800,"output_tokens":34}}'
TOKENS = '{"input":1,"output":2,"reasoning":4,"cache":{"write":3,"read":4}}'
OPENCODE = f'{{"type":"step_finish","part":{{"tokens":{TOKENS},"cost":0.5}}}}'
PI = '{"type":"message_end","message":{"role":"assistant","usage":{"input":5,"output":3,"cost":{"total":0.125}}}}'
DROID = '{"type":"completion","usage":{"input_tokens":20,"output_tokens":3,"cache_read_input_tokens":8}}'
GEMINI = '{"type":"result","stats":{"total_tokens":24,"input_tokens":20,"output_tokens":3,"cached":8,"input":12}}'
COPILOT = '{"modelMetrics":{"a":{"usage":{"inputTokens":9,"outputTokens":2,"cacheReadTokens":4}}}}'
COSTS = {
    CLAUDE: Cost(1, 3065, 206, 0.3125),
    CLAUDE.replace("0.3125", "0"): Cost(1, 3065, 206, None),  # a model without a price
    CODEX: Cost(1, 1200, 34, None),
    f"{OPENCODE}\n{OPENCODE}": Cost(1, 16, 12, 1.0),
    f"{PI}\n{PI}": Cost(1, 10, 6, 0.25),
    DROID: Cost(1, 28, 3, None),
    DROID.replace("{", '{"total_tokens":23,'): Cost(1, 20, 3, None),  # qwen: the cache is counted already
    GEMINI: Cost(1, 20, 3, None),
    COPILOT: Cost(1, 9, 2, None),
    "I raised DEPTH; it cost $3.\n": agents.UNKNOWN,
}
RUBBISH = [
    "", "{", "null", "\x00\ufffd", "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, '{"type": []}', '{"error": [7]}',
    '{"message": {"content": [], "role": {}}}', '{"permission_denials": [3]}',
    '{"type":"result","total_cost_usd":NaN,"usage":{"input_tokens":-1,"output_tokens":1e30}}',
    '{"type":"step_finish","part":{"tokens":{"input":1.5,"output":"2","cache":4},"cost":"free"}}',
]  # fmt: skip


def test_cost_is_read_from_what_a_cli_prints_adds_up_and_is_unknown_where_it_cannot_be():
    for output, cost in COSTS.items():
        assert agents.read_answer(output).cost == cost, output
    for output in RUBBISH:
        assert agents.read_answer(output).cost == agents.UNKNOWN, output[:80]
    total = Cost(1, 10, 2, 0.5) + Cost(1, 5, 1, 0.25)
    assert total.as_dict() == {"calls": 2, "tokens_in": 15, "tokens_out": 3, "usd": 0.75}
    assert (total + Cost(1, 5, 1, None)).usd is None
