"""Kill -9 at every step: the loop, its agent, its training, or all of them at once as when the plug is pulled.

    uv run pytest tests/test_kill.py                      # a kill while an agent works
    uv run pytest tests/test_kill.py -m slow              # 20: at state transitions and at random
    KILLS=150 uv run pytest tests/test_kill.py -m slow    # 300

A state transition is whatever loop.py does to the outside: a process started (git, agent, training), a file of the
checkout opened, renamed or removed, a folder made. An audit hook, put into the loop's interpreter from outside by a
sitecustomize.py, counts them and kills right before the n-th; so the loop's files are the shipped ones.
"""

import contextlib
import itertools
import os
import random
import signal
import subprocess

import pytest
from conftest import DEEPER, Checkout, wait_for

from harness.files import is_locked

KILLS = int(os.environ.get("KILLS", 10))  # with one worker, and as many with four
HOOK = """
import os, sys

WATCHED = ("subprocess.Popen", "open", "os.mkdir", "os.rename", "os.remove", "os.symlink", "shutil.rmtree")
CHECKOUT, LOG, AT = os.environ["KILL_CHECKOUT"], os.environ.get("KILL_LOG"), int(os.environ.get("KILL_AT", 0))
seen, busy = 0, False

def everything():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = open(f"/proc/{pid}/environ", "rb").read()
            if int(pid) != os.getpid() and f"KILL_CHECKOUT={CHECKOUT}".encode() in environment:
                os.kill(int(pid), 9)
        except OSError:
            pass

def hook(event, args):
    global seen, busy
    if busy or event not in WATCHED or (event != "subprocess.Popen" and CHECKOUT not in str(args[:2])):
        return
    if event == "open" and str(args[0]).endswith((".py", ".pyc")):
        return
    seen += 1
    if LOG:
        busy = True
        print(event, file=open(LOG, "a"))
        busy = False
    if seen == AT:
        busy = True
        if "KILL_ALL" in os.environ:
            everything()
        os.kill(os.getpid(), 9)

if sys.orig_argv[1].endswith("loop.py"):
    sys.addaudithook(hook)
"""

# Better by one of two knobs that merge (DEPTH, LR), equal and so discarded, or crashing; no two edits are the same.
AGENT = """
    n = count()
    time.sleep(0.03)
    knob("SECONDS", -n if n % 5 == 4 else 0.05)  # it cannot sleep for less than nothing
    if n % 5 == 4:
        pass
    elif n % 2 == 0:
        knob("DEPTH", 12 + 1e3 / n)
    elif n % 4 == 1:
        knob("LR", 0.1 + 100 / n)
    else:
        with open("train.py", "a") as file:
            file.write(f"X = {n}\\n")
    say(f"idea {n}")
"""


class Night:
    """A run that is killed and started again and again, and what must hold after each restart."""

    def __init__(self, checkout: Checkout, workers: int):
        self.checkout = checkout
        self.workers = workers
        self.kills = 0
        checkout.replace("train.py", "LR = 0.1", "\n\n\nLR = 300")
        checkout.replace("train.py", "SECONDS = 0.0", "\n\n\nSECONDS = 0.05")
        checkout.set_knob(DEPTH=3000)
        with open(checkout.path / "train.py", "a") as file:  # what was measured, by another witness
            file.write(f'print("x", file=open({str(checkout.outside / "measured")!r}, "a"))\n')
        checkout.set_constant("harness/repository.py", "LOCK_PATIENCE", "0.3")
        checkout.commit("a fork with short waits")
        (checkout.outside / "sitecustomize.py").write_text(HOOK)
        checkout.env |= {"PYTHONPATH": str(checkout.outside), "KILL_CHECKOUT": str(checkout.path)}
        self.options = ["--tag", "t", "--agent-cmd", checkout.agent(AGENT), "--workers", str(workers), "--ahead", "1"]
        self.rows: list[list[str]] = []
        self.refs: dict[int, str] = {}
        self.start(0)
        self.check()

    def start(self, experiments: int, **env: str) -> None:
        """A start that must end well."""
        self.checkout.loop(*self.options, "--max-experiments", str(experiments), **env)

    def kill_in_hook(self, **env: str) -> None:
        """Kill where the hook is told to: right before a state transition."""
        process = self.checkout.popen(*self.options, "--max-experiments", "4", **env)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), err
        self.kills += process.returncode == -signal.SIGKILL
        self.check_after_kill(f"{env}")

    def kill_at_random(self, seconds: float, everything: bool) -> None:
        process = self.checkout.popen(*self.options)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=seconds)
        pids = self.checkout.processes(f"KILL_CHECKOUT={self.checkout.path}") if everything else [process.pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        self.kills += 1
        self.check_after_kill(f"after {seconds:.3f} s, everything {everything}")

    def check_after_kill(self, how: str) -> None:
        """Nothing recorded may be gone; then a restart must put everything right."""
        assert self.checkout.rows()[: len(self.rows)] == self.rows, how
        self.start(0)
        self.check(how)

    def check(self, how: str = "") -> None:
        checkout = self.checkout
        rows = checkout.rows()
        # the ledger: no row lost, doubled or changed, and a kill loses what was in flight, no more
        assert rows[: len(self.rows)] == self.rows, how
        commits = [row[0] for row in rows]
        assert len(set(commits)) == len(commits), how
        measured = (checkout.outside / "measured").read_text().count("x")
        scored = sum(row[3] != "crash" for row in rows)
        assert scored <= measured <= scored + self.kills * self.workers, how
        assert (checkout.path / "results.tsv").read_text() == (checkout.home() / "results.tsv").read_text(), how
        # the champion: the last kept row, branch and files at it
        kept = next(row[0] for row in reversed(rows) if row[3] == "keep")
        assert checkout.git("rev-parse", "refs/heads/autoresearch/t").startswith(kept), how
        assert checkout.git("symbolic-ref", "HEAD") == "refs/heads/autoresearch/t", how
        assert checkout.git("status", "--porcelain", "--untracked-files=no") == "", how
        best = [float(row[1]) for row in rows if row[3] == "keep"]
        assert best == sorted(best, reverse=True) and len(set(best)) == len(best), how
        # the numbers: none ever reused, every row's commit findable under its own
        layout = "--format=%(refname:lstrip=3) %(objectname) %(subject)"
        lines = checkout.git("for-each-ref", layout, "refs/autoresearch/t")
        refs = {int(number): rest for number, rest in (line.split(" ", 1) for line in lines.splitlines())}
        assert all(f" run {number:04d}: " in rest for number, rest in refs.items()), how
        assert {number: refs[number] for number in self.refs} == self.refs, how
        runs = checkout.runs()
        assert all(run.purpose == "baseline" or refs[run.number].startswith(run.commit) for run in runs), how
        numbers = [run.number for run in runs]
        assert len(set(numbers)) == len(numbers), how
        assert self.workers > 1 or numbers == sorted(numbers), how
        assert max(int(path.name) for path in (checkout.home() / "runs").iterdir()) >= max(refs, default=0), how
        # a gain on a former champion was run again, or dropped by name
        again = {run.again_of for run in runs}
        assert all(run.number in again for run in runs if run.is_stale), how
        # no process, no lock, no file left
        assert checkout.orphans() == [], how
        assert [path for path in (checkout.path / ".git").rglob("*.lock") if path.is_file()] == [], how
        assert not is_locked(checkout.home() / "lock"), how
        assert list((checkout.home() / "scratch").glob("*")) == [], how
        assert list((checkout.path / ".autoresearch" / "t").glob("[0-9]")) == [], how
        self.rows = rows
        self.refs = refs


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_kill_at_every_step_loses_nothing(checkout, workers):
    """Of ten kills, six at state transitions and four at random moments; every other one takes all processes."""
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    night = Night(checkout, workers)
    log = checkout.outside / "transitions"
    night.start(2, KILL_LOG=str(log))
    every = len(log.read_text().splitlines())
    step = max(1, 2 * every // KILLS)
    places = itertools.cycle(range(1 + chance.randrange(step), every + 1, step))
    while night.kills < KILLS:
        if night.kills % 10 < 6:
            place = {"KILL_AT": str(next(places))} | ({"KILL_ALL": "1"} if night.kills % 2 else {})
            night.kill_in_hook(**place)
        else:
            night.kill_at_random(0.1 + chance.random(), everything=night.kills % 2 == 1)
    print(f"seed {seed}: {night.kills} kills, {len(night.rows)} rows, {every} transitions")


def test_children_of_a_killed_loop_are_ended_by_the_next(checkout):
    """The first call hangs, with a grandchild in a session of its own; the loop dies; its successor cleans up."""
    agent = f"""
        if count() == 1:
            subprocess.Popen(["sleep", "60"], start_new_session=True)
            time.sleep(60)
        {DEEPER}
    """
    command = ["--tag", "t", "--agent-cmd", checkout.agent(agent), "--max-experiments"]
    process = checkout.popen(*command, "1")
    wait_for(lambda: any(line.startswith("sleep") for line in checkout.orphans()))
    process.kill()
    process.communicate()
    wait_for(lambda: len(checkout.orphans()) == 1)  # the child died with the loop, its hidden child did not
    assert checkout.statuses() == ["keep"]
    checkout.loop(*command, "0")  # it starts neither agent nor training, whose own end would sweep as well
    assert checkout.orphans() == []
    checkout.loop(*command, "1")
    assert checkout.statuses() == ["keep", "keep"]
