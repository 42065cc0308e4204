"""A decoder layer of three gated projections side by side, whose errors add up exactly, to divide a sparsity on."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wina_convert.format.grid import GRID
from wina_convert.runtime.linear import WinaLinear

WIDTH = 32
STATES = [torch.randn(1, 40, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def projection(inputs: int, outputs: int, seed: int, scale: float = 1.0, low_rank: float = 0.0) -> WinaLinear:
    """A random projection that skips nothing yet; with a low-rank term, that term is zero."""
    made = WinaLinear(inputs, outputs, GRID, bias=False, low_rank=low_rank)
    weight_t = scale * torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(seed))
    for parameter in made.parameters():
        parameter.data.zero_()
    made.weight_t.data.copy_(weight_t)
    made.column_norms.data.copy_(weight_t.norm(dim=1))
    return made


def three_gates() -> dict[str, WinaLinear]:
    """Of three sizes; a fourth of the weights of `strong` matter a thousand times as much as those of `weak`."""
    return {
        "weak": projection(WIDTH, 96, 1, 0.01),
        "strong": projection(WIDTH, 48, 2),
        "small": projection(WIDTH, 8, 3),
    }


def run_of(gates: Mapping[str, WinaLinear]) -> Callable[..., Tensor]:
    """The layer: the outputs of all projections, one behind the other."""

    def run(hidden: Tensor, number: int = 0) -> Tensor:
        with torch.no_grad():
            return torch.cat([gate(hidden) for gate in gates.values()], -1)

    return run


def lost(gate: WinaLinear, part: float) -> Tensor:
    """The squared error of a projection that skips this part of STATES, by token, in float64 and with the exact quantile."""
    x = torch.cat(STATES).double().flatten(0, 1)
    scores = x.abs() * gate.column_norms.double()
    ordered = scores.flatten().sort().values
    threshold = ordered[min(int(part * len(ordered)), len(ordered)) - 1] if part > 0 else -1.0
    squares: Tensor = (torch.where(scores <= threshold, x, 0.0) @ gate.weight_t.double()).square().sum(-1)
    return squares
