"""What the loader costs here.

    uv run tests/bench_loader.py

Documents of log-normal length, 1,000 tokens on average, rows of 2048 tokens, 128 rows a batch: 262,144 tokens.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from prepare_fixtures import plain_rows

import prepare
from harness.device import seconds_of

B, T = 128, 2048


def milliseconds(function, rounds: int = 40) -> float:
    return 1000 * seconds_of(lambda: [function() for _ in range(rounds)]) / rounds


def main() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.4, 1.0, 30_080).astype(np.int64), 2, None)
    tokens = rng.integers(0, 8188, lengths.sum(), dtype=np.uint16)
    shard = prepare.Shard(tokens, lengths, np.full(len(lengths) // 128, 128))
    documents = [document.tolist() for document in np.split(tokens, np.cumsum(lengths)[:-1])]
    batches = [(documents[i : i + 128], 1) for i in range(0, len(documents), 128)]
    torch.set_num_threads(1)  # others may use the cores

    plain = plain_rows(itertools.cycle(batches), T + 1)
    plain_ms = milliseconds(lambda: torch.tensor([next(plain)[0] for _ in range(B)]), rounds=6)
    stream = prepare.RowStream([shard], T, forever=True)
    ours_ms = milliseconds(lambda: torch.from_numpy(stream.take(B)))
    times = f"plain {plain_ms:.1f} ms, ours {ours_ms:.2f} ms: {plain_ms / ours_ms:.0f} times faster"
    print(f"loader, batch of {B * T:,} tokens: {times}")

    device = prepare.default_device()
    loader = prepare._load(lambda: stream, B, T, torch.device(device), "train")
    next(loader)
    ms = milliseconds(lambda: next(loader))
    print(f"make_dataloader on {device}, nothing else to do: {ms:.2f} ms a batch, {B * T / ms / 1000:.0f} M tokens/s")
    loader.close()


if __name__ == "__main__":
    main()
