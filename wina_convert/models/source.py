"""Finds the checkpoint to convert, on disk or on the Hub, and refuses early what cannot be converted."""

import json
import tempfile
from dataclasses import dataclass
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

from ..architectures import ARCHITECTURES, Architecture
from ..errors import SourceError, one_line
from ..progress import Progress, silent
from ..format.shards import INDEX, SINGLE, TensorSpec, read_headers, read_index, spec_from_header
from ..format.trust import check_config, check_folder, contained

CONFIG = "config.json"
# weights in other formats, which a conversion neither needs nor copies
OTHER_WEIGHTS = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.tflite",
    "*.ot",
)
CAUSAL_LM = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be converted: its files are there (unless only headers were asked for) and are consistent.

    Attributes:
        name: the Hub id, or the name of the local folder.
        revision: commit hash on the Hub; None for a local folder.
        folder: where the files are.
        config: config.json, parsed.
        config_text: config.json as it is.
        tensors: every tensor by its key in the checkpoint.
        trust_remote_code: whether the user allowed the checkpoint's own code.
    """

    name: str
    revision: str | None
    folder: Path
    config: dict[str, Any]
    config_text: str
    tensors: dict[str, TensorSpec]
    trust_remote_code: bool = False

    @property
    def architecture(self) -> Architecture:
        """The family, as data."""
        return ARCHITECTURES[self.config["model_type"]]


def open_source(
    model: str,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    headers_only: bool = False,
    tqdm_class: type[Any] | None = None,
    progress: Progress = silent,
) -> Source:
    """Find a model and check that it can be converted.

    Args:
        model: a local folder or a Hub id.
        revision: branch, tag or commit on the Hub.
        token: Hub access token; None: the one that `hf auth login` stored.
        trust_remote_code: allow the checkpoint's own Python code.
        headers_only: from the Hub, fetch the config and the safetensors headers instead of the weights.
        tqdm_class: the progress bar for downloads; None: huggingface_hub's own.
        progress: how to report that the weights are being downloaded.

    Raises:
        SourceError: it cannot be found, read or supported; the message says why and what to do.
    """
    if Path(model).is_dir():
        return _open_folder(Path(model).resolve().name, Path(model), None, trust_remote_code)
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise SourceError(
            f"{model} is not a folder; give the folder that holds config.json, or a Hub id such as org/name"
        )
    try:
        if headers_only:
            return _open_headers(model, revision, token, trust_remote_code, tqdm_class)
        config = huggingface_hub.hf_hub_download(model, CONFIG, revision=revision, token=token, tqdm_class=tqdm_class)
        _check_config(model, read_config(Path(config).parent)[1])  # before gigabytes of weights
        with progress(f"Downloading {model}", 1, "model") as advance:
            folder = huggingface_hub.snapshot_download(
                model,
                revision=revision,
                token=token,
                ignore_patterns=[*OTHER_WEIGHTS, "original/*"],
                tqdm_class=tqdm_class,
            )
            advance(1)
        with progress(f"Checking {model}", 1, "model") as advance:
            _check_download(model, Path(folder), token)
            advance(1)
        return _open_folder(model, Path(folder), Path(folder).name, trust_remote_code)
    except RemoteEntryNotFoundError as error:
        raise SourceError(f"{model} has no {CONFIG}; it is not a model that transformers can load") from error
    except GatedRepoError as error:
        raise SourceError(
            f"{model} is gated: accept its licence at {_url(model)} and pass --token or run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
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
        raise SourceError(
            f"{model} is no local folder and the Hub cannot be reached; check the network, or give a local folder"
        ) from error
    except OSError as error:  # the cache: full, read-only; or a download that came short
        raise SourceError(
            f"{model} cannot be downloaded to {huggingface_hub.constants.HF_HUB_CACHE} ({one_line(error)}); "
            "check the disk and try again"
        ) from error


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


def _url(model: str) -> str:
    return f"{huggingface_hub.constants.ENDPOINT}/{model}"


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """config.json of a folder, as text and parsed.

    Raises:
        SourceError: it is missing or not a JSON object.
    """
    path = contained(folder, CONFIG)
    if not path.is_file():
        raise SourceError(f"{folder} has no {CONFIG}; give the folder of a Hugging Face model")
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


def _open_folder(name: str, folder: Path, revision: str | None, trust_remote_code: bool) -> Source:
    text, config = read_config(folder)
    _check_config(name, config)
    check_folder(folder)
    tensors = read_headers(folder)
    _check_tensors(name, tensors)
    return Source(name, revision, folder, config, text, tensors, trust_remote_code)


def _open_headers(
    model: str, revision: str | None, token: str | None, trust_remote_code: bool, tqdm_class: type[Any] | None
) -> Source:
    api = huggingface_hub.HfApi(endpoint=huggingface_hub.constants.ENDPOINT, token=token)
    commit = api.model_info(model, revision=revision).sha
    with tempfile.TemporaryDirectory() as folder:

        def fetch(name: str) -> Path:
            return Path(
                huggingface_hub.hf_hub_download(
                    model, name, revision=commit, token=token, local_dir=folder, tqdm_class=tqdm_class
                )
            )

        text, config = read_config(fetch(CONFIG).parent)
        _check_config(model, config)
        if api.file_exists(model, SINGLE, revision=commit):
            files = {SINGLE}
        elif api.file_exists(model, INDEX, revision=commit):
            files = set(read_index(fetch(INDEX)).values())
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
    _check_tensors(model, tensors)
    return Source(model, commit, Path(), config, text, tensors, trust_remote_code)


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
    if classes and not any(entry.endswith(CAUSAL_LM) for entry in classes):
        raise SourceError(f"{name} is not a causal language model ({', '.join(classes)}); give one that generates text")
    experts = next((key for key in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(key)), None)
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES or experts:
        what = f"a mixture of experts ({model_type})" if experts else f"of family {model_type!r}"
        raise SourceError(
            f"{name} is {what}, which is not supported; supported are: {', '.join(sorted(ARCHITECTURES))}"
        )


def _check_tensors(name: str, tensors: dict[str, TensorSpec]) -> None:
    if not any(spec.dtype.is_floating_point for spec in tensors.values()):
        raise SourceError(f"{name} has no floating-point tensor; convert a checkpoint in float32, bfloat16 or float16")


def sidecars(folder: Path) -> list[Path]:
    """The files that accompany the weights, relative to the folder: tokenizer, templates, generation config, licence ...

    Not the weights in any format, config.json and README.md (both rewritten), and hidden files.

    Raises:
        SourceError: a name is not printable Unicode: it could not be written into the manifest, or not be shown.
    """
    ours = {CONFIG, "README.md", "wina_report.json", "wina_manifest.json"}
    weights = (*OTHER_WEIGHTS, "*.safetensors", "*.index.json")
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and str(relative) not in ours and not any(relative.match(p) for p in weights):
            if not str(relative).isprintable():
                raise SourceError(f"{str(relative)!r} in {folder} is no name for a file of a checkpoint; rename it")
            found.append(relative)
    return found
