"""Every way in which a folder from a stranger is read, and whether anything outside it was opened."""

import ctypes
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from support.breaking import within
from support.commands import refused, run_wina
from wina_convert import load
from wina_convert.errors import WinaError
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.verify import verify_folder

SINGLE, INDEX, REPORT = "model.safetensors", "model.safetensors.index.json", "wina_report.json"
SHARD = "model-00002-of-00003.safetensors"
Q = "model.layers.0.self_attn.q_proj"
TOKENS = torch.tensor([[0, 310, 7, 1999]])
HANG = 30  # seconds after which a reader counts as hung


READERS: dict[str, Callable[[Path], object]] = {
    "load": lambda folder: load(str(folder)),
    "inspect": inspect_checkpoint,
    "verify": verify_folder,
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "wina inspect": ("inspect",),
    "wina verify": ("verify", "--quiet"),
    "wina generate": ("generate", "--prompt", "a", "--max-new-tokens", "2", "--quiet"),
    "wina retarget": ("retarget", "--sparsity", "0.25"),
}


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def command(name: str, folder: Path) -> Any:
    verb, *options = COMMANDS[name]
    return run_wina(verb, folder, *options)


def all_refuse(folder: Path, *words: str) -> None:
    """Every reader refuses a folder with these words, at once, and changes nothing."""
    before = links(folder)
    for name, read in READERS.items():
        with within(HANG), pytest.raises(WinaError) as raised:
            read(folder)
        for word in words:
            assert word in str(raised.value), f"{name}: {word!r} is not in {str(raised.value)!r}"
    for name in COMMANDS:
        with within(HANG):
            refused(command(name, folder), *words)
    assert links(folder) == before


def links(folder: Path) -> dict[str, str]:
    """What is in a folder, without opening or following anything."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else str(os.lstat(path)[:9:2])
        for path in sorted(folder.rglob("*"))
    }


class Watch:
    """Tells whether files were opened, by Python, Rust or C++: Linux reports it, whatever path led to the file."""

    def __init__(self, *paths: Path) -> None:
        if not sys.platform.startswith("linux"):
            pytest.skip("needs inotify")
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK)
        for path in paths:
            assert libc.inotify_add_watch(self.descriptor, os.fsencode(path), 0x20) >= 0, ctypes.get_errno()  # IN_OPEN

    def opened(self) -> bool:
        """Whether one was, since the last call."""
        with suppress(BlockingIOError):
            return bool(os.read(self.descriptor, 1 << 16))
        return False

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *args: object) -> None:
        os.close(self.descriptor)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: Any, body: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + body
