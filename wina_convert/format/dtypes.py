"""The dtypes that a model can have."""

import torch

from ..errors import OptionError, SourceError
from .folder import Folder

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
    check_dtype(dtype)
    return FLOATS[dtype]


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that is neither "auto" nor one that a model can have.

    Raises:
        OptionError: it is another.
    """
    if dtype not in ("auto", *FLOATS):
        raise OptionError(f"dtype is {dtype!r}; give auto, {', '.join(FLOATS)}")
