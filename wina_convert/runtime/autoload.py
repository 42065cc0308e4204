"""Registers the loader when transformers is imported, however that comes about, and the layer for adapters when PEFT is.

`import wina_convert` calls `arm`, and so does `import torch` through the entry point `torch.backends`. Pipelines and scripts
that have never heard of this package therefore load WINA checkpoints. Nothing heavy is imported here.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.quantizers.auto"
PEFT = "peft.tuners.lora.model"
# What registers itself when it is imported, by the module that must be there first.
PLUGINS = {TABLE: "wina_convert.runtime.loader", PEFT: "wina_convert.runtime.lora"}


class _RegisterAfterImport(MetaPathFinder):
    def __init__(self, awaited: str) -> None:
        self.awaited = awaited

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if _complete(self.awaited):  # its import was under way when this finder was armed
            sys.meta_path.remove(self)
            register(self.awaited)
        if name != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(name)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def loaded(name: str) -> ModuleType | None:
    """A module that is being imported or was."""
    return sys.modules.get(name)


def _complete(name: str) -> bool:
    module = loaded(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def register(awaited: str = TABLE) -> None:
    """Import what registers itself there; a failure must not break an import of transformers or PEFT."""
    try:
        importlib.import_module(PLUGINS[awaited])
    except Exception as error:
        whose = awaited.partition(".")[0]
        warnings.warn(f"wina-convert could not register its loader with {whose}: {error!r}", stacklevel=2)


def arm() -> None:
    """Register now where what must be there first is loaded, else as soon as it is."""
    armed = {finder.awaited for finder in sys.meta_path if isinstance(finder, _RegisterAfterImport)}
    for awaited in PLUGINS:
        if _complete(awaited):
            register(awaited)
        elif awaited not in armed:
            sys.meta_path.insert(0, _RegisterAfterImport(awaited))
