"""harness/knob_search.py: the agent without a model, on the real train.py and in a scratch checkout.

uv run pytest tests/test_knob_search.py
"""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from agent_fixtures import Lab

from harness.knob_search import (
    NEUTRAL,
    NOTHING_TO_TURN,
    NothingToTurn,
    mutate,
    propose,
    read_hyperparameters,
    with_values,
)

ROOT = Path(__file__).resolve().parents[1]
TRAIN = (ROOT / "train.py").read_text()


def values(source: str, profile: str) -> dict:
    return {name: one.value for name, one in read_hyperparameters(source, profile).items()}


def executed(source: str, profile: str) -> dict:
    """The hyperparameters as Python itself resolves them: what stands between their banner and the next is executed."""
    section = re.split(r"\n# ---+ (?:Knobs|Hyperparameters)", source, maxsplit=1)[1].split("\n# ---", 1)[0]
    names = {"PROFILE": profile, "torch": torch, "has_bfloat16": lambda device: True}  # the search takes it for true
    exec(f"#{section}", names)
    skipped = ("PROFILE", *NEUTRAL)
    return {k: v for k, v in names.items() if k.isupper() and k not in skipped and not isinstance(v, bool)}


@pytest.mark.parametrize("devices", [0, 1])
def test_hyperparameters_found_are_those_that_count_under_the_profile(monkeypatch, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    found = {profile: values(TRAIN, profile) for profile in ("climbmix", "code", "pocket", "smoke", "mine")}
    assert found == {profile: executed(TRAIN, profile) for profile in found}
    assert found["climbmix"] != found["pocket"]
    assert found["mine"] == found["climbmix" if devices else "pocket"]


BLOCKS = """
# The knobs below are yours.
import os
# ---- Knobs ----
DEPTH = 8  # layers, é
WIDTH = 4 * DEPTH
SHAPE = (1,
    2)
if PROFILE == "small":  # Knobs for small machines
    DEPTH = 2
elif torch.cuda.device_count() > 99:
    DEPTH = 3
elif memory_gb() < 24:
    DEPTH = 4
else:
    é = 0; DEPTH = 5; LR = 0.1  # two on a line
# ---- Model ----
OTHER = 1
"""
ORIGINAL = """
# ---------------------------------------------------------------------------
# Hyperparameters (edit these directly, no CLI flags needed)
# ---------------------------------------------------------------------------

DEPTH = 8               # number of transformer layers

# Optimization
LR = 0.04
# ---------------------------------------------------------------------------
# Setup
OTHER = 1
"""


def test_hyperparameters_in_blocks_of_any_condition_are_found_where_they_count():
    assert values(BLOCKS, "small") == {"DEPTH": 2}
    assert values(BLOCKS, "large") == {"DEPTH": 5, "LR": 0.1}  # memory_gb is not known here
    assert values(ORIGINAL, "climbmix") == {"DEPTH": 8, "LR": 0.04}
    assert values("DEPTH = 8\n", "climbmix") == {}
    changed = with_values(BLOCKS, read_hyperparameters(BLOCKS, "large"), {"DEPTH": 10, "LR": 0.25})
    assert changed == BLOCKS.replace("DEPTH = 5; LR = 0.1", "DEPTH = 10; LR = 0.25")


@pytest.mark.parametrize("profile", ["climbmix", "pocket"])
def test_proposal_changes_exactly_the_described_hyperparameter_and_nothing_else(profile):
    before = executed(TRAIN, profile)
    rng = random.Random(1)
    for _ in range(40):
        source, description = propose(TRAIN, profile, "", rng)
        after = executed(source, profile)
        ((name, old, new),) = [(name, before[name], after[name]) for name in before if before[name] != after[name]]
        assert description == f"{name} {old} -> {new}"
        assert type(old) is type(new)
        pairs = zip(TRAIN.splitlines(), source.splitlines(), strict=True)
        ((old_line, new_line),) = [pair for pair in pairs if pair[0] != pair[1]]
        assert new_line.partition("  # ")[1:] == old_line.partition("  # ")[1:]


@pytest.mark.parametrize("value", [1, 8, 524288, 0.0, 0.5, 1.0, 0.004, "SSSL", (0.8, 0.95), (0.999, 0.999), (), "adam"])
def test_mutation_keeps_type_and_bounds(value):
    rng = random.Random(0)
    for name in ("X", "WARMUP_RATIO") * 200:
        new = mutate(name, value, rng)
        assert type(new) is type(value)
        if isinstance(value, int):
            assert new >= 1
        if isinstance(value, tuple):
            assert len(new) == len(value) and all(0 <= x < 1 for x in new)
        if isinstance(value, float) and name != "X":
            assert 0 <= new <= 1
        if value == "adam":
            assert new == value


def test_no_proposal_is_made_twice_until_every_change_has_been_seen():
    source = '# ---- Knobs ----\nDEPTH = 2  # layers\nPATTERN = "L"  # windows\n# ---- Model ----\nOTHER = 3\n'
    seen = "DEPTH 2 -> 10"  # a change that is only the beginning of a seen one is another change
    rng = random.Random(0)
    with pytest.raises(ValueError, match="exhausted"):
        for _ in range(99):
            seen += "\n" + propose(source, "climbmix", seen, rng)[1]
    patterns = {f"PATTERN L -> {pattern}" for pattern in ("SL", "SSL", "SSSL", "SSSSL")}
    assert sorted(seen.split("\n")[1:]) == sorted({"DEPTH 2 -> 1", "DEPTH 2 -> 3"} | patterns)
    with pytest.raises(NothingToTurn):
        propose('# ---- Knobs ----\nOPTIMIZER = "adam"\nON = True\n', "climbmix", "", rng)


def test_edit_by_hand_avoids_what_ledger_and_prompt_name_and_says_when_nothing_is_left(tmp_path):
    lab = Lab(tmp_path, {})
    train = lab.checkout / "train.py"
    (lab.checkout / "results.tsv").write_text("a1b2c3d\t1.0\t1.0\tdiscard\tDEPTH 2 -> 1\n")

    def by_hand(source: str, prompt: str = "") -> tuple[int, str, str]:
        train.write_text(source)
        lab.git("commit", "-qam", "another train.py", "--allow-empty")
        train.write_text("what an agent left here\n")
        command = [sys.executable, "-P", str(ROOT / "harness/knob_search.py")]
        env = {"PATH": os.environ["PATH"]}
        done = subprocess.run(command, cwd=lab.checkout, env=env, input=prompt, capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    one = "# ---- Knobs ----\nDEPTH = 2\n# ---- Model ----\n"
    assert by_hand(one) == (0, "DEPTH 2 -> 3\n", "")
    assert (lab.checkout / "experiment.txt").read_text() == "DEPTH 2 -> 3\n"
    assert train.read_text() == one.replace("2", "3")
    exhausted = "error: every change at hand has been tried: the hyperparameters are exhausted\n"
    assert by_hand(one, "Running now: DEPTH 2 -> 3\n") == (1, "", exhausted)
    code, _, error = by_hand("x = 1\n")
    assert code == NOTHING_TO_TURN and error.startswith("error: train.py has no hyperparameter to turn (lines NAME = ")
    assert by_hand("def (:\n")[0] == 1
