"""Warm-up, the training loop and whole runs of train.py. Run: uv run pytest tests/test_train_run.py"""

import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from train_fixtures import build, one_thread

import prepare
import train
from train import GPT, GPTConfig, UserError

ROOT = Path(train.__file__).parent
CONFIG = GPTConfig(sequence_len=16, vocab_size=31, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="SL")
SUMMARY = {  # key: decimals
    "val_bpb": 6,
    "training_seconds": 1,
    "total_seconds": 1,
    "peak_vram_mb": 1,
    "mfu_percent": 2,
    "total_tokens_M": 1,
    "num_steps": 0,
    "num_params_M": 1,
    "depth": 0,
    "startup_seconds": 1,
    "eval_seconds": 1,
    "seed": 0,
}


@pytest.fixture(autouse=True)
def small_run(monkeypatch):
    """Knobs for CONFIG, one thread, and the garbage collector as it was."""
    for name, value in (("MAX_SEQ_LEN", 16), ("TOTAL_BATCH_SIZE", 128), ("DEVICE_BATCH_SIZE", 8), ("COMPILE", False)):
        monkeypatch.setattr(train, name, value)
    with one_thread():
        yield
    gc.unfreeze()
    gc.enable()


def fresh() -> tuple[GPT, train.MuonAdamW]:
    model = build(CONFIG)
    return model, model.setup_optimizer()


def snapshot(model) -> dict:
    return {name: t.detach().clone() for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}


def assert_same(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


class Clock:
    """Stands in for the judge's stopwatch: every step takes one second."""

    def __init__(self, budget: float, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(train, "training_seconds", lambda: self.now)
        monkeypatch.setattr(train, "TIME_BUDGET", budget)

    def batches(self, rows: int, on_first=None, seconds: float = 1.0, per_step: int = 1):
        generator = torch.Generator().manual_seed(3)
        for count in itertools.count():
            if count == 0 and on_first:
                on_first()
            if count:
                self.now += seconds / per_step
            x, y = (torch.randint(31, (rows, 16), generator=generator) for _ in "xy")
            yield x, y, 1


# ---- Fitting the device batch ----


def test_device_batch_halves_until_it_fits_and_divides_the_total():
    tried = []

    def trial(rows):
        tried.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert train.fit_device_batch(trial, total_rows=48, upper_bound=30) == 3
    assert tried == [24, 12, 6, 3]


@pytest.mark.parametrize(("total_rows", "upper_bound", "rows"), [(256, 128, 128), (48, 20, 16), (7, 4, 1), (4, 128, 4)])
def test_device_batch_is_the_largest_divisor_up_to_the_bound(total_rows, upper_bound, rows):
    assert train.fit_device_batch(lambda rows: None, total_rows, upper_bound) == rows


def test_a_single_row_that_does_not_fit_is_an_error_with_a_remedy():
    def trial(rows):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    with pytest.raises(UserError, match=r"^one row runs out of memory: make the model smaller .*Tried to allocate"):
        train.fit_device_batch(trial, 8, 8)


def test_other_errors_of_a_trial_are_not_taken_for_lack_of_memory():
    def trial(rows):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        train.fit_device_batch(trial, 8, 8)


# ---- The compile cache: what fits is remembered, what is old goes ----


@pytest.fixture
def compile_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compile"))
    return tmp_path / "compile"


@pytest.mark.parametrize("damage", [None, "", "{", "[1]", '{"other": "8", "kind": -1, "third": 0.5}'])
def test_fit_is_remembered_whatever_the_file_held(compile_cache, damage):
    assert train.read_fits() == {}
    if damage is not None:
        compile_cache.mkdir()
        (compile_cache / "fit.json").write_text(damage)
        assert train.read_fits() == {}
    train.remember_fit("kind", 16)
    train.remember_fit("another", 4)
    train.remember_fit("kind", 8)
    assert train.read_fits() == {"another": 4, "kind": 8}
    assert [path.name for path in compile_cache.iterdir()] == ["fit.json"]


def test_fits_are_bounded_and_the_newest_stay(compile_cache, monkeypatch):
    monkeypatch.setattr(train, "MAX_FITS", 3)
    for rows in range(1, 6):
        train.remember_fit(f"kind {rows}", rows)
    assert train.read_fits() == {"kind 3": 3, "kind 4": 4, "kind 5": 5}


def test_fit_in_a_folder_that_cannot_be_written_is_only_a_remark(compile_cache, capsys):
    compile_cache.write_text("a file")
    train.remember_fit("kind", 16)
    assert capsys.readouterr().err.startswith("the device batch is not remembered: ")
    assert train.read_fits() == {}


def test_kind_of_a_fit_changes_with_device_memory_back_end_model_and_knobs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (23.7 * 2**30, 24 * 2**30))
    model = build(CONFIG)
    kind = train.fit_kind(model, "flex")
    assert kind.startswith("card, 24 GiB free, flex, GPTConfig(sequence_len=16")
    assert train.fit_kind(model, "sdpa") != kind
    assert train.fit_kind(build(GPTConfig(16, 31, 4, 2, 2, 32, "SL")), "flex") != kind
    for name in ("DEVICE_BATCH_SIZE", "TOTAL_BATCH_SIZE", "LOSS_CHUNK"):
        with monkeypatch.context() as change:
            change.setattr(train, name, 1)
            assert train.fit_kind(model, "flex") != kind, name


def entry(folder: Path, name: str, size: int, hours: float) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))
    return path


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_compile_cache_loses_the_oldest_entries_whole_and_nothing_recent_or_foreign(compile_cache):
    entry(compile_cache, "triton/0/OLD/kernel.cubin", 100, hours=50)
    entry(compile_cache, "triton/0/OLD/kernel.json", 100, hours=50)
    entry(compile_cache, "triton/0/USED/kernel.cubin", 100, hours=60)
    entry(compile_cache, "triton/0/USED/kernel.json", 100, hours=2)  # one file was read: the kernel is in use
    entry(compile_cache, "ab/old.py", 100, hours=40)
    entry(compile_cache, "ab/newer.py", 100, hours=3)
    entry(compile_cache, "fxgraph/ab/key/graph", 100, hours=30)
    entry(compile_cache, "aotautograd/key/graph", 100, hours=0.5)
    keep = {"fit.json", "locks/a.lock", "thesis/chapter.tex"}
    for name in keep:
        entry(compile_cache, name, 1000, hours=90)
    everything = left(compile_cache)

    train.prune_compile_cache(compile_cache, limit=800)  # just what the entries take
    assert left(compile_cache) == everything
    train.prune_compile_cache(compile_cache, limit=450)
    gone = {"triton/0/OLD/kernel.cubin", "triton/0/OLD/kernel.json", "ab/old.py", "fxgraph/ab/key/graph"}
    assert everything - left(compile_cache) == gone
    train.prune_compile_cache(compile_cache, limit=0)
    assert left(compile_cache) == keep | {"aotautograd/key/graph"}
    assert not list(compile_cache.glob("fit-pruned*"))
    train.prune_compile_cache(compile_cache / "missing", limit=0)


def test_compile_cache_is_pruned_by_two_runs_at_once_and_what_a_killed_one_left_goes_too(compile_cache, monkeypatch):
    for number in range(30):
        entry(compile_cache, f"triton/0/{number}/kernel.cubin", 100, hours=50)
    entry(compile_cache, "fit-pruned-1-0/kernel.cubin", 100, hours=50)
    rename = Path.rename

    def slower(path, target):
        """Another run takes every second entry first."""
        if path.name.isdigit() and int(path.name) % 2:
            shutil.rmtree(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", slower)
    train.prune_compile_cache(compile_cache, limit=0)
    assert left(compile_cache) == set()


# ---- Warm-up ----


class Hungry(GPT):
    """Runs out of memory above two rows, in the backward pass, after it changed things."""

    def forward(self, idx, targets=None):
        if targets is None:
            return super().forward(idx)
        loss = super().forward(idx, targets)
        if len(idx) > 2:
            with torch.no_grad():
                self.lm_head.weight.add_(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({4: 0.10, 2: 0.12, 1: 0.2}, 4),
        ({4: 0.10, 2: 0.095, 1: 0.2}, 4),  # not 10% faster: no choice by noise
        ({4: 0.10, 2: 0.08, 1: 0.2}, 2),
        ({4: 0.30, 2: 0.20, 1: 0.1}, 1),
    ],
)
def test_threads_are_fewer_only_where_that_is_clearly_faster(monkeypatch, capsys, seconds, chosen):
    clock = 0.0
    threads = 4
    have_started = True

    def set_num_threads(count):
        nonlocal threads, have_started
        have_started = count == threads
        threads = count

    def micro_step():
        nonlocal clock, have_started
        clock += seconds[threads] + (0.0 if have_started else 0.5)
        have_started = True

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock)
    assert train.choose_threads(micro_step) == threads == chosen
    assert capsys.readouterr().err == f"threads: {chosen} of 4\n"


def test_warm_up_trains_and_judges_but_leaves_no_trace():
    model, optimizer = fresh()
    before, seen = snapshot(model), []
    model.register_forward_hook(lambda module, args, output: seen.append((module.training, output.ndim)))
    steps = []
    step = optimizer.step
    optimizer.step = lambda: (step(), steps.append(not torch.equal(model.lm_head.weight, before["lm_head.weight"])))
    assert train.warm_up(model, optimizer, vocab_size=31, upper_bound=8) == 8
    assert seen == [(True, 0), (True, 0), (False, 3), (False, 3)]
    assert steps == [True]  # a real step was made, and undone
    assert_same(before, snapshot(model))
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_warm_up_out_of_memory_halves_the_rows_and_still_restores(capsys):
    model = build(CONFIG, kind=Hungry)
    optimizer, before = model.setup_optimizer(), snapshot(model)
    assert train.warm_up(model, optimizer, vocab_size=31, upper_bound=8) == 2
    assert_same(before, snapshot(model))
    assert capsys.readouterr().err.splitlines() == [
        "out of memory with 8 rows per micro-step: halving them",
        "out of memory with 4 rows per micro-step: halving them",
    ]


def test_first_timed_step_starts_from_the_initial_state(monkeypatch):
    model, optimizer = fresh()
    before, found = snapshot(model), []
    rows = train.warm_up(model, optimizer, vocab_size=31, upper_bound=8)
    clock = Clock(1.0, monkeypatch)

    def look():
        found.append((snapshot(model), dict(optimizer.state)))

    train.train(model, optimizer, clock.batches(rows, on_first=look), rows, 0.0)
    [(parameters, state)] = found
    assert_same(before, parameters)
    assert state == {}
    adamw_parameters = sum(len(group["params"]) for group in optimizer.param_groups if group["kind"] == "adamw")
    assert [state["step"] for state in optimizer.state.values() if "step" in state] == [1] * adamw_parameters


@pytest.mark.slow
def test_nothing_is_compiled_after_warm_up(monkeypatch):
    model, optimizer = fresh()
    train.choose_attention(CONFIG, torch.device("cpu"))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    optimizer._muon_update = torch.compile(train.muon_update, backend=backend, dynamic=False, fullgraph=True)
    runner = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    rows = train.warm_up(runner, optimizer, vocab_size=31, upper_bound=8)
    compiled = len(graphs)
    assert compiled >= 2 + len({p.shape for p in model.transformer.h.parameters()})
    clock = Clock(5.0, monkeypatch)
    assert train.train(runner, optimizer, clock.batches(rows), rows, 0.0) == 5
    with torch.no_grad():
        runner.eval()(torch.zeros(rows, 16, dtype=torch.long))
    assert len(graphs) == compiled


# ---- Training loop ----


def test_training_ends_before_a_step_that_would_not_fit(monkeypatch):
    model, optimizer = fresh()
    clock = Clock(4.5, monkeypatch)
    assert train.train(model, optimizer, clock.batches(8), 8, 0.0) == 4
    assert clock.now == 4.0


def test_a_slow_last_step_ends_training_early(monkeypatch):
    model, optimizer = fresh()
    clock = Clock(10.0, monkeypatch)
    assert train.train(model, optimizer, clock.batches(8, seconds=6.0), 8, 0.0) == 1


def test_accumulated_micro_steps_equal_one_large_step(monkeypatch):
    torch.manual_seed(5)
    x, y = torch.randint(31, (2, 8, 16))
    results = []
    for rows in (8, 2):
        model, optimizer = fresh()
        clock = Clock(1.0, monkeypatch)
        micro_batches = itertools.cycle(zip(x.split(rows), y.split(rows), strict=True))
        gradients = {}

        def step(model=model, clock=clock, gradients=gradients):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})
            clock.now += 1.0

        optimizer.step = step
        train.train(model, optimizer, ((a, b, 1) for a, b in micro_batches), rows, 0.0)
        results.append(gradients)
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 101.0])
def test_bad_loss_stops_before_the_optimizer_step_with_step_and_loss(monkeypatch, bad):
    model, optimizer = fresh()
    clock = Clock(100.0, monkeypatch)
    calls, steps, step = itertools.count(), [], optimizer.step
    optimizer.step = lambda: (step(), steps.append(1))

    def go_wrong(module, args, loss):  # in the fourth step's first of two micro-steps
        return loss if next(calls) != 6 else loss * 0 + 2 * bad

    model.register_forward_hook(go_wrong)
    with pytest.raises(UserError, match=rf"^step 3: training loss ({bad}|10\d\.\d+) \(limit 100\): lower the learning"):
        train.train(model, optimizer, clock.batches(4, per_step=2), 4, 0.0)
    assert len(steps) == 3


def test_gradients_are_dropped_after_a_step(monkeypatch):
    model, optimizer = fresh()
    found = []
    model.register_forward_pre_hook(lambda module, args: found.append([p.grad is None for p in module.parameters()]))
    assert train.train(model, optimizer, Clock(3.0, monkeypatch).batches(8), 8, 0.0) == 3
    assert found == [[True] * len(list(model.parameters()))] * 3


def test_garbage_collector_is_frozen_and_off_after_the_first_step(monkeypatch):
    model, optimizer = fresh()
    found = []
    original_step = optimizer.step

    def step() -> None:
        original_step()
        # What is frozen is not listed. A count of it would mislead: Python 3.12 moves immortal objects there by itself.
        is_frozen = not any(each is model for each in gc.get_objects())
        found.append((gc.isenabled(), is_frozen))

    optimizer.step = step
    assert train.train(model, optimizer, Clock(3.0, monkeypatch).batches(8), 8, 0.0) == 3
    assert found == [(True, False), (False, True), (False, True)]


def test_garbage_is_collected_every_5000_steps(monkeypatch):
    class Slope(torch.nn.Linear):
        def forward(self, x, y):
            return self.weight.sum()

    def step():
        clock.now += 1.0

    clock, collected, batch = Clock(5001, monkeypatch), [], torch.zeros(8, 16)
    optimizer = SimpleNamespace(param_groups=[], step=step, zero_grad=lambda set_to_none: None)
    monkeypatch.setattr(gc, "collect", lambda: collected.append(clock.now))
    monkeypatch.setattr(train, "LOG_SECONDS", math.inf)
    assert train.train(Slope(1, 1), optimizer, itertools.repeat((batch, batch, 1)), 8, 0.0) == 5001
    assert collected == [1.0, 5001.0]


def test_schedules_follow_the_clock(monkeypatch):
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.5)
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.0)
    model, optimizer = fresh()
    clock = Clock(4.0, monkeypatch)
    rates, step = [], optimizer.step
    optimizer.step = lambda: (step(), rates.append(optimizer.param_groups[0]["lr"]))
    train.train(model, optimizer, clock.batches(8), 8, 0.0)
    first = optimizer.param_groups[0]["initial_lr"]
    assert rates == pytest.approx([first, first, first, first * 0.5])


def test_log_has_whole_lines_a_few_seconds_apart_and_the_last_one(monkeypatch, capsys):
    model, optimizer = fresh()
    clock = Clock(12.0, monkeypatch)
    train.train(model, optimizer, clock.batches(8), 8, 0.001)
    head, *lines = capsys.readouterr().err.splitlines()
    assert head == "batch 128 tokens = 8 rows x 16 x 1 micro-steps"
    assert [int(line[5:10]) for line in lines] == [1, 6, 11, 12]
    number = re.compile(r"\d+(\.\d+)?")
    shape = "step # | #% | loss # | lr x# | # ms | # tok/s | mfu #% | epoch # | # s left"
    assert [number.sub("#", line) for line in lines] == [shape] * 4
    assert "| 1000 ms | 128 tok/s | mfu 0.1% | epoch 1 | 11 s left" in lines[0]
    first = F.cross_entropy(torch.zeros(1, 31), torch.zeros(1, dtype=torch.long)).item()
    assert f"loss {first:.2f}" in lines[0]  # bias-corrected: the first loss is shown as it is


def test_log_on_a_terminal_is_one_line_that_is_rewritten(monkeypatch, capsys):
    model, optimizer = fresh()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train.train(model, optimizer, Clock(3.0, monkeypatch).batches(8), 8, 0.0)
    head, *lines = capsys.readouterr().err.split("\r")
    assert head == "batch 128 tokens = 8 rows x 16 x 1 micro-steps\n"
    assert [line[:10] for line in lines] == ["step 00001", "step 00002", "step 00003"]
    assert ["\n" in line for line in lines] == [False, False, True]


# ---- Whole runs ----


@pytest.fixture(scope="session")
def smoke_env(tmp_path_factory):
    """Environment with the smoke profile prepared in a cache of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("AUTORESEARCH_")}
    env |= {"AUTORESEARCH_CACHE": str(tmp_path_factory.mktemp("cache")), "AUTORESEARCH_PROFILE": "smoke"}
    for name in ("GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF"):
        env.pop(name, None)  # another test module imported train.py
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    env["OMP_NUM_THREADS"] = "1"  # two threads that wait for each other on busy cores can take 50 times as long
    subprocess.run([sys.executable, "prepare.py"], cwd=ROOT, env=env, check=True, capture_output=True)
    return env


def python(env: dict, *args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_run_ends_with_the_summary_in_order_and_format(smoke_env, tmp_path):
    run = python(smoke_env | {"AUTORESEARCH_RESULT": str(tmp_path / "result.json")}, "train.py")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "---"
    pairs = [re.fullmatch(r"(\w+):( +)(.*)", line) for line in lines[1:]]
    assert [pair[1] for pair in pairs] == [*SUMMARY, "sample", "attention"]
    for pair, decimals in zip(pairs, SUMMARY.values(), strict=False):
        assert pair.start(3) == 18, pair[0]
        assert re.fullmatch(r"\d+" + (rf"\.\d{{{decimals}}}" if decimals else ""), pair[3]), pair[0]
    values = {pair[1]: pair[3] for pair in pairs}
    assert 0 < float(values["training_seconds"]) <= 2.5
    assert int(values["num_steps"]) >= 1  # a busy machine has time for no more
    assert values["attention"] == "sdpa"
    record = json.loads((tmp_path / "result.json").read_text())
    assert values["val_bpb"] == f"{record['val_bpb']:.6f}"
    uniform = math.log2(512) * record["tokens"] / record["bytes"]  # bits per byte of a model that learned nothing
    assert record["val_bpb"] < uniform
    assert (values["peak_vram_mb"], values["mfu_percent"], values["seed"]) == ("0.0", "0.00", "42")
    assert float(values["total_seconds"]) > float(values["training_seconds"]) + float(values["startup_seconds"])
    assert values["sample"].startswith(r"def read_lines(path):\n")
    assert "val_bpb:" not in run.stderr
    assert run.stderr.splitlines()[0].startswith("profile smoke (AUTORESEARCH_PROFILE), 2 s on cpu, seed 42")


def test_import_has_no_side_effects_and_a_run_without_data_is_one_error_line(smoke_env, tmp_path):
    code = """
import os
import sys

before = dict(os.environ)
import train

changed = sorted(name for name in os.environ if os.environ[name] != before.get(name))
print(train.torch.cuda.is_initialized(), changed, os.listdir())
sys.exit(train.main())
"""
    env = smoke_env | {"AUTORESEARCH_CACHE": str(tmp_path / "none"), "PYTHONDONTWRITEBYTECODE": "1"}
    run = python(env, "-c", code, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (1, "False ['GOMP_SPINCOUNT', 'PYTORCH_ALLOC_CONF'] []\n")
    profile, error = run.stderr.splitlines()
    assert profile.startswith("profile smoke")
    assert re.fullmatch(r"error: profile 'smoke' is not prepared .*: run 'uv run prepare.py'", error)


def test_ctrl_c_is_no_traceback(monkeypatch):
    monkeypatch.setattr(train, "run", lambda: signal.raise_signal(signal.SIGINT))
    assert train.main() == 130


def test_a_bug_is_not_taken_for_an_error_of_the_person(monkeypatch):
    monkeypatch.setattr(train, "run", lambda: torch.zeros(1).nonsense)
    with pytest.raises(AttributeError, match="nonsense"):
        train.main()


# ---- A GPU that torch cannot start ----
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by ..."


@pytest.fixture
def driver(monkeypatch):
    """A machine with one GPU, whose driver raises these words when CUDA starts."""

    def raises(words: str) -> None:
        def init():
            raise RuntimeError(words)

        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return raises


@pytest.mark.parametrize("profile", ["climbmix", "code", "mine"])
def test_driver_too_old_is_one_error_line_with_both_versions_before_anything_else(
    driver, monkeypatch, capsys, profile
):
    driver(TOO_OLD)
    monkeypatch.setattr(train, "PROFILE", profile)
    monkeypatch.setattr(prepare, "default_device", lambda: pytest.fail("went on"))
    assert train.main() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"error: a GPU is there, but torch {torch.__version__} needs CUDA 13.0: its driver supports CUDA 12.4, which "
        "is too old: update the NVIDIA driver, or train on the CPU with AUTORESEARCH_PROFILE=pocket\n"
    )


def test_profile_of_a_cpu_trains_there_with_a_note_and_another_failure_keeps_its_words(driver, monkeypatch, capsys):
    driver("CUDA unknown error")
    monkeypatch.setattr(train, "PROFILE", "pocket")
    train.check_cuda_driver()
    assert capsys.readouterr().err.startswith("training on the CPU: a GPU is there, but")
    monkeypatch.setattr(train, "PROFILE", "code")
    with pytest.raises(UserError, match=r"needs CUDA 13\.0: RuntimeError: CUDA unknown error: update"):
        train.check_cuda_driver()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    train.check_cuda_driver()


@pytest.mark.parametrize("error", [prepare.NotCausal("logits moved"), UserError("a knob is bad: mend it")])
def test_what_a_person_or_an_agent_can_mend_is_one_error_line(monkeypatch, capsys, error):
    def run():
        raise error

    monkeypatch.setattr(train, "run", run)
    assert train.main() == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {error}\n")


class Letters:
    """A tokenizer: a character is its own token, and 0 begins a document."""

    def get_bos_token_id(self):
        return 0

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


class Bigrams:
    """A model whose next token depends on the last alone; `rows` are what it was called with."""

    cos = torch.zeros(1)

    def __init__(self, successors: dict[str, str]):
        self.rows, self.scores_VV = [], torch.zeros(128, 128)
        for last, following in successors.items():
            self.scores_VV[ord(last), ord(following)] = 1e4

    def __call__(self, idx):
        self.rows += idx.tolist()
        return self.scores_VV[idx]


PROMPT = "The most important thing about"


@pytest.fixture
def long_rows(monkeypatch):
    monkeypatch.setattr(train, "MAX_SEQ_LEN", 64)
    monkeypatch.setattr(train, "PROFILE", "climbmix")


@pytest.mark.parametrize(
    ("profile", "prompt"),
    [("climbmix", PROMPT), ("code", "def read_lines(path):\n"), ("pocket", "def read_lines(path):\n")],
)
def test_sample_continues_its_prompt_to_the_number_of_characters_on_one_line(long_rows, monkeypatch, profile, prompt):
    monkeypatch.setattr(train, "PROFILE", profile)
    model = Bigrams({"t": "a", "\n": "a", "a": "\n"})
    sample = train.write_sample(model, Letters(), characters=40)
    written = itertools.islice(itertools.cycle("a\n"), 40 - len(prompt))
    assert sample == (prompt + "".join(written)).replace("\n", r"\n")
    assert model.rows[0] == [0, *map(ord, prompt)]
    assert all(row[0] == 0 for row in model.rows)


def test_sample_ends_where_the_model_begins_another_document(long_rows):
    assert train.write_sample(Bigrams({"t": "a", "a": "b", "b": "\0"}), Letters()) == PROMPT + "ab"


def test_sample_ends_where_the_sequence_does(long_rows):
    model = Bigrams({"t": "a", "a": "a"})
    assert train.write_sample(model, Letters()) == PROMPT + "a" * (63 - len(PROMPT))
    assert max(map(len, model.rows)) == 63


def test_sample_is_drawn_and_the_same_for_the_same_weights(long_rows):
    model = Bigrams({})
    model.scores_VV[:, 0] = -1e4
    torch.manual_seed(1)
    sample = train.write_sample(model, Letters())
    torch.manual_seed(2)
    assert sample == train.write_sample(model, Letters())
    assert len(set(sample[len(PROMPT) :])) > 15
    assert sample.isprintable()


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A4000", 0),
        ("cpu", 0),
    ],
)
def test_peak_of_a_device_is_found_by_whole_words(name, tflops):
    assert train.peak_flops(name) == tflops * 1e12
