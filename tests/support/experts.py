"""Small mixtures of experts, and their experts in a few lines of plain torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers.pytorch_utils import Conv1D

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LATENT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}

# Sizes of every kind of experts, by type: how they are stored, chosen and computed.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**SMALL, "num_local_experts": 4},  # stored one by one, under other names
    "qwen3_moe": {**SMALL, "moe_intermediate_size": 32, "num_experts": 12, "num_experts_per_tok": 3},
    "olmoe": {**SMALL, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {**SMALL, "moe_intermediate_size": 32, "num_experts": 8, "shared_expert_intermediate_size": 64},
    "granitemoe": {**SMALL, "num_local_experts": 6},  # stored all in one
    "exaone_moe": {
        **SMALL,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },  # a bias of the router
    "glm4_moe": {**SMALL, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,  # chosen by groups
    "llama4_text": {**SMALL, "intermediate_size_mlp": 96, "num_local_experts": 4},  # each gets every token; transposed
    "gpt_oss": {**SMALL, "num_local_experts": 6},  # transposed, interleaved, with biases, clamped
}

TRANSPOSED = ("Llama4TextExperts", "GptOssExperts", "AriaExperts")  # store [in, out]


def matrix_of(model: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a projection in a plain model, float64; experts are slices of its parameters."""
    path, _, rest = name.partition(".experts.")
    if not rest[:1].isdigit():
        module = model.get_submodule(name)
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        return weight.detach().double(), None if module.bias is None else module.bias.detach().double()
    number, _, part = rest.partition(".")
    experts = model.get_submodule(f"{path}.experts")
    leaf = "gate_up_proj" if hasattr(experts, "gate_up_proj") and part != "down_proj" else part
    weight = getattr(experts, leaf)[int(number)].detach().double()
    if type(experts).__name__ in TRANSPOSED:
        weight = weight.t()
    bias = getattr(experts, f"{leaf}_bias", None)
    bias = None if bias is None else bias[int(number)].detach().double()
    rows = slice(None)
    if leaf == "gate_up_proj":
        first, half = part == "gate_proj", len(weight) // 2
        rows = slice(0 if first else half, half if first else None)
        if type(experts).__name__ == "GptOssExperts":
            rows = slice(0 if first else 1, None, 2)
    return weight[rows], None if bias is None else bias[rows]


def replace_experts(experts: Any, path: str, cut: Callable[[str, Tensor], Tensor]) -> None:
    """Make experts with SiLU compute a token after another, where cut(projection, x [in]) zeroes what is skipped."""

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for token, numbers in enumerate(chosen.tolist()):
            for place, number in enumerate(numbers):
                gate, up = experts.gate_up_proj[number].chunk(2)
                name = f"{path}.{number}"
                inner = silu(gate @ cut(f"{name}.gate_proj", x[token])) * (up @ cut(f"{name}.up_proj", x[token]))
                y[token] += weights[token, place] * (experts.down_proj[number] @ cut(f"{name}.down_proj", inner))
        return y

    experts.forward = forward
