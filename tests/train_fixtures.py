"""What the tests of train.py share: models on any device, and one thread. Run: uv run pytest tests/test_train*.py"""

import contextlib

import torch

from train import GPT, GPTConfig

CLIMBMIX = GPTConfig(2048, 8192, 8, 4, 4, 512, "SSSL")


def build(config: GPTConfig, device: torch.device | str = "cpu", kind: type[GPT] = GPT) -> GPT:
    """A model with seeded initial weights, made as train.py makes it."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = kind(config)
    model.to_empty(device=device).init_weights()
    return model


@contextlib.contextmanager
def one_thread():
    """Two threads that wait for each other on busy cores can take 50 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
