"""A reference of a few lines for a gated model, and how it is compared.

It is the dense model in plain transformers with the inputs of its projections zeroed by a hook, which reads the
thresholds from the checkpoint's files. A score within rounding of its threshold may fall on either side; the comparisons
take the first prompt for which the reference finds none.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

import wina_convert
from support.experts import matrix_of, replace_experts
from support.folders import config_of, tensors_of, threshold_of
from wina_convert.runtime.classes import auto_class

SAMPLES, LENGTH, NEW = 8, 32, 10
PLACE = re.compile(r"\.(\d+\..+)")
EDGE = 1e-6  # of the largest score: a multiple of float32's rounding


@dataclass
class Reference:
    """A dense model whose projections see only the inputs that the checkpoint's thresholds let through."""

    model: Any
    edge: float = 1.0
    skipped: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    def clear(self) -> None:
        self.skipped, self.inputs = dict.fromkeys(self.skipped, 0), dict.fromkeys(self.inputs, 0)

    def fractions(self) -> dict[str, float]:
        return {name: self.skipped[name] / self.inputs[name] for name in self.skipped}

    def overall(self) -> float:
        shares = [self.weights[name] * fraction for name, fraction in self.fractions().items()]
        return sum(shares) / sum(self.weights.values())


def dense_model(folder: Path) -> Any:
    """The dense model, by transformers alone."""
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)


def curve_of(name: str, curves: dict[str, Any]) -> Any:
    """What the checkpoint holds of a projection, whatever comes before the index of the layer there."""
    (found,) = [curve for key, curve in curves.items() if PLACE.search(key)[1] == PLACE.search(name)[1]]
    return found


def reference(dense: Path, gated: Path, sparsity: float) -> Reference:
    made = Reference(dense_model(dense))
    curves = {key.removesuffix(".thresholds"): t for key, t in tensors_of(gated).items() if key.endswith(".thresholds")}

    def cutting(name: str) -> Callable[[Tensor], Tensor]:
        curve = curve_of(name, curves)
        threshold = threshold_of(gated, curve, sparsity)
        weight, _ = matrix_of(made.model, name)
        norms = weight.norm(dim=0)
        made.skipped[name], made.inputs[name], made.weights[name] = 0, 0, weight.numel()

        def cut(x: Tensor) -> Tensor:
            scores = x.double().abs() * norms
            drop = scores <= threshold
            made.edge = min(made.edge, float((scores - threshold).abs().min() / scores.max()))
            made.skipped[name] += int(drop.sum())
            made.inputs[name] += drop.numel()
            return x.masked_fill(drop, 0)

        return cut

    def watch(module: torch.nn.Module, cut: Callable[[Tensor], Tensor]) -> None:
        module.register_forward_pre_hook(lambda _, inputs: (cut(inputs[0]),))

    cuts = {name: cutting(name) for name in config_of(gated)["quantization_config"]["modules"]}
    paths = {name.rpartition(".experts.")[0] for name in cuts if ".experts." in name}
    for path in paths:
        replace_experts(made.model.get_submodule(f"{path}.experts"), f"{path}.experts", lambda name, x: cuts[name](x))
    for name, cut in cuts.items():
        if ".experts." not in name:
            watch(made.model.get_submodule(name), cut)
    return made


@torch.no_grad()
def logits(model: Any, prompt: Tensor) -> Tensor:
    return model(input_ids=prompt).logits.float()


def greedy(model: Any, prompt: Tensor) -> list[list[int]]:
    return model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None).tolist()


def random_prompt(seed: int) -> Tensor:
    return torch.randint(2, 2048, (1, 40), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Answer:
    prompt: Tensor
    logits: Tensor
    continuation: list[list[int]]


def answer(expected: Reference) -> Answer:
    """What the reference makes of the first prompt that brings no score to the edge of its threshold."""
    for seed in range(20):
        prompt, expected.edge = random_prompt(seed), 1.0
        found = Answer(prompt, logits(expected.model, prompt), greedy(expected.model, prompt))
        if expected.edge > EDGE:
            return found
    raise AssertionError("every prompt has a score at its threshold; something is wrong with the reference")


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def assert_dense_at_0(dense: Path, gated: Path) -> None:
    """Within 1e-5 of the logits' scale; or within a few times the dense model's own rounding: a recurrence amplifies it."""
    plain, prompt = dense_model(dense), random_prompt(1)
    expected, found = logits(plain, prompt), logits(wina_convert.load(str(gated), sparsity=0.0), prompt)
    if (found - expected).abs().max() > 1e-5 * expected.abs().max():
        plain.config._experts_implementation = "eager"  # the others do not compute in float64
        rounding = (logits(plain.double(), prompt) - expected).abs().max()
        assert (found - expected).abs().max() <= 4 * rounding


def assert_equals_reference(dense: Path, gated: Path, sparsity: float) -> None:
    expected = answer(reference(dense, gated, sparsity))
    model = wina_convert.load(str(gated), sparsity=sparsity)
    assert_close(logits(model, expected.prompt), expected.logits)
    assert greedy(model, expected.prompt) == expected.continuation


def assert_each_product_follows_the_rule(dense: Path, gated: Path, sparsity: float) -> None:
    """Each product of a loaded model, of a prompt and of generated tokens, against float64 on the very inputs it got.

    For models with so many scores that some always lie at a threshold: what those inputs may contribute is allowed for.
    """
    plain = dense_model(dense)
    curves = {key.removesuffix(".thresholds"): t for key, t in tensors_of(gated).items() if key.endswith(".thresholds")}
    model = wina_convert.load(str(gated), sparsity=sparsity)
    called = set()

    def watch(name: str, weight: Tensor, bias: Tensor | None, threshold: float) -> Any:
        norms = weight.norm(dim=0)

        def hook(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            called.add(name)
            x = inputs[0].double()
            scores = x.abs() * norms
            expected = x.masked_fill(scores <= threshold, 0) @ weight.t() + (0 if bias is None else bias)
            at_the_edge = (scores - threshold).abs() < 1e-5 * threshold
            slack = (x.abs() * at_the_edge) @ weight.t().abs()
            assert ((output - expected).abs() <= slack + 1e-5 * expected.abs().max()).all(), name

        return hook

    names = config_of(gated)["quantization_config"]["modules"]
    for name in names:
        curve = curve_of(name, curves)
        hook = watch(name, *matrix_of(plain, name), threshold_of(gated, curve, sparsity))
        model.get_submodule(name).register_forward_hook(hook)
    logits(model, random_prompt(1))
    greedy(model, random_prompt(2))
    assert called >= {name for name in names if ".experts." not in name}
    assert {any_expert(name) for name in called} == {
        any_expert(name) for name in names
    }  # nobody need choose each of them


def any_expert(name: str) -> str:
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


def convert(dense: Path, gated: Path, **options: Any) -> dict[str, Any]:
    return wina_convert.convert(
        str(dense), gated, **{"samples": SAMPLES, "seq_len": LENGTH, "basis": "none", **options}
    )
