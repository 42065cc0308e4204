"""Tiny models of images and text with random weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from support.families import SEPARATE, SLIDING_AND_FULL, TOKENS, WINDOW, save
from wina_convert.models.twin import random_weights
from wina_convert.runtime.classes import auto_class

IMAGE = 7  # the token in whose place hidden states of an image come
SIDE, PATCH = 28, 14  # pixels
SIGLIP = {
    "model_type": "siglip_vision_model",
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": SIDE, "patch_size": PATCH, "vision_use_head": False},
}
TEXT = {name: value for name, value in SEPARATE.items() if name != "tie_word_embeddings"}
TILED = {"in_channels": 3, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}

# model_type -> config
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            **{"model_type": "gemma3_text", **TEXT, "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
            **{"num_hidden_layers": 3, "layer_types": SLIDING_AND_FULL},
        },
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        **{"boi_token_index": 5, "eoi_token_index": 6},
    },
    "gemma4": {  # as in E2B: the second half of the layers takes the keys and values of the first
        "text_config": {
            **{"model_type": "gemma4_text", **TEXT, "sliding_window": WINDOW, "hidden_size_per_layer_input": 16},
            **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
            **{"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "global_head_dim": 32},
            "vocab_size_per_layer_input": 2048,
        },
        "vision_config": {
            **{"model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": PATCH},
            **{"pooling_kernel_size": 2, "position_embedding_size": 16},
        },
        **{"image_token_id": IMAGE, "boi_token_id": 5, "eoi_token_id": 6, "audio_config": None},
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": SIGLIP,
        **{"image_token_index": IMAGE, "image_seq_length": 4, "vision_feature_select_strategy": "full"},
        "vision_feature_layer": -1,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None},
        "vision_config": {
            **{"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "head_dim": 16, "image_size": SIDE, "patch_size": PATCH},
        },
        **{"image_token_index": IMAGE, "spatial_merge_size": 1, "vision_feature_layer": -1},
    },
    "qwen2_5_vl": {
        "text_config": {"model_type": "qwen2_5_vl_text", **TEXT, "hidden_size": 64, "rope_parameters": MROPE},
        "vision_config": {
            **{
                "model_type": "qwen2_5_vl",
                **TILED,
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
            },
            **{"out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 56},
        },
        **{"image_token_id": IMAGE, "vision_start_token_id": 5, "vision_end_token_id": 6, "video_token_id": 8},
    },
    "qwen3_5": {
        "text_config": {
            **{"model_type": "qwen3_5_text", **TEXT, "layer_types": ["linear_attention", "full_attention"]},
            **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2},
            **{"linear_num_value_heads": 4, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
        },
        "vision_config": {
            **{
                "model_type": "qwen3_5",
                **TILED,
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
            },
            **{"out_hidden_size": 48, "num_position_embeddings": 16, "deepstack_visual_indexes": []},
        },
        **{"image_token_id": IMAGE, "vision_start_token_id": 5, "vision_end_token_id": 6, "video_token_id": 8},
    },
}


def make_wrapper(model_type: str, folder: Path, tied: bool = False) -> Path:
    """Save a random model of images and text, with the tokenizer of wina-lab-tiny, and return its folder."""
    fields = WRAPPERS[model_type]
    tokens = {name: TOKENS[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CONFIG_MAPPING[model_type](**fields, **tokens, tie_word_embeddings=tied)
    config.get_text_config().tie_word_embeddings = tied
    model = auto_class(config).from_config(config, dtype=torch.float32)
    random_weights(model, 0)
    return save(model, folder)


def with_image(model_type: str, seed: int = 0) -> dict[str, Tensor]:
    """A prompt with an image in it, as a processor would give it to the model."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, 2048, (1, 20), generator=generator)
    count = 1 if model_type.startswith(("qwen", "gemma4")) else 4
    tokens[0, 4] = 5
    tokens[0, 5 : 5 + count] = IMAGE
    tokens[0, 5 + count] = 6
    found = {"input_ids": tokens}
    if model_type.startswith("qwen"):  # 2 by 2 patches, which become one token
        patches = (4, 3 * TILED["temporal_patch_size"] * PATCH**2)
        return found | {
            "pixel_values": torch.randn(patches, generator=generator),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
            "mm_token_type_ids": (tokens == IMAGE).int(),
        }
    if model_type == "gemma4":  # 2 by 2 patches, which become one token
        return found | {
            "pixel_values": torch.rand(1, 4, 3 * PATCH**2, generator=generator),
            "image_position_ids": torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]]),
            "mm_token_type_ids": (tokens == IMAGE).int(),
        }
    found["pixel_values"] = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    if model_type == "mistral3":
        found["image_sizes"] = torch.tensor([[SIDE, SIDE]])
    if model_type == "gemma3":
        found["token_type_ids"] = (tokens == IMAGE).int()
    return found
