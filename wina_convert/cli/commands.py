"""The command line: `wina-convert`, and `wina` with its verbs. The only file that prints or exits."""

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click

from .. import __version__
from .text import bench_text, by_layer, plan_text, report_text, table
from ..errors import OptionError, WinaError, printable
from ..progress import Progress, bars, lines, silent


class _OneLineErrors:
    """A click command that prints any expected error as one line on stderr and exits 2, without a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().main(*args, **{**kwargs, "standalone_mode": False})  # type: ignore[misc]
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.ClickException as error:
            _fail(error.format_message(), 2)
        except WinaError as error:
            _fail(str(error), 2)
        except (KeyboardInterrupt, click.Abort) as error:  # click turns the first into the second
            said = str(error.__cause__ or error)
            _fail(f"interrupted; {said}" if said else "interrupted", 130)
        sys.exit(result if isinstance(result, int) else 0)


class _Command(_OneLineErrors, click.Command):
    pass


class _Group(_OneLineErrors, click.Group):
    command_class = _Command


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    sys.exit(code)


def _split(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    """Repeated options and comma-separated lists mean the same."""
    return tuple(part for value in values for part in value.split(",") if part)


def _fractions(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _split(context, parameter, values))
    except ValueError as error:
        raise click.BadParameter(f"{error}; give fractions such as 0.25,0.5") from error


def _shapes(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> tuple[tuple[int, int], ...]:
    found = []
    for part in _split(context, parameter, values):
        inputs, _, outputs = part.partition("x")
        if not (inputs.isdecimal() and outputs.isdecimal()):
            raise click.BadParameter(f"{part!r}; give INPUTSxOUTPUTS, such as 4096x14336")
        found.append((int(inputs), int(outputs)))
    return tuple(found)


def _progress(quiet: bool) -> Progress:
    if quiet:
        return silent
    return bars if sys.stderr.isatty() else lines(lambda text: click.echo(text, err=True))


def _quiet_transformers() -> None:
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity(50)  # CRITICAL: its errors come as exceptions, and may quote a file of anybody's
    logging._tqdm_active = False  # disable_progress_bar would take huggingface_hub's bars away as well
    hub_logging.set_verbosity_error()


def _download_bar(quiet: bool) -> type[Any]:
    """huggingface_hub's progress bar, on a terminal only."""
    from huggingface_hub.utils import tqdm

    shown = sys.stderr.isatty() and not quiet
    return type(
        "DownloadBar",
        (tqdm,),
        {"__init__": lambda self, *a, **k: tqdm.__init__(self, *a, **{**k, "disable": not shown})},
    )


HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress and no summary; errors only.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
version_option = click.version_option(__version__, "--version", prog_name="wina-convert")

CONVERT_OPTIONS: list[Callable[..., Any]] = [
    click.argument("model"),
    click.option("--out", required=True, type=click.Path(), help="Folder to write; must not exist."),
    click.option(
        "--sparsity",
        default=0.5,
        show_default=True,
        help="Default fraction of each projection's inputs to skip, 0 to 0.95.",
    ),
    click.option(
        "--calibration",
        default="bundled",
        show_default=True,
        help="Text to fit the thresholds on: bundled, a .txt, .jsonl or .parquet file, or a Hub dataset (name or name:split).",
    ),
    click.option("--samples", default=64, show_default=True, help="Calibration sequences."),
    click.option(
        "--seq-len", type=int, help="Tokens of a sequence.  [default: 512, or the model's context if shorter]"
    ),
    click.option("--batch-size", default=1, show_default=True, help="Sequences computed at a time on a GPU."),
    click.option("--seed", default=0, show_default=True, help="Seed of the choice of sequences."),
    device_option,
    click.option(
        "--dtype", default="auto", show_default=True, help="auto (as the source), float32, bfloat16 or float16."
    ),
    click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file."),
    click.option(
        "--targets",
        multiple=True,
        default=["all"],
        show_default=True,
        callback=_split,
        help="What to gate: all, attention, mlp, or patterns such as '*.down_proj'; repeat or separate by commas.",
    ),
    click.option(
        "--ignore", multiple=True, callback=_split, help="Patterns to leave dense, such as 'model.layers.0.*'."
    ),
    click.option(
        "--overwrite", is_flag=True, help="Replace an existing WINA checkpoint, or discard an unfinished one."
    ),
    click.option("--resume", is_flag=True, help="Continue an interrupted conversion; the same options are needed."),
    click.option(
        "--no-keep", "keep", flag_value=False, default=True, help="Leave nothing for --resume when interrupted."
    ),
    click.option("--dry-run", is_flag=True, help="Print the plan, time and disk expected, and touch nothing."),
    click.option("--plot", is_flag=True, help="Also write PNG pictures (needs the extra 'plot')."),
    click.option("--revision", help="Branch, tag or commit on the Hub."),
    click.option("--token", help="Hub access token.  [default: that of `hf auth login`]"),
    click.option("--trust-remote-code", is_flag=True, help="Allow the model's own Python code. Off by default."),
    quiet_option,
    json_option,
]


def _convert(out: str, quiet: bool, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Turn a Hugging Face causal LM into a WINA checkpoint.

    MODEL is a Hub id or a local folder. The result skips, at every gated projection, the inputs that do not matter for the
    token at hand; load it with AutoModelForCausalLM.from_pretrained(OUT).

    \b
    Examples:
      wina-convert meta-llama/Llama-3-8B --out ./llama-wina
      wina-convert ./my-model --out ./my-model-wina --sparsity 0.4 --calibration notes.txt
      wina-convert ./my-model --out ./my-model-wina --targets mlp --dry-run
    """
    from ..conversion.pipeline import convert

    _quiet_transformers()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = time.perf_counter()
    report = convert(out=out, dry_run=dry_run, progress=_progress(quiet), tqdm_class=_download_bar(quiet), **options)
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    elif dry_run:
        click.echo(plan_text(report, out))
    elif not quiet:
        click.echo(report_text(report, out, time.perf_counter() - start))


def _with_options(function: Callable[..., Any], options: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


wina_convert = version_option(
    click.command("wina-convert", cls=_Command, context_settings=HELP)(_with_options(_convert, CONVERT_OPTIONS))
)


@click.group(cls=_Group, context_settings=HELP)
@version_option
def wina() -> None:
    """Make, inspect, measure and run WINA checkpoints."""


def _fresh_convert(**options: Any) -> None:
    _convert(**options)


_fresh_convert.__doc__ = _convert.__doc__
wina.command("convert")(_with_options(_fresh_convert, CONVERT_OPTIONS))


@wina.command("inspect")
@click.argument("folder", metavar="DIR")
@json_option
def inspect_command(folder: str, as_json: bool) -> None:
    """Show what a checkpoint holds: per layer, its size, thresholds, sparsity and the bytes a token reads.

    \b
    Example:
      wina inspect ./llama-wina
    """
    from ..verbs.inspect import inspect_checkpoint

    found = inspect_checkpoint(folder)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
        return
    kinds = list(dict.fromkeys(kind for layer in found.layers for kind in layer.thresholds))
    rows = [["layer", "MB", "MB/token", "achieved", *(kind.rpartition(".")[2] for kind in kinds)]]
    for layer in found.layers:
        achieved = "-" if layer.achieved is None else f"{layer.achieved:.1%}"
        thresholds = [f"{layer.thresholds[kind]:.4g}" if kind in layer.thresholds else "-" for kind in kinds]
        rows.append(
            [str(layer.layer), f"{layer.nbytes / 1e6:.2f}", f"{layer.bytes_per_token / 1e6:.2f}", achieved, *thresholds]
        )
    gated, read = sum(layer.nbytes for layer in found.layers), sum(layer.bytes_per_token for layer in found.layers)
    rows.append(["all", f"{gated / 1e6:.2f}", f"{read / 1e6:.2f}", "", *("" for _ in kinds)])
    measured = "" if found.measured_at is None else f", achieved as measured at {found.measured_at:.0%} at conversion"
    click.echo(printable(f"{found.name}: {found.source}, scheme {found.scheme}, default sparsity {found.sparsity:.1%}"))
    click.echo(f"thresholds and bytes at the default sparsity{measured}; not gated: {found.other_bytes / 1e6:.2f} MB\n")
    click.echo(table(rows))


@wina.command("eval")
@click.argument("folder", metavar="DIR")
@click.option(
    "--text", "texts", multiple=True, required=True, help="Text file or dataset, as for --calibration; repeat for more."
)
@click.option("--source", help="The dense model, folder or Hub id, to compare with.")
@click.option(
    "--sparsity",
    "sparsities",
    multiple=True,
    callback=_fractions,
    help="Fractions, such as 0.25,0.5.  [default: DIR's]",
)
@click.option("--samples", default=64, show_default=True, help="Sequences, spread evenly over the text.")
@click.option("--seq-len", type=int, help="Tokens of a sequence.  [default: 512, or the model's context if shorter]")
@click.option("--batch-size", default=1, show_default=True, help="Sequences computed at a time.")
@device_option
@click.option("--revision", help="Branch, tag or commit of the source.")
@click.option("--token", help="Hub access token.  [default: that of `hf auth login`]")
@quiet_option
@json_option
def eval_command(folder: str, device: str, quiet: bool, as_json: bool, texts: Sequence[str], **options: Any) -> None:
    """Measure a checkpoint on text: perplexity, KL and agreement with the dense source, achieved sparsity.

    \b
    Example:
      wina eval ./llama-wina --text held-out.txt --source meta-llama/Llama-3-8B --sparsity 0.25,0.5
    """
    from ..conversion.pipeline import choose_device
    from ..models.measure import evaluate

    _quiet_transformers()
    measured = evaluate(folder, texts, device=choose_device(device), progress=_progress(quiet), **options)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(one) for one in measured], indent=2))
        return
    compared = measured[0].dense_perplexity is not None
    rows = [["sparsity", "achieved", "perplexity", *(["dense", "rise", "KL", "top-1 agreement"] if compared else [])]]
    for one in measured:
        row = [f"{one.sparsity:.1%}", f"{one.achieved:.2%}", f"{one.perplexity:.3f}"]
        if one.dense_perplexity is not None:
            rise = one.perplexity / one.dense_perplexity - 1
            row += [f"{one.dense_perplexity:.3f}", f"{rise:+.2%}", f"{one.kl:.4f}", f"{one.agreement:.1%}"]
        rows.append(row)
    click.echo(f"{measured[0].tokens} predicted tokens of {', '.join(texts)}\n")
    click.echo(table(rows))
    for one in measured:
        click.echo(f"\nachieved by projection at {one.sparsity:.1%}\n")
        click.echo(table(by_layer({name: f"{fraction:.1%}" for name, fraction in one.projections.items()})))


@wina.command("generate")
@click.argument("folder", metavar="DIR")
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--max-new-tokens", default=128, show_default=True, help="Stop after so many tokens.")
@click.option("--sparsity", type=float, help="Fraction of inputs to skip.  [default: DIR's]")
@click.option("--temperature", default=0.0, show_default=True, help="Of sampling; 0 takes the most likely token.")
@click.option("--seed", default=0, show_default=True, help="Seed of sampling.")
@device_option
@click.option("--dtype", default="auto", show_default=True, help="auto (as stored), float32, bfloat16 or float16.")
@quiet_option
def generate_command(folder: str, prompt: str, device: str, quiet: bool, **options: Any) -> None:
    """Continue a prompt, streaming the text, and print the speed.

    \b
    Example:
      wina generate ./llama-wina --prompt "Once upon a time"
    """
    from ..conversion.pipeline import choose_device
    from ..verbs.generate import generate

    _quiet_transformers()
    pending = [prompt]

    def write(text: str) -> None:
        click.echo("".join(pending) + text, nl=False)
        pending.clear()

    done = generate(folder, prompt, device=str(choose_device(device)), write=write, **options)
    write("\n")
    if not quiet:
        speed = f", {done.tokens_per_second:.1f} tokens a second" if done.tokens_per_second else ""
        click.echo(f"[{done.tokens} tokens{speed}]", err=True)


@wina.command("verify")
@click.argument("folder", metavar="DIR")
@quiet_option
def verify_command(folder: str, quiet: bool) -> None:
    """Check every file of a checkpoint against its manifest, and its tensors and config against each other.

    \b
    Example:
      wina verify ./llama-wina
    """
    from ..verbs.verify import verify_folder

    count = verify_folder(folder, _progress(quiet))
    if not quiet:
        click.echo(f"{folder}: {count} files are as they were written")


@wina.command("retarget")
@click.argument("folder", metavar="DIR")
@click.option("--sparsity", type=float, required=True, help="The new default, 0 to 0.95.")
def retarget_command(folder: str, sparsity: float) -> None:
    """Change the default sparsity of a checkpoint in place, without running the model.

    \b
    Example:
      wina retarget ./llama-wina --sparsity 0.4
    """
    from ..verbs.retarget import retarget

    retarget(folder, sparsity)
    click.echo(f"{folder}: default sparsity is now {sparsity:.1%}")


@wina.command("bench")
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--random", metavar="SIZE", help="Instead of DIR, a Llama shape with random weights: 1b, 3b or 8b.")
@click.option("--kernels", is_flag=True, help="Time single products instead of a model.")
@click.option(
    "--shapes",
    multiple=True,
    callback=_shapes,
    help="With --kernels: INPUTSxOUTPUTS, such as 4096x14336.  [default: those of the Llama shapes]",
)
@click.option(
    "--sparsity", "sparsities", multiple=True, callback=_fractions, help="Fractions to skip.  [default: 0,0.5,0.65]"
)
@click.option("--prompt-tokens", default=512, show_default=True, help="Length of the prompt.")
@click.option("--tokens", default=32, show_default=True, help="Tokens decoded after it.")
@click.option("--repeats", type=int, help="Times the prompt, or each product, is run.  [default: 3, or 31]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's, or OMP_NUM_THREADS]")
@click.option("--dtype", default="auto", show_default=True, help="auto (as stored), float32, bfloat16 or float16.")
@quiet_option
@json_option
def bench_command(
    folder: str | None,
    random: str | None,
    kernels: bool,
    shapes: Sequence[tuple[int, int]],
    sparsities: Sequence[float],
    prompt_tokens: int,
    tokens: int,
    repeats: int | None,
    threads: int | None,
    dtype: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Time the gated model against the dense one with the same weights, in turns, and against memory bandwidth.

    \b
    Examples:
      wina bench ./llama-wina
      wina bench --random 1b
      wina bench --kernels --shapes 4096x14336
    """
    import torch

    from ..verbs.bench import SHAPES, SPARSITIES, bench_model, bench_products

    if kernels and (folder or random):
        raise OptionError("--kernels times products of random numbers; give neither DIR nor --random")
    if shapes and not kernels:
        raise OptionError("--shapes goes with --kernels")
    _quiet_transformers()
    if threads:
        torch.set_num_threads(threads)
    shared: dict[str, Any] = {"sparsities": sparsities or SPARSITIES, "progress": _progress(quiet)}
    if kernels:
        measured = bench_products(shapes or SHAPES, dtype=dtype, repeats=31 if repeats is None else repeats, **shared)
    else:
        measured = bench_model(
            folder,
            random=random,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            repeats=3 if repeats is None else repeats,
            dtype=dtype,
            **shared,
        )
    click.echo(json.dumps(dataclasses.asdict(measured), indent=2) if as_json else bench_text(measured))
