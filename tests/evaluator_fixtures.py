"""What the tests of the evaluator share: a small network, and the ways in which a run meets the evaluator."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)  # tiny networks: a second thread would mostly wait

T, V = 32, 300  # of the profile "tiny"


class Toy(nn.Module):
    """One attention layer with seeded random weights; `sees(t, s)` says which keys s a query t may see."""

    def __init__(self, sees=lambda t, s: s <= t, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.wte = nn.Embedding(V, 32)
        self.qkv = nn.Linear(32, 96, bias=False)
        self.wpe = nn.Embedding(T, 32)
        self.head = nn.Linear(32, V, bias=False)
        nn.init.normal_(self.head.weight, std=0.3)
        t, s = torch.meshgrid(torch.arange(T), torch.arange(T), indexing="ij")
        self.register_buffer("mask", sees(t, s) | (t == s))

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask))


class Wrapped(nn.Module):
    """forward(idx) = change(model(idx), idx)."""

    def __init__(self, change, model=None):
        super().__init__()
        self.model = model or Toy()
        self.change = change

    def forward(self, idx):
        return self.change(self.model(idx), idx)


def evaluate(evaluator, model, batch_size=16):
    return evaluator.evaluate_bpb(model, evaluator.Tokenizer.from_directory(), batch_size)


def make_loader(evaluator, split="train", B=2, T=T):
    return evaluator.make_dataloader(evaluator.Tokenizer.from_directory(), B, T, split, device="cpu")


def start_clock(evaluator):
    loader = make_loader(evaluator)
    next(loader)
    loader.close()


def refused(evaluator, reason, function, *args):
    with pytest.raises(evaluator.EvaluationRefused, match=reason) as error:
        function(*args)
    assert "\n" not in str(error.value)


def rows_of(evaluator, split="val"):
    return evaluator._open_split(split, T).take(evaluator._manifest()["metric"]["rows"][split])
