"""Model, loss, optimizer and schedules against independent formulas. Run: uv run pytest tests/test_train.py"""

import ast
import itertools
import json
import math
import os
import re
import time
from pathlib import Path

import kernels
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from train_fixtures import CLIMBMIX, build, one_thread

import train
from train import GPT, GPTConfig, MuonAdamW, UserError

TINY = GPTConfig(sequence_len=12, vocab_size=37, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")


@pytest.fixture(autouse=True)
def on_one_thread():
    with one_thread():
        yield


def shake(model: GPT) -> GPT:
    """Give the zero matrices values, so that every path counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def batch(config: GPTConfig, rows: int = 3, seed: int = 2):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(config.vocab_size, (2, rows, config.sequence_len), generator=generator)
    y[0, :5] = -1
    return x, y


# ---- Model ----


def reference_logits(state: dict, config: GPTConfig, tokens: list[int]) -> torch.Tensor:
    """One row, in float64, written from MODEL.md with a loop over positions and heads."""
    p = {name: tensor.double() for name, tensor in state.items()}
    T, L, D = len(tokens), config.n_layer, config.n_embd // config.n_head

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotary(x):  # (T, D)
        y = torch.empty_like(x)
        for t in range(T):
            for j in range(D // 2):
                angle = t * 10000 ** (-2 * j / D)
                a, b = x[t, j], x[t, j + D // 2]
                y[t, j] = a * math.cos(angle) + b * math.sin(angle)
                y[t, j + D // 2] = -a * math.sin(angle) + b * math.cos(angle)
        return y

    x = x0 = rms(p["transformer.wte.weight"][tokens])
    for i in range(L):
        x = p["resid_lambdas"][i] * x + p["x0_lambdas"][i] * x0
        h, a = rms(x), f"transformer.h.{i}.attn."
        q, k, v = (h @ p[a + f"c_{c}.weight"].T for c in "qkv")
        if (L - 1 - i) % 2 == 0:
            gate = 2 / (1 + torch.exp(-(h[:, :32] @ p[a + "ve_gate.weight"].T)))
            v = v + gate.repeat_interleave(D, dim=1) * p[f"value_embeds.{i}.weight"][tokens]
        letter = "L" if i == L - 1 else config.window_pattern[i % len(config.window_pattern)]
        window = config.sequence_len if letter == "L" else config.sequence_len // 2
        heads = []
        for head in range(config.n_head):
            kv = head // (config.n_head // config.n_kv_head)
            q_h = rms(rotary(q[:, head * D : head * D + D]))
            k_h = rms(rotary(k[:, kv * D : kv * D + D]))
            rows = []
            for t in range(T):
                first = max(0, t - window)
                weights = torch.softmax(k_h[first : t + 1] @ q_h[t] / math.sqrt(D), dim=0)
                rows.append(weights @ v[first : t + 1, kv * D : kv * D + D])
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, dim=1) @ p[a + "c_proj.weight"].T
        hidden = rms(x) @ p[f"transformer.h.{i}.mlp.c_fc.weight"].T
        x = x + hidden.clamp(min=0) ** 2 @ p[f"transformer.h.{i}.mlp.c_proj.weight"].T
    return 15 * torch.tanh(rms(x) @ p["lm_head.weight"].T / 15)


@pytest.mark.parametrize("config", [TINY, GPTConfig(12, 40, 2, 2, 1, 16, "SL")], ids=["tiny", "narrower than a gate"])
def test_forward_equals_a_float64_reference_with_windows_gates_and_grouped_queries(config):
    model = shake(build(config))
    x, _ = batch(config)
    expected = torch.stack([reference_logits(model.state_dict(), config, row.tolist()) for row in x])
    logits = model(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=1e-4)


def test_climbmix_model_has_the_stated_size_flops_and_windows():
    with torch.device("meta"):
        model = GPT(CLIMBMIX)
    assert model.num_params() == 50_332_176
    windows = [1024, 1024, 1024, 2048, 1024, 1024, 1024, 2048]
    assert train.window_sizes(CLIMBMIX) == windows
    looked_up = 8192 * 512 + 4 * 8192 * 512 + 2 * 8
    assert model.estimate_flops() == 6 * (50_332_176 - looked_up) + sum(12 * 4 * 128 * window for window in windows)


def test_window_pattern_takes_either_case_ends_with_the_whole_sequence_and_refuses_other_letters():
    assert train.window_sizes(GPTConfig(64, 8, 3, 1, 1, 32, "S")) == [32, 32, 64]
    assert train.window_sizes(GPTConfig(64, 8, 4, 1, 1, 32, "lS")) == [64, 32, 64, 64]
    for pattern in ("SX", ""):
        with pytest.raises(UserError, match=f"WINDOW_PATTERN '{pattern}' is not made of the letters S and L"):
            train.window_sizes(GPTConfig(64, 8, 3, 1, 1, 32, pattern))


def test_row_longer_than_the_rotary_table_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match=r"rows of 13 tokens, but the rotary table has 12 positions: build the model"):
        build(TINY)(torch.zeros(1, 13, dtype=torch.long))


def test_fresh_model_has_nanochats_names_and_the_stated_statistics():
    model = build(GPTConfig(64, 4096, 3, 2, 2, 256, "L"))
    layer = [f"transformer.h.{i}.{m}.weight" for i in range(3) for m in ("mlp.c_fc", "mlp.c_proj")]
    layer += [f"transformer.h.{i}.attn.c_{m}.weight" for i in range(3) for m in ("q", "k", "v", "proj")]
    value = [f"{name}.weight" for i in (0, 2) for name in (f"value_embeds.{i}", f"transformer.h.{i}.attn.ve_gate")]
    names = {"transformer.wte.weight", "lm_head.weight", "resid_lambdas", "x0_lambdas", *layer, *value}
    assert set(model.state_dict()) == names

    assert model.transformer.wte.weight.std().item() == pytest.approx(1, rel=0.01)
    assert model.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.01)
    assert model.lm_head.weight.mean().abs() < 1e-5
    assert torch.equal(model.resid_lambdas, torch.ones(3))
    assert torch.equal(model.x0_lambdas, torch.full((3,), 0.1))
    bound = math.sqrt(3) / math.sqrt(256)
    for name, p in model.named_parameters():
        if "c_proj" in name or "ve_gate" in name:
            assert not p.any(), name
        elif name.startswith(("transformer.h.", "value_embeds.")):
            assert 0.999 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01), name


@pytest.mark.parametrize("backend", ["sdpa_attention", pytest.param("flex_attention", marks=pytest.mark.slow), "flash"])
def test_exported_model_gives_the_same_logits_and_holds_only_torchs_operators(monkeypatch, backend):
    """An audit scores the graph where neither train.py nor its kernels are; whatever trained is exported as SDPA."""
    function = getattr(train, backend, lambda *_: pytest.fail("a kernel of the hub was exported"))
    config = GPTConfig(16, 40, 2, 2, 1, 32, "SL")
    model = shake(build(config)).eval()
    x, _ = batch(config)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(train, "attention_backend", function)
        monkeypatch.setattr(train, "_masks", {})
        graph = torch.export.export(model, (x,))
        torch.testing.assert_close(graph.module()(x), expected, rtol=1e-6, atol=1e-6)
    parts = [part for part in graph.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]  # autocast's too
    called = {str(node.target) for part in parts for node in part.graph.nodes if node.op == "call_function"}
    assert "aten.scaled_dot_product_attention.default" in called
    assert not [name for name in called if not name.startswith(("aten.", "wrap_with_autocast", "<built-in"))]
    assert train._masks == {}  # a mask of the tracer's would break the model later


def plain_loss(x, weight, targets):
    """15 tanh(product / 15) and cross-entropy as torch has it; autograd finds the gradients."""
    logits = 15 * torch.tanh(F.linear(x, weight) / 15)
    return F.cross_entropy(logits, targets, ignore_index=-1)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_loss_and_gradients_equal_the_plain_ones_in_float64(monkeypatch, chunk):
    monkeypatch.setattr(train, "LOSS_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator).requires_grad_()
    weight = (2 * torch.randn(50, 32, generator=generator)).requires_grad_()  # many products beyond the cap
    targets = torch.randint(50, (64,), generator=generator)
    targets[::9] = -1
    loss = train.ChunkedLoss.apply(x, weight, targets)
    expected = plain_loss(x.double(), weight.double(), targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(3 * loss, (x, weight))
    expected_grads = torch.autograd.grad(3 * expected, (x, weight))
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_loss_of_the_model_is_the_cross_entropy_of_its_logits():
    model = shake(build(TINY))
    x, y = batch(TINY)
    plain = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    expected = torch.autograd.grad(plain, list(model.parameters()))
    loss = model(x, y)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    for got, want in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_chunked_loss_in_bfloat16_autocast_is_close_and_keeps_the_types(monkeypatch):
    monkeypatch.setattr(train, "LOSS_CHUNK", 16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(50, 32, generator=generator).requires_grad_()
    targets = torch.randint(50, (64,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        loss = train.ChunkedLoss.apply(x, weight, targets)
    x_grad, weight_grad = torch.autograd.grad(loss, (x, weight))
    assert (loss.dtype, x_grad.dtype, weight_grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    expected_grads = torch.autograd.grad(plain_loss(x.float(), weight, targets), (x, weight))
    for got, want in zip((x_grad, weight_grad), expected_grads, strict=True):
        assert (got.float() - want.float()).norm() < 0.02 * want.float().norm()


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


def eager_flex_attention(q, k, v, window):
    mask = train.attention_mask("flex", q.size(1), window, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("window", [0, 1, 4, 8, 9, 10])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_sdpa_equals_brute_force_forward_and_gradient(window, kv_heads):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 10, h, 8, generator=generator).requires_grad_() for h in (4, kv_heads, kv_heads))
    seed = torch.randn(2, 10, 4, 8, generator=generator)
    y, expected = train.sdpa_attention(q, k, v, window), brute_force_attention(q, k, v, window)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad((y * seed).sum(), (q, k, v))
    for name, a, b in zip("qkv", got, torch.autograd.grad((expected * seed).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize("window", [1, 50, 150, 200])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_agrees_with_sdpa(window):
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 200, h, 16, generator=generator) for h in (4, 2, 2))
    torch.testing.assert_close(
        eager_flex_attention(q, k, v, window), train.sdpa_attention(q, k, v, window), atol=1e-5, rtol=1e-4
    )


@pytest.mark.slow
def test_flex_is_traced_into_one_graph_with_masks_that_were_built_before(monkeypatch):
    config = GPTConfig(128, 64, 2, 2, 2, 32, "SL")
    model = shake(build(config))
    x, _ = batch(config)
    expected = model(x)
    for window in train.window_sizes(config):
        train.attention_mask("flex", 128, window, x.device)
    monkeypatch.setattr(train, "attention_backend", train.flex_attention)
    masks = dict(train._masks)
    called = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with torch.no_grad():
        logits = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)(x)
    assert called.count("flex_attention") == config.n_layer  # compiled, it is not replaced as in an export
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert train._masks == masks
    # The compiler names the device with its index; a mask missed for that would be built and compiled once more.
    assert train.attention_mask("flex", 128, 128, torch.device("cpu:0")) is masks["flex", 128, 128, "cpu"]


def test_probe_accepts_sdpa_and_refuses_a_back_end_that_drops_the_window():
    cpu = torch.device("cpu")
    train.probe_attention(train.sdpa_attention, 64, 20, cpu)
    with pytest.raises(ValueError, match="output differs from SDPA by"):
        train.probe_attention(lambda q, k, v, window: train.sdpa_attention(q, k, v, 64), 64, 20, cpu)


def test_probe_refuses_a_wrong_gradient():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.1 * grad

    with pytest.raises(ValueError, match=r"dv differs from SDPA by 0\.1"):
        train.probe_attention(
            lambda q, k, v, window: train.sdpa_attention(q, k, Wrong.apply(v), window), 64, 20, torch.device("cpu")
        )


@pytest.mark.parametrize(
    ("works", "load_error"),
    [("flash-attention-3", None), ("flex", None), ("sdpa", None), ("flex", OSError("no such kernel"))],
)
def test_first_back_end_that_passes_its_probe_is_chosen_and_those_before_say_why(
    monkeypatch, capsys, works, load_error
):
    """On a CUDA device that is not there: compiler, masks and probe are stand-ins."""
    backends = {"flash-attention-3": lambda *_: None, "flex": train.flex_attention, "sdpa": train.sdpa_attention}
    masks = []

    def load():
        if load_error:
            raise load_error
        return backends["flash-attention-3"]

    def probe(backend, T, window, device):
        assert (T, window, device) == (12, 6, torch.device("cuda"))
        if backend is not backends[works]:
            raise ValueError("dv differs\nfrom SDPA by 0.5")

    monkeypatch.setattr(train, "COMPILE", True)
    monkeypatch.setattr(train, "attention_backend", None)
    monkeypatch.setattr(train, "load_flash_attention", load)
    monkeypatch.setattr(train, "probe_attention", probe)
    monkeypatch.setattr(train, "attention_mask", lambda kind, T, window, device: masks.append((kind, window)))
    monkeypatch.setattr(torch, "compile", lambda backend, dynamic: backend)
    assert train.choose_attention(TINY, torch.device("cuda")) == works
    assert train.attention_backend is backends[works]
    reason = "OSError: no such kernel" if load_error else "ValueError: dv differs from SDPA by 0.5"
    before = itertools.takewhile(lambda name: name != works, backends)
    assert capsys.readouterr().err.splitlines() == [f"attention: no {name}: {reason}" for name in before]
    for_flex = [("flex", 6), ("flex", 12)] if works != "flash-attention-3" else []
    assert masks == [("sdpa", 6), ("sdpa", 12), *for_flex]


@pytest.mark.parametrize(("device", "compiled"), [("cpu", True), ("mps", True), ("cuda", False)])
def test_sdpa_is_taken_without_a_trial_where_nothing_is_compiled_for_cuda(monkeypatch, capsys, device, compiled):
    monkeypatch.setattr(train, "COMPILE", compiled)
    monkeypatch.setattr(train, "attention_backend", None)
    monkeypatch.setattr(train, "attention_mask", lambda *_: None)
    monkeypatch.setattr(train, "load_flash_attention", lambda: pytest.fail("tried"))
    assert train.choose_attention(TINY, torch.device(device)) == "sdpa"
    assert (train.attention_backend, capsys.readouterr().err) == (train.sdpa_attention, "")


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
import train

def flash_attn_func(q, k, v, causal, window_size):
    assert causal and window_size[1] == 0
    return train.sdpa_attention(q, k, v, window_size[0]), "log-sum-exp"
"""


def test_flash_kernel_is_the_newest_local_one_and_the_hub_is_asked_only_where_none_loads(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(kernels, "get_kernel", lambda *args, **options: asked.append((args, options)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "empty"))
    train.load_flash_attention()
    assert asked == [(("kernels-community/flash-attn3",), {"version": 1})]

    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    fake_snapshot(tmp_path, "older", 1, age=50, body="raise ImportError('older')")
    fake_snapshot(tmp_path, "other", 2, age=1, body="raise ImportError('another version')")
    newest = fake_snapshot(tmp_path, "newest", 1, age=5, body=CALLS_SDPA)
    train.probe_attention(train.load_flash_attention(), 64, 20, torch.device("cpu"))
    assert (len(asked), capsys.readouterr().err) == (1, "")

    # An unfinished download, a damaged one: the hub is asked.
    fake_snapshot(tmp_path, "empty", 1, age=2, body="")
    (tmp_path / "kernels--kernels-community--flash-attn3/snapshots/empty/build/torch-universal/__init__.py").unlink()
    (newest / "build/torch-universal/metadata.json").write_text("{")
    train.load_flash_attention()
    assert len(asked) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1].split("/")[-1] for line in lines] == ["empty", "older"]


def test_flash_attention_is_not_even_looked_for_on_a_device_that_it_is_not_built_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    monkeypatch.setattr(train, "load_flash_kernel", lambda: pytest.fail("looked for"))
    with pytest.raises(ValueError, match=r"it is not built for compute capability 12\.0"):
        train.load_flash_attention()


# ---- Optimizer ----


def group_of(optimizer: MuonAdamW, parameter: torch.Tensor) -> dict:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def test_every_parameter_is_in_the_group_that_the_recipe_names():
    model = build(TINY)
    optimizer = model.setup_optimizer()
    scale = math.sqrt(768 / 64)
    expected = [
        (model.lm_head.weight, train.UNEMBEDDING_LR * scale, train.ADAM_BETAS),
        (model.transformer.wte.weight, train.EMBEDDING_LR * scale, train.ADAM_BETAS),
        (model.value_embeds["0"].weight, train.EMBEDDING_LR * scale, train.ADAM_BETAS),
        (model.value_embeds["2"].weight, train.EMBEDDING_LR * scale, train.ADAM_BETAS),
        (model.resid_lambdas, train.SCALAR_LR * 0.01, train.ADAM_BETAS),
        (model.x0_lambdas, train.SCALAR_LR, (0.96, 0.95)),
    ]
    for parameter, lr, betas in expected:
        group = group_of(optimizer, parameter)
        assert (group["kind"], group["initial_lr"], group["betas"]) == ("adamw", pytest.approx(lr), betas)
    for matrix in model.transformer.h.parameters():
        group = group_of(optimizer, matrix)
        assert (group["kind"], group["initial_lr"]) == ("muon", train.MATRIX_LR)
        assert {p.shape for p in group["params"]} == {matrix.shape}
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


def test_adamw_equals_torch_adamw_without_decay():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    optimizer = MuonAdamW([{"kind": "adamw", "params": [ours], "lr": 0.1, "betas": (0.8, 0.95)}])
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    for _ in range(5):
        ours.grad = torch.randn(5, 3)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_adamw_equals_the_formula_in_float64():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    p = parameter.detach().double()
    m = v = torch.zeros_like(p)
    optimizer = MuonAdamW([{"kind": "adamw", "params": [parameter], "lr": 0.05, "betas": (0.96, 0.95)}])
    for t in range(1, 8):
        parameter.grad = torch.randn(4, 6) * 10.0 ** (t - 11)  # from where eps counts to where it does not
        g = parameter.grad.double()
        optimizer.step()
        m, v = 0.96 * m + 0.04 * g, 0.95 * v + 0.05 * g * g
        p = p - 0.05 / (1 - 0.96**t) * m / ((v / (1 - 0.95**t)).sqrt() + 1e-10)
    torch.testing.assert_close(parameter.double(), p, rtol=1e-5, atol=1e-6)


def test_polar_express_flattens_the_spectrum():
    torch.manual_seed(0)
    tall = torch.linalg.svdvals(train.polar_express(torch.randn(2, 1024, 256)).float())
    wide = torch.linalg.svdvals(train.polar_express(torch.randn(2, 256, 1024)).float())
    square = torch.linalg.svdvals(train.polar_express(torch.randn(2, 256, 256)).float())
    for values in (tall, wide):
        assert values.min() > 0.85
        assert values.max() < 1.15
    assert square.max() < 1.15
    assert square.median() > 0.85  # the least ones reach down to 0.05 and below


POLAR_EXPRESS = """
8.156554524902461, -22.48329292557795, 15.878769915207462
4.042929935166739, -2.808917465908714, 0.5000178451051316
3.8916678022926607, -2.772484153217685, 0.5060648178503393
3.285753657755655, -2.3681294933425376, 0.46449024233003106
2.3465413258596377, -1.7097828382687081, 0.42323551169305323
"""


def polar_by_svd(u):
    """The polynomial applied to the singular values, in float64."""
    U, S, Vt = torch.linalg.svd(u.double(), full_matrices=False)
    s = S / (1.02 * S.norm(dim=-1, keepdim=True) + 1e-6)
    for line in POLAR_EXPRESS.split("\n")[1:-1]:
        a, b, c = map(float, line.split(","))
        s = a * s + b * s**3 + c * s**5
    return U @ torch.diag_embed(s) @ Vt


@pytest.mark.parametrize("shape", [(3, 96, 32), (3, 32, 96), (1, 1, 32)])
def test_polar_express_equals_its_polynomial_of_the_singular_values_in_float32_on_a_cpu(shape):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = polar_by_svd(u)
    torch.testing.assert_close(train.polar_express(u), expected, rtol=1e-9, atol=1e-9)
    got = train.polar_express(u.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)  # bfloat16 is about 1e-2 off


def reference_muon(p, g, m, r, lr, mu, wd):
    """One matrix, one step, in float64, from MODEL.md."""
    m = m + (1 - mu) * (g - m)
    X = polar_by_svd(g + mu * (m - g))
    rows, columns = X.shape
    mean = (X**2).mean(dim=1, keepdim=True) if rows >= columns else (X**2).mean(dim=0, keepdim=True)
    r = r + (1 - 0.95) * (mean - r)
    Y = X / r.clamp(min=1e-10).sqrt()
    X = Y * (X.norm() / Y.norm())
    lr = lr * math.sqrt(max(1, rows / columns))
    return p - lr * X - lr * wd * p * (X * p >= 0), m, r


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24), (2, 32), (1, 32)])
def test_muon_equals_a_float64_reference_over_steps(monkeypatch, shape):
    monkeypatch.setattr(train, "polar_express", polar_by_svd)  # independent of the product's rounding
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(2)]
    optimizer = MuonAdamW([{"kind": "muon", "params": params, "lr": 0.02}])
    p = [parameter.detach().double() for parameter in params]
    m = [torch.zeros_like(x) for x in p]
    r = [0.0 * x.mean(dim=1 if shape[0] >= shape[1] else 0, keepdim=True) for x in p]
    for step in range(4):
        mu, wd, lr = 0.85 + 0.02 * step, 0.2 - 0.01 * step, 0.02 * (step + 1)
        optimizer.param_groups[0].update(momentum=mu, weight_decay=wd, lr=lr)
        for i, parameter in enumerate(params):
            parameter.grad = torch.randn(shape, generator=generator) * (i + 1)
            p[i], m[i], r[i] = reference_muon(p[i], parameter.grad.double(), m[i], r[i], lr, mu, wd)
        optimizer.step()
        for i, parameter in enumerate(params):
            torch.testing.assert_close(parameter.detach().double(), p[i], rtol=1e-4, atol=1e-5)


def test_muon_leaves_a_matrix_alone_whose_gradient_is_zero():
    parameter = torch.nn.Parameter(torch.zeros(8, 4))
    optimizer = MuonAdamW([{"kind": "muon", "params": [parameter], "lr": 0.02}])
    parameter.grad = torch.zeros(8, 4)
    optimizer.step()
    assert not parameter.any()


# ---- Schedules ----


def test_learning_rate_warms_up_stays_and_warms_down(monkeypatch):
    for name, value in (("WARMUP_RATIO", 0.1), ("WARMDOWN_RATIO", 0.4), ("FINAL_LR_FRAC", 0.2)):
        monkeypatch.setattr(train, name, value)
    points = {0: 0, 0.05: 0.5, 0.1: 1, 0.5: 1, 0.6: 1, 0.8: 0.6, 1: 0.2}
    assert {p: pytest.approx(train.get_lr_multiplier(p)) for p in points} == points


def test_learning_rate_is_flat_without_warm_up_and_warmdown(monkeypatch):
    monkeypatch.setattr(train, "WARMUP_RATIO", 0.0)
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.0)
    assert [train.get_lr_multiplier(p) for p in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


def test_momentum_and_weight_decay_follow_their_lines():
    assert [train.get_muon_momentum(s) for s in (0, 150, 300, 9999)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert [train.get_weight_decay(p) / train.WEIGHT_DECAY for p in (0, 0.25, 1)] == pytest.approx([1, 0.75, 0])


def test_set_schedules_reaches_every_group(monkeypatch):
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.5)
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.0)
    optimizer = build(TINY).setup_optimizer()
    train.set_schedules(optimizer, step=150, progress=0.75)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["initial_lr"] / 2)
        if group["kind"] == "muon":
            assert group["momentum"] == pytest.approx(0.90)
            assert group["weight_decay"] == pytest.approx(train.WEIGHT_DECAY / 4)


# ---- Knobs ----

RECIPE = {  # MODEL.md's
    "ASPECT_RATIO": 64,
    "HEAD_DIM": 128,
    "WINDOW_PATTERN": "SSSL",
    "TOTAL_BATCH_SIZE": 2**19,
    "DEPTH": 8,
    "DEVICE_BATCH_SIZE": 64,
    "EMBEDDING_LR": 0.6,
    "UNEMBEDDING_LR": 0.004,
    "MATRIX_LR": 0.04,
    "SCALAR_LR": 0.5,
    "WEIGHT_DECAY": 0.2,
    "ADAM_BETAS": (0.8, 0.95),
    "WARMUP_RATIO": 0.0,
    "WARMDOWN_RATIO": 0.5,
    "FINAL_LR_FRAC": 0.0,
    "COMPILE": True,  # DESIGN.md's, for CUDA
}


def knob_blocks() -> list[str]:
    """The knobs of the large profiles, and what the small ones change."""
    section = Path(train.__file__).read_text().split("# ---- Knobs ----\n")[1].split("# ---- ")[0]
    return section.split("\nif PROFILE in ")


def knobs(block: str) -> dict:
    lines = re.findall(r"^ *([A-Z_]+) = (.+?)(?:  #.*)?$", block, re.MULTILINE)
    return {name: ast.literal_eval(value) for name, value in lines}


def test_knobs_of_the_large_profiles_are_the_recipes():
    large = knobs(knob_blocks()[0])
    assert {name: large.get(name) for name in RECIPE} == RECIPE


def test_every_knob_is_a_literal_that_says_its_unit_or_meaning():
    large, small = knob_blocks()
    meant = re.findall(r"^([A-Z_]+) = .+?  # \w", large, re.MULTILINE)
    assert meant == list(knobs(large))
    assert knobs(small).keys() < knobs(large).keys()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DEPTH", 0, "DEPTH 0 is below 1: set it to 1 or more"),
        ("DEVICE_BATCH_SIZE", 0, "DEVICE_BATCH_SIZE 0 is below 1: set it to 1 or more"),
        ("HEAD_DIM", 33, "HEAD_DIM 33 is odd, and rotary embedding turns two halves: set it to 34"),
        ("TOTAL_BATCH_SIZE", 1923, "TOTAL_BATCH_SIZE 1923 is not a multiple of MAX_SEQ_LEN 100: set it to 2000"),
    ],
)
def test_bad_knob_is_refused_with_name_value_and_remedy(monkeypatch, name, value, message):
    monkeypatch.setattr(train, "MAX_SEQ_LEN", 100)
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", 2000)
    monkeypatch.setattr(train, name, value)
    with pytest.raises(UserError) as error:
        train.model_config(100)
    assert str(error.value) == message


def test_width_is_rounded_up_to_whole_heads(monkeypatch):
    for name, value in (("DEPTH", 3), ("ASPECT_RATIO", 50), ("HEAD_DIM", 64)):
        monkeypatch.setattr(train, name, value)
    config = train.model_config(100)
    assert (config.n_embd, config.n_head, config.n_kv_head, config.n_layer) == (192, 3, 3, 3)
