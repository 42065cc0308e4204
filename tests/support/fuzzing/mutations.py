"""Mutations of a checkpoint's files, at random: each changes them in place and says what it did."""

import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from wina_convert.format.names import MANIFEST

CONFIG, REPORT = "config.json", "wina_report.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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
FIELDS += [
    "sparsity",
    "grid",
    "modules",
    "scheme",
    "shares",
    "biases",
    "prefill",
    "format_version",
    "tie_word_embeddings",
    "pruned_heads",
]
FIELDS += ["weight_map", "metadata", "files", "verification", "thresholds", "__metadata__", "head_dim", "is_decoder"]
DTYPES = ["F32", "BF16", "F16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "U32", "C64", "f32", ""]

Files = dict[str, bytes]


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
