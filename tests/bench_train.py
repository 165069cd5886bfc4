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
ROWS = min(train.DEVICE_BATCH_SIZE, train.TOTAL_BATCH_SIZE // prepare.MAX_SEQ_LEN)


class Variant:
    """A model of its own with its way of doing a step."""

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
        self.tokens = torch.randint(prepare.VOCAB_SIZE, (ROWS, prepare.MAX_SEQ_LEN), device=DEVICE)

    def step(self) -> None:
        self.runner(self.tokens, self.tokens).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        torch.set_num_threads(self.threads)
        with patch.object(train, "LOSS_CHUNK", self.loss_chunk):
            return device.seconds_of(self.step)


def compare(with_compile: bool) -> None:
    variants = {"as it is": Variant(), "loss of all tokens at once": Variant(loss_chunk=2**30)}
    if DEVICE.type == "cpu":
        variants["one thread"] = Variant(threads=1)
    if with_compile:
        variants["compiled"] = Variant(compiled=True)
    rounds = [{name: variant.seconds() for name, variant in variants.items()} for _ in range(ROUNDS + 2)]
    medians = {name: median(seconds[name] for seconds in rounds[2:]) for name in variants}  # two to warm up
    tokens = ROWS * prepare.MAX_SEQ_LEN
    print(f"profile {prepare.PROFILE}, {tokens} tokens a step, {THREADS} threads, median of {ROUNDS}")
    for name, each in medians.items():
        print(f"{name:<28}{1000 * each:8.1f} ms {tokens / each:10,.0f} tok/s {medians['as it is'] / each:6.2f}x")


def whole_run(checkout: Path, seed: int) -> dict:
    """The summary of one run of that checkout's train.py."""
    env = os.environ | {"AUTORESEARCH_SEED": str(seed)}
    run = subprocess.run([sys.executable, "train.py"], cwd=checkout, env=env, stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        raise SystemExit(f"error: a run in {checkout} failed")
    return dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)


def against(other: Path, seeds: list[int]) -> None:
    """The other checkout's run and this one's in turn, so that a change of the machine's speed meets both."""
    print(f"profile {prepare.PROFILE}, A = {other}, B = this checkout")
    print(f"{'seed':<6}{'steps A':>9}{'steps B':>9}{'bpb A':>11}{'bpb B':>11}{'B - A':>10}")
    gains = []
    for seed in seeds:
        a, b = (whole_run(checkout, seed) for checkout in (other.absolute(), ROOT))
        gains.append(float(b["val_bpb"]) - float(a["val_bpb"]))
        print(f"{seed:<6}{int(a['num_steps']):>9}{int(b['num_steps']):>9}", end="")
        print(f"{float(a['val_bpb']):11.4f}{float(b['val_bpb']):11.4f}{gains[-1]:+10.4f}", flush=True)
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
