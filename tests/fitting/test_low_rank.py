"""The low-rank term: against a decomposition in float64, and what `is_best` takes for it."""

import pytest
import torch

from wina_convert.fitting.low_rank import is_best, low_rank_factors
from wina_convert.format.low_rank import rank_of

SHAPES = [(24, 40), (40, 24), (16, 16), (1, 9), (9, 1)]


def matrix(n_in: int, n_out: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n_in, n_out, dtype=torch.float64).mul(torch.linspace(2, 0.1, n_in)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_factors_are_the_nearest_matrix_of_their_rank(shape: tuple[int, int], dtype: torch.dtype):
    weight_t = matrix(*shape, dtype)
    rank = min(3, *shape)
    left, right = low_rank_factors(weight_t, rank)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    assert left.dtype == right.dtype == dtype
    u, s, vh = torch.linalg.svd(weight_t.double(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
    error = (left.double() @ right.double() - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(dtype).eps
    assert is_best(weight_t, left, right)
    assert all(torch.equal(a, b) for a, b in zip((left, right), low_rank_factors(weight_t, rank), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_factors_are_not_taken_for_them(dtype: torch.dtype):
    weight_t = matrix(24, 40, dtype)
    left, right = low_rank_factors(weight_t, 3)
    every_left, every_right = low_rank_factors(weight_t, 24)
    assert not is_best(weight_t, left, right * 1.2)
    assert not is_best(weight_t, left.roll(1, 0), right)
    assert not is_best(weight_t, torch.full_like(left, float("nan")), right)
    assert not is_best(weight_t, torch.zeros_like(left), torch.zeros_like(right))
    assert not is_best(
        weight_t, every_left[:, 5:8].contiguous(), every_right[5:8].contiguous()
    )  # singular, not the largest


def test_a_matrix_of_lower_rank_or_of_zeros_has_them_too():
    low = torch.randn(12, 1) @ torch.randn(1, 20)
    for weight_t in (low, torch.zeros(12, 20)):
        left, right = low_rank_factors(weight_t, 3)
        torch.testing.assert_close(left @ right, weight_t, rtol=1e-4, atol=1e-5)
        assert is_best(weight_t, left, right)


def test_the_rank_is_about_the_part_of_the_weights_that_was_asked_for():
    assert rank_of(0.05, 4096, 14336) == 159
    assert rank_of(0.05, 4, 4) == 1
    assert rank_of(0.9999, 1, 50) == 1
    part = 159 * (4096 + 14336) / (4096 * 14336)
    assert part == pytest.approx(0.05, rel=0.01)
