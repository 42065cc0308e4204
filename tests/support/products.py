"""Problems for the gated product, and the float64 sums that answers are held against."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # denormal
INF = torch.tensor(torch.inf)


def problem(
    seed: int, leading: tuple[int, ...], n_in: int, n_out: int, dtype: torch.dtype, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, weight_t, tau, bias; about half of the inputs are skipped."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tau = randn(n_in).abs()
    return randn(*leading, n_in).to(dtype), randn(n_in, n_out).to(dtype), tau, randn(n_out).to(dtype) if bias else None


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(y: Tensor, x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None = None) -> None:
    """Hold y against float64; whatever is NaN must be NaN in the dense product as well.

    y may lie between the roundings of the ends of what float32 accumulation allows: an infinity where that overflows.
    """
    x64, w64 = x.double(), weight_t.double()
    active = torch.where(x64.abs() <= tau.double(), 0.0, x64)
    added = 0.0 if bias is None else bias.double()
    product = active @ w64
    exact, dense = product + added, x64 @ w64 + added
    slack = 2**-22 * (active.abs() @ w64.abs() + abs(added)) + (len(tau) + 1) * SMALLEST[torch.float32]
    slack += torch.finfo(x.dtype).eps * (product.abs() + exact.abs())  # some paths round before they add the bias
    slack += SMALLEST[x.dtype]
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert not (y.isnan() & ~dense.isnan()).any(), "NaN where the dense product is a number"
    assert torch.equal(y.isnan(), exact.isnan())
    infinite = exact.isinf()
    assert torch.equal(y[infinite].double(), exact[infinite])
    rest = exact.isfinite()
    low, high = ((exact + side)[rest].to(x.dtype) for side in (-slack, slack))
    assert ((low <= y[rest]) & (y[rest] <= high)).all()
