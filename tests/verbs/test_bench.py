"""`wina bench`: what it compares, what it counts, what it prints, and what it refuses. Never how fast anything is."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import wina_convert as package
from support.commands import refused, run_wina, succeeded
from support.families import make_model
from support.folders import config_of, tensors_of, threshold_of
from wina_convert.cli.text import bench_text
from wina_convert.runtime.linear import WinaLinear, gated_modules
from wina_convert.verbs import bench, bench_models, benchmark
from wina_convert.verbs.bench import bench_model
from wina_convert.verbs.bench_products import bench_products
from wina_convert.verbs.benchmark import Benchmark, ProductSpeed, Speed

pytestmark = pytest.mark.slow

Calls = list[SimpleNamespace]
SHORT: dict[str, Any] = {"prompt_tokens": 16, "tokens": 3, "repeats": 2}
FLAGS = ("--prompt-tokens", 16, "--tokens", 3, "--repeats", 2)
PRODUCTS = ("--kernels", "--shapes", "64x32", "--repeats", 3, "--quiet")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    """Random models and working sets that take milliseconds."""
    monkeypatch.setitem(bench.RANDOM, "1b", (64, 2, 128, 4, 2, True))
    monkeypatch.setattr(bench_models, "VOCABULARY", 100)
    monkeypatch.setattr(benchmark, "WORKING_SET", 1 << 16)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every call that a benchmark makes of a loaded model, or of a copy: a copy keeps the hook."""
    seen: Calls = []

    def note(model: Any, args: tuple[()], kwargs: dict[str, Any]) -> None:
        cache = kwargs["past_key_values"]
        before = 0 if cache is None else cache.get_seq_length()
        sparsity = next((gate.sparsity for gate in gated_modules(model).values()), None)
        seen.append(SimpleNamespace(model=model, sparsity=sparsity, tokens=kwargs["input_ids"], before=before, xs={}))

    def load(*args: Any, **kwargs: Any) -> Any:
        model = package.load(*args, **kwargs)
        model.register_forward_pre_hook(note, with_kwargs=True)
        for name, gate in gated_modules(model).items():
            gate.register_forward_pre_hook(lambda gate, inputs, name=name: seen[-1].xs.update({name: inputs[0]}))
        return model

    monkeypatch.setattr(bench, "load", load)
    return seen


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with an untied head, with biases, and of Conv1D; NAME-wina is NAME, converted."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("llama", "qwen2", "gpt2"):
        source = make_model(name, folder / name)
        package.convert(str(source), folder / f"{name}-wina", samples=8, seq_len=32, basis="none")
    return folder


# --- the two models ---


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_dense_model_computes_what_the_source_and_the_gated_one_at_0_do(family: str, made: Path, calls: Calls):
    bench_model(str(made / f"{family}-wina"), sparsities=(0.5,), **SHORT)
    dense, gated = (call.model for call in calls[-2:])
    package.set_sparsity(gated, 0)
    source = AutoModelForCausalLM.from_pretrained(made / family)
    with torch.no_grad():
        found = [model(input_ids=calls[0].tokens, past_key_values=None).logits for model in (source, dense, gated)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2], found[1], rtol=1e-5, atol=1e-5)


def test_the_dense_model_has_plain_modules_and_shares_what_is_not_gated(wina_tiny: Path, calls: Calls):
    bench_model(str(wina_tiny), sparsities=(0.5,), **SHORT)
    dense, gated = (call.model for call in calls[-2:])
    assert {type(dense.get_submodule(name)) for name in (*gated_modules(gated), "lm_head")} == {nn.Linear}
    assert dense.config._attn_implementation == "sdpa"
    table = gated.get_input_embeddings().weight
    assert dense.get_input_embeddings().weight is dense.lm_head.weight is table


def test_the_gated_model_is_as_it_was_loaded(wina_tiny: Path, calls: Calls):
    bench_model(str(wina_tiny), sparsities=(0.0, 0.5), **SHORT)
    used, fresh = calls[-1].model, package.load(str(wina_tiny), sparsity=0.5)
    assert [type(module) for module in used.modules()] == [type(module) for module in fresh.modules()]
    assert used.config._attn_implementation == fresh.config._attn_implementation
    before, after = ({**dict(model.named_parameters()), **dict(model.named_buffers())} for model in (fresh, used))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_the_models_take_turns_with_the_same_tokens_and_each_its_own_cache(wina_tiny: Path, calls: Calls):
    assert bench_model(str(wina_tiny), sparsities=(0.5, 0.25), **SHORT).interleaved
    timed = calls[-15:]
    assert [call.sparsity for call in timed] == [None, 0.5, 0.25] * 5
    assert [call.before for call in timed] == [0] * 6 + [16] * 3 + [17] * 3 + [18] * 3
    assert [call.tokens.shape for call in timed] == [(1, 16)] * 6 + [(1, 1)] * 9
    for turn in range(0, 15, 3):
        assert all(torch.equal(call.tokens, timed[turn].tokens) for call in timed[turn : turn + 3])


def test_where_memory_is_short_the_dense_model_is_last(wina_tiny: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch):
    weights = sum(tensor.nbytes for name, tensor in tensors_of(wina_tiny).items() if name.endswith(".weight_t"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=weights))
    measured = bench_model(str(wina_tiny), sparsities=(0.5, 0.25), **SHORT)
    assert not measured.interleaved
    assert "one after the other" in bench_text(measured)
    assert [row.sparsity for row in measured.models] == [None, 0.5, 0.25]
    assert min(seconds for row in measured.models for seconds in (row.prefill_seconds, row.decode_seconds)) > 0
    assert [call.sparsity for call in calls[-15:]] == [0.5, 0.25] * 5 + [None] * 5
    assert len({id(call.model) for call in calls}) == 1
    assert not [module for module in calls[-1].model.modules() if isinstance(module, WinaLinear)]


# --- what is counted ---


@pytest.mark.parametrize(
    ("family", "table"),
    [("llama", "model.embed_tokens.weight"), ("qwen2", None), ("gpt2", "transformer.wpe.weight")],
)
def test_a_token_reads_all_tensors_but_lookups_and_the_cutoffs(family: str, table: str | None, made: Path):
    expected = sum(tensor.nbytes for name, tensor in tensors_of(made / family).items() if name != table)
    gated = [tensor for name, tensor in tensors_of(made / f"{family}-wina").items() if name.endswith(".weight_t")]
    cutoffs, weights = sum(4 * tensor.shape[0] for tensor in gated), sum(tensor.nbytes for tensor in gated)
    dense, at_0, at_half = bench_model(str(made / f"{family}-wina"), sparsities=(0.0, 0.5), **SHORT).models
    assert dense.bytes_per_token == expected
    assert at_0.bytes_per_token == pytest.approx(expected + cutoffs - at_0.achieved * weights, abs=1)
    assert at_half.bytes_per_token == pytest.approx(expected + cutoffs - at_half.achieved * weights, abs=1)
    assert at_0.achieved < (0.01 if family == "gpt2" else 1e-9)  # GELU makes zeros
    assert at_half.achieved == pytest.approx(0.5, abs=0.1)


def test_the_skipped_fraction_is_that_of_the_tokens_that_are_timed(wina_tiny: Path, calls: Calls):
    measured = bench_model(str(wina_tiny), sparsities=(0.5,), prompt_tokens=32, tokens=bench.COUNTED, repeats=1)
    stored = tensors_of(wina_tiny)
    decoded = [call for call in calls if call.before and call.sparsity]
    assert len(decoded) == 2 * bench.COUNTED  # counted, then timed
    for half in (decoded[: bench.COUNTED], decoded[bench.COUNTED :]):
        skipped = weights = 0
        for name, x in ((name, x) for call in half for name, x in call.xs.items()):
            weight, threshold = stored[f"{name}.weight_t"], threshold_of(wina_tiny, stored[f"{name}.thresholds"], 0.5)
            skipped += int((x.abs() * weight.norm(dim=1) <= threshold).sum()) * weight.shape[1]
            weights += weight.numel()
        assert measured.models[1].achieved == pytest.approx(skipped / weights, abs=1e-4)


@pytest.mark.parametrize("asked", [(0.0, 0.5, 0.65), (0.65, 0.0), (0.9,), (0.52,), (0.33, 0.78)], ids=str)
def test_a_random_model_skips_about_what_is_asked(asked: tuple[float, ...]):
    rows = bench_model(random="1b", sparsities=asked, dtype="float32", **{**SHORT, "prompt_tokens": 64}).models
    assert [row.sparsity for row in rows] == [None, *asked]
    assert rows[0].achieved is None
    for row in rows[1:]:
        assert row.achieved == (pytest.approx(row.sparsity, abs=0.1) if row.sparsity else 0)


def test_the_dtype_is_the_stored_one_or_the_chosen_one(wina_tiny: Path):
    stored, halved = (bench_model(str(wina_tiny), dtype=dtype, **SHORT) for dtype in ("auto", "bfloat16"))
    assert stored.model == f"{wina_tiny.name}, float32, prompt of 16 tokens"
    assert halved.model == f"{wina_tiny.name}, bfloat16, prompt of 16 tokens"
    assert stored.models[0].bytes_per_token == 2 * halved.models[0].bytes_per_token


def test_the_name_is_that_of_the_folder_from_inside_it_too(wina_tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(wina_tiny)
    assert bench_model(".", sparsities=(), **SHORT).model.startswith(f"{wina_tiny.name}, ")


def test_each_row_agrees_with_itself_and_the_dense_one():
    measured = bench_model(random="1b", sparsities=(0.5, 0.0, 0.5, 0), **SHORT)
    dense = measured.models[0]
    assert [row.sparsity for row in measured.models] == [None, 0.5, 0.0]
    for row in measured.models:
        assert min(row.prefill_seconds, row.decode_seconds, row.roofline) > 0
        assert row.prefill_ratio == pytest.approx(dense.prefill_seconds / row.prefill_seconds)
        assert row.ratio == pytest.approx(dense.decode_seconds / row.decode_seconds)
        assert row.tokens_per_second == pytest.approx(1 / row.decode_seconds)
        assert row.roofline * row.decode_seconds * measured.bandwidth == pytest.approx(row.bytes_per_token)


@pytest.mark.parametrize(("prompt", "tokens"), [(127, 1), (1, 127)])
def test_the_whole_context_can_be_used(prompt: int, tokens: int, made: Path):
    folder = made / "gpt2-wina"  # it cannot compute one position more
    assert config_of(folder)["n_positions"] == prompt + tokens
    assert bench_model(str(folder), prompt_tokens=prompt, tokens=tokens, repeats=1, sparsities=(0.5,)).models


def test_the_prompt_is_as_long_as_the_context_allows(wina_tiny: Path, calls: Calls):
    measured = bench_model(str(wina_tiny), tokens=3, repeats=1, sparsities=(0.5,))
    assert "prompt of 253 tokens" in measured.model  # of a context of 256
    assert max(call.tokens.shape[1] for call in calls) == 253


# --- single products ---


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_a_product_reads_what_its_shape_and_sparsity_say(dtype: str, itemsize: int):
    rows = bench_products([(64, 32), (512, 16)], sparsities=(0.0, 0.5, 0.5), dtype=dtype, repeats=3).products
    keys = [(row.in_features, row.out_features, row.sparsity) for row in rows]
    assert keys == [(*shape, sparsity) for shape in ((64, 32), (512, 16)) for sparsity in (None, 0.0, 0.5)]
    for first in (0, 3):
        dense = rows[first]
        nbytes = dense.in_features * dense.out_features * itemsize
        for row, kept in zip(rows[first : first + 3], (1, 1, 0.5), strict=True):
            assert row.seconds > 0
            assert row.bandwidth * row.seconds == pytest.approx(kept * nbytes, rel=0.05 if kept < 1 else 1e-6)
            assert row.ratio == pytest.approx(dense.seconds / row.seconds)
            assert row.bandwidth / row.roofline == pytest.approx(dense.bandwidth / dense.roofline)


def test_a_shape_given_twice_is_compared_with_its_own_dense_product():
    rows = bench_products([(64, 64), (64, 64)], sparsities=(0.5,), repeats=3).products
    assert {row.ratio for row in rows if row.sparsity is None} == {1}


@pytest.mark.parametrize("compiles", [True, False])
def test_a_shape_of_odd_numbers_is_timed_with_and_without_a_compiler(compiles: bool, monkeypatch: pytest.MonkeyPatch):
    if not compiles:
        monkeypatch.setattr(benchmark.cpu, "compiled", lambda dtype: None)
    assert len(bench_products([(3, 5)], repeats=2).products) == 4


# --- the command ---


def test_json_holds_the_measurements_and_nothing_else(wina_tiny: Path):
    result = run_wina("bench", wina_tiny, *FLAGS, "--sparsity", "0.5,0.25", "--json", "--quiet")
    succeeded(result)
    found = json.loads(result.stdout)
    assert found.keys() == {"machine", "date", "model", "bandwidth", "interleaved", "models", "products"}
    assert [row["sparsity"] for row in found["models"]] == [None, 0.5, 0.25]
    assert found["products"] == []
    seconds = {"prefill_seconds", "prefill_ratio", "decode_seconds", "tokens_per_second", "ratio"}
    assert found["models"][0].keys() == {"sparsity", "achieved", "bytes_per_token", "roofline"} | seconds
    assert result.stderr == ""


def test_text_has_a_row_for_each_sparsity_and_progress_reaches_its_total():
    result = run_wina("bench", "--random", "1b", *FLAGS)
    succeeded(result)
    assert result.stdout.startswith("random 1b, bfloat16, prompt of 16 tokens; ")
    assert re.findall(r"^(dense|\d+%) .*\dx$", result.stdout, re.MULTILINE) == ["dense", "0%", "50%", "65%"]
    assert result.stderr.splitlines()[-1].startswith("Timing: 20 of 20 calls, ")


def test_single_products_are_those_of_the_shapes(monkeypatch: pytest.MonkeyPatch):
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    options = ("bench", *PRODUCTS, "--shapes", "32x48,16x8", "--sparsity", "0.5", "--threads", 3)
    found = json.loads(run_wina(*options, "--json").stdout)
    assert threads == [3]
    assert (found["model"], found["models"]) == ("single products, bfloat16", [])
    keys = {"in_features", "out_features", "sparsity", "seconds", "ratio", "bandwidth", "roofline"}
    assert [row.keys() for row in found["products"]] == [keys] * 6
    shapes = ["64x32", "64x32", "32x48", "32x48", "16x8", "16x8"]
    assert [f"{row['in_features']}x{row['out_features']}" for row in found["products"]] == shapes
    text = run_wina(*options, "--dtype", "float32").stdout
    assert text.startswith("single products, float32; ")
    rows = re.findall(r"^(\d+x\d+) +(dense|\d+%) .*\d%$", text, re.MULTILINE)
    assert rows == list(zip(shapes, ["dense", "50%"] * 3, strict=True))


def test_the_tables_show_the_numbers_in_the_units_of_their_heads():
    row = Speed(0.5, 0.4321, 1.25, 0.8, 0.0625, 16.0, 1.75, 123_000_000, 0.66)
    text = bench_text(Benchmark("cpu", "2026-01-31", "a model", 10e9, True, models=(row,)))
    assert text.startswith("a model; cpu; 2026-01-31\nmemory is read at 10.0 GB/s\n\nsparsity ")
    assert text.splitlines()[-1].split() == ["50%", "43.2%", "62.5", "16.0", "1.75x", "123", "66%", "1.25", "0.80x"]
    product = ProductSpeed(64, 32, None, 0.0015, 1.0, 5e9, 0.5)
    text = bench_text(Benchmark("cpu", "2026-01-31", "products", 10e9, True, products=(product,)))
    assert text.splitlines()[-1].split() == ["64x32", "dense", "1.500", "1.00x", "5.0", "50%"]


# --- what is refused ---

REFUSED: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "neither": ((), ("checkpoint", "random", "0.6b, 1b, 3b, 8b")),
    "both": (("DIR", "--random", "1b"), ("either", "0.6b, 1b, 3b, 8b")),
    "size": (("--random", "9z"), ("'9z'", "0.6b, 1b, 3b, 8b")),
    "kernels and DIR": (("DIR", "--kernels"), ("--kernels", "neither DIR nor --random")),
    "kernels and random": (("--random", "1b", "--kernels"), ("--kernels", "neither DIR nor --random")),
    **{
        f"shape {shape!a}": (("--kernels", "--shapes", shape), ("--shapes", repr(shape), "4096x14336"))
        for shape in ("64", "64x", "x64", "axb", "64x64x64", "-1x5", "6.5x5", "²x3")
    },
    "shape of 0": (("--kernels", "--shapes", "0x5"), ("(0, 5)", "at least 1")),
    "sparsity abc": (("DIR", "--sparsity", "abc"), ("--sparsity", "abc")),
    "sparsity 2": (("DIR", "--sparsity", "0.5,2"), ("sparsity is 2.0", "between 0 and 0.95")),
    "sparsity nan": (("--kernels", "--sparsity", "nan"), ("sparsity is nan", "between 0 and 0.95")),
    "context": (("DIR", "--prompt-tokens", 254, "--tokens", 3), ("254", "context of 256")),
    "prompt 0": (("DIR", "--prompt-tokens", 0), ("prompt tokens is 0", "at least 1")),
    "tokens 0": (("--random", "1b", "--tokens", 0), ("tokens is 0", "at least 1")),
    "repeats 0": (("DIR", *FLAGS, "--quiet", "--repeats", 0), ("repeats is 0", "at least 1")),
    "repeats of products": ((*PRODUCTS, "--repeats", 0), ("repeats is 0", "at least 1")),
    "threads 0": (("DIR", "--threads", 0), ("--threads", "0")),
    "dtype": (("DIR", "--dtype", "int3"), ("dtype is 'int3'", "auto, float32, bfloat16, float16")),
    "dtype of products": (("--kernels", "--dtype", "int3"), ("dtype is 'int3'", "float32, bfloat16, float16")),
    "not a folder": (("./nosuch",), ("nosuch",)),
    "not converted": (("SOURCE",), ("wina-lab-tiny is not a WINA checkpoint",)),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_use_is_refused(options: tuple[object, ...], words: tuple[str, ...], wina_tiny: Path, tiny: Path):
    folders = {"DIR": wina_tiny, "SOURCE": tiny}
    refused(run_wina("bench", *(folders.get(str(option), option) for option in options)), *words)
