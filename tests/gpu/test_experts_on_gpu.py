"""A small mixture of experts on the GPU: its launches, its logits beside torch's, and its conversion there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from support.experts import MIXTURES
from support.families import make_type
from support.gating import gate_layers
from wina_convert import convert, load
from wina_convert.runtime.experts import open_experts
from wina_convert.runtime.grouping import group
from wina_convert.runtime.kernels import cuda, driver
from wina_convert.runtime.linear import gated_modules, observing
from wina_convert.runtime.rule import scores

LAYERS, GIVEN = 2, 2
PROMPT = torch.tensor([[5, 310, 7, 1999, 45, 45, 3, 800, 12, 64]])


@pytest.fixture
def model() -> Any:
    """Random weights, float32; half of each input is skipped."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=GIVEN,
        vocab_size=2048,
    )
    model = MixtralForCausalLM(config).eval()
    open_experts(model)
    gate_layers(model)

    def see(name: str, gate: Any, x: Tensor) -> None:
        gate.set_threshold(scores(x, gate.column_norms).quantile(0.5))

    with observing(gated_modules(model), see), torch.no_grad():
        model(PROMPT)
    group(model)
    return model.cuda()


@torch.no_grad()
def test_a_token_launches_the_experts_that_it_is_given(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []
    launch = driver.launch

    def count(function: int, grid: tuple[int, int], *others: object) -> None:
        launches.append(grid[0])
        launch(function, grid, *others)

    monkeypatch.setattr(driver, "launch", count)
    token = PROMPT[:, :1].cuda()
    found = model(token).logits
    assert len(launches) == LAYERS * (4 + 2 * GIVEN)  # q, k, v and o; of an expert gate with up, and down
    monkeypatch.setattr(cuda, "products", lambda *_: None)
    expected = model(token).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(
        found.cpu(), model.cpu()(token.cpu()).logits, rtol=0, atol=1e-4 * float(expected.abs().max())
    )


def test_a_mixture_is_converted_on_the_card_and_generates_there(tmp_path: Path) -> None:
    dense = make_type("qwen3_moe", tmp_path / "dense", **MIXTURES["qwen3_moe"])
    options: dict[str, Any] = {"samples": 8, "seq_len": 64, "basis": "none"}
    report = convert(str(dense), tmp_path / "gated", device="cuda", **options)
    assert report["verification"]["parity"] < 1e-5
    assert report["verification"]["held_out"]["achieved"] == pytest.approx(0.5, abs=0.03)
    found = load(str(tmp_path / "gated"), device_map="cuda").generate(PROMPT.cuda(), max_new_tokens=8, do_sample=False)
    assert torch.equal(found.cpu(), load(str(tmp_path / "gated")).generate(PROMPT, max_new_tokens=8, do_sample=False))
