"""LoRA adapters of PEFT on gated projections: they are trained beside frozen, gated weights.

Imported by `autoload` once PEFT's own table of layers exists; importing it registers. PEFT has no place to register a layer in,
so its last resort is given one more case, and its word for all linear modules takes the gated ones in.
"""

from typing import Any, NoReturn

from peft.tuners import tuners_utils
from peft.tuners.lora import layer

from ..errors import OptionError
from .autoload import PEFT, loaded
from .linear import WinaLinear, gated_modules

REASON = (
    "an adapter cannot be merged into gated weights, whose column norms and thresholds were made for the weights as they are; "
    "save the adapter and convert it with its dense model: run `wina export DIR --out DENSE`, set base_model_name_or_path of its "
    "adapter_config.json to DENSE, and run wina-convert ADAPTER"
)
ALL = tuners_utils.INCLUDE_LINEAR_LAYERS_SHORTHAND


class GatedLora(layer.Linear):  # type: ignore[misc] # PEFT is no dependency
    """A gated projection with a LoRA adapter: y = W (x * keep) + b + scale B A x. The adapter sees every input."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA alone: the others compute with the whole weight."""
        return {(): None}

    def _get_in_out_features(self, module: WinaLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse.

        Raises:
            OptionError: always.
        """
        raise OptionError(REASON)


def _register() -> None:
    """Have PEFT put GatedLora on gated projections; doing it twice changes nothing."""
    model: Any = loaded(PEFT)
    dispatch, include = model.dispatch_default, tuners_utils._maybe_include_all_linear_layers
    if getattr(dispatch, "knows_gated", False):
        return

    def dispatch_gated(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if not isinstance(base, WinaLinear) or kwargs.get("parameter_name") is not None:
            return dispatch(target, adapter_name, config=config, **kwargs)
        made = GatedLora(target, adapter_name, config=config, **kwargs)
        made.fan_in_fan_out = False
        config.fan_in_fan_out = base.plain.__name__ == "Conv1D"  # how the adapter fits the dense model
        return made

    def include_gated(config: Any, model: Any) -> Any:
        wanted = getattr(config, "target_modules", None)
        found = include(config, model)
        if isinstance(wanted, str) and wanted.lower() == ALL:
            found.target_modules |= set(gated_modules(model))
        return found

    dispatch_gated.knows_gated = True  # type: ignore[attr-defined]
    model.dispatch_default = dispatch_gated
    tuners_utils._maybe_include_all_linear_layers = include_gated


_register()
