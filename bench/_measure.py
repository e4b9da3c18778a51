"""Time of a call on a device, with what it works on out of the caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

COLD_BYTES = 2 << 30  # written before each timed call: many times an L2, and it lets the host run ahead of the device
COPY_BYTES = 4 << 30
WARM_UP = 2  # pairs of calls
SECONDS = 0.3  # for the repeats of a call
SLOW = 0.05  # seconds of a call that is repeated LEAST_SLOW times at least, others LEAST
LEAST, LEAST_SLOW = 7, 3


class Timing(NamedTuple):
    """Milliseconds at three quantiles of so many repeats."""

    p20: float
    p50: float
    p80: float
    repeats: int

    def rate(self, work: float) -> float:
        """`work` per second at the median, in units of 10^9."""
        return work / (self.p50 * 1e6)


class Stopwatch:
    """Times calls on one device by its events; of a dry run on a CPU, by the clock, and only to have run it all."""

    def __init__(self, device: torch.device, *, dry: bool) -> None:
        self.device, self.dry = device, dry
        self._cold = torch.empty(1 << 10 if dry else COLD_BYTES, dtype=torch.uint8, device=device)

    def time(self, call: Callable[[], object], *, most: int = 60) -> Timing:
        """Repeat `call` for about SECONDS, but at most so many times."""
        return self.time_all({"": call}, most=most)[""]

    def time_all(self, calls: dict[str, Callable[[], object]], *, most: int = 60) -> dict[str, Timing]:
        """Each of the calls in turn, again and again: what changes with time, as the clock does, changes for all.

        Slow ones are repeated less.
        """
        if self.dry:
            return {name: quantiles([self._on_clock(call)]) for name, call in calls.items()}
        seconds = sum(self._warm_up(call) for call in calls.values())
        least = LEAST if seconds < SLOW * len(calls) else LEAST_SLOW
        repeats = max(least, min(most, int(SECONDS * len(calls) / max(seconds, 1e-6))))
        pairs: dict[str, list[list[torch.cuda.Event]]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._cold.zero_()
                start.record()
                call()
                stop.record()
                pairs[name].append([start, stop])
        torch.cuda.synchronize(self.device)
        return {name: quantiles([a.elapsed_time(b) for a, b in marks]) for name, marks in pairs.items()}

    def _warm_up(self, call: Callable[[], object]) -> float:
        """Seconds that the last of some calls took; a slow one is made twice only."""
        for _ in range(WARM_UP):
            call()
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - begin
            if seconds > SLOW:
                break
        return seconds

    def copy_bandwidth(self) -> float:
        """GB/s of a large copy on the device, bytes read and bytes written."""
        size = 1 << 16 if self.dry else COPY_BYTES
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return self.time(lambda: target.copy_(source), most=20).rate(2 * size)

    def matmul_rate(self) -> float:
        """TFLOP/s of a large matrix product in bf16 on random data."""
        n = 64 if self.dry else 8192
        a, b = (torch.randn(n, n, device=self.device).bfloat16() for _ in range(2))
        return self.time(lambda: a @ b, most=20).rate(2.0 * n**3) / 1e3

    def _on_clock(self, call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3


def quantiles(milliseconds: list[float]) -> Timing:
    p20, p50, p80 = torch.tensor(milliseconds).double().quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return Timing(p20, p50, p80, len(milliseconds))
