"""What the commands share: errors in one line, the forms of options, progress, quiet libraries."""

import atexit
import gc
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from .. import __version__
from ..errors import WinaError, printable
from ..progress import Progress, bars, lines, silent

# A process that ends would search what torch and transformers made for cycles to free, which takes half a second and more.
atexit.register(gc.freeze)

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class OneLineErrors:
    """A click command that prints any expected error as one line on stderr and exits 2, without a traceback."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"context_settings": HELP, **kwargs})

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and exit with a status."""
        for stream in (sys.stdout, sys.stderr):  # a console that lacks a character is no reason to fail
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            result = super().main(*args, **{**kwargs, "standalone_mode": False})  # type: ignore[misc]
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.ClickException as error:
            _fail(error.format_message(), 2)
        except WinaError as error:
            _fail(str(error), 2)
        except (KeyboardInterrupt, click.Abort) as error:  # click turns the first into the second
            said = str(error.__cause__ or error)
            _fail(f"interrupted; {said}" if said else "interrupted", 130)
        sys.exit(result if isinstance(result, int) else 0)


class Command(OneLineErrors, click.Command):
    """A command."""


class Group(OneLineErrors, click.Group):
    """A command with verbs."""

    command_class = Command


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    sys.exit(code)


def split(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    """Repeated options and comma-separated lists mean the same."""
    return tuple(part for value in values for part in value.split(",") if part)


def fractions(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> tuple[float, ...]:
    """Repeated or comma-separated numbers."""
    try:
        return tuple(float(part) for part in split(context, parameter, values))
    except ValueError as error:
        raise click.BadParameter(f"{error}; give fractions such as 0.25,0.5") from error


def shapes(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Repeated or comma-separated sizes, INPUTSxOUTPUTS each."""
    found = []
    for part in split(context, parameter, values):
        inputs, _, outputs = part.partition("x")
        if not (inputs.isdecimal() and outputs.isdecimal()):
            raise click.BadParameter(f"{part!r}; give INPUTSxOUTPUTS, such as 4096x14336")
        found.append((int(inputs), int(outputs)))
    return tuple(found)


def print_json(content: Any) -> None:
    """A result as JSON on stdout, in ASCII: it is the same on every console."""
    click.echo(json.dumps(content, indent=2))


def begin(quiet: bool, doing: str) -> None:
    """Say on a terminal what is under way, before the imports that take seconds."""
    if sys.stderr.isatty() and not quiet:
        click.echo(f"{doing} ...", err=True)


def local(folder: str, quiet: bool, revision: str | None, token: str | None) -> str:
    """The folder of a checkpoint, downloaded where it is a Hub id; one without a config is refused before slow imports."""
    from pathlib import Path

    quiet_transformers()
    from ..format.folder import read_config
    from ..models.source import checkpoint_folder

    found = checkpoint_folder(folder, revision, token, download_bar(quiet), progress_of(quiet))
    read_config(Path(found))
    return found


def hub_options(command: Any) -> Any:
    """The options of a verb that takes a Hub id for DIR."""
    token = click.option("--token", help="Hub access token.  [default: that of `hf auth login`]")
    return click.option("--revision", help="Branch, tag or commit, for a Hub id.")(token(command))


def progress_of(quiet: bool) -> Progress:
    """Bars on a terminal, lines in a log, nothing where it is to be quiet."""
    if quiet:
        return silent
    return bars if sys.stderr.isatty() else lines(lambda text: click.echo(text, err=True))


def quiet_transformers() -> None:
    """Keep what the libraries print off the terminal: what matters comes as an error or as progress."""
    # CRITICAL: errors come as exceptions, and may quote a file of anybody's. In the environment for a library that is not
    # imported yet, and need not be for what is refused.
    os.environ |= {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_VERBOSITY": "error"}
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils import logging as hub_logging

        hub_logging.set_verbosity_error()
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity(50)
        logging._tqdm_active = False  # disable_progress_bar would take huggingface_hub's bars away as well


def download_bar(quiet: bool) -> type[Any]:
    """A progress bar for huggingface_hub, on a terminal only; a `name` is what it groups its own bars by."""
    from tqdm import tqdm  # here, so that the help shows at once

    shown = sys.stderr.isatty() and not quiet

    class DownloadBar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, name: str | None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": not shown})

    return DownloadBar


def upload_bars(quiet: bool) -> None:
    """Let huggingface_hub show its bars of an upload on a terminal only."""
    if quiet or not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")


def _hush(context: click.Context, parameter: click.Parameter, quiet: bool) -> bool:
    """Of what the package logs, let errors alone through where it is to be quiet."""
    logging.getLogger("wina_convert").setLevel(logging.ERROR if quiet else logging.NOTSET)
    return quiet


quiet_option = click.option(
    "-q", "--quiet", is_flag=True, callback=_hush, help="No progress and no summary; errors only."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
version_option = click.version_option(__version__, "--version", prog_name="wina-convert")
