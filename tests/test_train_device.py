"""harness/device.py: what a run needs of its device. Run: uv run pytest tests/test_train_device.py"""

import os
import re
import time
from types import SimpleNamespace

import kernels
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from train_fixtures import SMALL, batch, build, in_float32_on_one_thread, shaken  # noqa: F401 (a fixture)

import train
from harness import device
from harness.device import DeviceError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")

@pytest.mark.parametrize(("T", "window", "kv_heads"), [(10, 0, 1), (10, 4, 2), (10, 9, 1), (200, 1, 4), (200, 150, 2)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_mask_of_flex_attention_shows_what_sdpa_shows(T, window, kv_heads):
    """SDPA itself is held against a float64 reference in test_train.py."""
    generator = torch.Generator().manual_seed(3)
    qkv = [torch.randn(2, T, heads, 16, generator=generator) for heads in (4, kv_heads, kv_heads)]
    mask = device.attention_mask("flex", T, window, CPU)
    y = flex_attention(*(t.transpose(1, 2) for t in qkv), block_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(y, device.sdpa_attention(*qkv, window), atol=1e-5, rtol=1e-4)


def test_model_is_exported_with_sdpa_whatever_trained_and_no_mask_of_the_tracers_is_kept(monkeypatch):
    """An audit scores the graph where neither train.py nor its kernels are; a kept mask would break the model."""
    monkeypatch.setattr(device, "attention_backend", lambda *_: pytest.fail("a kernel of the hub was exported"))
    monkeypatch.setattr(device, "_masks", {})
    model = shaken(SMALL).eval()
    x, _ = batch(SMALL)
    graph = torch.export.export(model, (x,)).module()
    assert device._masks == {}
    monkeypatch.setattr(device, "attention_backend", device.sdpa_attention)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-6, atol=1e-6)


def without_window(q, k, v, window):
    return device.sdpa_attention(q, k, v, 64)


def with_wrong_gradient(q, k, v, window):
    return device.sdpa_attention(q, k, 1.5 * v - 0.5 * v.detach(), window)


def test_probe_accepts_sdpa_and_refuses_a_back_end_that_drops_the_window_or_has_a_wrong_gradient():
    device.probe_attention(device.sdpa_attention, 64, 20, 48, CPU)
    for backend, found in ((without_window, "output"), (with_wrong_gradient, "dv differs from SDPA by")):
        with pytest.raises(ValueError, match=found):
            device.probe_attention(backend, 64, 20, 48, CPU)


@pytest.mark.parametrize(("compiled", "works"), [(True, "fa3"), (True, "flex"), (True, "sdpa"), (False, "sdpa")])
def test_first_back_end_that_passes_its_probe_is_chosen_and_those_before_say_why(monkeypatch, capsys, compiled, works):
    """On a CUDA device that is not there: compiler, masks and probe are stand-ins."""
    functions = {"fa3": print, "flex": device.flex_attention, "sdpa": device.sdpa_attention}

    def probe(backend, T, window, head_dim, where):
        assert (T, window, head_dim, where) == (12, 6, 32, CUDA)
        if backend is not functions[works]:
            raise ValueError("dv differs\nfrom SDPA by 0.5")

    stand_ins = {"load_flash_attention": lambda: ("fa3", print), "probe_attention": probe}
    for name, value in (stand_ins | {"attention_backend": None, "attention_mask": lambda *_: None}).items():
        monkeypatch.setattr(device, name, value)
    monkeypatch.setattr(torch, "compile", lambda backend, dynamic: backend)
    assert device.choose_attention(12, [6, 12], 32, CUDA, compiled) == works
    assert device.attention_backend is functions[works]
    failed = ["flash-attention-3", "flex"][: list(functions).index(works) if compiled else 1]
    told = [f"attention: no {kind}: ValueError: dv differs from SDPA by 0.5" for kind in failed]
    assert capsys.readouterr().err.splitlines() == told


def load_stand_in(snapshot):
    """As kernels.get_local_kernel; a stand-in for a kernel, which runs on a GPU alone."""
    if "damaged" in snapshot.name:
        raise ImportError("for another torch")

    def flash_attn_func(q, k, v, causal, window_size):
        assert causal and window_size[1] == 0
        return device.sdpa_attention(q, k, v, window_size[0]), "log-sum-exp"

    return SimpleNamespace(flash_attn_func=flash_attn_func)


def test_kernel_is_fetched_once_and_a_run_takes_the_oldest_that_loads_and_names_its_revision(
    monkeypatch, tmp_path, capsys
):
    """On a GPU that the kernel is built for, with an empty local cache of kernels."""
    asked = []

    def add_snapshot(commit, age):
        snapshot = tmp_path / f"kernels--kernels-community--flash-attn3/snapshots/{commit}"
        snapshot.mkdir(parents=True)
        os.utime(snapshot, (time.time() - age, time.time() - age))

    def get_kernel(repo, version):
        asked.append((repo, version))
        if len(asked) == 1:
            raise OSError("no network")
        add_snapshot("0123456789older", age=50)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    monkeypatch.setattr(kernels, "get_local_kernel", load_stand_in)
    with pytest.raises(FileNotFoundError, match=r"not on this machine: 'uv run prepare\.py' fetches it"):
        device.load_flash_attention()
    for _ in range(3):
        device.fetch_attention_kernel()
    assert asked == [("kernels-community/flash-attn3", 1)] * 2
    assert capsys.readouterr().err == "note: no attention kernel was fetched (OSError: no network)\n"
    add_snapshot("fedcba9876newer", age=5)  # another project's: it must not change the runs of a tag
    add_snapshot("damaged", age=99)
    name, backend = device.load_flash_attention()
    assert name == "flash-attention-3@0123456"
    assert capsys.readouterr().err.endswith("damaged: ImportError: for another torch\n")
    device.probe_attention(backend, 64, 20, 48, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    with pytest.raises(ValueError, match=r"it is not built for compute capability 12\.0"):
        device.load_flash_attention()


def test_compiler_that_builds_no_kernel_is_one_error_line_with_its_remedies(monkeypatch, tmp_path):
    def compile_nothing(function):
        raise RuntimeError("PTXASError: ptxas fatal\n: Value 'sm_121a' is not defined")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "compile", compile_nothing)
    remedies = r"install gcc and .*, set TRITON_PTXAS_PATH .*, or COMPILE = False in train\.py \(RuntimeError: PTXAS"
    with pytest.raises(DeviceError, match="torch.compile builds no kernel for this cuda: " + remedies):
        device.prepare_compiler(tmp_path, CUDA)


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


def test_device_batch_halves_until_it_fits_and_divides_the_total_and_one_row_is_the_least():
    def trial(rows, limit=3):
        if rows > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    def trial_on_mps(rows):
        if rows > 3:
            raise RuntimeError("MPS backend out of memory" if rows < 20 else "illegal memory access")

    assert device.fit_device_batch(trial, total_rows=48, upper_bound=30) == 3
    assert device.fit_device_batch(trial, total_rows=7, upper_bound=4) == 1
    assert device.fit_device_batch(trial_on_mps, total_rows=48, upper_bound=12) == 3
    with pytest.raises(RuntimeError, match="illegal"):
        device.fit_device_batch(trial_on_mps, total_rows=48, upper_bound=30)
    with pytest.raises(DeviceError, match=r"^one row runs out of memory: make the model smaller .*Tried to allocate"):
        device.fit_device_batch(lambda rows: trial(rows, limit=0), 8, 8)


@pytest.mark.parametrize("rows", [8, 2])
def test_warm_up_trains_and_evaluates_says_where_time_goes_and_leaves_no_trace(capsys, rows):
    """On a device with memory for so many rows, where a larger batch fails after it changed things."""

    def run_out_of_memory(model, args, loss):
        if len(args[0]) > rows:
            model.lm_head.weight.data.add_(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model = build(SMALL)
    model.register_forward_hook(run_out_of_memory)
    optimizer = model.setup_optimizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changed = []
    head = before["lm_head.weight"]
    optimizer.register_step_post_hook(lambda *_: changed.append(not torch.equal(model.lm_head.weight, head)))
    assert device.warm_up(model, model, optimizer, 31, 16, total_rows=8, upper_bound=8, compiled=False, kind="") == rows
    assert changed and all(changed)  # real steps were made, and undone
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not optimizer.state and all(p.grad is None for p in model.parameters())
    *halved, threads, times = capsys.readouterr().err.splitlines()
    assert halved == [f"out of memory with {n} rows per micro-step: halving them" for n in (8, 4) if n > rows]
    parts = "forward #, loss #, backward #, optimizer # (once a step)"
    assert re.sub(r"\b\d[\d.e-]*", "#", times) == f"milliseconds of a micro-step of # rows: {parts}"
    assert (threads, f" {rows} rows:" in times) == ("threads: 1 of 1", True)


def test_gpu_that_torch_cannot_start_is_one_error_line_but_for_a_profile_of_the_cpu(monkeypatch, capsys):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 12040)")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(train, "PROFILE", "climbmix")
    assert train.main() == 1
    cause = "RuntimeError: The NVIDIA driver on your system is too old (found version 12040)"
    remedy = "update the NVIDIA driver, or train on the CPU with AUTORESEARCH_PROFILE=pocket"
    problem = f"a GPU is there, but torch {torch.__version__} cannot start it: {cause}"
    assert capsys.readouterr().err == f"error: {problem}: {remedy}\n"
    device.check_driver(may_use_cpu=True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert train.main() == 1
    remedy = "train on the CPU with CUDA_VISIBLE_DEVICES= AUTORESEARCH_PROFILE=pocket"
    assert capsys.readouterr().err == f"error: compute capability 7.5 has no bfloat16: {remedy}\n"


LETTERS = SimpleNamespace(  # a tokenizer: a character is its own token, and 0 begins a document
    get_bos_token_id=lambda: 0,
    encode=lambda text: [ord(c) for c in text],
    decode=lambda tokens: "".join(map(chr, tokens)),
)


def test_sample_continues_its_prompt_on_one_line_until_it_is_long_enough_or_the_document_or_the_row_ends(capsys):
    for pairs, characters, sample in (
        (["ta", "a\n", "\na"], 6, r"ta\na\na"),
        (["ta", "ab", "b\0"], 200, "tab"),
        (["ta", "aa"], 200, "t" + "a" * 62),
    ):
        model = torch.nn.Embedding(128, 128)  # scores of the next token by the last one
        for last, following in pairs:
            model.weight.data[ord(last), ord(following)] = 1e4
        assert device.write_sample(model, LETTERS, "t", 64, characters) == sample
    assert device.write_sample(torch.nn.Linear(1, 1), LETTERS, "t", 64) == ""
    assert capsys.readouterr().err.startswith("no sample: RuntimeError: ")
