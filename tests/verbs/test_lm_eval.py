"""lm-evaluation-harness measures a WINA checkpoint as it measures any model: `lm_eval --model hf --model_args pretrained=DIR`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import wina_convert

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed; pip install -e '.[test]'"
    ),
]

QUESTIONS = [
    {"text": "Once upon a time there was a little", "choices": [" girl", " the", " of it"]},
    {"text": "The captain of the ship gave the", "choices": [" order", " and", " were not"]},
    {"text": "He opened the door and went into the", "choices": [" house", " is", " had been"]},
    {"text": "for i in range(10):\n    print", "choices": ["(i)", " upon a time", " she said"]},
    {"text": "I would like to book a table at a", "choices": [" restaurant", " whale", " them"]},
]
TASK = """
task: local_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""


def log_likelihoods(folder: Path) -> list[list[float]]:
    """Sum of the log probabilities of each answer's tokens, by question, at the checkpoint's default sparsity."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), wina_convert.load(str(folder))
    found = []
    for question in QUESTIONS:
        prompt, row = tokenizer(question["text"]).input_ids, []
        for choice in question["choices"]:
            ids = tokenizer(question["text"] + choice).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            row.append(float(sum(logits[i - 1, ids[i]] for i in range(len(prompt), len(ids)))))
        found.append(row)
    return found


def test_lm_eval_runs_unchanged_and_finds_what_the_gated_model_computes(wina_tiny: Path, tmp_path: Path):
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(data=tmp_path / "questions.jsonl"))
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={wina_tiny},dtype=float32",
    ]
    command += ["--tasks", "local_choices", "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    command += ["--batch_size", "1", "--output_path", str(tmp_path / "results"), "--log_samples"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "results").rglob("samples_*.jsonl")
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    expected = log_likelihoods(wina_tiny)
    found = [[float(answer[0]) for answer in row["filtered_resps"]] for row in rows]
    assert found == [pytest.approx(row, abs=1e-3) for row in expected]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["local_choices"]["acc,none"]
    assert accuracy == pytest.approx(sum(row.index(max(row)) == 0 for row in expected) / len(expected))
