"""Golden checkpoints: what was written in each format version loads, computes and verifies as it did then."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from support import ROOT, TESTS
from support.folders import config_of, tensors_of
from wina_convert import WinaConfig, load, set_sparsity
from wina_convert.errors import CheckpointError
from wina_convert.runtime.linear import gated_modules
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.retarget import retarget
from wina_convert.verbs.verify import verify_folder

GOLDEN = TESTS / "golden"
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
PROJECTIONS = {
    "llama-bfloat16-tied": LLAMA,
    "gpt2-float32": GPT2,
    "llama-bfloat16-tuned": LLAMA,
    "gpt2-float32-sparse": [*GPT2, "lm_head"],
}
VERSION_1 = {"llama-bfloat16-tied": "wina", "gpt2-float32": "wina"}  # with the scheme
VERSION_2 = {"llama-bfloat16-tuned": "learned", "gpt2-float32-sparse": "r-sparse"}
SPARSITIES = {"0": 0.0, "default": None, "0.8": 0.8}
NAMES = pytest.mark.parametrize("name", PROJECTIONS)


def stored_dtype(name: str) -> str:
    return name.split("-")[1]


def place(name: str) -> Path:
    return GOLDEN / ("v1" if name in VERSION_1 else "v2") / name


def expected(name: str) -> dict[str, Tensor]:
    return load_file(place(name).with_name(f"{name}.expected.safetensors"))


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits.float()


def check_logits(found: Tensor, wanted: Tensor, dtype: str, sparsity: str) -> None:
    """Logits [B, S, vocabulary] are the stored ones, up to the rounding of a dtype.

    In float32 no input is so near its cutoff that rounding decides about it. In bfloat16 some are, and a token for
    which one is skipped or kept differs by more than rounding; but most tokens do not.
    """
    assert found.shape == wanted.shape
    errors = (found - wanted).abs().amax(-1).flatten() / wanted.abs().max()  # of each token
    if dtype == "float32":
        assert errors.max() < 1e-5
    elif sparsity == "0":
        assert errors.max() < 0.05
    else:
        assert errors.median() < 0.15


@pytest.fixture(params=PROJECTIONS)
def copied(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A golden checkpoint to change."""
    return Path(shutil.copytree(place(request.param), tmp_path / request.param))


def test_the_golden_checkpoints_are_all_there():
    for version, names in (("v1", VERSION_1), ("v2", VERSION_2)):
        files = {file for name in names for file in (name, f"{name}.expected.safetensors")}
        assert {path.name for path in (GOLDEN / version).iterdir()} == files
    for name in PROJECTIONS:
        stored = config_of(place(name))["quantization_config"]
        assert stored["format_version"] == (1 if name in VERSION_1 else 2)
        assert stored["sparsity"] == 0.5
        gated = {tensor.dtype for key, tensor in tensors_of(place(name)).items() if key.endswith(".weight_t")}
        assert gated == {getattr(torch, stored_dtype(name))}
        assert sum(path.stat().st_size for path in place(name).rglob("*")) < 80_000


def test_the_checkpoints_of_version_2_have_what_is_new_in_it():
    tuned, sparse = (config_of(place(name))["quantization_config"] for name in VERSION_2)
    assert (tuned["basis"]["kind"], tuned["biases"], tuned["scheme"], len(tuned["shares"])) == (
        "fitted",
        True,
        "learned",
        14,
    )
    tensors = tensors_of(place("llama-bfloat16-tuned"))
    for name in tuned["modules"]:
        assert tensors[f"{name}.biases"][1:].any()
        norms = tensors[f"{name}.weight_t"].float().norm(dim=1)
        assert not torch.allclose(tensors[f"{name}.column_norms"], norms, rtol=1e-3)
    assert (sparse["low_rank"], sparse["scheme"], sparse["modules"][-1]) == (0.05, "r-sparse", "lm_head")
    factors = {name for name in tensors_of(place("gpt2-float32-sparse")) if ".low_rank_" in name}
    assert factors == {f"{name}.low_rank_{end}" for name in sparse["modules"] for end in ("in", "out")}


@pytest.mark.parametrize("sparsity", SPARSITIES)
@NAMES
def test_a_golden_checkpoint_gives_its_logits_by_every_door(name: str, sparsity: str):
    asked, stored = SPARSITIES[sparsity], expected(name)
    tokens = stored["input_ids"]
    chosen = {} if asked is None else {"quantization_config": WinaConfig(sparsity=asked)}
    for dtype in {stored_dtype(name), "float32"}:
        options = {} if dtype == stored_dtype(name) else {"dtype": dtype}  # the stored one needs no word
        wanted = stored[f"logits.{dtype}.{sparsity}"]
        loaded = load(str(place(name)), sparsity=asked, **options)
        plain = AutoModelForCausalLM.from_pretrained(place(name), **chosen, **options)
        assert loaded.dtype == plain.dtype == getattr(torch, dtype)
        check_logits(logits(loaded, tokens), wanted, dtype, sparsity)
        check_logits(logits(plain, tokens), wanted, dtype, sparsity)


@NAMES
def test_a_golden_checkpoint_serves_every_sparsity_in_place(name: str):
    stored = expected(name)
    model = load(str(place(name)), dtype="float32")
    for sparsity, asked in SPARSITIES.items():
        set_sparsity(model, 0.5 if asked is None else asked)
        check_logits(logits(model, stored["input_ids"]), stored[f"logits.float32.{sparsity}"], "float32", sparsity)


@NAMES
def test_the_stored_logits_tell_the_sparsities_apart(name: str):
    stored = expected(name)
    for dtype in {stored_dtype(name), "float32"}:
        for found in SPARSITIES:
            for wanted in set(SPARSITIES) - {found}:
                with pytest.raises(AssertionError):
                    check_logits(stored[f"logits.{dtype}.{found}"], stored[f"logits.{dtype}.{wanted}"], dtype, wanted)


@NAMES
def test_a_golden_checkpoint_verifies(name: str):
    assert verify_folder(place(name)).files == len(list((place(name)).iterdir())) - 1  # the manifest itself


@NAMES
def test_a_golden_checkpoint_is_inspected(name: str):
    found, tensors = inspect_checkpoint(place(name)), tensors_of(place(name))
    report = json.loads((place(name) / "wina_report.json").read_text())["verification"]
    scheme = {**VERSION_1, **VERSION_2}[name]
    assert (found.sparsity, found.measured_at, found.source, found.scheme) == (0.5, 0.5, name, scheme)
    assert [layer.layer for layer in found.layers] == [0, 1, *([None] if "lm_head" in PROJECTIONS[name] else [])]
    by_suffix = {key: value for layer in found.layers for key, value in layer.thresholds.items()}
    assert [key.endswith(kind) for key, kind in zip(by_suffix, PROJECTIONS[name], strict=True)] == [True] * len(
        by_suffix
    )
    shown = [value for layer in found.layers for value in layer.thresholds.values()]
    assert shown == pytest.approx(list(report["thresholds"].values()), rel=1e-6)
    gated = sum(tensor.nbytes for key, tensor in tensors.items() if key.endswith(".weight_t"))
    assert sum(layer.nbytes for layer in found.layers) == gated
    assert found.other_bytes == sum(tensor.nbytes for tensor in tensors.values()) - gated
    assert all(abs(layer.achieved - 0.5) < 0.1 for layer in found.layers)


def test_a_golden_checkpoint_can_be_retargeted(copied: Path):
    stored = expected(copied.name)
    retarget(copied, 0.8)
    verify_folder(copied)
    model = AutoModelForCausalLM.from_pretrained(copied, dtype="float32")
    check_logits(logits(model, stored["input_ids"]), stored["logits.float32.0.8"], "float32", "0.8")


def test_a_golden_checkpoint_saved_again_is_the_same(copied: Path, tmp_path: Path):
    load(str(copied)).save_pretrained(tmp_path / "again")
    before, after = tensors_of(copied), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    blocks = [config_of(folder)["quantization_config"] for folder in (copied, tmp_path / "again")]
    assert blocks[0] == blocks[1]


def test_every_gated_projection_of_a_golden_checkpoint_is_gated(copied: Path):
    assert list(gated_modules(load(str(copied)))) == config_of(copied)["quantization_config"]["modules"]


@pytest.mark.parametrize("read", [load, AutoModelForCausalLM.from_pretrained, inspect_checkpoint, retarget])
def test_the_next_format_version_is_refused_with_the_remedy(read, copied: Path):
    config = config_of(copied)
    config["quantization_config"]["format_version"] = 3
    (copied / "config.json").write_text(json.dumps(config))
    arguments = (copied, 0.5) if read is retarget else (str(copied),)
    remedy = r"format version 3 .* reads versions 1 and 2; run `pip install --upgrade wina-convert`"
    with pytest.raises(CheckpointError, match=remedy):
        read(*arguments)


def test_the_golden_files_are_in_the_repository_and_the_sdist_and_not_in_the_wheel(tmp_path: Path):
    files = {path.relative_to(ROOT).as_posix() for path in GOLDEN.rglob("*") if path.is_file()}
    if (ROOT / ".git").exists() and shutil.which("git"):
        ignored = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (ignored.returncode, ignored.stdout) == (1, ""), ignored.stderr
    assert files <= {file.distribution_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    wheel = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert "wina_convert/format/trust.py" in wheel
    assert not [path for path in wheel if "golden" in path]
