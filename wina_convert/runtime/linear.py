"""WinaLinear: a projection that skips the inputs that do not matter for a token. DenseLinear: one that reads all of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..format.curve import threshold_at
from ..format.low_rank import LOW_RANK_IN, LOW_RANK_OUT, rank_of
from ..format.names import BIASES, COLUMN_NORMS, THRESHOLDS
from .kernels import dense_linear, gated_linear, gated_linears, refuse_graph
from .parallel import at_hand, by_inputs, divided, first, local
from .rule import cutoffs, dropped

EXACT = (COLUMN_NORMS, THRESHOLDS, BIASES, "tau")  # stay float32 when the model is cast
TOGETHER = ("cpu", "cuda")  # devices on which several products of the same x cost less in one call


class Handover:
    """What the first of a group of siblings leaves for the others, which are called next.

    One for all models: a compiled model checks for every token whatever its modules refer to, and each of them would refer to it.

    Attributes:
        left: the x that the results are of, and for each sibling that has not been called yet itself, its tau and its y.
    """

    def __init__(self) -> None:
        self.left: tuple[Tensor, tuple[tuple[WinaLinear, Tensor | None, Tensor], ...]] | None = None


HANDOVER = Handover()


class WinaLinear(nn.Module):
    """Replaces `nn.Linear` (or GPT-2's `Conv1D`) and computes y = W (x * keep) + b, where b may depend on the sparsity.

    Attributes:
        weight_t: [in, out], the model's dtype: W transposed.
        column_norms: [in], float32: the weighting of the score.
        thresholds: [K], float32: one threshold for each sparsity of `grid`.
        bias: [out], the model's dtype, or None.
        biases: [K, out], float32: what is added to `bias` at each sparsity of `grid`, nothing at 0; or None.
        low_rank_in, low_rank_out: [in, r] and [r, out], the model's dtype: what multiplies the inputs that are skipped, at any
            sparsity above 0; or None.
        tau: [in], float32: `thresholds` at `sparsity`, over `column_norms`; None until `set_sparsity`, and for good where
            the weights are offloaded or FSDP's: then each call computes it.
        shifted: [out], the model's dtype: `bias` with `biases` at `sparsity`; None as `tau`, and where there are no `biases`.
            Where tensor parallelism adds up products, `bias` is added to the sum, and the rest by one process.
        dense_prefill: compute calls with several tokens a sequence without skipping.
        several: whether the next call is one; None: the shape of x tells.
        siblings: projections that are called after this one with the same x; this one computes their products too, where
            that is faster, and leaves the results in `HANDOVER`. `grouping.group` sets them.
        plain: the class that it replaces, `nn.Linear` or `Conv1D`.
    """

    # Tensor parallelism of transformers hands a module local shards only where it asks for them.
    _hf_quantized_needs_local_tp = True
    __prepare_scriptable__ = refuse_graph  # torch.jit.script asks for it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: Sequence[float],
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        biases: bool = False,
        plain: type[nn.Module] = nn.Linear,
        low_rank: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.plain = plain
        self.grid = tuple(grid)
        self.sparsity = 0.0
        self.dense_prefill = False
        self.several: bool | None = None
        self.siblings: tuple[WinaLinear, ...] = ()

        def frozen(*shape: int, dtype: torch.dtype | None) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        # Parameters, not buffers: a load on the meta device leaves buffers uninitialised.
        self.weight_t = frozen(in_features, out_features, dtype=dtype)
        self.column_norms = frozen(in_features, dtype=torch.float32)
        self.thresholds = frozen(len(self.grid), dtype=torch.float32)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", frozen(out_features, dtype=dtype) if bias else None)
        self.biases: nn.Parameter | None
        shifts = frozen(len(self.grid), out_features, dtype=torch.float32) if biases else None
        self.register_parameter(BIASES, shifts)
        self.low_rank_in: nn.Parameter | None
        self.low_rank_out: nn.Parameter | None
        rank = rank_of(low_rank, in_features, out_features)
        self.register_parameter(LOW_RANK_IN, frozen(in_features, rank, dtype=dtype) if low_rank else None)
        self.register_parameter(LOW_RANK_OUT, frozen(rank, out_features, dtype=dtype) if low_rank else None)
        self.tau: Tensor | None
        self.shifted: Tensor | None
        self.register_buffer("tau", None, persistent=False)
        self.register_buffer("shifted", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """W as a view [out, in], for code that looks at `.weight`."""
        view = self.weight_t.t()
        if getattr(self.weight_t, "_is_hf_initialized", False):
            view._is_hf_initialized = True  # type: ignore[attr-defined] # or transformers would initialise the loaded weight anew, through the view
        return view

    def set_sparsity(self, sparsity: float) -> None:
        """Skip this fraction of the inputs from now on.

        Args:
            sparsity: within [grid[0], grid[-1]].

        Raises:
            OptionError: it is outside.
        """
        if not self.grid[0] <= sparsity <= self.grid[-1]:
            raise OptionError(f"sparsity is {sparsity}; this checkpoint has thresholds up to {self.grid[-1]}")
        self.sparsity = sparsity
        with torch.inference_mode(False):  # or a gradient could not pass it later
            self.tau = self._cutoffs() if at_hand(self.weight_t) else None
            self.shifted = self._shifted() if at_hand(self.weight_t) else None

    def set_threshold(self, threshold: Tensor | float, sparsity: float = 0.0) -> None:
        """Skip the inputs whose score is at most this, a float32 scalar, instead of what the stored curve says.

        Args:
            threshold: the threshold.
            sparsity: whose bias to add, within the grid.
        """
        self.sparsity = sparsity
        value = torch.as_tensor(threshold, dtype=torch.float32, device=self.column_norms.device)
        with torch.inference_mode(False):
            self.tau = cutoffs(value, local(self.column_norms))
            self.shifted = self._shifted()

    def forget_threshold(self) -> None:
        """Drop the cutoffs, whose memory is the layer's; each call computes them until a threshold is set again."""
        self.tau = self.shifted = None

    def _cutoffs(self) -> Tensor:
        return cutoffs(threshold_at(self.thresholds, self.grid, self.sparsity), local(self.column_norms)).detach()

    def _shifted(self) -> Tensor | None:
        """The bias at the sparsity [out]; None where it is `bias` itself."""
        if self.biases is None or self.sparsity == 0:  # at 0 the dense layer, which may have none
            return None
        shift = threshold_at(local(self.biases), self.grid, self.sparsity)
        if by_inputs(self.weight_t):
            shift = shift if first(self.weight_t) else torch.zeros_like(shift)
        elif self.bias is not None:
            shift = local(self.bias) + shift
        return shift.to(self.weight_t.dtype).detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the model's dtype."""
        left = HANDOVER.left  # once: another thread may take it away meanwhile
        if left is not None:
            of, ((module, tau, y), *others) = left
            # Another thread may have left it, or the threshold may have changed: then it is another product.
            mine = module is self and of is x and tau is self._buffers["tau"]
            HANDOVER.left = (of, tuple(others)) if mine and others else None
            if mine:
                return y
        if not (self.siblings and self._together(x)):
            weight_t, tau, bias = self._operands(x)
            operand = x if x.dtype == weight_t.dtype else x.to(weight_t.dtype)  # under autocast
            return self._completed(gated_linear(operand, weight_t, tau, bias), operand, tau)
        group = (self, *self.siblings)
        weights_t, taus, biases = zip(*[module._operands(x) for module in group], strict=True)
        operand = x if x.dtype == weights_t[0].dtype else x.to(weights_t[0].dtype)
        found = gated_linears(operand, weights_t, taus, biases)
        own, *ys = [part._completed(y, operand, tau) for part, y, tau in zip(group, found, taus, strict=True)]
        HANDOVER.left = (x, tuple([(part, part._buffers["tau"], y) for part, y in zip(self.siblings, ys, strict=True)]))
        return own

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What this call multiplies with: the weight, the cutoffs [in], float32, and the bias [out], in the model's dtype.

        From the dicts, for a module's own lookup takes longer than all else: five times a projection, hundreds of times a token.
        """
        parameters, buffers = self._parameters, self._buffers
        weight_t, tau = parameters["weight_t"], buffers["tau"]
        bias: Tensor | None = parameters["bias"]
        assert weight_t is not None
        known = tau is not None
        if tau is None:
            tau = self._cutoffs()
        if self.dense_prefill and self._dense(x):
            return weight_t, torch.full_like(tau, -1.0), bias  # no magnitude is below -1
        if parameters[BIASES] is not None:
            shifted = buffers["shifted"] if known else self._shifted()
            bias = bias if shifted is None else shifted
        return weight_t, tau, bias

    def _completed(self, y: Tensor, x: Tensor, tau: Tensor) -> Tensor:
        """y [..., out] with what the low-rank term makes of the inputs that were skipped; at sparsity 0 as it is."""
        parameters = self._parameters
        low_rank_in, low_rank_out = parameters[LOW_RANK_IN], parameters[LOW_RANK_OUT]
        if low_rank_in is None or low_rank_out is None or self.sparsity == 0 or self._dense(x):
            return y
        skipped = torch.where(dropped(x, tau), x, torch.zeros((), dtype=x.dtype, device=x.device))
        return y + skipped @ low_rank_in @ low_rank_out

    def _dense(self, x: Tensor) -> bool:
        """Whether this call uses every input."""
        several = x.dim() > 1 and x.shape[-2] > 1 if self.several is None else self.several
        return self.dense_prefill and several

    def _together(self, x: Tensor) -> bool:
        """Whether the siblings' products can be computed now: with this x, weights that are here, and without gradient."""
        device = x.device
        if device.type not in TOGETHER or (x.requires_grad and torch.is_grad_enabled()):
            return False
        dtype = self.weight_t.dtype
        for module in self.siblings:
            other: Any = module._parameters["weight_t"]
            # One that is offloaded or divided among processes is brought just before its own call.
            if other.device != device or other.dtype != dtype or divided(other):
                return False
            if module._forward_pre_hooks:  # which may give it another x, or another threshold
                return False
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before: dict[str, Any] = {name: getattr(self, name) for name in EXACT if getattr(self, name) is not None}
        before = {name: tensor.data for name, tensor in before.items()}  # the base method swaps data in place
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in before.items():
            tensor = getattr(self, name)
            if tensor.dtype != exact.dtype:
                tensor.data = exact.to(tensor.device)
        if self.shifted is not None and at_hand(self.weight_t):
            self.shifted = self._shifted()  # in the new dtype, not rounded twice
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={self.sparsity}"
        )


class DenseLinear(nn.Linear):
    """An `nn.Linear` that stays dense, the head above all: once the rest is gated it takes a third of the time."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the model's dtype."""
        trained = any(tensor is not None and tensor.requires_grad for tensor in (x, self.weight, self.bias))
        plain = (trained and torch.is_grad_enabled()) or torch.is_autocast_enabled("cpu") or divided(self.weight)
        if not plain and x.device.type == "cpu" and x.dtype == self.weight.dtype:
            return dense_linear(x, self.weight, self.bias)
        return super().forward(x)


def gated_modules(model: nn.Module) -> dict[str, WinaLinear]:
    """The gated projections of a model by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WinaLinear)}


@contextmanager
def observing(gates: Mapping[str, WinaLinear], see: Callable[[str, WinaLinear, Tensor], object]) -> Iterator[None]:
    """Within the block, call see(name, gate, x) with each x [..., in] that is about to enter one of the projections."""

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, WinaLinear)
            see(name, module, inputs[0])

        return hook

    handles = [gate.register_forward_pre_hook(observe(name)) for name, gate in gates.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
