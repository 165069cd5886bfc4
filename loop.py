"""loop.py, the ratchet: agents propose edits of train.py; the loop commits, runs, measures, decides and records.

    uv run loop.py --agent claude             # all night (Ctrl-C once: finish what runs and stop; twice: stop now)
    uv run loop.py try "raise depth to 10"    # one experiment on the edit now in train.py, for an agent that loops
    uv run loop.py try --again 12             # an earlier experiment once more, on a fresh seed (--base: the champion)
    uv run loop.py status [--wait]            # where the run stands
    uv run loop.py report [LEDGER]            # the morning read: what was kept, progress.png, report.html
    uv run loop.py audit                      # baseline and champion again: fresh seeds, sealed split, a clean judge

Words:
    desk         a checkout that an agent edits
    bench        a fresh folder in which one run trains
    experiment   an idea; a run is one execution of it, with a number of its own
    candidate    the champion's tree with one blob replaced, train.py's
    base         the commit that a candidate edits and is compared with: the champion of its time
    champion     the commit of the ledger's last `keep` row
    stale        a gain on a base that is no longer the champion: it runs again on the present one
    judge        the frozen file that measures, prepare.py; it runs in processes of its own

One thread decides, and it alone writes ledger, branch and refs. Agents and runs work in other threads and processes;
what they give back is plain data. Ledger, refs and run folders are the whole state: kill the loop anywhere, start it
again. Exit codes: 0 done, or stopped by request; 1 error or crash; 2 usage or refusal.
"""
# How a run is decided stands in this file. What the loop stands on is in harness/, a room a file: harness/__init__.py
# lists them.

import sys

if __name__ == "__main__":
    # This folder stands first on the path: the package harness is the one beside this file, whatever is installed.
    import harness  # noqa: F401

    # Everything else comes from elsewhere: an agent may have left a json.py or a git.py here.
    sys.path.pop(0)

import contextlib
import difflib
import math
import secrets
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness import commands, ledger, prompt
from harness.agents import Agent
from harness.bench import Crash, Job, Measurement, Outcome, Unavailable
from harness.commands import Options
from harness.contract import Description, Domain
from harness.desk import Assignment, Desk, Proposal
from harness.files import read_tail
from harness.fleet import LocalFleet
from harness.interrupts import Interrupts, StopNow
from harness.ledger import Row
from harness.live_page import LivePage
from harness.opening import (
    Use,
    check_data,
    check_packages,
    find_baseline_values,
    open_tag,
    process_mark,
    stale_gains,
)
from harness.proposers import Proposers, find_problem
from harness.ray_fleet import OFF, RayFleet
from harness.report import Audited
from harness.screen import UserError, duration, is_terminal, one_line, say, show_live_line
from harness.store import Run, Store, read_run
from harness.verdict import base_run, compare, find_marks, mean_pace, usual_runs
from harness.watch import Watch

# ---------------------------------------------------------------------------------------------------------------------
# What a fork for another domain changes: this block, the judge and the file that is edited

# -P: no folder of the candidate stands before the standard library. -u: what a run printed before it died is in its
# log, and in order.
PYTHON = (sys.executable, "-P", "-u")
RUN_TRAIN = "import os, runpy, sys; sys.path.append(os.getcwd()); runpy.run_path('train.py', run_name='__main__')"
DESCRIBE = "import json, os, sys; sys.path.append(os.getcwd()); import prepare; print(json.dumps(prepare.describe()))"

METRIC = "val_bpb"
LOWER_IS_BETTER = True
EDITABLE = "train.py"

DOMAIN = Domain(
    metric=METRIC,
    test_metric="test_bpb",
    lower_is_better=LOWER_IS_BETTER,
    unit="bpb",
    score_name="validation bits per byte",
    score_range=(0.01, 100.0),
    memory="peak_vram_mb",
    split="val",
    editable=EDITABLE,
    instructions="program.md",
    same_in_every_run=("attention",),  # another attention kernel is another speed
    explanations=(("eval_seconds", "evaluation seconds"),),
    describe_command=(*PYTHON, "-c", DESCRIBE),
    prepare_command=(*PYTHON, "prepare.py"),
    train_command=(*PYTHON, "-c", RUN_TRAIN),
    verify_hint="uv run prepare.py --verify",
    score_command=(*PYTHON, "prepare.py", "--score"),
    assumed_sigma={"climbmix": 0.0004, "pocket": 0.014},  # bpb: the original's H100; six baselines on two CPU cores
    default_sigma=0.0004,
    steps="num_steps",
    curve_pattern=r"step (?P<step>\d{1,12}) \| (?P<percent>[\d.]{1,12})% \| loss (?P<loss>[^ |]{1,30}) ",
    batch_pattern=r"batch (?P<size>[\d,]{1,20}) tokens = ",
    sample="sample",
)

STARTUP_ALLOWANCE = 300  # seconds for compilation and evaluation: a run may take 2 * its budget + this
RETRY_SECONDS = 10  # between looks at an environment that must recover
FIRST_SEED = 42  # of every attempt's first run; further runs take seeds that no edit can foresee
BASELINE_RUNS = 2  # with --confirm; without it one
POLL_SECONDS = 0.2  # between looks at results, signals and the clock
LIVE_RUNS = 3  # that the live line lists; more are summed up
STALE = "gained on a former champion; runs again on the present one"  # ends the description of a stale run's row

# ---------------------------------------------------------------------------------------------------------------------
# An experiment, and the runs that it needs


@dataclass(eq=False)
class Experiment:
    """An idea on its way to a verdict: the runs that it needs, and what they gave."""

    description: str
    purpose: str  # baseline, experiment, repeat (a champion, present or former, once more) or audit
    base: str  # the commit that it is compared with
    commit: str = ""  # once its first run has a number
    source: bytes | None = None  # the edited file; None: the commit exists already
    again_of: int = 0  # the run whose gain on a former champion is run again
    outstanding: int = 0  # runs that are planned or in flight
    runs: list[Run] = field(default_factory=list)  # that ended, with a score or a crash
    measurements: list[Measurement] = field(default_factory=list)  # of those that gave a score

    def scores(self, commit: str) -> list[float]:
        return [run.score for run in self.runs if run.commit == commit and run.decision != "crash"]


@dataclass(eq=False)
class PlannedRun:
    """A run that is to be made, or is in flight."""

    experiment: Experiment
    purpose: str  # baseline, experiment, repeat, second look, audit
    description: str
    seed: int
    commit: str = ""  # "": the experiment's, which is made when its first run is launched
    number: int = 0  # once it has a folder
    tries: int = 0  # that the machine could not make
    suspect_tries: int = 0  # of these, for which the edit may be to blame
    not_before: float = 0.0  # time.monotonic()
    started_at: float = 0.0  # time.monotonic()
    place: str = ""  # the node that has it, on a cluster


class Ratchet:
    """One session on one tag: ask, launch, settle, until it is finished."""

    def __init__(
        self,
        store: Store,
        facts: Description,
        fleet: LocalFleet | RayFleet,
        proposers: Proposers | None,
        options: Options,
        interrupts: Interrupts,
    ):
        self.store = store
        self.repository = store.repository
        self.facts = facts
        self.fleet = fleet
        self.options = options
        self.interrupts = interrupts
        self.proposers = proposers  # None: nobody is asked
        self.waiting: deque[Proposal] = deque()  # candidates that passed the gate
        self.planned: deque[PlannedRun] = deque()  # runs that go before every new candidate
        self.flying: dict[Future, PlannedRun] = {}  # runs that the fleet has
        self.begun = 0  # candidates of this session that were launched; one that is run again counts once
        self.decided: list[Experiment] = []  # of this session
        self.baseline_values = find_baseline_values(store)
        self.live_page = LivePage(store)
        self.deadline = time.monotonic() + 3600 * options.hours
        self.usual_seconds = facts.time_budget  # that a run takes; later the last one's
        self.waiting_for = ""  # what the machine lacks, as a person was last told
        self.waiting_since = 0.0  # time.monotonic(), where it lacks something
        self.watch = Watch(store, options.patience, options.target, options.notify)

    def run(self) -> None:
        """The loop. Raises StopNow at the second Ctrl-C."""
        self.plan_baseline()
        self.plan_stale_gains()
        self.watch.look_for_target()
        while not self.is_finished():
            self.ask()
            self.launch()
            self.settle()
            self.watch.look_for_long_wait(self.waits())
        self.watch.why_ended = self.reason_to_end()

    def close(self) -> None:
        """End what runs, and put the checkout to the champion."""
        self.interrupts.stop.set()
        self.fleet.close()
        if self.proposers:
            self.proposers.close()
        self.store.note("stopped", description=self.watch.why_ended)
        self.live_page.close()
        self.watch.close()

    def is_finished(self) -> bool:
        """Whether nothing runs, and nothing more is to be begun."""
        if self.flying or self.planned:
            return False
        if self.is_stopping():
            return True
        if self.proposers is None:
            nobody_proposes = True
        elif self.proposers.have_spent_all():
            nobody_proposes = not self.proposers.asked
        else:
            nobody_proposes = self.begun >= self.options.max_experiments
        return nobody_proposes and not self.waiting

    def is_stopping(self) -> bool:
        """Whether no new candidate may begin: Ctrl-C, a file STOP, --hours, --patience, --target."""
        return bool(self.watch.enough) or self.interrupts.is_stopping or time.monotonic() > self.deadline

    def reason_to_end(self) -> str:
        if self.watch.enough:
            return self.watch.enough
        if self.interrupts.is_stopping:
            return "stopped by request"
        if time.monotonic() > self.deadline:
            return f"--hours {self.options.hours:g} are over"
        if self.proposers and self.proposers.have_spent_all():
            return f"--max-usd {self.options.max_usd:g} is spent"
        return "all experiments are done"

    def waits(self) -> dict[str, float]:
        """What the loop waits for -> time.monotonic() since when."""
        found = {}
        if self.waiting_for:
            found["for the machine"] = self.waiting_since
        if self.proposers and self.proposers.failing_since is not None:
            found["for a proposal: the agents give none"] = self.proposers.failing_since
        return found

    # Ask: every idle desk, while too few candidates wait

    def ask(self) -> None:
        """Ask idle desks for proposals, as many as devices are free and as may wait."""
        if self.proposers is None or self.is_stopping() or self.proposers.have_spent_all():
            return
        wanted = self.free_places() + self.options.ahead * self.fleet.capacity
        while True:
            candidates = len(self.waiting) + len(self.proposers.asked)
            if candidates >= wanted or self.begun + candidates >= self.options.max_experiments:
                return
            if not self.proposers.ask(self.descriptions_in_flight()):
                return

    def free_places(self) -> int:
        """Devices for new candidates: a run that is planned, or waits for the machine, has its place already."""
        return max(0, self.fleet.capacity - len(self.flying) - len(self.planned))

    def descriptions_in_flight(self) -> list[str]:
        """Of the experiments that wait or run: an agent is told not to propose them again."""
        experiments = [planned.experiment for planned in (*self.flying.values(), *self.planned)]
        descriptions = [experiment.description for experiment in experiments if experiment.purpose == "experiment"]
        return descriptions + [proposal.description for proposal in self.waiting]

    # Launch: a waiting run on every free device

    def launch(self) -> None:
        if self.is_stopping():
            self.abandon_what_has_not_begun()
        while len(self.flying) < self.fleet.capacity:
            planned = self.take_next_run()
            if planned is None:
                return
            self.start(planned)

    def take_next_run(self) -> PlannedRun | None:
        """Take the next run that may start now: a planned one, else a candidate, merged onto the champion of now.

        No candidate starts before the baseline has its row.
        """
        for planned in self.planned:
            if planned.not_before <= time.monotonic():
                self.planned.remove(planned)
                return planned
        while self.waiting and self.free_places() and self.store.rows and not self.is_stopping():
            proposal = self.merge_onto_champion(self.waiting.popleft())
            if proposal is not None:
                if not proposal.again_of:
                    self.begun += 1
                return self.first_run_of(proposal)
        return None

    def first_run_of(self, proposal: Proposal) -> PlannedRun:
        experiment = Experiment(
            proposal.description, "experiment", base=proposal.base, source=proposal.source, again_of=proposal.again_of
        )
        experiment.outstanding = 1
        return PlannedRun(experiment, "experiment", experiment.description, FIRST_SEED)

    def merge_onto_champion(self, proposal: Proposal) -> Proposal | None:
        """The edit on the champion of now; None if the two do not go together, or the result is not worth a run."""
        champion = self.store.champion
        source = proposal.source
        if proposal.base != champion:
            of_champion = self.repository.read(champion, EDITABLE)
            of_base = self.repository.read(proposal.base, EDITABLE)
            source = self.repository.merge(of_champion, of_base, proposal.source)
            if source is None:
                self.assign_conflict(proposal)
                self.forget_stale_gain(proposal.again_of)
                return None
        problem = find_problem(self.store, source, self.pending_sources())
        if problem:
            say(f"dropped: {proposal.description}: {problem}")
            if self.proposers:
                self.proposers.remember_refusal(problem)
            self.forget_stale_gain(proposal.again_of)
            return None
        return replace(proposal, source=source, base=champion)

    def forget_stale_gain(self, number: int) -> None:
        """The gain of that run is not to be run again: it does not go with the present champion."""
        run = read_run(self.store.folder(number)) if number else None
        if run is not None:
            self.store.write_run(replace(run, decision="discard"))

    def pending_sources(self) -> set[bytes]:
        """The edits that wait or run."""
        found = {proposal.source for proposal in self.waiting}
        for planned in (*self.flying.values(), *self.planned):
            if planned.experiment.source is not None:
                found.add(planned.experiment.source)
        return found

    def assign_conflict(self, proposal: Proposal) -> None:
        """Drop a proposal that does not merge; an agent is given both diffs, once."""
        champion = self.store.champion
        say(f"dropped: {proposal.description}: it conflicts with the new champion {champion[:7]}")
        if self.proposers is None:
            return
        start = self.repository.read(champion, EDITABLE)
        base = self.repository.read(proposal.base, EDITABLE)
        text = prompt.conflict_task(proposal.description, unified(base, proposal.source), unified(base, start))
        self.proposers.assignments.append(Assignment(champion, start, text))

    def start(self, planned: PlannedRun) -> None:
        """Give a run its number, folder and commit, and send it to a device."""
        experiment = planned.experiment
        if not planned.number:
            planned.number = self.store.new_folder()
        if not experiment.commit:
            facts = self.facts
            experiment.commit = self.store.commit(
                planned.number, experiment.source, experiment.description, facts.profile, facts.digest, experiment.base
            )
        planned.commit = planned.commit or experiment.commit
        run = self.new_run(planned)
        self.store.write_run(run)
        if run.base:
            (self.store.folder(run.number) / "change.diff").write_bytes(self.repository.diff(run.base, run.commit))
        job = self.make_job(run, experiment)
        planned.started_at = time.monotonic()
        planned.place = ""
        if not planned.tries:
            say(f"run {run.number:04d}: {run.description}{self.progress()}")
        self.store.note("training", run.number, run.description)
        self.flying[self.fleet.submit(job)] = planned

    def make_job(self, run: Run, experiment: Experiment) -> Job:
        if experiment.source is None or run.commit != experiment.commit:
            tree = self.repository.tree(run.commit)
        else:
            tree = self.repository.candidate_tree(experiment.base, experiment.source)  # the same, sooner
        return Job(
            number=run.number,
            commit=run.commit,
            description=run.description,
            seed=run.seed,
            tree=tree,
            facts=self.facts,
            domain=DOMAIN,
            time_limit=2 * self.facts.time_budget + STARTUP_ALLOWANCE,
            audit=experiment.purpose == "audit",
            baseline_values=self.baseline_values,
        )

    def new_run(self, planned: PlannedRun) -> Run:
        """What run.json says of a run that has not ended."""
        experiment = planned.experiment
        is_of_candidate = experiment.purpose == "experiment" and planned.commit == experiment.commit
        return Run(
            number=planned.number,
            commit=planned.commit,
            base=experiment.base if is_of_candidate else "",
            seed=planned.seed,
            description=one_line(planned.description),
            purpose=planned.purpose,
            again_of=experiment.again_of,
        )

    # Settle: the results that have arrived

    def settle(self) -> None:
        """Wait a moment for results, and take those that came, in the order of their runs."""
        proposals = list(self.proposers.asked) if self.proposers else []  # futures of them
        futures = [*self.flying, *proposals]
        if futures:
            done, _ = wait(futures, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        else:
            time.sleep(POLL_SECONDS)
            done = set()
        self.interrupts.heed()
        for future in [future for future in self.flying if future in done]:
            self.take_outcome(self.flying.pop(future), future.result())
        for future in [future for future in proposals if future in done]:
            proposal = self.proposers.take(future, self.pending_sources())
            if proposal is not None:
                self.waiting.append(proposal)
        self.note_places()
        # On a CPU writing the page would slow the runs: there it waits for a moment at which one has just ended.
        is_quiet = self.facts.device != "cpu" or len(self.flying) < self.fleet.capacity
        self.live_page.keep_fresh(is_quiet)
        if is_terminal():  # else spare the work: the line is made from every row and the end of a log
            show_live_line(self.live_line())

    def note_places(self) -> None:
        """Which node got a run: its seconds count from then on."""
        for planned in self.flying.values():
            place = self.fleet.place(planned.number)
            if place and place != planned.place:
                planned.place = place
                planned.started_at = time.monotonic()
                self.store.note("training", planned.number, f"{planned.experiment.description} on {place}")

    def take_outcome(self, planned: PlannedRun, outcome: Outcome) -> None:
        """A run has ended, or could not be made. The last run of an experiment lets it be decided."""
        if isinstance(outcome, Unavailable):
            if outcome.is_permanent:
                raise UserError(outcome.reason)
            if outcome.retries is None or planned.suspect_tries < outcome.retries:
                if outcome.retries is not None:
                    planned.suspect_tries += 1
                self.postpone(planned, outcome.reason)
                return
            seconds = time.monotonic() - planned.started_at
            outcome = Crash(outcome.reason, "", seconds)  # it came back as often as it may: the edit's own fault
        self.waiting_for = ""
        self.usual_seconds = outcome.seconds
        self.store.note("measured", planned.number, planned.experiment.description, outcome.seconds)
        run = self.finished_run(planned, outcome)
        experiment = planned.experiment
        experiment.runs.append(run)
        experiment.outstanding -= 1
        if isinstance(outcome, Crash):
            self.take_crash(planned, outcome)
            return
        experiment.measurements.append(outcome)
        if experiment.purpose == "audit":
            self.store.write_run(replace(run, decision="audit"))
            self.decided.append(experiment)
            say(f"  run {run.number:04d}: {compare(run, None, DOMAIN)}")
            for weakness in run.marks:
                say(f"    {weakness}")
        elif not experiment.outstanding:
            self.decide(experiment)

    def postpone(self, planned: PlannedRun, reason: str) -> None:
        """The machine's fault: the run is made again, as the same run, when it may have recovered."""
        if not self.waiting_for:
            self.waiting_since = time.monotonic()
        if reason != self.waiting_for:
            say(f"waiting: {reason}")
            self.store.note("waiting", planned.number, reason)
        self.waiting_for = reason
        planned.tries += 1
        planned.not_before = time.monotonic() + RETRY_SECONDS
        self.planned.appendleft(planned)

    def abandon_what_has_not_begun(self) -> None:
        """The session stops: runs of experiments that have not begun, or that wait for the machine, are not made.

        Their experiments leave no row: `outstanding` stays above 0, so nothing that still flies decides them.
        """
        in_flight = [planned.experiment for planned in self.flying.values()]
        dropped = []
        for planned in self.planned:
            experiment = planned.experiment
            has_begun = bool(experiment.runs) or experiment in in_flight
            if (planned.tries or not has_begun) and experiment not in dropped:
                dropped.append(experiment)
                say(f"dropped: {experiment.description}: the loop stops before it could be run")
        self.planned = deque(planned for planned in self.planned if planned.experiment not in dropped)

    def finished_run(self, planned: PlannedRun, outcome: Measurement | Crash) -> Run:
        """What run.json says of a run that has ended; the verdict is added when its experiment is decided."""
        run = self.new_run(planned)
        if isinstance(outcome, Crash):
            reason = one_line(f"{outcome.reason}: {run.description}")
            return replace(run, decision="crash", description=reason, seconds=outcome.seconds)
        run = replace(
            run,
            score=round(outcome.record.score, 6),
            memory_gb=outcome.memory_gb,
            seconds=outcome.seconds,
            startup_seconds=outcome.startup_seconds,
            training_seconds=outcome.training_seconds,
            evaluation_seconds=outcome.evaluation_seconds,
            summary=outcome.summary,
            busy_others=outcome.record.busy_others,
            device_others=outcome.record.device_others,
        )
        marks = find_marks(outcome.record, run, usual_runs(self.store, run), self.facts.time_budget)
        return replace(run, marks=marks)

    def take_crash(self, planned: PlannedRun, crash: Crash) -> None:
        """A crash ends its experiment; an agent is given the edit and the end of the log. UserError where no agent
        made the edit: a baseline or an audit that crashes is for a person."""
        experiment = planned.experiment
        log = self.store.folder(planned.number) / "run.log"
        if experiment.purpose == "audit":
            raise UserError(f"the {experiment.description} crashed: {crash.reason} (log {log})")
        if experiment.purpose == "baseline":
            if not self.store.rows:
                self.store.forget_baseline()
            raise UserError(f"the baseline crashed: {crash.reason} (log {log})")
        say(f"  run {planned.number:04d} crash: {crash.reason}")
        if self.proposers and experiment.source is not None:
            text = prompt.crash_task(EDITABLE, crash.log_end)
            self.proposers.assignments.append(Assignment(experiment.base, experiment.source, text))
        self.drop_planned(experiment)
        if not experiment.outstanding:
            self.record(experiment, "crash")

    def drop_planned(self, experiment: Experiment) -> None:
        """Its planned runs need not be made; those in flight end and are then recorded with it."""
        for planned in [planned for planned in self.planned if planned.experiment is experiment]:
            self.planned.remove(planned)
            experiment.outstanding -= 1

    # Decide and record

    def decide(self, experiment: Experiment) -> None:
        """The verdict on an experiment whose runs have ended; a promising one may get more runs first.

        A former champion gets no more runs: a candidate that looks promising beside it runs again on the present one.
        """
        verdict = self.find_verdict(experiment)
        is_of_former_champion = experiment.purpose == "experiment" and experiment.base != self.store.champion
        if is_of_former_champion and verdict in ("keep", "look again"):
            self.record(experiment, "stale")
        elif verdict == "look again":
            self.plan_second_look(experiment)
        else:
            self.record(experiment, verdict)

    def find_verdict(self, experiment: Experiment) -> str:
        """`keep`, `discard`, `crash`, or `look again`: the candidate beside its base."""
        if any(run.decision == "crash" for run in experiment.runs):
            return "crash"
        if experiment.purpose == "baseline":
            return "keep"
        score = self.believed_score(experiment, experiment.commit)
        if experiment.purpose == "repeat":
            is_champion = experiment.commit == self.store.champion
            best = self.store.estimate(self.store.champion)
            return "keep" if is_champion or ledger.is_gain(best, score, DOMAIN) else "discard"
        base_score = self.believed_score(experiment, experiment.base)
        if self.options.confirm:
            verdict = self.find_confirmed_verdict(experiment, experiment.scores(experiment.commit))
        else:
            verdict = "keep" if ledger.is_gain(base_score, score, DOMAIN) else "discard"
        # Asked last: a lucky first score is no reason to keep a deletion, where a gain must be confirmed.
        if verdict == "discard" and self.is_simpler(experiment, base_score, score):
            return "keep"
        return verdict

    def believed_score(self, experiment: Experiment, commit: str) -> float:
        """The score of candidate or base that decides: of a commit that ran again, the mean of all but its first.

        The first score chose the commit to be run again, because it was nearly good enough, or bad on a busy machine.
        The later ones did not. All of them count: running a commit until one score is lucky does not help.
        """
        new_rows = [Row(commit[:7], score, 0.0, "discard", "") for score in experiment.scores(commit)]
        return ledger.best_estimate([*self.store.rows, *new_rows], commit[:7])

    def find_confirmed_verdict(self, experiment: Experiment, scores: list[float]) -> str:
        """With --confirm the first score only buys fresh runs of both, and these decide."""
        first, *fresh = scores
        of_base = self.store.fresh_scores(experiment.base) + experiment.scores(experiment.base)
        sigma = ledger.deciding_sigma(self.store.rows, DOMAIN.sigma_of(self.facts.profile))
        if not fresh:
            known = of_base or self.store.scores(experiment.base)
            had_its_first_look = bool(experiment.again_of)  # on a former champion
            is_promising = had_its_first_look or ledger.deserves_second_look(known, first, sigma, DOMAIN)
            return "look again" if is_promising else "discard"
        tried, kept = ledger.count_tried_and_kept(self.store.rows)
        return ledger.verdict_on_fresh_runs(of_base, fresh, sigma, tried, kept, DOMAIN)

    def is_simpler(self, experiment: Experiment, before: float, after: float) -> bool:
        """Whether it asked for the rule of simplicity and meets it: less code, about the same score."""
        if experiment.source is None or not ledger.wants_simpler_rule(experiment.description):
            return False
        base = self.repository.read(experiment.base, EDITABLE)
        if not ledger.is_less_code(base, experiment.source):
            return False
        spent = ledger.given_away(self.store.rows, DOMAIN)
        sigma = ledger.sigma_to_give_away(self.store.rows, DOMAIN.sigma_of(self.facts.profile))
        return ledger.is_simpler_keep(before, after, sigma, spent, DOMAIN)

    def plan_second_look(self, experiment: Experiment) -> None:
        """One fresh run of the candidate, and of its base where that has too few beside it."""
        looks = len(experiment.scores(experiment.commit)) - 1
        of_base = self.store.fresh_scores(experiment.base) + experiment.scores(experiment.base)
        missing = max(0, ledger.CHAMPION_RUNS[looks] - len(of_base))
        seed = fresh_seed()
        description = f"{experiment.description} (seed {seed})"
        self.planned.append(PlannedRun(experiment, "second look", description, seed, experiment.commit))
        for _ in range(missing):
            description = f"champion once more, beside: {experiment.description}"
            self.planned.append(PlannedRun(experiment, "second look", description, fresh_seed(), experiment.base))
        experiment.outstanding = 1 + missing
        say(f"  {experiment.description}: a gain so far, {experiment.outstanding} more to confirm it")

    def record(self, experiment: Experiment, verdict: str) -> None:
        """Append all rows of the experiment in one write; a kept commit is the champion from now on."""
        runs = sorted(experiment.runs, key=run_number)
        of_base = [run for run in runs if run.commit != experiment.commit]
        of_candidate = [run for run in runs if run.commit == experiment.commit]
        former = self.store.champion
        verdict_on_base = "keep" if experiment.base == former else "discard"  # the last `keep` row is the champion
        rows = [self.close_run(run, verdict_on_base) for run in of_base]
        rows += [self.close_run(run, verdict) for run in of_candidate]
        self.store.append(rows)
        self.decided.append(experiment)
        for run in of_candidate:
            if run.decision != "crash":
                say(f"  run {run.number:04d} {verdict}: {compare(run, base_run(self.store, run), DOMAIN)}")
            for weakness in run.marks:
                say(f"    {weakness}")
        if verdict == "stale":
            first = of_candidate[0].number
            again = Proposal(experiment.source, experiment.base, experiment.description, again_of=first)
            self.waiting.appendleft(again)
        if verdict == "keep":
            self.move_champion(former)
            self.baseline_values = find_baseline_values(self.store)
        self.store.publish(self.repository.checkout)
        self.inform_watch(experiment, verdict, former)

    def inform_watch(self, experiment: Experiment, verdict: str, former: str) -> None:
        """Let --patience, --target and --notify know of a verdict. A stale gain is run again, and counts then."""
        if experiment.purpose == "experiment" and verdict == "keep":
            first = min(run.number for run in experiment.runs)
            self.watch.take_keep(experiment.commit, former, first, experiment.description)
        elif experiment.purpose == "experiment" and verdict != "stale":
            self.watch.take_no_keep()
        self.watch.look_for_target()

    def close_run(self, run: Run, verdict: str) -> Row:
        """Write the verdict to a run's folder; return its row."""
        if run.decision == "crash":
            self.store.write_run(run)
            return Row(run.commit[:7], 0.0, 0.0, "crash", run.description)
        decision = "discard" if verdict == "crash" else verdict  # a run beside the one that crashed
        self.store.write_run(replace(run, decision=decision))
        description = run.description
        if decision == "stale":
            description = f"{one_line(description, 200 - len(STALE) - 2)}; {STALE}"
        status = "discard" if decision == "stale" else decision
        return Row(run.commit[:7], run.score, run.memory_gb, status, description)

    def move_champion(self, former: str) -> None:
        """Branch, checkout and idle desks follow the champion."""
        if self.options.workers > 1:
            self.store.move_branch(former)
        if self.proposers:
            self.proposers.clear_idle()

    # What goes before every candidate

    def plan_baseline(self) -> None:
        """The baseline, where the ledger has none; with --confirm, until it has run often enough."""
        done = len(self.store.scores(self.store.baseline))
        wanted = BASELINE_RUNS if self.options.confirm and len(self.store.rows) == done else 1
        if done >= wanted:
            return
        commit = self.store.baseline
        experiment = Experiment("baseline", "baseline", base="", commit=commit, outstanding=wanted - done)
        for index in range(done, wanted):
            is_first = index == 0
            seed = FIRST_SEED if is_first else fresh_seed()
            description = "baseline" if is_first else f"baseline (seed {seed})"
            number = min(self.store.attempts) if is_first else 0
            self.planned.append(PlannedRun(experiment, "baseline", description, seed, commit, number))

    def plan_again(self, commit: str) -> None:
        """A commit of an earlier run once more, on a fresh seed: a row of its own, beside those that it has.

        An attempt is compared with its own base, as ever. The champion is only measured: then later candidates are
        compared with a better known score. A former champion takes the title back where it is believed better.
        """
        seed = fresh_seed()
        description = one_line(self.store.description(commit), 160)
        bases = [run.base for run in self.store.runs_of(commit) if run.base]
        was_champion = any(row.commit == commit[:7] and row.status == "keep" for row in self.store.rows)
        if was_champion or not bases:
            experiment = Experiment(description, "repeat", base="", commit=commit, outstanding=1)
        else:
            source = self.repository.read(commit, EDITABLE)
            experiment = Experiment(description, "experiment", base=bases[0], commit=commit, source=source)
            experiment.outstanding = 1
        of_run = f"{description} (again, seed {seed})"
        self.planned.append(PlannedRun(experiment, experiment.purpose, of_run, seed, commit))

    def plan_stale_gains(self) -> None:
        """Gains on former champions that a session which was stopped did not run again."""
        if self.proposers is None:
            return  # `try` measures one edit, and tells the verdict on that
        for run in stale_gains(self.store):
            source = self.repository.read(run.commit, EDITABLE)
            self.waiting.append(Proposal(source, run.base, run.description, again_of=run.number))

    def audit(self, replicates: int) -> list[Audited]:
        """Baseline and champion, alternating, on fresh seeds; the baseline alone where nothing was kept."""
        commits = {"baseline": self.store.baseline}
        if self.store.champion != self.store.baseline:
            commits["champion"] = self.store.champion
        for _ in range(replicates):
            seed = fresh_seed()
            for name, commit in commits.items():
                description = f"audit of the {name} {commit[:7]}, seed {seed}"
                experiment = Experiment(description, "audit", base="", commit=commit, outstanding=1)
                self.planned.append(PlannedRun(experiment, "audit", description, seed, commit))
        with contextlib.suppress(StopNow):  # the seeds that were done are told all the same
            while self.flying or self.planned:
                self.launch()
                self.settle()
        rounds = len(self.decided) // len(commits)
        if not rounds:
            raise StopNow
        if rounds < replicates:
            say(f"stopped after {rounds} of {replicates} seeds")
        return [self.audited(experiment) for experiment in self.decided[: rounds * len(commits)]]

    def audited(self, experiment: Experiment) -> Audited:
        role = "baseline" if experiment.commit == self.store.baseline else "champion"
        measurement = experiment.measurements[0]
        clean_score, clean_test_score = measurement.rescored or (None, None)
        was_exported = measurement.record.exported is not None
        steps, pace = mean_pace(self.store, experiment.runs)
        return Audited(
            name=f"{role} {experiment.commit[:7]}",
            score=measurement.record.score,
            test_score=measurement.record.test_score,
            clean_score=clean_score,
            clean_test_score=clean_test_score,
            problem=measurement.rescore_problem,
            was_refused=was_exported and bool(DOMAIN.score_command) and measurement.rescored is None,
            believed=self.store.estimate(experiment.commit),
            device=self.facts.device,
            steps=steps,
            pace=pace,
        )

    # What a person sees

    def progress(self) -> str:
        """` (3 of 10, ~20 min left)`, the present run included; "" for a session without an end."""
        total = self.options.max_experiments
        if total == math.inf:
            return ""
        runs_left = total - self.begun + len(self.flying) + 1
        seconds_left = runs_left * self.usual_seconds / max(1, self.fleet.capacity)
        return f" ({self.begun} of {total}, ~{duration(seconds_left)} left)"

    def live_line(self) -> str:
        """`best 1.234567 | run 0012 8 s of ~40 s | 1 proposing | the last line of its log`."""
        best = self.store.estimate(self.store.champion)
        parts = ["no score yet" if best is None else f"best {best:.6f}"]
        ages = {planned.number: time.monotonic() - planned.started_at for planned in self.flying.values()}
        if len(ages) > LIVE_RUNS:
            nodes = {planned.place for planned in self.flying.values()}
            where = f" on {len(nodes)} nodes" if len(nodes) > 1 else ""
            oldest = f"the longest {max(ages.values()):.0f} s of ~{duration(self.usual_seconds)}"
            parts.append(f"{len(ages)} runs{where}, {oldest}")
        else:
            for number, seconds in ages.items():
                parts.append(f"run {number:04d} {seconds:.0f} s of ~{duration(self.usual_seconds)}")
        if self.proposers and self.proposers.asked:
            parts.append(f"{len(self.proposers.asked)} proposing")
        if len(self.flying) == 1:
            number = next(iter(self.flying.values())).number
            parts.append(one_line(read_tail(self.store.folder(number) / "run.log", 1)))
        return " | ".join(parts)


def run_number(run: Run) -> int:
    return run.number


def fresh_seed() -> int:
    """A seed that no edit can foresee."""
    return secrets.randbelow(10**9)


def unified(old: bytes, new: bytes) -> str:
    """The unified diff of two texts."""
    lines = [text.decode(errors="replace").splitlines(keepends=True) for text in (old, new)]
    return "".join(difflib.unified_diff(*lines, "before", "after"))


# ---------------------------------------------------------------------------------------------------------------------
# A session, put together from its rooms


def open_session(
    store: Store, options: Options, interrupts: Interrupts, agent: Agent | None = None, keep_edit: bool = False
) -> Ratchet:
    """Put right what an earlier session left, and make the session's rooms. Without an agent nobody is asked."""
    in_checkout = options.workers == 1
    if keep_edit:
        use = Use.EDITED
    elif agent is None:
        use = Use.UNTOUCHED
    else:
        use = Use.DESK if in_checkout else Use.SHOWN
    facts = open_tag(store, use, interrupts.were_sent)
    if options.ahead is None:
        options = replace(options, ahead=1 if facts.device == "cuda" else 0)
    fleet = open_fleet(store, facts, options, interrupts)
    proposers = None
    if agent is not None:
        desks = make_desks(store, in_checkout, options.workers)
        proposers = Proposers(
            store, desks, agent, facts.profile, options.agent_timeout, options.max_usd, interrupts.stop
        )
    say(f"{store.branch}: profile {facts.profile} ({facts.reason}), {facts.device_name}, {facts.time_budget:g} s a run")
    store.note("session")
    return Ratchet(store, facts, fleet, proposers, options, interrupts)


def open_fleet(store: Store, facts: Description, options: Options, interrupts: Interrupts) -> LocalFleet | RayFleet:
    """Where the runs are made: with one worker in this process, with more on Ray."""
    packages = check_packages(store)
    data = check_data(store, facts)
    if options.ray != OFF and (options.workers > 1 or options.ray):
        return RayFleet(store, facts, options.workers, options.ray, process_mark(store, "run"))
    devices = list(facts.devices)[: options.workers]
    if len(devices) < options.workers:
        say(f"note: {options.workers} workers, {len(devices)} device here: {len(devices)} run at a time")
    return LocalFleet(store, devices, process_mark(store, "run"), packages, data, interrupts.stop)


def make_desks(store: Store, in_checkout: bool, workers: int) -> list[Desk]:
    """With one worker the desk is the checkout; with more, every proposer has a worktree of its own."""
    mark = process_mark(store, "agent")
    if in_checkout:
        return [Desk(store.repository, store.repository.checkout, store.home, mark, store.branch)]
    desks = []
    for number in range(1, workers + 1):
        place = store.desks / f"{number}" / store.repository.checkout.name
        store.repository.add_worktree(place, store.champion)
        store.publish(place)
        desks.append(Desk(store.repository, place, place.parent, f"{mark}:{number}"))
    return desks


if __name__ == "__main__":
    sys.exit(commands.main(DOMAIN, Path(__file__).resolve().parent, open_session))
