"""The few calls into NVIDIA's driver that compiled code needs beside torch: load it, launch it, hold a little memory for it."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache

MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
MAX_SHARED_BYTES = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_local = threading.local()


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Launch(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_Pointers = ctypes.c_char_p * 1
_EARLY_AT = ctypes.pointer(_Attribute(PROGRAMMATIC_SERIALIZATION, 0, (1,)))


class DriverError(RuntimeError):
    """The driver is not here, or refused a call."""


def bind(index: int) -> None:
    """Make the context of a GPU current in this thread, the one that torch uses too.

    CUDA's runtime does that with its own first call in a thread; a thread's first call may be ours.
    """
    bound: set[int] = _local.__dict__.setdefault("bound", set())
    if index not in bound:
        _call("cuCtxSetCurrent", _context(index))
        bound.add(index)


def load(code: bytes, name: str, shared: int) -> int:
    """Load compiled code into the current context, for good.

    Args:
        code: cubin, or PTX with a zero byte at its end.
        name: of the kernel in it.
        shared: bytes of dynamic shared memory a launch may ask for.

    Returns:
        the kernel's handle.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with _relaxed():
        _call("cuModuleLoadData", ctypes.byref(module), code)
        _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_BYTES, shared)
    return function.value or 0


def zeros(nbytes: int) -> int:
    """Address of new memory in the current context, zeroed, for good.

    Not torch's: what torch allocates while a graph is captured belongs to the graph's pool.
    """
    address, stream = ctypes.c_uint64(), ctypes.c_void_p()
    with _relaxed():
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        _call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)  # of its own: another may be captured
        _call("cuMemsetD8Async", address, ctypes.c_ubyte(0), ctypes.c_size_t(nbytes), stream)
        _call("cuStreamSynchronize", stream)
        _call("cuStreamDestroy_v2", stream)
    return address.value


def capture_of(stream: int) -> int:
    """A number for the graph that this stream is being captured into, another for each capture."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    arguments = ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    _call("cuStreamGetCaptureInfo_v2", *arguments)
    return number.value


def launch(
    function: int, grid: tuple[int, int], threads: int, shared: int, stream: int, early: bool, arguments: bytes
) -> None:
    """Launch a kernel of one argument.

    Args:
        function: handle from `load`.
        grid: blocks in x and y.
        threads: of a block.
        shared: bytes of dynamic shared memory.
        stream: handle.
        early: it may start while the kernel before it in the stream still runs, for which it waits itself; needs compute
            capability 9.0.
        arguments: the bytes of the kernel's one argument, a struct.

    Raises:
        DriverError: also for what an earlier kernel did wrong.
    """
    config = _config(grid, threads, shared, stream, early)
    status = _launch()(ctypes.byref(config), function, _Pointers(arguments), None)
    if status:
        raise DriverError(_reason("cuLaunchKernelEx", status))


@lru_cache(maxsize=1024)
def _config(grid: tuple[int, int], threads: int, shared: int, stream: int, early: bool) -> _Launch:
    """Kept, because a model launches the same few over and over, and never changed."""
    return _Launch((*grid, 1), (threads, 1, 1), shared, stream, _EARLY_AT, early)


def shared_memory(index: int) -> int:
    """Bytes of shared memory that a block on this GPU may ask for."""
    nbytes = ctypes.c_int()
    _call("cuDeviceGetAttribute", ctypes.byref(nbytes), MAX_SHARED_BYTES, _device(index))
    return nbytes.value


@contextmanager
def _relaxed() -> Iterator[None]:
    """Let this thread allocate and load while a stream is captured; neither becomes part of the graph."""
    mode = ctypes.c_int(RELAXED)
    _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))  # leaves the old mode in `mode`
    try:
        yield
    finally:
        _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


@cache
def _context(index: int) -> ctypes.c_void_p:
    context = ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), _device(index))
    return context


def _device(index: int) -> ctypes.c_int:
    device = ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(device), index)
    return device


@cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"NVIDIA's driver cannot be loaded: {error}") from error


@cache
def _launch() -> "ctypes._NamedFuncPointer":
    function = _library().cuLaunchKernelEx
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return function


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise DriverError(_reason(name, status))


def _reason(name: str, status: int) -> str:
    text = ctypes.c_char_p()
    _library().cuGetErrorString(status, ctypes.byref(text))
    return f"{name}: {(text.value or b'unknown error').decode()} ({status})"
