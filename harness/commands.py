"""The five commands: their arguments, what they call, and their exit codes.

0 done, or stopped by request; 1 error or crash; 2 usage or refusal. What a person can mend, or the machine did, is one
line and never a traceback.
"""

import argparse
import functools
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import morning, report
from harness.agents import AGENTS, choose_agent
from harness.contract import Domain
from harness.desk import Proposal
from harness.files import open_regular, read_tail
from harness.interrupts import Interrupts, StopNow
from harness.ledger import wants_simpler_rule
from harness.live_page import LivePage
from harness.page import read_template
from harness.prompt import standing
from harness.proposers import find_problem
from harness.ray_fleet import check_extra
from harness.repository import Repository
from harness.screen import ERROR_CHARS, UserError, one_line, say
from harness.store import Store
from harness.verdict import read_beliefs, repeat_command

AGENT_TIMEOUT = 1800  # seconds that a proposal may take
TAG_BYTES = 100  # a tag is the name of folders and files


@dataclass(frozen=True)
class Options:
    """What a person chose for a session, by the flags of `run`; the defaults are those of `try` and `audit`."""

    workers: int = 1
    ray: str = ""  # address of a Ray cluster; "": on this machine; "off": without Ray
    ahead: int | None = None  # candidates that wait for each device; None: 1 on CUDA, else 0
    confirm: bool = False  # a gain counts once fresh seeds have confirmed it
    max_experiments: float = math.inf
    hours: float = math.inf  # that the session may last
    agent_timeout: float = AGENT_TIMEOUT
    max_usd: float = math.inf  # that the agents of this session may cost
    patience: float = math.inf  # experiments without a keep
    target: float | None = None  # score that is enough
    notify: str = ""  # a shell command that tells a person; "": nobody is told


def main(domain: Domain, checkout: Path, open_session: Callable) -> int:
    """Run the command line. `open_session(store, options, interrupts, agent, keep_edit)` makes a ratchet."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?"
    args = parse_arguments(sys.argv[1:])
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        del os.environ[name]  # set by a hook or an alias, they would point git elsewhere
    for name in ("AUTORESEARCH_CACHE", "AUTORESEARCH_LOCKS"):
        if os.environ.get(name):  # relative to here, not to the bench
            os.environ[name] = os.path.abspath(os.path.expanduser(os.environ[name]))
    command = COMMANDS[args.command]
    return guarded(lambda: command(domain, checkout, open_session, args))


def guarded(command: Callable[[], int]) -> int:
    """Call a command and return its exit code; an error that a person can mend becomes one line."""
    try:
        code = command()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError as error:
        if not _reader_is_gone():
            say(f"error: {error}")
            return 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python still writes at its exit must not fail either
        return 0
    except (StopNow, KeyboardInterrupt):
        say("stopped")
        return 0
    except ModuleNotFoundError as error:  # `python3 loop.py`: another Python than the one that has the packages
        say(f"error: {sys.executable} has no package {error.name!r}: start this with 'uv run' in place of python")
        return 1
    except (UserError, OSError, subprocess.SubprocessError) as error:
        say(f"error: {one_line(str(error), ERROR_CHARS - 10)}")
        return getattr(error, "code", 1)


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more: `| head` has read enough."""
    output = select.poll()
    output.register(1, 0)  # 0: errors alone
    return bool(output.poll(0))


def open_store(checkout: Path, domain: Domain, tag: str | None) -> Store:
    """The store of a tag: the one given, else the current branch's, else today's date."""
    repository = Repository(checkout, domain.editable, domain.instructions)
    today = time.strftime("%b%d").lower()
    branch = repository.head_branch()
    tag_of_branch = branch.removeprefix("autoresearch/")
    if not tag:
        tag = today if tag_of_branch == branch else tag_of_branch
    is_name = repository("check-ref-format", "--branch", f"autoresearch/{tag}", default="")
    is_long = len(os.fsencode(tag)) > TAG_BYTES
    if "/" in tag or is_long or not is_name:
        shown = one_line(tag, TAG_BYTES)
        raise UserError(f"--tag {shown!r} is not a valid branch name: use letters, digits and '-', say {today}", 2)
    return Store(repository, tag, domain)


# run


def command_run(domain: Domain, checkout: Path, open_session: Callable, args: argparse.Namespace) -> int:
    check_options(args)
    check_target(args.target, domain)
    agent = choose_agent(args.agent, args.agent_cmd)
    store = open_store(checkout, domain, args.tag)
    options = Options(
        workers=args.workers,
        ray=args.ray,
        ahead=args.ahead,
        confirm=args.confirm,
        max_experiments=args.max_experiments,
        hours=args.hours,
        agent_timeout=args.agent_timeout,
        max_usd=args.max_usd,
        patience=args.patience,
        target=args.target,
        notify=args.notify or "",
    )
    with store.locked(), Interrupts(checkout / "STOP") as interrupts:
        (store.home / "try.log").unlink(missing_ok=True)  # the refusal of an earlier `try` is no news any more
        ratchet = open_session(store, options, interrupts, agent)
        try:
            ratchet.run()
        except StopNow:
            ratchet.watch.why_ended = "stopped at once"
            say("stopped: what was in flight is dropped, ledger and branch are as the last row says")
        except Exception:
            ratchet.watch.why_ended = "an error; what the loop printed last says which"
            raise
        finally:
            ratchet.close()
    say(f"{standing(store.rows, domain)} Read it with: uv run loop.py report")
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError for numbers that mean nothing."""
    lowest = {"workers": 1, "ahead": 0, "max_experiments": 0, "hours": 0, "agent_timeout": 0}
    lowest |= {"max_usd": 0, "patience": 1}
    for name, least in lowest.items():
        value = getattr(args, name)
        if value is not None and not value >= least:  # NaN too
            raise UserError(f"--{name.replace('_', '-')} {value}: give {least} or more", 2)
    if args.max_usd < math.inf and args.agent in AGENTS and not AGENTS[args.agent].reports_usd:
        able = ", ".join(name for name, agent in AGENTS.items() if agent.reports_usd)
        raise UserError(f"--max-usd {args.max_usd:g}: {args.agent} reports no dollars: {able} do", 2)
    if args.notify is not None and not args.notify.strip():
        raise UserError(f"--notify {args.notify!r}: give a shell command", 2)
    check_extra(args.workers, args.ray)


def check_target(target: float | None, domain: Domain) -> None:
    """Raises UserError for a score that cannot be."""
    lowest, highest = domain.score_range
    if target is not None and not lowest <= target <= highest:  # NaN too
        raise UserError(f"--target {target}: give a {domain.metric} from {lowest:g} to {highest:g}", 2)


# try


def command_try(domain: Domain, checkout: Path, open_session: Callable, args: argparse.Namespace) -> int:
    """The experiment runs in a session of its own: killing this command, which only waits for it, does not end it."""
    store = open_store(checkout, domain, None)
    check_place_of_try(store)
    with store.locked():
        rows_before = len(store.rows)
        log = store.home / "try.log"
        log.unlink(missing_ok=True)
        with open_regular(checkout / domain.editable) as file:
            source = file.read()
        if args.again is not None or args.base:
            commit = commit_to_repeat(store, args.again)
            session = functools.partial(repeat_in_session, store, open_session, commit)
        else:
            session = functools.partial(try_in_session, store, open_session, source, one_line(args.description))
        child = os.fork()  # it inherits the lock
        if child == 0:
            code = 1
            try:
                _detach(log)
                code = guarded(session)
            finally:
                os._exit(code)
    for number in (signal.SIGINT, signal.SIGTERM):  # from here on they end the waiting only
        signal.signal(number, signal.SIG_DFL)
    say("running; if this command is cut off, it goes on: uv run loop.py status --wait")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    store.load()
    last_line = read_tail(log, 1, ERROR_CHARS)
    is_refused = last_line.startswith("error: ") or len(store.rows) == rows_before
    print(last_line if is_refused else report.verdict_text(store))
    if not is_refused and (advice := how_to_go_back(store)):
        print(advice)
    return code


def check_place_of_try(store: Store) -> None:
    """Raises UserError unless the checkout is on the branch of a run and has an editable file."""
    repository = store.repository
    if repository.head_branch() != store.branch:
        remedy = f"'git checkout -b {store.branch}' makes one"
        if repository("rev-parse", "--verify", "--quiet", f"refs/heads/{store.branch}", default=""):
            remedy = f"'git checkout {store.branch}' goes to it"
        raise UserError(f"this checkout is not on the branch of a run: {remedy}", 2)
    editable = repository.checkout / repository.editable
    if editable.is_symlink() or not editable.is_file():
        remedy = f"'git checkout -- {repository.editable}' restores it"
        raise UserError(f"{repository.editable} is not a regular file: {remedy}", 2)


def commit_to_repeat(store: Store, number: int | None) -> str:
    """The commit of an earlier run, the champion's for None. Raises UserError for what cannot be run again."""
    if not store.rows:
        raise UserError("no run has a verdict yet: begin with 'uv run loop.py try baseline'", 2)
    if number is None:
        return store.champion
    runs = {run.number: run for run in store.read_runs()}
    run = runs.get(number)
    if run is None:
        known = f"this tag has runs {min(runs)} to {max(runs)}" if runs else "this tag has none"
        raise UserError(f"--again {number}: there is no such run, {known}", 2)
    if run.purpose == "audit":
        remedy = "give the number of an experiment's run, or --base for the champion"
        raise UserError(f"--again {number}: that run was part of an audit: {remedy}", 2)
    if run.commit not in store.attempts.values():  # a baseline that crashed
        raise UserError(f"--again {number}: commit {run.commit[:7]} is not kept any more: give another run", 2)
    return run.commit


def _detach(log: Path) -> None:
    """A session of its own, nothing to read, and output to a log."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


def try_in_session(store: Store, open_session: Callable, source: bytes, description: str) -> int:
    """Measure one edit; the baseline first, where there is none."""
    repository = store.repository
    is_baseline = not store.rows and source == repository.read(store.champion, repository.editable)
    problem = "" if is_baseline else find_problem(store, source)
    if problem:
        raise UserError(f"refused: {problem}{_how_to_repeat(store, source)}", 2)
    with Interrupts(repository.checkout / "STOP") as interrupts:
        ratchet = open_session(store, Options(), interrupts, None, keep_edit=True)
        try:
            if not is_baseline:
                ratchet.waiting.append(Proposal(source, store.champion, description))
            ratchet.run()
        finally:
            ratchet.close()
    _put_back(store, source)
    return _exit_code(store)


def _how_to_repeat(store: Store, source: bytes) -> str:
    """The end of a refusal: the command that measures an earlier attempt with this content once more."""
    row = store.find_attempt(store.repository.hash_of_data(source))
    if row is None:
        return ""
    command = repeat_command(store, store.full_commit(row.commit))
    return f": '{command}' runs it once more"


def how_to_go_back(store: Store) -> str:
    """The line below a verdict: a former champion is believed better, and this command takes it back.

    "" where none is, or where the present one is a simplification that gives away no more than the noise.
    """
    former = store.better_former()
    if not former:
        return ""
    beliefs = read_beliefs(store)
    change = abs(beliefs.difference(former, store.champion))
    if wants_simpler_rule(store.description(store.champion)) and change <= beliefs.sigma:
        return ""
    believed = f"{former[:7]}, a former best, is believed better by {change:.6f} ({beliefs.score(former):.6f})"
    return f"{believed}: '{repeat_command(store, former)}' measures it again, and makes it the best if that holds"


def repeat_in_session(store: Store, open_session: Callable, commit: str) -> int:
    """Measure a commit of an earlier run once more. An edit that is in the checkout stays there."""
    champion = store.champion
    untouched = store.repository.read(champion, store.repository.editable)
    with Interrupts(store.repository.checkout / "STOP") as interrupts:
        ratchet = open_session(store, Options(), interrupts, None, keep_edit=True)
        try:
            ratchet.plan_again(commit)
            ratchet.run()
        finally:
            ratchet.close()
    has_edit = _put_back(store, untouched)
    if has_edit and store.champion != champion:
        name = store.repository.editable
        say(f"note: {name} still holds your edit of the former champion {champion[:7]}: 'git diff' shows it")
    return _exit_code(store)


def _put_back(store: Store, source: bytes) -> bool:
    """Put the checkout to the champion, but for an edit other than `source`; return whether there is one.

    An agent that did not wait for the verdict may be at its next idea already: that edit is not ours to undo.
    """
    repository = store.repository
    editable = repository.checkout / repository.editable
    is_regular = editable.is_file() and not editable.is_symlink()
    found = editable.read_bytes() if is_regular else source
    repository.reset(repository.checkout, store.champion, store.branch)
    has_edit = found != source
    if has_edit:
        editable.write_bytes(found)
    return has_edit


def _exit_code(store: Store) -> int:
    has_crashed = bool(store.rows) and store.rows[-1].status == "crash"
    return 1 if has_crashed else 0


# status, report, audit


def command_status(domain: Domain, checkout: Path, open_session: Callable, args: argparse.Namespace) -> int:
    return report.print_status(open_store(checkout, domain, args.tag), args.wait)


def command_report(domain: Domain, checkout: Path, open_session: Callable, args: argparse.Namespace) -> int:
    store = None if args.ledger else open_store(checkout, domain, args.tag)
    if args.tag and store is not None and not store.ledger.exists():  # results.tsv here is another tag's
        remedy = f"'ls {store.home.parent}' lists the tags that have one"
        raise UserError(f"no ledger at {store.ledger}: {remedy}")
    is_live = store is not None and store.is_busy()
    with morning.page_lock(store):
        findings = report.print_report(store, args.ledger, checkout, domain)
        path = morning.write_page(store, findings, checkout, domain, is_live, read_template())
    print(f"page: {path}")
    return 0


def command_audit(domain: Domain, checkout: Path, open_session: Callable, args: argparse.Namespace) -> int:
    store = open_store(checkout, domain, args.tag)
    if not store.rows:
        raise UserError("there are no rows to audit: 'uv run loop.py --agent random' starts a run")
    if args.replicates < 1:
        raise UserError(f"--replicates {args.replicates}: audit needs at least 1", 2)
    with store.locked(), Interrupts(checkout / "STOP") as interrupts:
        ratchet = open_session(store, Options(), interrupts)
        try:
            audited = ratchet.audit(args.replicates)
        finally:
            ratchet.close()
    text = report.audit_text(audited, domain)
    print(text)
    doubts = report.find_doubts(audited)
    for doubt in doubts:
        say(f"error: {doubt}")
    morning.keep_audit(store, text, doubts)
    LivePage(store).close()  # the session's own last write was before this
    return 1 if doubts else 0


COMMANDS = {
    "run": command_run,
    "try": command_try,
    "status": command_status,
    "report": command_report,
    "audit": command_audit,
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command line; `run` is the command where none is named."""
    description = sys.modules["__main__"].__doc__
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="loop.py", description=description, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="propose, train, keep or reset, all night (the default)")
    run.add_argument("--agent", metavar="NAME", help=", ".join(AGENTS))
    run.add_argument("--agent-cmd", metavar="CMD", help="any other: prompt on standard input, or {prompt_file}")
    run.add_argument("--max-experiments", type=int, default=math.inf, metavar="N", help="stop after N (default: never)")
    run.add_argument("--hours", type=float, default=math.inf, metavar="H", help="stop after H hours (default: never)")
    run.add_argument("--agent-timeout", type=float, default=AGENT_TIMEOUT, metavar="S", help="seconds for one proposal")
    usd_help = "ask for nothing more once this session's agents have cost X (of restarts each counts its own)"
    run.add_argument("--max-usd", type=float, default=math.inf, metavar="X", help=usd_help)
    patience_help = "stop after N experiments of this session without a keep"
    run.add_argument("--patience", type=int, default=math.inf, metavar="N", help=patience_help)
    run.add_argument("--target", type=float, metavar="SCORE", help="stop once the champion's score is as good")
    notify_help = "shell command that gets a text on standard input: of a keep, of the end, of a wait of half an hour"
    run.add_argument("--notify", metavar="CMD", help=notify_help)
    run.add_argument("--confirm", action="store_true", help="a gain counts once fresh seeds have confirmed it")
    run.add_argument("--ahead", type=int, metavar="N", help="candidates that wait for each device (1 on CUDA, else 0)")
    run.add_argument("--workers", type=int, default=1, metavar="N", help="experiments at a time (default 1)")
    ray_help = "a Ray cluster to run them on (default: Ray on this machine; off: threads, without Ray)"
    run.add_argument("--ray", default="", metavar="ADDRESS", help=ray_help)

    trying = commands.add_parser("try", help="one experiment on the edit now in the editable file")
    what = trying.add_mutually_exclusive_group(required=True)
    what.add_argument("description", nargs="?", help="what the edit does: one line for the ledger")
    what.add_argument("--again", type=int, metavar="RUN", help="an earlier run's commit once more, on a fresh seed")
    what.add_argument("--base", action="store_true", help="the champion once more, on a fresh seed")

    status = commands.add_parser("status", help="where the run stands, one screen")
    status.add_argument("--wait", action="store_true", help="wait for the verdict of the experiment that runs now")

    reading = commands.add_parser("report", help="what was kept, what it gained, progress.png, report.html")
    reading.add_argument("ledger", nargs="?", metavar="LEDGER", help="another ledger than this run's")

    audit = commands.add_parser("audit", help="baseline and champion again: fresh seeds, sealed split, a clean judge")
    audit.add_argument("--replicates", type=int, default=3, metavar="N", help="seeds each (default 3)")

    for command in (run, status, reading, audit):
        command.add_argument("--tag", help="name of the run (default: the current branch's, else today's date)")
    is_named = bool(argv) and argv[0] in (*commands.choices, "-h", "--help")
    is_word = bool(argv) and not argv[0].startswith("-")
    if is_word and not is_named:
        parser.error(f"no command {argv[0]!r}: use one of {', '.join(commands.choices)}")
    return parser.parse_args(argv if is_named else ["run", *argv])
