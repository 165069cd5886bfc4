"""The opening of a session: what a killed loop, an agent or a person left behind is put right here, once.

`open_tag` is called under the store's lock, before anything runs. UserError for what only a person can mend.
"""

import contextlib
import enum
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness import environment
from harness.bench import unpack
from harness.contract import Description, Domain
from harness.environment import Packages
from harness.files import open_to_append, read_text, remove_folder, write_atomically
from harness.processes import sweep
from harness.repository import WHOLE_DIFF
from harness.screen import UserError, listed, one_line, say
from harness.store import DIGEST_TRAILER, PROFILE_TRAILER, Run, Store

ROUNDING_OF_ROWS = 1e-6  # a row has six decimals
SAME_IN_EVERY_RECORD = ("profile", "split", "rows", "digest", "files", "prepare_sha256", "device_name")
MOST_WARNINGS = 5  # about rows, at a start; the report shows more


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
    _check_champion(store)
    if use is not Use.UNTOUCHED:
        _check_checkout(store, use)
    remove_folder(store.bench)  # what cannot be removed stands in nobody's way
    facts = _describe(store, is_stopped)
    if not store.attempts:
        number = store.new_folder()
        store.commit(number, None, "baseline", facts.profile, facts.digest, parent=store.champion)
    _check_trailer(store, DIGEST_TRAILER, facts.digest)
    store.mend_ledger()
    _warn_of_false_rows(store)
    if use is Use.DESK:
        store.repository.reset(store.repository.checkout, store.champion, store.branch)
    elif use is Use.SHOWN:
        _show_branch(store)
    if use is not Use.UNTOUCHED:
        store.publish(store.repository.checkout)
    return facts


def _warn_of_false_rows(store: Store) -> None:
    lines = false_rows(store)
    for line in lines[:MOST_WARNINGS]:
        say(f"warning: {line}")
    if len(lines) > MOST_WARNINGS:
        say(f"warning: {len(lines) - MOST_WARNINGS} more such rows: 'uv run loop.py report' shows them")


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


def _check_champion(store: Store) -> None:
    """UserError where the champion's tree differs from the baseline's by more than the editable file.

    The loop makes no such commit. An edited one does, and the judge that a session asks is the champion's.
    """
    if not store.attempts:
        return
    editable = store.repository.editable
    names = store.repository.differing_files(store.baseline, store.champion)
    foreign = [name for name in names if name != editable]
    if foreign:
        what = f"the champion {store.champion[:7]} changes {listed(foreign)}, an experiment changes {editable} alone"
        remedy = f"take its rows out of {store.ledger}, or begin another --tag at {store.baseline[:7]}"
        raise UserError(f"{what}: {remedy}")


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
        difference = repository("diff", *WHOLE_DIFF, "--binary", champion, "--", *changed, raw=True)
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


def check_data(store: Store, facts: Description) -> environment.Listing:
    """The files that runs train on, as they are now. UserError where one is another than when the tag began."""
    now = environment.sample_data(facts)
    before = {}
    with contextlib.suppress(ValueError, TypeError):
        before = dict(json.loads(read_text(store.data)))
    # A file that is gone was never needed, or its absence is told by the run that needs it.
    known = {name: digest for name, digest in before.items() if name in now}
    if changed := environment.changed_training_data(known, now, facts):
        remedy = "put it back as it was (delete it and prepare the data again), or choose another --tag"
        raise UserError(f"the training data changed since tag {store.tag} began ({changed}): {remedy}")
    if now.keys() - before.keys():
        write_atomically(store.data, json.dumps(before | now))
    return environment.look_at_data(facts)


def find_baseline_values(store: Store) -> dict[str, str]:
    """What the baseline's run printed under the keys that must be the same in every run."""
    for run in store.runs_of(store.baseline):
        found = {key: run.summary[key] for key in store.domain.same_in_every_run if key in run.summary}
        if found:
            return found
    return {}


def false_rows(store: Store) -> list[str]:
    """A line for each row that no record of a run bears out: a hand, or an edited loop.py, wrote it."""
    recorded: dict[str, list[tuple[Run, dict]]] = {}  # 7 characters of a commit -> its runs with records, no audits
    for run in store.read_runs():
        record = read_recorded(store.folder(run.number), store.domain)
        if record is not None and run.purpose != "audit":
            recorded.setdefault(run.commit[:7], []).append((run, record))
    lines = []
    of_baseline: dict = {}  # the record of the first row
    for row in store.rows:
        if row.status == "crash":
            continue
        left = recorded.get(row.commit, [])
        agreeing = [pair for pair in left if abs(pair[1][store.domain.metric] - row.score) <= ROUNDING_OF_ROWS]
        if agreeing:
            run, record = agreeing[0]
            left.remove(agreeing[0])  # a second row of this score needs a second record
            if row is store.rows[0]:
                of_baseline = record
            if problem := _false_value(run, record, of_baseline):
                lines.append(f"row {row.commit}: the record of run {run.number:04d} has {problem}")
        elif left:
            had = ", ".join(f"{record[store.domain.metric]:.6f}" for _, record in left)
            lines.append(f"row {row.commit} says {row.score:.6f}, the record of its run says {had}")
        else:
            lines.append(f"row {row.commit} says {row.score:.6f}, and no run of it left a record")
    return lines


def _false_value(run: Run, record: dict, of_baseline: dict) -> str:
    """The first value of a record that does not go with the baseline's record, or with its run; "" if all do."""
    seed = record.get("seed", run.seed)
    if seed != run.seed:
        return f"seed {seed}, its run was given {run.seed}"
    for key in SAME_IN_EVERY_RECORD:
        if key in of_baseline and record.get(key) != of_baseline[key]:
            had = one_line(repr(record.get(key)), 30)
            want = one_line(repr(of_baseline[key]), 30)
            return f"{key} {had}, the baseline's {want}"
    return ""


def read_recorded(folder: Path, domain: Domain) -> dict | None:
    """What a run's result.json says; None where it has no score."""
    with contextlib.suppress(ValueError, LookupError, TypeError, OverflowError, RecursionError):
        record = json.loads(read_text(folder / "result.json"))
        record[domain.metric] = float(record[domain.metric])
        return record
    return None


def stale_gains(store: Store) -> list[Run]:
    """Runs whose gain on a former champion waits to be run again on the present one."""
    # A loop that is killed between run.json and the ledger leaves a verdict without a row: that run does not count.
    recorded = {row.commit for row in store.rows}
    runs = [run for run in store.read_runs() if run.commit[:7] in recorded]
    again = {run.again_of for run in runs if run.decision}
    return [run for run in runs if run.decision == "stale" and run.number not in again]
