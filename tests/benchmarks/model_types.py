"""Every type of transformers' causal language models: which are supported, and why the others are not.

    python tests/benchmarks/model_types.py [TYPE ...] > types.md

Each is a small random model of the type's default config with every kind of its layers. It is converted, loaded by
AutoModelForCausalLM and compared with the dense model at sparsity 0; at 50% each product, of a prompt and of generated tokens, is
held against float64. What the conversion refuses is listed with its message; anything else that goes wrong is "wrong".
"""

import sys
import tempfile
import time
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.families import make_type
from support.reference import assert_dense_at_0, assert_each_product_follows_the_rule, convert
from wina_convert.architectures import REFUSED
from wina_convert.errors import WinaError, one_line

# where a type's default config leaves out what every released model of it says
MISSING = {name: {"head_dim": 128} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron")} | {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "nemotron_h": {
        "moe_intermediate_size": 7680,
        "moe_shared_expert_intermediate_size": 7680,
    },  # transformers wants multiples
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
}


def outcome(model_type: str, folder: Path) -> tuple[str, str]:
    """What becomes of a type: "supported", "refused" or "wrong", and the reason."""
    if model_type in REFUSED:
        return "refused", REFUSED[model_type]
    try:
        dense = make_type(model_type, folder / "dense", **MISSING.get(model_type, {}))
    except WinaError as error:
        return "refused", one_line(error)
    except Exception as error:  # whatever transformers makes of its own default config
        return "refused", f"no model can be built of the type's default config ({one_line(error)[:200]})"
    try:
        convert(dense, folder / "gated")
    except WinaError as error:
        return "refused", one_line(error).replace("dense is", "it is")
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {one_line(error)[:200]}"
    try:
        assert_dense_at_0(dense, folder / "gated")
        assert_each_product_follows_the_rule(dense, folder / "gated", 0.5)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {one_line(error)[:200]}"
    return "supported", ""


def main() -> None:
    """Print the table."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    counts: dict[str, int] = {}
    print("| type | | reason |\n| --- | --- | --- |")
    for model_type in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            verdict, reason = outcome(model_type, Path(folder))
        counts[verdict] = counts.get(verdict, 0) + 1
        print(f"| `{model_type}` | {verdict} | {reason.replace('|', '/')} |", flush=True)
        print(f"{model_type}: {verdict}, {time.monotonic() - begin:.0f} s", file=sys.stderr)
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


if __name__ == "__main__":
    main()
