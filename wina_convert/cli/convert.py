"""`wina-convert` and `wina convert`: one command under two names, its options those of a conversion."""

import signal
import time
from dataclasses import Field, fields
from typing import Any

import click

from ..conversion.options import ConversionOptions
from .common import (
    Command,
    begin,
    download_bar,
    json_option,
    print_json,
    progress_of,
    quiet_option,
    quiet_transformers,
    split,
    upload_bars,
    version_option,
)
from .text import plan_text, report_text


def _option(field: "Field[Any]") -> click.Option:
    """A field of the options as a command-line option."""
    flag, text = field.metadata["off"] or (f"--{field.name.replace('_', '-')}", field.metadata["help"])
    names = [flag, field.name]
    if isinstance(field.default, bool):
        return click.Option(names, is_flag=True, flag_value=not field.default, default=field.default, help=text)
    if isinstance(field.default, tuple):
        return click.Option(
            names,
            multiple=True,
            default=list(field.default),
            show_default=bool(field.default),
            callback=split,
            help=text,
        )
    if field.default is None:
        kind = next((kind for kind in (int, float) if kind.__name__ in str(field.type)), str)
        shown = f"  [default: {field.metadata['shown']}]" if field.metadata["shown"] else ""
        return click.Option(names, type=kind, help=text + shown)
    return click.Option(names, default=field.default, show_default=True, help=text)


def _convert(out: str, quiet: bool, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Turn a Hugging Face causal LM into a WINA checkpoint.

    MODEL is a Hub id or a local folder. The result skips, at every gated projection, the inputs that do not matter for the
    token at hand; load it with AutoModelForCausalLM.from_pretrained(OUT).

    \b
    Examples:
      wina-convert meta-llama/Llama-3-8B --out ./llama-wina
      wina-convert ./my-model --out ./my-model-wina --sparsity 0.4 --calibration notes.txt
      wina-convert ./my-model --out ./my-model-wina --targets mlp --dry-run
      wina-convert ./my-model --out ./my-model-wina --push-to-hub me/my-model-wina
    """
    begin(quiet, f"Reading {options['model']}")
    from ..conversion.pipeline import convert

    quiet_transformers()
    if options["push_to_hub"]:
        upload_bars(quiet)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = time.perf_counter()
    report = convert(out=out, dry_run=dry_run, progress=progress_of(quiet), tqdm_class=download_bar(quiet), **options)
    if as_json:
        print_json(report)
    elif dry_run:
        click.echo(plan_text(report, out))
    elif not quiet:
        click.echo(report_text(report, out, time.perf_counter() - start))


def command(name: str) -> Command:
    """The command, under a name."""
    out = click.Option(["--out"], required=True, type=click.Path(), help="Folder to write; must not exist.")
    options = [_option(field) for field in fields(ConversionOptions)]
    made = Command(name, callback=_convert, help=_convert.__doc__)
    made.params = [click.Argument(["model"], metavar="MODEL", type=click.Path()), out, *options]
    return quiet_option(json_option(made))


wina_convert = version_option(command("wina-convert"))
