"""The threads of the CPU kernels: those of torch's own OpenMP runtime."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

CALLED = ("GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")  # by the kernels, as wina_GOMP_barrier ...


@cache
def openmp() -> dict[str, Any]:
    """The entry into a parallel region of the OpenMP runtime that torch is linked with, and addresses of what `CALLED` names.

    Raises:
        OSError, AttributeError: torch has no such runtime here.
    """
    library = next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))), Path("libtorch_cpu"))
    runtime = ctypes.CDLL(str(library))  # symbols are looked up in the libraries it is linked with as well
    parallel = runtime.GOMP_parallel  # a call releases the interpreter lock
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint], None
    return {"GOMP_parallel": parallel, **{name: at(getattr(runtime, name)) for name in CALLED}}


def at(function: Any) -> int:
    """Address of a function of a library."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
