"""How far a long step is: the library reports it, the caller chooses the form."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

Advance = Callable[[int], object]


class Progress(Protocol):
    """Opens a step; the result of the with-block is called with the number of units done since the last call."""

    def __call__(self, label: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Open a step of `total` units."""


def silent(label: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    """Report nothing."""
    return nullcontext(lambda done: None)


@contextmanager
def bars(label: str, total: int, unit: str) -> Iterator[Advance]:
    """A tqdm bar on stderr, for a terminal; bytes are shown in binary multiples."""
    from tqdm import tqdm  # here, so that the help shows at once

    size = unit == "B"
    with tqdm(desc=label, total=total, unit=unit if size else f" {unit}", unit_scale=size, unit_divisor=1024) as bar:
        yield bar.update


def lines(write: Callable[[str], object]) -> Progress:
    """A plain line at the start, at each quarter and at the end of a step, for logs."""

    @contextmanager
    def step(label: str, total: int, unit: str) -> Iterator[Advance]:
        done, quarter = 0, 0
        scale, shown = (2**20, "MiB") if unit == "B" and total >= 2**20 else (1, unit)

        def advance(count: int) -> None:
            nonlocal done, quarter
            done += count
            if total and done * 4 // total > quarter:
                quarter = done * 4 // total
                write(f"{label}: {done // scale} of {total // scale} {shown}")

        write(f"{label}: {total // scale} {shown}")
        yield advance

    return step
