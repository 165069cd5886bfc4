"""Milliseconds of each attention back-end, forward and forward + backward, by window.

    uv run tests/bench_attention.py

On CUDA: FlashAttention-3, compiled FlexAttention and SDPA at the climbmix shape. On a CPU: SDPA at the pocket shape,
and FlexAttention's forward pass, which is all that it has there (its backward pass raises NotImplementedError).
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import device

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
B, T, H, D = (32, 2048, 4, 128) if ON_CUDA else (8, 256, 2, 64)


def milliseconds(function: Callable[[], object], rounds: int = 20) -> float:
    times = []
    for round_ in range(rounds + 3):
        if ON_CUDA:
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if ON_CUDA:
            torch.cuda.synchronize()
        if round_ >= 3:
            times.append(time.perf_counter() - started)
    return 1000 * median(times)


def backends() -> dict[str, Callable]:
    found = {"sdpa": device.sdpa_attention, "flex": torch.compile(device.flex_attention, dynamic=False)}
    try:
        if ON_CUDA:
            name, flash_attention = device.load_flash_attention()
            found = {name: flash_attention} | found
    except Exception as error:
        print(f"no flash-attention-3: {device.one_line(error)}")
    return found


def main() -> None:
    print(f"{DEVICE.type}, {DTYPE}, B {B}, T {T}, H {H}, D {D}")
    print(f"{'back-end':<20}{'window':>8}{'forward ms':>12}{'+ backward ms':>15}")
    for window in (T // 2, T):
        for kind in ("sdpa", "flex"):
            device.attention_mask(kind, T, window, DEVICE)
        for name, backend in backends().items():
            qkv = [torch.randn(B, T, H, D, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(3)]
            with torch.no_grad():
                forward = milliseconds(lambda: backend(*qkv, window))  # noqa: B023 (called at once)
            if name == "flex" and not ON_CUDA:
                print(f"{name:<20}{window:>8}{forward:>12.2f}{'none on a CPU':>15}")
                continue
            both = milliseconds(lambda: torch.autograd.grad(backend(*qkv, window).sum(), qkv))  # noqa: B023
            print(f"{name:<20}{window:>8}{forward:>12.2f}{both:>15.2f}")


if __name__ == "__main__":
    main()
