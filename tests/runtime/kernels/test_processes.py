"""The compiled kernels for a few rows on a CPU in processes of their own: threads, forks, imports and the cache on disk."""

import os
import shutil
from pathlib import Path

import pytest

from support.processes import python
from wina_convert.runtime.kernels import machine

pytestmark = pytest.mark.slow

PROBLEMS = """
import os, signal, sys, threading, warnings
import torch
from wina_convert.runtime.kernels import attend, cpu, dense_linear, gated_linear, streaming

def problem(rows, n_in, n_out, dtype):
    generator = torch.Generator().manual_seed(rows)
    x, weight_t, tau = (torch.randn(s, generator=generator) for s in ((rows, n_in), (n_in, n_out), (n_in,)))
    return x.to(dtype), weight_t.to(dtype), tau.abs()

def both(x, weight_t, tau):
    return gated_linear(x, weight_t, tau, None), dense_linear(x, weight_t.t().contiguous(), None)

def exact(x, weight_t, tau):
    return x.double() * (x.double().abs() > tau) @ weight_t.double(), x.double() @ weight_t.double()

def same(found, expected):
    return all(map(torch.equal, found, expected))
"""

CONCURRENT = """
sizes = [(1, 400, 700), (2, 700, 400), (5, 130, 1300), (8, 600, 100)]
problems = [problem(*size, dtype) for size, dtype in zip(sizes, [torch.float32, torch.bfloat16] * 2)]
torch.set_num_threads(2)
expected = [both(*one) for one in problems]
wrong, done = [], []

def work(me):
    for i in range(400):
        choice = (me + i) % 4
        if not same(both(*problems[choice]), expected[choice]):
            wrong.append((me, i))
    done.append(torch.get_num_threads())

workers = [threading.Thread(target=work, args=(me,)) for me in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert not wrong, wrong[:5]
assert done == [2] * 4, done
"""


def test_python_threads_that_call_at_once_get_what_each_gets_alone():
    python(PROBLEMS + CONCURRENT)


FORK = """
one_problem = problem(2, 400, 700, torch.bfloat16)
torch.set_num_threads(1)
alone = both(*one_problem)
torch.set_num_threads(2)
expected = both(*one_problem)
warnings.simplefilter("ignore")  # some Pythons warn of any fork beside threads
if not (child := os.fork()):
    signal.alarm(60)  # ends it, should it wait for threads that it has not inherited
    torch.set_num_threads(1)
    os._exit(0 if all(same(both(*one_problem), alone) for _ in range(20)) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert all(same(both(*one_problem), expected) for _ in range(20))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_with_one_thread_computes_as_its_parent_did():
    python(PROBLEMS + FORK)


LIMITED = """
requested, enter = [], streaming._parallel
streaming._parallel = lambda *call: (requested.append(call[2]), enter(*call))
x, weight_t, tau = problem(3, 400, 700, torch.float32)
both(x, weight_t, tau)
assert set(requested) == {1}, requested  # of OMP_NUM_THREADS
torch.set_num_threads(5)
for found, right in zip(both(x, weight_t, tau), exact(x, weight_t, tau)):
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-4)
assert set(requested[-2:]) == {5}, requested
"""


def test_the_threads_are_those_of_the_environment_and_fewer_than_asked_for_will_do():
    python(PROBLEMS + LIMITED, OMP_NUM_THREADS="1", OMP_THREAD_LIMIT="2")


WITHOUT = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 3, 8, 20, 1):
            x, weight_t, tau = problem(rows, 130, 70, dtype)
            for found, right in zip(both(x, weight_t, tau), exact(x, weight_t, tau)):
                assert found.dtype == dtype
                torch.testing.assert_close(found.double(), right, rtol=torch.finfo(dtype).eps, atol=1e-4)
        assert cpu.compiled(dtype) is None
assert {warning.category for warning in caught} == {RuntimeWarning}, caught
assert 1 <= len(caught) <= 3, [str(warning.message) for warning in caught]
assert all("the compiled CPU kernels do not work here" in str(warning.message) for warning in caught)
assert all("numba" in str(warning.message) for warning in caught)
"""


def test_without_numba_results_are_right_and_a_warning_says_that_they_come_slowly(tmp_path):
    code = "import sys\nsys.modules['numba'] = None\n" + PROBLEMS.replace(", streaming", "") + WITHOUT
    python(code, XDG_CACHE_HOME=str(tmp_path))


def test_importing_the_package_and_the_loader_does_not_import_the_compiler():
    code = "import sys, wina_convert, wina_convert.runtime.loader\n"
    assert python(code + "print({'numba', 'llvmlite'} & set(sys.modules))")[0] == "set()\n"


KEPT = (
    "import logging\nlogging.basicConfig(format='%(message)s', level=logging.INFO)\n"
    + PROBLEMS
    + "both(*problem(1, 3, 5, torch.float32))\nprint('numba' in sys.modules)"
)


def said_and_kept(folder, **env):
    """What a process says of compiling, whether it has imported numba, and the files that it leaves."""
    imported, said = python(KEPT, XDG_CACHE_HOME=str(folder), NUMBA_CACHE_DIR=str(folder), **env)
    lines = [line.split(":")[0].split(" in ")[0] for line in said.splitlines() if "CPU kernel" in line]
    files = {file: file.read_bytes() for file in folder.rglob("*") if file.suffix in (".o", ".nbc")}
    return lines, imported.strip() == "True", files


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """What the first process says and keeps, and where. Shared: copy the folder to change it."""
    folder = tmp_path_factory.mktemp("kept")
    return folder, *said_and_kept(folder)


def test_what_one_process_compiled_the_next_one_reads_from_the_disk_without_the_compiler(first):
    folder, said, imported, files = first
    assert said == [
        "compiling the CPU kernel 'columns' for float32",
        "compiled the CPU kernel 'columns'",
        "compiling the CPU kernel 'dots' for float32",
        "compiled the CPU kernel 'dots'",
    ]
    assert imported
    assert len(files) == 2
    assert said_and_kept(folder) == ([], not machine.PLACEABLE, files)


def test_a_program_without_logging_is_told_once_that_something_is_compiled(tmp_path):
    code = PROBLEMS + "both(*problem(1, 3, 5, torch.float32))"
    _, said = python(code, XDG_CACHE_HOME=str(tmp_path), NUMBA_CACHE_DIR=str(tmp_path))
    assert said == "compiling the CPU kernel 'columns' for float32: some seconds, once for this machine\n"
    assert python(code, XDG_CACHE_HOME=str(tmp_path), NUMBA_CACHE_DIR=str(tmp_path))[1] == ""


@pytest.mark.skipif(not machine.PLACEABLE, reason="numba keeps the code here")
def test_what_is_damaged_or_for_other_options_is_compiled_again(first, tmp_path):
    folder = Path(shutil.copytree(first[0], tmp_path / "kept"))
    files = {folder / file.relative_to(first[0]): content for file, content in first[3].items()}
    damaged = min(files)
    damaged.write_bytes(files[damaged][:-1])
    said, _, again = said_and_kept(folder)
    assert said == ["compiling the CPU kernel 'columns' for float32", "compiled the CPU kernel 'columns'"]
    assert said_and_kept(folder) == ([], False, again)
    assert set(again) == set(files)
    assert len(said_and_kept(folder, NUMBA_CPU_FEATURES="", NUMBA_CPU_NAME="generic")[2]) == 4


# what processors are called by the compiler and can do; float32 in a vector, and whether they convert float16
PROCESSORS = {
    "AVX2": ("haswell", "+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe", 8, True),
    "as virtual machines call it": ("x86-64", "+sse,+sse2", 4, False),
}

OLDER = """
from wina_convert.runtime.kernels import vectors
torch.set_num_threads(2)
half = sys.argv[2] == "True"
for dtype in (torch.float32, torch.bfloat16, *[torch.float16] * half):
    assert cpu.compiled(dtype) is streaming
    for rows, n_in, n_out in ((1, 300, 517), (5, 77, 1030)):
        one = problem(rows, n_in, n_out, dtype)
        for found, right in zip(both(*one), exact(*one)):
            torch.testing.assert_close(found.double(), right, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    query, key, value = torch.randn(1, 8, 1, 72).to(dtype), *torch.randn(2, 1, 4, 50, 72).to(dtype)
    weights = (0.1 * query.double() @ key.double().repeat_interleave(2, 1).mT).softmax(-1)
    right = (weights @ value.double().repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(attend(query, key, value, 0.1).double(), right, rtol=torch.finfo(dtype).eps, atol=1e-5)
assert vectors.LANES == int(sys.argv[1])
if not half:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        one = problem(1, 64, 130, torch.float16)
        for found, right in zip(both(*one), exact(*one)):
            torch.testing.assert_close(found.double(), right, rtol=2 * torch.finfo(torch.float16).eps, atol=1e-4)
    assert "float16 (F16C)" in str(caught[0].message), caught
"""


@pytest.mark.skipif(not machine.PLACEABLE, reason="other processors have other names")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_code_for_older_processors_computes_the_same(processor, tmp_path):
    name, features, lanes, half = PROCESSORS[processor]
    variables = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "XDG_CACHE_HOME": str(tmp_path)}
    python(PROBLEMS + OLDER, lanes, half, **variables)
