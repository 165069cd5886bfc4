"""Model, loss, optimizer and schedules against independent formulas. Run: uv run pytest tests/test_train.py"""

import math

import pytest
import torch
import torch.nn.functional as F
from train_fixtures import CLIMBMIX, batch, build, in_float32_on_one_thread, shaken  # noqa: F401 (a fixture)

import train
from harness import device
from train import GPT, GPTConfig, MuonAdamW, UserError

TINY = GPTConfig(sequence_len=12, vocab_size=37, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")


def set_knobs(monkeypatch, **knobs):
    for name, value in knobs.items():
        monkeypatch.setattr(train, name, value)


# ---- Model ----


def reference_logits(state: dict, config: GPTConfig, tokens: list[int]) -> torch.Tensor:
    """One row, in float64, written from MODEL.md with a loop over heads."""
    p = {name: tensor.double() for name, tensor in state.items()}
    T, L, D = len(tokens), config.n_layer, config.n_embd // config.n_head
    positions = torch.arange(T, dtype=torch.float64)
    angles = torch.outer(positions, 10000 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D))
    distance = positions[:, None] - positions

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotary(x):  # (T, D), its halves as the two parts of complex numbers
        turned = torch.complex(x[:, : D // 2], x[:, D // 2 :]) * torch.exp(-1j * angles)
        return torch.cat([turned.real, turned.imag], dim=1)

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
        hidden = (distance < 0) | (distance > window)
        heads = []
        for head in range(config.n_head):
            kv = head // (config.n_head // config.n_kv_head)
            q_h = rms(rotary(q[:, head * D : head * D + D]))
            k_h = rms(rotary(k[:, kv * D : kv * D + D]))
            scores = (q_h @ k_h.T / math.sqrt(D)).masked_fill(hidden, -math.inf)
            heads.append(torch.softmax(scores, dim=1) @ v[:, kv * D : kv * D + D])
        x = x + torch.cat(heads, dim=1) @ p[a + "c_proj.weight"].T
        hidden = rms(x) @ p[f"transformer.h.{i}.mlp.c_fc.weight"].T
        x = x + hidden.clamp(min=0) ** 2 @ p[f"transformer.h.{i}.mlp.c_proj.weight"].T
    return 15 * torch.tanh(rms(x) @ p["lm_head.weight"].T / 15)


@pytest.mark.parametrize("config", [TINY, GPTConfig(12, 40, 2, 2, 1, 16, "SL")], ids=["tiny", "narrower than a gate"])
def test_forward_equals_a_float64_reference_with_windows_gates_and_grouped_queries(config):
    model = shaken(config)
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


def test_fresh_model_has_the_stated_statistics():
    model = build(GPTConfig(64, 4096, 3, 2, 2, 256, "L"))
    assert model.transformer.wte.weight.std().item() == pytest.approx(1, rel=0.01)
    assert model.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.01)
    assert torch.equal(model.resid_lambdas, torch.ones(3))
    assert torch.equal(model.x0_lambdas, torch.full((3,), 0.1))
    bound = math.sqrt(3) / math.sqrt(256)
    for name, p in model.named_parameters():
        if "c_proj" in name or "ve_gate" in name:
            assert not p.any(), name
        elif name.startswith(("transformer.h.", "value_embeds.")):
            assert 0.999 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01), name


@pytest.mark.parametrize("chunk", [7, 1000])
def test_loss_and_gradients_equal_those_of_the_softcapped_cross_entropy_in_float64(monkeypatch, chunk):
    monkeypatch.setattr(train, "LOSS_CHUNK", chunk)
    model = shaken(TINY)
    x, y = batch(TINY)
    loss = model(x, y)
    precise = build(TINY).double()
    precise.load_state_dict(model.state_dict())
    monkeypatch.setattr(train, "head_logits", lambda x, weight: 15 * torch.tanh(F.linear(x, weight) / 15))
    expected = F.cross_entropy(precise(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for got, want in zip(grads, torch.autograd.grad(expected, list(precise.parameters())), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-5)


def test_bfloat16_where_a_cpu_has_units_for_it_is_close_and_keeps_parameters_and_stream_in_float32(monkeypatch):
    model = shaken(TINY)
    x, y = batch(TINY)
    expected = model(x, y)
    want = torch.autograd.grad(expected, list(model.parameters()))
    monkeypatch.setattr(device, "CPU_HAS_BFLOAT16", True)
    seen = []
    for module in (model.transformer.h[0].attn.c_q, model.transformer.h[1]):
        module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    loss = model(x, y)
    got = torch.autograd.grad(loss, list(model.parameters()))
    assert (*seen, loss.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert {t.dtype for t in (*model.parameters(), *model.buffers(), *got)} == {torch.float32}
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    flatten = torch.nn.utils.parameters_to_vector
    assert torch.cosine_similarity(flatten(got), flatten(want), dim=0) > 0.99
    assert train.polar_express(torch.randn(1, 4, 8)).dtype == torch.bfloat16


# ---- Optimizer ----


def test_every_parameter_is_in_the_group_that_the_recipe_names():
    model = build(TINY)
    optimizer = model.setup_optimizer()
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    scale = math.sqrt(768 / 64)
    for parameter, lr, betas in [
        (model.lm_head.weight, train.UNEMBEDDING_LR * scale, train.ADAM_BETAS),
        (model.transformer.wte.weight, train.EMBEDDING_LR * scale, train.ADAM_BETAS),
        (model.value_embeds["0"].weight, train.EMBEDDING_LR * scale, train.ADAM_BETAS),
        (model.value_embeds["2"].weight, train.EMBEDDING_LR * scale, train.ADAM_BETAS),
        (model.resid_lambdas, train.SCALAR_LR * 0.01, train.ADAM_BETAS),
        (model.x0_lambdas, train.SCALAR_LR, (0.96, 0.95)),
    ]:
        group = groups[id(parameter)]
        assert (group["kind"], group["initial_lr"], group["betas"]) == ("adamw", pytest.approx(lr), betas)
    for matrix in model.transformer.h.parameters():
        group = groups[id(matrix)]
        assert (group["kind"], group["initial_lr"]) == ("muon", train.MATRIX_LR)
        assert {p.shape for p in group["params"]} == {matrix.shape}


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


def polar_by_svd(u):
    """The polynomial applied to the singular values, in float64."""
    U, S, Vt = torch.linalg.svd(u.double(), full_matrices=False)
    s = S / (1.02 * S.norm(dim=-1, keepdim=True) + 1e-6)
    for a, b, c in (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),  # table 1 of arXiv 2505.16932
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ):
        s = a * s + b * s**3 + c * s**5
    return U @ torch.diag_embed(s) @ Vt


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


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (1, 32)])
def test_muon_equals_a_float64_reference_over_steps(shape):
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


def test_schedules_reach_every_group_and_follow_their_lines(monkeypatch):
    set_knobs(monkeypatch, WARMUP_RATIO=0.1, WARMDOWN_RATIO=0.4, FINAL_LR_FRAC=0.2)
    optimizer = build(TINY).setup_optimizer()
    for step, progress, factor, momentum in [
        (0, 0.05, 0.5, 0.85),
        (150, 0.6, 1, 0.90),
        (300, 0.8, 0.6, 0.95),
        (9999, 1, 0.2, 0.95),
    ]:
        train.set_schedules(optimizer, step, progress)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(group["initial_lr"] * factor)
            if group["kind"] == "muon":
                assert group["momentum"] == pytest.approx(momentum)
                assert group["weight_decay"] == pytest.approx(train.WEIGHT_DECAY * (1 - progress))


# ---- Knobs ----


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DEPTH", 0, "DEPTH 0 is below 1: set it to 1 or more"),
        ("HEAD_DIM", 33, "HEAD_DIM 33 is odd, and rotary embedding turns two halves: set it to 34"),
        ("TOTAL_BATCH_SIZE", 1923, "TOTAL_BATCH_SIZE 1923 is not a multiple of MAX_SEQ_LEN 100: set it to 2000"),
        ("WINDOW_PATTERN", "SX", "WINDOW_PATTERN 'SX' is not made of the letters S and L: use 'SSSL', say"),
    ],
)
def test_bad_knob_is_refused_with_name_value_and_remedy(monkeypatch, name, value, message):
    set_knobs(monkeypatch, **{"MAX_SEQ_LEN": 100, "TOTAL_BATCH_SIZE": 2000, name: value})
    with pytest.raises(UserError) as error:
        train.window_sizes(train.model_config(100))
    assert str(error.value) == message


def test_width_is_rounded_up_to_whole_heads_and_patterns_take_either_case(monkeypatch):
    set_knobs(monkeypatch, DEPTH=3, ASPECT_RATIO=50, HEAD_DIM=64, WINDOW_PATTERN="lS")
    config = train.model_config(100)
    assert (config.n_embd, config.n_head, config.n_kv_head, config.n_layer) == (192, 3, 3, 3)
    T = train.MAX_SEQ_LEN
    assert train.window_sizes(config) == [T, T // 2, T]
