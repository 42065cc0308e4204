"""The page of the verbs, made from the help of the command line: `python tests/support/pages.py` writes it."""

from pathlib import Path

from click.testing import CliRunner

VERBS = Path(__file__).parents[2] / ".github" / "VERBS.md"
INTRODUCTION = """# The verbs

What `wina VERB --help` prints, for every verb. `wina convert` is the same as `wina-convert`.

Completion of verbs, options and folders: `eval "$(_WINA_COMPLETE=bash_source wina)"` in `~/.bashrc`, with `zsh_source` in
`~/.zshrc`; for fish `_WINA_COMPLETE=fish_source wina | source`. For `wina-convert` the variable is `_WINA_CONVERT_COMPLETE`.
"""
WIDTH = 100


def verbs_page() -> str:
    """The text of the page."""
    from wina_convert.cli import wina

    parts = [INTRODUCTION]
    for name in sorted(wina.commands):
        shown = CliRunner().invoke(
            wina, [name, "--help"], prog_name="wina", terminal_width=WIDTH, max_content_width=WIDTH
        )
        parts.append(f"## {name}\n\n```text\n{shown.stdout.strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    VERBS.write_text(verbs_page(), "utf-8")
