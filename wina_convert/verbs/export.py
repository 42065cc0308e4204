"""`wina export`: the dense model of a checkpoint as a plain Hugging Face folder, one tensor after another."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import __version__
from ..defaults import torch_defaults
from ..errors import CheckpointError, VerificationError, as_checkpoint_error
from ..format.checkpoint import Checkpoint, open_checkpoint
from ..format.dtypes import compute_dtype
from ..format.experts import split_expert
from ..format.folder import copy_sidecars
from ..format.low_rank import LOW_RANK
from ..format.manifest import entry, read_manifest
from ..format.names import (
    BIASES,
    CARD,
    COLUMN_NORMS,
    CONFIG,
    INSTALL,
    MANIFEST,
    REPORT,
    SCORES_PNG,
    SPARSITY_PNG,
    THRESHOLDS,
    WEIGHT,
    WEIGHT_T,
)
from ..format.shard_writer import ShardWriter, shard_bytes
from ..format.shards import TensorSpec
from ..format.staging import Kind, check_space, check_target, staged
from ..models.stream import build_skeleton
from ..progress import Progress, silent

MARGIN = 50_000_000  # bytes for what is not weights: tokenizers have some megabytes

# Of the card of a checkpoint, what is true of its dense model as well.
KEPT = ("license", "license_name", "license_link", "language", "datasets", "base_model", "library_name", "pipeline_tag")
OURS = ("wina", "activation-sparsity")
MARK = "restored by `wina export` of wina-convert"
BODY = """
# {title}

The dense model of a [WINA](https://arxiv.org/abs/2505.19427) checkpoint, {mark} {version}.
{said}
"""


def _exported(folder: Path) -> bool:
    """Whether a folder has the card of an export."""
    try:
        return MARK in (folder / CARD).read_text("utf-8", errors="replace")
    except OSError:
        return False


EXPORT = Kind("a model that `wina export` wrote", _exported)


@dataclass(frozen=True)
class Exported:
    """A dense model that was restored.

    Attributes:
        source: what the checkpoint was converted from.
        tensors: how many were written.
        nbytes: of all of them.
        differs: why they are not those of the source bit for bit, as far as the checkpoint tells; empty where they are. The
            model is equal in any case, up to rounding.
    """

    source: str
    tensors: int
    nbytes: int
    differs: tuple[str, ...]

    @property
    def said(self) -> str:
        """That in a sentence."""
        if not self.differs:
            return f"Its {self.tensors} tensors are those of {self.source}, bit for bit."
        return f"It equals {self.source} up to rounding, not bit for bit: {'; '.join(self.differs)}."


@torch_defaults()
def export(
    folder: str | Path,
    out: str | Path,
    max_shard_size: str = "5GB",
    progress: Progress = silent,
    overwrite: bool = False,
) -> Exported:
    """Write the dense model of a WINA checkpoint: what it computes at sparsity 0, without this package.

    Tensors have the names, shapes and dtypes that they had in the source. One is in memory at a time, and the folder appears
    only when it is complete.

    Args:
        folder: a WINA checkpoint.
        out: folder to write; it must not exist, or be empty, without `overwrite`.
        max_shard_size: largest weight file, such as "5GB".
        progress: how to report it.
        overwrite: replace an earlier export.

    Raises:
        OptionError: `max_shard_size` is no size.
        CheckpointError: the folder is not a WINA checkpoint, or one of a mixture of experts; or `out` exists, is no export
            (with `overwrite`) or cannot be written.
        VerificationError: a weight file is not the one of the manifest.
    """
    folder, out = Path(folder), Path(out)
    shard_bytes(max_shard_size)
    check_target(out, str(folder), overwrite, EXPORT)
    checkpoint = open_checkpoint(folder)
    if any(split_expert(name) for name in checkpoint.config.modules):
        raise CheckpointError(
            f"{folder} holds a mixture of experts, each by itself, which transformers reads in another form; load it and save "
            "the dense model: model.dequantize().save_pretrained(...)"
        )
    with as_checkpoint_error(folder):
        plan = _plan(checkpoint)
    nbytes = sum(spec.nbytes for spec, _, _ in plan)
    check_space(out, nbytes + MARGIN)
    signed = _check_weights(checkpoint, progress)
    named = checkpoint.config.source
    source = str(named.get("name") or "the source")
    if isinstance(named.get("base"), dict):
        source += f", merged onto {named['base'].get('name')}"
    done = Exported(source, len(plan), nbytes, _differences(checkpoint, signed))
    with staged(out, {}, resume=False, keep=False, overwrite=overwrite, kind=EXPORT) as staging:
        with (
            as_checkpoint_error(folder),
            ShardWriter(staging.folder, [spec for spec, _, _ in plan], max_shard_size) as shards,
            progress("Writing the dense model", nbytes, "B") as advance,
        ):
            for spec, key, transposed in plan:
                ((_, tensor),) = checkpoint.read([key])
                shards.write({spec.name: tensor.t() if transposed else tensor})
                advance(spec.nbytes)
        (staging.folder / CONFIG).write_bytes(config_text(checkpoint).encode())
        copy_sidecars(checkpoint.folder, staging.folder, leave=(SPARSITY_PNG, SCORES_PNG))
        _write_card(folder, staging.folder, out.name, done)
    return done


def _plan(checkpoint: Checkpoint) -> list[tuple[TensorSpec, str, bool]]:
    """Every tensor to write, the key of the one that it is made of, and whether that is transposed.

    Raises:
        CheckpointError: the model of config.json has no linear map for a gated projection, or one of another shape.
    """
    folder = checkpoint.folder
    modules = dict(build_skeleton(folder, compute_dtype(folder)).named_modules())
    weights, dropped = {}, set()
    for name, key in checkpoint.gated_keys().items():
        module, shape = modules.get(name), folder.tensors[f"{key}.{WEIGHT_T}"].shape
        transposed = not isinstance(module, Conv1D)
        stored = shape[::-1] if transposed else shape
        if not isinstance(module, (nn.Linear, Conv1D)) or tuple(module.weight.shape) != stored:
            raise CheckpointError(
                f"{folder.path}: {name!r} is no linear map of {list(stored)} in the model of config.json; get it again"
            )
        weights[f"{key}.{WEIGHT_T}"] = (f"{key}.{WEIGHT}", stored, transposed)
        dropped |= {
            f"{key}.{leaf}" for leaf in (WEIGHT, COLUMN_NORMS, THRESHOLDS, BIASES, *LOW_RANK)
        }  # the first: the sentinel
    plan = []
    for key, spec in folder.tensors.items():
        if key not in dropped:
            name, shape, transposed = weights.get(key, (key, spec.shape, False))
            plan.append((TensorSpec(name, spec.dtype, shape), key, transposed))
    return plan


def _check_weights(checkpoint: Checkpoint, progress: Progress) -> bool:
    """Hold the weight files against the manifest; whether there is one.

    Raises:
        VerificationError: one was changed.
    """
    folder, specs = checkpoint.folder.path, checkpoint.folder.tensors
    if not (folder / MANIFEST).exists():
        return False
    files = read_manifest(folder)
    with progress("Checking weights", sum(spec.nbytes for spec in specs.values()), "B") as advance:
        for name in sorted({spec.file for spec in specs.values()}):
            if files.get(name) != entry(folder / name):
                raise VerificationError(f"{folder / name} was changed since the conversion; get it again")
            advance(sum(spec.nbytes for spec in specs.values() if spec.file == name))
    return True


def _differences(checkpoint: Checkpoint, signed: bool) -> tuple[str, ...]:
    """Why the weights are not the source's bit for bit, as far as config and report tell."""
    found = []
    kind = checkpoint.config.basis.get("kind")
    if kind != "none":
        found.append(f"the conversion put it in another basis ({kind})")
    if not signed:
        return (*found, f"another program saved the checkpoint, without {MANIFEST}")
    try:
        report = json.loads((checkpoint.folder.path / REPORT).read_bytes())
        dtype, unused = str(report["options"]["dtype"]), len(report.get("unused", ()))
        copied = report.get("head", {}).get("copied_bytes", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return (*found, f"{REPORT} cannot be read")
    if copied:
        found.append("the head was tied to the embedding and is a tensor of its own")
    if dtype != "auto":
        found.append(f"the conversion stored it in {dtype}")
    if unused:
        found.append(f"{unused} tensors that the model does not take were left out")
    return tuple(found)


def config_text(checkpoint: Checkpoint) -> str:
    """config.json without what a conversion adds; its text stays as it was where the addition is found at its end."""
    text = checkpoint.folder.config_text
    added = ("transformers_weights", "quantization_config")
    fields = {name: value for name, value in checkpoint.folder.config.items() if name not in added}
    ours = f'"transformers_weights": {json.dumps(INSTALL)},\n  "quantization_config"'
    before = text.rpartition(ours)[0].rstrip().removesuffix(",") + "\n}\n"
    with suppress(ValueError):
        if json.loads(before) == fields:
            return before
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def _write_card(folder: Path, staged_folder: Path, title: str, done: Exported) -> None:
    """A card that keeps the licence and what else is still true of the checkpoint's."""
    from huggingface_hub import ModelCard, ModelCardData  # here: these take a second

    kept: dict[str, Any] = {}
    with suppress(Exception):  # a broken card is no reason to fail
        kept = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()
    data = ModelCardData(**{name: kept[name] for name in KEPT if name in kept})
    data.tags = [tag for tag in kept.get("tags") or [] if tag not in OURS] or None
    body = BODY.format(title=title, mark=MARK, version=__version__, said=done.said)
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(staged_folder / CARD)
