"""A checkpoint holds everything of its source, and its config is the source's with a block more."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.breaking import failing
from support.commands import SMALL, contents, run, run_wina, succeeded
from wina_convert.format.names import MANIFEST
from wina_convert.runtime.linear import gated_modules

pytestmark = pytest.mark.slow

MODEL = "one layer"  # see support/shared.py


SIDECARS = {
    "LICENSE": b"Apache License 2.0\n",
    "NOTICE.txt": "Grüße\r\n".encode(),
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "special_tokens_map.json": b'{"bos_token": "<s>"}',
    "preprocessor_config.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "tokenizer.model": b"\0\1\2",
    "assets/picture.png": b"\x89PNG",
    "modeling_own.py": b"raise RuntimeError\n",
}
LEFT_BEHIND = {
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "model.gguf": b"GGUF",
    "onnx/model.onnx": b"onnx",
    "tf_model.h5": b"h5",
    "flax_model.msgpack": b"msgpack",
    "consolidated.safetensors": b"other safetensors",
    "adapter_config.json": b'{"peft_type": "LORA"}',  # of an adapter that is merged
    "adapter_model.safetensors": b"adapter",
    "checkpoint-500/config.json": b"{}",
    "trainer_state.json": b"{}",
    "model.fp32.safetensors": b"other safetensors",
    "video.mp4": b"no sidecar",
    ".gitattributes": b"hidden",
    ".cache/huggingface/download.lock": b"hidden",
}


def test_everything_beside_the_weights_comes_along_unchanged(source: Path, tmp_path: Path):
    folder = shutil.copytree(source, tmp_path / "source")
    for name, data in {**SIDECARS, **LEFT_BEHIND}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    succeeded(run(folder, "--out", tmp_path / "out", *SMALL))
    found = {name: data for name, data in contents(tmp_path / "out").items() if (tmp_path / "out" / name).is_file()}
    assert {name: found.get(name) for name in SIDECARS} == SIDECARS
    kept = {name for name in contents(source) if name not in ("model.safetensors", "config.json")}
    assert set(found) == {
        "config.json",
        "model.safetensors",
        "README.md",
        "wina_report.json",
        MANIFEST,
        *SIDECARS,
        *kept,
    }
    for name in kept:
        assert found[name] == (source / name).read_bytes()


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), f"a name stands twice: {[name for name, _ in pairs]}"
    return dict(pairs)


FORMATS: dict[str, Callable[[str], str]] = {
    "as saved": lambda text: text,
    "compact": lambda text: json.dumps(json.loads(text), separators=(",", ":")),
    "tabs": lambda text: json.dumps(json.loads(text), indent="\t") + "\n\n",
    "windows": lambda text: text.replace("\n", "\r\n"),
    "blanks around": lambda text: f"\n  {text} \n ",
    "brace on the last line": lambda text: text.rstrip().removesuffix("}").rstrip() + "}",
    "exponents": lambda text: re.sub(r'("rms_norm_eps": )[^,]*', r"\g<1>1E-05", text).replace(
        '"initializer_range": 0.02', '"initializer_range": 2.0e-02'
    ),
    "letters": lambda text: text.replace("{", '{"author": "Zoë 世界", "escaped": "Zo\\u00eb \\/ \\"",', 1),
    "unknown fields": lambda text: text.replace("{", '{"own": [1, {"deep": {}}], "sparsity": 0.125, "n": null,', 1),
    "dtype null": lambda text: text.replace('"dtype": "float32"', '"dtype": null'),
    "empty quantization": lambda text: text.replace("{", '{"quantization_config": null, "sparsity": 0.125,', 1),
}


def reformat(source: Path, folder: Path, change: Callable[[str], str]) -> bytes:
    shutil.copytree(source, folder)
    text = change((source / "config.json").read_text("utf-8")).encode()
    (folder / "config.json").write_bytes(text)
    return text


@pytest.fixture(scope="module", params=FORMATS)
def reformatted(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, Path]:
    """config.json of a source in some form, and what that source becomes."""
    folder = tmp_path_factory.mktemp("reformatted")
    before = reformat(source, folder / "source", FORMATS[request.param])
    succeeded(run(folder / "source", "--out", folder / "out", *SMALL))
    return before, folder / "out"


def test_the_text_of_config_json_stays_and_our_block_is_added(reformatted: tuple[bytes, Path]):
    before, out = reformatted
    after = (out / "config.json").read_bytes()
    fields = json.loads(after, object_pairs_hook=unique)
    ours = {name: fields.pop(name) for name in ("quantization_config", "transformers_weights")}
    original = json.loads(before)
    if original.get("quantization_config", "") is None:
        del original["quantization_config"]
    elif original["dtype"] is None:
        original["dtype"] = "float32"
    else:
        assert after.startswith(before.rstrip()[:-1].rstrip())
    assert fields == original
    assert ours["quantization_config"]["quant_method"] == "wina"


def test_a_checkpoint_loads_whatever_the_form_of_its_config(reformatted: tuple[bytes, Path]):
    model = AutoModelForCausalLM.from_pretrained(reformatted[1])
    assert {gate.sparsity for gate in gated_modules(model).values()} == {0.5}
    assert model.dtype == torch.float32


def test_retarget_changes_the_one_number(
    reformatted: tuple[bytes, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = shutil.copytree(reformatted[1], tmp_path / "out")
    for step in ("models.stream.StreamedModel", "models.stream.build_skeleton", "format.folder.read_tensors"):
        monkeypatch.setattr(f"wina_convert.{step}", failing(AssertionError(step)))  # no model is run, no weight is read
    before = contents(out)
    result = run_wina("retarget", out, "--sparsity", "0.3125")
    succeeded(result)
    assert "31.2%" in result.stdout
    after = contents(out)
    assert {name for name in before if before[name] != after[name]} == {
        "config.json",
        "README.md",
        "wina_report.json",
        MANIFEST,
    }
    assert set(after) == set(before)
    old, new = before["config.json"], after["config.json"]
    start = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    assert new[:start].endswith(b'"sparsity": 0.')
    assert (old[start:].startswith(b"5"), new[start:].startswith(b"3125")) == (True, True)
    assert old[start + 1 :] == new[start + 4 :]
    assert json.loads(new)["quantization_config"]["sparsity"] == 0.3125


@pytest.mark.parametrize("name", ["as saved", "compact", "blanks around"])
@pytest.mark.parametrize("field", ["dtype", "torch_dtype", None])
def test_a_chosen_dtype_changes_the_dtype_alone(name: str, field: str | None, source: Path, tmp_path: Path):
    def change(text: str) -> str:
        fields = json.loads(text)
        del fields["dtype"]
        return FORMATS[name](json.dumps(fields | ({field: "float32"} if field else {}), indent=2))

    before = json.loads(reformat(source, tmp_path / "source", change))
    succeeded(run(tmp_path / "source", "--out", tmp_path / "out", "--dtype", "bfloat16", *SMALL))
    after = json.loads((tmp_path / "out" / "config.json").read_bytes(), object_pairs_hook=unique)
    ours = {name: after.pop(name) for name in ("quantization_config", "transformers_weights")}
    assert ours["quantization_config"]["quant_method"] == "wina"
    assert after == before | {field or "dtype": "bfloat16"}
