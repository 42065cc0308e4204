"""Files that are whole on the disk, or not there at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace a file at once: the block writes the file that it is given, which becomes `path` when the block succeeds.

    Its bytes are on the disk before it gets its name, so that a power cut leaves the old file or the new one.

    Yields:
        a name beside `path` at which nothing lies: a link there would lead elsewhere.
    """
    beside = path.with_name(f".{path.name.removeprefix('.')}.new")
    try:
        beside.unlink(missing_ok=True)
        yield beside
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    except Exception:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have a file or folder on the disk, not only on its way to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
