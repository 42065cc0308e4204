"""What a benchmark on a GPU measured, and the measure itself: this card, its memory, its clock.

Times are between events that the card records, so that what the processor does meanwhile counts only where the card waits for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

from ..errors import OptionError
from .benchmark import ProductSpeed

CACHED = 320_000_000  # bytes of copies that products cycle through, several times the cache of any card
WORKING_SET = 1 << 30  # bytes that are read and copied to measure the memory


@dataclass(frozen=True)
class CardSpeed:
    """One model at one sparsity, decoding at batch 1.

    Attributes:
        sparsity: asked; None: the dense model.
        achieved: fraction of the gated weights' inputs skipped while decoding.
        step_seconds: time of a compiled step with a static cache, without waiting for its token.
        step_ratio: the dense model's over it.
        generate_seconds: median time of a token from `generate` with a static cache, which compiles the same steps.
        generate_ratio: the dense model's over it.
        eager_seconds: median time of a token from `generate` as it is by default, not compiled.
        eager_ratio: the dense model's over it.
        bytes_per_token: bytes of weights and cutoffs read for a token.
        roofline: the time that these bytes take at the measured bandwidth of reading, over that of a step.
    """

    sparsity: float | None
    achieved: float | None
    step_seconds: float
    step_ratio: float
    generate_seconds: float
    generate_ratio: float
    eager_seconds: float
    eager_ratio: float
    bytes_per_token: int
    roofline: float


@dataclass(frozen=True)
class CardBenchmark:
    """What was measured, and where.

    Attributes:
        card: name of the GPU, and versions.
        date: the day.
        model: name, dtype and prompt, or the dtype of single products.
        read_bandwidth: bytes a second at which its memory was read.
        copy_bandwidth: bytes a second, read and written together, at which it was copied.
        interleaved: whether the dense and the gated model were timed in turns; else one after the other.
        models: the dense model, then the gated one at each sparsity; empty for single products.
        products: for each shape the dense product, then the gated one at each sparsity; empty for a model.
    """

    card: str
    date: str
    model: str
    read_bandwidth: float
    copy_bandwidth: float
    interleaved: bool
    models: tuple[CardSpeed, ...] = ()
    products: tuple[ProductSpeed, ...] = ()


def use(device: torch.device) -> None:
    """Make the card the current one, on which events and graphs are.

    Raises:
        OptionError: it is none of NVIDIA's.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        raise OptionError(f"device is {str(device)!r}, for which there is no benchmark; give cpu or cuda")
    torch.cuda.set_device(device.index or 0)


def card_name(device: torch.device) -> str:
    """This card in a line, with versions."""
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, transformers {transformers.__version__}"


def free_bytes(device: torch.device) -> int:
    """Memory of the card that is free."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def event() -> Any:
    """A moment in the work that the card has been given so far; `elapsed` tells the time between two."""
    moment = torch.cuda.Event(enable_timing=True)
    moment.record()
    return moment


def elapsed(begin: Any, end: Any) -> float:
    """Seconds between two events; waits for the second."""
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def seconds(call: Callable[[], object]) -> float:
    """How long the card needs for what the call gives it."""
    begin = event()
    call()
    return elapsed(begin, event())


def captured(calls: Callable[[], object]) -> Callable[[], None]:
    """Run these calls once, and give what runs them again on the card alone: a CUDA graph."""
    calls()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    graph.replay()
    return graph.replay


def bandwidths(device: torch.device, repeats: int = 9) -> tuple[float, float]:
    """Bytes a second at which the card reads its memory, and at which it copies (read and written bytes together)."""
    memory = torch.ones(WORKING_SET // 4, dtype=torch.float32, device=device)
    other = torch.empty_like(memory)

    def timed(call: Callable[[], Tensor]) -> float:
        call()
        return median(seconds(call) for _ in range(repeats))

    return memory.nbytes / timed(memory.sum), 2 * memory.nbytes / timed(lambda: other.copy_(memory))
