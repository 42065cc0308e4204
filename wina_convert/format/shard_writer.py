"""The safetensors files of a folder, written: shards and their index, in any order of tensors, without holding any.

Writing does not go through `safetensors.save_file`, which needs a whole shard in memory: a shard of 5 GB would break the
promise that a conversion holds one decoder layer. The files are laid out as the library lays them out, byte for byte.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import torch
from torch import Tensor

from ..errors import CheckpointError, OptionError
from .names import INDEX
from .shards import DTYPES, NAMES, TensorSpec

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def shard_bytes(size: str | int) -> int:
    """A size such as "5GB" in bytes.

    Raises:
        OptionError: it is none.
    """
    try:
        if isinstance(size, int):
            limit = size
        else:
            text = size.strip().upper()
            limit = int(float(text[:-2]) * UNITS[text[-2:]])
        if limit > 0:
            return limit
    except (ValueError, OverflowError, KeyError):
        pass
    raise OptionError(f"max shard size is {size!r}; give a number of bytes or '500MB', '5GB'")


class TensorSink(Protocol):
    """Takes the tensors of a checkpoint as they are made, in any order."""

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors by name."""

    def skip(self, names: Iterable[str]) -> None:
        """These were taken before."""

    def sync(self) -> None:
        """Have everything taken so far in safety."""


class ShardWriter:
    """Writes safetensors shards and their index into a folder, in any order of tensors, without holding any.

    With `resumed`, the files of an interrupted conversion are there.

    Raises:
        OptionError: `max_shard_size` cannot be read as a size.
        CheckpointError (from `__enter__`): such a file is lost or cut off.
    """

    def __init__(
        self, folder: Path, specs: Iterable[TensorSpec], max_shard_size: str | int, resumed: bool = False
    ) -> None:
        from huggingface_hub import split_state_dict_into_shards_factory  # here: reading needs no client of the Hub

        self.folder = folder
        self.pending = {spec.name: spec for spec in specs}
        self.split = split_state_dict_into_shards_factory(
            self.pending,
            get_storage_size=lambda spec: spec.nbytes,
            get_storage_id=lambda spec: None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_bytes(max_shard_size),
        )
        self.resumed = resumed
        self.files: dict[str, BinaryIO] = {}
        self.offsets: dict[str, int] = {}

    def skip(self, names: Iterable[str]) -> None:
        """Tensors that are in the files already, from a conversion that was interrupted."""
        for name in names:
            del self.pending[name]

    def __enter__(self) -> Self:
        for file, names in self.split.filename_to_tensors.items():
            header, starts, size = _layout([self.pending[name] for name in names])
            self.offsets |= starts
            path = self.folder / file
            try:
                if self.resumed and not (path.is_file() and path.stat().st_size == size):
                    raise CheckpointError(f"{path} of the unfinished conversion is lost or cut off; start anew")
                self.files[file] = handle = path.open("r+b" if self.resumed else "wb")
                handle.write(header)
                handle.flush()
                handle.truncate(size)
            except BaseException:
                self._close()
                raise
        if self.split.is_sharded:
            total = sum(spec.nbytes for spec in self.pending.values())
            index = {"metadata": {"total_size": total}, "weight_map": self.split.tensor_to_filename}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
        return self

    def sync(self) -> None:
        """Have everything written so far on the disk."""
        for handle in self.files.values():
            handle.flush()
            os.fsync(handle.fileno())

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors at their place; each exactly once, with the planned dtype and shape."""
        for name, tensor in tensors.items():
            spec = self.pending.pop(name)
            if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
                raise ValueError(f"{name}: planned {spec.dtype} {spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
            handle = self.files[self.split.tensor_to_filename[name]]
            handle.seek(self.offsets[name])
            if spec.nbytes:
                handle.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self.pending:
                    raise ValueError(f"never written: {', '.join(sorted(self.pending))}")
                self.sync()
        finally:
            self._close()

    def _close(self) -> None:
        for handle in self.files.values():
            with suppress(OSError):  # of what is still to be flushed; the error that matters was raised before
                handle.close()


def _layout(specs: list[TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, absolute start of each tensor, and file size: widest dtype first, then by name, as the library does."""
    order = list(DTYPES.values())
    ordered = sorted(specs, key=lambda spec: (order.index(spec.dtype), spec.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for spec in ordered:
        starts[spec.name] = end
        end += spec.nbytes
        header[spec.name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [starts[spec.name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: base + start for name, start in starts.items()}, base + end
