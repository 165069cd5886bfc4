"""harness/device.py: what a run needs of its device. Run: uv run pytest tests/test_train_device.py"""

import json
import math
import os
import time
from pathlib import Path

import kernels
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from train_fixtures import SMALL, batch, build, in_float32_on_one_thread, shaken  # noqa: F401 (a fixture)

import prepare
import train
from harness import device
from harness.device import DeviceError
from train import GPT

CPU = torch.device("cpu")
CUDA = torch.device("cuda")

# ---- Attention ----


def brute_force_attention(q, k, v, window):
    """Loops over rows, heads and queries, in float64."""
    B, T, H, D = q.shape
    q, k, v = q.double(), k.double(), v.double()
    y = []
    for b in range(B):
        for t in range(T):
            for h in range(H):
                kv, first = h // (H // k.size(2)), max(0, t - window)
                weights = torch.softmax(k[b, first : t + 1, kv] @ q[b, t, h] / math.sqrt(D), dim=0)
                y.append(weights @ v[b, first : t + 1, kv])
    return torch.stack(y).view(B, T, H, D)


def random_qkv(B, T, kv_heads, D):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(B, T, h, D, generator=generator).requires_grad_() for h in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize(("window", "kv_heads"), [(0, 1), (1, 4), (4, 2), (9, 1), (10, 4)])
def test_sdpa_equals_brute_force_forward_and_gradient(window, kv_heads):
    qkv = random_qkv(2, 10, kv_heads, 8)
    y, expected = device.sdpa_attention(*qkv, window), brute_force_attention(*qkv, window)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    seed = torch.arange(y.numel()).view(y.shape).sin()
    got, want = (torch.autograd.grad((each * seed).sum(), qkv) for each in (y, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 50, 150, 200])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_mask_agrees_with_sdpa(window):
    qkv = [t.detach() for t in random_qkv(1, 200, 2, 16)]
    mask = device.attention_mask("flex", 200, window, CPU)
    y = flex_attention(*(t.transpose(1, 2) for t in qkv), block_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(y, device.sdpa_attention(*qkv, window), atol=1e-5, rtol=1e-4)


def test_exported_model_gives_the_same_logits_and_holds_only_torchs_operators(monkeypatch):
    """An audit scores the graph where neither train.py nor its kernels are; whatever trained is exported as SDPA."""
    model = shaken(SMALL).eval()
    x, _ = batch(SMALL)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(device, "attention_backend", lambda *_: pytest.fail("a kernel of the hub was exported"))
        monkeypatch.setattr(device, "_masks", {})
        graph = torch.export.export(model, (x,)).run_decompositions({})  # writes out what autocast does
        torch.testing.assert_close(graph.module()(x), expected, rtol=1e-6, atol=1e-6)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert "aten.scaled_dot_product_attention.default" in called
    assert not [name for name in called if not name.startswith("aten.")]
    assert device._masks == {}  # a mask of the tracer's would break the model later


class Wrong(torch.autograd.Function):
    """The identity, with a gradient that is ten per cent off."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.1 * grad


WRONG_BACKENDS = {
    "output differs from SDPA by": lambda q, k, v, window: device.sdpa_attention(q, k, v, 64),
    r"dv differs from SDPA by 0\.1": lambda q, k, v, window: device.sdpa_attention(q, k, Wrong.apply(v), window),
}


def test_probe_accepts_sdpa_and_refuses_a_back_end_that_drops_the_window_or_has_a_wrong_gradient():
    device.probe_attention(device.sdpa_attention, 64, 20, 48, CPU)
    for reason, backend in WRONG_BACKENDS.items():
        with pytest.raises(ValueError, match=reason):
            device.probe_attention(backend, 64, 20, 48, CPU)


@pytest.mark.parametrize(
    ("compiled", "works", "failed"),
    [
        (True, "flash-attention-3@abc1234", []),
        (True, "flex", ["flash-attention-3"]),
        (True, "sdpa", ["flash-attention-3", "flex"]),
        (False, "sdpa", ["flash-attention-3"]),
    ],
)
def test_first_back_end_that_passes_its_probe_is_chosen_and_those_before_say_why(
    monkeypatch, capsys, compiled, works, failed
):
    """On a CUDA device that is not there: compiler, masks and probe are stand-ins."""
    functions = {"flash-attention-3@abc1234": print, "flex": device.flex_attention, "sdpa": device.sdpa_attention}

    def probe(backend, T, window, head_dim, where):
        assert (T, window, head_dim, where) == (12, 6, 32, CUDA)
        if backend is not functions[works]:
            raise ValueError("dv differs\nfrom SDPA by 0.5")

    monkeypatch.setattr(device, "attention_backend", None)
    monkeypatch.setattr(device, "load_flash_attention", lambda: ("flash-attention-3@abc1234", print))
    monkeypatch.setattr(device, "probe_attention", probe)
    monkeypatch.setattr(device, "attention_mask", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda backend, dynamic: backend)
    assert device.choose_attention(12, [6, 12], 32, CUDA, compiled) == works
    assert device.attention_backend is functions[works]
    told = [f"attention: no {kind}: ValueError: dv differs from SDPA by 0.5" for kind in failed]
    assert capsys.readouterr().err.splitlines() == told


def fake_snapshot(cache: Path, commit: str, version: int, age: float, body: str) -> Path:
    """A kernel as the hub's local cache holds it: one build variant, no refs."""
    snapshot = cache / "kernels--kernels-community--flash-attn3" / "snapshots" / commit
    build = snapshot / "build" / "torch-universal"
    build.mkdir(parents=True)
    metadata = {"id": f"flash_attn3_{commit}", "name": "flash-attn3", "version": version, "license": "BSD-3-Clause"}
    metadata |= {"python-depends": [], "backend": {"type": "cuda"}}
    (build / "metadata.json").write_text(json.dumps(metadata))
    (build / "__init__.py").write_text(body)
    os.utime(snapshot, (time.time() - age, time.time() - age))
    return snapshot


CALLS_SDPA = """
from harness import device

def flash_attn_func(q, k, v, causal, window_size):
    assert causal and window_size[1] == 0
    return device.sdpa_attention(q, k, v, window_size[0]), "log-sum-exp"
"""


def test_kernel_is_fetched_once_and_a_run_takes_the_newest_that_loads_and_names_its_revision(
    monkeypatch, tmp_path, capsys
):
    """On a GPU that the kernel is built for, with an empty local cache of kernels."""
    asked = []

    def get_kernel(*args, **options):
        asked.append((args, options))
        fake_snapshot(tmp_path, "0123456789older", 1, age=50, body=CALLS_SDPA)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    with pytest.raises(FileNotFoundError, match=r"not on this machine: 'uv run prepare\.py' fetches it"):
        device.load_flash_attention()
    for _ in range(2):
        assert device.fetch_attention_kernel() == "flash-attention-3@0123456"
    assert asked == [(("kernels-community/flash-attn3",), {"version": 1})]
    fake_snapshot(tmp_path, "fedcba9876newer", 1, age=5, body=CALLS_SDPA)
    fake_snapshot(tmp_path, "other", 2, age=1, body="raise ImportError('another version')")
    damaged = fake_snapshot(tmp_path, "damaged", 1, age=1, body="raise ImportError('for another torch')")
    name, backend = device.load_flash_attention()
    assert name == "flash-attention-3@fedcba9"
    told = capsys.readouterr().err
    assert told.startswith(f"attention: no kernel in {damaged}: ") and told.count("\n") == 1
    device.probe_attention(backend, 64, 20, 48, CPU)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert device.fetch_attention_kernel() == ""
    with pytest.raises(ValueError, match=r"it is not built for compute capability 12\.0"):
        device.load_flash_attention()


# ---- The compiler and its cache ----


def test_compiler_that_builds_no_kernel_is_one_error_line_with_both_remedies(monkeypatch, tmp_path):
    def compile_nothing(function):
        raise RuntimeError("PTXASError: ptxas fatal\n: Value 'sm_121a' is not defined for option 'gpu-name'")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 1))
    with pytest.raises(DeviceError) as error:
        device.prepare_compiler(tmp_path, CUDA)
    assert str(error.value) == (
        "torch.compile builds no kernel for this cuda: set COMPILE = False in train.py, or TRITON_PTXAS_PATH to the "
        "ptxas of a CUDA toolkit that knows compute capability 12.1 (RuntimeError: PTXASError: ptxas fatal : Value "
        "'sm_121a' is not defined for option 'gpu-name')"
    )


def test_compile_cache_over_its_limit_is_emptied_of_what_compilers_wrote_and_of_nothing_else(tmp_path, capsys):
    for name in ("triton/0/KEY/kernel.cubin", "ab/code.py", "fxgraph/ab/key/graph", "fit-0123.txt", "thesis/one.tex"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
    device.limit_compile_cache(tmp_path, limit=500)
    assert (len(list(tmp_path.iterdir())), capsys.readouterr().err) == (5, "")
    device.limit_compile_cache(tmp_path, limit=499)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit-0123.txt", "thesis"]
    assert capsys.readouterr().err == f"{tmp_path} holds 0 GB: it is emptied\n"


# ---- Warm-up ----


def test_device_batch_halves_until_it_fits_and_divides_the_total_and_one_row_is_the_least():
    tried = []

    def trial(rows, limit=3):
        tried.append(rows)
        if rows > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    assert device.fit_device_batch(trial, total_rows=48, upper_bound=30) == 3
    assert tried == [24, 12, 6, 3]
    assert device.fit_device_batch(lambda rows: None, total_rows=7, upper_bound=4) == 1
    with pytest.raises(DeviceError, match=r"^one row runs out of memory: make the model smaller .*Tried to allocate"):
        device.fit_device_batch(lambda rows: trial(rows, limit=0), 8, 8)


class Hungry(GPT):
    """Runs out of memory above two rows, in the backward pass, after it changed things."""

    def forward(self, idx, targets=None):
        loss = super().forward(idx, targets)
        if targets is not None and len(idx) > 2:
            with torch.no_grad():
                self.lm_head.weight.add_(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss


@pytest.mark.parametrize(("kind", "rows"), [(GPT, 8), (Hungry, 2)])
def test_warm_up_trains_and_evaluates_says_where_time_goes_and_leaves_no_trace(capsys, kind, rows):
    model = build(SMALL, kind=kind)
    optimizer = model.setup_optimizer()
    tensors = [*model.parameters(), *model.buffers()]
    before = [t.detach().clone() for t in tensors]
    head = model.lm_head.weight.detach().clone()
    changed, step = [], optimizer.step
    optimizer.step = lambda: (step(), changed.append(not torch.equal(model.lm_head.weight, head)))
    assert device.warm_up(model, model, optimizer, 31, 16, total_rows=8, upper_bound=8, compiled=False, kind="") == rows
    assert changed and all(changed)  # real steps were made, and undone
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert model.training and not optimizer.state and all(p.grad is None for p in model.parameters())
    *halved, threads, times = capsys.readouterr().err.splitlines()
    assert halved == [f"out of memory with {n} rows per micro-step: halving them" for n in (8, 4) if n > rows]
    assert threads == "threads: 1 of 1"
    assert times.startswith(f"milliseconds of a micro-step of {rows} rows: forward ")
    parts = [part.split()[0] for part in times.split(": ")[1].split(", ")]
    assert parts == ["forward", "loss", "backward", "optimizer"]


# ---- A GPU that torch cannot start ----


def test_driver_too_old_is_one_error_line_with_both_versions_but_for_a_profile_of_the_cpu(monkeypatch, capsys):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040). Please update it")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(prepare, "default_device", lambda: pytest.fail("went on"))
    monkeypatch.setattr(train, "PROFILE", "climbmix")
    assert train.main() == 1
    assert capsys.readouterr().err == (
        f"error: a GPU is there, but torch {torch.__version__} needs CUDA 13.0: its driver supports CUDA 12.4, which "
        "is too old: update the NVIDIA driver, or train on the CPU with AUTORESEARCH_PROFILE=pocket\n"
    )
    device.check_driver(may_use_cpu=True)
    assert capsys.readouterr().err.startswith("training on the CPU: a GPU is there, but")


# ---- What the summary says ----


class Letters:
    """A tokenizer: a character is its own token, and 0 begins a document."""

    def get_bos_token_id(self):
        return 0

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


class Bigrams(torch.nn.Module):
    """A model whose next token depends on the last alone; `rows` are what it was called with."""

    def __init__(self, **successors: str):
        super().__init__()
        self.rows = []
        self.scores_VV = torch.nn.Parameter(torch.zeros(128, 128))
        for last, following in successors.items():
            self.scores_VV.data[ord(last), ord(following)] = 1e4

    def forward(self, idx):
        self.rows += idx.tolist()
        return self.scores_VV[idx]


def test_sample_continues_its_prompt_on_one_line_until_it_is_long_enough_or_the_document_or_the_row_ends(capsys):
    model = Bigrams(t="a", a="\n", **{"\n": "a"})
    assert device.write_sample(model, Letters(), "a\nt", row_length=64, characters=8) == r"a\nta\na\na"
    assert model.rows[0] == [0, *map(ord, "a\nt")]
    assert device.write_sample(Bigrams(t="a", a="b", b="\0"), Letters(), "t", 64) == "tab"
    model = Bigrams(t="a", a="a")
    assert device.write_sample(model, Letters(), "t", 64) == "t" + "a" * 62
    assert max(map(len, model.rows)) == 63
    assert device.write_sample(torch.nn.Linear(1, 1), Letters(), "t", 64) == ""
    assert capsys.readouterr().err.startswith("no sample: RuntimeError: ")


def test_peak_of_a_device_is_found_by_whole_words():
    peaks = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A10": 125}
    for name, tflops in (peaks | {"NVIDIA RTX A4000": 0, "cpu": 0}).items():
        assert device.peak_flops(name) == tflops * 1e12, name
