"""What the parts of one run share: the device, the time that is left, what turned out wrong, and the records."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ._check import Findings
from ._data import Kernels
from ._measure import Stopwatch, Timing

_Case = TypeVar("_Case")
MOST_THREADS = 12  # that compile kernels for different checks at once


@dataclass
class Session:
    """One run of `bench.gpu`. `wrong` has, of every kernel that failed a check, the first case that shows it."""

    device: torch.device
    dry: bool
    kernels: Kernels = Kernels()
    wrong: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)  # measured: copy_gb_per_s, matmul_tflop_per_s
    skipped: list[str] = field(default_factory=list)  # of the part that runs
    done: frozenset[str] = frozenset()  # cases of the part that an earlier run has recorded
    deadline: float = 0.0

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.device, dry=self.dry)

    def begin(self, seconds: float, done: Iterable[str] = ()) -> None:
        """Begin a part that may take so long; some of its cases are done."""
        self.skipped, self.done = [], frozenset(done)
        self.deadline = time.monotonic() + seconds

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self.deadline

    def in_time(self, cases: Iterable[_Case]) -> Iterator[_Case]:
        """The cases that are not done and begun before the part's time is over; those too late are noted as skipped."""
        for case in cases:
            if str(case) in self.done:
                continue
            if self.is_late:
                self.skipped.append(str(case))
            else:
                yield case

    def threads(self) -> ThreadPoolExecutor:
        """Threads for checks: most of a check's time is Triton's compilation. The interpreter runs one at a time."""
        return ThreadPoolExecutor(1 if self.dry else min(MOST_THREADS, os.cpu_count() or 1))

    def judge(self, kernel: str, case: str, check: Callable[[], Findings]) -> dict[str, Any]:
        """Run a check; what it found as a record, with `ok`. A kernel that fails is remembered as wrong."""
        record: dict[str, Any] = {"kernel": kernel, "case": case}
        try:
            found = check()
        except Exception as error:  # a kernel that does not compile or run is as wrong as one that miscomputes
            record |= {"ok": False, "failure": f"{type(error).__name__}: {error}"[:2000], "errors": {}}
        else:
            errors = {name: {"error": x.error, "allowed": x.allowed, "ok": x.ok} for name, x in found.items()}
            record |= {"ok": all(x.ok for x in found.values()), "errors": errors}
        if not record["ok"]:
            self.wrong.setdefault(kernel, case)
        return record

    def gate(self, kernel: str, case: str, check: Callable[[], Findings]) -> tuple[dict[str, Any], bool]:
        """The record of a case that is to be timed, and whether it may be: its own check holds, and all before did."""
        if kernel in self.wrong:
            return {"kernel": kernel, "case": case, "ok": False, "refused": f"wrong at: {self.wrong[kernel]}"}, False
        record = self.judge(kernel, case, check)
        if not record["ok"]:
            record["refused"] = "wrong at this case"
        return record, record["ok"]


def milliseconds(timing: Timing) -> dict[str, float]:
    """A timing as part of a record."""
    return timing._asdict()


def verdict(record: dict[str, Any]) -> str:
    """A record's correctness, for a table: "ok", or what is wrong."""
    if record.get("failure"):
        return record["failure"].splitlines()[0][:60]
    if not record["ok"]:
        errors = record.get("errors", {})
        bad = [f"{name} {x['error']:.1e} > {x['allowed']:.1e}" for name, x in errors.items() if not x["ok"]]
        return f"WRONG: {', '.join(bad)}" if bad else f"refused, {record['refused']}"
    return "ok"
