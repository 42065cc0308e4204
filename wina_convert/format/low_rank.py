"""The low-rank term of a gated projection: what stands in for the inputs that are skipped. Its leaves, its rank, its bytes."""

from collections.abc import Mapping

from .shards import TensorSpec

LOW_RANK_IN = "low_rank_in"  # [in, r]
LOW_RANK_OUT = "low_rank_out"  # [r, out]
LOW_RANK = (LOW_RANK_IN, LOW_RANK_OUT)


def rank_of(part: float, in_features: int, out_features: int) -> int:
    """The rank r at which the two factors have about this part of the matrix's weights, at least 1 and no more than it has.

    Args:
        part: `low_rank` of the config, above 0.
        in_features: inputs of the matrix.
        out_features: its outputs.
    """
    whole = in_features * out_features / (in_features + out_features)
    return max(1, min(int(part * whole + 0.5), in_features, out_features))


def low_rank_bytes(specs: Mapping[str, TensorSpec], key: str) -> int:
    """Bytes of the two factors of a projection, which a token reads at any sparsity above 0; 0 where it has none."""
    return sum(specs[f"{key}.{leaf}"].nbytes for leaf in LOW_RANK if f"{key}.{leaf}" in specs)
