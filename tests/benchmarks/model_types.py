"""Every type of transformers' causal language models: which are supported, and why the others are not.

    python tests/benchmarks/model_types.py [--rest] [--jobs N] [TYPE ...]

Each is a small random model of the type's default config with every kind of its layers. It is converted, loaded whole and held
against the dense model at sparsity 0; at 50% each product, of a prompt and of generated tokens, is held against float64. What the
conversion refuses is listed with its message; anything else that goes wrong is "wrong".

The rows of the types that were run replace those in `model_types.md` beside this file as soon as each is done; `--rest` runs the
types that have no row yet, so an interrupted run goes on where it stopped. Without types all of them are run.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.families import make_type
from support.reference import assert_dense_at_0, assert_each_product_follows_the_rule, convert
from wina_convert.architectures import REFUSED
from wina_convert.errors import WinaError, one_line
from wina_convert.models.stream import missing

TABLE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- begin: written by model_types.py -->", "<!-- end -->"
UNTRIED = "untried"  # a row that waits for a run
ROW = re.compile(r"\| `(.+?)` \| (\w+) \| (.*) \|")

# models of images and text that transformers has no causal language model of
WRAPPERS = (
    *("internvl", "lfm2_vl", "llava", "llava_next", "mistral3", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"),
    "smolvlm",
)
INDEXER = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256},
    **{"indexer_budget": 2048, "indexer_compress_ratio": 16},
}
# where a type's default config leaves out what every released model of it says
MISSING: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "bamba": {"attn_layer_indices": [1]},  # without attention layers transformers cannot generate
    **{name: {"head_dim": 128} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 9, "<image>": 7}},
    "nemotron": {"head_dim": 128, "num_attention_heads": 48, "num_key_value_heads": 8},
    "xmod": {"default_language": "en_XX"},
    **{
        name: {
            "text_config": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
            }
        }
        for name in ("qwen2_vl", "qwen2_5_vl")
    },
    "deepseek_v2": {"num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    "nemotron_h": {
        "moe_intermediate_size": 7680,
        "moe_shared_expert_intermediate_size": 7680,
    },  # transformers wants multiples
    "dbrx": {"attn_config": {"rope_theta": 500000}},
    "qwen4_exp_text": INDEXER,
    "qwen4_exp": {"text_config": INDEXER},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
}


def outcome(model_type: str) -> tuple[str, str]:
    """What becomes of a type: "supported", "refused" or "wrong", and the reason."""
    if model_type in REFUSED:
        return "refused", REFUSED[model_type]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            dense = make_type(model_type, folder / "dense", **MISSING.get(model_type, {}))
        except WinaError as error:
            return "refused", one_line(error)
        except ImportError as error:
            return "refused", f"transformers builds it with {missing(error)}"
        except Exception as error:  # whatever transformers makes of its own default config
            return "refused", f"no model can be built of the type's default config ({one_line(error)[:200]})"
        try:
            convert(dense, folder / "gated")
        except WinaError as error:
            return "refused", re.sub(r"^dense ", "it ", one_line(error))
        except Exception as error:
            return "wrong", f"{type(error).__name__}: {one_line(error)[:200]}"
        try:
            assert_dense_at_0(dense, folder / "gated")
            assert_each_product_follows_the_rule(dense, folder / "gated", 0.5)
        except Exception as error:
            return "wrong", f"{type(error).__name__}: {one_line(error)[:200]}"
        return "supported", ""


def rows() -> dict[str, tuple[str, str]]:
    """Outcome and reason by type, as the table has them; not of those that were never run."""
    found = {row[1]: (row[2], row[3].strip()) for row in ROW.finditer(TABLE.read_text("utf-8"))}
    return {name: row for name, row in found.items() if row[0] != UNTRIED}


def write(found: dict[str, tuple[str, str]]) -> None:
    """Put rows into the table; those that it has of other types stay."""
    merged = {**dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, (UNTRIED, "")), **rows(), **found}
    known = {name: merged[name] for name in sorted(merged) if name in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WRAPPERS)}
    counts = Counter(verdict for name, (verdict, _) in known.items() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    lines = [
        f"Of the {counts.total()} types of causal language models that transformers {transformers.__version__} knows: "
        + ", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts, reverse=True))
        + ".",
        "",
        "| type | | why |",
        "| --- | --- | --- |",
        *(f"| `{name}` | {verdict} | {reason.replace('|', '/')} |" for name, (verdict, reason) in known.items()),
    ]
    text = TABLE.read_text("utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    TABLE.write_text(text[:begin] + "\n" + "\n".join(lines) + "\n" + text[end:], "utf-8")


def quiet() -> None:
    """No warnings and progress bars of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def timed(model_type: str) -> tuple[str, str, float]:
    """The outcome of a type, and its seconds."""
    begin = time.monotonic()
    return *outcome(model_type), time.monotonic() - begin


def main() -> None:
    """Run types and write their rows."""
    parser = argparse.ArgumentParser(description="Tries types of models and writes model_types.md.")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="default: all")
    parser.add_argument("--rest", action="store_true", help="only those that the table has no row of")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    asked = parser.parse_args()
    types = asked.types or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WRAPPERS]
    todo = [name for name in dict.fromkeys(types) if not (asked.rest and name in rows())]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.jobs, spawn, quiet) as pool:
        running = {pool.submit(timed, name): name for name in todo}
        for future in as_completed(running):
            verdict, reason, seconds = future.result()
            write({running[future]: (verdict, reason)})
            print(f"{running[future]}: {verdict}, {seconds:.0f} s {reason}", flush=True)


if __name__ == "__main__":
    main()
