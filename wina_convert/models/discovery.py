"""What can be gated in a model of a type that no table lists: found on its skeleton, and on a twin that is run once."""

import functools
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architectures import DENSE, Architecture
from ..errors import SourceError, one_line
from ..format.experts import COUNTS, experts_given, of_any_expert, split_expert
from ..format.folder import Folder
from ..format.names import WEIGHT
from ..runtime.experts import open_experts, opened_experts
from .structure import decoder_layers, text_part
from .twin import LEFT_OUT, make_twin

TOKENS = 12  # of each of two sequences that the twin is run on
NARROW = 16  # outputs: of fewer, the float32 cutoffs are more than an eighth of a weight in half precision

_ATTENTION = re.compile(r"att", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|moe|expert|\bfc|\bw\d|^intermediate|^output", re.IGNORECASE)

_seen: dict[tuple[type, str], "Observed"] = {}


@dataclass(frozen=True)
class Observed:
    """What a run of a twin showed.

    Attributes:
        called: the modules that were called and did what a linear map does, by their names within a decoder layer; of experts,
            which tokens choose, by the name of any.
        outputs: the length of the tuple that a decoder layer returns; 0: it returns the hidden states alone.
        beside: the modules beside the text decoder that text passes as well.
    """

    called: frozenset[str]
    outputs: int
    beside: frozenset[str]


def architecture_of(folder: Folder, model: PreTrainedModel) -> Architecture:
    """The family of a model: the listed one, or what is found on its skeleton.

    Raises:
        SourceError: the model cannot be gated; the message says why.
    """
    return folder.architecture if folder.listed else discover(model)


def discover(model: PreTrainedModel) -> Architecture:
    """What can be gated in a model on the meta device.

    The decoder layers are the list with as many modules as the config has layers. In them every plain linear map that a layer
    calls is gated, but for those that the table DENSE names and those too narrow to save bytes.

    Raises:
        SourceError: it has no such list, its twin does not run, or nothing is left to gate.
    """
    path = decoder_layers(model)
    _check_experts(model, path)
    observed = observe(model)
    names: dict[str, str | None] = {}
    for layer in model.get_submodule(path).children():
        for name, module in layer.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                names[name] = names.get(name) or _stays_dense(name, module, observed)
    gated = [name for name, reason in names.items() if reason is None]
    if not gated:
        why = sorted({reason for reason in names.values() if reason}) or ["no linear map is in its decoder layers"]
        raise SourceError(f"nothing in a model of type {model.config.model_type!r} can be gated: {'; '.join(why)}")
    attention = tuple(name for name in gated if _ATTENTION.search(name) or not _FEED_FORWARD.search(name))
    return Architecture(
        layers=path,
        attention=attention,
        mlp=tuple(name for name in gated if name not in attention),
        weighted=(),
        residual="no test has turned a model of its type",
        values=None,
        dense={name: reason for name, reason in names.items() if reason},
        outputs=observed.outputs,
        beside=observed.beside,
    )


def _check_experts(model: PreTrainedModel, path: str) -> None:
    """Refuse experts that could not be opened, and those of which it is not known how many a token is given."""
    opened = opened_experts(model)
    counts = {getattr(model.config.get_text_config(), field, None) for field in COUNTS}
    for name, parameter in model.get_submodule(path).named_parameters():
        stacked = parameter.dim() > 2 and len(parameter) in counts
        if stacked or (".experts." in name and split_expert(name) is None):
            raise SourceError(
                f"a model of type {model.config.model_type!r} keeps its experts in a form that is not known ({name!r}); "
                "the type is not supported"
            )
    if opened and experts_given(model.config.to_dict()) is None:
        raise SourceError(
            f"config.json of a model of type {model.config.model_type!r} does not say how many experts a token is given"
        )


def _stays_dense(name: str, module: nn.Module, observed: Observed) -> str | None:
    """Why a linear map stays dense; None: it does not."""
    for pattern, reason in DENSE.items():
        if re.search(pattern, name):
            return reason
    if of_any_expert(name) not in observed.called:
        return "its layer does not use it as a plain linear map of text"
    rows, columns = module.get_parameter(WEIGHT).shape
    outputs = columns if isinstance(module, Conv1D) else rows
    return f"has fewer than {NARROW} outputs: its cutoffs would cost what it saves" if outputs < NARROW else None


def _see(called: set[str], name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
    """Note a module that computes W x + b: a subclass may do something else."""
    weight, bias = module.get_parameter(WEIGHT), dict(module.named_parameters(recurse=False)).get("bias")
    plain = weight.t() if isinstance(module, Conv1D) else weight
    if not inputs or inputs[0].shape[-1] != plain.shape[1]:  # of a part of the features
        return
    expected = nn.functional.linear(inputs[0], plain, bias)
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return
    if torch.allclose(output, expected, rtol=1e-3, atol=1e-4):
        called.add(name)


def kind_of(model: PreTrainedModel) -> tuple[type, str]:
    """What models that are built alike share: the class, and of the config what their twin is made from."""

    def told(fields: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in fields.items() if name not in LEFT_OUT}
        return {name: told(value) if isinstance(value, dict) else value for name, value in kept.items()}

    return type(model), json.dumps(told(model.config.to_dict()), sort_keys=True, default=str)


def observe(model: PreTrainedModel) -> Observed:
    """Run the twin of a model once; models of one class and config share what is seen.

    Raises:
        SourceError: it does not run on text alone.
    """
    key = kind_of(model)
    if key not in _seen:
        _seen[key] = _run(make_twin(model))
    return _seen[key]


def _run(twin: PreTrainedModel) -> Observed:
    open_experts(twin)
    path = decoder_layers(twin)
    called: set[str] = set()
    outputs: set[int] = set()
    beside: set[str] = set()
    for layer in twin.get_submodule(path).children():
        layer.register_forward_hook(
            lambda _, inputs, output: outputs.add(len(output) if isinstance(output, (tuple, list)) else 0)
        )
        for name, module in layer.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                module.register_forward_hook(functools.partial(_see, called, of_any_expert(name)))
    part = text_part(twin)
    for name, module in twin.named_modules():
        if not f"{name}.".startswith(part):
            module.register_forward_hook(lambda *_, name=name: beside.add(name))
    tokens = torch.arange(2 * TOKENS).view(2, TOKENS) * 7 % (twin.config.get_text_config().vocab_size - 8) + 4
    try:
        with torch.no_grad():
            twin(input_ids=tokens, use_cache=False)
    except Exception as error:  # whatever the model's code makes of text alone
        raise SourceError(
            f"a small model of type {twin.config.model_type!r} does not run on text ({one_line(error)}); "
            "the type is not supported"
        ) from error
    if len(outputs) != 1:
        raise SourceError(
            f"the decoder layers of {twin.config.model_type!r} are not called alike; the type is not supported"
        )
    return Observed(frozenset(called), outputs.pop(), frozenset(beside))
