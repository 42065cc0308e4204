"""What a benchmark measured, and the measure itself: this machine, its memory, a clock.

Everything compared is timed in turns in one process and given as medians, so that a busy machine disturbs all alike.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.kernels import cpu

SPARSITIES = (0.0, 0.5, 0.65)
WORKING_SET = 1 << 28  # bytes that products and reads cycle through, so that no cache holds them


@dataclass(frozen=True)
class Speed:
    """One model at one sparsity.

    Attributes:
        sparsity: asked; None: the dense model.
        achieved: fraction of the gated weights' inputs skipped while decoding.
        prefill_seconds: median time of the prompt.
        prefill_ratio: the dense model's over it.
        decode_seconds: median time of a token.
        tokens_per_second: its inverse.
        ratio: the dense model's time of a token over it.
        bytes_per_token: bytes of weights and cutoffs read for a token.
        roofline: the time that these bytes take at the measured bandwidth, over the time of a token.
    """

    sparsity: float | None
    achieved: float | None
    prefill_seconds: float
    prefill_ratio: float
    decode_seconds: float
    tokens_per_second: float
    ratio: float
    bytes_per_token: int
    roofline: float


@dataclass(frozen=True)
class ProductSpeed:
    """One product y = W x at one sparsity.

    Attributes:
        in_features, out_features: of W.
        sparsity: None: the dense product of torch.
        seconds: median time.
        ratio: the dense product's time over it.
        bandwidth: bytes a second of the weights it reads.
        roofline: that over the measured bandwidth.
    """

    in_features: int
    out_features: int
    sparsity: float | None
    seconds: float
    ratio: float
    bandwidth: float
    roofline: float


@dataclass(frozen=True)
class Benchmark:
    """What was measured, and where.

    Attributes:
        machine: processor, threads, versions.
        date: the day.
        model: name, dtype and prompt, or the dtype of single products.
        bandwidth: bytes a second at which memory was read, median.
        interleaved: whether the dense and the gated model were timed in turns; else one after the other.
        models: the dense model, then the gated one at each sparsity; empty for single products.
        products: for each shape the dense product, then the gated one at each sparsity; empty for a model.
    """

    machine: str
    date: str
    model: str
    bandwidth: float
    interleaved: bool
    models: tuple[Speed, ...] = ()
    products: tuple[ProductSpeed, ...] = ()


def machine() -> str:
    """This machine in a line: processor, threads, versions."""
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def processor() -> str:
    """What the processor calls itself."""
    named = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return named
    names = (line.partition(":")[2].strip() for line in info.read_text("utf-8").splitlines() if "model name" in line)
    return next(names, named)


def seconds(call: Callable[..., object], *arguments: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def read(memory: Tensor) -> None:
    """Read the memory once, as fast as it can be."""
    if compiled := cpu.compiled(torch.float32):
        compiled.read(memory)
    else:
        stored = memory.flatten().view(torch.uint8)
        stored[: len(stored) // 8 * 8].view(torch.int64).sum()  # byte by byte it would wait for the sums
