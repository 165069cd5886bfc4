"""What a training run needs of its device, and nothing of the model or its training.

It stands beside train.py in every candidate's tree, and no agent edits it. train.py imports it first: this starts the
process's clock, and sets variables that torch reads when it is imported.
Order: attention and its back-ends, the compile cache, warm-up with the device batch that fits, what the summary says.
Shapes: B batch rows, T time, H query heads, D head size.
"""
# ruff: noqa: E402 (the process's clock starts before the slow imports, so that they are counted)
import os
import time

PROCESS_STARTED = time.perf_counter()
# At a barrier libgomp's threads spin before they sleep, and with its default number of spins they are slow where cores
# are shared.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Segments that can grow leave fewer holes in a GPU's memory when batches of different sizes have come and gone. On WSL
# drivers before R615 fail at the first one (pytorch/pytorch#192330).
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and "microsoft" not in os.uname().release.lower():
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
import contextlib
import gc
import hashlib
import re
import resource
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex


class DeviceError(Exception):
    """What a person or an agent can mend: the message says how."""


def log(message: str, end: str = "\n") -> None:
    print(message, end=end, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


LEAST_CAPABILITY = (8, 0)  # of a GPU; from there on Triton compiles bfloat16
CPU_FEATURES = torch.cpu.get_capabilities()
CPU_HAS_BFLOAT16 = CPU_FEATURES.get("avx512_bf16", False) or CPU_FEATURES.get("amx_bf16", False)


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are fast: on CUDA, and on CPUs with AVX-512 BF16 or AMX. Other CPUs emulate
    them, 35 to 80 times slower than float32."""
    return device.type == "cuda" or (device.type == "cpu" and CPU_HAS_BFLOAT16)


def check_driver(may_use_cpu: bool) -> None:
    """Raise DeviceError for a GPU that torch cannot start (a GPU's model would train on the CPU for hours), and for one
    without bfloat16 (the compiler would build nothing, and say nothing).

    The driver's management library counts devices even when the driver is too old for torch's CUDA.
    """
    if torch.cuda.device_count() == 0:
        return
    try:
        torch.cuda.init()
    except RuntimeError as error:
        if may_use_cpu:
            return
        problem = f"a GPU is there, but torch {torch.__version__} cannot start it: {one_line(error)}"
        remedy = "update the NVIDIA driver, or train on the CPU with AUTORESEARCH_PROFILE=pocket"
        raise DeviceError(f"{problem}: {remedy}") from error
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        problem = "compute capability {}.{} has no bfloat16".format(*capability)
        raise DeviceError(f"{problem}: train on the CPU with CUDA_VISIBLE_DEVICES= AUTORESEARCH_PROFILE=pocket")


# ---- Attention: one function, three back-ends ----
FLASH_REPO = "kernels-community/flash-attn3"  # on the Hugging Face hub
FLASH_VERSION = 1  # of the kernel; its revision stands in the back-end's name
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


def load_flash_attention() -> tuple[str, Callable]:
    """Name and function of FlashAttention-3 (arXiv 2407.08608), which skips what a window hides and is the fastest on
    an H100. It comes from the local cache alone: no hiccup of a network may move a run to a slower back-end."""
    capability = torch.cuda.get_device_capability()
    if capability[0] not in FLASH_CAPABILITIES:
        raise ValueError("it is not built for compute capability {}.{}".format(*capability))
    from huggingface_hub.constants import HF_HUB_CACHE  # both here: only a GPU needs them
    from kernels import get_local_kernel

    cache = Path(os.environ.get("KERNELS_CACHE") or HF_HUB_CACHE)
    snapshots = cache.glob(f"kernels--{FLASH_REPO.replace('/', '--')}/snapshots/*")
    for snapshot in sorted(snapshots, key=lambda path: path.stat().st_mtime):  # the oldest: a later one changes no tag
        try:
            kernel = get_local_kernel(snapshot)
            break
        except Exception as error:  # an unfinished download, or a build for another torch
            log(f"attention: no kernel in {snapshot}: {one_line(error)}")
    else:
        raise FileNotFoundError("its kernel is not on this machine: 'uv run prepare.py' fetches it")

    def flash_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int) -> Tensor:
        y = kernel.flash_attn_func(q_BTHD, k_BTHD, v_BTHD, causal=True, window_size=(window, 0))
        return y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp too

    return f"flash-attention-3@{snapshot.name[:7]}", flash_attention  # the folder's name is the revision


def fetch_attention_kernel() -> None:
    """Fetch the attention kernel for this machine's GPU, unless one is here that works. For prepare.py.

    Where there is none a line on stderr says why: a run trains without it too, slower.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            load_flash_attention()
            return
        from kernels import get_kernel

        get_kernel(FLASH_REPO, version=FLASH_VERSION)
    except Exception as error:  # not built for this GPU or this torch, no network
        log(f"note: no attention kernel was fetched ({one_line(error)})")


def probe_attention(backend: Callable, T: int, window: int, head_dim: int, device: torch.device) -> None:
    """Raise unless `backend` agrees with SDPA on a small forward and backward on the real device."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, T, 2, head_dim)
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


def choose_attention(T: int, windows: list[int], head_dim: int, device: torch.device, compiled: bool) -> str:
    """Select the first back-end that works on `device`, build the masks, return its name. CPU and MPS take SDPA."""
    global attention_backend
    on_cuda = device.type == "cuda"
    for window in sorted(set(windows)):
        attention_mask("sdpa", T, window, device)
        if on_cuda and compiled:
            attention_mask("flex", T, window, device)
    loaders = [("flash-attention-3", load_flash_attention)] if on_cuda else []
    if on_cuda and compiled:
        loaders.append(("flex", lambda: ("flex", flex_attention)))
    for kind, load in loaders:
        try:
            name, attention_backend = load()
            to_probe = torch.compile(attention_backend, dynamic=False) if compiled else attention_backend
            probe_attention(to_probe, T, min(windows), head_dim, device)
            return name
        except Exception as error:  # whatever it was, the next one is tried
            log(f"attention: no {kind}: {one_line(error)}")
    attention_backend = sdpa_attention
    return "sdpa"


# ---- The compile cache: torch's compilers keep their work there between runs ----
COMPILE_CACHE_LIMIT = 1e9  # bytes; a model leaves about 90 MB, and every run starts with a copy
COMPILERS_NAMES = r"triton|fxgraph|aotautograd|[0-9a-z]{2}"  # of their folders; nothing else is touched


def prepare_compiler(folder: Path, device: torch.device) -> None:
    """Let torch.compile keep its work in `folder`, unless the environment names another one, and try it.

    Raises DeviceError where not even a single small kernel can be built.
    """
    folder = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder)))
    limit_compile_cache(folder)
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(16, device=device))
    except Exception as error:
        remedy = (
            "install gcc and Python's headers (apt install gcc python3-dev), set TRITON_PTXAS_PATH to the ptxas of a "
            "CUDA toolkit for this GPU, or COMPILE = False in train.py"
        )
        problem = f"torch.compile builds no kernel for this {device.type}"
        raise DeviceError(f"{problem}: {remedy} ({one_line(error)})") from error


def limit_compile_cache(folder: Path, limit: float = COMPILE_CACHE_LIMIT) -> None:
    """Empty a compile cache that is over its limit: the next runs compile again."""
    size = 0
    with contextlib.suppress(OSError):  # another run replaces files: the next one looks again
        size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    if size <= limit:
        return
    log(f"{folder} holds {size / 1e9:.0f} GB: it is emptied")
    for path in folder.iterdir():
        if re.fullmatch(COMPILERS_NAMES, path.name):
            shutil.rmtree(path, ignore_errors=True)


# ---- Warm-up: what must not be timed, on state that is restored ----


def fit_device_batch(trial: Callable[[int], None], total_rows: int, upper_bound: int) -> int:
    """The largest divisor of total_rows, up to upper_bound, for which trial(rows) has memory; the bound is halved."""
    while True:
        rows = max(divisor for divisor in range(1, upper_bound + 1) if total_rows % divisor == 0)
        try:
            trial(rows)
            return rows
        except RuntimeError as error:  # CUDA's is a class of its own, of MPS and CPU only the words tell
            if not re.search("out of memory|allocate memory|STATUS_ALLOC_FAILED", str(error)):
                raise
            if rows == 1:
                raise DeviceError(f"one row runs out of memory: make the model smaller ({one_line(error)})") from error
        log(f"out of memory with {rows} rows per micro-step: halving them")
        torch.compiler.reset()  # else torch stops compiling: it does so for a few sizes of a function, and no more
        upper_bound = rows // 2


def fit_note(kind: str) -> Path:
    """The file beside the compile cache that remembers which device batch fitted a kind of run: every size that fails
    costs a compilation. A GPU with other free memory has a note of its own."""
    free_bytes, _ = torch.cuda.mem_get_info()
    kind = f"{torch.cuda.get_device_name()}, {free_bytes / 2**30:.0f} GiB free, {kind}"
    digest = hashlib.sha256(kind.encode()).hexdigest()
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], f"fit-{digest[:16]}.txt")


def choose_threads(micro_step: Callable[[], None]) -> None:
    """Set the number of CPU threads with which micro_step is faster now: all, or half of them.

    Threads wait for each other, so that one busy core holds up all of them: where another process used one of two
    cores, a step of the pocket profile took 145 ms on one thread and 200 ms on two. Fewer are taken only where they
    are 10% faster, so that every run on an idle machine makes the same choice.
    """
    every = torch.get_num_threads()
    half = max(1, every // 2)
    medians = {}
    for count in (every, half):
        torch.set_num_threads(count)
        micro_step()  # not timed: the first one with a number of threads starts or ends some
        medians[count] = statistics.median(seconds_of(micro_step) for _ in range(3))
    chosen = half if medians[half] < 0.9 * medians[every] else every
    torch.set_num_threads(chosen)
    log(f"threads: {chosen} of {every}")


def seconds_of(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def time_step(
    model: nn.Module, forward: Callable, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> dict[str, float]:
    """Milliseconds of each part of a micro-step, and of the optimizer's step: medians of three.

    forward(x) is run as in evaluation, without a gradient. The loss is what model(x, y) takes beyond it.
    """
    seconds = {"forward": [], "loss": [], "backward": [], "optimizer": []}
    losses = []
    for _ in range(3):
        with torch.no_grad():
            model.eval()
            seconds["forward"].append(seconds_of(lambda: forward(x)))
        model.train()
        seconds["loss"].append(seconds_of(lambda: losses.append(model(x, y))))
        seconds["backward"].append(seconds_of(lambda: losses.pop().backward()))
        seconds["optimizer"].append(seconds_of(optimizer.step))
        optimizer.zero_grad(set_to_none=True)
    milliseconds = {part: 1000 * statistics.median(values) for part, values in seconds.items()}
    milliseconds["loss"] = max(0.0, milliseconds["loss"] - milliseconds["forward"])
    return milliseconds


def warm_up(
    model: nn.Module,
    forward: Callable,
    optimizer: torch.optim.Optimizer,
    vocab_size: int,
    row_length: int,
    total_rows: int,
    upper_bound: int,
    compiled: bool,
    kind: str,
) -> int:
    """Compile and run on random tokens what training and evaluation will run; say where a step's time goes; return the
    device batch that fits: a divisor of total_rows, at most upper_bound.

    Parameters and buffers are left as they were found, the (fresh) optimizer without state. `kind` is what the batch
    that fits depends on: model, back-end, hyperparameters. `forward` is what is timed as the model without its loss.
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
        elif device.type == "mps":
            torch.mps.empty_cache()

    def random_batch(rows: int) -> Tensor:
        return torch.randint(vocab_size, (rows, row_length), device=device)

    def trial(rows: int) -> None:
        forget()
        x = random_batch(rows)
        y = random_batch(rows)
        for _ in range(2):  # the second micro-step accumulates
            model(x, y).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = model(x)
            again = model(x)
            (logits[:4] - again[:4]).abs()  # the evaluator compares two results, a few rows at a time

    note = fit_note(f"{kind}, at most {upper_bound} rows") if device.type == "cuda" and compiled else None
    if note is not None:
        with contextlib.suppress(OSError, ValueError):  # no such run yet, or a damaged file
            upper_bound = min(upper_bound, int(note.read_text()))
    rows = fit_device_batch(trial, total_rows, upper_bound)
    if note is not None:
        note.write_text(str(rows))
    forget()
    x = random_batch(rows)
    y = random_batch(rows)
    if device.type == "cpu" and not compiled:  # compiled code has its number of threads written into it
        choose_threads(lambda: model(x, y).backward())
    parts = [f"{part} {ms:.3g}" for part, ms in time_step(model, forward, optimizer, x, y).items()]
    log(f"milliseconds of a micro-step of {rows} rows: {', '.join(parts)} (once a step)")
    forget()
    with torch.no_grad():
        torch._foreach_copy_(tensors, initial)
    return rows


# ---- What the summary says ----
PEAK_TFLOPS = {  # dense bf16, by a word in the device's name; the first match counts
    "B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "GH200": 989, "H200": 989, "H20": 148, "A100": 312,
    "A40": 150, "A10": 125, "L40S": 362, "L4": 121, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_flops(device_name: str) -> float:
    """FLOP/s, 0.0 where the table has none."""
    for word, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{word}\b(?! (Laptop|D\b|Ti\b|NVL))", device_name):
            return 1e12 * tflops
    return 0.0


def peak_memory_mb(device: torch.device) -> float:
    """MiB: torch's own peak on CUDA, what the driver holds now on MPS, on a CPU the peak of the process's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB here


@torch.no_grad()
def write_sample(model: nn.Module, tokenizer, prompt: str, row_length: int, characters: int = 200) -> str:
    """A text that starts with the prompt, on one line; the same for the same weights.

    The score counts, not the sample: where the model cannot write one, "" and a line on stderr.
    """
    device = next(model.parameters()).device
    bos = tokenizer.get_bos_token_id()
    tokens = tokenizer.encode(prompt)
    generator = torch.Generator().manual_seed(0)
    try:
        while len(tokens) < row_length - 1 and len(tokenizer.decode(tokens)) < characters:
            idx = torch.tensor([[bos, *tokens]], device=device)
            logits_V = model(idx)[0, -1].float().cpu()
            probabilities_V = torch.softmax(logits_V / 0.7, dim=-1)  # below 1 the likely tokens become likelier
            token = torch.multinomial(probabilities_V, 1, generator=generator).item()
            if token == bos:  # the end of the document
                break
            tokens.append(token)
    except Exception as error:
        log(f"no sample: {one_line(error)}")
        return ""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in tokenizer.decode(tokens))
