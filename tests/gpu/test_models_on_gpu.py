"""A small gated Llama on the GPU: groups, generation with and without compilation, and the torch operations beside it."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from support.gating import gate_layers
from wina_convert.runtime import linear
from wina_convert.runtime.grouping import group
from wina_convert.runtime.kernels import cuda, driver
from wina_convert.runtime.linear import gated_modules, observing
from wina_convert.runtime.rule import scores
from wina_convert.verbs import bench_models
from wina_convert.verbs.bench_cuda import bench_cuda
from wina_convert.verbs.bench_cuda_products import bench_cuda_products

LAYERS = 2
PROMPT = [[5, 310, 7, 1999, 45, 45, 3, 800, 12, 64]]


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Random weights, float32; no threshold is set."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    gate_layers(model)
    group(model)
    return model.cuda()


@torch.no_grad()
def skip(model: LlamaForCausalLM, sparsity: float) -> None:
    """Set thresholds at which this fraction of the inputs of the prompt is skipped."""

    def see(name: str, gate: linear.WinaLinear, x: Tensor) -> None:
        gate.set_threshold(scores(x, gate.column_norms).quantile(sparsity))

    with observing(gated_modules(model), see):
        model(torch.tensor(PROMPT, device="cuda"))


@torch.no_grad()
def logits(model: LlamaForCausalLM, tokens: int = 1) -> Tensor:
    found: Tensor = model(torch.tensor(PROMPT, device="cuda")[:, :tokens]).logits
    return found


def greedy(model: LlamaForCausalLM, **options: object) -> Tensor:
    prompt = torch.tensor(PROMPT, device="cuda")
    found: Tensor = model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, **options)
    return found


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tiles of each launch from now on."""
    seen: list[int] = []
    launch = driver.launch

    def count(function: int, grid: tuple[int, int], *others: object) -> None:
        seen.append(grid[0])
        launch(function, grid, *others)

    monkeypatch.setattr(driver, "launch", count)
    return seen


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_token_takes_four_launches_a_layer_and_has_the_logits_of_torch(
    model, launches, tokens, sparsity, monkeypatch
):
    skip(model, sparsity)
    launches.clear()
    together = logits(model, tokens)
    assert len(launches) == (4 * LAYERS if tokens <= cuda.ROWS else 0)
    launches.clear()
    monkeypatch.setattr(linear, "TOGETHER", ())
    apart = logits(model, tokens)
    assert len(launches) == (7 * LAYERS if tokens <= cuda.ROWS else 0)
    monkeypatch.setattr(cuda, "products", lambda *_: None)
    expected = logits(model, tokens)
    for found in (together, apart):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")  # torch's compiler and transformers warn of themselves
def test_generation_with_a_static_cache_is_compiled_and_gives_the_same_tokens(model, launches):
    skip(model, 0.5)
    expected = greedy(model)
    torch._dynamo.reset()
    assert torch.equal(greedy(model, cache_implementation="static"), expected)
    launches.clear()
    assert torch.equal(greedy(model, cache_implementation="static"), expected)
    assert len(launches) < 11 * 4 * LAYERS  # the rest are replayed


@pytest.mark.filterwarnings("ignore")
def test_thresholds_set_after_a_compilation_count(model):
    skip(model, 0.0)
    torch._dynamo.reset()
    greedy(model, cache_implementation="static")
    skip(model, 0.8)
    assert torch.equal(greedy(model, cache_implementation="static"), greedy(model))


@pytest.mark.filterwarnings("ignore")
def test_decoding_and_products_are_timed_on_the_card(monkeypatch):
    monkeypatch.setitem(bench_models.RANDOM, "1b", (512, LAYERS, 1376, 8, 2, True))
    monkeypatch.setattr(bench_models, "VOCABULARY", 2048)
    device = torch.device("cuda")
    torch._dynamo.reset()
    measured = bench_cuda(device, random="1b", sparsities=(0.0, 0.5), prompt_tokens=16, tokens=8, repeats=1)
    assert measured.interleaved
    assert [row.sparsity for row in measured.models] == [None, 0.0, 0.5]
    for row in measured.models:
        assert 0 < row.step_seconds < row.eager_seconds  # compiled, replayed
        assert 0 < row.roofline < 1
    found = bench_cuda_products(device, [(4096, 4096)], sparsities=(0.0, 0.5, 0.9), repeats=9).products
    assert found[0].seconds > found[3].seconds
    assert all(0.1 < row.roofline < 1.2 for row in found[:2])
