"""Plain-torch twins of the kernels, with the same names and signatures: what they are tested against, and the CPU path.

Arithmetic is in fp32 (fp64 for fp64 tensors) with one rounding at the end. Those of attention are in
`_reference_attend`.

pack and unpack move each byte once where there is no transform, by one strided copy per rank. With one, the work goes
through blocks of tokens whose temporaries stay in cache. Rows are *parts* here, (first head, first token, view): the
view's heads and tokens are those from the first on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import signals
from ._reference_attend import attend_backward, attend_forward, math_dtype
from ._views import HeadNumbers, ORows, QKVRows, Transform

__all__ = [
    "attend_backward", "attend_forward", "pack", "pack_grad", "poison", "signal", "unpack", "unpack_grad",
    "unpack_grad_heads", "wait",
]  # fmt: skip

Part = tuple[int, int, Tensor]  # first head, first token, view [tokens, B, heads, ...]

_BLOCK_ELEMENTS = 1 << 18  # 1 MB in fp32: smaller blocks pay more per call, larger ones leave the cache


def pack(q: Tensor, k: Tensor, v: Tensor, to: Sequence[QKVRows], transform: Transform | None = None) -> None:
    """Write the heads of q, k and v into each rank's rows, q and k normalised and rotated as `transform` says."""
    tf = transform or Transform()
    _pack_heads(q, [(r.q_head, r.q_token, r.q) for r in to], tf, tf.q_norm)
    _pack_heads(k, [(r.kv_head, r.kv_token, r.k) for r in to], tf, tf.k_norm)
    _pack_heads(v, [(r.kv_head, r.kv_token, r.v) for r in to], Transform(), None)


def pack_grad(do: Tensor, o: Tensor | None, dlse: Tensor | None, to: Sequence[ORows]) -> None:
    """Write the heads of dO into each rank's rows, and `delta = sum(dO * O) - dLSE` where they have a place for it."""
    for rows in to:
        rows.o.copy_(_source(do, rows.q_head, rows.token, rows.o))
    stats = [(rows.q_head, rows.token, rows.stat) for rows in to if rows.stat is not None]
    if not stats:
        return
    assert o is not None and len(stats) == len(to), "delta needs o, and goes to all ranks or none"
    dtype = math_dtype(do)
    for block in _token_blocks(do):
        for head, token, stat in _within(stats, block):  # [T, B, h]
            b_do, b_o = (_source(x[:, block], head, token, stat).to(dtype) for x in (do, o))  # [T, B, h, Dv]
            delta = (b_do * b_o).sum(-1)
            stat.copy_(delta if dlse is None else delta - _source(dlse[:, block], head, token, stat))


def poison(status: Tensor, rows: Tensor, number: int) -> None:
    """Write `number` to `status[1]` (0: leave it), and 255 to every byte of `rows` if `status[0]` is set."""
    if number:
        status[1] = number
    if status[0]:
        rows.view(-1).view(torch.uint8).fill_(255)


def unpack(rows: Sequence[ORows], out: Tensor, lse: Tensor | None) -> None:
    """Write the heads of O in each rank's rows to `out` [B, L, Hq, Dv], and their LSE to `lse` [B, L, Hq] if given."""
    for r in rows:
        _source(out, r.q_head, r.token, r.o).copy_(r.o)
        if lse is not None:
            assert r.stat is not None, "an LSE is asked for that the rows do not carry"
            _source(lse, r.q_head, r.token, r.stat).copy_(r.stat)


def unpack_grad(
    rows: Sequence[QKVRows], q: Tensor | None, k: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
    transform: Transform | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """As `unpack_grad_heads`, of all heads; return the gradients of the norms' weights."""
    dq_norm, dk_norm = unpack_grad_heads(rows, q, k, dq, dk, dv, transform)
    return None if dq_norm is None else dq_norm.sum(0), None if dk_norm is None else dk_norm.sum(0)


def unpack_grad_heads(
    rows: Sequence[QKVRows], q: Tensor | None, k: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
    transform: Transform | None = None, heads: HeadNumbers | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Write the gradients of what `pack` was given, of all heads or `heads`; return each head's share of the norms'."""
    tf = transform or Transform()
    q_heads, kv_heads = heads or (tuple(range(dq.shape[2])), tuple(range(dk.shape[2])))
    dq_norm = _unpack_heads([(r.q_head, r.q_token, r.q) for r in rows], q_heads, q, dq, tf, tf.q_norm)
    dk_norm = _unpack_heads([(r.kv_head, r.kv_token, r.k) for r in rows], kv_heads, k, dk, tf, tf.k_norm)
    _unpack_heads([(r.kv_head, r.kv_token, r.v) for r in rows], kv_heads, None, dv, Transform(), None)
    return dq_norm, dk_norm


def _pack_heads(x: Tensor, to: Sequence[Part], tf: Transform, weight: Tensor | None) -> None:
    """What the parts in `to` hold of `x` [B, L, H, D]."""
    if tf.cos is None and weight is None:
        for head, token, view in to:
            view.copy_(_source(x, head, token, view))
        return
    dtype = math_dtype(x)
    w = None if weight is None else weight.to(dtype)
    for block in _token_blocks(x):
        here = _within(to, block)
        wanted = sorted({head + i for head, _, view in here for i in range(view.shape[2])})
        if not wanted:
            continue
        y = b_x = (x[:, block] if len(wanted) == x.shape[2] else x[:, block, wanted]).to(dtype)  # [B, T, H, D]
        if tf.cos is not None:
            y = _rotate(b_x, *_rotation(tf, block, x.shape[-1], dtype, w), tf)
        elif w is not None:
            y = b_x * w
        if w is not None:
            y *= _rms_scale(b_x, tf.eps)
        for head, token, view in here:
            view.copy_(_source(y, wanted.index(head), token, view))


def _unpack_heads(
    rows: Sequence[Part], heads: Sequence[int], x: Tensor | None, dx: Tensor, tf: Transform, weight: Tensor | None
) -> Tensor | None:
    """The gradients of `heads` in parts into `dx` [B, L, H, D]; returns the shares of the norm's weight, [H, D]."""
    dw = None if weight is None else dx.new_zeros(dx.shape[2:], dtype=math_dtype(dx))
    blocks = list(_token_blocks(dx))  # sums in blocks are the same bits, however many heads go at once
    for run in _neighbours(heads):
        parts = _of_heads(rows, run)
        _unpack_run(parts, blocks, None if x is None else x[:, :, run], dx[:, :, run], tf, weight, dw, run)
    return dw


def _neighbours(heads: Sequence[int]) -> Iterator[slice]:
    """Runs of neighbours in ascending `heads`."""
    for _, run in groupby(enumerate(heads), lambda item: item[1] - item[0]):
        found = [head for _, head in run]
        yield slice(found[0], found[-1] + 1)


def _of_heads(parts: Sequence[Part], run: slice) -> list[Part]:
    """What of the parts belongs to a run of heads, which counts from 0 there."""
    found = []
    for head, token, view in parts:
        first, stop = max(head, run.start), min(head + view.shape[2], run.stop)
        if first < stop:
            is_whole = stop - first == view.shape[2]
            found.append((first - run.start, token, view if is_whole else view[:, :, first - head : stop - head]))
    return found


def _unpack_run(
    rows: Sequence[Part], blocks: Sequence[slice], x: Tensor | None, dx: Tensor, tf: Transform, weight: Tensor | None,
    shares: Tensor | None, run: slice,
) -> None:  # fmt: skip
    """`_unpack_heads` of a run of heads, which is all that `rows`, x and dx hold; in the blocks of tokens given."""
    dtype = math_dtype(dx)
    if tf.cos is None and weight is None and (dx.dtype == dtype or not _are_shared(rows, dx.shape[1])):
        _sum_heads(rows, dx)
        return
    for block in blocks:
        b_dx = dx[:, block]
        g = torch.empty_like(b_dx, dtype=dtype, memory_format=torch.contiguous_format)  # [B, T, H, D]
        _sum_heads(_within(rows, block), g)
        if tf.cos is not None:
            g = _rotate(g, *_rotation(tf, block, g.shape[-1], dtype, vjp=True), tf)
        if weight is not None:
            assert x is not None and shares is not None, "the norm's VJP needs the raw input"
            b_x = x[:, block].to(dtype)
            r = _rms_scale(b_x, tf.eps)  # [B, T, H, 1]
            n = b_x * r  # [B, T, H, D]
            gn = g * n  # [B, T, H, D]
            w = weight.to(dtype)
            for share, of_head in zip(shares[run], gn.flatten(0, 1).unbind(1), strict=True):
                share += of_head.contiguous().sum(0)  # in an order that knows of no other head
            mean = (gn * w).sum(-1, keepdim=True) / len(w)  # [B, T, H, 1]
            g.mul_(w).addcmul_(n, mean, value=-1).mul_(r)
        b_dx.copy_(g)


def _sum_heads(rows: Sequence[Part], out: Tensor) -> None:
    """Each token of a head in `out` [B, T, H, D] is the sum of its sources in the order of `rows`, zero without any."""
    for block in _even_blocks(rows, out.shape[1]):
        b_out = out[:, block]
        written = [False] * out.shape[2]
        for first, _, view in _within(rows, block):
            for head, n, again in _runs(written, first, view.shape[2]):
                target = b_out[:, :, head : head + n].transpose(0, 1)  # [T, B, n, D]
                source = view[:, :, head - first : head - first + n]
                if again:
                    target += source
                else:
                    target.copy_(source)
            written[first : first + view.shape[2]] = [True] * view.shape[2]
        for head, n, again in _runs(written, 0, len(written)):
            if not again:
                b_out[:, :, head : head + n] = 0


def _are_shared(rows: Sequence[Part], tokens: int) -> bool:
    """Whether any token of a head has several sources."""
    for block in _even_blocks(rows, tokens):
        heads = [first + i for first, _, view in _within(rows, block) for i in range(view.shape[2])]
        if len(heads) > len(set(heads)):
            return True
    return False


def _even_blocks(parts: Sequence[Part], tokens: int) -> Iterator[slice]:
    """Ranges of the tokens that each of `parts` holds whole or not at all."""
    cuts = {0, tokens, *(cut for _, token, view in parts for cut in (token, token + view.shape[0]))}
    for start, stop in pairwise(sorted(cuts)):
        yield slice(start, stop)


def _within(parts: Sequence[Part], block: slice) -> list[Part]:
    """What lies in a block of tokens: parts of it, without those that would be empty."""
    found = []
    for head, token, view in parts:
        n = view.shape[0]
        start, stop = max(token, block.start), min(token + n, block.stop)
        if start < stop and view.shape[2]:
            is_whole = stop - start == n  # a slice of all takes as long as a small copy
            found.append((head, start - block.start, view if is_whole else view[start - token : stop - token]))
    return found


def _runs(flags: Sequence[bool], first: int, n: int) -> Iterator[tuple[int, int, bool]]:
    """(first, length, flag) of each run of equal `flags` in `first .. first + n - 1`."""
    head = first
    for flag, run in groupby(flags[first : first + n]):
        length = len(list(run))
        yield head, length, flag
        head += length


def signal(pads: Sequence[Tensor], counts: Tensor, status: Tensor, kind: int, rank: int) -> None:
    """Raise this rank's count of `kind` and tell all ranks, whose `pads` are tensors here, not addresses."""
    counts[kind] += 1
    for peer, its_pad in enumerate(pads):
        its_pad.view(signals.KINDS, -1)[kind, rank] = -1 if status[0] else counts[kind, peer]


def wait(pad: Tensor, counts: Tensor, status: Tensor, kind: int, behind: int) -> None:
    """What a wait of `signals` says of peers that have not signalled when its time is over."""
    seen, wanted = pad.view(signals.KINDS, -1)[kind], counts[kind] - behind
    missing = seen < wanted
    if missing.any() and not status[0]:
        gave_up = torch.where(seen < 0, signals.GAVE_UP, signals.SILENT)
        status[signals.FLAGS :] = torch.where(missing, gave_up, status[signals.FLAGS :])
        status[0] = wanted[0] * signals.KINDS + kind + 1


def _source(x: Tensor, head: int, token: int, view: Tensor) -> Tensor:
    """What of `x` [B, L, H, ...] a part holds, in the order of dimensions of its view."""
    return x[:, token : token + view.shape[0], head : head + view.shape[2]].transpose(0, 1)


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
