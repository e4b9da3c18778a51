"""Launch configurations that `ulysses-triton tune` measured, one JSON file per GPU, and the lookup in them.

A file holds entries. The key of an entry is its kernel, dtype, head dims, option flags and sequence bucket (the power
of two that is not below the sequence, 0 for kernels that see a shard only); it counts as long as the kernel's source is
the one that was tuned, and never where the correctness gate did not pass. The file of the user's cache folder overrides
the one that is shipped in `autotune_cache/`, key by key.

Example: a bf16 forward with (D, Dv) = (128, 128), causal, with a window, over 5,000 tokens asks for the bucket 8192.
Without an entry for the flags (causal, window) it takes one for (causal,), and of those the bucket that is nearest.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

SHIPPED = Path(__file__).parent.parent / "autotune_cache"
FOLDER = "ULYSSES_TRITON_CACHE"  # the environment variable that names another folder than the user's cache
BLOCK = 128  # BLOCK_M and BLOCK_N divide it: the lists of `Blocks` are of blocks of so many queries and keys
KERNELS = {  # the file that each lies in
    "attend_forward": "attend_forward",
    "attend_dq": "attend_backward",
    "attend_dkv": "attend_backward",
    "pack": "pack",
    "pack_grad": "pack",
    "unpack": "unpack",
    "unpack_grad": "unpack",
}
_LAUNCHING = {"_cache", "_config"}  # files that say how a kernel is launched, and nothing of what it computes

Entry = dict[str, Any]
Tiles = dict[str, int]


class Key(NamedTuple):
    """What a configuration is looked up by."""

    kernel: str
    dtype: str  # as in "bfloat16"
    dims: tuple[int, int]  # (D, Dv)
    flags: tuple[str, ...]  # sorted names of the options that are on
    seq: int  # a bucket

    @staticmethod
    def of(entry: Entry) -> Key:
        D, Dv = entry["dims"]
        return Key(entry["kernel"], entry["dtype"], (D, Dv), tuple(sorted(entry["flags"])), entry["seq"])


def bucket(seq: int) -> int:
    """The power of two that is not below `seq`; 0 for 0."""
    return 1 << (seq - 1).bit_length() if seq > 0 else 0


def slug(gpu: str) -> str:
    """The name of a GPU's file: `NVIDIA H200` -> `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def user_folder() -> Path | None:
    """Where the user's own files lie; None without platformdirs, which `ulysses-triton tune` asks for to write any."""
    if folder := os.environ.get(FOLDER):
        return Path(folder)
    try:
        import platformdirs
    except ModuleNotFoundError:
        return None
    return Path(platformdirs.user_cache_dir("ulysses-triton"))


@cache
def source(kernel: str) -> tuple[str, tuple[str, ...]]:
    """A hash of what `kernel` is compiled from, and the files: its own and those it imports from this folder."""
    folder = Path(__file__).parent
    found: dict[str, bytes] = {}
    todo = [KERNELS[kernel]]
    while todo:
        name = todo.pop()
        if name in found or name in _LAUNCHING:
            continue
        found[name] = (folder / f"{name}.py").read_bytes()
        for node in ast.parse(found[name]).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                todo += [node.module] if node.module else [alias.name for alias in node.names]
    whole = hashlib.sha256()
    for name in sorted(found):
        whole.update(name.encode() + b"\0" + found[name] + b"\0")
    return whole.hexdigest()[:16], tuple(f"{name}.py" for name in sorted(found))


def read(path: Path) -> dict[Key, Entry]:
    """The entries of a file; none where it does not exist. A damaged file is reported, and has none."""
    try:
        content = json.loads(path.read_text())
        if slug(content["gpu"]) != path.stem:
            raise ValueError(f"it was made for {content['gpu']!r}")
        entries = [_checked(entry) for entry in content["entries"]]
        return {Key.of(entry): entry for entry in entries}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # also of what is no JSON, or no UTF-8
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        _warn_once(
            f"{path} is no file of launch configurations ({reason}); it is ignored: delete it, or run `ulysses-triton "
            "tune`, which replaces it"
        )
        return {}


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _checked(entry: Entry) -> Entry:
    """The entry, if a launch can be made of it."""
    for name, kind in (("kernel", str), ("dtype", str), ("source", str), ("seq", int), ("triton", str)):
        if not isinstance(entry[name], kind):
            raise ValueError(f"{name} is {entry[name]!r}")
    if type(entry["gate"]["passed"]) is not bool:
        raise ValueError(f"the gate of {entry['kernel']} passed {entry['gate']['passed']!r}")
    tiles = entry["tiles"]
    if tiles is None:  # nothing passed
        return entry
    blocks = {"BLOCK_M", "BLOCK_N"} if entry["kernel"].startswith("attend") else {"BLOCK_T"}
    if set(tiles) - {"descriptors"} != blocks | {"num_warps", "num_stages"}:
        raise ValueError(f"{entry['kernel']} has the tiles {tiles}")
    for name, value in tiles.items():
        if name == "descriptors" and type(value) is bool:
            continue
        if type(value) is not int or value < 1 or (name.startswith("BLOCK") and BLOCK % value):
            raise ValueError(f"{entry['kernel']} has {name} = {value!r}")
    return entry


@cache
def in_force(gpu: str) -> dict[Key, Tiles]:
    """The configurations of a GPU that may be used: the shipped ones, and over them the user's."""
    folders = [SHIPPED, user_folder()]
    found: dict[Key, Tiles] = {}
    for folder in folders:
        if folder is None:
            continue
        for key, entry in read(folder / f"{slug(gpu)}.json").items():
            known = key.kernel in KERNELS and entry["source"] == source(key.kernel)[0]
            if known and entry["gate"]["passed"] and entry["tiles"] is not None:
                found[key] = entry["tiles"]
    return found


def nearest(asked: Key, known: dict[Key, Tiles]) -> Tiles | None:
    """The tiles of the entry that lies nearest: all flags rather than some of them, then the nearest bucket."""
    fits = [key for key in known if key[:3] == asked[:3] and set(key.flags) <= set(asked.flags)]
    if not fits:
        return None
    return known[min(fits, key=lambda key: (-len(key.flags), _distance(key.seq, asked.seq), key))]


def _distance(a: int, b: int) -> float:
    """Between two buckets, in powers of two."""
    return 0.0 if a == b else math.inf if 0 in (a, b) else abs(math.log2(a / b))
