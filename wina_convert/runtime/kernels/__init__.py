"""The gated product behind one torch custom op, `wina::gated_linear`."""

from .op import gated_linear

__all__ = ["gated_linear"]
