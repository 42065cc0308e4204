"""A conversion is not resumed as something else: what changed since is named."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.commands import SMALL, contents, refused, run, succeeded
from support.interrupting import interrupt_in_layer
from wina_convert.verbs.verify import verify_folder

pytestmark = pytest.mark.slow

MODEL = "three layers"  # see support/shared.py


# What may not change before `--resume`, and a word of the message. The calibration text is a file in all of them.
CHANGED_OPTIONS: list[tuple[tuple[str, ...], str]] = [
    (("--sparsity", "0.4"), "sparsity"),
    (("--samples", "7"), "samples"),
    (("--seq-len", "16"), "seq_len"),
    (("--batch-size", "5"), "batch_size"),
    (("--scheme", "teal"), "scheme"),
    (("--allocation", "uniform"), "allocation"),
    (("--seed", "3"), "seed"),
    (("--device", "cpu:0"), "device"),
    (("--dtype", "bfloat16"), "dtype"),
    (("--max-shard-size", "100KB"), "max_shard_size"),
    (("--targets", "mlp"), "targets"),
    (("--ignore", "*.q_proj"), "ignore"),
    (("--plot",), "plot"),
    (("--calibration", "bundled"), "calibration"),
]


@pytest.fixture(scope="module")
def unfinished_of_text(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a calibration text and an unfinished conversion to `out`. Shared: copy it."""
    folder = tmp_path_factory.mktemp("unfinished")
    shutil.copytree(source, folder / "source")
    (folder / "text.txt").write_text("".join(f"Sentence {n} of a text is here. " for n in range(1000)))
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in_layer(patched, 2)
        assert resumed(folder).exit_code == 130
    return folder


def resumed(folder: Path, *options: str) -> Any:
    model, out, text = (folder / name for name in ("source", "out", "text.txt"))
    return run(model, "--out", out, "--calibration", text, "--resume", "--quiet", *SMALL, *options)


def refused_and_left(folder: Path, word: str, *options: str) -> None:
    before = contents(folder)
    line = refused(resumed(folder, *options), "of something else", "--overwrite")
    assert word in line.partition("something else")[2], line
    assert contents(folder) == before


def test_resume_with_nothing_changed_goes_on(unfinished_of_text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unfinished_of_text, tmp_path / "folder")
    succeeded(resumed(folder))
    verify_folder(folder / "out")


@pytest.mark.parametrize(("options", "word"), CHANGED_OPTIONS)
def test_resume_names_the_option_that_changed(
    options: tuple[str, ...], word: str, unfinished_of_text: Path, tmp_path: Path
) -> None:
    refused_and_left(shutil.copytree(unfinished_of_text, tmp_path / "folder"), word, *options)


def change_number(path: Path) -> None:
    """Another number of the same length: the size of the file stays."""
    text = path.read_text()
    path.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert path.read_text() != text


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))


def change_text(path: Path) -> None:
    path.write_text(path.read_text().replace("Sentence", "Paragraph"))


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        ("source/config.json", change_number, "config.json"),
        ("source/model.safetensors", flip_last_byte, "model.safetensors"),
        ("source/model.safetensors", touch, "model.safetensors"),
        ("text.txt", change_text, "calibration"),
    ],
)
def test_resume_names_the_file_that_changed(
    file: str, change: Callable[[Path], None], word: str, unfinished_of_text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(unfinished_of_text, tmp_path / "folder")
    change(folder / file)
    refused_and_left(folder, word)


def test_resume_refuses_another_source(unfinished_of_text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unfinished_of_text, tmp_path / "folder")
    (folder / "source").rename(folder / "another")
    (folder / "source").symlink_to("another")
    refused_and_left(folder, "another")


@pytest.mark.parametrize(
    ("place", "word"),
    [
        ("wina_convert.conversion.pipeline.torch.__version__", "torch"),
        ("transformers.__version__", "transformers"),
        ("wina_convert.conversion.pipeline.__version__", "wina-convert"),
    ],
)
def test_resume_names_the_version_that_changed(
    place: str, word: str, unfinished_of_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(unfinished_of_text, tmp_path / "folder")
    monkeypatch.setattr(place, "99.9.9")
    refused_and_left(folder, word)
