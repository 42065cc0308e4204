"""Interrupts, signals and errors at any step of a conversion."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.breaking import failing, patch_call
from support.commands import SMALL, contents, refused, run, succeeded
from support.folders import files_of
from support.interrupting import CALIBRATE, HIDDEN, STEPS, count_layers, interrupt_in_layer
from wina_convert.errors import VerificationError
from wina_convert.format.names import SNAPSHOT

pytestmark = pytest.mark.slow

MODEL = "three layers"  # see support/shared.py


@pytest.mark.parametrize(("step", "call", "finished"), STEPS)
@pytest.mark.parametrize(("keep", "old"), [(True, True), (False, False)], ids=["keep-overwrite", "no-keep-new"])
def test_an_interrupt_at_any_step_keeps_what_was_there(
    step: str,
    call: int,
    finished: bool,
    keep: bool,
    old: bool,
    source: Path,
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if old:
        shutil.copytree(converted, tmp_path / "out")
    before = contents(tmp_path)
    options = (*SMALL, "--quiet", "--overwrite", *(() if keep else ("--no-keep",)))
    with monkeypatch.context() as patched:
        patch_call(patched, step, call, failing(KeyboardInterrupt()))
        result = run(source, "--out", tmp_path / "out", *options)
    assert result.exit_code == 130
    (line,) = result.stderr.strip("\n").splitlines()
    assert line.startswith("error: interrupted; ")
    kept = {name: content for name, content in contents(tmp_path).items() if name.startswith(HIDDEN)}
    assert contents(tmp_path) == before | kept
    if not (keep and finished):
        assert kept == {}
        assert line == "error: interrupted; nothing was left behind"
        return
    assert f"{HIDDEN}/{SNAPSHOT}" in kept
    assert "--resume" in line
    layers = count_layers(monkeypatch)
    succeeded(run(source, "--out", tmp_path / "out", "--resume", *options))
    assert len(layers) < 3
    assert files_of(tmp_path) == {f"out/{name}": content for name, content in files_of(converted).items()}


@pytest.mark.parametrize("layer", [None, 2])
def test_an_error_of_the_conversion_itself_leaves_nothing(
    layer: int | None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layer:
        with monkeypatch.context() as patched:
            interrupt_in_layer(patched, layer)
            assert run(source, "--out", tmp_path / "out", *SMALL).exit_code == 130
    monkeypatch.setattr("wina_convert.conversion.proof.prove", failing(VerificationError("the logits differ")))
    refused(run(source, "--out", tmp_path / "out", "--resume", *SMALL, "--quiet"), "the logits differ")
    assert contents(tmp_path) == {}


@contextmanager
def default_signals() -> Iterator[None]:
    """Signal handlers of a job in the foreground, and at the end those of before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("layer", "left"), [(1, "nothing was left behind"), (2, "--resume")])
def test_a_signal_at_work_is_an_interrupt(
    name: str, layer: int, left: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(*args: Any) -> None:
        signal.raise_signal(getattr(signal, name))

    patch_call(monkeypatch, CALIBRATE, layer, send)
    with default_signals():
        result = run(source, "--out", tmp_path / "out", "--quiet", *SMALL)
    assert result.exit_code == 130
    (line,) = result.stderr.strip("\n").splitlines()
    assert line.startswith("error: interrupted; ")
    assert left in line
    assert [path.name for path in tmp_path.iterdir()] == ([] if layer == 1 else [HIDDEN])


def test_ctrl_c_ends_a_running_program_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wina_convert", tiny, "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [*command, "--samples", "100000", "--seq-len", "8", "--quiet", "--basis", "none"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background has it ignored
    )
    try:
        while not (tmp_path / HIDDEN / "model.safetensors").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, stdout) == (130, ""), stderr
    assert stderr.strip("\n") == "error: interrupted; nothing was left behind"
    assert contents(tmp_path) == {}
