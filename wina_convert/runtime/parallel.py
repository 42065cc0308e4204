"""A model divided among processes: what each holds of a gated projection, and what it may compute with.

Tensor parallelism of transformers divides a projection by its outputs or by its inputs. By outputs, a process holds its columns
of `weight_t` and every norm: all processes keep the same inputs. By inputs, it holds its rows of `weight_t` and their norms; the
threshold is one for all, so that together the processes keep what one would, and their products are added up.

FSDP gathers the tensors of a projection for the time of a call, and holds parts of no meaning in between.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..format.low_rank import LOW_RANK_IN, LOW_RANK_OUT
from ..format.names import BIASES, COLUMN_NORMS, THRESHOLDS, WEIGHT_T

# The styles of transformers are named for a weight [out, in]: of a matrix "colwise" divides the first dimension and "rowwise" the
# last, of a vector "colwise" the only one; a `bias` under "rowwise" is whole and added once, to the sum.
WHOLE = dict.fromkeys((COLUMN_NORMS, THRESHOLDS, BIASES, LOW_RANK_IN, LOW_RANK_OUT), "replicate")
BY_OUTPUTS = WHOLE | {WEIGHT_T: "rowwise", "bias": "colwise", BIASES: "rowwise", LOW_RANK_OUT: "rowwise"}
BY_INPUTS = WHOLE | {WEIGHT_T: "colwise", "bias": "rowwise", COLUMN_NORMS: "colwise", LOW_RANK_IN: "colwise"}


def divide(plan: dict[str, str], gates: Mapping[str, nn.Module], chosen: Any) -> None:
    """Add to a plan of transformers how the tensors of gated projections are divided, by the style of each projection.

    Args:
        plan: styles by name of a module or parameter, `*` for the index of a layer; added to in place.
        gates: the gated projections by name.
        chosen: the `DistributedConfig` that the caller of `from_pretrained` gave, whose plan goes before; or None.

    Raises:
        CheckpointError: a projection has a style that is neither by its outputs nor by its inputs.
    """
    # here: transformers has them from 5.21 on
    from transformers.distributed import tensor_parallel as styles
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

    own = getattr(chosen, "tp_plan", None)
    asked = plan | own if isinstance(own, dict) else plan
    for full, gate in gates.items():
        name = replace_layer_number_by_wildcard(full)
        if name not in asked:
            continue
        style = ALL_PARALLEL_STYLES[asked[name]]
        if isinstance(style, styles.ColwiseParallel):
            leaves = BY_OUTPUTS
        elif isinstance(style, styles.RowwiseParallel):
            leaves = BY_INPUTS
        elif type(style).shard_param is styles.TensorParallelLayer.shard_param:  # it divides no tensor
            continue
        else:
            raise CheckpointError(
                f"tp_plan divides {name!r} by the style {asked[name]!r}, which gated projections do not have; leave it out of "
                'the plan, or give "colwise" or "rowwise"'
            )
        plan |= {f"{name}.{leaf}": leaves[leaf] for leaf, _ in gate.named_parameters()}


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that tensor parallelism divided; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def at_hand(tensor: Tensor) -> bool:
    """Whether a tensor can be computed with between calls: it is not offloaded, and not gathered by FSDP for each call."""
    mesh = getattr(tensor, "device_mesh", None)
    return not tensor.is_meta and (mesh is None or mesh.mesh_dim_names == ("tp",))


def divided(tensor: Tensor) -> bool:
    """Whether no process has the whole tensor."""
    return hasattr(tensor, "to_local")


def by_inputs(weight_t: Any) -> bool:
    """Whether the processes add up their products of a gated projection, whose `weight_t` is given."""
    return divided(weight_t) and weight_t.placements[0].is_shard(0)


def first(weight_t: Any) -> bool:
    """Whether this is the process that adds what is to be added once, of those that divide a projection."""
    rank: int = weight_t.device_mesh.get_local_rank()
    return rank == 0
