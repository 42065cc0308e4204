"""The errors this package raises. Each message says what, where, what was got, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())


def printable(text: str, limit: int = 2000) -> str:
    """Text from a file that may be anybody's, on one line and without control characters."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:limit])
    return shown if len(shown) <= limit and len(text) <= limit else f"{shown[:limit]} ..."


class WinaError(Exception):
    """Base of every error the package raises on purpose; the command line prints it in one line and exits 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OptionError(WinaError):
    """An option has a value that cannot be used."""


class SourceError(WinaError):
    """The model to convert cannot be found, read or supported."""


class CalibrationError(WinaError):
    """The calibration text, or what the model makes of it, cannot be used."""


class CheckpointError(WinaError):
    """A WINA checkpoint folder cannot be written, read or loaded."""


class VerificationError(WinaError):
    """A written checkpoint does not do what the source does."""


class UploadError(WinaError):
    """A checkpoint did not get to the Hub, or may not be written there."""


@contextmanager
def as_checkpoint_error(where: object = "") -> Iterator[None]:
    """Within the block, what is wrong with a folder is wrong with a checkpoint: SourceError becomes CheckpointError.

    Args:
        where: named before the message, where it does not name the folder itself.
    """
    try:
        yield
    except SourceError as error:
        raise CheckpointError(f"{where}: {error}" if where else str(error)) from error
