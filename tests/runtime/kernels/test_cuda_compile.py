"""The GPU kernel compiled by NVRTC, which needs no GPU; and what is kept of it on disk."""

import ctypes
import re
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from wina_convert.runtime.kernels import cuda, nvrtc

pytestmark = pytest.mark.slow

SOURCE = Path(cuda.__file__).with_name("gated.cu").read_text()
VARIANTS = list(product(cuda.TYPES.values(), range(1, cuda.ROWS + 1), cuda.LANES, [True, False]))


@pytest.fixture(autouse=True)
def _needs_nvrtc():
    try:
        nvrtc.version()
    except nvrtc.NvrtcError as error:
        pytest.skip(f"{error}")


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "wina-convert" / "cuda"


def options(target: str, variant: tuple[int, int, int, bool], *more: str) -> list[str]:
    macros = [f"-D{name}={value}" for name, value in cuda.macros(*variant).items()]
    return [f"--gpu-architecture={target}", "--std=c++17", *macros, *more]


@cache
def compiled(variant: tuple[int, int, int, bool], arch: int) -> tuple[str, str]:
    """PTX for a card, and what the compiler said."""
    code, said = nvrtc.compile_source(SOURCE, options(f"compute_{arch}", variant))
    return code.decode(), said


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_compiles_for_the_oldest_card_without_a_warning(variant):
    code, said = compiled(variant, cuda.OLDEST)
    assert ".entry gated(" in code
    assert said == ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_added_without_atomics_and_the_only_one_counts_arrivals(variant):
    code, _ = compiled(variant, cuda.OLDEST)
    assert re.findall(r"\b(?:atom|red)\.\S+", code) == ["atom.acq_rel.gpu.global.add.u32"]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[3]])
def test_aligned_weights_are_read_sixteen_bytes_at_a_time(variant):
    loads = re.findall(r"ld\.global\.nc\.L1::no_allocate\S*", compiled(variant, cuda.OLDEST)[0])
    assert loads == ["ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32"] * 8


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_machine_code_for_one_row_keeps_everything_in_registers(arch):
    if arch not in nvrtc.architectures():
        pytest.skip(f"NVRTC {nvrtc.version()} does not compile for {arch}")
    for dtype in cuda.TYPES.values():
        flags = options(f"sm_{arch}", (dtype, 1, 32, True), "--ptxas-options=-v")
        code, said = nvrtc.compile_source(SOURCE, flags)
        assert code.startswith(b"\x7fELF")
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
        static = int(re.search(r"(\d+) bytes smem", said)[1])
        assert static <= cuda.STATIC


@pytest.mark.parametrize(("arch", "waits"), [(80, False), (89, False), (90, True), (120, True)])
def test_where_launches_overlap_nothing_is_read_before_the_wait(arch, waits):
    if arch not in nvrtc.architectures():
        pytest.skip(f"NVRTC {nvrtc.version()} does not compile for {arch}")
    for variant in VARIANTS:
        code, _ = compiled(variant, arch)
        body = code[code.index(".entry gated(") :]
        before, wait, after = body.partition("griddepcontrol.wait")
        assert bool(wait) == waits
        if waits:
            assert not re.search(r"\b(?:ld|st|atom)\.global", before)
            assert "griddepcontrol.launch_dependents" in after
            assert not re.search(r"ld\.global\.nc\.(?!L1::no_allocate)", body)  # x may be stale in the first cache


def test_the_kernel_and_the_host_agree_on_the_size_of_its_arguments():
    size = int(re.search(r"\.param .align 8 \.b8 gated_param_0\[(\d+)\]", compiled(VARIANTS[0], cuda.OLDEST)[0])[1])
    constant, call = cuda._pack_constant(*[0] * (5 * cuda.MATRICES + 4)), cuda._pack_call(*[0] * (3 + cuda.MATRICES))
    assert len(constant + call) == size


def test_code_is_compiled_once_and_read_from_the_disk_after_that(cache_folder, monkeypatch):
    first = nvrtc.compiled(SOURCE, 90, cuda.macros(*VARIANTS[0]))
    (path,) = cache_folder.iterdir()
    assert path.suffix == ".cubin"
    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.compiled(SOURCE, 90, cuda.macros(*VARIANTS[0])) == first


def test_another_variant_card_source_or_compiler_is_another_file(cache_folder, monkeypatch):
    nvrtc.compiled(SOURCE, 90, cuda.macros(*VARIANTS[0]))
    nvrtc.compiled(SOURCE, 90, cuda.macros(*VARIANTS[1]))
    nvrtc.compiled(SOURCE, 80, cuda.macros(*VARIANTS[0]))
    nvrtc.compiled(SOURCE + "\n", 90, cuda.macros(*VARIANTS[0]))
    monkeypatch.setattr(nvrtc, "version", lambda: "0.1")
    nvrtc.compiled(SOURCE, 90, cuda.macros(*VARIANTS[0]))
    assert len(list(cache_folder.iterdir())) == 5


@pytest.mark.parametrize("damage", [lambda code: code[:100], lambda code: b"", lambda code: code[:-1] + b"?"])
def test_a_damaged_file_is_compiled_anew(damage, cache_folder):
    first = nvrtc.compiled(SOURCE, 90, cuda.macros(*VARIANTS[0]))
    (path,) = cache_folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert nvrtc.compiled(SOURCE, 90, cuda.macros(*VARIANTS[0])) == first
    assert path.read_bytes() == whole


def test_where_nothing_can_be_written_code_is_compiled_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert nvrtc.compiled(SOURCE, 90, cuda.macros(*VARIANTS[0])).startswith(b"\x7fELF")


def test_a_card_that_this_nvrtc_does_not_know_yet_gets_ptx(cache_folder, monkeypatch):
    monkeypatch.setattr(nvrtc, "architectures", lambda: (80, 90))
    code = nvrtc.compiled(SOURCE, 100, cuda.macros(*VARIANTS[0]))
    assert b".target sm_90" in code
    assert code.endswith(b"\0")
    assert [path.suffix for path in cache_folder.iterdir()] == [".ptx"]


def test_a_card_too_old_for_this_nvrtc_is_refused(monkeypatch):
    monkeypatch.setattr(nvrtc, "architectures", lambda: (90,))
    with pytest.raises(nvrtc.NvrtcError, match=r"does not compile for compute capability 8\.0"):
        nvrtc.compiled(SOURCE, 80, cuda.macros(*VARIANTS[0]))


def test_a_source_that_does_not_compile_is_refused_with_what_the_compiler_says():
    with pytest.raises(nvrtc.NvrtcError, match='identifier "nothing" is undefined'):
        nvrtc.compile_source("__global__ void f() { nothing(); }", ["--gpu-architecture=compute_80"])


def test_a_machine_without_nvrtc_is_told_where_it_comes_from(monkeypatch):
    nvrtc._load.cache_clear()
    monkeypatch.setattr(nvrtc.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    monkeypatch.setattr(nvrtc.torch.version, "cuda", None)
    with pytest.raises(nvrtc.NvrtcError, match="pip install nvidia-cuda-nvrtc"):
        nvrtc._library()
    monkeypatch.setattr(nvrtc.torch.version, "cuda", "1.0")
    with pytest.raises(nvrtc.NvrtcError, match=r"cannot be loaded.*libnvrtc\.so\.1"):
        nvrtc._library()


def test_the_library_is_loaded_once():
    assert nvrtc._library() is nvrtc._library()
    assert isinstance(nvrtc._library(), ctypes.CDLL)
