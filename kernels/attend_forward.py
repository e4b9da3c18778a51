"""Local attention, forward: O = softmax(scale Q K^T) V and its log-sum-exp, one query tile per program.

Online softmax in base 2 (FlashAttention-2, Algorithm 1): with s = scale log2(e) q k^T, which a softcap and ALiBi change
(`_scores`), a program holds one tile of queries and walks over the key tiles it attends (`_mask`), keeping for every
query the running maximum m, the sum l of 2^(s - m) and the accumulator of 2^(s - m) v, all in fp32; a new maximum
rescales the last two by 2^(m_old - m_new). At the end O = acc / l and LSE = (m + log2 l) / log2(e). A query that
attends nothing gets zeros and LSE = -inf.

A head's sink is a score with no value behind it: m begins as the sink and l as 1, and the rest follows; the LSE counts
it too. Dropped pairs (`_dropout`) count in l and not in the accumulator, which 1 / (1 - p) scales at the end.

Layout: q, k and v are read in place from rows `[tokens, B, row]` through token, batch and head strides; a query head's
kv head is `(head + offset) // group`. O and the LSE beside it go to the spans that the tile lies in (`_rows`).

Worked example: S = Sk = 200, causal, BLOCK_M = BLOCK_N = 64. The tile of queries 128..191 runs the helper over the keys
0..127 without a mask and over 128..191 with one; with spans 0..149 and 150..199 it stores 22 rows into the first and 42
into the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import _config
from ._dropout import stays
from ._mask import BLOCK, keep, place, rows_held, tile_at, tile_range, tokens
from ._options import NUMBERS, arguments
from ._rows import (
    DTYPES,
    batch_rows,
    block,
    head_rows,
    launched,
    load_rows,
    named,
    occupied,
    section,
    shared_strides,
    span_range,
    span_rows,
    span_table,
    store_rows,
    unit,
    views_of,
)
from ._scores import distance, tanh
from ._views import Options, Span


@triton.jit
def _attend_keys(
    acc, m_i, l_i, b_q, k, v, n_keys, i_begin, i_end, full, full_end, tiles_ptr,
    m, i_head, o_m, spot_m, doc_m, qk_scale, cap_scale, slope, seed_low, seed_high, threshold,
    MASKED: tl.constexpr, HAS: tl.constexpr, PREDICATE: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Take the key tiles from `i_begin` to `i_end` into the running softmax."""
    i_b, Sk = m[0], m[3]
    for i in range(i_begin, i_end, BLOCK_N):
        i_n = tile_at(i, full, full_end, tiles_ptr, MASKED, HAS)
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_k = load_rows(k, i_n, n_keys, UNIT, MASKED, D, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if HAS.softcap:
            b_s = tanh(b_s * cap_scale)[0]
        factor = qk_scale
        if HAS.alibi:
            b_s = b_s * qk_scale - slope * distance(spot_m[:, None], o_n[None, :])
            factor = 1.0
        if MASKED:
            doc_n = tokens(m, 1, o_n, Sk, HAS)[0]
            kept = keep(
                m, i_head, o_m[:, None], o_n[None, :], spot_m[:, None], doc_m[:, None], doc_n[None, :], HAS, PREDICATE
            )  # [BLOCK_M, BLOCK_N]
            b_s = tl.where(kept, b_s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(b_s, 1) * factor)  # [BLOCK_M]
        m_safe = m_new
        if MASKED:
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row without a key so far: 2^(-inf), not NaN
        b_p = tl.math.exp2(b_s * factor - m_safe[:, None])  # [BLOCK_M, BLOCK_N]
        alpha = tl.math.exp2(m_i - m_safe)  # [BLOCK_M]
        l_i = l_i * alpha + tl.sum(b_p, 1)
        if HAS.dropout:
            stay = stays(i_b, i_head, o_m[:, None], o_n[None, :], seed_low, seed_high, threshold)
            b_p = tl.where(stay, b_p, 0.0)
        acc = acc * alpha[:, None]
        b_v = load_rows(v, i_n, n_keys, UNIT, MASKED, DV, BLOCK_N, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_DV]
        m_i = m_new
    return acc, m_i, l_i


@triton.jit(
    do_not_specialize=["stride_qn", "stride_qb", "stride_qh", "stride_kn", "stride_kb", "stride_kh",
                       "stride_vn", "stride_vb", "stride_vh", "stride_on", "stride_oh", "stride_ln", "stride_lh",
                       "B", "hq", "group", "offset", "n_spans", "section", *NUMBERS]
)  # fmt: skip
def attend_forward_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lse_ptr,
    stride_qn, stride_qb, stride_qh, stride_kn, stride_kb, stride_kh, stride_vn, stride_vb, stride_vh,
    stride_on, stride_oh, stride_ln, stride_lh, B, S, Sk, hq, group, offset, n_spans, section,
    start, n_rows, n_keys, first_head, left, right, documents, blocks, stride_rb, stride_rh, captured, slopes_ptr,
    sinks_ptr,
    seed_low, seed_high, threshold, keep_scale, qk_scale, cap_scale,
    HAS: tl.constexpr, PREDICATE: tl.constexpr, IS_NEGATIVE: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_SPAN_LSE: tl.constexpr,
    OUT_DTYPE: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    start, n_rows, n_keys = rows_held(start, n_rows, n_keys, S, Sk, HAS)
    i_tile, i_bh = place(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), B * hq, section, HAS.causal)
    i_q = i_tile * BLOCK_M  # a row of q, and the query in it
    i_m = i_q + start
    i_b = (i_bh // hq).to(tl.int64)
    i_h = i_bh % hq
    i_kv = (i_h + offset) // group
    o_q = i_q + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_m = o_q + start  # [BLOCK_M]

    q = head_rows(batch_rows(q_ptr, stride_qn, stride_qb, stride_qh, i_b, UNIT), i_h, UNIT)
    k = head_rows(batch_rows(k_ptr, stride_kn, stride_kb, stride_kh, i_b, UNIT), i_kv, UNIT)
    v = head_rows(batch_rows(v_ptr, stride_vn, stride_vb, stride_vh, i_b, UNIT), i_kv, UNIT)
    b_q = load_rows(q, i_q, n_rows, UNIT, True, D, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    if IS_NEGATIVE:
        b_q = (-b_q.to(tl.float32)).to(b_q.dtype)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        m_i = l_i + tl.load(sinks_ptr + i_h) * 1.4426950408889634  # log2(e)
        l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
    slope = 0.0
    if HAS.alibi:
        slope = tl.load(slopes_ptr + i_h) * 1.4426950408889634
    m = (i_b, B, S, Sk, left, right, documents, captured)
    doc_m, spot_m = tokens(m, 0, o_m, S, HAS)  # [BLOCK_M]
    i_row = i_b * stride_rb + i_h * stride_rh + i_m // BLOCK
    full, full_end, begin, end, tiles_ptr = tile_range(i_m, i_row, m, blocks, HAS, BLOCK_M, BLOCK_N)
    acc, m_i, l_i = _attend_keys(
        acc, m_i, l_i, b_q, k, v, n_keys, full, full_end, full, full_end, tiles_ptr,
        m, first_head + i_h, o_m, spot_m, doc_m, qk_scale, cap_scale, slope, seed_low, seed_high, threshold,
        False, HAS, PREDICATE, UNIT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    acc, m_i, l_i = _attend_keys(
        acc, m_i, l_i, b_q, k, v, n_keys, begin, end, full, full_end, tiles_ptr,
        m, first_head + i_h, o_m, spot_m, doc_m, qk_scale, cap_scale, slope, seed_low, seed_high, threshold,
        True, HAS, PREDICATE, UNIT, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    norm = 1.0 / l_safe
    if HAS.dropout:
        norm *= keep_scale
    b_o = (acc * norm[:, None]).to(OUT_DTYPE)  # [BLOCK_M, BLOCK_DV]
    b_lse = (m_i + tl.math.log2(l_safe)) * 0.6931471805599453  # [BLOCK_M], ln 2; a row without keys has m_i = -inf
    if HAS_LSE:
        tl.store(lse_ptr + (i_h.to(tl.int64) * B + i_b) * n_rows + o_q, b_lse, mask=o_q < n_rows)
    first, last = span_range(table_ptr, n_spans, i_q, tl.minimum(i_q + BLOCK_M, n_rows))
    for i_span in range(first, last):
        store_rows(table_ptr, i_span, i_b, i_h, o_q, b_o, stride_on, stride_oh, 0, OUT_UNIT, DV, BLOCK_DV)
        if HAS_SPAN_LSE:
            row, inside = span_rows(table_ptr, i_span, o_q)
            stat_ptr = tl.load(table_ptr + i_span * 6 + 2).to(tl.pointer_type(tl.float32))
            stat_ptr += tl.load(table_ptr + i_span * 6 + 3) * i_b + i_h.to(tl.int64) * stride_lh
            tl.store(stat_ptr + row * stride_ln, b_lse, mask=inside)


def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Sequence[Span], lse: Tensor | None, options: Options
) -> None:  # fmt: skip
    """Attend over the whole sequence for some heads, writing the output where it travels from.

    S and Sk below are rows of q and k, which hold all tokens or, if the options say so, a part of them.

    Args:
        q: `[S, B, hq, D]`, any strides with a dense last dimension; fp32, bf16 or fp16. D and Dv: up to 256.
        k: `[Sk, B, hkv, D]`.
        v: `[Sk, B, hkv, Dv]`.
        out: spans of `(o [n, B, hq, Dv], lse [n, B, hq] fp32 or None)` that cover the tokens 0..S-1 in order; token and
            head strides are equal in all of them, batch strides may differ.
        lse: `[hq, B, S]` contiguous fp32, or None: natural log of the sum of exponentials, -inf for a row without keys.
        options: which attention it is.
    """
    (n_rows, B, hq, D), n_keys, Dv = q.shape, len(k), v.shape[-1]
    spans = occupied(out, n_rows)
    if not spans:
        return
    o, stat = views_of(spans, 0), spans[0].views[1]
    assert lse is None or lse.is_contiguous()
    u, out_unit = unit(q, k, v), unit(*o)  # o may lie in a user's tensor, whose heads are not padded
    given = arguments(options._replace(scale=abs(options.scale)), n_rows, n_keys)  # of -q where it is negative
    given["qk_scale"] = max(given["qk_scale"], 1e-30)  # not 0: masked scores are -inf
    tiles = _config.tiles("attend_forward", q, (D, Dv), max(options.lengths(n_rows, n_keys)), options.flags)
    n_tiles = triton.cdiv(n_rows, tiles["BLOCK_M"])
    _config.launch(
        attend_forward_kernel,
        (n_tiles * B * hq,),
        table_ptr=span_table(spans, (out_unit, 1), q.device),
        lse_ptr=lse,
        **named("o", shared_strides(spans, 0, out_unit)),
        **named("l", (0, 0) if stat is None else shared_strides(spans, 1, 1)),
        B=B,
        hq=hq,
        n_spans=len(spans),
        section=section(B * hq, n_keys * (D + Dv) * q.element_size() // options.heads.group),
        **given,
        sinks_ptr=options.sinks,
        IS_NEGATIVE=options.scale < 0,
        HAS_SINKS=options.sinks is not None,
        HAS_LSE=lse is not None,
        HAS_SPAN_LSE=stat is not None,
        OUT_DTYPE=DTYPES[o[0].dtype],
        UNIT=u,
        OUT_UNIT=out_unit,
        D=D,
        DV=Dv,
        BLOCK_D=block(D),
        BLOCK_DV=block(Dv),
        **launched(tiles, u, q=(q, "BLOCK_M"), k=(k, "BLOCK_N"), v=(v, "BLOCK_N")),
    )
