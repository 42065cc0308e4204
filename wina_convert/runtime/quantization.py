"""The config of a WINA checkpoint as transformers takes it: stored fields, and what a caller of `from_pretrained` may ask for."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import OptionError
from ..format import config

CONVERSION = ("samples", "seq_len", "seed", "batch_size", "scheme", "allocation", "targets", "ignore")


@dataclass(frozen=True)
class Gating:
    """How a plain model is to be gated while it is loaded; one of the first two.

    Attributes:
        calibration: text to fit thresholds on, as the option of a conversion.
        thresholds: a WINA checkpoint of the same model to take them from, folder or Hub id.
        conversion: further options of a conversion.
    """

    calibration: str | None
    thresholds: str | None
    conversion: Mapping[str, Any] = field(default_factory=dict)


class WinaConfig(config.WinaConfig, QuantizationConfigMixin):  # type: ignore[misc] # it knows its own methods only
    """Configuration of a WINA checkpoint; with `from_pretrained`, a way to choose the sparsity or the prefill.

    With `calibration` or `thresholds`, `from_pretrained` gates a plain model while it is loaded, and writes nothing: as
    converting with `basis="none"` and loading the result does.

    Args:
        sparsity: fraction of inputs to skip, within [0, 0.95]; None: the checkpoint's default, or 0.5 for a plain model.
        prefill: "gated" or "dense"; None: the default.
        calibration: text to fit the thresholds of a plain model on: "bundled", a file or a Hub dataset.
        thresholds: a WINA checkpoint of the same model, folder or Hub id, to take the thresholds from.
        conversion: options of `wina_convert.convert` for `calibration`: samples, seq_len, seed, batch_size, scheme, allocation,
            targets, ignore.
        stored: the other fields of a checkpoint's config.json.

    Raises:
        OptionError: a value cannot be used, or the arguments do not go together.
        CheckpointError: the stored fields are of a newer format or do not fit together.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        prefill: str | None = None,
        *,
        calibration: str | Path | dict[str, Any] | None = None,
        thresholds: str | Path | None = None,
        conversion: Mapping[str, Any] | None = None,
        **stored: Any,
    ) -> None:
        text = str(calibration) if isinstance(calibration, (str, Path)) else None
        if text is None and calibration is not None:
            stored["calibration"] = calibration
        super().__init__(sparsity, prefill, **stored)
        if text is not None and thresholds is not None:
            raise OptionError(
                "calibration and thresholds are given; thresholds are fitted or taken from a checkpoint: give one"
            )
        if conversion and text is None:
            raise OptionError("conversion is given without calibration; it says how thresholds are fitted on that text")
        if unknown := sorted(set(conversion or ()) - set(CONVERSION)):
            raise OptionError(f"conversion has {unknown[0]!r}, which loading cannot do; give {', '.join(CONVERSION)}")
        chosen = Gating(text, None if thresholds is None else str(thresholds), dict(conversion or {}))
        self.gating = chosen if chosen.calibration or chosen.thresholds else None  # no field: it is never stored

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a caller of `from_pretrained` may override; transformers merges it into the stored config.

        It asks for this just before it warns that there are two configs, which for this one is the ordinary use.

        Raises:
            OptionError: it is asked to gate a checkpoint that is gated.
        """
        if self.gating:
            raise OptionError(
                "calibration and thresholds gate a plain model, and this is a WINA checkpoint; leave them out"
            )
        warnings.filterwarnings("ignore", message=r"You passed `quantization_config`.*\['(sparsity|prefill)'")
        chosen = {"sparsity": self.sparsity, "prefill": self.prefill}
        return {name: value for name, value in chosen.items() if value is not None}
