"""Attention on one device in fp64, written independently of the library: what every result is held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def allowed(queries: int, keys: int, *, causal: bool, window: tuple[int, int] | None = None) -> Tensor:
    """Which query [queries, 1] attends which key [1, keys]."""
    left, right = window or (-1, -1)
    i, j = torch.arange(queries).unsqueeze(1), torch.arange(keys)
    kept = j <= i if causal else torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        kept = kept & (i - j <= left)
    return kept & (j - i <= right) if right >= 0 else kept


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, S, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv] -> out, LSE; all scores at once."""
    repeat = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale if scale is not None else 1 / math.sqrt(q.size(-1)))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    kept = allowed(q.size(1), k.size(1), causal=causal, window=window)
    keyless = ~kept.any(-1, keepdim=True)
    scores = scores.masked_fill(~kept, -math.inf).masked_fill(keyless, 0.0)  # numbers, for the sake of the gradient
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(keyless, 0.0) if k.size(1) else scores
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return out, lse.masked_fill(keyless[:, 0], -math.inf).transpose(1, 2)


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
