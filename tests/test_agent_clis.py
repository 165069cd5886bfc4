"""The agents' own CLIs in a worktree, against a scripted model: an edit, no edit, refusals, a hang, no log-in.

    AUTORESEARCH_TEST_CLIS=~/clis/bin:~/more/bin uv run pytest tests/test_agent_clis.py    # looked in before PATH
    uv run pytest tests/test_agent_clis.py -m 'slow or not slow'                           # all but claude and codex

A real CLI runs with a fresh HOME, a dummy key and no other environment; where it is missing, its tests are skipped.
"""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from agent_fixtures import TRAIN, Lab
from model_server import Call, Hang, ModelServer, Run, Say, Status, Turn

from harness.agents import AGENTS, Agent, NoProposal, choose_agent
from harness.console import UserError
from harness.edit import Edit
from harness.processes import find_marked, find_processes

PATH = os.pathsep.join(filter(None, [os.environ.get("AUTORESEARCH_TEST_CLIS"), os.environ["PATH"]]))
PROMPT = 'Quote "it", $HOME, `ls`, \\n and ü.\n' + "Read every line of this. " * 4000  # 100 kB
EDITED = TRAIN.replace("DEPTH = 4", "DEPTH = 8").encode()
SED = "sed 's/^DEPTH = 4/DEPTH = 8/' train.py > new && mv new train.py"
EDIT = (Run(f"{SED} && echo raise > experiment.txt"), Say("Done."))
LIMIT = 120  # seconds, for one call


def configure(name: str, home: Path, url: str) -> dict[str, str]:
    """Point a CLI at the server and, where it can be, tell it not to try again by itself; the environment for that."""
    match name:
        case "claude":
            env = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "dummy", "CLAUDE_CODE_MAX_RETRIES": "0"}
            return env | {"IS_SANDBOX": "1"}  # root is refused without it
        case "codex":
            provider = {"name": "lab", "base_url": f"{url}/v1", "wire_api": "responses", "env_key": "LAB_KEY"}
            provider |= {"request_max_retries": 0, "stream_max_retries": 0}
            lines = ['model = "lab"', 'model_provider = "lab"', "[model_providers.lab]"]
            lines += [f"{key} = {json.dumps(value)}" for key, value in provider.items()]
            write(home / ".codex/config.toml", "\n".join(lines))
            return {"LAB_KEY": "dummy"}
        case "opencode":
            provider = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{url}/v1", "apiKey": "dummy"}}
            provider["models"] = {"lab": {"tool_call": True}}
            return {"OPENCODE_CONFIG_CONTENT": json.dumps({"model": "lab/lab", "provider": {"lab": provider}})}
        case "vibe":
            provider = f'[[providers]]\nname = "lab"\napi_base = "{url}/v1"\napi_key_env_var = "LAB_KEY"\n'
            model = '[[models]]\nname = "lab"\nprovider = "lab"\nalias = "lab"\ninput_price = 1.0\noutput_price = 2.0\n'
            write(home / ".vibe/config.toml", f'active_model = "lab"\n{provider}{model}')
            return {"LAB_KEY": "dummy"}
        case "pi":
            model = {"id": "lab", "cost": {"input": 1, "output": 2, "cacheRead": 0, "cacheWrite": 0}}
            lab = {"baseUrl": f"{url}/v1", "api": "openai-completions", "apiKey": "dummy", "models": [model]}
            write(home / ".pi/agent/models.json", json.dumps({"providers": {"lab": lab}}))
            write(home / ".pi/agent/settings.json", '{"defaultProvider": "lab", "defaultModel": "lab"}')
            return {}
        case "qwen":
            return {"OPENAI_API_KEY": "dummy", "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_MODEL": "lab"}
        case "copilot":
            env = {"COPILOT_PROVIDER_BASE_URL": f"{url}/v1", "COPILOT_PROVIDER_API_KEY": "dummy"}
            return env | {"COPILOT_MODEL": "lab", "COPILOT_OFFLINE": "true"}
        case "droid":
            model = {"model": "lab", "displayName": "lab", "baseUrl": f"{url}/v1", "apiKey": "dummy"}
            model |= {"maxOutputTokens": 1000, "provider": "generic-chat-completion-api"}
            chosen = {"model": "custom:lab-0"}
            settings = {"customModels": [model], "sessionDefaultSettings": chosen} | chosen
            write(home / ".factory/settings.json", json.dumps(settings))
            return {"FACTORY_API_KEY": "fk-dummy"}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


TELL_DOLLARS = ("claude", "vibe", "pi")  # of this model; opencode knows no price of it
OTHERS = "opencode", "vibe", "pi", "qwen", "copilot", "droid"
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
every_cli = pytest.mark.parametrize("cli", ["claude", "codex", *SLOW], indirect=True)


def require(name: str) -> None:
    if not shutil.which(name, path=PATH):
        pytest.skip(f"{name} is not installed (looked in AUTORESEARCH_TEST_CLIS and PATH)")


@pytest.fixture
def cli(request, tmp_path):
    require(request.param)
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    with ModelServer() as server:
        env = {"PATH": PATH, "HOME": str(home), "TMPDIR": str(home / "tmp"), "TERM": "dumb"}
        env["PWD"] = str(home)  # wrong on purpose: opencode would work there
        env |= {"CLAUDECODE": "1", "CLAUDE_CODE_ENTRYPOINT": "cli"}  # as if another agent had started the loop
        lab = Lab(tmp_path, env | configure(request.param, home, server.url))

        def propose(*script: Turn, limit: float = LIMIT, agent: Agent | None = None) -> Edit | NoProposal:
            server.play(*script)
            return lab.propose(agent or AGENTS[request.param], prompt=PROMPT, limit=limit)

        yield SimpleNamespace(name=request.param, lab=lab, server=server, propose=propose)
    assert find_marked(lab.tag.mark) == set()


@every_cli
def test_edit_is_a_proposal_with_its_cost_and_the_prompt_arrived_whole(cli):
    proposal = cli.propose(*EDIT)
    assert isinstance(proposal, Edit), proposal
    assert (proposal.source, proposal.description, proposal.touched) == (EDITED, "raise", ())
    assert any(PROMPT.strip() in request.user_text for request in cli.server.requests)
    cost = cli.lab.worktree.cost
    # One each for the edit and for the word; claude asks for a title too.
    assert (cost.calls, cost.tokens_in, cost.tokens_out) in [(1, 2, 2), (1, 3, 3)]
    assert (cost.usd is not None) == (cli.name in TELL_DOLLARS)


@every_cli
def test_answer_without_an_edit_and_refusals_are_told_apart_in_the_clis_words(cli):
    answer = cli.propose(Say("I would rather not."))
    assert (answer.kind, answer.reason) == ("unchanged", "the agent left train.py as it was: I would rather not.")
    answer = cli.propose(Status(401))
    assert answer.kind == "hopeless", answer
    assert "401" in answer.reason or "Invalid API key" in answer.reason


@pytest.mark.parametrize("cli", ["claude", "codex", "copilot", "pi"], indirect=True)
def test_server_errors_and_rate_limits_are_failures_and_an_edit_before_counts(cli):
    answer = cli.propose(Status(500))
    assert answer.kind == "failed" and len(answer.reason) > len("the agent ended with exit code 1: "), answer
    assert cli.propose(Status(429)).kind == "rate limit"
    assert cli.propose(EDIT[0], Status(500)).source == EDITED


@every_cli
def test_hang_is_ended_with_all_that_the_agent_started_and_an_edit_before_counts(cli, tmp_path):
    daemon = Run(f"setsid sleep 60 >/dev/null 2>&1 & echo $! > {tmp_path}/daemon")
    patience = 10 if cli.name in ("claude", "codex", "pi") else 30
    assert cli.propose(daemon, EDIT[0], Hang(), limit=patience).source == EDITED
    assert int((tmp_path / "daemon").read_text()) not in find_processes("cmdline", b"sleep")


@pytest.mark.parametrize("cli", ["claude"], indirect=True)
def test_claude_uses_its_own_tools_in_the_worktree_without_a_persons_hooks_and_says_where_it_may_not(cli):
    cli.lab.add_run(log="the end of a log", status="discard", description="wider layers", score=1.6)
    hook = {"matcher": "Edit|Bash", "hooks": [{"type": "command", "command": "echo '# formatted' >> train.py"}]}
    write(Path(cli.lab.env["HOME"], ".claude/settings.json"), json.dumps({"hooks": {"PostToolUse": [hook]}}))
    train = {"file_path": str(cli.lab.file("train.py"))}
    edit = Call("Edit", train | {"old_string": "DEPTH = 4", "new_string": "DEPTH = 8"})
    looks = [Call("Read", {"file_path": str(cli.lab.file(name))}) for name in ("runs/0002/run.log", "results.tsv")]
    proposal = cli.propose(
        *looks,
        Call("Read", train),
        edit,
        Call("Write", {"file_path": str(cli.lab.file("experiment.txt")), "content": "by its own tools"}),
        Say("Done."),
    )
    assert isinstance(proposal, Edit), proposal
    assert (proposal.source, proposal.description) == (EDITED, "by its own tools")
    seen = json.dumps(cli.server.requests[-1].body)
    assert "the end of a log" in seen and "wider layers" in seen
    asks = Agent("claude -p --output-format stream-json --verbose --allowedTools Read")
    answer = cli.propose(Call("Read", train), edit, Say("I could not."), agent=asks)
    assert answer.reason == "the agent failed: it was not allowed to use Edit: I could not."


@pytest.mark.parametrize("name", ["claude", "codex", pytest.param("vibe", marks=pytest.mark.slow)])
def test_real_cli_not_logged_in_is_refused(name, tmp_path, monkeypatch):
    require(name)
    for variable in [name for name in os.environ if name.endswith(("_KEY", "_TOKEN"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", PATH)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("IS_SANDBOX", "1")
    with pytest.raises(UserError, match=f"{name} is not logged in: "):
        choose_agent(name, None)
