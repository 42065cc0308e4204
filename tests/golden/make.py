"""Writes the golden checkpoints: what a conversion wrote when a format version was new, and the logits it gave.

    python tests/golden/make.py FOLDER  # tests/golden for the golden ones themselves

The checkpoints of a format version are written once. From the release of a version on, those of that version must never be
written again: they stand for checkpoints that people have, which every later release has to read. A new format version
gets golden checkpoints of its own beside these, and this file then makes those; now it makes version 2.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.families import random_weights
from wina_convert import convert, load
from wina_convert.format.config import FORMAT_VERSION

CHARACTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,;:!?'\"-"
SPARSITIES = {"0": 0.0, "default": None, "0.8": 0.8}
TOKENS: dict[str, Any] = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
NEWS = Path(__file__).parents[2] / "calibration" / "text" / "news.txt"  # enough for a token a character
# name -> dtype, config, and options of the conversion
MODELS: dict[str, tuple[torch.dtype, dict[str, Any], dict[str, Any]]] = {
    "llama-bfloat16-tuned": (  # another basis, biases along the sparsity, learned column weights
        torch.bfloat16,
        {
            "model_type": "llama",
            **TOKENS,
            "hidden_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        {"basis": "fitted", "tune": True},
    ),
    "gpt2-float32-sparse": (  # low-rank terms, Conv1D, which stores its weights transposed, biases, and a gated head
        torch.float32,
        {"model_type": "gpt2", **TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {"scheme": "r-sparse", "basis": "none", "targets": ["all", "head"]},
    ),
}


def make_source(folder: Path, dtype: torch.dtype, fields: dict[str, Any]) -> None:
    """A model with random weights, and a tokenizer with a token for each of a few characters."""
    fields = dict(fields)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[fields.pop("model_type")](**fields), dtype=torch.float32)
    random_weights(model, seed=1)
    model.to(dtype).save_pretrained(folder)
    vocabulary = {"<unk>": 0} | {character: index for index, character in enumerate(CHARACTERS, start=1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def expected_logits(folder: Path, stored: str) -> dict[str, Tensor]:
    """input_ids [2, 12]; float32 logits [2, 12, 64], computed in the stored dtype and in float32, which rounds less."""
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(2))
    found = {"input_ids": tokens}
    for dtype in {stored, "float32"}:
        for name, sparsity in SPARSITIES.items():
            model = load(str(folder), sparsity=sparsity, dtype=dtype)
            with torch.no_grad():
                found[f"logits.{dtype}.{name}"] = model(tokens).logits.float()
    return found


def main(out: Path) -> None:
    """Convert every model into a folder."""
    version = f"v{FORMAT_VERSION}"
    if (out / version).exists():
        sys.exit(f"{out / version} exists: golden checkpoints of a format version are written once")
    for name, (dtype, fields, options) in MODELS.items():
        with TemporaryDirectory() as temporary:
            source = Path(temporary) / name
            make_source(source, dtype, fields)
            convert(str(source), out / version / name, samples=32, seq_len=32, calibration=str(NEWS), **options)
        expected = expected_logits(out / version / name, str(dtype).removeprefix("torch."))
        save_file(expected, out / version / f"{name}.expected.safetensors")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
