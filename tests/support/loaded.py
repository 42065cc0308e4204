"""What a loaded model computes, and whether two sets of tensors are the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from support.folders import tensors_of

PROMPT = torch.tensor([[0, 310, 7, 1999, 45, 45, 3, 800, 12, 64]])


def logits(model: PreTrainedModel, tokens: Tensor = PROMPT) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def greedy(model: PreTrainedModel, tokens: Tensor = PROMPT, new: int = 12, **options: Any) -> Tensor:
    found = model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
    return found[:, tokens.shape[1] :]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    same = all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a.keys() & b.keys())
    return a.keys() == b.keys() and same


def cutoffs_of(folder: Path, name: str, sparsity: float) -> np.ndarray:
    """tau from the stored tensors, in float64."""
    stored = tensors_of(folder)
    grid = json.loads((folder / "config.json").read_text())["quantization_config"]["grid"]
    threshold = np.interp(sparsity, grid, stored[f"{name}.thresholds"].double().numpy())
    return threshold / stored[f"{name}.column_norms"].double().numpy()
