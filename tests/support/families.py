"""A tiny model with random weights for every supported family: what the tests convert."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from support import TINY

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


def random_weights(model: PreTrainedModel, seed: int) -> None:
    """Weights at which every layer changes the hidden state and the logits differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    owners = dict(model.named_modules())
    with torch.no_grad():
        for path, parameter in model.named_parameters():  # a tied head is not named again
            owner, _, name = path.rpartition(".")
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            if isinstance(owners[owner], nn.Embedding):
                parameter.copy_(0.05 * noise)  # small: else a tied head answers with the token it was given
            elif isinstance(owners[owner], (nn.Linear, Conv1D)) and name == "weight":
                axis = 0 if isinstance(owners[owner], Conv1D) else 1
                inputs = parameter.shape[axis]
                scale = torch.empty(inputs).uniform_(0.5, 2.0, generator=generator) / inputs**0.5
                parameter.copy_(noise * scale.unsqueeze(1 - axis))  # columns of unlike norms: the rule depends on them
            else:  # biases, and the weights of norms, which are 1 or (Gemma) 0
                parameter.add_(0.2 * noise)


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
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / file, Path(folder) / file)
    return Path(folder)
