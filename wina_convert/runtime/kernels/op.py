"""The torch custom op that every gated projection calls; kernels register behind it."""

import torch
from torch import Tensor

from . import cpu, reference


@torch.library.custom_op("wina::gated_linear", mutates_args=())
def gated_linear(x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
    """Gated projection: y = sum over the inputs with |x_j| > tau_j of x_j * weight_t[j], plus bias.

    Args:
        x: [..., in], float32, bfloat16 or float16.
        weight_t: [in, out], dtype of x, rows contiguous: an active input reads one contiguous row.
        tau: [in], float32, the magnitude each input must exceed.
        bias: [out], dtype of x, or None.

    Returns:
        [..., out], dtype of x.
    """
    half_on_cpu = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    if half_on_cpu:
        return cpu.gated_linear(x, weight_t, tau, bias)
    return reference.gated_linear(x, weight_t, tau, bias)


@gated_linear.register_fake
def _(x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_t.shape[1]))
