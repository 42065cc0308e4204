"""What a conversion says of a checkpoint, in the files beside its weights."""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import __version__
from ..fitting.thresholds import levels
from ..format.config import WinaConfig
from ..format.names import CONFIG, INSTALL
from ..models.source import Source
from .options import ConversionOptions

if TYPE_CHECKING:
    from .plan import ConversionPlan


def text_name(calibration: str) -> str:
    """What to call a calibration text: a file by its name, without its folder."""
    return Path(calibration).name if Path(calibration).is_file() else calibration


def digest(tokens: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def checkpoint_config(
    source: Source, plan: "ConversionPlan", options: ConversionOptions, tokens: Tensor, basis: dict[str, Any]
) -> WinaConfig:
    """What config.json will say of a checkpoint.

    Args:
        source: what is converted.
        plan: of the conversion.
        options: as they were used.
        tokens: [N, S], int64: the calibration text.
        basis: what is told of the change of basis.
    """
    return WinaConfig(
        sparsity=options.sparsity,
        prefill="gated",
        modules=[projection.name for projection in plan.projections],
        scheme=plan.scheme.name,
        low_rank=plan.scheme.low_rank,
        allocation=plan.budget.allocation,
        shares=plan.budget.stored(),
        basis=basis,
        calibration={
            "text": text_name(options.calibration),
            "samples": len(tokens),
            "seq_len": tokens.shape[1],
            "seed": options.seed,
            "levels": list(levels(options.sparsity)),
            "tokens_sha256": digest(tokens),
        },
        source=source.told(),
        tool_version=__version__,
    )


def write_config(folder: Path, source: Source, config: WinaConfig, plan: "ConversionPlan") -> None:
    """Write the source's config.json with our block added; the rest of its text stays, but for a dtype chosen anew.

    A source without a dtype gets one: transformers would guess it from the float32 column norms.
    """
    text = source.config_text.rstrip()
    dtype = str(plan.dtype).removeprefix("torch.")
    named = r'("(?:torch_)?dtype"\s*:\s*)(?:"[^"]*"|null)'
    block: dict[str, Any] = {"transformers_weights": INSTALL, "quantization_config": config.to_dict()}
    if "quantization_config" in source.config:  # empty, or it would have been refused
        fields = {name: value for name, value in source.config.items() if name != "quantization_config"}
        text = json.dumps(fields, indent=2, ensure_ascii=False)
    if not {"dtype", "torch_dtype"} & set(source.config):
        block = {"dtype": dtype} | block
    elif plan.cast or not (source.config.get("dtype") or source.config.get("torch_dtype")):
        text = re.sub(named, rf'\g<1>"{dtype}"', text)
    body = text.removesuffix("}").rstrip()
    ours = json.dumps(block, indent=2, ensure_ascii=False).removeprefix("{")
    (folder / CONFIG).write_bytes((body + ("," if not body.endswith("{") else "") + ours + "\n").encode())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON into a staged folder, the same way every time."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
