"""Many experiments at a time: whatever the order in which results arrive, no gain is lost and none is assumed.

The first half drives the real ratchet in this process, on a real git repository, with a fleet and agents whose answers
arrive in an order drawn by chance. The second half runs loop.py with four workers.
"""

import contextlib
import itertools
import math
import random
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import BASELINE, Desk, ended, hear, wait_for

import loop
from harness.agents import Agent
from harness.bench import Crash, Job, Measurement, Unavailable
from harness.commands import Options
from harness.contract import Description, Device, Record
from harness.desk import Assignment, NoProposal, Proposal
from harness.interrupts import Interrupts
from harness.ledger import Row
from harness.opening import stale_gains
from harness.proposers import Proposers, find_problem
from harness.repository import Repository
from harness.screen import UserError
from harness.store import Run, Store, read_run

# ---------------------------------------------------------------------------------------------------------------------
# The ratchet alone

KNOBS = "ABCDEF"
START = "".join(f"# {name}\n\n{name} = 0\n\n" for name in KNOBS)  # edits of two knobs merge, two of one knob conflict
CRASHING = 9  # a knob of this value crashes the run
ANOTHER_KERNEL = 8  # the run says another attention than the baseline, every time

FACTS = Description(
    profile="fake",
    reason="test",
    time_budget=1.0,
    cache="/nowhere",
    prepared=True,
    problem=None,
    digest="d" * 64,
    rows={"val": 7, "test": 5},
    files={},
    device="cpu",
    device_name="cpu",
    devices={f"cpu{i}": Device("/nowhere", 0.0) for i in range(4)},
    prepare_sha256="p" * 64,
)


def true_score(source: bytes) -> float:
    """Best at 4 everywhere. A and B do not go together: each is a gain alone, both are not."""
    knobs = [int(value) for value in re.findall(rb"= (\d+)", source)]
    interaction = 0.5 if knobs[0] and knobs[1] else 0.0
    return round(1 + sum(abs(knob - 4) for knob in knobs) / 100 + interaction, 6)


class Fleet:
    """Takes jobs; `complete` gives the outcome of one."""

    capacity = 4

    def __init__(self, chance: random.Random):
        self.chance = chance
        self.jobs: dict[Future, Job] = {}

    def submit(self, job: Job) -> Future:
        future: Future = Future()
        self.jobs[future] = job
        return future

    def place(self, number: int) -> str:
        return ""

    def complete(self, future: Future) -> None:
        job = self.jobs[future]
        source = next(blob.data for blob in job.tree if blob.path == "train.py")
        knobs = [int(value) for value in re.findall(rb"= (\d+)", source)]
        if self.chance.random() < 0.1:
            future.set_result(Unavailable("the device is busy"))
        elif CRASHING in knobs:
            future.set_result(Crash("boom", "Traceback: boom", 1.0))
        elif ANOTHER_KERNEL in knobs:
            future.set_result(Unavailable("attention is sdpa", retries=1))
        else:
            record = Record(true_score(source), "fake", "val", job.seed, 0.5, 7, "d" * 64, {}, "p" * 64, "cpu")
            future.set_result(Measurement(record, {}, 0.5, 1.0, 0.1, 0.5))

    def close(self) -> None:
        pass


class Agents:
    """As Proposers: every idle desk of four may be asked; an edit sets one knob of the champion's file."""

    def __init__(self, store: Store, chance: random.Random):
        self.store = store
        self.chance = chance
        self.asked: dict[Future, Proposal] = {}
        self.assignments: deque[Assignment] = deque()
        self.failing_since = None
        self.told: list[str] = []  # what agents heard beyond the usual
        self.count = 0

    def have_spent_all(self) -> bool:
        return False

    def ask(self, running: list[str]) -> bool:
        if len(self.asked) == 4:
            return False
        self.count += 1
        champion = self.store.champion
        start = self.store.repository.read(champion, "train.py")
        assignment = self.assignments.popleft() if self.assignments else Assignment(champion, start)
        if assignment.text:
            self.told.append(assignment.text)
        knob = self.chance.choice(KNOBS)
        value = self.chance.choice([1, 2, 3, 4, 5, 6, ANOTHER_KERNEL, CRASHING])
        source = re.sub(rf"{knob} = \d+", f"{knob} = {value}", assignment.start.decode()).encode()
        self.asked[Future()] = Proposal(source, assignment.base, f"idea {self.count} of {id(self)}: {knob} = {value}")
        return True

    def take(self, future: Future, pending: set[bytes]) -> Proposal | None:
        proposal = self.asked.pop(future)
        return None if find_problem(self.store, proposal.source, pending) else proposal

    def remember_refusal(self, refusal: str) -> None:
        pass

    def clear_idle(self) -> None:
        pass

    def close(self) -> None:
        pass


class Killed(BaseException):
    """kill -9, at the worst moment."""


class Night:
    """Sessions of the ratchet on one tag, and what must be true of what they leave."""

    def __init__(self, folder: Path, seed: int):
        self.seed = seed
        self.chance = random.Random(seed)
        self.folder = folder
        (folder / "train.py").write_text(START)
        (folder / "prepare.py").write_text("the judge")
        (folder / "program.md").write_text("do it")
        for command in ("init -q -b main", "add -A", "-c user.name=x -c user.email=x@y commit -q -m start"):
            subprocess.run(["git", *command.split()], cwd=folder, check=True)
        store = self.open_store()
        store.home.mkdir(parents=True)
        number = store.new_folder()
        store.commit(number, None, "baseline", "fake", FACTS.digest, parent=store.champion)
        store.mend_ledger()
        self.told: list[str] = []

    def open_store(self) -> Store:
        return Store(Repository(self.folder.resolve(), "train.py", "program.md"), "t", loop.DOMAIN)

    def session(self, experiments: int, kill: str = "", ahead: int = 1) -> loop.Ratchet:
        """Run until it is finished, or killed `before` or `after` a verdict is written to the ledger."""
        self.store = self.open_store()
        agents = Agents(self.store, self.chance)
        limits = Options(workers=4, ahead=ahead, max_experiments=experiments)
        fleet = Fleet(self.chance)
        ratchet = loop.Ratchet(self.store, FACTS, fleet, agents, limits, Interrupts(self.folder / "STOP"))
        if kill:
            self.arm(kill)
        ratchet.plan_baseline()
        ratchet.plan_stale_gains()
        steps = 0
        while not ratchet.is_finished():
            steps += 1
            assert steps < 60 * (experiments + 10), "it does not come to an end"
            ratchet.ask()
            candidates = len(ratchet.waiting) + len(agents.asked)
            assert candidates <= 4 * (1 + ahead) + 1  # one more: a gain that is run again
            before = set(ratchet.flying)
            ratchet.launch()
            self.check_launch(ratchet, before)
            for future in [*ratchet.flying, *agents.asked]:
                if self.chance.random() < (0.25 if future in ratchet.flying else 0.8):
                    fleet.complete(future) if future in ratchet.flying else future.set_result(None)
            ratchet.settle()
        made = {job.number for job in fleet.jobs.values()}
        new_ideas = [run for run in self.store.read_runs() if run.number in made and run.base and not run.again_of]
        assert len(new_ideas) == ratchet.begun == experiments
        self.told += agents.told + [assignment.text for assignment in agents.assignments if assignment.text]
        return ratchet

    def arm(self, kill: str) -> None:
        """Kill at the verdict of a gain that was run again: two runs and two rows belong together there."""
        append = self.store.append

        def deadly(rows):
            runs = [run for run in self.store.read_runs() if run.commit[:7] == rows[0].commit]
            is_again = any(run.again_of for run in runs)
            if kill == "after" or not is_again:
                append(rows)
            if is_again:
                raise Killed

        self.store.append = deadly

    def check_launch(self, ratchet: loop.Ratchet, before: set[Future]) -> None:
        """At most one run a device; gains that are run again go first; a job is the base's tree but for one file."""
        assert len(ratchet.flying) <= 4
        for future in set(ratchet.flying) - before:
            planned = ratchet.flying[future]
            experiment = planned.experiment
            if experiment.purpose == "experiment" and not planned.tries:
                assert experiment.base == self.store.champion
                assert experiment.again_of or not any(proposal.again_of for proposal in ratchet.waiting)
            job = ratchet.fleet.jobs[future]
            assert all(blob.is_intact() for blob in job.tree)
            assert job.time_limit == 2 * FACTS.time_budget + loop.STARTUP_ALLOWANCE
            others = {blob.path: blob.data for blob in job.tree if blob.path != "train.py"}
            assert others == {"prepare.py": b"the judge", "program.md": b"do it"}

    def check(self, said: str, said_before: str = "") -> None:
        """What must hold of rows, runs, refs and messages, whatever the order was; killed sessions said `before`."""
        store = self.open_store()
        repository = store.repository
        runs = {run.commit[:7]: run for run in store.read_runs() if run.decision}
        commits = [row.commit for row in store.rows]
        assert len(set(commits)) == len(commits), "a row twice"
        sources = {commit: repository.read(commit, "train.py") for commit in commits}
        again = {runs[commit].again_of for commit in commits}
        champion = ""
        for row in store.rows:
            run = runs[row.commit]
            assert store.attempts[run.number] == run.commit
            subject = repository("log", "-1", "--format=%s", run.commit)
            assert subject.startswith(f"run {run.number:04d}: ")
            crashes = re.search(rf"= ({CRASHING}|{ANOTHER_KERNEL})\n".encode(), sources[row.commit])
            assert (row.status == "crash") == bool(crashes)
            if crashes:
                continue
            score = true_score(sources[row.commit])
            assert row.score == pytest.approx(score, abs=1e-6)
            is_stale = row.description.endswith("; gained on a former champion; runs again on the present one")
            is_gain = not champion or score < true_score(sources[run.base[:7]])
            assert is_gain == (row.status == "keep" or is_stale), row
            if row.status == "keep":
                assert run.base[:7] == champion, "a gain was assumed to add up"
                assert not champion or score < true_score(sources[champion])
                champion = row.commit
            elif is_stale:
                assert run.base[:7] != champion
                assert run.number in again or f"dropped: {run.description}: " in said_before + said, "a gain was lost"
        assert store.champion[:7] == champion
        if not said_before:  # after a kill the opening of a session puts the branch right: test_loop_kill.py
            assert repository("rev-parse", f"refs/heads/{store.branch}")[:7] == champion
        assert stale_gains(store) == []
        conflicts = [text for text in self.told if "does not merge" in text]
        assert len(conflicts) == len(set(conflicts)), "a conflict told twice"
        met = (said_before + said).count("it conflicts with the new champion")
        if said_before:  # of a session that was killed some were met and could not be told any more
            assert len(conflicts) <= met
        else:
            assert len(conflicts) == met
        for text in conflicts:
            assert text.count("--- before") == 2  # both diffs


def five_nights(folder: Path) -> Iterator[Night]:
    """Nights to try one after the other, since chance may draw one in which no gain meets another; five such fail."""
    for attempt in range(5):
        place = folder / f"{attempt}"
        place.mkdir()
        yield Night(place, random.randrange(10**6))
    pytest.fail("no gain met another in five nights")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(loop, "RETRY_SECONDS", 0)
    monkeypatch.setattr(loop, "POLL_SECONDS", 0)


@pytest.mark.parametrize("ahead", [0, 1])
def test_any_order_of_arrival_loses_no_gain_and_assumes_none(tmp_path, capfd, quick, ahead):
    for night in five_nights(tmp_path):
        night.session(24, ahead=ahead)
        said = capfd.readouterr().err
        print(f"seed {night.seed}")
        night.check(said)
        if "gained on a former champion" in night.store.ledger.read_text():
            return


def test_session_killed_at_a_verdict_is_taken_up_without_loss(tmp_path, capfd, quick):
    """Between a run's folder and the ledger, or right after the row: a gain that was to be run again still is."""
    for night in five_nights(tmp_path):
        try:
            night.session(100, "before")
        except Killed:
            break
    for kill in ("after", "before"):
        with contextlib.suppress(Killed):  # where no other gain meets another
            night.session(12, kill)
    said_before = capfd.readouterr().err
    night.session(3)
    said = capfd.readouterr().err
    print(f"seed {night.seed}")
    night.check(said, said_before)


def session_in_flight(night: Night, experiments: int, **limits) -> loop.Ratchet:
    """A ratchet after its baseline, every device busy."""
    night.session(0)
    store = night.open_store()
    agents = Agents(store, night.chance)
    wanted = Options(workers=4, max_experiments=experiments, **({"ahead": 0} | limits))
    fleet = Fleet(night.chance)
    ratchet = loop.Ratchet(store, FACTS, fleet, agents, wanted, Interrupts(night.folder / "STOP"))
    while len(ratchet.flying) < 4:
        ratchet.ask()
        for future in agents.asked:
            future.set_result(None)
        ratchet.settle()
        ratchet.launch()
    return ratchet


def test_device_that_fails_while_the_loop_stops_ends_no_other_run(tmp_path, capfd, quick):
    night = Night(tmp_path, seed=1)
    ratchet = session_in_flight(night, 100)
    ratchet.interrupts.is_stopping = True
    futures = list(ratchet.flying)
    futures[0].set_result(Unavailable("the device is busy"))
    ratchet.settle()
    ratchet.launch()
    assert not ratchet.planned and set(ratchet.flying) == set(futures[1:]) and not ratchet.is_finished()
    for future in futures[1:]:
        future.set_result(Crash("boom", "", 1.0))
    ratchet.settle()
    assert ratchet.is_finished() and len(ratchet.store.rows) == 4  # the baseline and three
    assert not ratchet.waiting_for  # a run ended: the machine works again


def test_proposal_that_was_paid_for_is_waited_for(tmp_path, capfd, quick):
    night = Night(tmp_path, seed=1)
    ratchet = night.session(0)
    ratchet.options = Options(workers=4, max_usd=1.0)
    ratchet.proposers.have_spent_all = lambda: True
    assert ratchet.is_finished()
    ratchet.proposers.asked[Future()] = Proposal(b"", ratchet.store.champion, "the last one")
    assert not ratchet.is_finished()


def test_gain_that_would_repeat_a_run_in_flight_is_dropped_for_ever(tmp_path, capfd, quick):
    """Else every later session would take it up again."""
    ratchet = session_in_flight(Night(tmp_path, seed=1), 100)
    store = ratchet.store
    first, second, *_ = ratchet.flying.values()
    assert {planned.experiment.source for planned in ratchet.flying.values()} <= ratchet.pending_sources()
    store.write_run(replace(read_run(store.folder(first.number)), decision="stale"))
    store.append([Row(first.commit[:7], 1.0, 0.5, "discard", "a gain on a former champion")])
    assert [run.number for run in stale_gains(store)] == [first.number]
    again = Proposal(second.experiment.source, store.champion, "again", again_of=first.number)
    assert ratchet.merge_onto_champion(again) is None and stale_gains(store) == []
    assert "repeats an experiment that waits or runs now" in capfd.readouterr().err


def test_crash_of_a_second_look_drops_what_is_planned_and_keeps_the_first_score(tmp_path, capfd, quick):
    ratchet = session_in_flight(Night(tmp_path, seed=1), 100)
    store = ratchet.store
    (future, planned), (_, other), *_ = ratchet.flying.items()
    experiment = planned.experiment
    experiment.runs.append(replace(ratchet.new_run(planned), number=store.new_folder(), score=0.9))
    for of in (experiment, other.experiment, experiment):
        ratchet.planned.append(loop.PlannedRun(of, "second look", "again", 7))
    experiment.outstanding = 3
    future.set_result(Crash("boom", "", 1.0))
    ratchet.settle()
    assert [left.experiment for left in ratchet.planned] == [other.experiment]
    assert [(row.status, row.score) for row in store.rows[1:]] == [("crash", 0.0), ("discard", 0.9)]
    assert ratchet.find_verdict(experiment) == "crash"
    ratchet.abandon_what_has_not_begun()
    assert len(ratchet.planned) == 1  # the session stops, and this experiment has begun
    ratchet.planned[0].tries = 1
    ratchet.abandon_what_has_not_begun()
    assert not ratchet.planned  # it waits for the machine: nobody knows how long


def test_runs_beside_a_former_champion_do_not_bring_it_back(tmp_path, capfd, quick):
    """With --confirm: a promising candidate of it is run again on the present one."""
    ratchet = session_in_flight(Night(tmp_path, seed=1), 100)
    store = ratchet.store
    planned = next(iter(ratchet.flying.values()))
    experiment = planned.experiment
    store.rows.append(Row("f" * 7, 0.5, 1.0, "keep", "a gain meanwhile"))
    once_more = Run(store.new_folder(), experiment.base, "", 7, "champion once more", "second look", score=1.2)
    experiment.runs = [replace(ratchet.new_run(planned), score=0.1), once_more]
    ratchet.find_verdict = lambda _: "look again"
    ratchet.decide(experiment)
    assert [(row.status, row.score) for row in store.rows[-2:]] == [("discard", 1.2), ("discard", 0.1)]
    assert store.rows[-1].description.endswith(loop.STALE) and ratchet.waiting[0].again_of == planned.number
    assert store.champion == "f" * 7


def test_with_confirm_a_gain_on_a_former_champion_is_looked_at_again_whatever_its_next_score(tmp_path, capfd, quick):
    ratchet = Night(tmp_path, seed=1).session(0)
    baseline = ratchet.store.baseline
    experiment = loop.Experiment("idea", "experiment", base=baseline, commit="c" * 40)
    score = ratchet.store.estimate(baseline)
    assert ratchet.find_confirmed_verdict(experiment, [score]) == "discard"
    experiment.again_of = 7
    assert ratchet.find_confirmed_verdict(experiment, [score]) == "look again"
    assert ratchet.find_confirmed_verdict(experiment, [score, score + 1]) == "discard"


def test_with_confirm_a_lucky_first_score_of_a_deletion_buys_a_second_look_and_no_keep(tmp_path, capfd, quick):
    ratchet = Night(tmp_path, seed=1).session(0)
    baseline = ratchet.store.baseline
    commit = "c" * 40
    shorter = START.replace("F = 0\n", "").encode()
    experiment = loop.Experiment("simplify: no F", "experiment", base=baseline, commit=commit, source=shorter)
    base_score = ratchet.store.estimate(baseline)
    sigma = loop.DOMAIN.default_sigma

    def verdict(*losses: float) -> str:
        scores = [base_score + loss for loss in losses]
        experiment.runs = [Run(9, commit, "", 7, "no F", "experiment", score=score) for score in scores]
        return ratchet.find_verdict(experiment)

    assert verdict(-0.1) == "keep"  # the plain rule
    ratchet.options = replace(ratchet.options, confirm=True)
    assert verdict(-0.1) == "look again"
    assert verdict(-0.1, 0.1) == "discard"
    assert verdict(-0.1, 0.5 * sigma) == verdict(0.5 * sigma) == "keep"  # simpler, at about the same score


def test_commit_that_is_run_again_is_worth_all_its_runs_but_the_first(tmp_path, capfd, quick):
    """Running it until one is lucky does not help."""
    ratchet = Night(tmp_path, seed=1).session(0)
    commit = "c" * 40
    experiment = loop.Experiment("idea", "experiment", base=ratchet.store.baseline, commit=commit)
    experiment.runs.append(Run(9, commit, "", 7, "idea", "experiment", score=0.8))
    assert ratchet.believed_score(experiment, commit) == 0.8
    ratchet.store.rows += [Row(commit[:7], score, 1.0, "discard", "idea") for score in (0.5, 1.0)]
    assert ratchet.believed_score(experiment, commit) == pytest.approx(0.9)


def test_baseline_that_crashes_when_measured_again_costs_no_ref(tmp_path, capfd, quick):
    ratchet = Night(tmp_path, seed=1).session(0)
    attempts = dict(ratchet.store.attempts)
    experiment = loop.Experiment("baseline", "baseline", base="", commit=ratchet.store.baseline)
    with pytest.raises(UserError, match="the baseline crashed: boom"):
        ratchet.take_crash(loop.PlannedRun(experiment, "baseline", "baseline", 7, number=2), Crash("boom", "", 1.0))
    ratchet.store.load()
    assert ratchet.store.attempts == attempts


def test_run_that_comes_back_too_often_by_its_own_doing_is_a_crash_however_often_the_machine_failed(
    tmp_path, capfd, quick
):
    ratchet = session_in_flight(Night(tmp_path, seed=1), 100)
    planned = next(iter(ratchet.flying.values()))
    for outcome in [Unavailable("busy")] * 9 + [Unavailable("it stood still", retries=2), Unavailable("busy")] * 2:
        ratchet.take_outcome(planned, outcome)
        assert ratchet.planned.popleft() is planned
    ratchet.take_outcome(planned, Unavailable("it stood still", retries=2))
    assert [row.status for row in ratchet.store.rows] == ["keep", "crash"]
    assert ratchet.store.rows[1].description.startswith("it stood still: ")


def test_device_held_by_others_floods_nothing(tmp_path, capfd, quick, monkeypatch):
    """Every run waits for the machine: no further candidate is begun, no further agent is asked."""
    ratchet = session_in_flight(Night(tmp_path, seed=1), 100, ahead=1)
    for _ in range(20):
        for future in [*ratchet.flying, *ratchet.proposers.asked]:
            future.set_result(Unavailable("the device is busy"))
        ratchet.settle()
        ratchet.ask()
        ratchet.launch()
    assert ratchet.begun == len(ratchet.flying) == 4 and not ratchet.planned
    assert len(ratchet.waiting) + len(ratchet.proposers.asked) <= 4
    assert ratchet.store.next_number() == 6  # the baseline's and four
    assert capfd.readouterr().err.count("waiting: the device is busy") == 1
    monkeypatch.setattr(loop, "RETRY_SECONDS", 1000)
    for future in ratchet.flying:
        future.set_result(Unavailable("the device is busy"))
    ratchet.settle()
    ratchet.launch()
    assert len(ratchet.planned) == 4 and not ratchet.flying  # not before their time


def test_live_line_sums_up_many_runs_on_many_nodes():
    now = time.monotonic()
    flying = {
        number: SimpleNamespace(number=number, started_at=now - 10 * number, place=f"node{number % 2}")
        for number in range(1, 6)
    }
    store = SimpleNamespace(estimate=lambda champion: 1.25, champion="")
    ratchet = SimpleNamespace(store=store, flying=flying, usual_seconds=40.0, proposers=None)
    line = loop.Ratchet.live_line(ratchet)
    assert line == "best 1.250000 | 5 runs on 2 nodes, the longest 50 s of ~40 s"


class StandInDesk:
    """Gives the next answer, and keeps the prompts."""

    def __init__(self, answers: list):
        self.answers = answers
        self.prompts: list[str] = []
        self.log = Path("agent.log")

    def lay_out(self, champion: str, assignment: Assignment, prompt: str) -> None:
        self.prompts.append(prompt)

    def ask(self, *_):
        return self.answers.pop(0)

    def clear(self, champion: str) -> None:
        pass


def test_refusal_is_told_once_and_a_proposal_that_passes_ends_the_failing(tmp_path, capfd, quick):
    night = Night(tmp_path, seed=1)
    night.session(0)
    store = night.store
    champion = store.champion
    better = START.replace("A = 0", "A = 4").encode()
    answers = [Proposal(START.encode(), champion, "nothing"), NoProposal("rate limited", is_failure=True)]
    desk = StandInDesk([*answers, Proposal(better, champion, "A = 4")])
    proposers = Proposers(store, [desk], Agent([]), "fake", 1.0, math.inf, threading.Event())
    taken = []
    failing = []
    for _ in range(3):
        proposers._not_before = 0.0
        assert proposers.ask([])
        taken.append(proposers.take(next(iter(proposers.asked)), set()))
        failing.append(proposers.failing_since is not None)
    assert [proposal and proposal.source for proposal in taken] == [None, None, better]
    assert failing == [True, True, False] and proposers._failures == 0
    refusal = "The last proposal was refused: train.py is the champion's"
    assert [refusal in text for text in desk.prompts] == [False, True, False]


# ---------------------------------------------------------------------------------------------------------------------
# loop.py with four workers

DESK_NUMBER = """
number = int(pathlib.Path.cwd().parent.name)
calls = count(f"calls{number}")
say(f"desk {number}, call {calls}")
"""
WORSE = 'knob("LR", 1 + number + calls / 100)\n'


def in_flight(desk: Desk) -> int:
    events = [event["event"] for event in desk.events()]
    return events.count("training") - events.count("measured")


@pytest.mark.slow
def test_four_workers_fill_four_devices_and_stop_as_one(desk):
    """Ctrl-C twice drops what is in flight, once lets it end; the person's checkout is left alone."""
    agent = desk.agent(DESK_NUMBER + WORSE + "print(os.getcwd())")
    (desk.path / "notes.txt").write_text("a person's")
    command = "--tag", "t", "--agent-cmd", agent, "--workers", "4", "--ahead", "1"
    desk.loop(*BASELINE)
    desk.hold.touch()
    process = desk.popen(*command)
    wait_for(lambda: in_flight(desk) == 4)
    state = desk.loop("status").stdout.splitlines()[0]
    assert re.fullmatch(r"autoresearch/t: (run 000[2-5] desk \d, call 1, \d+ s(; )?){4}", state), state
    process.send_signal(signal.SIGINT)
    hear(process, "finishing what runs, then stopping")
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert "what was in flight is dropped" in done.stderr
    assert desk.statuses() == ["keep"] and desk.orphans() == []

    process = desk.popen(*command)
    wait_for(lambda: in_flight(desk) == 4 + 4)  # those of the first session were never measured
    process.send_signal(signal.SIGINT)
    hear(process, "finishing what runs, then stopping")
    desk.hold.unlink()
    ended(process)
    assert desk.statuses() == ["keep", *["discard"] * 4] and desk.orphans() == []

    runs = [run for folder in (desk.home() / "runs").iterdir() if (run := read_run(folder))]
    numbers = {run.commit[:7]: run.number for run in runs}
    assert sorted(numbers[row[0]] for row in desk.rows()) == [1, 6, 7, 8, 9]  # 2 to 5 were dropped; none is reused
    places = [(desk.home() / f"desks/{number}/agent.log").read_text().strip() for number in range(1, 5)]
    assert places == [str(desk.home() / f"desks/{number}/desk") for number in range(1, 5)]
    assert desk.git("symbolic-ref", "HEAD") == "refs/heads/autoresearch/t"
    assert desk.git("status", "--porcelain") == "?? notes.txt"


def test_gains_that_meet_are_run_again_and_a_conflict_is_told_once(desk):
    """Three gains on one base, two of them on the same line: whatever comes first, nothing is lost or assumed."""
    desk.replace("train.py", "LR = 0.1", "\n\n\nLR = 0.5")
    desk.commit("apart")
    desk.loop(*BASELINE)
    agent = """
if calls == 1:
    knob(["DEPTH", "LR", "DEPTH", "SECONDS"][number - 1], [6, 0.1, 8, 0.01][number - 1])
elif "does not merge" in prompt:
    (OUTSIDE / f"told {number} {calls}").write_text(prompt)
    knob("NOISE", 0.5)
"""
    desk.hold.touch()
    command = "--tag", "t", "--agent-cmd", desk.agent(DESK_NUMBER + agent), "--workers", "4", "--max-experiments", "5"
    process = desk.popen(*command)
    wait_for(lambda: in_flight(desk) == 4)
    desk.hold.unlink()
    ended(process)
    told = [path.read_text() for path in desk.outside.glob("told *")]
    assert len(told) == 1 and told[0].count("--- before") == 2
    assert {"+DEPTH = 6  # layers", "+DEPTH = 8  # layers"} <= set(told[0].splitlines())
    rows = desk.rows()
    kept = [row for row in rows if row[3] == "keep"]
    stale = [row for row in rows if row[4].endswith("; gained on a former champion; runs again on the present one")]
    assert len(kept) == 3 and float(kept[-1][1]) in (1.06, 1.04) and len(stale) >= 2
    assert all(row[3] == "discard" for row in stale)
    source = desk.git("show", "autoresearch/t:train.py")
    assert "LR = 0.1 " in source and ("DEPTH = 6 " in source) != ("DEPTH = 8 " in source)


@pytest.mark.slow
def test_every_run_sees_one_cuda_device_that_no_other_has(desk):
    desk.replace("prepare.py", '"device": "cpu"', '"device": "cuda"')
    desk.replace("prepare.py", 'f"cpu{i}": {', 'f"{i + 3}": {')
    desk.replace("prepare.py", "DEVICES = 4", "DEVICES = 2")
    desk.set_knob(SECONDS=0.3)
    log = desk.outside / "log"
    desk.replace("train.py", "prepare.start_clock()", "begin = time.time()\nprepare.start_clock()")
    with open(desk.path / "train.py", "a") as file:
        file.write(f"with open({str(log)!r}, 'a') as file:\n")
        file.write("    print(os.environ['CUDA_VISIBLE_DEVICES'], begin, time.time(), file=file)\n")
    desk.commit("cuda")
    agent = desk.agent(DESK_NUMBER + WORSE)
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--workers", "3", "--max-experiments", "6")
    assert "note: 3 workers, 2 device here: 2 run at a time" in done.stderr
    used: dict[str, list[tuple[float, float]]] = {}
    for line in log.read_text().splitlines():
        device, begin, end = line.split()
        used.setdefault(device, []).append((float(begin), float(end)))
    assert set(used) == {"3", "4"} and sum(map(len, used.values())) == 7
    for spans in used.values():
        spans.sort()
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    overlaps = [(one, other) for one in used["3"] for other in used["4"] if one[0] < other[1] and other[0] < one[1]]
    assert overlaps  # they do run side by side
