"""A reader of WINA checkpoints in 65 lines, written from wina_convert/format/README.md."""

import json
import struct

import numpy as np

ELEMENTS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
FIELDS = "quant_method format_version sparsity prefill grid modules scheme allocation shares biases low_rank basis calibration"


def refuse(wrong, what):
    if wrong:
        raise ValueError(what)


class Reader:
    def __init__(self, folder):
        self.folder, self.tensors = folder, {}
        with open(f"{folder}/config.json", encoding="utf-8") as file:
            block = json.load(file).get("quantization_config") or {}
        refuse(block.get("quant_method") != "wina" or block.get("format_version") not in (1, 2), "not WINA 1 or 2")
        refuse(set(block) - {*FIELDS.split(), "source", "tool_version"}, "unknown fields")
        self.sparsity, self.grid = block.get("sparsity") or 0.0, block.get("grid", [k / 20 for k in range(20)])
        refuse(self.grid[0] or self.grid[-1] > 1 or self.grid != sorted(set(self.grid)), "no ascending grid")
        try:
            with open(f"{folder}/model.safetensors.index.json", encoding="utf-8") as file:
                files = set(json.load(file)["weight_map"].values())
        except FileNotFoundError:
            files = {"model.safetensors"}
        for name in files:
            refuse(name in ("", ".", "..") or "/" in name or "\\" in name, "the index leads out of the folder")
            with open(f"{folder}/{name}", "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                self.tensors |= {key: (name, 8 + length, entry) for key, entry in json.loads(file.read(length)).items()}

    def tensor(self, key):
        file, data, entry = self.tensors[key]
        begin, shape = data + entry["data_offsets"][0], tuple(entry["shape"])
        array = np.memmap(f"{self.folder}/{file}", ELEMENTS[entry["dtype"]], "r", begin, shape)
        return (array.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else array

    def product(self, module, x, sparsity=None):
        """x [..., in], float32 -> y [..., out], float32, and which inputs are kept, [..., in], bool."""
        s, grid = self.sparsity if sparsity is None else sparsity, self.grid
        refuse(not 0 <= s <= min(0.95, grid[-1]), "the sparsity is out of range")
        keys = [key.removesuffix(".weight_t") for key in self.tensors if key.endswith(".weight_t")]
        tail = next((module[module.index(f".{n}.") :] for n in module.split(".") if n.isdigit()), " ")
        (p,) = [module] if module in keys else [k for k in keys if module.endswith(f".{k}") or k.endswith(tail)]
        weight_t, norms, curve = (self.tensor(f"{p}.{leaf}") for leaf in ("weight_t", "column_norms", "thresholds"))
        table = np.column_stack([curve, self.tensor(f"{p}.biases") if f"{p}.biases" in self.tensors else 0 * curve])
        refuse(not np.isfinite(norms).all() or (norms < 0).any(), "no column norms")
        refuse(not np.isfinite(table).all() or table[0].any() or (np.diff(curve) < 0).any(), "no thresholds or biases")
        r = next(k for k, point in enumerate(grid) if s <= point)
        (a, b), w = table[[r - 1, r]], np.float32((s - grid[r - 1]) / (grid[r] - grid[r - 1]) if r else 1)
        t, *shift = a + w * (b - a) if w < 0.5 else b - (b - a) * (np.float32(1) - w)
        bias = np.float32(shift) + (self.tensor(f"{p}.bias").astype("<f4") if f"{p}.bias" in self.tensors else 0)
        with np.errstate(all="ignore"):
            kept = ~(np.abs(x) <= np.where(norms > 0, t / norms, np.float32(np.inf)))
            y = np.where(kept, x, np.float32(0)) @ weight_t.astype("<f4") + bias
        if s > 0 and f"{p}.low_rank_in" in self.tensors:
            left, right = (self.tensor(f"{p}.low_rank_{leaf}").astype("<f4") for leaf in ("in", "out"))
            y = y + np.where(kept, np.float32(0), x) @ left @ right
        return y, kept
