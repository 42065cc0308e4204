"""Text in, token sequences out: for calibration and for evaluation."""

import importlib.resources
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, OptionError, SourceError, one_line
from .source import Source

BUNDLED = "bundled"
HELD_OUT = 16  # sequences kept for verification, at most
CHARACTERS_PER_TOKEN = 20  # read at most so many for a token that is needed: several times what text takes
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


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        SourceError: it has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # transformers raises many kinds
        raise SourceError(
            f"{source.name} has no usable tokenizer ({one_line(error)}); put its tokenizer files into {source.folder}"
        ) from error


def sequence_length(source: Source, asked: int | None) -> int:
    """Tokens of a sequence: what was asked, or 512, or the model's context where that is shorter.

    Raises:
        OptionError: the asked length is under 8 or does not fit the context.
    """
    context = source.config.get("max_position_embeddings") or source.config.get("n_positions") or 512
    length = min(512, context) if asked is None else asked
    if not 8 <= length <= context:
        raise OptionError(f"sequence length is {length}; give 8 to {context}, the context of {source.name}")
    return int(length)


def sequences(documents: Iterable[str], tokenizer: Any, length: int, limit: int, where: str) -> Tensor:
    """Pack documents into full sequences without padding: [N, length], int64.

    A sequence starts with what the tokenizer puts before a text (BOS, for most), as at run time; that token counts like
    any other. The documents are read until `limit` sequences are certain to be filled several times over.

    Args:
        documents: the texts.
        tokenizer: a transformers tokenizer.
        length: tokens of a sequence.
        limit: how many sequences will be used.
        where: what to name in an error.

    Raises:
        CalibrationError: fewer than two sequences came of it.
    """
    texts: list[str] = []
    characters, enough = 0, limit * length * CHARACTERS_PER_TOKEN
    for document in documents:
        texts.append(document)
        characters += len(document)
        if characters >= enough:
            break
    # Everything in front of the text's own tokens; an empty text also gets what comes behind, so subtract that.
    empty, with_text = tokenizer("").input_ids, tokenizer("a").input_ids
    prefix = empty[: next((i for i, (a, b) in enumerate(zip(empty, with_text, strict=False)) if a != b), len(empty))]
    ids = tokenizer("\n\n".join(texts)[:enough], add_special_tokens=False, verbose=False).input_ids
    body = length - len(prefix)
    rows = len(ids) // body
    if rows < 2:
        raise CalibrationError(
            f"{where} has {len(ids)} tokens; at least {2 * body} are needed for two sequences of {length}: "
            "give more text or a smaller --seq-len"
        )
    packed = torch.tensor(ids[: rows * body], dtype=torch.int64).view(rows, body)
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(rows, -1), packed], dim=1)


def split(packed: Tensor, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose calibration and held-out sequences at random, never the same one twice.

    Args:
        packed: [N, S].
        samples: calibration sequences wanted.
        seed: of the choice.

    Returns:
        calibration [at most samples, S] and held-out [an eighth of N, 1 to 16, S].
    """
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(seed))
    held_out = min(HELD_OUT, max(1, len(packed) // 8))
    return packed[order[held_out : held_out + samples]], packed[order[:held_out]]
