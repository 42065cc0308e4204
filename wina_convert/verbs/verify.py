"""`wina verify`: whether a folder is what a conversion wrote, by its manifest, and whether its parts fit together."""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from ..defaults import torch_defaults
from ..errors import CheckpointError, VerificationError, as_checkpoint_error
from ..fitting.budget import Budget, budget_of
from ..fitting.low_rank import is_best
from ..fitting.schemes import Scheme, scheme_of
from ..format.checkpoint import Checkpoint, open_checkpoint
from ..format.curve import starts_at_zero
from ..format.experts import shares
from ..format.low_rank import LOW_RANK
from ..format.manifest import entry, files_of, read_manifest, write_manifest
from ..format.names import BIASES, COLUMN_NORMS, MANIFEST, REPORT, WEIGHT_T, holds_weights
from ..format.trust import check_folder
from ..progress import Progress, silent

ROUNDING = 1e-4  # of norms and thresholds, computed again on another machine
SPENT = 1e-9  # of the sparsity that shares come to, which are stored in full


@dataclass(frozen=True)
class Verified:
    """A checkpoint that is what a conversion wrote.

    Attributes:
        files: how many files the manifest names.
        accepted: those of them that were changed, added or taken away since, and are signed now.
    """

    files: int
    accepted: tuple[str, ...] = ()


@torch_defaults()
def verify_folder(folder: str | Path, progress: Progress = silent, accept: bool = False) -> Verified:
    """Check every file of a checkpoint against the manifest, and its tensors and config against each other.

    Args:
        folder: a WINA checkpoint.
        progress: how to report it.
        accept: take files beside the weights as they are, and write the manifest for them if all else is well.

    Raises:
        CheckpointError: it is not a WINA checkpoint, or has no manifest that can be read.
        VerificationError: a file is missing, extra or changed; norms are not those of the weights; thresholds are not finite
            and ascending, or biases not finite from 0; what is asked of the projections is not the sparsity of the whole;
            config and tensors do not fit together.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():  # first: a folder of something else may hold any number of files
        raise _unsigned(folder)
    with as_checkpoint_error():
        check_folder(folder, hidden=True)
    files = read_manifest(folder)
    present = set(files_of(folder))
    accepted = []
    missing, extra = set(files) - present, present - set(files)
    if any(map(holds_weights, missing)) and any(map(holds_weights, extra)):
        raise VerificationError(
            f"{folder} was saved again, as save_pretrained does: its weights are in other files than the conversion wrote; "
            "verify or push the folder that wina-convert wrote, or get it again"
        )
    for problem, names in (("missing", missing), ("not in the manifest", extra)):
        for name in sorted(names):
            if not accept or holds_weights(name):
                raise VerificationError(
                    f"{folder}: {name!r} is {problem} ({len(names)} such files); {_remedy(folder, name)}"
                )
            accepted.append(name)
    with progress("Verifying files", sum(int(one["size"]) for one in files.values()), "B") as advance:
        for name, recorded in files.items():
            if name in present and entry(folder / name) != recorded:
                if not accept or holds_weights(name):
                    raise VerificationError(
                        f"{folder / name} was changed since the conversion; {_remedy(folder, name)}"
                    )
                accepted.append(name)
            advance(int(recorded["size"]))
    from ..models.stream import checkpoint_stream  # here: a file that was changed is told without transformers

    checkpoint = open_checkpoint(folder)
    with as_checkpoint_error(folder):
        checkpoint_stream(checkpoint, torch.device("cpu"))  # every parameter of the model has a tensor of its shape
    scheme, budget = scheme_of(checkpoint.config.scheme), budget_of(checkpoint.config)
    keys = checkpoint.gated_keys()
    with progress("Verifying tensors", len(keys), "projection") as advance:
        for name, key in keys.items():
            _check_norms(checkpoint, name, key, scheme)
            _check_biases(checkpoint, key)
            _check_low_rank(checkpoint, key, scheme)
            advance(1)
    _check_budget(checkpoint, budget)
    found = checkpoint.thresholds()
    reported = _recorded(folder, checkpoint) or found
    for name, threshold in found.items():
        if budget.asked(name, checkpoint.config.sparsity or 0.0) == 0 and threshold > 0:
            raise VerificationError(
                f"{name}: nothing is to be skipped, and its threshold is {threshold}; convert again"
            )
        if math.isclose(reported.get(name, math.nan), threshold, rel_tol=ROUNDING):
            continue
        raise VerificationError(f"{name}: the threshold at the default sparsity is not that of {REPORT}; convert again")
    if accepted:
        write_manifest(folder)
    return Verified(len(read_manifest(folder)), tuple(sorted(accepted)))


def _unsigned(folder: Path) -> CheckpointError:
    """What a folder without a manifest is, and what to do; raises what is wrong with it where it is no checkpoint."""
    config = open_checkpoint(folder).config
    if (folder / REPORT).exists():
        return CheckpointError(f"{folder} has no {MANIFEST} any more; get it again, or convert again")
    name = config.source.get("name")
    return CheckpointError(
        f"{folder} is a copy that was saved again, as save_pretrained does: a WINA checkpoint"
        f"{f' of {name}' if isinstance(name, str) else ''} that loads, without the {MANIFEST} to hold it against; verify or push "
        "the folder that wina-convert wrote, or convert again"
    )


def _remedy(folder: Path, name: str) -> str:
    """What to do about a file that is not as the manifest says."""
    if holds_weights(name):
        return "get it again: it holds weights, so it is damaged"
    return f"get it again, or run `wina verify {shlex.quote(str(folder))} --accept` if it is meant to be so"


def _check_budget(checkpoint: Checkpoint, budget: Budget) -> None:
    specs = checkpoint.folder.tensors
    keys = checkpoint.gated_keys()
    met = shares(checkpoint.folder.config, keys)
    weights = {name: round(met[name] * specs[f"{key}.{WEIGHT_T}"].numel) for name, key in keys.items()}
    for level in budget.grid if budget.shares else ():
        if abs(budget.overall(weights, level) - level) > SPENT:
            raise VerificationError(
                f"{checkpoint.folder.path}: shares in config.json come to {budget.overall(weights, level):.4%} of the weights "
                f"where {level:.4%} is asked; convert again"
            )


def _check_norms(checkpoint: Checkpoint, name: str, key: str, scheme: Scheme) -> None:
    stored = dict(checkpoint.read([f"{key}.{WEIGHT_T}", f"{key}.{COLUMN_NORMS}"]))
    norms = stored[f"{key}.{COLUMN_NORMS}"]
    expected = scheme.column_weights(name, stored[f"{key}.{WEIGHT_T}"])
    if not scheme.recomputed:  # known is only which columns weigh nothing
        norms, expected = norms.where(norms <= 0, 1.0), (expected > 0).float()
    if not (stored[f"{key}.{COLUMN_NORMS}"].isfinite().all() and torch.allclose(norms, expected, ROUNDING, atol=0)):
        raise VerificationError(
            f"{key}.{COLUMN_NORMS} are not those of its weights for scheme {scheme.name!r}; convert again"
        )


def _check_biases(checkpoint: Checkpoint, key: str) -> None:
    if checkpoint.config.biases:
        ((name, biases),) = checkpoint.read([f"{key}.{BIASES}"])
        if not starts_at_zero(biases):
            raise VerificationError(f"{name} are not finite and 0 at sparsity 0; convert again")


def _check_low_rank(checkpoint: Checkpoint, key: str, scheme: Scheme) -> None:
    if bool(checkpoint.config.low_rank) != bool(scheme.low_rank):
        raise VerificationError(
            f"{checkpoint.folder.path}: low_rank in config.json is {checkpoint.config.low_rank}, which does not go with scheme "
            f"{scheme.name!r}; convert again"
        )
    if scheme.low_rank:
        leaves = (WEIGHT_T, *LOW_RANK)
        weight_t, left, right = (tensor for _, tensor in checkpoint.read(f"{key}.{leaf}" for leaf in leaves))
        if not is_best(weight_t, left, right):
            raise VerificationError(f"{key}: the low-rank term is not that of its weights; convert again")


def _recorded(folder: Path, checkpoint: Checkpoint) -> dict[str, float] | None:
    """The thresholds of the report, unless it is of another default sparsity."""
    try:
        report = json.loads((folder / REPORT).read_bytes())["verification"]
        same = report["held_out"]["sparsity"] == checkpoint.config.sparsity
        return {name: float(value) for name, value in report["thresholds"].items()} if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise VerificationError(f"{folder / REPORT} is not the report of a conversion; get it again") from error
