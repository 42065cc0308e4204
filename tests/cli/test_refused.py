"""Options that are refused before anything is written."""

from pathlib import Path

import pytest

from support.commands import contents, refused, run, run_wina

MODEL = "one layer"  # see support/shared.py


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
    "device cuda": (("--device", "cuda:9"), ("device is 'cuda:9'", "CUDA")),
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


@pytest.mark.parametrize("verb", ["inspect", "eval", "generate", "retarget", "convert", "export"])
def test_a_verb_without_its_folder_is_refused(verb: str):
    refused(run_wina(verb), "Missing")


def test_a_verb_that_does_not_exist_is_refused():
    refused(run_wina("nosuch"), "nosuch")


@pytest.mark.parametrize("device", ["tpu", "", "xla", "cuda:99"])
def test_a_device_is_refused_in_words_of_our_own(device: str, source: Path, tmp_path: Path):
    line = refused(run(source, "--out", tmp_path / "out", "--device", device), "auto, cpu or cuda")
    assert not any(name in line for name in ("mkldnn", "opencl", "privateuseone", "Expected one of", "driver"))
