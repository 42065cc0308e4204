"""Refuses what a folder from a stranger could make its reader do: leave the folder, fetch code, take all memory."""

import json
from pathlib import Path
from typing import Any

from ..errors import SourceError

POINTER = b"version https://git-lfs.github.com/spec/"
MAX_LAYERS = 1000  # and labels: transformers makes a name for each
MAX_SIZE = 1 << 24  # of any dimension that config.json names
# The sizes that transformers takes from the config of a supported family; other fields are nobody's.
SIZES = {
    *("head_dim", "hidden_size", "intermediate_size", "vocab_size", "num_labels", "max_window_layers"),
    *("num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    *("max_position_embeddings", "original_max_position_embeddings"),
    *("n_embd", "n_head", "n_inner", "n_layer", "n_positions"),
}


def snapshot_of(folder: Path) -> Path | None:
    """The snapshot in the Hub's cache, `models--ORG--NAME/snapshots/COMMIT`, that a folder is or lies in; None: it is in none."""
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            return place
    return None


def check_content(path: Path) -> None:
    """Refuse a file that only says where git-lfs has the real one, as a clone without git-lfs leaves it.

    Raises:
        SourceError: it is such a pointer.
    """
    try:
        with path.open("rb") as file:
            pointer = file.read(len(POINTER)) == POINTER
    except OSError:
        return  # whoever reads it says why it cannot be read
    if pointer:
        raise SourceError(
            f"{path} is a pointer of git-lfs and not the file itself; run `git lfs pull` in {path.parent}"
        )


def contained(folder: Path, name: str) -> Path:
    """The path of a file of a folder; a link may stay inside, or lead to the blobs of the Hub's cache, as a download's do.

    Raises:
        SourceError: it lies elsewhere.
    """
    home = folder.resolve()
    snapshot = snapshot_of(home)
    places = [home, snapshot.parent.parent / "blobs"] if snapshot else [home]
    try:
        real = (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name too long or with a NUL
        raise SourceError(
            f"{folder}: {name!r} is no file name that can be used ({error}); get the folder again"
        ) from error
    if not any(real.is_relative_to(place) for place in places):
        raise SourceError(
            f"{folder}: {name!r} is a link or path out of the folder; copy the file in if you trust it, or do not use this folder"
        )
    return folder / name


def check_folder(folder: Path, hidden: bool = False) -> None:
    """Refuse a folder with an entry that is neither a file nor a folder inside it; hidden ones count only where asked.

    Raises:
        SourceError: a link out of it, a dangling one, a pipe or device; a tokenizer that names files elsewhere.
    """
    try:
        entries = sorted(folder.rglob("*"))
    except (OSError, RecursionError) as error:
        raise SourceError(f"{folder} cannot be listed ({type(error).__name__}: {error})") from error
    for path in entries:
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) and not hidden:
            continue
        if path.is_symlink():
            contained(folder, str(name))
        if not (path.is_file() or path.is_dir()):
            raise SourceError(f"{folder}: {str(name)!r} is neither a file nor a folder; remove it")
    for file in _tokenizer_files(folder):
        contained(folder, file)


def _tokenizer_files(folder: Path) -> list[str]:
    """The files that a tokenizer's config tells transformers to read."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_bytes())["fast_tokenizer_files"]
        return [str(name) for name in named]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def check_config(name: str, config: dict[str, Any]) -> None:
    """Refuse a config.json that would fetch code, or whose sizes no model has: they are taken before weights are read.

    Raises:
        SourceError: it does.
    """
    parts = (part for key, part in config.items() if key.endswith("_config") and isinstance(part, dict))
    for fields in (config, *parts):  # of text, of images
        _check_fields(name, fields)


def _check_fields(name: str, config: dict[str, Any]) -> None:
    """`check_config` of one object."""
    rotary = [config, config.get("rope_parameters"), config.get("rope_scaling")]
    for fields in rotary:
        fraction = fields.get("partial_rotary_factor") if isinstance(fields, dict) else None
        if isinstance(fraction, (int, float)) and not 0 <= fraction <= 1:
            raise SourceError(f"{name}: partial_rotary_factor in config.json is {fraction}; it is a fraction")
    for key, value in config.items():
        if key in ("attn_implementation", "_attn_implementation") and "/" in str(value):
            raise SourceError(
                f"{name}: {key} in config.json is {value!r}, code to download; remove it, and pass attn_implementation to "
                "from_pretrained if you trust it"
            )
        bound = MAX_LAYERS if "layer" in key or "label" in key else MAX_SIZE
        if key in SIZES and isinstance(value, (int, float)) and not -1 <= value <= bound:
            raise SourceError(
                f"{name}: {key} in config.json is {value}; at most {bound} makes sense; get the file again"
            )
