"""The memory a conversion needs: two decoder layers, the embeddings and the hidden states, whatever the depth."""

from pathlib import Path

import pytest

from support.families import make_model
from support.memory import HIDDEN, LAYER, LENGTH, LEVELS, MB, SAMPLES, peak_of, sizes

CONVERT = f"""
import sys
import wina_convert
options = dict(samples={SAMPLES}, seq_len={LENGTH}, batch_size=16, device="cpu", basis="pca")
wina_convert.convert(sys.argv[1], sys.argv[2], plot="plot" in sys.argv, **options)
"""
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak memory of a process from /proc"
)


def peak_of_conversion(source: Path, out: Path, *flags: str) -> int:
    """Convert, check the promised bound, and return the peak in bytes."""
    peak = peak_of(CONVERT, source, out, *flags)
    layer, embeddings = sizes(source)
    states = SAMPLES * LENGTH * HIDDEN * 4 * LEVELS
    print(f"layer {layer / MB:.1f} MB, embeddings {embeddings / MB:.1f} MB: peak {peak / MB:.0f} MB")
    assert peak < 2 * layer + embeddings + states + 600 * MB
    return peak


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The peak of a model of four layers and small embeddings."""
    folder = tmp_path_factory.mktemp("shallow")
    source = make_model("llama", folder / "source", num_hidden_layers=4, **LAYER)
    return peak_of_conversion(source, folder / "wina", "plot")


def test_depth_does_not_raise_the_peak(shallow: int, tmp_path: Path) -> None:
    """Not even with pictures, for which something of every layer is kept."""
    source = make_model("llama", tmp_path / "source", num_hidden_layers=12, **LAYER)
    layer = sizes(source)[0]
    assert 12e6 < layer < 14e6
    assert peak_of_conversion(source, tmp_path / "wina", "plot") - shallow < layer + 15 * MB  # 8 more are 100 MB


def test_large_embeddings_are_in_memory_once(shallow: int, tmp_path: Path) -> None:
    source = make_model("llama", tmp_path / "source", num_hidden_layers=2, vocab_size=20_000, **LAYER)
    embeddings = sizes(source)[1]
    assert embeddings > 75 * MB  # a second copy would break the bound
    assert peak_of_conversion(source, tmp_path / "wina", "plot") - shallow < embeddings + 16 * MB
