"""A model divided among processes computes what it computes in one, and saves what it was loaded from."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from support.families import make_model
from support.folders import config_of, tensors_of, write_biases
from support.loaded import equal
from support.ranks import on_ranks
from support.shared import Once
from wina_convert import convert, load
from wina_convert.errors import CheckpointError
from wina_convert.runtime.loader import WinaQuantizer
from wina_convert.runtime.quantization import WinaConfig

pytestmark = pytest.mark.slow

# Their plans differ: by outputs and inputs; with biases; whole outputs, cut up afterwards; norms of heads; fused heads.
FAMILIES = ["llama", "llama-tied", "phi3", "qwen3", "gpt_neox"]
KINDS = ["stored", "biases", "low-rank"]  # with biases along the sparsity, or a term for what is skipped

TENSOR = """
from wina_convert.format.checkpoint import open_checkpoint
from wina_convert.verbs.push import _difference as difference
found = {}
for folder in map(Path, sys.argv[2:]):
    if dist.is_initialized():
        divided = load(str(folder), distributed_config=DistributedConfig(tp_plan="auto"))
    else:
        divided = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")  # as it was called before
    whole = load(str(folder))
    gate = next(module for name, module in divided.named_modules() if name.endswith(("o_proj", "attention.dense")))
    case = {"held": gate.weight_t.to_local().numel() / gate.weight_t.numel(), "logits": [apart(logits(divided), logits(whole))]}
    for sparsity in (0.0, 0.42, 0.95):
        for model in (divided, whole):
            set_sparsity(model, sparsity)
        case["logits"].append(apart(logits(divided), logits(whole)))
    for model in (divided, whole):
        set_sparsity(model, 0.5)
    case["tokens"] = [greedy(model).tolist() for model in (divided, whole)]
    divided.save_pretrained(sys.argv[1] + "/" + folder.parent.name + "-" + folder.name)
    try:
        divided.dequantize()
    except Exception as error:
        case["restored"] = str(error)
    case["pushed"] = difference(divided, open_checkpoint(folder))
    found[folder.parent.name + "-" + folder.name] = case
"""

OTHERS = """
from torch.distributed.fsdp import fully_shard

folder = sys.argv[3]  # with biases

def sharded(dtype):
    model = load(folder, dtype=dtype)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)

ways = {
    "FSDP of transformers": lambda: load(folder, distributed_config=DistributedConfig(fsdp_size=2)),
    "FSDP of torch": lambda: sharded(torch.float32),
    "FSDP of torch, bfloat16": lambda: sharded(torch.bfloat16),
    "pipeline": lambda: load(folder, distributed_config=DistributedConfig(pp_size=2)),
}
others = {}
for way, make in ways.items():
    model = make()
    whole = load(folder, dtype=model.dtype)
    others[way] = [apart(logits(model), logits(whole))]
    for one in (model, whole):
        set_sparsity(one, 0.42)
    others[way].append(apart(logits(model), logits(whole)))
    if way == "FSDP of transformers":
        model.save_pretrained(sys.argv[1] + "/saved")
tell([found, others])
"""


def made(family: str, once: Once) -> list[Path]:
    """Two checkpoints of a family. Shared: do not change them."""

    def make(folder: Path) -> None:
        source = make_model(family, folder / "source")
        convert(str(source), folder / "stored", samples=4, seq_len=32, basis="none")
        convert(str(source), folder / "low-rank", samples=4, seq_len=32, basis="none", scheme="r-sparse")
        write_biases(Path(shutil.copytree(folder / "stored", folder / "biases")), 0.1)

    return [once(f"parallel-{family}", make) / kind for kind in KINDS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes save."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def folders(once: Once) -> dict[str, Path]:
    return {f"{path.parent.name}-{path.name}": path for family in FAMILIES for path in made(family, once)}


@pytest.fixture(scope="module")
def both(folders: dict[str, Path], saved: Path) -> list[Any]:
    """What each of two processes found: of every checkpoint by tensor parallelism, and of one in other ways."""
    return on_ranks(TENSOR + OTHERS, saved, *folders.values())


@pytest.fixture(scope="module")
def found(both: list[Any]) -> list[dict[str, Any]]:
    """What each found by tensor parallelism."""
    return [one for one, _ in both]


CASES = [f"parallel-{family}-{kind}" for family in FAMILIES for kind in KINDS]


@pytest.mark.parametrize("case", CASES)
def test_tensor_parallel_gives_the_logits_and_tokens_of_one_process(case: str, found: list[dict[str, Any]]):
    for rank in found:
        assert rank[case]["held"] == 0.5
        assert max(rank[case]["logits"]) <= 1e-5
        assert rank[case]["tokens"][0] == rank[case]["tokens"][1]


@pytest.mark.parametrize("case", CASES)
def test_it_saves_the_checkpoint_that_it_was_loaded_from(
    case: str, found: list[dict[str, Any]], folders: dict[str, Path], saved: Path
):
    stored, again = tensors_of(folders[case]), tensors_of(saved / case)
    if config_of(folders[case])["tie_word_embeddings"]:
        again["model.embed_tokens.weight"] = again.pop("lm_head.weight")  # the name that transformers keeps of the two
    assert equal(again, stored)
    for name in ("quantization_config", "transformers_weights"):
        assert config_of(saved / case)[name] == config_of(folders[case])[name]


def test_it_is_not_turned_back_in_memory_and_not_pushed(found: list[dict[str, Any]]):
    for case in found[0].values():
        assert case["pushed"].endswith(" is divided among processes")
        assert "is not whole in this process" in case["restored"]
        assert "run `wina export DIR --out DENSE`" in case["restored"]


def test_fsdp_and_a_pipeline_give_the_logits_of_one_process_and_fsdp_saves(
    both: list[Any], folders: dict[str, Path], saved: Path
):
    for _, rank in both:
        assert rank == {way: [0.0, 0.0] for way in rank}
        assert len(rank) == 4
    expected = tensors_of(folders[CASES[1]])
    stored = {name: tensor for name, tensor in expected.items() if tensor.numel()}
    assert equal({name: tensor for name, tensor in tensors_of(saved / "saved").items() if tensor.numel()}, stored)


# Refusals


def plan(config: PreTrainedConfig, stored: WinaConfig, styles: dict[str, str], **sizes: int) -> dict[str, str]:
    """What the plug-in makes of a model's plan where the caller asks for these styles and numbers of processes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config.distributed_config = SimpleNamespace(
        **{"tp_size": 2, "ep_size": 1, "dp_size": 1} | sizes, tp_plan=styles
    )
    quantizer = WinaQuantizer(stored)
    quantizer._process_model_before_weight_loading(model)
    made = dict(model.tp_plan)
    quantizer.update_parallel_plan(model, made)
    return made


UP = "model.layers.*.mlp.up_proj"
LLAMA = (CONFIG_MAPPING["llama"](num_hidden_layers=2), WinaConfig(modules=["model.layers.1.mlp.up_proj"]))
MIXTRAL = (CONFIG_MAPPING["mixtral"](num_hidden_layers=2), WinaConfig(modules=["model.layers.1.self_attn.q_proj"]))


def test_a_plan_of_the_callers_goes_before_the_models():
    assert plan(*LLAMA, {})[f"{UP}.weight_t"] == "rowwise"
    assert plan(*LLAMA, {UP: "rowwise_split_input"})[f"{UP}.weight_t"] == "colwise"
    assert f"{UP}.weight_t" not in plan(*LLAMA, {UP: "replicate"})


def test_what_cannot_be_divided_is_refused_with_its_reason():
    with pytest.raises(
        CheckpointError, match="up_proj' by the style 'packed_colwise', which gated projections do not have"
    ):
        plan(*LLAMA, {UP: "packed_colwise"})
    with pytest.raises(CheckpointError, match="either by tensor parallelism or by FSDP, not by both"):
        plan(*LLAMA, {}, dp_size=2)
    for sizes in ({}, {"tp_size": 1, "ep_size": 2}):
        with pytest.raises(
            CheckpointError, match=r'mixture of experts cannot be split among processes.*device_map="auto"'
        ):
            plan(*MIXTRAL, {}, **sizes)
    assert plan(*MIXTRAL, {}, tp_size=1)


def test_a_transformers_that_divides_in_another_way_is_refused(wina_tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(HfQuantizer, "update_parallel_plan")  # as before 5.21
    load(str(wina_tiny))
    monkeypatch.setattr(PreTrainedModel, "_tp_size", 2)
    with pytest.raises(CheckpointError, match=r"needs transformers 5\.21 or later"):
        load(str(wina_tiny))
