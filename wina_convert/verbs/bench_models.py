"""The models that `wina bench` compares: a gated one of random weights, and the dense one with the same weights."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..fitting.schemes import column_norms
from ..format.config import WinaConfig
from ..format.grid import GRID
from ..format.names import COLUMN_NORMS, THRESHOLDS
from ..runtime import decoding
from ..runtime.grouping import group
from ..runtime.install import gate
from ..runtime.linear import WinaLinear, gated_modules, observing
from ..runtime.restore import restore
from ..runtime.rule import scores

# hidden, layers, intermediate, heads, key-value heads, tied head: those of Llama 3.2 1B and 3B and of Llama 3 8B, and one of
# half the first's weights
RANDOM = {
    "0.6b": (1280, 24, 4096, 20, 4, True),
    "1b": (2048, 16, 8192, 32, 8, True),
    "3b": (3072, 28, 8192, 24, 8, True),
    "8b": (4096, 32, 14336, 32, 8, False),
}
VOCABULARY = 128256


def shape_config(shape: Sequence[int], **others: Any) -> Any:
    """The config of a Llama of a shape, given as those of RANDOM are, with the other fields given."""
    from transformers import LlamaConfig

    hidden, layers, intermediate, heads, kv_heads, tied = shape
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=bool(tied),
        **others,
    )


def random_model(size: str, dtype: str, device: torch.device | str = "cpu") -> Any:
    """A gated Llama with random weights and no thresholds yet, made where it is to run."""
    from transformers import LlamaForCausalLM
    from transformers.initialization import no_init_weights

    if size not in RANDOM:
        raise OptionError(f"the random model is {size!r}; give {', '.join(RANDOM)}")
    config = shape_config(RANDOM[size], vocab_size=VOCABULARY, max_position_embeddings=8192, dtype=dtype)
    with no_init_weights(), torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()
    model.tie_weights()
    # Billions of random numbers would take minutes: the same ones over and over, with a period that fits no matrix.
    numbers = (0.02 * torch.randn((1 << 20) + 7)).to(device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            flat = parameter.data.view(-1)
            for part in flat.split(len(numbers)):
                part.copy_(numbers[: len(part)])
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and ".layers." in name]
    gate(
        model,
        WinaConfig(modules=names),
        lambda name, weight_t: {
            COLUMN_NORMS: column_norms(weight_t),
            THRESHOLDS: torch.zeros(len(GRID), dtype=torch.float32),
        },
    )
    group(model)
    decoding.use(model)
    return model


@torch.no_grad()  # not inference mode: a compiled model has to tell its tensors from others
def fit(model: Any, prompt: Tensor, sparsities: Sequence[float]) -> None:
    """Thresholds from the quantiles of the scores at the end of the prompt, each layer behind the gated ones before it."""
    for sparsity in sorted(sparsities):

        def see(name: str, module: WinaLinear, x: Tensor, sparsity: float = sparsity) -> None:
            grid = torch.tensor(module.grid, device=x.device)
            below = grid < max(point for point in module.grid if point <= sparsity)
            sample = scores(x[:, -32:], module.column_norms).flatten()
            module.thresholds.data = torch.where(below, module.thresholds, sample.quantile(grid))
            module.thresholds.data[0] = 0
            module.set_sparsity(sparsity)

        with observing(gated_modules(model), see):
            model(input_ids=prompt, use_cache=False, logits_to_keep=1)


def sharing_copy(model: Any) -> Any:
    """A copy of the modules with the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def make_dense(model: Any) -> Any:
    """The model in place with plain linear modules and experts, as transformers builds them."""
    restore(model)
    return model.requires_grad_(False)
