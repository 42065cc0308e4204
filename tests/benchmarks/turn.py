"""Write a model in another basis as a plain Hugging Face folder: what a basis is worth can then be measured with any tool.

usage: python tests/benchmarks/turn.py MODEL OUT [--basis pca|fitted|auto] [--calibration FILE] [--tokens N] [--device cpu]
"""

import argparse
import shutil
import time
from pathlib import Path

import torch

from wina_convert.dtypes import compute_dtype
from wina_convert.progress import bars
from wina_convert.shards import ShardWriter
from wina_convert.source import open_source
from wina_convert.text import BUNDLED, HELD_OUT, load_tokenizer, read_documents, sequence_length, sequences, split
from wina_convert.turned_check import check_turned
from wina_convert.turning import find_basis, plan_turn, read_turned

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out", type=Path)
parser.add_argument("--basis", default="auto")
parser.add_argument("--calibration", default=BUNDLED)
parser.add_argument("--tokens", type=int, default=65536, help="of the dense pass")
parser.add_argument("--device", default="cpu", type=torch.device)
options = parser.parse_args()

source = open_source(options.model)
turn = plan_turn(source, options.basis, options.device)
assert turn is not None
length = sequence_length(source, None)
samples = options.tokens // length
packed = sequences(
    read_documents(options.calibration), load_tokenizer(source), length, samples + HELD_OUT, options.calibration
)
tokens, held_out = split(packed, samples, 0)
dtype, start = compute_dtype(source), time.process_time()
batch = 1 if options.device.type == "cpu" else 8
basis = find_basis(turn, dtype, tokens, batch, options.device, 0, bars)
found = time.process_time()
error = check_turned(turn, basis, held_out, options.device, bars)
print(
    f"{turn.shown()}; {tokens.numel()} tokens; {found - start:.1f} s of CPU to find, {time.process_time() - found:.1f} s to "
    f"check; logits differ by {error:.1e}"
)
options.out.mkdir()
with ShardWriter(options.out, turn.source.tensors.values(), "5GB") as shards:
    for key in turn.source.tensors:
        shards.write(dict(read_turned(turn, basis, [key], options.device)))
(options.out / "config.json").write_text(turn.source.config_text, "utf-8")
for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
    if (source.folder / file).is_file():
        shutil.copyfile(source.folder / file, options.out / file)
