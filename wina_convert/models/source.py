"""Finds the model to convert, on disk or on the Hub, and refuses early what cannot be converted."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..architectures import ARCHITECTURES, REFUSED
from ..errors import SourceError
from ..format.folder import Folder, read_config
from ..format.names import CONFIG
from ..format.shards import TensorSpec, read_headers
from ..format.trust import check_folder, snapshot_of
from ..progress import Progress, silent
from .adapters import MERGE_FIRST, Adapter, bind, is_adapter, open_adapter
from .kinds import kind_of

COMMIT = re.compile(r"[0-9a-f]{40}")
CAUSAL_LM = ("ForCausalLM", "LMHeadModel")
PARTS = ("vision_config", "audio_config")  # of a model of more than text


@dataclass(frozen=True)
class Source(Folder):
    """A checkpoint that can be converted: its files are there (unless only headers were asked for) and are consistent.

    Attributes:
        revision: commit hash on the Hub; None for a local folder.
        trust_remote_code: whether the user allowed the checkpoint's own code.
        adapter: the adapter that is merged while tensors are read; name and revision are then its, all else its base's.
    """

    revision: str | None = None
    trust_remote_code: bool = False
    adapter: Adapter | None = None

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by key, on the CPU.

        Raises:
            SourceError: a file cannot be read.
        """
        for key, tensor in super().read(keys):
            yield key, tensor if self.adapter is None else self.adapter.merged(key, tensor)

    def rows(self, key: str, nbytes: int) -> Iterator[Tensor]:
        """A tensor in slices along its first dimension of about `nbytes`, on the CPU.

        Raises:
            SourceError: the file cannot be read.
        """
        if self.is_stored(key):
            yield from super().rows(key, nbytes)
        else:
            ((_, tensor),) = self.read([key])
            yield from tensor.split(max(1, nbytes * len(tensor) // tensor.nbytes)) if tensor.dim() else [tensor]

    def is_stored(self, key: str) -> bool:
        """Whether a tensor is in the files as it is; else reading makes it."""
        return not self.tensors[key].joined and (self.adapter is None or not self.adapter.changes(key))

    def told(self) -> dict[str, Any]:
        """What report and config.json say of it: name and revision, and the base's where an adapter was merged."""
        said: dict[str, Any] = {"name": self.name, "revision": self.revision}
        if self.adapter is not None:
            said["base"] = {"name": self.adapter.base, "revision": self.adapter.base_revision}
        return said

    def files(self) -> list[Path]:
        """The files with weights."""
        stored = [part for spec in self.tensors.values() for part in (spec.joined or (spec,))]
        found = [self.path / file for file in sorted({part.file for part in stored})]
        return found if self.adapter is None else [*found, *self.adapter.files]


def open_source(
    model: str,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    scratch: Path | None = None,
    tqdm_class: type[Any] | None = None,
    progress: Progress = silent,
    try_type: Callable[[Source], object] = lambda source: None,
) -> Source:
    """Find a model and check that it can be converted.

    Args:
        model: a local folder or a Hub id, of a model or of a LoRA adapter, whose base is found then.
        revision: branch, tag or commit on the Hub.
        token: Hub access token; None: the one that `hf auth login` stored.
        trust_remote_code: allow the checkpoint's own Python code.
        scratch: an empty folder, into which comes what accompanies the weights on the Hub: of these, only the headers are
            fetched. Without the Hub, a model in its cache will do. None: fetch the weights.
        tqdm_class: the progress bar for downloads; None: huggingface_hub's own.
        progress: how to report that the weights are being downloaded.
        try_type: called with a source without tensors before the weights of a model on the Hub are downloaded.

    Raises:
        SourceError: it cannot be found, read or supported; the message says why and what to do.
    """
    how = (token, trust_remote_code, scratch, tqdm_class, progress, try_type)
    if Path(model).is_dir():
        name, folder, commit = _named(_in_cache(Path(model)))
        if is_adapter(folder):
            return _onto_base(open_adapter(name, folder, commit), *how)
        return _open_folder(name, folder, commit, trust_remote_code)
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise SourceError(
            f"{model} is not a folder; give the folder that holds config.json, or a Hub id such as org/name"
        )
    from . import hub  # here: a local folder needs no client of the Hub

    with hub.explained(model, revision):
        try:
            return _open_on_hub(model, revision, *how)
        except hub.NO_FILE:  # no config.json
            folder, commit = hub.fetch_adapter(model, revision, token, tqdm_class, scratch)
    return _onto_base(open_adapter(model, folder, commit), *how)


def _open_on_hub(
    model: str,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
    scratch: Path | None,
    tqdm_class: type[Any] | None,
    progress: Progress,
    try_type: Callable[[Source], object],
) -> Source:
    from . import hub

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
    folder = hub.fetch_config(model, revision, token, tqdm_class)
    text, config = read_config(folder)
    _check_config(model, config)
    try_type(Source(model, folder, config, text, {}, folder.name, trust_remote_code))
    path = hub.fetch_weights(model, revision, token, tqdm_class, progress)
    return _open_folder(model, path, path.name, trust_remote_code)


def _onto_base(adapter: Adapter, *how: Any) -> Source:
    """An adapter's base with the adapter on it.

    Raises:
        SourceError: the base cannot be converted, or the two do not fit.
    """
    try:
        base = open_source(adapter.base, adapter.base_revision, *how)
    except SourceError as error:
        raise SourceError(f"the base of the adapter {adapter.name}: {error}") from error
    if base.adapter is not None:
        raise SourceError(f"the base of the adapter {adapter.name} is an adapter itself; {MERGE_FIRST}")
    found = replace(adapter, base=base.name, base_revision=base.revision)
    bound = bind(found, base.tensors, base.config.get("vocab_size"))
    return replace(base, name=adapter.name, revision=adapter.revision, adapter=bound)


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
    kind = None if (folder / CONFIG).exists() else kind_of(path.name for path in folder.iterdir())
    if kind is not None:
        raise SourceError(f"{folder} {kind}")
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
    if not isinstance(model_type, str):
        raise SourceError(f"{name} has no model_type in its config.json; get the file again")
    if model_type not in ARCHITECTURES:
        _check_type(name, model_type, classes, config)
    elif classes and not any(entry.endswith(CAUSAL_LM) for entry in classes):
        raise _no_causal_lm(name, classes)


def _no_causal_lm(name: str, classes: list[str]) -> SourceError:
    return SourceError(f"{name} is not a causal language model ({', '.join(classes)}); give one that generates text")


def _check_type(name: str, model_type: str, classes: list[str], config: dict[str, Any]) -> None:
    """Refuse a type that no table lists where its config shows already that its structure need not be looked at."""
    if model_type in REFUSED:
        raise SourceError(f"{name} is of type {model_type!r}, which is not supported: {REFUSED[model_type]}")
    known = _generating(model_type)
    if not known and any(config.get(part) for part in PARTS):
        raise SourceError(
            f"{name} takes more than text ({', '.join(classes) or model_type}), and the installed transformers knows its type "
            "neither as a causal language model nor as one of images and text; give another"
        )
    if classes and not any(entry.endswith(CAUSAL_LM) or entry in known for entry in classes):
        raise _no_causal_lm(name, classes)
    if not known:
        raise SourceError(
            f"{name} is of type {model_type!r}, of which the installed transformers knows no causal language model; "
            "upgrade transformers"
        )


def _generating(model_type: str) -> set[str]:
    """The classes by which transformers generates text with a model of this type, images beside it or not."""
    from transformers.models.auto import modeling_auto  # slow, and needed here alone

    tables = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return {table[model_type] for table in tables if model_type in table}


def _check_tensors(name: str, tensors: dict[str, TensorSpec]) -> None:
    if not any(spec.dtype.is_floating_point for spec in tensors.values()):
        raise SourceError(f"{name} has no floating-point tensor; convert a checkpoint in float32, bfloat16 or float16")
