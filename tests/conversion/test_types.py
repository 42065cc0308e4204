"""Types of models that no table lists: found out, tried on a twin, converted, and each product held against float64.

A dozen stands for all structures; `tests/benchmarks/model_types.py` runs every type that transformers knows.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from support.families import make_type
from support.reference import assert_dense_at_0, assert_each_product_follows_the_rule, convert
from wina_convert.conversion import twin_proof
from wina_convert.errors import OptionError, SourceError
from wina_convert.models.source import open_source
from wina_convert.progress import silent
from wina_convert.runtime.linear import WinaLinear

pytestmark = pytest.mark.slow

HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8}
TYPES: dict[str, dict[str, Any]] = {
    "opt": {},  # a block that returns a tuple, LayerNorm, biases
    "bloom": {},  # queries, keys and values interleaved
    "falcon": {"hidden_size": 512, "num_attention_heads": 8},  # a subclass of nn.Linear
    "gptj": {"n_embd": 1024, "n_head": 8},  # attention and feed-forward side by side
    "gpt_bigcode": {},  # one key-value head
    "starcoder2": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8},
    "granite": {"hidden_size": 1024, "intermediate_size": 2048, **HEADS},  # multipliers on the residual stream
    "cohere2": {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        **HEADS,
    },  # sliding and full attention, one norm for both
    "olmo3": {"hidden_size": 1024, "intermediate_size": 2048, **HEADS},  # norms behind the blocks
    "smollm3": {},  # layers without rotary embeddings
    "glm4": {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8},
    "qwen3_5_text": {},  # linear attention among full attention
    # keys and values of earlier layers in later ones
    "gemma4_text": {"num_kv_shared_layers": 18, "use_double_wide_mlp": True},
    # and several hidden states a token; its sparse activations would skip more than was asked
    "gemma3n_text": {"activation_sparsity_pattern": [0.0] * 35},
    "minicpm3": {"hidden_size": 640, "intermediate_size": 1280, **HEADS},  # latent attention
}
QUICK = ("opt", "qwen3_5_text")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in TYPES])
def test_a_type_that_no_table_lists_converts(kind: str, tmp_path: Path) -> None:
    dense = make_type(kind, tmp_path / "dense", **TYPES[kind])
    report = convert(dense, tmp_path / "gated")
    assert report["verification"]["parity"] < 1e-5
    assert report["verification"]["held_out"]["achieved"] == pytest.approx(0.5, abs=0.03)
    assert_dense_at_0(dense, tmp_path / "gated")
    assert_each_product_follows_the_rule(dense, tmp_path / "gated", 0.5)


def test_a_dry_run_says_what_stays_dense_and_why(tmp_path: Path) -> None:
    dense = make_type("qwen3_5_text", tmp_path / "dense")
    plan = convert(dense, tmp_path / "gated", dry_run=True)
    assert set(plan["stays_dense"]) == {"linear_attn.in_proj_a", "linear_attn.in_proj_b"}
    assert all("forgets" in reason for reason in plan["stays_dense"].values())
    gated = {name.partition(".layers.")[2].partition(".")[2] for name in plan["projections"]}
    assert {"linear_attn.in_proj_qkv", "self_attn.q_proj", "mlp.down_proj"} <= gated
    assert not (tmp_path / "gated").exists()


@pytest.mark.parametrize(("targets", "block"), [("attention", "self_attn."), ("mlp", "fc")])
def test_targets_tell_attention_from_feed_forward(targets: str, block: str, tmp_path: Path) -> None:
    dense = make_type("opt", tmp_path / "dense")
    plan = convert(dense, tmp_path / "gated", dry_run=True, targets=(targets,))
    assert {name.partition(".layers.")[2].partition(".")[2].startswith(block) for name in plan["projections"]} == {True}


def test_a_basis_is_refused_for_what_no_test_has_turned(tmp_path: Path) -> None:
    dense = make_type("opt", tmp_path / "dense")
    assert convert(dense, tmp_path / "plan", dry_run=True, basis="auto")["basis"] == {"kind": "none"}
    with pytest.raises(OptionError, match=r"no test has turned a model of type 'opt'.*--basis none"):
        convert(dense, tmp_path / "gated", basis="pca")


def wrong_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    right = WinaLinear.set_threshold
    monkeypatch.setattr(WinaLinear, "set_threshold", lambda self, value, *rest: right(self, 0.5 * value, *rest))


def wrong_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(*arguments: Any) -> dict[str, torch.Tensor]:
        return {name: 2 * tensor for name, tensor in stored(*arguments).items()}

    stored = twin_proof.stored_tensors
    monkeypatch.setattr(twin_proof, "stored_tensors", doubled)


def wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = twin_proof._streamed
    monkeypatch.setattr(twin_proof, "_streamed", lambda *arguments: streamed(*arguments).roll(1, 0))


@pytest.mark.parametrize(
    ("damage", "what"),
    [(wrong_layer, "one at a time"), (wrong_weight, "at sparsity 0"), (wrong_threshold, "at 50%")],
)
def test_nothing_is_converted_where_the_twin_fails(
    damage: Any, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_type("opt", tmp_path / "dense")
    twin_proof.check_twin(open_source(str(dense)), silent)
    monkeypatch.setattr(twin_proof, "_passed", set())
    damage(monkeypatch)
    with pytest.raises(SourceError, match=rf"'opt', which was tried on a small random model.*{what}"):
        convert(dense, tmp_path / "gated")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("differs", "rounding", "passes"), [(9e-6, 0.0, True), (2e-5, 0.0, False), (2e-5, 1e-5, True), (5e-5, 1e-5, False)]
)
def test_logits_may_differ_by_what_the_dense_model_itself_rounds(differs: float, rounding: float, passes: bool) -> None:
    expected = torch.tensor([0.5, -2.0])
    with nullcontext() if passes else pytest.raises(SourceError, match="differ by"):
        twin_proof._compare("the model", expected + 2 * differs, expected, lambda: rounding)


def test_what_a_dense_twin_rounds_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, seen = open_source(str(make_type("opt", tmp_path / "dense", ffn_dim=2048))), list[float]()
    monkeypatch.setattr(twin_proof, "_compare", lambda what, found, expected, rounding: seen.append(rounding()))
    twin_proof.check_twin(source, silent)
    assert len(seen) == 3
    assert all(1e-9 < one < 1e-5 for one in seen)


def test_the_twin_is_tried_without_a_bar_of_another_library(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(make_type("opt", tmp_path / "dense", ffn_dim=1024)))
    capfd.readouterr()
    monkeypatch.setattr(logging, "_tqdm_active", True)
    twin_proof.check_twin(source, silent)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_the_twin_takes_nothing_from_the_global_generator(tmp_path: Path) -> None:
    source = open_source(str(make_type("opt", tmp_path / "dense")))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    twin_proof.check_twin(source, silent)
    assert torch.equal(torch.rand(3), expected)
