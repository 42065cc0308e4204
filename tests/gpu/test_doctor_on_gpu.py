"""`wina doctor` on a machine with a GPU."""

import pytest
import torch

from wina_convert.runtime.kernels import cuda
from wina_convert.verbs.doctor import diagnose


def test_the_kernels_of_every_gpu_are_told_and_its_memory_measured():
    found = diagnose()
    assert found.device == "cuda"
    for index in range(torch.cuda.device_count()):
        by = {(one.dtype, one.rows): one.by for one in found.kernels if one.device == f"cuda:{index}"}
        assert by == {
            (str(dtype).removeprefix("torch."), rows): how
            for dtype in cuda.TYPES
            for rows, how in (("1 to 2", "compiled kernel"), ("more", "dense product"))
        }
        (memory,) = (one for one in found.memory if one.device == f"cuda:{index}")
        assert memory.name == torch.cuda.get_device_name(index)
        assert memory.total == torch.cuda.get_device_properties(index).total_memory
        assert memory.bandwidth is not None


def test_a_gpu_on_which_the_kernel_does_not_work_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "_cards", {})
    monkeypatch.setattr(cuda, "OLDEST", 1000)
    found = diagnose()
    few = [one for one in found.kernels if one.device == "cuda:0" and one.rows == "1 to 2"]
    assert {one.by for one in few} == {"torch operations"}
    assert "need 100.0" in (few[0].why or "")
    assert [one for one in found.advice if one.startswith("cuda:0: ")]
