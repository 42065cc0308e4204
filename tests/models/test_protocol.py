"""How text is cut for a measurement."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wina_convert.errors import CalibrationError, OptionError
from wina_convert.models.protocol import cut


class Words:
    """A tokenizer of whole numbers, with 0 before a text."""

    def __init__(self, bos: bool = True) -> None:
        self.bos = [0] if bos else []

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        own = [int(word) if word.isdigit() else 1 for word in text.split()]
        return SimpleNamespace(input_ids=(self.bos if add_special_tokens else []) + own)


def folder(context: int) -> Any:
    return SimpleNamespace(text_config={"max_position_embeddings": context}, name="here", path=Path("here"))


def numbers(first: int, last: int) -> str:
    return " ".join(map(str, range(first, last)))


@pytest.mark.parametrize(("context", "block"), [(4096, 2048), (2048, 2048), (100, 100)])
def test_wikitext_takes_the_whole_text_in_blocks_with_one_bos(context: int, block: int):
    documents = [numbers(1, 3000), "", numbers(3000, 5000)]
    tokens, how = cut({"text": documents}, Words(), folder(context), "wikitext")
    count = 5000 // block
    assert torch.equal(tokens, torch.arange(count * block).view(count, block))  # 0 is the BOS
    assert how.shown() == (
        f"protocol wikitext: {count} blocks of {block} tokens, stride {block}, no overlap, BOS in the first block"
    )


def test_a_tokenizer_without_bos_puts_none_anywhere():
    tokens, how = cut({"text": [numbers(1, 301)]}, Words(bos=False), folder(100), "wikitext")
    assert torch.equal(tokens, torch.arange(1, 301).view(3, 100))
    assert how.shown().endswith("BOS nowhere")


def test_without_a_protocol_sequences_are_spread_and_each_has_a_bos():
    tokens, how = cut({"text": [numbers(1, 1000)]}, Words(), folder(4096), None, 3, 10)
    assert tokens[:, 0].tolist() == [0, 0, 0]
    assert tokens[0, 1] == 1
    assert tokens[:, 1].diff().unique().tolist() == [
        81
    ]  # of 19 sequences of 9 numbers the first, the middle and the last
    assert (how.name, how.block, how.stride, how.bos, how.blocks) == ("samples", 10, None, "each block", 3)


@pytest.mark.parametrize(("samples", "expected"), [(5, [1, 1, 1, 2, 2]), (1, [1]), (2, [1, 2]), (4, [1, 1, 2, 2])])
def test_several_texts_give_as_many_sequences_each(samples: int, expected: list[int]):
    """Though the first would be enough for all."""
    texts = {"first": [numbers(1000, 1999)], "second": [numbers(2000, 2999)]}
    tokens, how = cut(texts, Words(), folder(4096), None, samples, 10)
    assert (tokens[:, 1] // 1000).tolist() == expected
    assert how.blocks == samples


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": "c4"}, "protocol is 'c4'; give one of wikitext"),
        ({"protocol": "wikitext", "samples": 3}, "leave out --samples and --seq-len"),
        ({"protocol": "wikitext", "seq_len": 64}, "leave out --samples and --seq-len"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(OptionError, match=words):
        cut({"text": [numbers(1, 300)]}, Words(), folder(100), **options)


def test_less_than_a_block_is_refused():
    with pytest.raises(CalibrationError, match=r"novel.txt has 300 tokens; a block of wikitext has 2048"):
        cut({"novel.txt": [numbers(1, 300)]}, Words(), folder(4096), "wikitext")
