"""`wina push`: a checkpoint to the Hub."""

import click

from .common import Command, begin, json_option, print_json, progress_of, quiet_option, quiet_transformers, upload_bars


@click.command("push", cls=Command, short_help="Upload a checkpoint to the Hub.")
@click.argument("folder", metavar="DIR", type=click.Path())
@click.argument("repository", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private if it does not exist.")
@click.option("--revision", help="Branch to write to, made where it does not exist, or refs/pr/N.  [default: main]")
@click.option("--subfolder", help="Folder of the repository to write to.  [default: its top]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of writing to a branch.")
@click.option("--token", help="Hub access token.  [default: that of `hf auth login`]")
@quiet_option
@json_option
def push_command(
    folder: str,
    repository: str,
    private: bool,
    revision: str | None,
    subfolder: str | None,
    create_pr: bool,
    token: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Upload a checkpoint with its card, report and tokenizer to the Hub, in one commit.

    DIR must be as a conversion wrote it: it is verified first. Where an upload breaks off, the same command goes on.

    \b
    Examples:
      wina push ./llama-wina me/llama-wina
      wina push ./llama-wina me/llama-wina --private --revision half
    """
    begin(quiet, f"Reading {folder}")
    from ..verbs.push import push

    quiet_transformers()
    upload_bars(quiet)
    url = push(
        folder,
        repository,
        private=private or None,
        revision=revision,
        subfolder=subfolder,
        create_pr=create_pr,
        token=token,
        progress=progress_of(quiet),
    )
    if as_json:
        print_json({"folder": folder, "url": url})
    elif not quiet:
        click.echo(f"{folder}: uploaded to {url}")
