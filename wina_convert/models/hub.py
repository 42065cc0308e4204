"""A model on the Hub: its config, headers and weights fetched, and what the Hub refuses in words."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from ..errors import SourceError, one_line
from ..format.folder import FOREIGN, SIDECARS, Folder, read_config
from ..format.names import CONFIG, INDEX, SINGLE
from ..format.shards import read_index, spec_from_header
from ..progress import Progress
from . import adapters
from .kinds import kind_of

NO_FILE = RemoteEntryNotFoundError
UNREACHABLE = (OfflineModeIsEnabled, HTTPError, ConnectionError)


def unreachable(error: Exception) -> bool:
    """Whether the Hub did not answer; an HTTP status is an answer."""
    return isinstance(error, UNREACHABLE) and not isinstance(error, HfHubHTTPError)


@contextmanager
def explained(model: str, revision: str | None) -> Iterator[None]:
    """Within the block, whatever keeps a model on the Hub from being read is a SourceError that says what to do."""
    try:
        yield
    except RemoteEntryNotFoundError as error:
        raise SourceError(f"{model} has no {CONFIG}; it is not a model that transformers can load") from error
    except GatedRepoError as error:
        raise SourceError(
            f"{model} is gated: accept its licence at {_url(model)} and pass --token or run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        if _is_dataset(model):
            raise SourceError(
                f"{model} is a dataset on the Hub, not a model; a dataset goes to --calibration"
            ) from error
        raise SourceError(
            f"{model} is neither a local folder nor a model on the Hub that you can see; check the name, "
            "or pass --token for a private one"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{model} has no revision {revision!r}; see the branches at {_url(model)}") from error
    except HFValidationError as error:
        raise SourceError(f"{model!r} is neither a local folder nor a Hub id such as org/name") from error
    except HfHubHTTPError as error:
        raise _refused(model, error) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError, ConnectionError) as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refused(model, error.__cause__) from error
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise SourceError(
                f"{model} is no local folder and not in the Hub's cache {huggingface_hub.constants.HF_HUB_CACHE}, and "
                "HF_HUB_OFFLINE forbids to download it; unset that, or give a local folder"
            ) from error
        raise SourceError(
            f"{model} is no local folder and the Hub cannot be reached; check the network, or give a local folder"
        ) from error
    except OSError as error:  # the cache: full, read-only; or a download that came short
        raise SourceError(
            f"{model} cannot be downloaded to {huggingface_hub.constants.HF_HUB_CACHE} ({one_line(error)}); "
            "check the disk and try again"
        ) from error


def fetch_config(model: str, revision: str | None, token: str | None, tqdm_class: type[Any] | None) -> Path:
    """The folder in the cache into which config.json came."""
    file = huggingface_hub.hf_hub_download(model, CONFIG, revision=revision, token=token, tqdm_class=tqdm_class)
    return Path(file).parent


def fetch_adapter(
    model: str, revision: str | None, token: str | None, tqdm_class: type[Any] | None, scratch: Path | None
) -> tuple[Path, str]:
    """The folder into which an adapter came, and its commit; a dry run has it in its scratch folder, for it is small.

    Raises:
        SourceError: the repository holds no adapter; the message says what it holds.
    """
    api = huggingface_hub.HfApi(endpoint=huggingface_hub.constants.ENDPOINT, token=token)
    found = api.model_info(model, revision=revision)
    names, commit = [one.rfilename for one in found.siblings or ()], str(found.sha)
    if adapters.CONFIG not in names:
        raise SourceError(
            f"{model} {kind_of(names) or f'has no {CONFIG}; it is not a model that transformers can load'}"
        )
    folder = huggingface_hub.snapshot_download(
        model,
        revision=commit,
        token=token,
        allow_patterns=[adapters.CONFIG, adapters.WEIGHTS],
        tqdm_class=tqdm_class,
        local_dir=scratch / "adapter" if scratch else None,
    )
    return Path(folder), commit


def fetch_weights(
    model: str, revision: str | None, token: str | None, tqdm_class: type[Any] | None, progress: Progress
) -> Path:
    """The folder in the cache into which everything that a conversion needs came, held against the Hub's checksums."""
    with progress(f"Downloading {model}", 1, "model") as advance:

        def fetch(commit: str | None, patterns: Iterable[str]) -> Path:
            return Path(
                huggingface_hub.snapshot_download(
                    model,
                    revision=commit,
                    token=token,
                    allow_patterns=list(patterns),
                    ignore_patterns=list(FOREIGN),
                    tqdm_class=tqdm_class,
                )
            )

        folder = fetch(revision, (*SIDECARS, SINGLE))
        if not (folder / SINGLE).exists() and (folder / INDEX).exists():
            fetch(folder.name, sorted(set(read_index(folder / INDEX).values())))
        advance(1)
    with progress(f"Checking {model}", 1, "model") as advance:
        _check_download(model, folder, token)
        advance(1)
    return folder


def cached(model: str, revision: str | None) -> Path:
    """The folder in the cache that an earlier download left."""
    return Path(huggingface_hub.hf_hub_download(model, CONFIG, revision=revision, local_files_only=True)).parent


def fetch_headers(
    model: str,
    revision: str | None,
    token: str | None,
    tqdm_class: type[Any] | None,
    check: Callable[[str, dict[str, Any]], None],
    scratch: Path,
) -> tuple[str, Folder]:
    """The commit, and config and headers without a weight on the disk.

    Args:
        model: the Hub id.
        revision: branch, tag or commit.
        token: access token.
        tqdm_class: the progress bar.
        check: called with the model's name and its config before more is fetched.
        scratch: an empty folder for what accompanies the weights.
    """
    api = huggingface_hub.HfApi(endpoint=huggingface_hub.constants.ENDPOINT, token=token)
    commit = str(api.model_info(model, revision=revision).sha)
    huggingface_hub.hf_hub_download(
        model, CONFIG, revision=commit, token=token, local_dir=scratch, tqdm_class=tqdm_class
    )
    text, config = read_config(scratch)
    check(model, config)
    huggingface_hub.snapshot_download(
        model,
        revision=commit,
        token=token,
        local_dir=scratch,
        allow_patterns=list(SIDECARS),
        ignore_patterns=list(FOREIGN),
        tqdm_class=tqdm_class,
    )
    if api.file_exists(model, SINGLE, revision=commit):
        files = {SINGLE}
    elif (scratch / INDEX).exists():
        files = set(read_index(scratch / INDEX).values())
    else:
        raise SourceError(
            f"{model} has no safetensors weights; ask for them in its discussions, or save it as safetensors"
        )
    tensors = {}
    for file in sorted(files):
        try:
            header = api.parse_safetensors_file_metadata(model, file, revision=commit)
        except RemoteEntryNotFoundError as error:
            raise SourceError(f"{model}: shard {file} is missing; tell its authors") from error
        except SafetensorsParsingError as error:
            raise SourceError(f"{model}: {file} is truncated or not safetensors ({one_line(error)})") from error
        for name, entry in header.tensors.items():
            tensors[name] = spec_from_header(name, entry.dtype, entry.shape, file)
    return commit, Folder(model, scratch, config, text, tensors)


def _check_download(model: str, folder: Path, token: str | None) -> None:
    """Refuse files in the cache that are not the Hub's, by its checksums; where it does not answer they cannot be known."""
    try:
        found = huggingface_hub.HfApi(endpoint=huggingface_hub.constants.ENDPOINT).verify_repo_checksums(
            model, revision=folder.name, token=token
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, HTTPError, ConnectionError):
        return
    if found.mismatches:
        wrong = folder / found.mismatches[0]["path"]
        raise SourceError(
            f"{wrong} does not have the Hub's checksum; remove {wrong.resolve()} and run again to download it anew"
        )


def _refused(model: str, error: HfHubHTTPError) -> SourceError:
    return SourceError(f"the Hub refused {model}: {one_line(error)}; try again later or check --token")


def _is_dataset(name: str) -> bool:
    """Whether the Hub has a public dataset of this name; where it does not say, no."""
    api = huggingface_hub.HfApi(endpoint=huggingface_hub.constants.ENDPOINT)
    try:
        return api.repo_exists(name, repo_type="dataset")
    except (OSError, HTTPError, ValueError):
        return False


def _url(model: str) -> str:
    return f"{huggingface_hub.constants.ENDPOINT}/{model}"
