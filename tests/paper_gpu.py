"""A GPU of paper: train.py's CUDA path, traced, compiled and weighed on a machine that has no GPU.

    uv run tests/paper_gpu.py                     # a whole run at the climbmix shape on an H100 of paper
    uv run tests/paper_gpu.py --capability 120    # kernels for another architecture
    uv run tests/paper_gpu.py --attention         # the attention kernels alone
    uv run tests/paper_gpu.py --weigh --depth 4 --rows 4 8 16 32  # no kernels, memory only: see docs/small_gpus.md

train.run() runs unchanged on fake tensors, which have a shape, a type and a device but no data. torch.compile traces
it, Inductor generates kernels for the architecture named, Triton compiles them down to cubin, and nothing is launched.
Every fake tensor's bytes are counted while it lives: that is the peak memory. What it does not count is what CUDA, the
allocator's rounding and library workspaces take on a real device. The result is one line of JSON a run.

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
from triton.backends.compiler import GPUTarget

import prepare
import train
from harness import device

# Shared memory that one block may take: CUDA C++ programming guide, table of technical specifications, less the KiB
# that the system keeps.
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
GIB = 2**30
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


class Kernels:
    """Name and shared memory of every kernel that was compiled."""

    def __init__(self):
        self.shared: dict[str, int] = {}

    def note(self, autotuner: CachingAutotuner) -> None:
        for result in autotuner.compile_results:
            name = autotuner.fn.__name__
            self.shared[name] = max(result.kernel.metadata.shared, self.shared.get(name, 0))


def pretend_a_driver(capability: int, memory: Memory, gpu_gib: int) -> None:
    """torch.cuda's functions, and the copies that the compiler made of them when it was imported."""
    major, minor = divmod(capability, 10)
    total = gpu_gib * GIB
    properties = types.SimpleNamespace(
        name=f"paper GPU {major}.{minor}",
        uuid="paper",
        major=major,
        minor=minor,
        total_memory=total,
        warp_size=32,
        multi_processor_count=132,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=SHARED_MEMORY_LIMIT[capability],
        L2_cache_size=50 * MIB,
    )
    answers = {
        "is_available": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (major, minor),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "manual_seed_all": None,
        "init": None,
        "_lazy_init": None,
        "synchronize": None,
        "empty_cache": None,
        "mem_get_info": (total, total),
    }
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


def compile_for(capability: int, kernels: Kernels | None) -> None:
    """Inductor and Triton generate and compile for that architecture; generated code allocates, and launches nothing.

    Without `kernels` nothing is compiled by Triton: enough to weigh a run.
    """
    target = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32), get_current_device=lambda: 0
    )
    triton.runtime.driver.set_active(target)
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: triton.runtime.driver.set_active(target)
    torch._inductor.config.compile_threads = 1  # what is replaced here is replaced in this process only
    torch._inductor.config.use_static_cuda_launcher = False
    torch._inductor.config.shape_padding = False  # it is decided by timing

    CachingAutotuner.run = lambda self, *args, **options: None
    CachingAutotuner._dynamic_scale_rblock = lambda self: None  # it asks a loaded kernel for its registers
    if kernels is None:
        CachingAutotuner.precompile = lambda self, *args, **options: None
    else:
        CachingAutotuner._make_launchers = lambda autotuner: kernels.note(autotuner)

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


class Evaluator:
    """What train.run() asks of prepare.py, on fake data: a tokenizer, batches, a clock of a second a step, a score."""

    def __init__(self, memory: Memory):
        self.memory = memory
        self.real_warm_up = train.warm_up
        self.EvaluationRefused = prepare.EvaluationRefused
        self.PROFILE_REASON = "paper"
        self.CACHE_ROOT = prepare.CACHE_ROOT
        self.Tokenizer = self
        self.check_data = lambda: None
        train.warm_up = self.warm_up
        train.prepare = self
        train.training_seconds = lambda: float(next(self.clock))

    def begin(self, steps: int) -> None:
        """A run begins as in a process of its own: nothing compiled, the garbage collector on."""
        gc.unfreeze()
        gc.enable()
        torch.compiler.reset()
        torch.compiler.set_stance("default")
        counters.clear()
        self.clock = itertools.count()
        train.TIME_BUDGET = float(steps)
        self.graphs_warm = 0
        self.training_peak = 0
        self.evaluation_peak = 0

    def default_device(self) -> str:
        return prepare.default_device()

    def from_directory(self) -> "Evaluator":
        return self

    def get_vocab_size(self) -> int:
        return prepare.VOCAB_SIZE

    def get_bos_token_id(self) -> int:
        return 0  # what FakeTensor.item says: the sample ends at once

    def encode(self, text: str) -> list[int]:
        return [1] * len(text)

    def decode(self, tokens: list[int]) -> str:
        return "?" * len(tokens)

    def warm_up(self, model, *args) -> int:
        """The real one; whatever is compiled after it is an error."""
        rows = self.real_warm_up(model, *args)
        self.graphs_warm = counters["stats"]["unique_graphs"]
        torch.compiler.set_stance("fail_on_recompile")
        self.memory.reset_peak()
        self.memory.notes = self.memory.live - sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        return rows

    def make_dataloader(self, tokenizer, B: int, T: int, split: str, device):
        while True:
            x, y = torch.randint(prepare.VOCAB_SIZE, (2, B, T), device=device)
            yield x, y, 1

    @torch.no_grad()
    def evaluate_bpb(self, model, tokenizer, batch_size: int) -> float:
        """Holds what the real one does: two results, and pieces of them in float32."""
        self.training_peak = self.memory.peak_bytes()
        self.memory.reset_peak()
        model.eval()
        x = torch.randint(prepare.VOCAB_SIZE, (batch_size, prepare.MAX_SEQ_LEN), device="cuda")
        logits = model(x)
        again = model((x + 1) % prepare.VOCAB_SIZE)
        size = prepare.FLOAT32_ELEMENTS // prepare.VOCAB_SIZE
        for a, b in zip(logits.flatten(0, 1).split(size), again.flatten(0, 1).split(size), strict=True):
            (a.float() - b).abs().amax(-1)
        self.evaluation_peak = self.memory.peak_bytes()
        model.train()
        return 1.0


def refuse_flash_attention():
    raise ValueError("not on paper")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90, choices=SHARED_MEMORY_LIMIT, help="90 is an H100")
    parser.add_argument("--depth", type=int, default=train.DEPTH)
    parser.add_argument("--rows", type=int, nargs="+", default=[train.DEVICE_BATCH_SIZE], help="per micro-step")
    parser.add_argument("--attention", action="store_true", help="compile the attention kernels alone")
    parser.add_argument("--weigh", action="store_true", help="compile no kernels")
    arguments = parser.parse_args()

    train.DEPTH = arguments.depth
    train.COMPILE = True
    device.load_flash_attention = refuse_flash_attention

    memory = Memory()
    kernels = Kernels()
    pretend_a_driver(arguments.capability, memory, gpu_gib=80)
    pretend_tensors()
    pretend_a_context_for_autograd()
    compile_for(arguments.capability, None if arguments.weigh else kernels)
    memory.watch()
    evaluator = Evaluator(memory)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for rows in arguments.rows:
        train.DEVICE_BATCH_SIZE = rows
        train.TOTAL_BATCH_SIZE = 2 * rows * prepare.MAX_SEQ_LEN  # two micro-steps: the second accumulates
        evaluator.begin(steps=4)
        with mode, contextlib.redirect_stdout(sys.stderr):
            if arguments.attention:
                config = train.model_config(prepare.VOCAB_SIZE)
                windows = train.window_sizes(config)
                device.choose_attention(config.sequence_len, windows, train.HEAD_DIM, torch.device("cuda"), True)
            else:
                train.run()
        result = {
            "rows": rows,
            "attention": device.attention_backend.__name__,
            "graphs_warm": evaluator.graphs_warm,
            "graphs": counters["stats"]["unique_graphs"],
            "graph_breaks": dict(counters["graph_break"]),
            "training_mb": round(evaluator.training_peak / MIB),
            "evaluation_mb": round(evaluator.evaluation_peak / MIB),
            "kernels": len(kernels.shared),
            "largest_shared": max(kernels.shared.values(), default=0),
            "shared_limit": SHARED_MEMORY_LIMIT[arguments.capability],
        }
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
