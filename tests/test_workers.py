"""Many workers on one ratchet: whatever the order in which results arrive, no gain is lost and none is assumed."""

import re
import signal
import threading
from dataclasses import replace

import pytest
from conftest import BASELINE, Checkout, ended, hear, wait_for

import loop
from harness.domain import Description
from harness.edit import Dropped, Edit
from harness.ledger import Run
from harness.replicates import run_baseline
from harness.runner import Job, Runner

START = "".join(f"# {name}\n\n{name} = 0\n\n" for name in "ABC")  # edits of two knobs merge, two of one knob conflict
FACTS = Description("fake", "test", 1.0, "/nowhere", True, None, "d" * 64, {"val": 7}, "cpu", "cpu", {})


class FakeRunner(Runner):
    """Four devices on which a run takes no time. A and B do not go together: each is a gain alone, both are not."""

    def __init__(self, tag):
        super().__init__(threading.Event())
        self.tag = tag
        for number in range(4):
            self.add_device(number)

    def attempt(self, job: Job, device) -> Run:
        knobs = re.findall(rb"= (\d)", self.tag.repository.read(job.run.commit, "train.py"))
        score = 1.0 if b"0" not in knobs[:2] else 0.9 - sum(map(int, knobs)) / 100
        return replace(job.run, score=score, record={"profile": "fake"}, seconds=0.1)


@pytest.fixture
def ratchet(checkout, tag):
    checkout.write("train.py", START)
    checkout.commit("three knobs")
    ratchet = loop.Ratchet(tag, FACTS, FakeRunner(tag))
    tag.domain = replace(tag.domain, assumed_sigma={"fake": 0.0001})
    tag.load()
    run_baseline(ratchet, {})
    return ratchet


def test_gains_that_meet_are_not_added_and_an_edit_that_conflicts_or_repeats_is_dropped(ratchet):
    """Another worker's A is decided while B, an edit of the same champion, is: B runs again on A, and loses."""
    base = ratchet.tag.champion

    def edit(knob: str, value: int) -> Edit:
        return Edit(START.replace(f"{knob} = 0", f"{knob} = {value}").encode(), base, f"{knob} = {value}")

    decide = ratchet.decide

    def decide_after_another(runs: list[Run], late: Edit) -> tuple[str, str]:
        ratchet.decide = decide
        ratchet.experiment(edit("A", 4))
        return decide(runs, late)

    ratchet.decide = decide_after_another
    run = ratchet.experiment(edit("B", 4))
    (stale,) = [run for run in ratchet.tag.ledger.runs if run.is_stale]
    assert stale.reason.startswith("gained on a former champion") and stale.status == "discard"
    assert (run.again_of, run.status) == (stale.number, "discard")
    assert [change.run.description for change in ratchet.tag.ledger.changes()] == ["A = 4"]
    assert ratchet.experiment(edit("C", 1)).status == "keep"  # it is merged onto A
    assert re.findall(rb"= (\d)", ratchet.tag.source(ratchet.tag.champion)) == [b"4", b"0", b"1"]
    with pytest.raises(Dropped, match="conflicts with the new champion"):
        ratchet.experiment(edit("A", 3))
    running, _ = ratchet.begin(replace(edit("B", 2), base=ratchet.tag.champion))
    with pytest.raises(Dropped, match="repeats an experiment that runs now"):
        ratchet.experiment(running)


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
    champion = ""
    for run in checkout.runs():  # every keep was measured on the champion that it replaced
        assert run.status != "keep" or run.base == champion
        champion = run.commit if run.status == "keep" else champion
        assert not run.is_stale or run.number in again
