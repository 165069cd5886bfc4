"""A GPU of paper: the memory of train.py's CUDA path, traced and weighed on a machine that has no GPU.

    uv run tests/paper_gpu.py --weigh                               # at the climbmix shape, on an H100
    uv run tests/paper_gpu.py --weigh --depth 4 --rows 4 8 16 32    # see docs/small_gpus.md

Model, warm-up and training loop run unchanged on fake tensors, which have a shape, a type and a device but no data.
torch.compile traces them, Inductor generates its kernels, and nothing is compiled further or launched. Every fake
tensor's bytes are counted while it lives: that is the peak memory. What it does not count is what CUDA, the allocator's
rounding and library workspaces take on a real device. The result is one line of JSON for each number of rows.

Written for torch 2.11 and Triton 3.6, whose private names it replaces.
"""

import argparse
import atexit
import contextlib
import ctypes
import gc
import itertools
import json
import os
import sys
import tempfile
import types
import weakref
from pathlib import Path

os.environ["AUTORESEARCH_PROFILE"] = "code"  # the knobs and the shape of the GPU profiles
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="paper-gpu-")  # deleted when the process ends
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch._dynamo.device_interface
import torch._inductor.config
import torch._inductor.runtime.triton_helpers
import triton
from torch._dynamo.utils import counters
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from train_fixtures import build
from triton.backends.compiler import GPUTarget

import prepare
import train
from harness import device

CUDA = torch.device("cuda")
CAPABILITY = (9, 0)  # an H100
MIB = 2**20


def answer(owner, **values) -> None:
    """Let functions of `owner` return these values, whatever they are asked."""
    for name, value in values.items():
        setattr(owner, name, lambda *args, value=value, **options: value)


class Memory:
    """Bytes of the fake CUDA tensors that live, and the most that did since the last reset."""

    def __init__(self):
        self.live = 0
        self.peak = 0
        self.notes = 0  # bytes that would not be on a GPU: the compiler keeps fake tensors as notes on its graphs
        self._storages = {}  # by address; the weak reference tells when it dies

    def watch(self) -> None:
        create = FakeTensor.__new__

        def create_and_count(cls, *args, **options):
            tensor = create(cls, *args, **options)
            if tensor.fake_device.type == "cuda":
                self._count(tensor.untyped_storage())
            return tensor

        FakeTensor.__new__ = staticmethod(create_and_count)

    def _count(self, storage) -> None:
        key = storage._cdata
        if key in self._storages:  # another view of it
            return
        size = storage.nbytes()

        def on_death(reference) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, on_death)
        self.live += size
        self.peak = max(self.peak, self.live)

    def reset_peak(self, *args) -> None:
        gc.collect()
        self.peak = self.live

    def peak_bytes(self, *args) -> int:
        return self.peak - self.notes


def pretend_a_driver(memory: Memory) -> None:
    """torch.cuda's functions, and the copies that the compiler made of them when it was imported."""
    major, minor = CAPABILITY
    total = 80 * 2**30
    properties = types.SimpleNamespace(
        name="paper GPU", uuid="paper", major=major, minor=minor, total_memory=total, warp_size=32,
        L2_cache_size=50 * MIB, multi_processor_count=132, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, regs_per_multiprocessor=65536, shared_memory_per_block_optin=227 * 1024,
    )  # fmt: skip
    answers = {
        "is_available": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0, "set_device": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "get_device_name": properties.name, "init": None,
        "get_device_properties": properties, "get_device_capability": CAPABILITY, "manual_seed_all": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "_lazy_init": None,
        "synchronize": None, "empty_cache": None, "mem_get_info": (total, total),
    }  # fmt: skip
    answer(torch.cuda, **answers)
    torch.cuda.max_memory_allocated = memory.peak_bytes
    torch.cuda.reset_peak_memory_stats = memory.reset_peak
    torch.cuda.Event = type("Event", (), {"record": lambda self: None, "synchronize": lambda self: None})

    compilers_view = torch._dynamo.device_interface.CudaInterface
    for name in answers:
        public_name = name.removeprefix("_")
        if hasattr(compilers_view, public_name):
            setattr(compilers_view, public_name, staticmethod(getattr(torch.cuda, name)))
    compilers_view.get_raw_stream = staticmethod(lambda index: 0)
    torch._C._cuda_getCurrentRawStream = lambda index: 0

    @contextlib.contextmanager
    def guard(index):
        yield

    torch.cuda.device = torch.cuda._DeviceGuard = compilers_view.device = guard
    torch.accelerator.is_available = lambda: False  # or the compiler records real streams


def pretend_tensors() -> None:
    """What fake tensors lack for a whole training run."""
    FakeTensorMode.avoid_device_init = property(lambda mode: True)
    fake_tensor.init_gpu_context = lambda device: None
    FakeTensor.item = lambda self: 0.0  # the loss and the sampled token

    @torch.no_grad()
    def apply_anew(module, function, recurse=True):
        """Module.to and to_empty change parameters in place, which a fake one does not allow."""
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                part._parameters[name] = torch.nn.Parameter(function(parameter))
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = function(buffer)
        return module

    torch.nn.Module._apply = apply_anew

    class Generator:
        def __init__(self, device=None):
            pass

        def manual_seed(self, seed):
            return None  # as a generator: torch's own

    torch.Generator = Generator
    zeros = torch.zeros
    torch.zeros = lambda *args, pin_memory=False, **options: zeros(*args, **options)


def pretend_a_context_for_autograd() -> None:
    """Autograd's engine asks whether the device has a context, through a C++ object that raises without a driver.

    at::AcceleratorHooksInterface declares, in this order: the destructor (two slots of the virtual table), isBuilt,
    isAvailable, hasPrimaryContext. The object gets a copy of its table, in which the last one says yes.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
    get_hooks = library._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.cast(get_hooks(), ctypes.POINTER(ctypes.c_void_p))  # its first word points to the table
    real_table = hooks[0]
    word = ctypes.sizeof(ctypes.c_void_p)
    header_words = 2  # type information, in front of the table
    table = (ctypes.c_void_p * 100)()
    ctypes.memmove(table, real_table - header_words * word, ctypes.sizeof(table))
    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(lambda hooks, index: True)
    has_primary_context = 4
    table[header_words + has_primary_context] = ctypes.cast(yes, ctypes.c_void_p).value
    hooks[0] = ctypes.addressof(table) + header_words * word
    pretend_a_context_for_autograd.kept = (table, yes)
    atexit.register(hooks.__setitem__, 0, real_table)


def compile_without_a_device() -> None:
    """Inductor generates code for that architecture; what it generates allocates, and launches nothing."""
    target = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    triton.runtime.driver.set_active(target)
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: triton.runtime.driver.set_active(target)
    torch._inductor.config.compile_threads = 1  # what is replaced here is replaced in this process only
    torch._inductor.config.use_static_cuda_launcher = False
    torch._inductor.config.shape_padding = False  # it is decided by timing

    CachingAutotuner.run = lambda self, *args, **options: None
    CachingAutotuner._dynamic_scale_rblock = lambda self: None  # it asks a loaded kernel for its registers
    CachingAutotuner.precompile = lambda self, *args, **options: None  # no Triton

    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = lambda tensor, size, stride, offset=0: tensor.as_strided(
        size, stride, tensor.storage_offset() + offset
    )

    # Constant folding computes one element of a constant on the device; here on the CPU.
    deduce_value = UniformValueConstantFolder._deduce_value

    def deduce_on_cpu(self, node):
        options = node.kwargs
        node.kwargs = {name: torch.device("cpu") if name == "device" else value for name, value in options.items()}
        try:
            return deduce_value(self, node)
        finally:
            node.kwargs = options

    UniformValueConstantFolder._deduce_value = deduce_on_cpu


def refuse_flash_attention():
    raise ValueError("not on paper")


def weigh(rows: int, memory: Memory) -> dict:
    """Peak memory of a run's training and of its evaluation; what was compiled, before the first step and in all."""
    gc.unfreeze()
    gc.enable()
    torch.compiler.reset()
    torch.compiler.set_stance("default")
    counters.clear()
    T = prepare.MAX_SEQ_LEN
    V = prepare.VOCAB_SIZE
    train.TOTAL_BATCH_SIZE = 2 * rows * T  # two micro-steps: the second accumulates
    config = train.model_config(V)
    device.choose_attention(T, train.window_sizes(config), train.HEAD_DIM, CUDA, True)
    model = build(config, CUDA)
    optimizer = model.setup_optimizer(True)
    runner = torch.compile(model, dynamic=False)
    fitting_rows = device.warm_up(runner, runner, optimizer, V, T, 2 * rows, rows, compiled=True, kind=f"paper {rows}")
    graphs_warm = counters["stats"]["unique_graphs"]
    torch.compiler.set_stance("fail_on_recompile")
    memory.reset_peak()
    memory.notes = memory.live - sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    train.TIME_BUDGET = 4.0
    clock = itertools.count()
    train.training_seconds = lambda: float(next(clock))
    batches = ((*torch.randint(V, (2, fitting_rows, T), device=CUDA), 1) for _ in itertools.count())
    train.train(runner, optimizer, batches, fitting_rows, 0.0)
    training_bytes = memory.peak_bytes()

    memory.reset_peak()
    runner.eval()
    with torch.no_grad():  # the evaluator holds two results, and pieces of them in float32
        x = torch.randint(V, (fitting_rows, T), device=CUDA)
        logits = runner(x)
        again = runner((x + 1) % V)
        size = prepare.FLOAT32_ELEMENTS // V
        for a, b in zip(logits.flatten(0, 1).split(size), again.flatten(0, 1).split(size), strict=True):
            (a.float() - b).abs().amax(-1)
    return {
        "rows": fitting_rows,
        "attention": device.attention_backend.__name__,
        "graphs_warm": graphs_warm,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": dict(counters["graph_break"]),
        "training_mb": round(training_bytes / MIB),
        "evaluation_mb": round(memory.peak_bytes() / MIB),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=train.DEPTH)
    parser.add_argument("--rows", type=int, nargs="+", default=[train.DEVICE_BATCH_SIZE], help="per micro-step")
    parser.add_argument("--weigh", action="store_true", required=True, help="count the memory of a run")
    arguments = parser.parse_args()

    train.DEPTH = arguments.depth
    train.COMPILE = True
    device.load_flash_attention = refuse_flash_attention
    memory = Memory()
    pretend_a_driver(memory)
    pretend_tensors()
    pretend_a_context_for_autograd()
    compile_without_a_device()
    memory.watch()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for rows in arguments.rows:
            print(json.dumps(weigh(rows, memory)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
