"""The device to compute on."""

import torch

from ..errors import OptionError


def _reason(device: str) -> str:
    """Why a device cannot be used here; torch's own words name twenty that are none of ours."""
    if device.partition(":")[0] != "cuda":
        return "which is no device that can be used here"
    count = torch.cuda.device_count()
    if torch.version.cuda is None:
        return "and this torch was built without CUDA"
    return f"and torch sees {count} CUDA devices" if count != 1 else "and torch sees one CUDA device, cuda:0"


def choose_device(device: str) -> torch.device:
    """The device to compute on.

    Raises:
        OptionError: it does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device is {device!r}, {_reason(device)}; give auto, cpu or cuda") from error
    if chosen.type == "meta":
        raise OptionError("device is 'meta', which computes nothing; give auto, cpu or cuda")
    return chosen
