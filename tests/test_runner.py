"""One run: measure(job, place) on the tests' own evaluator. What it prints and leaves decides what is believed."""

import fcntl
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import FAKE_PREPARE, FAKE_TRAIN

from harness import machine, processes, runner
from harness.ledger import Run
from harness.processes import find_processes
from harness.runner import Job, LocalRunner, MachineFault, Place, Stopped, crash_reason, measure
from loop import DOMAIN


def tar_of(files: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return stream.getvalue()


class Runs:
    """An evaluator's data, and runs of a train.py that a test writes, each in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.outside = folder / "outside"
        self.outside.mkdir()
        (folder / "cache").mkdir()
        self.stop = threading.Event()
        self.count = 0
        self.domain = replace(DOMAIN, startup_allowance=8)
        (folder / "evaluator").mkdir()
        (folder / "evaluator" / "prepare.py").write_text(FAKE_PREPARE)
        subprocess.run([sys.executable, "prepare.py"], cwd=folder / "evaluator", check=True)
        self.facts = machine.describe(DOMAIN, folder / "evaluator", dict(os.environ))

    def job(self, train: str, purpose: str = "experiment") -> Job:
        self.count += 1
        run = Run(self.count, "c" * 40, "b" * 40, purpose=purpose, description="idea")
        return Job(run, tar_of({"prepare.py": FAKE_PREPARE, "train.py": train}), self.facts, self.domain)

    def measure(self, train: str, purpose: str = "experiment") -> Run:
        job = self.job(train, purpose)
        output = self.folder / "runs" / f"{job.run.number:04d}"
        output.mkdir(parents=True)
        place = Place(output, self.folder / "scratch", self.folder / "compiled", str(self.folder), "cpu0")
        return measure(job, place, self.stop)

    def ending(self, ending: str, purpose: str = "experiment") -> Run:
        """A run of the usual train.py whose last line is another."""
        return self.measure(FAKE_TRAIN[: FAKE_TRAIN.index("prepare.finish(")] + ending + "\n", purpose)


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Runs:
    folder = tmp_path / "of the runner"
    folder.mkdir()
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(folder / "cache"))
    monkeypatch.setattr(processes, "KILL_GRACE", 0.5)
    runs = Runs(folder)
    yield runs
    assert not find_processes("environ", f"AUTORESEARCH_MARK={folder}".encode())
    assert list((folder / "scratch").glob("*")) == []


def test_run_that_agrees_with_its_evaluator_is_measured_and_travels(runs: Runs):
    run = runs.measure(FAKE_TRAIN)
    assert (run.score, run.memory_mb, run.status) == (1.08, 512.0, "")
    assert run.summary == {"val_bpb": "1.080000", "peak_vram_mb": "512.0", "attention": "sdpa"}
    assert 0 <= run.startup_seconds <= run.seconds + 0.2 and 0 <= run.training_seconds < 2
    assert run.record["weights_sha256"] == "w" * 64 and 0 <= run.busy_others <= 1
    assert pickle.loads(pickle.dumps(run)) == run
    assert pickle.loads(pickle.dumps(runs.job(FAKE_TRAIN))).archive == runs.job(FAKE_TRAIN).archive


GOOD = "prepare.finish(0.5)"
RESULT = "prepare.pathlib.Path(os.environ['AUTORESEARCH_RESULT'])"
CRASHES = [
    ("print('---\\nval_bpb: 0.5\\npeak_vram_mb: 1.0')", "printed val_bpb 0.5, but the evaluator left no record"),
    ("prepare.finish(0.5, profile='other')", "the record's profile is 'other', not 'fake'"),
    ("prepare.finish(0.5, digest='e')", "the record's digest is 'e', not 'ddd"),
    ("prepare.finish(0.5, prepare_sha256='a')", "the record's prepare_sha256 is 'a'"),
    ("prepare.finish(0.5, val_bpb=0.500003)", "printed val_bpb 0.5, the evaluator measured 0.500003"),
    ("prepare.finish(0.5, val_bpb=True)", "the evaluator's record: val_bpb is True, not a finite number"),
    ("prepare.finish(0.5, training_seconds=4.0)", "trained for 4.0 s, the budget is 1 s"),
    (f"{GOOD}; {RESULT}.write_text('[]')", "the evaluator's record is not a JSON object"),
    (f"{GOOD}; {RESULT}.write_text('[' * 99999)", "printed val_bpb 0.5, but the evaluator left no record"),
    ("prepare.finish(-1)", "val_bpb -1 is outside of 0.01 to 100"),
    ("prepare.finish(float('nan'))", "val_bpb is 'nan', not a finite number"),
    ("prepare.finish(0.5, 4.8e91)", "peak_vram_mb 4.8e+91 cannot be"),
    ("pass", "no val_bpb printed"),
    (f"{GOOD}; print('val_bpb: 0.4')", "val_bpb printed 2 times"),
    ("raise FloatingPointError('loss is nan at step 3')", "FloatingPointError: loss is nan at step 3 (exit code 1)"),
    ("print('error: bad'); print('For C++ stack trace'); os._exit(3)", "error: bad (exit code 3)"),
    ("os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
    ("os.kill(os.getpid(), 9)", "out of memory: killed by the kernel (SIGKILL)"),
    (f"{GOOD}; os.unlink(str({RESULT}) + '.stopped')", ""),  # seen or not: either way no run hangs on it
    (f"{GOOD}; {RESULT}.unlink(); os.mkfifo({RESULT})", "printed val_bpb 0.5, but the evaluator left no record"),
    (f"{GOOD}; {RESULT}.unlink(); {RESULT}.symlink_to('/dev/zero')", "printed val_bpb 0.5, but the evaluator left no"),
    (f"time.sleep(3.2); {GOOD}", "trained for 3."),  # by the loop's own clock
]  # fmt: skip


def test_run_without_a_believable_result_is_a_crash_with_its_reason(runs: Runs):
    for ending, reason in CRASHES:
        run = runs.ending(ending)
        if reason:
            assert run.status == "crash" and run.reason.startswith(reason), (ending, run.reason)
        assert len(run.reason) < 160  # room for the idea in the ledger's cell


@pytest.mark.parametrize(
    "ending",
    [
        f"{GOOD}; raise ValueError('the sample failed')",
        f"{GOOD}; import threading; threading.Thread(target=time.sleep, args=(600,)).start()",
        f"print('99% |####', end='', file=__import__('sys').stderr, flush=True); {GOOD}; print(); print('---')",
    ],
)
def test_run_that_was_scored_is_scored_however_it_ends_and_whatever_it_prints_around(runs: Runs, ending: str):
    runs.domain = replace(runs.domain, startup_allowance=2)
    run = runs.ending(ending)
    assert (run.status, run.score) == ("", 0.5) and run.summary["attention"] == "sdpa"


def test_run_that_takes_too_long_is_a_crash_and_one_that_is_stopped_has_no_result(runs: Runs):
    threading.Timer(1, runs.stop.set).start()
    with pytest.raises(Stopped):
        runs.ending("time.sleep(600)")
    runs.stop.clear()
    runs.domain = replace(runs.domain, startup_allowance=-1)
    run = runs.ending("time.sleep(600)")
    assert run.status == "crash" and run.reason == "timeout after 1 s"


def test_run_finds_the_tree_and_a_fresh_place_and_neither_secrets_nor_variables_of_python(runs: Runs, monkeypatch):
    names = "ANTHROPIC_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "GITHUB_PAT", "BASIC_AUTH", "my_key"
    for name in (*names, "GOOGLE_APPLICATION_CREDENTIALS", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHASHSEED"):
        monkeypatch.setenv(name, "withheld")
    kept = {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "2", "PATIENCE": "1"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    spy = f"""
import json, sys, tempfile
found = {{"env": dict(os.environ), "here": os.listdir(), "path": sys.path, "tmp": os.listdir(tempfile.gettempdir())}}
open({str(runs.outside / "found")!r}, "w").write(json.dumps(found))
for folder in (".", tempfile.gettempdir()):
    open(os.path.join(folder, "left"), "w")
"""
    for _ in range(2):
        runs.ending(spy + GOOD)
        found = json.loads((runs.outside / "found").read_text())
        variables = found["env"]
        assert "withheld" not in variables.values() and kept.items() <= variables.items()
        assert variables["AUTORESEARCH_SEED"] == "42" and variables["AUTORESEARCH_PROFILE"] == "fake"
        assert set(found["here"]) == {"prepare.py", "train.py"} and found["tmp"] == []
        assert found["path"][-1] == variables["PWD"]  # what is installed goes before the tree


def test_network_of_an_audit_is_scored_again_without_train(runs: Runs):
    fresh_cache = f"assert {str(runs.folder / 'compiled')!r} not in os.environ['TORCHINDUCTOR_CACHE_DIR']"
    run = runs.ending(f"{fresh_cache}; {GOOD}", purpose="audit")
    assert (run.score, run.test_score, run.clean_score, run.clean_test_score) == (0.5, 0.51, 0.5, 0.51)
    assert run.problem == ""
    run = runs.ending("prepare.finish(0.5, exported=None, export_problem='it has a lock')", purpose="audit")
    assert (run.score, run.clean_score, run.problem) == (0.5, None, "it has a lock")


def test_crash_beside_lost_data_or_a_full_disk_and_a_run_on_another_device_are_the_machines_fault(
    runs: Runs, monkeypatch
):
    with pytest.raises(MachineFault, match="it ran on a tpu, the baseline on a cpu") as caught:
        runs.ending("prepare.finish(0.5, device_name='tpu')")
    assert caught.value.is_suspect
    with pytest.raises(MachineFault, match="the data is not as it was: no manifest"):
        runs.ending(f"open({str(runs.folder / 'cache' / 'manifest.json')!r}, 'w'); raise ValueError('no data')")
    monkeypatch.setattr(machine, "MIN_FREE_GB", 1e9)
    with pytest.raises(MachineFault, match="GB free on the disk"):
        runs.measure(FAKE_TRAIN)


def test_device_that_another_run_holds_is_waited_for(runs: Runs, tag, monkeypatch, capsys):
    monkeypatch.setattr(runner, "RETRY_SECONDS", 0.1)
    lock = Path(runs.facts.devices["cpu0"]["lock"])
    local = LocalRunner(tag, runs.facts, 1, runs.stop)
    job = runs.job(FAKE_TRAIN)
    tag.folder(job.run.number).mkdir(parents=True)
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(1, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        assert local.measure(job, "cpu0").score == 1.08
    assert capsys.readouterr().err.count("waiting: another run holds the device cpu") == 1


def test_crash_reason_is_the_line_that_says_why():
    for log, reason in {
        "": "no output (exit code 1)",
        "step 1\nstep 2\n\n": "step 2 (exit code 1)",
        "Traceback (most recent call last):\n  File x\nValueError: 3 % 2\n": "ValueError: 3 % 2 (exit code 1)",
        "torch.OutOfMemoryError: CUDA\nrank 0 exits\n": "torch.OutOfMemoryError: CUDA (exit code 1)",
        "error: loss is nan at step 7\nattention: sdpa\n": "error: loss is nan at step 7 (exit code 1)",
        "KeyError: 'a'\nDuring handling\nIndexError: b\n": "IndexError: b (exit code 1)",
    }.items():
        assert crash_reason(log, "exit code 1") == reason
