"""The opening of a session: what a killed loop, an agent or a person left behind is put right here, once.

`open_tag` is called under the store's lock, before anything runs. UserError for what only a person can mend.
"""

import enum
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness import environment
from harness.bench import unpack
from harness.contract import Description, Domain
from harness.environment import Packages
from harness.files import open_to_append, read_text, remove_folder
from harness.processes import sweep
from harness.screen import UserError, listed, say
from harness.store import DIGEST_TRAILER, PROFILE_TRAILER, Run, Store

ROUNDING_OF_ROWS = 1e-6  # a row has six decimals


class Use(enum.Enum):
    """What the checkout, in which the command was started, is to a session."""

    DESK = "an agent edits it: it is put to the champion"
    EDITED = "its edit is to be measured: all but the editable file is put to the champion afterwards"
    SHOWN = "nobody works in it: it shows the branch, unless a person changed files"
    UNTOUCHED = "it may show anything, and stays as it is"


def open_tag(store: Store, use: Use, is_stopped: Callable[[], bool]) -> Description:
    """Make ledger, refs, checkout and data as the next run needs them; return what the judge says of itself."""
    for role in ("agent", "run"):
        sweep(process_mark(store, role))
    store.check()
    if use is not Use.UNTOUCHED:
        _check_checkout(store, use)
    remove_folder(store.bench)  # what cannot be removed stands in nobody's way
    facts = _describe(store, is_stopped)
    if not store.attempts:
        number = store.new_folder()
        store.commit(number, None, "baseline", facts.profile, facts.digest, parent=store.champion)
    _check_trailer(store, DIGEST_TRAILER, facts.digest)
    store.mend_ledger()
    for line in false_rows(store):
        say(f"warning: {line}")
    if use is Use.DESK:
        store.repository.reset(store.repository.checkout, store.champion, store.branch)
    elif use is Use.SHOWN:
        _show_branch(store)
    if use is not Use.UNTOUCHED:
        store.publish(store.repository.checkout)
    return facts


def _show_branch(store: Store) -> None:
    """The checkout shows the tag's branch, its files at the champion; where a person changed files they stay."""
    repository = store.repository
    if repository.changed_files(repository.head()) and not store.moving.exists():
        repository("update-ref", f"refs/heads/{store.branch}", store.champion)
        return
    store.check_out_champion()


def process_mark(store: Store, role: str) -> str:
    """What the processes of a role, "agent" or "run", carry in their environment: by it they are found and ended."""
    return f"{store.home}:{role}"


def _check_checkout(store: Store, use: Use) -> None:
    """On a tag's first start: UserError unless the checkout is clean and the branch is free. Later: save what differs
    from the champion, before it is put back."""
    repository = store.repository
    champion = store.champion
    tip = repository("rev-parse", "--verify", "--quiet", f"refs/heads/{store.branch}", default=champion)
    changed = repository.changed_files(champion)
    if use is Use.EDITED:
        changed = [name for name in changed if name != repository.editable]
    if not store.attempts:
        if changed:
            remedy = "commit them or run 'git stash', then start again"
            if repository.converts_line_ends():
                remedy = "git's core.autocrlf changes the ends of lines: commit edits of your own, then run "
                remedy += "'git config core.autocrlf false && git read-tree --empty && git reset --hard'"
            raise UserError(f"{listed(changed)} has uncommitted changes: {remedy}")
        if tip != champion:
            raise UserError(f"branch {store.branch} exists, at {tip[:7]}: check it out, or choose another --tag", 2)
        return
    if not repository("for-each-ref", f"--contains={tip}", store.refs):
        say(f"note: {store.branch} was at {tip[:7]}, no experiment's: 'git branch NAME {tip[:7]}' keeps it")
    is_persons_own = use is Use.SHOWN and not store.moving.exists()
    if changed and not is_persons_own:
        path = store.home / "interrupted.diff"
        difference = repository("diff", "--binary", champion, "--", *changed, raw=True)
        with open_to_append(path) as file:
            file.buffer.write(difference + b"\n")
        say(f"note: {listed(changed)} differed from the champion; the difference is saved in {path}")


def _describe(store: Store, is_stopped: Callable[[], bool]) -> Description:
    """What the champion's judge says of profile, budget, data and devices. Missing data is prepared first."""
    store.bench.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=store.bench, prefix="describe-")) / "tree"
    unpack(store.repository.tree(store.champion), place)
    variables = environment.variables_for_training()
    facts = environment.ask_judge(store.domain, place, variables)
    if store.attempts:
        _check_trailer(store, PROFILE_TRAILER, facts.profile)
    if not facts.prepared and store.domain.prepare_command and not is_stopped():
        say(f"profile {facts.profile} ({facts.reason}) has no data yet: preparing it in {facts.cache}")
        environment.prepare_data(store.domain, place, variables, is_stopped)
        facts = environment.ask_judge(store.domain, place, variables)
    remove_folder(place.parent)
    if is_stopped():
        raise KeyboardInterrupt
    if not facts.prepared:
        raise UserError(f"the preparation failed: {facts.problem}")
    return facts


def _check_trailer(store: Store, key: str, value: str) -> None:
    """UserError unless profile or data are those that the tag was begun with."""
    had = store.trailer(key)
    if had != value:
        name = key.removeprefix("Autoresearch-")
        remedy = "set AUTORESEARCH_PROFILE and AUTORESEARCH_CACHE as they were, or choose another --tag"
        raise UserError(f"tag {store.tag} was begun under {name} {had[:12]}, this is {value[:12]}: {remedy}")


def check_packages(store: Store) -> Packages:
    """The installed packages. UserError unless they are as they were when the tag began."""
    now = Packages.installed()
    before = Packages.load(store.packages)
    if before is None:
        now.save(store.packages)
        return now
    if change := before.difference(now):
        remedy = f"undo that, choose another --tag, or delete {store.packages} if the scores still compare"
        raise UserError(f"the installed packages changed since tag {store.tag} began ({change}): {remedy}")
    return before


def find_baseline_values(store: Store) -> dict[str, str]:
    """What the baseline's run printed under the keys that must be the same in every run."""
    for run in store.runs_of(store.baseline):
        found = {key: run.summary[key] for key in store.domain.same_in_every_run if key in run.summary}
        if found:
            return found
    return {}


def false_rows(store: Store) -> list[str]:
    """A line for each row that no record of a run bears out: a hand, or an edited loop.py, wrote it."""
    recorded: dict[str, list[float]] = {}  # 7 characters of a commit -> scores of its runs, audits left out
    for run in store.read_runs():
        score = recorded_score(store.folder(run.number), store.domain)
        if score is not None and run.purpose != "audit":
            recorded.setdefault(run.commit[:7], []).append(score)
    lines = []
    for row in store.rows:
        if row.status == "crash":
            continue
        left = recorded.get(row.commit, [])
        agreeing = [score for score in left if abs(score - row.score) <= ROUNDING_OF_ROWS]
        if agreeing:
            left.remove(agreeing[0])  # a second row of this score needs a second record
        elif left:
            had = ", ".join(f"{score:.6f}" for score in left)
            lines.append(f"row {row.commit} says {row.score:.6f}, the record of its run says {had}")
        else:
            lines.append(f"row {row.commit} says {row.score:.6f}, and no run of it left a record")
    return lines


def recorded_score(folder: Path, domain: Domain) -> float | None:
    """The score in a run's result.json; None where there is none."""
    try:
        return float(json.loads(read_text(folder / "result.json"))[domain.metric])
    except (ValueError, LookupError, TypeError):
        return None


def stale_gains(store: Store) -> list[Run]:
    """Runs whose gain on a former champion waits to be run again on the present one."""
    # A loop that is killed between run.json and the ledger leaves a verdict without a row: that run does not count.
    recorded = {row.commit for row in store.rows}
    runs = [run for run in store.read_runs() if run.commit[:7] in recorded]
    again = {run.again_of for run in runs if run.decision}
    return [run for run in runs if run.decision == "stale" and run.number not in again]
