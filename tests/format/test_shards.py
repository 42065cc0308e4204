"""The shard writer lays files out as safetensors and huggingface_hub do, without holding a shard in memory."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.commands import SMALL, refused, run
from wina_convert.errors import OptionError, SourceError
from wina_convert.format.names import INDEX, SINGLE
from wina_convert.format.shard_writer import ShardWriter
from wina_convert.format.shards import DTYPES, TensorSpec, read_headers, read_rows, read_tensors


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bits that the dtype can have."""
    count = int(torch.Size(shape).numel()) * dtype.itemsize
    bits = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        bits %= 2
    return bits.view(dtype).view(shape)


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(folder: Path, tensors: dict[str, Tensor], size: str | int = "5GB", order: list[str] | None = None) -> None:
    with ShardWriter(folder, specs_of(tensors), size) as shards:
        for name in order or tensors:
            shards.write({name: tensors[name]})


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")


def tensors_with(smallest: int) -> st.SearchStrategy[dict[str, Tensor]]:
    """Tensors of any kind, with dimensions of at least this size."""
    shapes = st.lists(st.integers(smallest, 5), max_size=3).map(tuple)
    tensors = st.builds(random_tensor, st.sampled_from(list(DTYPES.values())), shapes, st.integers(0, 2**31))
    return st.dictionaries(NAMES, tensors, min_size=1, max_size=8)


TENSORS = tensors_with(0)


@settings(deadline=None)
@given(tensors=TENSORS, data=st.data())
def test_a_file_is_the_one_that_safetensors_writes(
    tensors: dict[str, Tensor], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("shards")
    write(folder, tensors, order=data.draw(st.permutations(list(tensors))))
    save_file(tensors, folder / "expected", {"format": "pt"})
    assert (folder / SINGLE).read_bytes() == (folder / "expected").read_bytes()


# huggingface_hub takes empty tensors for one and the same storage, so without those
@settings(deadline=None)
@given(tensors=tensors_with(1), size=st.integers(1, 400), data=st.data())
def test_shards_and_index_are_those_that_huggingface_hub_writes(
    tensors: dict[str, Tensor], size: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    folder, expected = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("expected")
    write(folder, tensors, size, data.draw(st.permutations(list(tensors))))
    save_torch_state_dict(tensors, expected, max_shard_size=size, metadata={"format": "pt"})
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in expected.iterdir())
    for path in expected.glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    if (expected / INDEX).exists():
        ours, theirs = (json.loads((place / INDEX).read_text()) for place in (folder, expected))
        assert ours["weight_map"] == theirs["weight_map"]
        assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]


@settings(deadline=None)
@given(tensors=TENSORS, size=st.integers(1, 400))
def test_what_was_written_reads_back(tensors: dict[str, Tensor], size: int, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("shards")
    write(folder, tensors, size)
    specs = read_headers(folder)
    assert {name: (spec.dtype, spec.shape) for name, spec in specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    for name, tensor in read_tensors(folder, specs.values()):
        assert tensor.contiguous().view(-1).view(torch.uint8).equal(tensors[name].view(-1).view(torch.uint8))
    assert {name for name, _ in read_tensors(folder, specs.values())} == set(tensors)


@settings(deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    nbytes=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_slices_of_rows_make_up_the_tensor(
    dtype: torch.dtype, shape: tuple[int, ...], nbytes: int, seed: int, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("rows")
    tensor = random_tensor(dtype, shape, seed)
    save_file({"x": tensor}, folder / SINGLE)
    (spec,) = read_headers(folder).values()
    parts = list(read_rows(folder, spec, nbytes))
    whole = torch.cat(parts) if shape else parts[0]
    assert (whole.dtype, whole.shape) == (tensor.dtype, tensor.shape)
    assert whole.contiguous().view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8))
    row = tensor.nbytes // shape[0] if shape and shape[0] else 0
    assert all(part.nbytes <= max(nbytes, row) for part in parts if shape)


def test_a_non_contiguous_tensor_is_written_by_its_values(tmp_path: Path):
    tensor = torch.arange(12.0).view(3, 4).t()
    write(tmp_path, {"x": tensor})
    assert torch.equal(load_file(tmp_path / SINGLE)["x"], tensor)


PLANNED = TensorSpec("x", torch.float32, (2, 3))


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3).bfloat16(), torch.zeros(2, 3, dtype=torch.int32)]
)
def test_a_tensor_other_than_planned_is_an_error(tensor: Tensor, tmp_path: Path):
    with pytest.raises(ValueError, match="x: planned"), ShardWriter(tmp_path, [PLANNED], "5GB") as shards:
        shards.write({"x": tensor})


def test_a_tensor_that_was_not_planned_is_an_error(tmp_path: Path):
    with pytest.raises(KeyError, match="y"), ShardWriter(tmp_path, [PLANNED], "5GB") as shards:
        shards.write({"y": torch.zeros(2, 3)})


def test_a_tensor_written_twice_is_an_error(tmp_path: Path):
    with ShardWriter(tmp_path, [PLANNED], "5GB") as shards:
        shards.write({"x": torch.zeros(2, 3)})
        with pytest.raises(KeyError, match="x"):
            shards.write({"x": torch.zeros(2, 3)})


def test_a_tensor_never_written_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="never written: x"), ShardWriter(tmp_path, [PLANNED], "5GB"):
        pass


def test_an_error_while_writing_closes_the_files_and_is_the_one_raised(tmp_path: Path):
    with pytest.raises(RuntimeError, match="mine"), ShardWriter(tmp_path, [PLANNED], "5GB") as shards:
        raise RuntimeError("mine")
    assert all(handle.closed for handle in shards.files.values())


def test_a_shard_that_cannot_be_made_leaves_no_file_open(tmp_path: Path):
    (tmp_path / "model-00002-of-00002.safetensors").mkdir()  # in the way
    shards = ShardWriter(tmp_path, [PLANNED, dataclasses.replace(PLANNED, name="y")], 24)
    with pytest.raises(IsADirectoryError), shards:
        pass
    assert shards.files
    assert all(handle.closed for handle in shards.files.values())


BAD_SIZES = ("", "5", "5XB", "many", "GB", "-5GB", "0GB", "0", "nanGB", "infGB")


@pytest.mark.parametrize("size", BAD_SIZES)
def test_a_shard_size_that_is_none_is_an_error(size: str, tmp_path: Path):
    with pytest.raises(OptionError, match="max shard size is"):
        ShardWriter(tmp_path, [PLANNED], size)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
@pytest.mark.parametrize("size", ["5XB", "-5GB", "0GB"])
def test_a_shard_size_that_is_none_is_refused(size: str, dry: tuple[str, ...], tiny: Path, tmp_path: Path):
    refused(
        run(tiny, "--out", tmp_path / "out", "--max-shard-size", size, *SMALL, *dry),
        f"max shard size is {size!r}",
        "5GB",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("read", [lambda folder, spec: list(read_tensors(folder, [spec])), read_rows])
def test_a_file_that_went_away_is_an_error_of_the_source(read, tmp_path: Path):
    write(tmp_path, {"x": torch.zeros(2, 3)})
    (spec,) = read_headers(tmp_path).values()
    (tmp_path / SINGLE).unlink()
    with pytest.raises(SourceError, match=r"model\.safetensors cannot be read"):
        list(read(tmp_path, spec))
