"""An agent that needs no model. It changes one knob of train.py at random: that is what a coding agent must beat.

    uv run loop.py --agent random
    AUTORESEARCH_PROFILE=pocket python -P harness/random_search.py < /dev/null     # one edit by hand, in a checkout

It starts from HEAD's train.py, which is the champion's on every desk, changes one of the knobs that count under the
profile and writes what it did to experiment.txt. Changes that are named in results.tsv or in the prompt on standard
input are not proposed again.
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
FACTORS = (0.5, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0)
SHARE_STEPS = (-0.2, -0.1, -0.05, 0.05, 0.1, 0.2)  # of a knob that is a share of the budget
BETA_STEPS = (-0.1, -0.05, -0.02, 0.02, 0.05)
PATTERNS = ("L", "SL", "SSL", "SSSL", "SSSSL")
NEUTRAL = ("DEVICE_BATCH_SIZE", "LOSS_CHUNK")  # memory only: the loss does not depend on them
TRIES = 1000  # random changes before the knobs count as exhausted


@dataclass(frozen=True)
class Knob:
    """The literal value of a line `NAME = value`, and where it stands."""

    value: object
    line: int  # from 0
    begin: int  # byte of the line at which the value begins
    end: int


def find_knobs(source: str, profile: str) -> dict[str, Knob]:
    """Name -> the assignment under the banner "Knobs" that counts under the profile: the last one that is executed."""
    first, last = _knob_lines(source)
    statements = [node for node in ast.parse(source).body if first <= node.lineno <= last]
    knobs: dict[str, Knob] = {}
    _collect(statements, profile, knobs)
    return {name: knob for name, knob in knobs.items() if name not in NEUTRAL and not isinstance(knob.value, bool)}


def _knob_lines(source: str) -> tuple[int, int]:
    """The first and the last line, from 1, of what stands between the banner "Knobs" and the next banner."""
    first = 0
    for number, line in enumerate(source.splitlines(), 1):
        is_banner = line.startswith("# ---")
        if first and is_banner:
            return first, number
        if not first and line.startswith("#") and "Knobs" in line:
            first = number
    return (first, number) if first else (1, 0)


def _collect(statements: list[ast.stmt], profile: str, knobs: dict[str, Knob]) -> None:
    """Add the knobs of these statements; of an `if` those of the branch that is taken."""
    for node in statements:
        if isinstance(node, ast.If):
            branch = node.body if _counts(node.test, profile) else node.orelse
            _collect(branch, profile, knobs)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            value = node.value
            try:
                literal = ast.literal_eval(value)
            except ValueError:  # computed from other knobs
                continue
            knobs[node.targets[0].id] = Knob(literal, value.lineno - 1, value.col_offset, value.end_col_offset)


def _counts(test: ast.expr, profile: str) -> bool:
    """Whether a block of knobs counts here. A condition that asks more than profile and devices is taken as false."""
    code = compile(ast.Expression(test), str(EDITABLE), "eval")
    try:
        return bool(eval(code, {"PROFILE": profile}))
    except NameError:
        import torch  # not above: it takes seconds, and few profiles need it
    try:
        return bool(eval(code, {"PROFILE": profile, "torch": torch}))
    except Exception:  # whatever an agent wrote there
        return False


def mutate(name: str, value: object, rng: random.Random) -> object:
    """Another value of the same type, not far away."""
    if isinstance(value, str):
        return rng.choice(PATTERNS)
    if isinstance(value, tuple):
        index = rng.randrange(len(value))
        moved = round(value[index] + rng.choice(BETA_STEPS), 3)
        moved = min(0.999, max(0.0, moved))
        return (*value[:index], moved, *value[index + 1 :])
    if isinstance(value, int):
        if value > 16:
            return rng.choice((value // 2, value * 2))
        return max(1, value + rng.choice((-1, 1)))
    if name.endswith(("RATIO", "FRAC")):
        moved = round(value + rng.choice(SHARE_STEPS), 3)
        return min(1.0, max(0.0, moved))
    return float(f"{value * rng.choice(FACTORS):.3g}")


def propose(source: str, profile: str, seen: str, rng: random.Random) -> tuple[str, str]:
    """The edited source and its description. Raises ValueError if every change at hand has been seen."""
    knobs = find_knobs(source, profile)
    if not knobs:
        raise ValueError(f"no knobs found in {EDITABLE}: they stand under the banner 'Knobs' as NAME = value")
    for _ in range(TRIES):
        name = rng.choice(sorted(knobs))
        knob = knobs[name]
        new = mutate(name, knob.value, rng)
        description = f"{name} {knob.value} -> {new}"
        if new != knob.value and not _was_seen(description, seen):
            return _with_value(source, knob, new), description
    raise ValueError("every change at hand has been tried: the knobs are exhausted")


def _was_seen(description: str, seen: str) -> bool:
    """Whether a text names this change; `DEPTH 2 -> 1` is not in `DEPTH 2 -> 10`."""
    return re.search(rf"(?<!\w){re.escape(description)}(?!\.?\w)", seen) is not None


def _with_value(source: str, knob: Knob, value: object) -> str:
    lines = source.splitlines(keepends=True)
    line = lines[knob.line].encode()  # ast counts bytes
    lines[knob.line] = (line[: knob.begin] + repr(value).encode() + line[knob.end :]).decode()
    return "".join(lines)


def main() -> int:
    ledger = Path("results.tsv")
    seen = ledger.read_text() if ledger.exists() else ""
    if not sys.stdin.isatty():
        seen += sys.stdin.read()
    head = subprocess.run(["git", "show", f"HEAD:{EDITABLE}"], stdout=subprocess.PIPE, text=True)
    if head.returncode:
        print(f"error: HEAD has no {EDITABLE}: run this in a checkout of the project", file=sys.stderr)
        return 1
    profile = os.environ.get("AUTORESEARCH_PROFILE", "climbmix")
    try:
        source, description = propose(head.stdout, profile, seen, random.Random())
    except (ValueError, SyntaxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    EDITABLE.write_text(source)
    Path("experiment.txt").write_text(description + "\n")
    print(description)
    return 0


if __name__ == "__main__":
    sys.exit(main())
