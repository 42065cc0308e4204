"""A LoRA adapter as PEFT saves it, and its merge onto the tensors of its base while they are read.

Merged is what PEFT's `merge_and_unload` gives: W + scale * B A (LoRA, arXiv 2106.09685), here in float32 and rounded once.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import SourceError
from ..format.names import split_layer
from ..format.shards import TensorSpec, read_file_headers, read_tensors
from ..format.trust import check_content, contained

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields of the config that change nothing about a merge, or are used here. Any other one must be empty.
KNOWN = {
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias", "lora_dropout"),
    *(
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
    ),
    *("megatron_core", "qalora_group_size", "eva_config", "loftq_config", "runtime_config", "ensure_weight_tying"),
}
NAMED = {"use_dora": "DoRA", "use_qalora": "QA-LoRA", "alora_invocation_tokens": "an activated LoRA"}
UNCHANGED_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # other ways to begin also change the base
MERGE_FIRST = "merge it with PEFT (merge_and_unload, save_pretrained) and convert the result"
PART = re.compile(r"(?P<module>.+)\.lora_(embedding_)?(?P<side>[AB])(\.weight)?")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter and where its parts go.

    Attributes:
        name: its Hub id, or the name of its folder.
        path: its folder.
        revision: commit hash on the Hub; None for a local folder.
        base: the model that it was trained on, as it names it.
        base_revision: the revision of that, if it names one.
        config: adapter_config.json, parsed.
        tensors: its tensors by name.
        pairs: B and A of each weight that has a product added, by the weight's key in the base.
        replaced: the tensor that takes the place of one of the base, by its key there.
    """

    name: str
    path: Path
    revision: str | None
    base: str
    base_revision: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """Its files."""
        return [self.path / CONFIG, self.path / WEIGHTS]

    def changes(self, key: str) -> bool:
        """Whether a tensor of the base becomes another."""
        return key in self.pairs or key in self.replaced

    def merged(self, key: str, tensor: Tensor) -> Tensor:
        """What becomes of a tensor of the base, in its dtype."""
        made = tensor
        if key in self.replaced:
            made = self._read(self.replaced[key])
        if key in self.pairs:
            up, down = (self._read(name).float() for name in self.pairs[key])
            delta = down.t() @ up.t() if "embedding" in self.pairs[key][0] else up @ down
            flipped = bool(self.config.get("fan_in_fan_out")) and "embedding" not in self.pairs[key][0]
            made = made.float() + (delta.t() if flipped else delta) * self.scale(key, len(down))
        return made.to(tensor.dtype)

    def scale(self, key: str, rank: int) -> float:
        """What the product of a pair is multiplied by."""
        module = self.pairs[key][0].removeprefix(PREFIX).rpartition(".lora_")[0]
        patterns = self.config.get("alpha_pattern") or {}
        found = (
            alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)
        )  # as PEFT does
        alpha = float(next(found, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _read(self, name: str) -> Tensor:
        ((_, tensor),) = read_tensors(self.path, [self.tensors[name]])
        return tensor


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def open_adapter(name: str, folder: Path, revision: str | None = None) -> Adapter:
    """Read an adapter's config and headers.

    Args:
        name: its Hub id or name.
        folder: where it is.
        revision: its commit on the Hub.

    Raises:
        SourceError: it is of a kind that cannot be merged here, damaged, or names no base.
    """
    try:
        config = json.loads(contained(folder, CONFIG).read_bytes())
        kind, base, pinned = (config.get(key) for key in ("peft_type", "base_model_name_or_path", "revision"))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise SourceError(f"{folder / CONFIG} is no JSON object that can be read ({error}); get it again") from error
    if kind != "LORA":
        raise SourceError(
            f"{name} is a PEFT adapter of kind {kind!r} and no model; only LoRA is merged here: {MERGE_FIRST}"
        )
    if not isinstance(base, str) or not base:
        raise SourceError(f"{name} is a LoRA adapter that names no base model; {MERGE_FIRST}")
    for key, value in config.items():
        if key in NAMED and value:
            raise SourceError(f"{name} is {NAMED[key]}, which adds more than a product to the weights; {MERGE_FIRST}")
        if key not in KNOWN and value:
            raise SourceError(f"{name} has {key} in its {CONFIG}, of which nothing is known here; {MERGE_FIRST}")
    if (begun := config.get("init_lora_weights")) not in UNCHANGED_BASE:
        raise SourceError(f"{name} began as {begun!r}, which changes the base model's weights as well; {MERGE_FIRST}")
    try:
        patterns = config.get("alpha_pattern") or {}
        alphas = [float(alpha) for alpha in (config.get("lora_alpha", 8), *patterns.values())]
        usable = all(map(math.isfinite, alphas)) and all(re.compile(pattern) for pattern in patterns)
    except (TypeError, ValueError, AttributeError, OverflowError, re.error):
        usable = False
    if not usable:
        raise SourceError(f"{name}: lora_alpha or alpha_pattern in its {CONFIG} is no number; get the adapter again")
    if not (folder / WEIGHTS).is_file():
        pickled = (
            " but pickled weights, which can run code when read" if (folder / "adapter_model.bin").exists() else ""
        )
        raise SourceError(f"{name} has no {WEIGHTS}{pickled}; save it with a newer PEFT")
    check_content(folder / WEIGHTS)
    pinned = pinned if isinstance(pinned, str) and pinned else None
    return Adapter(name, folder, revision, base, pinned, config, read_file_headers(folder, WEIGHTS))


def bind(adapter: Adapter, base: Mapping[str, TensorSpec], vocabulary: object) -> Adapter:
    """An adapter with the keys in its base of what it changes: `pairs` and `replaced`.

    Args:
        adapter: the adapter.
        base: the tensors of its base, by key; the base model's prefix may be missing from the keys.
        vocabulary: tokens that the base knows.

    Raises:
        SourceError: the base has no place for a tensor of it, or one of another shape, or ties it to another.
    """
    sides: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name in adapter.tensors:
        plain = name.removeprefix(PREFIX)
        if part := PART.fullmatch(plain):
            key = _key(adapter, f"{part['module']}.weight", base)
            sides.setdefault(key, {})[part["side"]] = name
        elif "lora_" in plain:
            raise SourceError(f"{adapter.name} holds {name!r}, which is no part of a plain LoRA; {MERGE_FIRST}")
        else:
            replaced[_key(adapter, plain.replace(".base_layer.", "."), base)] = name
    pairs = {}
    for key, found in sides.items():
        if set(found) != {"A", "B"}:
            raise SourceError(
                f"{adapter.name} has half of a pair for {key!r} ({', '.join(found.values())}); get it again"
            )
        pairs[key] = (found["B"], found["A"])
    for key in (*pairs, *replaced):
        _check(adapter, key, base, vocabulary, pairs.get(key), replaced.get(key))
    return replace(adapter, pairs=pairs, replaced=replaced)


def _key(adapter: Adapter, name: str, base: Mapping[str, TensorSpec]) -> str:
    keys = [name] if name in base else [key for key in base if name.endswith(f".{key}")]
    if len(keys) != 1:
        raise SourceError(
            f"{adapter.name} changes {name!r}, for which its base {adapter.base} has {len(keys)} tensors; {MERGE_FIRST}"
        )
    return keys[0]


def _check(
    adapter: Adapter,
    key: str,
    base: Mapping[str, TensorSpec],
    vocabulary: object,
    pair: tuple[str, str] | None,
    whole: str | None,
) -> None:
    spec, tensors = base[key], adapter.tensors
    shape: tuple[int, ...] = spec.shape if whole is None else tensors[whole].shape
    if pair is not None and shape == spec.shape:
        up, down = (tensors[name].shape for name in pair)
        rank = down[0] if down else 0
        made = (up[0], down[1]) if len(up) == len(down) == 2 and up[1] == rank > 0 else ()
        turned = bool(adapter.config.get("fan_in_fan_out")) or "embedding" in pair[0]
        shape = made[::-1] if turned else made
    if shape != spec.shape:
        raise SourceError(
            f"{adapter.name} does not fit its base {adapter.base}: {key!r} is {list(spec.shape)} there, not {list(shape)}; "
            "give the base that it was trained on, or merge it with PEFT first"
        )
    if len(spec.shape) != 2 or spec.shape[0] != vocabulary:
        return
    if [other for other, one in base.items() if one.shape == spec.shape and split_layer(other) is None] == [key]:
        raise SourceError(
            f"{adapter.name} changes {key!r}, which its base {adapter.base} uses as embedding and as head, and an adapter "
            f"changes one of them; {MERGE_FIRST}"
        )
