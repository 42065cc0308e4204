"""`wina doctor`: what this machine has, how gated products would be computed on it and why, and what is amiss."""

import os
import platform
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from statistics import median

import psutil
import torch

from .. import __version__
from ..defaults import torch_defaults
from ..models.device import choose_device
from ..runtime.kernels import cpu, cuda
from . import benchmark
from .benchmark import processor, read, seconds
from .card import bandwidths

PACKAGES = ("torch", "transformers", "huggingface_hub", "safetensors", "accelerate", "numba", "numpy")
# Instructions that decide about speed: the width of a vector, and products in half precision.
TELLING = ("avx", "avx2", "avx512f", "asimd", "sve", *sorted(set().union(*cpu.INSTRUCTIONS.values())))
READS = 7
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@dataclass(frozen=True)
class Kernel:
    """How gated products of one kind are computed here.

    Attributes:
        device: cpu, cuda:0 ...
        dtype: of the weights.
        rows: of a call: tokens that are computed together.
        by: what computes them.
        why: the reason where it is not the fastest way.
    """

    device: str
    dtype: str
    rows: str
    by: str
    why: str | None = None


@dataclass(frozen=True)
class Memory:
    """The memory of a device.

    Attributes:
        device: cpu, cuda:0 ...
        name: of the processor or GPU.
        total, free: bytes.
        bandwidth: bytes a second at which it is read, median; None: too little is free to measure.
    """

    device: str
    name: str
    total: int
    free: int
    bandwidth: float | None


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        versions: of Python and the packages; None for one that is not installed.
        device: what `--device auto` takes.
        cores: that this process may use.
        threads: that torch, and so the kernels, use.
        instructions: of the processor, those that decide about speed; None where they cannot be read.
        loader: whether `import torch` makes transformers load WINA checkpoints.
        memory: of every device.
        kernels: for every device, dtype and number of rows.
        advice: what could be better, and how; empty: nothing.
    """

    versions: dict[str, str | None]
    device: str
    cores: int
    threads: int
    instructions: tuple[str, ...] | None
    loader: bool
    memory: tuple[Memory, ...]
    kernels: tuple[Kernel, ...]
    advice: tuple[str, ...]


@torch_defaults()
@torch.inference_mode()
def diagnose() -> Diagnosis:
    """Look at this machine; takes a second or two, and some more where kernels are compiled for the first time."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if torch.version.cuda else []
    cores, threads = _cores(), torch.get_num_threads()
    found = cpu.instructions()
    kernels = [*_cpu_kernels(), *(kernel for gpu in gpus for kernel in _gpu_kernels(gpu))]
    loader = _armed()
    return Diagnosis(
        versions=_versions(),
        device=str(choose_device("auto")),
        cores=cores,
        threads=threads,
        instructions=None if found is None else tuple(name for name in TELLING if name in found),
        loader=loader,
        memory=(_cpu_memory(), *map(_gpu_memory, gpus)),
        kernels=tuple(kernels),
        advice=tuple(_advice(cores, threads, loader, kernels)),
    )


def _cores() -> int:
    """Cores that this process may use."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"wina-convert": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _armed() -> bool:
    """Whether torch imports our entry point."""
    named = {point.name for point in entry_points(group="torch.backends")}
    return "wina_convert" in named and os.environ.get(AUTOLOAD, "1") == "1"


def _cpu_kernels() -> list[Kernel]:
    kernels = []
    for dtype in cuda.TYPES:
        name = str(dtype).removeprefix("torch.")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            works = cpu.compiled(dtype) is not None
        reason = next((str(one.message) for one in said), "the compiled kernels do not work here")
        few = Kernel("cpu", name, f"1 to {cpu.FEW_ROWS}", "compiled kernel")
        kernels.append(few if works else Kernel("cpu", name, few.rows, "torch operations", reason))
        widened = dtype in cpu.HALF and not cpu.multiplies(dtype)
        kernels.append(
            Kernel("cpu", name, "more", "dense product in float32", f"no instructions for products in {name}")
            if widened
            else Kernel("cpu", name, "more", "dense product")
        )
    return kernels


def _gpu_kernels(device: torch.device) -> list[Kernel]:
    works: dict[torch.dtype, bool] = {}
    tau = torch.zeros(64, dtype=torch.float32, device=device)
    with warnings.catch_warnings(record=True) as said:  # it is said once for all dtypes
        warnings.simplefilter("always")
        for dtype in cuda.TYPES:
            one = torch.ones(64, 64, dtype=dtype, device=device)
            works[dtype] = cuda.products(one[:1], [one], [tau], [None]) is not None
    reason = next((str(one.message) for one in said), "the kernel does not work on this GPU")
    kernels = []
    for dtype, well in works.items():
        place, few = (str(device), str(dtype).removeprefix("torch.")), f"1 to {cuda.ROWS}"
        kernels.append(
            Kernel(*place, few, "compiled kernel") if well else Kernel(*place, few, "torch operations", reason)
        )
        kernels.append(Kernel(*place, "more", "dense product"))
    return kernels


def _cpu_memory() -> Memory:
    memory = psutil.virtual_memory()
    bandwidth = None
    if memory.available > 4 * benchmark.WORKING_SET:
        block = torch.ones(benchmark.WORKING_SET, dtype=torch.uint8)
        read(block)  # the first one compiles
        bandwidth = benchmark.WORKING_SET / median(seconds(read, block) for _ in range(READS))
    return Memory("cpu", processor(), memory.total, memory.available, bandwidth)


def _gpu_memory(device: torch.device) -> Memory:
    free, total = torch.cuda.mem_get_info(device)
    bandwidth = None
    try:
        with torch.cuda.device(device):
            bandwidth = bandwidths(device, READS)[0]
    except torch.OutOfMemoryError:  # others use it
        pass
    torch.cuda.empty_cache()
    return Memory(str(device), torch.cuda.get_device_name(device), total, free, bandwidth)


def _advice(cores: int, threads: int, loader: bool, kernels: list[Kernel]) -> list[str]:
    advice = []
    if threads < cores:
        cause = "OMP_NUM_THREADS is set" if "OMP_NUM_THREADS" in os.environ else "torch chose so"
        advice.append(
            f"{threads} of {cores} cores are used ({cause}); set OMP_NUM_THREADS={cores} if no other program needs them"
        )
    if threads > cores:
        advice.append(f"{threads} threads share {cores} cores; set OMP_NUM_THREADS={cores}")
    if not loader:
        cause = (
            f"{AUTOLOAD} is set to {os.environ[AUTOLOAD]}" if AUTOLOAD in os.environ else "it is not installed with pip"
        )
        advice.append(
            f"`import torch` does not arm the loader ({cause}); import wina_convert before a checkpoint is loaded"
        )
    slow = dict.fromkeys(f"{one.device}: {one.why}" for one in kernels if one.by == "torch operations")
    return advice + list(slow)
