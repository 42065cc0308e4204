"""The model card of a WINA checkpoint: README.md with metadata for the Hub."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..format.address import HERE
from ..format.default import default_line
from ..format.names import CARD
from ..format.shards import read_headers
from ..models.source import Source
from ..models.stream import model_config
from ..runtime.classes import auto_class

TAGS = ("wina", "activation-sparsity")

BODY = """
# {title}

This is [{base}]({link}) as a WINA checkpoint: at every gated projection the model skips the input columns that do not
matter for the token at hand ([WINA, arXiv 2505.19427](https://arxiv.org/abs/2505.19427)). {merged}{basis}{tuned}

{default}

## Use

```sh
pip install wina-convert
```

```python
from transformers import AutoTokenizer, {loader}

model = {loader}.from_pretrained("{here}")
tokenizer = AutoTokenizer.from_pretrained("{here}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

Another sparsity, from 0 (the dense model) to 0.95, without converting again:

```python
import wina_convert

model = wina_convert.load("{here}", sparsity=0.4)
wina_convert.set_sparsity(model, 0.25)  # in place
```

Programs that do not know the format refuse it: the empty tensor `{sentinel}` is there to stop them,
where they would fill the gated projections with random numbers. Install `wina-convert` for them.

## Measured

On {sequences} sequences of {length} tokens that no threshold was fitted on ({calibration}), at conversion:

| | dense | gated |
| --- | --- | --- |
| sparsity asked | 0% | {asked:.1%} |
| sparsity achieved | 0% | {achieved:.2%} |
| perplexity | {dense_perplexity:.3f} | {perplexity:.3f} |
| KL to dense, nats a token | 0 | {kl:.4f} |
| same most likely token | 100% | {agreement:.1%} |
| bytes of weights read for a token | {dense_bytes:.2f} MB | {gated_bytes:.2f} MB |
{pictures}
Gated are {n} projections of {layers} layers ({targets}). Calibration: {samples} sequences of {length} tokens of {calibration}
text, seed {seed}.{fewer}{pooled}

## Limits

Fewer bytes read is what a memory-bound device can gain at batch 1; how much of it becomes speed depends on the kernel. The
sparsity on your text may differ from that on the calibration text. See `wina_report.json` for every projection.

## Reproduce

`{command}` with wina-convert {version}, torch {torch}, transformers {transformers}.
"""


UNCHANGED = "The weights are unchanged; only a threshold per projection was added."
COPIED = " The head was tied to the\nembedding and is stored by itself, since it is gated."
MERGED = "It is a LoRA adapter, merged onto its base {base} before.\n"
TURNED = (
    "The weights are those of the source in another basis of its hidden states, in which more can be skipped; without skipping\n"
    "the model computes the same, up to rounding."
)


LEARNED = (
    "\nThresholds, biases by sparsity and column weights were learned from the dense model's outputs: on text that learning did\n"
    "not see, KL to dense (nats a token) went from {before:.4f} to {after:.4f} at {level:.0%}."
)
POOLED = (
    " {few} of {gated} experts were given\nfewer than {fewest_tokens} tokens of it and take the thresholds of all "
    "experts of their layer."
)
NOT_LEARNED = "\nLearning thresholds was asked for and not kept: {reason}."


def source_metadata(source: Source) -> dict[str, Any]:
    """The metadata of the source's own card that carries over: licence, languages, tags."""
    path = source.path / CARD
    if not path.is_file():
        return {}
    try:
        data: dict[str, Any] = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a broken card of somebody else is no reason to fail
        return {}
    strings = {name: _strings(data.get(name)) for name in ("language", "tags", "datasets")}
    words = {name: data.get(name) for name in ("license", "license_name", "license_link")}
    return {
        **{name: word for name, word in words.items() if isinstance(word, str) and word},
        **{name: found for name, found in strings.items() if found},
    }


def _address(source: Source) -> str:
    """Where on the Hub a source is; it may be in a subfolder of its repository."""
    repository, inner = source.name.split("/")[:2], source.name.split("/")[2:]
    place = ["tree", str(source.revision), *inner] if inner else []
    return "/".join(["https://huggingface.co", *repository, *place])


def _command(source: Source, options: dict[str, Any]) -> str:
    """What a shell makes the checkpoint with again; a model in a subfolder of its repository is downloaded first."""
    revision = ["--revision", source.revision] if source.revision else []
    model, first = [source.name, *revision], ""
    if len(parts := source.name.split("/")) > 2 and source.revision:
        repository, inner = "/".join(parts[:2]), "/".join(parts[2:])
        words = ["hf", "download", repository, *revision, "--include", f"{inner}/*", "--local-dir", parts[1]]
        model, first = [f"{parts[1]}/{inner}"], f"{shlex.join(words)} && "
    words = [word for name, value in _scalars(options) for word in (f"--{name.replace('_', '-')}", str(value)) if word]
    return first + shlex.join(["wina-convert", *model, "--out", "DIR", *words])


def _strings(value: Any) -> list[str]:
    """The strings of metadata that should be a list of them, whatever it is."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one]


def write_card(folder: Path, source: Source, report: dict[str, Any], pictures: Mapping[str, str] | None = None) -> None:
    """Write the model card into a staged checkpoint.

    Args:
        folder: the staged checkpoint.
        source: what was converted.
        report: as in wina_report.json.
        pictures: files of the folder with what they show.
    """
    kept = source_metadata(source)
    title = f"{source.name.rpartition('/')[2]}-wina"
    on_hub = source.revision is not None
    based_on = ["/".join(source.name.split("/")[:2])] if on_hub else []  # without a subfolder
    if source.adapter and source.adapter.base_revision:
        based_on.append("/".join(source.adapter.base.split("/")[:2]))
    config = model_config(source)
    images = config.get_text_config() is not config
    data = ModelCardData(
        base_model=(based_on if len(based_on) > 1 else based_on[0]) if based_on else None,
        base_model_relation="quantized" if based_on else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if images else "text-generation",
        tags=list(dict.fromkeys([*kept.pop("tags", []), *TAGS])),
        model_name=title,
        eval_results=_results(report),
        **kept,
    )
    options, calibration = report["options"], report["calibration"]
    verification, held_out = report["verification"], report["verification"]["held_out"]
    fewer = calibration["samples"] < options["samples"]
    reads = report["bytes_per_token"]
    body = BODY.format(
        pictures="".join(f"\n![{shown}]({name})\n" for name, shown in (pictures or {}).items()),
        default=default_line(held_out["sparsity"], reads["dense"], reads["gated"]),
        merged=MERGED.format(base=source.adapter.base) if source.adapter else "",
        basis=(UNCHANGED if report["basis"]["kind"] == "none" else TURNED)
        + (COPIED if report.get("head", {}).get("copied_bytes") else ""),
        tuned=_tuned(report.get("tuning")),
        title=title,
        loader=auto_class(config).__name__,
        base=source.name,
        link=_address(source) if on_hub else ".",
        here=HERE,
        sentinel=next(name for name, spec in read_headers(folder).items() if spec.shape == (0,)),
        sequences=verification["sequences"],
        length=calibration["seq_len"],
        calibration=calibration["text"],
        asked=held_out["sparsity"],
        **{key: held_out[key] for key in ("achieved", "perplexity", "dense_perplexity", "kl", "agreement")},
        dense_bytes=reads["dense"] / 1e6,
        gated_bytes=reads["gated"] / 1e6,
        n=len(report["projections"]),
        layers=report["layers"],
        targets=", ".join(options["targets"]),
        samples=calibration["samples"],
        fewer=f" {options['samples']} were asked for; the text is short." if fewer else "",
        pooled=_pooled(report.get("experts")),
        seed=calibration["seed"],
        command=_command(source, options),
        version=report["versions"]["wina-convert"],
        torch=report["versions"]["torch"],
        transformers=report["versions"]["transformers"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(folder / CARD)


def _results(report: dict[str, Any]) -> list[EvalResult]:
    """What was measured at conversion, as the Hub lists it beside a model; calibration text of a Hub dataset by its id."""
    held_out, text = report["verification"]["held_out"], report["calibration"]["text"]
    common: dict[str, Any] = {
        "task_type": "text-generation",
        "task_name": "Text generation",
        "dataset_type": text.partition(":")[0],
        "dataset_name": f"{text}, sequences that no threshold was fitted on",
        "metric_args": {
            "sparsity": held_out["sparsity"],
            "achieved": round(held_out["achieved"], 4),
            "sequences": report["verification"]["sequences"],
            "tokens": report["calibration"]["seq_len"],
        },
    }
    at = f"at {held_out['sparsity']:.1%} sparsity"
    return [
        EvalResult(
            metric_type="perplexity",
            metric_name=f"Perplexity {at} (dense: {held_out['dense_perplexity']:.3f})",
            metric_value=round(held_out["perplexity"], 3),
            **common,
        ),
        EvalResult(
            metric_type="kl_divergence",
            metric_name=f"KL to the dense model {at}, nats a token",
            metric_value=round(held_out["kl"], 4),
            **common,
        ),
    ]


def _pooled(experts: dict[str, Any] | None) -> str:
    return POOLED.format(few=len(experts["pooled"]), **experts) if experts and experts["pooled"] else ""


def _tuned(tuning: dict[str, Any] | None) -> str:
    if tuning is None:
        return ""
    if not tuning["kept"]:
        return NOT_LEARNED.format(reason=tuning["reason"])
    middle = len(tuning["levels"]) // 2
    before, after, level = (tuning[name][middle] for name in ("kl_before", "kl_after", "levels"))
    return LEARNED.format(before=before, after=after, level=level)


def _scalars(options: dict[str, Any]) -> list[tuple[str, Any]]:
    pairs = [
        (name, value) for name, value in options.items() if not isinstance(value, (list, bool)) and value is not None
    ]
    pairs += [(name, "") for name, value in options.items() if value is True]
    return pairs + [(name, value) for name in ("targets", "ignore") for value in options[name]]
