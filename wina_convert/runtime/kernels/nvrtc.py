"""CUDA C++ to machine code at run time, by the NVRTC that comes with torch, kept on disk between processes.

No toolkit, compiler or header is needed on the machine, and for compiling alone no GPU either.
"""

import ctypes
import hashlib
import importlib
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from . import kept

_lock = threading.Lock()


class NvrtcError(RuntimeError):
    """NVRTC is not here, or refuses the source."""


def compiled(source: str, arch: int, macros: dict[str, int]) -> bytes:
    """The code of `source` for a GPU: from the disk, or compiled now and left there.

    Args:
        source: CUDA C++ without includes.
        arch: compute capability of the GPU without the dot: 80, 90, 120.
        macros: definitions that select a variant of the source.

    Returns:
        machine code (cubin); for a GPU that this NVRTC does not know yet, PTX of the newest it knows: the driver translates it.

    Raises:
        NvrtcError: NVRTC is not here, knows no GPU as old as this, or refuses the source.
    """
    known = [other for other in architectures() if other <= arch]
    if not known:
        raise NvrtcError(f"NVRTC {version()} does not compile for compute capability {arch / 10:.1f}")
    target = f"sm_{arch}" if arch in known else f"compute_{max(known)}"
    options = [f"--gpu-architecture={target}", "--std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]
    key = hashlib.sha256("\0".join([source, version(), *options]).encode()).hexdigest()
    path = kept.folder("cuda") / f"{key[:40]}.{'cubin' if arch in known else 'ptx'}"
    code = kept.read(path)
    if code is None:
        code, _ = compile_source(source, options)
        kept.write(path, code)
    return code


def compile_source(source: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Compile, without the disk.

    Args:
        source: CUDA C++ without includes.
        options: of NVRTC; `--gpu-architecture=sm_90` gives machine code, `compute_90` PTX.

    Returns:
        the code, PTX with a zero byte at its end; and what the compiler said.

    Raises:
        NvrtcError: NVRTC is not here, or refuses the source.
    """
    nvrtc = _library()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"source.cu", 0, None, None))
    try:
        arguments = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
        _check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        log = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        said = log.value.decode(errors="replace").strip()
        if status:
            raise NvrtcError(said or _reason(status))
        kind = "CUBIN" if any("sm_" in option for option in options) else "PTX"
        _check(getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _check(getattr(nvrtc, f"nvrtcGet{kind}")(program, code))
        return code.raw, said
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def version() -> str:
    """Version of this NVRTC, major and minor."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


@cache
def architectures() -> tuple[int, ...]:
    """The compute capabilities this NVRTC compiles for, without the dot, ascending."""
    count = ctypes.c_int()
    _check(_library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _check(_library().nvrtcGetSupportedArchs(found))
    return tuple(sorted(found))


def _library() -> ctypes.CDLL:
    """NVRTC, loaded once. The lock: two threads that load it at once would both look for its built-ins."""
    with _lock:
        return _load()


@cache
def _load() -> ctypes.CDLL:
    """The NVRTC of the CUDA version torch was built for, from the wheels it depends on or from the system; else any in wheels."""
    major = (torch.version.cuda or "").split(".")[0]
    name = f"libnvrtc.so.{major or '[0-9]*'}"
    try:  # a namespace: each of NVIDIA's wheels adds a folder
        roots = [Path(root) for root in importlib.import_module("nvidia").__path__]
    except ImportError:
        roots = []
    path = next((path for root in roots for path in sorted(root.glob(f"*/lib/{name}"), reverse=True)), None)
    try:
        if path is None:
            if not major:
                raise NvrtcError(
                    "NVRTC is missing; it comes with torch for CUDA, or with `pip install nvidia-cuda-nvrtc`"
                )
            return ctypes.CDLL(name)
        # NVRTC opens the file of its built-ins by bare name, which is found only if it is loaded already.
        for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NvrtcError(f"NVRTC cannot be loaded: {error}") from error


def _check(status: int) -> None:
    if status:
        raise NvrtcError(_reason(status))


def _reason(status: int) -> str:
    text = _library().nvrtcGetErrorString
    text.restype = ctypes.c_char_p
    return f"NVRTC error {status} ({(text(status) or b'').decode()})"
