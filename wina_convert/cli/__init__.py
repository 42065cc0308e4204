"""The command line: `wina-convert`, and `wina` with its verbs. The only folder that prints or exits."""

from .commands import wina
from .convert import wina_convert

__all__ = ["wina", "wina_convert"]
