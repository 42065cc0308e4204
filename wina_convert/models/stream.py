"""A causal LM whose decoder layers visit memory one at a time.

The model is built on the meta device. Running it once with every decoder layer replaced by a pass-through records the hidden
states after the embedding and the arguments (masks, rotary embeddings) that each layer gets. From then on a layer is loaded,
run over all hidden states and put back on the meta device before the next one comes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..errors import SourceError, one_line
from ..format.shards import TensorSpec
from .source import Source
from ..format.trust import MAX_LAYERS

# Loads the tensors of these checkpoint keys: (key, tensor) pairs on the CPU.
Reader = Callable[[Iterable[str]], Iterable[tuple[str, Tensor]]]


def build_skeleton(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a source on the meta device, to compute in `dtype`.

    Raises:
        SourceError: transformers cannot build a model from the config.
    """
    try:
        if source.trust_remote_code and "auto_map" in source.config:
            place = source.folder if source.folder.is_absolute() or source.revision is None else source.name
            config = AutoConfig.from_pretrained(place, revision=source.revision, trust_remote_code=True)
        else:
            config = CONFIG_MAPPING[source.config["model_type"]].from_dict(source.config)
        if config.get_text_config().num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"{config.get_text_config().num_hidden_layers} layers")
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=source.trust_remote_code
            )
    except Exception as error:  # whatever transformers makes of a strange config
        raise SourceError(f"transformers cannot build {source.name} from its config.json: {one_line(error)}") from error
    model.train(False)
    return model


def checkpoint_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Which checkpoint key holds each parameter or buffer of the model, by transformers' own renaming rules."""
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = {rename_source_key(key, renamings, converters, model.base_model_prefix, state)[0]: key for key in keys}
    return {name: found[name] for name in state if name in found}


def tied(model: PreTrainedModel, keys: Mapping[str, str]) -> dict[str, str]:
    """Tied parameters of which the checkpoint stores one: the stored name -> the other. Stored both, they stay apart."""
    aliases = {}
    for target, origin in model.all_tied_weights_keys.items():
        if (target in keys) != (origin in keys):
            stored, other = (target, origin) if target in keys else (origin, target)
            aliases[stored] = other
    return aliases


def check_parameters(
    model: PreTrainedModel, keys: Mapping[str, str], specs: Mapping[str, TensorSpec], new: Iterable[str] = ()
) -> None:
    """Hold a model on the meta device against the headers of its checkpoint, before any memory is taken.

    Args:
        model: the model.
        keys: checkpoint key of each parameter.
        specs: the stored tensors by key.
        new: parameters that need not be stored.

    Raises:
        SourceError: a tensor is missing or has another shape.
    """
    known = {*keys, *tied(model, keys).values(), *new}
    state = model.state_dict()
    missing = [name for name in state if name not in known]
    if missing:
        raise SourceError(f"the checkpoint has no tensor {missing[0]} ({len(missing)} missing in all); get it again")
    for name, key in keys.items():
        if specs[key].shape != tuple(state[name].shape):
            raise SourceError(
                f"tensor {key!r} has shape {specs[key].shape} where config.json asks for {tuple(state[name].shape)}; "
                "the two do not belong together"
            )
        if state[name].is_floating_point() and not specs[key].dtype.is_floating_point:
            raise SourceError(f"tensor {key!r} is {specs[key].dtype}, where the model has floating-point numbers")


class StreamedModel:
    """Runs a causal LM layer by layer, without gradients.

    Attributes:
        model: the skeleton; on the meta device but for what is being run.
        layers: its decoder layers.
        keys: checkpoint key of each parameter.

    Raises:
        SourceError: a parameter has no tensor of its shape in the checkpoint.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: str,
        keys: Mapping[str, str],
        specs: Mapping[str, TensorSpec],
        read: Reader,
        device: torch.device,
    ) -> None:
        self.model, self.read, self.device = model, read, device
        self.layers: list[nn.Module] = list(model.get_submodule(layers).children())
        self.prefix = layers
        self.keys = dict(keys)
        self.aliases = tied(model, keys)
        check_parameters(model, keys, specs)
        self._outer = [name for name in self.keys if not name.startswith(f"{layers}.")]
        # What each layer gets besides the hidden states, by the number of rows in a batch.
        self._arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._captured: list[Tensor] = []
        self._inject: Tensor | None = None
        _initialise_buffers(model, device)

    def layer_keys(self, index: int) -> list[str]:
        """The checkpoint keys of a decoder layer."""
        return [self.keys[name] for name in self._layer_names(index)]

    def embed(self, batches: Iterable[Tensor]) -> list[Tensor]:
        """Hidden states that enter the first decoder layer: [B, S] token ids -> [B, S, hidden] each."""
        head = self._names_of(self.model.get_output_embeddings())
        with self._loaded([name for name in self._outer if name not in head]), self._stubs(), torch.no_grad():
            for batch in batches:
                self.model.base_model(input_ids=batch.to(self.device), use_cache=False)
        states, self._captured = self._captured, []
        return states

    @contextmanager
    def layer(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> Iterator[Callable[[Tensor], Tensor]]:
        """Load a decoder layer for the length of a with-block.

        Args:
            index: which layer.
            tensors: its tensors by checkpoint key; None: read them.

        Yields:
            a function from hidden states [B, S, hidden] to hidden states [B, S, hidden].
        """
        module = self.layers[index]

        @torch.no_grad()
        def run(hidden: Tensor) -> Tensor:
            args, kwargs = self._arguments[hidden.shape[0]][index]
            output = module(hidden, *args, **kwargs)
            result: Tensor = output[0] if isinstance(output, tuple) else output
            return result

        with self._loaded(self._layer_names(index), tensors):
            yield run

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Load what follows the layers for the length of a with-block.

        Yields:
            a function from the last layer's hidden states [N, hidden] to logits [N, vocabulary].
        """
        embedding, head = (
            self._names_of(module) for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        )
        spared = embedding if head else set()  # tied: the input embedding is the output embedding

        @torch.no_grad()
        def logits(hidden: Tensor) -> Tensor:
            # The layers pass through, so that whatever a family does after them is done here too.
            self._inject = hidden[None]
            output: Tensor = self.model(inputs_embeds=self._inject, use_cache=False).logits
            return output[0]

        with self._loaded([name for name in self._outer if name not in spared]), self._stubs():
            yield logits
        self._inject = None

    def _layer_names(self, index: int) -> list[str]:
        return [name for name in self.keys if name.startswith(f"{self.prefix}.{index}.")]

    def _names_of(self, module: nn.Module | None) -> set[str]:
        owners = {name for name, other in self.model.named_modules() if other is module}
        return {name for name in self.keys if name.rpartition(".")[0] in owners}

    @contextmanager
    def _loaded(self, names: list[str], tensors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        by_key = {self.keys[name]: name for name in names}
        empty = {name: _get(self.model, name) for name in names}
        try:
            for key, tensor in tensors.items() if tensors is not None else self.read(by_key):
                if key in by_key:
                    name = by_key[key]
                    self._set(name, tensor.to(self.device, empty[name].dtype))
            yield
        finally:
            for name, parameter in empty.items():
                self._set(name, parameter)

    def _set(self, name: str, tensor: Tensor) -> None:
        _set(self.model, name, tensor)
        if name in self.aliases:
            _set(self.model, self.aliases[name], tensor)

    @contextmanager
    def _stubs(self) -> Iterator[None]:
        """Replace every decoder layer by a pass-through that records what it was given."""

        def stub(index: int) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if self._inject is not None:
                    return self._inject
                if index == 0:
                    self._captured.append(hidden_states)
                recorded = self._arguments.setdefault(hidden_states.shape[0], [])
                if len(recorded) == index:
                    recorded.append((args, kwargs))
                return hidden_states

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = stub(index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


def _get(model: nn.Module, name: str) -> Tensor:
    module, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), leaf)
    return tensor


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    if leaf in owner._parameters and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, leaf, tensor)


def _initialise_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give the buffers (rotary frequencies) their values, through the model's own initialisation and nothing else's."""
    for name, buffer in list(model.named_buffers()):
        _set(model, name, torch.empty_like(buffer, device=device))
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()
