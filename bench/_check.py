"""Every kernel against fp64 on the device itself: what must hold before anything is timed.

References are plain PyTorch in fp64 on the same device and share nothing with the kernels. Copies must be exact; fp32
results may be 2e-6 off (relative, by norm); where a layout kernel rounds to bf16 or fp16, by one rounding; attention in
those dtypes at most twice as far as PyTorch's own attention is, or 2e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ulysses_triton import truth
from ulysses_triton.kernels._views import HeadMap, Options, Span, Transform

from ._data import DTYPES, Kernels, Memory, Movement, spans

ONE_ROUNDING = {"bf16": 2**-9, "fp16": 2**-12, "fp32": truth.FP32}  # half a unit in the last place
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))


class Found(NamedTuple):
    """An error and what it may be."""

    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


Findings = dict[str, Found]


class Check(NamedTuple):
    """One case of one kernel; `run` computes it on a device."""

    kernel: str
    case: str
    run: Callable[[Kernels, torch.device], Findings]


def checks(*, dry: bool) -> Iterator[Check]:
    """All checks of single kernels; of a dry run, a few small ones in the dtypes that the interpreter computes."""
    for case in _movements(dry):
        for name, function in (
            ("pack", check_pack),
            ("pack_grad", check_pack_grad),
            ("unpack", check_unpack),
            ("unpack_grad", check_unpack_grad),
        ):
            if case.norm + bool(case.rope) == 0 or name in ("pack", "unpack_grad"):
                yield Check(name, str(case), _bound(function, case))
    for case in _attentions(dry):
        yield Check("attend_forward", str(case), _bound(check_attend_forward, case))
        yield Check("attend_backward", str(case), _bound(check_attend_backward, case))


def _bound(function: Callable[..., Findings], case: object) -> Callable[[Kernels, torch.device], Findings]:
    return lambda kernels, device: function(kernels, device, case)


def _movements(dry: bool) -> Iterator[Movement]:
    if dry:
        yield Movement(37, 2, 4, 2, 16, 24, dtype="fp16")
        yield Movement(37, 1, 6, 1, 24, 24, 3, dtype="fp32", rope=16, norm=True)
        return
    transforms = ({"rope": 64, "norm": True}, {"rope": 32, "interleaved": True, "norm": True}, {"rope": 64})
    number = 0
    for D, Dv in DIMS:
        for dtype in DTYPES:
            plain = Movement(1037, 2, 8, 2, D, Dv, 2, dtype)
            yield plain
            yield replace(plain, Dv=D, **transforms[number % 3])
            number += 1
    yield Movement(777, 2, 12, 4, 128, 128, 6, "bf16")  # kv heads that ranks share
    yield Movement(777, 1, 12, 4, 128, 128, 6, "bf16", rope=128, norm=True)
    yield Movement(333, 3, 3, 1, 64, 64, 3, "fp32")
    yield Movement(333, 2, 8, 2, 128, 64, 4, "bf16", aligned=False)
    yield Movement(333, 2, 8, 8, 64, 64, 8, "fp16", aligned=False, rope=64, interleaved=True)
    yield Movement(1, 1, 4, 4, 128, 128, 4, "bf16")


# -- layout


def transform(case: Movement, memory: Memory) -> tuple[Transform, Tensor | None]:
    """What pack is told, and the angles it stands for."""
    angles = memory.uniform(case.L, case.rope // 2) * 6 if case.rope else None
    weights = [memory.uniform(case.D) + 0.5 if case.norm else None for _ in range(2)]
    if angles is None:
        return Transform(q_norm=weights[0], k_norm=weights[1]), None
    cos, sin = (t.float()[None] for t in (angles.double().cos(), angles.double().sin()))
    return Transform(cos, sin, case.rope, case.interleaved, *weights), angles


def _transformed(x: Tensor, weight: Tensor | None, tf: Transform, angles: Tensor | None) -> Tensor:
    """QK-norm and RoPE in the dtype of `x`."""
    normed = truth.rms_norm(x, None if weight is None else weight.to(x.dtype), tf.eps)
    return truth.rotate(normed, angles, interleaved=tf.interleaved)


def _exact(result: Tensor, expected: Tensor) -> Found:
    """Of a copy: the number of elements that differ."""
    return Found(float((result != expected).sum()), 0.0)


def _near(result: Tensor, expected: Tensor, allowed: float) -> Found:
    return Found(truth.relative_error(result, expected), allowed)


def _beside(memory: Memory) -> Findings:
    return {"written beside": Found(float(memory.written_beside()), 0.0)}


def _heads(x: Tensor, first: int, n: int) -> Tensor:
    return x[:, :, first : first + n].transpose(0, 1)  # [B, L, H, ...] -> [L, B, n, ...]


def check_pack(kernels: Kernels, device: torch.device, case: Movement) -> Findings:
    memory = Memory(device, aligned=case.aligned)
    q, k, v = case.projection(memory)
    tf, angles = transform(case, memory)
    rows = case.qkv_rows(memory)
    kernels.pack(q, k, v, rows, tf)
    changed = case.rope or case.norm
    expected = {
        "q": _transformed(q.double(), tf.q_norm, tf, angles) if changed else q,
        "k": _transformed(k.double(), tf.k_norm, tf, angles) if changed else k,
        "v": v,
    }
    found = {}
    for name, whole in expected.items():
        first = "q_head" if name == "q" else "kv_head"
        got = torch.cat([getattr(r, name).flatten() for r in rows])
        want = torch.cat([_heads(whole, getattr(r, first), getattr(r, name).size(2)).flatten() for r in rows])
        exact = name == "v" or not changed
        found[name] = _exact(got, want) if exact else _near(got, want, ONE_ROUNDING[case.dtype])
    return found | _beside(memory)


def check_pack_grad(kernels: Kernels, device: torch.device, case: Movement) -> Findings:
    memory = Memory(device, aligned=case.aligned)
    do, o = memory.filled(case.B, case.L, (case.Hq, case.Dv), (case.Hq, case.Dv), dtype=case.torch_dtype)
    dlse = memory.normal(case.B, case.L, case.Hq)
    rows = case.o_rows(memory, filled=False)
    kernels.pack_grad(do, o, dlse, rows)
    delta = (do.double() * o.double()).sum(-1) - dlse
    got, stats = (torch.cat([getattr(r, name) for r in rows], 2) for name in ("o", "stat"))
    found = {
        "do": _exact(got, do.transpose(0, 1)),
        "delta": _near(stats, delta.transpose(0, 1), truth.FP32),
    }
    return found | _beside(memory)


def check_unpack(kernels: Kernels, device: torch.device, case: Movement) -> Findings:
    memory = Memory(device, aligned=case.aligned)
    rows = case.o_rows(memory, filled=True)
    (out,) = memory.rows(case.B, case.L, (case.Hq, case.Dv), dtype=case.torch_dtype)
    lse = memory.rows(case.B, case.L, (case.Hq, 1), dtype=torch.float32)[0][..., 0]
    kernels.unpack(rows, out, lse)
    o, stats = (torch.cat([getattr(r, name) for r in rows], 2).transpose(0, 1) for name in ("o", "stat"))
    return {"out": _exact(out, o), "lse": _exact(lse, stats)} | _beside(memory)


def check_unpack_grad(kernels: Kernels, device: torch.device, case: Movement) -> Findings:
    memory = Memory(device, aligned=case.aligned)
    q, k, _ = case.projection(memory)
    tf, angles = transform(case, memory)
    rows = case.qkv_rows(memory, gradients=True)
    heads = ((case.Hq, case.D), (case.Hkv, case.D), (case.Hkv, case.Dv))
    dq, dk, dv = memory.rows(case.B, case.L, *heads, dtype=case.torch_dtype)
    norms = kernels.unpack_grad(rows, q, k, dq, dk, dv, tf)

    sums = [torch.zeros(case.B, case.L, *shape, dtype=torch.float64, device=device) for shape in heads]
    for r in rows:
        for total, part, first in zip(sums, r[:3], (r.q_head, r.kv_head, r.kv_head), strict=True):
            total[:, :, first : first + part.size(2)] += part.transpose(0, 1)
    leaves = [x.double().requires_grad_() for x in (q, k)]
    weights = [None if w is None else w.double().requires_grad_() for w in (tf.q_norm, tf.k_norm)]
    changed = case.rope or case.norm
    expected = sums
    if changed:
        moved = [_transformed(x, w, tf, angles) for x, w in zip(leaves, weights, strict=True)]
        given = [*leaves, *(w for w in weights if w is not None)]
        grads = torch.autograd.grad(moved, given, sums[:2])
        expected = [*grads[:2], sums[2], *grads[2:]]
    allowed = ONE_ROUNDING[case.dtype]
    found = {n: _near(x, e, allowed) for n, x, e in zip(("dq", "dk", "dv"), (dq, dk, dv), expected, strict=False)}
    if case.norm:
        for name, norm, want in zip(("dq_norm", "dk_norm"), norms, expected[3:], strict=True):
            assert norm is not None
            found[name] = _near(norm, want, truth.FP32)
    return found | _beside(memory)


# -- attention


@dataclass(frozen=True)
class Attention:
    """One local attention; its first query head has place `offset` in a group of `group`; spans end at `cuts`."""

    S: int
    Sk: int = 0  # 0 for S
    B: int = 1
    hq: int = 4
    group: int = 2
    offset: int = 0
    D: int = 128
    Dv: int = 128
    causal: bool = True
    dtype: str = "bf16"
    scale: float = 0.0  # 0 for 1 / sqrt(D)
    cuts: tuple[int, ...] = ()
    aligned: bool = True
    partial: bool = False  # dk and dv in fp32
    window: tuple[int, int] | None = None
    softcap: float | None = None

    @property
    def keys(self) -> int:
        return self.Sk or self.S

    @property
    def hkv(self) -> int:
        return (self.hq - 1 + self.offset) // self.group + 1

    @property
    def options(self) -> Options:
        return Options(self.factor, self.causal, HeadMap(self.group, self.offset), self.window, self.softcap)

    @property
    def masks(self) -> dict[str, Any]:
        return dict(causal=self.causal, window=self.window)

    @property
    def factor(self) -> float:
        return self.scale or self.D**-0.5

    @property
    def kv_of(self) -> list[int]:
        return [(h + self.offset) // self.group for h in range(self.hq)]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        dims = str(self.D) if self.D == self.Dv else f"{self.D}-{self.Dv}"
        sizes = f"S {self.S}" + f" Sk {self.Sk}" * bool(self.Sk) + f" B {self.B} heads {self.hq}/{self.hkv} D {dims}"
        marks = ["causal" if self.causal else "dense"] + ["unaligned"] * (not self.aligned)
        marks += [f"offset {self.offset}"] * bool(self.offset) + [f"scale {self.scale:g}"] * bool(self.scale)
        marks += [f"window {self.window}"] * bool(self.window) + [f"softcap {self.softcap}"] * bool(self.softcap)
        marks += [f"{len(self.cuts) + 1} spans"] * bool(self.cuts) + ["partial"] * self.partial
        return " ".join([self.dtype, sizes, *marks])


def _attentions(dry: bool) -> Iterator[Attention]:
    if dry:
        yield Attention(70, B=2, D=16, Dv=24, dtype="fp32", cuts=(30,), group=3, offset=2)
        yield Attention(40, Sk=53, hq=2, D=16, Dv=16, causal=False, dtype="fp16", partial=True)
        yield Attention(70, D=16, Dv=16, causal=False, dtype="fp16", window=(20, 3), softcap=5.0)
        return
    for D, Dv in DIMS:
        for dtype in DTYPES:
            for causal in (True, False):
                yield Attention(397, B=2, D=D, Dv=Dv, dtype=dtype, causal=causal, cuts=(131, 132))
    for dtype in ("bf16", "fp32"):
        yield Attention(3, B=2, dtype=dtype)
        yield Attention(2048, hq=8, group=8, dtype=dtype)
        yield Attention(513, hq=4, group=3, offset=2, dtype=dtype, partial=True, cuts=(64, 200))
        yield Attention(257, D=72, Dv=40, dtype=dtype, causal=False, aligned=False)
        yield Attention(700, dtype=dtype, window=(256, 0))
        yield Attention(700, dtype=dtype, softcap=2.0)
        yield Attention(700, D=64, Dv=64, dtype=dtype, causal=False, window=(100, 33), softcap=2.0)
    yield Attention(200, Sk=331, dtype="fp32")
    yield Attention(331, Sk=200, dtype="fp32")
    yield Attention(1, Sk=901, dtype="fp32", causal=False)
    yield Attention(301, dtype="fp32", scale=-0.1)
    yield Attention(331, Sk=200, dtype="fp32", causal=False, window=(40, 7))  # queries without keys


class Inputs(NamedTuple):
    """Tensors `[tokens, B, heads, dim]` of one attention, the truth, and what PyTorch's error is in this dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    exact: truth.Attention  # dk and dv of whole kv heads
    dlse: Tensor  # [S, B, hq]
    peer: dict[str, float]


def attention_inputs(case: Attention, memory: Memory) -> Inputs:
    q, do = memory.filled(case.S, case.B, (case.hq, case.D), (case.hq, case.Dv), dtype=case.torch_dtype)
    k, v = memory.filled(case.keys, case.B, (case.hkv, case.D), (case.hkv, case.Dv), dtype=case.torch_dtype)
    dlse = memory.normal(case.S, case.B, case.hq)
    batch_first = [x.transpose(0, 1) for x in (q, k[:, :, case.kv_of], v[:, :, case.kv_of], do)]  # a kv head for each
    exact = truth.attention(
        *batch_first, **case.masks, scale=case.factor, softcap=case.softcap, dlse=dlse.transpose(0, 1)
    )  # fmt: skip
    peer = {} if case.dtype == "fp32" else _peer_errors(case, batch_first)
    sums = [x.new_zeros(case.B, case.keys, case.hkv, x.size(-1)) for x in (exact.dk, exact.dv)]
    index = torch.tensor(case.kv_of, device=q.device)
    dk, dv = (total.index_add_(2, index, x) for total, x in zip(sums, (exact.dk, exact.dv), strict=True))
    return Inputs(q, k, v, do, exact._replace(dk=dk, dv=dv), dlse, peer)


def _peer_errors(case: Attention, inputs: list[Tensor]) -> dict[str, float]:
    """Errors of PyTorch's attention in this dtype, without what it does not know: the LSE's gradient, and softcap."""
    *qkv, do = (x.detach().contiguous() for x in inputs)  # PyTorch's kernels want aligned rows
    leaves = [x.requires_grad_() for x in qkv]
    out = truth.sdpa(*leaves, **case.masks, scale=case.factor)
    grads = torch.autograd.grad(out, leaves, do)
    same = truth.attention(*inputs, **case.masks, scale=case.factor)
    values, wanted = (out.detach(), *grads), (same.out, same.dq, same.dk, same.dv)
    return {n: truth.relative_error(x, y) for n, x, y in zip(("out", "dq", "dk", "dv"), values, wanted, strict=True)}


def _limit(case: Attention, peer: dict[str, float], name: str) -> float:
    if name == "lse":
        return truth.FP32
    return truth.allowed(case.torch_dtype, peer.get(name, 0.0))


def _joined(parts: list[Span], view: int) -> Tensor:
    return torch.cat([part.views[view] for part in parts if part.views[view] is not None]).transpose(0, 1)


def check_attend_forward(kernels: Kernels, device: torch.device, case: Attention) -> Findings:
    memory = Memory(device, aligned=case.aligned)
    p = attention_inputs(case, memory)
    out = spans(memory, case.S, case.cuts, case.B, (case.hq, case.Dv), dtype=case.torch_dtype)
    stats = spans(memory, case.S, case.cuts, case.B, (case.hq, 1), dtype=torch.float32)
    to = [Span(o.start, (o.views[0], s.views[0][..., 0])) for o, s in zip(out, stats, strict=True)]
    lse = memory.nan(case.hq, case.B, case.S, dtype=torch.float32)
    kernels.attend_forward(p.q, p.k, p.v, to, lse, case.options)
    results = {"out": (_joined(to, 0), p.exact.out), "lse": (_joined(to, 1), p.exact.lse)}
    found = {n: _near(x, y, _limit(case, p.peer, n)) for n, (x, y) in results.items()}
    found["lse of the heads"] = _exact(lse.permute(1, 2, 0), _joined(to, 1))
    return found | _beside(memory)


def check_attend_backward(kernels: Kernels, device: torch.device, case: Attention) -> Findings:
    memory = Memory(device, aligned=case.aligned)
    p = attention_inputs(case, memory)
    lse = p.exact.lse.permute(2, 0, 1).float().contiguous()
    delta = memory.rows(case.S, case.B, (case.hq, 1), dtype=torch.float32)[0][..., 0]
    delta.copy_((p.exact.out.transpose(0, 1) * p.do.double()).sum(-1) - p.dlse)
    sums = torch.float32 if case.partial else case.torch_dtype
    key_cuts = tuple(cut for cut in case.cuts if cut < case.keys)
    dq = spans(memory, case.S, case.cuts, case.B, (case.hq, case.D), dtype=case.torch_dtype)
    dkv = spans(memory, case.keys, key_cuts, case.B, (case.hkv, case.D), (case.hkv, case.Dv), dtype=sums)
    kernels.attend_backward(p.q, p.k, p.v, p.do, lse, delta, dq, dkv, case.options)
    results = {
        "dq": (_joined(dq, 0), p.exact.dq),
        "dk": (_joined(dkv, 0), p.exact.dk),
        "dv": (_joined(dkv, 1), p.exact.dv),
    }
    return {n: _near(x, y, _limit(case, p.peer, n)) for n, (x, y) in results.items()} | _beside(memory)
