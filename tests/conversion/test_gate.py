"""A plain model gated while it is loaded is the one that a conversion writes, and nothing is written."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from support.commands import contents
from support.families import make_model
from support.folders import config_of, tensors_of, write_biases
from support.loaded import equal, greedy, logits
from support.processes import in_new_process
from wina_convert import WinaConfig, convert, load
from wina_convert.errors import CalibrationError, CheckpointError, OptionError
from wina_convert.verbs.export import export

pytestmark = pytest.mark.slow

MODEL = "one layer"  # see support/shared.py
SMALL = {"samples": 4, "seq_len": 16}


def gated(source: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=WinaConfig(**options))


def same(found: Any, expected: Any) -> None:
    assert equal(dict(found.state_dict()), dict(expected.state_dict()))
    assert found.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()
    assert torch.equal(logits(found), logits(expected))
    assert torch.equal(greedy(found), greedy(expected))


CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "biases, tied": ("llama-tied", torch.float32, {}),
    "stored [in, out]": ("gpt2", torch.float32, {"targets": ("mlp",)}),
    "half precision": ("qwen2", torch.bfloat16, {"scheme": "teal", "allocation": "uniform", "seed": 3}),
}


@pytest.mark.parametrize(("family", "dtype", "options"), CASES.values(), ids=CASES)
def test_a_model_calibrated_while_it_is_loaded_is_the_converted_one(
    family: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
):
    source = make_model(family, tmp_path / "source", dtype)
    before = contents(source)
    convert(str(source), tmp_path / "wina", sparsity=0.6, basis="none", **SMALL, **options)
    model = gated(source, sparsity=0.6, calibration="bundled", conversion={**SMALL, **options})
    same(model, load(str(tmp_path / "wina")))
    assert contents(source) == before
    model.save_pretrained(tmp_path / "saved")
    same(load(str(tmp_path / "saved")), load(str(tmp_path / "wina")))
    assert equal(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "wina"))
    blocks = [config_of(tmp_path / name)["quantization_config"] for name in ("saved", "wina")]
    assert blocks[0] == blocks[1]


def test_a_text_file_a_dtype_and_a_prefill_can_be_chosen(source: Path, tmp_path: Path):
    text = tmp_path / "notes.txt"
    text.write_text("Some words of no use, and some more of them. " * 200)
    options: dict[str, Any] = {"calibration": text, "prefill": "dense", "conversion": SMALL}
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=WinaConfig(**options)
    )
    convert(str(source), tmp_path / "wina", calibration=str(text), basis="none", dtype="bfloat16", **SMALL)
    same(model, load(str(tmp_path / "wina"), prefill="dense"))
    assert model.config.quantization_config.calibration["text"] == "notes.txt"


def test_thresholds_can_be_taken_from_a_checkpoint(wina_tiny: Path, tiny: Path, tmp_path: Path):
    same(gated(tiny, thresholds=wina_tiny), load(str(wina_tiny)))
    same(gated(tiny, thresholds=wina_tiny, sparsity=0.3), load(str(wina_tiny), sparsity=0.3))
    learned = write_biases(Path(shutil.copytree(wina_tiny, tmp_path / "wina")))
    same(gated(tiny, thresholds=str(learned)), load(str(learned)))
    base = AutoModel.from_pretrained(tiny, quantization_config=WinaConfig(thresholds=wina_tiny))
    assert equal(dict(base.state_dict()), dict(AutoModel.from_pretrained(wina_tiny).state_dict()))


def test_columns_are_weighed_by_the_models_own_weights(wina_tiny: Path, tiny: Path, tmp_path: Path):
    other = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    found = gated(tmp_path / "other", thresholds=wina_tiny).model.layers[1].mlp.up_proj
    before = load(str(wina_tiny)).model.layers[1].mlp.up_proj
    torch.testing.assert_close(found.column_norms, 2 * before.column_norms)
    assert torch.equal(found.thresholds, before.thresholds)
    assert torch.equal(found.weight_t, 2 * before.weight_t)


def test_a_gated_model_can_be_made_plain_again(wina_tiny: Path, tiny: Path, tmp_path: Path):
    model = gated(tiny, thresholds=wina_tiny)
    model.save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "out")
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tiny))
    model.dequantize()
    assert equal(dict(model.state_dict()), dict(AutoModelForCausalLM.from_pretrained(tiny).state_dict()))


def test_a_log_tells_how_far_calibration_is(source: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "wina_convert"):
        gated(source, calibration="bundled", conversion=SMALL)
    assert "Calibrating on 4 sequences" in caplog.text


# Refusals

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"calibration": "bundled", "thresholds": "x"}, "calibration and thresholds are given"),
    "options alone": ({"conversion": {"samples": 4}}, "conversion is given without calibration"),
    "a basis": (
        {"calibration": "bundled", "conversion": {"basis": "pca"}},
        "conversion has 'basis', .* give samples, ",
    ),
    "tuning": ({"calibration": "bundled", "conversion": {"tune": True}}, "conversion has 'tune'"),
    "sparsity": ({"calibration": "bundled", "sparsity": 1.5}, "sparsity is 1.5"),
}


@pytest.mark.parametrize(("options", "words"), BAD.values(), ids=BAD)
def test_arguments_that_do_not_go_together_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(OptionError, match=words):
        WinaConfig(**options)


def test_what_a_conversion_would_refuse_is_refused(source: Path):
    with pytest.raises(CalibrationError, match=r"nowhere\.txt"):
        gated(source, calibration="nowhere.txt")
    with pytest.raises(OptionError, match="samples is 0"):
        gated(source, calibration="bundled", conversion={"samples": 0})


def test_thresholds_of_other_weights_are_refused(wina_tiny: Path, converted: Path, tiny: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"in another shape than this model|matches 0 linear projections"):
        gated(tiny, thresholds=converted)
    source = make_model("llama", tmp_path / "source")
    convert(str(source), tmp_path / "wina", basis="pca", **SMALL)
    with pytest.raises(CheckpointError, match=r"weights in another basis \(pca\)"):
        gated(source, thresholds=tmp_path / "wina")
    with pytest.raises(CheckpointError, match="is not a WINA checkpoint"):
        gated(source, thresholds=source)


def test_a_checkpoint_is_not_gated_twice(wina_tiny: Path):
    for options in ({"calibration": "bundled"}, {"thresholds": wina_tiny}):
        with pytest.raises(OptionError, match="this is a WINA checkpoint; leave them out"):
            gated(wina_tiny, **options)


def test_offloaded_weights_are_refused(wina_tiny: Path, tiny: Path, tmp_path: Path):
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{n}": "disk" if n else "cpu" for n in range(4)}
    with pytest.raises(CheckpointError, match="offloaded weights cannot be gated while it is loaded"):
        AutoModelForCausalLM.from_pretrained(
            tiny,
            device_map=places,
            offload_folder=tmp_path,
            quantization_config=WinaConfig(thresholds=wina_tiny),
        )


SPLIT = """
import sys, warnings
warnings.simplefilter("ignore")
import wina_convert
from transformers import AutoModelForCausalLM
from wina_convert import WinaConfig
try:
    AutoModelForCausalLM.from_pretrained(
        sys.argv[1], tp_plan="auto", quantization_config=WinaConfig(thresholds=sys.argv[2])
    )
except wina_convert.WinaError as error:
    print('"' + str(error) + '"')
"""


def test_tensor_parallel_is_refused_with_the_reason(tiny: Path, wina_tiny: Path):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    said, _ = in_new_process(SPLIT, str(tiny), str(wina_tiny), **alone)
    assert (
        "split among processes cannot be gated while it is loaded: a column norm is taken over the whole column" in said
    )
