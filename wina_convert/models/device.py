"""The device to compute on."""

import torch

from ..errors import OptionError


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
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"device is {device!r}, which cannot be used here ({reason}); give auto, cpu or cuda"
        ) from error
    if chosen.type == "meta":
        raise OptionError("device is 'meta', which computes nothing; give auto, cpu or cuda")
    return chosen
