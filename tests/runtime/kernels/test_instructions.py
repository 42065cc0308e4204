"""Whether products in half precision are left to torch: decided by what the processor says it can do."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from support.products import check, problem
from wina_convert.runtime.kernels import cpu, gated_linear, reference

X86 = (
    "processor\t: 0\nmodel name\t: Some\nflags\t\t: fpu sse2 avx2 f16c avx512f avx512bw avx512vl avx512dq {}\nbugs\t:\n"
)
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd {}\nCPU part\t: 0xd0c\n"
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The decision for a dtype on a processor with this /proc/cpuinfo, where torch gives this answer for every dtype."""

    def decide(text: str | None, dtype: torch.dtype, torch_says: bool = True) -> bool:
        monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
        if text is not None:
            cpu.CPUINFO.write_text(text)
        answers = dict.fromkeys(("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"), lambda: torch_says)
        monkeypatch.setattr(
            cpu, "torch", SimpleNamespace(**vars(torch) | {"ops": SimpleNamespace(mkldnn=SimpleNamespace(**answers))})
        )
        return cpu.multiplies.__wrapped__(dtype)

    return decide


@pytest.mark.parametrize(
    ("text", "bf16", "fp16"),
    [
        (X86.format(""), False, False),  # Skylake, Cascade Lake: torch says that it multiplies bfloat16
        (X86.format("avx512_vnni"), False, False),
        (X86.format("avx512_bf16"), True, False),  # Cooper Lake, Zen 4
        (X86.format("avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8"), True, True),  # Sapphire Rapids
        (X86.format("amx_fp16"), False, True),
        (X86.format("notavx512_bf16 avx512_bf16ish"), False, False),
        (ARM.format("fphp"), False, False),
        (ARM.format("asimdhp"), False, True),
        (ARM.format("asimdhp sve svebf16 bf16"), True, True),  # Neoverse V1
        ("processor: 0\n", True, True),  # nothing is said: torch's answer holds
        (None, True, True),
    ],
)
def test_the_instructions_of_the_processor_decide(text, bf16, fp16, decide):
    assert decide(text, BF16) is bf16
    assert decide(text, FP16) is fp16
    assert not decide(text, BF16, torch_says=False)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_many_rows_are_computed_in_float32_where_there_are_no_instructions_and_by_torch_where_there_are(
    dtype, monkeypatch
):
    arguments = problem(1, (20,), 65, 130, dtype)
    asked: list[torch.dtype] = []

    def dense(x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
        asked.append(x.dtype)
        return linear(torch.where(x.abs() <= tau, 0, x), weight_t.t(), bias)

    monkeypatch.setattr(reference, "gated_linear", dense)
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)
    check(gated_linear(*arguments), *arguments)
    assert asked == []
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: True)
    check(gated_linear(*arguments), *arguments)
    assert asked == [dtype]
