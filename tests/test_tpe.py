"""harness/tpe.py with the real Optuna: ranges, what the study is told, and whole loops over the fake domain.

uv run pytest tests/test_tpe.py
"""

import importlib.metadata
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
from conftest import ended, errors, hear, wait_for

from harness.agents import choose_agent
from harness.console import UserError
from harness.knob_search import NothingToTurn
from harness.machine import OF_EXTRAS, installed_packages
from harness.tpe import Search, make_range, round_value, search_ledger

TRAIN = (Path(__file__).resolve().parents[1] / "train.py").read_bytes()

RANGES = [  # name, the baseline's value, lowest and highest or all choices; None: it is not turned
    ("DEPTH", 8, (2, 32)),
    ("DEPTH", 1, (1, 4)),
    ("MATRIX_LR", 0.04, (0.01, 0.16)),
    ("WARMUP_RATIO", 0.0, (0.0, 1.0)),
    ("COMPILE", True, (False, True)),
    ("WINDOW_PATTERN", "SLL", ("L", "SL", "SSL", "SSSL", "SSSSL", "SLL")),
    ("OPTIMIZER", "adam", None),
    ("ADAM_BETAS", (0.8, 0.95), None),
    ("SECONDS", 0.0, None),
]


def test_range_lies_around_the_baselines_value_and_values_are_those_a_person_would_write():
    for name, value, expected in RANGES:
        found = make_range(name, value)
        if expected is None:
            assert found is None, name
        elif isinstance(value, bool | str):
            assert found.choices == expected
        else:
            assert (found.low, found.high) == expected
            assert found.log == (expected[0] > 0)  # log-uniform, but for fractions
    assert [round_value(64, value) for value in (16, 50, 64, 90, 92, 256)] == [16, 64, 64, 64, 128, 256]
    assert [round_value(48, value) for value in (12, 37, 192)] == [12, 48, 192]
    assert [round_value(8, value) for value in (2, 7, 31)] == [2, 7, 31]
    assert round_value(0.04, 0.0312345) == 0.0312
    assert round_value("SSSL", "SL") == "SL" and round_value(True, False) is False


def test_edit_changes_only_the_champions_values_and_every_description_names_them():
    baseline = b"# ---- Knobs ----\nDEPTH = 4\nLR = 0.1\nGONE = 3\n# ---- Model ----\nOTHER = 1\n"
    champion = b"# ---- Knobs ----\nNEW = 5\nLR = 0.2  # Muon\nDEPTH = 400\n# ---- Model ----\nOTHER = 2\n"
    search = Search(baseline, "fake", "minimize", seed=1)
    search.tell(champion, "mark", "COMPLETE", 1.0)
    assert search.study.trials[0].params == {"LR": 0.2}  # GONE is not there, DEPTH out of its range
    edits = list(itertools.islice(search.propose(champion), 20))
    assert len({source for source, _ in edits}) == 20
    for source, description in edits:
        expected = champion.decode()
        for change in description.split(", "):
            name, old, _, new = change.split(" ")
            assert name in ("DEPTH", "LR")
            expected = expected.replace(f"{name} = {old}", f"{name} = {new}")
        assert source.decode() == expected
    with pytest.raises(NothingToTurn):
        next(search.propose(b"# ---- Knobs ----\nNEW = 5\n"))


def test_real_block_is_searched_but_for_what_changes_memory_alone():
    for profile, deepest in (("climbmix", 32), ("pocket", 4)):
        ranges = Search(TRAIN, profile, "minimize").ranges
        assert {"MATRIX_LR", "COMPILE", "WINDOW_PATTERN"} < set(ranges)
        assert not {"DEVICE_BATCH_SIZE", "LOSS_CHUNK"} & set(ranges)
        assert ranges["DEPTH"].high == deepest


# Whole loops: of the fake train.py only DEPTH can be turned, from 1 to 4; deeper is better, and 3 crashes.


@pytest.fixture
def four(checkout):
    checkout.set_knob(DEPTH=1, LR=0.0)
    checkout.replace("train.py", "# ---- The rest ----", "# ---- The rest ----\nassert DEPTH != 3")
    checkout.commit("DEPTH alone")
    return checkout


TPE = "--tag", "t", "--agent", "tpe"


def depths(checkout) -> list[str]:
    """The values that were tried after the baseline, by the runs' commits, whether they have a verdict or not."""
    commits = checkout.git("for-each-ref", "--format=%(objectname)", "refs/autoresearch/t/").split()
    sources = [checkout.git("show", f"{commit}:train.py") for commit in commits]
    return sorted(source.split("DEPTH = ")[1][0] for source in sources)


def test_search_goes_on_from_the_ledger_alone_improves_and_ends_where_nothing_is_left(four, tag):
    four.loop(*TPE, "--max-experiments", "2")
    four.loop(*TPE, "--max-experiments", "1")
    assert depths(four) == ["2", "3", "4"]
    process = four.popen(*TPE)
    assert "every change at hand has been tried: the hyperparameters are exhausted" in hear(process, "no proposal")
    process.terminate()
    assert process.wait(20) == 0
    assert "DEPTH = 4" in (four.path / "train.py").read_text()
    tag.load()
    tag.commit(99, b"# ---- Knobs ----\nDEPTH = 2\n", "it trains", tag.champion)  # as of a run without a verdict
    trials = search_ledger(tag, "minimize", "fake").study.trials
    told = sorted((trial.params["DEPTH"], trial.state.name, trial.values) for trial in trials)
    measured = [(1, "COMPLETE", [1.12]), (2, "COMPLETE", [1.11]), (4, "COMPLETE", [1.09])]
    assert told == sorted([*measured, (2, "RUNNING", None), (3, "FAIL", None)])


def test_workers_propose_what_no_other_trains_and_the_best_of_them_becomes_champion(four):
    four.loop(*TPE, "--max-experiments", "0")
    four.hold.touch()
    process = four.popen(*TPE, "--workers", "3", "--max-experiments", "3")
    wait_for(lambda: len(depths(four)) == 3, 60)
    assert depths(four) == ["2", "3", "4"]  # all at once
    four.hold.unlink()
    ended(process, timeout=20)
    # 2 and 4 gain on the baseline by the same line: the later one runs again on the other, with its own value.
    assert "DEPTH = 4" in (four.path / "train.py").read_text()
    assert sorted(run.description for run in four.runs() if run.again_of) in (["DEPTH 1 -> 2"], ["DEPTH 1 -> 4"])


def test_fork_without_anything_to_turn_is_told_so(checkout):
    checkout.replace("train.py", "# ---- Knobs ----", "# ---- Values ----")
    checkout.commit("a fork")
    error = errors(checkout.loop(*TPE, code=1))[0]
    assert "train.py has no hyperparameter to turn" in error and "use an agent with a model" in error


def test_suggestions_are_in_the_prompt_of_a_model(four):
    agent = four.agent('(OUTSIDE / "prompt").write_text(prompt); knob("DEPTH", 2)')
    four.loop("--tag", "t", "--agent-cmd", agent, "--suggest", "tpe", "--max-experiments", "1")
    told = (four.outside / "prompt").read_text().partition("TPE, told all runs, would change train.py so")[2]
    lines = told.split("\n\n")[1].split("\n")
    assert sorted(lines) == ["- DEPTH 1 -> 2", "- DEPTH 1 -> 3", "- DEPTH 1 -> 4"]
    error = errors(four.loop(*TPE, "--suggest", "tpe", code=2))[0]
    assert error == "error: --suggest tpe: --agent tpe reads no prompt: choose an agent with a model"


def test_missing_optuna_is_refused_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["loop.py", "--agent", "claude", "--suggest", "tpe"])
    with pytest.raises(UserError) as refused:
        choose_agent("tpe", None)
    command = "uv run --extra tpe loop.py --agent claude --suggest tpe"
    assert str(refused.value).startswith(f"tpe is not installed: '{command}' (installed here: ")
    assert refused.value.code == 2


def test_tag_begun_without_the_extras_may_go_on_with_them():
    assert all(importlib.metadata.version(name) for name in OF_EXTRAS)  # they are installed here, and
    assert not OF_EXTRAS & installed_packages().keys()  # are not compared with what the baseline had
