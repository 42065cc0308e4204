"""RMSNorms of a gated model in one operation: which norms those are, and that nothing else changes."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.families import make_model
from support.loaded import PROMPT, greedy, logits
from wina_convert import convert, load
from wina_convert.runtime import norms
from wina_convert.runtime.grouping import SWITCH
from wina_convert.runtime.norms import FusedNorm

pytestmark = pytest.mark.slow


class Norm(nn.Module):
    """As transformers writes it."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.variance_epsilon = eps

    def gain(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.gain() * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x.dtype
        )


class ZeroCentred(Norm):
    """As Gemma has it, which calls the epsilon otherwise."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__(size)
        del self.variance_epsilon
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class Centring(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class WithoutEpsilon(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))


class Gated(Norm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


class PerhapsGated(Norm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


class Shifted(Norm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.bias = nn.Parameter(torch.randn(size))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Norms are computed in one operation on a CPU too; the shapes of what went that way."""
    seen: list[Any] = []

    def counted(x: Tensor, *others: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return torch.nn.functional.rms_norm(x, *others)

    monkeypatch.setattr(norms, "rms_norm", counted)
    monkeypatch.setattr(norms, "FUSED", ("cpu",))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize(("kind", "offset"), [(Norm, 0), (ZeroCentred, 1)])
def test_a_norm_has_the_value_of_the_definition(
    kind: type[Norm], offset: int, dtype: torch.dtype, scale: float, on_cpu: list[Any]
):
    norm = kind(96).to(dtype)
    x = (scale * torch.randn(2, 3, 96)).to(dtype)
    norms.use(norm)
    on_cpu.clear()
    found = norm(x)
    assert on_cpu == [(2, 3, 96)]
    wide = x.double()
    expected = (offset + norm.weight.double()) * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert found.dtype == dtype
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # between numbers too small for all digits
    roundings = 3 if dtype is torch.float32 else 1  # of five in float32, half an eps each, and those of the mean
    close = roundings * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=max(1e-9, step))


@pytest.mark.parametrize("kind", [Centring, WithoutEpsilon, Gated, PerhapsGated, Shifted])
def test_a_norm_of_another_kind_stays(kind: type[Norm]):
    norm = kind(32)
    norms.use(norm)
    assert type(norm) is kind


def test_autocast_and_mixed_dtypes_give_the_dtype_of_x(on_cpu: list[Any]):
    norm = Norm(32)
    norms.use(norm)
    on_cpu.clear()
    half = torch.randn(1, 32, dtype=torch.bfloat16)
    assert norm(half).dtype == Norm.forward(norm, half).dtype
    assert not on_cpu
    norm.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(half).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [Norm, ZeroCentred])
def test_a_copy_and_a_pickle_are_such_norms_too(kind: type[Norm]):
    norm = kind(32)
    norms.use(norm)
    norms.use(norm)  # again changes nothing
    assert type(norm).__name__ == kind.__name__
    assert isinstance(norm, kind)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is type(norm)
        assert isinstance(other, FusedNorm)
        assert other.weight is not norm.weight
        assert torch.equal(other.weight, norm.weight)
    norms.use(norm, False)
    assert type(norm) is kind


@pytest.mark.parametrize(("family", "fused"), [("qwen3", 9), ("gemma2", 9), ("gpt2", 0)])
def test_a_loaded_model_has_them_and_the_same_logits(
    family: str, fused: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, on_cpu: list[Any]
):
    source = make_model(family, tmp_path / "source")
    convert(str(source), tmp_path / "wina", basis="none", samples=4, seq_len=16)
    model = load(str(tmp_path / "wina"), sparsity=0.0)
    assert sum(isinstance(module, FusedNorm) for module in model.modules()) == fused
    on_cpu.clear()
    found, tokens = logits(model), greedy(model)
    assert bool(on_cpu) == bool(fused)
    monkeypatch.setenv(SWITCH, "0")
    plain = load(str(tmp_path / "wina"), sparsity=0.0)
    assert not any(isinstance(module, FusedNorm) for module in plain.modules())
    expected = logits(plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(tokens, greedy(plain))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    on_cpu.clear()
    with torch.no_grad():
        compiled(PROMPT)
    assert not on_cpu
