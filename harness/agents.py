"""The coding agents' CLIs and their worktrees: a prompt in, a proposal (or why none) and its cost out. It judges none.

A new agent is one more row of AGENTS; without a row, `loop.py --agent-cmd "COMMAND"` takes any command. The prompt
comes on standard input, or as {prompt_file} in the command; JSON that a CLI leaves in the folder {answer} is read like
what it prints. Command lines, checks and JSON as measured in November 2026 with claude 2.1, codex 0.171, opencode 1.18,
vibe 3.0, gemini 0.61, pi 1.6, copilot 1.0, qwen 0.24, droid 0.215, kilo 7.7, kimi 2.1 and cline 3.0.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.console import UserError, one_line
from harness.edit import Edit, describe_edit
from harness.files import open_regular, read_text, remove_folder, write_atomically
from harness.knob_search import NOTHING_TO_TURN
from harness.processes import LOG_LIMIT, Ending, run_child
from harness.tag import Tag

CHECK_SECONDS = 20  # that the check of the log-in may take
QUIET_LIMIT = 600  # seconds without output after which a CLI that streams its work is ended
DESCRIPTION_FILE = "experiment.txt"  # one line by the agent
MAX_EDIT_BYTES = 4 * 2**20
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
    package: str = ""  # that it needs, of the extra of its name


NPM = "npm install -g"
CLAUDE = "claude -p --dangerously-skip-permissions --output-format stream-json --verbose"
# Without a login shell its tools have the loop's PATH: as root /etc/profile sets another, and `uv` is not in it.
CODEX = "codex exec --dangerously-bypass-approvals-and-sandbox --disable hooks -c allow_login_shell=false --json -"
GEMINI = 'gemini -p "" --approval-mode yolo --skip-trust --output-format stream-json'
COPILOT = "copilot --allow-all --no-ask-user --no-color --output-format json --usage-output-file {answer}/usage.json"
READ = "'Read {prompt_file} and do what it says.'"
SEARCH = shlex.join([sys.executable, "-P", str(Path(__file__).with_name("knob_search.py"))])

AGENTS = {
    # It would wait for minutes for what it scheduled.
    "claude": Agent(f"{CLAUDE} --disallowedTools ScheduleWakeup", f"{NPM} @anthropic-ai/claude-code", True, True),
    "codex": Agent(CODEX, f"{NPM} @openai/codex", streams=True),
    "vibe": Agent(
        "vibe --auto-approve -p --output-dir {answer}", "uv tool install mistral-vibe", streams=False, reports_usd=True
    ),
    "gemini": Agent(GEMINI, f"{NPM} @google/gemini-cli", streams=True),
    "opencode": Agent("opencode run --auto --format json", f"{NPM} opencode-ai", True, True),
    "kilo": Agent("kilo run --auto --format json", f"{NPM} @kilocode/cli", True, True),
    "pi": Agent("pi -p --no-session --mode json", f"{NPM} @earendil-works/pi-coding-agent", True, True),
    "copilot": Agent(COPILOT, f"{NPM} @github/copilot", True),
    "qwen": Agent("qwen --yolo --output-format stream-json", f"{NPM} @qwen-code/qwen-code", True),
    "droid": Agent("droid exec --skip-permissions-unsafe -o stream-json", f"{NPM} droid", True),
    "kimi": Agent(f"kimi --output-format stream-json -p {READ}", f"{NPM} @moonshot-ai/kimi-code", True),
    "cline": Agent(f"cline --json --auto-approve true {READ}", f"{NPM} cline", True),
    "random": Agent(f"{SEARCH} random {{editable}} {{tag}} {{direction}}", has_model=False),
    "tpe": Agent(f"{SEARCH} tpe {{editable}} {{tag}} {{direction}}", has_model=False, package="optuna"),
}

LOG_INS = {  # name: a quick command without network, the pattern in what it says that means no, and the remedy
    "claude": ("claude auth status", r'"loggedIn": *false', "claude auth login, or export ANTHROPIC_API_KEY"),
    "codex": ("codex login status", "Not logged in", "codex login, or export CODEX_API_KEY"),
    "vibe": (
        "vibe --auto-approve -p x --resume no-such-session",
        "Missing .*environment variable",
        "vibe --setup, or export MISTRAL_API_KEY",
    ),
    "gemini": (
        "gemini --list-sessions",
        "exit code 41",
        "export GEMINI_API_KEY (log-ins of consumers ended in June 2026)",
    ),
}


def choose_agent(name: str | None, command: str | None) -> Agent:
    """The agent to use. Raises UserError, with the remedy, if it is missing, not allowed here or not logged in."""
    if command is not None:
        return _agent_of_command(command)
    installed = ", ".join(name for name, agent in AGENTS.items() if _is_installed(agent))
    if name not in AGENTS:
        asked = f"unknown agent {name!r}" if name else "no agent given"
        remedy = f'use --agent NAME (installed here: {installed}) or --agent-cmd "COMMAND"'
        raise UserError(f"{asked}: {remedy}", 2)
    agent = AGENTS[name]
    if not _is_installed(agent):
        remedy = agent.install
        if agent.package:
            remedy = with_extra(name)
        raise UserError(f"{name} is not installed: {remedy} (installed here: {installed})", 2)
    # What claude itself asks before it lets root skip permissions.
    is_sandbox = os.environ.get("IS_SANDBOX") == "1" or "CLAUDE_CODE_BUBBLEWRAP" in os.environ
    if name == "claude" and os.geteuid() == 0 and not is_sandbox:
        remedy = "run as another user or, in a container, export IS_SANDBOX=1"
        raise UserError(f"claude does not skip permissions as root: {remedy}", 2)
    _check_log_in(name)
    return agent


def with_extra(name: str) -> str:
    """The command line of now, with an optional extra installed."""
    return f"'uv run --extra {name} loop.py {shlex.join(sys.argv[1:])}'"


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


def _check_log_in(name: str) -> None:
    """Raises UserError where the CLI says that nobody is logged in. In doubt all is well: the first call will tell."""
    if name not in LOG_INS or (name == "codex" and _codex_has_own_access()):
        return
    command, refusal, remedy = LOG_INS[name]
    try:
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": CHECK_SECONDS}
        check = subprocess.run(shlex.split(command), **options)
    except subprocess.TimeoutExpired:
        return
    if re.search(refusal, f"{check.stdout!r}{check.stderr!r}exit code {check.returncode}"):
        raise UserError(f"{name} is not logged in: {remedy}", 2)


def _codex_has_own_access() -> bool:
    """An API key, or a provider of the user's own: its check knows neither."""
    config = Path(os.environ.get("CODEX_HOME", Path.home() / ".codex"), "config.toml")
    has_key = "CODEX_API_KEY" in os.environ or "CODEX_ACCESS_TOKEN" in os.environ
    return has_key or re.search("provider|base_url", read_text(config.resolve())) is not None


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
# What a CLI says in JSON: its last words, why it failed, and what that cost
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


UNKNOWN = Cost(1, None, None, None)


@dataclass(frozen=True)
class Answer:
    """What a CLI said."""

    said: str = ""  # its last words; "" where it printed no JSON that is known
    is_error: bool = False  # they tell a failure
    cost: Cost = UNKNOWN


def read_answer(output: str) -> Answer:
    """What a CLI printed, understood as far as it is JSON."""
    try:
        events = list(_find_objects(output))
        cost = _cost_of(events)
        words = (_words_of(event) for event in reversed(events))
        text, is_error = next((found for found in words if found[0]), ("", False))
        return Answer(text, is_error, cost)
    except RecursionError:  # lists in one another, a thousand deep
        return Answer()


def _find_objects(output: str) -> Iterator[dict]:
    """The JSON objects among the lines; warnings, torn lines and the like are left out."""
    for line in output.splitlines():
        if line.startswith(("{", "[")):
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                entries = value if isinstance(value, list) else [value]
                yield from (entry for entry in entries if isinstance(entry, dict))


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Whatever is neither object nor list in a JSON value, with the name under which it stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, name)
    else:
        yield name, value


def _last(value: object, names: Iterable[str], kind: type) -> object:
    """The last leaf of this type under the first of these names that has one; None where none has."""
    found = {name: leaf for name, leaf in _leaves(value) if isinstance(leaf, kind) and leaf}
    return next((found[name] for name in names if name in found), None)


def _at(value: object, *keys: str) -> object:
    """What stands under these keys, one in another; None where there is nothing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


SPEECH = ("result", "item", "part", "message", "data", "text", "content")  # what an event may hold of the model's
WORDS = ("", "text", "message", "content", "title", "command")  # the names of words in there, those of a model first
CODES = ("statusCode", "api_error_status", "code")


def _words_of(event: dict) -> tuple[str, bool]:
    """The last words of one object, "" where it says nothing to a person; and whether they tell a failure."""
    kind = str(event.get("type", ""))
    role = _at(event, "message", "role") or event.get("role")
    if role not in (None, "assistant") or kind.startswith(("user", "system")):  # the prompt, and what tools gave
        return "", False
    error = event.get("errors") or event.get("error") or event.get("errorMessage")
    error = error or _at(event, "message", "errorMessage")
    is_error = bool(error) or event.get("is_error") is True or kind.endswith(("error", "failed"))
    speech = next((event[name] for name in SPEECH if event.get(name)), None)
    text = _last(error, ("", "message"), str) or _last(speech, WORDS, str) or ""
    if is_error:
        text = text or str(event.get("subtype") or kind)
        code = _last(event, CODES, int)
        if code is not None and str(code) not in text:
            text = f"{code}: {text}"
    tools = {str(leaf) for name, leaf in _leaves(event.get("permission_denials")) if name == "tool_name"}
    if tools and not is_error:
        return f"it was not allowed to use {', '.join(sorted(tools))}: {text}", True
    return text.strip(), is_error


USAGE = (  # where counts of tokens stand, those of every model that was called first
    ("modelUsage",), ("modelMetrics",), ("usage",), ("stats",), ("part", "tokens"), ("message", "usage"),
)  # fmt: skip
DOLLARS = (("total_cost_usd",), ("cost_usd",), ("part", "cost"), ("message", "usage", "cost", "total"))
STEPS = ("step_finish", "message_end")  # events that count a part of the call (opencode and kilo, pi)
WHOLE = ("result", "turn.completed", "completion")  # that count all of it, as files in the folder {answer} do
TOKENS_IN = ("input_tokens", "inputTokens", "input")
TOKENS_OUT = ("output_tokens", "outputTokens", "output")
TOKENS_OF_CACHE = (  # beside those: what OpenAI's shape calls cached_input_tokens is a part of them
    "cache_read_input_tokens", "cache_creation_input_tokens", "cacheReadInputTokens", "cacheCreationInputTokens",
    "cacheRead", "cacheWrite", "read", "write",
)  # fmt: skip


def _cost_of(events: list[dict]) -> Cost:
    """The cost of a whole call: what the last object says that counts all of it, else the sum of its steps."""
    whole: list[Cost] = []
    steps: list[Cost] = []
    for event in events:
        usages = [_at(event, *place) for place in USAGE]
        usage = next((usage for usage in usages if isinstance(usage, dict) and usage), None)
        if usage is None:
            continue
        prices = [_at(event, *place) for place in DOLLARS]
        price = next((price for price in prices if price is not None), None)
        cost = Cost(1, *_tokens(usage), _number(price, MOST_USD, int | float))
        if event.get("type") in STEPS:
            steps.append(cost)
        elif event.get("type", WHOLE[0]) in WHOLE:
            whole = [cost]
    bills = whole or steps
    if not bills:
        return UNKNOWN
    total = dataclasses.replace(sum(bills, Cost()), calls=1)
    has_used_nothing = total.tokens_in == 0 and total.tokens_out == 0
    if total.usd == 0 and not has_used_nothing:  # a model whose price the CLI does not know
        return dataclasses.replace(total, usd=None)
    return total


def _tokens(usage: object) -> tuple[int | None, int | None]:
    """Tokens in and out of one CLI's counts, or of the counts of each model; None where one is missing or no count."""
    if not isinstance(usage, dict):
        return None, None
    if not any(name in usage for name in TOKENS_IN):
        models = [_tokens(_at(model, "usage") or model) for model in usage.values()]
        return tuple(_sum(counts) for counts in zip(*models, strict=True)) if models else (None, None)
    if isinstance(usage.get("cache"), dict):  # opencode
        usage = usage | usage["cache"]
    tokens_in = _first_count(usage, TOKENS_IN)
    tokens_out = _sum([_first_count(usage, TOKENS_OUT), _number(usage.get("reasoning", 0), MOST_TOKENS)])
    caches = _sum(_number(usage.get(name, 0), MOST_TOKENS) for name in TOKENS_OF_CACHE)
    if usage.get("total_tokens") == _sum([tokens_in, tokens_out]):
        caches = 0  # counted already
    return _sum([tokens_in, caches]), tokens_out


def _first_count(usage: dict, names: Iterable[str]) -> int | None:
    return next((_number(usage[name], MOST_TOKENS) for name in names if name in usage), None)


def _number(value: object, most: float, kinds=int) -> float | None:
    """The value, if it is a number from 0 to `most`."""
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    return value if is_number and 0 <= value <= most else None


def _sum(values: Iterable[float | None]) -> float | None:
    """None if one of them is unknown."""
    values = list(values)
    return None if None in values else sum(values)


# ---------------------------------------------------------------------------------------------------------------------
# Proposals


@dataclass(frozen=True)
class NoProposal:
    """Why an agent gave none."""

    reason: str
    kind: str  # unchanged, bad edit (the next prompt says why); failed; rate limit; hopeless (log-in, credit, model)


NO_MONEY = r"insufficient.?(quota|credit|balance|fund)|credit balance|out of credit|billing|payment|\b402\b"
RATE_LIMIT = r"\b429\b|rate.?limit|too many requests|(usage|session|weekly) limit|hit your .{0,30}limit|quota"
NO_ACCESS = (
    r"\b40[134]\b|unauthori[sz]ed|forbidden|authenticat|api.?key|credentials|log(ged)?.?in\b"
    r"|model.{0,60}(not found|not exist|not available|not supported|no access)|unknown model"
)


def _kind_of_failure(said: str) -> str:
    for kind, pattern in (("hopeless", NO_MONEY), ("rate limit", RATE_LIMIT), ("hopeless", NO_ACCESS)):
        if re.search(pattern, said, re.IGNORECASE):
            return kind
    return "failed"


class Worktree:
    """One agent's own checkout. It holds the champion's files, results.tsv, and copies of the newest runs.

    An agent may leave anything behind. Its exit code is not trusted: if the file has changed, there is a proposal.
    """

    def __init__(self, tag: Tag, number: int):
        self.folder = tag.worktrees / str(number)
        self.notes = self.folder.with_name(f"{number}.agent")  # the prompt, and what the CLI said
        self.log = self.notes / "agent.log"
        self.cost = Cost()  # of the last call
        self.was_cut_off = False  # before it could tell what it cost
        self._answers = self.notes / "answer"
        self._tag = tag
        self._repository = tag.repository
        self._mark = f"{tag.mark}:agent:{number}"

    def propose(
        self,
        agent: Agent,
        champion: str,
        start: bytes,
        prompt: str,
        env: dict[str, str],
        limit: float,
        stop: threading.Event,
    ) -> Edit | NoProposal:
        """Run the agent once, headless, on `start` in the champion's tree. Takes minutes."""
        self.cost = Cost()
        # Some CLIs read nothing outside of their folder; in it, the prompt would be found by every search.
        takes_file = "{prompt_file}" in agent.command
        prompt_file = (self.folder if takes_file else self.notes) / "prompt.md"
        gpus = {"CUDA_VISIBLE_DEVICES": ""} if agent.has_model else {}  # none: they are for the runs
        places = {"{prompt_file}": str(prompt_file), "{answer}": str(self._answers)}
        domain = self._tag.domain
        places |= {"{editable}": domain.editable, "{tag}": self._tag.name, "{direction}": domain.direction}
        words = shlex.split(agent.command)
        for place, value in places.items():
            words = [word.replace(place, value) for word in words]
        try:
            self.notes.mkdir(parents=True, exist_ok=True)
            self._lay_out(champion, start)
            write_atomically(prompt_file, prompt)
            ending = run_child(
                words,
                cwd=self.folder,
                env=agent_environment(env | gpus),
                mark=self._mark,
                log=self.log,
                limit=limit,
                stop=stop,
                stdin=None if takes_file else prompt_file,
                quiet_limit=QUIET_LIMIT if agent.streams else None,
            )
        except (OSError, UserError) as error:  # it updates itself, say, or the disk is full
            return NoProposal(f"the agent does not start: {error}", "failed")
        answer = self._read_answer()
        self.was_cut_off = ending.problem.startswith(("timeout", "no output", "over", "killed"))
        if agent.has_model:
            self.cost = answer.cost
        return self._look(agent, champion, start, ending, answer)

    def _lay_out(self, champion: str, start: bytes) -> None:
        """Make the worktree anew, whatever the last proposal left in it, but for .venv: `uv run` takes long to make it.

        The newest runs are there as copies, since an agent need not, and may not, leave its folder.
        """
        venv = self.folder / ".venv"
        aside = self.notes / ".venv"
        with contextlib.suppress(OSError):
            os.rename(venv, aside)
        self._repository.add_worktree(self.folder, champion)
        with contextlib.suppress(OSError):
            os.rename(aside, venv)
        remove_folder(self._answers)
        self._answers.mkdir()
        write_atomically(self.folder / self._repository.editable, start)
        write_atomically(self.folder / "results.tsv", read_text(self._tag.home / "results.tsv"))
        names = [path.name for path in self._tag.runs.glob("[0-9]*")]
        for name in sorted(filter(str.isdigit, names), key=int)[-RUNS_COPIED:]:
            copy = self.folder / "runs" / name
            copy.mkdir(parents=True)
            for path in (self._tag.runs / name / file for file in RUN_FILES):
                if path.is_file():
                    (copy / path.name).write_text(read_text(path, last=RUN_FILE_BYTES))

    def _read_answer(self) -> Answer:
        """What the agent said. Where that is JSON, its last words stand at the end of its log in plain text too."""
        said = read_text(self.log)
        for path in sorted(self._answers.glob("*.json")):
            with contextlib.suppress(ValueError, RecursionError):
                said += "\n" + json.dumps(json.loads(read_text(path, first=LOG_LIMIT)))
        answer = read_answer(said)
        if answer.said:
            with contextlib.suppress(OSError), open(self.log, "a", errors="replace") as file:
                file.write(f"\n--- Its last words:\n\n{answer.said}\n")
        return answer

    def _look(self, agent: Agent, champion: str, start: bytes, ending: Ending, answer: Answer) -> Edit | NoProposal:
        """What the agent made of the editable file."""
        name = self._repository.editable
        if ending.problem == "stopped":
            return NoProposal("the loop stopped the agent", "failed")
        try:
            with open_regular(self.folder / name) as file:
                source = file.read(MAX_EDIT_BYTES + 1)
        except OSError:
            return NoProposal(f"{name} is not a regular file", "bad edit")
        if len(source) > MAX_EDIT_BYTES:
            return NoProposal(f"{name} is over {MAX_EDIT_BYTES // 2**20} MiB", "bad edit")
        if source != start:
            description = one_line(read_text(self.folder / DESCRIPTION_FILE, first=2000))
            description = description or describe_edit(self._tag.source(champion), source, name)
            touched = self._touched(champion)
            return Edit(source, champion, description, touched=touched, overrides=not agent.has_model)
        said = one_line(answer.said, REASON_CHARS)
        if not ending.problem and not answer.is_error:
            return NoProposal(f"the agent left {name} as it was: {said}".rstrip(": "), "unchanged")
        said = said or _last_words(self.log)
        how = f"ended with {ending.problem}" if ending.problem else "failed"
        kind = "failed"
        if answer.is_error or not answer.said:  # else the words are the model's own
            kind = _kind_of_failure(said)
        if not agent.has_model and ending.problem == f"exit code {NOTHING_TO_TURN}":
            kind = "hopeless"
        return NoProposal(f"the agent {how}: {said}".rstrip(": "), kind)

    def _touched(self, champion: str) -> tuple[str, ...]:
        changed: list[str] = []
        if (self.folder / ".git").is_file():  # else git would look at the person's checkout
            with contextlib.suppress(UserError):  # the agent broke it
                changed = self._repository.changed_files(self.folder, champion)
        return tuple(file for file in changed if file != self._repository.editable)


def _last_words(log: Path) -> str:
    """The last lines of plain text that say something: a `}` does not."""
    lines = read_text(log, last=4000).splitlines()
    said = one_line(" ".join(line for line in lines if re.search(r"[^\W\d_]{3}", line)), 4000)
    return said[-REASON_CHARS:]


def rest_seconds(kind: str, failures: int) -> float:
    """How long a worker rests after so many calls in a row without a proposal, the last of this kind: twice as long for
    every one. After a rate limit all workers should."""
    is_limit = kind == "rate limit"
    first, last = (FIRST_REST_OF_LIMIT, LAST_REST_OF_LIMIT) if is_limit else (FIRST_REST, LAST_REST)
    return min(last, first * 2 ** min(failures - 1, 20))
