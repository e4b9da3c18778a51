"""What launch configurations are tuned on: how a launch is compiled and timed on this rank's GPU.

Nothing else in this package measures: a call looks its configuration up.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .errors import OptionError
from .kernels import _config
from .kernels._config import INTERPRET, Launch

DRY_RUN = "dry run"  # in the place of a GPU's name: no GPU reads such a file
COLD_BYTES = 512 << 20  # written before each timed launch: many times an L2, and it lets the host run ahead


class Resources(NamedTuple):
    """What a kernel was compiled to. Spills are registers, per thread; shared memory is in bytes, per block."""

    registers: int | None = None  # None in Triton's interpreter, which compiles nothing
    spills: int | None = None
    shared: int | None = None


class Machine(NamedTuple):
    """What tunes: a GPU, or Triton's interpreter in its place."""

    gpu: str
    device: torch.device
    compile: Callable[[Launch], Resources]  # raises what Triton does for a launch that does not fit
    measure: Callable[[Callable[[], None]], float]  # milliseconds
    gate_tokens: tuple[int, ...] = (1037, 3)
    shard_tokens: int = 8192  # that the layout kernels move
    most: int | None = None  # candidates of a key


def compile_launch(launch: Launch) -> Resources:
    """Compile a launch and load it, without running it."""
    compiled = launch.kernel.warmup(**launch.args, **launch.options, grid=launch.grid)
    compiled._init_handles()  # raises OutOfResources
    return Resources(compiled.n_regs, compiled.n_spills, compiled.metadata.shared)


def measure(call: Callable[[], None], *, least: int = 10, most: int = 100, seconds: float = 0.1) -> float:
    """The median time of a call on the current GPU, in milliseconds, with nothing of what it reads in its L2."""
    cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda")
    repeats = 3  # to warm up, and to know how long it takes
    while True:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in pairs:
            cold.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        median = statistics.median(start.elapsed_time(stop) for start, stop in pairs)
        if repeats > 3:
            return median
        repeats = max(least, min(most, int(seconds * 1e3 / max(median, 1e-3))))


def gpu_machine() -> Machine:
    """This rank's GPU, which becomes the current one."""
    if INTERPRET:
        raise OptionError("tune needs the kernels compiled: unset TRITON_INTERPRET, or pass --interpret for a dry run")
    if not torch.cuda.is_available():
        raise OptionError(
            "tune needs a GPU and PyTorch finds none here; a dry run in Triton's interpreter is "
            "`TRITON_INTERPRET=1 ulysses-triton tune --interpret --out FOLDER`"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    name = _config.gpu(device)
    assert name is not None
    return Machine(name, device, compile_launch, measure)


def dry_machine() -> Machine:
    """Triton's interpreter: the gate is real, the times mean nothing."""

    def clock(call: Callable[[], None]) -> float:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3

    if not INTERPRET:
        raise OptionError("--interpret needs TRITON_INTERPRET=1 in the environment, before Python starts")
    return Machine(DRY_RUN, torch.device("cpu"), lambda launch: Resources(), clock, (77, 3), 64, 3)
