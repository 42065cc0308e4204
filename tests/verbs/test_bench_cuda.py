"""`wina bench --device cuda` without a card: what it compares and prints. Events and graphs have stand-ins on the CPU."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel

from support.commands import refused, run_wina, succeeded
from wina_convert.cli.text import card_text
from wina_convert.runtime.linear import gated_modules
from wina_convert.verbs import bench, bench_cuda, bench_models, card
from wina_convert.verbs.bench_cuda_products import bench_cuda_products
from wina_convert.verbs.benchmark import ProductSpeed
from wina_convert.verbs.card import CardBenchmark, CardSpeed

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"prompt_tokens": 16, "tokens": 4, "repeats": 2}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A card whose every event is a second after the one before, and whose memory is read at 1 GB/s."""
    clock = SimpleNamespace(now=0.0, free=1 << 40)

    def event() -> float:
        clock.now += 1
        return float(clock.now)

    def captured(calls: Any) -> Any:
        calls()
        return calls

    for name, stand_in in {
        "use": lambda device: None,
        "card_name": lambda device: "a card",
        "free_bytes": lambda device: clock.free,
        "bandwidths": lambda device: (1e9, 2e9),
        "captured": captured,
        "event": event,
        "elapsed": lambda begin, end: end - begin,
    }.items():
        monkeypatch.setattr(card, name, stand_in)
    monkeypatch.setitem(bench.RANDOM, "1b", (64, 2, 128, 4, 2, True))
    monkeypatch.setattr(bench_models, "VOCABULARY", 100)
    return clock


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float | None, int]]:
    """Each step that would be compiled: of which kind of model, at which sparsity, from which place in the cache on."""
    seen: list[tuple[str, float | None, int]] = []

    def compiled(model: Any, config: Any) -> Any:
        gates = list(gated_modules(model).values())

        def step(**arguments: Any) -> Any:
            before = int(arguments["past_key_values"].get_seq_length())
            seen.append(("gated" if gates else "dense", gates[0].sparsity if gates else None, before))
            assert arguments["input_ids"].shape == (1, 1)
            return model(**arguments)

        return step

    def static(model: Any, arguments: Any, config: Any) -> bool:
        return not config.disable_compile and config.cache_implementation == "static"

    monkeypatch.setattr(PreTrainedModel, "get_compiled_call", compiled)
    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", static)
    return seen


def test_the_models_take_turns_and_steps_begin_at_the_start_of_the_cache(calls: list[Any]):
    measured = bench_cuda.bench_cuda(CPU, random="1b", sparsities=(0.5, 0.0, 0.5), **SHORT)
    assert measured.interleaved
    assert [row.sparsity for row in measured.models] == [None, 0.5, 0.0]
    turn = [*range(16, 20), *range(4)]  # `generate` after the prompt, then the steps
    kinds = [("dense", None), ("gated", 0.5), ("gated", 0.0)]
    assert calls == [(*kind, before) for _ in range(3) for kind in kinds for before in turn]


def test_a_row_agrees_with_its_times_and_loads():
    dense, half = bench_cuda.bench_cuda(CPU, random="1b", sparsities=(0.5,), **SHORT).models
    assert (dense.achieved, dense.step_ratio, dense.generate_ratio, dense.eager_ratio) == (None, 1, 1, 1)
    assert half.achieved == pytest.approx(0.5, abs=0.1)
    assert half.bytes_per_token < dense.bytes_per_token
    for row in (dense, half):
        assert row.step_seconds == 0.25  # four steps between two events
        assert row.generate_seconds == row.eager_seconds == 1  # an event for each token
        assert row.roofline == pytest.approx(row.bytes_per_token / 1e9 / 0.25)


def test_where_the_cards_memory_is_short_the_dense_model_is_last(calls: list[Any], clock: SimpleNamespace):
    clock.free = 0
    measured = bench_cuda.bench_cuda(CPU, random="1b", sparsities=(0.5,), **SHORT)
    assert not measured.interleaved
    assert [row.sparsity for row in measured.models] == [None, 0.5]
    assert [call[0] for call in calls] == ["gated"] * 24 + ["dense"] * 24
    assert "one after the other" in card_text(measured)


def test_a_checkpoint_is_timed_as_it_was_loaded(wina_tiny: Path, calls: list[Any]):
    measured = bench_cuda.bench_cuda(CPU, str(wina_tiny), sparsities=(0.25,), **SHORT)
    assert measured.model == f"{wina_tiny.name}, float32, prompt of 16 tokens"
    assert {call[:2] for call in calls} == {("dense", None), ("gated", 0.25)}


def test_a_random_model_is_grouped_as_a_loaded_one():
    model = bench_models.random_model("1b", "float32")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.siblings == (attention.k_proj, attention.v_proj)
    assert model.model.layers[1].mlp.gate_proj.siblings == (model.model.layers[1].mlp.up_proj,)


def test_a_product_reads_what_its_shape_and_sparsity_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(card, "CACHED", 3 * 64 * 32 * 4)  # four copies of the first shape, a second together
    rows = bench_cuda_products(CPU, [(64, 32), (64, 96)], sparsities=(0.0, 0.5), dtype="float32", repeats=3).products
    keys = [(row.in_features, row.out_features, row.sparsity) for row in rows]
    assert keys == [(64, out, sparsity) for out in (32, 96) for sparsity in (None, 0.0, 0.5)]
    for row, nbytes in zip(rows, [8192, 8192, 4096, 24576, 24576, 12288], strict=True):
        assert row.seconds == (0.25 if row.out_features == 32 else 0.5)
        assert row.ratio == 1
        assert row.bandwidth == pytest.approx(nbytes / row.seconds, rel=0.05)
        assert row.roofline == pytest.approx(row.bandwidth / 1e9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_command_times_products_of_the_shapes(dtype: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wina_convert.models.device.choose_device", lambda device: torch.device("meta"))
    monkeypatch.setattr("wina_convert.verbs.bench_cuda_products.bench_cuda_products", on_the_cpu(bench_cuda_products))
    options = ("--kernels", "--device", "cuda", "--shapes", "64x32", "--sparsity", "0.5", "--dtype", dtype, "--quiet")
    text = run_wina("bench", *options, "--repeats", 2).stdout
    assert text.startswith(f"single products, {dtype}; a card; ")
    assert "memory is read at 1 GB/s and copied at 2 GB/s" in text
    assert re.findall(r"^(\d+x\d+) +(dense|\d+%) .*\d%$", text, re.MULTILINE) == [("64x32", "dense"), ("64x32", "50%")]


def test_the_command_times_a_model_and_json_holds_the_measurements(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wina_convert.models.device.choose_device", lambda device: torch.device("meta"))
    monkeypatch.setattr(bench_cuda, "bench_cuda", on_the_cpu(bench_cuda.bench_cuda))
    options = ("--device", "cuda", "--prompt-tokens", 16, "--tokens", 3, "--repeats", 1, "--sparsity", "0.5")
    result = run_wina("bench", "--random", "1b", *options, "--json")
    succeeded(result)
    found = json.loads(result.stdout)
    names = {"card", "date", "model", "read_bandwidth", "copy_bandwidth", "interleaved", "models", "products"}
    assert found.keys() == names
    assert [row["sparsity"] for row in found["models"]] == [None, 0.5]
    assert result.stderr.splitlines()[-1].startswith("Timing: 4 of 4 turns, ")


def on_the_cpu(measure: Any) -> Any:
    return lambda device, *args, **options: measure(CPU, *args, **options)


def test_the_tables_show_the_numbers_in_the_units_of_their_heads():
    row = CardSpeed(0.5, 0.4321, 0.00625, 1.75, 0.008, 1.5, 0.03, 0.9, 123_000_000, 0.66)
    text = card_text(CardBenchmark("a card", "2026-01-31", "a model", 3e12, 2.5e12, True, models=(row,)))
    head = "a model; a card; 2026-01-31\nmemory is read at 3000 GB/s and copied at 2500 GB/s\n\nsparsity "
    assert text.startswith(head)
    cells = ["50%", "43.2%", "6.25", "1.75x", "123", "66%", "8.00", "1.50x", "30.00", "0.90x"]
    assert text.splitlines()[-1].split() == cells
    product = ProductSpeed(64, 32, None, 0.0000015, 1.0, 5e11, 0.5)
    text = card_text(CardBenchmark("a card", "2026-01-31", "products", 1e12, 1e12, True, products=(product,)))
    assert text.splitlines()[-1].split() == ["64x32", "dense", "1.5", "1.00x", "500.0", "50%"]


def test_a_device_that_is_not_here_or_no_card_is_refused(monkeypatch: pytest.MonkeyPatch):
    refused(run_wina("bench", "--random", "1b", "--device", "meta"), "meta", "cpu or cuda")
    refused(run_wina("bench", "--kernels", "--device", "nosuch"), "nosuch", "cpu or cuda")
    monkeypatch.undo()
    monkeypatch.setattr("wina_convert.models.device.choose_device", lambda device: torch.device("meta"))
    for options in (("--kernels",), ("--random", "1b")):
        refused(run_wina("bench", *options, "--device", "xpu"), "no benchmark", "cpu or cuda")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ("either", "0.6b, 1b, 3b, 8b")),
        ({"random": "9z"}, ("'9z'", "0.6b, 1b, 3b, 8b")),
        ({"random": "1b", "tokens": 0}, ("tokens is 0", "at least 1")),
        ({"random": "1b", "dtype": "int3"}, ("dtype is 'int3'",)),
        ({"random": "1b", "sparsities": (2.0,)}, ("sparsity is 2.0",)),
    ],
    ids=str,
)
def test_bad_use_is_refused(options: dict[str, Any], words: tuple[str, ...]):
    with pytest.raises(card.OptionError) as error:
        bench_cuda.bench_cuda(CPU, **options)
    assert all(word in str(error.value) for word in words)
