"""Experts that are given too few tokens take the counts of all experts of their layer; others keep their own."""

import pytest
import torch

from support.products import randn
from wina_convert.fitting.calibrate import FEWEST, calibrate_layer
from wina_convert.format.grid import GRID
from wina_convert.runtime.linear import WinaLinear
from wina_convert.runtime.rule import scores

LAYER = "model.layers.0"


def gate(seed: int, n_in: int = 32, n_out: int = 16) -> WinaLinear:
    made = WinaLinear(n_in, n_out, GRID, bias=False)
    with torch.no_grad():
        made.weight_t.copy_(randn(seed, n_in, n_out))
        made.column_norms.copy_(made.weight_t.norm(dim=1))
        made.thresholds.zero_()
    return made


@pytest.mark.parametrize("few", [0, 1, FEWEST - 1])
def test_the_threshold_of_an_expert_with_few_tokens_is_that_of_all_together(few: int) -> None:
    names = [f"{LAYER}.mlp.experts.{number}.up_proj" for number in range(3)] + [f"{LAYER}.mlp.shared_experts.up_proj"]
    gates = {name: gate(number) for number, name in enumerate(names)}
    tokens = [FEWEST, few, FEWEST + 40, few]
    inputs = [(1 + number) * randn(7 + number, count, 32) for number, count in enumerate(tokens)]

    def run(hidden: torch.Tensor, number: int = 0) -> torch.Tensor:
        for name, x in zip(names, inputs, strict=True):
            gates[name](x)
        return hidden

    with torch.no_grad():
        found, pooled = calibrate_layer(run, gates, {0.5: [torch.zeros(1, 1, 32)]}, lambda done: None)
    assert pooled == {names[1]}  # the fourth is no expert that a router chooses
    every = [scores(x, gates[name].column_norms).flatten() for name, x in zip(names, inputs, strict=True)]
    for number in (0, 2):
        expected = float(every[number].quantile(0.5))
        assert found[names[number]][0.5].quantile(0.5) == pytest.approx(expected, rel=0.02)
    together = float(torch.cat(every[:3]).quantile(0.5))
    assert found[names[1]][0.5].quantile(0.5) == pytest.approx(together, rel=0.02)
