"""Finds the model to convert, on disk or on the Hub, and refuses early what cannot be converted."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architectures import ARCHITECTURES, REFUSED
from ..errors import SourceError
from ..format.folder import Folder, read_config
from ..format.shards import TensorSpec, read_headers
from ..format.trust import check_folder, snapshot_of
from ..progress import Progress, silent

COMMIT = re.compile(r"[0-9a-f]{40}")
CAUSAL_LM = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Source(Folder):
    """A checkpoint that can be converted: its files are there (unless only headers were asked for) and are consistent.

    Attributes:
        revision: commit hash on the Hub; None for a local folder.
        trust_remote_code: whether the user allowed the checkpoint's own code.
    """

    revision: str | None = None
    trust_remote_code: bool = False

    def is_stored(self, key: str) -> bool:
        """Whether a tensor is in the files as it is; else reading makes it."""
        return True


def open_source(
    model: str,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    scratch: Path | None = None,
    tqdm_class: type[Any] | None = None,
    progress: Progress = silent,
) -> Source:
    """Find a model and check that it can be converted.

    Args:
        model: a local folder or a Hub id.
        revision: branch, tag or commit on the Hub.
        token: Hub access token; None: the one that `hf auth login` stored.
        trust_remote_code: allow the checkpoint's own Python code.
        scratch: an empty folder, into which comes what accompanies the weights on the Hub: of these, only the headers are
            fetched. Without the Hub, a model in its cache will do. None: fetch the weights.
        tqdm_class: the progress bar for downloads; None: huggingface_hub's own.
        progress: how to report that the weights are being downloaded.

    Raises:
        SourceError: it cannot be found, read or supported; the message says why and what to do.
    """
    if Path(model).is_dir():
        folder = _in_cache(Path(model))
        return _open_folder(*_named(folder), trust_remote_code)
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise SourceError(
            f"{model} is not a folder; give the folder that holds config.json, or a Hub id such as org/name"
        )
    from . import hub  # here: a local folder needs no client of the Hub

    with hub.explained(model, revision):
        if scratch is not None:
            try:
                commit, found = hub.fetch_headers(model, revision, token, tqdm_class, _check_config, scratch)
            except hub.UNREACHABLE as error:
                if not hub.unreachable(error):
                    raise
                path = hub.cached(model, revision)
                return _open_folder(model, path, path.name, trust_remote_code)
            _check_tensors(model, found.tensors)
            return Source(**vars(found), revision=commit, trust_remote_code=trust_remote_code)
        _check_config(model, read_config(hub.fetch_config(model, revision, token, tqdm_class))[1])  # before the weights
        path = hub.fetch_weights(model, revision, token, tqdm_class, progress)
        return _open_folder(model, path, path.name, trust_remote_code)


def checkpoint_folder(
    model: str,
    revision: str | None = None,
    token: str | None = None,
    tqdm_class: type[Any] | None = None,
    progress: Progress = silent,
) -> str:
    """The folder of a WINA checkpoint: the one given or, for a Hub id, the one in the cache into which it is downloaded.

    Raises:
        SourceError: it cannot be downloaded.
    """
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        return model
    from . import hub

    with hub.explained(model, revision):
        _, config = read_config(hub.fetch_config(model, revision, token, tqdm_class))
        block = config.get("quantization_config")
        if not isinstance(block, dict) or block.get("quant_method") != "wina":
            raise SourceError(f"{model} is not a WINA checkpoint; make one with `wina-convert {model} --out DIR`")
        return str(hub.fetch_weights(model, revision, token, tqdm_class, progress))


def _in_cache(folder: Path) -> Path:
    """A folder; for that of a repository in the Hub's cache, the snapshot of its branch main."""
    try:
        commit = (folder / "refs" / "main").read_text("utf-8").strip()
    except (OSError, ValueError):
        return folder
    snapshot = folder / "snapshots" / commit
    return snapshot if folder.name.startswith("models--") and snapshot_of(snapshot) and snapshot.is_dir() else folder


def _named(folder: Path) -> tuple[str, Path, str | None]:
    """Name, folder and commit of a local model; one in the Hub's cache is called as on the Hub."""
    place = folder.absolute()
    snapshot = snapshot_of(place)
    if snapshot is None or not COMMIT.fullmatch(snapshot.name):
        return folder.resolve().name, folder, None
    repository = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")
    return "/".join([repository, *place.relative_to(snapshot).parts]), place, snapshot.name


def _open_folder(name: str, folder: Path, revision: str | None, trust_remote_code: bool) -> Source:
    text, config = read_config(folder)
    _check_config(name, config)
    check_folder(folder)
    tensors = read_headers(folder)
    _check_tensors(name, tensors)
    return Source(name, folder, config, text, tensors, revision, trust_remote_code)


def _check_config(name: str, config: dict[str, Any]) -> None:
    """Refuse what its config.json shows cannot be converted."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "wina":
        raise SourceError(f"{name} is a WINA checkpoint already; use `wina retarget` to change its sparsity")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise SourceError(f"{name} is quantized ({method}); convert the original float checkpoint")
    model_type = config.get("model_type")
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(entry, str) for entry in classes):
        raise SourceError(
            f"{name}: architectures in its config.json is {classes!r}, not a list of names; get the file again"
        )
    if config.get("vision_config") or config.get("audio_config"):
        raise SourceError(
            f"{name} takes more than text ({', '.join(classes) or model_type}), which is not supported; "
            "give a model of text alone"
        )
    if classes and not any(entry.endswith(CAUSAL_LM) for entry in classes):
        raise SourceError(f"{name} is not a causal language model ({', '.join(classes)}); give one that generates text")
    if not isinstance(model_type, str):
        raise SourceError(f"{name} has no model_type in its config.json; get the file again")
    if model_type not in ARCHITECTURES:
        _check_type(name, model_type)


def _check_type(name: str, model_type: str) -> None:
    """Refuse a type that no table lists where its config shows already that its structure need not be looked at."""
    if model_type in REFUSED:
        raise SourceError(f"{name} is of type {model_type!r}, which is not supported: {REFUSED[model_type]}")
    if not _generates_text(model_type):
        raise SourceError(
            f"{name} is of type {model_type!r}, of which the installed transformers knows no causal language model; "
            "upgrade transformers"
        )


def _generates_text(model_type: str) -> bool:
    """Whether transformers has a causal LM of this type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # slow, and needed here alone

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _check_tensors(name: str, tensors: dict[str, TensorSpec]) -> None:
    if not any(spec.dtype.is_floating_point for spec in tensors.values()):
        raise SourceError(f"{name} has no floating-point tensor; convert a checkpoint in float32, bfloat16 or float16")
