"""`wina bench`: the gated model against the dense one with the same weights, on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from statistics import median
from time import perf_counter
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..defaults import torch_defaults
from ..errors import OptionError
from ..format.checkpoint import open_checkpoint
from ..format.dtypes import dtype_name
from ..format.experts import shares
from ..format.grid import check_sparsity
from ..progress import Progress, silent
from ..runtime.install import set_sparsity
from ..runtime.linear import WinaLinear, gated_modules, observing
from ..runtime.loader import load
from ..runtime.rule import bytes_read, dropped
from . import benchmark
from .bench_models import RANDOM, fit, make_dense, random_model, sharing_copy
from .benchmark import SPARSITIES, Benchmark, Speed, machine, read, seconds

PROMPT = 512  # tokens, where the context holds as many
COUNTED = 8  # tokens, at most, over which the bytes that one reads are averaged


@dataclass
class _Clock:
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ready:
    """What a benchmark of decoding starts from.

    Attributes:
        gated: the model, with thresholds for what is asked.
        described: name, dtype and prompt.
        asked: the sparsities, each once.
        prompt: [1, prompt tokens], int64, on the model's device.
        loads: for the dense model (None) and each sparsity, bytes that a token reads and the fraction of inputs it skips.
    """

    gated: Any
    described: str
    asked: tuple[float, ...]
    prompt: Tensor
    loads: dict[float | None, tuple[int, float | None]]


@torch_defaults()
def bench_model(
    folder: str | None = None,
    *,
    random: str | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    prompt_tokens: int | None = None,
    tokens: int = 32,
    repeats: int = 3,
    dtype: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> Benchmark:
    """Time prompt and decoding at batch 1 of a gated model and of the dense model with the same weights.

    Args:
        folder: a WINA checkpoint.
        random: instead of it, a Llama shape with random weights: "0.6b", "1b", "3b" or "8b".
        sparsities: at which to run the gated model.
        prompt_tokens: length of the prompt; None: 512, or what the context leaves where that is less.
        tokens: tokens decoded after it, of which the median time counts.
        repeats: times the prompt is run, of which the median counts.
        dtype: "auto" (as stored; bfloat16 if random), "float32", "bfloat16" or "float16".
        seed: of prompt and random weights.
        progress: shows how far it is.

    Raises:
        OptionError: an option cannot be used.
        CheckpointError: the folder is not a WINA checkpoint.
    """
    ready = prepare(folder, random, sparsities, prompt_tokens, tokens, repeats, dtype, seed)
    gated, asked, prompt = ready.gated, ready.asked, ready.prompt
    weights = sum(module.weight_t.nbytes for module in gated_modules(gated).values())
    interleaved = weights < 0.8 * psutil.virtual_memory().available
    clocks: dict[float | None, _Clock] = {sparsity: _Clock() for sparsity in (None, *asked)}
    reads: list[float] = []
    with progress("Timing", len(clocks) * (repeats + tokens), "call") as advance:

        def measure(models: dict[float | None, Any]) -> None:
            memory = torch.ones(benchmark.WORKING_SET, dtype=torch.uint8)
            caches = {}
            for _ in range(repeats):
                for sparsity, model in models.items():
                    took, caches[sparsity] = _step(model, sparsity, prompt, None)
                    clocks[sparsity].prefill.append(took)
                    advance(1)
            for k in range(tokens):
                reads.append(seconds(read, memory))
                for sparsity, model in models.items():
                    token = prompt[:, k % prompt.shape[1]][None]
                    took, caches[sparsity] = _step(model, sparsity, token, caches[sparsity])
                    clocks[sparsity].decode.append(took)
                    advance(1)

        if interleaved:
            measure({None: make_dense(sharing_copy(gated)), **dict.fromkeys(asked, gated)})
        else:  # memory does not hold both
            measure(dict.fromkeys(asked, gated))
            measure({None: make_dense(gated)})
    bandwidth = benchmark.WORKING_SET / median(reads)
    dense = clocks[None]
    rows = []
    for sparsity, clock in clocks.items():
        nbytes, achieved = ready.loads[sparsity]
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
    return Benchmark(machine(), date.today().isoformat(), ready.described, bandwidth, interleaved, models=tuple(rows))


def prepare(
    folder: str | None,
    random: str | None,
    sparsities: Sequence[float],
    prompt_tokens: int | None,
    tokens: int,
    repeats: int,
    dtype: str,
    seed: int,
    device: torch.device | str = "cpu",
) -> Ready:
    """Check the options and make model and prompt on a device; the arguments are those of `bench_model`.

    Raises:
        OptionError: an option cannot be used.
        CheckpointError: the folder is not a WINA checkpoint.
    """
    if (folder is None) == (random is None):
        raise OptionError(f"give either a checkpoint or a random model ({', '.join(RANDOM)})")
    for value, name in ((prompt_tokens, "prompt tokens"), (tokens, "tokens"), (repeats, "repeats")):
        if value is not None and value < 1:
            raise OptionError(f"{name} is {value}; give at least 1")
    asked = tuple([check_sparsity(sparsity) for sparsity in dict.fromkeys(sparsities)])
    dtype = dtype_name(dtype)
    torch.manual_seed(seed)
    if folder is not None:
        name = open_checkpoint(folder).folder.name  # before the load: it says more about what is wrong
        gated = load(folder, dtype=dtype).to(device)
    else:
        gated, name = random_model(str(random), "bfloat16" if dtype == "auto" else dtype, device), f"random {random}"
    longest = getattr(gated.config, "max_position_embeddings", PROMPT + tokens)
    if prompt_tokens is None:
        prompt_tokens = max(1, min(PROMPT, longest - tokens))
    if prompt_tokens + tokens > longest:
        raise OptionError(f"{prompt_tokens} prompt tokens and {tokens} more exceed the context of {longest}")
    prompt = torch.randint(gated.config.vocab_size, (1, prompt_tokens)).to(device)
    if random:
        fit(gated, prompt, asked)
    loads = {sparsity: _load_per_token(gated, sparsity, prompt, min(tokens, COUNTED)) for sparsity in (None, *asked)}
    described = f"{name}, {str(gated.dtype).removeprefix('torch.')}, prompt of {prompt_tokens} tokens"
    return Ready(gated, described, asked, prompt, loads)


@torch.inference_mode()
def _step(model: Any, sparsity: float | None, tokens: Tensor, cache: Any) -> tuple[float, Any]:
    """Seconds of one call with the cache of the calls before, and the cache after it."""
    if sparsity is not None:
        set_sparsity(model, sparsity)
    start = perf_counter()
    out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    out.logits[0, -1].argmax().item()
    return perf_counter() - start, out.past_key_values


def _factors(module: WinaLinear) -> list[Tensor]:
    """The low-rank term of a projection, where it has one."""
    return [tensor for tensor in (module.low_rank_in, module.low_rank_out) if tensor is not None]


@torch.inference_mode()
def _load_per_token(model: Any, sparsity: float | None, prompt: Tensor, tokens: int) -> tuple[int, float | None]:
    """Bytes of weights and cutoffs that a token after the prompt reads, and the fraction of inputs it skips, on average."""
    gates = gated_modules(model)
    own = {
        id(tensor)
        for module in gates.values()
        for tensor in (module.weight_t, module.column_norms, module.thresholds, *_factors(module))
    }
    # An embedding is looked up, a row a token, unless it is the head as well.
    head = getattr(model.get_output_embeddings(), "weight", None)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head}
    met = shares(model.config.to_dict(), [name for name, _ in model.named_parameters()] + list(gates))
    others = sum(met[name] * p.nbytes for name, p in model.named_parameters() if id(p) not in own | tables)
    if sparsity is None:
        return round(others + sum(met[name] * module.weight_t.nbytes for name, module in gates.items())), None
    dropped_inputs, inputs = dict.fromkeys(gates, 0), dict.fromkeys(gates, 0)

    def count(name: str, module: WinaLinear, x: Tensor) -> None:
        assert module.tau is not None
        dropped_inputs[name] += int(dropped(x, module.tau).sum())
        inputs[name] += x.numel()

    _, cache = _step(model, sparsity, prompt, None)
    with observing(gates, count):
        for k in range(tokens):
            _, cache = _step(model, sparsity, prompt[:, k % prompt.shape[1]][None], cache)
    seen = {name: module for name, module in gates.items() if inputs[name]}  # an expert may be given no token
    skipped = {name: dropped_inputs[name] / inputs[name] for name in seen}
    read = {name: inputs[name] / tokens / module.in_features for name, module in seen.items()}  # times a token
    gated = sum(read[name] * bytes_read(m.weight_t.nbytes, m.in_features, skipped[name]) for name, m in seen.items())
    if sparsity > 0:
        gated += sum(read[name] * tensor.nbytes for name, module in seen.items() for tensor in _factors(module))
    weights = {name: read[name] * module.weight_t.nbytes for name, module in seen.items()}
    return round(others + gated), sum(skipped[name] * weights[name] for name in seen) / sum(weights.values())
