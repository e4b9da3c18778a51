"""QK-norm and RoPE, and their transposes, on a block of one head in registers: helpers for pack and unpack.

QK-norm: `y = x * r * w` with `r = rsqrt(mean(x^2) + eps)` over the D channels (RMSNorm, Zhang and Sennrich 2019).
Its VJP, with `n = x * r` and `h = g * w`: `dx = r * (h - n * mean(h * n))`, `dw = sum over tokens of g * n`.

RoPE (Su et al. 2021): channel i of the first R has a partner channel p(i), and `y[i] = x[i] cos[i] + x[p(i)] s[i]`,
where `s` is -sin for the first channel of a pair and +sin for the second. Hence the VJP, which swaps the roles:
`dx[i] = g[i] cos[i] + g[p(i)] s[p(i)]`. It holds also for cos and sin that differ within a pair.

Example: R = 4, rotate-half: pairs (0, 2), (1, 3); interleaved: pairs (0, 1), (2, 3). With one column per pair, both
read cos[0] for the first pair and cos[1] for the second; with one per channel (`WIDE`), channel i reads cos[i].

The partner of a rotate-half channel lies R/2 away, most likely in another thread: the caller loads the block a second
time at the partner's columns (it is in cache). Interleaved partners lie side by side in one thread's registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._table import tile_mask


@triton.jit
def rms_scale(x, eps, D: tl.constexpr):
    """`rsqrt(mean(x^2) + eps)` of each token; channels past D must be zero."""
    return tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)  # [BLOCK_T]


@triton.jit
def norm_vjp(g, x, r, w, D: tl.constexpr):
    """Gradients of QK-norm for `x` and, summed over the block's tokens, for the weight."""
    n = x * r[:, None]  # [BLOCK_T, BLOCK_D]
    h = g * w[None, :]  # [BLOCK_T, BLOCK_D]
    mean = tl.sum(h * n, axis=1) / D  # [BLOCK_T]
    return r[:, None] * (h - n * mean[:, None]), tl.sum(g * n, axis=0)  # [BLOCK_T, BLOCK_D], [BLOCK_D]


@triton.jit
def half_partner(o_d, ROPE_DIM: tl.constexpr):
    """The partner of each of the first ROPE_DIM channels under rotate-half."""
    return tl.where(o_d < ROPE_DIM // 2, o_d + ROPE_DIM // 2, o_d - ROPE_DIM // 2)


@triton.jit
def rope_half(
    x, partner, cos_row, sin_row, m_t, ROPE_DIM: tl.constexpr, WIDE: tl.constexpr, IS_VJP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotate-half RoPE of `x` (or its VJP), given the same block at the partner's columns; both [BLOCK_T, BLOCK_D].

    `cos_row` and `sin_row` [BLOCK_T, 1] point to the tokens' first columns.
    """
    o_d = tl.arange(0, BLOCK_D)
    is_first = o_d < ROPE_DIM // 2
    o_p = half_partner(o_d, ROPE_DIM)
    o_cos = o_d if WIDE else tl.where(is_first, o_d, o_p)
    if WIDE and IS_VJP:
        o_sin = o_p
    else:
        o_sin = o_cos
    m = tile_mask(m_t, o_d, ROPE_DIM, BLOCK_D)
    b_cos = tl.load(cos_row + o_cos[None, :], mask=m, other=1.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    b_sin = tl.load(sin_row + o_sin[None, :], mask=m, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    b_sin = tl.where(is_first[None, :] != IS_VJP, -b_sin, b_sin)
    return x * b_cos + partner * b_sin


@triton.jit
def rope_interleaved(
    x, cos_row, sin_row, m_t, ROPE_DIM: tl.constexpr, WIDE: tl.constexpr, IS_VJP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Interleaved RoPE of `x` [BLOCK_T, BLOCK_D] (or its VJP); `cos_row` and `sin_row` as for `rope_half`."""
    if WIDE:
        o_c = tl.arange(0, BLOCK_D)
        m = tile_mask(m_t, o_c, ROPE_DIM, BLOCK_D)
        b_cos = tl.load(cos_row + o_c[None, :], mask=m, other=1.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        b_sin = tl.load(sin_row + o_c[None, :], mask=m, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        cos_a, cos_b = tl.split(b_cos.reshape(BLOCK_T, BLOCK_D // 2, 2))  # [BLOCK_T, BLOCK_D // 2]
        sin_a, sin_b = tl.split(b_sin.reshape(BLOCK_T, BLOCK_D // 2, 2))  # [BLOCK_T, BLOCK_D // 2]
    else:
        o_c = tl.arange(0, BLOCK_D // 2)
        m = tile_mask(m_t, o_c, ROPE_DIM // 2, BLOCK_D // 2)
        cos_a = tl.load(cos_row + o_c[None, :], mask=m, other=1.0).to(tl.float32)  # [BLOCK_T, BLOCK_D // 2]
        sin_a = tl.load(sin_row + o_c[None, :], mask=m, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D // 2]
        cos_b = cos_a
        sin_b = sin_a
    a, b = tl.split(x.reshape(BLOCK_T, BLOCK_D // 2, 2))  # [BLOCK_T, BLOCK_D // 2]
    if IS_VJP:
        y = tl.join(a * cos_a + b * sin_b, b * cos_b - a * sin_a)  # [BLOCK_T, BLOCK_D // 2, 2]
    else:
        y = tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b)  # [BLOCK_T, BLOCK_D // 2, 2]
    return y.reshape(BLOCK_T, BLOCK_D)
