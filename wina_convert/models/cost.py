"""What a token costs when a model decodes, from headers alone: bytes of weights read and multiply-accumulates."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..format.experts import shares
from ..format.low_rank import LOW_RANK
from ..format.names import COLUMN_NORMS, THRESHOLDS, WEIGHT, WEIGHT_T
from ..format.shards import TensorSpec
from ..runtime.linear import gated_modules
from ..runtime.rule import bytes_read
from .stream import StreamedModel
from .structure import not_read

NOT_READ = (COLUMN_NORMS, THRESHOLDS)  # the cutoffs that were made of them at load are


@dataclass(frozen=True)
class Cost:
    """Of one token, everything dense included: head, norms and biases. Cached keys and values are not weights.

    Of experts, as many count as a token is given.

    Attributes:
        nbytes: bytes of weights, cutoffs and biases read.
        macs: multiply-accumulates of the weight matrices; those of attention itself grow with the context and are left out.
    """

    nbytes: int
    macs: int


def token_cost(
    gated: StreamedModel, specs: Mapping[str, TensorSpec], skipped: Mapping[str, float] | None = None
) -> Cost:
    """The cost of a token.

    Args:
        gated: a WINA checkpoint's model; no weight of it is read.
        specs: the headers of the checkpoint.
        skipped: fraction of its inputs that each gated projection skips, by module name, nothing where it is missing; None:
            the dense model, which has no cutoffs.
    """
    met = shares(gated.model.config.to_dict(), gated.keys)
    gates, unread = gated_modules(gated.model), not_read(gated.model, gated.keys, gated.beside)
    nbytes = macs = 0.0
    for name, key in gated.keys.items():
        owner, _, leaf = name.rpartition(".")
        spec = specs[key]
        if name in unread or (owner in gates and leaf in NOT_READ):
            continue
        if owner in gates and leaf in LOW_RANK:
            read = (
                met[name] if skipped and any(skipped.values()) else 0.0
            )  # at sparsity 0 there is nothing to stand in for
            nbytes, macs = nbytes + read * spec.nbytes, macs + read * spec.numel
        elif owner in gates and leaf == WEIGHT_T:
            part = skipped.get(owner, 0.0) if skipped else 0.0
            nbytes += met[name] * bytes_read(spec.nbytes, spec.shape[0] if skipped else 0, part)
            macs += met[name] * round(spec.numel * (1 - part))
        else:
            nbytes += met[name] * spec.nbytes
            matrix = isinstance(gated.model.get_submodule(owner), (nn.Linear, Conv1D, nn.Embedding))
            macs += met[name] * spec.numel if matrix and leaf == WEIGHT else 0
    return Cost(round(nbytes), round(macs))
