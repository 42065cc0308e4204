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


def lines(write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> Progress:
    """A plain line at the start, at each quarter and at the end of a step, for logs; with the time it took and will take.

    Args:
        write: called with each line.
        clock: tells the time in seconds.
    """

    @contextmanager
    def step(label: str, total: int, unit: str) -> Iterator[Advance]:
        begin, done, quarter, noted = clock(), 0, 0, ""
        scale, shown = (2**20, "MiB") if unit == "B" and total >= 2**20 else (1, unit)
        if unit != "B" and total != 1:
            shown += "s"

        def advance(count: int) -> None:
            nonlocal done, quarter
            done += count
            if total and done * 4 // total > quarter:
                quarter = done * 4 // total
                took = clock() - begin
                left = f", about {duration(took * (total - done) / done)} left" if done < total else ""
                write(f"{label}: {done // scale} of {total // scale} {shown}{noted}, {duration(took)}{left}")

        def take(text: str) -> None:
            nonlocal noted
            noted = f", {text}"

        advance.note = take  # type: ignore[attr-defined]

        write(f"{label}: {total // scale} {shown}")
        yield advance

    return step


def grouped(advance: Advance, size: int) -> Advance:
    """Tells `advance` of every `size` units that are done: of layers, where a layer is so many sequences."""
    done = 0

    def count(units: int) -> None:
        nonlocal done
        before, done = done // size, done + units
        if done // size > before:
            advance(done // size - before)

    return count


def duration(seconds: float) -> str:
    """A time in the unit one would say it in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
