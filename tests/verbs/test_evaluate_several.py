"""`wina eval` of several checkpoints: one table, costs, picture, protocol, and text that a conversion saw."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import wina_convert
from support.commands import refused, run_wina, succeeded
from support.folders import config_of, tensors_of
from wina_convert import pictures
from wina_convert.models.documents import bundled_files

pytestmark = pytest.mark.slow

TEXT = "".join(f"In year {year} the harvest was {year % 7} times that of the year before.\n" for year in range(120))
FEW = ("--seq-len", 32, "--samples", 4, "--quiet")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "harvest.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def two(tiny: Path, wina_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with a tied head and one in another basis, whose head is its own."""
    other = tmp_path_factory.mktemp("two") / "teal"
    wina_convert.convert(str(tiny), other, samples=8, seq_len=64, basis="pca", scheme="teal")
    return wina_tiny, other


def rows_of(*args: object) -> list[dict[str, Any]]:
    result = run_wina("eval", *args, "--json")
    succeeded(result)
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def rows(two: tuple[Path, Path], text: Path) -> list[dict[str, Any]]:
    return rows_of(*two, "--text", text, "--sparsity", "0,0.5", *FEW)


def test_every_row_says_of_which_checkpoint_it_is_and_how_that_was_made(rows: list[dict[str, Any]], two: Any):
    assert [(row["checkpoint"], row["sparsity"]) for row in rows] == [
        (str(folder), sparsity) for folder in two for sparsity in (0.0, 0.5)
    ]
    assert [row["made"] for row in rows[::2]] == ["wina, measured", "teal, measured, basis pca"]
    assert all(row["seen_recorded"] for row in rows)
    assert rows[0]["protocol"] == {
        "name": "samples",
        "block": 32,
        "stride": None,
        "bos": "each block",
        "blocks": 4,
    }


def test_a_token_costs_what_is_stored_but_for_what_it_skips_or_looks_up(rows: list[dict[str, Any]], two: Any):
    """Summed by hand over the stored tensors, which are float32."""
    for folder, row in zip([folder for folder in two for _ in range(2)], rows, strict=True):
        tied = config_of(folder)["tie_word_embeddings"]
        gated, dense, weights, products = 0.0, 0, 0, 0.0
        for name, tensor in tensors_of(folder).items():
            module, _, leaf = name.rpartition(".")
            kept = 1 - row["projections"][module] if leaf == "weight_t" else 1
            if leaf in ("column_norms", "thresholds") or ("embed" in name and not tied):
                continue
            gated += tensor.nbytes * kept + (4 * len(tensor) if leaf == "weight_t" else 0)  # the cutoffs
            dense += tensor.nbytes
            weights += tensor.numel() if tensor.dim() == 2 else 0
            products += tensor.numel() * kept if tensor.dim() == 2 else 0
        assert row["bytes_per_token"]["gated"] == pytest.approx(gated, abs=28)  # each projection is rounded
        assert row["macs_per_token"]["gated"] == pytest.approx(products, abs=28)
        assert (row["bytes_per_token"]["dense"], row["macs_per_token"]["dense"]) == (dense, weights)
    assert rows[0]["bytes_per_token"]["dense"] == rows[2]["bytes_per_token"]["dense"]  # untying costs a token nothing


def test_without_a_source_a_checkpoint_is_compared_with_itself_at_0(rows: list[dict[str, Any]], two: Any, tiny: Path):
    for at_0, at_half in (rows[:2], rows[2:]):
        assert at_0["kl"] == at_0["rise"] == at_0["logit_error"] == 0
        assert at_half["dense_perplexity"] == at_0["perplexity"]
        assert at_half["rise"] == at_half["perplexity"] / at_0["perplexity"] - 1 != 0
        assert at_half["kl"] > 0


def test_that_is_the_source_up_to_rounding(rows: list[dict[str, Any]], two: Any, tiny: Path, text: Path):
    (alone,) = rows_of(two[1], "--text", text, "--source", tiny, "--sparsity", "0.5", *FEW)
    for key in ("perplexity", "dense_perplexity", "kl"):
        assert alone[key] == pytest.approx(rows[3][key], rel=1e-3)


def test_a_single_checkpoint_is_compared_with_nothing_unless_asked(two: Any, text: Path):
    (row,) = rows_of(two[0], "--text", text, *FEW)
    assert row["rise"] is row["kl"] is None
    assert row["sparsity"] == 0.5


def test_the_table_has_all_checkpoints(two: Any, text: Path):
    result = run_wina("eval", *two, "--text", text, "--sparsity", "0.25,0.5", *FEW)
    succeeded(result)
    first, protocol, _, header, *lines = result.stdout.splitlines()
    assert re.fullmatch(r"124 predicted tokens of .*harvest.txt", first)
    assert protocol == "protocol samples: 4 blocks of 32 tokens, spread evenly, BOS in each block"
    assert re.split("  +", header) == [
        "checkpoint",
        "made with",
        "sparsity",
        "achieved",
        "perplexity",
        "rise",
        "KL",
        "top-1",
        "bytes/token",
        "MACs",
    ]
    assert len(lines) == 6
    row = r" +wina, measured +25\.0% +\d+\.\d\d% +\d+\.\d{3} +[+-]\d+\.\d\d% +\d\.\d{4} +\d+\.\d% +\d\.\d\d MB +\d+\.\d\d k"
    assert re.fullmatch(row, lines[1])
    assert lines[3].startswith(str(two[1]))


def test_a_checkpoint_without_a_record_is_measured_and_a_line_says_so(two: Any, text: Path, tmp_path: Path):
    folder = Path(shutil.copytree(two[0], tmp_path / "older"))
    report = json.loads((folder / "wina_report.json").read_text())
    del report["seen"]
    (folder / "wina_report.json").write_text(json.dumps(report))
    shown = run_wina("eval", folder, "--text", text, *FEW)
    succeeded(shown)
    assert f"{folder} does not record which text its conversion saw; " in shown.stdout
    (row,) = rows_of(folder, "--text", text, *FEW)
    assert not row["seen_recorded"]


@pytest.mark.parametrize("options", [("--seq-len", 48, "--samples", 10_000), ("--protocol", "wikitext")])
def test_text_that_a_conversion_saw_is_refused(options: Any, two: Any, text: Path, tmp_path: Path):
    bundled = tmp_path / "bundled.txt"
    bundled.write_text("\n\n".join(path.read_text("utf-8") for path in bundled_files())[:60_000])
    wanted = ("--text", text, "--text", bundled, *options, "--quiet")
    refused(run_wina("eval", two[1], *wanted), "calibration text of", str(two[1]), "measure on other text")


def test_the_protocol_of_papers_is_named_in_the_table(wina_tiny: Path, text: Path):
    shown = run_wina("eval", wina_tiny, "--text", text, "--protocol", "wikitext", "--quiet")
    succeeded(shown)
    blocks = int(
        re.search(
            r"^protocol wikitext: (\d+) blocks of 256 tokens, stride 256, no overlap, BOS in the first block$",
            shown.stdout,
            re.MULTILINE,
        )[1]  # type: ignore[index]
    )
    assert shown.stdout.startswith(f"{blocks * 255} predicted tokens")


def test_the_picture_has_a_line_for_every_checkpoint(two: Any, text: Path, tmp_path: Path, monkeypatch: Any):
    drawn: list[Figure] = []
    save = pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure) or save(figure, path))
    path = tmp_path / "loss.png"
    found = rows_of(*two, "--text", text, "--sparsity", "0,0.5,0.75", *FEW, "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel().startswith("sparsity achieved")
    assert axes.get_ylabel() == "rise of perplexity over dense"
    assert axes.get_yscale() == "log"
    for number, line in enumerate(axes.get_lines()):
        points = [(row["achieved"], row["rise"]) for row in found[3 * number : 3 * number + 3] if row["rise"] > 0]
        assert list(zip(*line.get_data(), strict=True)) == points
        assert points
    labels = [label.get_text() for label in axes.get_legend().get_texts()]
    assert labels == [f"{two[0].name}\n(wina, measured)", "teal\n(teal, measured, basis pca)"]


def test_a_single_checkpoint_that_loses_nothing_has_a_picture_too(two: Any, text: Path, tmp_path: Path):
    (row,) = rows_of(two[0], "--text", text, "--sparsity", "0", *FEW, "--plot", tmp_path / "loss.png")
    assert row["rise"] == 0
    assert math.isfinite(row["perplexity"])
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("name", ["loss.jpg", "nosuch/loss.png", "."])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(
    name: str, two: Any, text: Path, tmp_path: Path
):
    refused(run_wina("eval", two[0], "--text", text, "--plot", tmp_path / name), "--plot", "give a .png file")
