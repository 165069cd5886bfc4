"""Runs of commits that exist already: the baseline, a commit once more, the two sides of an audit. No new edit.

Functions of a ratchet (loop.py), which executes and records.
"""

import secrets
import statistics

from harness import machine
from harness.console import UserError, say
from harness.edit import fingerprint
from harness.ledger import Run, broken_floor

FIRST_SEED = 42  # of every attempt's first run; further runs take seeds that no edit can foresee


def fresh_seed() -> int:
    return secrets.randbelow(10**9)


def run_baseline(ratchet) -> None:
    """The first run of a tag; twice, where nothing is known of the noise. Raises UserError if it crashes."""
    while True:
        done = len(ratchet.tag.ledger.scores(ratchet.tag.ledger.baseline))
        is_known = ratchet.tag.ledger.sigma is not None and not (ratchet.confirm and done < 2)
        if done >= 2 or (done == 1 and is_known):
            return
        commit = ratchet.tag.ledger.baseline or ratchet.tag.champion
        source = ratchet.tag.source(commit)
        seed = fresh_seed() if done else FIRST_SEED
        run = Run(
            number=0,
            commit=commit,
            seed=seed,
            purpose="replicate" if done else "baseline",
            description=f"baseline (seed {seed})" if done else "baseline",
            group="baseline" if done else "",
            fingerprint=fingerprint(source),
            packages={} if done else machine.installed_packages(),
        )
        with ratchet.runner.device() as device:
            run = ratchet.run_once(run, device)
        if run.status == "crash":
            log = ratchet.tag.folder(run.number) / "run.log"
            raise UserError(f"the baseline crashed: {run.reason} (log {log})")
        if broken := broken_floor(run, ratchet.domain):
            say(f"note: the baseline has {broken}: nothing is kept before an edit mends that")
        with ratchet.lock:
            is_champion = ratchet.tag.ledger.champion in ("", commit)
            ratchet.record([run], "keep" if is_champion else "discard")


def run_again(ratchet, commit: str) -> Run:
    """A commit of an earlier run once more, on a fresh seed.

    The champion is only measured, so that later candidates are compared with a better known score. Another commit
    takes the title where it is believed better by all of its fresh runs, and stands on the present champion or was
    a champion itself.
    """
    ledger_now = ratchet.tag.ledger
    seed = fresh_seed()
    first = ledger_now.first_run_of(commit)
    base = "" if commit in ledger_now.lineage() else first.base
    run = Run(0, commit, base, seed, "replicate", description=f"{first.description} (again, seed {seed})")
    with ratchet.runner.device() as device:
        run = ratchet.run_once(run, device)
    with ratchet.lock:
        if run.status == "crash":
            return ratchet.record([run], "crash", run.reason)
        scores = [*ledger_now.scores(commit), run.score]
        fresh = scores if commit == ledger_now.baseline else scores[1:] or scores  # the first may have crashed
        is_better = ratchet.domain.gain(ledger_now.best, statistics.fmean(fresh)) > 0
        was_kept = any(one.status == "keep" for one in ledger_now.runs_of(commit))
        is_allowed = not first.is_refused and not broken_floor(run, ratchet.domain)
        may_lead = was_kept or first.base == ratchet.tag.champion
        is_kept = commit == ratchet.tag.champion or (is_better and may_lead and is_allowed)
        if is_better and not may_lead:
            say(f"note: it edits {first.base[:7]}, which is not the best any more: apply its diff and try that")
        if not is_kept or was_kept or not ratchet.domain.approve:
            return ratchet.record([run], "keep" if is_kept else "discard")
        run = ratchet.record([run], "pending")
    return ratchet.ask_approval(run)


def check_run(ratchet) -> Run:
    """The champion's file once, for `check`: nothing is recorded."""
    run = Run(0, ratchet.tag.champion, purpose="baseline", description="check")
    with ratchet.runner.device() as device:
        return ratchet.run_once(run, device)


def audit(ratchet, replicates: int) -> str:
    """Baseline and champion in alternation on fresh seeds, scored once more in a clean process; the group of the
    audit's runs. What a stopped audit measured is in the ledger too."""
    number = 1 + len({run.group.partition("/")[0] for run in ratchet.tag.ledger.runs if run.purpose == "audit"})
    commits = {"baseline": ratchet.tag.ledger.baseline, "champion": ratchet.tag.ledger.champion}
    if commits["champion"] == commits["baseline"]:
        del commits["champion"]
    for _ in range(replicates):
        seed = fresh_seed()
        for role, commit in commits.items():
            group = f"audit {number}/{role}"
            run = Run(0, commit, seed=seed, purpose="audit", group=group, description=f"{role}, seed {seed}")
            with ratchet.runner.device() as device:
                run = ratchet.run_once(run, device)
            if run.status == "crash":
                log = ratchet.tag.folder(run.number) / "run.log"
                raise UserError(f"the audit of the {role} {commit[:7]} crashed: {run.reason} (log {log})")
            with ratchet.lock:
                ratchet.record([run], "measured")
    return f"audit {number}"
