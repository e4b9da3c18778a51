"""Attention on one device in fp64, written independently of the library: what every result is held against."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def allowed(
    queries: int, keys: int, *, causal: bool, window: tuple[int, int] | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Which query attends which key: [queries, keys], or with the documents' numbers ([B, S], [B, Sk]) [B, S, Sk]."""
    left, right = window or (-1, -1)
    right = 0 if causal else right
    i, j, kept = torch.arange(queries).unsqueeze(1), torch.arange(keys), torch.ones(queries, keys, dtype=torch.bool)
    if documents is not None:
        i, j = (_within(ids) for ids in documents)
        i, j = i.unsqueeze(2), j.unsqueeze(1)
        q_ids, k_ids = documents[0].unsqueeze(2), documents[1].unsqueeze(1)
        kept = (q_ids == k_ids) & (q_ids >= 0)
    if left >= 0:
        kept = kept & (i - j <= left)
    return kept & (j - i <= right) if right >= 0 else kept


def _within(ids: Tensor) -> Tensor:
    """Every token's position counted from the first token of its document."""
    places = torch.zeros_like(ids)
    for row, found in zip(ids.tolist(), places, strict=True):
        first: dict[int, int] = {}
        for n, number in enumerate(row):
            found[n] = n - first.setdefault(number, n)
    return places


def distances(queries: int, keys: int, documents: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """|i - j|, [1 or B, queries, keys]; in documents counted from their beginnings, as far as that is attended."""
    if documents is None:
        return (torch.arange(queries).unsqueeze(1) - torch.arange(keys)).abs().unsqueeze(0)
    i, j = (_within(ids) for ids in documents)
    return (i.unsqueeze(2) - j.unsqueeze(1)).abs()


def stays(p: float, seed: int, batch: int, heads: range, queries: int, keys: int) -> Tensor:
    """Which pairs dropout leaves, [batch, heads, queries, keys], by Philox-4x32-7 in numpy's unsigned integers."""
    word = np.uint64(0xFFFFFFFF)
    grids = np.meshgrid(np.arange(batch), np.array(heads), np.arange(queries), np.arange(keys), indexing="ij")
    c = [g.astype(np.uint64) for g in grids[::-1]]
    k = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(7):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & word, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & word]
        k = [(k[0] + np.uint64(0x9E3779B9)) & word, (k[1] + np.uint64(0xBB67AE85)) & word]
    return torch.from_numpy(c[0] >= np.uint64(round(p * 2**32)))


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, kept: Tensor, scale: float | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, bias: Tensor | None = None, stay: Tensor | None = None, p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, S, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv] -> out, LSE; all scores at once.

    `kept`, `bias` and `stay` broadcast to [B, Hq, S, Sk]: the mask, what is added to scores, what dropout leaves.
    """
    repeat = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale if scale is not None else 1 / math.sqrt(q.size(-1)))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    kept = kept.expand(scores.shape)
    scores = scores.masked_fill(~kept, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
        kept = torch.cat([kept, torch.ones_like(kept[..., :1])], -1) if kept.size(-1) else torch.isfinite(scores)
    keyless = ~kept.any(-1, keepdim=True)
    scores = scores.masked_fill(keyless, 0.0)  # numbers, for the sake of the gradient
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(keyless, 0.0) if scores.size(-1) else scores
    weights = weights[..., : k.size(1)]
    if stay is not None:
        weights = weights * stay / (1 - p)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return out, lse.masked_fill(keyless[..., 0], -math.inf).transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rope(x: Tensor, angles: Tensor | None, interleaved: bool) -> Tensor:
    """Rotate the channel pairs of x [B, S, H, D] by angles [S, R/2], as complex numbers."""
    if angles is None:
        return x
    pairs = angles.size(-1)
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    real, imag = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    z = torch.complex(real.contiguous(), imag.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    parts = [z.real, z.imag]
    turned = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat([turned, rest], dim=-1)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Norm of the difference by the norm of the truth; nan and inf where there should be none count as infinite."""
    difference = (result.double() - truth.double()).norm().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / max(truth.double().norm().item(), 1e-30)
