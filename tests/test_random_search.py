"""agents/random_search.py: the proposer without a model, on the real train.py and on a scratch run.

    uv run pytest tests/test_random_search.py
"""

import ast
import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
from agents.random_search import NEUTRAL, find_knobs, mutate, propose
from conftest import ROOT

TRAIN = (ROOT / "train.py").read_text()
PROFILES = ["climbmix", "code", "pocket", "smoke"]


def resolved(source: str, profile: str) -> dict:
    """The knobs as Python itself resolves them: the literal assignments between the first two banners."""
    found: dict = {}
    head = source.split("\n# ---- Knobs", 1)[1].split("\n# ---- ", 1)[0]

    def take(body):
        for node in body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = ast.literal_eval(node.value)
            elif isinstance(node, ast.If):
                counts = eval(compile(ast.Expression(node.test), "test", "eval"), {"PROFILE": profile, "torch": torch})
                take(node.body if counts else [])

    take(ast.parse("#" + head).body)
    return {name: value for name, value in found.items() if name not in NEUTRAL and not isinstance(value, bool)}


@pytest.mark.parametrize("profile", PROFILES)
def test_knobs_found_are_those_that_count_under_the_profile(profile):
    knobs = {name: value for name, (_, value) in find_knobs(TRAIN, profile).items()}
    assert knobs == resolved(TRAIN, profile)
    assert (knobs["DEPTH"] == 8) == (profile in ("climbmix", "code")) and "DEVICE_BATCH_SIZE" not in knobs


@pytest.mark.parametrize(("devices", "depth"), [(0, 1), (1, 8)])
def test_profile_of_the_users_own_takes_the_cpu_sized_knobs_without_a_gpu_only(monkeypatch, devices, depth):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    knobs = {name: value for name, (_, value) in find_knobs(TRAIN, "mine").items()}
    assert knobs == resolved(TRAIN, "mine") and knobs["DEPTH"] == depth


@pytest.mark.parametrize("profile", PROFILES)
def test_proposal_changes_exactly_the_described_knob_and_stays_python(profile):
    before, rng = resolved(TRAIN, profile), random.Random(1)
    for _ in range(200):
        source, description = propose(TRAIN, profile, "", rng)
        after = resolved(source, profile)
        changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
        assert [f"{name} {old} -> {new}" for name, (old, new) in changed.items()] == [description]
        ((old, new),) = changed.values()
        assert type(old) is type(new) and after.keys() == before.keys()
        ours, theirs = TRAIN.splitlines(), source.splitlines()
        assert len(ours) == len(theirs) and sum(a != b for a, b in zip(ours, theirs, strict=True)) == 1


@pytest.mark.parametrize("profile", ["pocket", "climbmix"])
def test_proposal_keeps_the_comment_of_its_line(profile):
    source, description = propose(TRAIN, profile, "", random.Random(3))
    [(before, after)] = [pair for pair in zip(TRAIN.splitlines(), source.splitlines(), strict=True) if len({*pair}) > 1]
    name, new = description.split(" ", 1)[0], description.split(" -> ")[1]
    assert after.partition("  # ")[0].strip() == f"{name} = {new}"
    assert after.partition("  # ")[1:] == before.partition("  # ")[1:]


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
                assert len(new) == 2 and all(0 <= x < 1 for x in new)
            if isinstance(value, float) and name != "X":
                assert 0 <= new <= 1


def test_no_proposal_is_made_twice_until_every_change_has_been_seen():
    source = '# ---- Knobs ----\nDEPTH = 2  # layers\nPATTERN = "L"  # windows\n# ---- Model ----\nOTHER = 3\n'
    seen, rng = "", random.Random(0)
    with pytest.raises(ValueError, match="exhausted"):
        for _ in range(99):
            seen += "\n" + propose(source, "climbmix", seen, rng)[1]
    assert set(seen.split("\n")[1:]) == {"DEPTH 2 -> 1", "DEPTH 2 -> 3"} | {
        f"PATTERN L -> {pattern}" for pattern in ("SL", "SSL", "SSSL", "SSSSL")
    }
    assert len(seen.split("\n")) == 7


def test_change_that_is_only_the_beginning_of_a_seen_one_may_be_proposed():
    """`DEPTH 2 -> 1` is not `DEPTH 2 -> 10`."""
    source = "# ---- Knobs ----\nDEPTH = 2\n# ---- Model ----\n"
    assert propose(source, "code", "DEPTH 2 -> 10\nDEPTH 2 -> 3\n", random.Random(0))[1] == "DEPTH 2 -> 1"


def test_file_without_knobs_is_an_error_that_says_where_they_stand():
    with pytest.raises(ValueError, match="banner 'Knobs'"):
        propose("x = 1\n", "climbmix", "", random.Random(0))


def by_hand(desk, prompt=""):
    command = [sys.executable, "agents/random_search.py"]
    return subprocess.run(command, cwd=desk.path, env=desk.env, input=prompt, capture_output=True, text=True)


def test_one_edit_by_hand_writes_train_and_the_description(desk):
    process = by_hand(desk)
    description = (desk.path / "experiment.txt").read_text()
    assert process.returncode == 0 and process.stdout == description and " -> " in description
    assert desk.git("diff", "--name-only") == "train.py"


def test_exhausted_knobs_are_one_error_line_and_leave_the_file(desk):
    (desk.path / "train.py").write_text("# ---- Knobs ----\nDEPTH = 2\n# ---- Model ----\n")
    desk.commit("one knob")
    process = by_hand(desk, "DEPTH 2 -> 1\nDEPTH 2 -> 3\n")
    assert process.returncode == 1
    assert process.stderr == "error: every change at hand has been tried: the knobs are exhausted\n"
    assert desk.git("status", "--porcelain") == ""


def test_changes_in_the_ledger_and_in_the_prompt_are_not_proposed_again(desk):
    (desk.path / "train.py").write_text("# ---- Knobs ----\nDEPTH = 2\n# ---- Model ----\n")
    desk.commit("one knob")
    (desk.path / "results.tsv").write_text("a1b2c3d\t1.0\t1.0\tdiscard\tDEPTH 2 -> 1\n")
    assert by_hand(desk).stdout == "DEPTH 2 -> 3\n"
    (desk.path / "results.tsv").unlink()
    assert by_hand(desk, "Running now: DEPTH 2 -> 3\n").stdout == "DEPTH 2 -> 1\n"


def test_run_of_random_search_builds_on_every_kept_change(desk):
    desk.loop("--agent", "random", "--tag", "t", "--max-experiments", "8")
    rows = desk.rows()
    assert len(rows) == 9 and rows[0][4] == "baseline"
    described = [row[4] for row in rows[1:]]
    assert len({(row[0], row[4]) for row in rows}) == 9 and all(" -> " in words for words in described)
    for row in rows:  # each differs from its parent, the champion of its time, in one line
        if row[4] != "baseline":
            assert desk.git("diff", "--shortstat", f"{row[0]}^", row[0]).startswith("1 file changed, 1 insertion")
    kept = [row for row in rows if row[3] == "keep"]
    for parent, row in itertools.pairwise(kept):
        assert desk.git("rev-parse", f"{row[0]}^")[:7] == parent[0]


@pytest.mark.parametrize("profile", ["pocket", "climbmix"])
def test_edited_real_train_still_imports(profile, tmp_path):
    """The values reach train.py's own constants; nothing is trained."""
    source, description = propose(TRAIN, profile, "", random.Random(5))
    (tmp_path / "train.py").write_text(source)
    (tmp_path / "prepare.py").write_text((ROOT / "prepare.py").read_text())
    name, new = description.split(" ", 1)[0], description.split(" -> ")[1]
    env = os.environ | {"AUTORESEARCH_PROFILE": profile, "AUTORESEARCH_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", f"import train; print(train.{name})"]
    child = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert child.stdout.splitlines()[-1] == new
