"""Where a folder lives until it is complete: a hidden one beside the target, locked, resumable, published by a rename.

A reader never sees half a model. A killed process leaves the hidden folder with everything up to its last snapshot, and
a lock that dies with it.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, WinaError
from .durable import replacing, sync
from .names import REPORT, SNAPSHOT


@dataclass(frozen=True)
class Snapshot:
    """What a conversion needs to go on after some decoder layers.

    Attributes:
        layers: how many are finished and written.
        tensors: whatever the conversion carries from layer to layer, by name.
    """

    layers: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """What `overwrite` may replace, and nothing else.

    Attributes:
        name: for messages, with its article.
        known: whether a folder is one.
    """

    name: str
    known: Callable[[Path], bool]


CHECKPOINT = Kind("a WINA checkpoint", lambda folder: (folder / REPORT).is_file())


@dataclass(frozen=True)
class Staging:
    """The folder of an unfinished checkpoint.

    Attributes:
        folder: where its files are.
        identity: everything that decides its bytes: source, options, versions, calibration.
        snapshot: where to go on; None: at the beginning.
    """

    folder: Path
    identity: dict[str, Any]
    snapshot: Snapshot | None

    @property
    def begun(self) -> Snapshot | None:
        """The snapshot if it says that layers are written; before, the weight files hold nothing to go on with."""
        return self.snapshot if self.snapshot and self.snapshot.layers else None

    def save(self, layers: int, tensors: Mapping[str, Tensor]) -> None:
        """Record that so many layers are finished; their weights are on the disk already."""
        metadata = {"layers": str(layers), "identity": json.dumps(self.identity)}
        with replacing(self.folder / SNAPSHOT) as beside:
            try:
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata)
            except SafetensorError as error:  # the library's only word for a full disk
                code = re.search(r"os error (\d+)", str(error))
                raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error


def hidden(target: Path) -> Path:
    """The folder of an unfinished conversion to a target."""
    return _beside(target, "staging")


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.wina-{what}")


@contextmanager
def staged(
    out: Path, identity: Mapping[str, Any], resume: bool, keep: bool, overwrite: bool, kind: Kind = CHECKPOINT
) -> Iterator[Staging]:
    """A hidden folder beside the target, which becomes the target when the with-block succeeds.

    If the block fails for a reason outside the conversion (interrupted, disk full), the folder stays for `resume` if `keep` says
    so and a layer is finished; after an error of the conversion itself, which would come again, it goes.

    Args:
        out: the target.
        identity: everything that decides the bytes of the checkpoint, as JSON.
        resume: go on from the snapshot of an unfinished conversion, where there is one.
        keep: leave the folder when interrupted.
        overwrite: discard an unfinished conversion, and replace what is there.
        kind: what that may be.

    Raises:
        CheckpointError: another conversion to this target is running; an unfinished one is there and neither `resume` nor
            `overwrite` is given, or it is of something else; the folder cannot be written: read-only, full, gone.
    """
    target = out.resolve()
    folder = hidden(target)
    new_parents = [parent for parent in target.parents if not parent.exists()]
    lock = FileLock(_beside(target, "lock"))
    kept = True  # what is there already is not this conversion's to remove
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
        recover(target)
        check_replaceable(out, overwrite, kind)
        snapshot = _begin(out, folder, identity, resume, overwrite)
        kept = False
        yield Staging(folder, dict(identity), snapshot)
        check_replaceable(out, overwrite, kind)  # hours later
        _publish(folder, target)
    except Timeout as error:
        raise CheckpointError(
            f"another conversion to {out} is running, or an export; wait for it or choose another --out"
        ) from error
    except BaseException as error:
        kept = kept or (keep and not isinstance(error, WinaError) and (folder / SNAPSHOT).exists())
        unfinished = kept and lock.is_locked and (folder / SNAPSHOT).exists()
        if isinstance(error, OSError):
            raise unwritable(out, error, unfinished) from error
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(_left(unfinished)) from error
        raise
    finally:
        if lock.is_locked:
            if not kept:
                _discard(folder)
            with suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)  # before the release: afterwards it may be another's
            lock.release()
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()  # only where nothing came


def check_target(out: Path, model: str, overwrite: bool, kind: Kind = CHECKPOINT) -> None:
    """Refuse a target that cannot or must not be written, before anything is spent.

    Raises:
        CheckpointError: it exists (without `overwrite`), is not of the kind (with it), lies in the source or holds it, or
            the folder it goes into cannot be written.
    """
    try:
        target = out.resolve()
        hidden(target).exists()  # its name is the longest
    except OSError as error:
        raise unwritable(out, error) from error
    source = Path(model).resolve()
    if Path(model).is_dir() and (target == source or source in target.parents or target in source.parents):
        raise CheckpointError(f"{out} and the source {model} lie one inside the other; choose another --out")
    check_replaceable(out, overwrite, kind)
    nearest = next(parent for parent in target.parents if parent.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise CheckpointError(f"{out} cannot be written: {nearest} is read-only or no folder; choose another --out")


def check_space(out: Path, needed: int) -> None:
    """Refuse when the disk of the target has less free space than a conversion needs, in bytes.

    Raises:
        CheckpointError: it has less, what an unfinished conversion to this target holds already counted as free.
    """
    folder = next(parent for parent in out.resolve().parents if parent.exists())
    unfinished = (path for path in hidden(out.resolve()).rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free + sum(path.stat().st_blocks * 512 for path in unfinished)
    if free < needed:
        raise CheckpointError(
            f"{out} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; free some, or choose another --out"
        )


def check_replaceable(out: Path, overwrite: bool, kind: Kind = CHECKPOINT) -> None:
    """Refuse to take the place of anything but nothing, an empty folder or, with `overwrite`, a folder of the kind.

    Raises:
        CheckpointError: something else is there.
    """
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise CheckpointError(f"{out} exists; choose another --out, or pass --overwrite to replace {kind.name}")
        if not kind.known(out):
            raise CheckpointError(f"{out} is not {kind.name}, so --overwrite does not replace it; choose another --out")
    elif out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; choose another --out")


def _begin(out: Path, folder: Path, identity: Mapping[str, Any], resume: bool, overwrite: bool) -> Snapshot | None:
    """Make the folder, or take up the one that is there."""
    if (folder / SNAPSHOT).exists() and (resume or not overwrite):
        found, snapshot = _read_snapshot(folder / SNAPSHOT)
        if not resume:
            raise CheckpointError(
                f"an unfinished conversion to {out} is there, {snapshot.layers} layers done; convert with --resume to "
                "continue it, or with --overwrite to start anew"
            )
        if changed := difference(found, identity):
            raise CheckpointError(
                f"the unfinished conversion to {out} is of something else: {changed}; use what it began with, or pass "
                "--overwrite to start anew"
            )
        return snapshot
    _discard(folder)
    folder.mkdir()
    return None


def _discard(folder: Path) -> None:
    """Remove an unfinished conversion, first what says that there is something to resume."""
    with suppress(OSError):
        (folder / SNAPSHOT).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _read_snapshot(path: Path) -> tuple[dict[str, Any], Snapshot]:
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
        return json.loads(metadata["identity"]), Snapshot(int(metadata["layers"]), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} of an unfinished conversion cannot be read ({error}); pass --overwrite to start anew"
        ) from error


def difference(before: Any, now: Any, where: str = "") -> str:
    """The first difference of two JSON values, in words; empty where there is none."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            inner = difference(before.get(name), now.get(name), f"{where}.{name}" if where else name)
            if inner:
                return inner
        return ""
    return "" if before == now else f"{where} was {before!r} and is {now!r}"


def recover(target: Path) -> None:
    """Put back what a killed process had moved aside: the checkpoint that it was to replace, the snapshot of its own."""
    replaced, snapshot = _beside(target, "replaced"), _beside(target, "snapshot")
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
    if snapshot.exists() and hidden(target).exists():
        snapshot.rename(hidden(target) / SNAPSHOT)
    snapshot.unlink(missing_ok=True)


def _publish(folder: Path, target: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)
    # Until the folder has its name, a refusal of the system can be resumed from; afterwards it is to be the checkpoint alone.
    with suppress(FileNotFoundError):
        (folder / SNAPSHOT).rename(_beside(target, "snapshot"))
    try:
        if target.is_dir() and any(target.iterdir()):
            target.rename(_beside(target, "replaced"))
        folder.rename(target)  # replaces an empty folder
    finally:
        recover(target)
    sync(target.parent)


def unwritable(out: Path, error: OSError, kept: bool = False) -> CheckpointError:
    """The error to raise where the target cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(f"the disk of {out} is full; free some space or choose another --out; {_left(kept)}")
    return CheckpointError(f"{out} cannot be written ({error.strerror or error}); choose another --out; {_left(kept)}")


def _left(kept: bool) -> str:
    return "the same command with --resume continues" if kept else "nothing was left behind"
