"""`python -m wina_convert` is `wina-convert`."""

from .cli import wina_convert

if __name__ == "__main__":
    wina_convert(prog_name="wina-convert")
