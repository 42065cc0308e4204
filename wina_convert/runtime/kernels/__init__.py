"""The gated and the dense product, and a token's attention, behind torch ops: `wina::gated_linear`, `wina::dense_linear` ..."""

from .op import attend, dense_linear, gated_linear, gated_linears, refuse_graph

__all__ = ["attend", "dense_linear", "gated_linear", "gated_linears", "refuse_graph"]
