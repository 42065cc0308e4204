"""A tiny model with random weights for every supported family: what the tests convert."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from support import TINY
from wina_convert.models.twin import make_twin, random_weights
from wina_convert.runtime.classes import auto_class

WINDOW = 16  # shorter than the calibration sequences, so that it matters

TOKENS: dict[str, Any] = {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SEPARATE: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # times 4 heads is more than the hidden size, as in Gemma and Qwen3
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
SLIDING_AND_FULL = ["sliding_attention", "sliding_attention", "full_attention"]

# name -> config
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {  # with the rotary scaling of Llama 3
        "model_type": "llama",
        **SEPARATE,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama-tied": {"model_type": "llama", **SEPARATE, "tie_word_embeddings": True, "attention_bias": True},
    "mistral": {"model_type": "mistral", **SEPARATE, "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2", **SEPARATE, "head_dim": 12, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SEPARATE},
    "phi3": {"model_type": "phi3", **SEPARATE, "head_dim": 12, "sliding_window": WINDOW},
    "phi3-longrope": {  # Phi-3 with 128k of context, Phi-4-mini
        "model_type": "phi3",
        **SEPARATE,
        "head_dim": 16,
        "hidden_size": 64,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0],
        },
    },
    "gemma": {"model_type": "gemma", **SEPARATE, "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        **SEPARATE,
        "tie_word_embeddings": True,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 1.0,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **SEPARATE,
        "tie_word_embeddings": True,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 3,
        "layer_types": SLIDING_AND_FULL,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "olmo2": {"model_type": "olmo2", **SEPARATE, "head_dim": 12},
    "gpt_neox": {
        "model_type": "gpt_neox",
        **TOKENS,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        **TOKENS,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "tie_word_embeddings": True,
    },
}


def make_model(
    family: str,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Save a random model of a family, with the tokenizer of wina-lab-tiny, and return its folder.

    Args:
        family: a name of FAMILIES.
        folder: where to.
        dtype: of the weights.
        seed: of the weights.
        max_shard_size: of its safetensors files.
        changes: fields of its config to set otherwise.
    """
    fields = {**FAMILIES[family], **changes}
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    random_weights(model, seed)
    return save(model.to(dtype), Path(folder), max_shard_size)


def make_type(model_type: str, folder: Path, **changes: Any) -> Path:
    """Save a small random model of any type that transformers knows, with every kind of its layers, and return its folder.

    Args:
        model_type: as config.json names it.
        folder: where to.
        changes: fields of the type's default config to set otherwise.
    """
    config = CONFIG_MAPPING[model_type](**changes)
    with torch.device("meta"):
        skeleton = auto_class(config).from_config(config, dtype=torch.float32)
    return save(make_twin(skeleton, vocabulary=TOKENS["vocab_size"]), folder)


def save(model: PreTrainedModel, folder: Path, max_shard_size: str = "5GB") -> Path:
    """Save a model with the tokenizer of wina-lab-tiny, and return its folder."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / file, folder / file)
    return folder
