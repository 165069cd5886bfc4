"""What the loader, the tokenizer and the evaluator cost here, in one run:

    uv run tests/bench_loader.py

Documents of log-normal length, 1,000 tokens on average, rows of 2048 tokens, 128 rows a batch: 262,144 tokens.
"""

import itertools
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("AUTORESEARCH_PROFILE", "climbmix")  # its vocabulary; no data is needed

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from prepare_fixtures import plain_rows

import prepare

B, T, BATCHES = 128, 2048, 40


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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


def bench_tokenizer():
    """A shard of 250 MB in one row group: the text of the pocket profile, six times."""
    text = [path.read_text(encoding="utf-8") for path in prepare._torch_files()]
    times = 250_000_000 // sum(map(len, text))
    with tempfile.TemporaryDirectory() as folder:
        prepare.CACHE = Path(folder)
        once, shard = prepare.CACHE / "once.parquet", prepare.CACHE / "shard.parquet"
        pq.write_table(pa.table({"text": text}), once)
        pq.write_table(pa.table({"text": text * times}), shard, row_group_size=10**9)
        start = time.perf_counter()
        prepare._train_tokenizer([once])
        trained = time.perf_counter()
        before = peak_mb()
        prepare._tokenize({"shard": shard})
        seconds = time.perf_counter() - trained
        tokens = len(prepare._read_shard(prepare._tokens_path("shard")).tokens)
    megabytes = times * sum(map(len, text)) / 1e6
    print(f"tokenizer trained on {megabytes / times:.0f} MB: {trained - start:.1f} s")
    speed = f"{tokens / seconds / 1e6:.2f} M tokens/s, {megabytes / seconds:.1f} MB/s"
    print(f"tokenization of a {megabytes:.0f} MB shard on {os.cpu_count()} cores: {speed}; ", end="")
    print(f"peak memory {before:.0f} MB before, {peak_mb():.0f} MB after")


def bench_evaluator(device):
    """Losses of one batch of bf16 logits, in pieces and at once: what they need beside the logits themselves."""
    rows = 128 if device == "cuda" else 16
    logits = torch.randn(rows, T, prepare.VOCAB_SIZE, dtype=torch.bfloat16, device=device)
    y = torch.randint(prepare.VOCAB_SIZE, (rows, T), device=device)

    def measure(losses):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else peak_mb()
        start = time.perf_counter()
        losses().sum()
        seconds = time.perf_counter() - start
        after = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_mb()
        return after - before, 1000 * seconds

    ours, ours_ms = measure(lambda: prepare._by_position(prepare._nats, logits, y))  # first: a peak never falls
    plain, plain_ms = measure(lambda: prepare._nats(logits.flatten(0, 1).float(), y.flatten()).cpu().numpy())
    plain += ours * (device == "cpu")
    print(f"losses of {rows} x {T} rows, V {prepare.VOCAB_SIZE}, on {device}: at once +{plain:.0f} MB, ", end="")
    print(f"{plain_ms:.0f} ms; in pieces +{ours:.0f} MB, {ours_ms:.0f} ms: {plain / ours:.1f} times less memory")


if __name__ == "__main__":
    where = "cuda" if torch.cuda.is_available() else "cpu"
    bench_evaluator(where)
    bench_tokenizer()
    bench_loader(where)
    print(f"peak memory of all this: {peak_mb():.0f} MB")
