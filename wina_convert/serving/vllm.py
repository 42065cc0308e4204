"""The vLLM plug-in: a quantization method named "wina", whose linear layers skip inputs as WinaLinear does.

vLLM loads it by the entry point group `vllm.general_plugins` and asks it for what each linear layer computes. vLLM fuses query,
key and value into one layer, and gate and up; here each *part* of such a layer keeps its own norms, threshold and choice of
inputs, and the parts are computed by the kernels of this package. Written for vLLM 0.32.

vLLM batches prompts and answers in one call, so every token is gated, whichever call brings it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ..errors import CheckpointError
from ..format.checkpoint import open_checkpoint
from ..format.config import WinaConfig
from ..format.curve import ascends, starts_at_zero, threshold_at
from ..format.names import BIASES, COLUMN_NORMS, THRESHOLDS, WEIGHT, WEIGHT_T
from ..runtime.kernels import gated_linears
from ..runtime.rule import cutoffs

TRIED = ("gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of a fused layer; other layers count them


@dataclass(frozen=True)
class Part:
    """A projection of the checkpoint within a layer of vLLM.

    Attributes:
        name: in the checkpoint.
        gated: whether it skips inputs.
        outputs: where its outputs are among those of the layer.
    """

    name: str
    gated: bool
    outputs: slice


class WinaVllmConfig(QuantizationConfig):  # type: ignore[misc] # vLLM is not installed where types are checked
    """What vLLM asks about a WINA checkpoint.

    Args:
        config: the stored block.

    Raises:
        CheckpointError: vLLM cannot serve what it asks for.
    """

    def __init__(self, config: WinaConfig) -> None:
        super().__init__()
        if config.prefill == "dense":
            raise CheckpointError(
                'vLLM computes prompts and answers in one call and cannot serve prefill "dense"; set quantization_config.prefill '
                'of config.json to "gated"'
            )
        self.config = config
        self.gated = frozenset(config.modules)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WinaVllmConfig":
        """From `quantization_config` of config.json.

        Raises:
            CheckpointError: its format version is unknown, or a field is.
        """
        return cls(WinaConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Hold the model against what can be served, before anything is built.

        Raises:
            CheckpointError: this type of model was not tried, or the folder is damaged.
        """
        kind = getattr(hf_config, "model_type", None)
        if kind not in TRIED:
            raise CheckpointError(
                f"vLLM serves WINA checkpoints of the types {', '.join(TRIED)}, and {model_name} is of type {kind}; use "
                "`transformers serve`, or serve what `wina export` makes of it"
            )
        if Path(model_name).is_dir():
            open_checkpoint(Path(model_name))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """What a layer of the model computes; None for what is no linear layer.

        Raises:
            CheckpointError: the server is to split the model or to serve adapters.
        """
        if not isinstance(layer, LinearBase):
            return None
        _check_server()
        home, _, leaf = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(leaf)
        names = [f"{home}.{name}" for name in fused] if fused and prefix not in self.gated else [prefix]
        if not self.gated & set(names):
            return UnquantizedLinearMethod()
        return WinaLinearMethod(self.config, names)

    def get_name(self) -> str:
        """As config.json has it."""
        return "wina"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes that the kernels compute in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability times ten, that the kernel of GPUs needs."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the block is in config.json."""
        return []


def _check_server() -> None:
    server = get_current_vllm_config()
    if server.parallel_config.world_size > 1:
        raise CheckpointError(
            "vLLM serves a WINA checkpoint in one process: tensor and pipeline parallelism are not supported; leave them out"
        )
    if server.lora_config is not None:
        raise CheckpointError("vLLM cannot put adapters on a WINA checkpoint; leave --enable-lora out")


class WinaLinearMethod(LinearMethodBase):  # type: ignore[misc] # as above
    """A linear layer of which at least one part skips inputs.

    The layer gets these parameters, under the names that the checkpoint's tensors have in it:

        weight_t: [in * out], the model's dtype: for each part after the other, W transposed [in, out of the part].
        weight: [0]. Where a part is dense, its W [out, in] is loaded under this name, into `weight_t`; the sentinel into nothing.
        column_norms: [parts, in], float32.
        thresholds: [parts, K], float32.
        biases: [K, out], float32; only where the checkpoint has such.

    Args:
        config: of the checkpoint.
        names: of the parts, in the checkpoint.
    """

    def __init__(self, config: WinaConfig, names: Sequence[str]) -> None:
        self.config, self.names = config, tuple(names)
        self.sparsity = config.sparsity or 0.0
        self.parts: tuple[Part, ...] = ()
        self.missing: set[tuple[str, str]] = set()  # what is not loaded yet, by part and leaf

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer its parameters, empty.

        Args:
            layer: the layer.
            input_size_per_partition: in.
            output_partition_sizes: out of each part.
            input_size: in.
            output_size: out.
            params_dtype: the model's dtype.
            extra_weight_attrs: the layer's own way to load a weight, which cannot place one that is transposed.
        """
        sizes = output_partition_sizes if len(self.names) > 1 else [sum(output_partition_sizes)]
        gated = set(self.config.modules)
        self.parts = tuple(
            Part(name, name in gated, slice(end - size, end))
            for name, size, end in zip(self.names, sizes, accumulate(sizes), strict=True)
        )
        points = len(self.config.grid)
        leaves = (WEIGHT_T, COLUMN_NORMS, THRESHOLDS, *([BIASES] if self.config.biases else []))
        self.missing = {(part.name, leaf) for part in self.parts for leaf in (leaves if part.gated else (WEIGHT,))}

        def add(
            name: str, place: Callable[[Tensor, Part, int, Tensor], None], tensor: Tensor, **attributes: Any
        ) -> None:
            def load(parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
                index = SHARDS.get(shard, shard)
                place(parameter.data, self.parts[index], index, loaded)
                self.missing.discard((self.parts[index].name, name))

            parameter = nn.Parameter(tensor, requires_grad=False)
            for attribute, value in {"weight_loader": load, **attributes}.items():
                setattr(parameter, attribute, value)
            layer.register_parameter(name, parameter)

        def place_dense(_: Tensor, part: Part, index: int, loaded: Tensor) -> None:
            if loaded.numel():  # the sentinel is empty
                self._weight_t(layer, part).copy_(loaded.t())

        def exact(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32)

        # Some models of vLLM reorder what they load along `output_dim`, as it is stored.
        add(
            WEIGHT_T,
            lambda _, part, index, loaded: _copy(self._weight_t(layer, part), loaded),
            torch.empty(input_size_per_partition * sum(sizes), dtype=params_dtype),
            output_dim=1,
        )
        add(WEIGHT, place_dense, torch.empty(0, dtype=params_dtype), output_dim=0)
        norms, curves = exact(len(sizes), input_size_per_partition), exact(len(sizes), points)
        add(COLUMN_NORMS, lambda to, part, index, loaded: _copy(to[index], loaded), norms)
        add(THRESHOLDS, lambda to, part, index, loaded: _copy(to[index], loaded), curves)
        if self.config.biases:
            shifts = exact(points, sum(sizes))
            add(BIASES, lambda to, part, index, loaded: _copy(to[:, part.outputs], loaded), shifts, output_dim=1)
        layer.register_buffer("taus", None, persistent=False)
        layer.register_buffer("shifted", None, persistent=False)

    def _weight_t(self, layer: Any, part: Part) -> Tensor:
        """W of a part, transposed: a view [in, out of the part] of the layer's parameter."""
        flat: Tensor = layer.weight_t.data
        inputs = layer.column_norms.shape[1]
        return flat[part.outputs.start * inputs : part.outputs.stop * inputs].view(inputs, -1)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make cutoffs and biases of the checkpoint's default sparsity.

        Raises:
            CheckpointError: a tensor of the layer was not in the checkpoint or holds what it may not.
        """
        if self.missing:
            name, leaf = min(self.missing)
            raise CheckpointError(f"the checkpoint has no tensor {name}.{leaf}; get it again")
        curves, norms, grid = layer.thresholds, layer.column_norms, self.config.grid
        for part, curve, weights in zip(self.parts, curves, norms, strict=True):
            if not (ascends(curve) and weights.isfinite().all() and (weights >= 0).all()):
                raise CheckpointError(f"the norms or thresholds of {part.name} are damaged; get the checkpoint again")
        layer.taus = torch.stack(
            [
                cutoffs(threshold_at(curve, grid, self.sparsity), weights)
                if part.gated
                else torch.full_like(weights, -1.0)  # no magnitude is below it: every input is kept
                for part, curve, weights in zip(self.parts, curves, norms, strict=True)
            ]
        ).detach()
        if self.config.biases:
            if not starts_at_zero(layer.biases):
                raise CheckpointError(f"the biases of {self.parts[0].name} are damaged; get the checkpoint again")
            if self.sparsity:
                shift = threshold_at(layer.biases, grid, self.sparsity)
                bias = (
                    None if layer.skip_bias_add else layer.bias
                )  # else the layer hands its bias on, to be added later
                layer.shifted = (shift if bias is None else bias + shift).to(layer.weight_t.dtype).detach()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out], in the model's dtype.

        Args:
            layer: the layer.
            x: [..., in].
            bias: [out], the layer's own, or None.
        """
        added = bias if layer.shifted is None else layer.shifted
        ys = gated_linears(
            x,
            [self._weight_t(layer, part) for part in self.parts],
            list(layer.taus),
            [None if added is None else added[part.outputs] for part in self.parts],
        )
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)


def _copy(to: Tensor, loaded: Tensor) -> None:
    """Copy a stored tensor where it belongs; never a smaller one by repeating it.

    Raises:
        CheckpointError: it has another shape.
    """
    if to.shape != loaded.shape:
        raise CheckpointError(
            f"a stored tensor has shape {tuple(loaded.shape)} where the model has {tuple(to.shape)}; get the checkpoint again"
        )
    to.copy_(loaded)


def register() -> None:
    """Make the method known to vLLM; doing it twice changes nothing."""
    register_quantization_config("wina")(WinaVllmConfig)
