"""The training loop and whole runs of train.py. Run: uv run pytest tests/test_train_run.py"""

import gc
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_fixtures import SMALL, build, in_float32_on_one_thread  # noqa: F401 (a fixture)

import prepare
import train
from train import UserError

ROOT = Path(train.__file__).parent


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Knobs for SMALL, a clock on which every step takes one second; the garbage collector as it was."""
    clock = Clock()
    knobs = {"MAX_SEQ_LEN": 16, "TOTAL_BATCH_SIZE": 128, "TIME_BUDGET": 4.5, "WARMDOWN_RATIO": 0.5, "FINAL_LR_FRAC": 0}
    for name, value in (knobs | {"training_seconds": lambda: clock.now}).items():
        monkeypatch.setattr(train, name, value)
    yield clock
    gc.unfreeze()
    gc.enable()


class Clock:
    """Stands in for the evaluator's stopwatch."""

    def __init__(self):
        self.now = 0.0

    def batches(self, rows: int = 8, seconds: float = 1.0):
        generator = torch.Generator().manual_seed(3)
        while True:
            x, y = torch.randint(31, (2, rows, 16), generator=generator)
            yield x, y, 1
            self.now += seconds


def fresh(before_step=lambda optimizer, *_: None):
    """A model and its optimizer, which calls before_step(optimizer, args, options)."""
    model = build(SMALL)
    optimizer = model.setup_optimizer()
    optimizer.register_step_pre_hook(before_step)
    return model, optimizer


# ---- Training loop ----


@pytest.mark.parametrize(("seconds", "rates"), [(1.0, [1, 1, 1, 2 / 3]), (3.0, [1])])
def test_training_follows_the_clock_and_ends_before_a_step_that_would_not_fit(clock, seconds, rates):
    found = []
    trained = fresh(lambda optimizer, *_: found.append(optimizer.param_groups[0]["lr"]))
    assert train.train(*trained, clock.batches(seconds=seconds), 8, 0.0) == len(rates)
    assert found == pytest.approx([rate * found[0] for rate in rates])
    assert clock.now == len(rates) * seconds


def test_accumulated_micro_steps_equal_one_large_step(clock):
    x, y, _ = next(Clock().batches())
    results = []

    def keep_gradients(optimizer, *_):
        results.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        clock.now += 9.0  # no second step

    for rows in (8, 2):
        clock.now = 0.0
        micro_batches = itertools.cycle(zip(x.split(rows), y.split(rows), itertools.repeat(1)))
        assert train.train(*fresh(keep_gradients), micro_batches, rows, 0.0) == 1
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, 101.0])
def test_bad_loss_stops_before_the_optimizer_step_with_step_and_loss(clock, bad):
    steps = []
    losses = itertools.count()
    model, optimizer = fresh(lambda *_: steps.append(1))
    # In the fourth step's first of two micro-steps.
    model.register_forward_hook(lambda module, args, loss: loss if next(losses) != 6 else loss * 0 + 2 * bad)
    with pytest.raises(UserError, match=rf"^step 3: training loss ({bad}|10\d\.\d+) \(limit 100\): lower the learning"):
        train.train(model, optimizer, clock.batches(4, seconds=0.5), 4, 0.0)
    assert len(steps) == 3


def test_log_has_whole_lines_a_few_seconds_apart_and_the_last_one(clock, monkeypatch, capsys):
    monkeypatch.setattr(train, "TIME_BUDGET", 12.0)
    train.train(*fresh(), clock.batches(), 8, 0.001)
    head, *lines = capsys.readouterr().err.splitlines()
    assert head == "batch 128 tokens = 8 rows x 16 x 1 micro-steps"
    assert [int(line[5:10]) for line in lines] == [1, 6, 11, 12]
    shape = "step # | #% | loss # | lr x# | # ms | # tok/s | mfu #% | epoch # | # s left"
    assert {re.sub(r"\d+(\.\d+)?", "#", line) for line in lines} == {shape}
    assert "| 1000 ms | 128 tok/s | mfu 0.1% | epoch 1 | 11 s left" in lines[0]
    assert f"loss {math.log(31):.2f}" in lines[0]  # bias-corrected: the first loss is shown as it is


# ---- Whole runs ----


@pytest.fixture(scope="session")
def smoke_env(tmp_path_factory):
    """Environment with the smoke profile prepared in a cache of its own."""
    set_by_train = ("AUTORESEARCH_", "GOMP_SPINCOUNT", "PYTORCH_")  # when another test imported it
    env = {name: value for name, value in os.environ.items() if not name.startswith(set_by_train)}
    env |= {"AUTORESEARCH_CACHE": str(tmp_path_factory.mktemp("cache")), "AUTORESEARCH_PROFILE": "smoke"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    env["OMP_NUM_THREADS"] = "1"  # two threads that wait for each other on busy cores can take 50 times as long
    subprocess.run([sys.executable, "prepare.py"], cwd=ROOT, env=env, check=True, capture_output=True)
    return env


def python(env: dict, *args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


DECIMALS = {  # of each value of the summary, in order
    "val_bpb": 6, "training_seconds": 1, "total_seconds": 1, "peak_vram_mb": 1, "mfu_percent": 2, "total_tokens_M": 1,
    "num_steps": 0, "num_params_M": 1, "depth": 0, "startup_seconds": 1, "eval_seconds": 1, "seed": 0,
}  # fmt: skip


@pytest.mark.slow
def test_run_ends_with_the_summary_in_order_and_format(smoke_env, tmp_path):
    env = smoke_env | {"AUTORESEARCH_RESULT": str(tmp_path / "result.json"), "AUTORESEARCH_AUDIT": "1"}
    run = python(env, "train.py")
    assert run.returncode == 0, run.stderr
    rule, *lines = run.stdout.splitlines()
    values = {line[:18].rstrip(" ").removesuffix(":"): line[18:] for line in lines}
    assert rule == "---" and list(values) == [*DECIMALS, "sample", "attention"]
    numbers = {name: float(values[name]) for name in DECIMALS}
    assert [values[name] for name in DECIMALS] == [f"{numbers[name]:.{DECIMALS[name]}f}" for name in DECIMALS]
    assert 0 < numbers["training_seconds"] <= 2.5 and numbers["num_steps"] >= 1  # a busy machine has time for no more
    assert numbers["total_seconds"] > numbers["training_seconds"] + numbers["startup_seconds"]
    assert 100 < numbers["peak_vram_mb"] < 5000  # the process's memory, most of it torch's
    assert (values["attention"], values["mfu_percent"], values["seed"]) == ("sdpa", "0.00", "42")
    left = {"result.json", "result.json.started", "result.json.stopped", "result.pt2"}
    assert {path.name for path in tmp_path.iterdir()} == left
    record = json.loads((tmp_path / "result.json").read_text())
    assert values["val_bpb"] == f"{record['val_bpb']:.6f}" and record["export_problem"] is None
    if torch.__version__.split("+")[0] == "2.11.0":  # its files are the text: the digest is that of commit a6048a1
        assert record["digest"] == "6d9a8577d1f7826e5d6159f8f087622d420984f40a771e3ce4f6f7c4123c59dc"
    assert record["val_bpb"] < 9 * record["tokens"] / record["bytes"]  # log2(512): that of a model that learned nothing
    assert values["sample"].startswith(r"def read_lines(path):\n")
    assert re.search(r"\nmilliseconds of a micro-step of 48 rows: forward .*, loss .*, backward .*, opt", run.stderr)
    assert run.stderr.startswith("profile smoke (AUTORESEARCH_PROFILE), 2 s on cpu, seed 42")


IMPORT_AND_RUN = """
import os, sys
before = dict(os.environ)
import train
changed = sorted(name for name in before | os.environ if os.environ.get(name) != before.get(name))
print(train.torch.cuda.is_initialized(), changed, os.listdir(), {'pyarrow', 'requests', 'rustbpe'} & set(sys.modules))
sys.exit(train.main())
"""


@pytest.mark.slow
def test_import_has_no_side_effects_and_a_run_without_data_is_one_error_line(smoke_env, tmp_path):
    told = {"AUTORESEARCH_RESULT": str(tmp_path / "result.json"), "AUTORESEARCH_SEED": "9", "AUTORESEARCH_AUDIT": "1"}
    env = smoke_env | told | {"AUTORESEARCH_CACHE": str(tmp_path / "none"), "PYTHONDONTWRITEBYTECODE": "1"}
    run = python(env, "-c", IMPORT_AND_RUN, cwd=tmp_path)
    changed = sorted([*told, "GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF"])  # a process that the run starts is no run
    assert (run.returncode, run.stdout) == (1, f"False {changed} [] set()\n")
    assert re.search(r"\nerror: profile 'smoke' is not prepared .*: run 'uv run prepare.py'\n$", run.stderr)


INTERRUPT = """
import os, signal, sys, train
signal.signal(signal.SIGINT, signal.default_int_handler)  # where these tests run in the background it is ignored
def log(line, **options):
    if line.startswith("step 00001"):
        os.kill(os.getpid(), signal.SIGINT)
train.log = log
sys.exit(train.main())
"""


@pytest.mark.slow
def test_ctrl_c_while_it_trains_ends_it_without_a_traceback(smoke_env):
    run = python(smoke_env, "-c", INTERRUPT)
    assert (run.returncode, run.stdout) == (130, "") and "Traceback" not in run.stderr


def test_refusal_of_the_evaluator_is_one_error_line(monkeypatch, capsys):
    def refuse():
        raise prepare.EvaluationRefused("logits moved")

    monkeypatch.setattr(train, "run", refuse)
    assert (train.main(), capsys.readouterr().err) == (1, "error: logits moved\n")
