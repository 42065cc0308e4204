"""What a checkpoint folder holds, by hash, and whether it is what a conversion wrote: `wina verify`."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from .checkpoint import Checkpoint, open_checkpoint
from .errors import CheckpointError, VerificationError
from .progress import Progress, silent
from .scoring import column_norms, threshold_at

MANIFEST = "wina_manifest.json"


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file of a folder, the manifest aside."""
    (folder / MANIFEST).write_bytes(_text({name: _entry(folder / name) for name in _files(folder)}))


def renew_entry(folder: Path, name: str, content: bytes) -> None:
    """Record what a file is about to become.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    files = _read_manifest(folder)
    files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    beside = folder / f".{MANIFEST}.new"
    beside.write_bytes(_text(files))
    beside.replace(folder / MANIFEST)


def verify_folder(folder: str | Path, progress: Progress = silent) -> int:
    """Check every file of a checkpoint against the manifest, and its tensors and config against each other.

    Args:
        folder: a WINA checkpoint.
        progress: how to report it.

    Returns:
        number of files.

    Raises:
        CheckpointError: it is not a WINA checkpoint, or has no manifest that can be read.
        VerificationError: a file is missing, extra or changed; norms are not those of the weights; thresholds are not finite
            and ascending; config and tensors do not fit together.
    """
    folder = Path(folder)
    files = _read_manifest(folder)
    present = set(_files(folder))
    for problem, names in (("missing", set(files) - present), ("not in the manifest", present - set(files))):
        if names:
            raise VerificationError(f"{folder}: {min(names)!r} is {problem} ({len(names)} such files); get it again")
    with progress("Verifying files", sum(int(entry["size"]) for entry in files.values()), "B") as advance:
        for name, entry in files.items():
            if _entry(folder / name) != entry:
                raise VerificationError(f"{folder / name} was changed since the conversion; get it again")
            advance(int(entry["size"]))
    checkpoint = open_checkpoint(folder)
    keys = checkpoint.gated_keys()
    with progress("Verifying tensors", len(keys), "projection") as advance:
        for key in keys.values():
            check_projection(checkpoint, key)
            advance(1)
    return len(files)


def check_projection(checkpoint: Checkpoint, key: str) -> None:
    """Check one gated projection: shapes, dtypes, norms against weights, thresholds.

    Raises:
        VerificationError: something does not fit.
    """
    config = checkpoint.config
    stored = dict(checkpoint.read(f"{key}.{leaf}" for leaf in ("weight_t", "column_norms", "thresholds")))
    weight_t, norms, curve = (stored[f"{key}.{leaf}"] for leaf in ("weight_t", "column_norms", "thresholds"))
    if weight_t.dim() != 2 or norms.shape != weight_t.shape[:1] or curve.shape != (len(config.grid),):
        shapes = [list(tensor.shape) for tensor in (weight_t, norms, curve)]
        raise VerificationError(f"{key}: weight_t, column_norms and thresholds have shapes {shapes}; convert again")
    if (norms.dtype, curve.dtype) != (torch.float32, torch.float32):
        raise VerificationError(f"{key}: column_norms are {norms.dtype} and thresholds {curve.dtype}, not float32")
    if config.scheme == "wina" and not torch.equal(norms, column_norms(weight_t)):
        raise VerificationError(f"{key}.column_norms are not those of its weights; convert again")
    if not (torch.isfinite(curve).all() and curve[0] == 0 and (curve.diff() >= 0).all()):
        raise VerificationError(f"{key}.thresholds is not a finite, ascending curve from 0; convert again")
    threshold_at(curve, config.grid, config.sparsity or 0.0)


def _files(folder: Path) -> Iterator[str]:
    """Every file of a folder but the manifest, relative, in order; what the Hub keeps beside a download is not the folder's."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if (
            path.is_file()
            and relative.parts[0] not in {".cache", ".git", ".gitattributes"}
            and str(relative) != MANIFEST
        ):
            yield relative.as_posix()


def _entry(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _text(files: dict[str, dict[str, int | str]]) -> bytes:
    return (json.dumps({"files": files}, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _read_manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        files: dict[str, dict[str, int | str]] = json.loads(content)["files"]
        whole = _text(files) == content and all(
            set(entry) == {"size", "sha256"} and isinstance(entry["size"], int) for entry in files.values()
        )
    except OSError as error:
        raise CheckpointError(
            f"{folder} has no {MANIFEST} that can be read ({error.strerror}); convert again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is damaged; get it again")
    return files
