"""RMSNorms of a gated model on a GPU, in one launch each.

transformers writes an RMSNorm as nine operations. A step of one token that is not compiled waits for the processor to launch
them, and at batch 1 they take it longer than all the gated products: torch's own function is one launch, or two. A model that is
compiled needs no help, its compiler joins them.
"""

import copy
import inspect
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
    """An RMSNorm of transformers, y = (offset + weight) * x / sqrt(mean(x^2) + epsilon), rounded to x's dtype once.

    Beside it the classes have the norm's own class as a base, and its name.
    """

    weight: nn.Parameter
    offset: float  # 0 for Llama's, 1 for Gemma's
    epsilon: str  # the attribute that holds it

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size], in the dtype of x."""
        weight = self.weight
        if torch.compiler.is_compiling() or x.device.type not in FUSED or x.dtype != weight.dtype:
            y: Tensor = super().forward(x)
            return y
        epsilon = getattr(self, self.epsilon)
        if self.offset:  # the sum has more digits than the weight
            return rms_norm(x.float(), weight.shape, weight.float() + self.offset, epsilon).to(x.dtype)
        return rms_norm(x, weight.shape, weight, epsilon).to(x.dtype)  # autocast makes it float32

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., nn.Module], tuple[Any, ...], dict[str, Any]]:
        return _blank, (_plain(self), self.offset, self.epsilon), self.__dict__


def use(model: nn.Module, used: bool = True) -> None:
    """Let the RMSNorms of a model be computed here, or no longer; those that compute anything else stay as they are."""
    used = used and os.environ.get(SWITCH) != "0"
    for module in model.modules():
        if isinstance(module, FusedNorm):
            if not used:
                module.__class__ = _plain(module)  # type: ignore[assignment]
        elif used and (found := _computes(module)):
            module.__class__ = _fused(type(module), *found)  # type: ignore[arg-type] # mypy takes a class for no Hashable


def _computes(module: Any) -> tuple[float, str] | None:
    """The offset of an RMSNorm and where its epsilon is, found out with a few numbers; None if it is anything else."""
    if [name for name, _ in module.named_parameters()] != ["weight"] or divided(module.weight):
        return None  # what FSDP has divided has a class of its own
    names = [name for name in ("variance_epsilon", "eps") if isinstance(getattr(module, name, None), float)]
    if not names or len(inspect.signature(module.forward).parameters) != 1:  # some take a gate as well
        return None
    epsilon = getattr(module, names[0])
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn((2, 8), generator=generator, device="cpu", dtype=torch.float32)
    x = x * epsilon**0.5  # so that the epsilon counts
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    try:
        found = probe(x)
    except Exception:  # it takes something else than hidden states: whatever it is, it stays
        return None
    for offset in (0.0, 1.0):
        expected = rms_norm(x, weight.shape, offset + weight, epsilon)
        if isinstance(found, Tensor) and found.shape == x.shape and torch.allclose(found, expected, rtol=1e-5):
            return offset, names[0]
    return None


@cache
def _fused(plain: type[nn.Module], offset: float, epsilon: str) -> type[FusedNorm]:
    known = {"__module__": plain.__module__, "offset": offset, "epsilon": epsilon}
    return type(plain.__name__, (FusedNorm, plain), known)


def _plain(module: FusedNorm) -> type[nn.Module]:
    plain: type[nn.Module] = type(module).__bases__[1]
    return plain


def _blank(plain: type[nn.Module], offset: float, epsilon: str) -> FusedNorm:
    """A norm without its attributes, for a copy or a pickle."""
    kind = _fused(plain, offset, epsilon)  # type: ignore[arg-type]
    return kind.__new__(kind)
