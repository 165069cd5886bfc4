"""A GPU of paper: train.py's CUDA path, traced, compiled and weighed on a machine that has no GPU.

    uv run tests/paper_gpu.py                     # a whole run at the climbmix shape on an H100 of paper
    uv run tests/paper_gpu.py --capability 120    # kernels for another architecture
    uv run tests/paper_gpu.py --attention         # the attention kernels alone
    uv run tests/paper_gpu.py --weigh --depth 4 --rows 4 8 16 32  # no kernels, memory only: see docs/small_gpus.md

train.run() runs unchanged on fake tensors, which have a shape, a type and a device but no data. torch.compile traces
it, Inductor generates kernels for the architecture named, Triton compiles them down to cubin, and nothing is launched.
Every fake tensor's bytes are counted while it lives: that is the peak memory. What it does not count is what CUDA, the
allocator's rounding and library workspaces take on a real device. The result is one line of JSON a run.

Written for torch 2.11 and Triton 3.6, whose private names it replaces, for this process only.
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
        self._storages = {}  # a weak reference to each, by address: it tells when the storage dies

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
        size = storage.nbytes()

        def on_death(reference) -> None:
            del self._storages[key]
            self.live -= size

        if key not in self._storages:  # else it is another view
            self._storages[key] = weakref.ref(storage, on_death)
            self.live += size
            self.peak = max(self.peak, self.live)

    def reset_peak(self, *args) -> None:
        gc.collect()
        self.peak = self.live

    def peak_bytes(self, *args) -> int:
        return self.peak - self.notes


def pretend_a_driver(capability: int, memory: Memory) -> None:
    """torch.cuda's functions, and the copies that the compiler made of them when it was imported."""
    major, minor = divmod(capability, 10)
    total = 80 * 2**30
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
    actions = ["set_device", "set_rng_state", "manual_seed_all", "init", "_lazy_init", "synchronize", "empty_cache"]
    answers = dict.fromkeys(actions) | {
        "is_available": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (major, minor),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
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

    torch.cuda.device = torch.cuda._DeviceGuard = compilers_view.device = contextlib.nullcontext
    torch.accelerator.is_available = lambda: False  # or the compiler records real streams


def pretend_tensors() -> None:
    """What fake tensors lack for a whole training run."""
    FakeTensorMode.avoid_device_init = property(lambda mode: True)
    fake_tensor.init_gpu_context = lambda device: None
    FakeTensor.item = lambda self: 0.0  # the loss and the sampled token

    @torch.no_grad()
    def apply_anew(module, function, recurse=True):
        """Module.to_empty changes parameters in place, which a fake one does not allow."""
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                part._parameters[name] = torch.nn.Parameter(function(parameter))
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = function(buffer)
        return module

    torch.nn.Module._apply = apply_anew

    class Generator:
        def __init__(self, device=None):
            self.manual_seed = lambda seed: None  # as a generator: torch's own

    torch.Generator = Generator
    zeros = torch.zeros
    torch.zeros = lambda *args, pin_memory=False, **options: zeros(*args, **options)


def pretend_a_context_for_autograd() -> None:
    """Autograd's engine asks whether the device has a context, through a C++ object that raises without a driver.

    at::AcceleratorHooksInterface declares, in this order: the destructor (two slots of the virtual table), isBuilt,
    isAvailable, hasPrimaryContext. The object gets a copy of its table, in which the last one says yes.
    """
    get_hooks = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.POINTER(ctypes.c_void_p)
    hooks = get_hooks()  # its first word points to the table
    real_table = hooks[0]
    header_bytes = 16  # type information, in front of the table
    table = (ctypes.c_void_p * 100)()
    ctypes.memmove(table, real_table - header_bytes, ctypes.sizeof(table))
    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(lambda hooks, index: True)
    table[2 + 4] = ctypes.cast(yes, ctypes.c_void_p).value  # two words of header, four slots
    hooks[0] = ctypes.addressof(table) + header_bytes
    atexit.register(lambda *kept: None, table, yes)  # they must live until the real table is back
    atexit.register(hooks.__setitem__, 0, real_table)


def compile_for(capability: int, with_triton: bool) -> dict[str, int]:
    """Inductor and Triton generate and compile for that architecture; generated code allocates, and launches nothing.

    Returns a dict that will hold the shared memory of every kernel by its name. Without Triton there are no kernels:
    enough to weigh a run.
    """
    shared: dict[str, int] = {}

    def note_kernels(autotuner: CachingAutotuner) -> None:
        name = autotuner.fn.__name__
        for result in autotuner.compile_results:
            shared[name] = max(result.kernel.metadata.shared, shared.get(name, 0))

    target = types.SimpleNamespace()
    answer(target, get_current_target=GPUTarget("cuda", capability, 32), get_current_device=0)
    triton.runtime.driver.set_active(target)
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: triton.runtime.driver.set_active(target)
    torch._inductor.config.compile_threads = 1  # in this process
    torch._inductor.config.use_static_cuda_launcher = False
    torch._inductor.config.shape_padding = False  # it is decided by timing
    torch._inductor.config.joint_graph_constant_folding = False  # it computes an element of a constant on the device

    answer(CachingAutotuner, run=None, _dynamic_scale_rblock=None)  # the second asks a loaded kernel for its registers
    if with_triton:
        CachingAutotuner._make_launchers = note_kernels
    else:
        answer(CachingAutotuner, precompile=None)

    def empty_strided(size, stride, dtype):
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    def reinterpret(tensor, size, stride, offset=0):
        return tensor.as_strided(size, stride, tensor.storage_offset() + offset)

    torch._C._dynamo.guards._empty_strided_cuda = empty_strided
    torch._C._dynamo.guards._reinterpret_tensor = reinterpret
    return shared


class Evaluator:
    """What train.run() asks of prepare.py, on fake data: a tokenizer, batches, a clock of a second a step, a score."""

    def __init__(self, memory: Memory):
        self.memory = memory
        self.real_warm_up = train.warm_up
        self.PROFILE_REASON = "paper"
        self.CACHE_ROOT = prepare.CACHE_ROOT
        self.Tokenizer = self
        answer(self, check_data=None, hold_device=None, default_device="cuda", from_directory=self)
        answer(self, get_vocab_size=prepare.VOCAB_SIZE)
        answer(self, encode=[1], decode="?", get_bos_token_id=0)  # FakeTensor.item says 0: the sample ends at once
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
    device.FLASH_CAPABILITIES = ()  # FlashAttention-3 is no Triton kernel

    memory = Memory()
    pretend_a_driver(arguments.capability, memory)
    pretend_tensors()
    pretend_a_context_for_autograd()
    shared = compile_for(arguments.capability, with_triton=not arguments.weigh)
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
            "kernels": len(shared),
            "largest_shared": max(shared.values(), default=0),
            "shared_limit": SHARED_MEMORY_LIMIT[arguments.capability],
        }
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
