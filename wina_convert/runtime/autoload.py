"""Registers the loader when transformers is imported, however that comes about.

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


class _RegisterAfterImport(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if _table_loaded():  # its import was under way when this finder was armed
            sys.meta_path.remove(self)
            register()
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _table_loaded() -> bool:
    table = sys.modules.get(TABLE)
    return table is not None and not getattr(table.__spec__, "_initializing", False)


def register() -> None:
    """Import the loader, which registers itself; a failure must not break an import of transformers."""
    try:
        importlib.import_module("wina_convert.runtime.loader")
    except Exception as error:
        warnings.warn(f"wina-convert could not register its loader with transformers: {error!r}", stacklevel=2)


def arm() -> None:
    """Register now if transformers' table of quantizers is loaded, else as soon as it is."""
    if _table_loaded():
        register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
