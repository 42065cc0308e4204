"""A gated model on single tokens, whole contexts, padding and batches without rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import wina_convert
from support.families import make_model
from support.products import DTYPES
from support.reference import EDGE, Reference, logits, reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass(frozen=True)
class Pair:
    """A random llama, its checkpoint calibrated on 32 tokens of a context of 128, and the reference at 50%."""

    dense: Path
    gated: Path
    reference: Reference
    model: Any

    def prompt(self, length: int, rows: int = 1) -> tuple[Tensor, Tensor]:
        """Random tokens [rows, length] that bring no score to the edge of its threshold, and the reference's logits."""
        for seed in range(40):
            tokens = torch.randint(2, 2048, (rows, length), generator=torch.Generator().manual_seed(seed))
            self.reference.edge = 1.0
            found = logits(self.reference.model, tokens)
            if self.reference.edge > EDGE:
                return tokens, found
        raise AssertionError("every prompt has a score at its threshold; something is wrong with the reference")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    dense, gated = make_model("llama", folder / "dense"), folder / "gated"
    wina_convert.convert(str(dense), gated, samples=8, seq_len=32, basis="none")
    return Pair(dense, gated, reference(dense, gated, 0.5), AutoModelForCausalLM.from_pretrained(gated))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
def test_a_single_token_has_the_logits_of_the_reference(rows, pair):
    tokens, expected = pair.prompt(1, rows)
    close(logits(pair.model, tokens), expected)


def test_a_prompt_as_long_as_the_context_has_the_logits_of_the_reference(pair):
    context = pair.model.config.max_position_embeddings
    assert context == 128  # four times the calibration's sequences
    tokens, expected = pair.prompt(context)
    close(logits(pair.model, tokens), expected)
    with torch.no_grad():  # and so it has when its second half comes token by token
        step = pair.model(tokens[:, : context // 2], use_cache=True)
        found = [step.logits]
        for at in range(context // 2, context):
            step = pair.model(tokens[:, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
            found.append(step.logits)
    close(torch.cat(found, 1), expected)


LENGTHS = [1, 2, 9, 30]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["counted from the first token", "as they come"])
@pytest.mark.parametrize("lengths", [LENGTHS, [1, 3]], ids=str)  # more rows than the compiled kernels take, and fewer
def test_a_padded_row_has_the_logits_of_the_row_alone(lengths, positions, side, pair):
    alone = [pair.prompt(length) for length in lengths]
    width = max(lengths)
    tokens, mask = (
        torch.ones(len(lengths), width, dtype=torch.int64),
        torch.zeros(len(lengths), width, dtype=torch.int64),
    )
    places = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for row, place in enumerate(places):
        tokens[row, place], mask[row, place] = alone[row][0][0], 1
    options = {} if positions == "as they come" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        found = pair.model(tokens, attention_mask=mask, **options).logits
    assert found.isfinite().all()  # the padding's own too
    for row, place in enumerate(places):
        close(found[row, place], alone[row][1][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_padding_alone_leaves_its_neighbours_as_they_are(side, dtype, pair):
    model = AutoModelForCausalLM.from_pretrained(pair.gated, dtype=dtype)
    tokens = pair.prompt(12)[0].repeat(3, 1)
    mask = torch.ones_like(tokens)
    mask[1] = 0
    mask[2, :4] = 0 if side == "left" else 1
    mask[2, -4:] = 0 if side == "right" else 1
    with torch.no_grad():
        found, plain = model(tokens, attention_mask=mask).logits, model(tokens).logits
    assert found.isfinite().all()
    assert torch.equal(found[0], plain[0])


def test_a_batch_without_rows_fares_as_in_the_dense_model(pair):
    dense = AutoModelForCausalLM.from_pretrained(pair.dense)
    for name, kind in (
        ("model.layers.0.mlp", "mlp"),
        ("lm_head", "head"),
        ("model.layers.1.self_attn.q_proj", "q_proj"),
    ):
        for shape in ((0, 5, 48), (2, 0, 48)):
            plain, gated = (model.get_submodule(name)(torch.zeros(shape)) for model in (dense, pair.model))
            assert plain.shape == gated.shape, kind
    for shape in ((0, 5), (2, 0)):
        tokens = torch.zeros(shape, dtype=torch.int64)
        outcomes = []
        for model in (dense, pair.model):
            try:
                outcomes.append(logits(model, tokens).shape)
            except RuntimeError as error:  # transformers' attention refuses it
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
