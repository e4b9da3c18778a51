"""Local attention, backward: dq, and dk with dv, from q, k, v, dO, the LSE and delta = sum(dO * O) - dLSE.

With P = exp(scale q k^T - LSE), recomputed tile by tile (FlashAttention-2, Algorithm 2):

    dv = P^T dO        dS = P * (dO v^T - delta)        dq = scale dS k        dk = scale dS^T q

A softcap multiplies dS by its slope (`_softcap`).

Two kernels, so that every element has one owner and a fixed order of sums, without atomics: `attend_dq_kernel` holds a
query tile and walks over key tiles as the forward does; `attend_dkv_kernel` holds a key tile of one kv head and walks
over the query tiles of all query heads that attend it (first the partial ones of every head, then the full ones), with
scores transposed (`[BLOCK_N, BLOCK_M]`) so that both accumulators have the key tile's shape. Queries past S carry an
LSE of +inf, which makes their P zero.

Layout: rows `[tokens, B, row]` as in the forward; delta is a strided view (it rides at the end of the dO rows); results
go to spans of tokens (`_rows`), cast to the destination's type.

Worked example: hq = 4 query heads with offset 1 in groups of 3: kv head 0 is attended by the query heads 0 and 1, kv
head 1 by 2 and 3, so their programs walk over two heads each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import _config
from ._mask import keep, mask, partial_tile, place, tile_range, tile_range_keys
from ._rows import (
    DTYPES,
    block,
    in_units,
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
from ._softcap import scales, tanh
from ._views import Options, Span


@triton.jit
def _dq_keys(
    b_dq, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_k, stride_v, i_begin, i_end, full, full_end,
    o_m, Sk, qk_scale, cap_scale, left, right,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add the key tiles from `i_begin` to `i_end` to dq."""
    for i in range(i_begin, i_end, BLOCK_N):
        o_n = (partial_tile(i, full, full_end, IS_WINDOW) if MASKED else i) + tl.arange(0, BLOCK_N)
        b_k = load_rows(k_ptr, o_n, Sk, stride_k, UNIT, MASKED, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load_rows(v_ptr, o_n, Sk, stride_v, UNIT, MASKED, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if HAS_SOFTCAP:
            b_s, b_slope = tanh(b_s * cap_scale)
        b_p = tl.math.exp2(b_s * qk_scale - b_lse[:, None])
        if MASKED:
            kept = keep(o_m[:, None], o_n[None, :], Sk, left, right, IS_CAUSAL, IS_WINDOW)  # [BLOCK_M, BLOCK_N]
            b_p = tl.where(kept, b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        b_ds = b_p * (b_dp - b_delta[:, None])
        if HAS_SOFTCAP:
            b_ds *= b_slope
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
    return b_dq


@triton.jit(
    do_not_specialize=["stride_qn", "stride_qb", "stride_qh", "stride_kn", "stride_kb", "stride_kh",
                       "stride_vn", "stride_vb", "stride_vh", "stride_don", "stride_dob", "stride_doh",
                       "stride_dn", "stride_db", "stride_dh", "stride_dqn", "stride_dqh",
                       "B", "S", "Sk", "hq", "group", "offset", "n_spans", "section", "left", "right"]
)  # fmt: skip
def attend_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, table_ptr,
    stride_qn, stride_qb, stride_qh, stride_kn, stride_kb, stride_kh, stride_vn, stride_vb, stride_vh,
    stride_don, stride_dob, stride_doh, stride_dn, stride_db, stride_dh, stride_dqn, stride_dqh,
    B, S, Sk, hq, group, offset, n_spans, section, scale, qk_scale, cap_scale, left, right,
    IS_CAUSAL: tl.constexpr, IS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    DQ_DTYPE: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    i_tile, i_bh = place(tl.program_id(0), tl.cdiv(S, BLOCK_M), B * hq, section, IS_CAUSAL)
    i_m = i_tile * BLOCK_M
    i_b = (i_bh // hq).to(tl.int64)
    i_h = (i_bh % hq).to(tl.int64)
    i_kv = (i_h + offset) // group
    o_m = i_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]

    q_ptr += (i_b * stride_qb + i_h * stride_qh) * UNIT
    k_ptr += (i_b * stride_kb + i_kv * stride_kh) * UNIT
    v_ptr += (i_b * stride_vb + i_kv * stride_vh) * UNIT
    do_ptr += (i_b * stride_dob + i_h * stride_doh) * UNIT
    delta_ptr += i_b * stride_db + i_h * stride_dh
    b_q = load_rows(q_ptr, o_m, S, stride_qn, UNIT, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_do = load_rows(do_ptr, o_m, S, stride_don, UNIT, True, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    b_lse = tl.load(lse_ptr + (i_h * B + i_b) * S + o_m, mask=o_m < S, other=float("inf"))  # [BLOCK_M]
    b_lse = b_lse * 1.4426950408889634  # log2(e)
    b_delta = tl.load(delta_ptr + o_m.to(tl.int64) * stride_dn, mask=o_m < S, other=0.0)  # [BLOCK_M]

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full, full_end, begin, end = tile_range(i_m, S, Sk, left, right, IS_CAUSAL, IS_WINDOW, BLOCK_M, BLOCK_N)
    b_dq = _dq_keys(
        b_dq, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_kn, stride_vn, full, full_end, full, full_end,
        o_m, Sk, qk_scale, cap_scale, left, right,
        False, IS_CAUSAL, IS_WINDOW, HAS_SOFTCAP, UNIT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    b_dq = _dq_keys(
        b_dq, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_kn, stride_vn, begin, end, full, full_end,
        o_m, Sk, qk_scale, cap_scale, left, right,
        True, IS_CAUSAL, IS_WINDOW, HAS_SOFTCAP, UNIT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    b_dq = (b_dq * scale).to(DQ_DTYPE)
    first, last = span_range(table_ptr, n_spans, i_m, tl.minimum(i_m + BLOCK_M, S))
    for i_span in range(first, last):
        store_rows(table_ptr, i_span, i_b, i_h, o_m, b_dq, stride_dqn, stride_dqh, 0, UNIT, D, BLOCK_D)


@triton.jit
def _dkv_queries(
    b_dk, b_dv, b_k, b_v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qn, stride_qh, stride_don, stride_doh, stride_dn,
    stride_dh, stride_lh, i_head, n_heads, i_begin, i_end, full, full_end,
    o_n, S, Sk, qk_scale, cap_scale, left, right,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add the query tiles from `i_begin` to `i_end` of `n_heads` query heads, head by head, to dk and dv.

    One loop over all of them: in a loop inside a loop, the state of the pipeline and the accumulators spill registers.
    """
    n_tiles = tl.cdiv(tl.maximum(i_end - i_begin, 0), BLOCK_M)
    n_steps = n_heads * n_tiles
    n_tiles = tl.maximum(n_tiles, 1)  # the pipeline divides by it ahead of the loop, whether or not there is a step
    for i in range(0, n_steps):
        i_h = tl.cast(i_head + i // n_tiles, tl.int64)
        i_m = i_begin + i % n_tiles * BLOCK_M
        o_m = (partial_tile(i_m, full, full_end, IS_WINDOW) if MASKED else i_m) + tl.arange(0, BLOCK_M)
        b_q = load_rows(q_ptr + i_h * stride_qh * UNIT, o_m, S, stride_qn, UNIT, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        b_lse = tl.load(lse_ptr + i_h * stride_lh + o_m, mask=o_m < S, other=float("inf"))  # [BLOCK_M]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        if HAS_SOFTCAP:
            b_s, b_slope = tanh(b_s * cap_scale)
        b_p = tl.math.exp2(b_s * qk_scale - (b_lse * 1.4426950408889634)[None, :])  # log2(e)
        if MASKED:
            kept = keep(o_m[None, :], o_n[:, None], Sk, left, right, IS_CAUSAL, IS_WINDOW)  # [BLOCK_N, BLOCK_M]
            b_p = tl.where(kept, b_p, 0.0)
        b_w = b_p
        if HAS_SOFTCAP:
            b_w = b_p * b_slope  # here, where b_p is about to end, rather than to hold b_slope as well
        do_head_ptr = do_ptr + i_h * stride_doh * UNIT
        b_do = load_rows(do_head_ptr, o_m, S, stride_don, UNIT, True, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")  # [BLOCK_N, BLOCK_DV]
        delta_ptrs = delta_ptr + i_h * stride_dh + o_m.to(tl.int64) * stride_dn
        b_delta = tl.load(delta_ptrs, mask=o_m < S, other=0.0)  # [BLOCK_M]
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        b_ds = b_w * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
    return b_dk, b_dv


@triton.jit(
    do_not_specialize=["stride_qn", "stride_qb", "stride_qh", "stride_kn", "stride_kb", "stride_kh",
                       "stride_vn", "stride_vb", "stride_vh", "stride_don", "stride_dob", "stride_doh",
                       "stride_dn", "stride_db", "stride_dh", "stride_dkn", "stride_dkh", "stride_dvn", "stride_dvh",
                       "B", "S", "Sk", "hq", "hkv", "group", "offset", "n_spans", "section", "left", "right"]
)  # fmt: skip
def attend_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, table_ptr,
    stride_qn, stride_qb, stride_qh, stride_kn, stride_kb, stride_kh, stride_vn, stride_vb, stride_vh,
    stride_don, stride_dob, stride_doh, stride_dn, stride_db, stride_dh, stride_dkn, stride_dkh, stride_dvn, stride_dvh,
    B, S, Sk, hq, hkv, group, offset, n_spans, section, scale, qk_scale, cap_scale, left, right,
    IS_CAUSAL: tl.constexpr, IS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    DK_DTYPE: tl.constexpr, DV_DTYPE: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    i_tile, i_bkv = place(tl.program_id(0), tl.cdiv(Sk, BLOCK_N), B * hkv, section, False)
    i_n = i_tile * BLOCK_N
    i_b = (i_bkv // hkv).to(tl.int64)
    i_kv = i_bkv % hkv
    o_n = i_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]

    q_ptr += i_b * stride_qb * UNIT
    k_ptr += (i_b * stride_kb + i_kv.to(tl.int64) * stride_kh) * UNIT
    v_ptr += (i_b * stride_vb + i_kv.to(tl.int64) * stride_vh) * UNIT
    do_ptr += i_b * stride_dob * UNIT
    lse_ptr += i_b * S
    delta_ptr += i_b * stride_db
    b_k = load_rows(k_ptr, o_n, Sk, stride_kn, UNIT, True, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    b_v = load_rows(v_ptr, o_n, Sk, stride_vn, UNIT, True, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    full, full_end, begin, end = tile_range_keys(i_n, S, Sk, left, right, IS_CAUSAL, IS_WINDOW, BLOCK_M, BLOCK_N)
    i_head = tl.maximum(0, i_kv * group - offset)
    n_heads = tl.maximum(0, tl.minimum(hq, (i_kv + 1) * group - offset) - i_head)
    stride_lh = tl.cast(B, tl.int64) * S
    if IS_CAUSAL or IS_WINDOW:
        b_dk, b_dv = _dkv_queries(
            b_dk, b_dv, b_k, b_v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qn, stride_qh, stride_don, stride_doh,
            stride_dn, stride_dh, stride_lh, i_head, n_heads, begin, end, full, full_end,
            o_n, S, Sk, qk_scale, cap_scale, left, right,
            True, IS_CAUSAL, IS_WINDOW, HAS_SOFTCAP, UNIT, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    b_dk, b_dv = _dkv_queries(
        b_dk, b_dv, b_k, b_v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qn, stride_qh, stride_don, stride_doh,
        stride_dn, stride_dh, stride_lh, i_head, n_heads, full, full_end, full, full_end,
        o_n, S, Sk, qk_scale, cap_scale, left, right,
        False, IS_CAUSAL, IS_WINDOW, HAS_SOFTCAP, UNIT, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    b_dk = (b_dk * scale).to(DK_DTYPE)
    b_dv = b_dv.to(DV_DTYPE)
    first, last = span_range(table_ptr, n_spans, i_n, tl.minimum(i_n + BLOCK_N, Sk))
    for i_span in range(first, last):
        store_rows(table_ptr, i_span, i_b, i_kv, o_n, b_dk, stride_dkn, stride_dkh, 0, UNIT, D, BLOCK_D)
        store_rows(table_ptr, i_span, i_b, i_kv, o_n, b_dv, stride_dvn, stride_dvh, 1, UNIT, DV, BLOCK_DV)


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, dq: Sequence[Span], dkv: Sequence[Span],
    options: Options,
) -> None:  # fmt: skip
    """Gradients of `attend_forward`, written where they travel from.

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
    """
    (S, B, hq, D), (Sk, _, hkv, _), Dv = q.shape, k.shape, v.shape[-1]
    assert lse.is_contiguous()
    dq, dkv = occupied(dq, S), occupied(dkv, Sk)
    u = unit(q, k, v, do, *views_of(dq, 0), *views_of(dkv, 0), *views_of(dkv, 1))
    inputs: dict[str, Any] = dict(q_ptr=q, k_ptr=k, v_ptr=v, do_ptr=do, lse_ptr=lse, delta_ptr=delta)
    shapes: dict[str, Any] = dict(
        **named("q", in_units(q, u)),
        **named("k", in_units(k, u)),
        **named("v", in_units(v, u)),
        **named("do", in_units(do, u)),
        **named("d", in_units(delta, 1)),
        B=B,
        S=S,
        Sk=Sk,
        hq=hq,
        group=options.heads.group,
        offset=options.heads.offset,
        scale=float(options.scale),
        **scales(options),
        **mask(options, S, Sk),
        UNIT=u,
        D=D,
        DV=Dv,
        BLOCK_D=block(D),
        BLOCK_DV=block(Dv),
    )
    row_bytes = (D + Dv) * q.element_size()
    if dq:
        tiles = _config.tiles("attend_dq", q, (D, Dv), max(S, Sk), options.flags)
        _config.launch(
            attend_dq_kernel,
            (triton.cdiv(S, tiles["BLOCK_M"]) * B * hq,),
            **inputs,
            table_ptr=span_table(dq, (u, 1), q.device),
            **named("dq", shared_strides(dq, 0, u)),
            n_spans=len(dq),
            section=section(B * hq, Sk * row_bytes // options.heads.group),
            DQ_DTYPE=_dtype(dq, 0),
            **shapes,
            **tiles,
        )
    if dkv:
        tiles = _config.tiles("attend_dkv", q, (D, Dv), max(S, Sk), options.flags)
        _config.launch(
            attend_dkv_kernel,
            (triton.cdiv(Sk, tiles["BLOCK_N"]) * B * hkv,),
            **inputs,
            table_ptr=span_table(dkv, (u, u), q.device),
            **named("dk", shared_strides(dkv, 0, u)),
            **named("dv", shared_strides(dkv, 1, u)),
            hkv=hkv,
            n_spans=len(dkv),
            section=section(B * hkv, S * row_bytes * options.heads.group),
            DK_DTYPE=_dtype(dkv, 0),
            DV_DTYPE=_dtype(dkv, 1),
            **shapes,
            **tiles,
        )


def _dtype(spans: Sequence[Span], view: int) -> tl.dtype:
    (dtype,) = {v.dtype for v in views_of(spans, view)}
    return DTYPES[dtype]
