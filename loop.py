"""loop.py, the ratchet: it commits an edit, has it run, decides, keeps or drops it. How a step is done: harness/.

    uv run loop.py --agent claude             # all night (Ctrl-C once: finish what runs and stop; twice: stop now)
    uv run loop.py try "raise depth to 10"    # one experiment on the edit now in train.py, for an agent that loops
    uv run loop.py try --again 12             # an earlier experiment once more, on a fresh seed (--base: the champion)
    uv run loop.py status [--wait]            # where the night stands
    uv run loop.py report [LEDGER]            # the morning read: what was kept, progress.png, report.html
    uv run loop.py audit                      # baseline and champion again: fresh seeds, held-out split, clean process
    uv run loop.py ablate                     # which of the kept changes are real: the champion without each of them
    uv run loop.py check [--agent NAME]       # is everything there that a night needs?

A worker is a thread that does one experiment after another. One lock guards ledger, branch and refs. Every decided run
is one line of runs.jsonl: kill the loop anywhere and start it again.
Exit codes: 0 done, or stopped by request; 1 error or crash; 2 usage or refusal.
"""

import sys

if __name__ == "__main__":
    # This folder stands first on the path: the package harness is the one beside this file, whatever is installed.
    import harness  # noqa: F401

    # Everything else comes from elsewhere: an agent may have left a json.py or a git.py here.
    sys.path.pop(0)

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from harness import cli, ledger
from harness.compare import headline
from harness.console import UserError, say
from harness.domain import Description, Domain
from harness.edit import Dropped, Edit, compile_problem, fingerprint, syntax_size
from harness.ledger import STALE, Run
from harness.replicates import FIRST_SEED, fresh_seed
from harness.runner import Job, Runner
from harness.tag import Tag

# ---------------------------------------------------------------------------------------------------------------------
# What a fork for another domain changes: this block, the evaluator and the file that is edited (docs/fork.md)

# -P: no folder of the candidate stands before the standard library. -u: what a run printed before it died is in its
# log, and in order.
PYTHON = (sys.executable, "-P", "-u")
RUN_TRAIN = "import os, runpy, sys; sys.path.append(os.getcwd()); runpy.run_path('train.py', run_name='__main__')"
DESCRIBE = "import json, os, sys; sys.path.append(os.getcwd()); import prepare; print(json.dumps(prepare.describe()))"

DOMAIN = Domain(
    metric="val_bpb",
    test_metric="test_bpb",
    lower_is_better=True,
    unit="bpb",
    score_name="validation bits per byte",
    score_range=(0.01, 100.0),
    score_digits=6,  # decimals in results.tsv
    editable="train.py",
    instructions="program.md",
    describe_command=(*PYTHON, "-c", DESCRIBE),  # what it prints says the time budget: seconds of training
    prepare_command=(*PYTHON, "prepare.py"),
    train_command=(*PYTHON, "-c", RUN_TRAIN),
    score_command=(*PYTHON, "prepare.py", "--score"),
    split="val",
    same_in_every_run=("attention",),  # another attention kernel is another speed
    # bpb, the standard deviation between seeds of one train.py: the original's H100; six baselines on two CPU cores.
    # A profile that is not here is unknown until something ran twice: its baseline does, at the start.
    assumed_sigma={"climbmix": 0.00037, "pocket": 0.014},
    startup_allowance=300,  # seconds to compile and evaluate: a run may take 2 * its budget + this, an audit 3 * + this
    rescore_tolerance=1e-3,  # bpb: kernels of another batch size round differently
    floors={},  # other numbers of the record, and the least that each must be: {"accuracy": 0.9}
    approve="",  # a shell command that must exit 0 before a keep stands; --approve sets it for one session
    memory="peak_vram_mb",
    steps="num_steps",
    curve_pattern=r"step (?P<step>\d{1,12}) \| (?P<percent>[\d.]{1,12})% \| loss (?P<loss>[^ |]{1,30}) ",
    batch_pattern=r"batch (?P<size>[\d,]{1,20}) tokens = ",
    sample="sample",
)

# ---------------------------------------------------------------------------------------------------------------------
# The ratchet


class Ratchet:
    """One session on one tag. `lock` is held for everything that reads or moves the champion."""

    def __init__(self, tag: Tag, facts: Description, runner: Runner, confirm: int = 0):
        self.tag = tag
        self.repository = tag.repository
        self.domain = tag.domain
        self.facts = facts
        self.runner = runner
        self.confirm = confirm  # fresh seeds that may confirm a gain; 0: the first score decides
        self.lock = threading.RLock()
        self.approve: Callable[[Run], bool] = lambda run: True
        self.on_decided: Callable[[Run], None] = lambda run: None
        self.on_training: Callable[[Run], None] = lambda run: None
        self.in_flight: dict[str, str] = {}  # fingerprint of what trains now -> its description

    # An experiment: one edit, until its line is written

    def experiment(self, edit: Edit) -> Run:
        """Commit, run, decide and record an edit; a gain on a former champion runs again on the present one.

        Raises Dropped where a new edit conflicts with the champion, or repeats an earlier one; Stopped.
        """
        while True:
            with self.runner.device() as device:  # waits until one is free
                self.runner.wait_for_disk(self.tag.home)
                try:
                    edit, run = self.begin(edit)
                except Dropped as dropped:
                    if not edit.again_of:
                        raise
                    with self.lock:  # not run again: it does not go with the present champion
                        stale = self.tag.ledger[edit.again_of]
                        return self.record([stale], "discard", f"gained on a former champion; {dropped}")
                try:
                    runs = self.run_and_confirm(run, device, edit.pairs)
                    with self.lock:
                        status, reason = self.decide(runs, edit)
                        if status == "keep" and edit.base != self.tag.champion:
                            status, reason = "discard", STALE
                        elif status == "keep" and self.domain.approve:
                            status = "pending"
                        run = self.record(runs, status, reason)
                finally:
                    self.in_flight.pop(run.fingerprint, None)
            if status == "pending":
                run = self.ask_approval(run)
            if not run.is_stale:
                return run
            edit = replace(edit, again_of=run.number, cost=None)

    def begin(self, edit: Edit) -> tuple[Edit, Run]:
        """The edit on the champion of now, committed, with the number and the folder of its run."""
        with self.lock:
            champion = self.tag.champion
            if edit.base != champion:
                sources = self.tag.source(champion), self.tag.source(edit.base), edit.source
                merged = self.repository.merge(*sources, theirs_win=edit.overrides)
                if merged is None:
                    raise Dropped(f"it conflicts with the new champion {champion[:7]}")
                edit = replace(edit, source=merged, base=champion)
            if not edit.pairs and (problem := self.find_problem(edit.source, edit.again_of)):
                raise Dropped(problem)
            run = self.new_run(edit)
            self.in_flight[run.fingerprint] = run.description
            return edit, run

    def new_run(self, edit: Edit) -> Run:
        """Commit an edit of the champion, and make the folder of its first run."""
        number = self.tag.new_folder()
        commit = self.tag.commit(number, edit.source, edit.description, edit.base)
        (self.tag.folder(number) / "change.diff").write_bytes(self.repository.diff(edit.base, commit))
        return Run(
            number=number,
            commit=commit,
            base=edit.base,
            seed=FIRST_SEED,
            purpose="experiment",
            description=edit.description,
            again_of=edit.again_of,
            fingerprint=fingerprint(edit.source),
            touched=edit.touched,
            cost=edit.cost or {},
        )

    def find_problem(self, source: bytes, again_of: int = 0) -> str:
        """The gate: why an edit is not worth a run, "" if it is. It must compile, and say something new."""
        name = self.domain.editable
        if problem := compile_problem(source, name):
            return problem
        mark = fingerprint(source)
        if mark == fingerprint(self.tag.source(self.tag.champion)):
            return f"{name} is the champion's (comments, layout and the seed do not count)"
        if (running := self.in_flight.get(mark)) is not None:
            return f"{name} repeats an experiment that runs now ({running})"
        earlier = self.tag.ledger.find_repeat(mark)
        if earlier is not None and earlier.number != again_of:
            again = f"'uv run loop.py try --again {earlier.number}' runs it once more"
            return f"{name} repeats run {earlier.number} ({earlier.status}: {earlier.description}): {again}"
        return ""

    def run_and_confirm(self, run: Run, device, pairs: int = 0) -> list[Run]:
        """The run, measured or crashed, and fresh runs of candidate and base: `pairs` of them or, with --confirm, some
        after a gain, as long as they show one. They are judged once, when all have run."""
        first = self.run_once(run, device)
        runs = [first]
        if self.find_refusal(runs) or not (pairs or (self.confirm and self.gain(first) > 0)):
            return runs
        if not pairs:
            say(f"  {run.description}: a gain so far, up to {self.confirm} fresh seeds to confirm it")
        for _ in range(pairs or self.confirm):
            runs += self.run_pair(run, device)
            if any(one.status == "crash" for one in runs) or not (pairs or self.fresh_gain(runs)[0] > 0):
                break
        return runs

    def run_pair(self, run: Run, device) -> list[Run]:
        """Champion and candidate once more, both on one fresh seed."""
        seed = fresh_seed()
        pair = []
        for commit in (run.base, run.commit):
            what = "champion" if commit == run.base else run.description
            again = Run(
                number=0,
                commit=commit,
                seed=seed,
                purpose="replicate",
                group=f"confirm {run.number}",
                description=f"{what} (seed {seed})",
            )
            pair.append(self.run_once(again, device))
        return pair

    def run_once(self, run: Run, device) -> Run:
        """Make one run; it gets a number and a folder if it has none."""
        if not run.number:
            with self.lock:
                run = replace(run, number=self.tag.new_folder())
        summary = (self.tag.ledger.baseline_run or run).summary
        same = {key: summary[key] for key in self.domain.same_in_every_run if key in summary}
        with self.lock:
            archive = self.repository.archive(run.commit)
        say(f"run {run.number:04d}: {run.description}")
        self.on_training(run)
        return self.runner.make(Job(run, archive, self.facts, self.domain, same), device)

    # The rules

    def gain(self, run: Run) -> float:
        """By how much a measured run is better than what is believed of its base."""
        return self.domain.gain(self.tag.ledger.believed(run.base), run.score)

    def fresh_gain(self, runs: list[Run]) -> tuple[float, float | None]:
        """The gain by the fresh runs alone, without the first by which the candidate was selected, and its standard
        error."""
        candidate = [run.score for run in runs[1:] if run.commit == runs[0].commit]
        champion = [run.score for run in runs[1:] if run.commit == runs[0].base]
        return self.tag.ledger.difference(champion, candidate)

    def decide(self, runs: list[Run], edit: Edit) -> tuple[str, str]:
        """`keep`, `discard` or `crash`, and why where that needs a word. Better than what is believed of the base is
        kept; a simplification also at about the same score (a removal by ablation whatever its length). Repeats are
        decided in replicates."""
        if refusal := self.find_refusal(runs):
            return refusal
        gain = self.gain(runs[0])
        is_better = gain > 0 and not self.confirm
        if len(runs) > 1:
            gain, error = self.fresh_gain(runs)
            is_better = error is not None and gain > 2 * error
        if is_better:
            return "keep", ""
        if ledger.wants_simpler(edit.description):
            if not edit.pairs and syntax_size(edit.source) >= syntax_size(self.tag.source(edit.base)):
                return "discard", "no simplification: its code says no less"
            if ledger.is_simpler_keep(self.tag.ledger, -gain):
                return "keep", ""
            return "discard", "no simplification: it loses over one sigma, or all of them together over two"
        return "discard", "not confirmed on fresh seeds" if len(runs) > 1 else ""

    def find_refusal(self, runs: list[Run]) -> tuple[str, str] | None:
        """The verdict, and why, on runs of which nothing is kept whatever they scored: a crash, a broken floor."""
        if runs[0].status == "crash":
            return "crash", runs[0].reason
        if crash := next((run for run in runs if run.status == "crash"), None):
            return "discard", f"a fresh run crashed: {crash.reason}"
        if broken := ledger.broken_floor(runs[0], self.domain):
            return "discard", broken
        return None

    def ask_approval(self, run: Run) -> Run:
        """The verdict on a gain that waits for an approval; it is stale where the champion has moved meanwhile."""
        is_approved = self.approve(run)
        with self.lock:
            group = f"confirm {run.number}"
            fresh = [one for one in self.tag.ledger.runs if one.group == group and not one.is_decided]
            if not is_approved:
                return self.record([replace(run, is_refused=True), *fresh], "discard", "not approved")
            if run.base != self.tag.champion:
                return self.record([run, *fresh], "discard", STALE)
            return self.record([run, *fresh], "keep")

    def record(self, runs: list[Run], status: str, reason: str = "") -> Run:
        """Append the lines of one experiment; a kept commit is the champion from now on."""
        decided = []
        for run in runs:
            if run.status == "crash":
                decided.append(run)
            elif run.commit == runs[0].commit:
                is_first = run.number == runs[0].number
                own = status if is_first or status in ("keep", "pending") else "discard"
                decided.append(replace(run, status=own, reason=reason, is_stale=reason == STALE))
            else:
                decided.append(replace(run, status="keep" if run.commit == self.tag.champion else "discard"))
        # The champion's own replicates first: the last `keep` line is the champion.
        decided.sort(key=lambda run: (run.commit == runs[0].commit, run.number))
        self.tag.append(*decided)
        if status == "keep":
            try:
                self.tag.show_champion()
            except UserError as error:  # it is the champion all the same; the next start shows it
                say(f"warning: the checkout does not show it: {error}")
        first = next(run for run in decided if run.number == runs[0].number)
        say(f"  {headline(self.tag.ledger, first)}")
        self.on_decided(first)
        return first


if __name__ == "__main__":
    sys.exit(cli.main(DOMAIN, Path(__file__).resolve().parent, Ratchet))
