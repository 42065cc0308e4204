"""How far a long step is: the library reports it, the caller chooses the form."""

import time
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


def note(advance: Advance, text: str) -> None:
    """Say something beside the progress of a step, such as a loss, where its form has a place for it."""
    say = getattr(advance, "note", None)
    if say is not None:
        say(text)


@contextmanager
def bars(label: str, total: int, unit: str) -> Iterator[Advance]:
    """A tqdm bar on stderr, for a terminal; bytes are shown in binary multiples."""
    from tqdm import tqdm  # here, so that the help shows at once

    size = unit == "B"
    with tqdm(desc=label, total=total, unit=unit if size else f" {unit}", unit_scale=size, unit_divisor=1024) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        advance.note = bar.set_postfix_str  # type: ignore[attr-defined]
        yield advance


def lines(write: Callable[[str], object]) -> Progress:
    """A plain line at the start, at each quarter and at the end of a step, for logs; with a note, the time left as well."""

    @contextmanager
    def step(label: str, total: int, unit: str) -> Iterator[Advance]:
        done, quarter, noted, begun = 0, 0, "", time.monotonic()
        scale, shown = (2**20, "MiB") if unit == "B" and total >= 2**20 else (1, unit)

        def advance(count: int) -> None:
            nonlocal done, quarter
            done += count
            if total and done * 4 // total > quarter:
                quarter = done * 4 // total
                left = (time.monotonic() - begun) * (total - done) / done
                more = f", {noted}, about {left:.0f} s left" if noted else ""
                write(f"{label}: {done // scale} of {total // scale} {shown}{more}")

        def take(text: str) -> None:
            nonlocal noted
            noted = text

        advance.note = take  # type: ignore[attr-defined]

        write(f"{label}: {total // scale} {shown}")
        yield advance

    return step
