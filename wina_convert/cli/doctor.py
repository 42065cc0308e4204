"""`wina doctor`: what the machine has, and how gated products are computed on it."""

import dataclasses
from typing import TYPE_CHECKING

import click

from ..errors import printable
from .common import Command, begin, json_option, print_json
from .text import size, table

if TYPE_CHECKING:
    from ..verbs.doctor import Diagnosis, Memory


@click.command("doctor", cls=Command, short_help="Show versions, kernels and how fast memory is read.")
@json_option
def doctor_command(as_json: bool) -> None:
    """Show versions, threads, instructions, the measured speed of memory, which kernels would be used and why.

    Put its output into the report of a bug. The first run on a machine compiles the kernels, which takes some seconds more.

    \b
    Example:
      wina doctor
    """
    begin(as_json, "Looking at the machine")
    from ..verbs.doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        click.echo(diagnosis_text(found))


def diagnosis_text(found: "Diagnosis") -> str:
    """What was found, as lines."""
    versions = ", ".join(f"{name} {version or 'is missing'}" for name, version in found.versions.items())
    has = (
        "cannot be read here"
        if found.instructions is None
        else " ".join(found.instructions) or "none of those that count"
    )
    loader = "`import torch` arms it" if found.loader else "`import wina_convert` arms it"
    rows = [["device", "dtype", "rows", "computed by"]]
    rows += [[one.device, one.dtype, one.rows, one.by] for one in found.kernels]
    reasons = dict.fromkeys(f"  {one.device}, {one.dtype}: {one.why}" for one in found.kernels if one.why)
    lines = [
        f"versions      {versions}",
        f"device        {found.device}",
        f"threads       {found.threads} on {found.cores} cores",
        f"instructions  {has}",
        *(f"memory        {_memory(one)}" for one in found.memory),
        f"loader        {loader}",
        "",
        *table(rows).splitlines(),
        *(["", "why", *reasons] if reasons else []),
        *(["", "advice", *(f"  {one}" for one in found.advice)] if found.advice else []),
    ]
    return "\n".join(printable(line) for line in lines)


def _memory(one: "Memory") -> str:
    speed = "too little is free to measure it" if one.bandwidth is None else f"read at {one.bandwidth / 1e9:.1f} GB/s"
    return f"{one.device} ({one.name}): {size(one.total)}, {size(one.free)} free, {speed}"
