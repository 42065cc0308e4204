"""The torch ops that every projection of a gated model calls; a kernel for each kind of device stands behind them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...errors import OptionError
from ..rule import dropped
from . import cpu, cuda, reference


@dataclass(frozen=True)
class Product:
    """A product with a weight that is stored in one way.

    Attributes:
        schema: arguments and result of its op; the second argument is the weight.
        outputs: which dimension of the stored weight the outputs are.
        kernels: what computes it on each kind of device, under torch's names for them; "default" on all others.
    """

    schema: str
    outputs: int
    kernels: Mapping[str, Callable[..., Tensor]]


NO_GRAPH = (
    "a gated model cannot be traced to TorchScript or ONNX, which have no product that skips inputs; take the dense model: run "
    "`wina export DIR --out DENSE` and load that, or call model.dequantize() first"
)

# The op for each way in which a weight is stored. To add a kernel, add its device; to add a packed weight, add a product.
PRODUCTS = {
    # [in, out]: an input that is skipped is a row that is not read
    "wina::gated_linear": Product(
        "(Tensor x, Tensor weight_t, Tensor tau, Tensor? bias) -> Tensor",
        outputs=1,
        kernels={"default": reference.gated_linear, "cpu": cpu.gated_linear, "cuda": cuda.gated_linear},
    ),
    # [out, in], as torch stores it: everything is read
    "wina::dense_linear": Product(
        "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        outputs=0,
        kernels={"default": linear, "cpu": cpu.dense_linear},
    ),
}


def refuse_graph(*args: Any) -> Any:
    """What is called where a gated model is to become a graph that cannot hold it.

    Raises:
        OptionError: always.
    """
    raise OptionError(NO_GRAPH)


def _fake(outputs: int) -> Callable[..., Tensor]:
    def empty(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            refuse_graph()
        torch._check(x.device == weight.device, lambda: f"x is on {x.device} and the weight on {weight.device}")
        return x.new_empty((*x.shape[:-1], weight.shape[outputs]))

    return empty


# Not `torch.library.custom_op`: its layers of Python cost as much as a small product.
for name, product in PRODUCTS.items():
    torch.library.define(name, product.schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device, kernel in product.kernels.items():
        torch.library.impl(name, device, kernel)
    torch.library.impl(
        name, "Tracer", refuse_graph
    )  # torch's name for what torch.jit.trace and the older ONNX exporter record with
    torch.library.register_fake(name, _fake(product.outputs))

_gated_linear = torch.ops.wina.gated_linear.default
_dense_linear = torch.ops.wina.dense_linear.default


def _one_by_one(x: Tensor, weights_t: list[Tensor], taus: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [_gated_linear(x, *others) for others in zip(weights_t, taus, biases, strict=True)]


torch.library.define(
    "wina::gated_linears",
    "(Tensor x, Tensor[] weights_t, Tensor[] taus, Tensor?[] biases) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("wina::gated_linears", "default", _one_by_one)
torch.library.impl("wina::gated_linears", "Tracer", refuse_graph)
torch.library.impl("wina::gated_linears", "cpu", cpu.gated_linears)
torch.library.impl("wina::gated_linears", "cuda", cuda.gated_linears)
torch.library.register_fake(
    "wina::gated_linears", lambda x, weights_t, taus, biases: [_fake(1)(x, weight_t) for weight_t in weights_t]
)
_gated_linears = torch.ops.wina.gated_linears.default


torch.library.define(
    "wina::attend",
    "(Tensor query, Tensor key, Tensor value, float scaling) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("wina::attend", "cpu", cpu.attend)
torch.library.register_fake(
    "wina::attend",
    lambda query, key, value, scaling: query.new_empty(len(query), 1, query.shape[1], value.shape[3]),
)
_attend = torch.ops.wina.attend.default


class _GatedLinear(torch.autograd.Function):
    """The gradient reaches the inputs that were kept; weights, thresholds and biases are frozen."""

    @staticmethod
    def forward(x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _gated_linear(x, weight_t, tau, bias)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight_t, tau = ctx.saved_tensors
        return linear(gradient.to(x.dtype), weight_t).masked_fill(dropped(x, tau), 0), None, None, None


def gated_linear(x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
    """Gated projection: y = sum over the inputs with |x_j| > tau_j of x_j * weight_t[j], plus bias.

    Differentiable in x, as if the choice of inputs were fixed.

    Args:
        x: [..., in], float32, bfloat16 or float16.
        weight_t: [in, out], dtype of x, rows contiguous: an active input reads one contiguous row.
        tau: [in], float32, the magnitude each input must exceed.
        bias: [out], dtype of x, or None.

    Returns:
        [..., out], dtype of x.
    """
    differentiable = x.requires_grad and torch.is_grad_enabled()
    apply: Any = _GatedLinear.apply if differentiable else _gated_linear
    y: Tensor = apply(x, weight_t, tau, bias)
    return y


def gated_linears(
    x: Tensor, weights_t: Sequence[Tensor], taus: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Gated projections of the same x, without gradient: in one launch where the device has a kernel for it.

    Args:
        x: [..., in], float32, bfloat16 or float16.
        weights_t: [in, out] each, dtype of x, rows contiguous.
        taus: [in] each, float32.
        biases: [out] each, dtype of x, or None.

    Returns:
        [..., out] each, dtype of x.
    """
    ys: list[Tensor] = _gated_linears(x, weights_t, taus, biases)
    return ys


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = W x + b with a plain weight, without gradient: as fast as memory allows for a few rows on a CPU.

    Args:
        x: [..., in].
        weight: [out, in], dtype of x.
        bias: [out], dtype of x, or None.

    Returns:
        [..., out], dtype of x.
    """
    y: Tensor = _dense_linear(x, weight, bias)
    return y


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of one token a sequence to all keys, where `cpu.attends` says so: softmax(scaling * query key') value.

    It is computed in float32. Not differentiable.

    Args:
        query: [batch, heads, 1, size]; heads that share keys stand beside each other.
        key: [batch, kv_heads, keys, size].
        value: [batch, kv_heads, keys, width].
        scaling: of the scores.

    Returns:
        [batch, 1, heads, width], dtype of the query.
    """
    y: Tensor = _attend(query, key, value, scaling)
    return y
