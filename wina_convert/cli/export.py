"""`wina export`."""

import dataclasses

import click

from .common import (
    Command,
    begin,
    hub_options,
    json_option,
    local,
    print_json,
    progress_of,
    quiet_option,
    quiet_transformers,
)


@click.command("export", cls=Command, short_help="Write the dense model of a checkpoint.")
@click.argument("folder", metavar="DIR")
@click.option("--out", required=True, type=click.Path(), help="Folder to write.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file.")
@click.option("--overwrite", is_flag=True, help="Replace a model that this command wrote.")
@hub_options
@quiet_option
@json_option
def export_command(
    folder: str,
    out: str,
    max_shard_size: str,
    overwrite: bool,
    revision: str | None,
    token: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the dense model of a checkpoint, as it was before the conversion, to be used without this package.

    DIR is a folder or a Hub id. Where the conversion changed no basis, the tensors are the source's bit for bit; else the model
    is equal. The command says which.

    \b
    Example:
      wina export ./llama-wina --out ./llama
    """
    begin(quiet, f"Reading {folder}")
    quiet_transformers()
    found = local(folder, quiet, revision, token)
    from ..verbs.export import export

    done = export(found, out, max_shard_size, progress_of(quiet), overwrite)
    if as_json:
        print_json({"folder": out, "bit_for_bit": not done.differs, **dataclasses.asdict(done)})
    elif not quiet:
        click.echo(f"{out}: the dense model, {done.nbytes / 1e6:.2f} MB. {done.said}")
