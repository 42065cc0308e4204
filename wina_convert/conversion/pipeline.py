"""`convert`: the straight line from a source to a published checkpoint, and nothing else."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from .. import __version__
from . import plot as pictures
from .card import write_card
from ..format.checkpoint import REPORT
from ..format.config import WinaConfig, check_sparsity
from ..errors import CalibrationError, OptionError
from .estimate import disk_bytes, plan_report, shape_report
from ..verbs.verify import write_manifest
from .layers import write_layers
from .plan import make_plan
from ..progress import Progress, silent
from ..format.shards import ShardWriter, shard_bytes
from ..models.source import Source, open_source
from .staging import staged
from ..models.text import BUNDLED, HELD_OUT, load_tokenizer, read_documents, sequence_length, sequences, split
from ..fitting.thresholds import levels
from .proof import verify
from .weights import check_space, check_target, copy_sidecars, write_config, write_json


def convert(
    model: str,
    out: str | Path,
    *,
    sparsity: float = 0.5,
    calibration: str = BUNDLED,
    samples: int = 64,
    seq_len: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    targets: Sequence[str] = ("all",),
    ignore: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    keep: bool = True,
    dry_run: bool = False,
    plot: bool = False,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    tqdm_class: type[Any] | None = None,
) -> dict[str, Any]:
    """Turn a Hugging Face causal LM into a WINA checkpoint.

    One decoder layer is in memory at a time, and the folder appears only when it is complete and verified.

    Args:
        model: local folder or Hub id.
        out: folder to write.
        sparsity: default fraction of every gated projection's inputs to skip, within [0, 0.95]. The checkpoint stores
            thresholds for all others too.
        calibration: "bundled", a .txt, .jsonl or .parquet file, or the name of a dataset (see `text.read_documents`).
        samples: calibration sequences; fewer are used where the text has fewer.
        seq_len: tokens of a sequence; None: 512, or the model's context where that is shorter.
        batch_size: sequences computed at a time on a GPU; on a CPU it is one, which is as fast.
        seed: of the choice of sequences.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1" ...
        dtype: "auto" (as the source is), "float32", "bfloat16" or "float16".
        max_shard_size: largest weight file, such as "5GB".
        targets: "all", "attention", "mlp" or glob patterns of module names.
        ignore: glob patterns of module names to leave dense.
        overwrite: replace an existing WINA checkpoint, or discard an unfinished one.
        resume: continue an unfinished conversion with the same arguments, where there is one.
        keep: leave an interrupted conversion in a hidden folder beside `out`, for `resume`.
        dry_run: return the plan and touch nothing.
        plot: also write pictures (needs matplotlib).
        revision: branch, tag or commit on the Hub.
        token: Hub access token.
        trust_remote_code: allow the source's own Python code.
        progress: how to report progress; see the module `progress`.
        tqdm_class: progress bar for downloads.

    Returns:
        the report, as in wina_report.json; for a dry run, the plan.

    Raises:
        WinaError: whatever stands in the way; nothing is written then.
    """
    sparsity = check_sparsity(sparsity)
    if samples < 1 or batch_size < 1:
        raise OptionError(f"samples is {samples} and batch size is {batch_size}; both must be at least 1")
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed is {seed}; give 0 to {2**63 - 1}")
    shard_bytes(max_shard_size)
    target = choose_device(device)
    if plot:
        pictures.check_available()
    check_target(Path(out), model, overwrite)
    source = open_source(model, revision, token, trust_remote_code, dry_run, tqdm_class, progress)
    plan = make_plan(source, targets, ignore, dtype)
    length = sequence_length(source, seq_len)
    if dry_run:
        return plan_report(source, plan, sparsity, samples, length, target)
    check_space(Path(out), disk_bytes(source, plan, sparsity, samples, length))
    # A CPU gains nothing from more sequences at a time, and one by one they give the same bits.
    at_a_time = 1 if target.type == "cpu" else batch_size

    packed = sequences(read_documents(calibration), load_tokenizer(source), length, samples + HELD_OUT, calibration)
    check_vocabulary(packed, source)
    tokens, held_out = split(packed, samples, seed)
    config = WinaConfig(
        sparsity=sparsity,
        prefill="gated",
        modules=[projection.name for projection in plan.projections],
        calibration={
            "text": Path(calibration).name if Path(calibration).is_file() else calibration,
            "samples": len(tokens),
            "seq_len": length,
            "seed": seed,
            "levels": list(levels(sparsity)),
            "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        },
        source={"name": source.name, "revision": source.revision},
        tool_version=__version__,
    )
    versions = {"wina-convert": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    options = {
        "sparsity": sparsity,
        "calibration": config.calibration["text"],
        "samples": samples,
        "seq_len": length,
        "batch_size": batch_size,
        "seed": seed,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "targets": list(targets),
        "ignore": list(ignore),
    }
    identity = {
        "source": config.source | {"files": fingerprints(source)},
        "versions": versions,
        "options": options | {"device": str(target), "plot": plot},
        "calibration": config.calibration | {"held_out_sha256": hashlib.sha256(held_out.numpy().tobytes()).hexdigest()},
    }
    with staged(Path(out), identity, resume, keep, overwrite) as staging:
        folder = staging.folder
        with ShardWriter(folder, plan.tensors, max_shard_size, staging.snapshot is not None) as shards:
            curves = write_layers(source, plan, config, tokens, at_a_time, target, shards, staging, progress, plot)
        write_config(folder, source, config, plan)
        copy_sidecars(source, folder)
        verification = verify(source, plan, folder, held_out, target, at_a_time, progress)
        report = {
            "versions": versions,
            "source": config.source,
            "options": options,
            **shape_report(plan, sparsity),
            "calibration": config.calibration,
            "verification": {"sequences": len(held_out), **verification.as_dict()},
        }
        write_json(folder / REPORT, report)
        write_card(folder, source, report)
        if plot:
            pictures.draw_conversion(folder, report, curves)
        write_manifest(folder)
    return report


def fingerprints(source: Source) -> dict[str, Any]:
    """What shows that a source changed: its config's hash, and size and time of change of its weight files."""
    files = sorted({spec.file for spec in source.tensors.values()})
    stats = {file: (source.folder / file).stat() for file in files}
    return {
        "config.json": hashlib.sha256(source.config_text.encode()).hexdigest(),
        **{file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
    }


def choose_device(device: str) -> torch.device:
    """The device to compute on.

    Raises:
        OptionError: it does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"device is {device!r}, which cannot be used here ({reason}); give auto, cpu or cuda"
        ) from error
    if chosen.type == "meta":
        raise OptionError("device is 'meta', which computes nothing; give auto, cpu or cuda")
    return chosen


def check_vocabulary(tokens: Tensor, source: Source) -> None:
    """Refuse token ids that the model's embedding does not have.

    Raises:
        CalibrationError: the tokenizer is another model's.
    """
    size = source.config.get("vocab_size", math.inf)
    if int(tokens.max()) >= size:
        raise CalibrationError(
            f"the tokenizer gives token {int(tokens.max())} and {source.name} has {size}; put the model's own tokenizer beside it"
        )
