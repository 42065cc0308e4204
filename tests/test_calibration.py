"""The bundled calibration text: what its README says of it."""

import hashlib

from support import ROOT
from wina_convert.models.documents import bundled_files, read_documents

FOLDER = ROOT / "calibration"
OTHER_LANGUAGES = {"german.txt", "french.txt", "spanish.txt", "chinese.txt", "japanese.txt"}


def test_checksums_name_every_file_and_match() -> None:
    sums = dict(reversed(line.split()) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    found = {f"text/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.glob("text/*")}
    assert sums == found


def test_the_text_is_large_enough_and_a_tenth_is_not_english() -> None:
    sizes = {path.name: path.stat().st_size for path in bundled_files()}
    assert sum(sizes.values()) >= 150_000
    assert set(sizes) >= OTHER_LANGUAGES
    assert 0.08 <= sum(sizes[name] for name in OTHER_LANGUAGES) / sum(sizes.values()) <= 0.12


def test_the_readme_names_every_file_and_the_licence() -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert all(f"`{path.name}`" in readme for path in bundled_files())
    assert "CC0-1.0" in readme


def test_the_text_does_not_repeat_itself() -> None:
    lines = [line.strip() for text in read_documents() for line in text.splitlines() if len(line.strip()) > 80]
    assert len(lines) > 300
    assert len(set(lines)) == len(lines)
