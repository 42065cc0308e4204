"""Text that a conversion has seen is known again, however it is cut into sequences; other text is not."""

import base64
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wina_convert.errors import CheckpointError
from wina_convert.models import seen as module
from wina_convert.models.seen import encode, fingerprints, overlap, seen_text


def text(seed: int, count: int = 20_000) -> torch.Tensor:
    return torch.randint(0, 5000, (count,), generator=torch.Generator().manual_seed(seed))


def cut(tokens: torch.Tensor, length: int, offset: int = 0) -> torch.Tensor:
    count = (len(tokens) - offset) // length
    return tokens[offset : offset + count * length].view(count, length)


@given(seed=st.integers(0, 2**31), offset=st.integers(0, 300), length=st.integers(64, 600))
@settings(max_examples=20, deadline=None)
def test_the_same_text_is_known_however_it_is_cut(seed: int, offset: int, length: int):
    seen = fingerprints(cut(text(seed), 512))
    assert overlap(cut(text(seed), length, offset), seen) > 0.8
    other = cut(text(seed + 1), length, offset)
    assert round(overlap(other, seen) * len(fingerprints(other))) <= 1  # two hashes of 32 bits may meet


def test_a_part_of_the_text_counts_for_its_share():
    half = torch.cat([text(0)[:10_000], text(1)[:10_000]])
    assert overlap(cut(half, 400), fingerprints(cut(text(0), 512))) == pytest.approx(0.5, abs=0.1)


def test_a_few_short_sequences_are_enough_to_tell():
    seen = fingerprints(cut(text(0), 512))
    found = [overlap(cut(text(0), 32, offset)[::150], seen) for offset in range(0, 480, 16)]  # four sequences each
    assert sum(share > 0.2 for share in found) >= 28


def test_rules_and_short_sequences_have_no_fingerprints():
    assert len(fingerprints(torch.full((50, 400), 7))) == 0
    assert len(fingerprints(torch.arange(7).repeat(100).view(1, -1))) == 0
    assert len(fingerprints(text(0)[:150].view(10, 15))) == 0


def test_the_memory_bound_changes_no_fingerprint(monkeypatch: pytest.MonkeyPatch):
    whole = fingerprints(cut(text(0), 64))
    monkeypatch.setattr(module, "ROWS", 100)
    assert torch.equal(fingerprints(cut(text(0), 64)), whole)


def test_a_fixed_part_is_kept_of_numbers_within_32_bits():
    found = fingerprints(cut(text(0), 500))
    assert len(found) == pytest.approx(20_000 * 485 / 500 / module.KEPT, rel=0.15)
    assert 0 <= int(found.min()) < 2**20
    assert 2**32 - 2**26 < int(found.max()) < 2**32


@given(st.lists(st.integers(0, 2**32 - 1)))
@settings(deadline=None)
def test_fingerprints_survive_being_written(values: list[int]):
    data = base64.b64decode(encode(torch.tensor(values, dtype=torch.int64)))
    assert [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)] == values


def test_a_report_gives_back_what_was_written(tmp_path: Path):
    found = fingerprints(cut(text(3), 200))
    (tmp_path / "wina_report.json").write_text(json.dumps({"seen": encode(found)}))
    read = seen_text(tmp_path)
    assert read is not None
    assert torch.equal(read, found)


@pytest.mark.parametrize("report", [None, "{", "[]", "{}", '{"seen": null}'])
def test_a_folder_without_a_record_does_not_tell(report: str | None, tmp_path: Path):
    if report is not None:
        (tmp_path / "wina_report.json").write_text(report)
    assert seen_text(tmp_path) is None


@pytest.mark.parametrize("record", ["3", '"?"', '"AAAA"', "[1]", "{}", '"\\u00e9"'])
def test_a_damaged_record_is_refused(record: str, tmp_path: Path):
    (tmp_path / "wina_report.json").write_text(f'{{"seen": {record}}}')
    with pytest.raises(CheckpointError, match="get the checkpoint again"):
        seen_text(tmp_path)
