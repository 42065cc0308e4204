"""`convert`: the straight line from a source to a published checkpoint, and nothing else."""

import hashlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..defaults import torch_defaults
from ..errors import UploadError
from ..format.folder import copy_sidecars
from ..format.manifest import write_manifest
from ..format.names import CONFIG
from ..format.names import REPORT as REPORT_FILE
from ..format.shard_writer import ShardWriter, shard_bytes
from ..format.staging import check_space, check_target, staged
from ..models.device import choose_device
from ..models.seen import SEEN, record
from ..models.source import Source, open_source
from ..models.text import sequence_length
from ..pictures import check_available
from ..progress import Progress, silent
from . import plot as pictures
from .files import checkpoint_config, text_name, write_config, write_json
from .options import IDENTITY, REPORT, ConversionOptions, documented


@documented
@torch_defaults()
def convert(
    model: str,
    out: str | Path,
    *,
    progress: Progress = silent,
    tqdm_class: type[Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Turn a Hugging Face causal LM into a WINA checkpoint.

    One decoder layer is in memory at a time, or with `tune` for a while the whole model. The folder appears only when it is
    complete and verified.

    Args:
        model: local folder or Hub id.
        out: folder to write.
        **options
        progress: how to report progress; see the module `progress`.
        tqdm_class: progress bar for downloads.

    Returns:
        the report, as in wina_report.json, and the URL as `pushed` where it was uploaded; for a dry run, the plan.

    Raises:
        UploadError: the upload broke off after the conversion: the checkpoint is complete, `push` sends what is missing.
        WinaError: whatever else stands in the way; nothing is written then.
    """
    asked = ConversionOptions(**options)
    fetched = asked.dry_run and not Path(model).exists()
    with TemporaryDirectory() if fetched else nullcontext() as scratch:
        return _convert(model, out, asked, Path(scratch) if scratch else None, progress, tqdm_class)


def _convert(
    model: str,
    out: str | Path,
    asked: ConversionOptions,
    scratch: Path | None,
    progress: Progress,
    tqdm_class: type[Any] | None,
) -> dict[str, Any]:
    """`convert`; a dry run of a model on the Hub has a folder to put its small files into."""
    shard_bytes(asked.max_shard_size)
    device = choose_device(asked.device)
    if asked.plot:
        check_available()
    check_target(Path(out), model, asked.overwrite)
    to = None
    if asked.push_to_hub:
        from ..models.upload import Destination, check_access  # here: it takes a while, and few need it

        to = Destination(asked.push_to_hub, asked.push_revision, asked.private or None, token=asked.token)
        check_access(to)  # hours before it is needed

    def try_type(found: Source) -> None:
        """Refuse a type that does not convert before its weights are downloaded."""
        from .twin_proof import check_twin

        if not found.listed:
            check_twin(found, progress)

    found_source = open_source(
        model, asked.revision, asked.token, asked.trust_remote_code, scratch, tqdm_class, progress, try_type
    )
    # Only now, so that what is refused above is refused at once: these import transformers.
    import transformers

    from ..models.tensors import taken, with_own_head
    from .card import write_card
    from .estimate import disk_bytes, experts_report, head_report, plan_report, shape_report
    from .layers import write_layers
    from .loss_limit import sparsity_within, within_report
    from .plan import HEAD, make_plan
    from .proof import prove
    from .sample import read_sample
    from .search import carried_shares, searched
    from .tuning import carried_tuning, plan_tuning, tune_source, tuned_plan
    from .turn import carried_basis, find_basis, plan_turn, restored_basis, turned_source
    from .turn_proof import check_turned

    source, unused = taken(found_source, asked.allow_unused)
    try_type(source)
    if HEAD in asked.targets:
        source = with_own_head(source)
    chosen = (asked.targets, asked.ignore, asked.dtype, asked.scheme, asked.allocation)
    plan = make_plan(source, *chosen)  # as it is: what is wrong with source or options is refused before it is turned
    if turn := plan_turn(source, asked.basis, device):
        plan = make_plan(turn.source, *chosen)
    basis = turn.shown() if turn else {"kind": "none"}
    length = sequence_length(source, asked.seq_len)
    tuning = plan_tuning(turn.source if turn else source, plan, length, device) if asked.tune else None
    check_space(Path(out), disk_bytes(source, plan, turn, tuning, asked.sparsity, 0, length))  # before the text is read
    # A CPU gains nothing from more sequences at a time, and one by one they give the same bits.
    at_a_time = 1 if device.type == "cpu" else asked.batch_size

    sample = read_sample(source, asked, length, turn is not None, tuning is not None)
    tokens, held_out = sample.tokens, sample.held_out
    text = text_name(asked.calibration)
    check_space(Path(out), disk_bytes(source, plan, turn, tuning, asked.sparsity, len(tokens), length))
    if asked.dry_run:
        found_text = {"text": text, "samples": len(tokens), "asked": asked.samples, "seq_len": length}
        planned = plan_report(source, plan, turn, tuning, asked.sparsity, found_text, device, unused)
        return planned | {"max_ppl_increase": asked.max_ppl_increase}
    used = replace(asked, seq_len=length, calibration=text, device=str(device))
    config = checkpoint_config(source, plan, used, tokens, basis)
    versions = {"wina-convert": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    identity = {
        "source": config.source | {"files": fingerprints(source)},
        "versions": versions,
        "options": used.deciding(REPORT, IDENTITY),
        "calibration": config.calibration | sample.digests(tuning is not None),
    }
    with staged(Path(out), identity, asked.resume, asked.keep, asked.overwrite) as staging:
        folder, written, differs = staging.folder, source, None
        carried: dict[str, Tensor] = {}
        extra: dict[str, Any] = {}
        if turn:
            found = restored_basis(turn, staging.snapshot) or find_basis(
                turn, plan.dtype, sample.shown, at_a_time, device, asked.seed, progress
            )
            differs = check_turned(turn, found, held_out, device, progress)
            written = turned_source(turn, found, plan.dtype if plan.cast else None, device)
            carried = carried_basis(found)
        plan = searched(plan, written, config, tokens, at_a_time, device, staging.snapshot, progress)
        config = replace(config, shares=plan.budget.stored())
        carried |= carried_shares(plan)
        if tuning:
            tuned = tune_source(
                written, plan, tuning, tokens, sample.rest, device, asked.seed, staging, carried, progress
            )
            carried |= carried_tuning(tuned)
            extra["tuning"] = tuned.report
            if tuned.tuned:
                plan = tuned_plan(written, plan, tuned.tuned)
                name, shares = plan.budget.allocation, plan.budget.stored()
                config = replace(config, scheme=plan.scheme.name, allocation=name, shares=shares, biases=True)
        with ShardWriter(folder, plan.tensors, asked.max_shard_size, staging.begun is not None) as shards:
            curves, few = write_layers(
                written, plan, config, tokens, at_a_time, device, shards, staging, carried, progress, asked.plot
            )
        write_config(folder, written, config, plan)
        copy_sidecars(source, folder)
        if asked.max_ppl_increase is not None:
            most = sparsity_within(source, folder, asked.max_ppl_increase, held_out, device, at_a_time, progress)
            config = replace(config, sparsity=most)
            write_config(folder, written, config, plan)
        proof = prove(written, plan, folder, held_out, device, at_a_time, progress, source if turn else None)
        within = within_report(plan, asked.max_ppl_increase, proof.held_out)
        report = {
            "versions": versions,
            "source": config.source,
            "options": used.deciding(REPORT),
            **shape_report(plan, proof.held_out.sparsity),
            "unused": list(unused),
            **head_report(source, plan),
            **experts_report(plan, few),
            "basis": basis | ({"logits_differ": differs} if turn else {}),
            **extra,
            "calibration": config.calibration,
            "verification": {"sequences": len(held_out), **proof.as_dict(), **within},
            SEEN: record(sample.all),
        }
        write_json(folder / REPORT_FILE, report)
        write_card(folder, source, report, pictures.PICTURES if asked.plot else None)
        if asked.plot:
            pictures.draw_conversion(folder, report, curves, plan.budget)
        write_manifest(folder)
    if to is None:
        return report
    from ..models.upload import upload

    try:
        return report | {"pushed": upload(Path(out), to, progress=progress)}
    except UploadError as error:
        raise UploadError(f"{out} is complete, but {error}") from error


def fingerprints(source: Source) -> dict[str, Any]:
    """What shows that a source changed: its config's hash, and size and time of change of its weight files."""
    stats = {file.name: file.stat() for file in source.files()}
    return {
        CONFIG: hashlib.sha256(source.config_text.encode()).hexdigest(),
        **{file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
    }
