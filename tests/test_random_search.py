"""harness/random_search.py: the proposer without a model, on the real train.py and on a scratch run.

    uv run pytest tests/test_random_search.py
"""

import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from harness.random_search import NEUTRAL, find_knobs, mutate, propose

TRAIN = (ROOT / "train.py").read_text()
PROFILES = ["climbmix", "code", "pocket", "smoke", "mine"]


def executed(source: str, profile: str) -> dict:
    """The knobs as Python itself resolves them: what is between the banner "Knobs" and the next is executed."""
    section = source.split("\n# ---- Knobs", 1)[1].split("\n# ---- ", 1)[0]
    names = {"PROFILE": profile, "torch": torch}
    exec(f"#{section}", names)
    del names["PROFILE"]
    return {
        name: value
        for name, value in names.items()
        if name.isupper() and name not in NEUTRAL and not isinstance(value, bool)
    }


@pytest.mark.parametrize("devices", [0, 1])
def test_knobs_found_are_those_that_count_under_the_profile(monkeypatch, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    by_profile = {}
    for profile in PROFILES:
        knobs = {name: knob.value for name, knob in find_knobs(TRAIN, profile).items()}
        assert knobs == executed(TRAIN, profile)
        by_profile[profile] = knobs
    assert by_profile["climbmix"] != by_profile["pocket"]
    assert by_profile["mine"] == by_profile["climbmix" if devices else "pocket"]
    assert not set(NEUTRAL) & set(by_profile["climbmix"])


BLOCKS = """
# ---- Knobs ----
DEPTH = 8  # layers, é
WIDTH = 4 * DEPTH
if PROFILE == "small":  # Knobs for small machines
    DEPTH = 2
elif torch.cuda.device_count() > 99:
    DEPTH = 3
elif memory_gb() < 24:
    DEPTH = 4
else:
    DEPTH = 5; LR = 0.1  # two on a line
# ---- Model ----
OTHER = 1
"""


def test_knobs_in_blocks_of_any_condition_are_found_where_they_count():
    small = find_knobs(BLOCKS, "small")
    large = find_knobs(BLOCKS, "large")
    assert {name: knob.value for name, knob in small.items()} == {"DEPTH": 2}
    assert {name: knob.value for name, knob in large.items()} == {"DEPTH": 5, "LR": 0.1}  # memory_gb is not known here
    source, description = propose(BLOCKS, "large", "DEPTH 5 -> 4 DEPTH 5 -> 6", random.Random(0))
    value = description.removeprefix("LR 0.1 -> ")
    assert source == BLOCKS.replace("LR = 0.1", f"LR = {value}")


@pytest.mark.parametrize("profile", ["climbmix", "pocket"])
def test_proposal_changes_exactly_the_described_knob_and_nothing_else(profile):
    before = executed(TRAIN, profile)
    rng = random.Random(1)
    for _ in range(40):
        source, description = propose(TRAIN, profile, "", rng)
        after = executed(source, profile)
        changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
        assert [f"{name} {old} -> {new}" for name, (old, new) in changed.items()] == [description]
        ((name, (old, new)),) = changed.items()
        assert type(old) is type(new)
        assert after.keys() == before.keys()
        pairs = zip(TRAIN.splitlines(), source.splitlines(), strict=True)
        ((old_line, new_line),) = [pair for pair in pairs if pair[0] != pair[1]]
        assert new_line.partition("  # ")[0].strip() == f"{name} = {new!r}"
        assert new_line.partition("  # ")[1:] == old_line.partition("  # ")[1:]


@pytest.mark.parametrize("value", [1, 2, 8, 524288, 0.0, 0.5, 1.0, 0.004, "SSSL", (0.8, 0.95), (0.999, 0.999)])
def test_mutation_keeps_type_and_bounds(value):
    rng = random.Random(0)
    for name in ("X", "WARMUP_RATIO", "FINAL_LR_FRAC"):
        for _ in range(200):
            new = mutate(name, value, rng)
            assert type(new) is type(value)
            if isinstance(value, int):
                assert new >= 1
            if isinstance(value, tuple):
                assert len(new) == 2
                assert all(0 <= x < 1 for x in new)
            if isinstance(value, float) and name != "X":
                assert 0 <= new <= 1


def test_no_proposal_is_made_twice_until_every_change_has_been_seen():
    source = '# ---- Knobs ----\nDEPTH = 2  # layers\nPATTERN = "L"  # windows\n# ---- Model ----\nOTHER = 3\n'
    seen = ""
    rng = random.Random(0)
    with pytest.raises(ValueError, match="exhausted"):
        for _ in range(99):
            seen += "\n" + propose(source, "climbmix", seen, rng)[1]
    patterns = {f"PATTERN L -> {pattern}" for pattern in ("SL", "SSL", "SSSL", "SSSSL")}
    assert sorted(seen.split("\n")[1:]) == sorted({"DEPTH 2 -> 1", "DEPTH 2 -> 3"} | patterns)


def test_change_that_is_only_the_beginning_of_a_seen_one_may_be_proposed():
    source = "# ---- Knobs ----\nDEPTH = 2\n# ---- Model ----\n"
    assert propose(source, "code", "DEPTH 2 -> 10\nDEPTH 2 -> 3\n", random.Random(0))[1] == "DEPTH 2 -> 1"


def by_hand(desk, prompt=""):
    command = [sys.executable, "-P", "harness/random_search.py"]
    return subprocess.run(command, cwd=desk.path, env=desk.env, input=prompt, capture_output=True, text=True)


def test_edit_by_hand_avoids_what_ledger_and_prompt_name_and_ends_when_nothing_is_left(desk):
    (desk.path / "train.py").write_text("# ---- Knobs ----\nDEPTH = 2\n# ---- Model ----\n")
    desk.commit("one knob")
    (desk.path / "train.py").write_text("what an agent left here\n")
    (desk.path / "results.tsv").write_text("a1b2c3d\t1.0\t1.0\tdiscard\tDEPTH 2 -> 1\n")
    done = by_hand(desk)
    assert (done.returncode, done.stdout) == (0, "DEPTH 2 -> 3\n")
    assert (desk.path / "experiment.txt").read_text() == "DEPTH 2 -> 3\n"
    assert (desk.path / "train.py").read_text() == "# ---- Knobs ----\nDEPTH = 3\n# ---- Model ----\n"

    desk.git("checkout", "train.py")
    done = by_hand(desk, "Running now: DEPTH 2 -> 3\n")
    assert done.returncode == 1
    assert done.stderr == "error: every change at hand has been tried: the knobs are exhausted\n"
    assert desk.git("status", "--porcelain") == ""

    (desk.path / "train.py").write_text("x = 1\n")
    desk.commit("no knobs")
    assert "no knobs found in train.py: they stand under the banner 'Knobs'" in by_hand(desk).stderr
    desk.git("rm", "-q", "train.py")
    desk.commit("no train.py")
    assert by_hand(desk).stderr.splitlines()[-1].startswith("error: HEAD has no train.py")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_run_of_random_search_builds_on_every_kept_change(desk, workers):
    desk.loop("--agent", "random", "--tag", "t", "--max-experiments", "6", "--workers", workers)
    rows = desk.rows()
    assert rows[0][4] == "baseline"
    assert all(" -> " in row[4] for row in rows[1:])
    again = [row for row in rows if "gained on a former champion" in row[4]]
    assert len(rows) == 7 + len(again)
    assert len({row[0] for row in rows}) == len(rows)
    for row in rows[1:]:  # each differs from its parent, the champion when it began, in one line
        assert desk.git("diff", "--shortstat", f"{row[0]}^", row[0]).startswith("1 file changed, 1 insertion")
    kept = [row for row in rows if row[3] == "keep"]
    for parent, row in itertools.pairwise(kept):
        assert desk.git("rev-parse", f"{row[0]}^")[:7] == parent[0]


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["pocket", "climbmix"])
def test_edited_real_train_still_imports(profile, tmp_path):
    """The value reaches train.py's own constant; nothing is trained."""
    source, description = propose(TRAIN, profile, "", random.Random(5))
    (tmp_path / "train.py").write_text(source)
    (tmp_path / "prepare.py").write_text((ROOT / "prepare.py").read_text())
    name = description.split(" ", 1)[0]
    new = description.split(" -> ")[1]
    env = os.environ | {"AUTORESEARCH_PROFILE": profile, "AUTORESEARCH_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", f"import train; print(train.{name})"]
    child = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert child.stdout.splitlines()[-1] == new
