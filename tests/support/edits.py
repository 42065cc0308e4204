"""Changes of a folder's files, each a function of the folder: `edit_block(sparsity=0.3)(folder)`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from support.folders import tensors_of

INDEX = "model.safetensors.index.json"
Change = Callable[[Path], object]


def edit_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    """Change what a JSON file holds."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))

    return change


def edit_fields(name: str, /, **fields: Any) -> Change:
    """Set fields of a JSON file."""
    return edit_json(name, lambda content: content.update(fields))


def edit_config(**fields: Any) -> Change:
    """Set fields of config.json."""
    return edit_fields("config.json", **fields)


def edit_block(**fields: Any) -> Change:
    """Set fields of config.json's quantization_config."""
    return edit_json("config.json", lambda config: config["quantization_config"].update(fields))


def edit_tensors(edit: Callable[[dict[str, Tensor]], object]) -> Change:
    """Change the tensors, each in its shard; a new one goes into the first shard, and an index follows."""

    def change(folder: Path) -> None:
        stored = tensors_of(folder)
        places = {name: file for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
        edit(stored)
        files = {name: places.get(name, min(places.values())) for name in stored}
        if (folder / INDEX).exists():
            edit_fields(INDEX, weight_map={name: file.name for name, file in files.items()})(folder)
        for file in set(places.values()):
            members = {name: stored[name].contiguous() for name in stored if files[name] == file}
            save_file(members, file, {"format": "pt"})

    return change


def edit_tensor(name: str, edit: Callable[[Tensor], Tensor | None]) -> Change:
    """Change a tensor in place, or put another in its place."""

    def change(stored: dict[str, Tensor]) -> None:
        changed = edit(stored[name])
        stored[name] = stored[name] if changed is None else changed

    return edit_tensors(change)
