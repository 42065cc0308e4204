"""A model whose layers are loaded one at a time gives what the whole model gives."""

from pathlib import Path

import pytest
import torch

from support.families import make_type
from support.reference import dense_model
from wina_convert.models.source import open_source
from wina_convert.models.stream import dense_stream

TYPES = {
    "gemma4_text": {},  # each layer is given an embedding of the tokens of its own
    "bart": {},  # a decoder that was trained with an encoder
    "ctrl": {},  # a tied head with a bias of its own; the embedding is scaled in place
    "electra": {},  # embeddings narrower than the hidden states
}


@pytest.mark.parametrize("kind", TYPES)
def test_layers_one_at_a_time_are_the_model(kind: str, tmp_path: Path) -> None:
    dense = make_type(kind, tmp_path / "dense", **TYPES[kind])
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
