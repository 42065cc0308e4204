"""The best low-rank stand-in for a matrix: its largest singular directions (R-Sparse, arXiv 2504.19449, section 3.2)."""

import torch
from torch import Tensor

ROUNDS = 30  # of the power iteration that looks for a larger direction


def low_rank_factors(weight_t: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors whose product is as near as a matrix of that rank can be (Eckart and Young).

    From the eigenvectors of the smaller of W'W and WW', in float64, and rounded to the weight's dtype.

    Args:
        weight_t: [in, out], any floating dtype.
        rank: r, at most in and out.

    Returns:
        [in, r] and [r, out], in the dtype of the weight.
    """
    exact = weight_t.double()
    if weight_t.shape[0] <= weight_t.shape[1]:
        left = _largest(exact @ exact.t(), rank)
        right = left.t() @ exact
    else:
        right = _largest(exact.t() @ exact, rank).t()
        left = exact @ right.t()
    return left.to(weight_t.dtype).contiguous(), right.to(weight_t.dtype).contiguous()


def _largest(gram: Tensor, rank: int) -> Tensor:
    """Its eigenvectors with the largest eigenvalues [n, r], each with the sign that makes its largest entry positive."""
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    signed: Tensor = vectors * signs
    return signed


def is_best(weight_t: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether factors are the largest singular directions of a matrix, up to their rounding; without decomposing it again.

    What they leave of the matrix has nothing in their directions, and no direction larger than their smallest.

    Args:
        weight_t: [in, out].
        left: [in, r], the dtype of the weight.
        right: [r, out], likewise.
    """
    weight, a, b = weight_t.double(), left.double(), right.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return False
    rest = weight - a @ b
    scale = float(torch.linalg.matrix_norm(weight))
    room = 8 * torch.finfo(weight_t.dtype).eps * scale
    inner_a, inner_b = torch.linalg.qr(a).Q, torch.linalg.qr(b.t()).Q
    if float((inner_a.t() @ rest).norm()) > room or float((rest @ inner_b).norm()) > room:
        return False
    smallest = float(torch.linalg.svdvals(inner_a.t() @ (a @ b) @ inner_b).min()) if a.numel() else 0.0
    probe = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
    probe = probe + torch.linspace(0, 1, len(probe), dtype=torch.float64, device=weight.device)
    for _ in range(ROUNDS):
        probe = rest.t() @ (rest @ (probe / probe.norm().clamp_min(1e-300)))
    largest = float((rest @ (probe / probe.norm().clamp_min(1e-300))).norm())
    return largest <= smallest + room
