"""What the dense pass gathers is what the whole model shows; and the turned headers are known before any weight is read."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from support.bases import CPU, random_tokens, turn_of
from support.families import FAMILIES, make_model
from support.folders import config_of, tensors_of
from wina_convert.conversion.turn import find_basis, gather, plan_turn, read_turned
from wina_convert.errors import CalibrationError, OptionError, SourceError
from wina_convert.fitting.fit_basis import principal_axes
from wina_convert.fitting.moments import Moments, Squares, pick_tokens
from wina_convert.models.source import Source, open_source
from wina_convert.progress import silent

STREAM = ("llama", "llama-tied", "qwen2", "qwen3", "gemma", "phi3")
VALUES_ALONE = ("gemma2", "olmo2", "gpt_neox", "gpt2")
BEHIND = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj", "gate_up_proj"),
}
OUTPUTS = ("o_proj", "attn.c_proj", "attention.dense")


def moments_of(folder: Path, tokens: Tensor, kind: str = "pca", batch: int = 1) -> Moments:
    return gather(turn_of(folder, kind), torch.float32, tokens, batch, CPU, 0, silent)


def whole_model_inputs(folder: Path, tokens: Tensor, endings: tuple[str, ...]) -> dict[str, Tensor]:
    """What enters these modules, [tokens, features], float64."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), {}
    for name, module in model.named_modules():
        if name.endswith(endings):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: found.update({name: inputs[0].double().flatten(0, 1)})
            )
    with torch.no_grad():
        model(tokens)
    return found


@pytest.mark.parametrize("family", STREAM)
def test_the_stream_is_seen_behind_norms_without_gains(family: str, tmp_path: Path):
    source = make_model(family, tmp_path)
    tokens = random_tokens(3, 24)
    tensors = tensors_of(source)
    epsilon, expected = config_of(source)["rms_norm_eps"], 0.0
    for name, hidden in whole_model_inputs(source, tokens, tuple(BEHIND)).items():
        layer, _, norm = name.rpartition(".")
        x = hidden / (hidden.square().mean(1, keepdim=True) + epsilon).sqrt()
        readers = [
            key
            for key in tensors
            if key.startswith(f"{layer}.") and key.endswith(tuple(f"{r}.weight" for r in BEHIND[norm]))
        ]
        expected = expected + x.t() @ x / len(x) * sum(tensors[key].numel() for key in readers)
    found = moments_of(source, tokens).stream
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_squares_are_summed_over_many_blocks_and_sequences():
    squares, sequences = Squares(600, CPU), [torch.randn(length, 600) for length in range(1, 20)]
    for x in sequences:
        squares.add(x)
    exact = sum(x.double().t() @ x.double() for x in sequences)
    torch.testing.assert_close(squares.total(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    assert torch.equal(squares.total(), squares.total().t())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", [*STREAM, *VALUES_ALONE])
def test_values_are_seen_where_the_output_projection_reads_them(family: str, batch: int, tmp_path: Path):
    source = make_model(family, tmp_path)
    tokens = random_tokens(3, 24)
    moments, sizes = moments_of(source, tokens, batch=batch), turn_of(source).sizes
    inputs = whole_model_inputs(source, tokens, OUTPUTS)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    group = sizes.heads // sizes.kv_heads
    for (name, z), mixed, columns in zip(inputs.items(), moments.mixed, moments.columns, strict=True):
        weight = model.get_submodule(name).weight.detach().double()
        weight = weight.t() if family == "gpt2" else weight  # [out, in]
        for head in range(sizes.kv_heads):
            parts = [
                slice(h * sizes.head_dim, (h + 1) * sizes.head_dim) for h in range(head * group, (head + 1) * group)
            ]
            seen = sum(z[:, part].t() @ z[:, part] for part in parts) / len(z)
            read = sum(weight[:, part].t() @ weight[:, part] for part in parts)
            torch.testing.assert_close(mixed[head], seen, rtol=0, atol=1e-5 * float(seen.abs().max()))
            torch.testing.assert_close(columns[head], read, rtol=0, atol=1e-6 * float(read.abs().max()))


@pytest.mark.parametrize("family", ["llama-tied", "phi3", "gpt_neox", "gpt2"])
def test_in_the_basis_found_values_are_uncorrelated_and_columns_orthogonal(family: str, tmp_path: Path):
    source = make_model(family, tmp_path / "source")
    turn, tokens = turn_of(source), random_tokens(4, 32)
    basis = find_basis(turn, torch.float32, tokens, 1, CPU, 0, silent)
    moments = moments_of(source, tokens)
    for mixed, columns, forward, inverse in zip(
        moments.mixed, moments.columns, basis.values, basis.inverses, strict=True
    ):
        for gram in (forward @ mixed @ forward.mT, inverse.mT @ columns @ inverse):
            off = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
            assert off.abs().max() <= 1e-5 * gram.abs().max()


@pytest.mark.parametrize("family", ["llama-tied", "gemma"])
def test_principal_axes_uncorrelate_the_stream_the_largest_first(family: str, tmp_path: Path):
    source = make_model(family, tmp_path)
    tokens = random_tokens(4, 32)
    basis = find_basis(turn_of(source), torch.float32, tokens, 1, CPU, 0, silent)
    q, stream = basis.residual, moments_of(source, tokens).stream
    torch.testing.assert_close(q.t() @ q, torch.eye(len(q), dtype=torch.float64), rtol=0, atol=1e-12)
    turned = q.t() @ stream @ q
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-9 * turned.max()
    assert (turned.diagonal().diff() <= 0).all()
    assert torch.equal(q, principal_axes(stream))
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_kept_sample_is_bounded_and_of_the_stream(tmp_path: Path):
    source = make_model("llama-tied", tmp_path)
    turn = turn_of(source, "fitted")
    kept = {}
    for rows in (4, 8):
        picks = pick_tokens(rows, 32, 64, 0)
        assert sum(map(len, picks)) == 64
        assert all((pick.diff() > 0).all() for pick in picks)
        object.__setattr__(turn.effort, "kept", 64)
        moments = gather(turn, torch.float32, random_tokens(rows, 32), 1, CPU, 0, silent)
        kept[rows] = [site.inputs.shape for site in moments.sites]
    assert kept[4] == kept[8] == [(64, 48)] * 4
    weights = sum(reader.weights for site in moments.sites for reader in site.readers)
    tensors = tensors_of(source)
    assert weights == sum(
        t.numel()
        for n, t in tensors.items()
        if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"))
    )
    gain = tensors["model.layers.0.post_attention_layernorm.weight"].double()
    fused = tensors["model.layers.0.mlp.gate_proj.weight"].double() * gain  # 96 rows of 48: kept as a triangle
    factor = moments.sites[1].readers[0].factor
    assert factor.shape == (48, 48)
    torch.testing.assert_close(factor.double().t() @ factor.double(), fused.t() @ fused, rtol=0, atol=1e-4)


def test_an_overflow_is_refused(tmp_path: Path):
    source = make_model("llama", tmp_path, dtype=torch.float16)
    tensors = tensors_of(source)
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(60000)
    from safetensors.torch import save_file

    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrationError, match="--dtype float32"):
        gather(turn_of(source), torch.float16, random_tokens(2, 16), 1, CPU, 0, silent)


# --- the plan ---


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_made_from_headers_and_names_what_the_family_allows(family: str, tmp_path: Path, monkeypatch):
    source = open_source(str(make_model(family, tmp_path)))
    for name in ("read", "rows"):
        monkeypatch.setattr(Source, name, None)  # no weight may be read
    assert plan_turn(source, "none", CPU) is None
    for kind in ("pca", "fitted", "auto"):
        turn = plan_turn(source, kind, CPU)
        stream = turn.reason is None
        assert turn.kind == ("values" if not stream else "fitted" if kind == "auto" else kind)
        assert (turn.effort is not None) == (turn.kind == "fitted")
        assert turn.origin is source
        new = set(turn.source.tensors) - set(source.tensors)
        tied = source.config.get("tie_word_embeddings", FAMILIES[family]["tie_word_embeddings"])
        assert new == ({"lm_head.weight"} if stream and tied else set())
        for name in new:
            embedding = source.tensors["model.embed_tokens.weight"]
            assert (turn.source.tensors[name].dtype, turn.source.tensors[name].shape) == (
                embedding.dtype,
                embedding.shape,
            )
        changed = {"tie_word_embeddings"} if stream else set()
        config = json.loads(turn.source.config_text)
        assert config == turn.source.config
        assert {key: value for key, value in config.items() if key not in changed} == {
            key: value for key, value in source.config.items() if key not in changed
        }
        assert config.get("tie_word_embeddings") is False or not stream
        assert ("as it was" in turn.shown()["stream"]) == (not stream)


def test_an_unknown_kind_is_refused(tmp_path: Path):
    with pytest.raises(OptionError, match="give one of none, pca, fitted, auto"):
        plan_turn(open_source(str(make_model("llama", tmp_path))), "svd", CPU)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"],
)
def test_nan_is_refused_by_the_name_of_its_tensor(name: str, tmp_path: Path):
    from safetensors.torch import save_file

    source = make_model("llama", tmp_path)
    turn = turn_of(source)
    basis = find_basis(turn, torch.float32, random_tokens(4, 32), 1, CPU, 0, silent)
    tensors = tensors_of(source)
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=f"'{name}'.*NaN or infinity"):
        dict(read_turned(turn, basis, turn.source.tensors, CPU))
