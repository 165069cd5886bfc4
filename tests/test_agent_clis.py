"""The agents' own CLIs, driven by loop.py against a scripted model: an edit, no edit, refusals, a hang, no log-in.

    AUTORESEARCH_TEST_CLIS=~/clis/bin uv run pytest tests/test_agent_clis.py    # a folder to look in before PATH
    uv run pytest tests/test_agent_clis.py -m 'slow or not slow'                # opencode and vibe take their time

A real CLI runs with a fresh HOME, a dummy key and no other environment; where it is missing, its tests are skipped.
Stand-ins for the CLIs cover the checks before the baseline everywhere.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from model_server import Hang, ModelServer, Run, Say, Status, Turn

ROOT = Path(__file__).resolve().parent.parent
PATH = os.pathsep.join(filter(None, [os.environ.get("AUTORESEARCH_TEST_CLIS"), os.environ["PATH"]]))
LIMIT = 120  # seconds, for one call of the loop

# -----------------------------------------------------------------------------
# A desk: loop.py, program.md and a domain that takes milliseconds

PREPARE = """
def describe():
    facts = {"profile": "stub", "reason": "a test", "device": "cpu", "device_name": "cpu", "lock": "no/lock"}
    facts |= {"cache": ".", "prepared": True, "problem": None, "time_budget": 1, "rows": {"val": 1, "test": 1}}
    return facts | {"digest": "0" * 64, "files": {}, "prepare_sha256": "0" * 64}
"""
TRAIN = """
import json, os, prepare

DEPTH = 8  # layers

val_bpb = 1 + 1 / DEPTH
seed = int(os.environ["AUTORESEARCH_SEED"])
with open(os.environ["AUTORESEARCH_RESULT"], "w") as file:
    json.dump(prepare.describe() | {"val_bpb": val_bpb, "split": "val", "seed": seed, "rows": 1}, file)
print(f"---\\nval_bpb:          {val_bpb:.6f}\\npeak_vram_mb:     0.0")
"""
PROGRAM = '# Research\n\nQuote "it", $HOME, `ls`, \\n and ü.\n' + "Read every line of this. " * 4000  # 100 kB


@dataclass
class Desk:
    path: Path
    env: dict[str, str]

    def loop(self, agent: str, *options: str, on_failure: Iterable[Callable] = ()) -> subprocess.CompletedProcess:
        """Run the loop to its end; whenever it says that a proposal failed, call the next of `on_failure`."""
        command = [sys.executable, "loop.py", "run", "--agent", agent, *options]
        process = subprocess.Popen(command, cwd=self.path, env=self.env, stderr=subprocess.PIPE, text=True)
        alarm = threading.Timer(LIMIT, process.terminate)
        alarm.start()
        calls, lines = iter(on_failure), []
        with process:
            for line in process.stderr:
                lines.append(line)
                if line.startswith("no proposal"):
                    next(calls, lambda: None)()
        alarm.cancel()
        return subprocess.CompletedProcess(command, process.returncode, stderr="".join(lines))

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(status, description) of the ledger's rows."""
        return [tuple(line.split("\t")[3:]) for line in (self.path / "results.tsv").read_text().splitlines()[1:]]


@pytest.fixture
def desk(tmp_path):
    path, home, tools = (tmp_path / name for name in ("desk", "home", "bin"))
    for folder in (path, home / "tmp", tools):
        folder.mkdir(parents=True)
    for file in [*ROOT.glob("*.py"), ROOT / ".gitignore"]:
        shutil.copy(file, path)
    shutil.copytree(ROOT / "agents", path / "agents", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in {"prepare.py": PREPARE, "train.py": TRAIN, "program.md": PROGRAM}.items():
        (path / name).write_text(text)
    loop, n_replaced = re.subn(r"(?m)^BACKOFF = .*", "BACKOFF = 0.1, 1", (path / "loop.py").read_text())
    assert n_replaced == 1
    (path / "loop.py").write_text(loop)
    for command in ("init -q", "add .", "-c user.name=t -c user.email=t@t commit -qm start"):
        subprocess.run(["git", *command.split()], cwd=path, check=True)
    (tools / "git").symlink_to(shutil.which("git"))  # and nothing else: no agent of the person who tests
    yield Desk(path, {"PATH": str(tools), "HOME": str(home), "TMPDIR": str(home / "tmp"), "TERM": "dumb"})
    assert processes_with(str(home)) == []


def processes_with(text: str) -> list[str]:
    """Command lines of the processes with a text in their environment (none where there is no /proc)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found


def assert_refused(desk: Desk, agent: str, beginning: str) -> str:
    """The loop ends with exit code 2 and one line, and has begun nothing: no baseline, no branch. Returns the line."""
    ended = desk.loop(agent, "--max-experiments", "1")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(beginning), ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert not (desk.path / ".git/autoresearch").exists()
    assert not (desk.path / "results.tsv").exists()
    return ended.stderr


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
PATIENCE_SECONDS = {"claude": 6, "codex": 6, "opencode": 20, "vibe": 20}  # several times what an edit takes
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

    def loop(self, n_experiments: int, **more) -> subprocess.CompletedProcess:
        options = ["--max-experiments", n_experiments, "--agent-timeout", PATIENCE_SECONDS[self.name]]
        return self.desk.loop(self.name, *map(str, options), **more)


@pytest.fixture
def lab(desk, request):
    require(request.param)
    with ModelServer() as server:
        desk.env |= {"PATH": PATH} | CLIS[request.param](Path(desk.env["HOME"]), server.url)
        yield Lab(desk, request.param, server)


def edit(depth: int, description: str) -> tuple[Turn, Turn]:
    """What a well-behaved agent does."""
    sed = f"sed 's/^DEPTH = [0-9]*/DEPTH = {depth}/' train.py > new && mv new train.py"
    return Run(f"{sed} && echo '{description}' > experiment.txt"), Say("Done.")


@every_cli
def test_edit_is_run_and_kept_or_discarded(lab):
    lab.server.play(*edit(10, "raise depth to 10"), *edit(4, "lower depth to 4"))
    ended = lab.loop(2)
    assert ended.returncode == 0, ended.stderr
    assert lab.desk.rows == [("keep", "baseline"), ("keep", "raise depth to 10"), ("discard", "lower depth to 4")]
    prompts = [path.read_text() for path in (lab.desk.path / "runs").glob("*/prompt.md")]
    assert len(prompts) == 2
    for prompt in prompts:
        assert PROGRAM.strip() in prompt
        assert any(prompt.strip() in request.user_text for request in lab.server.requests)


@every_cli_some_slow
def test_answer_without_an_edit_costs_no_row(lab):
    lab.server.play(Say("I would rather not."), *edit(10, "raise depth to 10"))
    ended = lab.loop(1)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("no proposal: ") == 1
    assert lab.desk.rows == [("keep", "baseline"), ("keep", "raise depth to 10")]


@every_cli_some_slow
def test_server_errors_and_rate_limits_cost_no_row(lab):
    lab.server.play(Status(500))
    limit = partial(lab.server.play, Status(429, retry_after_seconds=1))
    recover = partial(lab.server.play, *edit(10, "raise depth to 10"))
    ended = lab.loop(1, on_failure=[limit, recover])
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("no proposal: the agent ended with") >= 2
    assert lab.desk.rows == [("keep", "baseline"), ("keep", "raise depth to 10")]


@every_cli_some_slow
def test_hang_is_ended_with_all_that_the_agent_started(lab, tmp_path):
    daemon = Run("setsid sleep 300 >/dev/null 2>&1 & echo $! > ../daemon")
    lab.server.play(daemon, Hang(), *edit(10, "raise depth to 10"))
    ended = lab.loop(1)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("no proposal: the agent ended with timeout") == 1
    assert int((tmp_path / "daemon").read_text()) > 0  # it was started
    assert processes_with(lab.desk.env["HOME"]) == []
    assert lab.desk.rows == [("keep", "baseline"), ("keep", "raise depth to 10")]


@pytest.mark.parametrize("name", ["claude", "codex", "vibe", "gemini"])
def test_real_cli_not_logged_in_is_refused(desk, name):
    require(name)
    desk.env |= {"PATH": PATH, "IS_SANDBOX": "1"}
    assert_refused(desk, name, f"error: {name} is not logged in: ")


def test_real_claude_as_root_is_refused(desk):
    require("claude")
    if os.geteuid():
        pytest.skip("only root is refused")
    desk.env |= {"PATH": PATH, "ANTHROPIC_API_KEY": "dummy"}
    assert "IS_SANDBOX=1" in assert_refused(desk, "claude", "error: claude ")


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
STAND_IN = """#!{python}
import pathlib, sys
if {check!r} in sys.argv:
    print({answer!r}, file=sys.stdout if {answer!r}.startswith("{{") else sys.stderr)
    sys.exit({code})
train = pathlib.Path("train.py")
train.write_text(train.read_text().replace("DEPTH = 8", "DEPTH = 10"))
"""


def install(desk: Desk, name: str, check: str, answer: str, code: int) -> None:
    """A stand-in for a CLI: called with the argument `check` it gives the answer, else it edits train.py."""
    path = Path(desk.env["PATH"]) / name
    path.write_text(STAND_IN.format(python=sys.executable, check=check, answer=answer, code=code))
    path.chmod(0o755)
    desk.env["IS_SANDBOX"] = "1"


def assert_accepted(desk: Desk, agent: str) -> None:
    ended = desk.loop(agent, "--max-experiments", "0")
    assert ended.returncode == 0, ended.stderr
    assert desk.rows == [("keep", "baseline")]


@pytest.mark.parametrize("name", [*LOGGED_IN, "opencode"])
def test_missing_cli_is_refused_with_how_to_install_it(desk, name):
    line = assert_refused(desk, name, f"error: {name} is not installed")
    assert re.search(r"npm install|uv tool install", line)


@pytest.mark.parametrize("name", LOGGED_OUT)
def test_cli_not_logged_in_is_refused_with_how_to_log_in(desk, name):
    install(desk, name, *LOGGED_OUT[name])
    line = assert_refused(desk, name, f"error: {name} is not logged in: ")
    assert re.search(r", or export \w+_API_KEY$", line)


@pytest.mark.parametrize("name", LOGGED_IN)
def test_cli_logged_in_is_run(desk, name):
    install(desk, name, *LOGGED_IN[name])
    ended = desk.loop(name, "--max-experiments", "1")
    assert ended.returncode == 0, ended.stderr
    assert desk.rows == [("keep", "baseline"), ("keep", "DEPTH 8 -> 10")]


def test_claude_as_root_is_refused_with_what_to_do(desk):
    if os.geteuid():
        pytest.skip("only root is refused")
    install(desk, "claude", *LOGGED_IN["claude"])
    del desk.env["IS_SANDBOX"]
    assert "IS_SANDBOX=1" in assert_refused(desk, "claude", "error: claude ")


def test_claude_too_old_for_the_check_is_accepted(desk):
    install(desk, "claude", "auth", "error: unknown command 'auth'", 1)
    assert_accepted(desk, "claude")


def test_codex_with_a_key_in_the_environment_is_accepted(desk):
    desk.env["CODEX_API_KEY"] = "dummy"
    install(desk, "codex", *LOGGED_OUT["codex"])
    assert_accepted(desk, "codex")


def test_codex_with_a_provider_of_its_own_is_accepted(desk):
    config = Path(desk.env["HOME"]) / ".codex/config.toml"
    config.parent.mkdir()
    config.write_text('model_provider = "lab"\n')
    install(desk, "codex", *LOGGED_OUT["codex"])
    assert_accepted(desk, "codex")
