"""Memory to find, check and fold a basis: within that of a conversion, whatever the depth, and no embedding twice."""

from pathlib import Path

import pytest
import torch

from support.families import make_model
from support.memory import HIDDEN, LAYER, LENGTH, MB, SAMPLES, peak_of, sizes

TURN = f"""
import sys
import torch
from wina_convert.progress import silent
from wina_convert.models.source import open_source
from wina_convert.conversion.turn_proof import check_turned
from wina_convert.conversion.turn import find_basis, plan_turn, read_turned
cpu = torch.device("cpu")
turn = plan_turn(open_source(sys.argv[1]), sys.argv[2], cpu)
tokens = torch.randint(2, 2000, ({SAMPLES}, {LENGTH}), generator=torch.Generator().manual_seed(0))
basis = find_basis(turn, torch.float32 if "float32" in sys.argv else torch.bfloat16, tokens, 1, cpu, 0, silent)
check_turned(turn, basis, tokens, cpu, silent)
for key in turn.source.tensors:
    for _, tensor in read_turned(turn, basis, [key], cpu):
        del tensor  # before the next one is made
"""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak memory of a process from /proc"
)


def peak_of_turning(source: Path, kind: str) -> int:
    """Find, check and read everything, check the promised bound, and return the peak in bytes."""
    peak = peak_of(TURN, source, kind)
    layer, embeddings = sizes(source)
    states = SAMPLES * LENGTH * HIDDEN * 4
    print(f"{kind}: layer {layer / MB:.1f} MB, embeddings {embeddings / MB:.1f} MB: peak {peak / MB:.0f} MB")
    assert peak < 2 * layer + embeddings + states + 600 * MB
    return peak


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The peak of a model of four layers and small embeddings."""
    folder = tmp_path_factory.mktemp("shallow")
    return peak_of_turning(make_model("llama", folder, torch.bfloat16, num_hidden_layers=4, **LAYER), "pca")


def test_depth_does_not_raise_the_peak(shallow: int, tmp_path: Path):
    source = make_model("llama", tmp_path, torch.bfloat16, num_hidden_layers=16, **LAYER)
    layer = sizes(source)[0]
    values = 4 * 8 * 8 * 64 * 64  # bytes a layer: moments, Gram matrices, bases, inverses of 8 heads of 64, in float64
    more = peak_of_turning(source, "pca") - shallow
    assert more < 2 * layer + 12 * values + 16 * MB  # 12 layers more are 73 MB


@pytest.mark.parametrize("tied", [True, False])
def test_large_embeddings_are_in_memory_once(tied: bool, shallow: int, tmp_path: Path):
    source = make_model(
        "llama",
        tmp_path,
        torch.bfloat16,
        num_hidden_layers=2,
        vocab_size=50_000,
        tie_word_embeddings=tied,
        **LAYER,
    )
    embeddings = sizes(source)[1]
    assert embeddings >= 48 * MB * (1 if tied else 2)  # a second copy, or one in float32, would break the bound
    assert peak_of_turning(source, "pca") - shallow < embeddings / (1 if tied else 2) + 16 * MB
