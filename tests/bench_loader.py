"""What the loader costs here:

    uv run tests/bench_loader.py

Documents of log-normal length, 1,000 tokens on average, rows of 2048 tokens, 128 rows a batch: 262,144 tokens.
"""

import itertools
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("AUTORESEARCH_PROFILE", "climbmix")  # its vocabulary; no data is needed

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from prepare_fixtures import plain_rows

import prepare

B, T, BATCHES = 128, 2048, 40


def halves(rows):
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def bench_loader(device):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.4, 1.0, 30_000).astype(np.int64), 2, None)
    tokens = rng.integers(0, 8188, lengths.sum(), dtype=np.uint16)
    batches = np.full(-(-len(lengths) // 128), 128)
    batches[-1] = len(lengths) - 128 * (len(batches) - 1)
    shard = prepare.Shard(tokens, lengths, batches)

    torch.set_num_threads(1)  # others may use the cores
    stream = prepare.RowStream([shard], T, forever=True)
    ours_ms = []
    for _ in range(BATCHES):
        start = time.perf_counter()
        halves(torch.from_numpy(stream.take(B)))
        ours_ms.append(1000 * (time.perf_counter() - start))

    lists = np.split(tokens.astype(np.int64), np.cumsum(lengths)[:-1])
    documents = [document.tolist() for document in lists]
    batch_lists = [(documents[i : i + 128], 1) for i in range(0, len(documents), 128)]
    plain = plain_rows(itertools.cycle(batch_lists), T + 1)
    plain_ms = []
    for _ in range(6):
        start = time.perf_counter()
        halves(torch.tensor([next(plain)[0] for _ in range(B)]))
        plain_ms.append(1000 * (time.perf_counter() - start))
    ratio = np.median(plain_ms) / np.median(ours_ms)
    print(f"loader, batch of {B * T:,} tokens: plain {np.median(plain_ms):.1f} ms, ", end="")
    print(f"ours {np.median(ours_ms):.2f} ms: {ratio:.0f} times faster")

    stream = prepare.RowStream([shard], T, forever=True)
    loader = prepare._load(lambda: stream, B, T, torch.device(device), "train")
    next(loader)
    start = time.perf_counter()
    for _ in range(BATCHES):
        next(loader)
    if device == "cuda":
        torch.cuda.synchronize()
    ms = 1000 * (time.perf_counter() - start) / BATCHES
    print(f"make_dataloader on {device}, nothing else to do: {ms:.2f} ms a batch, {B * T / ms / 1000:.0f} M tokens/s")
    loader.close()


if __name__ == "__main__":
    bench_loader("cuda" if torch.cuda.is_available() else "cpu")
