"""The coding agents' CLIs and their worktrees: a prompt in, a proposal (or why none) and its cost out.

A new agent is one more row of AGENTS; without a row, `loop.py --agent-cmd "COMMAND"` takes any command. The prompt
comes on standard input, or as {prompt_file} in the command; JSON that a CLI leaves in the folder {answer} is read like
what it prints. Command lines, checks and JSON as measured in November 2026 with claude 2.1, codex 0.171, opencode 1.18,
vibe 3.0, gemini 0.61, pi 1.6, copilot 1.0, qwen 0.24, droid 0.215, kilo 7.7, kimi 2.1 and cline 3.0.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.console import UserError, one_line
from harness.edit import describe_edit
from harness.files import open_regular, open_to_append, read_end, read_head, read_text, remove_folder, write_atomically
from harness.knob_search import NOTHING_TO_TURN
from harness.processes import Ending, run_child
from harness.tag import Tag

CHECK_SECONDS = 20  # that the check of the log-in may take
QUIET_LIMIT = 600  # seconds without output after which a CLI that streams its work is ended
DESCRIPTION_FILE = "experiment.txt"  # one line by the agent
MAX_EDIT_BYTES = 4 * 2**20
MAX_LOG_BYTES = 16 * 2**20  # that are read of an agent's log; what is kept of its output is less
REASON_CHARS = 250  # of what a CLI said when it failed
RUNS_COPIED = 100  # newest runs that an agent finds in its worktree
RUN_FILES = ("run.log", "change.diff", "result.json")
RUN_FILE_BYTES = 64 * 2**10  # of each, its end
FIRST_REST = 5  # seconds to wait after a call that gave no proposal; doubles
LAST_REST = 600  # seconds, the longest wait
FIRST_REST_OF_LIMIT = 60  # seconds, after a rate limit
LAST_REST_OF_LIMIT = 1800

# ---------------------------------------------------------------------------------------------------------------------
# The CLIs


@dataclass(frozen=True)
class Agent:
    command: str  # its words, as in a shell
    install: str = ""  # the remedy where it is missing
    streams: bool = False  # it prints while it works: a long silence is a hang
    reports_usd: bool = False  # it can tell what a call cost; of an unknown command nobody knows
    has_model: bool = True  # False: a call costs nothing
    check: str = ""  # arguments of a quick command that tells, without network, whether it is logged in
    refused: str = ""  # the pattern in the check's output that says no; anything else passes
    login: str = ""  # the remedy where it is not logged in
    package: str = ""  # that it needs, of the extra of its name


NPM = "npm install -g"
CLAUDE = "claude -p --dangerously-skip-permissions --output-format stream-json --verbose"
# Without a login shell its tools have the loop's PATH: as root /etc/profile sets another, and `uv` is not in it.
CODEX = "codex exec --dangerously-bypass-approvals-and-sandbox --disable hooks -c allow_login_shell=false --json -"
GEMINI = 'gemini -p "" --approval-mode yolo --skip-trust --output-format stream-json'
COPILOT = "copilot --allow-all --no-ask-user --no-color --output-format json --usage-output-file {answer}/usage.json"
READ = "'Read {prompt_file} and do what it says.'"
RANDOM = shlex.join([sys.executable, "-P", str(Path(__file__).with_name("knob_search.py"))])
TPE = shlex.join([sys.executable, "-P", str(Path(__file__).with_name("tpe.py")), "{tag}", "{direction}"])

AGENTS = {
    "claude": Agent(
        f"{CLAUDE} --disallowedTools ScheduleWakeup",  # it would wait for minutes
        f"{NPM} @anthropic-ai/claude-code",
        streams=True,
        reports_usd=True,
        check="auth status",
        refused=r'"loggedIn": *false',
        login="claude auth login, or export ANTHROPIC_API_KEY",
    ),
    "codex": Agent(
        CODEX,
        f"{NPM} @openai/codex",
        streams=True,
        check="login status",
        refused="Not logged in",
        login="codex login, or export CODEX_API_KEY",
    ),
    "vibe": Agent(
        "vibe --auto-approve -p --output-dir {answer}",
        "uv tool install mistral-vibe",
        reports_usd=True,
        check="--auto-approve -p x --resume no-such-session",
        refused="Missing .*environment variable",
        login="vibe --setup, or export MISTRAL_API_KEY",
    ),
    "gemini": Agent(
        GEMINI,
        f"{NPM} @google/gemini-cli",
        streams=True,
        check="--list-sessions",
        refused="exit code 41",
        login="export GEMINI_API_KEY (log-ins of consumers ended in June 2026)",
    ),
    "opencode": Agent("opencode run --auto --format json", f"{NPM} opencode-ai", True, True),
    "kilo": Agent("kilo run --auto --format json", f"{NPM} @kilocode/cli", True, True),
    "pi": Agent("pi -p --no-session --mode json", f"{NPM} @earendil-works/pi-coding-agent", True, True),
    "copilot": Agent(COPILOT, f"{NPM} @github/copilot", True),
    "qwen": Agent("qwen --yolo --output-format stream-json", f"{NPM} @qwen-code/qwen-code", True),
    "droid": Agent("droid exec --skip-permissions-unsafe -o stream-json", f"{NPM} droid", True),
    "kimi": Agent(f"kimi --output-format stream-json -p {READ}", f"{NPM} @moonshot-ai/kimi-code", True),
    "cline": Agent(f"cline --json --auto-approve true {READ}", f"{NPM} cline", True),
    "random": Agent(RANDOM, has_model=False),
    "tpe": Agent(TPE, has_model=False, package="optuna"),
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
    if not _is_installed(agent):
        remedy = agent.install
        if agent.package:
            remedy = f"'uv run --extra {name} loop.py {shlex.join(sys.argv[1:])}'"
        raise UserError(f"{name} is not installed: {remedy} (installed here: {_installed()})", 2)
    # What claude itself asks before it lets root skip permissions.
    is_sandbox = os.environ.get("IS_SANDBOX") == "1" or "CLAUDE_CODE_BUBBLEWRAP" in os.environ
    if name == "claude" and os.geteuid() == 0 and not is_sandbox:
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
    return Agent(command)


def _is_installed(agent: Agent) -> bool:
    has_package = not agent.package or importlib.util.find_spec(agent.package) is not None
    return has_package and shutil.which(shlex.split(agent.command)[0]) is not None


def _installed() -> str:
    return ", ".join(name for name, agent in AGENTS.items() if _is_installed(agent))


def _codex_has_own_access() -> bool:
    if "CODEX_API_KEY" in os.environ or "CODEX_ACCESS_TOKEN" in os.environ:
        return True
    home = Path(os.environ.get("CODEX_HOME", Path.home() / ".codex"))
    provider = r"^\s*(model_provider|openai_base_url|profile|oss_provider)\s*="
    return re.search(provider, read_text(home / "config.toml"), re.MULTILINE) is not None


def _is_refused(agent: Agent) -> bool:
    """Whether the CLI says that nobody is logged in. In doubt it passes: a night's back-off is no great loss."""
    command = [shlex.split(agent.command)[0], *agent.check.split()]
    with contextlib.suppress(subprocess.TimeoutExpired):
        check = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_SECONDS)
        said = f"{check.stdout!r}{check.stderr!r}exit code {check.returncode}"
        return re.search(agent.refused, said) is not None
    return False


# What tells a CLI that another one of its kind started it.
NESTED = {
    "CLAUDECODE", "CLAUDE_CODE_ENTRYPOINT", "CLAUDE_CODE_CHILD_SESSION", "CLAUDE_CODE_SESSION_ID",
    "CLAUDE_CODE_MESSAGING_SOCKET", "CLAUDE_CODE_MESSAGING_TOKEN", "CLAUDE_CODE_CHILD_NOTES_DIR",
}  # fmt: skip
# A person's hooks, formatters and memories would take part in every proposal. Who wants theirs exports another value.
CLEAN = {"CLAUDE_CODE_SAFE_MODE": "1", "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1"}


def agent_environment(variables: dict[str, str]) -> dict[str, str]:
    """A person's environment, made fit for a CLI that starts clean."""
    kept = CLEAN | {name: value for name, value in variables.items() if name not in NESTED}
    for name in ("OPENCODE_CONFIG_CONTENT", "KILO_CONFIG_CONTENT"):
        with contextlib.suppress(ValueError, TypeError):
            kept[name] = json.dumps({"formatter": False} | json.loads(kept.get(name, "{}")))
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# What a CLI says in JSON: what it did, in plain words, why it failed, and what that cost
#
# CLIs print JSON objects, one a line, each with shapes of its own. They are told apart by what stands in them, so the
# same output of any other command is understood too. Whatever is not reported, or cannot be true, is unknown, never 0.

MOST_TOKENS = 10**10  # of one call: more is no count of tokens
MOST_USD = 10_000  # of one call: more is no price


@dataclass(frozen=True)
class Cost:
    """What calls of an agent used; None where that is unknown."""

    calls: int = 0
    tokens_in: int | None = 0  # those read from a cache included
    tokens_out: int | None = 0  # those of its thinking included
    usd: float | None = 0.0  # as the CLI reckons: the list price, also under a subscription

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*[_sum(pair) for pair in pairs])

    def as_dict(self) -> dict[str, float | None]:
        """{} where nothing was called that costs anything."""
        return dataclasses.asdict(self) if self.calls else {}

    def __str__(self) -> str:
        dollars = "cost unknown" if self.usd is None else f"${self.usd:.4f}"
        if self.tokens_in is None or self.tokens_out is None:
            return f"{dollars}, tokens unknown"
        return f"{dollars}, {self.tokens_in:,} tokens in, {self.tokens_out:,} out"


UNKNOWN = Cost(1, None, None, None)


@dataclass(frozen=True)
class Answer:
    """What a CLI said."""

    words: tuple[str, ...] = ()  # what it did and said, in order; empty where it printed no JSON that is known
    error: str = ""  # its last words, where they tell a failure
    cost: Cost = UNKNOWN


def read_answer(output: str) -> Answer:
    """What a CLI printed, understood as far as it is JSON."""
    words: list[str] = []
    errors: list[str] = []  # since it last said something else
    events = list(_find_objects(output))
    for event in events:
        text, is_error = _words_of(event)
        if not text:
            continue
        if text not in words[-1:]:  # an event often comes twice, begun and done
            words.append(text)
        if not is_error:
            errors = []
        elif text not in errors:
            errors.append(text)
    return Answer(tuple(words), "; ".join(errors[-2:]), _cost_of(events))


def _find_objects(output: str) -> Iterable[dict]:
    """The JSON objects among the lines; warnings, torn lines and the like are left out."""
    for line in output.splitlines():
        if not line.startswith(("{", "[")):
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict):
                yield entry


def _at(value: object, *keys: str | int) -> object:
    """What stands under these keys, one in another; None where there is nothing."""
    for key in keys:
        try:
            value = value[key]
        except (TypeError, KeyError, IndexError):
            return None
    return value


# Where CLIs put their words, and an error's first.
ERRORS = (
    ("errors", -1, "message"), ("errors", -1), ("error", "data", "message"), ("error", "message"), ("error", "name"),
    ("error",), ("errorMessage",), ("message", "errorMessage"),
)  # fmt: skip
WORDS = (
    ("result",), ("item", "text"), ("item", "message"), ("item", "command"), ("part", "text"),
    ("part", "state", "title"), ("message", "content", -1, "text"), ("data", "content"), ("data", "message"),
    ("message",), ("text",),
)  # fmt: skip
CODES = (("error", "data", "statusCode"), ("api_error_status",), ("data", "statusCode"), ("error", "code"))


def _words_of(event: dict) -> tuple[str, bool]:
    """One object in plain words, "" where it says nothing to a person; and whether it tells a failure."""
    kind = str(event.get("type"))
    role = _at(event, "message", "role") or event.get("role")
    if role not in (None, "assistant") or kind.startswith(("user", "system")):  # the prompt, and what tools gave
        return "", False
    text = _first_text(event, ERRORS)
    is_error = bool(text) or event.get("is_error") is True or kind.endswith(("error", "failed"))
    text = text or _first_text(event, WORDS)
    if is_error and not text:
        text = str(event.get("subtype") or kind)
    denials = event.get("permission_denials")
    if isinstance(denials, list) and denials and not is_error:
        tools = ", ".join(sorted({str(_at(denial, "tool_name")) for denial in denials}))
        return f"it was not allowed to use {tools}: {text}", True
    codes = [str(code) for code in (_at(event, *place) for place in CODES) if isinstance(code, int)]
    if is_error and codes and codes[0] not in text:
        text = f"{codes[0]}: {text}"
    return text.strip(), is_error


def _first_text(event: dict, places: Iterable[tuple]) -> str:
    for place in places:
        text = _at(event, *place)
        if isinstance(text, str) and text.strip():
            return text.strip()
    return ""


def _cost_of(events: list[dict]) -> Cost:
    """The cost of a whole call: what the last object says that counts all of it, else the sum of its steps."""
    whole: list[tuple[object, object]] = []  # (counts of tokens, dollars)
    steps: list[tuple[object, object]] = []
    for event in events:
        kind = event.get("type")
        models = event.get("modelUsage") or event.get("modelMetrics")
        if isinstance(models, dict):  # claude, copilot: every model that was called, subagents' too
            usages = [_at(model, "usage") or model for model in models.values()]
            dollars = _number(event.get("total_cost_usd"), MOST_USD)
            whole = [(usage, dollars if place == 0 else 0.0) for place, usage in enumerate(usages)]
        elif kind in ("result", "turn.completed", "completion") or "cost_usd" in event:  # claude, codex, vibe, others
            dollars = event.get("total_cost_usd", event.get("cost_usd"))
            whole = [(event.get("usage") or event.get("stats"), dollars)]
        elif kind == "step_finish":  # opencode, kilo
            steps.append((_at(event, "part", "tokens"), _at(event, "part", "cost")))
        elif kind == "message_end" and _at(event, "message", "role") == "assistant":  # pi
            usage = _at(event, "message", "usage")
            steps.append((usage, _at(usage, "cost", "total")))
    bills = whole or steps
    if not bills:
        return UNKNOWN
    counts = [_tokens(usage) for usage, _ in bills]
    tokens_in = _sum(count[0] for count in counts)
    tokens_out = _sum(count[1] for count in counts)
    usd = _sum(_number(dollars, MOST_USD) for _, dollars in bills)
    has_used_nothing = tokens_in == 0 and tokens_out == 0
    if usd == 0 and not has_used_nothing:  # a model whose price the CLI does not know
        usd = None
    return Cost(1, tokens_in, tokens_out, usd)


TOKENS_IN = ("input_tokens", "inputTokens", "input")
TOKENS_OUT = ("output_tokens", "outputTokens", "output")
TOKENS_OF_CACHE = (  # beside those: what OpenAI's shape calls cached_input_tokens is a part of them
    "cache_read_input_tokens", "cache_creation_input_tokens", "cacheReadInputTokens", "cacheCreationInputTokens",
    "cacheRead", "cacheWrite",
)  # fmt: skip


def _tokens(usage: object) -> tuple[int | None, int | None]:
    """Tokens in and out of one CLI's counts; None where one is missing or is no count."""
    if not isinstance(usage, dict):
        return None, None
    is_opencode = isinstance(usage.get("cache"), dict)
    if is_opencode:
        usage = usage | {"cacheRead": usage["cache"].get("read"), "cacheWrite": usage["cache"].get("write")}
    first_in = [_count(usage[key]) for key in TOKENS_IN if key in usage][:1]
    caches = [_count(usage[key]) for key in TOKENS_OF_CACHE if key in usage]
    outs = [_count(usage[key]) for key in TOKENS_OUT if key in usage][:1]
    if is_opencode:
        outs.append(_count(usage.get("reasoning")))
    total = usage.get("total_tokens")
    if None not in first_in + outs and total == sum(first_in + outs):
        caches = []  # counted already
    return _sum(first_in + caches) if first_in else None, _sum(outs) if outs else None


def _count(value: object) -> int | None:
    return _number(value, MOST_TOKENS) if isinstance(value, int) else None


def _number(value: object, most: float) -> float | None:
    """The value, if it is a number from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and 0 <= value <= most else None


def _sum(values: Iterable[float | None]) -> float | None:
    """None if one of them is unknown."""
    values = list(values)
    return None if None in values else sum(values)


# ---------------------------------------------------------------------------------------------------------------------
# Proposals


@dataclass(frozen=True)
class Proposal:
    """An edit that an agent made."""

    source: bytes  # the editable file as the agent left it
    description: str
    cost: Cost
    touched: tuple[str, ...] = ()  # other tracked files that it changed: they do not count


@dataclass(frozen=True)
class NoProposal:
    """Why an agent gave none."""

    reason: str
    kind: str  # unchanged; refused edit (the next prompt says why); failed; rate limit; refused (log-in, credit, model)
    cost: Cost = Cost()


NO_MONEY = r"insufficient.?(quota|credit|balance|fund)|credit balance|out of credit|billing|payment|\b402\b"
RATE_LIMIT = r"\b429\b|rate.?limit|too many requests|(usage|session|weekly) limit|hit your .{0,30}limit|quota"
REFUSED = (
    r"\b40[134]\b|unauthori[sz]ed|forbidden|authenticat|api.?key|credentials|log(ged)?.?in\b"
    r"|model.{0,60}(not found|not exist|not available|not supported|no access)|unknown model"
)


def _kind_of_failure(said: str) -> str:
    for kind, pattern in (("refused", NO_MONEY), ("rate limit", RATE_LIMIT), ("refused", REFUSED)):
        if re.search(pattern, said, re.IGNORECASE):
            return kind
    return "failed"


class Worktree:
    """One agent's own checkout. It holds the champion's files, results.tsv, and copies of the newest runs.

    An agent may leave anything behind. Its exit code is not trusted: if the file has changed, there is a proposal.
    """

    def __init__(self, tag: Tag, folder: Path, mark: str):
        self.folder = folder
        self.notes = folder.with_name(f"{folder.name}.agent")  # the prompt, and what the CLI said
        self.log = self.notes / "agent.log"
        self._tag = tag
        self._repository = tag.repository
        self._mark = mark
        self._copied: dict[str, list[int]] = {}  # run -> times of its files

    def propose(
        self,
        agent: Agent,
        champion: str,
        start: bytes,
        prompt: str,
        env: dict[str, str],
        limit: float,
        stop: threading.Event,
    ) -> Proposal | NoProposal:
        """Run the agent once, headless, on `start` in the champion's tree. Takes minutes."""
        self.notes.mkdir(parents=True, exist_ok=True)
        self._lay_out(champion, start)
        # Some CLIs read nothing outside of their folder; in it, the prompt would be found by every search.
        takes_file = "{prompt_file}" in agent.command
        prompt_file = (self.folder if takes_file else self.notes) / "prompt.md"
        answers = self.notes / "answer"
        remove_folder(answers)
        answers.mkdir()
        write_atomically(prompt_file, prompt)
        words = shlex.split(agent.command)
        places = {"{prompt_file}": str(prompt_file), "{answer}": str(answers)}
        places |= {"{tag}": self._tag.name, "{direction}": self._tag.domain.direction}
        for place, value in places.items():
            words = [word.replace(place, value) for word in words]
        try:
            ending = run_child(
                words,
                cwd=self.folder,
                env=agent_environment(env),
                mark=self._mark,
                log=self.log,
                limit=limit,
                stop=stop,
                stdin=os.devnull if takes_file else prompt_file,
                quiet_limit=QUIET_LIMIT if agent.streams else None,
            )
        except OSError as error:  # while it updates itself, say
            return NoProposal(f"the agent does not start: {error}", "failed")
        answer = self._read_answer(answers)
        answer = answer if agent.has_model else dataclasses.replace(answer, cost=Cost())
        return self._look(agent, champion, start, ending, answer)

    # Before

    def _lay_out(self, champion: str, start: bytes) -> None:
        """Make the worktree anew, whatever the last proposal left in it; what takes time to make is carried over."""
        with tempfile.TemporaryDirectory(dir=self.notes) as aside:
            for name in (".venv", "runs"):  # `uv run` makes the first
                with contextlib.suppress(OSError):
                    os.rename(self.folder / name, Path(aside, name))
            self._repository.add_worktree(self.folder, champion)
            for name in os.listdir(aside):
                os.rename(Path(aside, name), self.folder / name)
        write_atomically(self.folder / self._repository.editable, start)
        write_atomically(self.folder / "results.tsv", read_text(self._tag.home / "results.tsv"))
        self._copy_runs()

    def _copy_runs(self) -> None:
        """The newest runs in `runs/`, so that an agent need not leave its folder; only new ones are copied."""
        target = self.folder / "runs"
        if target.is_symlink() or not target.is_dir():
            with contextlib.suppress(FileNotFoundError):
                target.unlink()
            target.mkdir()
        names = [path.name for path in self._tag.runs.glob("[0-9]*")]
        newest = sorted(filter(str.isdigit, names), key=int)[-RUNS_COPIED:]
        for path in target.iterdir():
            if path.name not in newest:
                remove_folder(path)
        for name in newest:
            files = [path for path in (self._tag.runs / name / file for file in RUN_FILES) if path.is_file()]
            times = [path.stat().st_mtime_ns for path in files]
            if self._copied.get(name) == times and (target / name).is_dir():
                continue
            remove_folder(target / name)
            (target / name).mkdir()
            for path in files:
                (target / name / path.name).write_text(read_end(path, RUN_FILE_BYTES))
            self._copied[name] = times

    # After

    def _read_answer(self, answers: Path) -> Answer:
        """What the agent said. Where that is JSON, it stands at the end of its log in plain words too."""
        said = read_head(self.log, MAX_LOG_BYTES)
        for path in sorted(answers.glob("*.json")):
            with contextlib.suppress(ValueError, RecursionError):
                said += "\n" + json.dumps(json.loads(read_head(path, MAX_LOG_BYTES)))
        answer = read_answer(said)
        if answer.words:
            words = "\n".join(answer.words)
            with contextlib.suppress(OSError), open_to_append(self.log) as file:
                file.write(f"\n--- In plain words ({answer.cost}):\n\n{words}\n")
        return answer

    def _look(self, agent: Agent, champion: str, start: bytes, ending: Ending, answer: Answer) -> Proposal | NoProposal:
        """What the agent made of the editable file."""
        name = self._repository.editable
        if ending.problem == "stopped":
            return NoProposal("the loop stopped the agent", "failed", answer.cost)
        try:
            with open_regular(self.folder / name) as file:
                source = file.read(MAX_EDIT_BYTES + 1)
        except OSError:
            return NoProposal(f"{name} is not a regular file", "refused edit", answer.cost)
        if len(source) > MAX_EDIT_BYTES:
            return NoProposal(f"{name} is over {MAX_EDIT_BYTES // 2**20} MiB", "refused edit", answer.cost)
        if source != start:
            description = one_line(read_head(self.folder / DESCRIPTION_FILE, 2000))
            description = description or describe_edit(start, source, name)
            return Proposal(source, description, answer.cost, self._touched(champion))
        if not ending.problem and not answer.error:
            return NoProposal(f"the agent left {name} as it was", "unchanged", answer.cost)
        said = one_line(answer.error or (answer.words[-1] if answer.words else _last_words(self.log)), REASON_CHARS)
        how = f"ended with {ending.problem}" if ending.problem else "failed"
        reason = f"the agent {how}: {said}".rstrip(": ")
        kind = "failed"
        if answer.error or not answer.words:
            kind = _kind_of_failure(said)
        if not agent.has_model and ending.problem == f"exit code {NOTHING_TO_TURN}":
            kind = "refused"
        return NoProposal(reason, kind, answer.cost)

    def _touched(self, champion: str) -> tuple[str, ...]:
        changed: list[str] = []
        if (self.folder / ".git").is_file():  # else git would look at the person's checkout
            with contextlib.suppress(UserError):  # the agent broke it
                changed = self._repository.changed_files(self.folder, champion)
        return tuple(file for file in changed if file != self._repository.editable)


def _last_words(log: Path) -> str:
    """The last lines of plain text that say something: `}` and `[object Object]` do not."""
    lines = [one_line(line, REASON_CHARS) for line in read_end(log, 4000).splitlines()]
    lines = [line for line in lines if re.search(r"[^\W\d_]{3}", line) and line != "[object Object]"]
    said = lines[-1] if lines else ""
    for line in lines[-2::-1]:
        if len(line) + len(said) >= REASON_CHARS:
            break
        said = f"{line} {said}"
    return said


class BackOff:
    """How long one worker rests after calls that gave no proposal: twice as long for every one in a row."""

    def __init__(self):
        self.failures = 0  # in a row

    def after(self, answer: NoProposal) -> float:
        """Seconds to rest. After a rate limit all workers should."""
        is_limit = answer.kind == "rate limit"
        first, last = (FIRST_REST_OF_LIMIT, LAST_REST_OF_LIMIT) if is_limit else (FIRST_REST, LAST_REST)
        delay = min(last, first * 2 ** min(self.failures, 20))
        self.failures += 1
        return delay

    def succeeded(self) -> None:
        self.failures = 0
