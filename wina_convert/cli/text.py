"""Reports and tables as text for a terminal; the command line prints them."""

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import printable
from ..format.experts import of_any_expert
from ..format.names import split_layer
from ..progress import duration

if TYPE_CHECKING:
    from ..verbs.benchmark import Benchmark, ProductSpeed
    from ..verbs.card import CardBenchmark
    from ..verbs.evaluate import Evaluation


def report_text(report: dict[str, Any], out: str, seconds: float) -> str:
    """What a conversion came to."""
    held_out = report["verification"]["held_out"]
    rise = held_out["perplexity"] / held_out["dense_perplexity"] - 1
    reads = report["bytes_per_token"]
    return "\n".join(
        [
            f"Wrote {out} in {duration(seconds)}: {len(report['projections'])} gated projections in {report['layers']} layers",
            f"  sparsity      asked {held_out['sparsity']:.1%}, achieved {held_out['achieved']:.2%} on held-out text",
            f"  perplexity    dense {held_out['dense_perplexity']:.2f}, gated {held_out['perplexity']:.2f} ({rise:+.1%})",
            f"  bytes/token   {size(reads['dense'])} -> {size(reads['gated'])} ({reads['gated'] / reads['dense'] - 1:+.0%})",
            f"  basis         {basis_text(report['basis'])}",
            *head_text(report.get("head")),
            *([f"  tuning        {tuning_text(report['tuning'])}"] if "tuning" in report else []),
            calibration_text(report["calibration"] | {"asked": report["options"]["samples"]}),
            *experts_text(report.get("experts")),
            *unused_text(report["unused"]),
            *within_text(report["verification"].get("max_ppl_increase")),
            *([f"Uploaded to {report['pushed']}"] if "pushed" in report else []),
            f'Try it: wina generate {shlex.quote(out)} --prompt "Once upon a time"',
        ]
    )


def within_text(within: dict[str, Any] | None) -> list[str]:
    """The largest sparsity within a loss, where one was asked for: of all gated weights, and of the feed-forward ones."""
    if within is None:
        return []
    name = f"PPL-{within['allowed']:g}%"
    if not within["sparsity"]:
        return [f"  {name:<13} no sparsity measured stays within it: the default is 0"]
    inside = within["achieved_feed_forward"]
    alone = "" if inside is None else f", {inside:.2%} of the feed-forward ones alone"
    return [
        f"  {name:<13} {within['achieved']:.2%} of all gated weights{alone}, at {within['increase']:+.2f}% perplexity"
    ]


def plan_text(plan: dict[str, Any], out: str) -> str:
    """What a dry run tells."""
    reads, allowed = plan["bytes_per_token"], plan["max_ppl_increase"]
    kinds: dict[tuple[str, int, int], list[str]] = {}
    for name, shape in plan["projections"].items():
        kind = ".".join(of_any_expert(name).split(".")[-2:])
        kinds.setdefault((kind, shape["in_features"], shape["out_features"]), []).append(name)
    rows = [["gated projection", "inputs", "outputs", "layers"]]
    for (kind, inputs, outputs), names in kinds.items():
        layers = {of_any_expert(name) for name in names}
        experts = len(names) // len(layers)
        shown = f"{kind.removeprefix('*.')} of {experts} experts" if kind.startswith("*.") else kind
        rows.append([shown, str(inputs), str(outputs), str(len(layers))])
    return "\n".join(
        [
            f"Plan for {plan['source']['name']} ({plan['dtype']} on {plan['device']}), nothing was touched\n",
            table(rows),
            "",
            f"  bytes/token   {size(reads['dense'])} -> {size(reads['gated'])} at {plan['sparsity']:.1%} sparsity "
            f"({reads['gated'] / reads['dense'] - 1:+.0%})",
            *(
                [f"  default       the largest sparsity within {allowed:+g}% of perplexity, found at conversion"]
                if allowed
                else []
            ),
            f"  basis         {basis_text(plan['basis'])}",
            *head_text(plan.get("head")),
            *[f"  stays dense   {name}: {reason}" for name, reason in plan["stays_dense"].items()],
            *([f"  tuning        {tuning_text(plan['tuning'])}"] if "tuning" in plan else []),
            calibration_text(plan["calibration"]),
            *unused_text(plan["unused"]),
            f"  disk          {size(plan['disk_bytes'])} in {out}",
            f"  time          about {duration(plan['seconds'])}, the download aside",
        ]
    )


def span(kind: str, values: Mapping[str, float], form: str) -> str:
    """The value of a kind of projection, or of experts the smallest and largest, in a form such as "{:.1%}"."""
    found = (
        [values[kind]] if kind in values else [value for name, value in values.items() if of_any_expert(name) == kind]
    )
    return " to ".join(dict.fromkeys(form.format(value) for value in (min(found), max(found)))) if found else "-"


def calibration_text(found: dict[str, Any]) -> str:
    """A line on the text; what was asked of it and it does not hold is said."""
    less = (
        f", fewer than the {found['asked']} asked for: the text is short" if found["samples"] < found["asked"] else ""
    )
    return printable(
        f"  calibration   {found['samples']} sequences of {found['seq_len']} tokens of {found['text']}{less}"
    )


def head_text(found: dict[str, Any] | None) -> list[str]:
    """A line on a head that is gated."""
    if not found:
        return []
    copied = found["copied_bytes"]
    tied = f"; it was tied to the embedding and is stored by itself: {size(copied)} more" if copied else ""
    return [f"  head          gated{tied}"]


def experts_text(found: dict[str, Any] | None) -> list[str]:
    """A line on experts that were given too few tokens for thresholds of their own, where there are any."""
    if not found or not found["pooled"]:
        return []
    return [
        f"  experts       {len(found['pooled'])} of {found['gated']} were given fewer than {found['fewest_tokens']} tokens "
        "and take the thresholds of all experts of their layer; more --samples give them their own"
    ]


def unused_text(names: Sequence[str]) -> list[str]:
    """A line on the tensors of the source that no parameter takes, where there are any."""
    named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [printable(f"  left out      {named}: the model takes no such tensor")] if names else []


def basis_text(basis: dict[str, Any]) -> str:
    """What change of basis a conversion folds into the weights."""
    if basis["kind"] == "none":
        return "none: the weights are the source's"
    kind = "" if basis["kind"] == "values" else f"{basis['kind']}; "
    fit = f" ({basis['fit']})" if "fit" in basis else ""
    return f"{kind}residual stream {basis['stream']}, values {basis['values']}{fit}"


def evaluation_text(found: "Evaluation", texts: Sequence[str]) -> str:
    """One checkpoint on text, and what each of its projections skipped."""
    compared = found.measurements[0].rise is not None
    rows = [["sparsity", "achieved", "perplexity", *(["dense", "rise", "KL", "top-1 agreement"] if compared else [])]]
    for one in found.measurements:
        row = [f"{one.sparsity:.1%}", f"{one.achieved:.2%}", f"{one.perplexity:.3f}"]
        if one.rise is not None:
            row += [f"{one.dense_perplexity:.3f}", f"{one.rise:+.2%}", f"{one.kl:.4f}", f"{one.agreement:.1%}"]
        rows.append(row)
    lines = [*_measured_on([found], texts), "", table(rows)]
    for one in found.measurements:
        lines += ["", f"achieved by projection at {one.sparsity:.1%}", ""]
        lines.append(table(by_layer(one.projections, "{:.1%}")))
    return "\n".join(lines)


def comparison_text(found: "Sequence[Evaluation]", texts: Sequence[str]) -> str:
    """Several checkpoints on the same text."""
    rows = [
        ["checkpoint", "made with", "sparsity", "achieved", "perplexity", "rise", "KL", "top-1", "bytes/token", "MACs"]
    ]
    for evaluation in found:
        dense, first = evaluation.dense, evaluation.measurements[0]
        rows.append([evaluation.checkpoint, "dense", "", "", f"{first.dense_perplexity:.3f}", "", "", ""])
        rows[-1] += [size(dense.nbytes), count(dense.macs)]
        for one, cost in zip(evaluation.measurements, evaluation.costs, strict=True):
            row = ["", evaluation.made, f"{one.sparsity:.1%}", f"{one.achieved:.2%}", f"{one.perplexity:.3f}"]
            row += [f"{one.rise:+.2%}", f"{one.kl:.4f}", f"{one.agreement:.1%}", size(cost.nbytes), count(cost.macs)]
            rows.append(row)
    return "\n".join([*_measured_on(found, texts), "", table(rows)])


def _measured_on(found: "Sequence[Evaluation]", texts: Sequence[str]) -> list[str]:
    """On what, how it was cut, and whether a conversion may have seen it."""
    lines = []
    for tokens, protocol in dict.fromkeys((one.measurements[0].tokens, one.protocol) for one in found):
        lines += [f"{tokens} predicted tokens of {', '.join(texts)}", protocol.shown()]
    for one in found:
        if not one.seen_recorded:
            lines.append(
                f"{one.checkpoint} does not record which text its conversion saw; whether it saw this one cannot be told"
            )
    return [printable(line) for line in lines]


def tuning_text(tuning: dict[str, Any]) -> str:
    """What learning came to, or what it will take."""
    if "memory_bytes" in tuning:
        how = ", layers computed again for their gradients" if tuning["gradient_checkpointing"] else ""
        return f"takes {size(tuning['memory_bytes'])} of memory{how}"
    if not tuning["kept"]:
        return f"untuned: {tuning['reason']}"
    losses = zip(tuning["levels"], tuning["kl_before"], tuning["kl_after"], strict=True)
    return "KL to dense " + ", ".join(f"{before:.3g} -> {after:.3g} at {level:.0%}" for level, before, after in losses)


def bench_text(measured: "Benchmark") -> str:
    """What a benchmark found."""
    head = [
        f"{measured.model}; {measured.machine}; {measured.date}",
        f"memory is read at {measured.bandwidth / 1e9:.1f} GB/s",
    ]
    if not measured.interleaved:
        head.append("memory does not hold the dense and the gated model at once: timed one after the other")
    rows = [["sparsity", "skipped", "ms/token", "tokens/s", "speed", "MB/token", "of roofline", "prompt s", "speed"]]
    for row in measured.models:
        rows.append(
            [
                "dense" if row.sparsity is None else f"{row.sparsity:.0%}",
                "" if row.achieved is None else f"{row.achieved:.1%}",
                f"{row.decode_seconds * 1e3:.1f}",
                f"{row.tokens_per_second:.1f}",
                f"{row.ratio:.2f}x",
                f"{row.bytes_per_token / 1e6:.0f}",
                f"{row.roofline:.0%}",
                f"{row.prefill_seconds:.2f}",
                f"{row.prefill_ratio:.2f}x",
            ]
        )
    if measured.products:
        rows = _product_rows(measured.products)
    return "\n".join([*head, "", table(rows)])


def card_text(measured: "CardBenchmark") -> str:
    """What a benchmark on a GPU found."""
    head = [
        f"{measured.model}; {measured.card}; {measured.date}",
        f"memory is read at {measured.read_bandwidth / 1e9:.0f} GB/s and copied at {measured.copy_bandwidth / 1e9:.0f} GB/s",
    ]
    if not measured.interleaved:
        head.append("memory does not hold the dense and the gated model at once: timed one after the other")
    rows = [["sparsity", "skipped", "ms/step", "speed", "MB/token", "of roofline"]]
    rows[0] += ["generate ms", "speed", "not compiled ms", "speed"]
    for row in measured.models:
        rows.append(
            [
                "dense" if row.sparsity is None else f"{row.sparsity:.0%}",
                "" if row.achieved is None else f"{row.achieved:.1%}",
                f"{row.step_seconds * 1e3:.2f}",
                f"{row.step_ratio:.2f}x",
                f"{row.bytes_per_token / 1e6:.0f}",
                f"{row.roofline:.0%}",
                f"{row.generate_seconds * 1e3:.2f}",
                f"{row.generate_ratio:.2f}x",
                f"{row.eager_seconds * 1e3:.2f}",
                f"{row.eager_ratio:.2f}x",
            ]
        )
    if measured.products:
        rows = _product_rows(measured.products, microseconds=True)
    return "\n".join([*head, "", table(rows)])


def _product_rows(products: "Sequence[ProductSpeed]", microseconds: bool = False) -> list[list[str]]:
    rows = [["in x out", "sparsity", "us" if microseconds else "ms", "speed", "GB/s", "of bandwidth"]]
    for product in products:
        rows.append(
            [
                f"{product.in_features}x{product.out_features}",
                "dense" if product.sparsity is None else f"{product.sparsity:.0%}",
                f"{product.seconds * 1e6:.1f}" if microseconds else f"{product.seconds * 1e3:.3f}",
                f"{product.ratio:.2f}x",
                f"{product.bandwidth / 1e9:.1f}",
                f"{product.roofline:.0%}",
            ]
        )
    return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first to the left and the rest to the right."""
    rows = [[printable(cell, 120) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def size(count: float) -> str:
    """A number of bytes in decimal multiples."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def count(number: float) -> str:
    """A number of operations in decimal multiples."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f}"


def by_layer(values: Mapping[str, float], form: str) -> list[list[str]]:
    """A row for each decoder layer and a column for each kind of projection, from values by module name."""
    layers: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        place = split_layer(name)
        layer, kind = (str(place[1]), place[2]) if place else ("head", name)
        layers.setdefault(layer, {})[kind] = value
    kinds = list(dict.fromkeys(of_any_expert(kind) for row in layers.values() for kind in row))
    header = ["layer", *(kind.rpartition(".")[2] for kind in kinds)]
    return [header, *([layer, *(span(kind, row, form) for kind in kinds)] for layer, row in layers.items())]
