"""Which tiles a kernel is launched with, and the launch itself.

Tiles come from a table per architecture, `autotune_cache/<architecture>.json`: a list per kernel, of which the first
entry whose `head_dim` is not below the asked one and whose `bytes` (per element) match is taken. The choice follows
from the machine and the problem's head dims alone, never from the number of ranks and never from a timing, so results
do not depend on those.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

INTERPRET = bool(triton.knobs.runtime.interpret)  # read once: Triton decides at decoration, not at launch

_TABLES = Path(__file__).parent.parent / "autotune_cache"
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


@contextmanager
def capture(architecture: str) -> Iterator[list[Launch]]:
    """Record the launches of the code inside as they would be made on `architecture`, and run none of them."""
    launches: list[Launch] = []
    token = _capture.set(_Capture(architecture, launches))
    try:
        yield launches
    finally:
        _capture.reset(token)


def architecture(device: torch.device) -> str:
    """The name of the table for a device: `sm_90`, `gfx942`, ..., or `interpreter`."""
    captured = _capture.get()
    if captured is not None:
        return captured.architecture
    if INTERPRET:
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _table(name: str) -> dict[str, list[dict[str, int]]]:
    """The table of an architecture; an NVIDIA or AMD GPU without one of its own uses the nearest older one."""
    path = _TABLES / f"{name}.json"
    if not path.exists():
        family = name.rstrip("0123456789abcdef") if name.startswith("gfx") else "sm_"
        known = sorted((p.stem for p in _TABLES.glob(f"{family}*.json")), key=lambda s: int(s[len(family) :], 16))
        older = [k for k in known if int(k[len(family) :], 16) <= int(name[len(family) :], 16)]
        path = _TABLES / f"{(older or known)[-1 if older else 0]}.json"
    return json.loads(path.read_text())["kernels"]


def tiles(kernel: str, tensor: torch.Tensor, head_dim: int) -> dict[str, int]:
    """Tile sizes and launch options of `kernel` for tensors like `tensor` with heads of `head_dim` channels.

    Returns `BLOCK_*` entries beside `num_warps` and `num_stages`.
    """
    bytes_each = tensor.element_size()
    for entry in _table(architecture(tensor.device))[kernel]:
        if head_dim <= entry["head_dim"] and bytes_each == entry.get("bytes", bytes_each):
            return {key: value for key, value in entry.items() if key not in ("head_dim", "bytes")}
    raise AssertionError(f"no configuration of {kernel} for head dim {head_dim}")


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
