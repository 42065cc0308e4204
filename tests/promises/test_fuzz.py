"""Damaged checkpoints by the hundred; `python tests/support/fuzzing --cases 20000 --seed N` is the long run."""

import json
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.folders import files_of
from support.fuzzing import cases as fuzzing
from support.fuzzing.cases import Bench, Case, CaseError, make_bench, make_case, run_case
from support.fuzzing.mutations import mutated
from wina_convert.errors import CheckpointError
from wina_convert.format.names import MANIFEST

SEED = 0
CASES = 500
AT_A_TIME = 50
NOTHING = Case((), False, {})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module", autouse=True)
def limited(bench: Bench) -> Iterator[None]:
    """A case that wants more than some gigabytes fails instead of holding up the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (fuzzing.address_space() + 4 * fuzzing.MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("start", range(0, CASES, AT_A_TIME))
def test_a_damaged_checkpoint_is_refused_or_does_what_its_files_say(start: int, bench: Bench):
    outcomes, failures = fuzzing.run(bench, SEED, range(start, start + AT_A_TIME), lambda text: None)
    assert outcomes.total() == AT_A_TIME
    assert not failures, "\n".join(failures)
    assert files_of(bench.folder) == bench.files


# --- the harness finds what it is there to find ---


def test_the_original_passes(bench: Bench):
    assert run_case(bench, NOTHING) == "inspect accepted, verify accepted, load: the same logits"
    sealed = Case((), True, {})
    assert run_case(bench, sealed) == "inspect accepted, verify accepted, load: the same logits"


def test_cases_are_the_same_every_time_and_of_many_kinds(bench: Bench):
    cases = [make_case(bench, SEED, number) for number in range(CASES)]
    assert cases == [make_case(bench, SEED, number) for number in range(CASES)]
    assert cases[:50] != [make_case(bench, SEED + 1, number) for number in range(50)]
    changed = {name for case in cases for name in case.files}
    assert changed >= {name for name in bench.files if name != "generation_config.json"} | {"model.safetensors"}
    assert {len(case.mutations) for case in cases} == {1, 2, 3}
    assert 0.3 < sum(case.sealed for case in cases) / CASES < 0.6
    assert sum(not case.files for case in cases) < CASES / 10
    words = " ".join(word for case in cases for word in case.mutations)
    actions = ["delete", "replace", "tweak", "elsewhere", "add", "rename", "cut off", "place", "leave out", "make up"]
    actions += [
        f"header, {action}" for action in ("dtype", "shape", "swap", "offsets", "name", "twice", "length", "json")
    ]
    assert [action for action in actions if action not in words] == []


def test_every_depth_of_a_json_value_is_mutated():
    value = {"a": 1, "b": {"c": [1, 2, {"d": "x"}]}}
    before = json.dumps(value)
    found = {json.dumps(mutated(value, random.Random(number))[0]) for number in range(2000)}
    assert json.dumps(value) == before
    assert len(found) > 300
    parsed = [json.loads(text) for text in found]
    assert any(isinstance(new, dict) and "a" not in new for new in parsed)
    assert any(isinstance(new, dict) and new.get("a") == 1 and "b" in new and new["b"] != value["b"] for new in parsed)
    assert any('{"d": 1}' in text or '"d": ["x"]' in text for text in found)


def config(bench: Bench, **fields: Any) -> dict[str, bytes]:
    return {"config.json": json.dumps(json.loads(bench.files["config.json"]) | fields).encode()}


def block(bench: Bench, **fields: Any) -> dict[str, bytes]:
    stored = json.loads(bench.files["config.json"])["quantization_config"]
    return config(bench, quantization_config=stored | fields)


def test_a_function_that_the_files_changed_is_that_of_plain_transformers(bench: Bench):
    rope = json.loads(bench.files["config.json"])["rope_parameters"]
    for files in (
        config(bench, rms_norm_eps=0.5),
        config(bench, hidden_act="gelu"),
        config(bench, rope_parameters=rope | {"rope_theta": 7.0}),
        block(bench, sparsity=0.8),
        block(bench, sparsity=None),
        block(bench, prefill="dense"),
    ):
        assert run_case(bench, Case((), True, files)).endswith("load: other logits, those of plain transformers")


def test_a_reader_that_raises_something_else_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    for door in ("inspect_checkpoint", "verify_folder", "load"):
        with monkeypatch.context() as context:
            context.setattr(fuzzing, door, lambda *args, **options: {}["x"])
            with pytest.raises(CaseError, match="KeyError"):
                run_case(bench, NOTHING)


def test_a_reader_that_refuses_everything_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def refuse(folder: Path) -> int:
        raise CheckpointError("no")

    monkeypatch.setattr(fuzzing, "verify_folder", refuse)
    with pytest.raises(CaseError, match="refused the original: no"):
        run_case(bench, NOTHING)


def test_a_verification_that_accepts_everything_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuzzing, "verify_folder", lambda folder: 1)
    run_case(bench, NOTHING)
    with pytest.raises(CaseError, match="accepted what was changed"):
        run_case(bench, Case((), False, {"wina_report.json": b"{}"}))


@pytest.mark.parametrize("change", ["weights", "norms", "thresholds", "sparsity"])
def test_a_loaded_model_that_is_not_what_the_files_say_fails(
    change: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    load = fuzzing.load

    def wrong(folder: str, **options: Any) -> Any:
        model = load(folder, **options)
        gate = model.model.layers[1].mlp.down_proj
        with torch.no_grad():
            if change == "weights":
                gate.weight_t.mul_(1.01)
            elif change == "norms":
                gate.column_norms.mul_(1.5)
            elif change == "thresholds":
                gate.thresholds.mul_(1.5)
        gate.set_sparsity(0.7 if change == "sparsity" else gate.sparsity)
        return model

    monkeypatch.setattr(fuzzing, "load", wrong)
    with pytest.raises(CaseError, match="wrong logits"):
        run_case(bench, NOTHING)


def test_a_reader_without_end_or_measure_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 1)
    with pytest.raises(CaseError, match="no end after 1 seconds"):
        fuzzing.attempt("load", lambda: time.sleep(60))
    with pytest.raises(CaseError, match="ran out of memory"):
        fuzzing.attempt("load", out_of_memory)
    monkeypatch.setattr(fuzzing, "MEMORY", -1)
    with pytest.raises(CaseError, match="took 0 MB"):
        fuzzing.attempt("load", lambda: None)


def out_of_memory() -> None:
    try:
        bytearray(1 << 50)
    except MemoryError as error:
        raise CheckpointError("cannot be loaded") from error


def test_a_case_restores_the_folder_whatever_happens(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fuzzing, "inspect_checkpoint", stop)
    for sealed in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run_case(bench, Case((), sealed, {"config.json": b"{}", "wina_report.json": b""}))
        assert files_of(bench.folder) == bench.files
    assert MANIFEST in bench.files
