"""The names of a WINA folder: its files, the leaves of a gated projection, and where in a model a projection is."""

import re

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
REPORT = "wina_report.json"
MANIFEST = "wina_manifest.json"
SPARSITY_PNG = "wina_sparsity.png"
SCORES_PNG = "wina_scores.png"
SNAPSHOT = ".snapshot.safetensors"  # in the folder of an unfinished conversion only

# The tensors of a gated projection P: P.weight_t, P.column_norms, P.thresholds, P.bias where it has one, and P.biases where the
# checkpoint has biases along the sparsity.
WEIGHT = "weight"
WEIGHT_T = "weight_t"
COLUMN_NORMS = "column_norms"
THRESHOLDS = "thresholds"
BIASES = "biases"

# What a transformers without this package shows to its user when it refuses the folder.
INSTALL = "pip install wina-convert"

_LAYER = re.compile(r"(.+?)\.(\d{1,9})\.(.+)")


def holds_weights(name: str) -> bool:
    """Whether a file is weights or says where they are: nobody edits those."""
    return name.endswith((".safetensors", ".safetensors.index.json"))


def split_layer(name: str) -> tuple[str, int, str] | None:
    """A module's name as the path of the decoder layers, the layer's index and the module's name within the layer.

    `model.layers.3.mlp.up_proj` is ("model.layers", 3, "mlp.up_proj"); None for a module of no layer.
    """
    match = _LAYER.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None
