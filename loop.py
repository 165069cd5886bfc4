"""loop.py, the ratchet: an agent proposes an edit of train.py; the loop commits, runs, measures, decides and records.

    uv run loop.py --agent claude             # all night (Ctrl-C once: finish the experiment and stop; twice: stop now)
    uv run loop.py try "raise depth to 10"    # one experiment on the edit now in train.py, for an agent that loops
    uv run loop.py status [--wait]            # where the run stands
    uv run loop.py report [LEDGER]            # the morning read: what was kept, what it gained, progress.png
    uv run loop.py audit                      # baseline and champion again: fresh seeds, sealed test split

Words. desk: this checkout, where the agent edits. bench: a git worktree, where training runs. champion: the commit of
the ledger's last `keep` row. attempt: a commit of the champion's tree with train.py's blob replaced. experiment: an
idea; run: one execution of it. Everything of the loop's own is under <git common dir>/autoresearch/<tag>/, where no
reset or clean of an agent reaches. Ledger and attempts' refs are the state: kill the loop anywhere, start it again.
Exit codes: 0 done, or stopped by request; 1 error or crash; 2 usage or refusal.
"""

import sys

if __name__ == "__main__":  # an agent may have left a json.py beside this file: the standard library comes first
    sys.path.append(sys.path.pop(0))

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import report
from agents.clis import AGENTS, choose_agent
from ledger import AGAIN, COLUMNS, Row, decide, noise, one_line, parse_ledger, scores
from plumbing import Git, UserError, duration, flock_now, run_child, say, show, sweep, tail, watch, write_atomically

# ---------------------------------------------------------------------------------------------------------------------
# What a fork for another domain changes

METRIC = "val_bpb"                                # key of the summary and of the evaluator's record; lower is better
MEMORY = "peak_vram_mb"                           # key of the summary, MiB
EDITABLE = "train.py"                             # the one file that the agent edits
INSTRUCTIONS = "program.md"                       # the human's file: read anew for every proposal, never touched
TRAIN_COMMAND = [sys.executable, "train.py"]      # run on the bench
PREPARE_COMMAND = [sys.executable, "prepare.py"]  # run there when the data is missing
DESCRIBE_COMMAND = [sys.executable, "-c", "import json, prepare; print(json.dumps(prepare.describe()))"]

STARTUP_ALLOWANCE = 300  # seconds for compilation and evaluation: a run may take 2 * TIME_BUDGET + this
AGENT_TIMEOUT = 1800     # seconds that a proposal may take
BACKOFF = 5, 600         # seconds, first and longest wait after a failed proposal
POLL = 10                # seconds between looks at an environment that must recover
MIN_FREE_GB = 1.0        # GB that the disk must have free before a run
FIRST_SEED = 42          # every attempt's first run; its replicates count up from here

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|_PAT$", re.IGNORECASE)  # variables withheld from training


class StopNow(Exception):
    """The second Ctrl-C, or SIGTERM."""


class Crash(Exception):
    """A run without a believable result; the message is the reason that the ledger records."""


# ---------------------------------------------------------------------------------------------------------------------
# What a run said. Pure functions


def parse_log(log: str, key: str) -> float:
    """The one finite number that a run printed as `key: number`; raises Crash for anything else."""
    found = re.findall(rf"^{key}:[ \t]*(.*)$", log, re.MULTILINE)
    if len(found) != 1:
        raise Crash(f"{key} printed {len(found)} times" if found else f"no {key} printed")
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(found[0])):
            return value
    raise Crash(f"{key} is {one_line(found[0], 40)!r}, not a finite number")


def check_record(record: dict, expected: dict, printed: float) -> float:
    """The evaluator's own score; raises Crash where its record is not the one that this run had to write."""
    for key, want in expected.items():
        if (had := record.get(key) if isinstance(record, dict) else None) != want:
            had, want = (one_line(repr(value), 30) for value in (had, want))
            raise Crash(f"the evaluator's record has {key} {had}, this run was to have {want}")
    score = record.get(METRIC)
    if not isinstance(score, float) or not abs(score - printed) <= 1e-6:
        raise Crash(f"printed {METRIC} {printed} is not the evaluator's {score}")
    return score


def crash_reason(log: str) -> str:
    """The line that says best why a run ended: the last exception or `error:` line, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no output"]
    errors = [line for line in lines if re.match(r"error:|[\w.]*(Error|Exception|Refused|Exceeded|Causal)\b", line)]
    return one_line((errors or lines)[-1], 120)


def changed_knobs(old: str, new: str) -> str:
    """`DEPTH 8 -> 10, MATRIX_LR 0.04 -> 0.05`: the description of an edit whose author wrote none."""
    before, after = (re.findall(r"^ *([A-Z][A-Z0-9_]*) = (.+?) *(?:#.*)?$", text, re.MULTILINE) for text in (old, new))
    changes = [f"{a} {x} -> {y}" for (a, x), (b, y) in zip(before, after, strict=False) if a == b and x != y]
    return ", ".join(changes) or f"edit of {EDITABLE}"


# ---------------------------------------------------------------------------------------------------------------------
# The ratchet


@dataclass(frozen=True)
class Proposal:
    """An edit that passed the gate: `folder` holds the file as the agent left it, `base` is the commit it edits."""

    folder: Path
    base: str
    description: str


class Ratchet:
    """One tag's run on one desk: `locked`, then `start`, then `run`, `try_once` or `audit`."""

    def __init__(self, tag: str | None, args: argparse.Namespace):
        self.desk, self.args = Path(__file__).resolve().parent, args
        self.git = Git(self.desk, EDITABLE, spared=INSTRUCTIONS)
        self.start_branch = self.git("symbolic-ref", "--short", "--quiet", "HEAD", default="")
        today, branch_tag = time.strftime("%b%d").lower(), self.start_branch.removeprefix("autoresearch/")
        self.tag = tag or (today if branch_tag == self.start_branch else branch_tag)
        self.branch, self.refs = f"autoresearch/{self.tag}", f"refs/autoresearch/{self.tag}/"
        if "/" in self.tag or not self.git("check-ref-format", "--branch", self.branch, default=""):
            raise UserError(f"--tag {self.tag!r} is no valid branch name: use letters, digits and '-', say {today}", 2)
        self.home = self.git.common / "autoresearch" / self.tag
        names = "results.tsv", "experiments", "bench", "timeline.jsonl"
        self.ledger, self.runs, self.bench, self.timeline = (self.home / name for name in names)
        self.facts: dict = {}  # what the bench's prepare.py says of itself
        self.done = self.failures = 0  # experiments of this session; proposals that failed in a row
        self.refusal = self.running = ""  # for the prompt: why the last edit was refused, what trains meanwhile
        self.crashed: tuple[str, str] | None = None  # a crashed attempt and the end of its log: to be mended, once
        self.stop_soon, self.stop_now, self.trained = threading.Event(), threading.Event(), threading.Event()
        self.interrupted = False  # by a first Ctrl-C
        self.deadline = time.monotonic() + 3600 * getattr(args, "hours", math.inf)
        self.load()

    # Start: whatever a killed loop or an agent left behind is put right here

    def load(self) -> None:
        """Rows and champion, from the ledger (a torn last line is no row) and the attempts' refs; writes nothing."""
        text = self.ledger.read_text(errors="replace") if self.ledger.exists() else ""
        self.rows, _ = parse_ledger(text[: text.rfind("\n") + 1])
        listing = self.git("for-each-ref", "--format=%(refname:lstrip=3) %(objectname)", self.refs)
        self.attempts = dict(map(str.split, listing.splitlines()))  # number -> commit
        self.hashes = {commit[:7]: commit for commit in self.attempts.values()}  # as the ledger has them -> in full
        kept = [row.commit for row in self.rows if row.status == "keep"]
        if kept and kept[-1] not in self.hashes:
            raise UserError(f"the ledger's last kept commit {kept[-1]} is not in {self.refs}: choose another --tag")
        self.champion = self.hashes[kept[-1]] if kept else self.attempts.get("0") or self.git("rev-parse", "HEAD")

    def trailer(self, key: str) -> str:
        """What the champion's commit says of "profile" or "digest"."""
        return self.git("log", "-1", f"--format=%(trailers:key=Autoresearch-{key},valueonly)", self.champion).strip()

    def check_trailer(self, key: str, facts: dict) -> None:
        if (had := self.trailer(key)) != facts[key]:
            now = f"this is {facts[key][:12]}: set AUTORESEARCH_PROFILE and AUTORESEARCH_CACHE as they were"
            raise UserError(f"tag {self.tag} was begun under {key} {had[:12]}, {now}, or choose another --tag")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the tag's lock (one loop at a time) and heed signals; a terminal that is closed ends nothing."""
        self.home.mkdir(parents=True, exist_ok=True)
        with open(self.home / "lock", "a") as lock:
            if not flock_now(lock):
                raise UserError(f"tag {self.tag} is busy: 'uv run loop.py status --wait' waits for the verdict", 2)
            self.load()  # another loop may have written a row since
            handlers = {signal.SIGINT: self.on_signal, signal.SIGTERM: self.on_signal, signal.SIGHUP: signal.SIG_IGN}
            for number, handler in handlers.items():
                signal.signal(number, handler)
            yield

    def on_signal(self, number: int, _frame) -> None:
        """Heeded in a thread: the main one may be in the middle of a print, or hold the lock of an event."""
        now = number == signal.SIGTERM or self.interrupted or self.stop_soon.is_set()
        self.interrupted = True
        threading.Thread(target=self.stop, args=(now,)).start()

    def stop(self, now: bool) -> None:
        if now:
            self.stop_now.set()
        else:
            say("finishing this experiment, then stopping (Ctrl-C again: stop now)")
        self.stop_soon.set()

    def start(self, trying: bool = False) -> None:
        """Ledger, desk, bench and data as they must be before the next experiment; `try` keeps the desk's edit."""
        for role in ("agent", "train"):
            sweep(self.mark(role))
        changed = [name for name in self.git.changed(self.champion) if not (trying and name == EDITABLE)]
        tip = self.git("rev-parse", "--verify", "--quiet", f"refs/heads/{self.branch}", default=self.champion)
        if "0" not in self.attempts:
            if changed:
                names = ", ".join(changed)
                raise UserError(f"{names} has uncommitted changes: commit them or run 'git stash', then start again")
            if tip != self.champion:
                raise UserError(f"branch {self.branch} exists, at {tip[:7]}: check it out, or choose another --tag", 2)
        elif changed:
            diff = max([self.home, *self.runs.glob("[0-9]*")]) / "interrupted.diff"
            with open(diff, "ab") as file:
                file.write(self.git("diff", "--binary", self.champion, "--", *changed, raw=True) + b"\n")
            say(f"note: {', '.join(changed)} differed from the champion; the difference is saved in {diff}")
        if self.attempts and not self.git("for-each-ref", f"--contains={tip}", self.refs):
            say(f"note: {self.branch} was at {tip[:7]}, no experiment's: 'git branch NAME {tip[:7]}' keeps it")
        self.git.place(self.bench, self.champion)
        self.facts = self.describe()
        self.expected = self.facts["time_budget"]  # seconds that a run takes; later the last one's
        if "0" not in self.attempts:
            self.champion = self.commit("0", None, "baseline")
        self.check_trailer("digest", self.facts)
        write_atomically(self.ledger, COLUMNS + "".join(map(str, self.rows)))
        self.publish()
        if not trying:
            self.git.reset_desk(self.branch, self.champion)

    def describe(self) -> dict:
        """What the bench's prepare.py says of profile, budget, data and device; if there is no data, prepares it."""
        for may_prepare in (True, False):
            env = self.child_env("train")
            child = subprocess.run(DESCRIBE_COMMAND, cwd=self.bench, env=env, capture_output=True, text=True)
            if child.returncode:
                lines = child.stderr.strip().splitlines() or ["prepare.py cannot describe itself"]
                whose = f" (so says prepare.py as of {self.champion[:7]})" if self.attempts else ""
                raise UserError(lines[-1].removeprefix("error: ") + whose, 2 if child.returncode == 2 else 1)
            facts = json.loads(child.stdout.splitlines()[-1])
            if self.attempts:
                self.check_trailer("profile", facts)
            if not facts["prepared"] and may_prepare:
                say(f"profile {facts['profile']} ({facts['reason']}) has no data yet: preparing it in {facts['cache']}")
                watch(PREPARE_COMMAND, cwd=self.bench, stop=self.stop_now)
        if self.stop_soon.is_set() and not self.facts:
            raise StopNow
        if not facts["prepared"]:
            raise UserError(f"the preparation failed: {facts['problem']}")
        return facts

    def new_folder(self) -> Path:
        """The folder of a number that no experiment of this tag ever had."""
        self.runs.mkdir(exist_ok=True)
        number = max(map(int, ["0", *self.attempts, *(path.name for path in self.runs.glob("[0-9]*"))])) + 1
        (folder := self.runs / f"{number:04d}").mkdir()
        return folder

    def commit(self, number: str, file: Path | None, description: str) -> str:
        """The candidate: the champion's tree with one blob replaced, kept for ever under a ref of its number."""
        message = f"experiment {int(number)}: {description}\n\nAutoresearch-profile: {self.facts['profile']}\n"
        message += f"Autoresearch-digest: {self.facts['digest']}"
        commit = self.git.commit(self.champion, file, message, f"{self.refs}{int(number)}")
        self.hashes[commit[:7]] = commit
        return commit

    def publish(self) -> None:
        """The ledger's copy and the link to the experiments' folders, at the top level."""
        link = self.desk / "runs"
        try:
            write_atomically(self.desk / "results.tsv", self.ledger.read_text())
            if link.is_symlink():
                link.unlink()
            if not link.exists():
                link.symlink_to(self.runs)
        except OSError as error:
            say(f"warning: no copy of the ledger {self.ledger} at the top level ({error})")

    # Environment: what must be there before a run, and is never blamed on an idea

    def mark(self, role: str) -> str:
        return f"{self.home}:{role}"

    def child_env(self, role: str) -> dict[str, str]:
        own = "AUTORESEARCH_RESULT", "AUTORESEARCH_AUDIT", "AUTORESEARCH_SEED", "AUTORESEARCH_MARK"
        kept = [key for key in os.environ if key not in own and (role == "agent" or not SECRET.search(key))]
        profile = {"AUTORESEARCH_PROFILE": self.facts["profile"]} if self.facts else {}
        return {key: os.environ[key] for key in kept} | profile

    def environment_problem(self, after_crash: bool = False) -> str:
        """What the machine lacks just now, "" if nothing; raises UserError for what does not mend itself."""
        for name, digest in self.facts["files"].items():
            path = Path(self.facts["cache"], name)
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise UserError(f"{path} is not as it was prepared: look with 'uv run prepare.py --verify'")
        if (free := shutil.disk_usage(self.home).free / 1e9) < MIN_FREE_GB:
            return f"{free:.1f} GB free on the disk of {self.home}, {MIN_FREE_GB} GB needed"
        with contextlib.suppress(FileNotFoundError), open(self.facts["lock"]) as lock:
            if not after_crash and not flock_now(lock):  # after a crash it may be another loop's already
                return f"another run holds the device {self.facts['device_name']} ({lock.name})"
        if after_crash and self.facts["device"] == "cuda":  # not before a run: it takes seconds
            self.git.place(self.bench, self.champion)
            free, was_free = self.describe()["free_gb"], self.facts["free_gb"]  # 0.0 if the GPU is gone
            if free < was_free - 1:
                return f"the GPU has {free:.1f} GB free, at the start it had {was_free:.1f}"
        return ""

    def wait_for_environment(self, after_crash: bool = False) -> bool:
        """Wait until nothing is lacking, saying what is; False if nothing was."""
        said = ""
        while problem := self.environment_problem(after_crash):
            if problem != said:
                say(f"waiting: {problem}")
                self.note("waiting", description=problem)
            said = problem
            self.pause(POLL, self.stopping)
            if self.stop_soon.is_set():
                raise StopNow
        return bool(said)

    def pause(self, seconds: float, leave: Callable[[], bool] = lambda: False) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not leave():
            if self.stop_now.wait(0.2):
                raise StopNow

    # Propose

    def propose(self, leave: Callable[[], bool]) -> Proposal | None:
        """Ask the agent, on a clean desk, until an edit passes the gate; None if `leave()` after a failure."""
        folder, champion, path = self.new_folder(), self.champion, self.desk / EDITABLE
        mend, self.crashed = self.crashed, None
        while True:
            self.git.reset_desk(self.branch, champion)
            base = self.git("rev-parse", f"{mend[0]}^") if mend else champion
            start = self.git.read(mend[0] if mend else champion, EDITABLE)
            path.write_bytes(start)
            problem = self.ask(folder, mend[1] if mend else "")
            if path.is_symlink() or not path.is_file():
                problem = self.refusal = f"{EDITABLE} is not a regular file"
            elif path.read_bytes() != start:  # an exit code alone says little: some agents edit, then fail
                shutil.copyfile(path, folder / EDITABLE)
                problem = self.refusal = self.gate(folder / EDITABLE)
            if not problem:
                self.failures = 0
                return Proposal(folder, base, self.describe_edit(start, folder))
            delay = min(BACKOFF[1], BACKOFF[0] * 2 ** min(self.failures, 20))
            self.failures += 1
            say(f"no proposal: {problem}; again in {duration(delay)} (runs/{folder.name}/agent.log)")
            self.pause(delay, leave)
            if leave():
                self.crashed = self.crashed or mend
                return None
            mend = None  # offered once: an agent that cannot mend it would be stuck with it

    def ask(self, folder: Path, failure: str) -> str:
        """One headless call of the agent on the desk; how it ended, in case that it did not edit the file."""
        prompt, log = folder / "prompt.md", folder / "agent.log"
        prompt.write_text(self.prompt(failure))
        with contextlib.suppress(OSError):
            (self.desk / "experiment.txt").unlink()
        command = [word.replace("{prompt_file}", str(prompt)) for word in self.args.agent.command]
        try:
            ended = run_child(
                command, cwd=self.desk, env=self.child_env("agent"), mark=self.mark("agent"), log=log,
                limit=self.args.agent_timeout, stop=self.stop_now,
                stdin=prompt if command == self.args.agent.command else os.devnull,
                tick=lambda seconds: self.running or self.show_live(f"the agent proposes, {seconds:.0f} s", log),
            )  # fmt: skip
        except OSError as error:  # while it updates itself, say
            return f"the agent does not start: {error}"
        if self.stop_now.is_set():
            raise StopNow
        if ended:
            return f"the agent ended with {ended}: {one_line(tail(log, 1), 90)}"
        return f"the agent left {EDITABLE} as it was"

    def gate(self, file: Path) -> str:
        """Why a file is not worth a run, "" if it is: it must compile and must not have been measured before."""
        try:
            compile(file.read_bytes(), EDITABLE, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            return f"{EDITABLE} does not compile: {one_line(str(error))}"
        blob = self.git("hash-object", "--no-filters", "--", str(file))
        if blob == self.git("rev-parse", f"{self.champion}:{EDITABLE}"):
            return f"{EDITABLE} is the champion's"
        rows = [row for row in self.rows if row.commit in self.hashes]  # a copy: the main thread appends
        blobs = self.git("rev-parse", *(f"{self.hashes[row.commit]}:{EDITABLE}" for row in rows)).split()
        for row, tried in zip(rows, blobs, strict=True):
            if blob == tried and not row.description.endswith(AGAIN):  # the loop was killed before its second run
                return f"{EDITABLE} repeats {row.commit} ({row.status}: {row.description})"
        return ""

    def describe_edit(self, start: bytes, folder: Path) -> str:
        with contextlib.suppress(OSError):
            if text := one_line((self.desk / "experiment.txt").read_text(errors="replace")[:2000]):
                return text
        return one_line(changed_knobs(start.decode(errors="replace"), (folder / EDITABLE).read_text(errors="replace")))

    def prompt(self, failure: str) -> str:
        """The human's instructions, then what only the loop knows."""
        path = self.desk / INSTRUCTIONS
        told = path.read_bytes() if path.is_file() else self.git.read(self.champion, INSTRUCTIONS)
        told = told.decode(errors="replace") + "\n---\n\n# This experiment\n\n"
        told += f"loop.py calls you for one proposal. {self.summary()}\n\n"
        told += "The ledger's last rows:\n\n" + COLUMNS + "".join(map(str, self.rows[-20:])) + "\n"
        if self.running:
            told += f"Running now, its verdict unknown (propose something else): {self.running}\n\n"
        if failure:
            told += f"{EDITABLE} now holds an experiment that crashed: mend it, or restore it and try another idea. "
            told += f"The end of its log:\n\n{failure}\n\n"
        if self.refusal:
            told += f"Your last proposal was refused: {self.refusal}\n\n"
        told += f"Now: edit {EDITABLE} once, one idea. Write one line that describes it to experiment.txt. "
        return told + "Do not train, do not commit, touch no other file. Then stop.\n"

    # Run, judge, record

    def execute(self, commit: str, seed: int, folder: Path, audit: bool = False) -> tuple[dict, float]:
        """Train a commit on the bench: (the evaluator's record, GiB). Raises Crash if it fails, by its own fault."""
        while True:
            self.wait_for_environment()
            try:
                return self.train(commit, seed, folder, audit)
            except Crash as crash:
                for left in (self.bench, self.home / "tmp"):  # a disk that the run filled is not the machine's fault
                    shutil.rmtree(left, ignore_errors=True)
                if not self.wait_for_environment(after_crash=True):
                    raise
                say(f"  {crash}: not the idea's fault, it runs again")

    def train(self, commit: str, seed: int, folder: Path, audit: bool) -> tuple[dict, float]:
        scratch, log, result = self.home / "tmp", folder / "run.log", folder / "result.json"
        self.git.place(self.bench, commit)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        result.unlink(missing_ok=True)
        compiled = self.git.common / "autoresearch" / "compile_cache"
        env = self.child_env("train") | {
            "AUTORESEARCH_RESULT": str(result), "AUTORESEARCH_SEED": str(seed), "AUTORESEARCH_AUDIT": str(int(audit)),
            "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"), "TRITON_CACHE_DIR": str(compiled / "triton"),
            "TMPDIR": str(scratch),
        }  # fmt: skip
        self.note("training", folder, self.running)
        start = time.monotonic()
        ended = run_child(
            TRAIN_COMMAND, cwd=self.bench, env=env, mark=self.mark("train"), log=log, stop=self.stop_now,
            limit=2 * self.facts["time_budget"] + STARTUP_ALLOWANCE,
            tick=lambda seconds: self.show_live(f"{seconds:.0f} s of ~{duration(self.expected)}", log),
        )  # fmt: skip
        if self.stop_now.is_set():
            raise StopNow
        self.expected = time.monotonic() - start
        self.note("measured", folder, self.running, self.expected)
        text = log.read_text(errors="replace")
        if ended:
            raise Crash(ended if ended.startswith("timeout") else f"{crash_reason(text)} ({ended})")
        printed, memory_mb = parse_log(text, METRIC), parse_log(text, MEMORY)
        try:
            record = json.loads(result.read_text())
        except (OSError, ValueError, RecursionError):
            raise Crash(f"printed {METRIC} {printed}, but the evaluator left no record") from None
        expected = {key: self.facts[key] for key in ("profile", "digest", "files", "prepare_sha256")}
        check_record(record, expected | {"split": "val", "seed": seed, "rows": self.facts["rows"]["val"]}, printed)
        return record, memory_mb / 1024

    def experiment(self, commit: str, folder: Path, description: str) -> str:
        """Run, judge, record; a kept commit is the champion from now on. Returns the status of the last row."""
        (folder / "change.diff").write_bytes(self.git("diff", f"{commit}^", commit, raw=True))
        say(f"{self.place_in_run()}: {description} (runs/{folder.name})")
        self.running, is_champion, verdict = description, commit == self.champion, "again"
        while verdict == "again":
            before, sigma, best = scores(self.rows).get(commit[:7], []), noise(self.rows), self.best()
            seed = FIRST_SEED + len(before)
            told = f"{description} (seed {seed})" if sigma or before or self.args.replicates > 1 else description
            try:
                record, memory_gb = self.execute(commit, seed, folder)
            except Crash as crash:
                if not self.rows:  # the next start begins from HEAD again: a person mends it and commits
                    self.git("update-ref", "-d", f"{self.refs}0")
                if is_champion:
                    raise UserError(f"the {description} crashed: {crash} (log runs/{folder.name}/run.log)") from None
                self.crashed = commit, tail(folder / "run.log", 50)
                self.record(Row(commit[:7], 0.0, 0.0, "crash", one_line(f"{crash}: {told}")))
                say(f"  crash: {crash}")
                return "crash"
            score = round(record[METRIC], 6)
            verdict = "keep" if is_champion else decide(scores(self.rows)[self.champion[:7]], [*before, score], sigma)
            status, told = ("discard", f"{told}, {AGAIN}") if verdict == "again" else (verdict, told)
            self.record(Row(commit[:7], score, memory_gb, status, one_line(told)))
            gain = "" if best is None else f", {score - best:+.6f} to the best"
            say(f"  {verdict}: {METRIC} {score:.6f}{gain}, {duration(self.expected)}")
        self.champion = commit if verdict == "keep" else self.champion
        return verdict

    def record(self, row: Row) -> None:
        """Append a row, durably."""
        with open(self.ledger, "a") as file:
            file.write(str(row))
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        self.publish()

    # A night

    def run(self) -> None:
        """Baseline, then propose, run and record until asked to stop."""
        ahead = self.facts["device"] == "cuda" if self.args.ahead is None else self.args.ahead
        told = "profile {profile} ({reason}), {device_name}, {time_budget} s of training a run".format(**self.facts)
        say(f"{self.branch}: {told}")
        (self.desk / "STOP").unlink(missing_ok=True)  # an old one
        self.note("session")
        waiting: Future | None = None
        pool = ThreadPoolExecutor(1)

        def measure(commit: str, folder: Path, description: str) -> None:
            """Run the experiment; if ahead, the agent proposes the next meanwhile."""
            nonlocal waiting
            self.running = description
            self.trained.clear()
            if ahead and not waiting and not self.finished():
                waiting = pool.submit(self.propose, self.trained.is_set)
            try:
                self.experiment(commit, folder, description)
            finally:
                self.trained.set()
                self.running = ""

        try:
            wanted = max(1, self.args.replicates)
            while len(scores(self.rows).get(self.champion[:7], [])) < wanted and not self.stopping():
                measure(self.champion, self.new_folder(), "replicate" if self.rows else "baseline")
            while not self.finished():
                self.note("the agent proposes")
                proposal = waiting.result() if waiting else self.propose(self.finished)
                waiting = None
                self.git.reset_desk(self.branch, self.champion)
                if proposal and self.merges(proposal):
                    commit = self.commit(proposal.folder.name, proposal.folder / EDITABLE, proposal.description)
                    self.done += 1
                    measure(commit, proposal.folder, proposal.description)
        finally:
            self.stop_now.set()  # ends a proposal that is still being made
            pool.shutdown()
            self.git.reset_desk(self.branch, self.champion)
            self.note("stopped")

    def merges(self, proposal: Proposal) -> bool:
        """Bring a proposal onto the champion of now; False if the two do not go together: it is proposed anew."""
        ours, base, theirs = (proposal.folder / name for name in ("champion.py", "base.py", EDITABLE))
        problem = ""
        if proposal.base != self.champion:
            ours.write_bytes(self.git.read(self.champion, EDITABLE))
            base.write_bytes(self.git.read(proposal.base, EDITABLE))
            text = self.git("merge-file", "-p", "-q", str(ours), str(base), str(theirs), raw=True, default=b"")
            problem = "" if text else "it conflicts with the new champion"
            theirs.write_bytes(text or theirs.read_bytes())
        if problem := problem or self.gate(theirs):
            say(f"proposal {proposal.folder.name} dropped: {problem}")
            self.refusal = problem
        return not problem

    def stopping(self) -> bool:
        """True once asked to stop after this experiment: Ctrl-C, a file STOP, --hours."""
        with contextlib.suppress(FileNotFoundError):
            (self.desk / "STOP").unlink()
            self.stop_soon.set()
        if time.monotonic() > self.deadline:
            self.stop_soon.set()
        return self.stop_soon.is_set()

    def finished(self) -> bool:
        """True once no further experiment should begin."""
        return self.stopping() or self.done >= self.args.max_experiments

    def try_once(self, folder: Path, description: str) -> int:
        """The experiment of `try`, whose file was copied into the folder before; returns an exit code."""
        self.start(trying=True)
        first, path, tried, verdict = not self.rows, self.desk / EDITABLE, (folder / EDITABLE).read_bytes(), "keep"
        is_baseline = first and tried == self.git.read(self.champion, EDITABLE)
        if not is_baseline and (problem := self.gate(folder / EDITABLE)):
            raise UserError(f"refused: {problem}", 2)
        if first:
            self.experiment(self.champion, folder if is_baseline else self.new_folder(), "baseline")
        if not is_baseline:
            verdict = self.experiment(self.commit(folder.name, folder / EDITABLE, description), folder, description)
        later = path.read_bytes() if path.is_file() else tried
        self.git.reset_desk(self.branch, self.champion)
        if later != tried:  # the agent is at its next idea already: that is not ours to reset
            path.write_bytes(later)
        return 1 if verdict == "crash" else 0

    def audit(self, replicates: int) -> dict[str, list[tuple[float, float]]]:
        """Train baseline and champion, alternating, on fresh seeds; their scores (bpb): validation, sealed test."""
        baseline = self.hashes[self.rows[0].commit]
        commits = {f"baseline {baseline[:7]}": baseline, f"champion {self.champion[:7]}": self.champion}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commits}
        self.note("session")
        for _ in range(replicates):
            seed = secrets.randbelow(10**9)  # no edit can foresee it
            for name, commit in commits.items():
                folder = self.new_folder()
                self.running = f"audit of the {name}, seed {seed}"
                say(f"{folder.name}: {self.running}")
                try:
                    record, _ = self.execute(commit, seed, folder, audit=True)
                except Crash as crash:
                    raise UserError(f"the {name} crashed: {crash} (log runs/{folder.name}/run.log)") from None
                found[name].append((record[METRIC], record["test_bpb"]))
                say(f"  validation {record[METRIC]:.6f}, test {record['test_bpb']:.6f}")
        self.note("stopped")
        return found

    # What a person sees

    def best(self) -> float | None:
        found = scores(self.rows).get(self.champion[:7])
        return statistics.fmean(found) if found else None

    def show_live(self, text: str, log: Path) -> None:
        """The live line: where the run stands and the last line of a log."""
        best = f"best {self.best():.6f}" if self.best() else "no score yet"
        show(f"{self.place_in_run()} | {best} | {text} | {one_line(tail(log, 1))}")

    def place_in_run(self) -> str:
        total = getattr(self.args, "max_experiments", math.inf)
        left = (total - self.done + 1) * self.expected
        return f"experiment {self.done}" + ("" if total == math.inf else f" of {total}, ~{duration(left)} left")

    def summary(self) -> str:
        """Best so far and what it took, in one line."""
        if (best := self.best()) is None:
            return "No run yet: the baseline comes first."
        first, statuses = self.rows[0].val_bpb, [row.status for row in self.rows]
        counts = ", ".join(f"{statuses.count(kind)} {kind}" for kind in ("keep", "discard", "crash"))
        return f"Best {METRIC} {best:.6f} ({self.champion[:7]}), {best - first:+.6f} to the baseline; rows: {counts}."

    def note(self, event: str, folder: Path | None = None, description: str = "", seconds: float = 0.0) -> None:
        """A line of the timeline: from it `status` tells where a run stands and how busy the device was."""
        run = f"runs/{folder.name}" if folder else ""
        entry = {"at": time.time(), "event": event, "run": run, "description": description, "seconds": seconds}
        with contextlib.suppress(OSError), open(self.timeline, "a") as file:
            file.write(json.dumps(entry) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def command_run(args: argparse.Namespace) -> int:
    args.agent = choose_agent(args.agent, args.agent_cmd)
    ratchet = Ratchet(args.tag, args)
    with ratchet.locked():
        try:
            ratchet.start()
            ratchet.run()
        except StopNow:
            say("stopped: the experiment in flight is dropped, ledger and branch are as its last row says")
    say(f"{ratchet.summary()} Read it with: uv run loop.py report")
    return 0


def command_try(args: argparse.Namespace) -> int:
    """The experiment runs in a session of its own: killing this command, which only waits for it, does not end it."""
    ratchet, path = Ratchet(None, args), Path(EDITABLE)
    if ratchet.start_branch != ratchet.branch:
        raise UserError(f"this checkout is not on the branch of a run: 'git checkout -b {ratchet.branch}' makes one", 2)
    if (ratchet.desk / path).is_symlink() or not (ratchet.desk / path).is_file():
        raise UserError(f"{EDITABLE} is not a regular file: 'git checkout -- {EDITABLE}' restores it", 2)
    with ratchet.locked():
        before, folder = len(ratchet.rows), ratchet.new_folder()
        shutil.copyfile(ratchet.desk / path, folder / EDITABLE)
        if not (child := os.fork()):  # it inherits the lock
            os.setsid()
            output = os.open(folder / "loop.log", os.O_WRONLY | os.O_CREAT)
            for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
                os.dup2(source, number)
            os._exit(guarded(lambda: ratchet.try_once(folder, one_line(args.description))))
    for number in (signal.SIGINT, signal.SIGTERM):  # from here on they end the waiting only
        signal.signal(number, signal.SIG_DFL)
    say(f"running as runs/{folder.name}; if this command is cut off, it goes on: uv run loop.py status --wait")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ratchet.load()
    told = tail(folder / "loop.log", 1)
    print(told if told.startswith("error: ") or len(ratchet.rows) == before else report.verdict(ratchet))
    return code


def command_status(args: argparse.Namespace) -> int:
    return report.status(Ratchet(args.tag, args), args.wait)


def command_report(args: argparse.Namespace) -> int:
    return report.report(None if args.ledger else Ratchet(args.tag, args), args.ledger)


def command_audit(args: argparse.Namespace) -> int:
    ratchet = Ratchet(args.tag, args)
    if not ratchet.rows:
        raise UserError("there are no rows to audit: 'uv run loop.py --agent random' starts a run")
    if args.replicates < 1:
        raise UserError(f"--replicates {args.replicates}: audit needs at least 1", 2)
    with ratchet.locked():
        ratchet.start()
        report.print_audit(ratchet.audit(args.replicates))
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="loop.py", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="propose, train, keep or reset, all night (the default)")
    run.add_argument("--agent", metavar="NAME", help=", ".join(AGENTS))
    run.add_argument("--agent-cmd", metavar="CMD", help="any other: prompt on standard input, or {prompt_file}")
    run.add_argument("--max-experiments", type=int, default=math.inf, metavar="N", help="stop after N (default: never)")
    run.add_argument("--hours", type=float, default=math.inf, metavar="H", help="stop after H hours (default: never)")
    run.add_argument("--agent-timeout", type=float, default=AGENT_TIMEOUT, metavar="S", help="seconds for one proposal")
    run.add_argument("--ahead", action=argparse.BooleanOptionalAction, help="propose while training (default: on CUDA)")
    trying = commands.add_parser("try", help="one experiment on the edit now in train.py")
    trying.add_argument("description", help="what the edit does: one line for the ledger")
    trying.set_defaults(replicates=1)
    status = commands.add_parser("status", help="where the run stands, one screen")
    status.add_argument("--wait", action="store_true", help="wait for the verdict of the experiment that runs now")
    reading = commands.add_parser("report", help="what was kept, what it gained, progress.png")
    reading.add_argument("ledger", nargs="?", metavar="LEDGER", help="another ledger than this run's")
    audit = commands.add_parser("audit", help="baseline and champion again: fresh seeds, sealed test split")
    for command, count, meaning in ((run, 1, "baseline runs; over 1: confirm small gains"), (audit, 3, "seeds each")):
        command.add_argument("--replicates", type=int, default=count, metavar="N", help=f"{meaning} (default {count})")
    for command in (run, status, reading, audit):
        command.add_argument("--tag", help="name of the run (default: the current branch's, else today's date)")
    return parser.parse_args(argv if argv and argv[0] in (*commands.choices, "-h", "--help") else ["run", *argv])


def guarded(command: Callable[[], int]) -> int:
    """Exit code of a command; what a person can mend, or the machine did, is one line and never a traceback."""
    try:
        return command()
    except (StopNow, KeyboardInterrupt):
        say("stopped")
        return 0
    except (UserError, OSError, subprocess.SubprocessError) as error:
        say(f"error: {one_line(str(error), 600)}")
        return getattr(error, "code", 1)


def main() -> int:
    args = parse_arguments(sys.argv[1:])
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        del os.environ[name]  # set by a hook or an alias, they would point git elsewhere
    if cache := os.environ.get("AUTORESEARCH_CACHE"):  # relative to here, not to the bench
        os.environ["AUTORESEARCH_CACHE"] = os.path.abspath(os.path.expanduser(cache))
    commands = {"run": command_run, "try": command_try, "status": command_status, "report": command_report}
    return guarded(lambda: (commands | {"audit": command_audit})[args.command](args))


if __name__ == "__main__":
    sys.exit(main())
