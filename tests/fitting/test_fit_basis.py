"""The fit: an orthogonal basis, sparser than the principal axes, the same every time, within its effort."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.bases import CPU, random_orthogonal, turn_of
from wina_convert.conversion.turn import find_basis, gather
from wina_convert.conversion.turn_proof import check_turned
from wina_convert.errors import OptionError
from wina_convert.fitting.basis import Geometry
from wina_convert.fitting.fit_basis import (
    FEWEST_STEPS,
    OPERATIONS,
    STEPS,
    Effort,
    cayley,
    dropped_energy,
    effort_of,
    fit_basis,
    principal_axes,
)
from wina_convert.fitting.moments import Moments, Reader, Site
from wina_convert.models.documents import read_documents
from wina_convert.models.source import open_source
from wina_convert.models.text import load_tokenizer, sequences
from wina_convert.progress import silent

GPU = torch.device("cuda")

pytestmark = pytest.mark.slow
SHORT = Effort(steps=60, norms=2, tokens=256, kept=2048, operations=0, nbytes=0, enough=True)


@pytest.fixture(scope="module")
def tokens(tiny: Path) -> torch.Tensor:
    return sequences(read_documents(), load_tokenizer(open_source(str(tiny))), 128, 32, "bundled")[:32]


@pytest.fixture(scope="module")
def moments(tiny: Path, tokens: torch.Tensor) -> Moments:
    return gather(replace(turn_of(tiny, "fitted"), effort=SHORT), torch.float32, tokens, 1, CPU, 0, silent)


def loss_of(moments: Moments, q: torch.Tensor) -> float:
    """Squared scores dropped at 50% over all that was kept, in parts of each projection's output."""
    total = 0.0
    for site in moments.sites:
        for reader in site.readers:
            size = (site.inputs @ reader.factor.t()).square().sum(1).mean()
            total += reader.weights * float(dropped_energy(site.inputs, [reader.factor], q.float(), 0.5) / size)
    return total


def test_the_fit_is_orthogonal_and_drops_less_than_the_principal_axes_and_these_than_none(moments: Moments):
    axes = principal_axes(moments.stream)
    fitted = fit_basis(axes, moments.sites, SHORT, 0, silent)
    eye = torch.eye(len(fitted), dtype=torch.float64)
    torch.testing.assert_close(fitted.t() @ fitted, eye, rtol=0, atol=1e-12)
    found = [loss_of(moments, q) for q in (eye, axes, fitted)]
    assert found[1] < 0.9 * found[0]
    assert found[2] < 0.9 * found[1]


def test_the_same_fit_gives_the_same_bits_and_another_seed_others(moments: Moments):
    axes = principal_axes(moments.stream)
    one, again, other = (fit_basis(axes, moments.sites, SHORT, seed, silent) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_planted_basis_in_which_inputs_are_sparse_is_found():
    """Uncorrelated inputs of one size have no principal axes; the fit finds those along which few are large."""
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(8192, 8, generator=generator) ** 3
    planted = random_orthogonal(8, 1)
    site = Site(sparse @ planted.t().float(), (Reader(torch.eye(8), 64),))
    effort = replace(SHORT, steps=600, norms=1, tokens=2048)
    found = fit_basis(random_orthogonal(8, 2), [site], effort, 0, silent)
    match = (planted.t() @ found).abs()
    assert match.amax(0).min() > 0.97


def test_the_loss_is_the_squared_scores_below_the_quantile_of_each_projection():
    generator = torch.Generator().manual_seed(0)
    inputs, q = torch.randn(700, 8, generator=generator), random_orthogonal(8, 3).float()
    weights = [torch.randn(rows, 8, generator=generator) * torch.rand(8, generator=generator) for rows in (5, 12)]
    expected = 0.0
    for weight in weights:
        scores = (inputs @ q).abs() * (weight @ q).norm(dim=0)
        expected += float((scores * (scores < scores.quantile(0.4))).square().sum(1).mean())
    assert float(dropped_energy(inputs, weights, q, 0.4)) == pytest.approx(expected, rel=0.05)


def test_cayleys_map_is_orthogonal_and_starts_at_the_identity():
    assert torch.equal(cayley(torch.zeros(5, 5)), torch.eye(5))
    q = cayley(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(q.t() @ q, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["pca", "fitted"])
def test_a_trained_model_keeps_its_function(kind: str, tiny: Path, tokens: torch.Tensor):
    turn = turn_of(tiny, kind)
    turn = replace(turn, effort=turn.effort and SHORT)
    basis = find_basis(turn, torch.float32, tokens, 1, CPU, 0, silent)
    assert basis.kind == kind
    assert check_turned(turn, basis, tokens, CPU, silent) < 5e-6


# --- the effort ---

LLAMA_8B = Geometry(32, 4096, 32, 8, 128)
LLAMA_8B_READERS = [[(4096, 4096), (1024, 4096), (1024, 4096)], [(14336, 4096), (14336, 4096)]] * 32


def test_eight_billion_parameters_are_fitted_on_a_gpu_and_not_on_a_cpu():
    gpu, cpu = (effort_of(LLAMA_8B, LLAMA_8B_READERS, device) for device in (GPU, CPU))
    assert gpu.enough
    assert gpu.steps == STEPS
    assert gpu.nbytes <= 16 << 30
    assert not cpu.enough
    assert cpu.steps < FEWEST_STEPS
    assert cpu.operations <= OPERATIONS["cpu"]


@pytest.mark.parametrize("limits", ["OPERATIONS", "BYTES"])
def test_what_is_too_large_gets_principal_axes_and_a_fit_that_was_asked_for_is_refused(
    limits: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(f"wina_convert.fitting.fit_basis.{limits}", {"cpu": 1 << 20})
    assert turn_of(tiny, "auto").kind == "pca"
    assert turn_of(tiny, "auto").effort is None
    with pytest.raises(OptionError, match=r"wina-lab-tiny is too large to fit a basis on a cpu.*--basis pca"):
        turn_of(tiny, "fitted")


def test_a_small_model_is_fitted_anywhere(tiny: Path):
    turn = turn_of(tiny, "auto")
    assert turn.kind == "fitted"
    assert turn.effort.steps == STEPS
    assert turn.effort.nbytes < 100 << 20
    assert "300 steps" in turn.shown()["fit"]
