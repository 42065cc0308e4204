"""`wina retarget`: another default sparsity for a checkpoint, in place."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError
from ..fitting.budget import budget_of
from ..format.checkpoint import Checkpoint, open_checkpoint
from ..format.default import default_line, with_default
from ..format.durable import replacing
from ..format.experts import shares
from ..format.grid import check_sparsity
from ..format.low_rank import low_rank_bytes
from ..format.manifest import renewed_manifest
from ..format.names import CARD, CONFIG, MANIFEST, REPORT, WEIGHT_T
from ..runtime.rule import bytes_read


def retarget(folder: str | Path, sparsity: float) -> None:
    """Change the default sparsity of a WINA checkpoint in its config.json, report and card, and their entries in the manifest.

    What was measured at conversion stays. Killed meanwhile, it leaves a checkpoint that loads and does not verify; running it
    again repairs that.

    Raises:
        OptionError: the sparsity is outside [0, 0.95].
        CheckpointError: the folder is not a WINA checkpoint or cannot be written.
    """
    folder = Path(folder)
    files = retargeted(folder, sparsity)
    if (folder / MANIFEST).exists():  # else another program saved the checkpoint
        files = {MANIFEST: renewed_manifest(folder, files), **files}
    before = {name: (folder / name).read_bytes() for name in files}
    written = []
    try:
        for name, content in files.items():
            _write(folder / name, content)
            written.append(name)
    except CheckpointError:
        for name in written:
            _write(folder / name, before[name])
        raise


def retargeted(folder: Path, sparsity: float) -> dict[str, bytes]:
    """What config.json, report and card of a checkpoint become for another default, by name; nothing is written.

    Raises:
        OptionError: the sparsity is outside [0, 0.95].
        CheckpointError: the folder is not a WINA checkpoint.
    """
    sparsity = check_sparsity(sparsity)
    checkpoint = open_checkpoint(folder)
    replace(checkpoint.config, sparsity=sparsity)  # checks it against the grid
    config = _retargeted(checkpoint.folder.config_text, sparsity)
    return {CONFIG: config.encode(), **_described(checkpoint, sparsity)}


def _described(checkpoint: Checkpoint, sparsity: float) -> dict[str, bytes]:
    """Report and card for another default, where the folder has the ones of a conversion."""
    folder, specs = checkpoint.folder.path, checkpoint.folder.tensors
    budget = budget_of(checkpoint.config)
    weights = {name: specs[f"{key}.{WEIGHT_T}"] for name, key in checkpoint.gated_keys().items()}
    met = shares(checkpoint.folder.config, weights)
    skipped = sum(
        met[name] * (spec.nbytes - bytes_read(spec.nbytes, spec.shape[0], budget.asked(name, sparsity)))
        for name, spec in weights.items()
    )
    if sparsity > 0:
        keys = checkpoint.gated_keys()
        skipped -= sum(met[name] * low_rank_bytes(specs, key) for name, key in keys.items())
    try:
        report = json.loads((folder / REPORT).read_bytes())
        reads = report["bytes_per_token"]
        reads["gated"] = round(reads["dense"] - skipped)
        line = default_line(sparsity, reads["dense"], reads["gated"])
        converted = float(report["verification"]["held_out"]["sparsity"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    files = {REPORT: (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()}
    with suppress(OSError, ValueError):
        files[CARD] = with_default((folder / CARD).read_bytes().decode(), line, sparsity, converted).encode()
    return files


def _retargeted(text: str, sparsity: float) -> str:
    """config.json with another default sparsity; its formatting stays where the number can be found in it."""
    fields = json.loads(text)
    fields["quantization_config"]["sparsity"] = sparsity
    head, mark, block = text.partition('"quantization_config"')
    changed = head + mark + re.sub(r'("sparsity"\s*:\s*)[^,\s}]+', rf"\g<1>{json.dumps(sparsity)}", block, count=1)
    with suppress(ValueError):
        if json.loads(changed) == fields:
            return changed
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, content: bytes) -> None:
    try:
        with replacing(path) as beside, beside.open("xb") as file:  # never through a link that lies there
            file.write(content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror or error})") from error
