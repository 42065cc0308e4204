"""The documents of a calibration or evaluation text, from the package, files or datasets. Imports nothing heavy."""

import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CalibrationError, one_line

BUNDLED = "bundled"
FIELDS = ("text", "content")
PAIRS = (("instruction", "input", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


def read_documents(source: str = BUNDLED) -> Iterator[str]:
    """The documents of a calibration or evaluation text.

    Args:
        source: "bundled"; a .txt (one document), .jsonl or .parquet file (a document a row: the field `text` or `content`,
            a list of chat `messages`, or an instruction with its answer); or the name of a dataset, where `datasets` is
            installed: the split `train`, or the one after a colon, as in `name:validation`.

    Raises:
        CalibrationError: the file or dataset cannot be read, or is not text.
    """
    if source == BUNDLED:
        yield from (path.read_text("utf-8") for path in bundled_files())
        return
    path = Path(source)
    if path.suffix in {".txt", ".md"}:
        yield _decode(path)
    elif path.suffix in {".jsonl", ".json"}:
        yield from (_document(row, source) for row in _json_rows(path))
    elif path.suffix == ".parquet":
        yield from (_document(row, source) for row in _parquet_rows(path))
    elif path.is_file():
        yield _decode(path)
    else:
        yield from (_document(row, source) for row in _dataset_rows(source))


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
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}); give a UTF-8 text file") from error
    if "\0" in text:
        raise CalibrationError(
            f"{path} is binary (it has a NUL at character {text.index(chr(0))}); give a UTF-8 text file"
        )
    return text


def _json_rows(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_decode(path).split("\n"), start=1):  # JSON may hold the other line ends
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise CalibrationError(
                    f"{path}, line {number} is not JSON ({error}); give one JSON object a line"
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
    dataset, _, split = name.partition(":")
    try:
        yield from datasets.load_dataset(dataset, split=split or "train", streaming=True)
    except Exception as error:  # the library raises many kinds
        raise CalibrationError(
            f"{name} is neither a file nor a dataset that can be read ({one_line(error)})"
        ) from error


def _document(row: Any, source: str) -> str:
    """The text of one row."""
    if isinstance(row, str):
        return row
    fields = row if isinstance(row, dict) else {}
    for field in FIELDS:
        if isinstance(fields.get(field), str):
            return str(fields[field])
    turns = fields.get("messages")
    if isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str | None)
        for turn in turns
    ):
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns if turn["content"])
    for names in PAIRS:
        if (
            isinstance(fields.get(names[0]), str)
            and isinstance(fields.get(names[-1]), str)
            and all(isinstance(fields.get(name), str | None) for name in names)
        ):
            return "\n\n".join(fields[name] for name in names if fields.get(name))
    raise CalibrationError(
        f"{source}: a row has the fields {', '.join(map(repr, fields)) or 'none'}; needed is 'text', 'content' or 'messages'"
    )
