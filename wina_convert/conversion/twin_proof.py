"""The proof that a conversion fits a type of model that no table lists: it is tried on the model's twin first."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..errors import SourceError, one_line
from ..format.config import WinaConfig
from ..format.names import COLUMN_NORMS, WEIGHT, WEIGHT_T
from ..models.discovery import kind_of
from ..models.experts import opened
from ..models.source import Source, open_source
from ..models.stream import build_skeleton, dense_stream
from ..models.twin import make_twin
from ..progress import Progress
from ..runtime.experts import open_experts
from ..runtime.install import configure, install
from ..runtime.linear import gated_modules
from .plan import ConversionPlan, make_plan
from .weights import stored_tensors

CPU = torch.device("cpu")
TOKENS = (2, 24)
TOLERANCE = 1e-5  # of the logits' scale, in float32
AMPLIFIED = 4  # times the dense model's own rounding, where that is more: a recurrence amplifies it

_passed: set[tuple[type, str]] = set()


def check_twin(source: Source, progress: Progress) -> None:
    """Try the conversion of an unlisted type on a small random model of it, in seconds.

    Layers run one at a time must give what the whole model gives; the gated model at sparsity 0 what the dense one gives; and at
    50% what the dense model gives whose inputs are zeroed by a hook. What has passed is not tried again in the same process.

    Args:
        source: the model to convert.
        progress: how to report the three comparisons.

    Raises:
        SourceError: they differ, or the twin cannot be built, stored or read.
    """
    skeleton = build_skeleton(source, torch.float32)
    if kind_of(skeleton) in _passed:
        return
    twin = make_twin(skeleton)
    vocabulary = twin.config.get_text_config().vocab_size
    tokens = torch.randint(4, vocabulary - 4, TOKENS, generator=torch.Generator().manual_seed(1), device=CPU)

    def run(model: Callable[..., object]) -> Tensor:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits  # type: ignore[attr-defined]
        return logits

    def rounding() -> float:
        """How far the twin's logits in float32 are from those in float64; 0 where its code mixes the two."""
        try:
            return _difference(dense, run(deepcopy(twin).double()))
        except RuntimeError:
            return 0.0

    with progress("Trying the type of model", 3, "comparison") as advance, torch.no_grad(), _explained(source):
        with tempfile.TemporaryDirectory() as folder:
            with _without_bars():
                twin.save_pretrained(Path(folder, "twin"))
            small = open_source(str(Path(folder, "twin")))
            small = opened(small, build_skeleton(small, torch.float32))
            dense = run(twin)
            open_experts(twin)
            plan = make_plan(small)
            gated = gated_copy(twin, small, plan)
            _compare("its layers, one at a time,", _streamed(small, tokens), dense, rounding)
        advance(1)
        _compare("the gated model at sparsity 0", run(gated), dense, rounding)
        advance(1)
        with zeroed(twin, [projection.name for projection in plan.projections]) as thresholds:
            expected = run(twin)
        for name, module in gated_modules(gated).items():
            module.set_threshold(thresholds.get(name, 0.0))  # an expert that no token is given has none
        _compare("the gated model at 50%", run(gated), expected, rounding)
        advance(1)
    _passed.add(kind_of(skeleton))


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' bar for the twin's file off the terminal."""
    shown, logging._tqdm_active = logging._tqdm_active, False  # disable_progress_bar is for huggingface_hub's bars too
    try:
        yield
    finally:
        logging._tqdm_active = shown


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """What goes wrong with the twin is said of the type of model."""
    try:
        yield
    except Exception as error:  # whatever the model's code makes of being run a layer at a time
        raise SourceError(
            f"{source.name} is of type {source.config['model_type']!r}, which was tried on a small random model and is not "
            f"supported: {one_line(error)}"
        ) from error


def gated_copy(twin: PreTrainedModel, small: Source, plan: ConversionPlan) -> PreTrainedModel:
    """A copy of a twin with gated projections, filled with what a conversion of its folder stores, at sparsity 0."""
    gated = deepcopy(twin)
    install(gated, WinaConfig(sparsity=0.0, modules=[projection.name for projection in plan.projections]))
    stored = stored_tensors(small, plan.steps, [f"{projection.key}.{WEIGHT}" for projection in plan.projections])
    modules = gated_modules(gated)
    for projection in plan.projections:
        module, plain = modules[projection.name], twin.get_submodule(projection.name)
        module.weight_t.copy_(stored[f"{projection.key}.{WEIGHT_T}"])
        module.column_norms.copy_(stored[f"{projection.key}.{COLUMN_NORMS}"])
        module.thresholds.zero_()
        if module.bias is not None:
            module.bias.copy_(plain.get_parameter("bias"))
    configure(gated, WinaConfig(sparsity=0.0))
    return gated


@contextmanager
def zeroed(model: PreTrainedModel, names: list[str]) -> Iterator[Mapping[str, float]]:
    """Zero about half the inputs of linear maps, by the rule itself.

    The threshold of each is set at its first call, in the widest gap between scores near the median, so that rounding moves no
    score across it.

    Yields:
        the thresholds, by module name, as far as the modules have been called.
    """
    thresholds: dict[str, float] = {}

    def zeroing(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
            assert isinstance(weight, Tensor)
            scores = inputs[0].abs() * torch.linalg.vector_norm(weight.double(), dim=0).float()
            if name not in thresholds:
                ranked = scores.flatten().sort().values
                middle = ranked[len(ranked) * 9 // 20 : len(ranked) * 11 // 20 + 2]
                widest = int(middle.diff().argmax())
                thresholds[name] = float(middle[widest : widest + 2].mean())
            return (inputs[0] * (scores > thresholds[name]), *inputs[1:])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(zeroing(name)) for name in names]
    try:
        yield thresholds
    finally:
        for handle in handles:
            handle.remove()


def _streamed(small: Source, tokens: Tensor) -> Tensor:
    """Logits [B, S, vocabulary] of a folder's model, a layer at a time, each sequence a batch."""
    stream = dense_stream(small, torch.float32, CPU)
    states = stream.embed(tokens.split(1))
    for index in range(len(stream.layers)):
        with stream.layer(index) as layer:
            states = [layer(hidden, number) for number, hidden in enumerate(states)]
    with stream.head() as head:
        return torch.stack([head(hidden[0]) for hidden in states])


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, as a part of the second one's scale."""
    return float((found - expected).abs().max() / expected.abs().max())


def _compare(what: str, found: Tensor, expected: Tensor, rounding: Callable[[], float]) -> None:
    differs = _difference(found, expected)
    if not (differs <= TOLERANCE or differs <= AMPLIFIED * rounding()):
        raise SourceError(f"{what} gave logits that differ by {differs:.0e} of their scale")
