"""`wina retarget` changes one number, or says that it cannot and changes nothing."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from support.breaking import before_call, failing
from support.commands import contents, refused, run, run_wina, succeeded
from support.edits import Change, edit_block, edit_json
from support.folders import config_of, entries
from wina_convert import load
from wina_convert.errors import VerificationError
from wina_convert.format.checkpoint import open_checkpoint
from wina_convert.format.manifest import write_manifest
from wina_convert.format.names import MANIFEST
from wina_convert.runtime.linear import gated_modules
from wina_convert.verbs.retarget import retarget
from wina_convert.verbs.verify import verify_folder

MODEL = "kilobytes in shards"  # see support/shared.py


def test_retarget_keeps_the_manifest_right(copied: Path):
    before = entries(copied)
    for sparsity in (0.25, 0.0, 0.95, 1 / 3):
        succeeded(run_wina("retarget", copied, "--sparsity", sparsity))
        assert open_checkpoint(copied).config.sparsity == sparsity
        assert verify_folder(copied).files == len(before)
    after = entries(copied)
    assert {name for name in before if before[name] != after[name]} == {"config.json", "README.md", "wina_report.json"}
    succeeded(run_wina("retarget", copied, "--sparsity", 0.5))
    assert entries(copied) == before


@pytest.mark.parametrize("second", [0.25, 0.75])
@pytest.mark.parametrize("written", ["nothing", "manifest"])
def test_a_retarget_that_was_killed_is_repaired_by_another(
    written: str, second: float, copied: Path, monkeypatch: pytest.MonkeyPatch
):
    before = contents(copied)
    killed = before_call(Path.replace, 1 if written == "nothing" else 2, failing(KeyboardInterrupt()))
    with monkeypatch.context() as context:
        context.setattr(Path, "replace", lambda path, target: killed(path, target))
        with pytest.raises(KeyboardInterrupt):
            retarget(copied, 0.25)
    changed = {name for name, data in contents(copied).items() if before.get(name) != data and not name.startswith(".")}
    assert changed == (set() if written == "nothing" else {MANIFEST})
    assert {gate.sparsity for gate in gated_modules(load(str(copied))).values()} == {0.5}
    with pytest.raises(VerificationError):
        verify_folder(copied)
    retarget(copied, second)
    verify_folder(copied)
    assert open_checkpoint(copied).config.sparsity == second
    assert set(contents(copied)) == set(before)


def test_retarget_gives_a_folder_without_a_manifest_none(copied: Path, tmp_path: Path):
    load(str(copied)).save_pretrained(tmp_path / "saved")
    retarget(tmp_path / "saved", 0.25)
    assert open_checkpoint(tmp_path / "saved").config.sparsity == 0.25
    assert not (tmp_path / "saved" / MANIFEST).exists()


def test_retarget_does_not_bless_other_damage(copied: Path):
    (copied / "LICENSE").write_text("changed")
    retarget(copied, 0.25)
    with pytest.raises(VerificationError, match="LICENSE was changed"):
        verify_folder(copied)


def test_the_card_says_how_to_reproduce_a_retargeted_checkpoint(copied: Path):
    (before,) = (line for line in card(copied) if line.startswith("`wina-convert"))
    for sparsity in (0.25, 1 / 3):
        retarget(copied, sparsity)
        (line,) = (line for line in card(copied) if line.startswith("`wina-convert"))
        assert line == before.replace("` with", f"`, then `wina retarget DIR --sparsity {sparsity}` with")
    retarget(copied, 0.5)
    assert before in card(copied)


def card(folder: Path) -> list[str]:
    return (folder / "README.md").read_text().splitlines()


def first(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """A field in front of all others."""

    def edit(fields: dict[str, Any]) -> None:
        rest = dict(fields)
        fields.clear()
        fields.update({name: value} | {key: other for key, other in rest.items() if key != name})

    return edit


def inside(edit: Callable[[dict[str, Any]], object]) -> Change:
    return edit_json("config.json", lambda config: edit(config["quantization_config"]))


ODD_CONFIGS: dict[str, Change] = {
    "sparsity is null": edit_block(sparsity=None),
    "no sparsity": inside(lambda block: block.pop("sparsity")),
    "a sparsity in another block first": inside(first("calibration", {"sparsity": 0.125})),
    "the name as a value first": edit_json(
        "config.json", first("note", {"of": "quantization_config", "sparsity": 0.125})
    ),
    "the name in letters": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"quantization_config"', '"quantization\\u005fconfig"')
    ),
    "a block that counts for nothing": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("{", '{"quantization_config": {"sparsity": 0.125},', 1)
    ),
}


@pytest.mark.parametrize("change", ODD_CONFIGS.values(), ids=ODD_CONFIGS)
def test_retarget_changes_the_sparsity_or_says_that_it_cannot(change: Change, copied: Path):
    change(copied)
    write_manifest(copied)
    before = contents(copied)
    result = run_wina("retarget", copied, "--sparsity", "0.25")
    if result.exit_code:
        refused(result, "config.json")
        assert contents(copied) == before
    else:
        assert open_checkpoint(copied).config.sparsity == 0.25
        assert {name: value for name, value in config_of(copied).items() if name != "quantization_config"} == {
            name: value for name, value in json.loads(before["config.json"]).items() if name != "quantization_config"
        }
        verify_folder(copied)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.95])
def test_a_retargeted_checkpoint_loads_at_its_new_sparsity(sparsity: float, converted: Path, tmp_path: Path):
    out = shutil.copytree(converted, tmp_path / "out")
    succeeded(run_wina("retarget", out, "--sparsity", sparsity))
    verify_folder(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {gate.sparsity for gate in gated_modules(model).values()} == {sparsity}


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["none", "pca"])
def test_report_and_card_follow(basis: str, source: Path, tmp_path: Path):
    options = ("--samples", 4, "--seq-len", 16, "--quiet", "--basis", basis)
    for name, sparsity in (("first", 0.5), ("other", 0.25)):
        succeeded(run(source, "--out", tmp_path / name, *options, "--sparsity", sparsity))
    measured = json.loads((tmp_path / "first" / "wina_report.json").read_text())
    retarget(tmp_path / "first", 0.25)
    report, other = (json.loads((tmp_path / name / "wina_report.json").read_text()) for name in ("first", "other"))
    assert report["bytes_per_token"] == other["bytes_per_token"] != measured["bytes_per_token"]
    assert report["verification"] == measured["verification"]
    said, expected = (
        [line for line in (tmp_path / name / "README.md").read_text().splitlines() if line.startswith("By default")]
        for name in ("first", "other")
    )
    assert said == expected
    assert "By default 25.0% of the weights" in said[0]
    assert "| sparsity asked | 0% | 50.0% |" in (tmp_path / "first" / "README.md").read_text()  # what was measured


@pytest.mark.parametrize("report", ["{", "{}", '{"bytes_per_token": {"dense": "x"}}'])
def test_a_report_that_is_none_stays(report: str, copied: Path):
    (copied / "wina_report.json").write_text(report)
    card = (copied / "README.md").read_bytes()
    retarget(copied, 0.25)
    assert (copied / "wina_report.json").read_text() == report
    assert (copied / "README.md").read_bytes() == card


@pytest.mark.parametrize("sparsity", ["-0.1", "0.96", "50", "nan", "inf", "abc", ""])
def test_retarget_refuses_what_is_no_sparsity(sparsity: str, converted: Path, tmp_path: Path):
    out = shutil.copytree(converted, tmp_path / "out")
    before = contents(out)
    refused(run_wina("retarget", out, "--sparsity", sparsity), "sparsity")
    assert contents(out) == before


@pytest.mark.parametrize(
    ("call", "file"), [(1, MANIFEST), (2, "config.json"), (3, "wina_report.json"), (4, "README.md")]
)
def test_a_checkpoint_that_cannot_be_retargeted_stays(
    call: int, file: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = shutil.copytree(converted, tmp_path / "out")
    before = contents(out)
    fail = failing(OSError(errno.EROFS, "Read-only file system"))
    monkeypatch.setattr(Path, "replace", before_call(Path.replace, call, fail))
    refused(run_wina("retarget", out, "--sparsity", "0.25"), str(out / file), "Read-only file system")
    assert contents(out) == before
