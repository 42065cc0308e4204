"""A model whose memory is all in its layers, and what it takes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

SAMPLES, LENGTH, HIDDEN = 2, 16, 512
LEVELS = 4  # hidden states that calibration carries: three levels of sparsity, and those after the embedding
MB = 1 << 20

LAYER: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


# The allocator gives back what is freed, at once and whatever the threads did before: without it a peak moves by 40 MB.
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
# not getrusage: its peak starts at that of the parent process
REPORT = """
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def peak_of(script: str, *arguments: str | Path) -> int:
    """Run a script in a process of its own, where nothing else was ever loaded, and return its peak in bytes.

    The peak counts everything resident, the pages of mapped files and the libraries included.
    """
    command = [sys.executable, "-c", script + REPORT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | GIVE_BACK)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) * 1024


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of the largest decoder layer, and of everything outside the layers."""
    layers: dict[str, int] = {}
    outside = 0
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith("model.layers."):
            layers[name.split(".")[2]] = layers.get(name.split(".")[2], 0) + tensor.nbytes
        else:
            outside += tensor.nbytes
    return max(layers.values()), outside
