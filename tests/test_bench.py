"""One run: measure(Job, Place) on the tests' own judge. What it prints, leaves and does decides what is believed.

    uv run pytest tests/test_bench.py
"""

import dataclasses
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import FAKE_PREPARE, FAKE_TRAIN, wait_for

from harness import bench, environment, processes
from harness.bench import Crash, Job, Measurement, Place, Unavailable, crash_reason, measure
from harness.processes import find_processes
from harness.repository import Blob, git_hash
from loop import DOMAIN


class Runs:
    """A judge's data, and runs of a train.py that a test writes, each in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cache = folder / "cache"
        self.outside = folder / "outside"
        self.outside.mkdir()
        self.stop = threading.Event()
        self.count = 0
        (folder / "judge").mkdir()
        (folder / "judge" / "prepare.py").write_text(FAKE_PREPARE)
        subprocess.run([sys.executable, "prepare.py"], cwd=folder / "judge", check=True)
        self.facts = environment.ask_judge(DOMAIN, folder / "judge", dict(os.environ))

    def job(self, train: str, **changes) -> Job:
        tree = []
        for path, text in (("prepare.py", FAKE_PREPARE), ("train.py", train)):
            data = text.encode()
            tree.append(Blob(path, "100644", git_hash(data, 40), data))
        self.count += 1
        job = Job(self.count, "c" * 40, "idea", 42, tuple(tree), self.facts, DOMAIN, time_limit=10.0)
        return dataclasses.replace(job, **changes)

    def place(self, job: Job) -> Place:
        output = self.folder / "runs" / f"{job.number:04d}"
        output.mkdir(parents=True, exist_ok=True)
        return Place(output, self.folder / "bench", self.folder / "compiled", f"{self.folder}:run", "cpu0")

    def measure(self, train: str, **changes) -> bench.Outcome:
        job = self.job(train, **changes)
        return measure(job, self.place(job), self.stop)

    def ending(self, ending: str, **changes) -> bench.Outcome:
        """A run of the usual train.py whose last line is another."""
        return self.measure(FAKE_TRAIN[: FAKE_TRAIN.index("prepare.finish(")] + ending + "\n", **changes)


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Runs:
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(processes, "KILL_GRACE", 0.5)
    runs = Runs(tmp_path)
    yield runs
    assert not find_processes("environ", str(tmp_path).encode())
    assert [path.name for path in (tmp_path / "bench").glob("*") if not path.is_mount()] == []


# ---------------------------------------------------------------------------------------------------------------------
# What a run said


def test_run_that_agrees_with_its_judge_is_a_measurement_that_travels(runs):
    outcome = runs.measure(FAKE_TRAIN)
    assert isinstance(outcome, Measurement)
    assert outcome.record.score == 1.08 and outcome.memory_gb == 0.5
    assert outcome.summary == {"val_bpb": "1.080000", "peak_vram_mb": "512.0", "attention": "sdpa"}
    assert 0 <= outcome.startup_seconds <= outcome.seconds and 0 <= outcome.training_seconds < 2
    output = runs.folder / "runs" / "0001"
    assert json.loads((output / "result.json").read_text())["val_bpb"] == 1.08
    assert "val_bpb:          1.080000" in (output / "run.log").read_text()
    assert pickle.loads(pickle.dumps(outcome)) == outcome
    assert pickle.loads(pickle.dumps(runs.job(FAKE_TRAIN))).tree == runs.job(FAKE_TRAIN).tree


GOOD = "prepare.finish(0.5)"
RESULT = "prepare.pathlib.Path(os.environ['AUTORESEARCH_RESULT'])"
CRASHES = [
    ("print('---\\nval_bpb: 0.5\\npeak_vram_mb: 1.0')", "printed val_bpb 0.5, but the evaluator left no record"),
    ("prepare.finish(0.5, profile='other')", "the evaluator's record has profile 'other', this run was to have 'fake'"),
    ("prepare.finish(0.5, seed=7)", "the evaluator's record has seed 7, this run was to have 42"),
    ("prepare.finish(0.5, rows=3)", "the evaluator's record has rows 3, this run was to have 7"),
    ("prepare.finish(0.5, digest='e')", "the evaluator's record has digest 'e', this run was to have 'ddd"),
    ("prepare.finish(0.5, split='test')", "the evaluator's record has split 'test', this run was to have 'val'"),
    ("prepare.finish(0.5, files={})", "the evaluator's record has files {}, this run was to have {'val.bin'"),
    ("prepare.finish(0.5, prepare_sha256='a')", "the evaluator's record has prepare_sha256 'a'"),
    ("prepare.finish(0.5, cache='/mine')", "the evaluator's record has cache '/mine', this run was to have '/"),
    ("prepare.finish(0.5, val_bpb=0.6)", "printed val_bpb 0.5 is not the evaluator's 0.6"),
    ("prepare.finish(0.5, val_bpb=0.500003)", "printed val_bpb 0.5 is not the evaluator's 0.500003"),
    # Of a wrong type, or not there at all
    ("prepare.finish(0.5, val_bpb=True)", "the judge's record: val_bpb is True, not of type float"),
    ("prepare.finish(0.5, training_seconds='1')", "the judge's record: training_seconds is '1', not of type float"),
    ("prepare.finish(0.5, device_name=None)", "the judge's record: device_name is None, not of type str"),
    (f"{GOOD}; {RESULT}.write_text('[]')", "the judge's record is not a JSON object"),
    (f"{GOOD}; {RESULT}.write_text('{{}}')", "the judge's record has no val_bpb"),
    (f"{GOOD}; {RESULT}.write_bytes(b'\\xff')", "printed val_bpb 0.5, but the evaluator left no record"),
    (f"{GOOD}; {RESULT}.write_text('[' * 99999)", "printed val_bpb 0.5, but the evaluator left no record"),
    # What cannot be
    ("prepare.finish(-1)", "val_bpb -1 cannot be"),
    ("prepare.finish(0)", "val_bpb 0 cannot be"),
    ("prepare.finish(1e-300)", "val_bpb 1e-300 cannot be"),
    ("prepare.finish(1e308)", "val_bpb 1e+308 cannot be"),
    ("prepare.finish(float('nan'))", "val_bpb is 'nan', not a finite number"),
    ("prepare.finish(0.5, val_bpb=float('nan'))", "val_bpb nan cannot be"),
    ("prepare.finish(0.5, -4.8e91)", "peak_vram_mb -4.8e+91 cannot be"),
    ("prepare.finish(0.5, 4.8e91)", "peak_vram_mb 4.8e+91 cannot be"),
    ("prepare.finish(0.5, float('inf'))", "peak_vram_mb is 'inf', not a finite number"),
    # Printed otherwise than once
    ("pass", "no val_bpb printed"),
    (f"{GOOD}; print('val_bpb: 0.4')", "val_bpb printed 2 times"),
    (f"{GOOD}; print('peak_vram_mb: 0.4')", "peak_vram_mb printed 2 times"),
    # Ended otherwise than well
    (f"{GOOD}; raise SystemExit(3)", "attention: sdpa (exit code 3)"),
    (f"{GOOD}; raise ValueError('late')", "ValueError: late (exit code 1)"),
    (f"{GOOD}; os.kill(os.getpid(), 11)", "attention: sdpa (killed by SIGSEGV)"),
    ("raise FloatingPointError('loss is nan at step 3')", "FloatingPointError: loss is nan at step 3 (exit code 1)"),
    # The two clocks
    ("prepare.finish(0.5, training_seconds=1.6)", "trained for 1.6 s, the budget is 1 s"),
    ("prepare.finish(0.5, training_seconds=float('nan'))", "trained for nan s, the budget is 1 s"),
    (f"{GOOD}; os.unlink(str({RESULT}) + '.started')", "the judge's clock left no mark result.json.started"),
    (f"{GOOD}; os.unlink(str({RESULT}) + '.stopped')", "the judge's clock left no mark result.json.stopped"),
    (
        f"os.utime(str({RESULT}) + '.started', (time.time() - 9,) * 2); {GOOD}",
        "trained longer than the judge's clock says: 9.0 s went by, it says 0.5 s",
    ),
    # Something else than a file, where a reader would wait for ever
    (f"{GOOD}; {RESULT}.unlink(); os.mkfifo({RESULT})", "printed val_bpb 0.5, but the evaluator left no record"),
    (f"{GOOD}; {RESULT}.unlink(); {RESULT}.mkdir()", "printed val_bpb 0.5, but the evaluator left no record"),
    (f"{GOOD}; {RESULT}.unlink(); {RESULT}.symlink_to('/dev/zero')", "printed val_bpb 0.5, but the evaluator left no"),
]  # fmt: skip


@pytest.mark.parametrize("part", range(4))
def test_run_without_a_believable_result_is_a_crash_with_its_reason(runs, part):
    for ending, reason in CRASHES[part::4]:
        outcome = runs.ending(ending)
        assert isinstance(outcome, Crash), (ending, outcome)
        assert outcome.reason.startswith(reason), (ending, outcome.reason)
        assert len(outcome.reason) < 160  # room for the idea in the ledger's cell


def test_sealed_score_that_cannot_be_is_a_crash_of_the_audit(runs):
    outcome = runs.ending("prepare.finish(0.5, test_bpb=float('nan'))", audit=True)
    assert isinstance(outcome, Crash)
    assert outcome.reason == "test_bpb nan cannot be: it is between 0.01 and 100"


def test_crash_tells_the_end_of_its_log(runs):
    outcome = runs.ending("for i in range(99): print(i)\nraise ValueError('boom')")
    lines = outcome.log_end.splitlines()
    assert len(lines) == 50 and lines[-1] == "ValueError: boom"


def test_run_that_takes_too_long_is_a_crash_and_leaves_no_process(runs):
    outcome = runs.ending("time.sleep(600)", time_limit=0.5)
    assert isinstance(outcome, Crash) and outcome.reason == "timeout after 1 s"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "no output"),
        ("step 1\nstep 2\n\n", "step 2"),
        ("Traceback (most recent call last):\n  File x\nValueError: 3 % 2\n", "ValueError: 3 % 2"),
        ("torch.OutOfMemoryError: CUDA out of memory\nrank 0 exits\n", "torch.OutOfMemoryError: CUDA out of memory"),
        ("error: loss is nan at step 7\nbye\n", "error: loss is nan at step 7"),
        ("prepare.BudgetExceeded: 400 s of 300 s\n", "prepare.BudgetExceeded: 400 s of 300 s"),
        ("KeyError: 'a'\nDuring handling\nIndexError: b\n", "IndexError: b"),
        ("RuntimeError: " + "x" * 500, "RuntimeError: " + "x" * 106),
    ],
)
def test_crash_reason_is_the_line_that_says_why(log, reason):
    assert crash_reason(log) == reason


def test_printed_number_is_read_from_the_start_of_a_line():
    log = "step 1 val_bpb: 9.9\n---\nval_bpb:          0.997900\npeak_vram_mb:     45060.2\r\n"
    assert bench.printed_number(log, "val_bpb") == 0.9979
    assert bench.printed_number(log, "peak_vram_mb") == 45060.2
    for wrong in ("val_bpb:", "val_bpb: 1.0 or so", "val_bpb: -inf"):
        with pytest.raises(Exception, match="not a finite number"):
            bench.printed_number(wrong, "val_bpb")


def test_summary_is_what_stands_after_the_last_line_of_dashes():
    assert bench.parse_summary("depth: 4\n---\nnot: this\n---\nval_bpb:   1.0\nsample: a: b\n") == {
        "val_bpb": "1.0",
        "sample": "a: b",
    }
    assert bench.parse_summary("val_bpb: 1.0\n") == {}


# ---------------------------------------------------------------------------------------------------------------------
# What a run finds around it


def test_run_finds_the_tree_and_a_fresh_place_and_neither_secrets_nor_variables_of_python(runs, monkeypatch):
    names = "ANTHROPIC_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "GITHUB_PAT", "BASIC_AUTH", "my_key"
    for name in (*names, "GOOGLE_APPLICATION_CREDENTIALS", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHASHSEED"):
        monkeypatch.setenv(name, "withheld")
    kept = {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "2", "PATIENCE": "1"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    spy = (
        "import json, sys, tempfile, pathlib\n"
        "found = {'env': dict(os.environ), 'here': os.listdir(), 'path': sys.path,"
        " 'tmp': os.listdir(tempfile.gettempdir()), 'flags': sys.flags.safe_path}\n"
        f"open({str(runs.outside / 'found')!r}, 'w').write(json.dumps(found))\n"
        "pathlib.Path(tempfile.gettempdir(), 'left').touch()\n"
        "pathlib.Path('left').touch()\n"
        "pathlib.Path(os.environ['AUTORESEARCH_RESULT']).with_name('left').touch()\n"
    )
    for seed in (42, 7):
        runs.ending(spy + GOOD, seed=seed)
        found = json.loads((runs.outside / "found").read_text())
        variables = found["env"]
        assert "withheld" not in variables.values() and kept.items() <= variables.items()
        assert variables["AUTORESEARCH_SEED"] == str(seed) and variables["AUTORESEARCH_PROFILE"] == "fake"
        assert variables["AUTORESEARCH_MARK"] == f"{runs.folder}:run"
        assert variables["TORCHINDUCTOR_CACHE_DIR"] == str(runs.folder / "compiled" / "inductor")
        assert variables["TRITON_CACHE_DIR"] == str(runs.folder / "compiled" / "triton")
        assert set(found["here"]) - {"__pycache__"} == {"prepare.py", "train.py"} and found["tmp"] == []
        assert found["flags"] and found["path"][-1] == variables["PWD"]  # what is installed goes before the tree


def test_files_beside_train_shadow_nothing_that_is_installed(runs):
    job = runs.job(FAKE_TRAIN.replace("import os, time", "import json, os, time, numpy\n"))
    for name in ("json.py", "git.py", "numpy.py", "sitecustomize.py"):
        evil = Blob(name, "100644", git_hash(b"1 / 0", 40), b"1 / 0")
        job = dataclasses.replace(job, tree=(*job.tree, evil))
    assert isinstance(measure(job, runs.place(job), runs.stop), Measurement)


def test_blob_that_is_not_what_its_name_says_is_never_run(runs):
    job = runs.job(FAKE_TRAIN)
    job = dataclasses.replace(job, tree=(job.tree[0], dataclasses.replace(job.tree[1], data=b"other")))
    outcome = measure(job, runs.place(job), runs.stop)
    assert isinstance(outcome, Unavailable) and "train.py does not have the content of its blob" in outcome.reason


def test_network_of_an_audit_is_scored_again_without_train_and_leaves_no_large_file(runs):
    fresh_cache = f"assert {str(runs.folder / 'compiled')!r} not in os.environ['TORCHINDUCTOR_CACHE_DIR']"
    outcome = runs.ending(f"{fresh_cache}; {GOOD}", audit=True)
    assert isinstance(outcome, Measurement) and outcome.rescored and outcome.rescore_problem == ""
    assert outcome.record.test_score == pytest.approx(0.51)
    assert not (runs.folder / "runs" / "0001" / "result.pt2").exists()
    without = runs.ending("prepare.finish(0.5, exported=None, export_problem='two\\nlines')", audit=True)
    assert without.rescored is None and without.rescore_problem == "two lines"
    code = "import os, sys; sys.exit(os.path.exists('train.py'))"
    domain = dataclasses.replace(DOMAIN, score_command=(sys.executable, "-c", code))
    blind = runs.ending(GOOD, audit=True, domain=domain)
    assert blind.rescore_problem == "the score command printed no scores"  # and met no train.py


# ---------------------------------------------------------------------------------------------------------------------
# What is the machine's fault, and what is not


def test_run_on_another_device_is_made_again(runs):
    outcome = runs.ending("prepare.finish(0.5, device_name='H100')")
    assert outcome == Unavailable("it ran on a H100, the baseline on a cpu", retries=2)  # the edit may have chosen it


def test_run_with_another_kernel_is_made_again_once(runs):
    outcome = runs.ending("prepare.finish(0.5, attention='flex')", baseline_values={"attention": "sdpa"})
    assert outcome == Unavailable("attention is flex, the baseline's is sdpa", retries=1)
    assert isinstance(runs.ending(GOOD, baseline_values={"attention": "sdpa"}), Measurement)


def test_record_of_a_judge_that_does_not_say_where_its_data_lies_is_believed(runs):
    assert isinstance(runs.ending("prepare.finish(0.5, cache=None)"), Measurement)


def test_crash_beside_a_taken_device_is_the_ideas_own(runs):
    (runs.cache / "hold").touch()
    done: list[bench.Outcome] = []
    thread = threading.Thread(target=lambda: done.append(runs.ending("raise ValueError('boom')")))
    thread.start()
    wait_for(lambda: find_processes("environ", f"MARK={runs.folder}:run".encode()))
    with open(runs.cache / "cpu0.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (runs.cache / "hold").unlink()
        thread.join()
        assert isinstance(done[0], Crash)
        busy = runs.ending(GOOD)
    assert busy == Unavailable(f"another run holds the device cpu ({runs.cache / 'cpu0.lock'})")


@pytest.mark.parametrize("change", ["deleted", "edited", "a pipe", "a link to itself"])
def test_changed_data_is_named_before_a_run_and_ends_the_loop(runs, change):
    path = runs.cache / "val.bin"
    path.unlink()
    if change == "edited":
        path.write_bytes(b"other")
    elif change == "a pipe":
        os.mkfifo(path)
    elif change == "a link to itself":
        path.symlink_to(path)
    outcome = runs.ending(GOOD)
    assert isinstance(outcome, Unavailable) and outcome.is_permanent
    assert outcome.reason == f"{path} is not as it was prepared: look with 'uv run prepare.py --verify'"


def test_data_that_a_person_keeps_elsewhere_is_found_by_its_link(runs):
    (runs.cache / "tokens").rename(runs.outside / "tokens")
    (runs.cache / "tokens").symlink_to(runs.outside / "tokens")
    (runs.cache / "val.bin").rename(runs.outside / "val.bin")
    (runs.cache / "val.bin").symlink_to(runs.outside / "val.bin")
    assert isinstance(runs.measure(FAKE_TRAIN), Measurement)


def test_training_data_may_grow_during_a_run_and_not_change(runs):
    """A person may prepare more while runs train."""
    tokens = runs.cache / "tokens"
    new = f"tokens = prepare.CACHE / 'tokens'; (tokens / 'new.bin').touch(); (tokens / 'train.part').touch(); {GOOD}"
    assert isinstance(runs.ending(new), Measurement)
    rewritten = f"import shutil; shutil.copy(prepare.CACHE / 'val.bin', prepare.CACHE / 'tokens' / 'train.bin'); {GOOD}"
    outcome = runs.ending(rewritten)
    assert isinstance(outcome, Unavailable) and outcome.is_permanent
    assert outcome.reason.startswith(f"the training data changed: {tokens / 'train.bin'}. Scores from now on")
    job = runs.job(FAKE_TRAIN)
    place = dataclasses.replace(runs.place(job), data={"tokens/train.bin": (1, 1)})  # as it was when the session began
    assert isinstance(measure(job, place, runs.stop), Unavailable)


def test_run_that_stood_still_is_made_again_and_not_even_its_good_end_counts(runs):
    (runs.cache / "hold").touch()
    done: list[bench.Outcome] = []
    thread = threading.Thread(target=lambda: done.append(runs.measure(FAKE_TRAIN, time_limit=1.5)))
    thread.start()
    of_run = f"AUTORESEARCH_MARK={runs.folder}".encode()
    pid = wait_for(lambda: find_processes("cmdline", b"run_path") & find_processes("environ", of_run))
    os.kill(*pid, signal.SIGSTOP)
    thread.join(2.2)
    assert thread.is_alive()  # what it stands still is not counted against its limit
    os.kill(*pid, signal.SIGCONT)
    (runs.cache / "hold").unlink()
    thread.join()
    assert isinstance(done[0], Unavailable) and done[0].retries == 2  # it may have stopped itself
    assert done[0].reason.startswith("the run stood still for 2 s (stopped, or the machine slept)")


def test_run_during_which_the_clock_was_set_or_the_machine_slept_is_made_again(runs, monkeypatch):
    """By the wall clock its training took 9 s more than by the judge's."""
    late = f"os.utime(str({RESULT}) + '.started', (time.time() - 9,) * 2); {GOOD}"

    def ending_with(**changes) -> None:
        def run_child(*args, **options) -> processes.Ending:
            return dataclasses.replace(processes.run_child(*args, **options), **changes)

        monkeypatch.setattr(bench, "run_child", run_child)

    ending_with(clock_jump_seconds=9.0)
    assert runs.ending(late) == Unavailable("the machine's clock was set by +9 s during the run", retries=2)
    assert isinstance(runs.ending(GOOD), Measurement)  # it hurt nobody
    ending_with(clock_jump_seconds=0.5)
    assert isinstance(runs.ending(late), Crash)
    ending_with(paused_seconds=9.0, asleep_seconds=9.0)
    reason = "the run stood still for 9 s (stopped, or the machine slept)"
    assert runs.ending(GOOD) == Unavailable(reason)  # however often: no edit makes a machine sleep


def test_record_of_an_earlier_try_is_not_the_next_ones(runs):
    """A run that is made again, as the same run, begins without what its first try left."""
    job = runs.job(FAKE_TRAIN)
    assert isinstance(measure(job, runs.place(job), runs.stop), Measurement)
    train = "print('---\\nval_bpb: 1.08\\npeak_vram_mb: 1.0')"
    again = dataclasses.replace(runs.job(train), number=job.number)
    outcome = measure(again, runs.place(again), runs.stop)
    assert isinstance(outcome, Crash) and "left no record" in outcome.reason
    assert not (runs.place(again).output / "result.json").exists()


def test_bench_that_cannot_be_removed_stands_in_nobodys_way(runs):
    """Folders in one another, deeper than Python's own rmtree goes; and, where the test may, a mount."""
    deep = "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')\n"
    mount = "import subprocess\nsubprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', '../tmp'], capture_output=True)\n"
    try:
        for train in (deep + FAKE_TRAIN, mount + FAKE_TRAIN, FAKE_TRAIN):
            job = dataclasses.replace(runs.job(train), number=1)
            outcome = measure(job, runs.place(job), runs.stop)
            assert isinstance(outcome, Measurement), outcome
    finally:
        for folder in (runs.folder / "bench").glob("*/tmp"):
            subprocess.run(["umount", "-l", str(folder)], capture_output=True)
            subprocess.run(["rm", "-rf", str(folder.parent)], check=True)


@pytest.mark.parametrize("harm", ["os.mkfifo(log)", "os.mkdir(log)", "os.symlink('/dev/zero', log)"])
def test_log_that_a_run_replaced_is_a_crash_and_the_next_try_writes_its_own(runs, harm):
    log = f"log = {str(runs.folder)!r} + '/runs/0001/run.log'; os.unlink(log); {harm}; {GOOD}"
    job = dataclasses.replace(runs.job(FAKE_TRAIN.replace("prepare.finish(", f"{log}; (", 1)), number=1)
    assert isinstance(measure(job, runs.place(job), runs.stop), Crash)
    again = dataclasses.replace(runs.job(FAKE_TRAIN), number=1)
    assert isinstance(measure(again, runs.place(again), runs.stop), Measurement)


LEAVES_WEIGHTS = """
import os
import pathlib
cache = pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
triton = cache.parent / "triton"
kernels = [cache / "2a" / "kernel.py", cache / "fxgraph" / "ab" / "graph", triton / "0" / "kernel.cubin"]
for path in kernels:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
left = [cache / "weights.pt", cache / "stash" / "weights.pt", cache.parent / "weights.pt", cache / "fit.json"]
left += [cache / "fit-weights.pt", cache / "weights.tmp", cache / "2a" / "weights.pt", triton / "0" / "weights.npz"]
print("found", *sorted(path.name for path in [*left, *kernels] if path.exists()))
for path in left:
    path.parent.mkdir(exist_ok=True)
    path.touch()
"""


LEAVES_OTHERS = """
import os
import pathlib
cache = pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
print("found", *sorted(path.name for path in (cache / "2a").glob("*")), (cache / "fit.json").exists())
for name in ("large", "link", "pipe"):
    (cache / "2a" / name).unlink(missing_ok=True)
os.truncate(os.open(cache / "2a" / "large", os.O_CREAT | os.O_RDWR), 2**26 + 1)
(cache / "2a" / "link").symlink_to("/tmp")
os.mkfifo(cache / "2a" / "pipe")
(cache / "fit.json").unlink(missing_ok=True)
os.mkfifo(cache / "fit.json")
os.chdir(cache / "2a")
for _ in range(1500):
    os.makedirs("d", exist_ok=True)
    os.chdir("d")
os.chdir(os.environ["PWD"])
"""


def test_weights_beside_the_compile_cache_are_gone_in_the_next_run(runs):
    for expected in ("found graph kernel.cubin kernel.py", "found fit.json graph kernel.cubin kernel.py"):
        assert isinstance(runs.measure(LEAVES_WEIGHTS + FAKE_TRAIN), Measurement)
        log = (runs.folder / "runs" / f"{runs.count:04d}" / "run.log").read_text()
        assert log.splitlines()[0] == expected
    for expected in ("found kernel.py True", "found d kernel.py False"):
        assert isinstance(runs.measure(LEAVES_OTHERS + FAKE_TRAIN), Measurement)
        log = (runs.folder / "runs" / f"{runs.count:04d}" / "run.log").read_text()
        assert log.splitlines()[0] == expected
    environment.remove_foreign_files(runs.folder / "compiled")  # pytest cannot remove folders so deep
