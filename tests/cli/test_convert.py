"""What `wina-convert` prints, where, and what a dry run says."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import wina_convert as package
from support.breaking import failing
from support.commands import SMALL, Terminal, contents, refused, run, run_wina, succeeded
from wina_convert.cli import wina, wina_convert
from wina_convert.progress import grouped, lines

pytestmark = pytest.mark.slow

MODEL = "one layer"  # see support/shared.py


# --- what a conversion prints ---


def test_json_is_the_report_and_stdout_holds_nothing_else(source: Path, tmp_path: Path):
    result = run(source, "--out", tmp_path / "out", "--json", *SMALL)
    succeeded(result)
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "wina_report.json").read_text())
    assert "Calibrating" in result.stderr


def test_the_command_the_verb_and_the_function_make_the_same_files(source: Path, tmp_path: Path):
    succeeded(run(source, "--out", tmp_path / "command", "--targets", "mlp,*.q_proj", "--seed", "3", *SMALL))
    repeated = ("--targets", "mlp", "--targets", "*.q_proj")
    succeeded(run_wina("convert", source, "--out", tmp_path / "verb", *repeated, "--seed", "3", *SMALL))
    report = package.convert(
        str(source),
        tmp_path / "function",
        targets=["mlp", "*.q_proj"],
        seed=3,
        samples=8,
        basis="none",
        seq_len=32,
        batch_size=24,
    )
    assert contents(tmp_path / "command") == contents(tmp_path / "verb") == contents(tmp_path / "function")
    assert report == json.loads((tmp_path / "function" / "wina_report.json").read_text())


def test_quiet_prints_nothing(source: Path, tmp_path: Path):
    result = run(source, "--out", tmp_path / "out", "--quiet", *SMALL)
    succeeded(result)
    assert (result.stdout, result.stderr) == ("", "")


def test_a_summary_says_what_was_asked_and_achieved_and_how_to_go_on(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = run(source, "--out", out, "--sparsity", "0.4", *SMALL)
    succeeded(result)
    held_out = json.loads((out / "wina_report.json").read_text())["verification"]["held_out"]
    assert f"Wrote {out} in " in result.stdout
    assert "7 gated projections in 1 layers" in result.stdout
    assert f"asked 40.0%, achieved {held_out['achieved']:.2%} on held-out text" in result.stdout
    (command,) = re.findall(r"wina generate .*", result.stdout)
    wina.commands["generate"].make_context("generate", shlex.split(command)[2:])


def test_without_a_terminal_progress_is_plain_lines_that_reach_the_total(tiny: Path, tmp_path: Path):
    result = run(tiny, "--out", tmp_path / "out", *SMALL)
    succeeded(result)
    assert "\r" not in result.stderr
    assert "%|" not in result.stderr
    steps: dict[str, list[str]] = {}
    for line in result.stderr.splitlines():
        label, _, rest = line.partition(": ")
        steps.setdefault(label, []).append(rest)
    assert len(steps) >= 3
    for label, (start, *rest) in steps.items():
        amount, unit = start.split(" ")  # layers, tensors, bytes
        assert float(amount) > 0, label
        assert 1 <= len(rest) <= 4, label
        assert re.fullmatch(rf"{amount} of {amount} {unit}, \d+ s", rest[-1]), label
    for word in ("alibrat", "riting", "erif"):
        assert word in " ".join(steps)


@pytest.mark.parametrize(
    ("total", "unit", "advances", "expected"),
    [
        (
            8,
            "layer",
            [1] * 8,
            [
                "8 layers",
                "2 of 8 layers, 20 s, about 60 s left",
                "4 of 8 layers, 40 s, about 40 s left",
                "6 of 8 layers, 60 s, about 20 s left",
                "8 of 8 layers, 80 s",
            ],
        ),
        (1, "layer", [1], ["1 layer", "1 of 1 layer, 10 s"]),
        (3, "tensor", [3], ["3 tensors", "3 of 3 tensors, 10 s"]),
        (
            100 << 20,
            "B",
            [25 << 20, 75 << 20],
            ["100 MiB", "25 of 100 MiB, 10 s, about 30 s left", "100 of 100 MiB, 20 s"],
        ),
    ],
)
def test_a_step_prints_a_line_at_the_start_and_at_each_quarter(
    total: int, unit: str, advances: list[int], expected: list[str]
):
    printed: list[str] = []
    time = [0]
    with lines(printed.append, lambda: time[0])("Working", total, unit) as advance:
        for count in advances:
            time[0] += 10
            advance(count)
    assert printed == [f"Working: {line}" for line in expected]


def test_a_small_number_of_bytes_is_not_printed_as_zero():
    printed: list[str] = []
    with lines(printed.append)("Writing", 300_000, "B") as advance:
        advance(300_000)
    assert not [line for line in printed if re.search(r"\b0 (?!s)", line)], printed


def test_a_step_of_nothing_prints_and_does_not_fail():
    printed: list[str] = []
    with lines(printed.append)("Working", 0, "tensor") as advance:
        advance(0)
    assert printed == ["Working: 0 tensors"]


@pytest.mark.parametrize("steps", [[1] * 12, [5, 7], [12], [3, 3, 3, 3]])
def test_sequences_are_told_as_layers(steps: list[int]):
    told: list[int] = []
    advance = grouped(told.append, 4)
    for count in steps:
        advance(count)
    assert sum(told) == 3
    assert all(told)


def test_on_a_terminal_progress_is_bars_with_units(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal(monkeypatch)
    assert terminal.run(source, "--out", tmp_path / "out", *SMALL) == 0
    bars = [bar.split("\r")[-1] for bar in terminal.stderr.split("\n")]
    done = [bar for bar in bars if "100%|" in bar]
    assert len(done) == len([bar for bar in bars if "%|" in bar]) >= 3
    assert [bar for bar in done if " layer/s" in bar or "s/ layer" in bar]
    assert [bar for bar in done if "kB/s" in bar or "MB/s" in bar]


@pytest.mark.parametrize("quiet", [True, False])
def test_a_terminal_says_at_once_what_is_under_way(
    quiet: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    terminal = Terminal(monkeypatch)
    monkeypatch.setattr(
        "wina_convert.conversion.pipeline.ConversionOptions", failing(AssertionError("before anything is done"))
    )
    with pytest.raises(AssertionError, match="before anything"):
        wina_convert.main([str(source), "--out", str(tmp_path / "out"), *(["--quiet"] if quiet else [])])
    assert terminal.stderr == ("" if quiet else f"Reading {source} ...\n")


# --- dry run ---


def test_a_dry_run_prints_the_plan_and_touches_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = run(tiny, "--out", "out", "--dry-run")
    succeeded(result)
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.split()[1:]}
    assert rows["self_attn.k_proj"] == ["128", "64", "4"]
    assert rows["mlp.down_proj"] == ["352", "128", "4"]
    assert re.search(r"bytes/token +\d\S* MB -> \d\S* MB at 50.0% sparsity \(-\d+%\)", result.stdout)
    assert re.search(r"disk +\d\S* MB in out", result.stdout)
    assert re.search(r"time +about \d+ s", result.stdout)
    assert "nothing was touched" in result.stdout
    assert result.stderr == ""
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("sparsity", [0.0, 0.65])
def test_a_dry_run_counts_what_the_conversion_writes(sparsity: float, tiny: Path, tmp_path: Path):
    out = tmp_path / "out"
    # a plan cannot know what will be measured: only with shares by type do the bytes agree to the last one
    options = (tiny, "--out", out, "--sparsity", sparsity, "--allocation", "types", "--json", *SMALL)
    plan = json.loads(run(*options, "--dry-run").stdout)
    assert contents(tmp_path) == {}
    stored = load_file(tiny / "model.safetensors")
    shapes = {name: stored[f"{name}.weight"].shape[::-1] for name in plan["projections"]}
    assert len(shapes) == 28
    for name, (inputs, outputs) in shapes.items():
        assert plan["projections"][name] == {"in_features": inputs, "out_features": outputs}
    dense = sum(tensor.nbytes for tensor in stored.values())  # tied: the embedding is read as the head
    saved = sum(round(4 * inputs * outputs * sparsity) - 4 * inputs for inputs, outputs in shapes.values())
    assert plan["bytes_per_token"]["dense"] == dense
    assert plan["bytes_per_token"]["gated"] == pytest.approx(dense - saved, abs=len(shapes))
    report = json.loads(run(*options).stdout)
    assert plan["disk_bytes"] == sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    for field in ("layers", "bytes_per_token", "disk_bytes", "projections", "source"):
        assert plan[field] == report[field]


# --- pictures ---


def test_plot_adds_two_pictures(source: Path, tmp_path: Path):
    succeeded(run(source, "--out", tmp_path / "out", "--plot", *SMALL))
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert set(pictures) == {"wina_sparsity.png", "wina_scores.png"}
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in pictures.values())


def test_plot_without_matplotlib_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(run(source, "--out", tmp_path / "out", "--plot"), "matplotlib", "pip install 'wina-convert[plot]'")
