"""A causal LM whose decoder layers visit memory one at a time.

The model is built on the meta device. Running it once with every decoder layer replaced by a pass-through records the hidden
states after the embedding and the arguments (masks, rotary embeddings) that each layer gets. From then on a layer is loaded,
run over all hidden states and put back on the meta device before the next one comes. What one hands on to the next is a tensor
[B, S, features] whatever the model's own form is (see `models.handed`).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from ..architectures import Architecture
from ..errors import SourceError, one_line
from ..format.checkpoint import Checkpoint
from ..format.config import WinaConfig
from ..format.dtypes import compute_dtype
from ..format.folder import Folder
from ..format.names import WEIGHT, WEIGHT_T
from ..format.shards import TensorSpec
from ..format.trust import MAX_LAYERS
from ..runtime.classes import auto_class
from ..runtime.experts import open_experts
from ..runtime.install import install
from ..runtime.keys import check_parameters, checkpoint_keys, tied
from .discovery import architecture_of
from .experts import opened
from .handed import SHARED, packed, stored_before, unpacked
from .source import Source
from .structure import for_text

# Loads the tensors of these checkpoint keys: (key, tensor) pairs on the CPU.
Reader = Callable[[Iterable[str]], Iterable[tuple[str, Tensor]]]


def model_config(folder: Folder) -> PreTrainedConfig:
    """A folder's config as transformers has it."""
    if isinstance(folder, Source) and folder.trust_remote_code and "auto_map" in folder.config:
        place = folder.path if folder.path.is_absolute() or folder.revision is None else folder.name
        found: PreTrainedConfig = AutoConfig.from_pretrained(place, revision=folder.revision, trust_remote_code=True)
        return found
    kind = CONFIG_MAPPING[folder.config["model_type"]]
    return kind.from_dict(kind._decode_special_floats(folder.config))  # an infinite time step is stored as an object


def build_skeleton(folder: Folder, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder's config on the meta device, to compute in `dtype`; its experts are opened.

    Raises:
        SourceError: transformers cannot build a model from the config.
    """
    trusted = isinstance(folder, Source) and folder.trust_remote_code
    try:
        config = model_config(folder)
        if config.get_text_config().num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"{config.get_text_config().num_hidden_layers} layers")
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trusted)
    except ImportError as error:
        raise SourceError(f"transformers builds {folder.name} with {missing(error)}") from error
    except Exception as error:  # whatever transformers makes of a strange config
        raise SourceError(f"transformers cannot build {folder.name} from its config.json: {one_line(error)}") from error
    model.train(False)
    open_experts(model)
    return model


def missing(error: ImportError) -> str:
    """A library that transformers misses, from what it says: "the library timm, which is not installed ..."."""
    if found := re.search(r"pip install ([\w.-]+)", str(error)):
        return f"the library {found[1]}, which is not installed; run `pip install {found[1]}`"
    return f"a library that is not installed ({one_line(error)})"


class StreamedModel:
    """Runs a causal LM layer by layer, without gradients.

    Attributes:
        model: the skeleton; on the meta device but for what is being run.
        layers: its decoder layers.
        keys: checkpoint key of each parameter.
        outputs: the length of the tuple that a decoder layer returns; 0: it returns the hidden states alone.
        beside: the modules beside a model's decoder that text passes as well.

    Raises:
        SourceError: a parameter has no tensor of its shape in the checkpoint.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Architecture,
        keys: Mapping[str, str],
        specs: Mapping[str, TensorSpec],
        read: Reader,
        device: torch.device,
    ) -> None:
        self.model, self.read, self.device = model, read, device
        self.layers: list[nn.Module] = list(model.get_submodule(family.layers).children())
        self.prefix, self.outputs = family.layers, family.outputs
        self.keys = dict(keys)
        self.aliases = tied(model, keys)
        self._stored = stored_before(self.layers)
        self._hidden, self._copies = 0, 0  # features of a hidden state; how many a token has, if not one
        check_parameters(model, keys, specs)
        models = [(name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel)]
        # the innermost around the layers: without a head
        self._body = [part for name, part in models if not name or self.prefix.startswith(f"{name}.")][-1]
        self.beside = family.beside
        passed = for_text(model, self.keys, self.beside)
        self._outer = [name for name in passed if not name.startswith(f"{self.prefix}.")]
        # What each layer gets besides the hidden states, by batch.
        self._arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._captured: list[Tensor] = []
        self._inject: Tensor | None = None
        _initialise_buffers(model, device)

    def layer_keys(self, index: int) -> list[str]:
        """The checkpoint keys of a decoder layer."""
        return [self.keys[name] for name in self._layer_names(index)]

    def embed(self, batches: Iterable[Tensor]) -> list[Tensor]:
        """What enters the first decoder layer: [B, S] token ids -> [B, S, features] each; most often hidden states alone."""
        head = self._names_of(self.model.get_output_embeddings())
        self._arguments = []
        with self._loaded([name for name in self._outer if name not in head]), self._stubs(), torch.no_grad():
            for batch in batches:
                self._arguments.append([])
                self._body(input_ids=batch.to(self.device), use_cache=False)
                hidden = self._captured[-1]
                several = hidden.dim() == 4 and hidden.shape[1:3] == batch.shape
                self._hidden, self._copies = hidden.shape[-1], len(hidden) if several else 0
                self._captured[-1] = packed(hidden, self._copies, {})
        states, self._captured = self._captured, []
        return states

    @contextmanager
    def layer(
        self, index: int, tensors: Mapping[str, Tensor] | None = None
    ) -> Iterator[Callable[[Tensor, int], Tensor]]:
        """Load a decoder layer for the length of a with-block.

        Args:
            index: which layer.
            tensors: its tensors by checkpoint key; None: read them.

        Yields:
            a function from what the layer before handed on, [B, S, features], and the number of its batch in `embed` to what this
            one does.
        """
        module = self.layers[index]

        @torch.no_grad()
        def run(hidden: Tensor, number: int) -> Tensor:
            args, kwargs = self._arguments[number][index]
            hidden, shared = unpacked(hidden, self._hidden, self._copies, self._stored[index])
            if SHARED in kwargs:  # as the layers of this batch would have left it
                shared = type(kwargs[SHARED])(shared)
                kwargs = {**kwargs, SHARED: shared}
            output = module(hidden, *args, **kwargs)
            if shared.keys() != self._stored[index + 1].keys():
                raise SourceError(f"decoder layer {index} stored keys and values of {', '.join(shared)} for later ones")
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            return packed(hidden, self._copies, shared)

        with self._loaded(self._layer_names(index), tensors):
            yield run

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Load what follows the layers for the length of a with-block.

        Yields:
            a function from what the last layer handed on, [N, features], to logits [N, vocabulary].
        """
        embedding, head = (
            self._names_of(module) for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        )
        own = any(
            name.endswith((f".{WEIGHT}", f".{WEIGHT_T}")) for name in head
        )  # not tied; a tied head may have a bias of its own
        spared = embedding if own else set()

        @torch.no_grad()
        def logits(hidden: Tensor) -> Tensor:
            # The layers pass through, so that whatever a family does after them is done here too.
            self._inject, _ = unpacked(hidden[None], self._hidden, self._copies, self._stored[-1])
            # any tokens: the layers drop what comes of them
            tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
            output: Tensor = self.model(input_ids=tokens, use_cache=False).logits
            return output[0]

        # Zeros that take no memory stand in for the embedding: a model may look at its weight.
        empty = {self.keys[name]: _get(self.model, name) for name in spared}
        zeros = {
            key: torch.zeros(1, dtype=one.dtype, device=self.device).expand(one.shape) for key, one in empty.items()
        }
        outer = [name for name in self._outer if name not in spared]
        with self._loaded(list(spared), zeros), self._loaded(outer), self._stubs():
            yield logits
        self._inject = None

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """Load the whole model for the length of a with-block; it computes in its own dtype, and gradients where asked."""
        with self._loaded(list(self.keys)):
            yield self.model

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

        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def returned(hidden: Tensor) -> Any:
            return (hidden, *[None] * (self.outputs - 1)) if self.outputs else hidden

        def stub(index: int) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                if self._inject is not None:
                    return returned(self._inject)
                if index == 0:
                    self._captured.append(hidden_states)
                    kept.clear()
                first = self._arguments[0]
                known = first[index] if index < len(first) else None
                self._arguments[-1].append(_kept((args, kwargs), known, kept))
                return returned(hidden_states)

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = stub(index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


def gated_stream(
    folder: Folder,
    config: WinaConfig,
    dtype: torch.dtype,
    tensors: Iterable[TensorSpec],
    read: Reader,
    device: torch.device,
) -> StreamedModel:
    """The model of a source's config with gated projections installed, to be fed from a checkpoint's tensors."""
    model = build_skeleton(folder, dtype)
    family = architecture_of(folder, model)
    install(model, config)
    specs = {spec.name: spec for spec in tensors}
    return StreamedModel(model, family, checkpoint_keys(model, specs), specs, read, device)


def dense_stream(source: Folder, dtype: torch.dtype, device: torch.device) -> StreamedModel:
    """The source as it is, computed in `dtype`."""
    model = build_skeleton(source, dtype)
    source = opened(source, model)
    return StreamedModel(
        model,
        architecture_of(source, model),
        checkpoint_keys(model, source.tensors),
        source.tensors,
        source.read,
        device,
    )


def checkpoint_stream(checkpoint: Checkpoint, device: torch.device) -> StreamedModel:
    """A WINA checkpoint's model, with its thresholds."""
    folder = checkpoint.folder
    return gated_stream(
        folder, checkpoint.config, compute_dtype(folder), folder.tensors.values(), checkpoint.read, device
    )


def _kept(given: Any, first: Any, kept: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """What to keep of what a layer is given: the same objects as for the first batch where they hold the same.

    Masks and rotary embeddings of all batches would be more than the hidden states.

    Args:
        given: arguments.
        first: what the layer was given for the first batch; None: this is the first.
        kept: by the identity of a tensor of this batch, itself and what is kept of it: most layers are given the same.
    """
    if isinstance(given, Tensor):
        if id(given) not in kept:
            same = isinstance(first, Tensor) and first.shape == given.shape and torch.equal(first, given)
            kept[id(given)] = (given, first if same else given)
        return kept[id(given)][1]
    if type(given) in (tuple, list):
        parts = first if isinstance(first, (tuple, list)) and len(first) == len(given) else [None] * len(given)
        return type(given)(_kept(one, other, kept) for one, other in zip(given, parts, strict=True))
    if type(given) is dict:
        named = first if isinstance(first, dict) else {}
        return {name: _kept(one, named.get(name), kept) for name, one in given.items()}
    return given


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
