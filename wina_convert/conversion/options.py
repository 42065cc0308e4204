"""The options of a conversion, once: the command line, `convert`, a report, a card and the identity of a resume read them here.

Imports nothing heavy, so that the command line's help shows at once.
"""

import inspect
import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import OptionError
from ..format.grid import check_sparsity
from ..models.documents import BUNDLED

# What an option decides: REPORT, the bytes of the checkpoint, and it is recorded; IDENTITY, bytes only; RUN, how it goes.
REPORT, IDENTITY, RUN = "report", "identity", "run"
BASES = ("none", "pca", "fitted", "auto")


def _option(default: Any, decides: str, text: str, shown: str | None = None, off: tuple[str, str] | None = None) -> Any:
    """A field: its default, what it decides, its help, the default shown where it is none, the flag that turns it off."""
    return field(default=default, metadata={"decides": decides, "help": text, "shown": shown, "off": off})


@dataclass(frozen=True)
class ConversionOptions:
    """The options of a conversion.

    Raises:
        OptionError: a value cannot be used.
    """

    sparsity: float = _option(
        0.5, REPORT, "Default fraction of the gated weights to skip, 0 to 0.95. All others are stored too."
    )
    max_ppl_increase: float | None = _option(
        None,
        REPORT,
        "Make the default sparsity the largest whose perplexity on held-out calibration text is at most so many percent above "
        "the dense model's (PPL-p% sparsity).",
        shown="--sparsity is the default",
    )
    calibration: str = _option(
        BUNDLED,
        REPORT,
        "Text to fit the thresholds on: bundled, a .txt, .jsonl, .json or .parquet file, or a Hub dataset (name, name:split, "
        "name:config or name:config:split).",
    )
    samples: int = _option(64, REPORT, "Calibration sequences; fewer are used where the text has fewer.")
    seq_len: int | None = _option(None, REPORT, "Tokens of a sequence.", shown="512, or the model's context if shorter")
    basis: str = _option(
        "auto",
        REPORT,
        "Basis to fold into the weights: none, pca, fitted, or auto (fitted where the device allows it, else pca).",
    )
    scheme: str = _option(
        "wina",
        REPORT,
        "How inputs are scored: wina (|x| times the L2 norm of the column), wina-paper (that where keys and gate come from, "
        "|x| elsewhere, as in the authors' code), teal (|x|), was (|x| times the L1 norm) or r-sparse (as wina, with a low-rank "
        "term for what is skipped).",
    )
    allocation: str = _option(
        "auto",
        REPORT,
        "How the sparsity is divided: measured (by what each matrix, skipping alone, loses), types (by type of projection, as "
        "was best on small models), auto (measured, or types where there are experts), uniform (all alike) or greedy (TEAL's "
        "search within each layer, slow; to compare).",
    )
    tune: bool = _option(
        False,
        REPORT,
        "Learn thresholds, biases and column weights by distilling the dense model; takes the whole model in memory.",
    )
    batch_size: int = _option(1, REPORT, "Sequences computed at a time on a GPU; a CPU takes one, which is as fast.")
    seed: int = _option(0, REPORT, "Seed of the choice of sequences.")
    device: str = _option("auto", IDENTITY, "auto, cpu, cuda, cuda:1 ...")
    dtype: str = _option("auto", REPORT, "auto (as the source), float32, bfloat16 or float16; fp32, bf16, fp16.")
    max_shard_size: str = _option("5GB", REPORT, "Largest weight file.")
    targets: tuple[str, ...] = _option(
        ("all",),
        REPORT,
        "What to gate: all, attention, mlp (of the decoder layers), head, or patterns such as '*.down_proj'; repeat or separate "
        "by commas. A head that is tied to the embedding is stored by itself.",
    )
    ignore: tuple[str, ...] = _option((), REPORT, "Patterns to leave dense, such as 'model.layers.0.*'.")
    allow_unused: bool = _option(
        False,
        RUN,
        "Convert although weights are left out that the config has no place for: an adapter, a bias, a layer.",
    )
    overwrite: bool = _option(False, RUN, "Replace an existing WINA checkpoint, or discard an unfinished one.")
    resume: bool = _option(False, RUN, "Continue an interrupted conversion; the same options are needed.")
    keep: bool = _option(
        True,
        RUN,
        "Leave an interrupted conversion in a hidden folder beside the target, for resume.",
        off=("--no-keep", "Leave nothing for --resume when interrupted."),
    )
    dry_run: bool = _option(False, RUN, "Print the plan, time and disk expected, and touch nothing.")
    plot: bool = _option(False, IDENTITY, "Also write PNG pictures (needs the extra 'plot').")
    push_to_hub: str | None = _option(
        None, RUN, "Also upload the checkpoint to this repository, USER/NAME. Whether the token may is checked first."
    )
    push_revision: str | None = _option(None, RUN, "Branch to upload to, made where it does not exist.", shown="main")
    private: bool = _option(False, RUN, "Make the repository private if it does not exist.")
    revision: str | None = _option(None, RUN, "Branch, tag or commit on the Hub.")
    token: str | None = _option(None, RUN, "Hub access token.", shown="that of `hf auth login`")
    trust_remote_code: bool = _option(False, RUN, "Allow the model's own Python code. Off by default.")

    def __post_init__(self) -> None:
        from ..fitting.budget import ALLOCATIONS  # here: they import torch
        from ..fitting.schemes import SCHEMES
        from ..format.dtypes import dtype_name

        object.__setattr__(self, "sparsity", check_sparsity(self.sparsity))
        if self.max_ppl_increase is not None and not 0 < self.max_ppl_increase < math.inf:
            raise OptionError(f"max ppl increase is {self.max_ppl_increase}; give a number of percent above 0")
        check_name("basis", self.basis, BASES)
        check_name("scheme", self.scheme, SCHEMES)
        check_name("allocation", self.allocation, (*ALLOCATIONS, "auto"))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if self.tune and SCHEMES[self.scheme].low_rank:
            raise OptionError(
                f"tune learns no low-rank terms, which scheme {self.scheme!r} has; take another or leave out tune"
            )
        for name, count in (("samples", self.samples), ("batch size", self.batch_size)):
            if count < 1:
                raise OptionError(f"{name} is {count}; give at least 1")
        if not self.push_to_hub and (self.private or self.push_revision):
            raise OptionError("private and push revision say how to upload; give push to hub as well")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"seed is {self.seed}; give 0 to {2**63 - 1}")

    def deciding(self, *what: str) -> dict[str, Any]:
        """The options that decide any of `what`, by name, for JSON."""
        values = asdict(self)
        chosen = {f.name: values[f.name] for f in fields(self) if f.metadata["decides"] in what}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


def check_name(option: str, value: object, known: Iterable[str]) -> None:
    """Refuse a value of an option that is none of the known ones.

    Raises:
        OptionError: it is another.
    """
    if value not in list(known):  # a value that cannot be hashed is in no table
        raise OptionError(f"{option} is {value!r}; give one of {', '.join(known)}")


def documented(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that takes `**options` their names and defaults in its signature, and their help in its docstring."""
    signature = inspect.signature(function)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    others = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(ConversionOptions)
    ]
    function.__signature__ = signature.replace(parameters=[*positional, *options, *others])  # type: ignore[attr-defined]
    lines = []
    for f in fields(ConversionOptions):
        text = f.metadata["help"] + (f" None: {f.metadata['shown']}." if f.metadata["shown"] else "")
        lines += textwrap.wrap(f"{f.name}: {text}", 120, initial_indent=" " * 8, subsequent_indent=" " * 12)
    function.__doc__ = (function.__doc__ or "").replace("        **options\n", "\n".join(lines) + "\n")
    return function
