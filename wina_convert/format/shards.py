"""The safetensors files of a folder, read: headers and tensors, one at a time."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import SourceError
from .names import INDEX, SINGLE
from .trust import check_content, contained

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
# read, so that a header that holds one can be understood, and never written
FOREIGN = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
SLICE = 1 << 26  # bytes of a tensor that goes by in slices
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """Which part of a stored tensor another tensor is: one entry of its first dimension, transposed or not, and rows of that.

    Attributes:
        index: of the entry.
        transposed: whether its two dimensions change places.
        rows: start, stop and step of the rows that are taken then.
    """

    index: int
    transposed: bool
    rows: tuple[int, int, int]

    def of(self, entry: Tensor) -> Tensor:
        """The piece of that entry, in memory of its own."""
        return (entry.t() if self.transposed else entry)[slice(*self.rows)].contiguous()


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor without its data.

    Attributes:
        name: its key in the checkpoint.
        dtype: its stored dtype.
        shape: its shape.
        file: the shard that holds it, relative to its folder; empty where it is not yet written.
        stored: its name in that file, where that is another.
        piece: which part of the stored tensor it is, where it is not all of it.
        joined: the stored tensors that make it one after another along the first dimension, where they are several; file and
            stored are then the first one's.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str = ""
    stored: str = ""
    piece: Piece | None = None
    joined: "tuple[TensorSpec, ...]" = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * self.dtype.itemsize


def sentinel() -> Tensor:
    """An empty tensor stored under the plain weight name of the first gated projection.

    Without this package transformers would fill the gated projections with random numbers; the wrong shape makes it raise.
    """
    return torch.empty(0, dtype=torch.float32, device="cpu")


def spec_from_header(name: str, dtype: str, shape: Iterable[int], file: str) -> TensorSpec:
    """A TensorSpec from a safetensors header entry.

    Raises:
        SourceError: the dtype is not known.
    """
    known = DTYPES | FOREIGN
    if dtype not in known:
        raise SourceError(
            f"tensor {name!r} in {file} has dtype {dtype}; convert a checkpoint in float32, bfloat16 or float16"
        )
    return TensorSpec(name, known[dtype], tuple(shape), file)


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
        specs |= read_file_headers(folder, file)
    if weight_map is not None:
        wrong = sorted(name for name in weight_map if name not in specs or specs[name].file != weight_map[name])
        if wrong:
            raise SourceError(f"{folder / INDEX} places {wrong[0]!r} in {weight_map[wrong[0]]}, which does not hold it")
    return specs


def read_file_headers(folder: Path, file: str) -> dict[str, TensorSpec]:
    """Every tensor of one safetensors file of a folder, by name.

    Raises:
        SourceError: it is missing, truncated or outside the folder.
    """
    specs = {}
    if not os.path.isfile(contained(folder, file)):
        raise SourceError(f"{folder}: shard {file} is missing; download the model again")
    check_content(folder / file)
    try:
        with safe_open(folder / file, framework="np") as shard:  # torch's way would ask for memory of the file's size
            for name in shard.keys():  # noqa: SIM118 - not a dict
                entry = shard.get_slice(name)
                specs[name] = spec_from_header(name, entry.get_dtype(), entry.get_shape(), file)
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{folder / file} is truncated or not safetensors ({error}); download it again") from error
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
        if spec.joined:
            parts = dict(read_tensors(folder, spec.joined))
            yield spec.name, torch.cat([parts[part.name] for part in spec.joined])
        else:
            by_file.setdefault(spec.file, []).append(spec)
    for file, members in by_file.items():
        try:
            with safe_open(folder / file, framework="pt") as shard:
                for spec in members:
                    name = spec.stored or spec.name
                    if spec.piece is None:
                        yield spec.name, shard.get_tensor(name)
                    else:
                        yield spec.name, spec.piece.of(shard.get_slice(name)[spec.piece.index])
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{folder / file} cannot be read ({error})") from error


def read_rows(folder: Path, spec: TensorSpec, nbytes: int = SLICE) -> Iterator[Tensor]:
    """Yield a stored tensor in slices along its first dimension of about `nbytes`, never mapping more than one.

    Raises:
        SourceError: the file cannot be read.
    """
    rows = spec.shape[0] if spec.shape else 0
    step = max(1, nbytes * rows // max(spec.nbytes, 1)) if rows else 1
    if spec.piece is not None or spec.joined:  # a matrix of an expert, or a small tensor
        for _, tensor in read_tensors(folder, [spec]):
            yield from tensor.split(step)
        return
    try:
        for start in range(0, max(rows, 1), step):
            with safe_open(
                folder / spec.file, framework="pt"
            ) as shard:  # a file opened anew drops the pages read before
                name = spec.stored or spec.name
                yield shard.get_slice(name)[start : start + step] if rows else shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{folder / spec.file} cannot be read ({error})") from error
