"""In how many chunks layers go fastest, as `ulysses-triton tune --chunks` measured it: one JSON file per GPU.

An entry's key is what a layer's time follows from: the exchange, the ranks and whether one host has them all, the
model's heads, head dims, dtype, causal or dense, whether backward is to come, and the bucket of the sequence, as for
launch configurations (`kernels/_cache`), beside whose files these lie. It counts for its bucket only, and for as long
as attention's kernels are those that were timed. The user's file overrides the one that is shipped, key by key.

Example: 8 ranks on one host, 32 query and 8 kv heads of 128, bf16, causal, over 60,000 tokens by `nccl` ask for the
bucket 65536; where that was timed, `chunks="auto"` is the number that was fastest, otherwise what `cost` predicts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .kernels import _cache
from .spec import Problem

Entry = dict[str, Any]  # a key's fields, and: chunks, ms (by the number of chunks), source


class Key(NamedTuple):
    """What a number of chunks is looked up by."""

    exchange: str
    ranks: int
    one_host: bool
    heads: int
    kv_heads: int
    dims: tuple[int, int]  # (D, Dv)
    dtype: str  # as in "bfloat16"
    causal: bool
    backward: bool
    seq: int  # a bucket

    @staticmethod
    def of(entry: Entry) -> Key:
        D, Dv = entry["dims"]
        key = Key(**{name: entry[name] for name in Key._fields})._replace(dims=(D, Dv))
        if not isinstance(entry["source"], str) or type(entry["chunks"]) is not int or entry["chunks"] < 1:
            raise ValueError(f"{key} has {entry['chunks']!r} chunks, of {entry['source']!r}")
        return key


def key_of(problem: Problem, exchange: str, one_host: bool) -> Key | None:
    """The key of a layer; None for one that works or sends otherwise than those that are timed."""
    otherwise = problem.window or problem.cross or problem.recompute or problem.projects or problem.projects_out
    if otherwise or problem.attention != "triton":
        return None
    return Key(
        exchange, problem.ranks, one_host, problem.heads, problem.kv_heads, (problem.head_dim, problem.value_dim),
        problem.dtype, problem.causal, problem.grad, _cache.bucket(problem.seq),
    )  # fmt: skip


def file_of(gpu: str) -> str:
    """The name of a GPU's file."""
    return f"{_cache.slug(gpu)}.chunks.json"


def source() -> str:
    """A hash of the kernels that attend."""
    return "-".join(_cache.source(kernel)[0] for kernel in ("attend_forward", "attend_dq"))


def lookup(gpu: str, key: Key) -> int | None:
    """The number of chunks that was fastest on this GPU; None where nobody measured it."""
    return _in_force(gpu).get(key)


@cache
def _in_force(gpu: str) -> dict[Key, int]:
    found: dict[Key, int] = {}
    for folder in (_cache.SHIPPED, _cache.user_folder()):
        entries = {} if folder is None else read(folder / file_of(gpu))
        found |= {key: entry["chunks"] for key, entry in entries.items() if entry["source"] == source()}
    return found


def forget() -> None:
    """Read the files again at the next lookup."""
    _in_force.cache_clear()


def read(path: Path) -> dict[Key, Entry]:
    """The entries of a file; none where it does not exist. A damaged file is reported, and has none."""
    try:
        return {Key.of(entry): entry for entry in json.loads(path.read_text())["layers"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:  # also of what is no JSON, or no UTF-8
        warnings.warn(
            f"{path} is no file of chunks ({type(error).__name__}: {error}); it is ignored: delete it, or run "
            "`ulysses-triton tune --chunks`, which replaces it",
            stacklevel=2,
        )
        return {}


def text(gpu: str, entries: Iterable[Entry]) -> str:
    """A file, one line for each entry."""
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in sorted(entries, key=Key.of))
    return f'{{\n "gpu": {json.dumps(gpu)},\n "layers": [\n{lines}\n ]\n}}\n'
