"""`wina doctor` tells what the kernels would do, from the kernels themselves."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

import wina_convert
from support.commands import run_wina, succeeded
from wina_convert.runtime.kernels import cpu
from wina_convert.verbs import benchmark, doctor
from wina_convert.verbs.doctor import Diagnosis, Kernel, diagnose

pytestmark = pytest.mark.slow


@pytest.fixture
def fresh() -> Iterator[None]:
    """What the kernels have found out about this machine is found out again, in the test and after it."""
    for known in (cpu.compiled, cpu.multiplies):
        known.cache_clear()
    yield
    for known in (cpu.compiled, cpu.multiplies):
        known.cache_clear()


def of(found: Diagnosis, dtype: str, rows: str) -> Kernel:
    (kernel,) = (one for one in found.kernels if (one.device, one.dtype, one.rows) == ("cpu", dtype, rows))
    return kernel


def test_what_is_told_is_what_the_kernels_do():
    found = diagnose()
    assert found.versions["wina-convert"] == wina_convert.__version__
    assert found.versions["torch"] == torch.__version__
    assert found.threads == torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        assert (of(found, name, "1 to 8").by == "compiled kernel") == (cpu.compiled(dtype) is not None)
        widens = dtype is not torch.float32 and not cpu.multiplies(dtype)
        assert (of(found, name, "more").by == "dense product in float32") == widens
    assert set(found.instructions or ()) <= (cpu.instructions() or frozenset())
    assert found.memory[0].total == psutil.virtual_memory().total
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_command_shows_the_same_as_text_and_as_json():
    shown, told = run_wina("doctor"), run_wina("doctor", "--json")
    succeeded(shown)
    succeeded(told)
    found = json.loads(told.stdout)
    assert set(found) == set(Diagnosis.__dataclass_fields__)
    for name, version in found["versions"].items():
        assert f"{name} {version}" in shown.stdout
    for kernel in found["kernels"]:
        words = [kernel["device"], kernel["dtype"], *kernel["rows"].split(), *kernel["by"].split()]
        assert words in [line.split() for line in shown.stdout.splitlines()]
    assert f"threads       {found['threads']} on {found['cores']} cores" in shown.stdout
    assert "read at" in shown.stdout


@pytest.mark.usefixtures("fresh")
def test_kernels_that_do_not_work_are_told_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wina_convert.runtime.kernels.streaming", None)
    monkeypatch.delattr("wina_convert.runtime.kernels.streaming", raising=False)
    found = diagnose()
    for dtype in ("float32", "bfloat16", "float16"):
        kernel = of(found, dtype, "1 to 8")
        assert kernel.by == "torch operations"
        assert "compiled CPU kernels do not work here" in (kernel.why or "")
    (advice,) = (one for one in found.advice if one.startswith("cpu: "))
    assert "streaming" in advice
    assert "torch operations" in run_wina("doctor").stdout


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("flags", ["avx avx2", "avx avx2 avx512f avx512_bf16"])
def test_instructions_decide_and_are_told(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cpuinfo").write_text(f"model name : any\nflags : fpu {flags}\n")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    found = diagnose()
    assert found.instructions == tuple(flags.split())
    kernel = of(found, "bfloat16", "more")
    expected = "dense product" if "avx512_bf16" in flags else "dense product in float32"
    assert kernel.by == expected
    assert kernel.why == (None if "avx512_bf16" in flags else "no instructions for products in bfloat16")


def test_the_speed_of_memory_is_the_median_of_what_was_measured(monkeypatch: pytest.MonkeyPatch):
    times = iter([0.5, 0.25, 4.0, 0.125, 0.25, 0.25, 9.0])
    monkeypatch.setattr(doctor, "seconds", lambda call, memory: call(memory) or next(times))
    assert diagnose().memory[0].bandwidth == benchmark.WORKING_SET / 0.25


def test_memory_of_any_size_is_read_without_the_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "compiled", lambda dtype: None)
    for size in (0, 1, 7, 8, 13):
        benchmark.read(torch.ones(size, 3, dtype=torch.bfloat16))


def test_memory_that_is_not_free_is_not_taken(monkeypatch: pytest.MonkeyPatch):
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert diagnose().memory[0].bandwidth is None
    assert "too little is free" in run_wina("doctor").stdout


@pytest.mark.usefixtures("threads_as_before")
@pytest.mark.parametrize(("threads", "words"), [(1, "1 of 4 cores"), (4, None), (5, "5 threads share 4 cores")])
def test_threads_that_do_not_suit_the_cores_are_told(threads: int, words: str | None, monkeypatch: pytest.MonkeyPatch):
    torch.set_num_threads(threads)
    monkeypatch.setattr(doctor, "_cores", lambda: 4)
    said = [one for one in diagnose().advice if "cores" in one]
    assert [words in one for one in said] == [True] if words else said == []


def test_a_loader_that_is_not_armed_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(doctor.AUTOLOAD, raising=False)
    assert diagnose().loader
    monkeypatch.setenv(doctor.AUTOLOAD, "0")
    found = diagnose()
    assert not found.loader
    assert [one for one in found.advice if "import wina_convert" in one and f"{doctor.AUTOLOAD} is set to 0" in one]
