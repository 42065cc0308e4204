"""`wina eval`: what it measures, prints and refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import wina_convert as package
from support.commands import refused, run_wina, succeeded
from wina_convert.models.text import sequences

MODEL = "one layer"  # see support/shared.py


TEXT = "".join(f"In year {year} the harvest was {year % 7} times that of the year before.\n" for year in range(120))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "harvest.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.slow
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


@pytest.mark.slow
def test_eval_takes_several_texts(wina_tiny: Path, text: Path, tmp_path: Path):
    (tmp_path / "second.txt").write_text(TEXT)
    options = ("--seq-len", 32, "--samples", 10_000, "--batch-size", 64, "--json")
    (one,) = json.loads(run_wina("eval", wina_tiny, "--text", text, *options).stdout)
    (two,) = json.loads(run_wina("eval", wina_tiny, "--text", text, "--text", tmp_path / "second.txt", *options).stdout)
    assert two["tokens"] == pytest.approx(2 * one["tokens"], abs=64)


def test_eval_against_another_model_is_refused(wina_tiny: Path, source: Path, text: Path):
    refused(run_wina("eval", wina_tiny, "--text", text, "--source", source, "--quiet"), str(source), "not the model")
    refused(run_wina("eval", wina_tiny, "--text", text, "--source", wina_tiny, "--quiet"), "WINA checkpoint")


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
