"""Attention in plain PyTorch: the twins of both attention kernels.

It goes through blocks of BLOCK queries per batch and head, so that memory is linear in the sequence, and computes the
keys between the first and the last that a block attends. Every head's k and v, and every block of q, is first brought
to a fresh contiguous temporary: a result does not depend on strides, alignment or the number of heads beside it, bit
for bit. Worked example: S = Sk = 600, causal. The blocks are the queries 0..255, 256..511 and 512..599; they compute
the keys 0..255, 0..511 and 0..599, and only the square at the end of each is masked. With a window (100, 0) they
compute the keys 0..255, 156..511 and 412..599: work, too, is then linear in the sequence. With documents they compute
what their own documents span, with a block mask the listed blocks of 128 keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from . import _dropout
from ._mask import BLOCK as LISTED
from ._predicate import evaluate
from ._views import HeadGrads, HeadMap, Options, Span

BLOCK = 256  # queries computed at once; a divisor of `CUT`, so that parts are computed in the blocks of the whole

Keys: TypeAlias = "slice | Tensor"  # some keys: a range, or positions in ascending order


def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Sequence[Span], lse: Tensor | None, options: Options
) -> None:  # fmt: skip
    """Twin of `attend_forward.attend_forward`; fp64 is allowed too, with an LSE of fp64 then."""
    n, B, hq, _ = q.shape
    dtype, reach = math_dtype(q), _reach(n, len(k), options)
    for b in range(B):
        for j, group in _kv_heads(k, hq, options.heads):
            k_j, v_j = _fresh(k[:, b, j], dtype, reach), _fresh(v[:, b, j], dtype, reach)  # [reach, D], [reach, Dv]
            for h in group:
                for start, stop, keys in query_blocks(n, reach, options, b, h):
                    at = _Block(options, b, h, start, stop, keys, k)
                    rows = at.rows(n)
                    q_i = _fresh(q[rows, b, h], dtype)  # [rows, D]
                    s = at.masked(at.scores((q_i @ k_j[keys].mT).mul_(options.scale)))  # [rows, keys]
                    m = s.amax(1, keepdim=True) if s.size(1) else s.new_full((len(s), 1), -torch.inf)  # [rows, 1]
                    m = m if options.sinks is None else m.clamp(min=options.sinks[h])
                    m = m.nan_to_num(neginf=0.0, nan=torch.nan, posinf=torch.inf)
                    p = s.sub_(m).exp_()
                    total = p.sum(1, keepdim=True)  # [rows, 1]
                    total = total if options.sinks is None else total + (options.sinks[h] - m).exp()
                    o = (at.dropped(p) @ v_j[keys]) / torch.where(total == 0, 1, total)  # [rows, Dv]
                    stat = (total.log() + m)[:, 0]  # [rows]
                    _store(out, 0, b, h, rows.start, o)
                    _store(out, 1, b, h, rows.start, stat)
                    if lse is not None:
                        lse[h, b, rows] = stat


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, dq: Sequence[Span], dkv: Sequence[Span],
    options: Options, heads: HeadGrads | None = None, start: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Twin of `attend_backward.attend_backward`; fp64 is allowed too, with LSE, delta and start of fp64 then."""
    n, B, hq, _ = q.shape
    dtype, reach = math_dtype(q), _reach(n, len(k), options)
    d_sinks, d_slopes = heads or HeadGrads()
    for total in (d_sinks, d_slopes):
        if total is not None:
            total.zero_()
    for b in range(B):
        for j, group in _kv_heads(k, hq, options.heads):
            k_j, v_j = _fresh(k[:, b, j], dtype, reach), _fresh(v[:, b, j], dtype, reach)  # [reach, D], [reach, Dv]
            dk, dv = torch.zeros_like(k_j), torch.zeros_like(v_j)
            for h in group:
                for first, stop, keys in query_blocks(n, reach, options, b, h):
                    at = _Block(options, b, h, first, stop, keys, k)
                    rows = at.rows(n)
                    q_i, do_i = _fresh(q[rows, b, h], dtype), _fresh(do[rows, b, h], dtype)
                    lse_i = _fresh(lse[h, b, rows], dtype)  # [rows]
                    lse_i = torch.where(lse_i == -torch.inf, torch.inf, lse_i)  # a row without keys: P = 0
                    delta_i = _fresh(delta[rows, b, h], dtype)  # [rows]
                    s = (q_i @ k_j[keys].mT).mul_(options.scale)  # [rows, keys]
                    slope = _slope(s, options)
                    p = at.masked(at.scores(s)).sub_(lse_i[:, None]).exp_()
                    _add(dv, keys, at.dropped(p).mT, do_i)
                    ds = at.dropped(do_i @ v_j[keys].mT).sub_(delta_i[:, None]).mul_(p)
                    if d_sinks is not None and options.sinks is not None:
                        d_sinks[h] -= ((options.sinks[h] - lse_i).exp() * delta_i).sum()
                    if d_slopes is not None:
                        d_slopes[h] -= (ds * at.distance).sum()
                    if slope is not None:
                        ds.mul_(slope)
                    _add(dk, keys, ds.mT, q_i)
                    _store(dq, 0, b, h, rows.start, (ds @ k_j[keys]).mul_(options.scale))
            dk, dv = dk[: len(k)].mul_(options.scale), dv[: len(k)]
            if start is not None:
                dk += start[0][j, b]
                dv += start[1][j, b]
            _store(dkv, 0, b, j, 0, dk)
            _store(dkv, 1, b, j, 0, dv)


class _Block:
    """The scores `[rows, keys]` of some queries and some keys of one batch and head."""

    def __init__(self, options: Options, b: int, h: int, start: int, stop: int, keys: Keys, k: Tensor) -> None:
        self.options, self.b, self.h, self.start, self.stop, self.keys, self.k = options, b, h, start, stop, keys, k

    def rows(self, n: int) -> slice:
        """Where these queries lie among the `n` rows of q."""
        first = self.options.queries(n).start
        return slice(self.start - first, self.stop - first)

    @cached_property
    def q_pos(self) -> Tensor:
        return torch.arange(self.start, self.stop, device=self.k.device)[:, None]  # [rows, 1]

    @cached_property
    def kv_pos(self) -> Tensor:
        if isinstance(self.keys, Tensor):
            return self.keys[None]  # [1, keys]
        return torch.arange(self.keys.start, self.keys.stop, device=self.k.device)[None]

    @cached_property
    def spot(self) -> Tensor:
        tables = self.options.documents
        return self.q_pos if tables is None else tables.q[4, self.b, self.start : self.stop, None].long()  # [rows, 1]

    @property
    def distance(self) -> Tensor:
        return (self.spot - self.kv_pos).abs()

    def scores(self, s: Tensor) -> Tensor:
        """In place, softcap and ALiBi."""
        cap, slopes = self.options.softcap, self.options.slopes
        if cap is not None:
            s.div_(cap).tanh_().mul_(cap)
        return s if slopes is None else s.sub_(self.distance.to(s) * slopes[self.h])

    def dropped(self, x: Tensor) -> Tensor:
        """`x` with zeros where a pair is dropped and the others scaled up; `x` itself without dropout."""
        dropout = self.options.dropout
        if dropout is None:
            return x
        batch, head = (torch.tensor(n, device=x.device) for n in (self.b, self.options.heads.first + self.h))
        words = _dropout.words(dropout.seed, batch, head, self.q_pos, self.kv_pos)
        return (x / (1 - dropout.p)).masked_fill_(words < _dropout.threshold(dropout.p), 0.0)

    def masked(self, s: Tensor) -> Tensor:
        """In place, -inf where the queries do not attend the keys."""
        options = self.options
        left, right = options.bounds
        if options.documents is None and isinstance(self.keys, slice):
            _bounded(s, self.start, self.keys.start, left, right)
        else:
            away = self.kv_pos - self.spot
            if right >= 0:
                s.masked_fill_(away > right, -torch.inf)
            if left >= 0:
                s.masked_fill_(away < -left, -torch.inf)
        if options.documents is not None:
            q_doc, k_doc = options.documents.q[0, self.b, self.q_pos], options.documents.k[0, self.b, self.kv_pos]
            s.masked_fill_(q_doc != k_doc, -torch.inf)
        if options.predicate is not None and s.numel():
            head = options.heads.first + self.h
            kept = evaluate(options.predicate, self.b, head, self.q_pos, self.kv_pos)
            s.masked_fill_(~kept, -torch.inf)
        return s


def _bounded(s: Tensor, start: int, first: int, left: int, right: int) -> None:
    """In place, -inf where the queries from `start` on do not attend the keys from `first` on: only corners of `s`."""
    if right >= 0:
        corner = s[:, start + right + 1 - first :]  # the keys before it are not too late for any of the block
        corner.masked_fill_(torch.ones_like(corner, dtype=torch.bool).triu_(), -torch.inf)
    if left >= 0:
        corner = s[:, : max(0, start + len(s) - 1 - left - first)]  # nor are those after this one too early
        corner.masked_fill_(torch.ones_like(corner, dtype=torch.bool).tril_(start - left - first - 1), -torch.inf)


def _reach(n_rows: int, n_keys: int, options: Options) -> int:
    """The keys that are computed with: those there are and, in a part, as many behind them as listed blocks reach."""
    return min(options.lengths(n_rows, n_keys)[1], -(-n_keys // LISTED.value) * LISTED.value)


def query_blocks(n: int, Sk: int, options: Options, b: int = 0, h: int = 0) -> Iterator[tuple[int, int, Keys]]:
    """First of the queries in `n` rows, one past the last, and keys among which are all that any of them attends."""
    left, right = options.bounds
    queries = options.queries(n)
    if options.blocks is not None:
        yield from _listed_blocks(queries, Sk, options, b, h)
        return
    S = queries.stop
    starts = range(queries.start, S, BLOCK)
    first = [0 if left < 0 else start - left for start in starts]
    end = [Sk if right < 0 else min(start + BLOCK, S) + right for start in starts]
    if options.documents is not None:
        _, lo, hi, _, spot = options.documents.q[:, b, queries.start : S].long()
        lo = lo if left < 0 else torch.maximum(lo, spot - left)
        hi = hi if right < 0 else torch.minimum(hi, spot + right + 1)
        some = lo < hi
        first = [int(part.amin()) for part in lo.where(some, Sk).split(BLOCK)]
        end = [int(part.amax()) for part in hi.where(some, 0).split(BLOCK)]
    for start, a, z in zip(starts, first, end, strict=True):
        a = min(Sk, max(0, a))
        yield start, min(start + BLOCK, S), slice(a, max(a, min(Sk, z)))


def _listed_blocks(queries: range, Sk: int, options: Options, b: int, h: int) -> Iterator[tuple[int, int, Keys]]:
    assert options.blocks is not None
    rows, tiles = options.blocks.q_rows, options.blocks.q_tiles
    row = rows[b if rows.size(0) > 1 else 0, h if rows.size(1) > 1 else 0]
    inside = torch.arange(LISTED.value, device=tiles.device)
    for start in queries[:: LISTED.value]:
        begin, _, end = row[start // LISTED.value].tolist()
        keys = (tiles[begin:end].long().sort().values[:, None] * LISTED.value + inside).flatten()
        yield start, min(start + LISTED.value, queries.stop), keys[keys < Sk]


def math_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fresh(x: Tensor, dtype: torch.dtype, rows: int | None = None) -> Tensor:
    """A copy of `x`, with zeros behind it up to so many rows."""
    found = torch.empty((len(x) if rows is None else rows, *x.shape[1:]), dtype=dtype, device=x.device)
    found[: len(x)].copy_(x)
    found[len(x) :].zero_()
    return found


def _kv_heads(k: Tensor, hq: int, heads: HeadMap) -> Iterator[tuple[int, range]]:
    """Every local kv head with the local query heads that attend to it."""
    for j in range(k.shape[2]):
        first = j * heads.group - heads.offset
        yield j, range(max(0, first), min(hq, first + heads.group))


def _slope(s: Tensor, options: Options) -> Tensor | None:
    """The derivative of the softcap at `s`, 1 - tanh^2 = 1 / cosh^2, which loses nothing where tanh is near 1."""
    return None if options.softcap is None else (s / options.softcap).cosh_().reciprocal_().square_()


def _add(total: Tensor, keys: Keys, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to the rows `keys` of `total`."""
    if isinstance(keys, slice):
        total[keys].addmm_(a, b)
    else:
        total.index_add_(0, keys, a @ b)


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
