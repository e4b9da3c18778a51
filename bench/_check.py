"""Every kernel against fp64 on the device itself: what must hold before anything is timed.

References are plain PyTorch in fp64 on the same device and share nothing with the kernels but the random words of
dropout. Copies must be exact; fp32 results may be 2e-6 off (relative, by norm); where a layout kernel rounds to bf16 or
fp16, by one rounding; attention in those dtypes at most twice as far as PyTorch's own attention is, or 2e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ulysses_triton import truth
from ulysses_triton.kernels import _dropout
from ulysses_triton.kernels._views import HeadGrads, Options, Span, Transform

from ._data import DTYPES, SEED, Attention, Kernels, Memory, Movement, spans

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

    def __str__(self) -> str:
        return f"{self.kernel} {self.case}"


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
        yield Movement(37, 1, 6, 1, 25, 25, 3, dtype="fp32", rope=16, norm=True)
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
    yield Movement(333, 2, 8, 2, 100, 33, 2, "bf16")  # heads of a row begin on multiples of 8 elements
    yield Movement(333, 1, 12, 4, 33, 33, 6, "fp16", rope=32, norm=True)


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
    heads = (case.Hq, case.Dv)
    do, o = memory.filled(case.B, case.L, heads, heads, dtype=case.torch_dtype, step=1)
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
    (out,) = memory.rows(case.B, case.L, (case.Hq, case.Dv), dtype=case.torch_dtype, step=1)
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
    dq, dk, dv = memory.rows(case.B, case.L, *heads, dtype=case.torch_dtype, step=1)
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

EXTRAS = (  # options by name, each alone and some together
    {"documents": (0, 0, 1, 2, 2, 2, 3)},
    {"documents": (4, 1, -1, 1, 0, 4, 4), "B": 2, "window": (90, 0)},  # in pieces, and padding
    {"documents": (0, 1, 1, 2), "Sk": 333, "causal": False},  # documents begin elsewhere among the keys
    {"sinks": True},
    {"sinks": True, "window": (40, 7), "Sk": 200, "causal": False},  # and queries without keys
    {"alibi": True},
    {"alibi": True, "documents": (0, 0, 1), "causal": False},
    {"dropout": 0.3},
    {"dropout": 0.5, "causal": False, "B": 2, "offset": 1},
    {"predicate": True, "causal": False, "B": 2, "offset": 1},
    {"predicate": True, "causal": False, "B": 2, "offset": 1, "blocks": True},
    {"predicate": True, "blocks": True, "documents": (0, 0, 1), "window": (150, 0)},
    {"sinks": True, "alibi": True, "dropout": 0.1, "softcap": 5.0, "documents": (0, 1, 1), "predicate": True},
)


def _attentions(dry: bool) -> Iterator[Attention]:
    if dry:
        yield Attention(70, D=16, Dv=24, dtype="fp32", cuts=(30,), group=3, offset=2)
        yield Attention(40, Sk=53, hq=2, D=33, Dv=20, causal=False, dtype="fp16", partial=True)
        yield Attention(70, D=16, causal=False, dtype="fp16", window=(20, 3), softcap=5.0)
        yield Attention(40, hq=2, D=16, dtype="fp16", **EXTRAS[1])
        yield Attention(150, hq=1, D=16, dtype="fp32", **EXTRAS[10])
        yield Attention(70, hq=2, D=16, dtype="fp32", **EXTRAS[12])
        return
    for causal in (True, False):
        yield Attention(397, B=2, causal=causal, cuts=(131, 132))
    for dtype in ("bf16", "fp32"):
        for extra in EXTRAS:
            yield Attention(**{"S": 700, "dtype": dtype, **extra})
        for D, Dv in ((100, 33), (33, 50)):
            yield Attention(331, B=2, D=D, Dv=Dv, dtype=dtype)
        yield Attention(3, B=2, dtype=dtype)
        yield Attention(2048, hq=8, group=8, dtype=dtype)
        yield Attention(513, hq=4, group=3, offset=2, dtype=dtype, partial=True, cuts=(64, 200))
        yield Attention(257, D=72, Dv=40, dtype=dtype, causal=False, aligned=False)
        yield Attention(700, dtype=dtype, window=(256, 0))
        yield Attention(700, dtype=dtype, softcap=2.0)
        yield Attention(700, D=64, dtype=dtype, causal=False, window=(100, 33), softcap=2.0)
    for D, Dv in DIMS:
        for dtype in DTYPES:
            for causal in (True, False):
                if (D, dtype) != (128, "bf16"):
                    yield Attention(397, B=2, D=D, Dv=Dv, dtype=dtype, causal=causal, cuts=(131, 132))
    yield Attention(700, D=256, sinks=True, alibi=True, documents=(0, 1, 1))
    yield Attention(700, D=64, dtype="fp16", causal=False, dropout=0.2, predicate=True, blocks=True)
    yield Attention(200, Sk=331, dtype="fp32")
    yield Attention(331, Sk=200, dtype="fp32")
    yield Attention(1, Sk=901, dtype="fp32", causal=False)
    yield Attention(301, dtype="fp32", scale=-0.1)
    yield Attention(331, Sk=200, dtype="fp32", causal=False, window=(40, 7))  # queries without keys


class Pairs(NamedTuple):
    """Which of some query rows attend which keys, `[B or 1, hq or 1, R, Sk]`, and how far ahead each key lies."""

    kept: Tensor
    ahead: Tensor


def pairs_of(case: Attention, rows: Tensor) -> Pairs:
    """By the definitions, of the queries at the positions `rows` `[R]`."""
    device = rows.device
    i, j = rows[:, None], torch.arange(case.keys, device=device)
    ahead, kept = (j - i)[None, None], torch.ones((), dtype=torch.bool, device=device)
    if case.documents:
        q_ids, k_ids = case.ids(case.S, device), case.ids(case.keys, device)
        ahead = (_places(k_ids)[:, None] - _places(q_ids)[:, rows, None])[:, None]
        kept = ((q_ids[:, rows, None] == k_ids[:, None]) & (q_ids[:, rows, None] >= 0))[:, None]
    back, forth = case.bounds
    kept = kept & (ahead >= -back) & (ahead <= forth)
    if case.predicate:
        heads = (torch.arange(case.hq, device=device) + case.options(device).heads.first)[:, None, None]
        kept = kept & ((j <= i) | (j < case.lengths(device)[:, None, None, None] * (heads % 3)))
    return Pairs(kept, ahead)


def _places(ids: Tensor) -> Tensor:
    """Every token's position counted from the first token of its document, `[B, tokens]`."""
    positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
    firsts = torch.full((len(ids), int(ids.max()) + 2), ids.size(1), device=ids.device)
    firsts.scatter_reduce_(1, ids + 1, positions, "amin")
    return positions - firsts.gather(1, ids + 1)


def exact(
    case: Attention, options: Options, tensors: tuple[Tensor, Tensor, Tensor, Tensor], dlse: Tensor | None, rows: Tensor
) -> dict[str, Tensor]:
    """In fp64: out `[R, B, hq, Dv]`, lse `[R, B, hq]`, dq `[R, B, hq, D]` of the query rows, and what they give to dk
    and dv `[Sk, B, hkv, dim]`, dsinks and dslopes `[hq]`.

    `tensors` are q and do of the rows, and all of k and v: `q, k, v, do`. dlse: `[R, B, hq]`.
    """
    q, k, v, do = (x.double() for x in tensors)
    leaves = {"dq": q, "dk": k, "dv": v, "dsinks": options.sinks, "dslopes": options.slopes}
    leaves = {name: x.detach().double().requires_grad_() for name, x in leaves.items() if x is not None}
    kept, ahead = pairs_of(case, rows)
    s = torch.einsum("rbhd,kbhd->bhrk", leaves["dq"], leaves["dk"][:, :, case.kv_of]) * case.factor
    if case.softcap is not None:
        s = torch.tanh(s / case.softcap) * case.softcap
    if case.alibi:
        s = s - leaves["dslopes"][:, None, None] * ahead.abs()
    s = s.masked_fill(~kept, -torch.inf)
    if case.sinks:
        s = torch.cat([s, leaves["dsinks"][:, None, None].expand(*s.shape[:3], 1)], -1)
    keyless = (s == -torch.inf).all(-1, keepdim=True)
    finite = s.masked_fill(keyless, 0.0).logsumexp(-1, keepdim=True)
    p = (s - finite).exp().masked_fill(keyless, 0.0)[..., : case.keys]
    if case.dropout:
        p = p * _stays(case, options, rows) / (1 - case.dropout)
    out = torch.einsum("bhrk,kbhd->rbhd", p, leaves["dv"][:, :, case.kv_of])
    lse = finite.squeeze(-1).permute(2, 0, 1)
    total = (out * do).sum() + (0.0 if dlse is None else (lse * dlse.double()).sum())
    grads = torch.autograd.grad(total, list(leaves.values()))
    lse = lse.detach().masked_fill(keyless.squeeze(-1).permute(2, 0, 1), -torch.inf)
    return {"out": out.detach(), "lse": lse} | dict(zip(leaves, grads, strict=True))


def _stays(case: Attention, options: Options, rows: Tensor) -> Tensor:
    """Which pairs dropout leaves, `[B, hq, R, Sk]`."""
    batch, head, keys = (torch.arange(n, device=rows.device) for n in (case.B, case.hq, case.keys))
    indices = batch[:, None, None, None], (head + options.heads.first)[:, None, None], rows[:, None], keys
    return _dropout.words(SEED, *indices) >= round(case.dropout * 2**32)


def limits(
    case: Attention, options: Options, tensors: tuple[Tensor, Tensor, Tensor, Tensor], rows: Tensor
) -> dict[str, float]:
    """What each relative error may be; in bf16 and fp16 by the error of PyTorch's attention with the same mask.

    It is given nothing but the mask, which it also knows to compute, and is held against fp64 of the same; queries
    without keys attend every key there. Of sinks and slopes the error may be that of dq.
    """
    names = ("out", "dq", "dk", "dv")
    if case.dtype == "fp32":
        return dict.fromkeys((*names, "lse", "dsinks", "dslopes"), truth.FP32)
    kept = pairs_of(case, rows).kept
    kept = kept | ~kept.any(-1, keepdim=True)
    *qkv, do = (x.transpose(0, 1).transpose(1, 2).contiguous() for x in tensors)  # [B, h, tokens, dim]
    results = [_attention_by_torch(case, [x.to(t) for x in qkv], do.to(t), kept) for t in (qkv[0].dtype, torch.float64)]
    errors = [truth.relative_error(x, y) for x, y in zip(*results, strict=True)]
    found = {n: truth.allowed(case.torch_dtype, e) for n, e in zip(names, errors, strict=True)}
    return found | {"lse": truth.FP32, "dsinks": found["dq"], "dslopes": found["dq"]}


def _attention_by_torch(case: Attention, qkv: list[Tensor], do: Tensor, kept: Tensor) -> list[Tensor]:
    """SDPA of `[B, h, tokens, dim]` in their dtype, and its gradients; channels of zeros make head dims fit."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    width = -(-max(case.D, case.value_dim) // 8) * 8
    q, k, v = (pad(x, (0, width - x.size(-1))) for x in leaves)
    k, v = k[:, case.kv_of], v[:, case.kv_of]
    mask = kept.expand(case.B, case.hq, *kept.shape[2:])
    out = scaled_dot_product_attention(q, k, v, mask, scale=case.factor)[..., : case.value_dim]
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


class Inputs(NamedTuple):
    """Tensors `[tokens, B, heads, dim]` of one attention, the truth, and what errors may be."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor  # [S, B, hq]
    options: Options
    exact: dict[str, Tensor]
    limits: dict[str, float]

    def held(self, results: dict[str, Tensor | None]) -> Findings:
        """What became of each, against the truth."""
        return {n: _near(x, self.exact[n], self.limits[n]) for n, x in results.items() if x is not None}


def attention_inputs(case: Attention, memory: Memory) -> Inputs:
    q, do = memory.filled(case.S, case.B, (case.hq, case.D), (case.hq, case.value_dim), dtype=case.torch_dtype)
    k, v = memory.filled(case.keys, case.B, (case.hkv, case.D), (case.hkv, case.value_dim), dtype=case.torch_dtype)
    dlse = memory.normal(case.S, case.B, case.hq)
    options, rows = case.options(memory.device), torch.arange(case.S, device=memory.device)
    found = exact(case, options, (q, k, v, do), dlse, rows)
    return Inputs(q, k, v, do, dlse, options, found, limits(case, options, (q, k, v, do), rows))


def _joined(parts: list[Span], view: int) -> Tensor:
    return torch.cat([part.views[view] for part in parts if part.views[view] is not None])


def check_attend_forward(kernels: Kernels, device: torch.device, case: Attention) -> Findings:
    memory = Memory(device, aligned=case.aligned)
    p = attention_inputs(case, memory)
    out = spans(memory, case.S, case.cuts, case.B, (case.hq, case.value_dim), dtype=case.torch_dtype)
    stats = spans(memory, case.S, case.cuts, case.B, (case.hq, 1), dtype=torch.float32)
    to = [Span(o.start, (o.views[0], s.views[0][..., 0])) for o, s in zip(out, stats, strict=True)]
    lse = memory.nan(case.hq, case.B, case.S, dtype=torch.float32)
    kernels.attend_forward(p.q, p.k, p.v, to, lse, p.options)
    found = p.held({"out": _joined(to, 0), "lse": _joined(to, 1)})
    found["lse of the heads"] = _exact(lse.permute(2, 1, 0), _joined(to, 1))
    return found | _beside(memory)


def check_attend_backward(kernels: Kernels, device: torch.device, case: Attention) -> Findings:
    memory = Memory(device, aligned=case.aligned)
    p = attention_inputs(case, memory)
    lse = p.exact["lse"].permute(2, 1, 0).float().contiguous()
    delta = memory.rows(case.S, case.B, (case.hq, 1), dtype=torch.float32)[0][..., 0]
    delta.copy_((p.exact["out"] * p.do.double()).sum(-1) - p.dlse)
    sums = torch.float32 if case.partial else case.torch_dtype
    key_cuts = tuple(cut for cut in case.cuts if cut < case.keys)
    dq = spans(memory, case.S, case.cuts, case.B, (case.hq, case.D), dtype=case.torch_dtype)
    dkv = spans(memory, case.keys, key_cuts, case.B, (case.hkv, case.D), (case.hkv, case.value_dim), dtype=sums)
    heads = head_grads(p.options)
    kernels.attend_backward(p.q, p.k, p.v, p.do, lse, delta, dq, dkv, p.options, heads)
    results = {"dq": _joined(dq, 0), "dk": _joined(dkv, 0), "dv": _joined(dkv, 1)}
    return p.held(results | {"dsinks": heads.sinks, "dslopes": heads.slopes}) | _beside(memory)


def head_grads(options: Options) -> HeadGrads:
    """NaN for the gradients of what the options give per head."""
    return HeadGrads(*(None if x is None else torch.full_like(x, torch.nan) for x in (options.sinks, options.slopes)))
