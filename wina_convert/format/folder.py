"""A model's folder as it lies on the disk, a source's or a checkpoint's: config.json, headers, and the files beside them."""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..architectures import ARCHITECTURES, Architecture
from ..errors import SourceError
from .names import CARD, CONFIG, MANIFEST, REPORT
from .shards import TensorSpec, read_rows, read_tensors
from .trust import check_config, check_content, contained

# What accompanies weights, by name: a conversion takes these files along, and no others.
SIDECARS = (
    *("*.json", "*.txt", "*.md", "*.jinja", "*.py", "*.yaml", "*.yml", "*.toml", "*.cfg", "*.html", "*.pdf"),
    *("*.model", "*.model.*", "*.tiktoken", "*.spm", "*.bpe", "*.vocab"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "COPYRIGHT*", "AUTHORS*", "USE_POLICY*"),
)
# Of these, what belongs to other weights: an adapter that was merged, an optimizer, the same model for other runtimes.
FOREIGN = (
    "adapter_*",
    "trainer_state.json",
    "original/*",
    "onnx/*",
    "openvino/*",
    "coreml/*",
    "checkpoint-*/*",
    "runs/*",
)
INDEXES = "*.index.json"


@dataclass(frozen=True)
class Folder:
    """A folder with a model's config and weights.

    Attributes:
        name: what to call it: the Hub id, or the name of the local folder.
        path: where the files are.
        config: config.json, parsed.
        config_text: config.json as it is.
        tensors: every stored tensor by its key.
    """

    name: str
    path: Path
    config: dict[str, Any]
    config_text: str
    tensors: dict[str, TensorSpec]

    @property
    def listed(self) -> bool:
        """Whether the family is listed; else its structure must be discovered."""
        return self.config["model_type"] in ARCHITECTURES

    @property
    def architecture(self) -> Architecture:
        """The listed family, as data."""
        return ARCHITECTURES[self.config["model_type"]]

    @property
    def text_config(self) -> dict[str, Any]:
        """The fields of the config that tell of text: all of them, but for a model of more than text."""
        part = self.config.get("text_config")
        return part if isinstance(part, dict) else self.config

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by key, on the CPU.

        Raises:
            SourceError: a file cannot be read.
        """
        return read_tensors(self.path, [self.tensors[key] for key in keys])

    def rows(self, key: str, nbytes: int) -> Iterator[Tensor]:
        """A tensor in slices along its first dimension of about `nbytes`, on the CPU.

        Raises:
            SourceError: the file cannot be read.
        """
        return read_rows(self.path, self.tensors[key], nbytes)


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """config.json of a folder, as text and parsed.

    Raises:
        SourceError: it is missing or not a JSON object.
    """
    path = contained(folder, CONFIG)
    if not folder.is_dir():
        raise SourceError(f"there is no folder {folder}; give the one that holds a model's {CONFIG}")
    if not path.is_file():
        raise SourceError(f"{folder} has no {CONFIG}; give the folder of a Hugging Face model")
    check_content(path)
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")  # with its line ends
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error})") from error
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON ({error}); get the file again") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} is not a JSON object; get the file again")
    check_config(str(folder), config)
    return text, config


def sidecars(folder: Path) -> list[Path]:
    """The files that accompany the weights, relative to the folder: tokenizer, templates, generation config, licence ...

    Not config.json and README.md, which are both rewritten, and no hidden files.

    Raises:
        SourceError: a name is not printable Unicode: it could not be written into the manifest, or not be shown.
    """
    ours = {CONFIG, CARD, REPORT, MANIFEST}
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        known = any(relative.match(pattern) for pattern in SIDECARS)
        foreign = any(relative.match(pattern) for pattern in (*FOREIGN, INDEXES))
        if path.is_file() and not hidden and str(relative) not in ours and known and not foreign:
            if not str(relative).isprintable():
                raise SourceError(f"{str(relative)!r} in {folder} is no name for a file of a checkpoint; rename it")
            found.append(relative)
    return found


def copy_sidecars(source: Folder, folder: Path, leave: Iterable[str] = ()) -> None:
    """Copy everything that accompanies the weights, but for the files to leave, into another folder."""
    for relative in sidecars(source.path):
        if relative.as_posix() not in set(leave):
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / relative, folder / relative)
