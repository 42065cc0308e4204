"""What a causal LM's decoder layers are made of: the projections that can be gated, and what a token only looks up."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architectures import Architecture
from ..errors import SourceError
from ..format.experts import shares
from ..format.folder import Folder
from ..format.names import WEIGHT, WEIGHT_T
from ..runtime.rule import bytes_read

# fields with the number of decoder layers; a decoder that was trained with an encoder counts apart
COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")


@dataclass(frozen=True)
class Projection:
    """One gated matrix.

    Attributes:
        name: its module in the model, for example `model.layers.0.mlp.down_proj`.
        key: its name in the checkpoint (the same, but where a checkpoint leaves out the base model's prefix).
        layer: index of its decoder layer; None: it is the output head.
        in_features: inputs, the columns of W.
        out_features: outputs, the rows of W.
        transposed_in_source: whether the source stores [in, out] already (GPT-2).
        bias: whether it has a bias.
        dtype: of the stored weight.
        share: which part of the tokens meets it; less than 1 for an expert's.
    """

    name: str
    key: str
    layer: int | None
    in_features: int
    out_features: int
    transposed_in_source: bool
    bias: bool
    dtype: torch.dtype
    share: float = 1.0

    @property
    def weights(self) -> int:
        """Number of weights that a token meets on average; every budget and every mean over projections is weighted by it."""
        return round(self.share * self.in_features * self.out_features)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.in_features * self.out_features * self.dtype.itemsize

    def bytes_per_token(self, sparsity: float) -> float:
        """Bytes of weight and cutoffs that a token reads on average when this fraction of the inputs is skipped."""
        return self.share * bytes_read(self.nbytes, self.in_features, sparsity)


def text_part(model: PreTrainedModel) -> str:
    """What the names of all parameters of a model's text decoder begin with; empty where that is the whole model."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is decoder)


def for_text(model: PreTrainedModel, names: Iterable[str], beside: Collection[str] = ()) -> list[str]:
    """The parameters that text passes: those of the decoder and of the head, and not what makes hidden states of images.

    Args:
        model: the skeleton.
        names: of parameters.
        beside: the modules beside the decoder that text passes as well.
    """
    part, head = text_part(model), model.get_output_embeddings()
    others = {name for name, module in model.named_modules() if module is head} | {*beside}
    return [name for name in names if name.startswith(part) or name.rpartition(".")[0] in others]


def decoder_layers(model: PreTrainedModel) -> str:
    """Dotted path of a causal LM's decoder layers: the list with as many modules as the config has layers.

    Raises:
        SourceError: there is none, or more than one.
    """
    config, part = model.config.get_text_config(), text_part(model)
    counts = (getattr(config, name, None) for name in COUNTS)
    count = next((number for number in counts if number), None)
    lists: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and name.startswith(part)
    ]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        found = " and ".join(outer) if outer else "no list of its own"
        raise SourceError(
            f"a model of type {config.model_type!r} has {found} for its {count} decoder layers; the type is not supported"
        )
    return outer[0]


def find_projections(
    folder: Folder,
    family: Architecture,
    model: PreTrainedModel,
    keys: dict[str, str],
    dtype: torch.dtype | None,
) -> list[Projection]:
    """Every projection that a family's decoder layers can gate.

    Args:
        folder: the folder.
        family: its family.
        model: its skeleton.
        keys: checkpoint key of each parameter.
        dtype: to store the weights in; None: as they are.

    Raises:
        SourceError: one is no plain linear map, or its tensor has another shape than config.json asks for.
    """
    found = []
    met = shares(folder.config, keys)
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        modules = dict(layer.named_modules())
        for short in (*family.attention, *family.mlp):
            if short not in modules and not folder.listed:
                continue  # layers of several kinds
            name = f"{family.layers}.{index}.{short}"
            module = modules.get(short)
            key = keys.get(f"{name}.{WEIGHT}", "").removesuffix(f".{WEIGHT}")
            if not isinstance(module, (nn.Linear, Conv1D)) or not key:
                raise SourceError(f"{folder.name} has no plain weight for {name}; this variant is not supported")
            if f".{key}".partition(f".{index}.")[2] != short:  # a reader could not tell which it is
                raise SourceError(f"{folder.name} calls {name} {key!r} in its files, which is not supported")
            spec = folder.tensors[f"{key}.{WEIGHT}"]
            expected = tuple(model.get_parameter(f"{name}.{WEIGHT}").shape)
            if spec.shape != expected:
                raise SourceError(
                    f"tensor {spec.name!r} has shape {spec.shape} where config.json asks for "
                    f"{expected}; the two do not belong together"
                )
            transposed = isinstance(module, Conv1D)
            rows, columns = spec.shape
            found.append(
                Projection(
                    name=name,
                    key=key,
                    layer=index,
                    in_features=rows if transposed else columns,
                    out_features=columns if transposed else rows,
                    transposed_in_source=transposed,
                    bias=module.bias is not None,
                    dtype=dtype or spec.dtype,
                    share=met[f"{name}.{WEIGHT}"],
                )
            )
    return found


def find_head(folder: Folder, model: PreTrainedModel, keys: Mapping[str, str], dtype: torch.dtype | None) -> Projection:
    """The output head as a projection; arguments as for `find_projections`.

    Raises:
        SourceError: it is no plain linear map with a tensor of its own.
    """
    name, head = head_of(model)
    key = f"{name}.{WEIGHT}"
    if type(head) is not nn.Linear or keys.get(key) != key:
        raise SourceError(
            f"{folder.name} has no plain weight of its own for the head ({name or type(model).__name__}); leave it dense: take "
            "head out of --targets"
        )
    spec = folder.tensors[key]
    rows, columns = spec.shape
    return Projection(name, name, None, columns, rows, False, head.bias is not None, dtype or spec.dtype)


def head_of(model: PreTrainedModel) -> tuple[str, nn.Module | None]:
    """The module that makes logits, with its name; an empty one where there is none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), ""), head


def not_read(model: PreTrainedModel, keys: Mapping[str, str], beside: Collection[str] = ()) -> set[str]:
    """The parameters that a token of text does not read: embeddings, of which it looks up a row, and parts for images or sound.

    A tied input embedding is the head as well, and read.

    Args:
        model: the skeleton.
        keys: checkpoint key of each stored parameter.
        beside: the modules beside the decoder that text passes as well.
    """
    head, _ = head_of(model)
    own_head = any(f"{head}.{leaf}" in keys for leaf in (WEIGHT, WEIGHT_T))
    found = {
        f"{name}.{WEIGHT}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and (own_head or module is not model.get_input_embeddings())
    }
    return (found & keys.keys()) | (keys.keys() - for_text(model, keys, beside))
