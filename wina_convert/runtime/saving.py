"""What a loaded model leaves behind: saved again it names the package to install, pushed it is the checkpoint it came from."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed, nn

from ..format.durable import replacing
from ..format.names import CONFIG, INSTALL


def own(model: nn.Module) -> None:
    """Give a model, and each part of it that can be saved alone, our ways to save and to push."""
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            module.save_pretrained = partial(save_pretrained, module)  # type: ignore[assignment]
    model.push_to_hub = partial(push_to_hub, model)  # type: ignore[assignment]


def save_pretrained(model: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **options: Any) -> None:
    """Save as transformers does, and put back the field that it takes out of config.json.

    With it, a transformers without this package says what to install; without it, that a tensor has another shape.
    """
    type(model).save_pretrained(model, save_directory, is_main_process, *args, **options)
    path = Path(save_directory) / CONFIG
    first = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    if is_main_process and first and path.is_file():
        config = json.loads(path.read_text("utf-8"))
        if "quantization_config" in config:
            text = json.dumps(config | {"transformers_weights": INSTALL}, indent=2, sort_keys=True)
            with replacing(path) as beside:  # other processes may read it
                beside.write_text(text + "\n", "utf-8")


def push_to_hub(model: Any, repo_id: str, **options: Any) -> str:
    """Upload the checkpoint that a model was loaded from, with its card and all other files: see `wina_convert.push`."""
    import wina_convert  # here: what uploads is not needed by a model that runs

    return wina_convert.push(model, repo_id, **options)
