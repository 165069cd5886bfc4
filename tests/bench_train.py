"""What each choice of train.py costs or brings on this machine, against a plain eager loop of the same model.

    uv run tests/bench_train.py                  # tokens per second: variants interleaved in one process, medians
    uv run tests/bench_train.py --compile        # torch.compile among them
    uv run tests/bench_train.py --overhead       # what a run takes outside its budget, compile cache cold and kept

Uses the knobs of the profile (AUTORESEARCH_PROFILE); random tokens, so no data is needed for the first two forms.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_fixtures import build

import prepare
import train

ROOT = Path(__file__).parents[1]
ROUNDS = 15
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
THREADS = torch.get_num_threads()
POLAR_EXPRESS = train.polar_express


def fresh() -> tuple[train.GPT, train.MuonAdamW]:
    config = train.model_config(prepare.VOCAB_SIZE)
    train.choose_attention(config, DEVICE)
    model = build(config, DEVICE)
    return model, model.setup_optimizer()


def plain_loss(model: train.GPT, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)


def plain_adamw(optimizer: train.MuonAdamW, group: dict, params: list[torch.Tensor]) -> None:
    """The formula, one small operation after another."""
    for p in params:
        state = optimizer.state[p]
        if not state:
            state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "t": 0}
        beta1, beta2 = group["betas"]
        state["t"] += 1
        state["m"].lerp_(p.grad, 1 - beta1)
        state["v"].lerp_(p.grad.square(), 1 - beta2)
        denominator = (state["v"] / (1 - beta2 ** state["t"])).sqrt() + 1e-10
        p.sub_(group["lr"] / (1 - beta1 ** state["t"]) * state["m"] / denominator)


def plain_muon(optimizer: train.MuonAdamW, group: dict, params: list[torch.Tensor]) -> None:
    """One matrix at a time."""
    for p in params:
        state = optimizer.state[p]
        if not state:
            second_moment = torch.zeros_like(train.mean_square(p[None]))
            state |= {"momentum": torch.zeros_like(p[None]), "second_moment": second_moment}
        scalars = [torch.tensor(group[name]) for name in ("lr", "momentum", "weight_decay")]
        p.copy_(train.muon_update(p[None], p.grad[None], *state.values(), *scalars)[0])


def polar_in_bfloat16(u: torch.Tensor) -> torch.Tensor:
    return POLAR_EXPRESS(u.bfloat16())


class Variant:
    """A model of its own with its way of doing a step; `step()` returns its seconds."""

    def __init__(
        self,
        written_out_loss: bool = True,
        fused_adamw: bool = True,
        stacked_muon: bool = True,
        polar: Callable = POLAR_EXPRESS,
        threads: int = THREADS,
        compiled: bool = False,
    ):
        self.model, self.optimizer = fresh()
        self.written_out_loss = written_out_loss
        self.polar = polar
        self.threads = threads
        if not fused_adamw:
            self.optimizer._step_adamw = lambda group, params: plain_adamw(self.optimizer, group, params)
        if not stacked_muon:
            self.optimizer._step_muon = lambda group, params: plain_muon(self.optimizer, group, params)
        self.runner = torch.compile(self.model, dynamic=False) if compiled else self.model
        for group in self.optimizer.param_groups:
            group["lr"] *= 1e-3  # random tokens teach nothing
        rows = min(train.DEVICE_BATCH_SIZE, train.TOTAL_BATCH_SIZE // prepare.MAX_SEQ_LEN)
        self.tokens = torch.randint(prepare.VOCAB_SIZE, (rows, prepare.MAX_SEQ_LEN), device=DEVICE)

    def step(self) -> float:
        torch.set_num_threads(self.threads)
        train.polar_express = self.polar
        started = time.perf_counter()
        if self.written_out_loss:
            loss = self.runner(self.tokens, self.tokens)
        else:
            loss = plain_loss(self.runner, self.tokens, self.tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def compare(with_compile: bool) -> None:
    variants = {"plain eager loop": Variant(False, False, False, polar_in_bfloat16)}
    variants["+ loss with its gradient"] = Variant(True, False, False, polar_in_bfloat16)
    variants["+ fused AdamW"] = Variant(True, True, False, polar_in_bfloat16)
    variants["+ stacked Muon"] = Variant(polar=polar_in_bfloat16)
    if DEVICE.type == "cpu":
        variants["+ polar in float32"] = Variant()
        variants["the same, one thread"] = Variant(threads=1)
    if with_compile:
        variants["+ torch.compile"] = Variant(compiled=True)
    seconds = {name: [] for name in variants}
    for round_ in range(ROUNDS + 2):  # two to warm up
        for name, variant in variants.items():
            elapsed = variant.step()
            if round_ >= 2:
                seconds[name].append(elapsed)
    tokens = next(iter(variants.values())).tokens.numel()
    base = median(seconds["plain eager loop"])
    print(f"profile {prepare.PROFILE}, {tokens} tokens a step, {THREADS} threads, median of {ROUNDS}")
    for name, values in seconds.items():
        each = median(values)
        print(f"{name:<28}{1000 * each:8.1f} ms {tokens / each:10,.0f} tok/s {base / each:6.2f}x")


def overhead() -> None:
    """Whole runs, data prepared before: the seconds of each that are not training, interpreter start and exit too."""
    print(f"profile {prepare.PROFILE}, seconds outside the budget of {prepare.TIME_BUDGET:g} s")
    print(f"{'':24}{'start-up':>10}{'evaluation':>12}{'sample, exit':>14}{'in all':>8}{'steps':>8}")
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        for name, compiled in {"eager": False, "compiled, cache cold": True, "compiled, cache kept": True}.items():
            code = f"import train; train.COMPILE = {compiled}; raise SystemExit(train.main())"
            started = time.perf_counter()
            command = [sys.executable, "-c", code]
            run = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
            wall = time.perf_counter() - started
            found = dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)
            startup, evaluation, training = (float(found[f"{key}_seconds"]) for key in ("startup", "eval", "training"))
            outside = wall - training
            rest = outside - startup - evaluation
            row = f"{startup:10.1f}{evaluation:12.1f}{rest:14.1f}{outside:8.1f}{int(found['num_steps']):8}"
            print(f"{name:<24}{row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--compile", action="store_true")
    forms.add_argument("--overhead", action="store_true")
    args = parser.parse_args()
    if args.overhead:
        overhead()
    else:
        compare(args.compile)


if __name__ == "__main__":
    main()
