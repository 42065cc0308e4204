"""The documents of a calibration or evaluation text, from the package, files or datasets. Imports nothing heavy."""

import codecs
import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CalibrationError, one_line
from .rows import texts_of

BUNDLED = "bundled"
TEXT, ROWS, TABLES = {".txt", ".md", ".text", ".rst"}, {".jsonl", ".json", ".ndjson", ".jsonlines"}, {".parquet", ".pq"}
MARKUP = {".html", ".htm", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".pdf", ".docx", ".gz", ".zst", ".zip"}


def read_documents(source: str = BUNDLED) -> Iterator[str]:
    """The documents of a calibration or evaluation text.

    Args:
        source: "bundled"; a .txt (one document), .jsonl, .json or .parquet file (a document a row: the field `text` or
            `content`, a list of chat `messages`, or an instruction with its answer); or the name of a dataset, where `datasets`
            is installed, with the configuration and the split after colons: `name`, `name:validation`, `name:config` or
            `name:config:split`; the split is `train` by default.

    Raises:
        CalibrationError: the file or dataset cannot be read, or is not text.
    """
    if source == BUNDLED:
        yield from (path.read_text("utf-8") for path in bundled_files())
        return
    path = Path(source)
    ending = path.suffix.lower()
    if ending in TABLES:
        yield from texts_of(_parquet_rows(path), source)
    elif ending in MARKUP and path.is_file():
        raise CalibrationError(f"{path} is no plain text; give a .txt, .jsonl or .parquet file of its text")
    elif ending in TEXT | ROWS or path.is_file():
        text = _decode(path)
        if ending in ROWS or (ending not in TEXT and _looks_like_rows(text)):
            yield from texts_of(_json_rows(path, text), source)
        else:
            yield text
    else:
        yield from texts_of(_dataset_rows(source), source)


def bundled_files() -> list[Path]:
    """The calibration text that comes with the package: inside an installed one, beside a source checkout's."""
    package = Path(str(importlib.resources.files("wina_convert")))
    for folder in (package / "_calibration" / "text", package.parent / "calibration" / "text"):
        if folder.is_dir():
            return sorted(folder.glob("*.txt"))
    raise CalibrationError("the bundled calibration text is missing; reinstall wina-convert or pass --calibration FILE")


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror}); give a UTF-8 text file") from error
    try:  # a byte order mark says how, and is no text itself
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}); give a UTF-8 text file") from error
    if "\0" in text:
        raise CalibrationError(
            f"{path} is binary (it has a NUL at character {text.index(chr(0))}); give a UTF-8 text file"
        )
    return text


def _looks_like_rows(text: str) -> bool:
    """Whether a file that is not called so holds JSON, which is no text to calibrate on."""
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict | list)
    except (ValueError, RecursionError):
        return text.lstrip().startswith(("[\n", "{\n"))


def _json_rows(path: Path, text: str) -> Iterator[Any]:
    """The rows of JSON: an object or a string a line, or all of them in one list."""
    try:
        if isinstance(rows := json.loads(text), list):
            yield from rows
            return
    except (ValueError, RecursionError):
        pass  # several lines are no JSON together
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold the other line ends
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(
                    f"{path}, line {number} is not JSON ({error}); give one JSON object a line, or a list of them"
                ) from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise CalibrationError(f"reading {path} needs pyarrow; pip install 'wina-convert[datasets]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"{path} cannot be read as parquet ({one_line(error)})") from error


def _dataset_rows(name: str) -> Iterator[Any]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{name} is no file, and reading a dataset of that name needs `datasets`; pip install 'wina-convert[datasets]'"
        ) from error
    dataset, *choice = name.split(":")
    try:
        configuration, split = None, "train"
        if len(choice) == 1 and choice[0] not in datasets.get_dataset_config_names(dataset):
            split = choice[0]
        elif choice:
            configuration, split = [*choice, split][:2]
        yield from datasets.load_dataset(dataset, configuration, split=split, streaming=True)
    except Exception as error:  # the library raises many kinds
        raise CalibrationError(
            f"{name} is neither a file nor a dataset that can be read ({one_line(error)}); give name:config:split"
        ) from error
