"""`wina export` gives back the model that was converted: bit for bit, or equal, and it says which."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from support.breaking import failing, patch_call
from support.commands import contents, refused, run_wina, succeeded
from support.edits import edit_tensor
from support.families import make_model
from support.folders import config_of, tensors_of, write_biases
from support.killing import Child
from support.loaded import PROMPT, equal, logits
from wina_convert import convert, load
from wina_convert.errors import VerificationError
from wina_convert.format.names import CARD, CONFIG
from wina_convert.verbs.export import export

pytestmark = pytest.mark.slow

MODEL = "kilobytes in shards"  # see support/shared.py
WRITE = "wina_convert.format.shard_writer.ShardWriter.write"
FAST: dict[str, Any] = {"samples": 4, "seq_len": 16}


def described(source: Path, out: Path, left: str = CARD) -> None:
    """The files beside the weights are the source's."""
    others = [
        {name: data for name, data in contents(folder).items() if not name.startswith("model") and name != left}
        for folder in (source, out)
    ]
    assert others[0] == others[1]


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "phi3", "gemma3_text"])
def test_what_was_only_gated_comes_back_bit_for_bit(family: str, tmp_path: Path):
    dtype = torch.bfloat16 if family == "phi3" else torch.float32
    source = make_model(family, tmp_path / "source", dtype)
    convert(str(source), tmp_path / "wina", basis="none", **FAST)
    done = export(tmp_path / "wina", tmp_path / "out")
    assert equal(tensors_of(tmp_path / "out"), tensors_of(source))
    assert done.differs == ()
    assert done.tensors == len(tensors_of(source))
    described(source, tmp_path / "out")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
        logits(AutoModelForCausalLM.from_pretrained(source)),
    )


def test_a_turned_model_comes_back_equal_and_the_command_says_so(tmp_path: Path):
    source = make_model("llama-tied", tmp_path / "source")
    convert(str(source), tmp_path / "wina", basis="pca", **FAST)
    result = run_wina("export", tmp_path / "wina", "--out", tmp_path / "out")
    succeeded(result)
    assert (
        "equals source up to rounding, not bit for bit: the conversion put it in another basis (pca)" in result.stdout
    )
    expected = logits(AutoModelForCausalLM.from_pretrained(source))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.equal(found, expected)
    assert config_of(tmp_path / "out") == config_of(source) | {"tie_word_embeddings": False}
    assert result.stdout.rstrip().rpartition("MB. ")[2] in (tmp_path / "out" / CARD).read_text()


def test_a_dtype_chosen_at_conversion_stays_and_is_named(tmp_path: Path):
    source = make_model("llama", tmp_path / "source")
    convert(str(source), tmp_path / "wina", basis="none", dtype="bfloat16", **FAST)
    assert export(tmp_path / "wina", tmp_path / "out").differs == ("the conversion stored it in bfloat16",)
    rounded = {name: tensor.bfloat16() for name, tensor in tensors_of(source).items()}
    assert equal(tensors_of(tmp_path / "out"), rounded)
    assert config_of(tmp_path / "out") == config_of(source) | {"dtype": "bfloat16"}


def test_biases_along_the_sparsity_are_no_part_of_the_dense_model(wina_tiny: Path, tiny: Path, tmp_path: Path):
    learned = write_biases(Path(shutil.copytree(wina_tiny, tmp_path / "wina")))
    (learned / "wina_manifest.json").unlink()
    export(learned, tmp_path / "out")
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tiny))


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
def test_a_checkpoint_that_another_program_saved_comes_back_too(kind: Any, wina_tiny: Path, tiny: Path, tmp_path: Path):
    kind.from_pretrained(wina_tiny).save_pretrained(tmp_path / "saved")
    kind.from_pretrained(tiny).save_pretrained(tmp_path / "expected")
    done = export(tmp_path / "saved", tmp_path / "out")
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))
    assert done.differs == ("another program saved the checkpoint, without wina_manifest.json",)
    assert config_of(tmp_path / "out") == config_of(tmp_path / "expected")


@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_it_is_written_in_shards_of_the_size_asked_for(size: str, source: Path, converted: Path, tmp_path: Path):
    result = run_wina("export", converted, "--out", tmp_path / "out", "--max-shard-size", size, "--json")
    succeeded(result)
    said = json.loads(result.stdout)
    assert said["bit_for_bit"]
    assert said["source"] == source.name
    assert equal(tensors_of(tmp_path / "out"), tensors_of(source))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if size == "5GB" else 3)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_pictures_stay_behind(copied: Path, tmp_path: Path):
    for name in ("wina_sparsity.png", "logo.png"):
        (copied / name).write_bytes(b"png")
    export(copied, tmp_path / "dense")
    assert {path.name for path in (tmp_path / "dense").glob("*.png")} == {"logo.png"}


def test_the_card_keeps_the_licence_and_no_tag_of_ours(copied: Path, tmp_path: Path):
    card = (copied / CARD).read_text().replace("---\n", "---\nlicense: mit\nlanguage: [en]\n", 1)
    assert "activation-sparsity" in card
    (copied / CARD).write_text(card)
    export(copied, tmp_path / "dense")
    head = (tmp_path / "dense" / CARD).read_text().split("---\n")[1]
    assert "license: mit" in head
    assert "- en" in head
    assert "activation-sparsity" not in head


# Refusals, and what they leave


def test_a_target_that_exists_is_refused(converted: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    before = contents(tmp_path)
    refused(run_wina("export", converted, "--out", tmp_path / "out"), "exists; choose another --out")
    refused(run_wina("export", tmp_path / "out", "--out", tmp_path / "new"), "has no config.json")
    refused(run_wina("export", converted, "--out", converted / "dense"), "one inside the other")
    assert contents(tmp_path) == before


def test_only_an_earlier_export_is_replaced_and_only_where_asked_for(
    source: Path, converted: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dense, other = tmp_path / "dense", shutil.copytree(source, tmp_path / "other")
    export(converted, dense, max_shard_size="30KB")
    edit_tensor("model.norm.weight", lambda tensor: tensor.add_(1))(dense)
    before = contents(tmp_path)
    again = ("export", converted, "--quiet", "--out")
    refused(
        run_wina(*again, dense),
        "exists; choose another --out, or pass --overwrite to replace a model that `wina export`",
    )
    for folder in (other, copied):
        refused(
            run_wina(*again, folder, "--overwrite"), "is not a model that `wina export` wrote, so --overwrite does not"
        )
    with monkeypatch.context() as patched:
        patch_call(patched, WRITE, 5, failing(RuntimeError("odd")))
        assert run_wina(*again, dense, "--overwrite").exit_code == 1
    assert contents(tmp_path) == before
    succeeded(run_wina(*again, dense, "--overwrite"))
    assert equal(tensors_of(dense), tensors_of(source))
    assert len(list(dense.glob("*.safetensors"))) == 1


def test_a_plain_model_is_refused(source: Path, tmp_path: Path):
    refused(run_wina("export", source, "--out", tmp_path / "out", "--quiet"), "is not a WINA checkpoint")
    assert contents(tmp_path) == {}


def test_a_weight_file_that_was_changed_is_refused(copied: Path, tmp_path: Path):
    edit_tensor("model.norm.weight", lambda tensor: tensor.add_(1))(copied)
    with pytest.raises(VerificationError, match=r"model-0.* was changed since the conversion"):
        export(copied, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_gated_name_that_is_no_linear_map_of_its_model_is_refused(copied: Path, tmp_path: Path):
    config = config_of(copied) | {"hidden_size": 32}
    (copied / CONFIG).write_text(json.dumps(config))
    refused(run_wina("export", copied, "--out", tmp_path / "dense", "--quiet"), "is no linear map of")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


ERRORS = [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), RuntimeError("odd")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_export_that_fails_leaves_nothing(
    error: BaseException, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patch_call(patched, WRITE, 5, failing(error))
        result = run_wina("export", converted, "--out", tmp_path / "out", "--quiet")
    assert result.exit_code == {KeyboardInterrupt: 130, OSError: 2, RuntimeError: 1}[type(error)]
    if isinstance(error, OSError):
        assert "is full" in refused(result)
    assert contents(tmp_path) == {}


def test_an_export_that_is_killed_leaves_no_target_and_another_one_succeeds(
    source: Path, converted: Path, tmp_path: Path
):
    arguments = {"folder": converted, "out": tmp_path / "out"}
    events = Child(export, arguments, tmp_path).end().events
    shutil.rmtree(tmp_path / "out")
    (published,) = [number for number, event in enumerate(events, 1) if event.endswith(" .out.wina-staging out")]
    for at in (published // 3, 2 * published // 3, published):
        assert Child(export, arguments, tmp_path, at).end().killed
        assert not (tmp_path / "out").exists()
        assert any(path.name.startswith(".out.") for path in tmp_path.iterdir())
    export(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert equal(tensors_of(tmp_path / "out"), tensors_of(source))


# In memory


def test_dequantize_gives_the_model_that_export_writes(converted: Path, tmp_path: Path):
    model = load(str(converted))
    export(converted, tmp_path / "out")
    model.dequantize()
    assert equal(dict(model.state_dict()), dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()))
    assert torch.equal(logits(model, PROMPT), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), PROMPT))
