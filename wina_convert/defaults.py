"""Torch's settings that hold for a whole process or thread, and how the verbs keep clear of them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def torch_defaults(device: torch.device | str = "cpu") -> Iterator[None]:
    """Within the block, or the function that this decorates, torch is as it starts: float32, the CPU, gradients recorded.

    A caller may have set another default dtype or device, switched gradients off, or be in inference mode; what a verb does and
    leaves behind is the same. The default dtype is the process's: other threads see float32 meanwhile.

    Args:
        device: on which tensors are made where nothing else is said.
    """
    dtype = torch.get_default_dtype()
    if dtype is not torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        # A default device costs every call of torch a detour through Python, so none is set that is there already.
        already = torch.get_default_device() == torch.device(device)
        with torch.inference_mode(False), torch.enable_grad(), nullcontext() if already else torch.device(device):
            yield
    finally:
        if dtype is not torch.float32:
            torch.set_default_dtype(dtype)
