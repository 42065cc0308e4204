"""What a token costs in every shape of family: tied and untied heads, fused matrices, biases, learned positions."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import wina_convert
from support.families import make_model
from wina_convert.format.checkpoint import open_checkpoint
from wina_convert.models.cost import token_cost
from wina_convert.models.stream import checkpoint_stream


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "llama-tied", "qwen2"])
def test_the_dense_cost_is_that_of_the_source_and_skipping_takes_off_its_part(family: str, tmp_path: Path):
    source = make_model(family, tmp_path / "source")
    wina_convert.convert(str(source), tmp_path / "out", samples=4, seq_len=16, basis="none")
    checkpoint = open_checkpoint(tmp_path / "out")
    gated = checkpoint_stream(checkpoint, torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    parameters = dict(model.named_parameters())  # a tied one once
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    looked_up = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and not (tied and module is model.get_input_embeddings())
    }
    read = {name: parameter for name, parameter in parameters.items() if name not in looked_up}
    dense = token_cost(gated, checkpoint.folder.tensors)
    assert dense.nbytes == sum(parameter.nbytes for parameter in read.values())
    assert dense.macs == sum(parameter.numel() for parameter in read.values() if parameter.dim() == 2)
    names = checkpoint.config.modules
    half = token_cost(gated, checkpoint.folder.tensors, dict.fromkeys(names, 0.5))
    weights = sum(parameters[f"{name}.weight"].numel() for name in names)
    specs = checkpoint.folder.tensors
    inputs = sum(specs[f"{key}.column_norms"].numel for key in checkpoint.gated_keys().values())
    itemsize = next(iter(read.values())).element_size()
    assert half.macs == dense.macs - weights // 2
    assert half.nbytes == dense.nbytes - weights * itemsize // 2 + 4 * inputs
