"""Times of the four layout kernels, against a copy of as many bytes and against PyTorch's permute and contiguous.

Bytes are each input read once and each output written once. PyTorch moves q, k and v by one permute each into messages
of the same tokens and heads; what a real exchange would still have to do to join the three is not in its time, nor is
delta in that of pack_grad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from . import _check
from ._data import Memory, Movement
from ._record import ratio, table
from ._session import Session, milliseconds, verdict

TIMED = (
    Movement(32768, 1, 32, 8, 128, 128, 8),
    Movement(32768, 1, 64, 8, 64, 64, 8),
    Movement(32768, 1, 16, 8, 256, 256, 8),
    Movement(32768, 1, 32, 8, 128, 128, 8, rope=128, norm=True),
    Movement(32768, 1, 32, 8, 128, 128, 2),
    Movement(8192, 4, 32, 8, 128, 128, 4),
    Movement(32768, 1, 32, 4, 128, 128, 8),
    Movement(32768, 1, 32, 8, 128, 128, 8, rope=128, norm=True, interleaved=True),
)
DRY = (Movement(40, 2, 4, 2, 16, 16, 2, "fp16"), Movement(24, 1, 4, 2, 16, 16, 2, "fp16", rope=16, norm=True))


def run(session: Session) -> Iterator[list[dict[str, Any]]]:
    for case in session.in_time(DRY if session.dry else TIMED):
        records = []
        for kernel in CALLS:
            if (case.rope or case.norm) and kernel in ("pack_grad", "unpack"):
                continue  # they know no transform
            check = partial(getattr(_check, f"check_{kernel}"), session.kernels, session.device, case)
            record, right = session.gate(kernel, str(case), check)
            if right:
                record |= _times(session, kernel, case)
            records.append(record)
        yield records


def _times(session: Session, kernel: str, case: Movement) -> dict[str, Any]:
    memory = Memory(session.device, seed=1)
    call, theirs, moved = CALLS[kernel](session, case, memory)
    timings = session.stopwatch.time_all({"ours": call} | ({"permute": theirs} if theirs else {}))
    said = {name: {"ms": milliseconds(t), "gb_per_s": t.rate(moved)} for name, t in timings.items()}
    ours = said.pop("ours")
    share = ours["gb_per_s"] / session.ceilings["copy_gb_per_s"]
    return ours | {"bytes": moved, "share_of_copy": share, "peers": said}


Timed = tuple[Callable[[], object], Callable[[], object] | None, int]  # ours, PyTorch's, bytes


def _pack(session: Session, case: Movement, memory: Memory) -> Timed:
    q, k, v = case.projection(memory)
    tf, _ = _check.transform(case, memory)
    rows = case.qkv_rows(memory)
    moved = _bytes([q, k, v, *(x for r in rows for x in r[:3])])
    return lambda: session.kernels.pack(q, k, v, rows, tf), _messages(case, q, k, v), moved


def _pack_grad(session: Session, case: Movement, memory: Memory) -> Timed:
    do, o = (memory.normal(case.B, case.L, case.Hq, case.Dv, dtype=case.torch_dtype) for _ in range(2))
    rows = case.o_rows(memory, filled=False)
    moved = _bytes([do, o, *(x for r in rows for x in (r.o, r.stat) if x is not None)])
    return lambda: session.kernels.pack_grad(do, o, None, rows), _messages(case, do), moved


def _unpack(session: Session, case: Movement, memory: Memory) -> Timed:
    rows = case.o_rows(memory, filled=True)
    out = memory.nan(case.B, case.L, case.Hq, case.Dv, dtype=case.torch_dtype)
    moved = _bytes([out, *(r.o for r in rows)])
    return lambda: session.kernels.unpack(rows, out, None), _sequences(case, memory, (case.Hq, case.Dv)), moved


def _unpack_grad(session: Session, case: Movement, memory: Memory) -> Timed:
    q, k, _ = case.projection(memory)
    tf, _ = _check.transform(case, memory)
    rows = case.qkv_rows(memory, gradients=True)
    heads = ((case.Hq, case.D), (case.Hkv, case.D), (case.Hkv, case.Dv))
    grads = memory.rows(case.B, case.L, *heads, dtype=case.torch_dtype)
    moved = _bytes([*grads, *(x for r in rows for x in r[:3]), *((q, k) if case.norm else ())])
    return lambda: session.kernels.unpack_grad(rows, q, k, *grads, tf), _sequences(case, memory, *heads), moved


CALLS: dict[str, Callable[[Session, Movement, Memory], Timed]] = {
    "pack": _pack,
    "pack_grad": _pack_grad,
    "unpack": _unpack,
    "unpack_grad": _unpack_grad,
}


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _messages(case: Movement, *tensors: Tensor) -> Callable[[], object] | None:
    """[B, L, H, D] to one message per rank, [P, L, B, h, D], by PyTorch; it has no such thing with shared heads."""
    if case.shared or case.rope or case.norm:
        return None
    split = [x.unflatten(2, (case.ranks, -1)).permute(2, 1, 0, 3, 4) for x in tensors]
    return lambda: [x.contiguous() for x in split]


def _sequences(case: Movement, memory: Memory, *heads: tuple[int, int]) -> Callable[[], object] | None:
    """[P, L, B, h, D] to [B, L, H, D], by PyTorch."""
    if case.shared or case.rope or case.norm:
        return None
    shapes = [(case.ranks, case.L, case.B, h // case.ranks, d) for h, d in heads]
    split = [memory.normal(*shape, dtype=case.torch_dtype).permute(2, 1, 0, 3, 4) for shape in shapes]
    return lambda: [x.contiguous() for x in split]


def show(records: list[dict[str, Any]]) -> str:
    rows = [
        (
            r["case"], r["kernel"], r.get("ms", {}).get("p50"), r.get("gb_per_s"), r.get("share_of_copy"),
            r.get("peers", {}).get("permute", {}).get("gb_per_s"), ratio(r, "permute"), verdict(r),
        )
        for r in records
    ]  # fmt: skip
    return table(("case", "kernel", "ms p50", "GB/s", "of copy", "permute GB/s", "/ permute", "check"), rows)
