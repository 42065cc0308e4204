"""The commands: their options, what they print and where, and what they refuse."""

import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from commands import SMALL, Terminal, contents, refused, run, run_wina, succeeded
from families import make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import wina_convert as package
from wina_convert.cli import wina, wina_convert
from wina_convert.generate import generate
from wina_convert.progress import lines
from wina_convert.text import sequences

COMMANDS = {
    "wina-convert": wina_convert,
    "wina": wina,
    **{f"wina {name}": verb for name, verb in wina.commands.items()},
}
TEXT = "".join(f"In year {year} the harvest was {year % 7} times that of the year before.\n" for year in range(120))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer with random weights."""
    return make_model("llama", tmp_path_factory.mktemp("source") / "tiny", num_hidden_layers=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "harvest.txt"
    path.write_text(TEXT)
    return path


def invoke(name: str, *args: object) -> Any:
    return run_wina(*name.split()[1:], *args) if name.startswith("wina ") or name == "wina" else run(*args)


# --- help, names and defaults ---


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_every_option_and_verb(name: str, flag: str):
    result = invoke(name, flag)
    succeeded(result)
    shown = result.stdout.split()
    for parameter in COMMANDS[name].params:
        for option in parameter.opts if isinstance(parameter, click.Option) else ():
            assert option in [word.rstrip(",") for word in shown], option
    for verb in getattr(COMMANDS[name], "commands", ()):
        assert verb in shown


def examples(name: str) -> list[str]:
    text = invoke(name, "--help").stdout
    return re.findall(r"^ {4,}(wina.*)$", text.partition("Example")[2].partition("Options:")[0], re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "wina"])
def test_every_example_of_a_help_is_a_command_with_such_options(name: str):
    assert examples(name)
    for example in examples(name):
        program, *words = shlex.split(example)
        command = wina_convert if program == "wina-convert" else wina.commands[words.pop(0)]
        command.make_context(program, words)  # raises what the command would


def test_without_a_verb_the_group_shows_its_help():
    result = run_wina()
    assert "\nCommands:\n" in result.stdout + result.stderr


def test_every_parameter_of_the_function_is_an_option_with_its_default_and_the_reverse():
    parameters = dict(inspect.signature(package.convert).parameters)
    for python_only in ("progress", "tqdm_class"):
        del parameters[python_only]
    options = {option.name: option for option in wina_convert.params}
    for printing in ("quiet", "as_json", "version"):
        del options[printing]
    assert set(parameters) == set(options)
    for name, parameter in parameters.items():
        assert options[name].required == (parameter.default is inspect.Parameter.empty), name
    context = wina_convert.make_context("wina-convert", ["MODEL", "--out", "DIR"])
    expected = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert {name: context.params[name] for name in expected} == expected


def test_the_verb_convert_is_the_same_command():
    def described(command: click.Command) -> dict[str, Any]:
        info = command.to_info_dict(click.Context(command))
        info["params"] = [parameter for parameter in info["params"] if parameter["name"] != "version"]
        del info["name"]
        return info

    assert described(wina.commands["convert"]) == described(wina_convert)


@pytest.mark.parametrize("name", ["wina-convert", "wina"])
def test_version_is_that_of_the_package(name: str):
    result = invoke(name, "--version")
    succeeded(result)
    assert result.stdout == f"wina-convert, version {package.__version__}\n"


def test_the_module_runs_as_a_program_and_help_does_not_wait_for_torch():
    command = [sys.executable, "-X", "importtime", "-m", "wina_convert", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: wina-convert [OPTIONS] MODEL\n")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not {"torch", "transformers", "numpy"} & imported


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
        amount, unit = start.split(" ")
        assert float(amount) > 0, label
        assert 1 <= len(rest) <= 4, label
        assert rest[-1] == f"{amount} of {amount} {unit}", label
    for word in ("alibrat", "riting", "erif"):
        assert word in " ".join(steps)


@pytest.mark.parametrize(
    ("total", "unit", "advances", "expected"),
    [
        (8, "sequence", [1] * 8, ["8 sequence", *(f"{n} of 8 sequence" for n in (2, 4, 6, 8))]),
        (3, "tensor", [3], ["3 tensor", "3 of 3 tensor"]),
        (100 << 20, "B", [50 << 20, 50 << 20], ["100 MiB", "50 of 100 MiB", "100 of 100 MiB"]),
    ],
)
def test_a_step_prints_a_line_at_the_start_and_at_each_quarter(
    total: int, unit: str, advances: list[int], expected: list[str]
):
    printed: list[str] = []
    with lines(printed.append)("Working", total, unit) as advance:
        for count in advances:
            advance(count)
    assert printed == [f"Working: {line}" for line in expected]


def test_a_small_number_of_bytes_is_not_printed_as_zero():
    printed: list[str] = []
    with lines(printed.append)("Writing", 300_000, "B") as advance:
        advance(300_000)
    assert not [line for line in printed if re.search(r"\b0 ", line)], printed


def test_a_step_of_nothing_prints_and_does_not_fail():
    printed: list[str] = []
    with lines(printed.append)("Working", 0, "tensor") as advance:
        advance(0)
    assert printed == ["Working: 0 tensor"]


def test_on_a_terminal_progress_is_bars_with_units(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal(monkeypatch)
    assert terminal.run(source, "--out", tmp_path / "out", *SMALL) == 0
    bars = [bar.split("\r")[-1] for bar in terminal.stderr.split("\n")]
    done = [bar for bar in bars if "100%|" in bar]
    assert len(done) == len([bar for bar in bars if "%|" in bar]) >= 3
    assert [bar for bar in done if " sequence/s" in bar]
    assert [bar for bar in done if "kB/s" in bar or "MB/s" in bar]


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
    options = (tiny, "--out", out, "--sparsity", sparsity, "--json", *SMALL)
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


# --- inspect ---


def test_inspect_shows_each_layer_and_its_thresholds(wina_tiny: Path):
    result = run_wina("inspect", wina_tiny)
    succeeded(result)
    stored = load_file(wina_tiny / "model.safetensors")
    block = json.loads((wina_tiny / "config.json").read_text())["quantization_config"]
    at = block["grid"].index(0.5)
    table = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    header = table["layer"]
    assert header[:4] == ["layer", "MB", "MB/token", "achieved"]
    for layer in range(4):
        row = dict(zip(header, table[str(layer)], strict=True))
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
            threshold = stored[f"model.layers.{layer}.self_attn.{kind}.thresholds"][at]
            assert float(row[kind]) == pytest.approx(float(threshold), rel=1e-3)
        for kind in ("gate_proj", "up_proj", "down_proj"):
            threshold = stored[f"model.layers.{layer}.mlp.{kind}.thresholds"][at]
            assert float(row[kind]) == pytest.approx(float(threshold), rel=1e-3)
        weights = [t for n, t in stored.items() if n.startswith(f"model.layers.{layer}.") and n.endswith("weight_t")]
        assert float(row["MB"]) == pytest.approx(sum(t.nbytes for t in weights) / 1e6, abs=0.005)
        read = sum(t.nbytes / 2 + 4 * t.shape[0] for t in weights)
        assert float(row["MB/token"]) == pytest.approx(read / 1e6, abs=0.005)
        assert 45 <= float(row["achieved"].rstrip("%")) <= 55
    assert "default sparsity 50.0%" in result.stdout


def test_inspect_json_has_the_achieved_sparsity_of_the_report(wina_tiny: Path):
    found = json.loads(run_wina("inspect", wina_tiny, "--json").stdout)
    assert (found["sparsity"], found["measured_at"], found["source"]) == (0.5, 0.5, "wina-lab-tiny")
    report = json.loads((wina_tiny / "wina_report.json").read_text())
    for layer in found["layers"]:
        inside = {
            name: fraction
            for name, fraction in report["verification"]["held_out"]["projections"].items()
            if name.startswith(f"model.layers.{layer['layer']}.")
        }
        sizes = {name: shape["in_features"] * shape["out_features"] for name, shape in report["projections"].items()}
        mean = sum(inside[name] * sizes[name] for name in inside) / sum(sizes[name] for name in inside)
        assert layer["achieved"] == pytest.approx(mean)
    stored = load_file(wina_tiny / "model.safetensors")
    inside_bytes = sum(layer["nbytes"] for layer in found["layers"])
    assert inside_bytes + found["other_bytes"] == sum(tensor.nbytes for tensor in stored.values())


def test_inspect_follows_retarget(wina_tiny: Path, tmp_path: Path):
    out = shutil.copytree(wina_tiny, tmp_path / "out")
    result = run_wina("retarget", out, "--sparsity", "0.25")
    succeeded(result)
    assert result.stdout == f"{out}: default sparsity is now 25.0%\n"
    found = json.loads(run_wina("inspect", out, "--json").stdout)
    assert (found["sparsity"], found["measured_at"]) == (0.25, 0.5)
    curve = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.thresholds"]
    assert found["layers"][0]["thresholds"]["mlp.up_proj"] == pytest.approx(float(curve[5]))


@pytest.mark.parametrize("damage", ["missing", "not JSON", "other"])
def test_inspect_does_without_a_report(damage: str, wina_tiny: Path, tmp_path: Path):
    out = shutil.copytree(wina_tiny, tmp_path / "out")
    (out / "wina_report.json").unlink()
    if damage != "missing":
        (out / "wina_report.json").write_text({"not JSON": "{", "other": '{"verification": null}'}[damage])
    result = run_wina("inspect", out)
    succeeded(result)
    assert re.search(r"^0 +\S+ +\S+ +- ", result.stdout, re.MULTILINE)


# --- eval ---


def test_eval_measures_what_the_loaded_model_computes(wina_tiny: Path, tiny: Path, text: Path):
    result = run_wina(
        *("eval", wina_tiny, "--text", text, "--source", tiny, "--json", "--quiet"),
        *("--sparsity", "0,0.5", "--seq-len", 64, "--samples", 1000, "--batch-size", 3),
    )
    succeeded(result)
    assert result.stderr == ""
    at_0, at_half = json.loads(result.stdout)
    tokens = sequences([TEXT], AutoTokenizer.from_pretrained(tiny), 64, 1000, "here")
    logits = {}
    with torch.no_grad():
        for name, model in {"dense": tiny, 0.0: wina_tiny, 0.5: wina_tiny}.items():
            loaded = package.load(str(model), sparsity=name) if name != "dense" else None
            loaded = loaded or AutoModelForCausalLM.from_pretrained(model)
            logits[name] = loaded(tokens).logits[:, :-1].double().log_softmax(-1)
    target = tokens[:, 1:, None]
    for found, asked in ((at_0, 0.0), (at_half, 0.5)):
        assert found["sparsity"] == asked
        assert found["tokens"] == target.numel()
        assert found["perplexity"] == pytest.approx(float((-logits[asked].gather(2, target).mean()).exp()), rel=1e-4)
        dense = float((-logits["dense"].gather(2, target).mean()).exp())
        assert found["dense_perplexity"] == pytest.approx(dense, rel=1e-4)
        kl = (logits["dense"].exp() * (logits["dense"] - logits[asked])).sum(-1).mean()
        assert found["kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        same = (logits["dense"].argmax(-1) == logits[asked].argmax(-1)).double().mean()
        assert found["agreement"] == pytest.approx(float(same), abs=2 / target.numel())
        assert len(found["projections"]) == 28
    assert at_0["agreement"] == 1
    assert abs(at_0["achieved"]) < 0.01
    assert 0.3 < at_half["achieved"] < 0.7


def test_eval_prints_a_table_and_each_projection(wina_tiny: Path, tiny: Path, text: Path):
    options = ("--text", text, "--seq-len", 32, "--samples", 4, "--batch-size", 4)
    alone = run_wina("eval", wina_tiny, *options)
    succeeded(alone)
    header = next(line for line in alone.stdout.splitlines() if line.startswith("sparsity"))
    assert header.split() == ["sparsity", "achieved", "perplexity"]
    assert re.search(r"^50\.0% +\d+\.\d\d% +\d+\.\d+$", alone.stdout, re.MULTILINE)
    assert re.search(
        r"^layer +q_proj +k_proj +v_proj +o_proj +gate_proj +up_proj +down_proj$", alone.stdout, re.MULTILINE
    )
    assert len(re.findall(r"^[0-3]( +\d+\.\d%){7}$", alone.stdout, re.MULTILINE)) == 4
    assert "Evaluating" in alone.stderr
    compared = run_wina("eval", wina_tiny, *options, "--source", tiny, "--sparsity", "0.25", "--sparsity", "0.5")
    succeeded(compared)
    header = next(line for line in compared.stdout.splitlines() if line.startswith("sparsity"))
    assert header.split() == "sparsity achieved perplexity dense rise KL top-1 agreement".split()  # noqa: SIM905
    assert len(re.findall(r"^(25|50)\.0% .* \d+\.\d%$", compared.stdout, re.MULTILINE)) == 2


def test_eval_takes_several_texts(wina_tiny: Path, text: Path, tmp_path: Path):
    (tmp_path / "second.txt").write_text(TEXT)
    options = ("--seq-len", 32, "--samples", 10_000, "--batch-size", 64, "--json")
    (one,) = json.loads(run_wina("eval", wina_tiny, "--text", text, *options).stdout)
    (two,) = json.loads(run_wina("eval", wina_tiny, "--text", text, "--text", tmp_path / "second.txt", *options).stdout)
    assert two["tokens"] == pytest.approx(2 * one["tokens"], abs=64)


def test_eval_against_another_model_is_refused(wina_tiny: Path, source: Path, text: Path):
    refused(run_wina("eval", wina_tiny, "--text", text, "--source", source, "--quiet"), str(source), "not the model")
    refused(run_wina("eval", wina_tiny, "--text", text, "--source", wina_tiny, "--quiet"), "WINA checkpoint")


# --- generate ---


def test_generate_continues_a_prompt_as_transformers_does(wina_tiny: Path):
    prompt = "Once upon a time"
    result = run_wina("generate", wina_tiny, "--prompt", prompt, "--max-new-tokens", 12)
    succeeded(result)
    tokenizer = AutoTokenizer.from_pretrained(wina_tiny)
    inputs = tokenizer(prompt, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(wina_tiny)
    ids = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=12, do_sample=False
    )
    expected = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert result.stdout.rstrip() == (prompt + expected).rstrip()
    assert re.fullmatch(r"\[12 tokens, \d+\.\d tokens a second\]\n", result.stderr)


def test_generate_streams_the_text_in_pieces(wina_tiny: Path):
    pieces: list[str] = []
    done = generate(str(wina_tiny), "Once upon a time", max_new_tokens=16, write=pieces.append)
    assert len([piece for piece in pieces if piece]) > 4
    assert "".join(pieces) == done.text
    assert done.tokens == 16
    assert done.times == sorted(done.times)


def test_generate_quietly_prints_the_text_alone(wina_tiny: Path):
    result = run_wina("generate", wina_tiny, "--prompt", "The cat", "--max-new-tokens", 4, "--quiet")
    succeeded(result)
    assert result.stdout.startswith("The cat")
    assert result.stdout.endswith("\n")
    assert result.stderr == ""


def test_generate_samples_by_its_seed(wina_tiny: Path):
    def text(seed: int) -> str:
        options = ("--prompt", "The", "--max-new-tokens", 12, "--temperature", 1.5, "--seed", seed, "--quiet")
        result = run_wina("generate", wina_tiny, *options)
        succeeded(result)
        return result.stdout

    assert text(0) == text(0)
    assert len({text(seed) for seed in range(4)}) > 1


def test_generate_at_another_sparsity_writes_another_text(wina_tiny: Path):
    texts = set()
    for sparsity in (0.0, 0.9):
        options = ("--prompt", "Once upon a time", "--max-new-tokens", 16, "--sparsity", sparsity, "--quiet")
        texts.add(run_wina("generate", wina_tiny, *options).stdout)
    assert len(texts) == 2


# --- what is refused ---

BAD_OPTIONS = {
    "sparsity abc": (("--sparsity", "abc"), ("--sparsity", "abc")),
    "sparsity 7": (("--sparsity", "7"), ("sparsity is 7.0", "between 0 and 0.95")),
    "sparsity 50": (("--sparsity", "50"), ("sparsity is 50.0", "between 0 and 0.95")),
    "sparsity -1": (("--sparsity", "-1"), ("sparsity is -1.0", "between 0 and 0.95")),
    "sparsity 0.951": (("--sparsity", "0.951"), ("sparsity is 0.951", "between 0 and 0.95")),
    "sparsity nan": (("--sparsity", "nan"), ("sparsity is nan", "between 0 and 0.95")),
    "sparsity inf": (("--sparsity", "inf"), ("sparsity is inf", "between 0 and 0.95")),
    "device tpu": (("--device", "tpu"), ("device is 'tpu'", "auto, cpu or cuda")),
    "device empty": (("--device", ""), ("device is ''", "auto, cpu or cuda")),
    "device meta": (("--device", "meta"), ("device is 'meta'", "auto, cpu or cuda")),
    "device cuda:99": (("--device", "cuda:99"), ("device is 'cuda:99'", "auto, cpu or cuda")),
    "device xla": (("--device", "xla"), ("device is 'xla'", "auto, cpu or cuda")),
    "dtype int3": (("--dtype", "int3"), ("dtype is 'int3'", "auto, float32, bfloat16, float16")),
    "dtype int8": (("--dtype", "int8"), ("dtype is 'int8'", "auto, float32, bfloat16, float16")),
    "samples 0": (("--samples", "0"), ("samples is 0", "at least 1")),
    "samples -1": (("--samples", "-1"), ("samples is -1", "at least 1")),
    "samples 1.5": (("--samples", "1.5"), ("--samples", "1.5")),
    "batch 0": (("--batch-size", "0"), ("batch size is 0", "at least 1")),
    "length 0": (("--seq-len", "0"), ("sequence length is 0", "8 to 128")),
    "length 7": (("--seq-len", "7"), ("sequence length is 7", "8 to 128")),
    "length 129": (("--seq-len", "129"), ("sequence length is 129", "8 to 128", "context")),
    "targets": (("--targets", "nosuch"), ("'nosuch' matches no projection", "all, attention, mlp")),
    "targets empty": (("--targets", ""), ("nothing", "--targets")),
    "ignore": (("--ignore", "lm_head"), ("'lm_head' matches no projection", "names like 'model.layers.0.")),
    "ignore all": (("--ignore", "*"), ("nothing is left to gate", "--ignore", "--targets")),
    "size": (("--max-shard-size", "5XB"), ("max shard size is '5XB'", "5GB")),
    "unknown": (("--sparsty", "0.5"), ("--sparsty", "--sparsity")),
    "argument": (("more",), ("more",)),
    "seed abc": (("--seed", "abc"), ("--seed", "abc")),
    "seed too large": (("--seed", str(2**64)), ("seed",)),
}


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
def test_a_bad_option_is_refused_before_anything_is_written(
    options: tuple[str, ...], words: tuple[str, ...], dry: tuple[str, ...], source: Path, tmp_path: Path
):
    refused(run(source, "--out", tmp_path / "out", "--quiet", *dry, *options), *words)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(("args", "word"), [((), "MODEL"), (("model",), "--out"), (("model", "--out"), "--out")])
def test_a_missing_argument_is_named(args: tuple[str, ...], word: str):
    refused(run(*args), word)


@pytest.mark.parametrize("verb", ["inspect", "eval", "generate", "retarget", "convert"])
def test_a_verb_without_its_folder_is_refused(verb: str):
    refused(run_wina(verb), "Missing")


def test_a_verb_that_does_not_exist_is_refused():
    refused(run_wina("nosuch"), "nosuch")


BAD_EVAL = {
    "sparsity abc": (("--sparsity", "abc"), ("sparsity", "abc")),
    "sparsity 2": (("--sparsity", "0.5,2"), ("sparsity is 2.0", "between 0 and 0.95")),
    "sparsity nan": (("--sparsity", "nan"), ("sparsity is nan",)),
    "samples 0": (("--samples", "0"), ("samples is 0", "at least 1")),
    "batch 0": (("--batch-size", "0"), ("batch size is 0", "at least 1")),
    "batch -1": (("--batch-size", "-1"), ("batch size is -1", "at least 1")),
    "length 7": (("--seq-len", "7"), ("sequence length is 7", "8 to 256")),
    "length 257": (("--seq-len", "257"), ("sequence length is 257", "8 to 256")),
    "device tpu": (("--device", "tpu"), ("device is 'tpu'",)),
    "no text": (("--text", "nosuch.txt"), ("nosuch.txt",)),
    "no source": (("--source", "./nosuch"), ("./nosuch", "not a folder")),
}


@pytest.mark.parametrize(("options", "words"), BAD_EVAL.values(), ids=BAD_EVAL)
def test_a_bad_option_of_eval_is_refused(options: tuple[str, ...], words: tuple[str, ...], wina_tiny: Path, text: Path):
    refused(run_wina("eval", wina_tiny, "--text", text, "--quiet", *options), *words)


BAD_GENERATE = {
    "tokens 0": (("--max-new-tokens", "0"), ("max new tokens is 0",)),
    "temperature -1": (("--temperature", "-1"), ("temperature is -1.0",)),
    "temperature nan": (("--temperature", "nan"), ("temperature is nan",)),
    "sparsity 2": (("--sparsity", "2"), ("sparsity is 2.0", "between 0 and 0.95")),
    "sparsity nan": (("--sparsity", "nan"), ("sparsity is nan",)),
    "dtype int3": (("--dtype", "int3"), ("dtype is 'int3'", "auto, float32, bfloat16, float16")),
    "device tpu": (("--device", "tpu"), ("device is 'tpu'",)),
    "seed -1": (("--seed", "-1"), ("seed is -1",)),
    "seed too large": (("--seed", str(2**32)), (f"seed is {2**32}",)),
}


@pytest.mark.parametrize(("options", "words"), BAD_GENERATE.values(), ids=BAD_GENERATE)
def test_a_bad_option_of_generate_is_refused(options: tuple[str, ...], words: tuple[str, ...], wina_tiny: Path):
    refused(run_wina("generate", wina_tiny, "--prompt", "The", "--max-new-tokens", "2", *options), *words)


@pytest.mark.parametrize("model", ["nowhere", "some/model"])
def test_generate_from_what_is_no_checkpoint_is_refused(model: str, source: Path):
    refused(run_wina("generate", model, "--prompt", "The"), model)
    refused(run_wina("generate", source, "--prompt", "The"), str(source), "not a WINA checkpoint")
