"""train.py: a GPT, Muon + AdamW and the training loop. An experiment is an edit of this file.

    uv run train.py    # after: uv run prepare.py; AUTORESEARCH_PROFILE=pocket chooses another profile

It trains for TIME_BUDGET seconds on one device (CUDA, else MPS, else CPU) and lets prepare.py evaluate the result.
Shapes: B batch rows, T time, C model width, H query heads, Hkv key/value heads, D head size, V vocabulary, N = B·T;
K matrices of R rows. A suffix names a layout: q_BTHD, logits_BTV. The residual stream is plain x, (B, T, C).
Progress goes to stderr. The summary is the last thing on stdout, after a line `---`, one `key: value` a line:
val_bpb, training_seconds, total_seconds (from process start), peak_vram_mb (MiB; on a CPU the process's memory),
mfu_percent, total_tokens_M, num_steps, num_params_M, depth, startup_seconds, eval_seconds, seed, sample (text that the
trained model wrote), attention (the back-end that ran).
"""
# First: it starts the process's clock, and sets variables that torch reads when it is imported.
from harness.device import (
    PROCESS_STARTED,
    DeviceError,
    attention,
    check_driver,
    choose_attention,
    has_bfloat16,
    log,
    peak_flops,
    peak_memory_mb,
    prepare_compiler,
    warm_up,
    write_sample,
)

# isort: split
import gc
import math
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
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
LOSS_CHUNK = 131072  # tokens whose loss is computed at a time: more than a micro-step has is all at once
EMBEDDING_LR = 0.6  # wte and value embeddings (AdamW)
UNEMBEDDING_LR = 0.004  # lm_head (AdamW)
MATRIX_LR = 0.04  # matrices inside the layers (Muon)
SCALAR_LR = 0.5  # x0_lambdas; resid_lambdas take a hundredth of it (AdamW)
WEIGHT_DECAY = 0.2  # Muon only, falls linearly to 0
ADAM_BETAS = (0.8, 0.95)  # decay of the first and second moment
WARMUP_RATIO = 0.0  # fraction of the time budget in which the learning rate rises from 0
WARMDOWN_RATIO = 0.5  # fraction of the time budget in which it falls to FINAL_LR_FRAC
FINAL_LR_FRAC = 0.0  # fraction of the peak learning rate that is left at the end
COMPILE = True  # torch.compile the model and Muon's update

# CPU-sized values, in place of those above; without a GPU, for a profile of your own too
if PROFILE in ("pocket", "smoke") or (PROFILE not in ("climbmix", "code") and not torch.cuda.device_count()):
    DEPTH = 1
    ASPECT_RATIO = 128
    TOTAL_BATCH_SIZE = 3072
    LOSS_CHUNK = 256
    EMBEDDING_LR = 0.8
    UNEMBEDDING_LR = 0.005
    WEIGHT_DECAY = 0.1
    ADAM_BETAS = (0.9, 0.98)
    WARMDOWN_RATIO = 0.9
    FINAL_LR_FRAC = 0.05
    COMPILE = False  # True makes 1.3 times the steps on two cores; a run starts 20 s (cached) to 2 min later
    if not has_bfloat16(torch.device("cpu")):  # a step takes twice as long
        ASPECT_RATIO = 96
        HEAD_DIM = 96


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
        """Fill every parameter and buffer in place; on CUDA embeddings and rotary tables become bfloat16."""
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
        storage_type = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.cos = angle.cos().to(storage_type)
        self.sin = angle.sin().to(storage_type)
        self.transformer.wte.to(storage_type)
        self.value_embeds.to(storage_type)

    def trunk(self, idx: Tensor) -> Tensor:
        """idx int64 (B, T) to the normed residual stream (B, T, C) after the last layer."""
        T = idx.size(1)
        positions = self.cos.size(0)
        if idx.size(1) > positions:
            raise ValueError(
                f"idx has rows of {T} tokens, but the rotary table has {positions} positions: "
                "build the model with a larger sequence_len"
            )
        cos = self.cos[:T]
        sin = self.sin[:T]
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=has_bfloat16(idx.device)):
            x = norm(self.transformer.wte(idx))
            x0 = x
            for layer, block in enumerate(self.transformer.h):
                ve = None
                if str(layer) in self.value_embeds:
                    ve = self.value_embeds[str(layer)](idx)
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
                x = block(x, ve, cos, sin)
            return norm(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """idx int64 (B, T) to float32 logits (B, T, V); with targets int64 (B, T), -1 ignored, to the mean loss."""
        x = self.trunk(idx)
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=has_bfloat16(idx.device)):
            if targets is None:
                return head_logits(x, self.lm_head.weight)
            loss = 0.0  # a sum, LOSS_CHUNK tokens at a time: what a CPU computes then stays in its cache
            for x_NC, y_N in zip(x.flatten(0, 1).split(LOSS_CHUNK), targets.flatten().split(LOSS_CHUNK), strict=True):
                loss += F.cross_entropy(head_logits(x_NC, self.lm_head.weight), y_N, ignore_index=-1, reduction="sum")
            return loss / (targets != -1).sum()

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
    """About the nearest (semi-)orthogonal matrix to each of K, in bfloat16 where the device has units for it."""
    x = u_KRC.bfloat16() if has_bfloat16(u_KRC.device) else u_KRC
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


# ---- Schedules: functions of progress (fraction of the time budget that is used, 0 to 1) or of the step ----

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
    next_step_seconds = 0.0  # that a step may take
    smooth_loss = 0.0
    logged_at = -math.inf

    x, y, epoch = next(loader)  # the first batch starts the evaluator's clock
    now = training_seconds()
    while now + next_step_seconds <= TIME_BUDGET:
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
        next_step_seconds = max(step_seconds, 0.8 * next_step_seconds)  # a busy machine is slow at times
        is_last = now + next_step_seconds > TIME_BUDGET
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
def run() -> None:
    # -- Device, data, model --
    check_driver(may_use_cpu=PROFILE in ("pocket", "smoke"))
    device = torch.device(prepare.default_device())
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    log(f"profile {PROFILE} ({prepare.PROFILE_REASON}), {TIME_BUDGET:g} s on {device_name}, seed {SEED}")
    prepare.check_data()
    prepare.hold_device(device)
    tokenizer = prepare.Tokenizer.from_directory()
    config = model_config(tokenizer.get_vocab_size())
    log(str(config))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    compiled = COMPILE and device.type != "mps"
    if compiled:
        prepare_compiler(prepare.CACHE_ROOT / "compile", device)
    torch.manual_seed(SEED)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    backend = choose_attention(MAX_SEQ_LEN, window_sizes(config), HEAD_DIM, device, compiled)
    log(f"attention {backend}, compiled {compiled}, bfloat16 {has_bfloat16(device)}")
    optimizer = model.setup_optimizer(compiled)
    runner = torch.compile(model, dynamic=False) if compiled else model
    flops = model.estimate_flops()
    peak = peak_flops(device_name)
    mfu_per_speed = 100 * flops / peak if peak else 0.0  # percent, times tokens per second
    log(f"{model.num_params():,} parameters, {flops:,} FLOPs per token, peak {peak / 1e12:.0f} TFLOP/s (0: not known)")

    # -- Warm-up: compiles and runs what must not be timed, on state that is restored --
    forward = runner if compiled else model.trunk  # timed beside the loss; compiled it ends at the logits
    total_rows = TOTAL_BATCH_SIZE // MAX_SEQ_LEN
    kind = f"{backend}, {config}, {model.num_params()} parameters, {TOTAL_BATCH_SIZE=}, {LOSS_CHUNK=}"
    device_batch = warm_up(
        runner, forward, optimizer, config.vocab_size, MAX_SEQ_LEN, total_rows, DEVICE_BATCH_SIZE, compiled, kind
    )

    # -- Training --
    loader = prepare.make_dataloader(tokenizer, device_batch, MAX_SEQ_LEN, "train", device=device)
    startup_seconds = time.perf_counter() - PROCESS_STARTED
    num_steps = train(runner, optimizer, loader, device_batch, mfu_per_speed)
    num_tokens = num_steps * TOTAL_BATCH_SIZE

    # -- Evaluation --
    eval_started = time.perf_counter()
    val_bpb = prepare.evaluate_bpb(runner, tokenizer, device_batch)
    eval_seconds = time.perf_counter() - eval_started
    prompt = "def read_lines(path):\n" if PROFILE in ("code", "pocket", "smoke") else "The most important thing about"
    sample = write_sample(model, tokenizer, prompt, MAX_SEQ_LEN)
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
    except (UserError, DeviceError, prepare.EvaluationRefused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell counts Ctrl-C
    return 0


if __name__ == "__main__":
    sys.exit(main())
