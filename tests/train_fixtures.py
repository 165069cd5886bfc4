"""What the tests of train.py share: models on any device, batches. Run: uv run pytest tests/test_train*.py"""

import pytest
import torch

from harness import device as harness_device
from train import GPT, GPTConfig

CLIMBMIX = GPTConfig(2048, 8192, 8, 4, 4, 512, "SSSL")
SMALL = GPTConfig(sequence_len=16, vocab_size=31, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="SL")


def build(config: GPTConfig, device: torch.device | str = "cpu") -> GPT:
    """A model with seeded initial weights, made as train.py makes it."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device).init_weights()
    return model


def shaken(config: GPTConfig) -> GPT:
    """A model whose zero matrices have values too, so that every path counts."""
    model = build(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def batch(config: GPTConfig):
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randint(config.vocab_size, (2, 3, config.sequence_len), generator=generator)
    y[0, :5] = -1
    return x, y


@pytest.fixture(autouse=True)
def in_float32_on_one_thread(monkeypatch):
    """Independent formulas are compared in float32, whatever units the CPU has. Two threads that wait for each other
    on busy cores can take 50 times as long as one."""
    monkeypatch.setattr(harness_device, "CPU_HAS_BFLOAT16", False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
