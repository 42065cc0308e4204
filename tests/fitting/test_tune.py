"""Learning: its gradient, its division of the sparsity, that it helps on other text, and that it can be interrupted."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from support import TINY
from wina_convert.fitting import tune as tuning
from wina_convert.fitting.budget import UNIFORM
from wina_convert.fitting.schemes import column_norms
from wina_convert.fitting.student import WIDTH, Skip, Student, divergence, even_shares
from wina_convert.fitting.tune import LEVELS, Texts, Tuned, tune
from wina_convert.format.grid import GRID

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 4, "LOOK": 2, "LEVEL_TOKENS": 64}.items():
        monkeypatch.setattr(tuning, name, value)


def load() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY)


def student(model: PreTrainedModel | None = None) -> Student:
    model = model or load()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    columns = {name: column_norms(module.weight.detach().t().contiguous()) for name, module in linears.items()}
    return Student(model, columns, {name: module.weight.numel() for name, module in linears.items()}, LEVELS)


@pytest.fixture(scope="module")
def texts() -> Texts:
    """The project's text in sequences of 64 tokens."""
    from wina_convert.models.documents import BUNDLED, read_documents
    from wina_convert.models.source import open_source
    from wina_convert.models.text import load_tokenizer, sequences, split

    packed = sequences(read_documents(BUNDLED), load_tokenizer(open_source(str(TINY))), 64, 400, "text")
    seen, _ = split(packed, 120, 0)
    return Texts(seen[12:], seen[:8], seen[8:12])


# --- the mask ---


def test_the_mask_is_the_rule_and_its_gradient_that_of_a_sigmoid():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float32, generator=generator, requires_grad=True)
    scale = torch.rand(8, generator=generator).mul(2).requires_grad_()
    weights = torch.randn(3, 5, 8, generator=generator)
    masked, skipped = Skip.apply(x, scale)
    keep = x.abs() * scale > 1
    assert torch.equal(masked, x * keep)
    assert float(skipped.detach()) == pytest.approx(1 - keep.float().mean().item())
    found = torch.autograd.grad((masked * weights).sum() + 7 * skipped, (x, scale))
    soft = torch.sigmoid((x.abs() * scale - 1) / WIDTH)
    by_mask = torch.autograd.grad((x.detach() * soft * weights).sum() + 7 * (1 - soft).mean(), (x, scale))
    torch.testing.assert_close(found[0], by_mask[0] + weights * keep)
    torch.testing.assert_close(found[1], by_mask[1])


def test_without_a_level_the_student_is_the_dense_model(texts: Texts):
    model, dense = load(), load()
    gated, tokens = student(model), texts.judged[:2]
    with torch.no_grad():
        expected = dense(tokens).logits.log_softmax(-1)
        assert torch.equal(gated.log_probabilities(tokens, None), expected)
        assert not torch.allclose(gated.log_probabilities(tokens, 2), expected, atol=0.1)


def test_thresholds_are_set_behind_gated_projections(texts: Texts):
    gated = student()
    shares = gated.asked(UNIFORM)
    gated.set_thresholds(texts.fitted, shares)
    torch.testing.assert_close(gated.fractions(texts.fitted), shares, rtol=0, atol=0.01)
    assert (gated.fractions(texts.judged) - shares).abs().max() < 0.06


def test_the_divergence_is_that_of_its_definition():
    p, q = (torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(n)).log_softmax(-1) for n in (0, 1))
    expected = (p.double().exp() * (p.double() - q.double())).sum(-1).mean()
    assert float(divergence(p, q)) == pytest.approx(float(expected), rel=1e-5)
    assert float(divergence(p, p)) == 0


# --- the division of the sparsity ---


@pytest.mark.parametrize("seed", range(5))
def test_shares_come_to_each_level_and_never_fall(seed: int):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.rand(30, dtype=torch.float64, generator=generator)
    parts /= parts.sum()
    fractions = torch.rand(30, len(LEVELS), dtype=torch.float64, generator=generator)
    shares = even_shares(fractions, parts, LEVELS)
    torch.testing.assert_close(parts @ shares, torch.tensor(LEVELS, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (shares.diff(dim=1) >= 0).all()
    assert shares.min() >= 0
    assert shares.max() <= 1


def test_shares_that_come_to_the_levels_already_stay():
    parts = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    fractions = torch.tensor(list(LEVELS), dtype=torch.float64).repeat(3, 1)
    torch.testing.assert_close(even_shares(fractions, parts, LEVELS), fractions, rtol=1e-9, atol=0)


def made(shares: Tensor, biases: Tensor) -> Tuned:
    return Tuned({}, {"p": biases}, {"p": shares}, (1.0,), (0.5,), 3)


def test_budget_and_biases_along_the_grid_are_what_was_learned_at_the_levels():
    shares = torch.tensor([0.2, 0.3, 0.45, 0.6, 0.8, 0.9], dtype=torch.float64)
    biases = torch.arange(12.0).view(6, 2) + 1
    tuned = made(shares, biases)
    table, budget = tuned.bias_table("p"), tuned.budget(["p"])
    assert (budget.allocation, table.shape, table.dtype) == ("learned", (len(GRID), 2), torch.float32)
    for level, share, bias in zip(LEVELS, shares.tolist(), biases, strict=True):
        assert budget.asked("p", level) == pytest.approx(share, abs=1e-12)
        torch.testing.assert_close(table[GRID.index(level)], bias)
    assert budget.asked("p", 0.0) == 0
    assert not table[0].any()
    assert budget.asked("p", 0.95) == pytest.approx(0.9 + 0.1 * 10 / 15)  # towards 1 at 1
    torch.testing.assert_close(table[GRID.index(0.1)], biases[0] * 0.4)
    torch.testing.assert_close(table[GRID.index(0.7)], (biases[3] + biases[4]) / 2)
    assert torch.equal(table[-1], biases[-1])


# --- the learning ---


def test_it_helps_at_every_level_on_text_that_it_did_not_learn_from(texts: Texts, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "STEPS", 16)
    monkeypatch.setattr(tuning, "LOOK", 8)
    monkeypatch.setattr(tuning, "LEVEL_TOKENS", 256)
    said: list[float] = []
    gated = student()
    tuned = tune(gated, UNIFORM, texts, 0, told=lambda steps, loss: said.append(loss))
    assert tuned.better
    assert all(after <= before for before, after in zip(tuned.before, tuned.after, strict=True))
    assert tuned.after[2] < 0.95 * tuned.before[2]
    assert (tuned.steps, len(said)) == (16, 17)
    weights = {name: len(tuned.columns[name]) * tuned.biases[name].shape[1] for name in gated.gates}
    budget = tuned.budget(weights)
    for level in GRID:
        assert budget.overall(weights, level) == pytest.approx(level, abs=1e-9)


@pytest.mark.parametrize("rate", [50.0, 1e38])  # the second until nothing is a number any more
def test_what_only_gets_worse_is_left_early_and_as_it_was(rate: float, texts: Texts, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "RATES", (5.0, rate, 5.0))
    monkeypatch.setattr(tuning, "STEPS", 20)
    gated = student()
    start = {name: gate.columns.clone() for name, gate in gated.gates.items()}
    tuned = tune(gated, UNIFORM, texts, 0)
    assert tuned.steps == tuning.LOOK * tuning.PATIENCE
    assert tuned.after == tuned.before
    assert not tuned.better
    for name, columns in tuned.columns.items():
        assert torch.equal(columns, start[name])
        assert not tuned.biases[name].any()
        torch.testing.assert_close(tuned.shares[name], torch.tensor(LEVELS, dtype=torch.float64))


def same(a: Tuned, b: Tuned) -> bool:
    tables = ("columns", "biases", "shares")
    equal = all(
        torch.equal(value, getattr(b, table)[name]) for table in tables for name, value in getattr(a, table).items()
    )
    return equal and (a.before, a.after, a.steps) == (b.before, b.after, b.steps)


def test_the_same_seed_gives_the_same_also_after_an_interruption(texts: Texts):
    states: list[tuning.State] = []
    whole = tune(student(), UNIFORM, texts, 0, save=states.append)
    assert len(states) == 2
    assert same(tune(student(), UNIFORM, texts, 0, state=states[0]), whole)
    others: list[tuning.State] = []
    tune(student(), UNIFORM, texts, 1, save=others.append)
    assert not torch.equal(states[-1]["now/0"], others[-1]["now/0"])


def test_a_column_of_zeros_goes_on_weighing_nothing(texts: Texts):
    model = load()
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[:, 7] = 0
    tuned = tune(student(model), UNIFORM, texts, 0)
    assert tuned.columns[name][7] == 0
    assert tuned.steps == 4
    assert (tuned.columns[name] > 0).sum() == len(tuned.columns[name]) - 1
