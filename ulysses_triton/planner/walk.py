"""The steps of one layer's attention on many ranks at once, with a time for each: when every rank is done.

The order is `schedule`'s, as in `cost`, but ranks are elements of arrays: thousands of them take milliseconds. Example,
of two ranks that pack for 1 s and exchange for 2 s: if the second begins 1 s late, both have their rows at 4 s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..schedule import Step, Which

Seconds = NDArray[np.float64]  # of every rank


def walk(
    steps: Sequence[Step], seconds: Mapping[str, float | Seconds], start: Seconds, slower: Seconds, row: int
) -> tuple[Seconds, Seconds]:  # fmt: skip
    """When each rank is done, and for how long of that it computed.

    `seconds` of each step by name, `slower` is what a rank's steps that compute are multiplied by; an exchange begins
    when the `row` neighbouring ranks that share a sequence have all come to it.
    """
    free = {"compute": start, "exchange": start}
    ends: dict[Which, Seconds] = {}
    busy = np.zeros_like(start)
    for step in steps:
        begin = free[step.stream]
        for which in step.after:
            begin = np.maximum(begin, ends[which]) if which in ends else begin
        if step.stream == "exchange":
            end = latest(begin, row) + seconds[step.name]
        else:
            took = seconds[step.name] * slower
            busy, end = busy + took, begin + took
        free[step.stream] = ends[step.which] = end
    return np.maximum(free["compute"], free["exchange"]), busy


def latest(times: Seconds, row: int) -> Seconds:
    """The latest of each row's times, for each of its ranks."""
    return np.repeat(times.reshape(-1, row).max(axis=1), row)
