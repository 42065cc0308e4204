"""`wina retarget`: another default sparsity for a checkpoint, in place."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError
from ..format.checkpoint import open_checkpoint
from ..format.durable import replacing
from ..format.grid import check_sparsity
from ..format.manifest import renewed_manifest
from ..format.names import CONFIG, MANIFEST


def retarget(folder: str | Path, sparsity: float) -> None:
    """Change the default sparsity of a WINA checkpoint in its config.json, and that file's entry in the manifest.

    Killed between the two, it leaves a checkpoint that loads and does not verify; running it again repairs that.

    Raises:
        OptionError: the sparsity is outside [0, 0.95].
        CheckpointError: the folder is not a WINA checkpoint or cannot be written.
    """
    sparsity = check_sparsity(sparsity)
    checkpoint = open_checkpoint(folder)
    replace(checkpoint.config, sparsity=sparsity)  # checks it against the grid
    content = _retargeted(checkpoint.folder.config_text, sparsity).encode()
    manifest = Path(folder) / MANIFEST
    if not manifest.exists():  # another program saved the checkpoint
        _write(Path(folder) / CONFIG, content)
        return
    before = manifest.read_bytes()
    _write(manifest, renewed_manifest(Path(folder), CONFIG, content))
    try:
        _write(Path(folder) / CONFIG, content)
    except CheckpointError:
        _write(manifest, before)
        raise


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
