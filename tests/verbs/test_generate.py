"""`wina generate`: what it writes and refuses."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from support.commands import refused, run_wina, succeeded
from wina_convert.runtime.kernels import cpu
from wina_convert.verbs.generate import generate

MODEL = "one layer"  # see support/shared.py


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


def test_generate_compiles_its_kernels_before_the_first_token(wina_tiny: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    compiled, continued = cpu.compiled, GenerationMixin.generate
    monkeypatch.setattr(cpu, "compiled", lambda dtype: (events.append("compiled"), compiled(dtype))[1])
    monkeypatch.setattr(
        GenerationMixin, "generate", lambda *args, **options: (events.append("tokens"), continued(*args, **options))[1]
    )
    generate(str(wina_tiny), "Once upon a time there was a very small house by the river", max_new_tokens=3)
    assert events[:2] == ["compiled", "tokens"]


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
