"""A whole layer on virtual ranks: threads of one process that share the device.

Checked against fp64, and its results must be the same bits for every number of ranks. Timed, it is the work of all
ranks together, on one device, without a network: what the layer adds to attention. In a second run all ranks begin
every step together, and end it when the device is idle: time per phase. Virtual ranks write into each other's buffers,
so the bytes move in pack, attend and their gradients, the exchanges only wait, and there is no unpack in forward.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ulysses_triton import executor, truth
from ulysses_triton.case import Case, Inputs, Layer, Results, draw, exact, peer
from ulysses_triton.group import UlyssesGroup, run_virtual

from ._check import Check, Findings, Found
from ._data import Kernels
from ._measure import Timing, quantiles
from ._record import table
from ._session import Session, milliseconds, verdict

RANKS = (1, 2, 4)
TIMED_RANKS = (1, 2, 4, 8)
REPEATS, PHASE_REPEATS = 7, 3
STEPS = ("_pack", "_attend", "_unpack", "_pack_grad", "_attend_backward", "_unpack_grad", "_finish")  # of the executor


def checks(*, dry: bool) -> list[Check]:
    """Checks of the layer for every number of ranks."""
    if dry:
        cases = [Case(21, 1, 4, 4, 16, 24, "fp32"), Case(18, 1, 4, 1, 16, 16, "fp16", rope=True, qk_norm=True)]
    else:
        cases = [
            Case(1001, 2, 8, 4, 128, 128, "bf16"),
            Case(777, 1, 8, 4, 64, 64, "fp32", uneven=True),
            Case(500, 2, 8, 8, 192, 128, "fp16", causal=False, recompute=True),
            Case(643, 2, 8, 2, 96, 96, "bf16", rope=True, qk_norm=True),
            Case(515, 1, 4, 4, 128, 128, "fp32", rope=True, qk_norm=True, uneven=True),
            Case(1301, 1, 3, 1, 128, 128, "bf16", rope=True, uneven=True),  # heads that are cut
            Case(1024, 2, 5, 5, 64, 64, "fp32", causal=False),
        ]
    cases = [replace(case, attention="triton") for case in cases]
    return [Check("layer", str(case), partial(_check, case=case)) for case in cases]


def _check(kernels: Kernels, device: torch.device, case: Case) -> Findings:
    """Errors of each number of ranks, and whether its bits are those of one rank."""
    inputs = draw(case, device)
    everything = torch.arange(case.tokens, device=device)
    expected = exact(case, inputs, everything)
    peers = peer(case, inputs) if case.dtype in ("bf16", "fp16") else {}
    found: Findings = {}
    first: Results = {}
    for ranks in RANKS:
        results = _results(replace(case, ranks=ranks), inputs)
        for name, want in expected.items():
            reached = truth.relative_error(peers[name], want) if peers else 0.0
            error = truth.relative_error(results[name], want)
            found[f"{name} on {ranks}"] = Found(error, truth.allowed(case.torch_dtype, reached))
            exact_too = name == "out" or (name in ("dq", "dk", "dv") and case.kv_heads % ranks == 0)
            if ranks > 1 and exact_too:
                found[f"{name} on {ranks}, bits"] = Found(float((results[name] != first[name]).sum()), 0.0)
        first = first or results
    return found


def _results(case: Case, inputs: Inputs) -> Results:
    """All ranks' results as one."""
    parts = run_virtual(case.ranks, lambda group: Layer(case, inputs, group).results())
    whole = {}
    for name in parts[0]:
        shares = [part[name] for part in parts]
        norm = name in ("dq_norm", "dk_norm")
        whole[name] = torch.stack([s.double() for s in shares]).sum(0) if norm else torch.cat(shares, 1)
    return whole


def cases(*, dry: bool) -> list[Case]:
    if dry:
        layers, numbers = [Case(16, 1, 4, 2, 16, 16, "fp16", attention="triton")], TIMED_RANKS[1:3]
    else:
        numbers = TIMED_RANKS
        big = Case(32768, 1, 32, 8, 128, 128, "bf16", attention="triton")
        layers = [big, replace(big, rope=True, qk_norm=True), replace(big, tokens=8192)]
    return [replace(layer, ranks=ranks) for layer in layers for ranks in numbers]


def run(session: Session) -> Iterator[list[dict[str, Any]]]:
    gate = checks(dry=session.dry)[0]
    wanted = session.in_time(cases(dry=session.dry))
    for number, (layer, group) in enumerate(groupby(wanted, lambda case: replace(case, ranks=1))):
        if number == 0:
            session.gate("layer", gate.case, partial(gate.run, session.kernels, session.device))
        inputs = draw(layer, session.device)
        base = _sdpa(session, layer, inputs)
        for case in group:
            record, right = session.gate("layer", str(case), partial(_sampled, case, inputs))
            if right:
                forward, backward = _times(session, case, inputs)
                record |= {
                    "ranks": case.ranks,
                    "ms": {"forward": milliseconds(forward), "backward": milliseconds(backward)},
                    "phases_ms": _phases(session, case, inputs),
                    "sdpa_ms": {name: milliseconds(t) for name, t in base.items()},
                }
            yield [record]


def _sampled(case: Case, inputs: Inputs) -> Findings:
    """At the timed size, some query rows: the output's gradient is zero in the others."""
    rows = torch.arange(0, case.tokens, max(1, case.tokens // 64), device=inputs.q.device)
    some = inputs.zero_but(rows)
    expected, reached, results = exact(case, some, rows), peer(case, some), _results(case, some)
    found = {}
    for name, want in expected.items():
        got, theirs = results[name], reached[name]
        if name in ("out", "dq"):
            found[f"{name} elsewhere"] = Found(_elsewhere(got, rows, zero=name == "dq"), 0.0)
            got, theirs = got[:, rows], theirs[:, rows]
        allowed = truth.allowed(case.torch_dtype, truth.relative_error(theirs, want))
        found[name] = Found(truth.relative_error(got, want), allowed)
    return found


def _elsewhere(x: Tensor, rows: Tensor, *, zero: bool) -> float:
    """How many elements outside of the rows are not numbers, or not zero where they must be."""
    rest = x.clone()
    rest[:, rows] = 0
    return float((rest != 0).sum() if zero else rest.isfinite().logical_not().sum())


def _times(session: Session, case: Case, inputs: Inputs) -> tuple[Timing, Timing]:
    """Forward and backward, from when all ranks begin to when the device has done the work of all."""
    level = threading.Barrier(case.ranks, timeout=120)
    repeats = 1 if session.dry else REPEATS

    def work(group: UlyssesGroup) -> list[tuple[float, float]]:
        layer = Layer(case, inputs, group)
        marks = _Marks(session, level)
        for _ in range(repeats + 1):  # the first one warms up
            marks.begin()
            out = layer.forward()
            marks.end()
            marks.begin()
            layer.backward(out)
            marks.end()
        return marks.pairs()[1:]

    pairs = run_virtual(case.ranks, work)[0]
    forward, backward = zip(*pairs, strict=True)
    return quantiles(list(forward)), quantiles(list(backward))


class _Marks:
    """Times between points that all ranks reach; the device is idle at each begin."""

    def __init__(self, session: Session, level: threading.Barrier) -> None:
        self.session, self.level = session, level
        self.milliseconds: list[float] = []

    def begin(self) -> None:
        _settle(self.session, self.level)
        self.start = time.perf_counter()

    def end(self) -> None:
        _settle(self.session, self.level)
        self.milliseconds.append((time.perf_counter() - self.start) * 1e3)

    def pairs(self) -> list[tuple[float, float]]:
        return list(zip(self.milliseconds[::2], self.milliseconds[1::2], strict=True))


def _settle(session: Session, level: threading.Barrier) -> None:
    level.wait()
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
    level.wait()


def _phases(session: Session, case: Case, inputs: Inputs) -> dict[str, float]:
    """Median milliseconds of each step, in their order, the exchanges by name."""
    level = threading.Barrier(case.ranks, timeout=120)
    found: dict[str, list[float]] = {}

    def work(group: UlyssesGroup) -> None:
        layer = Layer(case, inputs, group)
        for _ in range(1 if session.dry else PHASE_REPEATS + 1):
            layer.backward(layer.forward())

    with _timed_steps(session, level, found):
        run_virtual(case.ranks, work)
    return {name: quantiles(times[-PHASE_REPEATS:]).p50 for name, times in found.items()}  # the first one warms up


def _timed_steps(
    session: Session, level: threading.Barrier, found: dict[str, list[float]]
) -> AbstractContextManager[object]:
    """Inside, every step of a layer begins when all ranks have come to it and the device is idle, and ends likewise."""

    def timed(method: str) -> Callable[..., None]:
        step = getattr(executor._Run, method)

        def run(self: executor._Run, *which: Any) -> None:
            name = which[0] if method == "_finish" else method.removeprefix("_")
            _settle(session, level)
            begin = time.perf_counter()
            step(self, *which)
            _settle(session, level)
            if self.group.rank == 0:
                found.setdefault(name, []).append((time.perf_counter() - begin) * 1e3)

        return run

    return mock.patch.multiple(executor._Run, **{method: timed(method) for method in STEPS})


def _sdpa(session: Session, case: Case, inputs: Inputs) -> dict[str, Timing]:
    """PyTorch's own choice of attention over the whole sequence, kv heads repeated, without norm and RoPE."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = truth.sdpa(q, k, v, causal=case.causal, scale=case.scale)
    return {
        "forward": session.stopwatch.time(lambda: truth.sdpa(q, k, v, causal=case.causal, scale=case.scale)),
        "backward": session.stopwatch.time(lambda: torch.autograd.grad(out, (q, k, v), inputs.dout, retain_graph=True)),
    }


def show(records: list[dict[str, Any]]) -> str:
    def line(r: dict[str, Any]) -> tuple[object, ...]:
        ours, sdpa = r.get("ms", {}), r.get("sdpa_ms", {})
        medians = [side.get(name, {}).get("p50") for side in (ours, sdpa) for name in ("forward", "backward")]
        return r["case"], *medians, verdict(r)

    header = ("case", "forward ms", "backward ms", "SDPA forward", "SDPA backward", "check")
    names = list(dict.fromkeys(name for r in records for name in r.get("phases_ms", {})))
    phases = [(r["case"], *(r["phases_ms"].get(name) for name in names)) for r in records if "phases_ms" in r]
    return table(header, map(line, records)) + "\n\n" + table(("ms per phase", *names), phases)
