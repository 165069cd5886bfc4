"""The commands: their arguments, what they call, and their exit codes. What they do stands elsewhere.

0 done, or stopped by request; 1 error or crash; 2 usage or refusal. What a person can mend, or the machine did, is one
line and never a traceback.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from harness import ablation, isolation, machine, page, replicates, report
from harness.agents import AGENTS, choose_agent, with_extra
from harness.compare import verdict
from harness.console import ERROR_CHARS, Interrupts, StopNow, UserError, one_line, say
from harness.domain import Domain
from harness.edit import Edit, describe_edit
from harness.files import open_regular, read_tail, read_text, write_atomically
from harness.ledger import MEASURED, parse_tsv
from harness.repository import leave_git_variables
from harness.runner import unpack
from harness.session import Options, Session, clean_worktrees, open_session
from harness.tag import Tag, open_tag

TSV_PROFILE = "climbmix"  # whose noise is assumed for a results.tsv, which says nothing of it, unless a person does


def main(domain: Domain, checkout: Path, ratchet: type) -> int:
    """Run the command line. `ratchet` is loop.py's class."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?"
    args = parse_arguments(sys.argv[1:])
    leave_git_variables()
    for name in ("AUTORESEARCH_CACHE", "AUTORESEARCH_LOCKS"):
        if os.environ.get(name):  # relative to here, not to a run's folder
            os.environ[name] = os.path.abspath(os.path.expanduser(os.environ[name]))
    command = COMMANDS[args.command]
    return guarded(lambda: command(domain, checkout, ratchet, args))


def guarded(command: Callable[[], int]) -> int:
    """Call a command and return its exit code; an error that a person can mend becomes one line."""
    try:
        code = command()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python still writes at its exit must not fail either
        return 0
    except (StopNow, KeyboardInterrupt):
        say("stopped: what was in flight is dropped, ledger and branch are as the last row says")
        return 0
    except ModuleNotFoundError as error:  # `python3 loop.py`: another Python than the one that has the packages
        say(f"error: {sys.executable} has no package {error.name!r}: start this with 'uv run' in place of python")
        return 1
    except (UserError, OSError, subprocess.SubprocessError) as error:
        say(f"error: {one_line(str(error), ERROR_CHARS - 10)}")
        return getattr(error, "code", 1)


# run: the default command


def command_run(domain: Domain, checkout: Path, ratchet: type, args: argparse.Namespace) -> int:
    options = read_options(args, domain)
    agent = choose_agent(args.agent, args.agent_cmd)
    if args.suggest:
        choose_agent(args.suggest, None)  # it must be installed too
        if not agent.has_model:
            problem = f"--suggest {args.suggest}: --agent {args.agent} reads no prompt"
            raise UserError(f"{problem}: choose an agent with a model", 2)
    if args.approve:
        domain = dataclasses.replace(domain, approve=args.approve)
    tag = open_tag(checkout, domain, args.tag)
    with tag.locked(), Interrupts(checkout / "STOP") as interrupts:
        clean_worktrees(tag)
        facts = open_session(tag, interrupts.were_sent)
        where = f"profile {facts.profile} ({facts.reason}), {facts.device_name}"
        say(f"{tag.branch}: {where}, {facts.time_budget:g} s a run")
        with contextlib.closing(Session(tag, facts, ratchet, options, interrupts)) as session:
            session.run(agent)
        cost = f" Its agents cost {session.spent_usd:.2f} dollars." if session.spent_usd else ""
        say(f"{session.why_ended()}. {tag.ledger.standing()}{cost} Read it with: uv run loop.py report")
    return 0


def read_options(args: argparse.Namespace, domain: Domain) -> Options:
    """The flags of `run`. Raises UserError for numbers that mean nothing."""
    lowest = {"workers": 1, "ahead": 0, "max_experiments": 0, "hours": 0, "agent_timeout": 0}
    lowest |= {"max_usd": 0, "patience": 1, "confirm": 0}
    for name, least in lowest.items():
        value = getattr(args, name)
        if value is not None and not value >= least:  # NaN too
            raise UserError(f"--{name.replace('_', '-')} {value}: give {least} or more", 2)
    low, high = domain.score_range
    if args.target is not None and not low <= args.target <= high:  # NaN too
        raise UserError(f"--target {args.target}: give a {domain.metric} from {low:g} to {high:g}", 2)
    if args.max_usd < math.inf and args.agent in AGENTS and not AGENTS[args.agent].reports_usd:
        able = ", ".join(name for name, agent in AGENTS.items() if agent.reports_usd)
        raise UserError(f"--max-usd {args.max_usd:g}: {args.agent} reports no dollars: {able} do", 2)
    for name in ("notify", "approve"):
        value = getattr(args, name)
        if value is not None and not value.strip():
            raise UserError(f"--{name} {value!r}: give a shell command", 2)
    chosen = {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(Options)}
    check_ray(args.ray)
    return Options(**chosen)


def check_ray(address: str | None) -> None:
    """Raises UserError where Ray is asked for and not installed, or the address is none."""
    if address is None:
        return
    if not re.fullmatch(r"\S+:\d+", address):
        raise UserError(f"--ray {address!r}: give HOST:PORT of a cluster; without --ray runs are made here", 2)
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"--ray {address} needs Ray, which is not installed: {with_extra('ray')}", 2)


# try


def command_try(domain: Domain, checkout: Path, ratchet: type, args: argparse.Namespace) -> int:
    """The experiment runs in a session of its own: killing this command, which only waits for it, does not end it."""
    tag = open_tag(checkout, domain, None)
    check_place_of_try(tag)
    with tag.locked():
        check_loop_is_champions(tag)
        known = {run.number for run in tag.ledger.runs}
        log = tag.home / "try.log"
        log.unlink(missing_ok=True)
        with open_regular(checkout / domain.editable) as file:
            source = file.read()
        if args.again is not None or args.base:
            commit = commit_to_repeat(tag, args.again)
            work = functools.partial(try_again, tag, ratchet, commit)
        else:
            work = functools.partial(try_edit, tag, ratchet, source, one_line(args.description))
        child = os.fork()  # it inherits the lock
        if child == 0:
            code = 1
            try:
                _detach(log)
                code = guarded(work)
            except BaseException:  # a fault of our own: the log has it
                traceback.print_exc()
            finally:
                os._exit(code)
    for number in (signal.SIGINT, signal.SIGTERM):  # from here on they end the waiting only
        signal.signal(number, signal.SIG_DFL)
    if not known:  # once is enough
        say("running; if this command is cut off, it goes on: uv run loop.py status --wait")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tag.load()
    new = [run for run in tag.ledger.rows if run.number not in known]
    last_line = read_tail(log, 1, ERROR_CHARS)
    if last_line.startswith("error: ") or not new:
        print(last_line)
    else:
        print(verdict(tag.ledger, new[-1]))
    return code


def check_place_of_try(tag: Tag) -> None:
    """Raises UserError unless the checkout is on the branch of a tag and has an editable file."""
    repository = tag.repository
    if repository.head_branch() != tag.branch:
        remedy = f"'git checkout -b {tag.branch}' makes one"
        if repository.commit_of(f"refs/heads/{tag.branch}"):
            remedy = f"'git checkout {tag.branch}' goes to it"
        raise UserError(f"this checkout is not on the branch of a run: {remedy}", 2)
    editable = tag.checkout / repository.editable
    if editable.is_symlink() or not editable.is_file():
        remedy = f"'git checkout -- {repository.editable}' restores it"
        raise UserError(f"{repository.editable} is not a regular file: {remedy}", 2)


def check_loop_is_champions(tag: Tag) -> None:
    """Raises UserError where loop.py or harness/ were edited: then an edit of the rules would decide about itself."""
    changed = tag.repository.changed_files(tag.checkout, tag.champion)
    edited = [name for name in changed if name == "loop.py" or name.startswith("harness/")]
    if edited and tag.ledger.runs:
        remedy = "'git checkout HEAD -- loop.py harness' puts them back"
        raise UserError(f"refused: {', '.join(edited[:3])} is not the champion's: {remedy}", 2)


def commit_to_repeat(tag: Tag, number: int | None) -> str:
    """The commit of an earlier run, the champion's for None. Raises UserError for what cannot be run again."""
    ledger = tag.ledger
    if not ledger.baseline:
        raise UserError("no run has a verdict yet: begin with 'uv run loop.py try baseline'", 2)
    if number is None:
        return ledger.champion
    if number not in ledger:
        raise UserError(f"--again {number}: there is no such run, the last one is {ledger.runs[-1].number}", 2)
    if ledger[number].purpose in MEASURED:
        remedy = "give the number of an experiment's run, or --base for the champion"
        raise UserError(f"--again {number}: that run was part of an {ledger[number].purpose}: {remedy}", 2)
    if not ledger[number].is_decided:
        raise UserError(f"--again {number}: that run waits for approval: start the loop with --approve first", 2)
    return ledger[number].commit


def _detach(log: Path) -> None:
    """A session of its own, nothing to read, and output to a log."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


def one_session(tag: Tag, ratchet: type, work: Callable, edits_checkout: bool = False, options: Options | None = None):
    """A session without an agent: `work(ratchet)`; what it returned."""
    with Interrupts(tag.checkout / "STOP") as interrupts:
        facts = open_session(tag, interrupts.were_sent, edits_checkout)
        with contextlib.closing(Session(tag, facts, ratchet, options or Options(), interrupts)) as session:
            return session.call(lambda: work(session.ratchet))


def try_edit(tag: Tag, ratchet: type, source: bytes, description: str) -> int:
    """Measure one edit; the baseline first, where there is none."""
    champions = tag.source(tag.champion)
    is_baseline = not tag.ledger.baseline and source == champions
    description = description or describe_edit(champions, source, tag.domain.editable)

    def work(loop) -> None:
        if not is_baseline and (problem := loop.find_problem(source)):
            raise UserError(f"refused: {problem}", 2)
        replicates.run_baseline(loop)
        if not is_baseline:
            loop.experiment(Edit(source, tag.champion, description))
            put_back(tag, source)  # not where it was stopped: the edit may be committed nowhere

    one_session(tag, ratchet, work, edits_checkout=True)
    return _exit_code(tag)


def try_again(tag: Tag, ratchet: type, commit: str) -> int:
    """Measure a commit of an earlier run once more. An edit that is in the checkout stays there."""
    champion = tag.champion
    untouched = tag.source(champion)
    one_session(tag, ratchet, lambda loop: replicates.run_again(loop, commit), edits_checkout=True)
    has_edit = put_back(tag, untouched)
    if has_edit and tag.champion != champion:
        name = tag.domain.editable
        say(f"note: {name} still holds your edit of the former champion {champion[:7]}: 'git diff' shows it")
    return _exit_code(tag)


def put_back(tag: Tag, source: bytes) -> bool:
    """Put the checkout to the champion, but for an edit other than `source`; return whether there is one.

    An agent that did not wait for the verdict may be at its next idea already: that edit is not ours to undo. What it
    changed in other files is undone, and said.
    """
    editable = tag.checkout / tag.domain.editable
    is_regular = editable.is_file() and not editable.is_symlink()
    found = editable.read_bytes() if is_regular else source
    others = [name for name in tag.repository.changed_files(tag.checkout, tag.champion) if name != tag.domain.editable]
    if others:
        say(f"note: {', '.join(others[:3])} was changed too: undone")
    tag.repository.reset(tag.checkout, tag.champion, tag.branch)
    has_edit = found != source
    if has_edit:
        write_atomically(editable, found)
    return has_edit


def _exit_code(tag: Tag) -> int:
    return 1 if tag.ledger.rows[-1].status == "crash" else 0


# status, report, audit, check


def command_status(domain: Domain, checkout: Path, ratchet: type, args: argparse.Namespace) -> int:
    tag = open_tag(checkout, domain, args.tag)
    if args.wait:
        number = _wait_for_verdict(tag)
        if number:
            print(verdict(tag.ledger, tag.ledger[number]))
            return 0
    print(report.status_text(tag))
    return 0


def _wait_for_verdict(tag: Tag) -> int:
    """The number of the next run that is decided, or of the last one if no loop runs. The baseline of a `try` on a
    fresh tag is no verdict yet, nor is a gain on a former champion or a run that only confirms another."""
    known = {run.number for run in tag.ledger.rows}
    while tag.is_busy():
        time.sleep(1)  # it must not load the machine that is measured
        tag.load()
        for run in tag.ledger.rows:
            if run.number not in known and run.purpose != "baseline" and not run.is_stale and not run.group:
                return run.number
    tag.load()
    return tag.ledger.rows[-1].number if tag.ledger.rows else 0


def command_report(domain: Domain, checkout: Path, ratchet: type, args: argparse.Namespace) -> int:
    if args.ledger:
        path = Path(args.ledger)
        if not path.is_file():
            raise UserError(f"{path} is not a file: give a results.tsv", 2)
        profile = os.environ.get("AUTORESEARCH_PROFILE") or TSV_PROFILE
        ledger, bad = parse_tsv(read_text(path.resolve()), domain, profile)
        if not ledger.rows:
            raise UserError(f"{path} has no rows: a ledger has lines of {domain.columns.strip()!r}")
        if bad:
            say(f"warning: {bad} lines of {path} are no rows")
        print(report.report_text(ledger))
        page.draw_progress(ledger, Path("progress.png"))
        page.write_page(ledger, Path("report.html"))
        return 0
    tag = open_tag(checkout, domain, args.tag)
    if not tag.ledger.rows:
        raise UserError(f"{tag.branch} has no rows yet: 'uv run loop.py --agent random' starts a run")
    print(report.report_text(tag.ledger))
    if group := tag.ledger.last_group("ablation"):
        print(f"\n{ablation.ablation_text(tag, group)}")
    page.draw_progress(tag.ledger, checkout / "progress.png")
    page.write_page(tag.ledger, checkout / "report.html", tag)
    return 0


def command_audit(domain: Domain, checkout: Path, ratchet: type, args: argparse.Namespace) -> int:
    tag = open_tag(checkout, domain, args.tag)
    if args.replicates < 1:
        raise UserError(f"--replicates {args.replicates}: audit needs at least 1", 2)
    with tag.locked():
        if not tag.ledger.baseline:
            raise UserError("there are no rows to audit: 'uv run loop.py --agent random' starts a run", 2)
        group = one_session(tag, ratchet, lambda loop: replicates.audit(loop, args.replicates))
    text, doubts = report.audit_text(tag.ledger, group)
    print(text)
    for doubt in doubts:
        say(f"error: {doubt}")
    return 1 if doubts else 0


def command_ablate(domain: Domain, checkout: Path, ratchet: type, args: argparse.Namespace) -> int:
    for name in ("replicates", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more", 2)
    check_ray(args.ray)
    options = Options(workers=args.workers, ray=args.ray)
    tag = open_tag(checkout, domain, args.tag)
    with tag.locked():
        if not tag.ledger.baseline:
            raise UserError("there are no rows to ablate: 'uv run loop.py --agent random' starts a run", 2)

        def work(loop) -> str:
            group = ablation.ablate(loop, args.replicates, args.workers)
            if args.apply:
                ablation.apply(loop, args.replicates)
            return group

        group = one_session(tag, ratchet, work, options=options)
    print(ablation.ablation_text(tag, group))
    if args.apply:
        say(tag.ledger.standing())
    return 0


def command_check(domain: Domain, checkout: Path, ratchet: type, args: argparse.Namespace) -> int:
    """Is everything there that a night needs? One run is made and left nowhere."""
    if args.agent or args.agent_cmd:
        choose_agent(args.agent, args.agent_cmd)
        print(f"agent: {args.agent or args.agent_cmd} is there")
    tag = open_tag(checkout, domain, f"check-{secrets.token_hex(4)}")  # nobody's tag
    try:
        with tag.locked(), Interrupts(checkout / "STOP") as interrupts:
            folder = tag.home / "tree"
            unpack(tag.repository.archive(tag.champion), folder)
            facts = machine.describe(domain, folder, machine.variables_for_training())
            print(f"profile: {facts.profile} ({facts.reason}), {facts.time_budget:g} s a run")
            print(f"device: {facts.device_name}, {len(facts.devices)} of them ({', '.join(facts.devices)})")
            print(f"data: {facts.problem or f'prepared in {facts.cache}'}")
            machine.try_isolation(domain, folder, machine.variables_for_training(), facts)
            print(f"isolation: {isolation.problem() or 'runs are isolated by bubblewrap'}")
            if problem := machine.lacking_disk(checkout):
                raise UserError(problem)
            if not facts.prepared:
                raise UserError(f"the data is not prepared: {' '.join(domain.prepare_command)}")
            with contextlib.closing(Session(tag, facts, ratchet, Options(), interrupts)) as session:
                run = session.call(lambda: replicates.check_run(session.ratchet))
            if run.status == "crash":
                shutil.copy(tag.folder(run.number) / "run.log", checkout)
                raise UserError(f"the run crashed: {run.reason}: run.log has its output")
    finally:
        shutil.rmtree(tag.home, ignore_errors=True)
    scored = f"{domain.metric} {domain.score_text(run.score)}"
    print(f"run: {scored} in {run.seconds:.0f} s ({run.startup_seconds:.0f} s to start), {run.memory_mb / 1024:.1f} GB")
    print("all is there")
    return 0


COMMANDS = {
    "run": command_run,
    "try": command_try,
    "status": command_status,
    "report": command_report,
    "audit": command_audit,
    "ablate": command_ablate,
    "check": command_check,
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
    timeout = Options.agent_timeout
    timeout_help = f"seconds for one proposal (default {timeout:g})"
    run.add_argument("--agent-timeout", type=float, default=timeout, metavar="S", help=timeout_help)
    usd_help = "ask no agent any more once this session's calls have cost X dollars (a restart counts from 0)"
    run.add_argument("--max-usd", type=float, default=math.inf, metavar="X", help=usd_help)
    patience_help = "stop after N experiments of this session without a keep"
    run.add_argument("--patience", type=int, default=math.inf, metavar="N", help=patience_help)
    run.add_argument("--target", type=float, metavar="SCORE", help="stop once the champion's score is as good")
    suggest_help = "TPE's next three suggestions are in the agent's prompt (needs the extra tpe)"
    run.add_argument("--suggest", choices=["tpe"], help=suggest_help)
    notify_help = "shell command that gets a text on standard input: of a keep, of the end, of a wait of half an hour"
    run.add_argument("--notify", metavar="CMD", help=notify_help)
    approve_help = "shell command that must exit 0 before a keep stands: the run as JSON on standard input"
    run.add_argument("--approve", metavar="CMD", help=approve_help)
    confirm_help = "run a gain again on up to N fresh seeds, candidate and champion, and keep what that confirms"
    run.add_argument("--confirm", type=int, default=0, metavar="N", help=confirm_help)
    ahead_help = "agents beyond --workers, which propose while others train (default on CUDA: as many, else 0)"
    run.add_argument("--ahead", type=int, metavar="N", help=ahead_help)

    trying = commands.add_parser("try", help="one experiment on the edit now in the editable file")
    what = trying.add_mutually_exclusive_group(required=True)
    what.add_argument("description", nargs="?", help="what the edit does: one line for the ledger")
    what.add_argument("--again", type=int, metavar="RUN", help="an earlier run's commit once more, on a fresh seed")
    what.add_argument("--base", action="store_true", help="the champion once more, on a fresh seed")

    status = commands.add_parser("status", help="where the night stands, one screen")
    status.add_argument("--wait", action="store_true", help="wait for the verdict of the experiment that runs now")

    reading = commands.add_parser("report", help="what was kept, what it gained, progress.png, report.html")
    reading.add_argument("ledger", nargs="?", metavar="LEDGER", help="another ledger than this tag's")

    audit = commands.add_parser("audit", help="baseline and champion again: fresh seeds, held-out split, clean process")
    audit.add_argument("--replicates", type=int, default=3, metavar="N", help="seeds each (default 3)")

    ablate = commands.add_parser("ablate", help="which kept changes are real: the champion without each of them")
    ablate.add_argument("--replicates", type=int, default=3, metavar="N", help="seeds for each change (default 3)")
    apply_help = "then take out what does not carry, if that loses at most one sigma"
    ablate.add_argument("--apply", action="store_true", help=apply_help)

    ray_help = "a Ray cluster to run them on, HOST:PORT (default: this machine)"
    for command in (run, ablate):
        command.add_argument("--workers", type=int, default=1, metavar="N", help="runs at a time (default 1)")
        command.add_argument("--ray", metavar="ADDRESS", help=ray_help)

    check = commands.add_parser("check", help="is everything there that a night needs? It makes one run")
    check.add_argument("--agent", metavar="NAME", help="look for this agent too, and its log-in where that is quick")
    check.add_argument("--agent-cmd", metavar="CMD", help="look for this command's program too")

    for command in (run, status, reading, audit, ablate):
        command.add_argument("--tag", help="name of the night (default: the current branch's, else today's date)")
    is_named = bool(argv) and argv[0] in (*commands.choices, "-h", "--help")
    is_word = bool(argv) and not argv[0].startswith("-")
    if is_word and not is_named:
        parser.error(f"no command {argv[0]!r}: use one of {', '.join(commands.choices)}")
    return parser.parse_args(argv if is_named else ["run", *argv])
