"""What a conversion writes, what it gates, and what it leaves alone."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

import wina_convert
from support.families import make_model
from support.folders import config_of, files_of, tensors_of
from wina_convert.errors import OptionError
from wina_convert.format.names import MANIFEST
from wina_convert.progress import lines

FAST: dict[str, Any] = {"samples": 4, "seq_len": 32, "batch_size": 8, "basis": "none"}


@pytest.mark.slow
def test_same_input_same_bytes(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    wina_convert.convert(str(tiny), tmp_path / "one", plot=True, **FAST)
    torch.manual_seed(torch.seed())
    wina_convert.convert(str(tiny), tmp_path / "another-name", plot=True, progress=lines(said.append), **FAST)
    one, other = files_of(tmp_path / "one"), files_of(tmp_path / "another-name")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    assert said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"targets": ["mlp"]}, {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        ({"targets": ["attention"]}, {f"self_attn.{p}_proj" for p in "qkvo"}),
        ({"targets": ["*.down_proj", "*.q_proj"]}, {"mlp.down_proj", "self_attn.q_proj"}),
        (
            {"targets": ["attention", "*.up_proj"], "ignore": ["*.[kv]_proj"]},
            {"self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"},
        ),
    ],
    ids=["mlp", "attention", "patterns", "both with ignore"],
)
def test_targets_and_ignore_choose_what_is_gated(
    options: dict[str, list[str]], expected: set[str], tiny: Path, tmp_path: Path
) -> None:
    report = wina_convert.convert(str(tiny), tmp_path / "out", **options, **FAST)
    names = {f"model.layers.{layer}.{kind}" for layer in range(4) for kind in expected}
    assert set(report["projections"]) == names
    assert set(config_of(tmp_path / "out")["quantization_config"]["modules"]) == names
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {name for name, module in model.named_modules() if hasattr(module, "weight_t")} == names
    source, written = tensors_of(tiny), tensors_of(tmp_path / "out")
    dense = [name for name in source if name.removesuffix(".weight") not in names]
    assert all(torch.equal(source[name], written[name]) for name in dense)


@pytest.mark.slow
def test_ignore_leaves_a_whole_layer_dense(tiny: Path, tmp_path: Path) -> None:
    report = wina_convert.convert(str(tiny), tmp_path / "out", ignore=["model.layers.0.*"], **FAST)
    assert {name.split(".")[2] for name in report["projections"]} == {"1", "2", "3"}
    plan = wina_convert.convert(str(tiny), tmp_path / "plan", ignore=["model.layers.0.*"], dry_run=True)
    assert plan["bytes_per_token"] == report["bytes_per_token"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ignore": ["*"]}, "nothing is left to gate"),
        ({"targets": ["mlp"], "ignore": ["*.mlp.*"]}, "nothing is left to gate"),
        ({"targets": []}, "nothing is left to gate"),
        ({"targets": ["*.dwon_proj"]}, "'*.dwon_proj'"),
        ({"targets": ["mlp", "lm_head"]}, "'lm_head'"),
        ({"ignore": ["model.layers.9.*"]}, "'model.layers.9.*'"),
    ],
    ids=str,
)
def test_a_choice_that_gates_nothing_or_matches_nothing_is_an_error(
    options: dict[str, list[str]], named: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError) as caught:
        wina_convert.convert(str(tiny), tmp_path / "out", **options, **FAST)
    assert named in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny", "llama", "gpt2", "gpt_neox"])
def test_a_dry_run_touches_nothing_and_counts_the_bytes_of_a_token(
    family: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny if family == "tiny" else make_model(family, tmp_path / "source")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)

    def everything() -> list[tuple[str, int]]:
        paths = [*tmp_path.rglob("*"), *source.rglob("*")]
        return sorted((str(path), path.stat().st_mtime_ns) for path in paths)

    before = everything()
    plan = wina_convert.convert(str(source), "out", sparsity=0.4, basis="none", dry_run=True)
    assert everything() == before

    tensors = tensors_of(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    linear = {name: m for name, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() == 2}
    gated = [name for name, m in linear.items() if not isinstance(m, torch.nn.Embedding) and name != "lm_head"]
    embeddings = [f"{name}.weight" for name, m in linear.items() if isinstance(m, torch.nn.Embedding)]
    if model.config.tie_word_embeddings:
        embeddings.remove(next(n for n in embeddings if "embed" in n or "wte" in n))  # it is the head as well
    dense = sum(tensor.nbytes for name, tensor in tensors.items() if name not in embeddings)
    assert plan["bytes_per_token"]["dense"] == dense
    weights = {name: tensors[f"{name}.weight"] for name in gated}
    inputs = {name: w.shape[0] if family == "gpt2" else w.shape[1] for name, w in weights.items()}
    skipped = sum(0.4 * weights[name].nbytes - 4 * inputs[name] for name in gated)
    assert plan["bytes_per_token"]["gated"] == pytest.approx(dense - skipped, abs=len(gated))
    assert set(plan["projections"]) == set(gated)
    assert plan["seconds"] > 0

    monkeypatch.undo()
    report = wina_convert.convert(str(source), tmp_path / "out", sparsity=0.4, **FAST)
    # What is asked of each matrix is not known before it is measured, and its bytes are rounded one by one.
    assert plan["bytes_per_token"]["gated"] == pytest.approx(report["bytes_per_token"]["gated"], abs=len(gated))
    shared = ("disk_bytes", "projections", "layers", "source")
    assert {key: plan[key] for key in shared} == {key: report[key] for key in shared}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_tensor_of_the_source_is_in_the_checkpoint(family: str, tmp_path: Path) -> None:
    source = tensors_of(make_model(family, tmp_path / "source"))
    report = wina_convert.convert(str(tmp_path / "source"), tmp_path / "out", **FAST)
    written = tensors_of(tmp_path / "out")
    for name in list(report["projections"]):
        weight = source.pop(f"{name}.weight")
        columns_of = weight if family == "gpt2" else weight.t()
        assert torch.equal(written.pop(f"{name}.weight_t"), columns_of)
        norms = written.pop(f"{name}.column_norms")
        torch.testing.assert_close(norms.double(), columns_of.double().norm(dim=1), rtol=1e-6, atol=0)
        curve = written.pop(f"{name}.thresholds")
        assert curve.dtype == norms.dtype == torch.float32
        assert len(curve) == 20
        assert curve[0] == 0
        assert (curve.diff() > 0).all()
    sentinel = written.pop(f"{next(iter(report['projections']))}.weight")
    assert sentinel.shape == (0,)
    assert source.keys() == written.keys()
    assert all(torch.equal(source[name], written[name]) for name in source)


def test_the_files_are_as_the_safetensors_library_writes_them(wina_tiny: Path) -> None:
    file = wina_tiny / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert save(load_file(file), metadata={"format": "pt"}) == file.read_bytes()


@pytest.mark.slow
def test_plot_writes_two_pictures(tiny: Path, tmp_path: Path) -> None:
    plain = wina_convert.convert(str(tiny), tmp_path / "plain", **FAST)
    plotted = wina_convert.convert(str(tiny), tmp_path / "plotted", plot=True, **FAST)
    without, found = files_of(tmp_path / "plain"), files_of(tmp_path / "plotted")
    fewer, more = (json.loads(files.pop(MANIFEST))["files"] for files in (without, found))
    pictures = found.keys() - without.keys()
    assert pictures == {"wina_sparsity.png", "wina_scores.png"}
    for name in pictures:
        assert found[name].startswith(b"\x89PNG\r\n\x1a\n")
        width, height = (int.from_bytes(found[name][at : at + 4], "big") for at in (16, 20))
        assert min(width, height) > 300
        assert len(found[name]) > 10_000
    assert plain == plotted
    assert {name for name in without if found[name] != without[name]} == {"README.md"}
    assert all(f"]({name})" in found["README.md"].decode() for name in pictures)
    assert "![" not in without["README.md"].decode()
    assert more.keys() - fewer.keys() == pictures
    assert all(more[name] == fewer[name] for name in fewer if name != "README.md")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["*.down_proj"]},
        {"targets": ["model.layers.2.mlp.down_proj"]},
        {"targets": ["mlp"], "sparsity": 0.0},
        {"ignore": ["model.layers.0.*"], "sparsity": 0.95},
    ],
    ids=str,
)
def test_pictures_of_any_choice(options: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    wina_convert.convert(str(tiny), tmp_path / "out", plot=True, **options, **FAST, seed=1)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"wina_sparsity.png", "wina_scores.png"}


@pytest.mark.parametrize(
    ("stored", "asked", "field"),
    [
        (torch.float32, "bfloat16", "dtype"),
        (torch.float32, "float16", "torch_dtype"),
        (torch.bfloat16, "float32", "dtype"),
        (torch.float32, "bfloat16", None),
    ],
)
def test_a_chosen_dtype_casts_tensors_and_config(
    stored: torch.dtype, asked: str, field: str | None, tmp_path: Path
) -> None:
    source = make_model("qwen2", tmp_path / "source", stored)
    before = config_of(source)
    name = before.pop("dtype")
    (source / "config.json").write_text(json.dumps({**before, **({field: name} if field else {})}))
    wina_convert.convert(str(source), tmp_path / "out", dtype=asked, **FAST)
    dtype = getattr(torch, asked)
    after = config_of(tmp_path / "out")
    assert after.pop(field or "dtype") == asked
    ours = {"quantization_config", "transformers_weights"}
    assert {key: value for key, value in after.items() if key not in ours} == before
    original, written = tensors_of(source), tensors_of(tmp_path / "out")
    assert torch.equal(written["model.norm.weight"], original["model.norm.weight"].to(dtype))
    q_proj = "model.layers.0.self_attn.q_proj"
    assert torch.equal(written[f"{q_proj}.weight_t"], original[f"{q_proj}.weight"].to(dtype).t())
    assert torch.equal(written[f"{q_proj}.bias"], original[f"{q_proj}.bias"].to(dtype))
    norms = written[f"{q_proj}.weight_t"].double().norm(dim=1)
    torch.testing.assert_close(written[f"{q_proj}.column_norms"].double(), norms, rtol=1e-6, atol=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == dtype
    assert model.get_submodule(q_proj).column_norms.dtype == torch.float32


def test_tensors_keep_a_dtype_of_their_own(tmp_path: Path) -> None:
    """Norms in float32 beside bfloat16, and a config that asks for another dtype than the file's."""
    source = make_model("llama", tmp_path / "source", torch.bfloat16)
    mixed = {name: t.float() if "norm" in name or "mlp" in name else t for name, t in tensors_of(source).items()}
    (source / "model.safetensors").write_bytes(save(mixed, metadata={"format": "pt"}))
    wina_convert.convert(str(source), tmp_path / "out", **FAST)
    written = tensors_of(tmp_path / "out")
    assert written["model.layers.0.mlp.down_proj.weight_t"].dtype == torch.float32
    assert written["model.layers.0.self_attn.q_proj.weight_t"].dtype == torch.bfloat16
    assert written["model.norm.weight"].dtype == torch.float32
    model = wina_convert.load(str(tmp_path / "out"), sparsity=0.0)
    assert model.dtype == torch.bfloat16
    prompt = torch.arange(2, 42)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(prompt).logits.float()
        assert (model(prompt).logits.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.slow
def test_every_progress_step_ends_at_its_total(tiny: Path, tmp_path: Path) -> None:
    steps: dict[str, list[Any]] = {}

    @contextmanager
    def record(label: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        steps[label] = [unit, total, 0]

        def advance(done: int) -> None:
            steps[label][2] += done

        yield advance

    wina_convert.convert(str(tiny), tmp_path / "out", progress=record, **FAST)
    assert [unit for unit, _, _ in steps.values()] == ["layer", "B", "layer", "tensor", "layer"], list(steps)
    assert [label for label, (_, total, done) in steps.items() if not done == total > 0] == []
