"""What only a CUDA device can show of train.py and harness/device.py. Run: uv run pytest -n 0 -m gpu"""

import itertools

import pytest
import torch
from train_fixtures import build

import train
from harness import device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
SHALLOW = train.GPTConfig(2048, 8192, 2, 4, 4, 512, "SL")


@pytest.fixture(autouse=True)
def climbmix(monkeypatch, tmp_path):
    """The knobs of the large profiles, whatever profile the tests run under, with a small batch."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for name, value in (("MAX_SEQ_LEN", 2048), ("TOTAL_BATCH_SIZE", 4 * 2048), ("LOSS_CHUNK", 131072)):
        monkeypatch.setattr(train, name, value)
    torch.set_float32_matmul_precision("high")


def build_and_compile(config: train.GPTConfig, compiled: bool = True):
    """A model, what runs it, and its optimizer, with the back-end that a run would choose."""
    device.choose_attention(config.sequence_len, train.window_sizes(config), 128, CUDA, compiled)
    model = build(config, CUDA)
    runner = torch.compile(model, dynamic=False) if compiled else model
    return model, runner, model.setup_optimizer(compiled)


@pytest.mark.parametrize("window", [100, 1024, 2048])
@pytest.mark.parametrize("name", ["flash", "flex"])
def test_back_end_agrees_with_sdpa_forward_and_gradient(name, window):
    if name == "flash":
        try:
            _, backend = device.load_flash_attention()
        except Exception as error:
            pytest.skip(f"no FlashAttention-3 here: {device.one_line(error)}")
    else:
        backend = torch.compile(device.flex_attention, dynamic=False)
        device.attention_mask("flex", 2048, window, CUDA)
    device.probe_attention(backend, 2048, window, 128, CUDA)


def test_step_without_a_compiler_works_and_types_are_bfloat16_where_the_recipe_says_so():
    model, _, optimizer = build_and_compile(SHALLOW, compiled=False)
    bfloat16 = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert bfloat16 == {"transformer.wte.weight", "value_embeds.1.weight"}
    assert model.cos.dtype == model.sin.dtype == torch.bfloat16
    streams = []
    model.transformer.h[0].register_forward_hook(lambda module, args, output: streams.append(output.dtype))
    x, y = torch.randint(8192, (2, 2, 2048), device=CUDA)
    loss = model(x, y)
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and model(x, y) < loss
    assert set(streams) == {torch.bfloat16} and model(x).dtype == torch.float32


def test_a_step_does_not_synchronise_beyond_the_loss(monkeypatch):
    """In sync debug mode every blocking call raises, but waiting for the loss copy's event."""
    _, runner, optimizer = build_and_compile(SHALLOW)
    rows = device.warm_up(runner, runner, optimizer, 8192, 2048, 2, 2, compiled=True, kind="a test")
    steps = itertools.count()
    monkeypatch.setattr(train, "training_seconds", lambda: float(next(steps)))
    monkeypatch.setattr(train, "TIME_BUDGET", 5.0)
    x, y = torch.randint(8192, (2, rows, 2048), device=CUDA)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert train.train(runner, optimizer, itertools.repeat((x, y, 1)), rows, 0.0) >= 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_exported_model_gives_the_same_logits_as_the_compiled_one():
    model, runner, _ = build_and_compile(SHALLOW)
    x = torch.randint(8192, (2, 2048), device=CUDA)
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "c_proj" in name):  # 0 at first
            parameter.uniform_(-0.05, 0.05)
        exported = torch.export.export(model.eval(), (x,)).module()(x)
        assert (exported - runner(x)).abs().max() < 0.05  # bfloat16 kernels round differently
