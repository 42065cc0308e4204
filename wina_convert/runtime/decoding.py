"""What a gated model does in place of transformers, because it shows once weights are skipped: attention, growing cache, norms.

The loader imports this when transformers is complete.
"""

from typing import Any

from . import attention, cache, norms


def use(model: Any, used: bool = True, own_attention: bool = True) -> None:
    """Let a model do so, or no longer; its attention only where that is not chosen by name."""
    attention.use(model, used and own_attention)
    cache.use(model, used)
    norms.use(model, used)
