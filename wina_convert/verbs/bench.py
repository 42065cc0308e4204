"""`wina bench`: the gated model against the dense one on this machine, and single products against memory bandwidth.

Everything compared is timed in turns in one process and given as medians, so that a busy machine disturbs all alike.
"""

import copy
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..format.checkpoint import open_checkpoint
from ..format.config import WinaConfig, check_sparsity
from ..format.dtypes import FLOATS, check_dtype
from ..errors import OptionError
from ..progress import Progress, silent
from ..runtime import attention
from ..runtime.kernels import cpu, gated_linear
from ..runtime.linear import DenseLinear, WinaLinear, gated_modules
from ..runtime.loader import install, load, set_sparsity
from ..runtime.rule import column_norms, dropped, scores

SPARSITIES = (0.0, 0.5, 0.65)
# hidden, layers, intermediate, heads, key-value heads, tied head: those of Llama 3.2 1B and 3B and of Llama 3 8B
RANDOM = {
    "1b": (2048, 16, 8192, 32, 8, True),
    "3b": (3072, 28, 8192, 24, 8, True),
    "8b": (4096, 32, 14336, 32, 8, False),
}
VOCABULARY = 128256
SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096), (2048, 8192), (8192, 2048), (2048, 2048), (2048, 512))
COUNTED = 8  # tokens, at most, over which the bytes that one reads are averaged
WORKING_SET = 1 << 28  # bytes that products and reads cycle through, so that no cache holds them


@dataclass(frozen=True)
class Speed:
    """One model at one sparsity.

    Attributes:
        sparsity: asked; None: the dense model.
        achieved: fraction of the gated weights' inputs skipped while decoding.
        prefill_seconds: median time of the prompt.
        prefill_ratio: the dense model's over it.
        decode_seconds: median time of a token.
        tokens_per_second: its inverse.
        ratio: the dense model's time of a token over it.
        bytes_per_token: bytes of weights and cutoffs read for a token.
        roofline: the time that these bytes take at the measured bandwidth, over the time of a token.
    """

    sparsity: float | None
    achieved: float | None
    prefill_seconds: float
    prefill_ratio: float
    decode_seconds: float
    tokens_per_second: float
    ratio: float
    bytes_per_token: int
    roofline: float


@dataclass(frozen=True)
class ProductSpeed:
    """One product y = W x at one sparsity.

    Attributes:
        in_features, out_features: of W.
        sparsity: None: the dense product of torch.
        seconds: median time.
        ratio: the dense product's time over it.
        bandwidth: bytes a second of the weights it reads.
        roofline: that over the measured bandwidth.
    """

    in_features: int
    out_features: int
    sparsity: float | None
    seconds: float
    ratio: float
    bandwidth: float
    roofline: float


@dataclass(frozen=True)
class Benchmark:
    """What was measured, and where.

    Attributes:
        machine: processor, threads, versions.
        date: the day.
        model: name, dtype and prompt, or the dtype of single products.
        bandwidth: bytes a second at which memory was read, median.
        interleaved: whether the dense and the gated model were timed in turns; else one after the other.
        models: the dense model, then the gated one at each sparsity; empty for single products.
        products: for each shape the dense product, then the gated one at each sparsity; empty for a model.
    """

    machine: str
    date: str
    model: str
    bandwidth: float
    interleaved: bool
    models: tuple[Speed, ...] = ()
    products: tuple[ProductSpeed, ...] = ()


@dataclass
class _Clock:
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def bench_model(
    folder: str | None = None,
    *,
    random: str | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    prompt_tokens: int = 512,
    tokens: int = 32,
    repeats: int = 3,
    dtype: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> Benchmark:
    """Time prompt and decoding at batch 1 of a gated model and of the dense model with the same weights.

    Args:
        folder: a WINA checkpoint.
        random: instead of it, a Llama shape with random weights: "1b", "3b" or "8b".
        sparsities: at which to run the gated model.
        prompt_tokens: length of the prompt.
        tokens: tokens decoded after it, of which the median time counts.
        repeats: times the prompt is run, of which the median counts.
        dtype: "auto" (as stored; bfloat16 if random), "float32", "bfloat16" or "float16".
        seed: of prompt and random weights.
        progress: shows how far it is.

    Raises:
        OptionError: an option cannot be used.
        CheckpointError: the folder is not a WINA checkpoint.
    """
    if (folder is None) == (random is None):
        raise OptionError(f"give either a checkpoint or a random model ({', '.join(RANDOM)})")
    for value, name in ((prompt_tokens, "prompt tokens"), (tokens, "tokens"), (repeats, "repeats")):
        if value < 1:
            raise OptionError(f"{name} is {value}; give at least 1")
    asked = [check_sparsity(sparsity) for sparsity in dict.fromkeys(sparsities)]
    check_dtype(dtype)
    torch.manual_seed(seed)
    if folder is not None:
        name = open_checkpoint(folder).source.name  # before the load: it says more about what is wrong
        gated = load(folder, dtype=dtype)
    else:
        gated, name = random_model(str(random), "bfloat16" if dtype == "auto" else dtype), f"random {random}"
    longest = getattr(gated.config, "max_position_embeddings", prompt_tokens + tokens)
    if prompt_tokens + tokens > longest:
        raise OptionError(f"{prompt_tokens} prompt tokens and {tokens} more exceed the context of {longest}")
    prompt = torch.randint(gated.config.vocab_size, (1, prompt_tokens))
    if random:
        _fit(gated, prompt, asked)
    loads = {sparsity: _load_per_token(gated, sparsity, prompt, min(tokens, COUNTED)) for sparsity in (None, *asked)}
    weights = sum(module.weight_t.nbytes for module in gated_modules(gated).values())
    interleaved = weights < 0.8 * psutil.virtual_memory().available
    described = f"{name}, {str(gated.dtype).removeprefix('torch.')}, prompt of {prompt_tokens} tokens"
    clocks: dict[float | None, _Clock] = {sparsity: _Clock() for sparsity in (None, *asked)}
    reads: list[float] = []
    with progress("Timing", len(clocks) * (repeats + tokens), "call") as advance:

        def measure(models: dict[float | None, Any]) -> None:
            memory = torch.ones(WORKING_SET, dtype=torch.uint8)
            caches = {}
            for _ in range(repeats):
                for sparsity, model in models.items():
                    seconds, caches[sparsity] = _step(model, sparsity, prompt, None)
                    clocks[sparsity].prefill.append(seconds)
                    advance(1)
            for k in range(tokens):
                reads.append(_seconds(lambda: _read(memory)))
                for sparsity, model in models.items():
                    token = prompt[:, k % prompt_tokens][None]
                    seconds, caches[sparsity] = _step(model, sparsity, token, caches[sparsity])
                    clocks[sparsity].decode.append(seconds)
                    advance(1)

        if interleaved:
            measure({None: make_dense(_sharing_copy(gated)), **dict.fromkeys(asked, gated)})
        else:  # memory does not hold both
            measure(dict.fromkeys(asked, gated))
            measure({None: make_dense(gated)})
    bandwidth = WORKING_SET / median(reads)
    dense = clocks[None]
    rows = []
    for sparsity, clock in clocks.items():
        nbytes, achieved = loads[sparsity]
        decode = median(clock.decode)
        rows.append(
            Speed(
                sparsity=sparsity,
                achieved=achieved,
                prefill_seconds=median(clock.prefill),
                prefill_ratio=median(dense.prefill) / median(clock.prefill),
                decode_seconds=decode,
                tokens_per_second=1 / decode,
                ratio=median(dense.decode) / decode,
                bytes_per_token=nbytes,
                roofline=nbytes / bandwidth / decode,
            )
        )
    return Benchmark(machine(), date.today().isoformat(), described, bandwidth, interleaved, models=tuple(rows))


@torch.inference_mode()
def bench_products(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    dtype: str = "auto",
    repeats: int = 31,
    progress: Progress = silent,
) -> Benchmark:
    """Time single products at batch 1: the dense one of torch and the gated one.

    Args:
        shapes: (inputs, outputs) of each.
        sparsities: fractions of inputs to skip.
        dtype: "auto" (bfloat16), "float32", "bfloat16" or "float16".
        repeats: calls of each, of which the median counts.
        progress: shows how far it is.

    Raises:
        OptionError: an option cannot be used.
    """
    asked = [check_sparsity(sparsity) for sparsity in dict.fromkeys(sparsities)]
    check_dtype(dtype)
    number = FLOATS["bfloat16" if dtype == "auto" else dtype]
    if repeats < 1 or not shapes or any(size < 1 for shape in shapes for size in shape):
        raise OptionError(f"repeats is {repeats} and shapes are {list(shapes)}; give numbers of at least 1")
    timed: list[tuple[int, int, float | None, float, float]] = []  # in, out, sparsity, fraction read, seconds
    bandwidths: dict[tuple[int, int], float] = {}
    with progress("Timing", len(dict.fromkeys(shapes)) * repeats, "turn") as advance:
        for n_in, n_out in dict.fromkeys(shapes):
            copies = max(2, WORKING_SET // (n_in * n_out * number.itemsize))
            # The same memory is [in, out] to the gated product and [out, in] to the dense one.
            memory = (0.02 * torch.randn(n_in * n_out)).to(number).repeat(copies, 1)
            x = torch.randn(1, n_in).to(number)
            kept: dict[float | None, float] = {None: 1.0}
            calls: dict[float | None, Callable[[Tensor], object]] = {None: _dense_call(x, n_out)}
            for sparsity in asked:
                tau = torch.full((n_in,), float(x.abs().float().quantile(sparsity)) if sparsity else -1.0)
                kept[sparsity] = 1 - dropped(x, tau).double().mean().item()
                calls[sparsity] = _gated_call(x, n_out, tau)
            clocks: dict[float | None, list[float]] = {key: [] for key in calls}
            reads = []
            turn = 0
            for _ in range(repeats):
                for key, call in calls.items():
                    clocks[key].append(_seconds(call, memory[turn % copies]))
                    turn += 1
                reads.append(_seconds(_read, memory))
                advance(1)
            bandwidths[n_in, n_out] = memory.nbytes / median(reads)
            timed += [(n_in, n_out, key, kept[key], median(seconds)) for key, seconds in clocks.items()]
    bandwidth = median(bandwidths.values())
    rows = []
    for n_in, n_out, key, fraction, took in timed:
        rate = fraction * n_in * n_out * number.itemsize / took
        dense = next(one[4] for one in timed if one[:3] == (n_in, n_out, None))
        rows.append(ProductSpeed(n_in, n_out, key, took, dense / took, rate, rate / bandwidths[n_in, n_out]))
    described = f"single products, {str(number).removeprefix('torch.')}"
    return Benchmark(machine(), date.today().isoformat(), described, bandwidth, True, products=tuple(rows))


def machine() -> str:
    """This machine in a line: processor, threads, versions."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = (
            line.partition(":")[2].strip() for line in info.read_text("utf-8").splitlines() if "model name" in line
        )
        processor = next(names, processor)
    return (
        f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
    )


def _seconds(call: Callable[..., object], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def _read(memory: Tensor) -> None:
    """Read the memory once, as fast as it can be."""
    if compiled := cpu.compiled(torch.float32):
        compiled.read(memory)
    else:
        memory.flatten().view(torch.uint8).sum(dtype=torch.int64)


def _dense_call(x: Tensor, n_out: int) -> Callable[[Tensor], object]:
    return lambda weight: linear(x, weight.view(n_out, -1))


def _gated_call(x: Tensor, n_out: int, tau: Tensor) -> Callable[[Tensor], object]:
    return lambda weight: gated_linear(x, weight.view(-1, n_out), tau, None)


@torch.inference_mode()
def _step(model: Any, sparsity: float | None, tokens: Tensor, cache: Any) -> tuple[float, Any]:
    """Seconds of one call with the cache of the calls before, and the cache after it."""
    if sparsity is not None:
        set_sparsity(model, sparsity)
    start = time.perf_counter()
    out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    out.logits[0, -1].argmax().item()
    return time.perf_counter() - start, out.past_key_values


@torch.inference_mode()
def _load_per_token(model: Any, sparsity: float | None, prompt: Tensor, tokens: int) -> tuple[int, float | None]:
    """Bytes of weights and cutoffs that a token after the prompt reads, and the fraction of inputs it skips, on average."""
    gates = gated_modules(model).values()
    own = {id(tensor) for module in gates for tensor in (module.weight_t, module.column_norms, module.thresholds)}
    # An embedding is looked up, a row a token, unless it is the head as well.
    head = getattr(model.get_output_embeddings(), "weight", None)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head}
    others = sum(p.nbytes for p in model.parameters() if id(p) not in own | tables)
    weights = sum(module.weight_t.nbytes for module in gates)
    if sparsity is None:
        return others + weights, None
    skipped = 0

    def count(module: WinaLinear, inputs: tuple[Tensor, ...]) -> None:
        nonlocal skipped
        row = module.weight_t.nbytes // module.in_features
        assert module.tau is not None
        skipped += row * int(dropped(inputs[0], module.tau).sum())

    _, cache = _step(model, sparsity, prompt, None)
    handles = [module.register_forward_pre_hook(count) for module in gates]
    for k in range(tokens):
        _, cache = _step(model, sparsity, prompt[:, k % prompt.shape[1]][None], cache)
    for handle in handles:
        handle.remove()
    skipped //= tokens
    cutoffs = sum(4 * module.in_features for module in gates)
    return others + weights - skipped + cutoffs, skipped / weights


def random_model(size: str, dtype: str) -> Any:
    """A gated Llama with random weights and no thresholds yet."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    if size not in RANDOM:
        raise OptionError(f"the random model is {size!r}; give {', '.join(RANDOM)}")
    hidden, layers, intermediate, heads, kv_heads, tied = RANDOM[size]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        dtype=dtype,
    )
    with no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()
    model.tie_weights()
    # Billions of random numbers would take minutes: the same ones over and over, with a period that fits no matrix.
    numbers = 0.02 * torch.randn((1 << 20) + 7)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            flat = parameter.data.view(-1)
            for part in flat.split(len(numbers)):
                part.copy_(numbers[: len(part)])
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and ".layers." in name]
    plain = {name: model.get_submodule(name).weight.data for name in names}
    install(model, WinaConfig(modules=names))
    for name in names:
        gate = model.get_submodule(name)
        gate.weight_t.data = plain.pop(name).t().contiguous()
        gate.column_norms.data = column_norms(gate.weight_t)
        gate.thresholds.data.zero_()
    attention.use(model)
    return model


@torch.inference_mode()
def _fit(model: Any, prompt: Tensor, sparsities: Sequence[float]) -> None:
    """Thresholds from the quantiles of the scores at the end of the prompt, each layer behind the gated ones before it."""
    for sparsity in sorted(sparsities):

        def fit(module: WinaLinear, inputs: tuple[Tensor, ...], sparsity: float = sparsity) -> None:
            grid = torch.tensor(module.grid)
            below = grid < max(point for point in module.grid if point <= sparsity)
            sample = scores(inputs[0][:, -32:], module.column_norms).flatten()
            module.thresholds.data = torch.where(below, module.thresholds, sample.quantile(grid))
            module.thresholds.data[0] = 0
            module.set_sparsity(sparsity)

        handles = [module.register_forward_pre_hook(fit) for module in gated_modules(model).values()]
        model(input_ids=prompt, use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()


def _sharing_copy(model: Any) -> Any:
    """A copy of the modules with the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def make_dense(model: Any) -> Any:
    """The model in place with plain linear modules, as transformers builds them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, WinaLinear):
            plain = nn.Linear(1, 1, bias=False, device="meta")
            plain.in_features, plain.out_features = module.in_features, module.out_features
            plain.weight = nn.Parameter(module.weight_t.t().contiguous(), requires_grad=False)
            plain.register_parameter("bias", module.bias)
            model.set_submodule(name, plain)
        elif isinstance(module, DenseLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
    if model.config._attn_implementation == attention.SDPA:
        model.set_attn_implementation("sdpa")
    return model
