"""train.py: the thing judged. A GPT, Muon + AdamW and the training loop.

    uv run train.py    # after: uv run prepare.py; AUTORESEARCH_PROFILE=pocket chooses another profile

It trains for TIME_BUDGET seconds on one device (CUDA, else MPS, else CPU) and lets prepare.py judge the result.
Shapes: B batch rows, T time, C model width, H query heads, Hkv key/value heads, D head size, V vocabulary, N = B·T;
K matrices of R rows. A suffix names a layout: q_BTHD, logits_BTV. The residual stream is plain x, (B, T, C).
Progress goes to stderr. The summary is the last thing on stdout, after a line `---`, one `key: value` a line:
val_bpb, training_seconds, total_seconds (from process start), peak_vram_mb (MiB), mfu_percent, total_tokens_M,
num_steps, num_params_M, depth, startup_seconds, eval_seconds, seed, sample (text that the trained model wrote),
attention (the back-end that ran).
"""
# ruff: noqa: E402 (the process's clock starts before the slow imports, so that they are counted)
import os
import time

PROCESS_STARTED = time.perf_counter()
# torch reads both when it is imported. At a barrier libgomp's threads spin before they sleep, and with its default
# number of spins they are slow where cores are shared. Segments that can grow leave fewer holes in a GPU's memory when
# batches of different sizes have come and gone.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
import gc
import json
import math
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.optim.adamw import adamw

import prepare
from prepare import MAX_SEQ_LEN, PROFILE, SEED, TIME_BUDGET, UserError, training_seconds

# ---- Knobs ----
DEPTH = 8  # layers
ASPECT_RATIO = 64  # channels per layer: the width is DEPTH * ASPECT_RATIO, rounded up to a multiple of HEAD_DIM
HEAD_DIM = 128  # channels per attention head
WINDOW_PATTERN = "SSSL"  # attention window by layer, repeated: L whole sequence, S half of it; the last layer is L
TOTAL_BATCH_SIZE = 524288  # tokens per optimizer step, 2**19
DEVICE_BATCH_SIZE = 64  # rows per micro-step, an upper bound: halved when the device runs out of memory
LOSS_CHUNK = 32768  # tokens whose logits exist at the same time
EMBEDDING_LR = 0.6  # wte and value embeddings (AdamW)
UNEMBEDDING_LR = 0.004  # lm_head (AdamW)
MATRIX_LR = 0.04  # matrices inside the layers (Muon)
SCALAR_LR = 0.5  # x0_lambdas; resid_lambdas take a hundredth of it (AdamW)
WEIGHT_DECAY = 0.2  # Muon only, falls linearly to 0
ADAM_BETAS = (0.8, 0.95)  # decay of the first and second moment
WARMUP_RATIO = 0.0  # share of the time budget in which the learning rate rises from 0
WARMDOWN_RATIO = 0.5  # share of the time budget in which it falls to FINAL_LR_FRAC
FINAL_LR_FRAC = 0.0  # share of the peak learning rate that is left at the end
COMPILE = True  # torch.compile the model and Muon's update

# CPU-sized values, in place of those above; without a GPU, for a profile of your own too
if PROFILE in ("pocket", "smoke") or (PROFILE not in ("climbmix", "code") and not torch.cuda.device_count()):
    DEPTH = 1
    ASPECT_RATIO = 96
    HEAD_DIM = 48
    TOTAL_BATCH_SIZE = 2048
    LOSS_CHUNK = 512
    EMBEDDING_LR = 0.3
    UNEMBEDDING_LR = 0.01
    WARMDOWN_RATIO = 0.7
    COMPILE = False  # True makes 1.3 times the steps on two cores; a run starts 20 (cached) to 60 s later


def log(message: str, end: str = "\n") -> None:
    print(message, end=end, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# ---- Attention: one function, three back-ends ----
FLASH_REPO = "kernels-community/flash-attn3"  # on the Hugging Face hub
FLASH_VERSION = 1  # of the kernel, pinned
FLASH_CAPABILITIES = (8, 9)  # major compute capabilities that it is built for
_masks: dict = {}  # built before a model is compiled, shared by its layers


def attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
    """Causal attention, scale 1/sqrt(D): query t sees keys t-window .. t. k and v may have fewer heads than q (grouped
    queries, arXiv 2305.13245). The back-end is the one that choose_attention found."""
    # An audit scores the exported network in a process that knows only torch's own operators. (While torch.compile
    # traces, is_exporting() is True as well.)
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return sdpa_attention(q_BTHD, k_BTHD, v_BTHD, window)
    return attention_backend(q_BTHD, k_BTHD, v_BTHD, window)


def attention_mask(kind: str, T: int, window: int, device: torch.device):
    """Query t sees keys t-window .. t: a boolean (T, T) for "sdpa", a BlockMask for "flex"."""
    # By device type, not by device: before compiling it is "cuda", in a compiled model "cuda:0". With two names the
    # mask would be missed, and every compiled step would build its own.
    key = (kind, T, window, device.type)
    if key in _masks:
        return _masks[key]
    if kind == "flex":

        def is_visible(b, h, query, key):
            return (key <= query) & (query - key <= window)

        mask = flex.create_block_mask(is_visible, None, None, T, T, device=device)
    else:
        mask = torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(-window)
    if not torch.compiler.is_compiling():  # a mask made while a graph is traced belongs to that graph
        _masks[key] = mask
    return mask


def sdpa_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
    """torch's own attention. It has no windows, so that a short one costs a mask and saves nothing."""
    T = q_BTHD.size(1)
    sees_everything = window >= T - 1
    mask = None if sees_everything else attention_mask("sdpa", T, window, q_BTHD.device)
    grouped = q_BTHD.size(2) > k_BTHD.size(2)
    q_BHTD = q_BTHD.transpose(1, 2)
    k_BHTD = k_BTHD.transpose(1, 2)
    v_BHTD = v_BTHD.transpose(1, 2)
    y_BHTD = F.scaled_dot_product_attention(
        q_BHTD, k_BHTD, v_BHTD, attn_mask=mask, is_causal=sees_everything, enable_gqa=grouped
    )
    return y_BHTD.transpose(1, 2)


def flex_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
    """FlexAttention (arXiv 2412.05496): skips the blocks that a window hides."""
    if not torch.compiler.is_compiling():  # eager, it would build the whole score matrix
        return sdpa_attention(q_BTHD, k_BTHD, v_BTHD, window)
    mask = attention_mask("flex", q_BTHD.size(1), window, q_BTHD.device)
    q_BHTD = q_BTHD.transpose(1, 2)
    k_BHTD = k_BTHD.transpose(1, 2)
    v_BHTD = v_BTHD.transpose(1, 2)
    y_BHTD = flex.flex_attention(q_BHTD, k_BHTD, v_BHTD, block_mask=mask, enable_gqa=True)
    return y_BHTD.transpose(1, 2)


def flash_snapshots() -> list[Path]:
    """Downloads of the pinned kernel in the hub's local cache, newest first."""
    from huggingface_hub.constants import HF_HUB_CACHE  # here, as kernels below: only a GPU needs them

    cache = Path(os.environ.get("KERNELS_CACHE") or HF_HUB_CACHE)
    found = set()
    for metadata in cache.glob(f"kernels--{FLASH_REPO.replace('/', '--')}/snapshots/*/build/*/metadata.json"):
        try:
            version = json.loads(metadata.read_text()).get("version", FLASH_VERSION)  # old builds do not say it
        except (OSError, ValueError):  # an unfinished download
            continue
        if version == FLASH_VERSION:
            found.add(metadata.parents[2])
    return sorted(found, key=lambda snapshot: snapshot.stat().st_mtime, reverse=True)


def load_flash_kernel():
    """The kernel's module, from the local cache if it is there. The hub is asked only where it is not: a hiccup of the
    network must not move an experiment to a slower back-end."""
    from kernels import get_kernel, get_local_kernel

    for snapshot in flash_snapshots():
        try:
            return get_local_kernel(snapshot)
        except Exception as error:  # an unfinished download, or a build for another torch
            log(f"attention: no kernel in {snapshot}: {one_line(error)}")
    return get_kernel(FLASH_REPO, version=FLASH_VERSION)


def load_flash_attention() -> Callable:
    """FlashAttention-3 (arXiv 2407.08608), which skips what a window hides and is the fastest on an H100."""
    major, minor = torch.cuda.get_device_capability()
    if major not in FLASH_CAPABILITIES:
        raise ValueError(f"it is not built for compute capability {major}.{minor}")
    kernel = load_flash_kernel()

    def flash_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
        y = kernel.flash_attn_func(q_BTHD, k_BTHD, v_BTHD, causal=True, window_size=(window, 0))
        return y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp too

    return flash_attention


def probe_attention(backend: Callable, T: int, window: int, device: torch.device) -> None:
    """Raise unless `backend` agrees with SDPA on a small forward and backward on the real device."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, T, 2, HEAD_DIM)
    qkv = [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3)]

    def output_and_gradients(function: Callable) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in qkv]
        y = function(*leaves, window)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    expected = output_and_gradients(sdpa_attention)
    got = output_and_gradients(backend)
    for name, a, b in zip(("output", "dq", "dk", "dv"), expected, got, strict=True):
        error = ((b.float() - a.float()).norm() / a.float().norm()).item()
        if not error < 0.02:  # bfloat16 kernels are about 0.004 apart; NaN fails too
            raise ValueError(f"{name} differs from SDPA by {error:.3f}")


attention_backend: Callable = sdpa_attention  # what attention() calls; choose_attention sets it


def choose_attention(config: "GPTConfig", device: torch.device) -> str:
    """Select the first back-end that works on `device`, build the masks, return its name. CPU and MPS take SDPA."""
    global attention_backend
    T = config.sequence_len
    windows = sorted(set(window_sizes(config)))
    for window in windows:
        attention_mask("sdpa", T, window, device)
    candidates = {}
    if device.type == "cuda" and COMPILE:
        candidates = {"flash-attention-3": load_flash_attention, "flex": lambda: flex_attention}
    for name, load in candidates.items():
        try:
            attention_backend = load()
            if name == "flex":
                for window in windows:
                    attention_mask(name, T, window, device)
            probe_attention(torch.compile(attention_backend, dynamic=False), T, windows[0], device)
            return name
        except Exception as error:  # whatever it was, the next one is tried
            log(f"attention: no {name}: {one_line(error)}")
    attention_backend = sdpa_attention
    return "sdpa"


# ---- Model ----

@dataclass
class GPTConfig:
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str


def window_sizes(config: GPTConfig) -> list[int]:
    """Attention window of each layer, in tokens. The last layer sees everything."""
    sizes = {"L": config.sequence_len, "S": config.sequence_len // 2}
    pattern = config.window_pattern.upper()
    if not pattern or set(pattern) - set(sizes):
        raise UserError(
            f"WINDOW_PATTERN {config.window_pattern!r} is not made of the letters S and L: use 'SSSL', say"
        )
    letters = [pattern[layer % len(pattern)] for layer in range(config.n_layer - 1)]
    return [sizes[letter] for letter in [*letters, "L"]]


def has_value_embedding(layer: int, n_layer: int) -> bool:
    """Every second layer has one, counted so that the last layer does."""
    return layer % 2 == (n_layer - 1) % 2


def norm(x: Tensor) -> Tensor:
    """RMS norm (arXiv 1910.07467) over the last axis, without a learnable scale."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves split (RoFormer, arXiv 2104.09864). cos and sin: (T, 1, D/2)."""
    half = x_BTHD.size(-1) // 2
    x1 = x_BTHD[..., :half]  # a slice's gradient fuses into its neighbours, chunk's is written out
    x2 = x_BTHD[..., half:]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


class Attention(nn.Module):
    GATE_CHANNELS = 32  # channels of the layer's input that the value embedding's gate reads

    def __init__(self, config: GPTConfig, window: int, with_ve: bool):
        super().__init__()
        C = config.n_embd
        self.head_dim = C // config.n_head
        self.window = window
        self.c_q = nn.Linear(C, config.n_head * self.head_dim, bias=False)
        self.c_k = nn.Linear(C, config.n_kv_head * self.head_dim, bias=False)
        self.c_v = nn.Linear(C, config.n_kv_head * self.head_dim, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        if with_ve:
            self.ve_gate = nn.Linear(min(self.GATE_CHANNELS, C), config.n_kv_head, bias=False)

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        q_BTHD = self.c_q(x).unflatten(-1, (-1, self.head_dim))
        k_BTHD = self.c_k(x).unflatten(-1, (-1, self.head_dim))
        v_BTHD = self.c_v(x).unflatten(-1, (-1, self.head_dim))
        if ve is not None:
            # One gate per token and head. Its weights start at 0, and 2 · sigmoid(0) = 1: the value embedding is added
            # as it is, and the gate can learn to double it or to shut it out.
            gate_BTH = 2 * torch.sigmoid(self.ve_gate(x[..., : self.GATE_CHANNELS]))
            v_BTHD = v_BTHD + gate_BTH[..., None] * ve.view_as(v_BTHD)
        # Normed queries and keys (arXiv 2010.04245) bound the scores by sqrt(D), so that high learning rates do not
        # drive the softmax into saturation.
        q_BTHD = norm(rotate(q_BTHD, cos, sin))
        k_BTHD = norm(rotate(k_BTHD, cos, sin))
        y_BTHD = attention(q_BTHD, k_BTHD, v_BTHD, self.window)
        return self.c_proj(y_BTHD.flatten(2))


class MLP(nn.Module):
    def __init__(self, C: int):
        super().__init__()
        self.c_fc = nn.Linear(C, 4 * C, bias=False)
        self.c_proj = nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.c_fc(x)).square()  # relu squared (Primer, arXiv 2109.08668): better than GELU, and cheap
        return self.c_proj(hidden)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, window: int, with_ve: bool):
        super().__init__()
        self.attn = Attention(config, window, with_ve)
        self.mlp = MLP(config.n_embd)

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(norm(x), ve, cos, sin)
        return x + self.mlp(norm(x))


def head_logits(x: Tensor, weight_VC: Tensor) -> Tensor:
    """(..., C) to float32 logits (..., V), soft-capped: 15 tanh(product / 15), as in Gemma 2 (arXiv 2408.00118).

    Logits within -15 and 15 keep loss and gradient bounded at high learning rates.
    """
    product = F.linear(x, weight_VC).float()
    return 30 * torch.sigmoid(product / 7.5) - 15  # the same as 15 tanh(product / 15), 6 times as fast on a CPU


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of head_logits, targets of -1 left out, LOSS_CHUNK tokens at a time.

    The gradient is taken in the forward pass. So the logits of only one chunk exist at a time (a whole batch's,
    262,144 x 8192, are 8.6 GB) and nothing is computed twice. It is written out because autograd needs about twice as
    many passes over the logits, which is what the loss costs on a CPU.
    """

    @staticmethod
    def forward(ctx, x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
        loss = torch.zeros((), device=x_NC.device)
        weight_grad = torch.zeros_like(weight_VC)
        x_grads = []
        for x_chunk, targets_chunk in zip(x_NC.split(LOSS_CHUNK), targets_N.split(LOSS_CHUNK), strict=True):
            counted = (targets_chunk != -1)[:, None]
            target = targets_chunk.clamp(min=0)[:, None]
            product = F.linear(x_chunk, weight_VC)
            s = product.float().div_(7.5).sigmoid_()  # logits = 30 s - 15
            p = torch.softmax(30 * s, dim=-1)
            loss -= (p.gather(1, target).log() * counted).sum()  # finite: the soft cap keeps p above e^-30 / V
            one_hot = torch.zeros_like(p).scatter_(1, target, 1.0)
            product_grad = p.sub_(one_hot).mul_(s).mul_(1 - s).mul_(4 * counted)  # d logits / d product = 4 s (1 - s)
            product_grad = product_grad.to(product.dtype)  # once: autocast would do it for each use
            x_grads.append(product_grad @ weight_VC)
            weight_grad += product_grad.mT @ x_chunk
        count = (targets_N != -1).sum()
        ctx.save_for_backward(torch.cat(x_grads), weight_grad, count)
        return loss / count

    @staticmethod
    def backward(ctx, loss_grad: Tensor):
        x_grad, weight_grad, count = ctx.saved_tensors
        return x_grad * (loss_grad / count), weight_grad * (loss_grad / count), None


class GPT(nn.Module):
    """A decoder-only transformer after nanochat's. What it adds to the textbook's:

    - value embeddings (ResFormer, arXiv 2410.17897): every second layer adds a token's own learned vector to its
      values, so that deep layers still know which token it was. They are many parameters, and hardly any arithmetic.
    - resid_lambdas and x0_lambdas, two scalars a layer: a layer reads resid_lambda · x + x0_lambda · x0, where x0 is
      the embedded token. It can turn the stream down, and take the token itself once more (after modded-nanogpt).

    Build it under torch.device("meta"), then to_empty(device=...), then init_weights().
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V = config.vocab_size
        C = config.n_embd
        L = config.n_layer
        head_dim = C // config.n_head
        blocks = nn.ModuleList()
        value_embeds = nn.ModuleDict()
        for layer, window in enumerate(window_sizes(config)):
            with_ve = has_value_embedding(layer, L)
            blocks.append(Block(config, window, with_ve))
            if with_ve:
                value_embeds[str(layer)] = nn.Embedding(V, config.n_kv_head * head_dim)
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, C), "h": blocks})
        self.lm_head = nn.Linear(C, V, bias=False)  # not tied to wte: they have learning rates of their own
        self.resid_lambdas = nn.Parameter(torch.empty(L))
        self.x0_lambdas = nn.Parameter(torch.empty(L))
        self.value_embeds = value_embeds
        self.register_buffer("cos", torch.empty(config.sequence_len, 1, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(config.sequence_len, 1, head_dim // 2), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter and buffer in place; embeddings and rotary tables take the compute type."""
        bound = math.sqrt(3 / self.config.n_embd)  # U(-bound, bound) has standard deviation 1/sqrt(C)
        nn.init.normal_(self.transformer.wte.weight, std=1.0)  # normed before use, so only the direction counts
        nn.init.normal_(self.lm_head.weight, std=0.001)  # logits near 0: the first loss is ln(V)
        nn.init.constant_(self.resid_lambdas, 1.0)
        nn.init.constant_(self.x0_lambdas, 0.1)
        for matrix in (*self.transformer.h.parameters(), *self.value_embeds.parameters()):
            nn.init.uniform_(matrix, -bound, bound)
        for name, matrix in self.transformer.h.named_parameters():
            if "c_proj" in name or "ve_gate" in name:  # every layer starts by adding nothing, every gate at 1
                nn.init.zeros_(matrix)

        device = self.cos.device
        T, _, half = self.cos.shape
        position = torch.arange(T, device=device)[:, None, None]
        frequency = 10000.0 ** (-torch.arange(half, device=device) / half)
        angle = position * frequency  # (T, 1, D/2)
        # On CUDA tables and embeddings are bfloat16: half the memory, and the residual stream starts as bfloat16.
        compute_type = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.cos = angle.cos().to(compute_type)
        self.sin = angle.sin().to(compute_type)
        self.transformer.wte.to(compute_type)
        self.value_embeds.to(compute_type)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """idx int64 (B, T) to float32 logits (B, T, V); with targets int64 (B, T), -1 ignored, to the mean loss."""
        T = idx.size(1)
        positions = self.cos.size(0)
        if idx.size(1) > positions:
            raise ValueError(
                f"idx has rows of {T} tokens, but the rotary table has {positions} positions: "
                "build the model with a larger sequence_len"
            )
        cos = self.cos[:T]
        sin = self.sin[:T]
        on_cuda = idx.device.type == "cuda"
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=on_cuda):
            x = norm(self.transformer.wte(idx))
            x0 = x
            for layer, block in enumerate(self.transformer.h):
                ve = None
                if str(layer) in self.value_embeds:
                    ve = self.value_embeds[str(layer)](idx)
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
                x = block(x, ve, cos, sin)
            x = norm(x)
            if targets is None:
                return head_logits(x, self.lm_head.weight)
            return ChunkedLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self) -> int:
        """Floating-point operations per token, forward and backward: matrix products and attention scores."""
        matrix_params = self.lm_head.weight.numel() + sum(p.numel() for p in self.transformer.h.parameters())
        return 6 * matrix_params + 12 * self.config.n_embd * sum(window_sizes(self.config))

    def setup_optimizer(self, compiled: bool = False) -> "MuonAdamW":
        """AdamW for embeddings, head and scalars; Muon for all matrices inside the layers, a group per shape."""
        scale = math.sqrt(768 / self.config.n_embd)  # AdamW's rates were tuned at a width of 768
        groups = []

        def add_adamw(params: list[Tensor], lr: float, betas: tuple[float, float] = ADAM_BETAS) -> None:
            groups.append({"kind": "adamw", "params": params, "lr": lr, "betas": betas})

        add_adamw([self.lm_head.weight], UNEMBEDDING_LR * scale)
        add_adamw([self.transformer.wte.weight], EMBEDDING_LR * scale)
        add_adamw(list(self.value_embeds.parameters()), EMBEDDING_LR * scale)
        add_adamw([self.resid_lambdas], 0.01 * SCALAR_LR)  # a small change of it acts on everything before the layer
        add_adamw([self.x0_lambdas], SCALAR_LR, betas=(0.96, 0.95))
        matrices_by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in self.transformer.h.parameters():
            matrices_by_shape.setdefault(matrix.shape, []).append(matrix)
        for matrices in matrices_by_shape.values():
            groups.append({"kind": "muon", "params": matrices, "lr": MATRIX_LR})
        return MuonAdamW(groups, compiled)


def model_config(vocab_size: int) -> GPTConfig:
    """The knobs, checked; the width rounded up to whole heads."""
    for name in ("DEPTH", "ASPECT_RATIO", "HEAD_DIM", "TOTAL_BATCH_SIZE", "DEVICE_BATCH_SIZE", "LOSS_CHUNK"):
        if globals()[name] < 1:
            raise UserError(f"{name} {globals()[name]} is below 1: set it to 1 or more")
    if HEAD_DIM % 2:
        raise UserError(f"HEAD_DIM {HEAD_DIM} is odd, and rotary embedding turns two halves: set it to {HEAD_DIM + 1}")
    if TOTAL_BATCH_SIZE % MAX_SEQ_LEN:
        rounded_up = math.ceil(TOTAL_BATCH_SIZE / MAX_SEQ_LEN) * MAX_SEQ_LEN
        problem = f"TOTAL_BATCH_SIZE {TOTAL_BATCH_SIZE} is not a multiple of MAX_SEQ_LEN {MAX_SEQ_LEN}"
        raise UserError(f"{problem}: set it to {rounded_up}")
    n_head = math.ceil(DEPTH * ASPECT_RATIO / HEAD_DIM)
    return GPTConfig(
        sequence_len=MAX_SEQ_LEN,
        vocab_size=vocab_size,
        n_layer=DEPTH,
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_head * HEAD_DIM,
        window_pattern=WINDOW_PATTERN,
    )


# ---- Optimizer ----
POLAR_EXPRESS = (  # (a, b, c) of each step, arXiv 2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(u_KRC: Tensor) -> Tensor:
    """About the nearest (semi-)orthogonal matrix to each of K, in bfloat16 on CUDA.

    Elsewhere it keeps its type: most CPUs emulate bfloat16 products, up to 100 times slower than float32's. One with
    AVX-512 BF16 or AMX has them in hardware.
    """
    x = u_KRC.bfloat16() if u_KRC.is_cuda else u_KRC
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    is_tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        if is_tall:  # the smaller of the two Gram matrices
            gram = x.mT @ x
            x = a * x + x @ (b * gram + c * (gram @ gram))
        else:
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def mean_square(x_KRC: Tensor) -> Tensor:
    """Of each row, or of each column where there are more columns than rows."""
    axis = -1 if x_KRC.size(-2) >= x_KRC.size(-1) else -2
    return x_KRC.square().mean(dim=axis, keepdim=True)


def muon_update(p: Tensor, g: Tensor, momentum: Tensor, second_moment: Tensor, lr, mu, weight_decay) -> Tensor:
    """New values of stacked matrices p (K, R, C) with gradients g. Updates momentum and second_moment in place.

    Muon (github.com/KellerJordan/Muon): the momentum, with all its singular values brought near 1, so that rare
    directions move as far as common ones. The scalars are 0-d CPU tensors: floats would be compiled in, and every step
    would compile anew.
    """
    # Nesterov momentum.
    momentum += (1 - mu) * (g - momentum)
    update = polar_express(g + mu * (momentum - g)).float()

    # NorMuon (arXiv 2510.05491): each row (or column) is divided by the running size of its updates, as in Adam. The
    # whole keeps its length, so that the learning rate means the same with and without.
    second_moment += (1 - 0.95) * (mean_square(update) - second_moment)
    scaled = update / second_moment.clamp(min=1e-10).sqrt()
    length = update.norm(dim=(-2, -1), keepdim=True)
    scaled_length = scaled.norm(dim=(-2, -1), keepdim=True)
    update = scaled * (length / scaled_length.clamp(min=1e-10))

    # Cautious weight decay (arXiv 2510.12402): only where the update too pulls the weight towards 0.
    decay = weight_decay * p * (update * p >= 0)
    lr = lr * math.sqrt(max(1, p.size(-2) / p.size(-1)))
    return p - lr * (update + decay)


class MuonAdamW(torch.optim.Optimizer):
    """Groups of two kinds: "adamw" (lr, betas) and "muon" (matrices of one shape; lr, momentum, weight_decay)."""

    def __init__(self, groups: list[dict], compiled: bool = False):
        used_groups = [{**group, "initial_lr": group["lr"]} for group in groups if group["params"]]
        super().__init__(used_groups, defaults={})
        self._muon_update = torch.compile(muon_update, dynamic=False, fullgraph=True) if compiled else muon_update
        set_schedules(self, step=0, progress=0.0)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["kind"] == "adamw":
                self._step_adamw(group, params)
            else:
                self._step_muon(group, params)

    def _step_adamw(self, group: dict, params: list[Tensor]) -> None:
        """AdamW (arXiv 1711.05101) without decay, in torch's fused kernel: one launch for all of a group."""
        for p in params:
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] = torch.zeros((), device=p.device)
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads=[p.grad for p in params],
            exp_avgs=[self.state[p]["exp_avg"] for p in params],
            exp_avg_sqs=[self.state[p]["exp_avg_sq"] for p in params],
            max_exp_avg_sqs=[],
            state_steps=[self.state[p]["step"] for p in params],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=1e-10,
        )

    def _step_muon(self, group: dict, params: list[Tensor]) -> None:
        p = torch.stack(params)
        g = torch.stack([p.grad for p in params])
        state = self.state[params[0]]  # the whole group's
        if not state:
            state["momentum"] = torch.zeros_like(g)
            state["second_moment"] = torch.zeros_like(mean_square(g))
        lr = torch.tensor(group["lr"])
        mu = torch.tensor(group["momentum"])
        weight_decay = torch.tensor(group["weight_decay"])
        updated = self._muon_update(p, g, state["momentum"], state["second_moment"], lr, mu, weight_decay)
        torch._foreach_copy_(params, updated.unbind())


# ---- Schedules: functions of progress (share of the time budget that is used, 0 to 1) or of the step ----

def get_lr_multiplier(progress: float) -> float:
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    if progress <= 1 - WARMDOWN_RATIO:
        return 1.0
    left = (1 - progress) / WARMDOWN_RATIO
    return left + (1 - left) * FINAL_LR_FRAC


def get_muon_momentum(step: int) -> float:
    """From 0.85 to 0.95 over 300 steps: early gradients turn quickly, and old ones mislead."""
    return 0.85 + (0.95 - 0.85) * min(step / 300, 1)


def get_weight_decay(progress: float) -> float:
    return WEIGHT_DECAY * (1 - progress)


def set_schedules(optimizer: MuonAdamW, step: int, progress: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * get_lr_multiplier(progress)
        if group["kind"] == "muon":
            group["momentum"] = get_muon_momentum(step)
            group["weight_decay"] = get_weight_decay(progress)


# ---- Warm-up: what must not be timed, on state that is restored ----
COMPILE_CACHE_LIMIT = 10e9  # bytes; a model leaves about 90 MB
COMPILE_CACHE_REST = 3600  # seconds: what was used this recently may be another run's, and stays
COMPILE_CACHE_NAMES = r"triton|fxgraph|aotautograd|[0-9a-z]{2}|fit-pruned.*"  # no other folder is touched
MAX_FITS = 200  # device batches that are remembered


def compile_cache() -> Path:
    """The folder where torch's compilers keep their work between runs."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or prepare.CACHE_ROOT / "compile")


def compile_cache_entries(folder: Path) -> list[tuple[float, int, Path]]:
    """(time of last use, bytes, path) of everything that can be deleted by itself: one file of generated code, or a
    folder whose files belong together (a kernel and its description)."""
    entries = []
    for parent, _, names in os.walk(folder):
        place = Path(parent).relative_to(folder).parts
        if not place or not re.fullmatch(COMPILE_CACHE_NAMES, place[0]):
            continue
        stats = {}
        for name in names:
            path = Path(parent, name)
            try:
                stats[path] = path.stat()
            except FileNotFoundError:  # another run deleted it
                continue
        if len(place) == 1:
            entries += [(max(s.st_atime, s.st_mtime), s.st_size, path) for path, s in stats.items()]
        elif stats:
            last_use = max(max(s.st_atime, s.st_mtime) for s in stats.values())
            entries.append((last_use, sum(s.st_size for s in stats.values()), Path(parent)))
    return entries


def prune_compile_cache(folder: Path, limit: float = COMPILE_CACHE_LIMIT) -> None:
    """Delete what was not used for longest, until the folder is under its limit. Other runs may be doing the same."""
    entries = compile_cache_entries(folder)
    excess = sum(size for _, size, _ in entries) - limit
    for number, (last_use, size, path) in enumerate(sorted(entries)):
        if excess <= 0 or last_use > time.time() - COMPILE_CACHE_REST:
            return
        # Moved away first: no other run may find a kernel's folder half deleted.
        doomed = folder / f"fit-pruned-{os.getpid()}-{number}"
        try:
            path.rename(doomed)
            if doomed.is_dir():
                shutil.rmtree(doomed)
            else:
                doomed.unlink()
        except OSError:  # another run was faster, or it is not ours to delete
            continue
        excess -= size


def fit_kind(model: nn.Module, backend: str) -> str:
    """What a device batch that fits depends on: device, free memory, back-end, model, knobs."""
    free_bytes, _ = torch.cuda.mem_get_info()
    return (
        f"{torch.cuda.get_device_name()}, {free_bytes / 2**30:.0f} GiB free, {backend}, {model.config}, "
        f"{model.num_params()} parameters, {DEVICE_BATCH_SIZE=}, {TOTAL_BATCH_SIZE=}, {LOSS_CHUNK=}, {COMPILE=}"
    )


def read_fits() -> dict[str, int]:
    """Device batches by kind that earlier runs found; none if the file is missing or damaged."""
    try:
        fits = json.loads((compile_cache() / "fit.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(fits, dict):
        return {}
    return {kind: rows for kind, rows in fits.items() if isinstance(rows, int) and rows >= 1}


def remember_fit(kind: str, rows: int) -> None:
    """Write down what fits, so that the next run of this kind need not search: every size that fails costs a
    compilation."""
    fits = read_fits()
    if fits.get(kind) == rows:
        return
    fits.pop(kind, None)
    newest = dict([*fits.items(), (kind, rows)][-MAX_FITS:])
    folder = compile_cache()
    part = folder / f"fit-{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(newest, indent=1))
        os.replace(part, folder / "fit.json")
    except OSError as error:
        log(f"the device batch is not remembered: {one_line(error)}")


def fit_device_batch(trial: Callable[[int], None], total_rows: int, upper_bound: int) -> int:
    """The largest divisor of total_rows, up to upper_bound, for which trial(rows) has memory; the bound is halved."""
    while True:
        rows = max(divisor for divisor in range(1, upper_bound + 1) if total_rows % divisor == 0)
        try:
            trial(rows)
            return rows
        except torch.OutOfMemoryError as error:
            if rows == 1:
                raise UserError(f"one row runs out of memory: make the model smaller ({one_line(error)})") from error
        log(f"out of memory with {rows} rows per micro-step: halving them")
        torch.compiler.reset()  # else torch stops compiling: it does so for a few sizes of a function, and no more
        upper_bound = rows // 2


def choose_threads(micro_step: Callable[[], None]) -> int:
    """Set and return the number of CPU threads with which micro_step is fastest now: all, half of them, ... or one.

    Threads wait for each other, so that one busy core holds up all of them: where another process used one of two
    cores, a step took 79 ms on one thread and 136 ms on two. Fewer are taken only where they are 10% faster, so that
    every run on an idle machine makes the same choice.
    """
    all_threads = torch.get_num_threads()
    counts = [all_threads]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    seconds = {count: [] for count in counts}
    for _ in range(5):
        for count in counts:
            torch.set_num_threads(count)
            micro_step()  # not timed: the first one with a number of threads starts or ends some
            started = time.perf_counter()
            micro_step()
            seconds[count].append(time.perf_counter() - started)
    medians = {count: statistics.median(values) for count, values in seconds.items()}
    fastest = min(counts, key=medians.get)
    chosen = fastest if medians[fastest] < 0.9 * medians[all_threads] else all_threads
    torch.set_num_threads(chosen)
    log(f"threads: {chosen} of {all_threads}")
    return chosen


def warm_up(model: nn.Module, optimizer: MuonAdamW, vocab_size: int, upper_bound: int) -> int:
    """Compile and run on random tokens what training and evaluation will run; return the device batch that fits.

    Parameters and buffers are left as they were found, the (fresh) optimizer without state.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device
    initial = [t.detach().to("cpu", copy=True) for t in tensors]

    def forget() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def trial(rows: int) -> None:
        forget()
        x = torch.randint(vocab_size, (rows, MAX_SEQ_LEN), device=device)
        y = torch.randint(vocab_size, (rows, MAX_SEQ_LEN), device=device)
        for _ in range(2):  # the second micro-step accumulates
            model(x, y).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = model(x)
            again = model(x)
            (logits[:4] - again[:4]).abs()  # the judge compares two results, a few rows at a time

    device_batch = fit_device_batch(trial, TOTAL_BATCH_SIZE // MAX_SEQ_LEN, upper_bound)
    forget()
    with torch.no_grad():
        torch._foreach_copy_(tensors, initial)
    return device_batch


# ---- Training loop ----
LOG_SECONDS = 5  # a line this often, where stderr is no terminal
MAX_LOSS = 100  # nats per token; an untrained model has ln(V), about 9


def train(model: nn.Module, optimizer: MuonAdamW, loader, device_batch: int, mfu_per_speed: float) -> int:
    """Train until the next step would no longer fit into TIME_BUDGET; return the number of steps.

    loader yields (x, y, epoch). mfu_per_speed is the MFU in percent at one token per second.
    """
    grad_accum_steps = TOTAL_BATCH_SIZE // (device_batch * MAX_SEQ_LEN)
    log(f"batch {TOTAL_BATCH_SIZE:,} tokens = {device_batch} rows x {MAX_SEQ_LEN} x {grad_accum_steps} micro-steps")
    on_cuda = next(model.parameters()).is_cuda
    on_terminal = sys.stderr.isatty()
    host_loss = torch.zeros((), pin_memory=on_cuda)  # pinned, so that the copy need not wait for the GPU
    loss_copied = torch.cuda.Event() if on_cuda else None
    step = 0
    step_seconds = 0.0
    smooth_loss = 0.0
    logged_at = -math.inf

    x, y, epoch = next(loader)  # the first batch starts the judge's clock
    now = training_seconds()
    while now + step_seconds <= TIME_BUDGET:
        # -- Gradients --
        progress = min(now / TIME_BUDGET, 1.0)
        set_schedules(optimizer, step, progress)
        step_loss = 0.0
        for micro_step in range(grad_accum_steps):
            loss = model(x, y) / grad_accum_steps
            step_loss = step_loss + loss.detach()
            if micro_step == grad_accum_steps - 1:
                host_loss.copy_(step_loss, non_blocking=on_cuda)
                if on_cuda:
                    loss_copied.record()
            loss.backward()
            x, y, epoch = next(loader)

        # -- Fast fail, before the optimizer spreads a bad gradient --
        if on_cuda:
            loss_copied.synchronize()  # waits for the forward passes only: the last backward still runs
        train_loss = host_loss.item()
        if not train_loss <= MAX_LOSS:  # NaN too
            raise UserError(f"step {step}: training loss {train_loss} (limit {MAX_LOSS}): lower the learning rates")

        # -- Step --
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 5000 == 1:  # left alone, the garbage collector would stall some steps by 0.5 s
            gc.collect()
            gc.freeze()
            gc.disable()

        # -- Log --
        before = now
        now = training_seconds()
        step_seconds = now - before
        smooth_loss += 0.1 * (train_loss - smooth_loss)
        is_last = now + step_seconds > TIME_BUDGET
        if on_terminal or is_last or now - logged_at >= LOG_SECONDS:
            logged_at = now
            speed = TOTAL_BATCH_SIZE / step_seconds
            seconds_left = max(0, TIME_BUDGET - now)
            percent_done = 100 - 100 * seconds_left / TIME_BUDGET
            unbiased_loss = smooth_loss / (1 - 0.9**step)  # the mean started from 0
            line = (
                f"step {step:05d} | {percent_done:.1f}% | loss {unbiased_loss:.4f} | "
                f"lr x{get_lr_multiplier(progress):.2f} | {1000 * step_seconds:.0f} ms | {speed:,.0f} tok/s | "
                f"mfu {mfu_per_speed * speed:.1f}% | epoch {epoch} | {seconds_left:.0f} s left"
            )
            if on_terminal:
                log(f"\r{line}\033[K", end="\n" if is_last else "")
            else:
                log(line)
    return step


# ---- Summary ----
PEAK_TFLOPS = {  # dense bf16, by a word in the device's name; the first match counts
    "B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "GH200": 989, "H200": 989, "H20": 148, "A100": 312,
    "A40": 150, "A10": 125, "L40S": 362, "L4": 121, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_flops(device_name: str) -> float:
    """FLOP/s, 0.0 where the table has none."""
    for word, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{word}\b", device_name):
            return 1e12 * tflops
    return 0.0


def peak_memory_mb(device: torch.device) -> float:
    """MiB: torch's own peak on CUDA, what the driver holds now on MPS, 0.0 on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    return 0.0


@torch.no_grad()
def write_sample(model: GPT, tokenizer: prepare.Tokenizer, characters: int = 200) -> str:
    """A text that starts with a fixed prompt, on one line; the same for the same weights."""
    prompt = "def read_lines(path):\n" if PROFILE in ("code", "pocket", "smoke") else "The most important thing about"
    bos = tokenizer.get_bos_token_id()
    tokens = tokenizer.encode(prompt)
    generator = torch.Generator().manual_seed(0)
    while len(tokens) < MAX_SEQ_LEN - 1 and len(tokenizer.decode(tokens)) < characters:
        idx = torch.tensor([[bos, *tokens]], device=model.cos.device)
        logits_V = model(idx)[0, -1].cpu()
        probabilities_V = torch.softmax(logits_V / 0.7, dim=-1)  # below 1 the likely tokens become likelier
        token = torch.multinomial(probabilities_V, 1, generator=generator).item()
        if token == bos:  # the end of the document
            break
        tokens.append(token)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in tokenizer.decode(tokens))


def check_cuda_driver() -> None:
    """Raise UserError where there is a GPU that torch cannot start: a GPU's model would train on the CPU for hours.

    The driver's management library counts devices even when the driver is too old for torch's CUDA.
    """
    if torch.cuda.device_count() == 0:
        return
    try:
        torch.cuda.init()
        return
    except RuntimeError as error:
        reason = one_line(error)
    found = re.search(r"found version (\d+)", reason)
    if found:  # 12040 is CUDA 12.4
        version = int(found[1])
        reason = f"its driver supports CUDA {version // 1000}.{version % 1000 // 10}, which is too old"
    problem = f"a GPU is there, but torch {torch.__version__} needs CUDA {torch.version.cuda}: {reason}"
    if PROFILE in ("pocket", "smoke"):
        log(f"training on the CPU: {problem}")
        return
    remedy = "update the NVIDIA driver, or train on the CPU with AUTORESEARCH_PROFILE=pocket"
    raise UserError(f"{problem}: {remedy}")


def run() -> None:
    # -- Device, data, model --
    check_cuda_driver()
    device = torch.device(prepare.default_device())
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    log(f"profile {PROFILE} ({prepare.PROFILE_REASON}), {TIME_BUDGET:g} s on {device_name}, seed {SEED}")
    tokenizer = prepare.Tokenizer.from_directory()
    config = model_config(tokenizer.get_vocab_size())
    log(str(config))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    compiled = COMPILE and device.type != "mps"
    if compiled:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compile_cache())
        prune_compile_cache(compile_cache())
    torch.manual_seed(SEED)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    backend = choose_attention(config, device)
    log(f"attention {backend}, compiled {compiled}")
    optimizer = model.setup_optimizer(compiled)
    runner = torch.compile(model, dynamic=False) if compiled else model
    flops = model.estimate_flops()
    peak = peak_flops(device_name)
    mfu_per_speed = 100 * flops / peak if peak else 0.0  # percent, times tokens per second
    log(f"{model.num_params():,} parameters, {flops:,} FLOPs per token, peak {peak / 1e12:.0f} TFLOP/s (0: not known)")

    # -- Warm-up --
    upper_bound = DEVICE_BATCH_SIZE
    if device.type == "cuda":
        kind = fit_kind(model, backend)
        upper_bound = min(upper_bound, read_fits().get(kind, upper_bound))
    device_batch = warm_up(runner, optimizer, config.vocab_size, upper_bound)
    if device.type == "cuda":
        remember_fit(kind, device_batch)
    if device.type == "cpu" and not compiled:  # compiled code has its number of threads written into it
        x = torch.randint(config.vocab_size, (device_batch, MAX_SEQ_LEN))
        choose_threads(lambda: model(x, x).backward())
        optimizer.zero_grad(set_to_none=True)

    # -- Training --
    loader = prepare.make_dataloader(tokenizer, device_batch, MAX_SEQ_LEN, "train", device=device)
    startup_seconds = time.perf_counter() - PROCESS_STARTED
    num_steps = train(runner, optimizer, loader, device_batch, mfu_per_speed)
    num_tokens = num_steps * TOTAL_BATCH_SIZE

    # -- Evaluation --
    eval_started = time.perf_counter()
    val_bpb = prepare.evaluate_bpb(runner, tokenizer, device_batch)
    eval_seconds = time.perf_counter() - eval_started
    sample = write_sample(model, tokenizer)
    summary = {
        "val_bpb": f"{val_bpb:.6f}",
        "training_seconds": f"{training_seconds():.1f}",
        "total_seconds": f"{time.perf_counter() - PROCESS_STARTED:.1f}",
        "peak_vram_mb": f"{peak_memory_mb(device):.1f}",
        "mfu_percent": f"{mfu_per_speed * num_tokens / training_seconds():.2f}",
        "total_tokens_M": f"{num_tokens / 1e6:.1f}",
        "num_steps": num_steps,
        "num_params_M": f"{model.num_params() / 1e6:.1f}",
        "depth": DEPTH,
        "startup_seconds": f"{startup_seconds:.1f}",
        "eval_seconds": f"{eval_seconds:.1f}",
        "seed": SEED,
        "sample": sample,
        "attention": backend,
    }
    print("---")
    for key, value in summary.items():
        print(f"{key + ':':<18}{value}", flush=True)


def main() -> int:
    try:
        run()
    except (UserError, prepare.EvaluationRefused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell counts Ctrl-C
    return 0


if __name__ == "__main__":
    sys.exit(main())
