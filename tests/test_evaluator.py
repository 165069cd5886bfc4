"""The evaluator: bits per byte against hand calculation; every leaking model refused."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluator_fixtures import T, Toy, V, Wrapped, evaluate, refused, rows_of
from torch import nn

# ----- the score -----


def test_bpb_equals_the_plain_formula_for_any_batch_size(evaluator):
    model = Toy()
    lengths = evaluator.get_token_bytes()
    scores = {}
    for split in ("val", "test"):
        rows = rows_of(evaluator, split)
        assert len(rows) == 100
        nats = num_bytes = 0.0
        for row in rows:
            logits = model(torch.from_numpy(row[None, :-1]))[0].detach().double()
            for t, target in enumerate(row[1:]):
                if lengths[target] > 0:
                    nats += (logits[t].exp().sum().log() - logits[t, target]).item()
                    num_bytes += int(lengths[target])
        scores[split] = nats / math.log(2) / num_bytes
    test = evaluator._score(model, "test", 100, 33, torch.device("cpu"))
    assert test["test_bpb"] == pytest.approx(scores["test"], abs=1e-6)
    for batch_size in (7, 64, 1000):
        shapes = set()
        model = Wrapped(lambda logits, idx, shapes=shapes: shapes.add(tuple(idx.shape)) or logits)
        assert evaluate(evaluator, model, batch_size) == pytest.approx(scores["val"], abs=1e-6)
        assert shapes == {(min(batch_size, 100), T)}  # one shape: nothing recompiles


def test_token_bytes_are_raw_lengths(evaluator):
    tokenizer, lengths = evaluator.Tokenizer.from_directory(), evaluator.get_token_bytes()
    assert lengths.dtype == torch.int32 and lengths.shape == (V,)
    assert lengths[:256].eq(1).all()  # single bytes, those that are no UTF-8 among them
    assert lengths[-4:].eq(0).all()
    text = "naïve 漢字 🙂 ba ke"
    assert int(lengths[tokenizer.encode(text)].sum()) == len(text.encode())


# ----- the model's cheats -----

LEAKS = {
    "one token": lambda t, s: s <= t + 1,
    "three tokens at distance": lambda t, s: (s <= t) | (s == t + 3),
    "across the boundary of chunks of 16": lambda t, s: (s <= t) | ((t % 16 == 15) & (s == t + 1)),
    "last token from anywhere": lambda t, s: (s <= t) | (s == T - 1),
}


def peek(logits, idx):
    """So little that no probe alone tells it from rounding."""
    return logits + 0.009 * F.one_hot(idx.roll(-1, 1), V)


@pytest.mark.parametrize("batch_size", [1, 16, 100])
def test_look_ahead_is_refused_even_below_the_tolerance_of_a_logit(evaluator, batch_size):
    reason = r"logits at position \d+ moved by [\d.]+ when only tokens from position"
    for sees in LEAKS.values():
        refused(evaluator, reason, evaluate, evaluator, Toy(sees), batch_size)
    reason = "the model looks ahead: it predicts a token 0.00[789]"
    refused(evaluator, reason, evaluate, evaluator, Wrapped(peek), batch_size)


def test_leak_at_a_single_chunk_boundary_of_a_long_row_is_found(evaluator):
    """Anywhere-probes alone would find it in one of eight runs."""
    evaluator.VOCAB_SIZE = 4

    def model(idx):
        logits = F.one_hot(idx, 4).float()
        logits[:, 1023] += F.one_hot(idx[:, 1024], 4)
        return logits

    x = torch.randint(4, (256, 2048))
    reason = r"position 1023 moved by 1 when only tokens from position 1024 on"
    refused(evaluator, reason, evaluator._probe, model, x, model(x), np.random.default_rng(1))


def test_rounding_that_moves_with_other_tokens_is_no_look_ahead(evaluator):
    """As large as the probes allow: numbers of 8 bits, say, whose scale is the largest activation's."""

    def round_differently(logits, idx):
        generator = torch.Generator().manual_seed(int(idx.sum()))
        return logits + 0.0098 * (torch.rand(logits.shape, generator=generator) - 0.5)

    for _ in range(3):
        assert evaluate(evaluator, Wrapped(round_differently)) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(evaluator, Toy()) > 0


def learner(first_call):
    """A model that counts the tokens it sees, and shows what it learned from a call on; and the list of its calls."""
    calls = []

    def learn(logits, idx):
        calls.append(torch.bincount(idx.flatten(), minlength=V))
        return logits + sum(calls[:-1]) * 0.01 * (len(calls) >= first_call)

    return Wrapped(learn), calls


def test_model_that_keeps_what_it_saw_is_refused(evaluator):
    reason = "two identical forwards .*: a cache, running statistics, learning"
    refused(evaluator, reason, evaluate, evaluator, learner(0)[0])
    honest, calls = learner(math.inf)
    evaluate(evaluator, honest)
    reason = "changes while it is scored: scored again at the end, the first batch moved by"
    refused(evaluator, reason, evaluate, evaluator, learner(len(calls))[0])


def mix_last_position(logits, idx):
    """Only the row that stays whole shows it: in all others that position may change."""
    return torch.cat([logits[:, :-1], logits[:, -1:] + logits[:, -1:].roll(1, 0)], 1)


DROPOUT = r"two identical forwards in eval mode differ by \d.* \(dropout\), or something that a"
BAD_OUTPUTS = [  # what is made of a network's logits, and how it is refused
    (mix_last_position, "when only other rows changed"),
    (lambda logits, idx: F.dropout(logits, 0.1, training=True), DROPOUT),
    (lambda logits, idx: logits[:, -1:], r"gave torch.float32 \(16, 1, 300\), not logits of a float type"),
    (lambda logits, idx: (logits, None), "gave tuple, not a plain"),
    (lambda logits, idx: nn.Parameter(logits), "gave Parameter, not a plain torch.Tensor"),
    (lambda logits, idx: logits * math.nan, "loss on batch 0 of split 'val' is not finite: a logit is NaN or inf"),
    (lambda logits, idx: logits.index_fill(-1, idx[0, 5], -math.inf), "a token that occurs has the logit -inf"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_OUTPUTS)
def test_outputs_that_cannot_be_scored_are_refused_with_what_is_seen_and_its_likely_cause(evaluator, change, reason):
    refused(evaluator, reason, evaluate, evaluator, Wrapped(change))


def test_tokens_that_never_occur_may_have_no_probability(evaluator):
    model = Wrapped(lambda logits, idx: logits.index_fill(-1, torch.tensor(V - 1), -math.inf))
    assert evaluate(evaluator, model) < evaluate(evaluator, Toy())


@pytest.mark.parametrize("leak", [None, "one token"])
def test_model_returns_to_its_mode_and_random_state_is_untouched(evaluator, leak):
    """Scored or refused. It is scored in eval mode, without gradients, and gets nothing but idx."""
    model = nn.Sequential(Toy(LEAKS[leak]) if leak else Toy(), nn.Dropout(0.5)).train()
    seen = set()
    model.register_forward_hook(lambda module, args, out: seen.add((module.training, out.requires_grad, len(args))))
    state = torch.manual_seed(3).get_state()
    if leak:
        refused(evaluator, "moved by", evaluate, evaluator, model)
    else:
        assert evaluate(evaluator, model) == pytest.approx(evaluate(evaluator, model[0]), abs=1e-9)
    assert seen == {(False, False, 1)} and model.training
    assert torch.equal(torch.get_rng_state(), state)
