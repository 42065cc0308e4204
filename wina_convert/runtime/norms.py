"""RMSNorms of a gated model on a GPU, in one launch each.

transformers writes an RMSNorm as nine operations. A step of one token that is not compiled waits for the processor to launch
them, and at batch 1 they take it longer than all the gated products: torch's own function is one launch, or two. A model that is
compiled needs no help, its compiler joins them.
"""

import copy
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from .grouping import SWITCH
from .parallel import divided

FUSED = ("cuda",)  # devices where an operation costs more than it computes


class FusedNorm(nn.Module):
    """An RMSNorm of transformers, y = weight * x / sqrt(mean(x^2) + variance_epsilon), rounded to the dtype of x once, not twice.

    Beside it the classes have the norm's own class as a base, and its name.
    """

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size], in the dtype of x."""
        weight = self.weight
        if torch.compiler.is_compiling() or x.device.type not in FUSED or x.dtype != weight.dtype:
            y: Tensor = super().forward(x)
            return y
        return rms_norm(x, weight.shape, weight, self.variance_epsilon).to(x.dtype)  # autocast makes it float32

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., nn.Module], tuple[type[nn.Module]], dict[str, Any]]:
        return _blank, (_plain(self),), self.__dict__


def use(model: nn.Module, used: bool = True) -> None:
    """Let the RMSNorms of a model be computed here, or no longer; those that compute anything else stay as they are."""
    used = used and os.environ.get(SWITCH) != "0"
    for module in model.modules():
        if isinstance(module, FusedNorm):
            if not used:
                module.__class__ = _plain(module)  # type: ignore[assignment]
        elif used and _is_rms_norm(module):
            module.__class__ = _fused(type(module))  # type: ignore[arg-type] # mypy takes a class for no Hashable


def _is_rms_norm(module: Any) -> bool:
    """Whether a module computes what `rms_norm` does, found out with a few numbers: there are norms that add 1 to the weight."""
    if [name for name, _ in module.named_parameters()] != ["weight"] or not hasattr(module, "variance_epsilon"):
        return False
    if divided(module.weight):  # FSDP's, which has given the module a class of its own
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn((2, 8), generator=generator, device="cpu", dtype=torch.float32)
    x = x * module.variance_epsilon**0.5  # so that the epsilon counts
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    try:
        found = probe(x)
    except Exception:  # it takes other arguments: whatever it is, it stays
        return False
    expected = rms_norm(x, weight.shape, weight, module.variance_epsilon)
    return isinstance(found, Tensor) and found.shape == x.shape and torch.allclose(found, expected, rtol=1e-5)


@cache
def _fused(plain: type[nn.Module]) -> type[FusedNorm]:
    return type(plain.__name__, (FusedNorm, plain), {"__module__": plain.__module__})


def _plain(module: FusedNorm) -> type[nn.Module]:
    plain: type[nn.Module] = type(module).__bases__[1]
    return plain


def _blank(plain: type[nn.Module]) -> FusedNorm:
    """A norm without its attributes, for a copy or a pickle."""
    kind = _fused(plain)  # type: ignore[arg-type]
    return kind.__new__(kind)
