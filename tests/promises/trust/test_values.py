"""A checkpoint from a stranger: strange values are refused or do no harm."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.breaking import within
from support.commands import contents, refused, run_wina
from support.edits import edit_block, edit_config, edit_fields, edit_tensors
from support.strangers import COMMANDS, HANG, READERS, REPORT, Q, all_refuse, command, logits_of, plain
from wina_convert import load
from wina_convert.errors import CheckpointError, WinaError
from wina_convert.format.manifest import write_manifest
from wina_convert.format.names import MANIFEST
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.retarget import retarget
from wina_convert.verbs.verify import verify_folder

# --- values of the block ---

NAN, INFINITY = float("nan"), float("inf")
BAD_BLOCKS: dict[str, dict[str, Any]] = {
    **{
        f"sparsity {value!r:.12}": {"sparsity": value}
        for value in (NAN, INFINITY, -INFINITY, "0.5", True, False, 7, -1, 0.951, -1e-9, [0.5], {}, 10**400)
    },
    **{
        f"grid {value!r:.24}": {"grid": value}
        for value in (
            [], [0], None, "0, 0.5", 7, {}, [0, NAN], [NAN, 0.5], [0, INFINITY], [0, "0.5"], [0, None], [[0], [1]],
            [0, 10**400],
            [0.1, 0.5], [0, 0.5, 0.4], [0, 0.5, 0.5], [0, 1.5], [-0.1, 0.5], [k / 2000 for k in range(2000)], [0, 0.5],
        )
    },
    **{f"prefill {value!r}": {"prefill": value} for value in ("sparse", "", 7, [], {}, True, "GATED")},
    **{
        f"modules {value!r:.24}": {"modules": value}
        for value in (None, "*", 7, {}, [], [None], [7], [""], ["*"], ["model"], ["model.layers.0"], [["a"]])
    },
    **{
        f"format_version {value!r:.12}": {"format_version": value}
        for value in (3, 0, -1, "1", None, 1.5, [1], {}, 10**400)
    },
    **{f"scheme {value!r}": {"scheme": value} for value in (None, 7, [])},
    **{f"basis {value!r}": {"basis": value} for value in (None, 7, [], "pca")},
    **{f"allocation {value!r}": {"allocation": value} for value in (None, 7, [])},
    **{
        f"shares {value!r:.24}": {"shares": value, "allocation": "types"}
        for value in (
            None, 7, [], "x", {"mlp.up_proj": None}, {"mlp.up_proj": 0.5}, {"mlp.up_proj": []}, {"mlp.up_proj": [0, 0.5]},
            {"mlp.up_proj": [NAN] * 20}, {"mlp.up_proj": [0, *[10**400] * 19]}, {"mlp.up_proj": [0, *["1"] * 19]},
        )
    },
    "an unknown field": {"rotation": "hadamard"},
    "an empty unknown field": {"": None},
}  # fmt: skip


@pytest.mark.parametrize("fields", BAD_BLOCKS.values(), ids=BAD_BLOCKS)
def test_a_value_that_the_format_does_not_have_is_refused(fields: dict[str, Any], single: Path):
    edit_block(**fields)(single)
    write_manifest(single)
    all_refuse(single)
    with pytest.raises(WinaError):
        plain(single)


@pytest.mark.parametrize(
    "value", [None, [], [1], "wina", 7, {}, True, {"quant_method": "gptq"}, {"quant_method": ["wina"]}]
)
def test_a_block_that_is_none_is_refused(value: Any, single: Path):
    edit_config(quantization_config=value)(single)
    write_manifest(single)
    all_refuse(single, "not a WINA checkpoint")


@pytest.mark.parametrize("digits", ["1e999", "-1e999", "NaN", "-Infinity", "0.5e-999", "0x1", "00.5", "1" * 5000])
def test_a_sparsity_written_strangely_is_refused_or_is_a_number(digits: str, single: Path):
    text = (single / "config.json").read_text().replace('"sparsity": 0.5', f'"sparsity": {digits}')
    assert digits in text
    (single / "config.json").write_text(text)
    write_manifest(single)
    if digits == "0.5e-999":  # too small for a float: 0
        assert inspect_checkpoint(single).sparsity == 0.0
        load(str(single))
    else:
        all_refuse(single)


@pytest.mark.parametrize(
    "fields",
    [
        *({"source": value} for value in (None, [], "name", 7, {"name": None}, {"name": []}, {"name": {"a": 1}}, {})),
        *({"calibration": value} for value in (None, [], "text", 7, {"text": 10**400})),
        *({"tool_version": value} for value in (None, [], 7, "99.9.9")),
        {"sparsity": None},
        {"prefill": None},
    ],
    ids=lambda fields: repr(fields)[:40],
)
def test_what_is_only_told_of_a_checkpoint_is_refused_or_does_no_harm(fields: dict[str, Any], single: Path):
    edit_block(**fields)(single)
    write_manifest(single)
    for read in READERS.values():
        try:
            read(single)
        except WinaError:
            continue
    for name in COMMANDS:
        result = command(name, single)
        assert result.exit_code == 0 or refused(result)


def test_modules_that_repeat_are_refused_or_gated_once(single: Path, logits: Tensor):
    block = json.loads((single / "config.json").read_text())["quantization_config"]
    edit_block(modules=[*block["modules"], *block["modules"]])(single)
    write_manifest(single)
    for door in (load, plain):
        try:
            found = logits_of(door(str(single)))
        except WinaError:
            continue
        assert torch.equal(found, logits)


HELD_OUT: dict[str, Any] = {
    "sparsity": [None, "0.5", "x", NAN, INFINITY, 10**400, [], True],
    "projections": [None, [], {}, "x", 7, {Q: None}, {Q: "x"}, {Q: NAN}, {Q: 10**400}, {"other": 0.5}],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in HELD_OUT.items() for value in values],
    ids=lambda value: repr(value)[:30],
)
def test_a_strange_report_does_not_stop_an_inspection(field: str, value: Any, single: Path):
    report = json.loads((single / REPORT).read_text())
    held_out = report["verification"]["held_out"]
    if field == "projections" and isinstance(value, dict) and Q in value:
        value = held_out["projections"] | value
    held_out[field] = value
    (single / REPORT).write_text(json.dumps(report))
    for options in ((), ("--json",)):
        result = run_wina("inspect", single, *options)
        assert result.exit_code == 0 or refused(result), repr(result.exception)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "null", "{}", '{"verification": 7}', '{"verification": {"held_out": null}}', "[" * 10**5, "\xff"],
)
def test_what_is_no_report_does_not_stop_an_inspection(text: str, single: Path):
    (single / REPORT).write_bytes(text.encode("latin-1"))
    result = run_wina("inspect", single)
    assert result.exit_code == 0 or refused(result), repr(result.exception)


# --- values of the weights ---


def fill(name: str, index: int, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda stored: stored[name].view(-1)[index].fill_(value)


BAD_WEIGHTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    f"{leaf} {index} is {value}": fill(f"{Q}.{leaf}", index, value)
    for leaf, values in {
        "thresholds": (
            (-1, NAN), (-1, INFINITY), (-1, -1.0), (0, 1.0), (0, -1.0), (0, NAN), (10, 0.0), (10, NAN), (10, 1e30),
        ),
        "column_norms": ((0, NAN), (-1, INFINITY), (5, -1.0), (5, -INFINITY), (15, -1e-30)),
    }.items()
    for index, value in values
}  # fmt: skip


@pytest.mark.parametrize("edit", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_norms_and_thresholds_that_are_none_are_refused_on_load(
    edit: Callable[[dict[str, Tensor]], object], single: Path
):
    edit_tensors(edit)(single)
    for door in (load, plain):
        with pytest.raises(CheckpointError, match=f"{Q}: column norms are not finite"):
            door(str(single))
    with pytest.raises(CheckpointError, match=f"{Q}: column norms are not finite"):
        load(str(single), sparsity=0.25)
    refused(command("wina generate", single), Q)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", f"{Q}.weight_t"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.float64], ids=str)
def test_weights_of_another_kind_are_refused_or_computed_with(dtype: torch.dtype, name: str, single: Path):
    edit_tensors(lambda stored: stored.update({name: stored[name].abs().to(dtype).float()}))(single)
    same_values = logits_of(load(str(single)))
    edit_tensors(lambda stored: stored.update({name: stored[name].to(dtype)}))(single)
    write_manifest(single)
    for read in (inspect_checkpoint, verify_folder):
        with suppress(WinaError):
            read(single)
    for door in (load, plain):
        try:
            model = door(str(single))
        except WinaError:
            continue
        torch.testing.assert_close(logits_of(model), same_values, rtol=0, atol=1e-5)


def test_a_grid_of_more_points_than_a_curve_needs_is_refused(single: Path):
    curve = torch.linspace(0, 1, 1001)
    edit_tensors(
        lambda stored: stored.update({name: curve.clone() for name in stored if name.endswith(".thresholds")}),
    )(single)
    edit_block(grid=[k / 1000 for k in range(1001)])(single)
    write_manifest(single)
    all_refuse(single, "grid")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 10**9},
        {"num_return_sequences": 10**9},
        {"max_length": 10**12},
        {"temperature": "hot"},
        {"eos_token_id": "x"},
        {"top_k": -1},
        {"cache_implementation": "nosuch"},
        {"do_sample": "yes"},
    ],
    ids=str,
)
def test_a_generation_config_of_a_stranger_is_refused_or_does_no_harm(fields: dict[str, Any], single: Path):
    edit_fields("generation_config.json", **fields)(single)
    with within(HANG):
        result = command("wina generate", single)
    assert result.exit_code == 0 or refused(result), repr(result.exception)


def test_retarget_of_a_stranger_changes_four_files_alone(single: Path):
    before = contents(single.parent)
    retarget(single, 0.25)
    after = contents(single.parent)
    assert {name for name in after if before.get(name) != after[name]} == {
        f"out/{name}" for name in ("config.json", "README.md", "wina_report.json", MANIFEST)
    }
