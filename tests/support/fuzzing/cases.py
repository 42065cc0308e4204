"""Damaged checkpoints, and what reading one has to end in."""

import dataclasses
import json
import random
import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from support.breaking import Hung, within
from support.commands import run_wina
from support.families import make_model
from support.folders import threshold_of
from support.fuzzing.mutations import CONFIG, INDEX, MUTATIONS, Files, shards
from wina_convert import convert, load
from wina_convert.errors import WinaError
from wina_convert.format.manifest import write_manifest
from wina_convert.format.names import MANIFEST
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.verify import verify_folder

TOKENS = torch.tensor([[0, 310, 7, 1999]])
SECONDS = 30
MEMORY = 1 << 30  # bytes that a case may add to the largest before
TOLERANCE = 1e-3  # of logits, relative to the largest: sums in another order


class CaseError(AssertionError):
    """A case that did not end as it has to."""


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
        basis="none",
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


def address_space() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
