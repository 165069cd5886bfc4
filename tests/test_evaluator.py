"""The evaluator: bits per byte against hand calculation and a known entropy rate; every leaking model refused.

Run: uv run pytest tests/test_evaluator.py
"""

import itertools
import math
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from judge_fixtures import T, Toy, V, Wrapped, evaluate, rows_of
from prepare_fixtures import copy_prepare, error_line, load_prepare, profile_row
from torch import nn


@pytest.fixture
def judge(tiny):
    return load_prepare(tiny[0], "tiny", tiny[1])


# ----- the score -----


def test_bpb_equals_the_plain_formula(judge):
    model = Toy()
    lengths = judge.get_token_bytes()
    scores = {}
    for split in ("val", "test"):
        rows = rows_of(judge, split)
        assert len(rows) == 100
        nats = num_bytes = 0.0
        for row in rows:
            logits = model(torch.from_numpy(row[None, :-1]))[0].detach().double()
            for t, target in enumerate(row[1:]):
                if lengths[target] > 0:
                    nats += (logits[t].exp().sum().log() - logits[t, target]).item()
                    num_bytes += int(lengths[target])
        scores[split] = nats / math.log(2) / num_bytes
    assert evaluate(judge, model) == pytest.approx(scores["val"], abs=1e-6)
    test = judge._score(model, "test", 100, 33, torch.device("cpu"))
    assert test["test_bpb"] == pytest.approx(scores["test"], abs=1e-6)


def test_bpb_equals_hand_computation_on_one_row(judge, monkeypatch):
    """Three targets: probability 1/2 for a 2-byte token, 1/4 for a 3-byte one; BOS (0 bytes) does not count."""
    monkeypatch.setattr(judge, "MAX_SEQ_LEN", 3)
    two, three = (next(t for t in range(V) if judge.get_token_bytes()[t] == n) for n in (2, 3))
    rows = np.array([[judge.BOS_ID, two, three, judge.BOS_ID]])
    monkeypatch.setattr(judge, "_open_split", lambda split, T: type("Rows", (), {"take": lambda self, n: rows[:n]})())

    def model(idx):
        p = torch.full((*idx.shape, V), 0.0)
        p[:, 0, two], p[:, 0, 7], p[:, 1, three], p[:, 1, 8], p[:, 2, 9] = 0.5, 0.5, 0.25, 0.75, 1.0
        return torch.log(p + 1e-30)

    score = judge._score(model, "val", 1, 4, torch.device("cpu"))
    assert score == {"val_bpb": pytest.approx((1 + 2) / 5, abs=1e-6), "rows": 1, "tokens": 2, "bytes": 5}


def test_uniform_model_scores_log2_vocabulary_times_tokens_over_bytes(judge):
    rows = rows_of(judge)[:, 1:]
    lengths = judge.get_token_bytes().numpy()[rows]
    expected = math.log2(V) * (lengths > 0).sum() / lengths.sum()
    assert evaluate(judge, lambda idx: torch.zeros(*idx.shape, V)) == pytest.approx(expected, abs=1e-6)


def test_bpb_is_independent_of_batch_size(judge):
    expected = evaluate(judge, Toy(), 10)
    for batch_size in (7, 64, 100, 1000):
        shapes = set()
        model = Wrapped(lambda logits, idx, shapes=shapes: shapes.add(tuple(idx.shape)) or logits)
        assert evaluate(judge, model, batch_size) == pytest.approx(expected, abs=1e-6)
        assert shapes == {(min(batch_size, 100), T)}  # one shape: nothing recompiles


def test_bpb_of_half_precision_logits_is_computed_in_float32(judge):
    model = Toy()
    full = evaluate(judge, Wrapped(lambda logits, idx: logits.bfloat16().float(), model))
    assert evaluate(judge, Wrapped(lambda logits, idx: logits.bfloat16(), model)) == pytest.approx(full, abs=1e-9)


def test_token_bytes_are_raw_lengths(judge):
    tokenizer, lengths = judge.Tokenizer.from_directory(), judge.get_token_bytes()
    assert lengths.dtype == torch.int32 and lengths.shape == (V,)
    assert lengths[:256].eq(1).all()  # single bytes, those that are no UTF-8 among them
    assert lengths[-4:].eq(0).all()
    text = "naïve 漢字 🙂 ba ke"
    assert int(lengths[tokenizer.encode(text)].sum()) == len(text.encode())


@pytest.mark.slow
def test_true_model_of_a_markov_chain_scores_its_entropy_rate(tmp_path):
    """Parquet to bpb: four letters, a token each, of which the next depends on the last; the model is that chain."""
    rng = np.random.default_rng(11)
    letters, P = "abcd", rng.dirichlet([0.6] * 4, size=4)
    documents = []
    for _ in range(3000):
        state, text = 0, []
        for uniform in rng.random(200):
            state = int(np.searchsorted(np.cumsum(P[state])[:3], uniform))
            text.append(letters[state])
        documents.append("".join(text))
    pq.write_table(pa.table({"text": documents}), tmp_path / "chain.parquet")
    # 260 tokens: the 256 bytes and the special ones, so that a token is a letter.
    row = profile_row("chain", tmp_path / "chain.parquet", vocab_size=260, max_seq_len=256, eval_tokens=256 * 400)
    chain = load_prepare(copy_prepare(tmp_path, row), "chain", tmp_path / "cache")
    assert chain.main([]) == 0
    log_p = torch.full((260, 260), -30.0)
    ids = [chain.Tokenizer.from_directory().encode(letter)[0] for letter in letters]
    for i, j in itertools.product(range(4), range(4)):
        log_p[ids[i], ids[j]] = math.log(P[i, j])
    for j in range(4):
        log_p[chain.BOS_ID, ids[j]] = math.log(P[0, j])  # every document starts in state 0
    values, vectors = np.linalg.eig(P.T)
    pi = np.real(vectors[:, np.argmax(values.real)])
    pi /= pi.sum()
    entropy_rate = -(pi[:, None] * P * np.log2(P)).sum()
    bpb = evaluate(chain, lambda idx: log_p[idx], 50)
    # 100,000 letters: the standard error of the mean is about 0.004 bits
    assert bpb == pytest.approx(entropy_rate, abs=0.02)


def test_model_is_scored_in_eval_mode_and_without_gradients(judge):
    model, seen = nn.Sequential(Toy(), nn.Dropout(0.5)), set()
    model.register_forward_hook(lambda module, args, output: seen.add((module.training, torch.is_grad_enabled())))
    assert evaluate(judge, model) == pytest.approx(evaluate(judge, model[0]), abs=1e-9)
    assert seen == {(False, False)}


def test_model_returns_to_its_mode_and_random_state_is_untouched(judge):
    for mode in (True, False):
        model = Toy().train(mode)
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        expected = torch.rand(1), np.random.rand(), random.random()
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        evaluate(judge, model)
        assert (torch.rand(1), np.random.rand(), random.random()) == expected
        assert model.training is mode


# ----- the model's cheats -----


def refused(judge, model, reason, batch_size=16, kind="NotCausal"):
    with pytest.raises(getattr(judge, kind), match=reason):
        evaluate(judge, model, batch_size)


def test_honest_models_are_never_refused(judge):
    for seed in range(4):
        evaluate(judge, Toy(seed=seed, scale=3.0), batch_size=10 + 30 * seed)


LEAKS = {
    "one token": lambda t, s: s <= t + 1,
    "three tokens at distance": lambda t, s: (s <= t) | (s == t + 3),
    "whole chunks of 8": lambda t, s: s // 8 <= t // 8,
    "across the boundary of chunks of 8": lambda t, s: (s <= t) | ((t % 8 == 7) & (s == t + 1)),
    "across the boundary of chunks of 16": lambda t, s: (s <= t) | ((t % 16 == 15) & (s == t + 1)),
    "last token from anywhere": lambda t, s: (s <= t) | (s == T - 1),
}


@pytest.mark.parametrize("batch_size", [1, 16, 100])
@pytest.mark.parametrize("leak", LEAKS)
def test_look_ahead_is_refused(judge, leak, batch_size):
    reason = r"logits at position \d+ moved by [\d.]+ when only tokens from position"
    refused(judge, Toy(LEAKS[leak]), reason, batch_size)


def weak_peek(nats):
    """Adds so little to the logit of each next token that no probe alone tells it from rounding."""
    return lambda logits, idx: logits + nats * F.one_hot(idx.roll(-1, 1), V)


@pytest.mark.parametrize("batch_size", [1, 16, 100])
def test_look_ahead_below_the_tolerance_of_a_logit_is_refused(judge, batch_size):
    refused(judge, Wrapped(weak_peek(0.009)), "the model looks ahead: it predicts a token 0.00[789]", batch_size)


def test_rounding_that_moves_with_other_tokens_is_no_look_ahead(judge):
    """As large as the probes allow: numbers of 8 bits, say, whose scale is the largest activation's."""

    def round_differently(logits, idx):
        generator = torch.Generator().manual_seed(int(idx.sum()))
        return logits + 0.0098 * (torch.rand(logits.shape, generator=generator) - 0.5)

    for _ in range(3):
        assert evaluate(judge, Wrapped(round_differently)) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(judge, Toy()) > 0


@pytest.mark.parametrize("training", [True, False])
def test_refused_model_returns_to_its_mode(judge, training):
    model = Toy(LEAKS["one token"]).train(training)
    refused(judge, model, "moved by")
    assert model.training is training


@pytest.mark.parametrize("batch_size", [2, 16, 100])
def test_mixing_over_the_batch_is_refused(judge, batch_size):
    model = Wrapped(lambda logits, idx: logits + 0.5 * logits.mean(0, keepdim=True))
    refused(judge, model, "moved by", batch_size)


def test_mixing_at_one_position_is_refused_as_other_rows(judge):
    """Only the row that stays whole shows it: in all others that position may change."""
    model = Wrapped(lambda logits, idx: torch.cat([logits[:, :-1], logits[:, -1:] + logits[:, -1:].roll(1, 0)], 1))
    refused(judge, model, "when only other rows changed")


def test_leak_at_a_single_chunk_boundary_of_a_long_row_is_found(judge):
    """Anywhere-probes alone would find it in one of eight runs."""
    judge.VOCAB_SIZE = 4

    def model(idx):
        logits = F.one_hot(idx, 4).float()
        logits[:, 1023] += F.one_hot(idx[:, 1024], 4)
        return logits

    x = torch.randint(4, (256, 2048))
    with pytest.raises(judge.NotCausal, match=r"position 1023 moved by 1 when only tokens from position 1024 on"):
        judge._probe(model, x, model(x), np.random.default_rng(1))
    with pytest.raises(judge.NotCausal, match="moved by inf"):  # no number is no answer
        judge._probe(lambda idx: model(idx) * math.nan, x, model(x), np.random.default_rng(1))


def test_dropout_kept_on_is_refused(judge):
    refused(judge, Wrapped(lambda logits, idx: F.dropout(logits, 0.1, training=True)), "remove randomness in eval mode")


def test_learning_from_earlier_batches_is_refused(judge):
    class Learner(Toy):
        counts = torch.ones(V)

        def forward(self, idx):
            logits = super().forward(idx) + self.counts.log()
            if not hasattr(self, "last") or not torch.equal(self.last, idx):
                self.counts = self.counts + torch.bincount(idx.flatten(), minlength=V) * 1e-3
            self.last = idx
            return logits

    class Patient(Learner):
        """Shows what it learned only in the last call of an evaluation."""

        calls, last_call = 0, math.inf

        def forward(self, idx):
            self.calls += 1
            if self.calls < self.last_call:
                self.counts = torch.ones(V)
            return super().forward(idx)

    refused(judge, Learner(), "moved by|scored again at the end|two identical forwards")
    honest = Patient()
    evaluate(judge, honest)
    patient = Patient()
    patient.last_call = honest.calls
    refused(judge, patient, "the model changes during evaluation: scored again at the end, the first batch moved by")


def test_unnormalised_scores_gain_nothing(judge):
    """The evaluator normalises: a constant added to all logits, however large, changes nothing."""
    model = Toy()
    shifted = evaluate(judge, Wrapped(lambda logits, idx: logits + 100.0, model))
    assert shifted == pytest.approx(evaluate(judge, model), abs=1e-5)


def test_model_sees_no_targets(judge):
    """Nothing but idx is passed, and no storage behind it holds the last target."""
    seen = []

    def model(*args, **kwargs):
        assert len(args) == 1 and not kwargs
        seen.append(args[0].untyped_storage().nbytes() == args[0].numel() * 8 and args[0]._base is None)
        return torch.zeros(*args[0].shape, V)

    evaluate(judge, model)
    assert all(seen)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda logits, idx: logits[..., :-1], r"torch.float32 \(16, 32, 299\)"),
        (lambda logits, idx: F.pad(logits, (0, 4)), r"torch.float32 \(16, 32, 304\)"),
        (lambda logits, idx: logits[:, -1:], r"torch.float32 \(16, 1, 300\)"),
        (lambda logits, idx: logits.mean(), r"torch.float32 \(\)"),
        (lambda logits, idx: logits.long(), r"torch.int64 \(16, 32, 300\)"),
    ],
)
def test_wrong_shapes_are_refused(judge, change, got):
    refused(judge, Wrapped(change), f"model\\(idx\\) gave {got}, not logits of a float type", kind="EvaluationRefused")


def test_anything_but_a_tensor_is_refused(judge):
    refused(judge, Wrapped(lambda logits, idx: (logits, None)), "gave tuple, not a plain", kind="EvaluationRefused")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_is_refused(judge, value):
    model = Wrapped(lambda logits, idx: torch.where(idx[..., None] == judge.BOS_ID, value, logits))
    refused(judge, model, "loss on batch 0 of split 'val' is not finite", kind="EvaluationRefused")


def test_infinite_loss_on_a_single_target_is_refused(judge):
    model = Wrapped(lambda logits, idx: logits.index_fill(-1, torch.tensor([int(rows_of(judge)[50, 5])]), -math.inf))
    refused(judge, model, "not finite", kind="EvaluationRefused")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_bad_batch_size_is_an_error(judge, batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        evaluate(judge, Toy(), batch_size)


def test_tokenizer_of_another_vocabulary_is_an_error(judge):
    special, ranks = {f"<|reserved_{i}|>": 256 + i for i in range(4)}, {bytes([byte]): byte for byte in range(256)}
    other = tiktoken.Encoding("other", pat_str=judge.SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    with pytest.raises(ValueError, match="the vocabulary 260, not 300"):
        judge.evaluate_bpb(Toy(), judge.Tokenizer(other), 16)


# ----- the files -----


@pytest.mark.parametrize("name", ["tokenizer.tiktoken", "tokenizer.json", "tokens/val.tokens", "tokens/test.tokens"])
def test_changed_metric_file_is_named(tiny, tmp_path, capsys, name):
    """The byte table is computed from tokenizer.tiktoken, so that file stands for it."""
    shutil.copytree(tiny[1], tmp_path / "cache")
    path = tmp_path / "cache" / "tiny" / name
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    if name == "tokenizer.tiktoken":  # two byte tokens trade places: still a tokenizer
        lines = data.decode().splitlines()
        data = "\n".join([lines[1].split()[0] + " 0", lines[0].split()[0] + " 1", *lines[2:]]).encode() + b"\n"
    elif name == "tokenizer.json":
        data += b" "
    else:
        data[100] ^= 1
    path.write_bytes(data)
    judge = load_prepare(tiny[0], "tiny", tmp_path / "cache")
    assert judge.main(["--verify"]) == 1
    assert error_line(capsys).startswith(f"error: {path} is not what was prepared")
    with pytest.raises(judge.UserError, match=f"{name} is not what was prepared"):
        evaluate(judge, Toy())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float32_logits_of_the_batch_are_never_whole(judge):
    """The losses of bf16 logits of 2.1 GB take a few pieces more, not the 4.3 GB that all of them are in float32."""
    B, T_, vocab = 64, 2048, 8192
    logits = torch.randn(B, T_, vocab, dtype=torch.bfloat16, device="cuda")
    y = torch.randint(vocab, (B, T_), device="cuda")
    judge.VOCAB_SIZE = vocab
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = judge._by_position(judge._nats, logits, y)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 4 * 2**25 * 4 < logits.numel() * 4
    assert losses.shape == (B, T_)
