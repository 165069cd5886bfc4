"""How fast train.py is on this machine, and how good beside another checkout's.

    uv run tests/bench_train.py                       # milliseconds of a step by variant, interleaved in one process
    uv run tests/bench_train.py --compile             # torch.compile among them
    uv run tests/bench_train.py --against CHECKOUT    # whole runs of both in turn, a pair for each seed

Uses the knobs of the profile (AUTORESEARCH_PROFILE); the first two forms take random tokens and need no data.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_fixtures import build

import prepare
import train
from harness import device

ROOT = Path(__file__).parents[1]
ROUNDS = 15
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
THREADS = torch.get_num_threads()


class Variant:
    """A model of its own with its way of doing a step; `step()` returns its seconds."""

    def __init__(self, threads=THREADS, loss_chunk=train.LOSS_CHUNK, compiled=False):
        self.threads = threads
        self.loss_chunk = loss_chunk
        config = train.model_config(prepare.VOCAB_SIZE)
        device.choose_attention(config.sequence_len, train.window_sizes(config), train.HEAD_DIM, DEVICE, compiled)
        model = build(config, DEVICE)
        self.runner = torch.compile(model, dynamic=False) if compiled else model
        self.optimizer = model.setup_optimizer(compiled)
        for group in self.optimizer.param_groups:
            group["lr"] *= 1e-3  # random tokens teach nothing
        rows = min(train.DEVICE_BATCH_SIZE, train.TOTAL_BATCH_SIZE // prepare.MAX_SEQ_LEN)
        self.tokens = torch.randint(prepare.VOCAB_SIZE, (rows, prepare.MAX_SEQ_LEN), device=DEVICE)

    def step(self) -> float:
        torch.set_num_threads(self.threads)
        with patch.object(train, "LOSS_CHUNK", self.loss_chunk):
            started = time.perf_counter()
            self.runner(self.tokens, self.tokens).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started


def compare(with_compile: bool) -> None:
    variants = {"as it is": Variant(), "loss of all tokens at once": Variant(loss_chunk=2**30)}
    if DEVICE.type == "cpu":
        variants["one thread"] = Variant(threads=1)
    if with_compile:
        variants["compiled"] = Variant(compiled=True)
    seconds = {name: [] for name in variants}
    for round_ in range(ROUNDS + 2):  # two to warm up
        for name, variant in variants.items():
            elapsed = variant.step()
            if round_ >= 2:
                seconds[name].append(elapsed)
    tokens = variants["as it is"].tokens.numel()
    base = median(seconds["as it is"])
    print(f"profile {prepare.PROFILE}, {tokens} tokens a step, {THREADS} threads, median of {ROUNDS}")
    for name, values in seconds.items():
        each = median(values)
        print(f"{name:<28}{1000 * each:8.1f} ms {tokens / each:10,.0f} tok/s {base / each:6.2f}x")


def whole_run(checkout: Path, seed: int) -> dict:
    """The summary of one run of that checkout's train.py."""
    env = os.environ | {"AUTORESEARCH_SEED": str(seed)}
    run = subprocess.run([sys.executable, "train.py"], cwd=checkout, env=env, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"error: a run in {checkout} failed:\n{run.stderr[-2000:]}")
    return dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)


def against(other: Path, seeds: list[int]) -> None:
    """The other checkout's run and this one's in turn, so that a change of the machine's speed meets both."""
    print(f"profile {prepare.PROFILE}, A = {other}, B = this checkout")
    print(f"{'seed':<6}{'steps A':>9}{'steps B':>9}{'bpb A':>11}{'bpb B':>11}{'B - A':>10}")
    gains = []
    for seed in seeds:
        a, b = (whole_run(checkout, seed) for checkout in (other.absolute(), ROOT))
        bpb_a, bpb_b = float(a["val_bpb"]), float(b["val_bpb"])
        gains.append(bpb_b - bpb_a)
        steps = f"{a['num_steps'].strip():>9}{b['num_steps'].strip():>9}"
        print(f"{seed:<6}{steps}{bpb_a:11.4f}{bpb_b:11.4f}{gains[-1]:+10.4f}", flush=True)
    error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    print(f"mean of B - A {mean(gains):+.4f}, standard error {error:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(42, 48)))
    args = parser.parse_args()
    if args.against:
        against(args.against, args.seeds)
    else:
        compare(args.compile)


if __name__ == "__main__":
    main()
