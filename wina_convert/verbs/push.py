"""`wina push`, `wina_convert.push` and `model.push_to_hub`: a checkpoint as it was converted goes to the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UploadError
from ..format.checkpoint import Checkpoint, open_checkpoint
from ..models.upload import Destination, check_access, upload
from ..progress import Progress, silent
from .retarget import retargeted
from .verify import verify_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def push(
    checkpoint: "str | Path | PreTrainedModel",
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    progress: Progress = silent,
) -> str:
    """Upload a checkpoint with card, report and tokenizer to the Hub, in one commit; a second run goes on where one broke off.

    Args:
        checkpoint: the folder that a conversion wrote, or a model loaded from it. A model's default sparsity goes with it; its
            tensors must be those of the folder.
        repo_id: USER/NAME; made where it does not exist.
        private: whether a repository that is made is private; None: as its owner's are.
        revision: branch, made where it does not exist; None: main.
        subfolder: folder of the repository; None: its top.
        create_pr: open a pull request instead.
        token: Hub access token; None: that of `hf auth login`.
        commit_message: of the commit.
        progress: how to report it.

    Returns:
        the URL of the repository, branch or pull request.

    Raises:
        OptionError: repository, revision or subfolder cannot be one.
        UploadError: the token may not write there, the model is not what its folder holds, or the upload broke off.
        CheckpointError: the folder is not a WINA checkpoint with a manifest.
        VerificationError: it is not what the conversion wrote.
    """
    to = Destination(repo_id, revision, private, subfolder, create_pr, token)
    folder = _loaded_from(checkpoint) if hasattr(checkpoint, "state_dict") else Path(checkpoint)
    check_access(to)
    verify_folder(folder, progress)
    changed = _retargeted(checkpoint, folder) if hasattr(checkpoint, "state_dict") else {}
    return upload(folder, to, changed, commit_message, progress)


def _loaded_from(model: Any) -> Path:
    """The folder of the checkpoint that a model was loaded from."""
    folder = getattr(getattr(model, "hf_quantizer", None), "folder", None)
    if folder is None:
        raise UploadError(f"{type(model).__name__} was not loaded from a WINA checkpoint; push the folder of one")
    return Path(folder)


def _retargeted(model: Any, folder: Path) -> dict[str, bytes]:
    """The files that a model's default sparsity changes; its class and tensors must be those of its folder."""
    checkpoint = open_checkpoint(folder)
    if differs := _difference(model, checkpoint):
        raise UploadError(
            f"{differs}, so card and report of {folder} would not hold for this model; push the folder, or save_pretrained the "
            "model and upload that with `hf upload`"
        )
    sparsity = model.config.quantization_config.sparsity or 0.0
    return {} if sparsity == checkpoint.config.sparsity else retargeted(folder, sparsity)


def _difference(model: Any, checkpoint: Checkpoint) -> str | None:
    """What in a model is not as in the checkpoint that it was loaded from."""
    from ..runtime.keys import checkpoint_keys, tied  # here: the rest does without transformers
    from ..runtime.parallel import divided

    classes = checkpoint.folder.config.get("architectures") or [type(model).__name__]
    if type(model).__name__ not in classes:
        return f"it is a {type(model).__name__} and was converted as {', '.join(classes)}"
    state, keys = model.state_dict(), checkpoint_keys(model, checkpoint.folder.tensors)
    keys |= {other: keys[stored] for stored, other in tied(model, keys).items()}
    if new := [name for name in state if name not in keys]:
        return f"it has gained {new[0]}"
    names: dict[str, list[str]] = {}
    for name, key in keys.items():
        names.setdefault(key, []).append(name)
    for key, stored in checkpoint.read(names):
        for name in names[key]:
            now = state[name]
            if divided(now):
                return f"{name} is divided among processes"
            if now.dtype != stored.dtype:
                return f"{name} is now {now.dtype} and was {stored.dtype}"
            if not now.is_meta and not torch.equal(now.cpu(), stored):  # meta: it was left on the disk
                return f"{name} has changed"
    return None
