"""The agents' own CLIs, driven by loop.py against a scripted model: an edit, no edit, refusals, a hang, no log-in.

    AUTORESEARCH_TEST_CLIS=~/clis/bin uv run pytest tests/test_agent_clis.py    # a folder to look in before PATH
    uv run pytest tests/test_agent_clis.py -m 'slow or not slow'                # opencode and vibe take their time

A real CLI runs with a fresh HOME, a dummy key and no other environment; where it is missing, its tests are skipped.
Stand-ins for the CLIs cover the checks before the baseline everywhere.
"""

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from conftest import Desk
from model_server import Hang, ModelServer, Run, Say, Status, Turn

from harness import agents
from harness.agents import Agent
from harness.processes import find_processes

PATH = os.pathsep.join(filter(None, [os.environ.get("AUTORESEARCH_TEST_CLIS"), os.environ["PATH"]]))
PROGRAM = '# Research\n\nQuote "it", $HOME, `ls`, \\n and ü.\n' + "Read every line of this. " * 4000  # 100 kB
LIMIT = 120  # seconds, for one call of the loop


@pytest.fixture
def bare(desk, tmp_path):
    """A desk with git, rm and an empty HOME, but without the agents of the person who tests."""
    tools, temporary = tmp_path / "bin", tmp_path / "home" / "tmp"
    tools.mkdir()
    temporary.mkdir()
    for name in ("git", "rm"):
        (tools / name).symlink_to(shutil.which(name))
    desk.env |= {"PATH": str(tools), "TMPDIR": str(temporary), "TERM": "dumb"}
    desk.env["PWD"] = desk.env["HOME"]  # wrong on purpose: opencode would work there
    (desk.path / "program.md").write_text(PROGRAM)
    desk.commit("a long program")
    return desk


def run_loop(desk: Desk, *options: str, on_failure: Iterable[Callable] = ()) -> tuple[int, str]:
    """Run the loop to its end; whenever it says that a proposal failed, call the next of `on_failure`.

    Returns its exit code and what it wrote to stderr.
    """
    calls, lines = iter(on_failure), []
    with desk.popen("--tag", "t", *options) as process:
        alarm = threading.Timer(LIMIT, process.terminate)
        alarm.start()
        for line in process.stderr:
            lines.append(line)
            if line.startswith("no proposal"):
                next(calls, lambda: None)()
        alarm.cancel()
    return process.returncode, "".join(lines)


def ledger(desk: Desk) -> list[tuple[str, str]]:
    """(status, description) of every row."""
    return [(row[3], row[4]) for row in desk.rows()]


def assert_refused(desk: Desk, agent: str, beginning: str) -> str:
    """The loop ends with exit code 2 and one line, and has begun nothing: no baseline, no branch. Returns the line."""
    code, line = run_loop(desk, "--agent", agent, "--max-experiments", "1")
    assert code == 2, line
    assert line.startswith(beginning), line
    assert line.count("\n") == 1, line
    assert not desk.home().exists()
    return line


# -----------------------------------------------------------------------------
# Real CLIs: how each is pointed at the server and, where it can be, told not to try again by itself


def configure_claude(home: Path, url: str) -> dict[str, str]:
    env = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "dummy", "CLAUDE_CODE_MAX_RETRIES": "0"}
    return env | {"IS_SANDBOX": "1"}  # root is refused without it


def configure_codex(home: Path, url: str) -> dict[str, str]:
    provider = {"name": "lab", "base_url": f"{url}/v1", "wire_api": "responses", "env_key": "LAB_KEY"}
    provider |= {"request_max_retries": 0, "stream_max_retries": 0}
    lines = ['model = "lab"', 'model_provider = "lab"', "[model_providers.lab]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in provider.items()]
    (home / ".codex").mkdir()
    (home / ".codex/config.toml").write_text("\n".join(lines))
    return {"LAB_KEY": "dummy"}


def configure_opencode(home: Path, url: str) -> dict[str, str]:
    provider = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{url}/v1", "apiKey": "dummy"}}
    provider["models"] = {"lab": {"tool_call": True}}
    return {"OPENCODE_CONFIG_CONTENT": json.dumps({"model": "lab/lab", "provider": {"lab": provider}})}


def configure_vibe(home: Path, url: str) -> dict[str, str]:
    provider = f'[[providers]]\nname = "lab"\napi_base = "{url}/v1"\napi_key_env_var = "LAB_KEY"\n'
    model = '[[models]]\nname = "lab"\nprovider = "lab"\nalias = "lab"\n'
    (home / ".vibe").mkdir()
    (home / ".vibe/config.toml").write_text(f'active_model = "lab"\n{provider}{model}')
    return {"LAB_KEY": "dummy"}


CLIS = {"claude": configure_claude, "codex": configure_codex, "opencode": configure_opencode, "vibe": configure_vibe}
PATIENCE_SECONDS = {"claude": 8, "codex": 8, "opencode": 20, "vibe": 20}  # several times what an edit takes
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("opencode", "vibe")]

every_cli = pytest.mark.parametrize("lab", CLIS, indirect=True)
every_cli_some_slow = pytest.mark.parametrize("lab", ["claude", "codex", *SLOW], indirect=True)


def require(name: str) -> None:
    if not shutil.which(name, path=PATH):
        pytest.skip(f"{name} is not installed (looked in AUTORESEARCH_TEST_CLIS and PATH)")


@dataclass
class Lab:
    """A desk, a real CLI for it and the model that this one talks to."""

    desk: Desk
    name: str
    server: ModelServer

    def run(self, n_experiments: int, on_failure: Iterable[Callable] = ()) -> str:
        """Run the loop for so many experiments. Returns what it wrote to stderr."""
        options = ["--max-experiments", n_experiments, "--agent-timeout", PATIENCE_SECONDS[self.name]]
        code, said = run_loop(self.desk, "--agent", self.name, *map(str, options), on_failure=on_failure)
        assert code == 0, said
        return said


@pytest.fixture
def lab(bare, request):
    require(request.param)
    with ModelServer() as server:
        bare.env |= {"PATH": PATH} | CLIS[request.param](Path(bare.env["HOME"]), server.url)
        yield Lab(bare, request.param, server)


def edit(depth: int, description: str) -> tuple[Turn, Turn]:
    """What a well-behaved agent does."""
    sed = f"sed 's/^DEPTH = [0-9]*/DEPTH = {depth}/' train.py > new && mv new train.py"
    return Run(f"{sed} && echo '{description}' > experiment.txt"), Say("Done.")


@every_cli
def test_edit_is_run_and_kept_or_discarded(lab):
    lab.server.play(*edit(8, "raise depth to 8"), *edit(2, "lower depth to 2"))
    lab.run(2)
    assert ledger(lab.desk) == [("keep", "baseline"), ("keep", "raise depth to 8"), ("discard", "lower depth to 2")]
    prompt = (lab.desk.home() / "prompt.md").read_text()  # the last one
    assert PROGRAM.strip() in prompt
    assert "raise depth to 8" in prompt
    assert any(prompt.strip() in request.user_text for request in lab.server.requests)
    for event in [event for event in lab.desk.events() if event["event"] == "proposal"]:
        if lab.name in ("claude", "codex"):  # opencode, where the machine is busy, may be ended after the edit
            assert (event["tokens_in"], event["tokens_out"]) == (2, 2)  # one each for the edit and for the word
        assert (event["usd"] is not None) == (lab.name == "claude")  # opencode knows no price of this model


@every_cli_some_slow
def test_answer_without_an_edit_costs_no_row(lab):
    lab.server.play(Say("I would rather not."), *edit(8, "raise depth to 8"))
    assert lab.run(1).count("no proposal: ") == 1
    assert ledger(lab.desk) == [("keep", "baseline"), ("keep", "raise depth to 8")]


@every_cli_some_slow
def test_server_errors_and_rate_limits_cost_no_row(lab):
    lab.server.play(Status(500))
    limit = partial(lab.server.play, Status(429, retry_after_seconds=1))
    recover = partial(lab.server.play, *edit(8, "raise depth to 8"))
    said = lab.run(1, on_failure=[limit, recover])
    assert said.count("no proposal: the agent ended with") >= 2
    assert not re.search(r"exit code \d+: *[;{]", said), said  # the CLI's own words say why, in no JSON
    assert ledger(lab.desk) == [("keep", "baseline"), ("keep", "raise depth to 8")]


@every_cli_some_slow
def test_hang_is_ended_with_all_that_the_agent_started(lab, tmp_path):
    daemon = Run("setsid sleep 60 >/dev/null 2>&1 & echo $! > ../daemon")
    lab.server.play(daemon, Hang(), *edit(8, "raise depth to 8"))
    assert lab.run(1).count("no proposal: the agent ended with timeout") == 1
    assert int((tmp_path / "daemon").read_text()) not in find_processes("cmdline", b"sleep")
    assert lab.desk.orphans() == []
    assert ledger(lab.desk) == [("keep", "baseline"), ("keep", "raise depth to 8")]


@pytest.mark.parametrize("name", ["claude", "codex", "vibe", "gemini"])
def test_real_cli_not_logged_in_is_refused(bare, name):
    require(name)
    bare.env |= {"PATH": PATH, "IS_SANDBOX": "1"}
    assert_refused(bare, name, f"error: {name} is not logged in: ")


def test_real_claude_as_root_is_refused(bare):
    require("claude")
    if os.geteuid():
        pytest.skip("only root is refused")
    bare.env |= {"PATH": PATH, "ANTHROPIC_API_KEY": "dummy"}
    assert "IS_SANDBOX=1" in assert_refused(bare, "claude", "error: claude ")


# -----------------------------------------------------------------------------
# What needs no CLI: a missing one, and stand-ins that give a real one's answer to the check (measured)

LOGGED_OUT = {  # name: (the check's argument, its answer, exit code)
    "claude": ("auth", '{"loggedIn": false, "authMethod": "none"}', 1),
    "codex": ("login", "Not logged in", 1),
    "vibe": ("--resume", "Error: Missing MISTRAL_API_KEY environment variable for mistral provider", 1),
    "gemini": ("--list-sessions", "Please set an Auth method in your ~/.gemini/settings.json", 41),
}
LOGGED_IN = {
    "claude": ("auth", '{"loggedIn": true, "authMethod": "api_key"}', 0),
    "codex": ("login", "Logged in using ChatGPT", 0),
    "vibe": ("--resume", "Error: Session not found: no-such-session", 1),
    "gemini": ("--list-sessions", "No previous sessions found for this project.", 0),
}
NEEDED = {  # without these a real CLI asks a person, who sleeps, or edits nothing
    "claude": ["-p", "--dangerously-skip-permissions", "--output-format", "json"],
    "codex": ["exec", "--dangerously-bypass-approvals-and-sandbox", "--json", "-"],
    "vibe": ["-p", "--auto-approve"],
    "gemini": ["-p", "--approval-mode", "yolo", "--skip-trust"],
}
STAND_IN = """#!{python}
import pathlib, sys
if {check!r} in sys.argv:
    print({answer!r}, file=sys.stdout if {answer!r}.startswith("{{") else sys.stderr)
    sys.exit({code})
asked = set({needed!r}) <= set(sys.argv) and "loop.py calls you for one proposal" in sys.stdin.read()
train = pathlib.Path("train.py")
train.write_text(train.read_text().replace("DEPTH = 4", "DEPTH = 8" if asked else "DEPTH = 2"))
"""


def install(desk: Desk, name: str, check: str, answer: str, code: int) -> None:
    """A stand-in for a CLI: called with the argument `check` it gives the answer, else it edits train.py.

    The edit is a good one only if the command line holds what is needed and standard input the prompt.
    """
    path = Path(desk.env["PATH"]) / name
    path.write_text(STAND_IN.format(python=sys.executable, check=check, answer=answer, code=code, needed=NEEDED[name]))
    path.chmod(0o755)
    desk.env["IS_SANDBOX"] = "1"


def assert_accepted(desk: Desk, agent: str) -> None:
    code, said = run_loop(desk, "--agent", agent, "--max-experiments", "0")
    assert code == 0, said
    assert ledger(desk) == [("keep", "baseline")]


@pytest.mark.parametrize("name", [*LOGGED_IN, "opencode"])
def test_missing_cli_is_refused_with_how_to_install_it(bare, name):
    line = assert_refused(bare, name, f"error: {name} is not installed")
    assert re.search(r"npm install|uv tool install", line)


@pytest.mark.parametrize("name", LOGGED_OUT)
def test_cli_not_logged_in_is_refused_with_how_to_log_in(bare, name):
    install(bare, name, *LOGGED_OUT[name])
    line = assert_refused(bare, name, f"error: {name} is not logged in: ")
    assert re.search(r", or export \w+_API_KEY$", line)


@pytest.mark.parametrize("name", LOGGED_IN)
def test_cli_logged_in_is_run(bare, name):
    install(bare, name, *LOGGED_IN[name])
    code, said = run_loop(bare, "--agent", name, "--max-experiments", "1")
    assert code == 0, said
    assert ledger(bare) == [("keep", "baseline"), ("keep", "DEPTH 4 -> 8")]


def test_claude_as_root_is_refused_with_what_to_do(bare):
    if os.geteuid():
        pytest.skip("only root is refused")
    install(bare, "claude", *LOGGED_IN["claude"])
    del bare.env["IS_SANDBOX"]
    assert "IS_SANDBOX=1" in assert_refused(bare, "claude", "error: claude ")


def test_claude_too_old_for_the_check_is_accepted(bare):
    install(bare, "claude", "auth", "error: unknown command 'auth'", 1)
    assert_accepted(bare, "claude")


def test_codex_with_a_key_in_the_environment_is_accepted(bare):
    bare.env["CODEX_API_KEY"] = "dummy"
    install(bare, "codex", *LOGGED_OUT["codex"])
    assert_accepted(bare, "codex")


def test_codex_with_a_provider_of_its_own_is_accepted(bare):
    config = Path(bare.env["HOME"]) / ".codex/config.toml"
    config.parent.mkdir()
    config.write_text('model_provider = "lab"\n')
    install(bare, "codex", *LOGGED_OUT["codex"])
    assert_accepted(bare, "codex")


def test_check_that_hangs_refuses_nobody(monkeypatch):
    monkeypatch.setattr(agents, "CHECK_SECONDS", 0.1)
    monkeypatch.setitem(agents.AGENTS, "slow", Agent(["sleep"], check="60", refused="exit code"))
    assert agents.choose_agent("slow", None).command == ["sleep"]
