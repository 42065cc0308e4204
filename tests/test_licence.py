"""The text of the licence is in the package, in the metadata of the wheel, and in the sdist."""

import zipfile
from email.parser import Parser
from pathlib import Path

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parent.parent
LICENCE = (ROOT / "wina_convert" / "LICENSE").read_text("utf-8")


def test_the_licence_is_all_of_apache_2() -> None:
    assert LICENCE.split()[:7] == [
        "Apache",
        "License",
        "Version",
        "2.0,",
        "January",
        "2004",
        "http://www.apache.org/licenses/",
    ]
    assert "END OF TERMS AND CONDITIONS" in LICENCE
    assert [f"   {n}. " in LICENCE for n in range(1, 11)] == [n < 10 for n in range(1, 11)]


def test_the_wheel_brings_the_licence_and_names_it(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist() if "LICENSE" in name}
        metadata = next(
            archive.read(name).decode() for name in archive.namelist() if name.endswith("dist-info/METADATA")
        )
        assert "wina_convert/format/README.md" in archive.namelist()  # the specification of what it writes
    in_metadata = [name for name in files if ".dist-info/licenses/" in name]
    assert len(in_metadata) == 1
    assert set(files) == {"wina_convert/LICENSE", *in_metadata}
    assert set(files.values()) == {LICENCE}
    fields = Parser().parsestr(metadata)
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields.get_all("License-File") == ["wina_convert/LICENSE"]


def test_the_sdist_brings_the_licence() -> None:
    files = {file.distribution_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    assert {"wina_convert/LICENSE", "wina_convert/format/README.md"} <= files
