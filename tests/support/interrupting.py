"""Conversions that are interrupted, and what they leave."""

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from support.breaking import failing, patch_call
from wina_convert import convert
from wina_convert.format.names import REPORT
from wina_convert.format.staging import Staging, staged

HIDDEN = ".out.wina-staging"  # for a target named "out"
ASIDE = ".out.wina-replaced"
CALIBRATE = "wina_convert.conversion.layers.calibrate_layer"
CLOCK = "wina_convert.conversion.layers.time"
FAST: dict[str, Any] = {"samples": 8, "seq_len": 32, "batch_size": 24, "basis": "none"}  # SMALL, for Python

# A function of a conversion, at which call of it something happens, and whether a layer is finished by then.
STEPS = [
    ("wina_convert.conversion.layers.write_layers", 1, False),
    (CALIBRATE, 1, False),
    (CALIBRATE, 2, True),
    ("wina_convert.conversion.pipeline.write_config", 1, True),
    ("wina_convert.conversion.pipeline.copy_sidecars", 1, True),
    ("wina_convert.conversion.proof.prove", 1, True),
    ("wina_convert.conversion.card.write_card", 1, True),
    ("wina_convert.conversion.pipeline.write_manifest", 1, True),
]


def interrupt_in_layer(patched: pytest.MonkeyPatch, number: int) -> None:
    """Interrupt the n-th layer that is calibrated from now on."""
    patch_call(patched, CALIBRATE, number, failing(KeyboardInterrupt()))


@contextmanager
def stage(out: Path, identity: dict[str, Any] | None = None, **options: bool) -> Iterator[Staging]:
    """`staged` for a conversion of four layers, finished at the end of the with-block, with a report as all have."""
    how = {"resume": False, "keep": True, "overwrite": False} | options
    with staged(out, {"options": {"seed": 0}} if identity is None else identity, **how) as staging:
        yield staging
        (staging.folder / REPORT).write_text("{}")
        staging.save(4, {})


def fail_after(layers: int, error: BaseException, out: Path, **options: Any) -> None:
    """A conversion that fails when so many layers are finished."""
    with stage(out, **options) as staging:
        (staging.folder / "weights").write_text(f"of {layers} layers")
        if layers:
            staging.save(layers, {"state": torch.arange(3), "other": torch.tensor(0.5, dtype=torch.float64)})
        raise error


def leave_unfinished(out: Path, **options: Any) -> None:
    """What a conversion leaves that was interrupted after two layers."""
    with pytest.raises(KeyboardInterrupt):
        fail_after(2, KeyboardInterrupt(), out, **options)


def interrupted_in_layer(number: int, source: Path, out: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in_layer(patched, number)
        with pytest.raises(KeyboardInterrupt):
            convert(str(source), out, **options)


def count_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by an entry for every layer that is calibrated from now on."""
    layers: list[int] = []
    calibrate_layer = pkgutil.resolve_name(CALIBRATE)

    def counted(*args: Any) -> Any:
        layers.append(1)
        return calibrate_layer(*args)

    monkeypatch.setattr(CALIBRATE, counted)
    return layers
