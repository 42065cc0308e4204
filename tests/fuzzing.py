"""Damages checkpoints at random and reads them: each must be refused, or do what its files say.

    python tests/fuzzing.py --cases 20000 --seed 0      # the long run; exit code 1 if a case fails
    python tests/fuzzing.py --seed 0 --case 123         # one case again

A case applies one to three mutations to the files of a tiny checkpoint and gives the folder to `inspect_checkpoint`,
`verify_folder` and `load` with a forward pass of four tokens. In half of the cases the manifest is written anew after
the mutations, as somebody would who wants them to pass. What is right:

- a WinaError, from each of them;
- `verify_folder` accepts only bytes that are the original ones, or whose manifest was written anew;
- an inspection counts the bytes that the headers count, and can be printed;
- a loaded model gives the logits of the original. Where it does not, the mutation may have changed the function that
  the files describe: then plain transformers decides. It loads the same config without the gated block, and the same
  tensors transposed back; plain code gates its inputs by the stored thresholds and norms; the logits have to be the
  same. Where a forward pass raises, it has to raise there too.

Anything else is a failure: another exception, another result, 30 seconds, a gigabyte.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from breaking import Hung, within
from commands import run_wina
from families import make_model
from folders import threshold_of
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from wina_convert import convert, load
from wina_convert.errors import WinaError
from wina_convert.inspection import inspect_checkpoint
from wina_convert.integrity import MANIFEST, verify_folder, write_manifest

CONFIG, REPORT = "config.json", "wina_report.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENS = torch.tensor([[0, 310, 7, 1999]])
SECONDS = 30
MEMORY = 1 << 30  # bytes that a case may add to the largest before
TOLERANCE = 1e-3  # of logits, relative to the largest: sums in another order

NUMBERS = [0, 1, -1, 2, 3, 7, 16, 32, 1000, 2**24, 2**31, 2**63, 10**400, 0.5, 0.25, 0.96, -0.0, 1e-320, 1e30, 1e308]
NUMBERS += [math.nan, math.inf, -math.inf]
TEXTS = [
    "",
    "x",
    "0.5",
    "1",
    "null",
    "model",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "é" * 50,
    "a" * 10_000,
    "..",
    "../x",
    "/",
    "a/b",
]
TEXTS += [
    "model.safetensors",
    "model-00001-of-00003.safetensors",
    "float16",
    "bfloat16",
    "int8",
    "eager",
    "gelu",
    "relu",
]
VALUES = [None, True, False, [], {}, [[]], [None], {"": None}, [0.0, 0.5], ["a", "b"], *NUMBERS, *TEXTS]
FIELDS = ["transformers_weights", "attn_implementation", "_attn_implementation", "quantization_config", "num_labels"]
FIELDS += [
    "auto_map",
    "dtype",
    "torch_dtype",
    "layer_types",
    "text_config",
    "sub_configs",
    "base_model_tp_plan",
    "id2label",
]
FIELDS += [
    "num_hidden_layers",
    "rope_scaling",
    "partial_rotary_factor",
    "sliding_window",
    "model_type",
    "architectures",
]
FIELDS += ["sparsity", "grid", "modules", "scheme", "prefill", "format_version", "tie_word_embeddings", "pruned_heads"]
FIELDS += ["weight_map", "metadata", "files", "verification", "thresholds", "__metadata__", "head_dim", "is_decoder"]
DTYPES = ["F32", "BF16", "F16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "U32", "C64", "f32", ""]

Files = dict[str, bytes]


class CaseError(AssertionError):
    """A case that did not end as it has to."""


# --- mutations: each changes the files in place and says what it did ---


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON value, the value itself first."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def tweaked(value: Any, rng: random.Random) -> Any:
    """A value like this one."""
    if isinstance(value, bool):
        return rng.choice([not value, int(value), str(value).lower()])
    if isinstance(value, int | float):
        with_number = [
            value + 1,
            value - 1,
            -value,
            value * 2,
            value // 2,
            float(value),
            str(value),
            [value],
            0,
            value * 1e6,
        ]
        return rng.choice(with_number) if math.isfinite(value) else 0
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value.upper(), f" {value}", [value], value * 100, value[::-1]])
    if isinstance(value, list) and value:
        first, *rest = value
        return rng.choice(
            [rest, [*value, first], value[::-1], value * 2, [first], {"0": first}, rng.sample(value, len(value))]
        )
    return rng.choice(VALUES)


def mutated(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A JSON value with one change somewhere, and a word about it."""
    every = list(places(value))
    # every depth alike: lists of many numbers would otherwise be all that is ever changed
    depth = rng.choice([len(path) for path in every])
    path = rng.choice([path for path in every if len(path) == depth])
    if not path:
        new = rng.choice(VALUES) if rng.random() < 0.2 or not isinstance(value, dict) else {**value, **field(rng)}
        return new, "the whole" if new is not value else ""
    value = json.loads(json.dumps(value))
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, old = path[-1], holder[path[-1]]
    action = rng.choice(["delete", "replace", "tweak", "tweak", "tweak", "elsewhere", "add", "rename"])
    if action == "delete":
        del holder[key]
    elif action == "replace":
        holder[key] = rng.choice(VALUES)
    elif action == "tweak":
        holder[key] = tweaked(old, rng)
    elif action == "elsewhere":
        other: Any = value
        for step in rng.choice(every):
            other = other[step]
        holder[key] = json.loads(json.dumps(other))
    elif action == "add" and isinstance(holder, dict):
        holder.update(field(rng))
    elif isinstance(holder, dict):
        del holder[key]
        holder[rng.choice([f"{key}x", str(key)[:-1], *TEXTS, *map(str, holder)])] = old
    else:
        holder.insert(key, rng.choice([old, *VALUES]))
    new = holder.get(key, "nothing") if isinstance(holder, dict) else holder[key : key + 1]
    return value, f"{action} {'.'.join(map(str, path))}: {str(old)[:60]!r} -> {repr(new)[:60]}"


def field(rng: random.Random) -> dict[str, Any]:
    return {rng.choice([*FIELDS, *FIELDS, *TEXTS]): rng.choice(VALUES)}


def in_json(name: str) -> Callable[[Files, random.Random], str]:
    def mutate(files: Files, rng: random.Random) -> str:
        try:
            content = json.loads(files[name])
        except ValueError:
            return in_bytes(name)(files, rng)  # an earlier mutation broke it
        content, what = mutated(content, rng)
        # the manifest counts only as it is written
        form: dict[str, Any] = {"indent": 2, "sort_keys": True} if name == MANIFEST else {}
        files[name] = json.dumps(content, **form).encode() + (b"\n" if name == MANIFEST else b"")
        return f"{name}: {what}"

    return mutate


def in_bytes(name: str | None) -> Callable[[Files, random.Random], str]:
    """Bytes changed, taken out, put in or cut off, near the beginning as often as anywhere."""

    def mutate(files: Files, rng: random.Random) -> str:
        file = name or rng.choice(shards(files))
        data = bytearray(files[file])
        near = rng.choice([16, 4096, len(data) + 1])
        at = rng.randrange(min(near, len(data) + 1))
        action = rng.choice(["change", "change", "insert", "take out", "cut off", "append"])
        count = rng.choice([1, 1, 2, 8, 100])
        if action == "change":
            data[at : at + count] = rng.randbytes(len(data[at : at + count]))
        elif action == "insert":
            data[at:at] = rng.randbytes(count)
        elif action == "take out":
            del data[at : at + count]
        elif action == "cut off":
            del data[at:]
        else:
            data += rng.randbytes(count)
        files[file] = bytes(data)
        return f"{file}: {action} {count} bytes at {at}"

    return mutate


def shards(files: Files) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


def in_header(files: Files, rng: random.Random) -> str:
    """One change of a safetensors header, with the length that fits it, mostly."""
    file = rng.choice(shards(files))
    data = files[file]
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        names = [name for name in header if name != "__metadata__"]
        one, two = rng.sample(names, 2)
        action = rng.choice(
            ["dtype", "shape", "swap", "offsets", "name", "twice", "metadata", "length", "json", "json"]
        )
        what = one
        if action == "dtype":
            header[one]["dtype"] = what = rng.choice(DTYPES)
        elif action == "shape":
            shape = header[one]["shape"]
            strange = [
                shape[::-1],
                [*shape, 1],
                [math.prod(shape)],
                [1, *shape],
                [],
                [2**40, 2**40],
                [-1],
                [2**64],
                "x",
            ]
            header[one]["shape"] = what = rng.choice([*strange, shape[:-1] if shape else [1]])
        elif action == "swap":
            header[one], header[two] = header[two], header[one]
        elif action == "offsets":
            start, end = header[one]["data_offsets"]
            strange = [
                [start, end + 4],
                [end, start],
                [start + 4, end + 4],
                [start, 2**62],
                [0, 2**63],
                [-4, end],
                [start],
            ]
            header[one]["data_offsets"] = what = rng.choice([*strange, header[two]["data_offsets"]])
        elif action == "name":
            entry = header.pop(one)
            header[rng.choice([two, f"{one}x", one.replace("model.", "", 1), *TEXTS])] = entry
        elif action == "twice":
            header[rng.choice([f"{one}.bias", one.replace("weight_t", "weight"), f"x.{one}", "x"])] = header[one]
        elif action == "metadata":
            header["__metadata__"] = rng.choice(
                [*VALUES, {"format": "tf"}, {"format": 7}, {"format": "pt", "x": "y" * 999}]
            )
        elif action == "json":
            header, what = mutated(header, rng)
        text = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        return in_bytes(file)(files, rng)  # an earlier mutation broke it
    length = rng.choice([0, 1, size - 1, size + 8, 2**31, 2**62, 2**64 - 1]) if action == "length" else len(text)
    files[file] = length.to_bytes(8, "little") + text + data[8 + size :]
    return f"{file}: header, {action} {str(what)[:100]}"


def in_index(files: Files, rng: random.Random) -> str:
    """A tensor that the index places elsewhere, leaves out or makes up."""
    try:
        index = json.loads(files[INDEX])
        weights = index["weight_map"]
        name = rng.choice(sorted(weights))
        action = rng.choice(["place", "place", "leave out", "make up", "gather"])
        file = rng.choice([*shards(files), *TEXTS, "../x.safetensors", CONFIG])
        if action == "place":
            weights[name] = file
        elif action == "leave out":
            del weights[name]
        elif action == "make up":
            weights[f"{name}{rng.choice(TEXTS)}"] = file
        else:
            index["weight_map"] = dict.fromkeys(weights, file)
    except (ValueError, KeyError, TypeError, AttributeError):
        return in_bytes(INDEX)(files, rng)  # an earlier mutation broke it
    files[INDEX] = json.dumps(index).encode()
    return f"{INDEX}: {action} {name} {file[:40]!r}"


def in_tensor(files: Files, rng: random.Random) -> str:
    """Data of a whole tensor, as a number that floats have."""
    file = rng.choice(shards(files))
    data = files[file]
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        name = rng.choice([name for name in header if name != "__metadata__"])
        start, end = header[name]["data_offsets"]
        value = torch.tensor(rng.choice([0.0, -0.0, 1.0, -1.0, 1e-40, 1e38, math.nan, math.inf, -math.inf]))
        at = 8 + size + start + 4 * rng.randrange(max(1, (end - start) // 4))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return in_bytes(file)(files, rng)  # an earlier mutation broke it
    files[file] = data[:at] + value.numpy().tobytes() + data[at + 4 :]
    return f"{file}: {name} gets {value.item()}"


def in_folder(files: Files, rng: random.Random) -> str:
    """A file more: weights that the index does not name, or any file under another name."""
    if rng.random() < 0.5:
        one, name = (
            rng.choice(sorted(files)),
            rng.choice(["pytorch_model.bin", "adapter_config.json", "x/y", ".hidden", SINGLE]),
        )
        files[name] = files[one]
        return f"{one} also as {name}"
    try:
        stored = {key: tensor for file in shards(files) for key, tensor in from_bytes(files[file]).items()}
        name = rng.choice(sorted(stored))
    except (SafetensorError, KeyError, IndexError):
        return in_bytes(None)(files, rng)  # an earlier mutation broke it
    files[SINGLE] = to_bytes(stored | {name: stored[name] * 2}, {"format": "pt"})
    return f"{SINGLE}: everything, and {name} doubled"


MUTATIONS: list[Callable[[Files, random.Random], str]] = [
    *[in_json(CONFIG)] * 8,
    *[in_header] * 6,
    *[in_index] * 2,
    in_tensor,
    in_folder,
    in_json(INDEX),
    in_json(MANIFEST),
    *[in_json(REPORT)] * 2,
    in_bytes(CONFIG),
    in_bytes(INDEX),
    in_bytes(MANIFEST),
    in_bytes(REPORT),
    in_bytes(None),
]


# --- what a case has to end in ---


@dataclass(frozen=True)
class Bench:
    """The checkpoint that is damaged.

    Attributes:
        folder: where it is; each case changes and restores it.
        files: its bytes.
        logits: [1, 4, vocabulary], what it computes.
    """

    folder: Path
    files: Files
    logits: Tensor


@dataclass(frozen=True)
class Case:
    """A damaged checkpoint.

    Attributes:
        mutations: in words.
        sealed: whether the manifest was written anew.
        files: the files that differ from the original.
    """

    mutations: tuple[str, ...]
    sealed: bool
    files: Files


def make_bench(folder: Path) -> Bench:
    """Convert a tiny random llama into three shards; without the files that no reader here opens."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 4}
    convert(
        str(make_model("llama", folder / "source", **sizes)),
        folder / "out",
        samples=4,
        seq_len=16,
        max_shard_size="100KB",
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md"):
        (folder / "out" / name).unlink()
    write_manifest(folder / "out")
    files = {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}
    if len(shards(files)) != 3:
        raise ValueError(f"expected were three shards: {sorted(files)}")
    return Bench(folder / "out", files, forward(load(str(folder / "out"))))


def forward(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, return_dict=True).logits.float()


def attempt(door: str, read: Callable[[], Any]) -> Any:
    """What a reader returns, or its WinaError.

    Raises:
        CaseError: it ends in any other way.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with within(SECONDS):
            result = read()
    except WinaError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) or "allocate" in str(cause):
                raise CaseError(f"{door}: ran out of memory: {str(error)[:200]}") from error
            cause = cause.__cause__ or cause.__context__
        result = error
    except Hung as error:
        raise CaseError(f"{door}: no end after {SECONDS} seconds") from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | CaseError):
            raise
        where = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in where if "wina_convert" in frame.filename] or where
        at = f"{Path(own[-1].filename).name} in {own[-1].name}"
        raise CaseError(f"{door}: {type(error).__name__} at {at}: {str(error)[:200]}") from error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    if grown > MEMORY:
        raise CaseError(f"{door}: took {grown >> 20} MB")
    return result


def check_inspection(bench: Bench, case: Case) -> str:
    """Right, or refused; the words of the outcome."""
    folder = bench.folder
    found = attempt("inspect", lambda: inspect_checkpoint(folder))
    if isinstance(found, WinaError):
        return "refused"
    stored = sum(tensor.nbytes for tensor in tensors(folder).values())
    counted = sum(layer.nbytes for layer in found.layers) + found.other_bytes
    if counted != stored:
        raise CaseError(f"inspect: counts {counted} bytes, and {stored} are stored")
    json.dumps(dataclasses.asdict(found))
    shown = run_wina("inspect", folder)
    if shown.exit_code or not all(char.isprintable() or char == "\n" for char in shown.output):
        raise CaseError(f"inspect: cannot be printed: {shown.exception!r} {shown.output[:200]!r}") from shown.exception
    return "accepted"


def check_verification(bench: Bench, case: Case) -> str:
    """Right, or refused; the words of the outcome."""
    found = attempt("verify", lambda: verify_folder(bench.folder))
    if isinstance(found, WinaError):
        if not case.files:
            raise CaseError(f"verify: refused the original: {found}")
        return "refused"
    if case.files and not case.sealed:
        raise CaseError("verify: accepted what was changed")
    return "accepted"


def tensors(folder: Path) -> dict[str, Tensor]:
    """What the files that the index names hold."""
    names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    return {name: tensor for file in names for name, tensor in load_file(folder / file).items()}


def plain_logits(folder: Path) -> Tensor:
    """What plain transformers computes from a folder, its inputs gated by plain code, in float32."""
    config = json.loads((folder / CONFIG).read_bytes().decode("utf-8", "replace"))
    block = config.pop("quantization_config")
    config.pop("transformers_weights", None)
    stored = tensors(folder)
    dense = {}
    for name, tensor in stored.items():
        if name.endswith(".weight_t"):
            dense[name.removesuffix("_t")] = tensor.t().contiguous()
        elif not name.endswith((".column_norms", ".thresholds")) and tensor.numel():
            dense[name] = tensor
    with TemporaryDirectory() as place:
        (Path(place) / CONFIG).write_text(json.dumps(config))
        save_file(dense, Path(place) / "model.safetensors", {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)

    def gate(cutoff: Tensor) -> Callable[..., tuple[Tensor]]:
        return lambda module, inputs: (torch.where(inputs[0].abs() <= cutoff, 0.0, inputs[0]),)

    for name in block["modules"] if block.get("prefill") != "dense" else ():
        threshold = threshold_of(folder, stored[f"{name}.thresholds"], block.get("sparsity") or 0.0)
        norms = stored[f"{name}.column_norms"]
        cutoff = torch.where(norms > 0, torch.tensor(threshold, dtype=torch.float32) / norms, torch.inf)
        model.get_submodule(name).register_forward_pre_hook(gate(cutoff))
    return forward(model)


def check_load(bench: Bench, case: Case) -> str:
    """Right, or refused; the words of the outcome."""
    folder = bench.folder
    model = attempt("load", lambda: load(str(folder)))
    if isinstance(model, WinaError):
        return "refused"
    if model.dtype != torch.float32:  # whose rounding decides about inputs near a cutoff
        model = attempt("load in float32", lambda: load(str(folder), dtype="float32"))
    try:
        found = forward(model)
    except Exception as error:
        try:
            plain_logits(folder)
        except Exception:
            return "cannot be computed, by plain transformers neither"
        raise CaseError(
            f"forward: {type(error).__name__}: {str(error)[:200]}, but plain transformers computes"
        ) from error
    if torch.equal(found, bench.logits):
        return "the same logits"
    try:
        expected = plain_logits(folder)
    except Exception as error:
        raise CaseError(
            f"load: a model that plain transformers refuses: {type(error).__name__} {str(error)[:200]}"
        ) from error
    if not expected.isfinite().all():
        return "logits that are no numbers, of plain transformers neither"
    if found.shape == expected.shape and (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
        return "other logits, those of plain transformers"
    raise CaseError(
        f"load: wrong logits, by {(found - expected).abs().max() if found.shape == expected.shape else found.shape}"
    )


def make_case(bench: Bench, seed: int, number: int) -> Case:
    """The case of a seed and number, the same every time."""
    rng = random.Random(f"{seed} {number}")
    files = dict(bench.files)
    words = tuple(rng.choice(MUTATIONS)(files, rng) for _ in range(rng.choice([1, 1, 1, 2, 3])))
    changed = {name: data for name, data in files.items() if data != bench.files.get(name)}
    return Case(words, MANIFEST not in changed and rng.random() < 0.5, changed)


def run_case(bench: Bench, case: Case) -> str:
    """Read a damaged checkpoint.

    Returns:
        how it ended, in words.

    Raises:
        CaseError: it ended wrongly.
    """
    touched = {*case.files, MANIFEST} if case.sealed else {*case.files}
    words: list[str] = []
    failures: list[str] = []
    try:
        for name, data in case.files.items():
            (bench.folder / name).parent.mkdir(exist_ok=True)
            (bench.folder / name).write_bytes(data)
        if case.sealed:
            write_manifest(bench.folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for check in (check_inspection, check_verification, check_load):
                try:
                    words.append(check(bench, case))
                except CaseError as error:
                    failures.append(str(error))
    finally:
        for name in touched:
            restore(bench, name)
    if failures:
        raise CaseError("; ".join(failures))
    return "inspect {}, verify {}, load: {}".format(*words)


def restore(bench: Bench, name: str) -> None:
    path = bench.folder / name
    if name in bench.files:
        path.write_bytes(bench.files[name])
    elif path.exists():
        path.unlink()
        if path.parent != bench.folder:
            path.parent.rmdir()


def describe(case: Case, seed: int, number: int) -> str:
    sealed = ", manifest written anew" if case.sealed else ""
    return f"seed {seed}, case {number}{sealed}: {'; '.join(case.mutations)}"


def run(bench: Bench, seed: int, numbers: range, tell: Callable[[str], object]) -> tuple[Counter[str], list[str]]:
    """Run cases.

    Returns:
        how often each outcome came, and the failures in words.
    """
    outcomes: Counter[str] = Counter()
    failures = []
    start = time.monotonic()
    for number in numbers:
        case = make_case(bench, seed, number)
        try:
            outcomes[run_case(bench, case)] += 1
        except CaseError as failure:
            door, what, *_ = str(failure).split(": ")
            outcomes[f"FAILED {door}: {what.partition(',')[0][:100]}"] += 1
            failures.append(f"{describe(case, seed, number)}\n    {failure}")
            tell(failures[-1])
        done = number - numbers.start + 1
        if done % 1000 == 0:
            tell(f"{done} of {len(numbers)} cases, {len(failures)} failed, {time.monotonic() - start:.0f} s")
    return outcomes, failures


def tell(text: str) -> None:
    print(text.encode("ascii", "backslashreplace").decode(), flush=True)


def main() -> None:
    """The long run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # errors are raised as well
    with TemporaryDirectory() as place:
        bench = make_bench(Path(place))
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + 4 * MEMORY,) * 2)
        numbers = range(options.cases) if options.case is None else range(options.case, options.case + 1)
        outcomes, failures = run(bench, options.seed, numbers, tell)
        for outcome, count in outcomes.most_common():
            print(f"{count:7}  {outcome}")
        if options.case is not None:
            print(describe(make_case(bench, options.seed, options.case), options.seed, options.case))
    sys.exit(1 if failures else 0)


def address_space() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
