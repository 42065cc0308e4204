"""Machine code of the CPU kernels, placed into memory or left to numba."""

import numba
import pytest
import torch

from support.products import DTYPES, problem
from wina_convert.runtime.kernels import kept, machine, streaming

pytestmark = pytest.mark.slow
placed = pytest.mark.skipif(not machine.PLACEABLE, reason="numba loads the code here")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path / "wina-convert" / "cpu"


def bits(monkeypatch, dtype, address=machine.address.__wrapped__):
    """What code that is loaded anew gives: [4, 95] and [4, 95]."""
    x, weight_t, tau, bias = problem(12, (4,), 300, 95, dtype)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "address", address)
        return torch.stack(
            [streaming.columns(x, weight_t, tau, bias), streaming.dots(x, weight_t.t().contiguous(), bias)]
        )


@placed
@pytest.mark.parametrize("dtype", DTYPES)
def test_code_placed_from_the_disk_computes_what_numba_loads(folder, dtype, monkeypatch):
    expected = bits(monkeypatch, dtype)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_compiled", None)  # it is kept now
        assert torch.equal(bits(monkeypatch, dtype), expected)
    monkeypatch.setattr(machine, "PLACEABLE", False)
    assert torch.equal(bits(monkeypatch, dtype), expected)


@placed
def test_where_nothing_can_be_kept_each_process_compiles(tmp_path, monkeypatch):
    expected = bits(monkeypatch, torch.float32, machine.address)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert torch.equal(bits(monkeypatch, torch.float32), expected)


@placed
def test_code_that_refers_in_another_way_is_left_to_numba(folder, monkeypatch):
    expected = bits(monkeypatch, torch.float32)
    name, _, code = kept.read(next(folder.iterdir())).partition(b"\0")
    monkeypatch.setattr(machine, "ABSOLUTE", 2)
    with pytest.raises(OSError, match="a reference of kind 1"):
        machine.place(code, name)
    assert torch.equal(bits(monkeypatch, torch.float32), expected)


def test_code_that_no_folder_can_hold_is_compiled_for_this_process(monkeypatch):
    expected = bits(monkeypatch, torch.float32, machine.address)
    compile = numba.cfunc

    def cfunc(signature: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile(signature, **options)

    monkeypatch.setattr(machine, "PLACEABLE", False)
    monkeypatch.setattr(numba, "cfunc", cfunc)
    assert torch.equal(bits(monkeypatch, torch.float32), expected)
