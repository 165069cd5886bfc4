"""train.py: the thing judged. A GPT, Muon + AdamW and the training loop.

    uv run train.py    # after: uv run prepare.py; AUTORESEARCH_PROFILE=pocket chooses another profile

It trains for TIME_BUDGET seconds on one device (CUDA, else MPS, else CPU) and lets prepare.py judge the result.
Shapes: B batch rows, T time, C model width, H query heads, Hkv key/value heads, D head size, V vocabulary, N = B·T;
K matrices of R rows. A suffix names a layout: q_BTHD, logits_BTV. The residual stream is plain x, (B, T, C).
Progress goes to stderr. The summary is the last thing on stdout, after a line `---`, one `key: value` a line:
val_bpb, training_seconds, total_seconds (from process start), peak_vram_mb (MiB), mfu_percent, total_tokens_M,
num_steps, num_params_M, depth, startup_seconds, eval_seconds, seed, sample (text that the trained model wrote).
"""
# ruff: noqa: E402 (the process's clock starts before the slow imports, so that they are counted)
import os
import time

PROCESS_STARTED = time.perf_counter()
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # at barriers: libgomp's default crawls where cores are shared
import gc
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

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
DEVICE_BATCH_SIZE = 128  # rows per micro-step, an upper bound: halved when the device runs out of memory
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

# CPU-sized values of the same knobs; without a GPU, for a profile of your own too
if PROFILE in ("pocket", "smoke") or (PROFILE not in ("climbmix", "code") and not torch.cuda.device_count()):
    DEPTH = 1
    HEAD_DIM = 64
    TOTAL_BATCH_SIZE = 2048
    LOSS_CHUNK = 512
    EMBEDDING_LR = 0.3
    UNEMBEDDING_LR = 0.005
    WARMDOWN_RATIO = 0.7
    COMPILE = False  # compiling takes longer than the budget


def log(message: str, end: str = "\n") -> None:
    print(message, end=end, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# ---- Attention: one function, three back-ends ----
FLASH_KERNEL = {"repo_id": "kernels-community/flash-attn3", "version": 1}  # on the Hugging Face hub, pinned
_masks: dict = {}  # built before a model is compiled, shared by its layers


def attention_mask(kind: str, T: int, window: int, device: torch.device):
    """Query t sees keys t-window .. t: a boolean (T, T) for "sdpa", a BlockMask for "flex"."""
    key = (kind, T, window, device)
    if key not in _masks:
        if kind == "flex":
            visible = lambda b, h, q, k: (k <= q) & (q - k <= window)  # noqa: E731
            _masks[key] = flex.create_block_mask(visible, None, None, T, T, device=device)
        else:
            _masks[key] = torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(-window)
    return _masks[key]


def sdpa_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
    T, grouped = q_BTHD.size(1), q_BTHD.size(2) > k_BTHD.size(2)
    mask = attention_mask("sdpa", T, window, q_BTHD.device) if window < T - 1 else None
    qkv_BHTD = (t.transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD))
    y_BHTD = F.scaled_dot_product_attention(*qkv_BHTD, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y_BHTD.transpose(1, 2)


def flex_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
    if not torch.compiler.is_compiling():  # eager, it would build the whole score matrix
        return sdpa_attention(q_BTHD, k_BTHD, v_BTHD, window)
    mask = attention_mask("flex", q_BTHD.size(1), window, q_BTHD.device)
    qkv_BHTD = (t.transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD))
    return flex.flex_attention(*qkv_BHTD, block_mask=mask, enable_gqa=True).transpose(1, 2)


def load_flash_attention() -> Callable:
    """FlashAttention-3 from the local hub cache, without a network; else downloaded, once."""
    from huggingface_hub import constants
    from kernels import get_kernel
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        kernel = get_kernel(**FLASH_KERNEL)
    except (OSError, ValueError):  # not in the cache
        constants.HF_HUB_OFFLINE = offline
        kernel = get_kernel(**FLASH_KERNEL)
    finally:
        constants.HF_HUB_OFFLINE = offline

    def flash_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
        y = kernel.flash_attn_func(q_BTHD, k_BTHD, v_BTHD, causal=True, window_size=(window, 0))
        return y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp too

    return flash_attention


def probe_attention(backend: Callable, T: int, window: int, device: torch.device) -> None:
    """Raise unless `backend` agrees with SDPA on a small forward and backward on the real device."""
    generator, shape = torch.Generator(device).manual_seed(0), (1, T, 2, HEAD_DIM)
    qkv = [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3)]
    results = []
    for run in (sdpa_attention, backend):
        leaves = [t.clone().requires_grad_() for t in qkv]
        y = run(*leaves, window)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for name, expected, got in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        error = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
        if not error < 0.02:  # bfloat16 kernels are about 0.004 apart
            raise ValueError(f"{name} differs from SDPA by {error:.3f}")


attention: Callable = sdpa_attention  # causal, scale 1/sqrt(D), k and v may have fewer heads; see choose_attention


def choose_attention(config: "GPTConfig", device: torch.device) -> str:
    """Select the first back-end that works on `device`, build the masks, return its name. CPU and MPS take SDPA."""
    global attention
    T, windows = config.sequence_len, sorted(set(window_sizes(config)))
    candidates = {"flash-attention-3": load_flash_attention, "flex": lambda: flex_attention}
    for window in windows:
        attention_mask("sdpa", T, window, device)
    for name, load in candidates.items() if device.type == "cuda" and COMPILE else ():
        try:
            attention = load()
            for window in windows if name == "flex" else ():
                attention_mask(name, T, window, device)
            probe_attention(torch.compile(attention, dynamic=False), T, windows[0], device)
            return name
        except Exception as error:  # whatever it was, the next one is tried
            log(f"attention: no {name}: {one_line(error)}")
    attention = sdpa_attention
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
    pattern, sizes = config.window_pattern, {"L": config.sequence_len, "S": config.sequence_len // 2}
    if not pattern or set(pattern) - set(sizes):
        raise UserError(f"WINDOW_PATTERN {pattern!r} is not made of the letters S and L: use 'SSSL', say")
    return [sizes[pattern[layer % len(pattern)]] for layer in range(config.n_layer - 1)] + [sizes["L"]]


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves split (RoFormer, arXiv 2104.09864). cos and sin: (T, 1, D/2)."""
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


class Attention(nn.Module):
    GATE_CHANNELS = 32  # channels of the layer's input that the value embedding's gate reads

    def __init__(self, config: GPTConfig, window: int, has_ve: bool):
        super().__init__()
        self.head_dim, self.window = config.n_embd // config.n_head, window
        self.c_q = nn.Linear(config.n_embd, config.n_head * self.head_dim, bias=False)
        self.c_k = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if has_ve:
            self.ve_gate = nn.Linear(min(self.GATE_CHANNELS, config.n_embd), config.n_kv_head, bias=False)

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        q_BTHD, k_BTHD, v_BTHD = (c(x).unflatten(-1, (-1, self.head_dim)) for c in (self.c_q, self.c_k, self.c_v))
        if ve is not None:
            gate_BTH = 2 * torch.sigmoid(self.ve_gate(x[..., : self.GATE_CHANNELS]))
            v_BTHD = v_BTHD + gate_BTH[..., None] * ve.view_as(v_BTHD)
        q_BTHD, k_BTHD = norm(rotate(q_BTHD, cos, sin)), norm(rotate(k_BTHD, cos, sin))
        return self.c_proj(attention(q_BTHD, k_BTHD, v_BTHD, self.window).flatten(2))


class MLP(nn.Module):
    def __init__(self, C: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, window: int, has_ve: bool):
        super().__init__()
        self.attn, self.mlp = Attention(config, window, has_ve), MLP(config.n_embd)

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(norm(x), ve, cos, sin)
        return x + self.mlp(norm(x))


def head_logits(x: Tensor, weight_VC: Tensor) -> Tensor:
    """(..., C) to float32 logits (..., V), soft-capped: 15 tanh(logits / 15); sigmoid is 6 times as fast on a CPU."""
    return 30 * torch.sigmoid(F.linear(x, weight_VC).float() / 7.5) - 15


def head_loss(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(head_logits(x_NC, weight_VC), targets_N, ignore_index=-1, reduction="sum")


class ChunkedLoss(torch.autograd.Function):
    """Mean of head_loss, LOSS_CHUNK tokens at a time: the gradient is taken in the forward pass, so that the logits of
    one chunk only ever exist (a whole batch's, 262,144 x 8192, are 8.6 GB) and nothing is computed twice."""

    @staticmethod
    def forward(ctx, x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
        loss, weight_grad, x_grads = torch.zeros((), device=x_NC.device), torch.zeros_like(weight_VC), []
        loss_and_grads = torch.func.grad_and_value(head_loss, argnums=(0, 1))
        for x_chunk, targets_chunk in zip(x_NC.split(LOSS_CHUNK), targets_N.split(LOSS_CHUNK), strict=True):
            (x_grad, chunk_weight_grad), chunk_loss = loss_and_grads(x_chunk, weight_VC, targets_chunk)
            x_grads.append(x_grad)
            weight_grad += chunk_weight_grad
            loss += chunk_loss
        count = (targets_N != -1).sum()
        ctx.save_for_backward(torch.cat(x_grads), weight_grad, count)
        return loss / count

    @staticmethod
    def backward(ctx, loss_grad: Tensor):
        x_grad, weight_grad, count = ctx.saved_tensors
        return x_grad * (loss_grad / count), weight_grad * (loss_grad / count), None


class GPT(nn.Module):
    """Build it under torch.device("meta"), then to_empty(device=...), then init_weights(). Design: nanochat's GPT."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V, L, head_dim = config.vocab_size, config.n_layer, config.n_embd // config.n_head
        with_ve = range((L - 1) % 2, L, 2)  # every second layer, so that the last one has a value embedding
        blocks = [Block(config, window, layer in with_ve) for layer, window in enumerate(window_sizes(config))]
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, config.n_embd), "h": nn.ModuleList(blocks)})
        self.lm_head = nn.Linear(config.n_embd, V, bias=False)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.empty(L)), nn.Parameter(torch.empty(L))
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(V, config.n_kv_head * head_dim) for i in with_ve})
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(config.sequence_len, 1, head_dim // 2), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter and buffer in place; embeddings and rotary tables take the compute type."""
        bound = math.sqrt(3 / self.config.n_embd)  # U(-bound, bound) has standard deviation 1/sqrt(C)
        nn.init.normal_(self.transformer.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        nn.init.constant_(self.resid_lambdas, 1.0)
        nn.init.constant_(self.x0_lambdas, 0.1)
        for matrix in (*self.transformer.h.parameters(), *self.value_embeds.parameters()):
            nn.init.uniform_(matrix, -bound, bound)
        for name, matrix in self.transformer.h.named_parameters():
            if "c_proj" in name or "ve_gate" in name:
                nn.init.zeros_(matrix)

        device, (T, _, half) = self.cos.device, self.cos.shape
        angle = torch.arange(T, device=device)[:, None, None] * 10000.0 ** (-torch.arange(half, device=device) / half)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        self.transformer.wte.to(dtype)
        self.value_embeds.to(dtype)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """idx int64 (B, T) to float32 logits (B, T, V); with targets int64 (B, T), -1 ignored, to the mean loss."""
        cos, sin = self.cos[: idx.size(1)], self.sin[: idx.size(1)]
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=idx.device.type == "cuda"):
            x = x0 = norm(self.transformer.wte(idx))
            for layer, block in enumerate(self.transformer.h):
                ve = self.value_embeds[str(layer)](idx) if str(layer) in self.value_embeds else None
                x = block(self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0, ve, cos, sin)
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
        matrices = list(self.transformer.h.parameters())
        for shape in dict.fromkeys(p.shape for p in matrices):
            groups.append({"kind": "muon", "params": [p for p in matrices if p.shape == shape], "lr": MATRIX_LR})
        return MuonAdamW(groups, compiled)


def model_config(vocab_size: int) -> GPTConfig:
    """The knobs, checked; the width rounded up to whole heads."""
    for name in ("DEPTH", "ASPECT_RATIO", "HEAD_DIM", "TOTAL_BATCH_SIZE", "DEVICE_BATCH_SIZE", "LOSS_CHUNK"):
        if globals()[name] < 1:
            raise UserError(f"{name} {globals()[name]} is below 1: set it to 1 or more")
    if HEAD_DIM % 2:
        raise UserError(f"HEAD_DIM {HEAD_DIM} is odd, and rotary embedding turns two halves: set it to {HEAD_DIM + 1}")
    if TOTAL_BATCH_SIZE % MAX_SEQ_LEN:
        remedy = f"set it to {math.ceil(TOTAL_BATCH_SIZE / MAX_SEQ_LEN) * MAX_SEQ_LEN}"
        raise UserError(f"TOTAL_BATCH_SIZE {TOTAL_BATCH_SIZE} is not a multiple of MAX_SEQ_LEN {MAX_SEQ_LEN}: {remedy}")
    n_head = math.ceil(DEPTH * ASPECT_RATIO / HEAD_DIM)
    return GPTConfig(MAX_SEQ_LEN, vocab_size, DEPTH, n_head, n_head, n_head * HEAD_DIM, WINDOW_PATTERN)


# ---- Optimizer ----
POLAR_EXPRESS = (  # (a, b, c) of each step, arXiv 2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(u_KRC: Tensor) -> Tensor:
    """About the nearest (semi-)orthogonal matrix to each of K, computed in bfloat16 on every device."""
    x = u_KRC.bfloat16()
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    return x


def mean_square(x_KRC: Tensor) -> Tensor:  # of each row, or of each column where those are more
    return x_KRC.square().mean(dim=-1 if x_KRC.size(-2) >= x_KRC.size(-1) else -2, keepdim=True)


def muon_update(p: Tensor, g: Tensor, momentum: Tensor, second_moment: Tensor, lr, mu, weight_decay) -> Tensor:
    """New values of stacked matrices p (K, R, C) with gradients g: Muon (github.com/KellerJordan/Muon), Polar Express,
    NorMuon (arXiv 2510.05491), cautious decay. Updates momentum and second_moment; the scalars are 0-d CPU tensors, for
    which nothing is compiled anew."""
    momentum += (1 - mu) * (g - momentum)
    update = polar_express(g + mu * (momentum - g)).float()
    second_moment += (1 - 0.95) * (mean_square(update) - second_moment)
    scaled = update / second_moment.clamp(min=1e-10).sqrt()
    before, after = (x.norm(dim=(-2, -1), keepdim=True) for x in (update, scaled))
    update = scaled * (before / after.clamp(min=1e-10))  # as long as before
    lr = lr * math.sqrt(max(1, p.size(-2) / p.size(-1)))
    return p - lr * (update + weight_decay * p * (update * p >= 0))


class MuonAdamW(torch.optim.Optimizer):
    """Groups of two kinds: "adamw" (lr, betas) and "muon" (matrices of one shape; lr, momentum, weight_decay)."""

    def __init__(self, groups: list[dict], compiled: bool = False):
        super().__init__([{**group, "initial_lr": group["lr"]} for group in groups if group["params"]], defaults={})
        self._muon_update = torch.compile(muon_update, dynamic=False, fullgraph=True) if compiled else muon_update
        set_schedules(self, step=0, progress=0.0)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["kind"] == "adamw":
                self._step_adamw(group, params)
            elif params:
                self._step_muon(group, params)

    def _step_adamw(self, group: dict, params: list[Tensor]) -> None:
        """AdamW (arXiv 1711.05101) without decay, in torch's fused kernel."""
        for p in params:
            if not self.state[p]:
                self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p]["step"] = torch.zeros((), device=p.device)
        exp_avgs, exp_avg_sqs, steps = ([self.state[p][k] for p in params] for k in ("exp_avg", "exp_avg_sq", "step"))
        options = {"fused": True, "amsgrad": False, "maximize": False, "weight_decay": 0.0, "eps": 1e-10}
        options |= {"lr": group["lr"], "beta1": group["betas"][0], "beta2": group["betas"][1]}
        adamw(params, [p.grad for p in params], exp_avgs, exp_avg_sqs, [], steps, **options)

    def _step_muon(self, group: dict, params: list[Tensor]) -> None:
        p, g = torch.stack(params), torch.stack([p.grad for p in params])
        state = self.state[params[0]]  # the whole group's
        if not state:
            state |= {"momentum": torch.zeros_like(g), "second_moment": torch.zeros_like(mean_square(g))}
        scalars = [torch.tensor(group[name]) for name in ("lr", "momentum", "weight_decay")]
        torch._foreach_copy_(params, self._muon_update(p, g, *state.values(), *scalars).unbind())


# ---- Schedules: functions of progress (share of the time budget that is used, 0 to 1) or of the step ----

def get_lr_multiplier(progress: float) -> float:
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    if progress <= 1 - WARMDOWN_RATIO:
        return 1.0
    left = (1 - progress) / WARMDOWN_RATIO
    return left + (1 - left) * FINAL_LR_FRAC


def get_muon_momentum(step: int) -> float:
    return 0.85 + (0.95 - 0.85) * min(step / 300, 1)


def get_weight_decay(progress: float) -> float:
    return WEIGHT_DECAY * (1 - progress)


def set_schedules(optimizer: MuonAdamW, step: int, progress: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * get_lr_multiplier(progress)
        if group["kind"] == "muon":
            group["momentum"], group["weight_decay"] = get_muon_momentum(step), get_weight_decay(progress)


# ---- Warm-up: what must not be timed, on state that is restored ----

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
        torch.compiler.reset()  # a function is compiled for a few sizes only
        upper_bound = rows // 2


def warm_up(model: nn.Module, optimizer: MuonAdamW, vocab_size: int) -> int:
    """Compile and run on random tokens what training and evaluation will run; return the device batch that fits.

    Parameters and buffers are left as they were found, the (fresh) optimizer without state.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device, initial = tensors[0].device, [t.detach().to("cpu", copy=True) for t in tensors]

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
        x, y = (torch.randint(vocab_size, (rows, MAX_SEQ_LEN), device=device) for _ in "xy")
        for _ in range(2):  # the second micro-step accumulates
            model(x, y).backward()
        optimizer.step()
        with torch.no_grad():
            _ = model.eval()(x), model(x)  # the judge holds two results

    device_batch = fit_device_batch(trial, TOTAL_BATCH_SIZE // MAX_SEQ_LEN, DEVICE_BATCH_SIZE)
    forget()
    with torch.no_grad():
        torch._foreach_copy_(tensors, initial)
    return device_batch


# ---- Training loop ----
LOG_SECONDS = 5  # a line this often, where stderr is no terminal
MAX_LOSS = 100  # nats per token; an untrained model has ln(V), about 9


def train(model: nn.Module, optimizer: MuonAdamW, loader, device_batch: int, mfu_per_speed: float) -> int:
    """Train until the next step would no longer fit into TIME_BUDGET; return the number of steps."""
    grad_accum_steps = TOTAL_BATCH_SIZE // (device_batch * MAX_SEQ_LEN)
    log(f"batch {TOTAL_BATCH_SIZE:,} tokens = {device_batch} rows x {MAX_SEQ_LEN} x {grad_accum_steps} micro-steps")
    on_cuda = next(model.parameters()).is_cuda
    host_loss, copied = torch.zeros((), pin_memory=on_cuda), torch.cuda.Event() if on_cuda else None
    step, step_seconds, smooth_loss, logged_at, on_terminal = 0, 0.0, 0.0, -math.inf, sys.stderr.isatty()
    (x, y, epoch), now = next(loader), training_seconds()  # the first batch starts the stopwatch
    while now + step_seconds <= TIME_BUDGET:
        progress = min(now / TIME_BUDGET, 1.0)
        set_schedules(optimizer, step, progress)
        step_loss = 0.0
        for micro_step in range(grad_accum_steps):
            loss = model(x, y) / grad_accum_steps
            step_loss = step_loss + loss.detach()
            if micro_step == grad_accum_steps - 1:
                host_loss.copy_(step_loss, non_blocking=on_cuda)
                if copied:
                    copied.record()
            loss.backward()
            x, y, epoch = next(loader)
        if copied:
            copied.synchronize()  # of the forward passes only: the last backward still runs
        train_loss = host_loss.item()
        if not train_loss <= MAX_LOSS:  # NaN too
            raise UserError(f"step {step}: training loss {train_loss} (limit {MAX_LOSS}): lower the learning rates")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 5000 == 1:  # left alone, the garbage collector would stall some steps by 0.5 s
            gc.collect()
            gc.freeze()
            gc.disable()
        before, now = now, training_seconds()
        step_seconds = now - before
        smooth_loss += 0.1 * (train_loss - smooth_loss)
        last = now + step_seconds > TIME_BUDGET
        if on_terminal or last or now - logged_at >= LOG_SECONDS:
            logged_at = now
            speed, left = TOTAL_BATCH_SIZE / step_seconds, max(0, TIME_BUDGET - now)
            line = (
                f"step {step:05d} | {100 - 100 * left / TIME_BUDGET:.1f}% | loss {smooth_loss / (1 - 0.9**step):.4f} | "
                f"lr x{get_lr_multiplier(progress):.2f} | {1000 * step_seconds:.0f} ms | {speed:,.0f} tok/s | "
                f"mfu {mfu_per_speed * speed:.1f}% | epoch {epoch} | {left:.0f} s left"
            )
            log(f"\r{line}\033[K" if on_terminal else line, end="" if on_terminal and not last else "\n")
    return step


# ---- Summary ----
PEAK_TFLOPS = {  # dense bf16, by a word in the device's name; the first match counts
    "B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "GH200": 989, "H200": 989, "H20": 148, "A100": 312,
    "A40": 150, "A10": 125, "L40S": 362, "L4": 121, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_flops(device_name: str) -> float:  # FLOP/s, 0.0 where the table has none
    return 1e12 * next((peak for word, peak in PEAK_TFLOPS.items() if re.search(rf"\b{word}\b", device_name)), 0.0)


@torch.no_grad()
def write_sample(model: GPT, tokenizer: prepare.Tokenizer, characters: int = 200) -> str:
    """A text that starts with a fixed prompt, on one line; the same for the same weights."""
    prompt = "def read_lines(path):\n" if PROFILE in ("code", "pocket", "smoke") else "The most important thing about"
    bos, tokens = tokenizer.get_bos_token_id(), tokenizer.encode(prompt)
    generator = torch.Generator().manual_seed(0)
    while len(tokens) < MAX_SEQ_LEN - 1 and len(tokenizer.decode(tokens)) < characters:
        logits_V = model(torch.tensor([[bos, *tokens]], device=model.cos.device))[0, -1].cpu()
        token = torch.multinomial(torch.softmax(logits_V / 0.7, dim=-1), 1, generator=generator).item()
        if token == bos:  # the end of the document
            break
        tokens.append(token)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in tokenizer.decode(tokens))


def run() -> None:
    device = torch.device(prepare.default_device())
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    log(f"profile {PROFILE} ({prepare.PROFILE_REASON}), {TIME_BUDGET:g} s on {device_name}, seed {SEED}")
    tokenizer = prepare.Tokenizer.from_directory()
    log(str(config := model_config(tokenizer.get_vocab_size())))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(prepare.CACHE_ROOT / "compile"))  # kept between runs
    torch.manual_seed(SEED)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device).init_weights()
    compiled = COMPILE and device.type != "mps"
    log(f"attention {choose_attention(config, device)}, compiled {compiled}")
    optimizer = model.setup_optimizer(compiled)
    runner = torch.compile(model, dynamic=False) if compiled else model
    flops, peak = model.estimate_flops(), peak_flops(device_name)
    mfu_per_speed = 100 * flops / peak if peak else 0.0  # percent, times tokens per second
    log(f"{model.num_params():,} parameters, {flops:,} FLOPs per token, peak {peak / 1e12:.0f} TFLOP/s (0: not known)")
    device_batch = warm_up(runner, optimizer, config.vocab_size)
    loader = prepare.make_dataloader(tokenizer, device_batch, MAX_SEQ_LEN, "train", device=device)
    startup_seconds = time.perf_counter() - PROCESS_STARTED
    num_steps = train(runner, optimizer, loader, device_batch, mfu_per_speed)
    eval_started = time.perf_counter()
    val_bpb = prepare.evaluate_bpb(runner, tokenizer, device_batch)
    eval_seconds = time.perf_counter() - eval_started
    sample = write_sample(model, tokenizer)
    memory = {"cuda": torch.cuda.max_memory_allocated, "mps": torch.mps.driver_allocated_memory}
    num_tokens = num_steps * TOTAL_BATCH_SIZE
    summary = {
        "val_bpb": f"{val_bpb:.6f}",
        "training_seconds": f"{training_seconds():.1f}",
        "total_seconds": f"{time.perf_counter() - PROCESS_STARTED:.1f}",
        "peak_vram_mb": f"{memory.get(device.type, int)() / 2**20:.1f}",
        "mfu_percent": f"{mfu_per_speed * num_tokens / training_seconds():.2f}",
        "total_tokens_M": f"{num_tokens / 1e6:.1f}",
        "num_steps": num_steps,
        "num_params_M": f"{model.num_params() / 1e6:.1f}",
        "depth": DEPTH,
        "startup_seconds": f"{startup_seconds:.1f}",
        "eval_seconds": f"{eval_seconds:.1f}",
        "seed": SEED,
        "sample": sample,
    }
    print("---", *(f"{key + ':':<18}{value}" for key, value in summary.items()), sep="\n", flush=True)


def main() -> int:
    try:
        run()
    except (UserError, prepare.EvaluationRefused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
