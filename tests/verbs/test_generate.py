"""`wina generate`: what it writes and refuses."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

import wina_convert as package
from support.commands import refused, run_wina, succeeded
from support.edits import edit_fields
from wina_convert.runtime.kernels import cpu
from wina_convert.verbs.generate import generate

pytestmark = pytest.mark.slow

MODEL = "one layer"  # see support/shared.py
GREEDY = ("--temperature", 0, "--repetition-penalty", 1)


def test_generate_continues_a_prompt_as_transformers_does(wina_tiny: Path):
    prompt = "Once upon a time"
    result = run_wina("generate", wina_tiny, "--prompt", prompt, "--max-new-tokens", 12, *GREEDY)
    succeeded(result)
    tokenizer = AutoTokenizer.from_pretrained(wina_tiny)
    inputs = tokenizer(prompt, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(wina_tiny)
    ids = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=12, do_sample=False
    )
    expected = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert result.stdout.rstrip() == (prompt + expected).rstrip()
    said = r"\[12 tokens, \d+\.\d tokens a second; 1\.0 million parameters know words and little else\]\n"
    assert re.fullmatch(said, result.stderr)


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
    assert events[0] == "compiled"
    assert events.count("tokens") == 1


def test_generate_quietly_prints_the_text_alone(wina_tiny: Path):
    result = run_wina("generate", wina_tiny, "--prompt", "The cat", "--max-new-tokens", 4, "--quiet")
    succeeded(result)
    assert result.stdout.startswith("The cat")
    assert result.stdout.endswith("\n")
    assert result.stderr == ""


def test_generate_samples_by_its_seed(wina_tiny: Path):
    def text(seed: int) -> str:
        options = ("--prompt", "The", "--max-new-tokens", 12, "--seed", seed, "--quiet")
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


@pytest.fixture
def chatty(wina_tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer has a chat template."""
    folder = Path(shutil.copytree(wina_tiny, tmp_path / "chatty"))
    template = "{{ bos_token }}{% for turn in messages %}{{ turn.role }} said {{ turn.content }} {% endfor %}then"
    edit_fields("tokenizer_config.json", chat_template=template)(folder)
    return folder


def test_a_prompt_is_a_turn_of_a_chat_where_the_tokenizer_has_a_template(chatty: Path):
    options = {"max_new_tokens": 8, "temperature": 0.0}
    answered = generate(str(chatty), "a word", **options)
    assert answered.chat
    assert answered.text == generate(str(chatty), "user said a word then", raw=True, **options).text
    shown = run_wina(
        "generate", chatty, "--prompt", "a word", "--max-new-tokens", 8, "--temperature", 0, "--quiet"
    ).stdout
    assert shown.rstrip("\n") == answered.text


def test_a_template_that_refuses_is_named(chatty: Path):
    edit_fields("tokenizer_config.json", chat_template="{{ raise_exception('no turns today') }}")(chatty)
    refused(run_wina("generate", chatty, "--prompt", "The"), "no turns today", "--raw")


def test_stop_strings_of_the_generation_config_stop(wina_tiny: Path, tmp_path: Path):
    folder = Path(shutil.copytree(wina_tiny, tmp_path / "stops"))
    whole = generate(str(folder), "Once upon a time", max_new_tokens=24, temperature=0.0).text
    stop = whole.split()[2]
    edit_fields("generation_config.json", stop_strings=[stop])(folder)
    stopped = generate(str(folder), "Once upon a time", max_new_tokens=24, temperature=0.0).text
    assert stopped == whole[: len(stopped)]
    assert stopped.rstrip().endswith(stop)
    assert len(stopped) < len(whole)


def test_text_ends_where_the_context_does(source: Path, converted: Path):
    prompt = "word " * 100
    length = len(AutoTokenizer.from_pretrained(converted)(prompt).input_ids)
    assert length < 128  # its context
    assert generate(str(converted), prompt, max_new_tokens=500).tokens == 128 - length
    refused(run_wina("generate", converted, "--prompt", "word " * 200), "the context", "is 128")


def test_what_is_compiled_is_compiled_before_the_clock_runs(wina_tiny: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, ...]] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        model = package.load(*args, **kwargs)
        model.register_forward_pre_hook(
            lambda model, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        return model

    monkeypatch.setattr("wina_convert.verbs.generate.load", load)
    generate(str(wina_tiny), "Once upon a time", max_new_tokens=3)
    assert seen[0] == (1, 1)
    assert len(seen) == 4


def test_the_prompt_is_written_once_also_where_no_text_comes_at_first(converted: Path):
    options = (
        "--max-new-tokens",
        6,
        "--seed",
        0,
        "--temperature",
        5,
        "--top-p",
        1,
        "--quiet",
    )  # bytes that are no text yet
    for seed in range(6):
        result = run_wina("generate", converted, "--prompt", "Once", *options, "--seed", seed)
        assert result.stdout.count("Once") == 1
    written: list[str] = []
    generate(str(converted), "Once", max_new_tokens=6, write=written.append, echo=True)
    assert written[0].startswith("Once")


def test_json_is_the_text_and_its_measures(wina_tiny: Path):
    result = run_wina("generate", wina_tiny, "--prompt", "The cat", "--max-new-tokens", 4, "--json")
    succeeded(result)
    found = json.loads(result.stdout)
    assert (found["tokens"], found["chat"]) == (4, False)
    assert found["text"] == generate(str(wina_tiny), "The cat", max_new_tokens=4).text


BAD_GENERATE = {
    "tokens 0": (("--max-new-tokens", "0"), ("max new tokens is 0",)),
    "temperature -1": (("--temperature", "-1"), ("temperature is -1.0",)),
    "temperature inf": (("--temperature", "inf"), ("temperature is inf",)),
    "top-p 0": (("--top-p", "0"), ("top-p is 0.0",)),
    "top-p 2": (("--top-p", "2"), ("top-p is 2.0",)),
    "penalty 0": (("--repetition-penalty", "0"), ("repetition penalty is 0.0",)),
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
