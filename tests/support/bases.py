"""Random bases for a source, and turned models as plain folders that transformers loads."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from wina_convert.conversion.turn import Turn, plan_turn, read_turned
from wina_convert.fitting.basis import Basis
from wina_convert.models.source import open_source

CPU = torch.device("cpu")


def turn_of(folder: Path, kind: str = "pca") -> Turn:
    turn = plan_turn(open_source(str(folder)), kind, CPU)
    assert turn is not None
    return turn


def random_orthogonal(size: int, seed: int) -> Tensor:
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise).Q


def random_basis(turn: Turn, seed: int = 0) -> Basis:
    """No special one: any orthogonal matrix and any invertible ones must leave the function as it is."""
    sizes = turn.sizes
    heads, dim = sizes.layers * sizes.kv_heads, sizes.head_dim
    scale = torch.linspace(0.5, 2, dim, dtype=torch.float64)  # a worse condition would magnify float32's rounding
    made = [
        random_orthogonal(dim, seed + 2 * n) * scale @ random_orthogonal(dim, seed + 2 * n + 1) for n in range(heads)
    ]
    values = torch.stack(made).view(sizes.layers, sizes.kv_heads, dim, dim)
    residual = random_orthogonal(sizes.hidden, seed) if turn.reason is None else None
    return Basis(turn.kind, residual, values, torch.linalg.inv(values))


def write_turned(turn: Turn, basis: Basis, folder: Path) -> Path:
    """The turned model as a plain Hugging Face folder."""
    folder.mkdir()
    tensors = {key: tensor.contiguous() for key, tensor in read_turned(turn, basis, turn.source.tensors, CPU)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(turn.source.config_text)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(turn.origin.path / file, folder / file)
    return folder


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 2048, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(folder: Path, tokens: Tensor) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits.double()


def difference(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max())
