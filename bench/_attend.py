"""Times of attention, forward and backward, against PyTorch's SDPA on the same tensors in the same run.

TFLOP/s count two matrix products in forward and five in backward over the attended pairs, whatever a kernel computes
besides. SDPA reads the same rows through views; its backward computes delta itself, which ours gets from pack_grad.

At the timed size the check takes all queries and keys of the last sequence, for the first and the last kv head; every
other element must at least have been written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ulysses_triton import truth
from ulysses_triton.kernels._views import Span

from ._check import Attention, Findings, Found
from ._data import Memory
from ._record import table
from ._session import Session, milliseconds, verdict

PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
TOKENS = {8192: 2, 2048: 8, 32768: 1, 4096: 4, 16384: 1}  # of a sequence, to how many there are; the telling ones first
HEADS = ((128, 16, 4), (64, 32, 8), (256, 8, 2), (128, 16, 1))  # head dim, query heads, group


def cases(*, dry: bool) -> list[Attention]:
    if dry:
        return [Attention(48, B=2, hq=2, group=2, D=16, Dv=16, dtype="fp16", causal=causal) for causal in (True, False)]
    return [
        Attention(S, B=B, hq=hq, group=group, D=D, Dv=D, causal=causal)
        for S, B in TOKENS.items()
        for D, hq, group in HEADS
        for causal in (True, False)
    ]


def flops(case: Attention) -> tuple[float, float]:
    """Of forward and backward, for equal numbers of queries and keys."""
    pairs = case.S * (case.S + 1) / 2 if case.causal else case.S**2
    each = 2.0 * pairs * case.B * case.hq
    return each * (case.D + case.Dv), each * (3 * case.D + 2 * case.Dv)


class Rows(NamedTuple):
    """One attention as it lies between two exchanges: views `[S, B, heads, dim]` of rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    do: Tensor
    lse: Tensor
    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def rows_of(case: Attention, device: torch.device) -> Rows:
    memory = Memory(device, seed=2)
    S, B, dtype = case.S, case.B, case.torch_dtype
    heads = ((case.hq, case.D), (case.hkv, case.D), (case.hkv, case.Dv))
    q, k, v = memory.filled(S, B, *heads, dtype=dtype)
    (o,) = memory.rows(S, B, (case.hq, case.Dv), dtype=dtype)
    (do,) = memory.filled(S, B, (case.hq, case.Dv), dtype=dtype)
    dq, dk, dv = memory.rows(S, B, *heads, dtype=dtype)
    lse = memory.nan(case.hq, B, S, dtype=torch.float32)
    delta = memory.nan(S, B, case.hq, dtype=torch.float32)
    return Rows(q, k, v, o, do, lse, delta, dq, dk, dv)


def run(session: Session) -> list[dict[str, Any]]:
    records = []
    for case in session.in_time(cases(dry=session.dry)):
        rows = rows_of(case, session.device)
        forward, backward = _calls(session, case, rows)
        ours, right = session.gate("attend_forward", str(case), partial(_check_forward, case, rows, forward))
        ours |= _sizes(case)
        records.append(ours)
        peer = _Peer(case, rows)
        if right:
            ours |= _times(session, flops(case)[0], forward, peer.forward)
            rows.delta.copy_((rows.do.float() * rows.o.float()).sum(-1))
            check = partial(_check_backward, case, rows, backward)
            ours, right = session.gate("attend_backward", str(case), check)
            ours |= _sizes(case)
            records.append(ours)
            if right:
                ours |= _times(session, flops(case)[1], backward, peer.backward)
        del rows, forward, backward, peer  # before the next case takes its memory
    return records


def _calls(session: Session, case: Attention, r: Rows) -> tuple[Callable[[], None], Callable[[], None]]:
    kernels = session.kernels
    out, dq, dkv = [Span(0, (r.o, None))], [Span(0, (r.dq,))], [Span(0, (r.dk, r.dv))]
    return (
        lambda: kernels.attend_forward(r.q, r.k, r.v, out, r.lse, case.options),
        lambda: kernels.attend_backward(r.q, r.k, r.v, r.do, r.lse, r.delta, dq, dkv, case.options),
    )


def _sizes(case: Attention) -> dict[str, Any]:
    return {
        "tokens": case.S, "batch": case.B, "heads": case.hq, "kv_heads": case.hkv, "head_dim": case.D,
        "causal": case.causal, "dtype": case.dtype,
    }  # fmt: skip


def _times(
    session: Session, work: float, call: Callable[[], None], prepare_peer: Callable[[], Callable[[], object]]
) -> dict[str, Any]:
    timing = session.stopwatch.time(call)
    rate = timing.rate(work) / 1e3
    found: dict[str, Any] = {
        "flops": work,
        "ms": milliseconds(timing),
        "tflop_per_s": rate,
        "share_of_matmul": rate / session.ceilings["matmul_tflop_per_s"],
        "peers": {},
    }
    for name, backend in PEERS.items():
        try:
            with sdpa_kernel(backend):
                timing = session.stopwatch.time(prepare_peer())
        except RuntimeError as error:  # a backend that does not take this case
            found["peers"][name] = {"unavailable": str(error).splitlines()[0][:200]}
        else:
            found["peers"][name] = {"ms": milliseconds(timing), "tflop_per_s": timing.rate(work) / 1e3}
    return found


class _Peer:
    """SDPA over the same rows; `forward` and `backward` prepare a call, under the backend that the caller chose."""

    def __init__(self, case: Attention, rows: Rows) -> None:
        self.case = case
        self.qkv = [x.permute(1, 2, 0, 3) for x in rows[:3]]  # [S, B, h, D] -> [B, h, S, D]
        self.do = rows.do.permute(1, 2, 0, 3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        case = self.case
        grouped = {"enable_gqa": True} if case.group > 1 else {}
        return scaled_dot_product_attention(q, k, v, is_causal=case.causal, scale=case.factor, **grouped)

    def forward(self) -> Callable[[], object]:
        return lambda: self._attend(*self.qkv)

    def backward(self) -> Callable[[], object]:
        leaves = [x.detach().requires_grad_() for x in self.qkv]
        out = self._attend(*leaves)
        return lambda: torch.autograd.grad(out, leaves, self.do, retain_graph=True)


def _exact(case: Attention, r: Rows, kv_head: int) -> tuple[list[Tensor], truth.Attention, Callable[[Tensor], Tensor]]:
    """Inputs `[1, S, h, D]` of one kv head of the last sequence, the truth, and what picks the query heads."""

    def query(x: Tensor) -> Tensor:
        return x[:, -1:, kv_head * case.group : (kv_head + 1) * case.group].transpose(0, 1)

    k, v = (x[:, -1:, kv_head : kv_head + 1].transpose(0, 1) for x in (r.k, r.v))
    inputs = [query(r.q), k, v, query(r.do)]
    return inputs, truth.attention(*inputs, causal=case.causal, scale=case.factor), query


def _peer_errors(case: Attention, inputs: list[Tensor], exact: truth.Attention) -> dict[str, float]:
    *qkv, do = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = truth.sdpa(*leaves, causal=case.causal, scale=case.factor)
    values = (out.detach(), *torch.autograd.grad(out, leaves, do))
    wanted = (exact.out, exact.dq, exact.dk, exact.dv)
    return {n: truth.relative_error(x, y) for n, x, y in zip(("out", "dq", "dk", "dv"), values, wanted, strict=True)}


def _check_forward(case: Attention, r: Rows, forward: Callable[[], None]) -> Findings:
    forward()
    found = {"unwritten": Found(float(r.o.isnan().sum() + r.lse.isnan().sum()), 0.0)}
    for j in {0, case.hkv - 1}:
        inputs, exact, query = _exact(case, r, j)
        peer = _peer_errors(case, inputs, exact)
        found[f"out of kv head {j}"] = _found(case, query(r.o), exact.out, peer["out"])
        lse = query(r.lse.permute(2, 1, 0)[..., None])[..., 0]
        found[f"lse of kv head {j}"] = Found(truth.relative_error(lse, exact.lse), truth.FP32)
    return found


def _check_backward(case: Attention, r: Rows, backward: Callable[[], None]) -> Findings:
    backward()
    found = {"unwritten": Found(float(sum(x.isnan().sum() for x in (r.dq, r.dk, r.dv))), 0.0)}
    for j in {0, case.hkv - 1}:
        inputs, exact, query = _exact(case, r, j)
        peer = _peer_errors(case, inputs, exact)
        dk, dv = (x[:, -1:, j : j + 1].transpose(0, 1) for x in (r.dk, r.dv))
        for name, got in (("dq", query(r.dq)), ("dk", dk), ("dv", dv)):
            found[f"{name} of kv head {j}"] = _found(case, got, getattr(exact, name), peer[name])
    return found


def _found(case: Attention, result: Tensor, exact: Tensor, peer: float) -> Found:
    return Found(truth.relative_error(result, exact), truth.allowed(case.torch_dtype, peer))


def show(records: list[dict[str, Any]]) -> str:
    def line(r: dict[str, Any]) -> tuple[object, ...]:
        peers = r.get("peers", {})
        rates = [peers.get(name, {}).get("tflop_per_s") for name in PEERS]
        best = max((rate for rate in rates if rate), default=None)
        ours = r.get("tflop_per_s")
        share = ours / best if ours and best else None
        return r["case"], r["kernel"], r.get("ms", {}).get("p50"), ours, *rates, share, verdict(r)

    return table(
        ("case", "kernel", "ms p50", "TFLOP/s", *(f"SDPA {name}" for name in PEERS), "of best", "check"),
        map(line, records),
    )
