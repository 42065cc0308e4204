"""A turned model is its source's function, for every family, by any basis; and what a fold does to a tensor."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.bases import CPU, difference, logits, random_basis, random_orthogonal, random_tokens, turn_of, write_turned
from support.families import FAMILIES, make_model
from support.folders import tensors_of
from wina_convert.architectures import ARCHITECTURES, Residual
from wina_convert.conversion.turn import read_turned
from wina_convert.conversion.turn_proof import check_turned
from wina_convert.errors import VerificationError
from wina_convert.fitting import basis as bases
from wina_convert.fitting.basis import Basis, Fold, balanced_values, fold_tensor
from wina_convert.progress import silent

EXACT = 5e-6  # of the largest logit: what float32 rounds
STREAM = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "phi3", "phi3-longrope")
VALUES_ALONE = ("gemma2", "gemma3_text", "olmo2", "gpt_neox", "gpt2")


def test_every_family_is_one_that_can_be_turned_or_whose_values_can():
    assert {*STREAM, *VALUES_ALONE} == set(FAMILIES)
    for name in FAMILIES:
        residual = ARCHITECTURES[FAMILIES[name]["model_type"]].residual
        assert isinstance(residual, Residual) == (name in STREAM)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_turned_model_computes_what_its_source_does(family: str, tmp_path: Path):
    source = make_model(family, tmp_path / "source")
    turn = turn_of(source)
    basis = random_basis(turn)
    tokens = random_tokens(2, 40)
    turned = write_turned(turn, basis, tmp_path / "turned")
    assert difference(logits(source, tokens), logits(turned, tokens)) <= EXACT
    before, after = tensors_of(source), tensors_of(turned)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(before) & set(turn.folds)
    assert check_turned(turn, basis, tokens, CPU, silent) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_basis_that_is_not_exact_is_refused(family: str, tmp_path: Path):
    turn = turn_of(make_model(family, tmp_path))
    good = random_basis(turn)
    wrong = [replace(good, inverses=good.inverses + 0.001 * good.inverses.roll(1, -1))]
    if good.residual is not None:
        wrong += [replace(good, residual=good.residual * 1.0001), replace(good, residual=good.residual * torch.nan)]
    for basis in wrong:
        with pytest.raises(VerificationError, match="in the new basis the logits differ by"):
            check_turned(turn, basis, random_tokens(2, 40), CPU, silent)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_norms_behind_a_block_make_a_turned_stream_another_model(family: str, tmp_path: Path, monkeypatch):
    """The table of families is not merely careful: the stream of these cannot be turned."""
    source = make_model(family, tmp_path / "source")
    kind = ARCHITECTURES[FAMILIES[family]["model_type"]]
    llama = ARCHITECTURES["llama" if family == "olmo2" else "gemma"].residual
    readers = llama.readers[1:] if family == "olmo2" else llama.readers
    monkeypatch.setitem(
        ARCHITECTURES,
        FAMILIES[family]["model_type"],
        replace(kind, residual=replace(llama, readers=readers)),
    )
    turn = turn_of(source)
    with pytest.raises(VerificationError):
        check_turned(turn, random_basis(turn), random_tokens(2, 40), CPU, silent)


def test_every_bias_that_a_layer_can_have_is_turned_or_stays(tmp_path: Path):
    source = make_model("llama-tied", tmp_path / "source", mlp_bias=True)
    turn = turn_of(source)
    turned = write_turned(turn, random_basis(turn), tmp_path / "turned")
    before, after = tensors_of(source), tensors_of(turned)
    biases = [name for name in before if name.endswith("_proj.bias")]
    assert len(biases) == 14
    moved = ("o_proj.bias", "down_proj.bias", "v_proj.bias")
    assert {name for name in biases if not torch.equal(before[name], after[name])} == {
        name for name in biases if name.endswith(moved)
    }
    tokens = random_tokens(2, 40)
    assert difference(logits(source, tokens), logits(turned, tokens)) <= EXACT


def test_tensors_are_the_products_of_the_definition(tmp_path: Path):
    """Readers W g Q, writers Q'W, values A W, the columns that read them times the inverse; two query heads a value head."""
    source = make_model("llama-tied", tmp_path / "source")
    turn = turn_of(source)
    basis = random_basis(turn)
    q, tensors = basis.residual, {name: tensor.double() for name, tensor in tensors_of(source).items()}
    found = dict(read_turned(turn, basis, turn.source.tensors, CPU, torch.float64))
    layer, embedded = "model.layers.1", tensors["model.embed_tokens.weight"]
    gain = tensors[f"{layer}.input_layernorm.weight"]
    forward, inverse = torch.block_diag(*basis.values[1]), torch.block_diag(*basis.inverses[1].repeat_interleave(2, 0))
    expected = {
        "model.embed_tokens.weight": embedded @ q,
        "lm_head.weight": embedded * tensors["model.norm.weight"] @ q,
        "model.norm.weight": torch.ones_like(gain),
        f"{layer}.input_layernorm.weight": torch.ones_like(gain),
        f"{layer}.self_attn.q_proj.weight": tensors[f"{layer}.self_attn.q_proj.weight"] * gain @ q,
        f"{layer}.self_attn.v_proj.weight": forward @ tensors[f"{layer}.self_attn.v_proj.weight"] * gain @ q,
        f"{layer}.self_attn.v_proj.bias": forward @ tensors[f"{layer}.self_attn.v_proj.bias"],
        f"{layer}.self_attn.o_proj.weight": q.t() @ tensors[f"{layer}.self_attn.o_proj.weight"] @ inverse,
        f"{layer}.self_attn.o_proj.bias": q.t() @ tensors[f"{layer}.self_attn.o_proj.bias"],
        f"{layer}.mlp.down_proj.weight": q.t() @ tensors[f"{layer}.mlp.down_proj.weight"],
        f"{layer}.self_attn.q_proj.bias": tensors[f"{layer}.self_attn.q_proj.bias"],
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("slice_", [1, 7, 100, 5000])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "fold",
    [
        Fold(gain="g", offset=1.0, turned="inputs"),
        Fold(gain="g", turned="inputs", values="rows", starts=(6, 9)),
        Fold(values="rows", starts=(2, 8)),
        Fold(turned="outputs"),
        Fold(turned="outputs", values="columns", starts=(0, 3, 6, 9)),
    ],
)
def test_slices_change_nothing(fold: Fold, transposed: bool, slice_: int, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=generator)
    basis = Basis("pca", random_orthogonal(12, 1), values, torch.linalg.inv(values))
    tensor, gain = torch.randn(12, 12, generator=generator), torch.randn(12, generator=generator)
    gain = gain if fold.gain else None
    fold = replace(fold, transposed=transposed)
    monkeypatch.setattr(bases, "SLICE", 1 << 40)
    whole = fold_tensor(basis, fold, tensor, gain)
    monkeypatch.setattr(bases, "SLICE", slice_)
    torch.testing.assert_close(fold_tensor(basis, fold, tensor, gain), whole, rtol=1e-13, atol=1e-13)
    other = fold_tensor(basis, replace(fold, transposed=False), tensor.t() if transposed else tensor, gain)
    torch.testing.assert_close(other.t() if transposed else other, whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_tensor_is_rounded_once(dtype: torch.dtype):
    basis = Basis("pca", random_orthogonal(32, 0), torch.empty(0, 0, 0, 0), torch.empty(0, 0, 0, 0))
    tensor = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for fold, matrix in ((Fold(turned="inputs"), tensor), (Fold(turned="outputs"), tensor.t())):
        assert torch.equal(fold_tensor(basis, fold, matrix, None, dtype), fold_tensor(basis, fold, matrix).to(dtype))


def test_a_fold_that_needs_a_gain_says_so():
    basis = Basis("pca", random_orthogonal(4, 0), torch.empty(0, 0, 0, 0), torch.empty(0, 0, 0, 0))
    with pytest.raises(ValueError, match=r"needs a\.weight"):
        fold_tensor(basis, Fold(gain="a.weight", turned="inputs"), torch.ones(2, 4))


@pytest.mark.parametrize("residual", [None, random_orthogonal(4, 0)])
def test_a_stored_basis_is_the_same(residual: torch.Tensor | None):
    values = torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = Basis("fitted", residual, values, torch.linalg.inv(values))
    found = bases.stored_basis("fitted", bases.basis_tensors(basis))
    assert found.residual is residual
    assert torch.equal(found.values, basis.values)
    assert torch.equal(found.inverses, basis.inverses)


# --- the values ---


def spd(count: int, size: int, seed: int, rank: int | None = None) -> torch.Tensor:
    noise = torch.randn(count, size, rank or size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise @ noise.mT


def test_balanced_values_are_uncorrelated_and_their_columns_orthogonal_of_the_same_size():
    mixed, columns = spd(3, 8, 0), spd(3, 8, 1)
    forward, inverse = balanced_values(mixed, columns)
    torch.testing.assert_close(forward @ inverse, torch.eye(8, dtype=torch.float64).expand(3, 8, 8))
    seen, read = forward @ mixed @ forward.mT, inverse.mT @ columns @ inverse
    torch.testing.assert_close(seen, torch.diag_embed(seen.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(read, torch.diag_embed(read.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-9)
    torch.testing.assert_close(seen, read, rtol=1e-5, atol=1e-5)
    assert (seen.diagonal(dim1=1, dim2=2).diff() <= 0).all()


def test_values_of_which_nothing_is_seen_or_read_stay_and_few_dimensions_stay_finite():
    zero = torch.zeros(1, 8, 8, dtype=torch.float64)
    for mixed, columns in ((zero, spd(1, 8, 0)), (spd(1, 8, 0), zero)):
        for found in balanced_values(mixed, columns):
            assert torch.equal(found[0], torch.eye(8, dtype=torch.float64))
    for mixed, columns in ((spd(1, 8, 0, 2), spd(1, 8, 1)), (spd(1, 8, 0), spd(1, 8, 1, 2))):
        forward, inverse = balanced_values(mixed, columns)
        torch.testing.assert_close(forward @ inverse, torch.eye(8, dtype=torch.float64)[None], rtol=0, atol=1e-7)
