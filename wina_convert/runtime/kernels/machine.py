"""Machine code of the CPU kernels: compiled once a machine, then read from the disk without the compiler.

On Linux on x86-64 the object file that LLVM made is kept and placed into memory here: no linker is needed, as all its
addresses are absolute. Elsewhere numba keeps its own files and loads them, for which it must be imported.
"""

import ctypes
import hashlib
import logging
import mmap
import os
import platform
import struct
import sys
from functools import cache
from importlib.metadata import version
from itertools import chain, repeat
from pathlib import Path
from time import perf_counter
from typing import Any

from . import kept
from .openmp import at, openmp

SOURCES = ("bodies.py", "vectors.py", "task.py")  # what the code is made from
OPTIONS = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT")  # environment variables that change it
CPUINFO = Path("/proc/cpuinfo")
PROCESSOR = ("vendor_id", "cpu family", "model", "flags")  # what of it the code is for, as Linux calls it

PLACEABLE = sys.platform == "linux" and platform.machine() == "x86_64" and struct.calcsize("P") == 8

# Of ELF: kinds of sections, the flag of those that are needed in memory, and the one kind of reference.
SYMBOLS, REFERENCES, EMPTY, UNWINDING = 2, 4, 8, 0x70000001
NEEDED = 2
ABSOLUTE = 1

_log = logging.getLogger(__name__)
_levels = chain([logging.WARNING], repeat(logging.INFO))  # of what is said before each compilation
_alive: list[Any] = []  # the code lives as long as these


@cache
def address(kernel: str, dtype: str, rows: int = 0) -> int:
    """Address of a kernel's machine code, by name and dtype; `rows`: of x, 0 where the code takes any number."""
    if PLACEABLE:
        path = kept.folder("cpu") / f"{_key()}-{kernel}-{dtype}-{rows}.o"
        stored = kept.read(path)
        if stored is None:
            made = _compiled(kernel, dtype, rows, keep=False)
            stored = made._wrapper_name.encode() + b"\0" + made._library._get_compiled_object()
            kept.write(path, stored)
        name, _, code = stored.partition(b"\0")
        try:
            return place(code, name)
        except OSError as error:
            _log.info("the CPU kernel %r is left to numba: %s", kernel, error)
    made = _compiled(kernel, dtype, rows, keep=True)
    _alive.append(made)
    return int(made.address)


def place(code: bytes, name: bytes) -> int:
    """Address of the function `name` of an object file (ELF, x86-64), whose sections are placed into memory.

    Raises:
        OSError: it refers to something in another way than by its address, or memory may not hold code here.
    """
    (table,), (_, count) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<HH", code, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, table + 64 * number) for number in range(count)]
    places, end = {}, 0
    for number, (_, kind, flags, _, _, size, _, _, align, _) in enumerate(sections):
        if flags & NEEDED and kind != UNWINDING:
            places[number] = -(-end // max(align, 1)) * max(align, 1)
            end = places[number] + size
    memory = mmap.mmap(-1, max(end, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for number, place in places.items():
        _, kind, _, _, offset, size, *_ = sections[number]
        memory[place : place + size] = bytes(size) if kind == EMPTY else code[offset : offset + size]
    symbols = next(section for section in sections if section[1] == SYMBOLS)
    names = sections[symbols[6]][4]

    def found(number: int) -> tuple[bytes, int]:
        start, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", code, symbols[4] + 24 * number)
        text = code[names + start : code.index(b"\0", names + start)]
        return text, base + places[section] + value if section in places else 0

    for _, kind, _, _, offset, size, _, target, _, _ in sections:
        if kind == REFERENCES and target in places:
            for entry in range(offset, offset + size, 24):
                where, what, added = struct.unpack_from("<QQq", code, entry)
                if what & 0xFFFFFFFF != ABSOLUTE:
                    raise OSError(f"the compiled code has a reference of kind {what & 0xFFFFFFFF}")
                text, inside = found(what >> 32)
                struct.pack_into("<Q", memory, places[target] + where, (inside or _outside(text.decode())) + added)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(base), ctypes.c_size_t(len(memory)), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "memory may not hold code here")
    _alive.append(memory)
    entries = dict(found(number) for number in range(symbols[5] // 24))
    return entries[name]


def _compiled(kernel: str, dtype: str, rows: int, keep: bool) -> Any:
    """numba's object of a kernel; the arguments are those of `bodies.compiled`."""
    begin = perf_counter()
    # Once in a process in a way that shows where a program has set up no logging: what follows are seconds of silence.
    _log.log(next(_levels), "compiling the CPU kernel %r for %s: some seconds, once for this machine", kernel, dtype)
    from . import bodies

    made = bodies.compiled(kernel, dtype, rows, keep)
    _log.info("compiled the CPU kernel %r in %.1f s", kernel, perf_counter() - begin)
    return made


@cache
def _key() -> str:
    """What the code depends on: its sources, the compiler, the processor."""
    parts = [(Path(__file__).parent / name).read_text("utf-8") for name in SOURCES]
    parts += [version("numba"), version("llvmlite"), *(os.environ.get(option, "") for option in OPTIONS)]
    for line in CPUINFO.read_text("utf-8", "replace").split("\n\n")[0].splitlines():
        if line.partition(":")[0].strip() in PROCESSOR:
            parts.append(line)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _outside(name: str) -> int:
    """Address of what the code refers to and does not hold."""
    if name.startswith("wina_"):
        return int(openmp()[name.removeprefix("wina_")])
    process = ctypes.CDLL(None)
    # numba's own functions only serve errors, of which these kernels have none.
    return at(getattr(process, name, process.abort))
