"""Attention on one device in fp64, written apart from the kernels, and how far from it a result may be.

Works through blocks of queries, so that memory is linear in the keys; for sequences too long to compute whole it takes
some query rows only. A gradient of the output that is zero in all other rows makes those rows' truth the whole truth:
dq is zero elsewhere, and dk and dv hold the rows' contributions and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

BLOCK_BYTES = 256 << 20  # of fp64 scores at once
FP32 = 2e-6  # what the relative error of an fp32 result may be
FLOOR = 2e-4  # of bf16 and fp16: what is allowed at least, where PyTorch's own error happens to be small


class Attention(NamedTuple):
    """Results of attention: of all keys (dk, dv), and of the query rows that were asked for (all others)."""

    out: Tensor  # [B, R, Hq, Dv]
    lse: Tensor  # [B, R, Hq]
    dq: Tensor  # [B, R, Hq, D]
    dk: Tensor  # [B, Sk, Hkv, D]
    dv: Tensor  # [B, Sk, Hkv, Dv]
    dsinks: Tensor  # [B, R, Hq], what a row adds to the gradient, like dslopes; zeros without sinks
    dslopes: Tensor  # [B, R, Hq]; zeros without slopes


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    causal: bool,
    scale: float,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    documents: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    dropout: tuple[float, int] | None = None,
    rows: Tensor | None = None,
    dlse: Tensor | None = None,
) -> Attention:
    """Attention and its gradients in fp64.

    Args:
        q: `[B, R, Hq, D]`, any dtype: the query rows. k: `[B, Sk, Hkv, D]`. v: `[B, Sk, Hkv, Dv]`.
        dout: `[B, R, Hq, Dv]`, the gradient of these rows' output.
        causal: query i attends the keys j <= i.
        window: query i attends the keys i - left <= j <= i + right, -1 for no bound.
        softcap: scores are `softcap tanh(scale q k^T / softcap)`.
        documents: `[B, Sk]`, the document of every token; tokens attend those of their own.
        sinks: `[Hq]`, one more score for every query, with no value behind it.
        slopes: `[Hq]`, scores lose `slope |i - j|`.
        dropout: the probability with which a pair is dropped, and the seed.
        rows: positions of the R queries in the sequence, int64 in ascending order; None for 0 .. R - 1.
        dlse: `[B, R, Hq]`, the gradient of the log-sum-exp, or None.
    """
    (B, R, Hq, D), (_, Sk, Hkv, Dv) = q.shape, v.shape
    rows = torch.arange(R, device=q.device) if rows is None else rows
    G = Hq // Hkv
    left, right = window or (-1, -1)
    right = 0 if causal else right

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=q.device)

    found = Attention(
        zeros(B, R, Hq, Dv), zeros(B, R, Hq), zeros(B, R, Hq, D), zeros(B, Sk, Hkv, D), zeros(B, Sk, Hkv, Dv),
        zeros(B, R, Hq), zeros(B, R, Hq),
    )  # fmt: skip
    step = max(1, BLOCK_BYTES // max(1, 8 * G * Sk))
    positions = torch.arange(Sk, device=q.device)
    for b in range(B):
        for j in range(Hkv):
            heads = slice(j * G, (j + 1) * G)
            for start in range(0, R, step):
                block = slice(start, start + step)
                at = rows[block]
                keys = slice(0, Sk if right < 0 else min(Sk, int(at[-1]) + right + 1))
                k_j, v_j = k[b, keys, j].double(), v[b, keys, j].double()  # [n, D], [n, Dv]
                q_i, do_i = (x[b, block, heads].double().transpose(0, 1) for x in (q, dout))  # [G, rows, D or Dv]
                s = (q_i @ k_j.mT).mul_(scale)  # [G, rows, n]
                slope = 1.0 if softcap is None else 1 / (s / softcap).cosh_().square_()
                if softcap is not None:
                    s.div_(softcap).tanh_().mul_(softcap)
                distance = (at[:, None] - positions[keys]).double()  # [rows, n]
                if slopes is not None:
                    s.sub_(distance.abs() * slopes[heads, None, None].double())
                if right >= 0:
                    s.masked_fill_(distance < -right, -math.inf)
                if left >= 0:
                    s.masked_fill_(distance > left, -math.inf)
                if documents is not None:
                    s.masked_fill_(documents[b, at, None] != documents[b, keys], -math.inf)
                lse = s.logsumexp(-1)  # [G, rows]
                if sinks is not None:
                    lse = lse.logaddexp(sinks[heads, None].double())
                p = s.sub_(lse[..., None].nan_to_num(neginf=0.0)).exp_()  # a row without keys: zeros
                kept = 1.0 if dropout is None else _kept_weight(*dropout, b, heads, at, positions[keys])
                o = (p * kept) @ v_j  # [G, rows, Dv]
                delta = (do_i * o).sum(-1)
                if dlse is not None:
                    delta -= dlse[b, block, heads].double().T
                found.dv[b, keys, j] += ((p * kept).mT @ do_i).sum(0)
                ds = (do_i @ v_j.mT).mul_(kept).sub_(delta[..., None]).mul_(p)
                if sinks is not None:
                    found.dsinks[b, block, heads] = -((sinks[heads, None].double() - lse).exp_() * delta).T
                if slopes is not None:
                    found.dslopes[b, block, heads] = -(ds * distance.abs()).sum(-1).T
                ds.mul_(scale).mul_(slope)
                found.dk[b, keys, j] += (ds.mT @ q_i).sum(0)
                for result, value in zip(found[:3], (o, lse, ds @ k_j), strict=True):
                    result[b, block, heads] = value.transpose(0, 1)
    return found


def _kept_weight(p: float, seed: int, batch: int, heads: slice, rows: Tensor, keys: Tensor) -> Tensor:
    """What dropout multiplies weights with, 0 or 1 / (1 - p), `[G, rows, keys]`: Philox-4x32-7 in 16-bit halves."""
    word = 0xFFFFFFFF

    def times(number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """High and low word of the product; no sum here exceeds 2^49."""
        low = x * (number & 0xFFFF)
        high = x * (number >> 16) + (low >> 16)
        return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF

    head = torch.arange(heads.start, heads.stop, device=rows.device)[:, None, None]
    a, b, c, d = keys, rows[:, None], head, torch.full_like(keys[:1], batch)
    for i in range(7):
        first, second = times(0xD2511F53, a), times(0xCD9E8D57, c)
        key = (seed + i * 0x9E3779B9) & word, ((seed >> 32) + i * 0xBB67AE85) & word
        a, b, c, d = second[0] ^ b ^ key[0], second[1], first[0] ^ d ^ key[1], first[1]
    return (a >= round(p * 2**32)).double() / (1 - p)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, window: tuple[int, int] | None = None,
    documents: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """PyTorch's own attention in the dtype of its inputs `[B, S, H, D]`, for the error that this precision costs.

    kv heads are repeated and head dims made equal with zero channels, which every one of its kernels takes.
    """
    Dv, width = v.size(-1), max(q.size(-1), v.size(-1))
    repeat = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(repeat, 2) if repeat > 1 else x for x in (k, v))
    q, k, v = (pad(x, (0, width - x.size(-1))) if x.size(-1) < width else x for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None
    if window is not None or documents is not None:
        mask = _kept(q.size(2), k.size(2), causal, window or (-1, -1), q.device)
        mask = mask if documents is None else mask & (documents[:, None, :, None] == documents[:, None, None])
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scale)
    return out.transpose(1, 2)[..., :Dv]


def _kept(queries: int, keys: int, causal: bool, window: tuple[int, int], device: torch.device) -> Tensor:
    """Whether a query attends a key, `[queries, keys]`."""
    left, right = window
    kept = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal or right >= 0:
        kept = kept.tril(0 if causal else right)
    return kept if left < 0 else kept.triu(-left)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last dim, differentiable, in the dtype of `x`; `x` itself without a weight."""
    return x if weight is None else x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotate(x: Tensor, angles: Tensor | None, *, interleaved: bool = False) -> Tensor:
    """RoPE of the first R channels of x `[B, S, H, D]` by angles `[S, R/2]`, differentiable, in the dtype of `x`."""
    if angles is None:
        return x
    cos, sin = (t.to(x.dtype)[:, None] for t in (angles.double().cos(), angles.double().sin()))  # [S, 1, R/2]
    R = 2 * angles.size(-1)
    a, b = (x[..., 0:R:2], x[..., 1:R:2]) if interleaved else (x[..., : R // 2], x[..., R // 2 : R])
    turned = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((joined, x[..., R:]), -1)


def squares(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """The sums of squares of the difference and of the exact values, which may be added up over parts."""
    difference = result.double() - exact.double()
    agree = torch.isinf(exact) & (result == exact)  # the LSE of a query without keys is -inf
    difference, exact = difference.masked_fill(agree, 0.0), exact.double().masked_fill(agree, 0.0)
    return difference.square().sum().item(), exact.square().sum().item()


def relative(parts: Sequence[float]) -> float:
    """The relative error by norm, of two sums of squares; infinite where a result is not a number."""
    difference, exact = parts
    if not math.isfinite(difference):
        return math.inf
    return math.sqrt(difference / max(exact, 1e-60))


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The norm of the difference by the norm of the exact values; infinite where a result is not a number."""
    return relative(squares(result, exact))


def allowed(dtype: torch.dtype, peer: float) -> float:
    """What a relative error may be, given what PyTorch's own attention reaches in this dtype."""
    if dtype == torch.float64:
        return 1e-13
    return FP32 if dtype == torch.float32 else max(FLOOR, 2 * peer)
