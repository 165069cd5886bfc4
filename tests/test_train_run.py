"""Warm-up, the training loop and whole runs of train.py. Run: uv run pytest tests/test_train_run.py"""

import gc
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, value in (("MAX_SEQ_LEN", 16), ("TOTAL_BATCH_SIZE", 128), ("DEVICE_BATCH_SIZE", 8), ("COMPILE", False)):
        monkeypatch.setattr(train, name, value)
    yield
    torch.set_num_threads(threads)
    gc.unfreeze()
    gc.enable()


def build() -> tuple[GPT, train.MuonAdamW]:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.init_weights()
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


def test_warm_up_trains_and_judges_but_leaves_no_trace():
    model, optimizer = build()
    before, seen = snapshot(model), []
    model.register_forward_hook(lambda module, args, output: seen.append((module.training, output.ndim)))
    steps = []
    step = optimizer.step
    optimizer.step = lambda: (step(), steps.append(not torch.equal(model.lm_head.weight, before["lm_head.weight"])))
    assert train.warm_up(model, optimizer, vocab_size=31) == 8
    assert seen == [(True, 0), (True, 0), (False, 3), (False, 3)]
    assert steps == [True]  # a real step was made, and undone
    assert_same(before, snapshot(model))
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_warm_up_out_of_memory_halves_the_rows_and_still_restores(capsys):
    torch.manual_seed(0)
    model = Hungry(CONFIG)
    model.init_weights()
    optimizer, before = model.setup_optimizer(), snapshot(model)
    assert train.warm_up(model, optimizer, vocab_size=31) == 2
    assert_same(before, snapshot(model))
    assert capsys.readouterr().err.splitlines() == [
        "out of memory with 8 rows per micro-step: halving them",
        "out of memory with 4 rows per micro-step: halving them",
    ]


def test_first_timed_step_starts_from_the_initial_state(monkeypatch):
    model, optimizer = build()
    before, found = snapshot(model), []
    rows = train.warm_up(model, optimizer, vocab_size=31)
    clock = Clock(1.0, monkeypatch)

    def look():
        found.append((snapshot(model), dict(optimizer.state)))

    train.train(model, optimizer, clock.batches(rows, on_first=look), rows, 0.0)
    [(parameters, state)] = found
    assert_same(before, parameters)
    assert state == {}
    assert all(state["step"] == 1 for state in optimizer.state.values() if "step" in state)


def test_nothing_is_compiled_after_warm_up(monkeypatch):
    model, optimizer = build()
    train.choose_attention(CONFIG, torch.device("cpu"))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    optimizer._muon_update = torch.compile(train.muon_update, backend=backend, dynamic=False, fullgraph=True)
    runner = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    rows = train.warm_up(runner, optimizer, vocab_size=31)
    compiled = len(graphs)
    assert compiled >= 2 + len({p.shape for p in model.transformer.h.parameters()})
    clock = Clock(5.0, monkeypatch)
    assert train.train(runner, optimizer, clock.batches(rows), rows, 0.0) == 5
    with torch.no_grad():
        runner.eval()(torch.zeros(rows, 16, dtype=torch.long))
    assert len(graphs) == compiled


# ---- Training loop ----


def test_training_ends_before_a_step_that_would_not_fit(monkeypatch):
    model, optimizer = build()
    clock = Clock(4.5, monkeypatch)
    assert train.train(model, optimizer, clock.batches(8), 8, 0.0) == 4
    assert clock.now == 4.0


def test_a_slow_last_step_ends_training_early(monkeypatch):
    model, optimizer = build()
    clock = Clock(10.0, monkeypatch)
    assert train.train(model, optimizer, clock.batches(8, seconds=6.0), 8, 0.0) == 1


def test_accumulated_micro_steps_equal_one_large_step(monkeypatch):
    torch.manual_seed(5)
    x, y = torch.randint(31, (2, 8, 16))
    results = []
    for rows in (8, 2):
        model, optimizer = build()
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
    model, optimizer = build()
    clock = Clock(100.0, monkeypatch)
    calls, steps, step = itertools.count(), [], optimizer.step
    optimizer.step = lambda: (step(), steps.append(1))

    def go_wrong(module, args, loss):  # in the fourth step's first of two micro-steps
        return loss if next(calls) != 6 else loss * 0 + 2 * bad

    model.register_forward_hook(go_wrong)
    with pytest.raises(UserError, match=rf"^step 3: training loss ({bad}|10\d\.\d+) \(limit 100\): lower the learning"):
        train.train(model, optimizer, clock.batches(4, per_step=2), 4, 0.0)
    assert len(steps) == 3


def test_schedules_follow_the_clock(monkeypatch):
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.5)
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.0)
    model, optimizer = build()
    clock = Clock(4.0, monkeypatch)
    rates, step = [], optimizer.step
    optimizer.step = lambda: (step(), rates.append(optimizer.param_groups[0]["lr"]))
    train.train(model, optimizer, clock.batches(8), 8, 0.0)
    first = optimizer.param_groups[0]["initial_lr"]
    assert rates == pytest.approx([first, first, first, first * 0.5])


def test_log_has_whole_lines_a_few_seconds_apart_and_the_last_one(monkeypatch, capsys):
    model, optimizer = build()
    clock = Clock(12.0, monkeypatch)
    train.train(model, optimizer, clock.batches(8), 8, 0.001)
    lines = capsys.readouterr().err.splitlines()
    assert [int(line[5:10]) for line in lines] == [1, 6, 11, 12]
    number = re.compile(r"\d+(\.\d+)?")
    shape = "step # | #% | loss # | lr x# | # ms | # tok/s | mfu #% | epoch # | # s left"
    assert [number.sub("#", line) for line in lines] == [shape] * 4
    assert "| 1000 ms | 128 tok/s | mfu 0.1% | epoch 1 | 11 s left" in lines[0]
    first = F.cross_entropy(torch.zeros(1, 31), torch.zeros(1, dtype=torch.long)).item()
    assert f"loss {first:.2f}" in lines[0]  # bias-corrected: the first loss is shown as it is


# ---- Whole runs ----


@pytest.fixture(scope="session")
def smoke_env(tmp_path_factory):
    """Environment with the smoke profile prepared in a cache of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("AUTORESEARCH_")}
    env |= {"AUTORESEARCH_CACHE": str(tmp_path_factory.mktemp("cache")), "AUTORESEARCH_PROFILE": "smoke"}
    env.pop("GOMP_SPINCOUNT", None)  # another test module imported train.py
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    env["OMP_NUM_THREADS"] = "1"  # two threads that wait for each other on busy cores can take 50 times as long
    subprocess.run([sys.executable, "prepare.py"], cwd=ROOT, env=env, check=True, capture_output=True)
    return env


def python(env: dict, *args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_run_ends_with_the_summary_in_order_and_format(smoke_env):
    run = python(smoke_env, "train.py")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "---"
    pairs = [re.fullmatch(r"(\w+):( +)(.*)", line) for line in lines[1:]]
    assert [pair[1] for pair in pairs] == [*SUMMARY, "sample"]
    for pair, decimals in zip(pairs, SUMMARY.values(), strict=False):
        assert pair.start(3) == 18, pair[0]
        assert re.fullmatch(r"\d+" + (rf"\.\d{{{decimals}}}" if decimals else ""), pair[3]), pair[0]
    values = {pair[1]: pair[3] for pair in pairs}
    assert 1.0 < float(values["training_seconds"]) <= 2.5
    assert int(values["num_steps"]) >= 2
    assert 1.5 < float(values["val_bpb"]) < 4.5
    assert (values["peak_vram_mb"], values["mfu_percent"], values["seed"]) == ("0.0", "0.00", "42")
    assert float(values["total_seconds"]) > float(values["training_seconds"]) + float(values["startup_seconds"])
    assert values["sample"].startswith(r"def read_lines(path):\n")
    assert "val_bpb:" not in run.stderr
    assert run.stderr.splitlines()[0].startswith("profile smoke (AUTORESEARCH_PROFILE), 2 s on cpu, seed 42")


def test_run_without_data_is_one_error_line_with_the_next_command(smoke_env, tmp_path):
    run = python(smoke_env | {"AUTORESEARCH_CACHE": str(tmp_path)}, "train.py")
    assert (run.returncode, run.stdout) == (1, "")
    last = run.stderr.splitlines()[-1]
    assert re.fullmatch(r"error: profile 'smoke' is not prepared .*: run 'uv run prepare.py'", last)
    assert "Traceback" not in run.stderr


def test_total_batch_that_does_not_divide_is_one_error_line(smoke_env):
    run = python(smoke_env, "-c", "import train; train.TOTAL_BATCH_SIZE = 5000; raise SystemExit(train.main())")
    assert (run.returncode, run.stdout) == (1, "")
    expected = "error: TOTAL_BATCH_SIZE 5000 is not a multiple of MAX_SEQ_LEN 64: set it to 5056"
    assert run.stderr.splitlines()[-1] == expected


def test_a_bug_shows_its_traceback_in_the_last_lines(smoke_env):
    run = python(smoke_env, "-c", "import train; train.norm = lambda x: x.nonsense; raise SystemExit(train.main())")
    assert run.returncode == 1
    tail = run.stderr.splitlines()[-50:]
    assert any("Traceback" in line for line in tail)
    assert tail[-1] == "AttributeError: 'Tensor' object has no attribute 'nonsense'"


def test_import_has_no_side_effects(smoke_env, tmp_path):
    code = """
import os
before = dict(os.environ)
import train
print(train.torch.cuda.is_initialized(), {name for name in os.environ if os.environ[name] != before.get(name)})
"""
    env = smoke_env | {"AUTORESEARCH_CACHE": str(tmp_path / "none"), "PYTHONDONTWRITEBYTECODE": "1"}
    run = python(env, "-c", code, cwd=tmp_path)
    assert (run.stdout, run.stderr) == ("False {'GOMP_SPINCOUNT'}\n", "")
    assert list(tmp_path.iterdir()) == []


class FakeTokenizer:
    """Token i is chr(i + 7): control characters, letters; 0 begins a document."""

    def get_bos_token_id(self):
        return 0

    def encode(self, text):
        return [ord(c) % 31 for c in text]

    def decode(self, tokens):
        return "".join(chr(token + 7) for token in tokens)


def test_sample_is_one_printable_line_and_the_same_for_the_same_weights(monkeypatch):
    model, _ = build()
    sample = train.write_sample(model, FakeTokenizer())
    assert sample == train.write_sample(model, FakeTokenizer())
    assert sample.isprintable()
    assert "\n" not in sample


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
