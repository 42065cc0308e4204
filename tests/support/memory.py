"""A model whose memory is all in its layers, and what it takes."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

SAMPLES, LENGTH, HIDDEN = 2, 16, 512
LEVELS = 4  # hidden states that calibration carries: three levels of sparsity, and those after the embedding
MB = 1 << 20

LAYER: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of the largest decoder layer, and of everything outside the layers."""
    layers: dict[str, int] = {}
    outside = 0
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith("model.layers."):
            layers[name.split(".")[2]] = layers.get(name.split(".")[2], 0) + tensor.nbytes
        else:
            outside += tensor.nbytes
    return max(layers.values()), outside
