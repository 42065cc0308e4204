"""Where rounding decides between experts a few tokens differ by more than rounding: they do not count as a fault."""

import pytest
import torch
from torch import Tensor

from wina_convert.models.measure import _Sums


@pytest.mark.parametrize(("part", "tokens"), [(1.0, 40), (0.9, 36), (0.5, 20)])
def test_the_error_is_the_largest_of_a_part_of_the_tokens(part: float, tokens: int) -> None:
    sums, target = _Sums(), torch.zeros(8, dtype=torch.int64)
    worst: list[Tensor] = []
    for _ in range(5):
        expected, found = torch.randn(8, 30), torch.randn(8, 30)
        sums.add(found, target, expected)
        worst += (found - expected).abs().max(dim=1).values
    assert sums.error(part) == pytest.approx(float(sorted(worst)[tokens - 1]))
