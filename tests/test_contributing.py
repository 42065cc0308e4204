"""What CONTRIBUTING.md names is there, and the hooks run what the CI runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / ".github" / "CONTRIBUTING.md").read_text("utf-8")
HOOKS = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
# in backticks or in a line of shell: anything under a top-level name, and the files at the top that are written in capitals
PATHS = sorted(set(re.findall(r"(?<![\w/.])(?:(?:wina_convert|tests|calibration|\.ci)/[\w./-]*|[A-Z]+\.md)", TEXT)))
PACKAGES = ["format", "runtime", "models", "fitting", "conversion", "verbs", "serving", "cli"]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_there(path: str) -> None:
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_the_map_names_every_package_and_every_top_level_module() -> None:
    rows = "\n".join(line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `"))
    mapped = {name.strip("`") for name in re.findall(r"`[^`]+`", rows) if name.startswith("`wina_convert/")}
    package = ROOT / "wina_convert"
    found = {f"wina_convert/{path.parent.name}/" for path in package.glob("*/__init__.py")}
    found |= {f"wina_convert/{path.name}" for path in package.glob("*.py") if not path.name.startswith("__")}
    assert mapped == found


def test_the_rule_of_imports_names_every_package() -> None:
    order = re.search(r"^    errors, .*$", TEXT, flags=re.MULTILINE)
    assert order is not None
    assert [name for name in re.findall(r"\w+", order[0]) if name in PACKAGES] == PACKAGES
    assert {path.parent.name for path in (ROOT / "wina_convert").glob("*/__init__.py")} == set(PACKAGES)


def test_the_hooks_run_the_tools_of_the_environment() -> None:
    entries = re.findall(r"entry: (.*)", HOOKS)
    assert [entry.removeprefix(".venv/bin/").split(" --")[0] for entry in entries] == [
        "ruff check",
        "ruff format",
        "mypy",
    ]
    assert all(entry.startswith(".venv/bin/") for entry in entries)
    assert "--strict" in entries[2]
    assert HOOKS.count("language: system") == HOOKS.count("- id: ") == 3
    assert "http" not in HOOKS
