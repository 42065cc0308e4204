"""The files of a checkpoint beside its weights that a conversion makes."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..format.config import WinaConfig
from ..format.names import CONFIG, INSTALL
from ..models.source import Source

if TYPE_CHECKING:
    from .plan import ConversionPlan


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
