"""Structure found on a skeleton: for the listed families, what the table says."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from support.families import FAMILIES
from wina_convert.architectures import ARCHITECTURES
from wina_convert.errors import SourceError
from wina_convert.models.discovery import discover, kind_of, observe
from wina_convert.models.structure import decoder_layers
from wina_convert.models.twin import HEAD_DIM, layer_kinds, make_twin, shrink


def skeleton(model_type: str, **fields: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**fields), dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_is_what_the_table_lists(family: str) -> None:
    fields = dict(FAMILIES[family])
    listed = ARCHITECTURES[fields["model_type"]]
    found = discover(skeleton(fields.pop("model_type"), **fields))
    assert found.layers == listed.layers
    assert set(found.attention) == set(listed.attention)
    assert set(found.mlp) == set(listed.mlp)
    assert found.outputs == listed.outputs == 0
    assert found.dense == {}
    assert {name: found.prior[name] for name in listed.prior if name.startswith("self_attn.q_")} == {
        name: share for name, share in listed.prior.items() if name.startswith("self_attn.q_")
    }


def test_a_checkpoint_and_its_source_in_any_dtype_are_of_one_kind_and_other_widths_are_not() -> None:
    model, other = skeleton("opt"), skeleton("opt", ffn_dim=1024)
    expected = kind_of(model)
    model.config.dtype, model.config.transformers_weights = torch.bfloat16, "pip install wina-convert"
    assert kind_of(model) == expected != kind_of(other)


def test_a_layer_that_returns_a_tuple_is_seen() -> None:
    assert observe(skeleton("bloom")).outputs > 0


def test_a_subclass_that_computes_something_else_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = skeleton("opt")

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    def twin_with_doubled(*arguments: Any) -> PreTrainedModel:
        twin = make_twin(*arguments)
        for layer in twin.get_submodule(decoder_layers(twin)).children():
            layer.fc1.__class__ = Doubled
        return twin

    monkeypatch.setattr("wina_convert.models.discovery.make_twin", twin_with_doubled)
    monkeypatch.setattr("wina_convert.models.discovery._seen", {})
    found = discover(model)
    assert found.dense == {"fc1": "its layer does not use it as a plain linear map of text"}
    assert "fc2" in found.mlp


def test_a_subclass_that_takes_a_part_of_the_features_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = skeleton("opt")

    class Narrow(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.cat([x, x], -1)) if x.shape[-1] < self.in_features else super().forward(x)

    def twin_with_narrow(*arguments: Any) -> PreTrainedModel:
        twin = make_twin(*arguments)
        for layer in twin.get_submodule(decoder_layers(twin)).children():
            wide = layer.fc1.in_features
            layer.fc1.register_forward_pre_hook(lambda _, inputs, wide=wide: (inputs[0][..., : wide // 2],))
            layer.fc1.__class__ = Narrow
        return twin

    monkeypatch.setattr("wina_convert.models.discovery.make_twin", twin_with_narrow)
    monkeypatch.setattr("wina_convert.models.discovery._seen", {})
    assert set(discover(model).dense) == {"fc1"}


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("xlm", "transformer.attentions and .* for its 12 decoder layers"),
        ("jetmoe", "keeps its experts in a form that is not known"),
        ("mamba", "state-space block"),
    ],
)
def test_what_cannot_be_gated_is_refused_with_the_reason(model_type: str, why: str) -> None:
    with pytest.raises(SourceError, match=why):
        discover(skeleton(model_type))


def test_a_twin_has_every_kind_of_layer_in_its_order() -> None:
    model = skeleton("gemma3_text")
    twin = make_twin(model)
    kinds = layer_kinds(model)
    assert layer_kinds(twin) == kinds[: twin.config.num_hidden_layers]
    assert set(layer_kinds(twin)) == set(kinds)
    assert twin.config.num_hidden_layers < model.config.num_hidden_layers


@pytest.mark.parametrize("layers", [35, 30])
def test_half_of_the_layers_of_a_twin_share_where_those_of_the_model_do(layers: int) -> None:
    model = skeleton("gemma3n_text", num_hidden_layers=layers)
    twin = make_twin(model)
    assert (twin.config.num_hidden_layers, twin.config.num_kv_shared_layers) == (10, 5)
    assert set(layer_kinds(twin)) == set(layer_kinds(model))
    assert twin.config.intermediate_size == [16384 // 16] * 10


def test_all_widths_are_divided_alike() -> None:
    config = CONFIG_MAPPING["llama"](hidden_size=4096, intermediate_size=14336, num_attention_heads=32, head_dim=128)
    small = shrink(config, 32, 2)
    assert (small.head_dim, small.hidden_size, small.intermediate_size) == (HEAD_DIM, 512, 1792)
    assert (small.num_attention_heads, small.num_hidden_layers) == (32, 2)


def test_the_same_seed_gives_the_same_twin() -> None:
    model = skeleton("opt")
    first, again, other = (make_twin(model, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())
