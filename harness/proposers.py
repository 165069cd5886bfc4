"""The desks together: who is asked, what came back, and the gate that an edit must pass before any device time.

Agents run in threads of their own; everything here is called by the one deciding thread.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from harness import environment
from harness.agents import Agent
from harness.desk import Assignment, Desk, NoProposal, Proposal, compile_problem
from harness.files import read_text
from harness.prompt import Background, write_prompt
from harness.screen import duration, say
from harness.store import Store
from harness.verdict import discarded_when_busy, latest_verdicts, read_beliefs

FIRST_BACKOFF = 5  # seconds to wait after a failed proposal; doubles
LAST_BACKOFF = 600  # seconds, the longest wait
OFFERS = 3  # of an assignment to agents that fail; it is offered once more when an agent has worked without it


class Proposers:
    """Desks, the agents at work on them, and what the next one is to be told."""

    def __init__(
        self,
        store: Store,
        desks: list[Desk],
        agent: Agent,
        profile: str,
        limit: float,
        max_usd: float,
        stop: threading.Event,
    ):
        self.asked: dict[Future, Desk] = {}
        self.assignments: deque[Assignment] = deque()  # crashes and conflicts, each for one agent that works
        self.failing_since: float | None = None  # time.monotonic() of the first call in a row that gave no proposal
        self._store = store
        self._desks = desks
        self._given: dict[Future, Assignment] = {}
        self._has_unknown_cost = False  # and a person was told
        self._agent = agent
        self._variables = environment.variables_for_agent(profile)
        self._limit = limit
        self._max_usd = max_usd
        self._spent_usd = 0.0  # by the calls that said what they cost
        self._stop = stop
        self._threads = ThreadPoolExecutor(max(1, len(desks)), "agent")
        self._failures = 0  # in a row
        self._not_before = 0.0  # time.monotonic()
        self._refusal = ""  # why the last edit was refused

    def have_spent_all(self) -> bool:
        """Whether the agents have cost as much as they may: nothing more is to be asked for."""
        return self._spent_usd >= self._max_usd

    def ask(self, running: Iterable[str]) -> bool:
        """Ask an idle desk for a proposal; False if none is idle, or the agents are given a rest."""
        busy = set(self.asked.values())
        idle = [desk for desk in self._desks if desk not in busy]
        if not idle or time.monotonic() < self._not_before:
            return False
        desk = idle[0]
        champion = self._store.champion
        start = self._store.repository.read(champion, self._store.domain.editable)
        assignment = self._next_assignment() or Assignment(champion, start)
        instructions = self._instructions()
        text = write_prompt(
            instructions,
            self._store.rows,
            self._background(),
            running,
            self._refusal,
            assignment.text,
            self._store.domain,
        )
        desk.lay_out(champion, assignment, text)
        self._refusal = ""
        future = self._threads.submit(desk.ask, self._agent, assignment, self._variables, self._limit, self._stop)
        self.asked[future] = desk
        self._given[future] = assignment
        return True

    def _next_assignment(self) -> Assignment | None:
        """Take a crash or a conflict, if one waits; None: the agent starts from the champion's file."""
        if not self.assignments:
            return None
        if self._failures and self.assignments[0].failures >= OFFERS:
            return None  # first see whether agents fail without it too
        return self.assignments.popleft()

    def _background(self) -> Background:
        store = self._store
        beliefs = read_beliefs(store)
        merged = {run.commit[:7] for run in store.read_runs() if run.decision == "stale"}
        return Background(beliefs.sigma, discarded_when_busy(store), merged, latest_verdicts(store, beliefs))

    def _put_back(self, assignment: Assignment) -> None:
        """Let the next agent have an assignment whose agent failed, unless the assignment may be why agents fail."""
        if assignment.text and assignment.failures < OFFERS:
            self.assignments.appendleft(replace(assignment, failures=assignment.failures + 1))

    def _instructions(self) -> str:
        """The human's file, from the checkout: an edit counts from the next proposal on."""
        name = self._store.domain.instructions
        text = read_text(self._store.repository.checkout / name)
        if text:
            return text
        return self._store.repository.read(self._store.champion, name).decode(errors="replace")

    def take(self, future: Future, pending: set[bytes]) -> Proposal | None:
        """What an agent came back with, if it passes the gate. `pending`: edits that wait or run already."""
        desk = self.asked.pop(future)
        assignment = self._given.pop(future)
        answer = future.result()
        self._note_cost(answer)
        desk.clear(self._store.champion)
        if isinstance(answer, Proposal):
            problem = find_problem(self._store, answer.source, pending)
            if not problem:
                self._failures = 0
                self.failing_since = None
                return answer
            answer = NoProposal(problem, is_refusal=True)
        if self._stop.is_set():
            return None
        if answer.is_failure:
            self._put_back(assignment)
        self._refuse(answer, desk)
        return None

    def _note_cost(self, answer: Proposal | NoProposal) -> None:
        """Write to the timeline what a call cost, also one that gave no proposal."""
        description = answer.description if isinstance(answer, Proposal) else f"no proposal: {answer.reason}"
        self._store.note("proposal", description=description, cost=answer.cost)
        if answer.cost.usd is not None:
            self._spent_usd += answer.cost.usd
        elif self._max_usd < math.inf and not self._has_unknown_cost:
            say(f"note: this agent did not say what a call cost: --max-usd {self._max_usd:g} cannot count it")
            self._has_unknown_cost = True

    def _refuse(self, answer: NoProposal, desk: Desk) -> None:
        """Say why there is no proposal, and let the agents rest: longer for every failure in a row."""
        if self.failing_since is None:
            self.failing_since = time.monotonic()
        # Agents that work side by side fail together, of a rate limit say: that is one failure.
        is_resting = time.monotonic() < self._not_before
        if not is_resting:
            delay = min(LAST_BACKOFF, FIRST_BACKOFF * 2 ** min(self._failures, 20))
            self._failures += 1
            self._not_before = time.monotonic() + delay
        if answer.is_refusal:
            self.remember_refusal(answer.reason)
        rest = max(0.0, self._not_before - time.monotonic())
        say(f"no proposal: {answer.reason}; again in {duration(rest)} ({desk.log})")

    def remember_refusal(self, refusal: str) -> None:
        """Tell the next agent why an edit was refused, or dropped although it had passed the gate."""
        self._refusal = refusal

    def clear_idle(self) -> None:
        """Put the desks at which no agent works to the champion."""
        busy = set(self.asked.values())
        for desk in self._desks:
            if desk not in busy:
                desk.clear(self._store.champion)
                self._store.publish(desk.place)

    def close(self) -> None:
        """Wait for the agents, which the event `stop` ends, and clear every desk."""
        self._threads.shutdown(cancel_futures=True)
        for future in self.asked:
            if not future.cancelled() and future.exception() is None:
                self._note_cost(future.result())
        self.asked.clear()
        self._given.clear()
        self.clear_idle()


def find_problem(store: Store, source: bytes, pending: set[bytes] = frozenset()) -> str:
    """The gate: why an edit is not worth a run, "" if it is. It must compile, and must not have been measured."""
    name = store.domain.editable
    if problem := compile_problem(source, name):
        return problem
    if source == store.repository.read(store.champion, name):
        return f"{name} is the champion's"
    if source in pending:
        return f"{name} repeats an experiment that waits or runs now"
    blob = store.repository.hash_of_data(source)
    if row := store.find_attempt(blob):
        return f"{name} repeats {row.commit} ({row.status}: {row.description})"
    return ""
