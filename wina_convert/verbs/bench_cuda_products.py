"""`wina bench --kernels --device cuda`: single products against the dense one of torch and against the card's memory."""

from collections.abc import Callable, Sequence
from datetime import date
from statistics import median

import torch
from torch import Tensor

from ..defaults import torch_defaults
from ..progress import Progress, silent
from . import card
from .bench_products import Timed, asked_of, product_calls, product_rows
from .benchmark import SPARSITIES
from .card import CardBenchmark

# Llama 3 8B: q, k and v side by side, o, gate and up side by side, down
SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))


@torch_defaults()
@torch.inference_mode()
def bench_cuda_products(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    dtype: str = "auto",
    repeats: int = 31,
    progress: Progress = silent,
) -> CardBenchmark:
    """Time single products at batch 1 on a GPU: replays of CUDA graphs in which each call reads another copy of the weight.

    Args:
        device: the card.
        shapes: (inputs, outputs) of each.
        sparsities: fractions of inputs to skip.
        dtype: "auto" (bfloat16), "float32", "bfloat16" or "float16".
        repeats: replays of each, of which the median counts.
        progress: shows how far it is.

    Raises:
        OptionError: an option cannot be used.
    """
    card.use(device)
    asked, number = asked_of(shapes, sparsities, dtype, repeats)
    timed: list[Timed] = []
    read, copy = card.bandwidths(device)
    with progress("Timing", len(dict.fromkeys(shapes)) * repeats, "turn") as advance:
        for n_in, n_out in dict.fromkeys(shapes):
            copies = 1 + max(1, card.CACHED // (n_in * n_out * number.itemsize))
            memory = (0.02 * torch.randn(n_in * n_out, device=device)).to(number).repeat(copies, 1)
            calls, kept = product_calls(torch.randn(1, n_in, device=device).to(number), n_out, asked)
            replays = {key: card.captured(_over(memory, call)) for key, call in calls.items()}
            clocks: dict[float | None, list[float]] = {key: [] for key in calls}
            for _ in range(repeats):
                for key, replay in replays.items():
                    clocks[key].append(card.seconds(replay) / copies)
                advance(1)
            timed += [Timed(n_in, n_out, key, kept[key], median(took)) for key, took in clocks.items()]
    return CardBenchmark(
        card.card_name(device),
        date.today().isoformat(),
        f"single products, {str(number).removeprefix('torch.')}",
        read,
        copy,
        True,
        products=product_rows(timed, number.itemsize, dict.fromkeys(shapes, read)),
    )


def _over(memory: Tensor, call: Callable[[Tensor], object]) -> Callable[[], object]:
    """The call with each copy [inputs * outputs] of the weight."""
    return lambda: [call(weight) for weight in memory]
