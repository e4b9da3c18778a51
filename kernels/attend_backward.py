"""Local attention, backward: dq, and dk with dv, from q, k, v, dO, the LSE and delta = sum(dO * O) - dLSE.

With P = exp(scale q k^T - LSE), recomputed tile by tile (FlashAttention-2, Algorithm 2):

    dv = P^T dO        dS = P * (dO v^T - delta)        dq = scale dS k        dk = scale dS^T q

A softcap multiplies dS by its slope (`_scores`); a slope of ALiBi has the gradient -sum(dS |i - j|), whose sum over
keys the dq kernel leaves per query. Under dropout (`_dropout`), with Z = 0 for a dropped pair and 1 / (1 - p) for
others, P in dv and dO v^T in dS are multiplied by Z. The LSE counts the sink, so P is right as it is, and the sink's
own gradient is -sum(exp(sink - LSE) delta) over the queries.

Two kernels, so that every element has one owner and a fixed order of sums, without atomics: `attend_dq_kernel` holds a
query tile and walks over key tiles as the forward does; `attend_dkv_kernel` holds a key tile of one kv head and walks
over the query tiles of all query heads that attend it (first the partial ones of every head, then the full ones), with
scores transposed (`[BLOCK_N, BLOCK_M]`) so that both accumulators have the key tile's shape. Queries past S carry an
LSE of +inf, which makes their P zero. Where the query heads of a kv head come in several calls, each starts from
the sums of the one before.

Layout: rows `[tokens, B, row]` as in the forward; delta is a strided view (it rides at the end of the dO rows); results
go to spans of tokens (`_rows`), cast to the destination's type.

Worked example: hq = 4 query heads with offset 1 in groups of 3: kv head 0 is attended by the query heads 0 and 1, kv
head 1 by 2 and 3, so their programs walk over two heads each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _config
from ._dropout import stays
from ._mask import BLOCK, keep, place, rows_held, tile_at, tile_range, tile_range_keys, tokens, within
from ._options import NUMBERS, arguments
from ._rows import (
    DTYPES,
    batch_rows,
    block,
    head_rows,
    in_units,
    launched,
    load_rows,
    named,
    occupied,
    section,
    shared_strides,
    span_range,
    span_table,
    store_rows,
    unit,
    views_of,
)
from ._scores import distance, tanh
from ._views import HeadGrads, Options, Span


@triton.jit
def _dq_keys(
    b_dq, b_dslope, b_q, b_do, b_lse, b_delta, k, v, n_keys, i_begin, i_end, full, full_end,
    tiles_ptr, m, i_head, o_m, spot_m, doc_m, qk_scale, cap_scale, slope, seed_low, seed_high, threshold, keep_scale,
    MASKED: tl.constexpr, HAS: tl.constexpr, PREDICATE: tl.constexpr, HAS_DSLOPE: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add the key tiles from `i_begin` to `i_end` to dq and, of the slope's gradient, to every query's part."""
    i_b, Sk = m[0], m[3]
    for i in range(i_begin, i_end, BLOCK_N):
        i_n = tile_at(i, full, full_end, tiles_ptr, MASKED, HAS)
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_k = load_rows(k, i_n, n_keys, UNIT, MASKED, D, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load_rows(v, i_n, n_keys, UNIT, MASKED, DV, BLOCK_N, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if HAS.softcap:
            b_s, b_slope = tanh(b_s * cap_scale)
        b_s = b_s * qk_scale - b_lse[:, None]
        if HAS.alibi:
            b_s -= slope * distance(spot_m[:, None], o_n[None, :])
        b_p = tl.math.exp2(b_s)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            doc_n = tokens(m, 1, o_n, Sk, HAS)[0]
            kept = keep(
                m, i_head, o_m[:, None], o_n[None, :], spot_m[:, None], doc_m[:, None], doc_n[None, :], HAS, PREDICATE
            )  # [BLOCK_M, BLOCK_N]
            b_p = tl.where(kept, b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if HAS.dropout:
            stay = stays(i_b, i_head, o_m[:, None], o_n[None, :], seed_low, seed_high, threshold)
            b_dp = tl.where(stay, b_dp * keep_scale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if HAS_DSLOPE:
            b_dslope -= tl.sum(b_ds * distance(spot_m[:, None], o_n[None, :]), 1)
        if HAS.softcap:
            b_ds *= b_slope
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
    return b_dq, b_dslope


@triton.jit(
    do_not_specialize=["stride_qn", "stride_qb", "stride_qh", "stride_kn", "stride_kb", "stride_kh",
                       "stride_vn", "stride_vb", "stride_vh", "stride_don", "stride_dob", "stride_doh",
                       "stride_dn", "stride_db", "stride_dh", "stride_dqn", "stride_dqh",
                       "B", "hq", "group", "offset", "n_spans", "section", *NUMBERS]
)  # fmt: skip
def attend_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, table_ptr,
    stride_qn, stride_qb, stride_qh, stride_kn, stride_kb, stride_kh, stride_vn, stride_vb, stride_vh,
    stride_don, stride_dob, stride_doh, stride_dn, stride_db, stride_dh, stride_dqn, stride_dqh,
    B, S, Sk, hq, group, offset, n_spans, section, dslope_ptr,
    start, n_rows, n_keys, first_head, left, right, documents, blocks, stride_rb, stride_rh, captured, slopes_ptr,
    seed_low, seed_high, threshold, keep_scale, scale, qk_scale, cap_scale,
    HAS: tl.constexpr, PREDICATE: tl.constexpr, HAS_DSLOPE: tl.constexpr,
    DQ_DTYPE: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    start, n_rows, n_keys = rows_held(start, n_rows, n_keys, S, Sk, HAS)
    i_tile, i_bh = place(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), B * hq, section, HAS.causal)
    i_q = i_tile * BLOCK_M  # a row of q, and the query in it
    i_m = i_q + start
    i_b = (i_bh // hq).to(tl.int64)
    i_h = (i_bh % hq).to(tl.int64)
    i_kv = (i_h + offset) // group
    o_q = i_q + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_m = o_q + start  # [BLOCK_M]

    q = head_rows(batch_rows(q_ptr, stride_qn, stride_qb, stride_qh, i_b, UNIT), i_h, UNIT)
    k = head_rows(batch_rows(k_ptr, stride_kn, stride_kb, stride_kh, i_b, UNIT), i_kv, UNIT)
    v = head_rows(batch_rows(v_ptr, stride_vn, stride_vb, stride_vh, i_b, UNIT), i_kv, UNIT)
    do = head_rows(batch_rows(do_ptr, stride_don, stride_dob, stride_doh, i_b, UNIT), i_h, UNIT)
    delta_ptr += i_b * stride_db + i_h * stride_dh
    b_q = load_rows(q, i_q, n_rows, UNIT, True, D, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_do = load_rows(do, i_q, n_rows, UNIT, True, DV, BLOCK_M, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    b_lse = tl.load(lse_ptr + (i_h * B + i_b) * n_rows + o_q, mask=o_q < n_rows, other=float("inf"))  # [BLOCK_M]
    b_lse = b_lse * 1.4426950408889634  # log2(e)
    b_delta = tl.load(delta_ptr + o_q.to(tl.int64) * stride_dn, mask=o_q < n_rows, other=0.0)  # [BLOCK_M]

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_dslope = tl.zeros([BLOCK_M], tl.float32)
    slope = 0.0
    if HAS.alibi:
        slope = tl.load(slopes_ptr + i_h) * 1.4426950408889634
    m = (i_b, B, S, Sk, left, right, documents, captured)
    doc_m, spot_m = tokens(m, 0, o_m, S, HAS)  # [BLOCK_M]
    i_row = i_b * stride_rb + i_h * stride_rh + i_m // BLOCK
    full, full_end, begin, end, tiles_ptr = tile_range(i_m, i_row, m, blocks, HAS, BLOCK_M, BLOCK_N)
    b_dq, b_dslope = _dq_keys(
        b_dq, b_dslope, b_q, b_do, b_lse, b_delta, k, v, n_keys, full, full_end, full, full_end,
        tiles_ptr, m, first_head + i_h, o_m, spot_m, doc_m, qk_scale, cap_scale, slope,
        seed_low, seed_high, threshold, keep_scale,
        False, HAS, PREDICATE, HAS_DSLOPE, UNIT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    b_dq, b_dslope = _dq_keys(
        b_dq, b_dslope, b_q, b_do, b_lse, b_delta, k, v, n_keys, begin, end, full, full_end,
        tiles_ptr, m, first_head + i_h, o_m, spot_m, doc_m, qk_scale, cap_scale, slope,
        seed_low, seed_high, threshold, keep_scale,
        True, HAS, PREDICATE, HAS_DSLOPE, UNIT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    if HAS_DSLOPE:
        tl.store(dslope_ptr + (i_h * B + i_b) * n_rows + o_q, b_dslope, mask=o_q < n_rows)
    b_dq = (b_dq * scale).to(DQ_DTYPE)
    first, last = span_range(table_ptr, n_spans, i_q, tl.minimum(i_q + BLOCK_M, n_rows))
    for i_span in range(first, last):
        store_rows(table_ptr, i_span, i_b, i_h, o_q, b_dq, stride_dqn, stride_dqh, 0, UNIT, D, BLOCK_D)


@triton.jit
def _dkv_queries(
    b_dk, b_dv, b_k, b_v, q, do, lse_ptr, delta_ptr, stride_dn, stride_dh, stride_lh, i_first, n_heads,
    i_begin, i_end, full, full_end, tiles_ptr,
    m, first_head, o_n, doc_n, slopes_ptr, qk_scale, cap_scale, seed_low, seed_high, threshold, keep_scale,
    MASKED: tl.constexpr, HAS: tl.constexpr, PREDICATE: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add the query tiles from `i_begin` to `i_end` of `n_heads` query heads, head by head, to dk and dv.

    One loop over all of them: in a loop inside a loop, the state of the pipeline and the accumulators spill registers.
    Lists of blocks name the heads themselves.
    """
    i_b, S = m[0], m[2]
    n_tiles = tl.cdiv(tl.maximum(i_end - i_begin, 0), BLOCK_M)
    n_steps = n_tiles
    if not HAS.blocks:
        n_steps = n_heads * n_tiles
    n_tiles = tl.maximum(n_tiles, 1)  # the pipeline divides by it ahead of the loop, whether or not there is a step
    for i in range(0, n_steps):
        if HAS.blocks:
            i_tile = tile_at(i_begin + i * BLOCK_M, full, full_end, tiles_ptr, MASKED, HAS)
            n_listed = tl.cdiv(S, BLOCK) * BLOCK  # tokens that every head has in the list
            i_h = tl.cast(i_tile // n_listed, tl.int64)
            i_m = i_tile % n_listed
        else:
            i_h = tl.cast(i_first + i // n_tiles, tl.int64)
            i_tile = i_begin + i % n_tiles * BLOCK_M
            i_m = tile_at(i_tile, full, full_end, tiles_ptr, MASKED, HAS)
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_q = load_rows(head_rows(q, i_h, UNIT), i_m, S, UNIT, True, D, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        b_lse = tl.load(lse_ptr + i_h * stride_lh + o_m, mask=o_m < S, other=float("inf"))  # [BLOCK_M]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        if HAS.softcap:
            b_s, b_slope = tanh(b_s * cap_scale)
        b_s = b_s * qk_scale - (b_lse * 1.4426950408889634)[None, :]  # log2(e)
        if MASKED or HAS.alibi:
            doc_m, spot_m = tokens(m, 0, o_m, S, HAS)  # [BLOCK_M]
        if HAS.alibi:
            slope = tl.load(slopes_ptr + i_h) * 1.4426950408889634
            b_s -= slope * distance(spot_m[None, :], o_n[:, None])
        b_p = tl.math.exp2(b_s)  # [BLOCK_N, BLOCK_M]
        if MASKED:
            kept = keep(
                m, first_head + i_h, o_m[None, :], o_n[:, None], spot_m[None, :], doc_m[None, :], doc_n[:, None],
                HAS, PREDICATE,
            )  # fmt: skip
            b_p = tl.where(kept, b_p, 0.0)  # [BLOCK_N, BLOCK_M]
        b_w = b_p
        if HAS.softcap:
            b_w = b_p * b_slope  # here, where b_p is about to end, rather than to hold b_slope as well
        if HAS.dropout:
            stay = stays(i_b, first_head + i_h, o_m[None, :], o_n[:, None], seed_low, seed_high, threshold)
            b_p = tl.where(stay, b_p * keep_scale, 0.0)
        b_do = load_rows(head_rows(do, i_h, UNIT), i_m, S, UNIT, True, DV, BLOCK_M, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")  # [BLOCK_N, BLOCK_DV]
        delta_ptrs = delta_ptr + i_h * stride_dh + o_m.to(tl.int64) * stride_dn
        b_delta = tl.load(delta_ptrs, mask=o_m < S, other=0.0)  # [BLOCK_M]
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        if HAS.dropout:
            b_dp = tl.where(stay, b_dp * keep_scale, 0.0)
        b_ds = b_w * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
    return b_dk, b_dv


@triton.jit(
    do_not_specialize=["stride_qn", "stride_qb", "stride_qh", "stride_kn", "stride_kb", "stride_kh",
                       "stride_vn", "stride_vb", "stride_vh", "stride_don", "stride_dob", "stride_doh",
                       "stride_dn", "stride_db", "stride_dh", "stride_dkn", "stride_dkh", "stride_dvn", "stride_dvh",
                       "B", "hq", "hkv", "group", "offset", "n_spans", "section", *NUMBERS]
)  # fmt: skip
def attend_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, table_ptr,
    stride_qn, stride_qb, stride_qh, stride_kn, stride_kb, stride_kh, stride_vn, stride_vb, stride_vh,
    stride_don, stride_dob, stride_doh, stride_dn, stride_db, stride_dh, stride_dkn, stride_dkh, stride_dvn, stride_dvh,
    B, S, Sk, hq, hkv, group, offset, n_spans, section,
    start, n_rows, n_keys, first_head, left, right, documents, blocks, stride_rb, stride_rh, captured, slopes_ptr,
    seed_low, seed_high, threshold, keep_scale, scale, qk_scale, cap_scale, start_dk_ptr, start_dv_ptr,
    HAS: tl.constexpr, PREDICATE: tl.constexpr, HAS_START: tl.constexpr,
    DK_DTYPE: tl.constexpr, DV_DTYPE: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    start, n_rows, n_keys = rows_held(start, n_rows, n_keys, S, Sk, HAS)
    i_tile, i_bkv = place(tl.program_id(0), tl.cdiv(n_keys, BLOCK_N), B * hkv, section, False)
    i_n = i_tile * BLOCK_N
    i_b = (i_bkv // hkv).to(tl.int64)
    i_kv = i_bkv % hkv
    o_n = i_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]

    # What is of queries is found by query, not by row of q: in the loop a part costs nothing.
    q = batch_rows(q_ptr, stride_qn, stride_qb, stride_qh, i_b, UNIT, start)
    k = head_rows(batch_rows(k_ptr, stride_kn, stride_kb, stride_kh, i_b, UNIT), i_kv, UNIT)
    v = head_rows(batch_rows(v_ptr, stride_vn, stride_vb, stride_vh, i_b, UNIT), i_kv, UNIT)
    do = batch_rows(do_ptr, stride_don, stride_dob, stride_doh, i_b, UNIT, start)
    lse_ptr += i_b * n_rows - start
    delta_ptr += i_b * stride_db - start * tl.cast(stride_dn, tl.int64)
    b_k = load_rows(k, i_n, n_keys, UNIT, True, D, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    b_v = load_rows(v, i_n, n_keys, UNIT, True, DV, BLOCK_N, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    if HAS_START:  # here and not at the end, where loads beside full accumulators spill
        o_row = ((i_kv * B + i_b) * n_keys + o_n)[:, None]  # [BLOCK_N, 1]
        o_d, o_dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
        b_dk += tl.load(start_dk_ptr + o_row * D + o_d, mask=(o_n < n_keys)[:, None] & (o_d < D), other=0.0)
        b_dv += tl.load(start_dv_ptr + o_row * DV + o_dv, mask=(o_n < n_keys)[:, None] & (o_dv < DV), other=0.0)
        b_dk *= 1.0 / tl.where(scale == 0.0, 1.0, scale)  # the accumulator is multiplied by scale at the end
    m = (i_b, B, S, Sk, left, right, documents, captured)
    doc_n = tokens(m, 1, o_n, Sk, HAS)[0]  # [BLOCK_N]
    i_row = i_b * stride_rb + i_kv * stride_rh + i_n // BLOCK
    full, full_end, begin, end, tiles_ptr = tile_range_keys(i_n, i_row, m, blocks, HAS, BLOCK_M, BLOCK_N)
    if HAS.part:
        full, full_end, begin, end = within(full, full_end, begin, end, start, start + n_rows, HAS)
    i_first = tl.maximum(0, i_kv * group - offset)
    n_heads = tl.maximum(0, tl.minimum(hq, (i_kv + 1) * group - offset) - i_first)
    stride_lh = tl.cast(B, tl.int64) * n_rows
    if HAS.causal or HAS.gaps or HAS.predicate or HAS.blocks:
        b_dk, b_dv = _dkv_queries(
            b_dk, b_dv, b_k, b_v, q, do, lse_ptr, delta_ptr, stride_dn, stride_dh, stride_lh, i_first, n_heads,
            begin, end, full, full_end, tiles_ptr,
            m, first_head, o_n, doc_n, slopes_ptr, qk_scale, cap_scale, seed_low, seed_high, threshold, keep_scale,
            True, HAS, PREDICATE, UNIT, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    b_dk, b_dv = _dkv_queries(
        b_dk, b_dv, b_k, b_v, q, do, lse_ptr, delta_ptr, stride_dn, stride_dh, stride_lh, i_first, n_heads,
        full, full_end, full, full_end, tiles_ptr,
        m, first_head, o_n, doc_n, slopes_ptr, qk_scale, cap_scale, seed_low, seed_high, threshold, keep_scale,
        False, HAS, PREDICATE, UNIT, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    b_dk = (b_dk * scale).to(DK_DTYPE)
    b_dv = b_dv.to(DV_DTYPE)
    first, last = span_range(table_ptr, n_spans, i_n, tl.minimum(i_n + BLOCK_N, n_keys))
    for i_span in range(first, last):
        store_rows(table_ptr, i_span, i_b, i_kv, o_n, b_dk, stride_dkn, stride_dkh, 0, UNIT, D, BLOCK_D)
        store_rows(table_ptr, i_span, i_b, i_kv, o_n, b_dv, stride_dvn, stride_dvh, 1, UNIT, DV, BLOCK_DV)


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, dq: Sequence[Span], dkv: Sequence[Span],
    options: Options, heads: HeadGrads | None = None, start: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Gradients of `attend_forward`, written where they travel from; S and Sk are rows of q and k, as there.

    Of a part, all gradients are those that its queries have.

    Args:
        q: `[S, B, hq, D]`, as in the forward.
        k: `[Sk, B, hkv, D]`.
        v: `[Sk, B, hkv, Dv]`.
        do: `[S, B, hq, Dv]`, the gradient of the output.
        lse: `[hq, B, S]` contiguous fp32, from the forward.
        delta: `[S, B, hq]` fp32, any strides: sum(dO * O) over Dv, minus the gradient of the LSE.
        dq: spans of `(dq [n, B, hq, D],)` that cover the tokens 0..S-1.
        dkv: spans of `(dk [n, B, hkv, D], dv [n, B, hkv, Dv])` that cover the tokens 0..Sk-1; fp32 where they are
            partial sums.
        options: which attention it is.
        heads: where the gradients of sinks and slopes go, those of the local heads.
        start: dk `[hkv, B, Sk, D]` and dv `[hkv, B, Sk, Dv]`, contiguous fp32, of other query heads of these kv heads,
            from which the sums start.
    """
    (n_rows, B, hq, D), (n_keys, _, hkv, _), Dv = q.shape, k.shape, v.shape[-1]
    heads = heads or HeadGrads()
    assert lse.is_contiguous() and all(x.is_contiguous() for x in start or ())
    dq, dkv = occupied(dq, n_rows), occupied(dkv, n_keys)
    u = unit(q, k, v, do, *views_of(dq, 0), *views_of(dkv, 0), *views_of(dkv, 1))
    rows = {"q": (q, "BLOCK_M"), "k": (k, "BLOCK_N"), "v": (v, "BLOCK_N"), "do": (do, "BLOCK_M")}
    shapes: dict[str, Any] = dict(
        lse_ptr=lse,
        delta_ptr=delta,
        **named("d", in_units(delta, 1)),
        B=B,
        hq=hq,
        scale=float(options.scale),
        UNIT=u,
        D=D,
        DV=Dv,
        BLOCK_D=block(D),
        BLOCK_DV=block(Dv),
    )
    row_bytes = (D + Dv) * q.element_size()
    seq = max(options.lengths(n_rows, n_keys))
    dslope = None if heads.slopes is None else torch.empty(hq, B, n_rows, dtype=torch.float32, device=q.device)
    if dq:
        tiles = _config.tiles("attend_dq", q, (D, Dv), seq, options.flags)
        _config.launch(
            attend_dq_kernel,
            (triton.cdiv(n_rows, tiles["BLOCK_M"]) * B * hq,),
            table_ptr=span_table(dq, (u, 1), q.device),
            **named("dq", shared_strides(dq, 0, u)),
            dslope_ptr=dslope,
            HAS_DSLOPE=dslope is not None,
            **arguments(options, n_rows, n_keys),
            n_spans=len(dq),
            section=section(B * hq, n_keys * row_bytes // options.heads.group),
            DQ_DTYPE=_dtype(dq, 0),
            **shapes,
            **launched(tiles, u, **rows),
        )
    if dkv:
        tiles = _config.tiles("attend_dkv", q, (D, Dv), seq, options.flags)
        _config.launch(
            attend_dkv_kernel,
            (triton.cdiv(n_keys, tiles["BLOCK_N"]) * B * hkv,),
            table_ptr=span_table(dkv, (u, u), q.device),
            **named("dk", shared_strides(dkv, 0, u)),
            **named("dv", shared_strides(dkv, 1, u)),
            hkv=hkv,
            **arguments(options, n_rows, n_keys, keys=True),
            n_spans=len(dkv),
            section=section(B * hkv, n_rows * row_bytes * options.heads.group),
            start_dk_ptr=start[0] if start else None,
            start_dv_ptr=start[1] if start else None,
            HAS_START=start is not None,
            DK_DTYPE=_dtype(dkv, 0),
            DV_DTYPE=_dtype(dkv, 1),
            **shapes,
            **launched(tiles, u, **rows),
        )
    if heads.slopes is not None and dslope is not None:
        torch.sum(dslope, (1, 2), out=heads.slopes)
    if heads.sinks is not None:
        assert options.sinks is not None
        sink_gradient(lse, delta, options.sinks, heads.sinks)


def sink_gradient(lse: Tensor, delta: Tensor, sinks: Tensor, out: Tensor) -> None:
    """The gradient of the sinks `[hq]`, from what the backward has: no pass over rows, and the same on every device."""
    weights = (sinks[:, None, None] - lse).exp()  # [hq, B, S]; without a key and with a sink of -inf there is none
    weights = weights.masked_fill(lse == -torch.inf, 0.0)
    torch.sum(-weights * delta.permute(2, 1, 0), (1, 2), out=out)


def _dtype(spans: Sequence[Span], view: int) -> tl.dtype:
    (dtype,) = {v.dtype for v in views_of(spans, view)}
    return DTYPES[dtype]
