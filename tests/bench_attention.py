"""Milliseconds of each attention back-end, forward and forward + backward, by window.

    uv run tests/bench_attention.py

On CUDA: FlashAttention-3, compiled FlexAttention and SDPA at the climbmix shape. On a CPU: SDPA at the pocket shape.
"""

import sys
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import device

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
B, T, H, D = (32, 2048, 4, 128) if ON_CUDA else (8, 256, 2, 64)


def milliseconds(function) -> float:
    for _ in range(3):
        function()
    return 1000 * median(device.seconds_of(function) for _ in range(20))


def main() -> None:
    backends = {"sdpa": device.sdpa_attention}
    if ON_CUDA:
        backends["flex"] = torch.compile(device.flex_attention, dynamic=False)
        try:
            name, flash_attention = device.load_flash_attention()
            backends[name] = flash_attention
        except Exception as error:
            print(f"no flash-attention-3: {device.one_line(error)}")
    print(f"{DEVICE.type}, {DTYPE}, B {B}, T {T}, H {H}, D {D}")
    print(f"{'back-end':<20}{'window':>8}{'forward ms':>12}{'+ backward ms':>15}")
    for window in (T // 2, T):
        device.attention_mask("sdpa", T, window, DEVICE)
        device.attention_mask("flex", T, window, DEVICE)
        for name, backend in backends.items():
            qkv = [torch.randn(B, T, H, D, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(3)]
            with torch.no_grad():
                forward = milliseconds(lambda: backend(*qkv, window))  # noqa: B023 (called at once)
            both = milliseconds(lambda: torch.autograd.grad(backend(*qkv, window).sum(), qkv))  # noqa: B023
            print(f"{name:<20}{window:>8}{forward:>12.2f}{both:>15.2f}")


if __name__ == "__main__":
    main()
