"""The training loop and whole runs of train.py. Run: uv run pytest tests/test_train_run.py"""

import gc
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from train_fixtures import build, in_float32_on_one_thread  # noqa: F401 (a fixture)

import prepare
import train
from harness import device
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
    """Knobs for CONFIG, and the garbage collector as it was."""
    for name, value in (("MAX_SEQ_LEN", 16), ("TOTAL_BATCH_SIZE", 128), ("DEVICE_BATCH_SIZE", 8), ("COMPILE", False)):
        monkeypatch.setattr(train, name, value)
    yield
    gc.unfreeze()
    gc.enable()


def fresh() -> tuple[GPT, train.MuonAdamW]:
    model = build(CONFIG)
    return model, model.setup_optimizer()


def warm(model, optimizer, rows: int = 8) -> int:
    return device.warm_up(model, model, optimizer, 31, 16, total_rows=8, upper_bound=rows, compiled=False, kind="")


class Clock:
    """Stands in for the evaluator's stopwatch: every step takes one second."""

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


# ---- Training loop ----


@pytest.mark.parametrize(("budget", "seconds", "steps"), [(4.5, 1.0, 4), (10.0, 6.0, 1)])
def test_training_ends_before_a_step_that_would_not_fit(monkeypatch, budget, seconds, steps):
    model, optimizer = fresh()
    clock = Clock(budget, monkeypatch)
    assert train.train(model, optimizer, clock.batches(8, seconds=seconds), 8, 0.0) == steps
    assert clock.now == steps * seconds


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
    assert (values["mfu_percent"], values["seed"]) == ("0.00", "42")
    assert 100 < float(values["peak_vram_mb"]) < 5000  # the process's memory, most of it torch's
    assert float(values["total_seconds"]) > float(values["training_seconds"]) + float(values["startup_seconds"])
    assert values["sample"].startswith(r"def read_lines(path):\n")
    assert "val_bpb:" not in run.stderr
    assert re.search(r"\nmilliseconds of a micro-step of 48 rows: forward .*, loss .*, backward .*, opt", run.stderr)
    assert run.stderr.splitlines()[0].startswith("profile smoke (AUTORESEARCH_PROFILE), 2 s on cpu, seed 42")


def test_import_has_no_side_effects_and_a_run_without_data_is_one_error_line(smoke_env, tmp_path):
    code = """
import os
import sys

before = dict(os.environ)
import train

changed = sorted(name for name in os.environ if os.environ[name] != before.get(name))
print(train.torch.cuda.is_initialized(), changed, os.listdir(), {'pyarrow', 'requests', 'rustbpe'} & set(sys.modules))
sys.exit(train.main())
"""
    env = smoke_env | {"AUTORESEARCH_CACHE": str(tmp_path / "none"), "PYTHONDONTWRITEBYTECODE": "1"}
    run = python(env, "-c", code, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (1, "False ['GOMP_SPINCOUNT', 'PYTORCH_ALLOC_CONF'] [] set()\n")
    profile, error = run.stderr.splitlines()
    assert profile.startswith("profile smoke")
    assert re.fullmatch(r"error: profile 'smoke' is not prepared .*: run 'uv run prepare.py'", error)


def test_ctrl_c_while_it_trains_ends_it_without_a_traceback(smoke_env):
    command = [sys.executable, "train.py"]
    run = subprocess.Popen(command, cwd=ROOT, env=smoke_env, stdout=-1, stderr=-1, text=True)
    while not run.stderr.readline().startswith("step 00001"):
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("error", [UserError("val.tokens is not what was prepared"), prepare.NotCausal("it moved")])
def test_what_a_person_or_an_agent_can_mend_is_one_error_line(monkeypatch, capsys, error):
    def check_data():
        raise error

    monkeypatch.setattr(prepare, "check_data", check_data)
    monkeypatch.setattr(train, "warm_up", lambda *_: pytest.fail("went on"))
    assert train.main() == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {error}"
