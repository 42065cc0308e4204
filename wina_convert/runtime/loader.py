"""The transformers plug-in: a quantizer named "wina" that puts WinaLinear where the config says so.

Imported by `autoload` once transformers' table of quantizers exists; importing it registers the plug-in.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from ..defaults import torch_defaults
from ..errors import CheckpointError, WinaError, as_checkpoint_error, one_line
from ..format.checkpoint import open_checkpoint
from ..format.names import INSTALL, WEIGHT
from ..format.shards import sentinel
from .experts import opened_experts
from .grouping import group
from .install import configure, install
from .linear import gated_modules
from .parallel import divide
from .quantization import WinaConfig
from .saving import own

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SPLIT = (
    "a model that is split among processes cannot be gated while it is loaded: a column norm is taken over the whole column, and "
    "calibration runs whole layers; convert it with wina-convert and load that"
)
SPLIT_MIXTURE = (
    "a mixture of experts cannot be split among processes: each of its experts is a module of its own, for which transformers "
    'has no plan; load it in one process, over several devices with device_map="auto"'
)
# how a config is found, of what `from_pretrained` takes
WHERE = ("cache_dir", "code_revision", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


class WinaQuantizer(HfQuantizer):
    """Builds and finishes the gated model inside `from_pretrained`."""

    quantization_config: WinaConfig
    read_from: Path | None = None  # the folder of a plain model
    mixture = False  # whether the model has experts, of which the router chooses: no graph knows beforehand which run
    chosen_attention = False  # whether the caller named one, which is never replaced
    folder: Path | None = None  # that the weights came from

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized and self.quantization_config.gating is None:
            raise CheckpointError(
                "WinaConfig was given for a model that is not a WINA checkpoint; convert it first with wina-convert, or give "
                'calibration="bundled" or thresholds=CHECKPOINT to gate it now'
            )

    def update_attn_implementation(self, config: Any) -> Any:
        if not self.pre_quantized and getattr(config, "distributed_config", None) is not None:
            raise CheckpointError(SPLIT)
        self.chosen_attention = config._attn_implementation is not None
        return accept(config)

    update_tp_plan = update_attn_implementation  # the hook with the config in transformers before 5.21

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self.read_from = Path(checkpoint_files[0]).parent if checkpoint_files else None
            return
        install(model, self.quantization_config)
        self.mixture = bool(opened_experts(model))
        if checkpoint_files:  # None where the caller passed a state dict
            check_files(model, checkpoint_files)
            self.folder = Path(checkpoint_files[0]).parent

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        chosen = getattr(model.config, "distributed_config", None)
        if chosen is not None and self.mixture and (chosen.tp_size > 1 or chosen.ep_size > 1):
            raise CheckpointError(SPLIT_MIXTURE)
        if chosen is not None and chosen.tp_size > 1 and chosen.dp_size > 1:
            raise CheckpointError(
                "a gated model is divided either by tensor parallelism or by FSDP, not by both; leave one out"
            )
        divide(plan, gated_modules(model), chosen)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from . import decoding  # here, because transformers imports this module before it is complete

        if not self.pre_quantized:
            self._gate(model)
        if getattr(model, "_tp_size", None) and not hasattr(HfQuantizer, "update_parallel_plan"):
            raise CheckpointError("tensor parallelism of a gated model needs transformers 5.21 or later; upgrade it")
        configure(model, self.quantization_config)
        group(model)
        decoding.use(model, own_attention=not self.chosen_attention)
        for module in model.modules():
            if hasattr(module, "save_pretrained"):  # a part of the model that is saved alone needs the sentinel too
                module.hf_quantizer = self  # type: ignore[assignment]
        own(model)
        return model

    def _gate(self, model: Any) -> None:
        """Gate a plain model that was loaded; from now on it is as one of a checkpoint."""
        from .. import gate  # through the door of the package: what calibrates is above this room

        if getattr(model, "_tp_size", None) or getattr(model, "_device_mesh", None) is not None:
            raise CheckpointError(SPLIT)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise CheckpointError(
                "a model with offloaded weights cannot be gated while it is loaded; convert it with wina-convert and load that"
            )
        self.quantization_config = model.config.quantization_config = gate(
            model, self.read_from, self.quantization_config
        )
        self.pre_quantized = True
        model._weight_conversions = self.update_weight_conversions(getattr(model, "_weight_conversions", None) or [])

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from .restore import restore  # here, because transformers imports this module before it is complete

        restore(model, dtype)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        # Earlier transformers give no model, hence the field.
        # With opened experts the stored names are those of the parameters: nothing is joined, renamed, or parted when saved.
        # What a plain model joins is stored joined in a checkpoint.
        from .keys import joins  # here, because transformers imports this module

        if self.mixture:
            return []
        return [entry for entry in weight_conversions if not (self.pre_quantized and joins(entry))]

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        gates, first = list(gated_modules(model)), f".{self.quantization_config.modules[0]}"
        # of the base model alone the names are shorter; a text part of a larger model may have others
        name = next((name for name in gates if first.endswith(f".{name}") or f".{name}".endswith(first)), gates[0])
        return model.state_dict() | {f"{name}.{WEIGHT}": sentinel()}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters are: to a Trainer this means that it may train those

    @property
    def is_compileable(self) -> bool:
        return not self.mixture


def accept(config: Any) -> Any:
    """Take out the field with which a plain transformers refuses the folder and names the package to install."""
    if getattr(config, "transformers_weights", None) == INSTALL:
        del config.transformers_weights
    return config


def check_files(model: "PreTrainedModel", files: Sequence[str]) -> None:
    """Hold the headers of a checkpoint against its config and the model, before any memory is taken for weights.

    Raises:
        CheckpointError: the weights are pickled, the folder is damaged or leads out of itself, a tensor is missing or has
            another shape. New heads, such as a classifier's, need no tensor.
    """
    from .keys import check_parameters, checkpoint_keys  # here, because transformers imports this module

    if pickled := [file for file in files if not file.endswith(".safetensors")]:
        raise CheckpointError(f"{pickled[0]} may run code when read; a WINA checkpoint is in safetensors: get it again")
    folder = Path(files[0]).parent
    specs = open_checkpoint(folder).folder.tensors
    if {Path(file).name for file in files} != {spec.file for spec in specs.values()}:
        raise CheckpointError(f"{folder}: config.json names other weights than the folder's; do not use it")
    head = model.get_output_embeddings()
    base = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    heads = {name for name, module in model.named_modules() if module is head}
    new = [name for name in model.state_dict() if not name.startswith(base) and name.rpartition(".")[0] not in heads]
    with as_checkpoint_error(folder):
        check_parameters(model, checkpoint_keys(model, specs), specs, new)


def load(path: str, sparsity: float | None = None, prefill: str | None = None, **kwargs: Any) -> Any:
    """Load a WINA checkpoint as `AutoModelForCausalLM.from_pretrained` does, or `AutoModelForImageTextToText` where it must.

    Args:
        path: folder or Hub id.
        sparsity: fraction of inputs to skip, within [0, 0.95]; None: the checkpoint's default.
        prefill: "gated" (skip in every call) or "dense" (skip only where a call brings one token a sequence).
        kwargs: passed on to `from_pretrained`.

    Raises:
        OptionError: `sparsity` or `prefill` cannot be used.
        CheckpointError: the folder is not a WINA checkpoint that this version can read.
    """
    from transformers import AutoConfig  # here, because transformers imports this module

    from .classes import auto_class

    chosen = WinaConfig(sparsity=sparsity, prefill=prefill)
    if chosen.get_loading_attributes():
        kwargs["quantization_config"] = chosen
    folder = Path(path, kwargs.get("subfolder") or "")
    if folder.is_dir():
        open_checkpoint(folder)  # before transformers reads its config
    default = torch.get_default_device()  # where transformers loads to; "meta" would hold no weights
    try:
        with torch_defaults("cpu" if default.type == "meta" else default):
            asked = {"trust_remote_code": False} | kwargs
            where = {name: asked[name] for name in WHERE if name in asked}
            kind = auto_class(asked.get("config") or AutoConfig.from_pretrained(path, **where))
            model = kind.from_pretrained(path, **asked)
    except WinaError:
        raise
    except Exception as error:  # whatever transformers makes of a strange folder
        raise CheckpointError(f"{path} cannot be loaded: {one_line(error)}") from error
    if not gated_modules(model):
        raise CheckpointError(
            f"{path} is not a WINA checkpoint; make one with `wina-convert {shlex.quote(str(path))} --out DIR`"
        )
    return model


def register() -> None:
    """Add the plug-in to transformers' tables; doing it twice changes nothing."""
    if "wina" in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config("wina")(WinaConfig)
    auto.register_quantizer("wina")(WinaQuantizer)
    # Lets from_pretrained(DIR, quantization_config=WinaConfig(sparsity=...)) override the stored values.
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (WinaConfig,)  # type: ignore[assignment]


register()
