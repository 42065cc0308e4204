"""The config of a WINA checkpoint as transformers takes it: stored fields, and what `from_pretrained` may override."""

import warnings
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..format import config


class WinaConfig(config.WinaConfig, QuantizationConfigMixin):  # type: ignore[misc] # it knows its own methods only
    """Configuration of a WINA checkpoint; with `from_pretrained`, a way to choose the sparsity or the prefill."""

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a caller of `from_pretrained` may override; transformers merges it into the stored config.

        It asks for this just before it warns that there are two configs, which for this one is the ordinary use.
        """
        warnings.filterwarnings("ignore", message=r"You passed `quantization_config`.*\['(sparsity|prefill)'")
        chosen = {"sparsity": self.sparsity, "prefill": self.prefill}
        return {name: value for name, value in chosen.items() if value is not None}
