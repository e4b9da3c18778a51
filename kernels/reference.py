"""Plain-torch twins of the kernels, with the same names and signatures: what they are tested against, and the CPU path.

Arithmetic is in fp32 (fp64 for fp64 tensors) with one rounding at the end.

Attention goes through blocks of BLOCK queries per batch and head, so that memory is linear in the sequence. Every
head's k and v, and every block of q, is first brought to a fresh contiguous temporary: a result does not depend on
strides, alignment or the number of heads beside it, bit for bit. Worked example: S = Sk = 600, causal. The blocks are
the queries 0..255, 256..511 and 512..599; they compute the keys 0..255, 0..511 and 0..599, and only the square at the
end of each is masked. With a window (100, 0) they compute the keys 0..255, 156..511 and 412..599: work, too, is then
linear in the sequence.

pack and unpack move each byte once where there is no transform, by one strided copy per rank. With one, the work goes
through blocks of tokens whose temporaries stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._views import HeadMap, Options, ORows, QKVRows, Span, Transform

BLOCK = 256  # queries computed at once
_BLOCK_ELEMENTS = 1 << 18  # 1 MB in fp32: smaller blocks pay more per call, larger ones leave the cache


# -- attention


def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Sequence[Span], lse: Tensor | None, options: Options
) -> None:  # fmt: skip
    """Twin of `attend_forward.attend_forward`; fp64 is allowed too, with an LSE of fp64 then."""
    S, B, hq, _ = q.shape
    dtype = _math_dtype(q)
    for b in range(B):
        for j, group in _kv_heads(k, hq, options.heads):
            k_j, v_j = _fresh(k[:, b, j], dtype), _fresh(v[:, b, j], dtype)  # [Sk, D], [Sk, Dv]
            for h in group:
                for start, stop, keys in _query_blocks(S, len(k), options):
                    q_i = _fresh(q[start:stop, b, h], dtype)  # [rows, D]
                    s = _capped(_products(q_i, k_j[keys], options), options)  # [rows, keys]
                    s = _masked(s, start, keys.start, options)
                    if s.size(1):
                        m = s.amax(1, keepdim=True).nan_to_num(neginf=0.0, nan=torch.nan, posinf=torch.inf)  # [rows, 1]
                    else:
                        m = s.new_zeros(len(s), 1)
                    p = s.sub_(m).exp_()
                    total = p.sum(1, keepdim=True)  # [rows, 1]
                    o = (p @ v_j[keys]) / torch.where(total == 0, 1, total)  # [rows, Dv]
                    stat = (total.log() + m)[:, 0]  # [rows]
                    _store(out, 0, b, h, start, o)
                    _store(out, 1, b, h, start, stat)
                    if lse is not None:
                        lse[h, b, start:stop] = stat


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, dq: Sequence[Span], dkv: Sequence[Span],
    options: Options,
) -> None:  # fmt: skip
    """Twin of `attend_backward.attend_backward`; fp64 is allowed too, with LSE and delta of fp64 then."""
    S, B, hq, _ = q.shape
    dtype = _math_dtype(q)
    for b in range(B):
        for j, group in _kv_heads(k, hq, options.heads):
            k_j, v_j = _fresh(k[:, b, j], dtype), _fresh(v[:, b, j], dtype)  # [Sk, D], [Sk, Dv]
            dk, dv = torch.zeros_like(k_j), torch.zeros_like(v_j)
            for h in group:
                for start, stop, keys in _query_blocks(S, len(k), options):
                    q_i, do_i = _fresh(q[start:stop, b, h], dtype), _fresh(do[start:stop, b, h], dtype)
                    lse_i = _fresh(lse[h, b, start:stop], dtype)  # [rows]
                    lse_i = torch.where(lse_i == -torch.inf, torch.inf, lse_i)  # a row without keys: P = 0
                    s = _products(q_i, k_j[keys], options)  # [rows, keys]
                    slope = _slope(s, options)
                    p = _masked(_capped(s, options), start, keys.start, options).sub_(lse_i[:, None]).exp_()
                    dv[keys].addmm_(p.mT, do_i)
                    ds = (do_i @ v_j[keys].mT).sub_(_fresh(delta[start:stop, b, h], dtype)[:, None]).mul_(p)
                    if slope is not None:
                        ds.mul_(slope)
                    dk[keys].addmm_(ds.mT, q_i)
                    _store(dq, 0, b, h, start, (ds @ k_j[keys]).mul_(options.scale))
            _store(dkv, 0, b, j, 0, dk.mul_(options.scale))
            _store(dkv, 1, b, j, 0, dv)


def _math_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fresh(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def _kv_heads(k: Tensor, hq: int, heads: HeadMap) -> Iterator[tuple[int, range]]:
    """Every local kv head with the local query heads that attend to it."""
    for j in range(k.shape[2]):
        first = j * heads.group - heads.offset
        yield j, range(max(0, first), min(hq, first + heads.group))


def _query_blocks(S: int, Sk: int, options: Options) -> Iterator[tuple[int, int, slice]]:
    """First query, one past the last, and the keys that any of them attends."""
    left, right = options.bounds
    for start in range(0, S, BLOCK):
        stop = min(start + BLOCK, S)
        first = 0 if left < 0 else min(Sk, max(0, start - left))
        yield start, stop, slice(first, Sk if right < 0 else max(first, min(Sk, stop + right)))


def _products(q: Tensor, k: Tensor, options: Options) -> Tensor:
    """`scale q k^T`, `[rows, keys]`."""
    return (q @ k.mT).mul_(options.scale)


def _capped(s: Tensor, options: Options) -> Tensor:
    """In place, the softcap of `s`, if there is one."""
    return s if options.softcap is None else s.div_(options.softcap).tanh_().mul_(options.softcap)


def _slope(s: Tensor, options: Options) -> Tensor | None:
    """The derivative of the softcap at `s`, 1 - tanh^2 = 1 / cosh^2, which loses nothing where tanh is near 1."""
    return None if options.softcap is None else (s / options.softcap).cosh_().reciprocal_().square_()


def _masked(s: Tensor, start: int, first: int, options: Options) -> Tensor:
    """In place, -inf where the queries from `start` on do not attend the keys from `first` on."""
    left, right = options.bounds
    if right >= 0:
        corner = s[:, start + right + 1 - first :]  # the keys before it are not too late for any of the block
        corner.masked_fill_(torch.ones_like(corner, dtype=torch.bool).triu_(), -torch.inf)
    if left >= 0:
        corner = s[:, : max(0, start + len(s) - 1 - left - first)]  # nor are those after this one too early
        corner.masked_fill_(torch.ones_like(corner, dtype=torch.bool).tril_(start - left - first - 1), -torch.inf)
    return s


def _store(spans: Sequence[Span], view: int, b: int, h: int, start: int, rows: Tensor) -> None:
    """Write `rows` of the tokens from `start` on to the spans they lie in."""
    stop = start + len(rows)
    for span in spans:
        target = span.views[view] if view < len(span.views) else None
        if target is None:
            continue
        first, last = max(start, span.start), min(stop, span.start + len(target))
        if first < last:
            target[first - span.start : last - span.start, b, h].copy_(rows[first - start : last - start])


# -- layout


def pack(q: Tensor, k: Tensor, v: Tensor, to: Sequence[QKVRows], transform: Transform | None = None) -> None:
    """Write the heads of q, k and v into each rank's rows, q and k normalised and rotated as `transform` says."""
    tf = transform or Transform()
    _pack_heads(q, [(rows.q_head, rows.q) for rows in to], tf, tf.q_norm)
    _pack_heads(k, [(rows.kv_head, rows.k) for rows in to], tf, tf.k_norm)
    _pack_heads(v, [(rows.kv_head, rows.v) for rows in to], Transform(), None)


def pack_grad(do: Tensor, o: Tensor | None, dlse: Tensor | None, to: Sequence[ORows]) -> None:
    """Write the heads of dO into each rank's rows, and `delta = sum(dO * O) - dLSE` where they have a place for it."""
    for rows in to:
        rows.o.copy_(_heads(do, rows.q_head, rows.o))
    if all(rows.stat is None for rows in to):
        return
    assert o is not None, "delta needs o"
    dtype = _math_dtype(do)
    for block in _token_blocks(do):
        delta = (do[:, block].to(dtype) * o[:, block].to(dtype)).sum(-1)  # [B, T, Hq]
        if dlse is not None:
            delta -= dlse[:, block]
        for rows in to:
            assert rows.stat is not None, "delta for all ranks or none"
            stat = rows.stat[block]
            stat.copy_(_heads(delta, rows.q_head, stat))


def unpack(rows: Sequence[ORows], out: Tensor, lse: Tensor | None) -> None:
    """Write the heads of O in each rank's rows to `out` [B, L, Hq, Dv], and their LSE to `lse` [B, L, Hq] if given."""
    for r in rows:
        _heads(out, r.q_head, r.o).copy_(r.o)
        if lse is not None:
            assert r.stat is not None, "an LSE is asked for that the rows do not carry"
            _heads(lse, r.q_head, r.stat).copy_(r.stat)


def unpack_grad(
    rows: Sequence[QKVRows], q: Tensor | None, k: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
    transform: Transform | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Write the gradients of what `pack` was given, from those of what it wrote; return the norm weights' gradients."""
    tf = transform or Transform()
    dq_norm = _unpack_heads([(r.q_head, r.q) for r in rows], q, dq, tf, tf.q_norm)
    dk_norm = _unpack_heads([(r.kv_head, r.k) for r in rows], k, dk, tf, tf.k_norm)
    _unpack_heads([(r.kv_head, r.v) for r in rows], None, dv, Transform(), None)
    return dq_norm, dk_norm


def _pack_heads(x: Tensor, to: Sequence[tuple[int, Tensor]], tf: Transform, weight: Tensor | None) -> None:
    """The heads of `x` [B, L, H, D] into views [L, B, h, D] that begin with the given head."""
    if tf.cos is None and weight is None:
        for head, view in to:
            view.copy_(_heads(x, head, view))
        return
    dtype = _math_dtype(x)
    w = None if weight is None else weight.to(dtype)
    for block in _token_blocks(x):
        y = b_x = x[:, block].to(dtype)  # [B, T, H, D]
        if tf.cos is not None:
            y = _rotate(b_x, *_rotation(tf, block, x.shape[-1], dtype, w), tf)
        elif w is not None:
            y = b_x * w
        if w is not None:
            y *= _rms_scale(b_x, tf.eps)
        for head, view in to:
            view[block].copy_(_heads(y, head, view[block]))


def _unpack_heads(
    rows: Sequence[tuple[int, Tensor]], x: Tensor | None, dx: Tensor, tf: Transform, weight: Tensor | None
) -> Tensor | None:
    """The gradients in views [L, B, h, D] into `dx` [B, L, H, D]; returns the gradient of the norm's weight."""
    dtype = _math_dtype(dx)
    heads = [first + i for first, view in rows for i in range(view.shape[2])]
    shared = len(heads) > len(set(heads))
    if tf.cos is None and weight is None and (dx.dtype == dtype or not shared):
        _sum_heads(rows, dx)
        return None
    dw = None if weight is None else dx.new_zeros(dx.shape[-1], dtype=dtype)
    for block in _token_blocks(dx):
        b_dx = dx[:, block]
        g = torch.empty_like(b_dx, dtype=dtype, memory_format=torch.contiguous_format)  # [B, T, H, D]
        _sum_heads([(head, view[block]) for head, view in rows], g)
        if tf.cos is not None:
            g = _rotate(g, *_rotation(tf, block, g.shape[-1], dtype, vjp=True), tf)
        if weight is not None:
            assert x is not None and dw is not None, "the norm's VJP needs the raw input"
            b_x = x[:, block].to(dtype)
            r = _rms_scale(b_x, tf.eps)  # [B, T, H, 1]
            n = b_x * r  # [B, T, H, D]
            gn = g * n  # [B, T, H, D]
            w = weight.to(dtype)
            dw += gn.sum((0, 1, 2))
            mean = (gn @ w).unsqueeze(-1) / len(w)  # [B, T, H, 1]
            g.mul_(w).addcmul_(n, mean, value=-1).mul_(r)
        b_dx.copy_(g)
    return dw


def _sum_heads(rows: Sequence[tuple[int, Tensor]], out: Tensor) -> None:
    """Each head of `out` [B, T, H, D] is the sum of its sources in the order of `rows`, and zero without any."""
    written = [False] * out.shape[2]
    for first, view in rows:
        for head, n, again in _runs(written, first, view.shape[2]):
            target = out[:, :, head : head + n].transpose(0, 1)  # [T, B, n, D]
            source = view[:, :, head - first : head - first + n]
            if again:
                target += source
            else:
                target.copy_(source)
        written[first : first + view.shape[2]] = [True] * view.shape[2]
    for head, n, again in _runs(written, 0, len(written)):
        if not again:
            out[:, :, head : head + n] = 0


def _runs(flags: Sequence[bool], first: int, n: int) -> Iterator[tuple[int, int, bool]]:
    """(first, length, flag) of each run of equal `flags` in `first .. first + n - 1`."""
    head = first
    for flag, run in groupby(flags[first : first + n]):
        length = len(list(run))
        yield head, length, flag
        head += length


def _heads(x: Tensor, first: int, view: Tensor) -> Tensor:
    """The heads of `x` [B, L, H, ...] that `view` [L, B, h, ...] holds, in its order of dimensions."""
    return x[:, :, first : first + view.shape[2]].transpose(0, 1)


def _token_blocks(x: Tensor) -> Iterator[slice]:
    """Token ranges of `x` [B, L, H, D] whose elements fit a block."""
    B, L, H, D = x.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, B * H * D))
    for start in range(0, L, step):
        yield slice(start, min(start + step, L))


def _rms_scale(x: Tensor, eps: float) -> Tensor:
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, tf: Transform) -> Tensor:
    """`x` [B, T, H, D] times `cos` [1 or B, T, 1, D], plus its turned channels times `sin` [1 or B, T, 1, R]."""
    y = x * cos  # [B, T, H, D]
    y[..., : tf.rope_dim].addcmul_(_turn(x[..., : tf.rope_dim], tf.interleaved), sin)
    return y


def _turn(x: Tensor, interleaved: bool) -> Tensor:
    """The partners of all channels; of interleaved pairs (a, b), which PyTorch turns as complex numbers, (-b, a)."""
    if not interleaved:
        return x.roll(x.shape[-1] // 2, -1)
    if x.storage_offset() % 2 or any(s % 2 for s in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)  # complex numbers must lie at even places
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * 1j).flatten(-2)


def _rotation(
    tf: Transform, block: slice, D: int, dtype: torch.dtype, weight: Tensor | None = None, vjp: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin of a block of tokens for `_rotate`: one column per channel, signs and a norm's weight included.

    The VJP is the same map with sin at the partner's place and of opposite sign.
    """
    assert tf.cos is not None and tf.sin is not None
    R = tf.rope_dim

    def swap(t: Tensor) -> Tensor:
        return t.unflatten(-1, (R // 2, 2)).flip(-1).flatten(-2) if tf.interleaved else t.roll(R // 2, -1)

    cos, sin = (t[:, block].to(dtype).unsqueeze(2) for t in (tf.cos, tf.sin))  # [1 or B, T, 1, R / 2 or R]
    if cos.shape[-1] != R:
        cos, sin = (t.repeat_interleave(2, -1) if tf.interleaved else torch.cat((t, t), -1) for t in (cos, sin))
    if vjp:
        sin = -swap(sin)
    if not tf.interleaved:
        sin = torch.cat((-sin[..., : R // 2], sin[..., R // 2 :]), -1)
    cos = pad(cos, (0, D - R), value=1.0)
    return (cos, sin) if weight is None else (cos * weight, sin * swap(weight[:R]))
