"""What a checkpoint folder holds, by hash: wina_manifest.json."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import CheckpointError
from .names import MANIFEST, SNAPSHOT

Entry = dict[str, int | str]  # "size" in bytes and "sha256" of a file


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file of a folder, the manifest aside."""
    (folder / MANIFEST).write_bytes(_text({name: entry(folder / name) for name in files_of(folder)}))


def renewed_manifest(folder: Path, contents: Mapping[str, bytes]) -> bytes:
    """The manifest for when files have become these.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    files = read_manifest(folder)
    for name, content in contents.items():
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return _text(files)


def files_of(folder: Path) -> Iterator[str]:
    """Every file of a folder but the manifest, relative, in order; what the Hub keeps beside a download is not the folder's."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if (
            path.is_file()
            and relative.parts[0] not in {".cache", ".git", ".gitattributes"}
            and str(relative) not in {MANIFEST, SNAPSHOT}
        ):
            yield relative.as_posix()


def entry(path: Path) -> Entry:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _text(files: dict[str, Entry]) -> bytes:
    return (json.dumps({"files": files}, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The entries of a folder's manifest, by file.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        files: dict[str, Entry] = json.loads(content)["files"]
        whole = _text(files) == content and all(
            set(one) == {"size", "sha256"} and isinstance(one["size"], int) and 0 <= one["size"] < 1 << 63
            for one in files.values()
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
