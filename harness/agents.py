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

CHECK_SECONDS = 20  # that the check of the log-in may take


@dataclass(frozen=True)
class Agent:
    command: list[str]
    install: str = ""  # the remedy where it is missing
    check: str = ""  # arguments of a quick command that tells, without network, whether it is logged in
    refused: str = ""  # the pattern in the check's output that says no; anything else passes
    login: str = ""  # the remedy where it is not logged in
    reports_usd: bool = False  # it can tell what a call cost (see costs.py); of an unknown command nobody knows


AGENTS = {
    "claude": Agent(
        command=["claude", "-p", "--dangerously-skip-permissions", "--output-format", "json"],
        install="npm install -g @anthropic-ai/claude-code",
        check="auth status",
        refused=r'"loggedIn": *false',
        login="claude auth login, or export ANTHROPIC_API_KEY",
        reports_usd=True,
    ),
    "codex": Agent(
        command=["codex", "exec", "--dangerously-bypass-approvals-and-sandbox", "--json", "-"],
        install="npm install -g @openai/codex",
        check="login status",
        refused="Not logged in",
        login="codex login, or export CODEX_API_KEY",
    ),
    "vibe": Agent(
        command=["vibe", "--auto-approve", "-p"],
        install="uv tool install mistral-vibe",
        check="--auto-approve -p x --resume no-such-session",
        refused="Missing .*environment variable",
        login="vibe --setup, or export MISTRAL_API_KEY",
    ),
    "gemini": Agent(
        command=["gemini", "-p", "", "--approval-mode", "yolo", "--skip-trust"],
        install="npm install -g @google/gemini-cli",
        check="--list-sessions",
        refused="exit code 41",
        login="gemini, or export GEMINI_API_KEY",
    ),
    "opencode": Agent(
        command=["opencode", "run", "--auto", "--format", "json"],
        install="npm install -g opencode-ai",
        reports_usd=True,
    ),
    "random": Agent(command=[sys.executable, "-P", str(Path(__file__).with_name("random_search.py"))]),
}


def choose_agent(name: str | None, command: str | None) -> Agent:
    """The agent to use. Raises UserError, with the remedy, if it is missing, not allowed here or not logged in."""
    if command is not None:
        return _agent_of_command(command)
    if name not in AGENTS:
        asked = f"unknown agent {name!r}" if name else "no agent given"
        remedy = f'use --agent NAME (installed here: {_installed()}) or --agent-cmd "COMMAND"'
        raise UserError(f"{asked}: {remedy}", 2)
    agent = AGENTS[name]
    if not shutil.which(agent.command[0]):
        raise UserError(f"{name} is not installed: {agent.install} (installed here: {_installed()})", 2)
    if name == "claude" and os.geteuid() == 0 and not _is_sandbox():
        remedy = "run as another user or, in a container, export IS_SANDBOX=1"
        raise UserError(f"claude does not skip permissions as root: {remedy}", 2)
    # The check of codex knows neither an API key nor a provider of the user's own.
    needs_no_login = name == "codex" and _codex_has_own_access()
    if agent.check and not needs_no_login and _is_refused(agent):
        raise UserError(f"{name} is not logged in: {agent.login}", 2)
    return agent


def _agent_of_command(command: str) -> Agent:
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote
        words = []
    if not words or not shutil.which(words[0]):
        raise UserError(f"--agent-cmd {command!r} starts no program that is installed: give its path", 2)
    return Agent(words)


def _installed() -> str:
    return ", ".join(name for name, agent in AGENTS.items() if shutil.which(agent.command[0]))


def _is_sandbox() -> bool:
    """What claude itself asks before it lets root skip permissions."""
    return os.environ.get("IS_SANDBOX") == "1" or "CLAUDE_CODE_BUBBLEWRAP" in os.environ


def _codex_has_own_access() -> bool:
    if "CODEX_API_KEY" in os.environ or "CODEX_ACCESS_TOKEN" in os.environ:
        return True
    home = Path(os.environ.get("CODEX_HOME", Path.home() / ".codex"))
    config = home / "config.toml"
    if not config.is_file():
        return False
    provider = r"^\s*(model_provider|openai_base_url|profile|oss_provider)\s*="
    return re.search(provider, config.read_text(errors="replace"), re.MULTILINE) is not None


def _is_refused(agent: Agent) -> bool:
    """Whether the CLI says that nobody is logged in. In doubt it passes: a night's back-off is no great loss."""
    command = [agent.command[0], *agent.check.split()]
    with contextlib.suppress(subprocess.TimeoutExpired):
        check = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_SECONDS)
        said = f"{check.stdout!r}{check.stderr!r}exit code {check.returncode}"
        return re.search(agent.refused, said) is not None
    return False
