"""`wina`, with a verb for everything that one does with a checkpoint."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import click

from ..errors import OptionError, printable
from ..format.experts import of_any_expert
from .common import (
    Group,
    begin,
    device_option,
    download_bar,
    fractions,
    hub_options,
    json_option,
    local,
    print_json,
    progress_of,
    quiet_option,
    quiet_transformers,
    shapes,
    version_option,
)
from .convert import command
from .doctor import doctor_command
from .export import export_command
from .hub import push_command
from .text import bench_text, card_text, span, table

TOY = 20_000_000  # parameters below which a model is for trying things out


@click.group(cls=Group)
@version_option
def wina() -> None:
    """Make, inspect, measure and run WINA checkpoints."""


wina.add_command(command("convert"))
wina.add_command(push_command)
wina.add_command(doctor_command)
wina.add_command(export_command)


@wina.command("inspect", short_help="Show thresholds, sparsity and bytes a token, layer by layer.")
@click.argument("folder", metavar="DIR", type=click.Path())
@hub_options
@quiet_option
@json_option
def inspect_command(folder: str, revision: str | None, token: str | None, quiet: bool, as_json: bool) -> None:
    """Show what a checkpoint holds: per layer, its size, thresholds, sparsity and the bytes a token reads.

    DIR is a folder or a Hub id.

    \b
    Example:
      wina inspect ./llama-wina
    """
    begin(quiet, f"Reading {folder}")
    from ..verbs.inspect import inspect_checkpoint

    found = inspect_checkpoint(local(folder, quiet, revision, token))
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    kinds = list(dict.fromkeys(of_any_expert(kind) for layer in found.layers for kind in layer.thresholds))
    rows = [["layer", "MB", "MB/token", "achieved", *(kind.rpartition(".")[2] for kind in kinds)]]
    for layer in found.layers:
        achieved = "-" if layer.achieved is None else f"{layer.achieved:.1%}"
        thresholds = [span(kind, layer.thresholds, "{:.4g}") for kind in kinds]
        rows.append(
            [
                "head" if layer.layer is None else str(layer.layer),
                f"{layer.nbytes / 1e6:.2f}",
                f"{layer.bytes_per_token / 1e6:.2f}",
                achieved,
                *thresholds,
            ]
        )
    gated, read = sum(layer.nbytes for layer in found.layers), sum(layer.bytes_per_token for layer in found.layers)
    if found.allocation != "uniform":
        rows.append(["asked", "", "", f"{found.sparsity:.1%}", *(span(kind, found.asked, "{:.1%}") for kind in kinds)])
    rows.append(["all", f"{gated / 1e6:.2f}", f"{read / 1e6:.2f}", "", *("" for _ in kinds)])
    measured = "" if found.measured_at is None else f", achieved as measured at {found.measured_at:.0%} at conversion"
    click.echo(
        printable(
            f"{found.name}: {found.source}, scheme {found.scheme}, allocation {found.allocation}, basis {found.basis}, "
            f"default sparsity {found.sparsity:.1%}"
        )
    )
    click.echo(f"thresholds and bytes at the default sparsity{measured}; not gated: {found.other_bytes / 1e6:.2f} MB\n")
    click.echo(table(rows))


@wina.command("eval", short_help="Measure perplexity, KL and agreement with the dense model.")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path())
@click.option(
    "--text", "texts", multiple=True, required=True, help="Text file or dataset, as for --calibration; repeat for more."
)
@click.option(
    "--source",
    help="The dense model, folder or Hub id, to compare with.  [default with several DIRs or --plot: each DIR at sparsity 0]",
)
@click.option(
    "--sparsity",
    "sparsities",
    multiple=True,
    callback=fractions,
    help="Fractions, such as 0.25,0.5.  [default: DIR's]",
)
@click.option("--samples", type=int, help="Sequences, as many from each text, spread evenly over it.  [default: 64]")
@click.option("--seq-len", type=int, help="Tokens of a sequence.  [default: 512, or the model's context if shorter]")
@click.option(
    "--protocol",
    help="wikitext: the whole text in blocks of 2,048 tokens (or the context) without overlap, one BOS, as papers measure.",
)
@click.option("--batch-size", default=1, show_default=True, help="Sequences computed at a time.")
@click.option("--plot", metavar="FILE.png", help="Also draw loss against sparsity (needs the extra 'plot').")
@device_option
@click.option("--revision", help="Branch, tag or commit of the source; without one, of DIR, for a Hub id.")
@click.option("--token", help="Hub access token.  [default: that of `hf auth login`]")
@quiet_option
@json_option
def eval_command(
    folders: Sequence[str],
    device: str,
    quiet: bool,
    as_json: bool,
    texts: Sequence[str],
    plot: str | None,
    **options: Any,
) -> None:
    """Measure checkpoints on text: perplexity, KL and agreement with the dense source, achieved sparsity.

    DIR is a folder or a Hub id. Several come in one table, with the bytes and multiply-accumulates of a token. Text that a
    conversion saw is refused.

    \b
    Examples:
      wina eval ./llama-wina --text held-out.txt --source meta-llama/Llama-3-8B --sparsity 0.25,0.5
      wina eval ./wina ./teal --text held-out.txt --sparsity 0.25,0.4,0.5,0.65,0.75 --plot loss.png
    """
    from pathlib import Path

    from ..models.device import choose_device
    from ..verbs.evaluate import evaluate
    from ..verbs.loss_picture import check_file, draw_loss
    from .text import comparison_text, evaluation_text

    quiet_transformers()
    if plot:
        check_file(Path(plot))
    several = len(folders) > 1
    options |= {
        "compare": several or plot is not None,
        "progress": progress_of(quiet),
        "tqdm_class": download_bar(quiet),
    }
    found = evaluate(folders, texts, device=choose_device(device), **options)
    if plot:
        draw_loss(Path(plot), found)
    if as_json:
        print_json([row for one in found for row in one.rows()])
    else:
        click.echo(comparison_text(found, texts) if several else evaluation_text(found[0], texts))


@wina.command("generate", short_help="Continue or answer a prompt, and print the speed.")
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option(
    "--prompt", required=True, help="The text to continue, or to answer where the tokenizer has a chat template."
)
@click.option("--raw", is_flag=True, help="Continue the prompt, whatever template the tokenizer has.")
@click.option("--max-new-tokens", default=128, show_default=True, help="Stop after so many tokens, or at the context.")
@click.option("--sparsity", type=float, help="Fraction of inputs to skip.  [default: DIR's]")
@click.option("--temperature", default=0.7, show_default=True, help="Of sampling; 0 takes the most likely token.")
@click.option("--top-p", default=0.9, show_default=True, help="Sample among tokens of this probability together.")
@click.option("--repetition-penalty", default=1.1, show_default=True, help="Against repeating; 1 is none.")
@click.option("--seed", default=0, show_default=True, help="Seed of sampling.")
@device_option
@click.option("--dtype", default="auto", show_default=True, help="auto (as stored), float32, bfloat16 or float16.")
@hub_options
@quiet_option
@json_option
def generate_command(
    folder: str,
    prompt: str,
    device: str,
    revision: str | None,
    token: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a prompt or answer it, streaming the text, and print the speed.

    DIR is a folder or a Hub id.

    \b
    Example:
      wina generate ./llama-wina --prompt "Once upon a time"
    """
    begin(quiet, f"Reading {folder}")
    folder = local(folder, quiet, revision, token)
    from ..models.device import choose_device
    from ..verbs.generate import generate

    quiet_transformers()  # which has a bar for reading weights

    def write(text: str) -> None:
        if not as_json:
            click.echo(text, nl=False)

    done = generate(folder, prompt, device=str(choose_device(device)), write=write, echo=True, **options)
    if as_json:
        shown = {
            "text": done.text,
            "tokens": done.tokens,
            "tokens_per_second": done.tokens_per_second,
            "chat": done.chat,
        }
        print_json(shown)
        return
    write("\n")
    if not quiet:
        speed = f", {done.tokens_per_second:.1f} tokens a second" if done.tokens_per_second else ""
        small = (
            f"; {done.parameters / 1e6:.1f} million parameters know words and little else"
            if done.parameters < TOY
            else ""
        )
        click.echo(f"[{done.tokens} tokens{speed}{small}]", err=True)


@wina.command("verify", short_help="Check every file, tensor and field of a checkpoint.")
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option("--accept", is_flag=True, help="Sign files beside the weights as they are now.")
@quiet_option
@json_option
def verify_command(folder: str, accept: bool, quiet: bool, as_json: bool) -> None:
    """Check every file of a checkpoint against its manifest, and its tensors and config against each other.

    \b
    Examples:
      wina verify ./llama-wina
      wina verify ./llama-wina --accept
    """
    begin(quiet, f"Reading {folder}")
    from ..verbs.verify import verify_folder

    found = verify_folder(folder, progress_of(quiet), accept)
    if as_json:
        print_json({"folder": folder, **dataclasses.asdict(found)})
    elif not quiet and found.accepted:
        click.echo(f"{folder}: {found.files} files are well; accepted as they are now: {', '.join(found.accepted)}")
    elif not quiet:
        click.echo(f"{folder}: {found.files} files are as they were written")


@wina.command("retarget", short_help="Change the default sparsity of a checkpoint in place.")
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option("--sparsity", type=float, required=True, help="The new default, 0 to 0.95.")
@quiet_option
@json_option
def retarget_command(folder: str, sparsity: float, quiet: bool, as_json: bool) -> None:
    """Change the default sparsity of a checkpoint in place, without running the model.

    \b
    Example:
      wina retarget ./llama-wina --sparsity 0.4
    """
    begin(quiet, f"Reading {folder}")
    from ..verbs.retarget import retarget

    retarget(folder, sparsity)
    if as_json:
        print_json({"folder": folder, "sparsity": sparsity})
    elif not quiet:
        click.echo(f"{folder}: default sparsity is now {sparsity:.1%}")


@wina.command("bench", short_help="Time the gated model against the dense one.")
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path())
@click.option("--random", metavar="SIZE", help="Instead of DIR, a Llama shape with random weights: 0.6b, 1b, 3b or 8b.")
@click.option("--kernels", is_flag=True, help="Time single products instead of a model.")
@click.option(
    "--shapes",
    multiple=True,
    callback=shapes,
    help="With --kernels: INPUTSxOUTPUTS, such as 4096x14336.  [default: those of the Llama shapes]",
)
@click.option(
    "--sparsity", "sparsities", multiple=True, callback=fractions, help="Fractions to skip.  [default: 0,0.5,0.65]"
)
@click.option("--prompt-tokens", type=int, help="Length of the prompt.  [default: 512, or what the context leaves]")
@click.option("--tokens", default=32, show_default=True, help="Tokens decoded after it.")
@click.option("--repeats", type=int, help="Times the prompt, or each product, is run.  [default: 3, or 31]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
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
    prompt_tokens: int | None,
    tokens: int,
    repeats: int | None,
    device: str,
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
      wina bench --random 8b --device cuda
    """
    begin(quiet, f"Reading {folder or 'the machine'}")
    import torch

    from ..models.device import choose_device
    from ..verbs.bench import bench_model
    from ..verbs.bench_cuda import bench_cuda
    from ..verbs.bench_cuda_products import SHAPES as CUDA_SHAPES
    from ..verbs.bench_cuda_products import bench_cuda_products
    from ..verbs.bench_products import SHAPES, bench_products
    from ..verbs.benchmark import SPARSITIES, Benchmark
    from ..verbs.card import CardBenchmark

    if kernels and (folder or random):
        raise OptionError("--kernels times products of random numbers; give neither DIR nor --random")
    if shapes and not kernels:
        raise OptionError("--shapes goes with --kernels")
    quiet_transformers()
    if threads:
        torch.set_num_threads(threads)
    chosen = choose_device(device)
    shared: dict[str, Any] = {"sparsities": sparsities or SPARSITIES, "dtype": dtype, "progress": progress_of(quiet)}
    if kernels:
        shared |= {"repeats": 31 if repeats is None else repeats}
    else:
        shared |= {"repeats": 3 if repeats is None else repeats, "prompt_tokens": prompt_tokens, "tokens": tokens}
        shared |= {"random": random}
    measured: Benchmark | CardBenchmark
    if chosen.type == "cpu":
        measured = bench_products(shapes or SHAPES, **shared) if kernels else bench_model(folder, **shared)
    elif kernels:
        measured = bench_cuda_products(chosen, shapes or CUDA_SHAPES, **shared)
    else:
        measured = bench_cuda(chosen, folder, **shared)
    if as_json:
        print_json(dataclasses.asdict(measured))
    else:
        click.echo(bench_text(measured) if isinstance(measured, Benchmark) else card_text(measured))
