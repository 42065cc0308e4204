"""Projections that read the same input, computed together."""

import copy
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.families import FAMILIES, make_model
from support.loaded import PROMPT, greedy, logits
from wina_convert import convert, load, set_sparsity
from wina_convert.architectures import ARCHITECTURES
from wina_convert.runtime import linear
from wina_convert.runtime.grouping import SWITCH, group
from wina_convert.runtime.linear import gated_modules

pytestmark = pytest.mark.slow


@pytest.fixture
def apart(monkeypatch):
    """Load a checkpoint without groups."""

    def load_apart(folder):
        with monkeypatch.context() as patch:
            patch.setenv(SWITCH, "0")
            return load(folder)

    return load_apart


@pytest.fixture
def grouped(wina_tiny):
    return load(wina_tiny)


class Calls(TorchDispatchMode):
    """Counts the products by op and number of matrices."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.wina.gated_linear.default:
            self.found.append(1)
        elif func is torch.ops.wina.gated_linears.default:
            self.found.append(len(args[1]))
        return func(*args, **(kwargs or {}))


def calls(model, tokens=PROMPT):
    with Calls() as seen:
        logits(model, tokens)
    return seen.found


def left_behind():
    return linear.HANDOVER.left is not None


def first_attention(model):
    return model.model.layers[0].self_attn


@pytest.fixture(params=FAMILIES)
def family(request, once):
    """A converted model of each family. Shared: do not change it."""

    def make(folder):
        convert(str(make_model(request.param, folder / "source")), folder / "wina", samples=8, seq_len=32, basis="none")

    return once(f"grouped {request.param}", make) / "wina"


def test_a_grouped_model_is_the_same_function_with_fewer_launches(family, apart):
    together, alone = load(family), apart(family)
    for tokens in (PROMPT, PROMPT[:, :1]):
        assert torch.equal(logits(together, tokens), logits(alone, tokens))
    assert torch.equal(greedy(together), greedy(alone))
    layers = together.config.num_hidden_layers
    shared = ARCHITECTURES[together.config.model_type].shared
    assert calls(alone) == [1] * len(gated_modules(alone))
    assert calls(together) == ([3, 1, 2, 1] * layers if shared else calls(alone))
    assert not left_behind()


def test_what_a_family_says_is_called_in_that_order_with_one_tensor(family):
    model = load(family)
    seen = []
    for path, module in gated_modules(model).items():
        module.register_forward_pre_hook(lambda module, inputs, path=path: seen.append((path, inputs[0])))
    logits(model)
    for names in ARCHITECTURES[model.config.model_type].shared:
        inside = [
            (path.split("layers.0.")[1], x) for path, x in seen if path.endswith(tuple(f"layers.0.{n}" for n in names))
        ]
        assert tuple(name for name, _ in inside) == names
        assert all(x is inside[0][1] for _, x in inside)


def test_the_switch_leaves_every_projection_alone(wina_tiny, apart):
    model = apart(wina_tiny)
    assert all(module.siblings == () for module in gated_modules(model).values())


def test_a_base_model_is_grouped_too(wina_tiny):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(wina_tiny)
    attention = model.layers[0].self_attn
    assert attention.q_proj.siblings == (attention.k_proj, attention.v_proj)


def test_a_group_of_which_a_part_stays_dense_is_the_rest(grouped):
    attention = first_attention(grouped)
    dense = torch.nn.Linear(attention.q_proj.in_features, attention.q_proj.out_features, bias=False)
    for module in gated_modules(grouped).values():
        module.siblings = ()
    attention.q_proj = dense
    group(grouped)
    assert attention.k_proj.siblings == (attention.v_proj,)
    assert calls(grouped)[:3] == [2, 1, 2]


def test_a_model_of_no_known_family_is_left_alone(grouped):
    for module in gated_modules(grouped).values():
        module.siblings = ()
    group(torch.nn.ModuleList([first_attention(grouped)]))
    assert first_attention(grouped).q_proj.siblings == ()


def test_state_and_parameters_do_not_know_of_groups(grouped, wina_tiny, apart):
    alone = apart(wina_tiny)
    assert list(grouped.state_dict()) == list(alone.state_dict())
    assert [name for name, _ in grouped.named_modules()] == [name for name, _ in alone.named_modules()]


def test_a_sibling_called_with_another_tensor_computes_its_own(grouped):
    attention = first_attention(grouped)
    x = torch.randn(1, 1, attention.q_proj.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = attention.k_proj(x.clone())
        attention.q_proj(2 * x)
        assert torch.equal(attention.k_proj(x), expected)
        attention.q_proj(x)
        with Calls() as seen:
            assert torch.equal(attention.k_proj(x), expected)
    assert seen.found == []


def test_a_threshold_set_between_the_calls_counts(grouped):
    attention = first_attention(grouped)
    x = torch.randn(1, 1, attention.q_proj.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention.q_proj(x)
        attention.k_proj.set_sparsity(0.9)
        found = attention.k_proj(x)
        assert torch.equal(found, attention.k_proj(x.clone()))
    set_sparsity(grouped, 0.25)
    expected = logits(grouped)
    set_sparsity(grouped, 0.5)
    logits(grouped)
    set_sparsity(grouped, 0.25)
    assert torch.equal(logits(grouped), expected)


def test_a_hook_that_changes_the_threshold_of_a_sibling_counts(grouped):
    attention = first_attention(grouped)
    handle = attention.k_proj.register_forward_pre_hook(lambda module, _: module.set_sparsity(0.9))
    assert calls(grouped)[:4] == [1, 1, 1, 1]
    handle.remove()
    assert calls(grouped)[:2] == [3, 1]


def test_projections_are_apart_where_a_gradient_is_wanted(grouped):
    embeds = grouped.get_input_embeddings()(PROMPT).detach().requires_grad_()
    with Calls() as seen:
        grouped(inputs_embeds=embeds).logits.sum().backward()
    assert set(seen.found) == {1}
    assert embeds.grad.abs().sum() > 0


def test_a_sibling_whose_weights_are_not_here_is_left_to_its_own_call(grouped):
    attention = first_attention(grouped)
    x = torch.randn(1, 1, attention.q_proj.in_features)
    weight_t = attention.v_proj.weight_t.data
    attention.v_proj.weight_t = torch.nn.Parameter(weight_t.to("meta"), requires_grad=False)
    with Calls() as seen, torch.no_grad():
        attention.q_proj(x)
        attention.k_proj(x)
    assert seen.found == [1, 1]


def test_dense_prefill_and_autocast_are_those_of_each_projection(wina_tiny, apart):
    together, alone = load(wina_tiny, prefill="dense"), apart(wina_tiny)
    for module in gated_modules(alone).values():
        module.dense_prefill = True
    assert torch.equal(logits(together), logits(alone))
    together, alone = together.bfloat16(), alone.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(together), logits(alone))


def test_a_copy_has_groups_of_its_own(grouped):
    other = copy.deepcopy(grouped)
    set_sparsity(other, 0.9)
    assert first_attention(other).q_proj.siblings == (first_attention(other).k_proj, first_attention(other).v_proj)
    assert not torch.equal(logits(other), logits(grouped))
    assert calls(other) == calls(grouped)


def test_threads_that_share_a_model_get_their_own_results(grouped):
    prompts = [PROMPT + n for n in range(4)]
    expected = [logits(grouped, prompt) for prompt in prompts]
    wrong = []

    def work(prompt, right):
        for _ in range(20):
            if not torch.equal(logits(grouped, prompt), right):
                wrong.append(prompt)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(prompts, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_compiled_model_is_one_graph_of_grouped_products(grouped):
    expected = logits(grouped)
    seen, graphs = [], []

    def backend(graph, _):
        graphs.append(graph)
        for node in graph.graph.nodes:
            if node.target is torch.ops.wina.gated_linears.default:
                seen.append(len(node.args[1]))
            elif node.target is torch.ops.wina.gated_linear.default:
                seen.append(1)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(grouped, fullgraph=True, backend=backend)
    for _ in range(3):
        assert torch.equal(logits(compiled), expected)
        assert not left_behind()
    assert len(graphs) == 1
    assert seen == [3, 1, 2, 1] * grouped.config.num_hidden_layers
    assert torch.equal(logits(grouped), expected)


def test_torch_accepts_the_op():
    x, other = torch.randn(2, 31), torch.randn(31, 5)
    arguments = x, [other, other + 1], [torch.rand(31), torch.rand(31)], [torch.randn(5), None]
    torch.library.opcheck(torch.ops.wina.gated_linears.default, arguments)
