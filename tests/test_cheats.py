"""What a training script may try with its evaluator, each refused; and what the evaluator records of a run."""

import hashlib
import json
import math
import os
import re

import pytest
import torch
import torch.nn.functional as F
from evaluator_fixtures import Toy, Wrapped, evaluate, make_loader, refused, rows_of, start_clock
from prepare_fixtures import load_prepare


@pytest.fixture
def evaluator(evaluator):
    """In a notebook: no loop. Its clock is evaluator.now."""
    evaluator.now = 50.0
    evaluator._now = lambda: evaluator.now
    return evaluator


@pytest.fixture
def run(tiny, tmp_path):
    """In a run that the loop started."""
    return load_prepare(tiny[0], "tiny", tiny[1], seed=7, AUTORESEARCH_RESULT=str(tmp_path / "result.json"))


# ----- the clock -----


def test_training_over_budget_is_refused_whatever_the_run_calls_its_budget(evaluator):
    def slowly(logits, idx):
        evaluator.now += 1
        return logits

    start_clock(evaluator)
    evaluator.now += 10.26
    evaluator.TIME_BUDGET = 80
    reason = r"trained for 10.26 s by the evaluator's clock, 10.25 s is the most \(TIME_BUDGET is 10 s\): .*: warm up"
    refused(evaluator, reason, evaluate, evaluator, Toy())
    evaluator.now -= 0.02
    assert evaluate(evaluator, Wrapped(slowly)) > 0 and evaluator.now > 65  # what evaluation takes is no training
    assert evaluator.training_seconds() == pytest.approx(10.24)


def test_longer_rows_than_those_that_are_scored_are_refused(evaluator):
    evaluator.MAX_SEQ_LEN = 64
    reason = "prepare.MAX_SEQ_LEN is 64, rows of 32 tokens are scored: leave it"
    refused(evaluator, reason, evaluate, evaluator, Toy())


def test_work_on_the_way_to_eval_mode_is_training_time(evaluator):
    """As of a model that averages its weights there."""
    model = Toy()

    def eval_slowly(mode=True):
        evaluator.now += 11
        return Toy.train(model, mode)

    model.train = eval_slowly
    start_clock(evaluator)
    refused(evaluator, "trained for 11.00 s by the evaluator's clock", evaluate, evaluator, model)


@pytest.mark.parametrize("name", ["head.weight", "mean"])
def test_model_that_changes_while_it_is_scored_is_refused_by_the_tensors_name(run, tmp_path, name):
    """Once, before its first logits: no later forward differs."""
    model = Toy()
    model.register_buffer("mean", torch.zeros((), dtype=torch.bfloat16))

    def change(*_):
        hook.remove()
        model.state_dict()[name].view(-1)[0] += 1

    hook = model.register_forward_pre_hook(change)
    start_clock(run)
    refused(run, f"the model changes while it is scored: {name} is not what it was", evaluate, run, model)
    assert not (tmp_path / "result.json").exists()


# ----- data that is not the run's; evaluated once -----


def test_validation_loader_inside_a_run_is_refused(run, evaluator):
    refused(run, "the clock never started", evaluate, run, Toy())
    for split in ("val", "test"):
        refused(run, f"split '{split}' is the evaluator's alone in a training run", make_loader, run, split)
    by_hand = make_loader(evaluator, "val")
    next(by_hand)  # nothing trains yet: a person looks at the data
    start_clock(evaluator)
    refused(evaluator, "split 'val' is the evaluator's alone", next, by_hand)
    refused(evaluator, "split 'val' is the evaluator's alone", make_loader, evaluator, "val")


@pytest.mark.parametrize("kind", ["run", "evaluator"])
def test_run_is_evaluated_once_even_if_its_model_breaks_that_off(request, kind):
    """Else a model could look at all rows, raise, and train on what it saw."""
    evaluator = request.getfixturevalue(kind)

    def look(logits, idx):
        raise KeyError("enough")

    loader = make_loader(evaluator)
    next(loader)
    with pytest.raises(KeyError, match="enough"):
        evaluate(evaluator, Wrapped(look))
    for function, args in [(next, [loader]), (make_loader, [evaluator]), (evaluate, [evaluator, Toy()])]:
        refused(evaluator, "this run was evaluated", function, *args)


def test_no_batch_comes_after_the_clock_even_to_code_that_the_evaluation_calls(evaluator):
    loader = make_loader(evaluator)
    next(loader)
    model = Toy()
    model.state_dict = lambda: next(loader)
    refused(evaluator, "this run was evaluated", evaluate, evaluator, model)


def test_score_depends_on_no_loss_normalisation_or_byte_count_of_the_runs(evaluator, monkeypatch):
    honest = evaluate(evaluator, Toy())
    assert math.isfinite(honest)
    assert evaluate(evaluator, Wrapped(lambda logits, idx: logits + 100.0)) == pytest.approx(honest, abs=1e-5)
    tokenizer = evaluator.Tokenizer.from_directory()
    tokenizer.encoding.decode_single_token_bytes = None
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *args, **options: logits[:, 0] * 0 + 0.1)
    assert evaluator.evaluate_bpb(Toy(), tokenizer, 16) == honest


def weights_digest(model):
    digests = []
    for name, tensor in sorted(model.state_dict().items()):
        data = f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes()
        digests.append((name, hashlib.sha256(data).hexdigest()))
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def test_record_holds_what_the_evaluator_measured(run, tmp_path):
    run._now = iter([3.0, 7.25]).__next__
    start_clock(run)
    bpb = evaluate(run, Toy())
    record = json.loads((tmp_path / "result.json").read_text())
    described = run.describe()
    lengths = run.get_token_bytes().numpy()[rows_of(run)[:, 1:]]
    same = {name: described[name] for name in ("digest", "prepare_sha256", "device_name")}
    assert record == same | {
        "val_bpb": bpb,
        "profile": "tiny",
        "split": "val",
        "seed": 7,
        "training_seconds": 4.25,
        "rows": 100,
        "tokens": int((lengths > 0).sum()),
        "bytes": int(lengths.sum()),
        "weights_sha256": weights_digest(Toy()),
    }
    assert json.loads(json.dumps(described)) == described
    assert described["rows"] == {"val": 100, "test": 100} and described["prepared"] and described["problem"] is None
    assert described["devices"] == {"cpu": {"lock": str(run.LOCKS / "cpu.lock"), "free_gb": 0.0}}
    assert re.fullmatch(rf"\w.+ \({os.cpu_count()} cores\)", described["device_name"])
