"""The agents `random` and `tpe` on the real train.py, with the real Optuna, and in whole loops."""

import itertools
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import errors, hear

from harness import device, knob_search
from harness.knob_search import Search, random_draw, read_hyperparameters, tpe_draw

TRAIN = (Path(__file__).resolve().parents[1] / "train.py").read_text()


def values(source: str, profile: str) -> dict:
    return {name: one.value for name, one in read_hyperparameters(source, profile).items()}


def executed(source: str, profile: str) -> dict:
    """The hyperparameters as Python itself resolves them: what stands between their banner and the next is executed."""
    section = re.split(r"\n# ---+ (?:Knobs|Hyperparameters)", source, maxsplit=1)[1].split("\n# ---", 1)[0]
    names = {"PROFILE": profile, "torch": torch, "has_bfloat16": device.has_bfloat16}
    exec(f"#{section}", names)
    skipped = ("PROFILE", *knob_search.NEUTRAL)
    return {k: v for k, v in names.items() if k.isupper() and k not in skipped and not isinstance(v, tuple)}


@pytest.mark.parametrize(("devices", "has_bfloat16"), [(0, False), (0, True), (1, True)])
def test_hyperparameters_found_are_those_that_count_under_the_profile(monkeypatch, devices, has_bfloat16):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(device, "has_bfloat16", lambda _: has_bfloat16)
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
PATTERN = ("S"
    "L")
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
BANNER = "# " + "-" * 75
ORIGINAL = f"""
{BANNER}
# Hyperparameters (edit these directly, no CLI flags needed)
{BANNER}
DEPTH = 8               # number of transformer layers

LR = 0.04
{BANNER}
# Setup
OTHER = 1
"""


def test_hyperparameters_in_blocks_of_any_condition_are_found_and_changed_where_they_count():
    assert values(BLOCKS, "small") == {"DEPTH": 2}
    assert values(BLOCKS, "large") == {"DEPTH": 5, "LR": 0.1}  # memory_gb is not known here
    assert values(ORIGINAL, "climbmix") == {"DEPTH": 8, "LR": 0.04}
    assert values("DEPTH = 8\n", "climbmix") == {}
    changed = knob_search.with_values(BLOCKS, read_hyperparameters(BLOCKS, "large"), {"DEPTH": 10, "LR": 0.25})
    assert changed == BLOCKS.replace("DEPTH = 5; LR = 0.1", "DEPTH = 10; LR = 0.25")


@pytest.mark.parametrize("profile", ["climbmix", "pocket"])
@pytest.mark.parametrize("agent", ["random", "tpe"])
def test_proposals_are_new_and_change_exactly_what_they_describe(agent, profile):
    before = executed(TRAIN, profile)
    search = Search(TRAIN.encode(), profile)
    assert {"DEPTH", "MATRIX_LR", "WARMDOWN_RATIO", "WINDOW_PATTERN"} < set(search.space)
    assert not {*knob_search.NEUTRAL} & {*search.space}
    for number in range(knob_search.STARTUP):
        few = next(search.propose(TRAIN.encode(), tpe_draw(search, "minimize", seed=number)))[1]
        assert ", " not in few  # one at a time, before there is something to learn from
        search.tell(TRAIN.encode(), "COMPLETE", 1.0 + number / 100)
    draw = random_draw(random.Random(1)) if agent == "random" else tpe_draw(search, "minimize", seed=1)
    edits = list(itertools.islice(search.propose(TRAIN.encode(), draw), 40))
    assert len({source for source, _ in edits}) == 40
    for source, description in edits:
        after = executed(source.decode(), profile)
        changed = {name: (old, after[name]) for name, old in before.items() if after[name] != old}
        assert description == ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        assert all(type(old) is type(new) and new in search.space[name] for name, (old, new) in changed.items())
        pairs = zip(TRAIN.splitlines(), source.decode().splitlines(), strict=True)
        comments = [(old.partition("  # ")[2], new.partition("  # ")[2]) for old, new in pairs if old != new]
        assert len(comments) == len(changed) and all(old == new for old, new in comments)
        assert len(changed) <= (1 if agent == "random" else 2)


def block(*lines: str) -> bytes:
    return "\n".join(["# ---- Knobs ----", *lines, "# ---- Model ----", "OTHER = 1", ""]).encode()


def test_search_knows_runs_by_values_that_the_baseline_has_too_and_takes_no_comment_for_new():
    search = Search(block("DEPTH = 4", "LR = 0.1", "GONE = 3", 'PATTERN = "L"', "ON = True"), "fake")
    champion = block("NEW = 5", "LR = 0.2  # Muon", "DEPTH = 400", "PATTERN = 1", "ON = 1")
    search.tell(champion, "COMPLETE", 1.0)
    ((places, *told),) = search.trials  # GONE is not there, DEPTH out of its range, two are of another type
    assert {name: search.space[name][place] for name, place in places.items()} == {"LR": 0.2}
    assert told == ["COMPLETE", 1.0]
    one = block("DEPTH = 1")
    for draw in (random_draw(random.Random(0)), tpe_draw(Search(one, "fake"), "minimize")):
        search = Search(one, "fake")
        search.tell(block("DEPTH = 2  # tried"), "FAIL")
        assert sorted(description for _, description in search.propose(one, draw)) == ["DEPTH 1 -> 3", "DEPTH 1 -> 4"]


# Whole loops: of the fake train.py only DEPTH can be turned, from 1 to 4; deeper is better, and 3 crashes.


@pytest.fixture
def four(checkout):
    checkout.set_knob(DEPTH=1, LR=0.0)
    checkout.replace("train.py", "# ---- The rest ----", "# ---- The rest ----\nassert DEPTH != 3")
    checkout.commit("DEPTH alone")
    return checkout


@pytest.mark.parametrize("agent", ["random", "tpe"])
def test_search_goes_on_from_the_ledger_alone_improves_and_ends_where_nothing_is_left(four, tag, agent):
    command = "--tag", "t", "--agent", agent
    four.loop(*command, "--max-experiments", "2")
    four.loop(*command, "--max-experiments", "1")
    assert sorted(run.description[-1] for run in four.runs()[1:]) == ["2", "3", "4"]
    process = four.popen(*command)
    assert "every change at hand has been tried: the hyperparameters are exhausted" in hear(process, "no proposal")
    process.terminate()
    assert process.wait(20) == 0
    assert "DEPTH = 4" in (four.path / "train.py").read_text()
    tag.load()
    tag.commit(99, b"# ---- Knobs ----\nDEPTH = 2\n", "it trains", tag.champion)  # as of a run without a verdict
    tag.commit(98, b"# ---- Knobs ----\nDEPTH = 3\n", "of a former night", tag.champion)
    tag.folder(99).mkdir()
    trials = knob_search.search_ledger(tag, "fake").trials
    told = [(places["DEPTH"] + 1, state, score) for places, state, score in trials]
    assert {(1, "COMPLETE", 1.12), (4, "COMPLETE", 1.09), (2, "RUNNING", None), (3, "FAIL", None)} < set(told)
    assert len(told) == 5 and not any(run.cost for run in four.runs())


def test_fork_without_anything_to_turn_is_told_so_and_the_loop_ends(checkout):
    checkout.replace("train.py", "# ---- Knobs ----", "# ---- Values ----")
    checkout.commit("a fork")
    error = errors(checkout.loop("--tag", "t", "--agent", "tpe", code=1))[0]
    assert "the file has no hyperparameter to turn" in error and "use an agent with a model" in error


def test_suggestions_are_in_the_prompt_of_a_model(four):
    agent = four.agent('(OUTSIDE / "prompt").write_text(prompt); knob("DEPTH", 2)')
    four.loop("--tag", "t", "--agent-cmd", agent, "--suggest", "tpe", "--max-experiments", "1")
    told = (four.outside / "prompt").read_text().partition("TPE, told all runs, would change train.py so")[2]
    lines = told.split("\n\n")[1].split("\n")
    assert sorted(lines) == ["- DEPTH 1 -> 2", "- DEPTH 1 -> 3", "- DEPTH 1 -> 4"]
    (error,) = errors(four.loop("--agent", "tpe", "--suggest", "tpe", code=2))
    assert error == "error: --suggest tpe: --agent tpe reads no prompt: choose an agent with a model"
