"""A model of random weights, gated in memory."""

import torch
from torch import nn

from wina_convert.format.config import WinaConfig
from wina_convert.format.grid import GRID
from wina_convert.runtime.install import gate, set_sparsity


def gate_layers(model: nn.Module) -> None:
    """Gate every linear map of the decoder layers in place, all thresholds zero."""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and ".layers." in name]

    def tables(name: str, weight_t: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"column_norms": weight_t.float().norm(dim=1), "thresholds": torch.zeros(len(GRID))}

    gate(model, WinaConfig(modules=names), tables)
    set_sparsity(model, 0)
