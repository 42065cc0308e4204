"""Calibration text: every form it can have, what is refused, and how it becomes sequences."""

import builtins
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from support import ROOT
from support.commands import SMALL, contents, refused, run, run_wina, succeeded
from wina_convert.errors import CalibrationError
from wina_convert.models.documents import bundled_files, read_documents
from wina_convert.models.text import sequences, split, split_apart

ROWS = {
    "text": ({"text": "a b", "id": 1}, "a b"),
    "content": ({"content": "a b", "id": 1}, "a b"),
    "text before content": ({"content": "x", "text": "a b"}, "a b"),
    "messages": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        "user: Hi\n\nassistant: Hello",
    ),
    "instruction": ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2\n\n3"),
    "instruction without input": ({"instruction": "Sing.", "input": "", "output": "La"}, "Sing.\n\nLa"),
    "instruction, input null": ({"instruction": "Sing.", "input": None, "output": "La"}, "Sing.\n\nLa"),
    "completion": ({"prompt": "1 + 1 =", "completion": "2"}, "1 + 1 =\n\n2"),
    "response": ({"prompt": "Hi", "response": "Hello"}, "Hi\n\nHello"),
    "answer": ({"question": "Why?", "answer": "So."}, "Why?\n\nSo."),
}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "notes", "notes.rst"])
def test_a_text_file_is_one_document(name: str, tmp_path: Path):
    (tmp_path / name).write_text("Grüße\n\n世界\n", "utf-8")
    assert list(read_documents(str(tmp_path / name))) == ["Grüße\n\n世界\n"]


@pytest.mark.parametrize(("row", "document"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_row_of_any_common_form_is_a_document(write: Callable, row: dict, document: str, tmp_path: Path):
    path = write(tmp_path / f"rows.{write.__name__}", [row, row])
    assert list(read_documents(str(path))) == [document, document]


ASKED = {"role": "user", "content": "Call it"}
PARTS = [{"type": "image", "url": "x"}, {"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
ODD_ROWS: dict[str, tuple[Any, list[str]]] = {
    "a call of a tool": ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, ["user: Call it"]),
    "a turn of null": ({"messages": [ASKED, {"role": "assistant", "content": None}]}, ["user: Call it"]),
    "content in parts": (
        {"messages": [ASKED, {"role": "bot", "content": PARTS}]},
        ["user: Call it\n\nbot: Hi\n\nthere"],
    ),
    "other names": ({"conversations": [{"from": "human", "value": "Hi"}]}, ["human: Hi"]),
    "parts of a document": ({"content": PARTS}, ["Hi\n\nthere"]),
    "a list of texts": ({"text": ["a", None, "b"]}, ["a\n\nb"]),
    "null": (None, []),
    "text of null": ({"text": None}, []),
    "text of null beside content": ({"text": None, "content": "a"}, ["a"]),
    "messages of null": ({"messages": None}, []),
    "half a character": ({"text": "cut \ud83d off"}, ["cut \ufffd off"]),
    "a whole one in halves": ({"text": "\ud83d\ude00"}, ["\U0001f600"]),
}


@pytest.mark.parametrize(("row", "documents"), ODD_ROWS.values(), ids=ODD_ROWS)
@pytest.mark.parametrize("form", ["lines", "list", "indented list"])
def test_rows_are_taken_where_they_mean_text(form: str, row: Any, documents: list[str], tmp_path: Path):
    rows = [{"text": "before"}, row, {"text": "behind"}]
    text = (
        "\n".join(map(json.dumps, rows))
        if form == "lines"
        else json.dumps(rows, indent=2 if "indented" in form else None)
    )
    (tmp_path / "rows.json").write_text(text)
    assert list(read_documents(str(tmp_path / "rows.json"))) == ["before", *documents, "behind"]


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.Json", "rows.ndjson", "rows.jsonlines", "rows", "rows.data"])
def test_rows_are_rows_however_the_file_is_called(name: str, tmp_path: Path):
    jsonl(tmp_path / name, [{"text": "a"}, {"text": "b"}])
    assert list(read_documents(str(tmp_path / name))) == ["a", "b"]


@pytest.mark.parametrize("name", ["rows.PARQUET", "rows.pq"])
def test_a_table_is_one_however_the_file_is_called(name: str, tmp_path: Path):
    parquet(tmp_path / name, [{"text": "a"}, {"text": None}])
    assert list(read_documents(str(tmp_path / name))) == ["a"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_byte_order_mark_is_no_text(encoding: str, tmp_path: Path):
    mark = "\ufeff" if encoding[-2:] in ("le", "be") else ""
    (tmp_path / "a.TXT").write_bytes(f"{mark}Grüße".encode(encoding))
    (tmp_path / "rows.jsonl").write_bytes((mark + '{"text": "Grüße"}\n').encode(encoding))
    assert (
        list(read_documents(str(tmp_path / "a.TXT"))) == list(read_documents(str(tmp_path / "rows.jsonl"))) == ["Grüße"]
    )


def test_a_configuration_of_a_dataset_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, card = tmp_path / "data", ["---", "configs:"]
    for name in ("small", "large"):
        card += [f"- config_name: {name}", "  data_files:"]
        for part in ("train", "test"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            jsonl(folder / name / f"{part}.jsonl", [{"text": f"{name} {part}"}])
            card += [f"  - split: {part}", f"    path: {name}/{part}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    assert list(read_documents(f"{folder}:small")) == ["small train"]
    assert list(read_documents(f"{folder}:large:test")) == ["large test"]
    with pytest.raises(CalibrationError, match=r"small.*large.*name:config:split"):
        list(read_documents(str(folder)))


def test_a_json_line_may_be_a_bare_string_and_blank_lines_do_not_count(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('"a b"\n\n   \n{"text": "c"}', "utf-8")
    assert list(read_documents(str(tmp_path / "rows.jsonl"))) == ["a b", "c"]


# the line ends of str.splitlines that JSON allows inside a string
@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
def test_a_line_of_json_ends_at_a_newline_only(character: str, tmp_path: Path):
    document = f"before{character}after"
    assert list(read_documents(str(jsonl(tmp_path / "rows.jsonl", [{"text": document}])))) == [document]


def test_lines_of_json_may_end_as_on_windows(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert list(read_documents(str(tmp_path / "rows.jsonl"))) == ["a", "b"]


def test_a_dataset_folder_is_read_by_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [{"text": f"t{i}"} for i in range(3)])
    jsonl(folder / "validation.jsonl", [{"text": f"v{i}"} for i in range(2)])
    assert list(read_documents(str(folder))) == ["t0", "t1", "t2"]
    assert list(read_documents(f"{folder}:validation")) == ["v0", "v1"]
    with pytest.raises(CalibrationError, match="nosuch"):
        list(read_documents(f"{folder}:nosuch"))


def test_the_bundled_text_is_every_file_of_the_calibration_folder():
    folder = ROOT / "calibration" / "text"
    files = sorted(folder.glob("*.txt"))
    assert [path.name for path in bundled_files()] == [path.name for path in files]
    assert list(read_documents()) == [path.read_text("utf-8") for path in files]
    assert sum(path.stat().st_size for path in files) >= 150_000


def test_a_missing_bundled_text_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / "wina_convert")
    with pytest.raises(CalibrationError, match=r"reinstall wina-convert or pass --calibration"):
        list(read_documents())


def write(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def rows(*found: Any, name: str = "rows.jsonl") -> Callable[[Path], Path]:
    return lambda folder: (jsonl if name.endswith("l") else parquet)(folder / name, list(found))


def folder_named(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder / name

    return make


GOOD = {"text": "word " * 40}
BAD_TEXT = {
    "no such file": (lambda folder: folder / "nosuch.txt", ("nosuch.txt", "cannot be read", "UTF-8 text file")),
    "a folder named so": (folder_named("a.txt"), ("a.txt", "cannot be read", "UTF-8 text file")),
    "empty": (write("a.txt", b""), ("a.txt has 0 tokens", "are needed", "give more text or a smaller --seq-len")),
    "blank": (write("a.txt", b"\n \n"), ("a.txt has", "give more text")),
    "too short": (write("a.txt", b"Once upon a time"), ("a.txt has", "are needed", "more text or a smaller --seq-len")),
    "binary": (write("a.txt", b"text\0more" * 999), ("a.txt is binary", "character 4", "UTF-8 text file")),
    "latin-1": (write("a.txt", "Grüße".encode("latin-1")), ("a.txt is not UTF-8", "byte 2", "UTF-8 text file")),
    "a picture": (write("a", b"\x89PNG\r\n\x1a\n"), ("not UTF-8", "byte 0")),
    "no such rows": (lambda folder: folder / "nosuch.jsonl", ("nosuch.jsonl", "cannot be read")),
    "no rows": (write("rows.jsonl", b""), ("rows.jsonl has 0 tokens", "give more text")),
    "empty rows": (rows({"text": ""}, {"text": ""}), ("rows.jsonl has", "give more text")),
    "broken row": (
        write("rows.jsonl", b'{"text": "a"}\n\n{"text": '),
        ("rows.jsonl", "line 3", "not JSON", "one JSON object a line"),
    ),
    "other fields": (rows(GOOD, {"id": 1, "body": "x"}), ("rows.jsonl, row 2", "'id', 'body'", "'text', 'content'")),
    "no fields": (rows({}), ("rows.jsonl", "none", "'text', 'content'")),
    "a number for a row": (rows(7), ("rows.jsonl", "'text', 'content'")),
    "a number for text": (rows({"text": 7}), ("row 1: 'text' is of type int",)),
    "messages without role": (rows({"messages": [{"content": "Hi"}]}), ("row 1", "'messages'", "'role'")),
    "messages of strings": (rows({"messages": ["Hi"]}), ("rows.jsonl", "messages")),
    "input of a list": (rows({"instruction": "Add", "input": [1, 2], "output": "3"}), ("rows.jsonl", "'input'")),
    "a table": (write("a.csv", b"text\nword"), ("a.csv is no plain text", ".jsonl")),
    "a page": (write("a.HTML", b"<p>word</p>"), ("a.HTML is no plain text",)),
    "a list of numbers": (rows({"text": ["a", 7]}), ("row 1: 'text' holds a value of type int",)),
    "a picture alone": (rows({"content": [{"type": "image", "url": "x"}]}), ("rows.jsonl has 0 tokens",)),
    "garbage parquet": (write("a.parquet", b"garbage" * 99), ("a.parquet cannot be read as parquet",)),
    "empty parquet": (write("a.parquet", b""), ("a.parquet cannot be read as parquet",)),
    "cut-off parquet": (
        lambda folder: write("b.parquet", parquet(folder / "a.parquet", [GOOD]).read_bytes()[:-9])(folder),
        ("b.parquet cannot be read as parquet",),
    ),
    "no such parquet": (lambda folder: folder / "nosuch.parquet", ("nosuch.parquet cannot be read",)),
    "other columns": (rows({"id": 1, "body": "x"}, name="a.parquet"), ("a.parquet", "'id', 'body'", "'text'")),
    "bytes in a column": (rows({"text": b"x"}, name="a.parquet"), ("a.parquet", "'text'")),
    "no such dataset": (lambda folder: folder / "nosuch", ("nosuch", "neither a file nor a dataset")),
    "a folder without data": (folder_named("data"), ("data", "neither a file nor a dataset")),
}


@pytest.mark.parametrize(("make", "words"), BAD_TEXT.values(), ids=BAD_TEXT)
def test_a_text_that_cannot_be_used_is_refused_and_nothing_is_written(
    make: Callable[[Path], Path], words: tuple[str, ...], tiny: Path, tmp_path: Path
):
    path = make(tmp_path)
    before = contents(tmp_path)
    refused(run(tiny, "--out", tmp_path / "out", "--calibration", path, "--quiet", *SMALL), *words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["empty", "binary", "no such file", "broken row", "no such dataset"])
def test_a_text_that_cannot_be_evaluated_is_refused(name: str, wina_tiny: Path, tmp_path: Path):
    make, words = BAD_TEXT[name]
    refused(run_wina("eval", wina_tiny, "--text", make(tmp_path), "--quiet"), *words[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["notes.txt", "rows.jsonl", "rows.parquet"])
def test_a_conversion_takes_its_text_from_the_file_given(name: str, tiny: Path, tmp_path: Path):
    words = "".join(f"{i * i} is the square of {i}.\n" for i in range(900))
    path = tmp_path / name
    if name.endswith("txt"):
        path.write_text(words)
    else:
        (jsonl if name.endswith("l") else parquet)(path, [{"text": words}])
    out = tmp_path / "out"
    succeeded(run(tiny, "--out", out, "--calibration", path, *SMALL))
    calibration = json.loads((out / "config.json").read_text())["quantization_config"]["calibration"]
    assert calibration["text"] == name
    assert (calibration["samples"], calibration["seq_len"]) == (8, 32)


@pytest.mark.parametrize(("package", "source"), [("pyarrow.parquet", "rows.parquet"), ("datasets", "some/dataset")])
def test_without_an_optional_package_the_line_says_what_to_install(
    package: str, source: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    parquet(tmp_path / "rows.parquet", [GOOD])
    monkeypatch.setattr(builtins, "__import__", without)
    words = (source, package.split(".")[0], "pip install 'wina-convert[datasets]'")
    refused(run(tiny, "--out", tmp_path / "out", "--calibration", source), *words)
    assert not (tmp_path / "out").exists()


def word_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A token for each of the words w0 to w99; <s> is 100, </s> is 101, <unk> is 102."""
    words = {f"w{i}": i for i in range(100)} | {"<s>": 100, "</s>": 101, "<unk>": 102}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 100), ("</s>", 101)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("template", "prefix"),
    [(None, []), ("<s> $A", [100]), ("<s> $A </s>", [100]), ("$A </s>", []), ("<s> <s> $A </s>", [100, 100])],
)
@settings(deadline=None)
@given(words=st.lists(st.lists(st.integers(0, 99), max_size=30), min_size=1, max_size=6), length=st.integers(4, 12))
def test_documents_are_packed_without_gaps_behind_what_the_tokenizer_puts_in_front(
    template: str | None, prefix: list[int], words: list[list[int]], length: int
):
    documents = [" ".join(f"w{i}" for i in document) for document in words]
    ids = [i for document in words for i in document]
    body = length - len(prefix)
    expected = [prefix + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
    tokenizer = word_tokenizer(template)
    if len(expected) < 2:
        with pytest.raises(CalibrationError, match=f"here has {len(ids)} tokens; at least {2 * body} are needed"):
            sequences(documents, tokenizer, length, 99, "here")
    else:
        packed = sequences(documents, tokenizer, length, 99, "here")
        assert packed.dtype == torch.int64
        assert packed.tolist() == expected


def test_documents_are_read_only_until_there_are_enough():
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "w1 " * 100

    packed = sequences(endless(), word_tokenizer(None), 10, 20, "here")
    assert len(packed) >= 20
    assert read < 100


def test_of_one_very_long_document_only_the_beginning_is_tokenized(monkeypatch: pytest.MonkeyPatch):
    tokenizer, lengths = word_tokenizer(None), []
    call = type(tokenizer).__call__

    def counting(self: Any, text: str, **kwargs: Any) -> Any:
        lengths.append(len(text))
        return call(self, text, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    assert len(sequences(["w1 " * 100_000], tokenizer, 10, 20, "here")) >= 20
    assert max(lengths) < 50_000


@settings(deadline=None)
@given(count=st.integers(2, 300), samples=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_held_out_and_calibration_never_share_a_sequence_and_the_seed_decides(count: int, samples: int, seed: int):
    packed = torch.arange(count * 3).view(count, 3)
    chosen, held_out = split(packed, samples, seed)
    assert 1 <= len(held_out) <= 16
    assert len(chosen) == min(samples, count - len(held_out))
    rows = [tuple(row) for row in torch.cat([chosen, held_out]).tolist()]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= {tuple(row) for row in packed.tolist()}
    again = split(packed, samples, seed)
    assert torch.equal(chosen, again[0])
    assert torch.equal(held_out, again[1])


def test_another_seed_chooses_other_sequences():
    packed = torch.arange(600).view(200, 3)
    assert not torch.equal(split(packed, 50, 0)[0], split(packed, 50, 1)[0])


@given(rows=st.integers(2, 400), samples=st.integers(1, 100), others=st.integers(0, 400), seed=st.integers(0, 2**62))
@settings(deadline=None)
def test_text_for_thresholds_stands_apart_from_the_others(rows: int, samples: int, others: int, seed: int):
    packed = torch.arange(rows)[:, None]
    chosen, rest, held_out = split_apart(packed, samples, others, seed)
    assert len(held_out) == min(16, max(1, rows // 8))
    assert 1 <= len(chosen) <= samples
    assert len(rest) <= others
    drawn = [row.item() for part in (chosen, rest, held_out) for row in part]
    assert len(set(drawn)) == len(drawn)
    again = split_apart(packed, samples, others, seed)
    assert all(torch.equal(a, b) for a, b in zip((chosen, rest, held_out), again, strict=True))
    if rows >= 24 and others <= rows // 3:  # then none of the others is a neighbour from the same stretch
        stretch = {row.item() * 12 // rows for part in (chosen, held_out) for row in part}
        assert stretch.isdisjoint({row.item() * 12 // rows for row in rest})
    if rows >= 3 * (samples + 16):
        assert len(chosen) == samples


def test_stretches_for_thresholds_are_spread_over_the_text_and_a_third_of_it():
    chosen, rest, held_out = split_apart(torch.arange(120)[:, None], 64, 10**6, 0)
    assert {row.item() // 10 for part in (chosen, held_out) for row in part} == {1, 4, 7, 10}
    assert sorted(row.item() for row in rest) == [row for row in range(120) if row // 10 not in (1, 4, 7, 10)]
    assert (len(chosen), len(held_out)) == (25, 15)
