"""A model whose layers are loaded one at a time gives what the whole model gives."""

import re
from pathlib import Path

import pytest
import torch

from support.breaking import failing
from support.families import make_type
from support.reference import dense_model
from wina_convert.errors import SourceError
from wina_convert.models import stream
from wina_convert.models.handed import Stored, packed, unpacked
from wina_convert.models.source import open_source
from wina_convert.models.stream import dense_stream

pytestmark = pytest.mark.slow

TYPES = {
    "gemma4_text": {},  # each layer is given an embedding of the tokens of its own
    "gemma4_text sharing": {  # later layers take keys and values of earlier ones, in heads of two widths
        "num_kv_shared_layers": 18,
        "use_double_wide_mlp": True,
    },
    "gemma3n_text": {},  # a token has four hidden states, and half of the layers take keys and values of the others
    "bart": {},  # a decoder that was trained with an encoder
    "ctrl": {},  # a tied head with a bias of its own; the embedding is scaled in place
    "electra": {},  # embeddings narrower than the hidden states
}


@pytest.mark.parametrize("kind", TYPES)
def test_layers_one_at_a_time_are_the_model(kind: str, tmp_path: Path) -> None:
    dense = make_type(kind.partition(" ")[0], tmp_path / "dense", **TYPES[kind])
    tokens = torch.randint(4, 2000, (5, 20), generator=torch.Generator().manual_seed(0))
    stream = dense_stream(open_source(str(dense)), torch.float32, torch.device("cpu"))
    for batch_size in (1, 2):  # the last batch of two has one sequence
        states = stream.embed(tokens.split(batch_size))
        for index in range(len(stream.layers)):
            with stream.layer(index) as layer:
                states = [layer(hidden, number) for number, hidden in enumerate(states)]
        with stream.head() as head:
            found = torch.stack([head(row) for hidden in states for row in hidden])
        with torch.no_grad():
            expected = dense_model(dense)(input_ids=tokens).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_keys_and_values_that_are_handed_on_come_out_as_they_went_in() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 2, 5, 12, generator=generator)
    shapes = {"full": (2, 3, 5, 8), "sliding": (2, 2, 5, 4)}
    pairs = {
        kind: (torch.randn(s, generator=generator), torch.randn(s, generator=generator)) for kind, s in shapes.items()
    }
    stored = {"sliding": Stored(8, 4), "full": Stored(24, 8)}  # in another order
    state = packed(hidden, 4, pairs)
    assert state.shape == (2, 5, 4 * 12 + 2 * 24 + 2 * 8)
    again, found = unpacked(state, 12, 4, stored)
    assert torch.equal(again, hidden)
    assert found.keys() == pairs.keys()
    assert all(torch.equal(a, b) for kind in pairs for a, b in zip(found[kind], pairs[kind], strict=True))
    row, _ = unpacked(packed(hidden[0], 0, pairs)[1:, :3], 12, 0, stored)  # some tokens of a sequence
    assert torch.equal(row, hidden[0, 1:, :3])


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "TimmModel requires the timm library. You can install it: `pip install timm`. Please note",
            "pip install timm`",
        ),
        ("no module named 'mamba_ssm'", "a library that is not installed (no module named 'mamba_ssm')"),
    ],
)
def test_a_library_that_transformers_misses_is_named(
    said: str, told: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "model_config", failing(ImportError(said)))
    with pytest.raises(SourceError, match=re.escape(told)):
        stream.build_skeleton(open_source(str(tiny)), torch.float32)
