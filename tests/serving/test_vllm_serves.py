"""vLLM itself serves checkpoints: the greedy tokens and their log probabilities are those of transformers.

Skipped where there is no vLLM. It asks for other versions than the test environment has, so this runs in an environment with vLLM
0.32, this package, pytest and pytest-xdist: `python -m pytest -n 0 tests/serving/test_vllm_serves.py` (minutes on two cores).
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support import vllm_greedy
from support.families import make_model
from support.shared import Once
from wina_convert import convert

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")

# vLLM's attention on a CPU takes heads of 32 and some larger sizes
HEAD, WIDE = {"head_dim": 32}, {"hidden_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": HEAD,
    "gemma2": HEAD,
    "gemma3_text": HEAD,
    "gpt2": {"n_embd": 128},
    "llama": HEAD,
    "llama-tied": HEAD,
    "mistral": HEAD,
    "olmo2": WIDE | HEAD,
    "phi3": WIDE | HEAD,
    "qwen2": WIDE | HEAD,
    "qwen3": HEAD,
}


@pytest.fixture(scope="module")
def checkpoints(wina_tiny: Path, once: Once) -> dict[str, Path]:
    def make(name: str, **options: Any) -> Path:
        def convert_it(folder: Path) -> None:
            source = make_model(name, folder / "source", **FAMILIES[name])
            convert(str(source), folder / "wina", samples=8, seq_len=32, basis="none", **options)

        return once("-".join([f"served {name}", *options]), convert_it) / "wina"

    return {
        "trained": wina_tiny,
        **{name: make(name) for name in FAMILIES},
        "qwen2, keys and gates dense": make("qwen2", ignore=["*.k_proj", "*.gate_proj"]),
    }


@pytest.fixture(scope="module")
def served(checkpoints: dict[str, Path]) -> dict[str, Any]:
    """What vLLM answers, by the name of the checkpoint and how it ran."""
    found = {}
    for mode, names in (("eager", [*checkpoints]), ("compiled", ["trained"])):
        folders = [str(checkpoints[name]) for name in names]
        command = [sys.executable, vllm_greedy.__file__, mode, *folders]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=True).stdout.splitlines()
        answers = dict(json.loads(line) for line in lines if line.startswith('["/'))
        found |= {f"{name} {mode}": answers[folder] for name, folder in zip(names, folders, strict=True)}
    return found


@pytest.mark.parametrize(
    ("name", "mode"),
    [*[(name, "eager") for name in ("trained", *FAMILIES, "qwen2, keys and gates dense")], ("trained", "compiled")],
)
def test_vllm_answers_as_transformers_does(name, mode, checkpoints, served):
    # the attention that computes all that a config asks for, whichever version of transformers is there
    model = AutoModelForCausalLM.from_pretrained(checkpoints[name], attn_implementation="eager")
    answers = served[f"{name} {mode}"]
    assert not isinstance(answers, str), answers
    for prompt, (tokens, log_probabilities) in zip(vllm_greedy.PROMPTS, answers, strict=True):
        whole = model.generate(
            torch.tensor([prompt]), max_new_tokens=len(tokens), min_new_tokens=len(tokens), do_sample=False
        )
        assert tokens == whole[0, len(prompt) :].tolist()
        with torch.no_grad():
            logits = model(whole).logits[0, len(prompt) - 1 : -1]
        ours = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(log_probabilities), ours, rtol=1e-4, atol=1e-4)
