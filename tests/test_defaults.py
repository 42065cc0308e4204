"""What a program set in torch for itself changes no result: default dtype and device, gradients off, inference mode."""

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import wina_convert
from support.families import make_model
from support.folders import files_of
from support.processes import python
from support.products import DTYPES, problem
from wina_convert.defaults import torch_defaults
from wina_convert.fitting import fit_basis
from wina_convert.runtime.kernels import cpu, dense_linear, gated_linear, streaming
from wina_convert.runtime.linear import gated_modules
from wina_convert.verbs.bench import bench_model
from wina_convert.verbs.bench_products import bench_products
from wina_convert.verbs.evaluate import evaluate
from wina_convert.verbs.generate import generate
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.verify import verify_folder

pytestmark = pytest.mark.slow

MODEL = "one layer"  # see support/shared.py
PROMPT = torch.tensor([[1, 310, 7, 1999, 45]])


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "gradients off": torch.no_grad,
    "inference mode": torch.inference_mode,
}


@pytest.fixture(params=SETTINGS)
def strange(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """A context in which torch is not as it starts."""
    return SETTINGS[request.param]


def state() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


def test_torch_is_as_it_starts_within_and_as_it_was_after(strange):
    usual = state()
    with strange():
        unusual = state()
        assert unusual != usual
        with torch_defaults():
            assert state() == usual
        assert state() == unusual
        with pytest.raises(ZeroDivisionError), torch_defaults():
            raise ZeroDivisionError
        assert state() == unusual
    assert state() == usual


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_kernels_are_found_to_work_and_give_the_same_bits(dtype, strange):
    x, weight_t, tau, bias = problem(1, (3,), 40, 30, dtype)
    weight = weight_t.t().contiguous()
    expected = gated_linear(x, weight_t, tau, bias), dense_linear(x, weight, bias)
    many = gated_linear(x.repeat(5, 1), weight_t, tau, bias)
    cpu.compiled.cache_clear()

    def check() -> None:  # on a thread of its own, which has no scratch memory yet
        with strange():
            found.extend([gated_linear(x, weight_t, tau, bias), dense_linear(x, weight, bias)])
            found.append(gated_linear(x.repeat(5, 1), weight_t, tau, bias))
            streaming.read(weight_t)

    found: list[Tensor] = []
    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert cpu.compiled(dtype) is streaming
    assert all(map(torch.equal, found, (*expected, many)))


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=["as stored", "bfloat16"])
def test_a_model_is_loaded_and_set_and_computes_the_same(options, strange, converted):
    def run() -> list[Tensor]:
        model = wina_convert.load(str(converted), **options)
        logits = []
        for sparsity in (0.5, 0.3):
            wina_convert.set_sparsity(model, sparsity)
            with torch.no_grad():  # where a gradient is recorded, the dense head is computed by torch
                logits += [model(PROMPT).logits, model(PROMPT[:, :1]).logits]
        models.append(model)
        return [*logits, *model.state_dict().values(), *(gate.tau for gate in gated_modules(model).values())]

    models: list[Any] = []
    expected = run()
    with strange():
        found = run()
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)
    x = torch.randn(1, 3, models[1].config.hidden_size, generator=torch.Generator().manual_seed(1)).to(models[1].dtype)
    next(iter(gated_modules(models[1]).values()))(x.requires_grad_()).sum().backward()  # whatever it was loaded in
    assert x.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_transformers_loads_and_generates_the_same_whatever_the_default_dtype(dtype, converted):
    def run() -> list[Tensor]:
        model = AutoModelForCausalLM.from_pretrained(converted)
        new = model.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        return [new, model(PROMPT).logits, *model.state_dict().values()]

    expected = run()
    with default_dtype(dtype):
        found = run()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files that a conversion writes where torch is as it starts; each conversion is made once."""

    @functools.cache
    def write(source: Path, basis: str) -> dict[str, bytes]:
        out = tmp_path_factory.mktemp("usual") / "out"
        wina_convert.convert(str(source), out, samples=4, seq_len=32, basis=basis)
        return files_of(out)

    return write


@pytest.mark.parametrize("basis", ["none", "fitted"])
def test_a_conversion_writes_the_same_bytes(basis, strange, source, written, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_basis, "STEPS", fit_basis.FEWEST_STEPS)
    expected = written(source, basis)
    with strange():
        wina_convert.convert(str(source), tmp_path / "strange", samples=4, seq_len=32, basis=basis)
    assert files_of(tmp_path / "strange") == expected


def test_the_verbs_find_the_same(strange, source, converted, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"In year {year} there were {year % 7} of them.\n" for year in range(60)))

    def run() -> list[Any]:
        plan = copy.deepcopy(wina_convert.convert(str(source), tmp_path / "none", dry_run=True))
        plan.pop("seconds", None)
        return [
            generate(str(converted), "Once", max_new_tokens=4).text,
            generate(str(converted), "Once", max_new_tokens=4, temperature=1.0, seed=3).text,
            evaluate([str(converted)], [str(text)], (0.5,), str(source), 5, 16),
            inspect_checkpoint(converted),
            verify_folder(converted),
            sorted(plan),
        ]

    expected = run()
    with strange():
        assert run() == expected


def test_benchmarks_time_the_same_work(strange, converted, monkeypatch):
    from wina_convert.verbs import benchmark

    monkeypatch.setattr(benchmark, "WORKING_SET", 1 << 20)

    def run() -> list[Any]:
        models = bench_model(str(converted), prompt_tokens=4, tokens=2, repeats=1).models
        products = bench_products(((64, 32),), dtype="float32", repeats=2).products
        return [(row.sparsity, row.achieved, row.bytes_per_token) for row in models] + [
            row.sparsity for row in products
        ]

    expected = run()
    with strange():
        assert run() == expected


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A model with rotary frequencies of two kinds and sliding windows."""
    return make_model("gemma3_text", tmp_path_factory.mktemp("gemma") / "dense")


def test_rotary_frequencies_and_masks_which_no_folder_holds_are_the_same(strange, gemma, written, tmp_path: Path):
    with strange():
        wina_convert.convert(str(gemma), tmp_path / "strange", samples=4, seq_len=32, basis="none")
    assert files_of(tmp_path / "strange") == written(gemma, "none")


PROCESS = """
import sys, torch
torch.set_default_dtype(torch.bfloat16)
torch.set_default_device("meta")
torch.set_grad_enabled(False)
import wina_convert
from wina_convert.runtime.kernels import cpu
model = wina_convert.load(sys.argv[1])
print(model(torch.tensor([[1, 310, 7, 1999, 45]], device="cpu")).logits.double().sum().item())
assert cpu.compiled(model.dtype)
"""


def test_what_is_set_before_the_package_is_imported_changes_nothing(converted):
    with torch.no_grad():
        expected = wina_convert.load(str(converted))(PROMPT).logits.double().sum().item()
    assert python(PROCESS, converted)[0] == f"{expected}\n"
