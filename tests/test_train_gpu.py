"""What only a CUDA device can show of train.py and harness/device.py.

Run: uv run pytest -n 0 -m 'gpu and not slow' tests/test_train_gpu.py
"""

import itertools

import pytest
import torch
from train_fixtures import CLIMBMIX, build

import train
from harness import device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


@pytest.fixture
def climbmix(monkeypatch, tmp_path):
    """The knobs of the large profiles, whatever profile the tests run under."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    values = {"MAX_SEQ_LEN": 2048, "TOTAL_BATCH_SIZE": 524288, "DEVICE_BATCH_SIZE": 64, "LOSS_CHUNK": 131072}
    for name, value in (values | {"HEAD_DIM": 128, "COMPILE": True}).items():
        monkeypatch.setattr(train, name, value)
    torch.set_float32_matmul_precision("high")


def choose_attention(config: train.GPTConfig, compiled: bool = True) -> str:
    return device.choose_attention(config.sequence_len, train.window_sizes(config), train.HEAD_DIM, CUDA, compiled)


def warm_up(runner, optimizer, total_rows: int) -> int:
    return device.warm_up(runner, runner, optimizer, 8192, 2048, total_rows, total_rows, compiled=True, kind="a test")


@pytest.mark.parametrize("window", [100, 1024, 2048])
@pytest.mark.parametrize("name", ["flash", "flex"])
def test_back_end_agrees_with_sdpa_forward_and_gradient(climbmix, name, window):
    if name == "flash":
        try:
            _, backend = device.load_flash_attention()
        except Exception as error:
            pytest.skip(f"no FlashAttention-3 here: {device.one_line(error)}")
    else:
        backend = torch.compile(device.flex_attention, dynamic=False)
        device.attention_mask("flex", 2048, window, CUDA)
    device.probe_attention(backend, 2048, window, 128, CUDA)


def test_step_without_a_compiler_works(climbmix):
    config = train.GPTConfig(2048, 8192, 2, 4, 4, 512, "SL")
    choose_attention(config, compiled=False)
    model = build(config, CUDA)
    x, y = torch.randint(8192, (2, 2, 2048), device=CUDA)
    loss = model(x, y)
    loss.backward()
    model.setup_optimizer().step()
    assert loss.isfinite() and model(x, y) < loss


def test_types_are_bfloat16_where_the_recipe_says_so(climbmix):
    model = build(CLIMBMIX, CUDA)
    bfloat16 = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert bfloat16 == {"transformer.wte.weight", *(f"value_embeds.{i}.weight" for i in (1, 3, 5, 7))}
    assert model.cos.dtype == model.sin.dtype == torch.bfloat16
    streams = []
    model.transformer.h[3].register_forward_hook(lambda module, args, output: streams.append(output.dtype))
    assert model(torch.zeros(1, 64, dtype=torch.long, device=CUDA)).dtype == torch.float32
    assert streams == [torch.bfloat16]


def test_a_step_does_not_synchronise_beyond_the_loss(climbmix, monkeypatch):
    """In sync debug mode every blocking call raises, but waiting for the loss copy's event."""
    config = train.GPTConfig(2048, 8192, 2, 4, 4, 512, "SL")
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", 4 * 2048)
    choose_attention(config)
    model = build(config, CUDA)
    optimizer, runner = model.setup_optimizer(compiled=True), torch.compile(model, dynamic=False)
    rows = warm_up(runner, optimizer, total_rows=2)
    steps = itertools.count()
    monkeypatch.setattr(train, "training_seconds", lambda: float(next(steps)))
    monkeypatch.setattr(train, "TIME_BUDGET", 5.0)
    x, y = (torch.randint(8192, (rows, 2048), device=CUDA) for _ in "xy")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert train.train(runner, optimizer, itertools.repeat((x, y, 1)), rows, 0.0) >= 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 30e9, reason="needs 30 GB"
)
def test_peak_memory_is_under_the_goal_of_25_gb_in_training_and_evaluation(climbmix):
    choose_attention(CLIMBMIX)
    model = build(CLIMBMIX, CUDA)
    optimizer, runner = model.setup_optimizer(compiled=True), torch.compile(model, dynamic=False)
    assert warm_up(runner, optimizer, total_rows=64) == 64
    x, y = (torch.randint(8192, (64, 2048), device=CUDA) for _ in "xy")
    for _ in range(2):
        runner(x, y).backward()
    optimizer.step()
    training_mb = device.peak_memory_mb(CUDA)
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        runner.eval()
        logits = runner(x)
        again = runner(x)
        evaluation_mb = device.peak_memory_mb(CUDA)
        del logits, again
    print(f"peak {training_mb:.0f} MiB in training, {evaluation_mb:.0f} in evaluation")
    assert evaluation_mb < training_mb < 25_000


def test_exported_model_gives_the_same_logits_as_the_compiled_one(climbmix):
    config = train.GPTConfig(2048, 8192, 2, 4, 4, 512, "SL")
    choose_attention(config)
    model = build(config, CUDA).eval()
    x = torch.randint(8192, (2, 2048), device=CUDA)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()(x)
        compiled = torch.compile(model, dynamic=False)(x)
    assert (exported - compiled).abs().max() < 0.05  # bfloat16 kernels round differently
