"""`wina verify`: right hashes over wrong content are told, tensor by tensor."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.commands import contents, refused, run_wina, succeeded
from support.edits import Change, edit_block, edit_config, edit_json, edit_tensor, edit_tensors
from support.folders import config_of, entries
from wina_convert import load
from wina_convert.errors import WinaError
from wina_convert.format.manifest import write_manifest
from wina_convert.verbs.verify import verify_folder

MODEL = "kilobytes in shards"  # see support/shared.py


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
OTHER = "model.layers.2.mlp.down_proj"  # of a layer that the model does not have


# --- the command ---


def test_the_command_says_in_one_line_that_all_is_well(converted: Path):
    before = contents(converted)
    result = run_wina("verify", converted)
    succeeded(result)
    assert result.stdout == f"{converted}: {len(entries(converted))} files are as they were written\n"
    assert all(line.startswith("Verifying ") for line in result.stderr.splitlines())
    quiet = run_wina("verify", converted, "--quiet")
    succeeded(quiet)
    assert quiet.output == ""
    assert contents(converted) == before


def test_the_command_says_in_one_line_what_is_damaged(copied: Path):
    path = min(copied.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = contents(copied)
    refused(run_wina("verify", copied, "--quiet"), str(path), "was changed since the conversion", "get it again")
    shown = run_wina("verify", copied)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert [line for line in shown.stderr.splitlines() if not line.startswith("Verifying ")] == [
        f"error: {path} was changed since the conversion; get it again: it holds weights, so it is damaged"
    ]
    assert contents(copied) == before


def test_a_folder_of_something_else_is_refused_before_all_of_it_is_looked_at(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")  # what a look at every file would meet
    refused(run_wina("verify", tmp_path), str(tmp_path), "has no config.json")
    refused(run_wina("verify", tmp_path / "none"), f"there is no folder {tmp_path / 'none'}")


EDITS: dict[str, Callable[[Path], object]] = {
    "README.md": lambda folder: (folder / "README.md").write_text("our own words"),
    "LICENSE": lambda folder: (folder / "LICENSE").unlink(),
    "docs/more.md": lambda folder: (folder / "docs" / "more.md").write_text("more"),
    "config.json": edit_config(pad_token_id=3),
}


@pytest.mark.parametrize(("name", "edit"), EDITS.items(), ids=EDITS)
def test_a_file_that_was_edited_is_signed_when_it_is_accepted(name: str, edit: Change, copied: Path):
    edit(copied)
    before = contents(copied)
    refused(run_wina("verify", copied, "--quiet"), name, f"wina verify {copied} --accept")
    assert contents(copied) == before
    accepted = run_wina("verify", copied, "--accept", "--json", "--quiet")
    succeeded(accepted)
    assert json.loads(accepted.stdout)["accepted"] == [name]
    assert {file for file, data in contents(copied).items() if before.get(file) != data} == {"wina_manifest.json"}
    assert verify_folder(copied).accepted == ()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a weight": lambda folder: edit_tensor(f"{Q}.weight_t", lambda weight: weight + 1)(folder),
    "a shard is gone": lambda folder: min(folder.glob("*.safetensors")).unlink(),
    "the index": edit_json("model.safetensors.index.json", lambda index: index.update(more=1)),
    "a config that does not fit": lambda folder: edit_config(hidden_size=32)(folder),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_not_accepted(damage: Change, copied: Path):
    damage(copied)
    before = contents(copied)
    line = refused(run_wina("verify", copied, "--accept", "--quiet"))
    assert "--accept" not in line
    assert contents(copied) == before


def test_a_copy_that_was_saved_again_is_told_as_such_and_a_lost_manifest_is_not(copied: Path, tmp_path: Path):
    load(copied).save_pretrained(tmp_path / "saved")
    line = refused(run_wina("verify", tmp_path / "saved"), "saved again", "save_pretrained", "wina-convert wrote")
    assert f"a WINA checkpoint of {config_of(copied)['quantization_config']['source']['name']}" in line
    (copied / "wina_manifest.json").unlink()
    assert "saved again" not in refused(
        run_wina("verify", copied), str(copied), "no wina_manifest.json", "get it again"
    )
    (tmp_path / "saved" / "config.json").unlink()
    assert "saved again" not in refused(run_wina("verify", tmp_path / "saved"), "config.json")


def test_a_checkpoint_that_was_saved_over_is_told_as_such(copied: Path):
    load(copied).save_pretrained(copied)  # three weight files become one
    (copied / "model.safetensors.index.json").unlink(missing_ok=True)
    for options in ((), ("--accept",)):
        line = refused(run_wina("verify", copied, "--quiet", *options), str(copied), "saved again", "other files")
        assert "--accept" not in line


# --- right hashes, wrong content ---


def nth(tensor: Tensor, index: int, value: float) -> None:
    tensor.view(-1)[index] = value


def scaled(curve: Tensor) -> Tensor:
    """An ascending curve from 0 that calibration did not find."""
    return curve * 1.01


def without_report_threshold(report: dict[str, Any]) -> None:
    del report["verification"]["thresholds"][DOWN]


def other_report_threshold(report: dict[str, Any]) -> None:
    report["verification"]["thresholds"][DOWN] *= 1.001


def strange_report_threshold(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda report: report["verification"]["thresholds"].update({DOWN: value})


def transposed(stored: dict[str, Tensor]) -> None:
    """A whole projection of another shape, its norms too."""
    stored[f"{DOWN}.weight_t"] = stored[f"{DOWN}.weight_t"].t().contiguous()
    stored[f"{DOWN}.column_norms"] = torch.linalg.vector_norm(stored[f"{DOWN}.weight_t"], dim=1)


def infinite(stored: dict[str, Tensor]) -> None:
    nth(stored[f"{DOWN}.weight_t"], 0, float("inf"))
    nth(stored[f"{DOWN}.column_norms"], 0, float("inf"))


def stranger(stored: dict[str, Tensor]) -> None:
    """A projection that config.json does not name."""
    stored.update({name.replace(DOWN, OTHER): stored[name].clone() for name in gated(DOWN)})


def gated(name: str) -> list[str]:
    return [f"{name}.{leaf}" for leaf in ("weight_t", "column_norms", "thresholds")]


def modules(edit: Callable[[list[str]], object]) -> Change:
    return edit_json("config.json", lambda config: edit(config["quantization_config"]["modules"]))


WRONG_CONTENT: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a norm a little too large": (
        edit_tensor(f"{DOWN}.column_norms", lambda norms: nth(norms, -1, norms[-1] * 1.001)),
        (f"{DOWN}.column_norms", "not those of its weights"),
    ),
    "a norm with another sign": (edit_tensor(f"{Q}.column_norms", lambda norms: -norms), (f"{Q}.column_norms",)),
    "a norm is zero": (edit_tensor(f"{Q}.column_norms", lambda norms: nth(norms, 3, 0)), (f"{Q}.column_norms",)),
    "a norm is NaN": (edit_tensor(f"{Q}.column_norms", lambda norms: nth(norms, 0, torch.nan)), (f"{Q}.column_norms",)),
    "norms in another order": (edit_tensor(f"{Q}.column_norms", lambda norms: norms.flip(0)), (f"{Q}.column_norms",)),
    "a weight changed": (edit_tensor(f"{Q}.weight_t", lambda w: nth(w, 7, w.abs().max() * 2)), (f"{Q}.column_norms",)),
    "a weight is NaN": (edit_tensor(f"{Q}.weight_t", lambda w: nth(w, -1, torch.nan)), (f"{Q}.column_norms",)),
    "a weight and its norm are infinite": (edit_tensors(infinite), (DOWN,)),
    **{
        f"a threshold is {value}": (
            edit_tensor(f"{DOWN}.thresholds", lambda t, v=value: nth(t, -1, v)),
            (f"{DOWN}.thresholds",),
        )
        for value in (float("nan"), float("inf"), 0.0)
    },
    "thresholds descend": (edit_tensor(f"{Q}.thresholds", lambda t: t.flip(0)), (f"{Q}.thresholds",)),
    "a threshold is below the one before": (
        edit_tensor(f"{Q}.thresholds", lambda t: nth(t, 15, t[14] * 0.999)),
        (f"{Q}.thresholds", "ascending"),
    ),
    "thresholds start above 0": (edit_tensor(f"{Q}.thresholds", lambda t: nth(t, 0, t[1] / 2)), (f"{Q}.thresholds",)),
    "thresholds start below 0": (edit_tensor(f"{Q}.thresholds", lambda t: nth(t, 0, -1)), (f"{Q}.thresholds",)),
    "thresholds are not those of the report": (edit_tensor(f"{DOWN}.thresholds", scaled), (DOWN, "wina_report.json")),
    "the report has another threshold": (
        edit_json("wina_report.json", other_report_threshold),
        (DOWN, "wina_report.json"),
    ),
    "the report lacks a threshold": (
        edit_json("wina_report.json", without_report_threshold),
        (DOWN, "wina_report.json"),
    ),
    **{
        f"a threshold of the report is {value!r:.8}": (
            edit_json("wina_report.json", strange_report_threshold(value)),
            ("wina_report.json",),
        )
        for value in (float("nan"), float("inf"), None, "x", [], 10**400)
    },
    "the report is empty": (lambda folder: (folder / "wina_report.json").write_text("{}"), ("wina_report.json",)),
    "the report is no JSON": (lambda folder: (folder / "wina_report.json").write_text("{"), ("wina_report.json",)),
    "the report is a list": (lambda folder: (folder / "wina_report.json").write_text("[]"), ("wina_report.json",)),
    "there is no report": (lambda folder: (folder / "wina_report.json").unlink(), ("wina_report.json",)),
    **{
        f"{leaf} in {dtype}": (
            edit_tensor(f"{DOWN}.{leaf}", lambda t, d=dtype: t.to(d)),
            (f"{DOWN}.{leaf}", str(dtype)),
        )
        for leaf in ("column_norms", "thresholds")
        for dtype in (torch.float16, torch.float64, torch.int32)
    },
    "a weight in integers": (edit_tensor(f"{DOWN}.weight_t", lambda w: w.to(torch.int32)), (f"{DOWN}.weight_t",)),
    "a weight in float64": (edit_tensor(f"{DOWN}.weight_t", lambda w: w.double()), (f"{DOWN}.weight_t",)),
    "a norm too few": (edit_tensor(f"{DOWN}.column_norms", lambda t: t[:-1]), (f"{DOWN}.column_norms", "[31]", "[32]")),
    "a threshold too few": (
        edit_tensor(f"{DOWN}.thresholds", lambda t: t[:-1]),
        (f"{DOWN}.thresholds", "[19]", "[20]"),
    ),
    "thresholds in a row": (edit_tensor(f"{DOWN}.thresholds", lambda t: t[None]), (f"{DOWN}.thresholds", "[1, 20]")),
    "a weight with a dimension more": (edit_tensor(f"{DOWN}.weight_t", lambda w: w[..., None]), (f"{DOWN}.weight_t",)),
    "a weight with a dimension less": (edit_tensor(f"{DOWN}.weight_t", lambda w: w[:, 0]), (f"{DOWN}.weight_t",)),
    "a weight without dimensions": (edit_tensor(f"{DOWN}.weight_t", lambda w: w[0, 0]), (DOWN,)),
    **{
        f"no {leaf}": (edit_tensors(lambda stored, n=f"{DOWN}.{leaf}": stored.pop(n)), (DOWN,))
        for leaf in ("weight_t", "column_norms", "thresholds")
    },
    "config names a projection that is not stored": (modules(lambda names: names.append(OTHER)), (OTHER,)),
    "a projection is named otherwise in config": (modules(lambda names: names.__setitem__(0, OTHER)), (OTHER,)),
    "config does not name a stored projection": (modules(lambda names: names.remove(DOWN)), (DOWN,)),
    "config names nothing": (modules(lambda names: names.clear()), ("does not name",)),
    "a stored projection without a name in config": (edit_tensors(stranger), (OTHER,)),
    "a grid of another length": (
        edit_block(grid=[0, 0.5, 0.95], allocation="uniform", shares={}),
        ("thresholds", "[3]"),
    ),
    "a sparsity out of range": (edit_block(sparsity=0.96), ("sparsity",)),
    # what transformers would find when it builds the model
    "a projection of another shape": (edit_tensors(transposed), (f"{DOWN}.weight_t", "32")),
    "a norm layer of another shape": (
        edit_tensor("model.norm.weight", lambda w: torch.ones(17)),
        ("model.norm.weight", "17"),
    ),
    "no embedding": (
        edit_tensors(lambda stored: stored.pop("model.embed_tokens.weight")),
        ("model.embed_tokens.weight",),
    ),
    "a layer too many in config": (edit_config(num_hidden_layers=3), ("model.layers.2",)),
}


@pytest.mark.parametrize(("change", "words"), WRONG_CONTENT.values(), ids=WRONG_CONTENT)
def test_wrong_content_under_right_hashes_is_found(change: Change, words: tuple[str, ...], copied: Path):
    change(copied)
    write_manifest(copied)
    with pytest.raises(WinaError) as raised:
        verify_folder(copied)
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in {str(raised.value)!r}"
    refused(run_wina("verify", copied, "--quiet"), *words)


def test_what_is_equal_but_written_otherwise_verifies(copied: Path):
    edit_tensors(lambda stored: None)(copied)  # the same tensors, laid out by another writer
    edit_json("config.json", lambda config: None)(copied)
    write_manifest(copied)
    verify_folder(copied)


def test_norms_and_thresholds_may_differ_by_the_rounding_of_another_machine(copied: Path):
    edit_tensor(f"{DOWN}.column_norms", lambda norms: norms * (1 + 1e-6))(copied)
    edit_tensor(f"{DOWN}.thresholds", lambda curve: curve * (1 + 1e-6))(copied)
    write_manifest(copied)
    verify_folder(copied)


def test_a_column_of_zeros_has_norm_zero_and_verifies(copied: Path):
    edit_tensor(f"{DOWN}.weight_t", lambda w: torch.cat([torch.zeros(1, 16), w[1:]]))(copied)
    edit_tensor(f"{DOWN}.column_norms", lambda norms: nth(norms, 0, 0))(copied)
    write_manifest(copied)
    verify_folder(copied)
