"""A session on a tag: what an earlier one left, workers, a person's signals. No verdicts: those are loop.py's.

The main thread supervises: it heeds signals, tells `status` what runs, and refreshes the page. Every worker is a thread
with a worktree of its own: it asks its agent for an edit and takes that through the ratchet (loop.py), again and again.
"""

import json
import math
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from harness import compare, isolation, knob_search, machine, prompt
from harness.agents import Agent, Cost, NoProposal, Worktree, rest_seconds
from harness.console import Interrupts, StopNow, UserError, duration, is_terminal, listed, say, show_live_line
from harness.domain import Description
from harness.edit import Dropped, Edit
from harness.files import read_tail, read_text, remove_folder
from harness.ledger import Run
from harness.page import PageWriter
from harness.processes import run_child, sweep
from harness.replicates import run_baseline
from harness.runner import LocalRunner, Runner, Stopped, unpack
from harness.tag import Tag
from harness.watch import Watch

POLL_SECONDS = 0.2  # between looks of the main thread
LIVE_SECONDS = 1.0  # between writings of what `status` reads
APPROVAL_SECONDS = 7 * 86400  # that --approve may take: a human may be at the weekend
LATEST_VERDICTS = 3  # that an agent is told
CRASH_LINES = 50  # of a log, for the agent that mends it
MOST_REFUSALS = 3  # in a row, of a session whose agents have proposed nothing yet
OFFERS = 2  # of a crash to mend, to an agent that fails or does nothing with it


@dataclass(frozen=True)
class Options:
    """What a person chose for a session, by flags; the defaults are those of `try` and `audit`."""

    workers: int = 1
    ray: str | None = None  # address of a Ray cluster; None: this machine
    ahead: int | None = None  # workers more than devices, which propose meanwhile; None: as many on CUDA, else 0
    confirm: int = 0
    max_experiments: float = math.inf
    hours: float = math.inf  # that the session may last
    agent_timeout: float = 1800  # seconds that a proposal may take
    max_usd: float = math.inf  # that the agents of this session may cost
    patience: float = math.inf  # experiments without a keep
    target: float | None = None  # score that is enough
    notify: str | None = None  # a shell command that tells a person
    suggest: str | None = None  # "tpe": its next three suggestions are in an agent's prompt


# ---------------------------------------------------------------------------------------------------------------------
# The opening: what a killed loop, an agent or a person left behind


def open_session(tag: Tag, is_stopped, edits_checkout: bool = False) -> Description:
    """Make refs, checkout and data as the next run needs them; return what the evaluator says of itself.

    Under the tag's lock. `edits_checkout`: the checkout holds an edit that is to be measured. UserError for what only
    a person can mend.
    """
    for left in ("run", "agent", "approve"):
        sweep(f"{tag.mark}:{left}")
    remove_folder(tag.home / "scratch")
    tag.clear_live()  # a killed loop's
    facts = _describe(tag, is_stopped)
    first = tag.ledger.baseline_run
    if first is None:
        _begin_branch(tag, edits_checkout)
        return facts
    for key in ("profile", "digest", "device_name"):
        had = first.record.get(key)
        found = getattr(facts, key)
        if had != found:
            remedy = "set AUTORESEARCH_PROFILE and AUTORESEARCH_CACHE as they were, or choose another --tag"
            if key == "device_name":
                remedy = "make that device free and visible (CUDA_VISIBLE_DEVICES), or choose another --tag"
            raise UserError(f"tag {tag.name} was begun with {key} {had!r:.50}, this is {found!r:.50}: {remedy}", 2)
    if machine.changed_packages(first.packages):
        machine.restore_packages(first.packages)
    tag.show_champion()
    tag.publish()
    return facts


def _begin_branch(tag: Tag, edits_checkout: bool) -> None:
    """On a tag's first start the checkout is clean, the branch is free, and the checkout shows it from now on."""
    repository = tag.repository
    head = repository.head()
    changed = repository.changed_files(tag.checkout, head)
    if edits_checkout:
        changed = [name for name in changed if name != tag.domain.editable]
    if changed:
        remedy = "commit them or run 'git stash', then start again"
        raise UserError(f"{listed(changed)} has uncommitted changes: {remedy}", 2)
    tip = repository.commit_of(f"refs/heads/{tag.branch}")
    if tip and tip != head:
        raise UserError(f"branch {tag.branch} exists, at {tip[:7]}: check it out, or choose another --tag", 2)
    repository("update-ref", f"refs/heads/{tag.branch}", head)
    repository("symbolic-ref", "HEAD", f"refs/heads/{tag.branch}")


def _describe(tag: Tag, is_stopped) -> Description:
    """What the champion's evaluator says of profile, budget, data and devices. Missing data is prepared first."""
    with tempfile.TemporaryDirectory(prefix="autoresearch-describe-") as folder:
        tree = Path(folder, "tree")
        unpack(tag.repository.archive(tag.champion), tree)
        variables = machine.variables_for_training()
        facts = machine.describe(tag.domain, tree, variables)
        if is_stopped():
            raise StopNow
        if not facts.prepared and tag.domain.prepare_command:
            say(f"profile {facts.profile} ({facts.reason}) has no data yet: preparing it in {facts.cache}")
            # With the person's keys: this is the evaluator's own work, no candidate's.
            machine.prepare_data(tag.domain, tree, machine.variables_for_agent(facts.profile), is_stopped)
            facts = machine.describe(tag.domain, tree, variables)
        machine.try_isolation(tag.domain, tree, variables, facts)
    why = isolation.problem()
    if why and why != isolation.OFF:
        say(f"note: runs are not isolated ({why})")
    if is_stopped():
        raise StopNow
    if not facts.prepared:
        raise UserError(f"the preparation failed: {facts.problem}")
    return facts


def make_runner(tag: Tag, facts: Description, options: Options, interrupts: Interrupts) -> Runner:
    """Where runs are made: on the devices here or, with Ray, of a cluster."""
    if options.ray is not None:
        from harness.ray_runner import RayRunner

        return RayRunner(tag, facts, options.workers, options.ray, interrupts.stop)
    return LocalRunner(tag, facts, options.workers, interrupts.stop)


# ---------------------------------------------------------------------------------------------------------------------
# The session


class Session:
    """Supervises a ratchet: with an agent all night, or for one command."""

    def __init__(self, tag: Tag, facts: Description, ratchet: type, options: Options, interrupts: Interrupts):
        self.tag = tag
        self.domain = tag.domain
        self.facts = facts
        self.runner = make_runner(tag, facts, options, interrupts)
        self.ratchet = ratchet(tag, facts, self.runner, options.confirm)
        self.options = options
        self.interrupts = interrupts
        self.began_at = time.time()
        self.watch = Watch(self.tag, options.patience, options.target, options.notify)
        self.page = PageWriter(self.tag)
        self.no_more = threading.Event()  # ends what agents do: nothing new begins
        self.begun = 0  # experiments that took one of --max-experiments
        self.decided = 0  # of these
        self.spent_usd = 0.0
        self.dearest_usd = 0.0  # of its agents' calls, as far as they told it
        self.has_proposed = False  # an agent of this session has
        self.rate_limited_until = 0.0  # time.monotonic(), for all workers
        self.waiting_for = ""  # a proposal, as a person was last told
        self.waiting_since = 0.0
        self.doing: dict[str, dict] = {}  # thread -> what it does
        self.failure: BaseException | None = None
        self.pending: deque[Run] = deque()  # gains of an earlier session that wait for approval,
        self.again: deque[Run] = deque()  # and stale ones
        self.ratchet.on_decided = self._on_decided
        self.ratchet.on_training = self._on_training
        self.ratchet.approve = self._ask_approval
        self.runner.is_stopping = self.is_stopping

    def is_stopping(self) -> bool:
        """Whether no new experiment may begin."""
        is_late = time.time() - self.began_at > 3600 * self.options.hours
        return bool(self.watch.enough) or self.interrupts.is_stopping or is_late or self.failure is not None

    def why_ended(self) -> str:
        if self.failure is not None:
            return "an error; what the loop printed last says which"
        if self.watch.enough:
            return self.watch.enough
        if self.interrupts.is_stopping:
            return "stopped by request"
        if self.spent_usd >= self.options.max_usd:
            return f"--max-usd {self.options.max_usd:g} is spent"
        if self.is_stopping():
            return f"--hours {self.options.hours:g} are over"
        return "all experiments are done"

    # The main thread

    def supervise(self, work: dict) -> None:
        """Run functions in threads of their own, by name, until all have ended. Raises StopNow, or what one raised."""
        threads = []
        for name, function in work.items():
            thread = threading.Thread(target=self._guarded, args=(function,), name=name, daemon=True)
            thread.start()
            threads.append(thread)
        wrote_live_at = 0.0
        while threads := [thread for thread in threads if thread.is_alive()]:
            try:
                self.interrupts.heed()
            except StopNow:
                self.no_more.set()
                for thread in threads:
                    thread.join(30)
                raise
            if self.is_stopping():
                self.no_more.set()
            if time.monotonic() - wrote_live_at > LIVE_SECONDS:
                wrote_live_at = time.monotonic()
                self._tell_state()
            threads[0].join(POLL_SECONDS)
        if self.failure is not None:
            raise self.failure

    def _guarded(self, function) -> None:
        try:
            function()
        except Stopped:
            pass
        except BaseException as error:
            self.failure = self.failure or error
            self.interrupts.stop.set()
        finally:
            self.doing.pop(threading.current_thread().name, None)

    def call(self, function):
        """What a function returns that runs in a thread of its own. Raises StopNow where the session ended before."""
        results = []
        self.supervise({"work": lambda: results.append(function())})
        if not results:
            raise StopNow
        return results[0]

    def close(self) -> None:
        """End what runs; the page and a person hear that it is over."""
        self.no_more.set()
        self.interrupts.stop.set()
        self.runner.close()
        self.tag.clear_live()
        self.page.close()
        self.watch.close(self.why_ended())

    def _tell_state(self) -> None:
        waiting = self.runner.waiting or self.waiting_for
        since = self.runner.waiting_since if self.runner.waiting else self.waiting_since
        self.watch.look_for_wait(waiting, since)
        self.page.refresh()
        runs = self.tag.ledger.rows[-1:]
        usual = runs[0].seconds if runs else self.facts.time_budget
        self.tag.write_live(
            {
                "since": self.began_at,
                "waiting": waiting,
                "devices": len(self.runner.devices),
                "usual_seconds": usual,
                "others": runs[0].busy_others if runs else None,
                "workers": list(self.doing.values()),
            }
        )
        if is_terminal():
            show_live_line(self._live_line(usual))

    def _live_line(self, usual: float) -> str:
        """`best 1.234567 | run 0012 8 s of ~40 s | 1 proposing`."""
        best = self.tag.ledger.best
        parts = ["no score yet" if best is None else f"best {self.domain.score_text(best)}"]
        workers = list(self.doing.values())
        for worker in workers:
            if worker["doing"] == "training":
                parts.append(f"run {worker['run']:04d} {time.time() - worker['since']:.0f} s of ~{duration(usual)}")
        if proposing := sum(worker["doing"] == "proposing" for worker in workers):
            parts.append(f"{proposing} proposing")
        return " | ".join(parts)

    # What the ratchet tells

    def _set_doing(self, doing: str, run: int = 0, description: str = "") -> None:
        """What this thread does from now on, as `status` reads it."""
        state = {"doing": doing, "run": run, "description": description, "since": time.time()}
        self.doing[threading.current_thread().name] = state

    def _on_training(self, run: Run) -> None:
        idea = self.doing.get(threading.current_thread().name, {}).get("description")
        is_repeat = run.purpose == "replicate" and idea  # of the idea that this worker confirms
        self._set_doing("training", run.number, idea if is_repeat else run.description)

    def _on_decided(self, run: Run) -> None:
        self.doing.pop(threading.current_thread().name, None)
        if run.is_stale:
            self._set_doing("waiting for a device", description=run.description)
        self.watch.see(run)
        is_verdict = run.purpose == "experiment" and not run.is_stale and run.is_decided
        if is_verdict and self.options.max_experiments < math.inf:
            self.decided += 1
            left = self.options.max_experiments - self.decided
            pace = (time.time() - self.began_at) / self.decided
            if left > 0:
                say(f"  {self.decided} of {self.options.max_experiments:g}, ~{duration(left * pace)} left")

    def _ask_approval(self, run: Run) -> bool:
        """Whether the command of --approve exits 0. It gets the run as JSON on standard input, and the diff's path."""
        self._set_doing("waiting for approval", run.number, run.description)
        folder = self.tag.folder(run.number)
        question = folder / "approve.json"
        values = {key: value for key, value in vars(run).items() if value not in (None, "", (), {})}
        question.write_text(json.dumps(values | {"diff": str(folder / "change.diff")}))
        ending = run_child(
            ["sh", "-c", self.domain.approve],
            cwd=self.tag.checkout,
            env=machine.variables_for_agent(self.facts.profile) | {"AUTORESEARCH_DIFF": str(folder / "change.diff")},
            mark=f"{self.tag.mark}:approve:{run.number}",
            log=folder / "approve.log",
            limit=APPROVAL_SECONDS,
            stop=self.no_more,
            stdin=question,
        )
        if ending.problem == "stopped":
            raise Stopped
        if ending.problem:
            say(f"  run {run.number:04d} is not approved: {ending.problem}: {read_tail(folder / 'approve.log', 1)}")
        return not ending.problem

    # All night

    def run(self, agent: Agent) -> None:
        """Baseline, what an earlier session left open, then experiments until it is enough."""
        self.watch.look_for_target()
        self.supervise({"opening": self._open})
        self.again = deque(self.tag.ledger.stale_gains())
        ahead = self.options.ahead
        if ahead is None:
            ahead = self.options.workers if self.facts.device == "cuda" else 0
        wanted = max(self.options.max_experiments, len(self.pending) + len(self.again))
        count = int(min(self.options.workers + ahead, wanted))
        worktrees = [Worktree(self.tag, number) for number in range(1, count + 1)]
        work = {f"worker {n}": lambda w=worktree: self._work(agent, w) for n, worktree in enumerate(worktrees, 1)}
        try:
            self.supervise(work)
        finally:
            for worktree in worktrees:
                self.tag.repository.remove_worktree(worktree.folder)

    def _open(self) -> None:
        run_baseline(self.ratchet)
        self.pending = deque(self.tag.ledger.pending())
        if self.pending and not self.domain.approve:
            problem = f"run {self.pending[0].number} waits for approval, and nobody is there to give it"
            raise UserError(f"{problem}: start with the same --approve CMD as before", 2)

    def _work(self, agent: Agent, worktree: Worktree) -> None:
        """A worker: one experiment after another. A crash is given to the next proposal, to be mended, once."""
        crash: Run | None = None
        refusal = ""
        cost = Cost()  # of the agent's calls since its last run
        failures = refusals = 0  # of these in a row
        while run := self._next_of(self.pending):
            run = self.ratchet.ask_approval(run)
            if run.is_stale:
                self.again.append(run)
        while run := self._next_of(self.again):
            self._take_through(Edit(self.tag.source(run.commit), run.base, run.description, again_of=run.number))
        while self._begin():
            answer = self._propose(agent, worktree, crash, refusal)
            cost = cost + worktree.cost
            if isinstance(answer, NoProposal):
                with self.ratchet.lock:
                    self.begun -= 1
                refusal = answer.reason if answer.kind in ("bad edit", "unchanged") else ""
                failures += 1
                refusals = refusals + 1 if answer.kind == "hopeless" else 0
                if answer.kind == "bad edit" or failures >= OFFERS:
                    crash = None
                if refusals and not self.has_proposed and (refusals == MOST_REFUSALS or not agent.has_model):
                    raise UserError(f"the agent was refused: {answer.reason}")
                self._rest(answer, failures, worktree)
                continue
            failures = refusals = 0
            self.has_proposed = True
            self.waiting_for = ""
            run, refusal = self._take_through(replace(answer, cost=cost.as_dict()))
            if run is not None:
                cost = Cost()
            is_new_crash = crash is None and run is not None and run.status == "crash"
            crash = run if is_new_crash else None  # a mend that crashes too ends it: else it goes on for ever

    def _begin(self) -> bool:
        """Take one of --max-experiments; False where nothing more is to begin."""
        with self.ratchet.lock:
            may_begin = self._may_begin()
            self.begun += may_begin
            return may_begin

    def _may_begin(self) -> bool:
        is_spent = self.spent_usd >= self.options.max_usd or self.begun >= self.options.max_experiments
        return not (is_spent or self.is_stopping())

    def _next_of(self, left: deque) -> Run | None:
        """A gain that an earlier session left; it counts as no new experiment."""
        with self.ratchet.lock:
            return left.popleft() if left and not self.is_stopping() else None

    def _propose(self, agent: Agent, worktree: Worktree, crash: Run | None, refusal: str) -> Edit | NoProposal:
        """An edit by the agent, or why there is none."""
        self._set_doing("proposing")
        suggestions = knob_search.suggest(self.tag, self.facts.profile) if self.options.suggest else []
        with self.ratchet.lock:
            base = crash.base if crash else self.tag.champion
            start = self.tag.source(crash.commit if crash else base)
            text = self._prompt(crash, refusal, suggestions)
        env = machine.variables_for_agent(self.facts.profile)
        answer = worktree.propose(agent, base, start, text, env, self.options.agent_timeout, self.no_more)
        if self.no_more.is_set() and isinstance(answer, NoProposal):
            raise Stopped
        with self.ratchet.lock:
            usd = worktree.cost.usd or 0.0
            if worktree.cost.usd is None and worktree.was_cut_off:  # it may have cost as much as any
                usd = self.dearest_usd
            self.dearest_usd = max(self.dearest_usd, usd)
            self.spent_usd += usd
            answer = self._check_packages(answer)
        if isinstance(answer, NoProposal):
            return answer
        if answer.touched:
            say(f"note: the agent also changed {', '.join(answer.touched)}: undone")
        problem = self.ratchet.find_problem(answer.source) if base == self.tag.champion else ""
        return NoProposal(problem, "bad edit") if problem else answer

    def _check_packages(self, answer: Edit | NoProposal) -> Edit | NoProposal:
        """The environment is put back where an agent installed something, and its edit is refused. Whose it was is not
        known where several work: an edit that needs it crashes."""
        first = self.tag.ledger.baseline_run
        changes = machine.changed_packages(first.packages)
        if not changes:
            return answer
        machine.restore_packages(first.packages)
        reason = f"no new dependency is allowed, and {', '.join(changes[:3])} was installed: put back"
        if sum(one["doing"] == "proposing" for one in list(self.doing.values())) > 1:
            say(f"note: {reason}")
            return answer
        return NoProposal(reason, "bad edit")

    def _prompt(self, crash: Run | None, refusal: str, suggestions: list[str]) -> str:
        name = self.domain.instructions
        instructions = read_text(self.tag.checkout / name)  # the person's: an edit counts from now on
        if not instructions:
            instructions = self.tag.repository.read(self.tag.champion, name).decode(errors="replace")
        ledger = self.tag.ledger
        latest = [run for run in ledger.rows if run.purpose == "experiment"][-LATEST_VERDICTS:]
        verdicts = [compare.verdict(ledger, run) for run in latest]
        running = [one["description"] for one in list(self.doing.values()) if one["description"]]
        crash_log = read_tail(self.tag.folder(crash.number) / "run.log", CRASH_LINES) if crash else ""
        return prompt.write_prompt(
            instructions, ledger, running, verdicts, refusal, crash_log, suggestions, self.tag.source
        )

    def _rest(self, no_proposal: NoProposal, failures: int, worktree: Worktree) -> None:
        """Say why there is no proposal, and let this worker rest: longer for every failure in a row."""
        seconds = rest_seconds(no_proposal.kind, failures)
        if no_proposal.kind == "rate limit":
            self.rate_limited_until = time.monotonic() + seconds
        if not self.waiting_for:
            self.waiting_since = time.time()
        self.waiting_for = f"no proposal: {no_proposal.reason}"
        say(f"no proposal: {no_proposal.reason}; again in {duration(seconds)} ({worktree.log})")
        until = time.monotonic() + seconds
        while time.monotonic() < max(until, self.rate_limited_until) and self._may_begin():
            self.no_more.wait(POLL_SECONDS)

    def _take_through(self, edit: Edit) -> tuple[Run | None, str]:
        """An edit through the ratchet: its run, or None and why it was dropped."""
        self._set_doing("waiting for a device", description=edit.description)
        try:
            return self.ratchet.experiment(edit), ""
        except Stopped:
            say(f"not decided: {edit.description}: the loop stops before")
            raise
        except Dropped as dropped:
            say(f"dropped: {edit.description}: {dropped}")
            with self.ratchet.lock:
                self.begun -= 1
            return None, str(dropped)


def clean_worktrees(tag: Tag) -> None:
    """Remove agents' worktrees of a loop that was killed."""
    tag.repository.remove_half_made_worktrees()
    for place in tag.worktrees.glob("*"):
        tag.repository.remove_worktree(place)
