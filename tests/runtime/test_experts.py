"""Experts opened into modules of their own: what they compute, what they hold, and what of them is run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from support.experts import MIXTURES
from wina_convert import load
from wina_convert.errors import CheckpointError, SourceError
from wina_convert.models.twin import make_twin
from wina_convert.runtime import experts, linear
from wina_convert.runtime.experts import open_experts, opened_experts
from wina_convert.runtime.grouping import SWITCH
from wina_convert.verbs.bench_models import make_dense

TOKENS = torch.randint(4, 500, (2, 20))


def twin(kind: str) -> Any:
    config = CONFIG_MAPPING[kind](**MIXTURES[kind])
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return make_twin(skeleton, seed=3).double()


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("kind", MIXTURES)
def test_opened_experts_compute_what_the_model_does_and_close_again(kind: str) -> None:
    model = twin(kind)
    stored, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model)
    open_experts(model)
    assert opened_experts(model)
    assert all(parameter.dim() < 3 for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-12)
    for name, module in opened_experts(model).items():
        model.set_submodule(name, module.closed())
    again = model.state_dict()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_opening_twice_changes_nothing() -> None:
    model = twin("mixtral")
    open_experts(model)
    names = [name for name, _ in model.named_modules()]
    open_experts(model)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"])
def test_an_expert_sees_the_tokens_that_it_is_given_and_no_other(kind: str) -> None:
    model = twin(kind)
    open_experts(model)
    seen: dict[str, int] = {}

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, inputs: seen.__setitem__(name, len(inputs[0])))

    for path, module in opened_experts(model).items():
        for number in range(module.count):
            watch(f"{path}.{number}", module.get_submodule(f"{number}.up_proj"))
    logits(model)
    for path in opened_experts(model):
        given = sum(count for name, count in seen.items() if name.startswith(f"{path}."))
        assert given == TOKENS.numel() * model.config.num_experts_per_tok
    seen.clear()
    logits(model, TOKENS[:1, :1])
    assert len(seen) == len(opened_experts(model)) * model.config.num_experts_per_tok


def test_no_token_is_no_result() -> None:
    model = twin("mixtral")
    open_experts(model)
    (module, *_) = opened_experts(model).values()
    empty = torch.empty(0, model.config.hidden_size, dtype=torch.float64)
    assert module(empty, torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)).shape == empty.shape


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from support.families import make_type
    from support.reference import convert

    folder = tmp_path_factory.mktemp("experts")
    dense = make_type("mixtral", folder / "dense", **MIXTURES["mixtral"])
    convert(dense, folder / "gated", samples=2)
    return dense, folder / "gated"


def test_the_model_of_a_benchmark_is_the_one_of_transformers(folders: tuple[Path, Path]) -> None:
    dense, gated = folders
    plain, made = AutoModelForCausalLM.from_pretrained(dense), make_dense(load(str(gated)))
    assert [(name, type(part)) for name, part in made.named_modules()] == [
        (name, type(part)) for name, part in plain.named_modules()
    ]
    assert all(torch.equal(made.get_parameter(name), tensor) for name, tensor in plain.named_parameters())
    assert torch.equal(logits(made), logits(plain))


def test_gate_and_up_of_an_expert_are_one_launch(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(str(folders[1]))
    monkeypatch.setenv(SWITCH, "0")
    apart = load(str(folders[1]))
    groups: list[int] = []
    together = linear.gated_linears

    def counted(*args: Any) -> Any:
        groups.append(len(args[1]))
        return together(*args)

    monkeypatch.setattr(linear, "gated_linears", counted)
    assert torch.equal(logits(model, TOKENS[:1, :1]), logits(apart, TOKENS[:1, :1]))
    assert groups == [2] * model.config.num_hidden_layers * model.config.num_experts_per_tok


def test_more_experts_than_any_model_has_are_refused(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "MOST", 7)
    with pytest.raises(SourceError, match=r"asks for 8 experts; at most 7 make sense; get the file again"):
        open_experts(twin("mixtral"))
    with pytest.raises(CheckpointError, match="8 experts"):
        load(str(folders[1]))
