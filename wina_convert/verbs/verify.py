"""What a checkpoint folder holds, by hash, and whether it is what a conversion wrote: `wina verify`."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from ..format.checkpoint import REPORT, Checkpoint, open_checkpoint
from ..errors import CheckpointError, SourceError, VerificationError
from ..progress import Progress, silent
from ..runtime.rule import column_norms, threshold_at
from ..conversion.staging import SNAPSHOT
from ..format.trust import check_folder

MANIFEST = "wina_manifest.json"
ROUNDING = 1e-4  # of norms and thresholds, computed again on another machine


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file of a folder, the manifest aside."""
    (folder / MANIFEST).write_bytes(_text({name: _entry(folder / name) for name in _files(folder)}))


def renewed_manifest(folder: Path, name: str, content: bytes) -> bytes:
    """The manifest for when a file has become this.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    files = _read_manifest(folder)
    files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return _text(files)


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
    try:
        check_folder(folder, hidden=True)
    except SourceError as error:
        raise CheckpointError(str(error)) from error
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
    try:
        checkpoint.stream(torch.device("cpu"))  # every parameter of the model has a tensor of its shape
    except SourceError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    keys = checkpoint.gated_keys()
    with progress("Verifying tensors", len(keys), "projection") as advance:
        for key in keys.values():
            _check_norms(checkpoint, key)
            advance(1)
    found = thresholds(checkpoint)
    recorded = _recorded(folder, checkpoint) or found
    for name, threshold in found.items():
        if math.isclose(recorded.get(name, math.nan), threshold, rel_tol=ROUNDING):
            continue
        raise VerificationError(f"{name}: the threshold at the default sparsity is not that of {REPORT}; convert again")
    return len(files)


def thresholds(checkpoint: Checkpoint) -> dict[str, float]:
    """The threshold of every gated projection at the default sparsity, by module name.

    Raises:
        VerificationError: thresholds are not a finite, ascending curve from 0.
    """
    config, keys = checkpoint.config, checkpoint.gated_keys()
    curves = dict(checkpoint.read(f"{key}.thresholds" for key in keys.values()))
    for name, curve in curves.items():
        if not (torch.isfinite(curve).all() and curve[0] == 0 and (curve.diff() >= 0).all()):
            raise VerificationError(f"{name!r} is not a finite, ascending curve from 0; convert again")
    return {
        name: threshold_at(curves[f"{key}.thresholds"], config.grid, config.sparsity or 0.0).item()
        for name, key in keys.items()
    }


def _check_norms(checkpoint: Checkpoint, key: str) -> None:
    stored = dict(checkpoint.read([f"{key}.weight_t", f"{key}.column_norms"]))
    norms = stored[f"{key}.column_norms"]
    if not (
        norms.isfinite().all() and torch.allclose(norms, column_norms(stored[f"{key}.weight_t"]), ROUNDING, atol=0)
    ):
        raise VerificationError(f"{key}.column_norms are not those of its weights; convert again")


def _recorded(folder: Path, checkpoint: Checkpoint) -> dict[str, float] | None:
    """The thresholds of the report, unless it is of another default sparsity."""
    try:
        report = json.loads((folder / REPORT).read_bytes())["verification"]
        same = report["held_out"]["sparsity"] == checkpoint.config.sparsity
        return {name: float(value) for name, value in report["thresholds"].items()} if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise VerificationError(f"{folder / REPORT} is not the report of a conversion; get it again") from error


def _files(folder: Path) -> Iterator[str]:
    """Every file of a folder but the manifest, relative, in order; what the Hub keeps beside a download is not the folder's."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if (
            path.is_file()
            and relative.parts[0] not in {".cache", ".git", ".gitattributes"}
            and str(relative) not in {MANIFEST, SNAPSHOT}
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
            set(entry) == {"size", "sha256"} and isinstance(entry["size"], int) and 0 <= entry["size"] < 1 << 63
            for entry in files.values()
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
