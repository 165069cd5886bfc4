"""A proposer that needs no model. It changes one knob of train.py; an LLM must beat it.

    uv run loop.py --agent random
    AUTORESEARCH_PROFILE=pocket python harness/random_search.py < /dev/null     # one edit by hand

It starts from HEAD's train.py (the champion's), takes the knobs under the banner "Knobs", those of the CPU-sized block
before the general ones where it counts, and writes what it did to experiment.txt. Changes named in results.tsv or in
the prompt on standard input are not proposed again.
"""

import ast
import os
import random
import re
import subprocess
import sys
from pathlib import Path

EDITABLE = Path("train.py")
FACTORS = 0.5, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0
PATTERNS = "L", "SL", "SSL", "SSSL", "SSSSL"
NEUTRAL = {"DEVICE_BATCH_SIZE", "LOSS_CHUNK"}  # memory only: the loss does not depend on them

KNOB = re.compile(r"^(?P<indent> *)(?P<name>[A-Z][A-Z0-9_]*) = (?P<value>[^#\n]+?)(?= *(?:#|$))")
BLOCK = re.compile(r"^if PROFILE in \((.*?)\)")


def find_knobs(source: str, profile: str) -> dict[str, tuple[int, object]]:
    """Name -> (line number, value) of the knobs that count under the profile."""
    knobs: dict[str, tuple[int, object]] = {}
    inside = 0
    for number, line in enumerate(source.splitlines()):
        if line.startswith("# ---") and knobs:
            break
        if line.startswith("#") and "Knobs" in line:
            inside = 1
        if header := BLOCK.match(line):
            inside = 1 if f'"{profile}"' in header[1] or is_cpu_sized(profile) else 2  # 2: a block of other profiles
        knob = KNOB.match(line)
        if knob and inside and not (knob["indent"] and inside == 2) and knob["name"] not in NEUTRAL:
            knobs[knob["name"]] = number, ast.literal_eval(knob["value"])
    return {name: knob for name, knob in knobs.items() if not isinstance(knob[1], bool)}


def is_cpu_sized(profile: str) -> bool:
    """Whether train.py takes its CPU-sized knobs for a profile of the user's own."""
    if profile in ("climbmix", "code"):
        return False
    import torch  # not above: it takes seconds

    return not torch.cuda.device_count()


def mutate(name: str, value: object, rng: random.Random) -> object:
    """Another value of the same type, not far away."""
    if isinstance(value, str):
        return rng.choice(PATTERNS)
    if isinstance(value, tuple):
        i = rng.randrange(len(value))
        moved = min(0.999, max(0.0, round(value[i] + rng.choice((-0.1, -0.05, -0.02, 0.02, 0.05)), 3)))
        return (*value[:i], moved, *value[i + 1 :])
    if isinstance(value, int):
        if value > 16:
            return rng.choice((value // 2, value * 2))
        return max(1, value + rng.choice((-1, 1)))
    if name.endswith(("RATIO", "FRAC")):
        return min(1.0, max(0.0, round(value + rng.choice((-0.2, -0.1, -0.05, 0.05, 0.1, 0.2)), 3)))
    return float(f"{value * rng.choice(FACTORS):.3g}")


def propose(source: str, profile: str, seen: str, rng: random.Random) -> tuple[str, str]:
    """(The edited source, its description); raises ValueError if every change at hand has been seen."""
    knobs = find_knobs(source, profile)
    if not knobs:
        raise ValueError(f"no knobs found in {EDITABLE}: they stand under the banner 'Knobs' as NAME = value")
    for _ in range(1000):
        name = rng.choice(sorted(knobs))
        number, old = knobs[name]
        new = mutate(name, old, rng)
        description = f"{name} {old} -> {new}"
        tried = rf"(?<!\w){re.escape(description)}(?!\.?\w)"  # `2 -> 1` is not in `2 -> 10`
        if new != old and not re.search(tried, seen):
            lines = source.splitlines(keepends=True)
            lines[number] = KNOB.sub(rf"\g<indent>{name} = {new!r}", lines[number])
            return "".join(lines), description
    raise ValueError("every change at hand has been tried: the knobs are exhausted")


def main() -> int:
    seen = "" if sys.stdin.isatty() else sys.stdin.read()
    seen += Path("results.tsv").read_text() if Path("results.tsv").exists() else ""
    source = subprocess.run(["git", "show", f"HEAD:{EDITABLE}"], capture_output=True, check=True, text=True).stdout
    try:
        source, description = propose(source, os.environ.get("AUTORESEARCH_PROFILE", "climbmix"), seen, random.Random())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    EDITABLE.write_text(source)
    Path("experiment.txt").write_text(description + "\n")
    print(description)
    return 0


if __name__ == "__main__":
    sys.exit(main())
