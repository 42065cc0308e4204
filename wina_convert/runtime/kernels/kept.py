"""Code that was compiled on this machine, kept on the disk for the next process."""

import hashlib
import os
import tempfile
from pathlib import Path


def folder(kind: str) -> Path:
    """Where compiled code of a kind is kept: `wina-convert/KIND` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wina-convert" / kind


def read(path: Path) -> bytes | None:
    """What `write` left, if it is whole: damaged code may do anything."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, code = stored[:32], stored[32:]
    return code if digest == hashlib.sha256(code).digest() else None


def write(path: Path, code: bytes) -> None:
    """Leave the code for other processes; where nothing can be written each process compiles for itself."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)  # another process may write the same file at the same time
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError:
        pass
