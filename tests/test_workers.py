"""Many workers on one ratchet: whatever the order in which results arrive, no gain is lost and none is assumed."""

import contextlib
import random
import re
import signal
import subprocess
import threading
import time
from dataclasses import replace

import pytest
from conftest import BASELINE, Checkout, ended, hear, wait_for

import loop
from harness.domain import Description
from harness.edit import Dropped, Edit
from harness.ledger import Run
from harness.replicates import run_baseline
from harness.runner import Job, MachineFault, Runner

KNOBS = "ABCDEF"
START = "".join(f"# {name}\n\n{name} = 0\n\n" for name in KNOBS)  # edits of two knobs merge, two of one knob conflict
FACTS = Description("fake", "test", 1.0, "/nowhere", True, None, "d" * 64, {"val": 7}, "cpu", "cpu", {})


def true_score(source: bytes) -> float:
    """Best at 4 everywhere. A and B do not go together: each is a gain alone, both are not."""
    knobs = [int(value) for value in re.findall(rb"= (\d+)", source)]
    interaction = 0.5 if knobs[0] and knobs[1] else 0.0
    return round(1 + sum(abs(knob - 4) for knob in knobs) / 100 + interaction, 6)


class ChanceRunner(Runner):
    """Devices on which a run takes a moment drawn by chance, and now and then comes to nothing."""

    def __init__(self, tag, devices: int, chance: random.Random):
        super().__init__(threading.Event())
        self.tag = tag
        self.chance = chance
        for number in range(devices):
            self.add_device(number)

    def attempt(self, job: Job, device) -> Run:
        time.sleep(self.chance.random() / 20)
        if self.chance.random() < 0.05:
            raise MachineFault("the device is busy")
        source = self.tag.repository.read(job.run.commit, "train.py")
        if b"= 9" in source:
            return replace(job.run, status="crash", reason="boom")
        return replace(job.run, score=true_score(source), record={"profile": "fake"}, seconds=0.1)


@pytest.fixture
def ratchet(tag, monkeypatch):
    """A ratchet on four devices; the file that is edited has six knobs."""
    monkeypatch.setattr("harness.runner.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("harness.ledger.ASSUMED_DEGREES", 4)
    (tag.checkout / "train.py").write_text(START)
    subprocess.run(["git", "-C", tag.checkout, "-c", "user.name=p", "-c", "user.email=p@p", "commit", "-qam", "start"])
    domain = replace(tag.domain, assumed_sigma={"fake": 0.0001})
    tag.domain = domain
    tag.load()
    ratchet = loop.Ratchet(tag, FACTS, ChanceRunner(tag, 4, random.Random(1)))
    run_baseline(ratchet, {})
    return ratchet


def knob_edit(ratchet, knob: str, value: int, base: str = "") -> Edit:
    base = base or ratchet.tag.champion
    source = ratchet.repository.read(base, "train.py").decode()
    return Edit(re.sub(rf"{knob} = \d+", f"{knob} = {value}", source).encode(), base, f"{knob} = {value}")


def check_night(ratchet) -> None:
    """Every keep was measured on the champion that it replaced, and every gain on a former one ran again."""
    ledger = ratchet.tag.ledger
    best = float("inf")
    champion = ""
    again = {run.again_of for run in ledger.runs}
    for run in ledger.rows:
        if run.status == "crash":
            continue
        assert run.score == true_score(ratchet.repository.read(run.commit, "train.py"))
        if run.status == "keep":
            assert run.base == champion and run.score < best
            best, champion = run.score, run.commit
    assert champion == ledger.champion == ratchet.repository.commit_of("refs/heads/" + ratchet.tag.branch)
    for run in ledger.runs:
        if run.is_stale and run.number not in again:
            raise AssertionError(f"the gain of run {run.number} is lost")


def test_any_order_of_arrival_loses_no_gain_and_assumes_none(ratchet):
    chance = random.Random(1)
    failures = []

    def work() -> None:
        try:
            for _ in range(12):
                edit = knob_edit(ratchet, chance.choice(KNOBS), chance.choice([1, 2, 3, 4, 5, 6, 9]))
                time.sleep(chance.random() / 20)
                with contextlib.suppress(Dropped):  # by the gate, or a stale gain that conflicts with the new champion
                    ratchet.experiment(edit)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert any("former champion" in run.reason for run in ratchet.tag.ledger.runs)
    check_night(ratchet)


def test_two_gains_that_do_not_go_together_are_not_added_and_an_edit_that_conflicts_or_repeats_is_dropped(ratchet):
    """A and B each gain alone: B, an edit of the former champion, was decided later and runs again on A, and loses."""
    base = ratchet.tag.champion
    late = knob_edit(ratchet, "B", 4, base)
    decide = ratchet.decide
    meanwhile = []

    def decide_after_another(runs: list[Run], edit: Edit) -> tuple[str, str]:
        if not meanwhile:
            meanwhile.append(True)
            ratchet.experiment(knob_edit(ratchet, "A", 4, base))
        return decide(runs, edit)

    ratchet.decide = decide_after_another
    run = ratchet.experiment(late)
    (stale,) = [run for run in ratchet.tag.ledger.runs if run.is_stale]
    assert stale.reason.startswith("gained on a former champion") and stale.status == "discard"
    assert (run.again_of, run.status) == (stale.number, "discard")
    assert [change.run.description for change in ratchet.tag.ledger.changes()] == ["A = 4"]
    with pytest.raises(Dropped, match="conflicts with the new champion"):
        ratchet.experiment(knob_edit(ratchet, "A", 3, base))
    edit, _ = ratchet.begin(knob_edit(ratchet, "C", 4))
    with pytest.raises(Dropped, match="repeats an experiment that runs now"):
        ratchet.experiment(edit)


# The real loop


def test_four_workers_fill_four_devices_and_stop_as_one(checkout: Checkout):
    checkout.loop(*BASELINE)
    checkout.hold.touch()
    agent = checkout.agent('knob("LR", 0.2 + count() / 100)')
    process = checkout.popen("--tag", "t", "--agent-cmd", agent, "--workers", "4")
    for _ in range(4):
        hear(process, "run 000")
    status = wait_for(lambda: (text := checkout.loop("status", "--tag", "t").stdout).count("training") >= 4 and text)
    assert all(f"{number:04d}" in status for number in (2, 3, 4, 5))
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert checkout.orphans() == [] and checkout.statuses() == ["keep"]


def test_workers_beyond_the_devices_propose_ahead_and_rest_alone_where_their_agent_fails(checkout: Checkout):
    """Three workers for one device; each edit is merged onto the champion of its moment. The agent of one fails."""
    checkout.replace("train.py", "LR = 0.1", "\n\n\nLR = 0.5")
    (checkout.cache / "devices").write_text("1")
    checkout.set_constant("harness/agents.py", "FIRST_REST", "60")
    checkout.set_constant("harness/agents.py", "LAST_REST", "60")
    checkout.commit("lines between the knobs, long rests")
    agent = checkout.agent("""
        if os.getcwd().endswith("/1"):
            sys.exit("worker one fell over")
        n = count()
        if n % 2:
            knob("DEPTH", 4 + n)
        else:
            knob("LR", 0.5 - n / 100)
    """)
    process = checkout.popen("--tag", "t", "--agent-cmd", agent, "--workers", "2", "--ahead", "1")
    hear(process, "note: 2 workers, 1 device here")
    hear(process, "worker one fell over")
    wait_for(lambda: len(checkout.rows()) >= 7, seconds=60)
    process.send_signal(signal.SIGINT)
    ended(process)
    best = [float(row[1]) for row in checkout.rows() if row[3] == "keep"]
    assert best == sorted(best, reverse=True) and len(best) > 2
    again = {run.again_of for run in checkout.runs()}
    assert all(run.number in again for run in checkout.runs() if run.is_stale)
