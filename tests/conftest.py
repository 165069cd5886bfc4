"""Shared by the loop's tests: `Checkout`, a scratch repository in which a run takes milliseconds instead of minutes.

FAKE_PREPARE and FAKE_TRAIN stand in for the evaluator and for what it scores. loop.py and harness/ are the real ones;
so are git, the processes and the signals.
"""

import atexit
import compileall
import contextlib
import functools
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import settings
from prepare_fixtures import evaluator, locks_given_back, tiny  # noqa: F401 (fixtures of the judge's tests)

import loop
from harness.ledger import Run, read_runs
from harness.processes import find_processes
from harness.repository import Repository
from harness.tag import Tag

# Before any test imports prepare: what a person exported, the profile of their run say, is not the tests'.
for name in [name for name in os.environ if name.startswith("AUTORESEARCH_") and name != "AUTORESEARCH_TEST_CLIS"]:
    del os.environ[name]
# A run of one test process must not wait for the device lock of another.
os.environ["AUTORESEARCH_LOCKS"] = tempfile.mkdtemp(prefix="autoresearch-locks-")
os.environ["AUTORESEARCH_ISOLATION"] = "off"  # the same everywhere; test_isolation.py switches it on
atexit.register(shutil.rmtree, os.environ["AUTORESEARCH_LOCKS"], ignore_errors=True)

settings.register_profile("unhurried", deadline=None)  # the machine may be busy
settings.load_profile("unhurried")

ROOT = Path(__file__).resolve().parents[1]

FAKE_PREPARE = '''
"""A domain that costs nothing: describe() and finish() as the real prepare.py has them. What the machine is like
stands in files of the cache: `kind` (cpu, cuda), `devices` (how many), `device` (their name), `digest`."""
import hashlib, json, os, pathlib, sys, time

PROFILE = os.environ.get("AUTORESEARCH_PROFILE", "fake")
if PROFILE not in ("fake", "other"):
    print(f"error: unknown profile {PROFILE!r}", file=sys.stderr)
    sys.exit(2)
CACHE = pathlib.Path(os.environ["AUTORESEARCH_CACHE"])

def text(name, default):
    return (CACHE / name).read_text() if (CACHE / name).exists() else default

def describe():
    kind = text("kind", "cpu")
    names = [f"cpu{i}" for i in range(int(text("devices", "4")))]
    if kind == "cuda":
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    prepared = text("manifest.json", "") == "{}"
    return {
        "profile": PROFILE, "reason": "test", "time_budget": 1, "cache": str(CACHE), "prepared": prepared,
        "problem": None if prepared else "no manifest", "digest": text("digest", "d" * 64),
        "rows": {"val": 7, "test": 5}, "device": kind, "device_name": text("device", "cpu"),
        "devices": {name: {"lock": str(CACHE / f"{name}.lock"), "free_gb": 0.0} for name in names},
        "prepare_sha256": hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest(),
    }

def start_clock():
    if "AUTORESEARCH_RESULT" in os.environ:
        pathlib.Path(os.environ["AUTORESEARCH_RESULT"] + ".started").touch()

def finish(score, memory=512.0, attention="sdpa", **changes):
    """What evaluate_bpb and the summary do: the record, then the printed lines."""
    facts = describe()
    record = {
        "val_bpb": float(score), "profile": PROFILE, "split": "val",
        "seed": int(os.environ.get("AUTORESEARCH_SEED", 42)), "training_seconds": 0.5,
        "rows": 7, "tokens": 70, "bytes": 210, "weights_sha256": "w" * 64,
    } | {key: facts[key] for key in ("digest", "device_name", "prepare_sha256")}
    if os.environ.get("AUTORESEARCH_AUDIT") == "1":
        result = pathlib.Path(os.environ["AUTORESEARCH_RESULT"]).with_name("result.pt2")
        result.write_text(json.dumps({"val_bpb": float(score), "test_bpb": float(score) + 0.01}))
        record |= {"test_bpb": float(score) + 0.01, "test_rows": 5, "exported": "result.pt2", "export_problem": None}
    if "AUTORESEARCH_RESULT" in os.environ:
        pathlib.Path(os.environ["AUTORESEARCH_RESULT"] + ".stopped").touch()
        pathlib.Path(os.environ["AUTORESEARCH_RESULT"]).write_text(json.dumps(record | changes))
    print(f"---\\nval_bpb:          {score:.6f}\\npeak_vram_mb:     {memory:.1f}\\nattention:        {attention}")

if __name__ == "__main__":
    if sys.argv[1:2] == ["--score"]:  # the scores of an exported network
        print(pathlib.Path(sys.argv[2]).read_text())
        sys.exit()
    (CACHE / "manifest.json").write_text("{}")
'''

FAKE_TRAIN = '''
"""Bits per byte fall with DEPTH up to 12; the seed moves them by NOISE."""
import os, time
import prepare

while (prepare.CACHE / "hold").exists():  # a test wants to meet it here
    time.sleep(0.01)
prepare.start_clock()

# ---- Knobs ----
DEPTH = 4  # layers
LR = 0.1  # learning rate
SECONDS = 0.0  # seconds of pretended training
NOISE = 0.0  # bpb for each step of the seed
# ---- The rest ----

time.sleep(SECONDS)
seed = int(os.environ.get("AUTORESEARCH_SEED", 42))
prepare.finish(1.0 + abs(DEPTH - 12) / 100 + abs(LR - 0.1) / 10 + NOISE * (seed - 42))
'''

BASELINE = "--tag", "t", "--agent-cmd", "true", "--max-experiments", "0"  # for Checkout.loop: the first row, no more
DEEPER = 'knob("DEPTH", knob("DEPTH") + 1)'  # for Checkout.agent: a proposal that is better, up to 12


@functools.cache
def template() -> Path:
    """The checkout that every scratch one is a copy of, made once a process: short waits, compiled, committed."""
    folder = Path(tempfile.mkdtemp(prefix="autoresearch-checkout-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    checkout = Checkout.__new__(Checkout)
    checkout.path = folder / "checkout"
    (checkout.path / "harness").mkdir(parents=True)
    for source in (ROOT / "loop.py", *(ROOT / "harness").glob("*.py"), ROOT / "harness" / "page.html"):
        (checkout.path / source.relative_to(ROOT)).write_text(source.read_text())
    checkout.set_constant("harness/processes.py", "KILL_GRACE", "0.5")
    checkout.set_constant("harness/agents.py", "FIRST_REST", "0.05")
    checkout.set_constant("harness/agents.py", "LAST_REST", "0.2")
    checkout.set_constant("harness/runner.py", "RETRY_SECONDS", "0.1")
    checkout.replace("loop.py", "startup_allowance=300", "startup_allowance=60")
    checkout.replace("loop.py", '"pocket": 0.014}', '"pocket": 0.014, "fake": 0.0004}')
    (checkout.path / "prepare.py").write_text(FAKE_PREPARE)
    (checkout.path / "train.py").write_text(FAKE_TRAIN)
    (checkout.path / "program.md").write_text("# Instructions\n\nLower val_bpb.\n")
    (checkout.path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    compileall.compile_dir(checkout.path / "harness", quiet=1)  # a copy keeps the times, so it need not compile again
    checkout.git("init", "-q", "-b", "main")
    checkout.commit("start")
    return checkout.path


class Checkout:
    """A scratch checkout with the real loop.py, to run, kill and look at."""

    def __init__(self, folder: Path):
        self.path = folder / "checkout"
        self.cache = folder / "cache"
        self.outside = folder / "outside"
        self.hold = self.cache / "hold"  # while it exists, every training waits
        for path in (self.cache, self.outside, folder / "home"):
            path.mkdir(parents=True)
        shutil.copytree(template(), self.path)
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), "AUTORESEARCH_CACHE": str(self.cache)}
        self.env["AUTORESEARCH_ISOLATION"] = "off"

    def set_constant(self, file: str, name: str, value: str) -> None:
        text, count = re.subn(rf"(?m)^( *){name} = .*$", rf"\1{name} = {value}", (self.path / file).read_text())
        assert count == 1, name
        self.write(file, text)

    def replace(self, file: str, old: str, new: str) -> None:
        text = (self.path / file).read_text()
        assert old in text, old
        self.write(file, text.replace(old, new))

    def write(self, file: str, text: str) -> None:
        """Replace a file and forget its bytecode, which within a second, at the same length, would pass for the new."""
        path = self.path / file
        path.write_text(text)
        if path.suffix == ".py":
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def set_knob(self, **knobs) -> None:
        for name, value in knobs.items():
            self.set_constant("train.py", name, str(value))

    def git(self, *args: str) -> str:
        command = ["git", "-c", "user.name=person", "-c", "user.email=person@localhost", *args]
        return subprocess.run(command, cwd=self.path, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, message: str) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)
        return self.git("rev-parse", "HEAD")

    def agent(self, body: str) -> str:
        """An --agent-cmd that runs this Python code on the checkout.

        It can call knob(NAME) to read a knob, knob(NAME, value) to set it, say(text) to describe the edit,
        git(command), and count() for the number of calls so far; `prompt` is what it was told.
        """
        self.agents = getattr(self, "agents", 0) + 1
        path = self.outside / f"agent{self.agents}.py"
        head = """
            import contextlib, itertools, os, pathlib, re, subprocess, sys, time
            OUTSIDE = pathlib.Path(__file__).parent
            prompt = sys.stdin.read()
            def knob(name, value=None):
                text = pathlib.Path("train.py").read_text()
                if value is not None:
                    pathlib.Path("train.py").write_text(re.sub(rf"(?m)^{name} = [^ #\\s]+", f"{name} = {value}", text))
                return float(re.search(rf"(?m)^{name} = ([^ #\\s]+)", text)[1])
            def say(text):
                pathlib.Path("experiment.txt").write_text(text)
            def git(command):
                words = f"git -c user.name=a -c user.email=a@a {command}"
                subprocess.run(words, shell=True, check=True, capture_output=True)
            def count():  # two agents at the same time get two numbers
                for number in itertools.count(1):
                    with contextlib.suppress(FileExistsError):
                        open(OUTSIDE / f"call{number}", "x").close()
                        return number
        """
        path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
        return shlex.join([sys.executable, str(path)])

    def popen(self, *args: str, **env: str) -> subprocess.Popen:
        """Start a command in a session of its own, with nothing to read; `hear` and `ended` read what it prints."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options |= {"cwd": self.path, "env": self.env | env, "start_new_session": True}
        process = subprocess.Popen([sys.executable, str(self.path / "loop.py"), *args], **options)
        process.heard = ""  # of its stderr so far
        return process

    def loop(self, *args: str, code: int = 0, timeout: float = 60, **env: str) -> subprocess.CompletedProcess:
        """Run a command to its end, which must have this exit code."""
        return ended(self.popen(*args, **env), code, timeout)

    def home(self) -> Path:
        return self.path / ".git" / "autoresearch" / "t"

    def rows(self) -> list[list[str]]:
        lines = (self.home() / "results.tsv").read_text().splitlines()
        assert lines[0] == "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
        return [line.split("\t") for line in lines[1:]]

    def statuses(self) -> list[str]:
        return [row[3] for row in self.rows()]

    def runs(self) -> list[Run]:
        """The lines of runs.jsonl."""
        return read_runs(self.home() / "runs.jsonl")

    def processes(self, entry: str) -> list[int]:
        """Ids of the living processes in whose environment an entry begins so; who draws the page has another one."""
        return sorted(find_processes("environ", rb"(^|\0)" + re.escape(entry.encode()) + rb"(?![^\0]*:page\0)"))

    def orphans(self) -> list[str]:
        """Command lines of the living processes that carry this checkout's mark."""
        found = []
        for pid in self.processes(f"AUTORESEARCH_MARK={self.path}"):
            with contextlib.suppress(OSError):
                found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
        return found

    def end(self) -> None:
        """Kill whatever still runs of this checkout's, as after a failed test."""
        while pids := self.processes(f"AUTORESEARCH_CACHE={self.cache}"):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def wait_for(condition, seconds: float = 20.0):
    """Poll until the condition is true; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)
    return value


@contextlib.contextmanager
def killed_after(process: subprocess.Popen, seconds: float):
    alarm = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def ended(process: subprocess.Popen, code: int = 0, timeout: float = 30) -> subprocess.CompletedProcess:
    """Wait for a command's end: it must have this exit code, and a person never sees a traceback."""
    with killed_after(process, timeout):
        out, err = process.communicate()
    err = process.heard + err
    assert process.returncode == code and "Traceback" not in out + err, out + err
    return subprocess.CompletedProcess(process.args, code, out, err)


def hear(process: subprocess.Popen, words: str, seconds: float = 20.0) -> str:
    """Wait for the next line of stderr with these words."""
    line = ""
    with killed_after(process, seconds):
        while words not in line:
            line = process.stderr.readline()
            assert line, f"it never said {words!r}:\n{process.heard}"
            process.heard += line
    return line


def errors(done: subprocess.CompletedProcess) -> list[str]:
    """The lines of stderr that tell a failure."""
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


@pytest.fixture
def checkout(tmp_path: Path):
    checkout = Checkout(tmp_path)
    yield checkout
    checkout.end()


@pytest.fixture
def tag(checkout: Checkout) -> Tag:
    """The tag `t` of a scratch checkout, for tests that write runs themselves."""
    tag = Tag(Repository(checkout.path, "train.py", "program.md"), "t", loop.DOMAIN)
    tag.home.mkdir(parents=True)
    return tag
