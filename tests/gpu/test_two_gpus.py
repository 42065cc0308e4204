"""A model on two GPUs: its layers on one and the other, or every layer on both."""

from pathlib import Path

import pytest
import torch
from transformers.quantizers.base import HfQuantizer

from support.families import make_model
from support.loaded import PROMPT, greedy
from support.ranks import on_ranks
from support.shared import Once
from wina_convert import convert, load, set_sparsity
from wina_convert.runtime.kernels import driver
from wina_convert.runtime.linear import gated_modules

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


@pytest.fixture(scope="module")
def folder(once: Once) -> Path:
    """A Llama of four layers, converted. Shared: do not change it."""

    def make(folder: Path) -> None:
        source = make_model("llama", folder / "source", num_hidden_layers=4, hidden_size=256, intermediate_size=512)
        convert(str(source), folder / "wina", samples=8, seq_len=32, basis="none", device="cpu")

    return once("two-gpus", make) / "wina"


def test_layers_on_two_gpus_run_in_the_kernel_and_give_the_tokens_of_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    launches: list[int] = []
    launch = driver.launch
    monkeypatch.setattr(driver, "launch", lambda *args: (launches.append(1), launch(*args)))
    one = load(str(folder), device_map={"": 0})
    layer = sum(parameter.nbytes for parameter in one.model.layers[0].parameters())
    room = {0: one.model.embed_tokens.weight.nbytes + int(2.5 * layer), 1: 10**9}
    two = load(str(folder), device_map="auto", max_memory=room)
    held = {gate.weight_t.device.index for gate in gated_modules(two).values()}
    assert held == {0, 1}
    assert all(gate.tau.device == gate.weight_t.device for gate in gated_modules(two).values())
    for sparsity in (0.5, 0.2):
        for model in (one, two):
            set_sparsity(model, sparsity)
        expected = greedy(one, PROMPT.cuda())
        launches.clear()
        assert torch.equal(greedy(two, PROMPT.cuda()), expected)
        assert len(launches) == 11 * 4 * 4  # of each token behind the prompt and each layer: qkv, o, gate and up, down


TENSOR = """
from wina_convert.runtime.kernels import driver
launched = []
launch = driver.launch
driver.launch = lambda *args: (launched.append(args), launch(*args))
divided = load(sys.argv[2], distributed_config=DistributedConfig(tp_plan="auto"))
whole = load(sys.argv[2], device_map={"": dist.get_rank()})
found = {"logits": [], "tokens": []}
for sparsity in (0.5, 0.2):
    for model in (divided, whole):
        set_sparsity(model, sparsity)
    found["logits"].append(apart(logits(divided), logits(whole)))
    launched.clear()
    found["tokens"].append([greedy(model, PROMPT.to(model.device)).tolist() for model in (divided, whole)])
    found["launched"] = len(launched)
divided.save_pretrained(sys.argv[1] + "/saved")
tell(found)
"""


@pytest.mark.skipif(not hasattr(HfQuantizer, "update_parallel_plan"), reason="needs transformers 5.21")
def test_every_layer_on_two_gpus_gives_the_logits_and_tokens_of_one(folder: Path, tmp_path: Path):
    for rank in on_ranks(TENSOR, tmp_path, folder):
        assert max(rank["logits"]) <= 1e-4
        assert rank["launched"] == 11 * 4 * (7 + 4)
        assert rank["tokens"][0][0] == rank["tokens"][0][1]
        assert rank["tokens"][1][0] == rank["tokens"][1][1]
    assert torch.equal(greedy(load(str(tmp_path / "saved"), sparsity=0.5)), greedy(load(str(folder), sparsity=0.5)))
