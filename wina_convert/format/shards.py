"""The safetensors files of a folder: headers and tensors in, shards out, one tensor at a time.

Writing does not go through `safetensors.save_file`, which needs a whole shard in memory: a shard of 5 GB would break the
promise that a conversion holds one decoder layer. The files are laid out as the library lays them out, byte for byte.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.serialization._base import parse_size_to_int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, OptionError, SourceError
from .trust import contained

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# in the order in which the library writes them
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor without its data.

    Attributes:
        name: its key in the checkpoint.
        dtype: its stored dtype.
        shape: its shape.
        file: the shard that holds it, relative to its folder; empty where it is not yet written.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * self.dtype.itemsize


def spec_from_header(name: str, dtype: str, shape: Iterable[int], file: str) -> TensorSpec:
    """A TensorSpec from a safetensors header entry.

    Raises:
        SourceError: the dtype is not one this package can copy.
    """
    if dtype not in DTYPES:
        raise SourceError(
            f"tensor {name!r} in {file} has dtype {dtype}; convert a checkpoint in float32, bfloat16 or float16"
        )
    return TensorSpec(name, DTYPES[dtype], tuple(shape), file)


def read_headers(folder: Path) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint folder, by name, from the headers alone.

    Raises:
        SourceError: no safetensors weights, a shard missing, truncated or outside the folder, or an index that disagrees.
    """
    if contained(folder, SINGLE).is_file():  # as transformers chooses
        weight_map = None
    elif contained(folder, INDEX).is_file():
        weight_map = read_index(folder / INDEX)
    else:
        raise SourceError(_no_weights(folder))
    specs: dict[str, TensorSpec] = {}
    for file in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
        if not os.path.isfile(contained(folder, file)):
            raise SourceError(f"{folder}: shard {file} is missing; download the model again")
        try:
            with safe_open(folder / file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    entry = shard.get_slice(name)
                    specs[name] = spec_from_header(name, entry.get_dtype(), entry.get_shape(), file)
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{folder / file} is truncated or not safetensors ({error}); download it again"
            ) from error
    if weight_map is not None:
        wrong = sorted(name for name in weight_map if name not in specs or specs[name].file != weight_map[name])
        if wrong:
            raise SourceError(f"{folder / INDEX} places {wrong[0]!r} in {weight_map[wrong[0]]}, which does not hold it")
    return specs


def read_index(path: Path) -> dict[str, str]:
    """Which file holds each tensor, by an index.

    Raises:
        SourceError: it is no index, or leads out of its folder.
    """
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        items = dict(weight_map).items()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(f"{path} is not a safetensors index ({error!r}); download it again") from error
    for name, file in items:
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in {"", ".", ".."}:
            raise SourceError(f"{path} places {name!r} in {file!r}, outside the folder; do not use this checkpoint")
    return dict(items)


def _no_weights(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()}
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        return (
            f"{folder} has only pickled weights, which can run code when read; save it as safetensors first: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    if any(name.endswith(".gguf") for name in names):
        return f"{folder} has only GGUF weights; convert the original safetensors checkpoint"
    return f"{folder} has no {SINGLE} and no {INDEX}; give a folder or Hub id with safetensors weights"


def read_tensors(folder: Path, specs: Iterable[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor on the CPU) for the specs, file by file, each file open only meanwhile.

    Raises:
        SourceError: a file cannot be read.
    """
    by_file: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        by_file.setdefault(spec.file, []).append(spec)
    for file, members in by_file.items():
        try:
            with safe_open(folder / file, framework="pt") as shard:
                for spec in members:
                    yield spec.name, shard.get_tensor(spec.name)
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{folder / file} cannot be read ({error})") from error


def read_rows(folder: Path, spec: TensorSpec, nbytes: int = 1 << 26) -> Iterator[Tensor]:
    """Yield a stored tensor in slices along its first dimension of about `nbytes`, never mapping more than one.

    Raises:
        SourceError: the file cannot be read.
    """
    rows = spec.shape[0] if spec.shape else 0
    step = max(1, nbytes * rows // max(spec.nbytes, 1)) if rows else 1
    try:
        for start in range(0, max(rows, 1), step):
            with safe_open(
                folder / spec.file, framework="pt"
            ) as shard:  # a file opened anew drops the pages read before
                yield shard.get_slice(spec.name)[start : start + step] if rows else shard.get_tensor(spec.name)
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{folder / spec.file} cannot be read ({error})") from error


def shard_bytes(size: str | int) -> int:
    """A size such as "5GB" in bytes.

    Raises:
        OptionError: it is none.
    """
    try:
        limit = size if isinstance(size, int) else parse_size_to_int(size)
        if limit > 0:
            return limit
    except (ValueError, OverflowError):
        pass
    raise OptionError(f"max shard size is {size!r}; give a number of bytes or '500MB', '5GB'")


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
