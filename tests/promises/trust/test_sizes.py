"""A checkpoint from a stranger: no number takes memory or time."""

import json
import shutil
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from support.strangers import SINGLE, Q, header_of, with_header

LIMITED = """
import base64, json, os, resource, signal, sys
import torch
from pathlib import Path
from transformers.utils import logging
from wina_convert import load
from wina_convert.errors import WinaError
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.verify import verify_folder
from wina_convert.format.manifest import write_manifest

class Hung(BaseException): pass
def stop(*args): raise Hung
signal.signal(signal.SIGALRM, stop)
logging.disable_progress_bar()
logging.set_verbosity_error()
folder, cases = Path(sys.argv[1]), json.load(sys.stdin)
doors = {"load": lambda folder: load(str(folder)), "inspect": inspect_checkpoint, "verify": verify_folder}
for door in doors.values():
    door(folder)  # imports, and what is compiled once
def held():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = held() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name, files in cases.items():
    before = {file: (folder / file).read_bytes() for file in files}
    for file, data in files.items():
        (folder / file).write_bytes(base64.b64decode(data))
    write_manifest(folder)
    for door, read in doors.items():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        chain, kind, message = [], "accepted", ""
        signal.alarm(20)
        try:
            read(folder)
        except BaseException as error:
            kind, message = "refused" if isinstance(error, WinaError) else type(error).__name__, str(error)
            while error is not None:
                chain.append(f"{type(error).__name__} {error}")
                error = error.__cause__ or error.__context__
        signal.alarm(0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        short = any("MemoryError" in one or "allocate" in one or "hung" in one.lower() for one in chain)
        print(json.dumps([name, door, kind, message[:1000], grown, short]), flush=True)
    for file, data in before.items():
        (folder / file).write_bytes(data)
"""
SIZES = ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"]
SIZES += ["num_key_value_heads", "head_dim"]
ENORMOUS = [10**9, 10**12, 2**63, 10**400, 1e300, -2, -(10**12), 0]
JUST_WITHIN = [1000, 1 << 24]


def headers(data: bytes) -> dict[str, bytes]:
    """Files whose headers promise what the file does not hold."""
    header, body = header_of(data)
    name = f"{Q}.weight_t"

    def entry(**fields: Any) -> bytes:
        return with_header(header | {name: header[name] | fields}, body)

    found = {f"header of {size} bytes": with_header(header, body, size) for size in (2**62, 2**63, 2**64 - 1, 2**40, 0)}
    found |= {
        f"shape {shape}": entry(shape=shape)
        for shape in (
            [2**32, 2**32],
            [2**62, 4],
            [2**40, 2**40, 2**40],
            [2**64],
            [10**30],
            [-16, -16],
            [16, -16],
            [1e3],
        )
    }
    found |= {
        f"offsets {offsets}": entry(data_offsets=offsets)
        for offsets in (
            [0, 2**62],
            [2**62, 2**63],
            [len(body), len(body) + 1024],
            [1024, 0],
            [-1024, 0],
            [0],
            [0, 1, 2],
        )
    }
    found["enormous shape and offsets"] = entry(shape=[2**31, 2**31], data_offsets=[0, 2**64 - 4])
    found["a thousand dimensions"] = entry(shape=[1] * 1000 + [16, 16])
    found["two tensors in one place"] = with_header(header | {"twin": header[name]}, body)
    found["a tensor of nothing, enormous"] = with_header(
        header | {"void": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, body
    )
    found["no JSON"] = with_header(b"\x00" * 64, body)
    found["a list"] = with_header([], body)
    found["nested without end"] = with_header(b"[" * 50_000, body)
    found["only a length"] = (2**62).to_bytes(8, "little")
    found["nothing"] = b""
    return found


def more(number: int, value: Any) -> dict[str, Any]:
    return {f"extra_{index}": value for index in range(number)}


@pytest.fixture(scope="module")
def limited(one: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[str, str, int, bool]]]:
    """What the readers made of each case, given one gigabyte: (outcome, message, kB taken, whether it ran short)."""
    config = json.loads((one / "config.json").read_text())
    rope, block = config["rope_parameters"], config["quantization_config"]

    def changed(**fields: Any) -> dict[str, bytes]:
        return {"config.json": json.dumps(config | fields).encode()}

    cases = {f"{name} {value:.4g}" if value < 10**300 else f"{name} 1e400": changed(**{name: value})
             for name in SIZES for value in (*ENORMOUS, *JUST_WITHIN)}  # fmt: skip
    cases |= {f"{name} '{10**9}'": changed(**{name: str(10**9)}) for name in SIZES}
    cases |= {f"{name} NaN": changed(**{name: float("nan")}) for name in SIZES}
    cases |= {f"{name} Infinity": changed(**{name: float("inf")}) for name in SIZES}
    cases |= {f"num_labels {value}": changed(num_labels=value) for value in (10**9, 1 << 24)}
    cases |= {f"partial_rotary_factor {value}": changed(partial_rotary_factor=value) for value in (1e8, 1e12)}
    cases |= {
        f"rope {name} {value}": changed(rope_parameters=rope | {name: value})
        for name in ("partial_rotary_factor", "factor", "original_max_position_embeddings")
        for value in (1e8, 1e300, -1e8)
    }
    cases |= {f"rope type {name}": changed(rope_parameters={**rope, "rope_type": name, "short_factor": [1.0] * 10**4,
              "long_factor": [1.0] * 10**4}) for name in ("longrope", "yarn", "dynamic", "linear")}  # fmt: skip
    cases |= {
        "a thousand layers in a list": changed(layer_types=["full_attention"] * 10**6),
        "a grid of a million points": changed(quantization_config=block | {"grid": [k / 10**6 for k in range(10**6)]}),
        "a hundred thousand modules": changed(
            quantization_config=block | {"modules": [f"m.{k}" for k in range(10**5)]}
        ),
        "a module a hundred thousand times": changed(
            quantization_config=block | {"modules": block["modules"][:1] * 10**5}
        ),
        "a hundred thousand fields": changed(**more(10**5, 1)),
        "a number of a hundred thousand digits": {
            "config.json": b'{"model_type": "llama", "x": ' + b"9" * 10**5 + b"}"
        },
        "nested without end": {"config.json": b'{"model_type": "llama", "x": ' + b"[" * 10**6},
    }
    cases |= {name: {SINGLE: data} for name, data in headers((one / SINGLE).read_bytes()).items()}
    folder = shutil.copytree(one, tmp_path_factory.mktemp("limited") / "out")
    text = json.dumps(
        {name: {file: b64encode(data).decode() for file, data in files.items()} for name, files in cases.items()}
    )
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, folder], input=text, capture_output=True, text=True, timeout=1800, check=False
    )
    found: dict[str, dict[str, tuple[str, str, int, bool]]] = {}
    for name, door, *outcome in map(json.loads, done.stdout.splitlines()):
        found.setdefault(name, {})[door] = tuple(outcome)
    assert len(found) == len(cases), (list(cases)[len(found)], done.returncode, done.stderr[-2000:])
    return found


ACCEPTED = (
    "max_position",
    "rope factor",
    "rope original",
    "rope type",
    "a hundred thousand fields",
    "a module a hundred",
)


def test_no_reader_takes_memory_or_time_because_a_number_says_so(limited: dict[str, Any]):
    wrong = {
        f"{name}: {door}": (kind, message[:200], f"{grown // 1024} MB")
        for name, doors in limited.items()
        for door, (kind, message, grown, short) in doors.items()
        if grown > 300 * 1024 or short or kind not in ("refused", "accepted")
    }
    assert not wrong, "\n".join(f"{case}: {outcome}" for case, outcome in wrong.items())


def test_numbers_that_no_model_has_are_refused(limited: dict[str, Any]):
    accepted = {name for name, doors in limited.items() if doors["load"][0] == "accepted"}
    assert {name for name in accepted if not name.startswith(ACCEPTED)} - {"a tensor of nothing, enormous"} == set()
    refused_early = [name for name in limited if name.startswith("header of") or name.startswith("offsets")]
    assert len(refused_early) > 10
    for name in refused_early:
        assert {kind for kind, *_ in limited[name].values()} == {"refused"}
        assert all("not safetensors" in message for _, message, *_ in limited[name].values())
    for name in SIZES:
        assert f"{name} in config.json is" in limited[f"{name} 1e+12"]["inspect"][1]
