"""What a coding agent's CLI prints in its JSON mode: what it did, in plain words, and what that cost.

Pure functions from the text that a CLI printed. Three CLIs print JSON objects, one a line, as read in November 2026:
claude 2.1 (`--output-format json`), codex 0.169 (`exec --json`) and opencode 1.18 (`run --format json`). The types of
the objects tell which CLI it was, so the same output of any other command is understood too. vibe 3.0 prints no tokens
in any of its formats.

Whatever is not reported, or cannot be true, is unknown: None, never 0.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

MOST_TOKENS = 10**10  # of one call: more is no count of tokens
MOST_USD = 10_000  # of one call: more is no price


@dataclass(frozen=True)
class Cost:
    """What one call of an agent used; None where that is unknown."""

    tokens_in: int | None = None  # those read from a cache included
    tokens_out: int | None = None  # those of its thinking included
    usd: float | None = None  # as the CLI reckons: the list price, also under a subscription

    def __str__(self) -> str:
        dollars = "cost unknown" if self.usd is None else dollars_text(self.usd)
        if self.tokens_in is None or self.tokens_out is None:
            return f"{dollars}, tokens unknown"
        return f"{dollars}, {self.tokens_in:,} tokens in, {self.tokens_out:,} out"


@dataclass(frozen=True)
class Answer:
    """What a CLI said."""

    words: tuple[str, ...] = ()  # what it did and said, in order; empty where it printed no JSON that is known
    cost: Cost = field(default_factory=Cost)


def read_answer(output: str) -> Answer:
    """What a CLI printed, understood as far as it is one of the three formats."""
    events = _find_objects(output)
    words: list[str] = []
    for event in events:
        text = _words_of(event).strip()
        if text and text not in words[-1:]:  # codex says an error twice
            words.append(text)
    return Answer(tuple(words), _cost_of(events))


def _find_objects(output: str) -> list[dict]:
    """The JSON objects among the lines; warnings, torn lines and the like are left out."""
    found = []
    for line in output.splitlines():
        if not line.startswith(("{", "[")):
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        values = value if isinstance(value, list) else [value]  # claude prints one list where `verbose` is set
        found += [entry for entry in values if isinstance(entry, dict)]
    return found


# In words


def _words_of(event: dict) -> str:
    """One object in plain words, "" where it says nothing to a person."""
    kind = event.get("type")
    if kind == "result":  # claude
        return _text(event, "result")
    if kind == "item.completed":  # codex
        return _words_of_item(event)
    if kind == "turn.failed":  # codex
        return _text(event, "error", "message")
    if kind == "text":  # opencode
        return _text(event, "part", "text")
    if kind == "tool_use":  # opencode
        title = _text(event, "part", "state", "title")
        return f"$ {title}" if title else ""
    if kind == "error":  # codex; opencode
        return _text(event, "message") or _text(event, "error", "data", "message") or _text(event, "error", "name")
    return ""


def _words_of_item(event: dict) -> str:
    command = _text(event, "item", "command")
    if command:
        return f"$ {command}"
    return _text(event, "item", "text") or _text(event, "item", "message")


def _text(value: object, *keys: str) -> str:
    """The text that stands under these keys, one in another; "" where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


# What it cost


def _cost_of(events: list[dict]) -> Cost:
    """The cost of a whole call, from the objects that tell it."""
    by_kind: dict[str, list[dict]] = {}
    for event in events:
        by_kind.setdefault(str(event.get("type")), []).append(event)
    if "result" in by_kind:
        cost = _cost_of_claude(by_kind["result"][-1])
    elif "turn.completed" in by_kind:
        cost = _cost_of_codex(by_kind["turn.completed"][-1])
    elif "step_finish" in by_kind:
        cost = _cost_of_opencode(by_kind["step_finish"])
    else:
        return Cost()
    has_used_nothing = cost.tokens_in == 0 and cost.tokens_out == 0
    if cost.usd == 0 and not has_used_nothing:  # a model whose price the CLI does not know
        return Cost(cost.tokens_in, cost.tokens_out)
    return cost


def _cost_of_claude(result: dict) -> Cost:
    """`modelUsage` holds every model that was called, subagents' too, as the dollars do."""
    usages = result.get("modelUsage")
    usages = list(usages.values()) if isinstance(usages, dict) else [None]
    keys_in = ("inputTokens", "cacheReadInputTokens", "cacheCreationInputTokens")
    tokens_in = _sum(_tokens(usage, *keys_in) for usage in usages)
    tokens_out = _sum(_tokens(usage, "outputTokens") for usage in usages)
    return Cost(tokens_in, tokens_out, _number(result.get("total_cost_usd"), MOST_USD))


def _cost_of_codex(turn: dict) -> Cost:
    """Its input counts those from the cache, its output those of the thinking. It names no dollars."""
    usage = turn.get("usage")
    return Cost(_tokens(usage, "input_tokens"), _tokens(usage, "output_tokens"))


def _cost_of_opencode(steps: list[dict]) -> Cost:
    tokens_in = []
    tokens_out = []
    dollars = []
    for step in steps:
        part = step.get("part")
        part = part if isinstance(part, dict) else {}
        tokens = part.get("tokens")
        cache = tokens.get("cache") if isinstance(tokens, dict) else None
        tokens_in += [_tokens(tokens, "input"), _tokens(cache, "read", "write")]
        tokens_out.append(_tokens(tokens, "output", "reasoning"))
        dollars.append(_number(part.get("cost"), MOST_USD))
    return Cost(_sum(tokens_in), _sum(tokens_out), _sum(dollars))


def _tokens(usage: object, *keys: str) -> int | None:
    """The sum of the counts under these keys; None if one of them is missing or is no count."""
    if not isinstance(usage, dict):
        return None
    counts = [_number(usage.get(key), MOST_TOKENS) for key in keys]
    return _sum(counts if all(isinstance(count, int) for count in counts) else [None])


def _sum(values: Iterable[float | None]) -> float | None:
    """None if one of them is unknown."""
    values = list(values)
    return None if None in values else sum(values)


def _number(value: object, most: float) -> float | None:
    """The value, if it is a number from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and 0 <= value <= most else None


# What a run of the loop cost, from its timeline


def spending(events: Iterable[dict], kept: int) -> str:
    """One line: what the agents' calls cost, each and for each of the `kept` gains; "" where none was called."""
    costs = [_cost_of_event(event) for event in events if event.get("event") == "proposal"]
    if not costs:
        return ""
    dollars = [cost.usd for cost in costs if cost.usd is not None]
    tokens = [cost.tokens_in + cost.tokens_out for cost in costs if None not in (cost.tokens_in, cost.tokens_out)]
    calls = "1 agent call" if len(costs) == 1 else f"{len(costs)} agent calls"
    dollar_part = _shares(dollars, len(costs), kept, "dollars", dollars_text)
    token_part = _shares(tokens, len(costs), kept, "tokens", _tokens_text)
    return f"{calls}: {dollar_part}; {token_part}"


def _cost_of_event(event: dict) -> Cost:
    """The cost in a line of the timeline, checked: another version, or a hand, may have written it."""
    return Cost(
        _number(event.get("tokens_in"), MOST_TOKENS),
        _number(event.get("tokens_out"), MOST_TOKENS),
        _number(event.get("usd"), MOST_USD),
    )


def _shares(known: list[float], calls: int, kept: int, name: str, text: Callable[[float], str]) -> str:
    """`$3.42 ($0.28 a call, $1.14 a kept gain), 2 calls unknown`."""
    if not known:
        return f"{name} unknown"
    total = sum(known)
    shares = [f"{text(total / len(known))} a call"]
    if kept > 0:
        shares.append(f"{text(total / kept)} a kept gain")
    unknown = calls - len(known)
    rest = ""
    if unknown:
        rest = ", 1 call unknown" if unknown == 1 else f", {unknown} calls unknown"
    return f"{text(total)} ({', '.join(shares)}){rest}"


def dollars_text(usd: float) -> str:
    return f"${usd:.2f}" if usd >= 0.1 else f"${usd:.4f}"


def _tokens_text(tokens: float) -> str:
    return f"{tokens:,.0f} tokens"
