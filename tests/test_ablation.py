"""`ablate`: which kept changes are real. The loop, git and the processes are the real ones; the effects are known."""

import itertools
import signal
from types import SimpleNamespace

import pytest
from conftest import Checkout, hear

from harness.ablation import Contribution, apply, order_runs, take_back, without_all
from harness.edit import Edit
from harness.ledger import Ledger, Run
from loop import Ratchet

SIGMA = 0.01
TRAIN = '''
"""Three knobs help, two do nothing, one harms, two only help together."""
import os, random, time
import prepare

prepare.start_clock()
# ---- Knobs ----
HELPS_1 = 0
HELPS_2 = 0
IDLE_1 = 0
HELPS_3 = 0
IDLE_2 = 0
HARMS = 0
PAIR_1 = 0
PAIR_2 = 0
# ---- The rest ----
while (prepare.CACHE / "hold").exists():
    time.sleep(0.01)
if IDLE_2 and not IDLE_1 and (prepare.CACHE / "crash").exists():
    raise ValueError("IDLE_2 needs IDLE_1")
noise = random.Random(os.environ["AUTORESEARCH_SEED"]).gauss(0, NOISE)
prepare.finish(2.0 - 0.1 * (HELPS_1 + HELPS_2 + HELPS_3) + 0.1 * HARMS - 0.1 * PAIR_1 * PAIR_2 + noise)
'''
KNOBS = "HELPS_1", "HELPS_2", "IDLE_1", "HELPS_3", "IDLE_2", "HARMS", "PAIR_1", "PAIR_2"


@pytest.fixture
def night(checkout: Checkout) -> Checkout:
    """Every knob was turned by a kept change, whatever its score."""
    checkout.write("train.py", TRAIN.replace("NOISE", str(SIGMA / 10)))
    checkout.replace("loop.py", '"fake": 0.0004', f'"fake": {SIGMA}')
    checkout.replace("loop.py", "        if is_better:", "        if True:")
    checkout.commit("effects")
    turn = checkout.agent(f"name = {KNOBS}[count() - 1]\nknob(name, 1)\nsay(name)")
    checkout.loop("--tag", "t", "--agent-cmd", turn, "--max-experiments", str(len(KNOBS)))
    assert checkout.statuses() == ["keep"] * 9
    checkout.git("checkout", "-q", "--", "loop.py")
    return checkout


def words(output: str) -> dict[str, str]:
    """Knob -> what the table says of it."""
    rows = [line.split("  ") for line in output.splitlines() if line.startswith("run ")]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[-1]: row[3] for row in cells}


@pytest.mark.slow
def test_ablation_tells_what_each_change_carries_and_apply_takes_the_others_out(night: Checkout):
    done = night.loop("ablate", "--tag", "t", timeout=200)
    assert "ablation of 8 changes: 33 runs, 9 of the champion, about" in done.stderr
    said = words(done.stdout)
    assert {name for name, word in said.items() if word == "carries"} == {*KNOBS} - {"IDLE_1", "IDLE_2", "HARMS"}
    assert said["HARMS"] == "harms" and said["IDLE_1"] == said["IDLE_2"] == "within noise" and "+1 -1" in done.stdout
    assert "if none of these 8 had an effect, at least one would still be said to carry in about 17%" in done.stdout
    before = len(night.runs())
    assert words(night.loop("ablate", "--tag", "t").stdout) == said and len(night.runs()) == before
    assert night.statuses() == ["keep"] * 9  # an ablation decides nothing
    assert words(night.loop("report", "--tag", "t").stdout.rpartition("next:")[2]) == said

    night.replace("loop.py", 'approve=""', 'approve="false"')
    night.set_constant("harness/ablation.py", "APPLY_TRIES", "1")
    for status, reason in (("discard", "not approved"), ("keep", "")):
        night.loop("ablate", "--tag", "t", "--apply", timeout=100)
        tried = [run for run in night.runs() if run.purpose == "experiment"][-1]
        assert (tried.status, tried.reason) == (status, reason)
        assert tried.description == "simplify: without the changes of runs 4, 6, 7"
        assert len({run.seed for run in night.runs() if run.group == f"confirm {tried.number}"}) == 3
        night.git("checkout", "-q", "--", "loop.py", "harness")
    text = night.git("show", "autoresearch/t:train.py")
    assert [name for name in KNOBS if f"{name} = 0" in text] == ["IDLE_1", "IDLE_2", "HARMS"]


@pytest.mark.slow
def test_stopped_and_killed_ablation_goes_on_and_what_crashes_is_measured_beside_its_base(night: Checkout):
    """Workers share it. The champion without IDLE_1, the change of run 4, crashes."""
    (night.cache / "crash").touch()
    for number in (signal.SIGTERM, signal.SIGKILL):
        night.hold.touch()
        loop = night.popen("ablate", "--tag", "t", "--replicates", "1")
        hear(loop, "run 001")
        loop.send_signal(number)
        loop.communicate(timeout=30)
        assert night.statuses() == ["keep"] * 9
    night.hold.unlink()
    for replicates, runs in (("1", 11), ("2", 12)):
        done = night.loop("ablate", "--tag", "t", "--replicates", replicates, "--workers", "4", timeout=100)
        assert f"ablation of 8 changes: {runs} runs, 3 of the champion, about" in done.stderr
    assert words(done.stdout)["IDLE_1"] == "within noise, beside its base" and "none of these 7" in done.stdout
    measured = [(run.group.split("/")[1], run.commit) for run in night.runs() if run.purpose == "ablation"]
    twice = [*(f"without {number}" for number in (2, 3, 5, 6, 7, 8, 9)), "before 4", "with 4"]
    assert sorted(side for side, _ in measured) == sorted(["champion"] * 6 + ["without 4"] + twice * 2)
    change = night.runs()[3]
    assert {("before 4", change.base), ("with 4", change.commit)} < set(measured)


def test_change_is_taken_back_between_its_neighbours_and_not_below_a_later_one(tag):
    first, second = b"A = 1\nB = 1\nC = 1\n", b"A = 2\nB = 1\nC = 1\n"
    for champion, left in (
        (b"A = 2\nB = 2\nC = 1\n", b"A = 1\nB = 2\nC = 1\n"),  # git calls neighbours a conflict
        (b"A = 3\nB = 1\nC = 1\n", None),  # a later change of the same line
        (b"A = 2\nB = 2\nA = 2\n", None),  # which of the two?
    ):
        assert take_back(tag.repository, champion, second, first) == left


def test_change_that_made_the_code_shorter_is_taken_out_only_where_it_harms(tag):
    longer = tag.commit(1, b"X = 1 + 1\n" + tag.source(tag.champion), "one line more", tag.champion)
    for gain, is_taken in ((0.0, False), (-9.0, True)):
        change = Contribution(Run(2, tag.champion, base=longer), False, gain, 1.0)
        assert without_all(tag, [change])[1] == [change] * is_taken


def test_removal_that_is_refused_is_tried_again_without_the_half_that_contributed_most(tag, monkeypatch):
    idle = [Contribution(Run(number, "c"), False, number / 100, 1.0) for number in (9, 4, 2, 6)]
    monkeypatch.setattr("harness.ablation.read_contributions", lambda ledger, group: idle)
    monkeypatch.setattr("harness.ablation.without_all", lambda tag, idle: (b"", idle))
    tried = []
    ratchet = SimpleNamespace(tag=tag, experiment=lambda edit: tried.append(edit) or Run(1, "c", status="discard"))
    apply(ratchet, 1)
    assert [edit.description.rpartition("run")[2] for edit in tried] == ["s 2, 4, 6, 9", "s 2, 4", " 2"]


def test_removal_may_be_as_long_as_what_it_replaces_where_another_simplification_may_not(tag):
    base = tag.champion
    tag.ledger = Ledger(tag.domain, [Run(1, base, purpose="baseline", status="keep", score=1.0)])
    runs = [Run(2, "c", base, score=1.0), Run(3, base, score=1.0), Run(4, "c", score=1.0)]
    edits = [Edit(tag.source(base), base, "simplify: x", pairs=pairs) for pairs in (1, 0)]
    assert [Ratchet(tag, None, None).decide(runs, edit)[0] for edit in edits] == ["keep", "discard"]


def test_champion_runs_in_alternation_and_more_often_than_each_other():
    sides = ["champion", *(f"without {number}" for number in range(14))]
    order = order_runs(sides, 3)
    assert order.count("champion") == 12 and all(order.count(side) == 3 for side in sides[1:])
    places = [place for place, side in enumerate(order) if side == "champion"]
    assert max(after - before for before, after in itertools.pairwise(places)) <= 6
