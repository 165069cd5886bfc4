"""How each coding agent's CLI runs headless, and the quick checks before it is trusted with a night.

A new agent is one more row of AGENTS; without a row, `loop.py --agent-cmd "COMMAND"` takes any command. The prompt
comes on standard input. Command lines and checks as measured in November 2026 with claude 2.1, codex 0.169, vibe 3.0,
gemini 0.61 and opencode 1.18.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from harness.screen import UserError


@dataclass(frozen=True)
class Agent:
    command: list[str]
    install: str = ""  # the remedy where it is missing
    check: str = ""  # arguments of a quick command that tells, without network, whether it is logged in
    refused: str = ""  # the pattern in the check's output that says no; anything else passes
    login: str = ""  # the remedy


AGENTS = {
    "claude": Agent(
        ["claude", "-p", "--dangerously-skip-permissions"], "npm install -g @anthropic-ai/claude-code",
        "auth status", r'"loggedIn": *false', "claude auth login, or export ANTHROPIC_API_KEY",
    ),
    "codex": Agent(
        ["codex", "exec", "--dangerously-bypass-approvals-and-sandbox", "-"], "npm install -g @openai/codex",
        "login status", "Not logged in", "codex login, or export CODEX_API_KEY",
    ),
    "vibe": Agent(
        ["vibe", "--auto-approve", "-p"], "uv tool install mistral-vibe",
        "--auto-approve -p x --resume no-such-session", "Missing .*environment variable",
        "vibe --setup, or export MISTRAL_API_KEY",
    ),
    "gemini": Agent(
        ["gemini", "-p", "", "--approval-mode", "yolo", "--skip-trust"], "npm install -g @google/gemini-cli",
        "--list-sessions", "exit code 41", "gemini, or export GEMINI_API_KEY",
    ),
    "opencode": Agent(["opencode", "run", "--auto"], "npm install -g opencode-ai"),
    "random": Agent([sys.executable, "-P", str(Path(__file__).with_name("random_search.py"))]),
}  # fmt: skip


def choose_agent(name: str | None, command: str | None) -> Agent:
    """The adapter to use. Raises UserError, with the remedy, if it is missing, not allowed here or not logged in."""
    if command is not None:
        try:
            words = shlex.split(command)
        except ValueError:
            words = []
        if not words or not shutil.which(words[0]):
            raise UserError(f"--agent-cmd {command!r} starts no program that is installed: give its path", 2)
        return Agent(words)
    installed = ", ".join(each for each, agent in AGENTS.items() if shutil.which(agent.command[0]))
    if name not in AGENTS:
        asked = f"unknown agent {name!r}" if name else "no agent given"
        raise UserError(f'{asked}: use --agent NAME (installed here: {installed}) or --agent-cmd "COMMAND"', 2)
    agent = AGENTS[name]
    if not shutil.which(agent.command[0]):
        raise UserError(f"{name} is not installed: {agent.install} (installed here: {installed})", 2)
    sandbox = os.environ.get("IS_SANDBOX") == "1" or "CLAUDE_CODE_BUBBLEWRAP" in os.environ
    if name == "claude" and os.geteuid() == 0 and not sandbox:
        remedy = "run as another user or, in a container, export IS_SANDBOX=1"
        raise UserError(f"claude does not skip permissions as root: {remedy}", 2)
    if name == "codex":  # its check knows neither an API key nor a provider of the user's own
        config = Path(os.environ.get("CODEX_HOME", Path.home() / ".codex"), "config.toml")
        provider = r"(?m)^\s*(model_provider|openai_base_url|profile|oss_provider)\s*="
        own = config.is_file() and re.search(provider, config.read_text())
        if own or {"CODEX_API_KEY", "CODEX_ACCESS_TOKEN"} & set(os.environ):
            return agent
    if not agent.check:
        return agent
    with contextlib.suppress(subprocess.TimeoutExpired):  # in doubt it passes
        command = [agent.command[0], *agent.check.split()]
        check = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
        if re.search(agent.refused, f"{check.stdout!r}{check.stderr!r}exit code {check.returncode}"):
            raise UserError(f"{name} is not logged in: {agent.login}", 2)
    return agent
