"""Turn a Hugging Face causal LM into a WINA checkpoint, and run it.

    import wina_convert

    wina_convert.convert("meta-llama/Llama-3-8B", out="llama-wina", sparsity=0.5)
    model = wina_convert.load("llama-wina")

Importing the package registers the loader, so `AutoModelForCausalLM.from_pretrained("llama-wina")` works as well.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import WinaError
from .runtime.autoload import arm

if TYPE_CHECKING:
    from .conversion.gate import gate as gate
    from .conversion.pipeline import convert
    from .runtime.install import set_sparsity
    from .runtime.loader import load
    from .runtime.quantization import WinaConfig
    from .verbs.push import push

__version__ = "0.11.0"
__all__ = ["WinaConfig", "WinaError", "convert", "load", "push", "set_sparsity"]

_LAZY = {
    "WinaConfig": "runtime.quantization",
    "convert": "conversion.pipeline",
    "gate": "conversion.gate",
    "load": "runtime.loader",
    "push": "verbs.push",
    "set_sparsity": "runtime.install",
}

arm()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
