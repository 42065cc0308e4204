"""The pages beside the README say what the program says."""

import ast
import re
from pathlib import Path

from support import ROOT
from support.pages import VERBS, verbs_page
from support.picture import PICTURE, draw

TROUBLESHOOTING = (ROOT / ".github" / "TROUBLESHOOTING.md").read_text("utf-8")
HEADINGS = re.findall(r"^### (.+)$", TROUBLESHOOTING, flags=re.MULTILINE)
OTHERS = 3  # headings that are no message of this package, and say so


def messages() -> set[str]:
    """Every text in the package, with … for what is filled in."""
    found: set[str] = set()
    for path in (ROOT / "wina_convert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))  # type: ignore[misc]
    return found


def test_the_page_of_the_verbs_is_their_help() -> None:
    assert VERBS.read_text("utf-8") == verbs_page(), "run: python tests/support/pages.py"


def test_every_message_of_the_troubleshooting_page_exists() -> None:
    known = messages()
    unknown = [heading for heading in HEADINGS if heading not in known]
    assert len(unknown) == OTHERS, unknown
    assert len(HEADINGS) > 12


def test_the_picture_is_drawn_by_the_rule_of_the_package(tmp_path: Path) -> None:
    assert draw(tmp_path / "picture.png") == 8  # of 16 inputs
    assert PICTURE.read_bytes().startswith(b"\x89PNG")
    assert f"]({PICTURE.name})" in (ROOT / ".github" / "HOW_IT_WORKS.md").read_text("utf-8")


def test_every_figure_on_the_page_of_expectations_is_in_the_readme() -> None:
    figure = r"\+?\d+\.\d+(?:%|x| million| billion)"
    page = (ROOT / ".github" / "WHAT_TO_EXPECT.md").read_text("utf-8")
    figures = set(re.findall(figure, page))
    assert len(figures) > 15
    assert figures <= set(re.findall(figure, (ROOT / "README.md").read_text("utf-8")))


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in (ROOT / ".github").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
