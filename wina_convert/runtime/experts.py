"""Mixtures of experts, opened: each expert is a module of its own, with a linear map for each of its matrices.

transformers keeps the experts of a layer as parameters of three dimensions. Opened, a matrix of an expert is a projection like
any other: gated, calibrated, stored and read as such, and read only for the tokens that its expert is given. The router stays as
it is, and what a family does between the matrices is done by its own module.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import SORTED_EXPERTS
from ..errors import SourceError
from .linear import WinaLinear

FUSED, GATE, UP, DOWN = "gate_up_proj", "gate_proj", "up_proj", "down_proj"
BIAS = "_bias"  # behind the name of a matrix: its biases
MOST = 1 << 17  # experts of all layers: a module is made for each
LEAVES = {name + end for name in (FUSED, UP, DOWN) for end in ("", BIAS)}


class Expert(nn.Module):
    """One expert: the linear maps gate_proj (where it has a gate), up_proj and down_proj."""

    def __init__(self, parts: dict[str, Tensor]) -> None:
        super().__init__()
        for name in (GATE, UP, DOWN):
            if (weight := parts.get(f"{name}.weight")) is not None:
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                if (bias := parts.get(f"{name}.bias")) is not None:
                    linear.bias = nn.Parameter(bias, requires_grad=False)
                self.add_module(name, linear)


def stored_transposed(fused: nn.Module) -> bool:
    """Whether an experts module of transformers stores its matrices as [in, out]."""
    found: bool = getattr(fused, "is_transposed", type(fused).__name__ in SORTED_EXPERTS)
    return found


class OpenedExperts(nn.Module):
    """Computes what an experts module of transformers does, an expert after another, and only those that a token is given.

    Attributes:
        count: how many experts there are.
        leaves: names of the parameters that were opened.
        transposed: whether the family stores matrices as [in, out].
        concatenated: whether gate and up lie one behind the other in gate_up_proj; else their rows alternate.
        several: whether the call brings several tokens a sequence; None: nobody needs to know.
    """

    fused: Any  # that module, without its parameters

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        stacked = {name: parameter.detach() for name, parameter in fused.named_parameters()}
        self.count, self.leaves = len(stacked[DOWN]), tuple(stacked)
        self.transposed = stored_transposed(fused)
        self.concatenated = getattr(fused, "is_concatenated", True)
        self.several: bool | None = None
        for number in range(self.count):
            parts: dict[str, Tensor] = {}
            for leaf, tensor in stacked.items():
                rows = tensor[number].t() if self.transposed and not leaf.endswith(BIAS) else tensor[number]
                parts |= {path: rows[part] for path, part in self.rows(leaf, len(rows)).items()}
            self.add_module(str(number), Expert(parts))
        for leaf in self.leaves:
            fused.register_parameter(leaf, None)
        self.__dict__["fused"] = fused  # past nn.Module: it is no part of the model any more

    def rows(self, leaf: str, count: int) -> dict[str, slice]:
        """Which of the rows of one expert's part of a parameter are what: "gate_proj.weight", say, to a slice of `count` rows."""
        name, kind = (leaf.removesuffix(BIAS), "bias") if leaf.endswith(BIAS) else (leaf, "weight")
        if name != FUSED:
            return {f"{name}.{kind}": slice(0, count, 1)}
        half = count // 2
        gate, up = (
            (slice(0, half, 1), slice(half, count, 1))
            if self.concatenated
            else (slice(0, count, 2), slice(1, count, 2))
        )
        return {f"{GATE}.{kind}": gate, f"{UP}.{kind}": up}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Hidden states [T, in], the experts that each token is given and their weights, [T, k] each -> [T, out]."""
        given, chosen = top_k_index.shape[-1], top_k_index.flatten()
        by_expert = chosen.argsort(stable=True).split(torch.bincount(chosen, minlength=self.count).tolist())
        results: Tensor | None = None
        for number, places in enumerate(by_expert[: self.count]):
            if len(places):
                found = self.run(number, hidden_states[places // given])
                results = found.new_zeros(len(chosen), found.shape[-1]) if results is None else results
                results[places] = found
        if results is None:  # no token
            return torch.zeros_like(hidden_states)
        weighted = results.view(-1, given, results.shape[-1]) * top_k_weights.unsqueeze(-1)
        return weighted.sum(1).to(hidden_states.dtype)

    def run(self, number: int, x: Tensor) -> Tensor:
        """One expert on its tokens, x [N, in] -> [N, out]."""
        parts = dict(self.get_submodule(str(number)).named_children())
        for linear in parts.values():
            if isinstance(linear, WinaLinear):
                linear.several = self.several
        gate = parts[GATE](x) if GATE in parts else None
        up = parts[UP](x)
        result: Tensor = parts[DOWN](self.fused.act_fn(up) if gate is None else self._gated(gate, up))
        return result

    def closed(self) -> nn.Module:
        """The module of transformers again, with a copy of the experts' plain matrices as its parameters."""
        for leaf in self.leaves:
            stacked = []
            for number in range(self.count):
                parts = {path: self.get_parameter(f"{number}.{path}") for path in self.rows(leaf, 2)}
                total = sum(map(len, parts.values()))
                entry = torch.cat(tuple(parts.values()))
                for path, rows in self.rows(leaf, total).items():
                    entry[rows] = parts[path]
                stacked.append(entry.t() if self.transposed and not leaf.endswith(BIAS) else entry)
            self.fused.register_parameter(leaf, nn.Parameter(torch.stack(stacked), requires_grad=False))
        fused: nn.Module = self.fused
        return fused

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if not hasattr(self.fused, "_apply_gate"):
            return self.fused.act_fn(gate) * up  # type: ignore[no-any-return]
        together = torch.cat((gate, up), -1) if self.concatenated else torch.stack((gate, up), -1).flatten(-2)
        return self.fused._apply_gate(together)  # type: ignore[no-any-return]


class OpenedSortedExperts(OpenedExperts):
    """The experts of Llama 4, each of which gets every token, as zeros where it is not chosen."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Hidden states [experts * T, in], already weighted -> [experts * T, out]."""
        rows = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        results = torch.zeros_like(rows)
        for number, row in enumerate(rows):
            (places,) = row.any(-1).nonzero(as_tuple=True)
            if len(places):
                results[number, places] = self.run(number, row[places])
        return results.view(hidden_states.shape)


def open_experts(model: nn.Module) -> None:
    """Open the experts of a model in place, where their form is known; what they hold stays where it is, in views.

    Raises:
        SourceError: there are more of them than any model has.
    """
    found = fused_experts(model)
    if (count := sum(len(module.get_parameter(DOWN)) for module in found.values())) > MOST:
        raise SourceError(f"config.json asks for {count} experts; at most {MOST} make sense; get the file again")
    for name, module in found.items():
        kind = OpenedSortedExperts if type(module).__name__ in SORTED_EXPERTS else OpenedExperts
        model.set_submodule(name, kind(module))


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of transformers whose form is known, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        known = hasattr(module, "is_concatenated") or type(module).__name__ in SORTED_EXPERTS
        if known and {DOWN} <= {leaf for leaf, _ in module.named_parameters()} <= LEAVES:
            found[name] = module
    return found


def opened_experts(model: nn.Module) -> dict[str, OpenedExperts]:
    """The opened experts of a model, by the name of the module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OpenedExperts)}


def tell_prefill(model: nn.Module) -> None:
    """Let the experts know of each call whether it brings several tokens a sequence: they see the tokens of all in one row."""

    def telling(experts: OpenedExperts) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def tell(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            experts.several = inputs[0].dim() > 2 and inputs[0].shape[-2] > 1

        return tell

    for name, experts in opened_experts(model).items():
        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(telling(experts))
