"""train.py: the thing judged. A GPT, Muon + AdamW and the training loop, in one file that is edited freely.

    uv run train.py                                  # prepare once with: uv run prepare.py
    AUTORESEARCH_PROFILE=pocket uv run train.py      # another profile (prepare.py lists them)

It trains for TIME_BUDGET seconds on one device (CUDA, else MPS, else CPU) and lets prepare.py judge the result.
Compilation and warm-up happen before the stopwatch starts, on synthetic batches and on state that is restored.

Shapes: B batch rows, T time, C model width, H query heads, Hkv key/value heads, D head size, V vocabulary,
L layers, N tokens of a batch (B·T), K matrices of one shape. A suffix names a layout: q_BTHD, logits_BTV.

Progress goes to stderr. The summary is the last thing on stdout, after a line `---`, one `key: value` a line:
val_bpb, training_seconds, total_seconds (from process start), peak_vram_mb (MiB), mfu_percent, total_tokens_M,
num_steps, num_params_M, depth, startup_seconds, eval_seconds, seed, sample (text that the trained model wrote).
"""
# ruff: noqa: E402 (the process's clock starts before the slow imports, so that they are counted)

import time

PROCESS_STARTED = time.perf_counter()

import gc
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from prepare import (
    CACHE_ROOT,
    MAX_SEQ_LEN,
    PROFILE,
    PROFILE_REASON,
    SEED,
    TIME_BUDGET,
    EvaluationRefused,
    Tokenizer,
    UserError,
    evaluate_bpb,
    make_dataloader,
    training_seconds,
)

# ----------------------------------------------------------------------------------------------------------------------
# Knobs: one line each, no second place
# ----------------------------------------------------------------------------------------------------------------------

# model
DEPTH = 8  # layers
ASPECT_RATIO = 64  # channels per layer: width = DEPTH * ASPECT_RATIO, rounded up to a multiple of HEAD_DIM
HEAD_DIM = 128  # channels per attention head
WINDOW_PATTERN = "SSSL"  # attention window by layer, repeated: L whole sequence, S half of it; the last layer is L

# batch
TOTAL_BATCH_SIZE = 524288  # tokens per optimizer step, 2**19
DEVICE_BATCH_SIZE = 128  # rows per micro-step, an upper bound: halved when the device runs out of memory
LOSS_CHUNK = 32768  # tokens whose logits exist at the same time

# optimizer
EMBEDDING_LR = 0.6  # wte and value embeddings (AdamW)
UNEMBEDDING_LR = 0.004  # lm_head (AdamW)
MATRIX_LR = 0.04  # matrices inside the layers (Muon)
SCALAR_LR = 0.5  # x0_lambdas; resid_lambdas take a hundredth of it (AdamW)
WEIGHT_DECAY = 0.2  # Muon only, falls linearly to 0
ADAM_BETAS = (0.8, 0.95)  # first and second moment

# schedule
WARMUP_RATIO = 0.0  # share of the time budget in which the learning rate rises from 0
WARMDOWN_RATIO = 0.5  # share of the time budget in which it falls to FINAL_LR_FRAC
FINAL_LR_FRAC = 0.0  # share of the peak learning rate that is left at the end

# machine
COMPILE = True  # torch.compile the model and Muon's update

if PROFILE in ("pocket", "smoke"):  # CPU-sized values, chosen by measurement on two cores
    DEPTH = 2  # layers
    HEAD_DIM = 64  # channels per attention head
    WINDOW_PATTERN = "L"  # a short window's mask costs more than it saves here
    TOTAL_BATCH_SIZE = 2048  # tokens per optimizer step
    DEVICE_BATCH_SIZE = 32  # rows per micro-step
    LOSS_CHUNK = 512  # tokens whose logits exist at the same time
    COMPILE = False  # the compiler takes longer to start than the whole budget

# ----------------------------------------------------------------------------------------------------------------------
# Attention: three back-ends behind one function
# ----------------------------------------------------------------------------------------------------------------------

FLASH_KERNEL = ("kernels-community/flash-attn3", 1)  # repository and pinned version on the Hugging Face hub
LOAD_ERRORS = (ImportError, OSError, RuntimeError, ValueError, AttributeError, TypeError)  # of a missing kernel
_masks: dict = {}  # (kind, T, window, device) -> mask: built once, outside the compiled graph, shared by the layers
_flash_attn_func: Callable | None = None  # set by load_flash_attention


def in_window(query: Tensor, key: Tensor, window: int) -> Tensor:
    """The one definition of causal sliding-window attention: query t sees keys t-window .. t."""
    return (key <= query) & (query - key <= window)


def sdpa_mask(T: int, window: int, device: torch.device) -> Tensor:
    """Boolean (T, T), True where attention is allowed."""
    cache_key = ("sdpa", T, window, device)
    if cache_key not in _masks:
        position = torch.arange(T, device=device)
        _masks[cache_key] = in_window(position[:, None], position[None, :], window)
    return _masks[cache_key]


def flex_mask(T: int, window: int, device: torch.device):
    """FlexAttention's BlockMask."""
    from torch.nn.attention.flex_attention import create_block_mask

    cache_key = ("flex", T, window, device)
    if cache_key not in _masks:
        _masks[cache_key] = create_block_mask(
            lambda b, h, query, key: in_window(query, key, window), None, None, T, T, device=device
        )
    return _masks[cache_key]


def sdpa_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
    T, repeats = q_BTHD.size(1), q_BTHD.size(2) // k_BTHD.size(2)
    if repeats > 1:
        k_BTHD, v_BTHD = (t.repeat_interleave(repeats, dim=2) for t in (k_BTHD, v_BTHD))
    q_BHTD, k_BHTD, v_BHTD = (t.transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD))
    if window >= T - 1:
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
    else:
        mask = sdpa_mask(T, window, q_BTHD.device)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=mask)
    return y_BHTD.transpose(1, 2)


def flex_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
    if not torch.compiler.is_compiling():  # eager FlexAttention builds the whole score matrix
        return sdpa_attention(q_BTHD, k_BTHD, v_BTHD, window)
    from torch.nn.attention.flex_attention import flex_attention as flex

    mask = flex_mask(q_BTHD.size(1), window, q_BTHD.device)
    q_BHTD, k_BHTD, v_BHTD = (t.transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD))
    return flex(q_BHTD, k_BHTD, v_BHTD, block_mask=mask, enable_gqa=True).transpose(1, 2)


def flash_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
    y = _flash_attn_func(q_BTHD, k_BTHD, v_BTHD, causal=True, window_size=(window, 0))
    return y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp too


def load_flash_attention() -> None:
    """FlashAttention-3 from the local hub cache (no network), else downloaded once."""
    global _flash_attn_func
    from huggingface_hub import constants
    from kernels import get_kernel

    repository, version = FLASH_KERNEL
    offline_by_wish = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = True
        kernel = get_kernel(repository, version=version)
    except (OSError, ValueError):  # not in the cache
        if offline_by_wish:
            raise
        constants.HF_HUB_OFFLINE = False
        kernel = get_kernel(repository, version=version)
    finally:
        constants.HF_HUB_OFFLINE = offline_by_wish
    _flash_attn_func = kernel.flash_attn_func


def probe_attention(backend: Callable, device: torch.device) -> None:
    """Raise unless `backend` agrees with SDPA on a tiny forward and backward on the real device."""
    T, window = 256, 100
    generator = torch.Generator(device).manual_seed(0)
    results = []
    inputs = [torch.randn(1, T, 2, HEAD_DIM, generator=generator, device=device, dtype=torch.bfloat16) for _ in "qkv"]
    for run in (sdpa_attention, backend):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = run(*leaves, window)
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for name, expected, got in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        error = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
        if not error < 0.02:  # bfloat16 back-ends measure about 0.004 apart
            raise ValueError(f"{name} differs from SDPA by {error:.3f}")


_backend: Callable = sdpa_attention


def choose_attention(device: torch.device) -> str:
    """Select the first back-end that works on `device`; return its name. SDPA is the reference, and CPU's and MPS's."""
    global _backend
    _backend, name = sdpa_attention, "sdpa"
    if device.type != "cuda":
        return name
    try:
        load_flash_attention()
        probe_attention(flash_attention, device)
        _backend, name = flash_attention, "flash-attention-3"
    except LOAD_ERRORS as error:
        log(f"attention: no flash-attention-3 ({one_line(error)})")
        if COMPILE:
            try:
                flex_mask(256, 100, device)
                probe_attention(torch.compile(flex_attention, dynamic=False), device)
                _backend, name = flex_attention, "flex"
            except LOAD_ERRORS as error:
                log(f"attention: no flex ({one_line(error)})")
    return name


def attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
    """Causal attention over a sliding window, scale 1/sqrt(D); k and v may have fewer heads. Returns (B, T, H, D)."""
    return _backend(q_BTHD, k_BTHD, v_BTHD, window)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


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
    """Attention window of each layer, in tokens. The last layer always sees everything."""
    sizes = {"L": config.sequence_len, "S": config.sequence_len // 2}
    unknown = set(config.window_pattern) - set(sizes)
    if unknown or not config.window_pattern:
        raise UserError(f"WINDOW_PATTERN {config.window_pattern!r} is not made of {' and '.join(sizes)}: use these")
    pattern = config.window_pattern
    return [sizes[pattern[i % len(pattern)]] for i in range(config.n_layer - 1)] + [sizes["L"]]


def has_value_embedding(layer: int, n_layer: int) -> bool:
    """Every second layer, so that the last one has it."""
    return layer % 2 == (n_layer - 1) % 2


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x_BTHD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotary position embedding, halves split (RoFormer, arXiv 2104.09864)."""
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    return torch.cat([x1 * cos_T1D + x2 * sin_T1D, x2 * cos_T1D - x1 * sin_T1D], dim=-1)


class Attention(nn.Module):
    GATE_CHANNELS = 32  # channels of the layer's input that the value embedding's gate reads

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        kv_width = config.n_kv_head * self.head_dim
        self.window = window_sizes(config)[layer]
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_width, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_width, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if has_value_embedding(layer, config.n_layer):
            self.ve_gate = nn.Linear(self.GATE_CHANNELS, config.n_kv_head, bias=False)

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        q_BTHD = self.c_q(x).view(B, T, -1, self.head_dim)
        k_BTHD = self.c_k(x).view(B, T, -1, self.head_dim)
        v_BTHD = self.c_v(x).view(B, T, -1, self.head_dim)
        if ve is not None:
            gate_BTH = 2 * torch.sigmoid(self.ve_gate(x[..., : self.GATE_CHANNELS]))
            v_BTHD = v_BTHD + gate_BTH[..., None] * ve.view_as(v_BTHD)
        q_BTHD, k_BTHD = norm(rotate(q_BTHD, cos, sin)), norm(rotate(k_BTHD, cos, sin))
        y_BTHD = attention(q_BTHD, k_BTHD, v_BTHD, self.window)
        return self.c_proj(y_BTHD.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(norm(x), ve, cos, sin)
        return x + self.mlp(norm(x))


def head_logits(x: Tensor, weight_VC: Tensor) -> Tensor:
    """(..., C) to float32 logits (..., V), soft-capped to ±15."""
    return 15 * torch.tanh(F.linear(x, weight_VC).float() / 15)


def head_loss(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy summed over the tokens whose target is not -1."""
    return F.cross_entropy(head_logits(x_NC, weight_VC), targets_N, ignore_index=-1, reduction="sum")


class ChunkedLoss(torch.autograd.Function):
    """Mean of head_loss over all tokens, LOSS_CHUNK of them at a time.

    The gradient is taken in the forward pass, chunk by chunk, so that the logits of only one chunk ever exist (a whole
    batch's, 262,144 x 8192, are 8.6 GB in float32, several times over) and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
        count = (targets_N != -1).sum()
        loss = torch.zeros((), device=x_NC.device)
        weight_grad = torch.zeros_like(weight_VC)
        x_grads = []
        loss_and_grads = torch.func.grad_and_value(head_loss, argnums=(0, 1))
        for x_chunk, targets_chunk in zip(x_NC.split(LOSS_CHUNK), targets_N.split(LOSS_CHUNK), strict=True):
            (x_grad, chunk_weight_grad), chunk_loss = loss_and_grads(x_chunk, weight_VC, targets_chunk)
            x_grads.append(x_grad)
            weight_grad += chunk_weight_grad
            loss += chunk_loss
        ctx.save_for_backward(torch.cat(x_grads), weight_grad, count)
        return loss / count

    @staticmethod
    def backward(ctx, loss_grad: Tensor):
        x_grad, weight_grad, count = ctx.saved_tensors
        scale = loss_grad / count
        return x_grad * scale, weight_grad * scale, None


class GPT(nn.Module):
    """The model: rotary positions, QK norm, sliding windows, value embeddings, relu² MLP, soft-capped logits.

    Build it under torch.device("meta"), then to_empty(device=...), then init_weights().
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        head_dim = config.n_embd // config.n_head
        self.value_embeds = nn.ModuleDict({
            str(layer): nn.Embedding(config.vocab_size, config.n_kv_head * head_dim)
            for layer in range(config.n_layer)
            if has_value_embedding(layer, config.n_layer)
        })
        self.register_buffer("cos", torch.empty(config.sequence_len, 1, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(config.sequence_len, 1, head_dim // 2), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter and buffer in place; embeddings and rotary tables take the compute type."""
        device = self.lm_head.weight.device
        bound = math.sqrt(3 / self.config.n_embd)  # U(-bound, bound) has standard deviation 1/sqrt(C)
        nn.init.normal_(self.transformer.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        nn.init.ones_(self.resid_lambdas)
        nn.init.constant_(self.x0_lambdas, 0.1)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            if hasattr(block.attn, "ve_gate"):
                nn.init.zeros_(block.attn.ve_gate.weight)
        for embedding in self.value_embeds.values():
            nn.init.uniform_(embedding.weight, -bound, bound)

        half = self.cos.size(-1)
        frequency = 10000 ** (-torch.arange(half, dtype=torch.float32, device=device) / half)
        angle = torch.arange(self.cos.size(0), dtype=torch.float32, device=device)[:, None, None] * frequency
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        self.transformer.wte.to(dtype)
        self.value_embeds.to(dtype)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """idx int64 (B, T) to float32 logits (B, T, V); with targets int64 (B, T), -1 ignored, to the mean loss."""
        T = idx.size(1)
        cos, sin = self.cos[:T], self.sin[:T]
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=idx.device.type == "cuda"):
            x = x0 = norm(self.transformer.wte(idx))
            for layer, block in enumerate(self.transformer.h):
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
                ve = self.value_embeds[str(layer)](idx) if str(layer) in self.value_embeds else None
                x = block(x, ve, cos, sin)
            x = norm(x)
            if targets is None:
                return head_logits(x, self.lm_head.weight)
            return ChunkedLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self) -> int:
        """Floating-point operations per token, forward and backward: matrix products and attention scores."""
        config = self.config
        looked_up = [self.transformer.wte.weight, *self.value_embeds.parameters(), self.resid_lambdas, self.x0_lambdas]
        matrix_params = self.num_params() - sum(p.numel() for p in looked_up)
        visible = sum(min(window, config.sequence_len) for window in window_sizes(config))
        return 6 * matrix_params + 12 * config.n_embd * visible

    def setup_optimizer(self, compiled: bool = False) -> "MuonAdamW":
        """AdamW for embeddings, head and scalars, with learning rates for a width of 768; Muon for all matrices."""
        scale = math.sqrt(768 / self.config.n_embd)
        adamw_groups = [
            ([self.lm_head.weight], UNEMBEDDING_LR * scale, ADAM_BETAS),
            ([self.transformer.wte.weight], EMBEDDING_LR * scale, ADAM_BETAS),
            (list(self.value_embeds.parameters()), EMBEDDING_LR * scale, ADAM_BETAS),
            ([self.resid_lambdas], 0.01 * SCALAR_LR, ADAM_BETAS),
            ([self.x0_lambdas], SCALAR_LR, (0.96, 0.95)),
        ]
        groups = [{"kind": "adamw", "params": p, "lr": lr, "betas": betas} for p, lr, betas in adamw_groups]
        matrices: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in self.transformer.h.parameters():
            matrices.setdefault(matrix.shape, []).append(matrix)
        for params in matrices.values():
            groups.append({"kind": "muon", "params": params, "lr": MATRIX_LR, "momentum": 0.95, "weight_decay": 0.0})
        return MuonAdamW(groups, compiled)


def model_config(vocab_size: int) -> GPTConfig:
    """The knobs, checked and rounded."""
    if HEAD_DIM < 2 or HEAD_DIM % 2:
        raise UserError(f"HEAD_DIM {HEAD_DIM} is not a positive even number: rotary embedding needs two halves")
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


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer
# ----------------------------------------------------------------------------------------------------------------------

# (a, b, c) of the five steps of Polar Express, arXiv 2505.16932
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(u_KRC: Tensor) -> Tensor:
    """Nearest (semi-)orthogonal matrix of each of K stacked matrices, approximately, in bfloat16."""
    x = u_KRC.bfloat16()
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    return x


def norm_muon(x_KRC: Tensor, second_moment: Tensor) -> Tensor:
    """Even out the rows (columns of a wide matrix) by a running mean of their squares, which is updated in place.

    The Frobenius norm stays. NorMuon, arXiv 2510.05491.
    """
    mean_square = x_KRC.square().mean(dim=second_moment_axis(x_KRC), keepdim=True)
    second_moment += (1 - 0.95) * (mean_square - second_moment)
    scaled = x_KRC / second_moment.clamp(min=1e-10).sqrt()
    return scaled * (frobenius(x_KRC) / frobenius(scaled).clamp(min=1e-10))


def second_moment_axis(x_KRC: Tensor) -> int:
    return -1 if x_KRC.size(-2) >= x_KRC.size(-1) else -2


def frobenius(x_KRC: Tensor) -> Tensor:
    return x_KRC.norm(dim=(-2, -1), keepdim=True)


def muon_update(
    p_KRC: Tensor,
    g_KRC: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
) -> Tensor:
    """New values of K stacked matrices; the two buffers are updated in place. Scalars are 0-d CPU tensors, so that a
    compiled update does not recompile when they change."""
    momentum_buffer += (1 - momentum) * (g_KRC - momentum_buffer)
    u_KRC = g_KRC + momentum * (momentum_buffer - g_KRC)
    x_KRC = norm_muon(polar_express(u_KRC).float(), second_moment)
    lr = lr * math.sqrt(max(1, p_KRC.size(-2) / p_KRC.size(-1)))
    decay = weight_decay * p_KRC * (x_KRC * p_KRC >= 0)  # cautious: only where it agrees with the update
    return p_KRC - lr * (x_KRC + decay)


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer, two kinds of groups: "adamw" (lr, betas) and "muon" (lr, momentum, weight_decay; equal shapes).

    AdamW (arXiv 1711.05101) with eps 1e-10 and no decay, torch's fused kernel. Muon: github.com/KellerJordan/Muon.
    A group keeps its `initial_lr` for the schedule.
    """

    def __init__(self, groups: list[dict], compiled: bool = False):
        super().__init__([{**group, "initial_lr": group["lr"]} for group in groups if group["params"]], defaults={})
        self._muon_update = torch.compile(muon_update, dynamic=False, fullgraph=True) if compiled else muon_update

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._step_adamw if group["kind"] == "adamw" else self._step_muon)(group, params)

    def _step_adamw(self, group: dict, params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=1e-10,
            maximize=False,
        )

    def _step_muon(self, group: dict, params: list[Tensor]) -> None:
        p_KRC = torch.stack(params)
        g_KRC = torch.stack([p.grad for p in params])
        state = self.state[params[0]]  # the whole group's
        if not state:
            state["momentum_buffer"] = torch.zeros_like(g_KRC)
            state["second_moment"] = torch.zeros_like(g_KRC.mean(second_moment_axis(g_KRC), keepdim=True))
        scalars = [torch.tensor(group[name]) for name in ("lr", "momentum", "weight_decay")]
        updated = self._muon_update(p_KRC, g_KRC, state["momentum_buffer"], state["second_moment"], *scalars)
        torch._foreach_copy_(params, list(updated.unbind()))


# ----------------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of progress (share of the time budget, 0 to 1) or of the step
# ----------------------------------------------------------------------------------------------------------------------


def get_lr_multiplier(progress: float) -> float:
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    if progress <= 1 - WARMDOWN_RATIO:
        return 1.0
    left = (1 - progress) / WARMDOWN_RATIO
    return left + (1 - left) * FINAL_LR_FRAC


def get_muon_momentum(step: int) -> float:
    return 0.85 + 0.10 * min(step / 300, 1)


def get_weight_decay(progress: float) -> float:
    return WEIGHT_DECAY * (1 - progress)


def set_schedules(optimizer: MuonAdamW, step: int, progress: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * get_lr_multiplier(progress)
        if group["kind"] == "muon":
            group["momentum"] = get_muon_momentum(step)
            group["weight_decay"] = get_weight_decay(progress)


# ----------------------------------------------------------------------------------------------------------------------
# Warm-up: everything that must not be timed, on state that is restored
# ----------------------------------------------------------------------------------------------------------------------


def fit_device_batch(trial: Callable[[int], None], total_rows: int, upper_bound: int) -> int:
    """The largest device batch up to `upper_bound` that divides `total_rows` and for which `trial(rows)` has room.

    On torch.OutOfMemoryError the bound is halved; a single row that does not fit is an error.
    """
    while True:
        rows = max(divisor for divisor in range(1, upper_bound + 1) if total_rows % divisor == 0)
        try:
            trial(rows)
            return rows
        except torch.OutOfMemoryError as error:
            reason = one_line(error)
        if rows == 1:
            raise UserError(f"DEVICE_BATCH_SIZE 1 does not fit on the device: make the model smaller ({reason})")
        upper_bound = rows // 2
        log(f"out of memory with {rows} rows: trying at most {upper_bound} ({reason})")


def warm_up(model: nn.Module, optimizer: MuonAdamW, device: torch.device, vocab_size: int) -> int:
    """Compile and run what a run needs on random tokens, then restore parameters, buffers and optimizer.

    Returns the device batch that fits. `model` may be compiled.
    """
    if TOTAL_BATCH_SIZE < 1 or TOTAL_BATCH_SIZE % MAX_SEQ_LEN:
        near = max(1, round(TOTAL_BATCH_SIZE / MAX_SEQ_LEN)) * MAX_SEQ_LEN
        raise UserError(
            f"TOTAL_BATCH_SIZE {TOTAL_BATCH_SIZE} is not a multiple of MAX_SEQ_LEN {MAX_SEQ_LEN}: set it to {near}, say"
        )
    if DEVICE_BATCH_SIZE < 1:
        raise UserError(f"DEVICE_BATCH_SIZE {DEVICE_BATCH_SIZE} is below 1: set the most rows to try per micro-step")
    initial = [(t, t.detach().to("cpu", copy=True)) for t in (*model.parameters(), *model.buffers())]

    def forget() -> None:
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def trial(rows: int) -> None:
        forget()
        tokens = torch.randint(vocab_size, (rows, MAX_SEQ_LEN + 1), device=device)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        try:
            for _ in range(2):  # the second micro-step accumulates
                model(x, y).backward()
            optimizer.step()
            with torch.no_grad():
                model.eval()(x)  # what the judge calls
        except torch.OutOfMemoryError:
            torch.compiler.reset()  # each size is compiled anew; too many would fall back to eager
            raise
        finally:
            model.train()

    device_batch = fit_device_batch(trial, TOTAL_BATCH_SIZE // MAX_SEQ_LEN, DEVICE_BATCH_SIZE)
    forget()
    with torch.no_grad():
        for tensor, value in initial:
            tensor.copy_(value)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return device_batch


# ----------------------------------------------------------------------------------------------------------------------
# Training loop
# ----------------------------------------------------------------------------------------------------------------------

LOG_SECONDS = 5  # a line this often when stderr is no terminal
MAX_LOSS = 100  # nats per token; an untrained model has ln(V), about 9


class LossReader:
    """Brings a step's loss to the host without draining the GPU's queue: start() before backward, result() after it."""

    def __init__(self, device: torch.device):
        self.copied = torch.cuda.Event() if device.type == "cuda" else None
        self.loss = torch.zeros((), pin_memory=self.copied is not None)

    def start(self, loss: Tensor) -> None:
        if self.copied is None:
            self.loss = loss
        else:
            self.loss.copy_(loss, non_blocking=True)
            self.copied.record()

    def result(self) -> float:
        if self.copied is not None:
            self.copied.synchronize()  # the forward pass is done; backward is still running
        return self.loss.item()


class ProgressLine:
    """One line rewritten in place on a terminal, else a whole line every LOG_SECONDS."""

    def __init__(self):
        self.terminal = sys.stderr.isatty()
        self.logged_at = -math.inf

    def show(self, text: str, last: bool = False) -> None:
        if self.terminal:
            print(f"\r{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or time.perf_counter() - self.logged_at >= LOG_SECONDS:
            self.logged_at = time.perf_counter()
            log(text)


def train(model: nn.Module, optimizer: MuonAdamW, loader, device: torch.device, device_batch: int, mfu) -> int:
    """Train until the next step would no longer fit into TIME_BUDGET; return the number of steps."""
    grad_accum_steps = TOTAL_BATCH_SIZE // (device_batch * MAX_SEQ_LEN)
    reader, line = LossReader(device), ProgressLine()
    step, step_seconds, smooth_loss = 0, 0.0, 0.0
    x, y, epoch = next(loader)  # starts the stopwatch
    now = training_seconds()
    while now + step_seconds <= TIME_BUDGET:
        progress = min(now / TIME_BUDGET, 1.0)
        set_schedules(optimizer, step, progress)
        step_loss = 0.0
        for micro_step in range(grad_accum_steps):
            loss = model(x, y) / grad_accum_steps
            step_loss = step_loss + loss.detach()
            if micro_step == grad_accum_steps - 1:
                reader.start(step_loss)
            loss.backward()
            x, y, epoch = next(loader)

        train_loss = reader.result()
        if not train_loss <= MAX_LOSS:  # NaN too
            raise UserError(f"step {step}: training loss {train_loss} is above {MAX_LOSS}: lower the learning rates")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        step += 1
        if step == 1:
            gc.collect()
            gc.freeze()  # the collector's pauses, 0.5 s each, would be in the middle of steps
            gc.disable()
        elif step % 5000 == 0:
            gc.collect()
        before, now = now, training_seconds()
        step_seconds = now - before
        smooth_loss = 0.9 * smooth_loss + 0.1 * train_loss
        last = now + step_seconds > TIME_BUDGET
        line.show(
            f"step {step:05d} | {100 * min(now / TIME_BUDGET, 1):5.1f}% | loss {smooth_loss / (1 - 0.9**step):.4f} | "
            f"lr x{get_lr_multiplier(progress):.2f} | {1000 * step_seconds:.0f} ms | "
            f"{TOTAL_BATCH_SIZE / step_seconds:,.0f} tok/s | mfu {mfu(TOTAL_BATCH_SIZE, step_seconds):.1f}% | "
            f"epoch {epoch} | {max(0, TIME_BUDGET - now):.0f} s left ",
            last,
        )
    gc.unfreeze()
    gc.enable()
    return step


# ----------------------------------------------------------------------------------------------------------------------
# Summary
# ----------------------------------------------------------------------------------------------------------------------

# dense bf16 peak in FLOP/s by a part of the device's name; the first match counts
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
SAMPLE_CHARACTERS = 200


def peak_flops(device_name: str) -> float:
    """The device's peak, 0.0 if it is not in the table."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), 0.0)


def peak_vram_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return torch.mps.driver_allocated_memory() / 2**20 if device.type == "mps" else 0.0


@torch.no_grad()
def write_sample(model: GPT, tokenizer: Tokenizer) -> str:
    """About SAMPLE_CHARACTERS written by the model from a fixed prompt, on one line; the same for the same weights."""
    prompt = "def read_lines(path):\n" if PROFILE in ("code", "pocket", "smoke") else "The most important thing about"
    bos, device = tokenizer.get_bos_token_id(), model.lm_head.weight.device
    tokens = [bos, *tokenizer.encode(prompt)]
    generator = torch.Generator().manual_seed(0)
    while len(tokens) < MAX_SEQ_LEN and len(tokenizer.decode(tokens[1:])) < SAMPLE_CHARACTERS:
        logits_V = model(torch.tensor([tokens], device=device))[0, -1].cpu()
        probabilities_V = torch.softmax(logits_V / 0.7, dim=-1)
        token = torch.multinomial(probabilities_V, 1, generator=generator).item()
        if token == bos:  # the document ends
            break
        tokens.append(token)
    text = tokenizer.decode(tokens[1:])
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def pick_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def run() -> None:
    device = pick_device()
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    log(f"profile {PROFILE} ({PROFILE_REASON}), device {device_name}, seed {SEED}, budget {TIME_BUDGET} s")
    tokenizer = Tokenizer.from_directory()
    vocab_size = tokenizer.get_vocab_size()
    config = model_config(vocab_size)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE_ROOT / "compile"))  # kept between runs

    torch.manual_seed(SEED)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    log(f"attention: {choose_attention(device)}")
    compiled = COMPILE and device.type != "mps"
    optimizer = model.setup_optimizer(compiled)
    runner = torch.compile(model, dynamic=False) if compiled else model
    flops_per_token = model.estimate_flops()
    log(f"{config}")
    log(f"parameters {model.num_params():,}, FLOPs per token {flops_per_token:,}, compiled {compiled}")
    peak = peak_flops(device_name)
    if not peak:
        log(f"mfu: no bf16 peak known for {device_name!r}, so it reads 0.00")

    def mfu_percent(tokens: int, seconds: float) -> float:
        return 100 * flops_per_token * tokens / seconds / peak if peak else 0.0

    device_batch = warm_up(runner, optimizer, device, vocab_size)
    grad_accum_steps = TOTAL_BATCH_SIZE // (device_batch * MAX_SEQ_LEN)
    log(f"batch: {TOTAL_BATCH_SIZE:,} tokens = {device_batch} rows x {MAX_SEQ_LEN} x {grad_accum_steps} micro-steps")
    loader = make_dataloader(tokenizer, device_batch, MAX_SEQ_LEN, "train", device=device)
    startup_seconds = time.perf_counter() - PROCESS_STARTED

    num_steps = train(runner, optimizer, loader, device, device_batch, mfu_percent)

    eval_started = time.perf_counter()
    val_bpb = evaluate_bpb(runner, tokenizer, device_batch)
    eval_seconds = time.perf_counter() - eval_started
    tokens = num_steps * TOTAL_BATCH_SIZE
    summary = {
        "val_bpb": f"{val_bpb:.6f}",
        "training_seconds": f"{training_seconds():.1f}",
        "total_seconds": "",
        "peak_vram_mb": f"{peak_vram_mb(device):.1f}",
        "mfu_percent": f"{mfu_percent(tokens, training_seconds()):.2f}",
        "total_tokens_M": f"{tokens / 1e6:.1f}",
        "num_steps": num_steps,
        "num_params_M": f"{model.num_params() / 1e6:.1f}",
        "depth": DEPTH,
        "startup_seconds": f"{startup_seconds:.1f}",
        "eval_seconds": f"{eval_seconds:.1f}",
        "seed": SEED,
        "sample": write_sample(model, tokenizer),
    }
    summary["total_seconds"] = f"{time.perf_counter() - PROCESS_STARTED:.1f}"
    print("---", *(f"{key + ':':<18}{value}" for key, value in summary.items()), sep="\n", flush=True)


def main() -> int:
    try:
        run()
    except (UserError, EvaluationRefused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
