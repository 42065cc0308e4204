"""TRL's trainer for supervised fine-tuning trains a LoRA adapter on a gated model."""

import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from support.loaded import equal, greedy, logits
from wina_convert import load
from wina_convert.runtime.lora import GatedLora

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT asks for it
]
TEXTS = ["Once upon a time there was a river.", "The captain gave the order."] * 4


def test_sft_moves_the_adapter_alone_and_what_it_saves_loads(wina_tiny: Path, tmp_path: Path):
    model = load(str(wina_tiny))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_length": 32, "seed": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and accelerate about processors without pinned memory
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                str(tmp_path), **settings, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1
            ),
            train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
            processing_class=AutoTokenizer.from_pretrained(wina_tiny),
            peft_config=LoraConfig(target_modules="all-linear", r=4),
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.5
    trained = trainer.model.eval()
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in trained.state_dict().items()
        if "lora_" not in name
    }
    assert equal(after, before)
    again = PeftModel.from_pretrained(load(str(wina_tiny)), tmp_path / "adapter")
    assert sum(isinstance(module, GatedLora) for module in again.modules()) == 4 * 7
    torch.testing.assert_close(logits(again), logits(trained), rtol=0, atol=1e-5)
    assert torch.equal(greedy(again), greedy(trained))
    assert not torch.allclose(logits(again), logits(load(str(wina_tiny))), atol=0.1)
