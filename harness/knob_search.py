"""Agents that need no model: they turn one hyperparameter of the editable file. A coding agent should beat them.

    uv run loop.py --agent random
    AUTORESEARCH_PROFILE=pocket python -P harness/knob_search.py < /dev/null     # one edit by hand, in a checkout

It starts from HEAD's train.py, which is the champion's in every worktree, changes one of the hyperparameters that count
under the profile and writes what it did to experiment.txt. Changes that are named in results.tsv or in the prompt on
standard input are not proposed again. A program of its own: it imports nothing of harness/.
"""

import ast
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

EDITABLE = Path("train.py")
BANNER = re.compile(r"#.*\b(knobs|hyper-?parameters)\b", re.IGNORECASE)  # above the block
RULE = re.compile(r"# ?[-=#]{3}")  # begins every banner
NEUTRAL = ("DEVICE_BATCH_SIZE", "LOSS_CHUNK")  # memory only: the loss does not depend on them
NOTHING_TO_TURN = 3  # exit code: no later call will find anything either

FACTORS = (0.5, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0)
FRACTION_STEPS = (-0.2, -0.1, -0.05, 0.05, 0.1, 0.2)  # of a hyperparameter that is a fraction of the budget
BETA_STEPS = (-0.1, -0.05, -0.02, 0.02, 0.05)
PATTERNS = ("L", "SL", "SSL", "SSSL", "SSSSL")
TRIES = 1000  # random changes before the hyperparameters count as exhausted


# Reading and writing hyperparameters


@dataclass(frozen=True)
class Hyperparameter:
    """The literal value of a line `NAME = value`, and where it stands."""

    value: object
    line: int  # from 0
    begin: int  # byte of the line at which the value begins
    end: int


def read_hyperparameters(source: str, profile: str, with_booleans: bool = False) -> dict[str, Hyperparameter]:
    """Name -> the assignment in the block that counts under the profile: the last one that is executed."""
    first, last = _block(source)
    statements = [node for node in ast.parse(source).body if first <= node.lineno <= last]
    found: dict[str, Hyperparameter] = {}
    _collect(statements, profile, found)
    found = {name: one for name, one in found.items() if name not in NEUTRAL}
    return {name: one for name, one in found.items() if with_booleans or not isinstance(one.value, bool)}


def with_values(source: str, hyperparameters: dict[str, Hyperparameter], values: dict[str, object]) -> str:
    """The source with other values."""
    lines = source.splitlines(keepends=True)
    # From the last to the first: two may stand on one line.
    for name in sorted(values, key=lambda name: hyperparameters[name].begin, reverse=True):
        place = hyperparameters[name]
        line = lines[place.line].encode()  # ast counts bytes
        lines[place.line] = (line[: place.begin] + repr(values[name]).encode() + line[place.end :]).decode()
    return "".join(lines)


def _block(source: str) -> tuple[int, int]:
    """The first and the last line, from 1, of what stands between the block's banner and the next banner."""
    lines = source.splitlines()
    first = 0
    has_code = False
    for number, line in enumerate(lines, 1):
        is_rule = RULE.match(line) is not None
        if not first:
            is_banner = is_rule or (number > 1 and RULE.match(lines[number - 2]) is not None)
            first = number if is_banner and BANNER.match(line) else 0
        elif has_code and is_rule:
            return first, number
        elif line.strip() and not line.startswith("#"):  # a banner may have a rule below it too
            has_code = True
    return (first, len(lines)) if first else (1, 0)


def _collect(statements: list[ast.stmt], profile: str, found: dict[str, Hyperparameter]) -> None:
    """Add the hyperparameters of these statements; of an `if` those of the branch that is taken."""
    for node in statements:
        if isinstance(node, ast.If):
            branch = node.body if _counts(node.test, profile) else node.orelse
            _collect(branch, profile, found)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            value = node.value
            try:
                literal = ast.literal_eval(value)
            except ValueError:  # computed from others
                continue
            if isinstance(literal, int | float | str | tuple) and value.lineno == value.end_lineno:
                place = (value.lineno - 1, value.col_offset, value.end_col_offset)
                found[node.targets[0].id] = Hyperparameter(literal, *place)


def _counts(test: ast.expr, profile: str) -> bool:
    """Whether a branch counts here. A condition that asks more than profile and devices is taken as false."""
    code = compile(ast.Expression(test), str(EDITABLE), "eval")
    try:
        return bool(eval(code, {"PROFILE": profile}))
    except NameError:
        pass
    try:
        import torch  # not above: it takes seconds, and few profiles need it

        return bool(eval(code, {"PROFILE": profile, "torch": torch}))
    except Exception:  # whatever an agent wrote there
        return False


# Random search


def mutate(name: str, value: object, rng: random.Random) -> object:
    """Another value of the same type, not far away."""
    if isinstance(value, str):
        return rng.choice(PATTERNS) if set(value) <= set("SL") else value
    if isinstance(value, tuple):
        index = rng.randrange(len(value)) if value else 0
        if not value or not isinstance(value[index], float):
            return value
        moved = round(value[index] + rng.choice(BETA_STEPS), 3)
        moved = min(0.999, max(0.0, moved))
        return (*value[:index], moved, *value[index + 1 :])
    if isinstance(value, int):
        if value > 16:
            return rng.choice((value // 2, value * 2))
        return max(1, value + rng.choice((-1, 1)))
    if name.endswith(("RATIO", "FRAC")) and value <= 1:
        moved = round(value + rng.choice(FRACTION_STEPS), 3)
        return min(1.0, max(0.0, moved))
    return float(f"{value * rng.choice(FACTORS):.3g}")


class NothingToTurn(ValueError):
    """The editable file has no hyperparameter that this agent knows how to change."""


def propose(source: str, profile: str, seen: str, rng: random.Random) -> tuple[str, str]:
    """The edited source and its description. Raises ValueError if every change at hand has been seen."""
    hyperparameters = read_hyperparameters(source, profile)
    is_any_turned = False
    for _ in range(TRIES if hyperparameters else 0):
        name = rng.choice(sorted(hyperparameters))
        old = hyperparameters[name].value
        new = mutate(name, old, rng)
        description = f"{name} {old} -> {new}"
        if new != old and not _was_seen(description, seen):
            return with_values(source, hyperparameters, {name: new}), description
        is_any_turned = is_any_turned or new != old
    if is_any_turned:
        raise ValueError("every change at hand has been tried: the hyperparameters are exhausted")
    where = "lines NAME = value under a banner that says 'Knobs' or 'Hyperparameters'"
    raise NothingToTurn(f"{EDITABLE} has no hyperparameter to turn ({where}): use an agent with a model")


def _was_seen(description: str, seen: str) -> bool:
    """Whether a text names this change; `DEPTH 2 -> 1` is not in `DEPTH 2 -> 10`."""
    return re.search(rf"(?<!\w){re.escape(description)}(?!\.?\w)", seen) is not None


def main() -> int:
    ledger = Path("results.tsv")
    seen = ledger.read_text() if ledger.exists() else ""
    if not sys.stdin.isatty():
        seen += sys.stdin.read()
    head = subprocess.run(["git", "show", f"HEAD:{EDITABLE}"], stdout=subprocess.PIPE, text=True)
    if head.returncode:
        print(f"error: HEAD has no {EDITABLE}: run this in a checkout of the project", file=sys.stderr)
        return NOTHING_TO_TURN
    profile = os.environ.get("AUTORESEARCH_PROFILE", "climbmix")
    try:
        source, description = propose(head.stdout, profile, seen, random.Random())
    except (ValueError, SyntaxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return NOTHING_TO_TURN if isinstance(error, NothingToTurn) else 1
    EDITABLE.write_text(source)
    Path("experiment.txt").write_text(description + "\n")
    print(description)
    return 0


if __name__ == "__main__":
    sys.exit(main())
