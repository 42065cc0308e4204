"""The gated and the dense product behind two torch ops, `wina::gated_linear` and `wina::dense_linear`."""

from .op import dense_linear, gated_linear, gated_linears, refuse_graph

__all__ = ["dense_linear", "gated_linear", "gated_linears", "refuse_graph"]
