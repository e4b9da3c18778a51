"""Which tiles a kernel is launched with, and the launch itself.

Tiles come from the files that `ulysses-triton tune` made for this GPU (`_cache`). Where those have nothing that fits,
they come from a table per architecture, `autotune_cache/<architecture>.json`: a list per kernel, of which the first
entry that fits is taken: its `head_dim` is not below the asked one, its `bytes` (per element) match, and its `flags`,
where it has such, are all among the options that are on. The choice follows from the machine, its files and the problem
alone, never from the number of ranks and never from a timing, so results do not depend on those. `fingerprint` is what
ranks compare, since their files may differ.

Example: of the entries for head dims up to 128, first one with the flags [documents], then one without flags, documents
with a causal mask take the first, and a causal mask alone the second. Without the second it had nothing.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from . import _cache
from ._cache import Key, Tiles

INTERPRET = bool(triton.knobs.runtime.interpret)  # read once: Triton decides at decoration, not at launch
SHARD = 0  # the sequence length of kernels that see a shard only: what they choose may not depend on the ranks

_ASKED = ("head_dim", "bytes", "flags")  # what an entry of a table is looked up by; the rest of it are tiles
_interpreter = threading.Lock()  # Triton's interpreter keeps the program ids in module state


class Launch(NamedTuple):
    """One kernel launch as it was asked for: what the ahead-of-time compile reproduces."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages


class _Capture(NamedTuple):
    architecture: str
    launches: list[Launch]


_capture: ContextVar[_Capture | None] = ContextVar("ulysses_triton_capture", default=None)
_fixed: ContextVar[dict[str, Tiles] | None] = ContextVar("ulysses_triton_fixed", default=None)


@contextmanager
def capture(architecture: str) -> Iterator[list[Launch]]:
    """Record the launches of the code inside as they would be made on `architecture`, and run none of them."""
    launches: list[Launch] = []
    token = _capture.set(_Capture(architecture, launches))
    try:
        yield launches
    finally:
        _capture.reset(token)


@contextmanager
def fixed(kernel: str, tiles: Tiles) -> Iterator[None]:
    """Inside, `kernel` is launched with these tiles, whatever the tables say."""
    token = _fixed.set({**(_fixed.get() or {}), kernel: tiles})
    try:
        yield
    finally:
        _fixed.reset(token)


@cache
def gpu(device: torch.device) -> str | None:
    """The GPU's own name, as in `NVIDIA H200`; None in Triton's interpreter."""
    return None if INTERPRET else torch.cuda.get_device_name(device)


@cache
def architecture(device: torch.device) -> str:
    """The name of the table for a device: `sm_90`, `gfx942`, ..., or `interpreter`."""
    if INTERPRET:
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def has_tma(device: torch.device) -> bool:
    """Whether the device loads by TMA descriptors: NVIDIA GPUs from Hopper on."""
    name = architecture(device)
    return name.startswith("sm_") and int(name.removeprefix("sm_")) >= 90


@cache
def _table(name: str) -> dict[str, list[dict[str, Any]]]:
    """The table of an architecture; an NVIDIA or AMD GPU without one of its own uses the nearest older one."""
    path = _cache.SHIPPED / f"{name}.json"
    if not path.exists():
        family = name.rstrip("0123456789abcdef") if name.startswith("gfx") else "sm_"
        known = sorted(
            (p.stem for p in _cache.SHIPPED.glob(f"{family}*.json")), key=lambda s: int(s[len(family) :], 16)
        )
        older = [k for k in known if int(k[len(family) :], 16) <= int(name[len(family) :], 16)]
        path = _cache.SHIPPED / f"{(older or known)[-1 if older else 0]}.json"
    return json.loads(path.read_text())["kernels"]


def tiles(
    kernel: str, like: torch.Tensor, dims: tuple[int, int], seq: int, flags: tuple[str, ...] = ()
) -> Tiles:  # fmt: skip
    """Tile sizes and launch options of `kernel`: `BLOCK_*` entries beside `num_warps` and `num_stages`.

    An attention kernel's may say `descriptors`, true for rows that are loaded by TMA (`_rows`).

    Args:
        like: a tensor with the dtype and the device of the launch.
        dims: (D, Dv), the channels of a head of q and k, and of v.
        seq: tokens of the whole sequence, the longer of queries and keys; `SHARD` for kernels that do not know it.
        flags: sorted names of the options of attention that are on.
    """
    fixed = _fixed.get()
    if fixed is not None and kernel in fixed:
        return dict(fixed[kernel])
    captured = _capture.get()
    machine = (None, captured.architecture) if captured else (gpu(like.device), architecture(like.device))
    return dict(_chosen(kernel, like.dtype, dims, flags, _cache.bucket(seq), *machine))


@cache
def _chosen(
    kernel: str, dtype: torch.dtype, dims: tuple[int, int], flags: tuple[str, ...], bucket: int, gpu: str | None,
    table: str,
) -> Tiles:  # fmt: skip
    if gpu is not None:
        key = Key(kernel, str(dtype).removeprefix("torch."), dims, flags, bucket)
        found = _cache.nearest(key, _cache.in_force(gpu))
        if found is not None:
            return found
    for entry in _table(table)[kernel]:
        fits = max(dims) <= entry["head_dim"] and dtype.itemsize == entry.get("bytes", dtype.itemsize)
        if fits and set(entry.get("flags", ())) <= set(flags):
            return {key: value for key, value in entry.items() if key not in _ASKED}
    raise AssertionError(f"no configuration of {kernel} for head dims {dims}")


def fingerprint(device_type: str) -> str:
    """A short hash of all configurations in force on this rank's device: ranks that compute alike have the same.

    Empty where there is no such device: in a graph that is traced for a GPU elsewhere.
    """
    if INTERPRET or device_type != "cuda":
        device = torch.device(device_type)
    elif torch.cuda.is_available():
        device = torch.device(device_type, torch.cuda.current_device())
    else:
        return ""
    return _fingerprint(gpu(device), architecture(device))


@cache
def _fingerprint(gpu: str | None, table: str) -> str:
    tuned = sorted(_cache.in_force(gpu).items()) if gpu is not None else []
    return hashlib.sha256(json.dumps([tuned, _table(table)], sort_keys=True).encode()).hexdigest()[:12]


def forget() -> None:
    """Read the files again at the next lookup."""
    for cached in (_cache.in_force, _table, _chosen, _fingerprint):
        cached.cache_clear()


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int, num_stages: int, **args: Any) -> None:
    """Run `kernel` over `grid`; under `capture` only record it. A grid with a zero in it runs nothing."""
    if 0 in grid:
        return
    captured = _capture.get()
    if captured is not None:
        options = {"num_warps": num_warps, "num_stages": num_stages}
        captured.launches.append(Launch(kernel, grid, args, options))
        return
    if INTERPRET:
        with _interpreter:
            kernel[grid](**args)
        return
    kernel[grid](**args, num_warps=num_warps, num_stages=num_stages)
