"""What a training script can do to its judge without patching it, each refused; and what the judge writes of a run.

Run: uv run pytest tests/test_cheats.py
"""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from judge_fixtures import T, Toy, Wrapped, evaluate, make_loader, rows_of, start_clock
from prepare_fixtures import load_prepare


@pytest.fixture
def judge(tiny):
    """In a notebook: no loop."""
    return load_prepare(tiny[0], "tiny", tiny[1])


@pytest.fixture
def run(tiny, tmp_path):
    """In a run that the loop started."""
    return load_prepare(tiny[0], "tiny", tiny[1], AUTORESEARCH_RESULT=str(tmp_path / "result.json"))


def refused(judge, reason, function, *args):
    with pytest.raises(judge.EvaluationRefused, match=reason) as error:
        function(*args)
    assert "\n" not in str(error.value)


# ----- the judge's own values -----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TIME_BUDGET", 80),
        ("EVAL_TOKENS", 64),
        ("VOCAB_SIZE", 2),
        ("PROBE_TOLERANCE", 1e9),
        ("CACHE", Path("/nowhere")),
        ("CONSTANTS", {}),
    ],
)
def test_constant_of_the_judge_that_the_run_sets_is_refused(run, tmp_path, name, value):
    tokenizer = run.Tokenizer.from_directory()
    start_clock(run)
    before = getattr(run, name)
    setattr(run, name, value)
    reason = f"prepare.{name} is {value!r} in this process, and {before!r}"[:70]
    refused(run, re.escape(reason), run.evaluate_bpb, Toy(), tokenizer, 16)
    assert not (tmp_path / "result.json").exists()


def test_entry_that_the_run_sets_in_a_table_of_the_judge_is_refused(judge):
    judge.DTYPES[6] = torch.float64
    refused(judge, "prepare.DTYPES is", evaluate, judge, Toy())
    judge.DTYPES[6] = torch.float16
    judge.MY_OWN = 1  # not one of the judge's
    assert evaluate(judge, Toy()) > 0


# ----- the clock -----


def test_training_over_budget_is_refused(tiny):
    for seconds, says in [(10.59, None), (10.61, "trained for 10.61 s by the judge's clock, 10.60 s is the most")]:
        judge = load_prepare(tiny[0], "tiny", tiny[1])
        now = [50.0]
        judge._now = lambda now=now: now[0]
        start_clock(judge)
        now[0] += seconds
        if says:
            with pytest.raises(judge.BudgetExceeded, match=says):
                evaluate(judge, Toy())
        else:
            assert evaluate(judge, Toy()) > 0
        judge._stopwatch.lock.close()


def test_clock_never_started_under_the_loop_is_refused(run, tmp_path):
    refused(run, "the clock never started", evaluate, run, Toy())
    assert not (tmp_path / "result.json").exists()


def test_clock_stops_where_the_evaluation_begins(judge):
    now = [0.0]
    judge._now = lambda: now[0]
    start_clock(judge)
    now[0] = 8.5
    evaluate(judge, Wrapped(lambda logits, idx: now.__setitem__(0, now[0] + 1) or logits))
    assert now[0] > 15 and judge.training_seconds() == 8.5


class Averaging(Toy):
    """Works for some seconds when it is put into eval mode, as a model that averages its weights there."""

    def __init__(self, now, seconds):
        super().__init__()
        self.now = now
        self.seconds = seconds

    def train(self, mode=True):
        if not mode:
            self.now[0] += self.seconds
        return super().train(mode)


def test_work_on_the_way_to_eval_mode_is_training_time(judge):
    now = [0.0]
    judge._now = lambda: now[0]
    start_clock(judge)
    now[0] = 5.0
    model = Averaging(now, seconds=7.0)
    refused(judge, "trained for 12.00 s by the judge's clock", evaluate, judge, model)
    assert model.training
    now[0] = 5.0
    assert evaluate(judge, Averaging(now, seconds=3.0)) > 0
    assert judge.training_seconds() == 8.0


class Changing(Toy):
    """Changes something once, before its first logits in eval mode: no later forward differs."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.tied = self.head
        self.register_buffer("mean", torch.zeros((), dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros(3), persistent=False)
        self.register_buffer("cache", torch.zeros(0))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("nowhere", torch.zeros(3, device="meta"))

    def forward(self, idx):
        if not self.training and self.change:
            self.change(self)
            self.change = None
        return super().forward(idx)


def learn(model):
    model.head.weight.data[0, 0] += 1


def keep_statistics(model):
    model.mean += 1


def make_caches(model):
    model.count += 1
    model.cache = torch.ones(9)  # has grown
    model.register_buffer("another", torch.ones(2))


@pytest.mark.parametrize(("change", "name"), [(learn, "head.weight"), (keep_statistics, "mean")])
def test_model_that_learns_while_it_is_scored_is_refused(run, tmp_path, change, name):
    start_clock(run)
    reason = f"the model changes during evaluation: {name} is not what it was"
    refused(run, reason, evaluate, run, Changing(change))
    assert not (tmp_path / "result.json").exists()


def test_caches_that_a_forward_makes_are_no_learning(judge):
    assert evaluate(judge, Changing(make_caches)) == evaluate(judge, Toy())


def test_second_clock_of_a_run_is_an_error(tiny, run):
    """A child process, forked before the clock started, could train first and leave its weights."""
    child = load_prepare(tiny[0], "tiny", tiny[1], AUTORESEARCH_RESULT=str(run._RESULT))
    start_clock(child)
    child._stopwatch.lock.close()
    with pytest.raises(FileExistsError, match=r"result.json.started"):
        start_clock(run)


def test_marks_of_the_clock_stand_beside_the_record(run, tmp_path):
    loader = make_loader(run)
    assert os.listdir(tmp_path) == []
    next(loader)
    assert os.listdir(tmp_path) == ["result.json.started"]
    loader.close()
    evaluate(run, Toy())
    assert sorted(os.listdir(tmp_path)) == ["result.json", "result.json.started", "result.json.stopped"]
    started, stopped, record = (
        (tmp_path / name).stat().st_mtime_ns for name in ("result.json.started", "result.json.stopped", "result.json")
    )
    assert started < stopped < record


# ----- data that is not the run's -----


def test_validation_loader_inside_a_run_is_refused(run, judge):
    for split in ("val", "test"):
        refused(run, f"split '{split}' is the judge's alone in a training run", make_loader, run, split)
    by_hand = make_loader(judge, "val")
    next(by_hand)  # nothing trains yet: a person looks at the data
    start_clock(judge)
    refused(judge, "split 'val' is the judge's alone", next, by_hand)
    refused(judge, "split 'val' is the judge's alone", make_loader, judge, "val")


def test_no_data_is_read_before_the_clock_starts(run):
    path = run._tokens_path("train_00000")
    loader = make_loader(run)  # has read nothing yet
    early = "was asked for before the clock started: make_dataloader starts it"
    refused(run, early, run._open_split, "train", T)
    refused(run, early, run._read_shard, path)
    texts = run.CACHE / "text" / "train_00000.parquet"
    refused(run, "is for the preparation", next, run._document_batches(texts))
    first, _, _ = next(loader)
    assert torch.equal(first, torch.from_numpy(run._open_split("train", T).take(2)[:, :-1]))  # by the clock
    refused(run, "split 'val' is the judge's alone", run._read_shard, run._tokens_path("val"))
    refused(run, "is for the preparation", next, run._document_batches(texts))
    loader.close()


def test_first_batch_is_read_by_the_clock(run):
    seen = []
    read = run._read_shard
    run._read_shard = lambda path: seen.append(run._stopwatch.started) or read(path)
    start_clock(run)
    assert seen and None not in seen


# ----- evaluated once -----


def test_run_is_evaluated_once_whatever_becomes_of_its_record(run, tmp_path, monkeypatch):
    loader = make_loader(run)
    next(loader)
    evaluate(run, Toy())
    stopped = (tmp_path / "result.json.stopped").stat().st_mtime_ns
    (tmp_path / "result.json").unlink()
    for name in ("AUTORESEARCH_RESULT", "AUTORESEARCH_SEED", "AUTORESEARCH_AUDIT"):
        monkeypatch.delenv(name, raising=False)
    for function, args in [(next, [loader]), (make_loader, [run]), (evaluate, [run, Toy(seed=1)])]:
        refused(run, "this run was evaluated", function, *args)
    assert not (tmp_path / "result.json").exists()
    assert (tmp_path / "result.json.stopped").stat().st_mtime_ns == stopped


def test_record_of_an_earlier_run_is_not_overwritten(run, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    start_clock(run)
    refused(run, "a run is scored once, and .* holds this run's record", evaluate, run, Toy())
    assert (tmp_path / "result.json").read_text() == "{}"


def test_evaluation_that_the_model_breaks_off_is_the_only_one(run, judge):
    """Else a model could look at all rows, raise, and train on what it saw."""
    for prepare in (run, judge):
        seen = []

        def look(logits, idx, seen=seen):
            seen.append(idx)
            raise KeyError("enough")

        loader = make_loader(prepare)
        next(loader)
        with pytest.raises(KeyError, match="enough"):
            evaluate(prepare, Wrapped(look))
        assert seen
        refused(prepare, "this run was evaluated", next, loader)
        refused(prepare, "this run was evaluated", evaluate, prepare, Toy())
        prepare._stopwatch.lock.close()


def test_evaluation_with_wrong_arguments_can_be_repeated(run):
    start_clock(run)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(run, Toy(), batch_size=0)
    assert evaluate(run, Toy()) > 0


# ----- scores that nobody measured -----


def test_patched_loss_of_torch_does_not_score(judge, monkeypatch):
    honest = evaluate(judge, Toy())
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *args, **options: logits[:, 0] * 0 + 0.1)
    assert evaluate(judge, Toy()) == honest


@pytest.mark.parametrize("loss", [0.0, -1.0, 1e30])
def test_score_that_cannot_be_is_refused(run, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(run, "cross_entropy", lambda logits, *args, **options: logits[:, 0] * 0 + loss)
    start_clock(run)
    refused(run, "bits per byte on split 'val' cannot be", evaluate, run, Toy())
    assert not (tmp_path / "result.json").exists()


def test_logits_of_a_tensor_subclass_are_refused(run, tmp_path):
    class Flatterer(torch.Tensor):
        """Answers to cross_entropy itself."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            result = super().__torch_function__(function, types, args, kwargs or {})
            return result * 0.5 if function is F.cross_entropy else result

    start_clock(run)
    model = Wrapped(lambda logits, idx: logits.as_subclass(Flatterer))
    refused(run, r"model\(idx\) gave Flatterer, not a plain torch.Tensor", evaluate, run, model)
    assert not (tmp_path / "result.json").exists()


def test_logits_of_honest_kinds_are_plain(judge):
    """Whatever an honest model does on the way, plain tensors come out."""
    toy = Toy()
    honest = evaluate(judge, toy)
    vmapped = Wrapped(lambda logits, idx: torch.func.vmap(lambda row: row * 1.0)(logits), toy)
    functional = Wrapped(lambda _, idx: torch.func.functional_call(toy, dict(toy.named_parameters()), (idx,)), toy)
    for model in (vmapped, functional):
        assert evaluate(judge, model) == pytest.approx(honest, abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert evaluate(judge, toy) == pytest.approx(honest, abs=0.05)


# ----- the record -----


def test_record_holds_what_the_evaluator_measured(tiny, tmp_path):
    path = tmp_path / "result.json"
    judge = load_prepare(tiny[0], "tiny", tiny[1], seed=7, AUTORESEARCH_RESULT=str(path))
    judge._now = iter([3.0, 7.25]).__next__
    start_clock(judge)
    bpb = evaluate(judge, Toy())
    record = json.loads(path.read_text())
    described = judge.describe()
    lookup = load_prepare(tiny[0], "tiny", tiny[1])
    lengths = lookup.get_token_bytes().numpy()[rows_of(lookup)[:, 1:]]
    assert 0 <= record.pop("busy_others") <= 1
    assert record == {
        "val_bpb": bpb,
        "profile": "tiny",
        "split": "val",
        "seed": 7,
        "training_seconds": 4.25,
        "rows": 100,
        "tokens": int((lengths > 0).sum()),
        "bytes": int(lengths.sum()),
        "digest": described["digest"],
        "files": described["files"],
        "prepare_sha256": described["prepare_sha256"],
        "device_name": described["device_name"],
        "device_others": None,
        "cache": described["cache"],
    }
    assert json.loads(json.dumps(described)) == described
    assert described["rows"] == {"val": 100, "test": 100} and described["prepared"] and described["problem"] is None
    assert described["devices"] == {"cpu": {"lock": str(judge.LOCKS / "cpu.lock"), "free_gb": 0.0}}


def test_share_of_others_is_what_neither_idled_nor_was_spent_here(judge):
    before = 100.0, 40.0, 10.0  # all CPU time, spent by anyone, spent here
    assert judge._busy_others(before, (200.0, 100.0, 30.0)) == pytest.approx(0.4)
    assert judge._busy_others(before, (200.0, 40.0, 30.0)) == 0.0  # rounding of the kernel's ticks
    assert judge._busy_others(before, (200.0, 300.0, 30.0)) == 1.0
    assert judge._busy_others(before, before) is None
    assert judge._busy_others(None, before) is None


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="Linux only")
def test_work_of_this_process_is_not_others(judge, monkeypatch):
    begin = judge._cpu_seconds()
    while judge._cpu_seconds()[2] < begin[2] + 0.1:
        sum(range(10000))
    end = judge._cpu_seconds()
    assert end[1] - begin[1] >= 0.05  # the kernel saw it too
    assert judge._busy_others(begin, end) < (end[1] - begin[1]) / (end[0] - begin[0])
    monkeypatch.setattr(judge.os, "times", lambda: os.times_result((1.0, 2.0, 4.0, 8.0, 0.0)))
    assert judge._cpu_seconds()[2] == 15.0  # a compiler's processes are its own too


def test_devices_and_their_other_processes_are_told(judge, monkeypatch):
    """Against a pretended driver: no machine of ours has two GPUs."""

    class Driver:
        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByUUID(self, uuid, handle):
            return 0 if uuid == b"GPU-uuid-1" else 6

        def nvmlDeviceGetComputeRunningProcesses_v3(self, handle, count, array):
            count._obj.value = 3
            return 7  # the array is too small

    def no_driver(name):
        raise OSError(name)

    uuid = lambda device: SimpleNamespace(uuid=f"uuid-{torch.device(device).index}")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", uuid)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    locks = [str(judge.LOCKS / f"uuid-{i}.lock") for i in (0, 1)]
    for visible, names in [(None, ["0", "1"]), ("3, GPU-5", ["3", "GPU-5"])]:
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        else:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        expected = {name: {"lock": locks[i], "free_gb": float(i)} for i, name in enumerate(names)}
        assert judge._devices("cuda") == expected

    monkeypatch.setattr(judge.ctypes, "CDLL", lambda name: Driver())
    assert judge._device_others(torch.device("cuda", 1)) == 2
    assert judge._device_others(torch.device("cuda", 0)) is None  # the driver does not know it
    monkeypatch.setattr(judge.ctypes, "CDLL", no_driver)
    assert judge._device_others(torch.device("cuda", 1)) is None
    assert judge._device_others(torch.device("cpu")) is None
