"""The specification of the checkpoint, wina_convert/format/README.md, says what the package does.

`tests/support/reader.py` is written from its text with json, struct and numpy only; the package and float64 are its measure.
"""

import ast
import json
import re
import shutil
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor

import wina_convert
from support.families import make_model
from support.folders import bias_of, config_of, tensors_of, threshold_of, weight_key, write_biases
from support.reader import Reader
from wina_convert import WinaConfig, convert
from wina_convert.runtime.linear import WinaLinear, gated_modules

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "wina_convert" / "format" / "README.md").read_text("utf-8")
GOLDEN = ROOT / "tests" / "golden" / "v1"
SMALL: dict[str, Any] = {"samples": 4, "seq_len": 16, "basis": "none"}
SPARSITIES = [None, 0.0, 0.25, 0.333, 0.8, 0.95]
LOW_RANK = {"low_rank_in", "low_rank_out"}
OPTIONAL = {"bias", "biases", *LOW_RANK}
FORMATS = {"F32": "<f4", "F16": "<f2"}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading or sentence, without its head."""
    table = re.search(r"(?:^\|.*\n)+", TEXT.split(heading, 1)[1], flags=re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[0].splitlines()[2:]]


def names(heading: str) -> list[str]:
    return [row[0].strip("`") for row in rows(heading)]


def example() -> dict[str, list[float]]:
    block = re.search(r"```text\n(.*?)```", TEXT, flags=re.DOTALL)
    assert block is not None
    return {name: [float(number) for number in numbers] for name, *numbers in map(str.split, block[1].splitlines())}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A llama in float32, one in bfloat16, and a GPT-2 in float32 whose keys have no prefix."""
    folder = tmp_path_factory.mktemp("sources")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 4}
    made = {
        "float32": make_model("llama", folder / "float32", **sizes),
        "bfloat16": make_model("llama-tied", folder / "bfloat16", torch.bfloat16, **sizes),
        "unprefixed": make_model("gpt2", folder / "unprefixed"),
    }
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(made["unprefixed"]).items()}
    save_file(stripped, made["unprefixed"] / "model.safetensors", metadata={"format": "pt"})
    return made | {"low-rank": made["float32"]}


@pytest.fixture(scope="module")
def converted(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those, converted; the bfloat16 one into shards, a float32 one with pictures and one with low-rank terms. Read only."""
    folder = tmp_path_factory.mktemp("converted")
    options: dict[str, dict[str, Any]] = {"bfloat16": {"max_shard_size": "40KB"}, "float32": {"plot": True}}
    options["low-rank"] = {"scheme": "r-sparse"}
    for name, source in sources.items():
        convert(str(source), folder / name, **SMALL, **options.get(name, {}))
    return {name: folder / name for name in sources}


@pytest.fixture(scope="module")
def biased(converted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The float32 llama, which has no bias, and the GPT-2, which has, with random biases along the sparsity."""
    folder = tmp_path_factory.mktemp("biased")
    for name in ("float32", "unprefixed"):
        write_biases(shutil.copytree(converted[name], folder / f"{name}-biased"))
    return {path.name: path for path in folder.iterdir()}


CHECKPOINTS = ["llama-bfloat16-tied", "gpt2-float32", "float32", "bfloat16", "unprefixed"]
CHECKPOINTS += ["float32-biased", "unprefixed-biased", "low-rank"]


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    golden: Path = GOLDEN / request.param
    made = "biased" if request.param.endswith("biased") else "converted"
    return golden if golden.exists() else request.getfixturevalue(made)[request.param]


def in_float64(folder: Path, module: str, x: Tensor, sparsity: float) -> Tensor:
    """The gated product by the score: y = W (x * (|x| norm > t)) + b, from the folder's tensors."""
    tensors = {name: tensor.double() for name, tensor in tensors_of(folder).items()}
    key = next(k for k in (module, module.partition(".")[2]) if f"{k}.weight_t" in tensors)
    score = x.double().abs() * tensors[f"{key}.column_norms"]
    keep = score > threshold_of(folder, tensors[f"{key}.thresholds"], sparsity)
    bias = tensors.get(f"{key}.bias", torch.zeros(())) + bias_of(folder, tensors.get(f"{key}.biases"), sparsity)
    y = (x.double() * keep) @ tensors[f"{key}.weight_t"] + bias
    if sparsity > 0 and f"{key}.low_rank_in" in tensors:
        y = y + (x.double() * ~keep) @ tensors[f"{key}.low_rank_in"] @ tensors[f"{key}.low_rank_out"]
    return y


@pytest.mark.slow
def test_the_reader_reproduces_every_gated_product(checkpoint: Path) -> None:
    model, reader = wina_convert.load(str(checkpoint)), Reader(checkpoint)
    generator = torch.Generator().manual_seed(3)
    gates = gated_modules(model)
    assert list(gates) == config_of(checkpoint)["quantization_config"]["modules"]
    skipped = []
    for sparsity in SPARSITIES:
        asked = reader.sparsity if sparsity is None else sparsity
        wina_convert.set_sparsity(model, asked)
        for name, gate in gates.items():
            x = torch.randn(3, gate.in_features, generator=generator).to(model.dtype)
            found, kept = reader.product(name, x.float().numpy(), sparsity)
            assert gate.tau is not None
            assert found.dtype == np.float32
            np.testing.assert_array_equal(kept, ~(x.float().abs() <= gate.tau).numpy())
            exact = in_float64(checkpoint, name, x, asked)
            np.testing.assert_allclose(found, exact.numpy(), rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                torch.testing.assert_close(gate(x), torch.from_numpy(found).to(x.dtype))
            skipped.append((asked, 1 - kept.mean()))
    assert max(share for asked, share in skipped if asked == 0) == 0
    assert min(share for asked, share in skipped if asked == 0.95) > 0.3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.625, 0.0])
def test_the_example_is_right(sparsity: float, dtype: str, tmp_path: Path) -> None:
    given = example()
    write_example(tmp_path, given, dtype)
    expected, kept = given["y"], [bool(flag) for flag in given["kept"]]
    x = torch.tensor(given["x"])
    gate = WinaLinear(4, 2, given["grid"], True, DTYPES[dtype])
    stored = tensors_of(tmp_path)
    gate.load_state_dict({leaf: stored[f"P.{leaf}"] for leaf in ("weight_t", "column_norms", "thresholds", "bias")})
    gate.set_sparsity(sparsity)
    assert gate.tau is not None
    if sparsity:
        assert given["sparsity"] == [sparsity]
        assert gate.tau.tolist() == pytest.approx(given["tau"], rel=1e-6)
        assert torch.lerp(*torch.tensor(given["thresholds"][1:]), 0.5).item() == given["t"][0]
    else:
        written = re.search(r"At sparsity 0 the same input gives y = ([-.\d]+) ([-.\d]+)", TEXT)
        assert written is not None
        expected, kept = [float(number) for number in written.groups()], [True, False, True, True]
    found, mask = Reader(tmp_path).product("model.P", x.numpy(), sparsity)
    assert found.tolist() == gate(x.to(DTYPES[dtype])).tolist() == expected
    assert mask.tolist() == kept == (~(x.abs() <= gate.tau)).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("x", "kept", "y"),
    [
        ([np.nan, 7, 0, 0], [1, 0, 0, 0], [np.nan, np.nan]),
        ([0.5, np.nan, 0, 0], [1, 1, 0, 0], [np.nan, np.nan]),  # a column of zeros does not hide it
        ([0.5, np.inf, -0.0, 0], [1, 0, 0, 0], [2.5, 1]),
        ([np.inf, 7, 0, 0], [1, 0, 0, 0], [np.inf, np.inf]),
    ],
)
def test_nan_and_infinity_are_kept_or_skipped_as_the_text_says(
    x: list[float], kept: list[int], y: list[float], dtype: str, tmp_path: Path
) -> None:
    given = example()
    write_example(tmp_path, given, dtype)
    gate = WinaLinear(4, 2, given["grid"], True, DTYPES[dtype])
    stored = tensors_of(tmp_path)
    gate.load_state_dict({leaf: stored[f"P.{leaf}"] for leaf in ("weight_t", "column_norms", "thresholds", "bias")})
    for sparsity in (0.625, 0.0):
        gate.set_sparsity(sparsity)
        found, mask = Reader(tmp_path).product("model.P", np.asarray(x, np.float32), sparsity)
        assert mask.tolist() == [bool(flag) for flag in kept]
        np.testing.assert_array_equal(found, np.asarray(y, np.float32))
        np.testing.assert_array_equal(gate(torch.tensor(x).to(DTYPES[dtype])).detach().float().numpy(), found)


def write_example(folder: Path, given: dict[str, list[float]], dtype: str) -> None:
    """The example as a checkpoint, laid out with struct as the text says; without the fields that may be absent."""

    def encode(values: Any, dtype: str) -> bytes:
        numbers = np.asarray(values, "<f4")
        if dtype == "BF16":
            return (numbers.view("<u4") >> 16).astype("<u2").tobytes()
        return numbers.astype(FORMATS[dtype]).tobytes()

    weight_t = [given[f"weight_t[{j}]"] for j in range(4)]
    tensors = {
        "P.weight_t": (dtype, weight_t),
        "P.column_norms": ("F32", given["column_norms"]),
        "P.thresholds": ("F32", given["thresholds"]),
        "P.bias": (dtype, given["bias"]),
        "P.weight": ("F32", []),
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (kind, values) in tensors.items():
        begin, data = len(data), data + encode(values, kind)
        header[name] = {"dtype": kind, "shape": list(np.shape(values)), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    block = {"quant_method": "wina", "format_version": 2, "grid": given["grid"], "modules": ["model.P"]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": block}))


def test_the_default_sparsity_is_that_of_the_config(checkpoint: Path) -> None:
    reader, name = Reader(checkpoint), config_of(checkpoint)["quantization_config"]["modules"][0]
    x = np.linspace(-2, 2, tensors_of(checkpoint)[weight_key(checkpoint, name)].shape[0], dtype=np.float32)
    default, asked = reader.product(name, x), reader.product(name, x, 0.5)
    assert all(np.array_equal(a, b) for a, b in zip(default, asked, strict=True))


def test_the_reader_is_short_and_imports_json_struct_and_numpy_only() -> None:
    source = (ROOT / "tests" / "support" / "reader.py").read_text("utf-8")
    assert len(source.splitlines()) <= 65
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert all(isinstance(node, ast.Import) for node in imports)
    assert {alias.name for node in imports for alias in node.names} == {"json", "struct", "numpy"}
    assert "__import__" not in source


def test_the_text_lists_the_fields_of_the_config_with_their_defaults() -> None:
    found = rows("`quantization_config` has exactly these fields")
    listed = [row[0].strip("`") for row in found]
    assert len(listed) == len(set(listed))
    assert set(listed) == {field.name for field in fields(WinaConfig)}
    absent = {row[0].strip("`"): row[3].partition(",")[0] for row in found}
    bare = WinaConfig.from_dict({"quant_method": "wina", "format_version": 2})
    assert [name for name, text in absent.items() if text == "refuse"] == ["quant_method", "format_version"]
    assert (bare.sparsity, absent["sparsity"]) == (None, "0")
    assert (bare.prefill, absent["prefill"]) == (None, "`gated`")
    assert bare.grid == [k / 20 for k in range(20)]
    assert bare.modules == []
    for name in ("scheme", "allocation"):
        assert absent[name] == f"`{getattr(bare, name)}`"
    assert (bare.biases, absent["biases"]) == (False, "false")
    for name in ("calibration", "source", "tool_version", "shares"):
        assert absent[name] == "empty"
        assert not getattr(bare, name)
    assert absent["basis"] == '`{"kind": "none"}`'
    assert bare.basis == {"kind": "none"}


def test_the_config_of_a_conversion_is_as_the_text_says(sources: dict[str, Path], converted: dict[str, Path]) -> None:
    listed = names("`quantization_config` has exactly these fields")
    for name, folder in converted.items():
        before, after = config_of(sources[name]), config_of(folder)
        assert set(after) - set(before) <= set(names("with these fields added or changed"))
        assert {key: after[key] for key in before} == before
        unwritten = {"biases"} | (set() if name == "low-rank" else {"low_rank"})  # there is none
        assert set(after["quantization_config"]) == set(listed) - unwritten
        assert f"the text `{after['transformers_weights']}`" in TEXT
        for field in ("calibration", "source"):
            assert all(f"`{key}`" in TEXT for key in after["quantization_config"][field])


def test_the_text_lists_the_files(sources: dict[str, Path], converted: dict[str, Path]) -> None:
    listed = set(names("## Files"))
    seen = set()
    for name, folder in converted.items():
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        own = found - {path.name for path in sources[name].iterdir()} | {"config.json"}
        weights = {file for file in found if file.endswith(".safetensors")}
        shards = {re.sub(r"\d{5}-of-\d{5}", "00001-of-00003", file) for file in weights}
        seen |= own - weights | shards
        assert (len(weights) > 1) == ("model.safetensors.index.json" in found) == (name == "bfloat16")
    assert seen == listed


def test_the_text_lists_the_tensors_of_a_projection(checkpoint: Path) -> None:
    listed = {name.removeprefix("P.") for name in names("`P` being its key")}
    model, tensors = wina_convert.load(str(checkpoint)), tensors_of(checkpoint)
    biased = False
    gates = gated_modules(model)
    for name, gate in gates.items():
        assert {leaf for leaf, _ in gate.named_parameters()} | OPTIONAL == listed
        key = weight_key(checkpoint, name).removesuffix(".weight_t")
        stored = {full.removeprefix(f"{key}.") for full in tensors if full.startswith(f"{key}.")}
        first = {"weight"} if name == next(iter(gates)) else set()
        assert stored - OPTIONAL == (listed - OPTIONAL) | first
        assert (stored >= LOW_RANK) == (gate.low_rank_in is not None) == (checkpoint.name == "low-rank")
        assert ("biases" in stored) == (gate.biases is not None) == checkpoint.name.endswith("biased")
        assert ("bias" in stored) == (gate.bias is not None)
        biased |= gate.bias is not None
        if first:
            assert (tensors[f"{key}.weight"].dtype, tensors[f"{key}.weight"].shape) == (torch.float32, (0,))
    assert biased or checkpoint.name in ("llama-bfloat16-tied", "float32", "float32-biased", "low-rank")


def test_the_text_lists_the_dtypes_that_the_package_reads() -> None:
    listed = {name for row in rows("| from 8 + N | data") for name in re.findall(r"`(\w+)`", row[0])}
    order = re.search(r"ordered by dtype \((.*?)\)", TEXT, flags=re.DOTALL)
    assert order is not None
    assert listed == set(re.findall(r"`(\w+)`", order[1]))
    assert listed >= {"F32", "F16", "BF16"}


def test_headers_are_ordered_and_padded_as_the_text_says(checkpoint: Path) -> None:
    order = re.findall(r"`(\w+)`", TEXT.partition("ordered by dtype (")[2].partition(")")[0])
    for file in checkpoint.glob("*.safetensors"):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        assert length % 8 == 0
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        assert entries == sorted(entries, key=lambda pair: (order.index(pair[1]["dtype"]), pair[0]))
        ends = [entry["data_offsets"] for _, entry in entries]
        assert [begin for begin, _ in ends] == [0, *(end for _, end in ends)][: len(ends)]
        assert 8 + length + ends[-1][1] == len(content)


def test_the_text_lists_the_fields_of_the_report(checkpoint: Path) -> None:
    report = json.loads((checkpoint / "wina_report.json").read_text("utf-8"))
    found = rows("`wina_report.json` is for people")
    made_by = report["versions"]["wina-convert"]
    later = {"`basis`": "0.4", "`unused`": "0.5", "`seen`": "0.5"}
    absent = {name for name, since in later.items() if Version(made_by) < Version(since)} | {
        "`tuning`",
        "`experts`",
        "`head`",
    }  # untuned, no mixture, and the head dense
    assert [row[0].strip("`") for row in found if row[0] not in absent] == list(report)
    held = {row[0].strip("`"): row[1] for row in found}
    for field in ("versions", "bytes_per_token", "verification"):
        assert all(f"`{key}`" in held[field] for key in report[field])


def test_the_manifest_is_as_the_text_says(checkpoint: Path) -> None:
    text = (checkpoint / "wina_manifest.json").read_text("utf-8")
    files = json.loads(text)["files"]
    assert text == json.dumps({"files": files}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert all(set(entry) == {"sha256", "size"} for entry in files.values())
    present = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert present - {"wina_manifest.json"} == set(files)


def test_the_version_of_the_text_is_that_of_the_package() -> None:
    version = WinaConfig().format_version
    assert TEXT.startswith(f"# The WINA checkpoint, format version {version}\n")
    assert f"| `format_version` | integer | {version};" in TEXT
