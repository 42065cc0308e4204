"""The dtypes that a model can have."""

import torch

from ..errors import OptionError, SourceError
from .folder import Folder

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(folder: Folder, dtype: str = "auto") -> torch.dtype:
    """The dtype that config.json names, or that of the largest tensor; or the chosen one.

    Raises:
        OptionError: the chosen one is unknown.
        SourceError: the source's is not supported.
    """
    if dtype == "auto":
        named = folder.config.get("dtype") or folder.config.get("torch_dtype")
        floating = [spec for spec in folder.tensors.values() if spec.dtype.is_floating_point]
        compute = FLOATS.get(str(named), max(floating, key=lambda spec: spec.numel).dtype)
        if compute not in FLOATS.values():
            raise SourceError(f"{folder.name} is in {compute}; pass --dtype float32, bfloat16 or float16")
        return compute
    return FLOATS[dtype_name(dtype)]


def dtype_name(dtype: str) -> str:
    """The name of a dtype that a model can have, or "auto"; `bf16`, `fp16` and `fp32` are names, too.

    Raises:
        OptionError: it is another.
    """
    name = SHORT.get(dtype, dtype)
    if name not in ("auto", *FLOATS):
        raise OptionError(f"dtype is {dtype!r}; give auto, {', '.join(FLOATS)}")
    return name
