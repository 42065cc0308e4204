"""sentence-transformers takes a checkpoint as the encoder of a model for embeddings, gated."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from wina_convert import set_sparsity
from wina_convert.runtime.linear import gated_modules

pytestmark = pytest.mark.slow
TEXTS = ["Once upon a time", "The river was wide and the captain gave the order"]


def last_states(folder: Path, sparsity: float) -> np.ndarray:
    """The hidden state of the last token of each text [texts, hidden]."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    set_sparsity(model, sparsity)
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1] for text in TEXTS]
    return torch.stack(rows).numpy()


def test_embeddings_are_the_gated_models_and_the_model_for_them_is_saved(wina_tiny: Path, tmp_path: Path):
    model = SentenceTransformer(str(wina_tiny), device="cpu")
    assert len(gated_modules(model)) == 28
    found = model.encode(TEXTS)
    np.testing.assert_allclose(found, last_states(wina_tiny, 0.5), rtol=0, atol=1e-4)
    model.save(str(tmp_path / "saved"))
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS), found, atol=1e-5
    )
    set_sparsity(model[0].auto_model, 0.0)
    dense = last_states(wina_tiny, 0.0)
    np.testing.assert_allclose(model.encode(TEXTS), dense, rtol=0, atol=1e-4)
    assert np.abs(dense - found).max() > 0.1
