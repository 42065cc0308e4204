"""Training on top of a gated model: its weights are frozen, gradients pass through, and PEFT's LoRA is trained beside them."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from support.edits import edit_fields
from support.families import make_model
from support.loaded import PROMPT, equal, greedy, logits
from support.processes import in_new_process
from support.reference import reference
from wina_convert import WinaConfig, convert, load, set_sparsity
from wina_convert.errors import OptionError
from wina_convert.format.grid import GRID
from wina_convert.runtime.linear import DenseLinear, WinaLinear, gated_modules
from wina_convert.runtime.lora import GatedLora
from wina_convert.verbs.export import export

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning",  # PEFT asks for it
    "ignore:Converting a tensor with requires_grad:UserWarning",  # the reference looks at its scores
)
TOKENS = torch.randint(2, 2048, (4, 24), generator=torch.Generator().manual_seed(0))


def lora(model: Any, seed: int = 0, **options: Any) -> Any:
    """A model with an adapter of random numbers, which does something from the first step on."""
    torch.manual_seed(seed)
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "r": 4, **options}
    made = get_peft_model(model, LoraConfig(**options))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    return made


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


# Gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5, 7), (2, 40, 7)])
def test_the_gradient_of_a_gated_projection_is_that_of_the_masked_product(shape: tuple[int, ...], dtype: torch.dtype):
    generator = torch.Generator().manual_seed(len(shape))
    gate = WinaLinear(7, 11, GRID, bias=True, dtype=dtype)
    gate.weight_t.data = torch.randn(7, 11, generator=generator).to(dtype)
    gate.bias.data = torch.randn(11, generator=generator).to(dtype)  # type: ignore[union-attr]
    gate.column_norms.data = torch.rand(7, generator=generator) + 0.5
    gate.thresholds.data = torch.tensor(GRID)
    gate.set_sparsity(0.6)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    up = torch.randn((*shape[:-1], 11), generator=generator).to(dtype)
    gate(x).backward(up)
    keep = x.detach().double().abs() * gate.column_norms.double() > gate.thresholds[GRID.index(0.6)]
    assert 0 < keep.float().mean() < 1
    expected = (up.double() @ gate.weight_t.double().t()) * keep
    tolerance = {"rtol": 0, "atol": {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * float(expected.abs().max())}
    torch.testing.assert_close(x.grad.double(), expected, **tolerance)  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in gate.parameters())


def test_gradients_through_a_model_are_those_of_the_dense_one_with_its_inputs_masked(wina_tiny: Path, tiny: Path):
    found = []
    for model in (load(str(wina_tiny)), reference(tiny, wina_tiny, 0.5).model):
        embeds = model.get_input_embeddings()(PROMPT).detach().requires_grad_()
        model(inputs_embeds=embeds, labels=PROMPT).loss.backward()
        found.append([embeds.grad, model.model.norm.weight.grad, model.model.layers[0].input_layernorm.weight.grad])
    for gated, expected in zip(*found, strict=True):
        torch.testing.assert_close(gated, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_gated_weights_are_frozen_and_an_optimizer_gets_none(wina_tiny: Path, tiny: Path):
    fly = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=WinaConfig(thresholds=wina_tiny))
    for model in (load(str(wina_tiny)), fly):
        inside = {parameter for gate in gated_modules(model).values() for parameter in gate.parameters()}
        assert inside
        assert not any(parameter.requires_grad for parameter in inside)
        assert model.model.norm.weight.requires_grad
        assert not any(".mlp." in name or ".self_attn." in name for name in trainable(model))


# PEFT


def test_a_step_moves_the_adapter_and_nothing_else(wina_tiny: Path):
    model = lora(load(str(wina_tiny)))
    assert trainable(model) == [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(trainable(model)) == 4 * 2 * 2
    before, lora_before = frozen_tensors(model), {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    assert equal(frozen_tensors(model), before)
    assert all(not torch.equal(p, lora_before[n]) for n, p in model.named_parameters() if "lora_" in n)


def test_an_adapter_on_a_gated_model_is_one_on_the_dense_model_with_its_inputs_masked(wina_tiny: Path, tiny: Path):
    gated = lora(load(str(wina_tiny)))
    masked = lora(reference(tiny, wina_tiny, 0.5).model)
    expected = logits(masked)
    assert (logits(gated) - expected).abs().max() <= 1e-4 * expected.abs().max()
    for model in (gated, masked):
        model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    grads = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in (gated, masked)]
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[1].items():
        torch.testing.assert_close(grads[0][name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


def test_an_adapter_is_saved_loaded_and_generates(wina_tiny: Path, tmp_path: Path):
    model = lora(load(str(wina_tiny))).eval()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["fan_in_fan_out"] is False
    again = PeftModel.from_pretrained(load(str(wina_tiny)), tmp_path)
    assert isinstance(again.base_model.model.model.layers[0].mlp.down_proj, GatedLora)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(greedy(again), greedy(model))
    other = load(str(wina_tiny))
    other.load_adapter(str(tmp_path))  # transformers' own way
    assert torch.equal(logits(other), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(load(str(wina_tiny))))
    set_sparsity(again, 0.25)
    assert not torch.equal(logits(again), logits(model))


def test_merging_is_refused_with_its_reason_and_taking_it_off_is_not(wina_tiny: Path):
    model = lora(load(str(wina_tiny)))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(
            OptionError, match=r"cannot be merged into gated weights, whose column norms .* wina-convert ADAPTER"
        ):
            merge()
    assert torch.equal(logits(model.unload()), logits(load(str(wina_tiny))))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_the_reason_says_to_do_gives_the_adapted_model(family: str, tmp_path: Path):
    source = make_model(family, tmp_path / "source")
    convert(str(source), tmp_path / "wina", basis="none", samples=4, seq_len=16)
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[family]
    model = lora(load(str(tmp_path / "wina"), sparsity=0.0), target_modules=targets).eval()
    model.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "wina", tmp_path / "dense")
    edit_fields("adapter_config.json", base_model_name_or_path=str(tmp_path / "dense"))(tmp_path / "adapter")
    convert(str(tmp_path / "adapter"), tmp_path / "again", basis="none", samples=4, seq_len=16)
    expected = logits(model)
    assert (logits(load(str(tmp_path / "again"), sparsity=0.0)) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_all_linear_takes_the_gated_projections_and_leaves_the_head(wina_tiny: Path):
    model = lora(load(str(wina_tiny)), target_modules="all-linear").base_model.model
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(GatedLora) == kinds.count(WinaLinear) == 4 * 7
    assert type(model.lm_head) is DenseLinear


def test_variants_that_need_the_whole_weight_are_refused(wina_tiny: Path):
    with pytest.raises(ValueError, match="use_dora"):
        lora(load(str(wina_tiny)), use_dora=True)


def test_dense_models_get_adapters_as_before(dense: PreTrainedModel):
    model = lora(copy.deepcopy(dense), target_modules="all-linear").base_model.model
    kinds = [type(module).__module__ for module in model.modules()]
    assert "peft.tuners.lora.layer" in kinds
    assert not any(kind.startswith("wina_convert") for kind in kinds)


ORDER = """
import json, sys, warnings
warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)
exec(sys.argv[2])
from transformers.utils import logging
logging.disable_progress_bar()
from transformers import AutoModelForCausalLM
from peft import LoraConfig, get_peft_model
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
made = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
print(json.dumps([type(m).__name__ for m in made.modules() if "Lora" in type(m).__name__]))
"""


FIRST = [("import peft", "1"), ("import transformers", "1"), ("import wina_convert", "0")]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "discovery"), FIRST)
def test_adapters_work_whatever_is_imported_first(first: str, discovery: str, wina_tiny: Path):
    found, stderr = in_new_process(ORDER, wina_tiny, first, TORCH_DEVICE_BACKEND_AUTOLOAD=discovery)
    assert found.count("GatedLora") == 4
    assert stderr == ""


# transformers' Trainer


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[index], "labels": TOKENS[index]}


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    arguments = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
    }
    return Trainer(model, TrainingArguments(folder, **arguments, disable_tqdm=True, **options), train_dataset=Rows())


def test_a_trainer_trains_an_adapter_the_same_with_and_without_checkpoints_of_activations(
    wina_tiny: Path, tmp_path: Path
):
    adapters = []
    for recompute in (False, True):
        model = lora(load(str(wina_tiny)), lora_dropout=0.0)
        before = frozen_tensors(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and accelerate about processors without pinned memory
            trainer(model, tmp_path / f"run-{recompute}", gradient_checkpointing=recompute).train()
        assert equal(frozen_tensors(model), before)
        adapters.append(
            {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        )
    for name, parameter in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], parameter, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "run-True" / "checkpoint-3" / "adapter_model.safetensors").exists()


def test_a_trainer_refuses_a_gated_model_without_an_adapter(wina_tiny: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer(load(str(wina_tiny)), tmp_path)
