"""What a folder or repository without config.json is, by the names of its files."""

from collections.abc import Iterable
from fnmatch import fnmatch

# The first that matches is told: a pattern of a file at the top, what it shows, and what to do.
KINDS = (
    ("model_index.json", "a diffusers pipeline", "give a causal language model"),
    ("*.gguf", "a model in GGUF, whose weights are quantized or packed", "give the original safetensors checkpoint"),
    ("*.mlmodelc", "a Core ML model", "give the original safetensors checkpoint"),
    ("*.onnx", "an ONNX model", "give the original safetensors checkpoint"),
    ("dataset_info.json", "a dataset", "give a causal language model; a dataset goes to --calibration"),
    ("dataset_dict.json", "a dataset", "give a causal language model; a dataset goes to --calibration"),
    ("*.parquet", "a dataset", "give a causal language model; a dataset goes to --calibration"),
    ("*.arrow", "a dataset", "give a causal language model; a dataset goes to --calibration"),
    ("*.jsonl", "a dataset", "give a causal language model; a dataset goes to --calibration"),
    ("tokenizer*.json", "a tokenizer without a model", "give the folder of the model"),
    ("tokenizer.model", "a tokenizer without a model", "give the folder of the model"),
)


def kind_of(names: Iterable[str]) -> str | None:
    """What files with these names are, and what to give instead; None: nothing that is known.

    Args:
        names: of all files, relative to the folder; weights or a dataset may lie in a subfolder.
    """
    every = list(names)
    weights = any(fnmatch(name, "model*.safetensors") and "/" not in name for name in every)
    for pattern, kind, remedy in KINDS[:1] if weights else KINDS:  # a model that lacks its config is nothing else
        if any(fnmatch(name.rpartition("/")[2], pattern) for name in every):
            return f"is {kind}, not a model that can be converted; {remedy}"
    return None
