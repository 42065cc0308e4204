"""Token sequences from documents, for calibration and for evaluation."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, OptionError, SourceError, one_line
from ..format.folder import Folder
from ..format.trust import check_content
from .documents import read_documents
from .source import Source

HELD_OUT = 16  # sequences kept for verification, at most
STRETCHES = 12  # of a text, of which some are for thresholds alone; the bundled one has 15 documents
CHARACTERS_PER_TOKEN = 20  # read at most so many for a token that is needed: several times what text takes


def load_tokenizer(folder: Folder) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        SourceError: it has none that transformers can load.
    """
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt"):
        check_content(folder.path / name)
    try:
        trusted = isinstance(folder, Source) and folder.trust_remote_code
        return AutoTokenizer.from_pretrained(folder.path, trust_remote_code=trusted)
    except Exception as error:  # transformers raises many kinds
        raise SourceError(
            f"{folder.name} has no usable tokenizer ({one_line(error)}); put its tokenizer files into {folder.path}"
        ) from error


def context_of(folder: Folder) -> int:
    """Tokens that a model can take at once; 512 where its config does not say."""
    return int(folder.text_config.get("max_position_embeddings") or folder.text_config.get("n_positions") or 512)


def sequence_length(folder: Folder, asked: int | None) -> int:
    """Tokens of a sequence: what was asked, or 512, or the model's context where that is shorter.

    Raises:
        OptionError: the asked length is under 8 or does not fit the context.
    """
    context = context_of(folder)
    length = min(512, context) if asked is None else asked
    if not 8 <= length <= context:
        raise OptionError(f"sequence length is {length}; give 8 to {context}, the context of {folder.name}")
    return int(length)


def prefix(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before a text: BOS, for most; for some, nothing."""
    # An empty text also gets what comes behind, so subtract that.
    empty, with_text = tokenizer("").input_ids, tokenizer("a").input_ids
    return list(
        empty[: next((i for i, (a, b) in enumerate(zip(empty, with_text, strict=False)) if a != b), len(empty))]
    )


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
    before = prefix(tokenizer)
    ids = tokenizer("\n\n".join(texts)[:enough], add_special_tokens=False, verbose=False).input_ids
    body = length - len(before)
    rows = len(ids) // body
    if rows < 2:
        raise CalibrationError(
            f"{where} has {len(ids)} tokens; at least {2 * body} are needed for two sequences of {length}: "
            "give more text or a smaller --seq-len"
        )
    packed = torch.tensor(ids[: rows * body], dtype=torch.int64).view(rows, body)
    return torch.cat([torch.tensor(before, dtype=torch.int64).expand(rows, -1), packed], dim=1)


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


def split_apart(packed: Tensor, samples: int, others: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose sequences whose neighbours in the text are not among the others.

    A basis that was found on a text suits what stands near it too: thresholds fitted there would skip less of anything else.
    So they come from stretches of their own, spread over the text, and at most a third of it.

    Args:
        packed: [N, S], in the order of the text.
        samples: calibration sequences wanted.
        others: sequences wanted to find a basis on, and to learn from.
        seed: of the choice within the stretches.

    Returns:
        calibration [at most samples, S], others [at most others, S], those that have no neighbour in the calibration first, and
        held-out [as many as `split` has, S], which are of the calibration's stretches.
    """
    rows = len(packed)
    held_out = min(HELD_OUT, max(1, rows // 8))
    count = min(STRETCHES, rows)
    wanted = max(held_out + 1, min(held_out + samples, rows // 3))
    taken = math.ceil(wanted * count / rows)
    own = {int((number + 0.5) * count / taken) for number in range(taken)}
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    inside = torch.tensor([int(row) * count // rows in own for row in order])
    near, far = order[inside], order[~inside]
    end = held_out + min(samples, max(1, rows // 3 - held_out))
    rest = torch.cat([far, near[end:]])[:others]
    return packed[near[held_out:end]], packed[rest], packed[near[:held_out]]


def read_sequences(source: Source, text: str, length: int, wanted: int, seed: int) -> tuple[Tensor, Tensor]:
    """Calibration and held-out sequences, as `split` returns them, of a calibration text in a model's tokens.

    Args:
        source: whose tokenizer.
        text: as the option `calibration` of a conversion.
        length: tokens of a sequence.
        wanted: calibration sequences.
        seed: of the choice.

    Raises:
        CalibrationError: the text cannot be read or is too short, or the tokenizer is another model's.
        SourceError: the model has no tokenizer.
    """
    return split(_packed(source, text, length, wanted), wanted, seed)


def read_apart(
    source: Source, text: str, length: int, samples: int, others: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Calibration sequences, others and held-out ones, as `split_apart` returns them; arguments and errors as for both."""
    return split_apart(_packed(source, text, length, samples + others), samples, others, seed)


def _packed(source: Source, text: str, length: int, wanted: int) -> Tensor:
    documents = read_documents(text)
    packed = sequences(documents, load_tokenizer(source), length, wanted + HELD_OUT, text)
    check_vocabulary(packed, source)
    return packed


def check_vocabulary(tokens: Tensor, folder: Folder) -> None:
    """Refuse token ids that the model's embedding does not have.

    Raises:
        CalibrationError: the tokenizer is another model's.
    """
    size = folder.text_config.get("vocab_size", math.inf)
    if int(tokens.max()) >= size:
        raise CalibrationError(
            f"the tokenizer gives token {int(tokens.max())} and {folder.name} has {size}; put the model's own tokenizer beside it"
        )
