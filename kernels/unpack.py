"""Unpack: rows in head layout -> heads in sequence layout, the inverse of `pack`.

`unpack` takes O and the LSE back. `unpack_grad` takes dq, dk and dv back: a program reads BLOCK_T tokens of one head
from every rank that worked on them, sums them in fp32 in ascending rank order, applies the VJPs of RoPE and QK-norm,
and writes the head once. Tokens that no rank worked on become zero.

Worked example: 2 ranks, 4 query heads, 1 kv head that both worked on. The units of `unpack_grad` are (kind, head, first
source, number of sources), the sources (pointer, token stride, batch stride, is it fp32, first token, tokens):

    units    q0: 0, 1    q1: 1, 1    q2: 2, 1    q3: 3, 1    k0: 4, 2    v0: 6, 2
    sources  q0, q1 of rank 0, q2, q3 of rank 1, k0 of rank 0, k0 of rank 1, v0 of rank 0, v0 of rank 1

The gradient of a norm's weight sums over tokens and heads. Each program writes its part to a row of its own in a
scratch tensor, and `torch.sum` adds the rows up: no atomics, so it is the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _config
from ._rope_norm import half_partner, norm_vjp, rms_scale, rope_half, rope_interleaved
from ._rows import unit
from ._table import common_unit, elements, head_in_table, head_of, heads, holds, kept, table, tile_mask
from ._views import HeadNumbers, ORows, QKVRows, Transform
from .pack import QKVPlace, named_strides, o_places, o_units, qkv_places, rope_arguments, rope_flags

_UNPACK_INTS = "n_units stride_ob stride_ot stride_oh stride_lb stride_lt stride_lh".split()
_UNPACK_GRAD_INTS = (
    "n_units n_blocks n_q n_k stride_dqb stride_dqt stride_dqh stride_dkb stride_dkt stride_dkh stride_dvb stride_dvt "
    "stride_dvh stride_qb stride_qt stride_qh stride_kb stride_kt stride_kh stride_rb stride_rt"
).split()


@triton.jit(do_not_specialize=_UNPACK_INTS)
def _unpack_kernel(
    out_ptr, lse_ptr, unit_ptr, n_units, stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh,
    HAS_LSE: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Units are as `o_units` makes them, with the LSE for a stat."""
    i_unit = tl.program_id(0) % n_units
    i_t = tl.program_id(0) // n_units
    i_b = tl.program_id(1)
    unit_ptr += i_unit * 9
    i_h = tl.load(unit_ptr)
    src_ptr, stride_st = head_in_table(unit_ptr + 3, i_b, out_ptr.dtype.element_ty, UNIT)
    o_r = i_t * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    o_t = tl.load(unit_ptr + 1) + o_r
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_r < tl.load(unit_ptr + 2)
    m = tile_mask(m_t, o_d, DV, BLOCK_D)
    b_o = tl.load(src_ptr + o_r[:, None] * stride_st + o_d[None, :], mask=m, other=0.0)  # [BLOCK_T, BLOCK_D]
    out_ptr = head_of(out_ptr, i_b, i_h, stride_ob, stride_oh, UNIT)
    tl.store(out_ptr + o_t[:, None] * elements(stride_ot, UNIT) + o_d[None, :], b_o, mask=m)
    if HAS_LSE:
        stat_ptr, stride_et = head_in_table(unit_ptr + 6, i_b, tl.float32, 1)
        b_lse = tl.load(stat_ptr + o_r * stride_et, mask=m_t, other=0.0)  # [BLOCK_T]
        lse_ptr = head_of(lse_ptr, i_b, i_h, stride_lb, stride_lh, 1)
        tl.store(lse_ptr + o_t * elements(stride_lt, 1), b_lse, mask=m_t)


@triton.jit
def _load_source(source_ptr, i_b, o_r, o_d, m, DTYPE: tl.constexpr, UNIT: tl.constexpr):
    """The rows `o_r`, columns `o_d` of one source of a head, in fp32."""
    src_ptr, stride_t = head_in_table(source_ptr, i_b, DTYPE, UNIT)
    return tl.load(src_ptr + o_r[:, None] * stride_t + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _sum_sources(
    source_ptr, n_sources, i_b, o_t, o_d, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, HAS_PARTIAL: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The columns `o_d` of a head, as far as COLUMNS, summed in fp32 over the sources of each token in their order."""
    b_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for _ in range(n_sources):
        o_r = o_t - tl.load(source_ptr + 4)
        m = tile_mask((o_r >= 0) & (o_r < tl.load(source_ptr + 5)), tl.arange(0, BLOCK_D), COLUMNS, BLOCK_D)
        if HAS_PARTIAL:
            if tl.load(source_ptr + 3) != 0:
                b_sum += _load_source(source_ptr, i_b, o_r, o_d, m, tl.float32, UNIT)
            else:
                b_sum += _load_source(source_ptr, i_b, o_r, o_d, m, DTYPE, UNIT)
        else:
            b_sum += _load_source(source_ptr, i_b, o_r, o_d, m, DTYPE, UNIT)
        source_ptr += 6
    return b_sum


@triton.jit
def _unpack_grad_tile(
    source_ptr, n_sources, dst_ptr, stride_dt, raw_ptr, stride_xt, norm_ptr, partial_ptr, eps, i_b, i_t, n_tokens,
    cos_ptr, sin_ptr, stride_rt,
    HAS_NORM: tl.constexpr, ROPE_DIM: tl.constexpr, IS_INTERLEAVED: tl.constexpr, WIDE: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head's gradient to `dst_ptr`; with a norm also the weight's partial sum [D] to `partial_ptr`."""
    DTYPE: tl.constexpr = dst_ptr.dtype.element_ty
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_t < n_tokens
    m = tile_mask(m_t, o_d, D, BLOCK_D)
    g = _sum_sources(source_ptr, n_sources, i_b, o_t, o_d, D, DTYPE, HAS_PARTIAL, UNIT, BLOCK_T, BLOCK_D)
    if ROPE_DIM > 0:
        cos_row = cos_ptr + o_t[:, None] * stride_rt  # [BLOCK_T, 1]
        sin_row = sin_ptr + o_t[:, None] * stride_rt  # [BLOCK_T, 1]
        if IS_INTERLEAVED:
            g = rope_interleaved(g, cos_row, sin_row, m_t, ROPE_DIM, WIDE, True, BLOCK_T, BLOCK_D)
        else:
            o_p = half_partner(o_d, ROPE_DIM)
            p = _sum_sources(source_ptr, n_sources, i_b, o_t, o_p, ROPE_DIM, DTYPE, HAS_PARTIAL, UNIT, BLOCK_T, BLOCK_D)
            g = rope_half(g, p, cos_row, sin_row, m_t, ROPE_DIM, WIDE, True, BLOCK_D)
    if HAS_NORM:
        x = tl.load(raw_ptr + o_t[:, None] * stride_xt + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        w = tl.load(norm_ptr + o_d, mask=o_d < D, other=0.0).to(tl.float32)  # [BLOCK_D]
        g, dw = norm_vjp(g, x, rms_scale(x, eps, D), w, D)  # [BLOCK_T, BLOCK_D], [BLOCK_D]
        tl.store(partial_ptr + o_d, dw, mask=o_d < D)
    tl.store(dst_ptr + o_t[:, None] * stride_dt + o_d[None, :], g.to(DTYPE), mask=m)


@triton.jit(do_not_specialize=_UNPACK_GRAD_INTS)
def _unpack_grad_kernel(
    dq_ptr, dk_ptr, dv_ptr, unit_ptr, source_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,
    dq_norm_ptr, dk_norm_ptr, eps, n_units, n_blocks, n_q, n_k,
    stride_dqb, stride_dqt, stride_dqh, stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_rb, stride_rt,
    HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, ROPE_DIM: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr, HAS_PARTIAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr,
    ROPE_UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Units are rows of (kind, head, first source, number of sources); kinds are 0 q, 1 k, 2 v.

    Sources are rows of (pointer, token stride, batch stride, is it fp32, first token, number of tokens).
    dq_norm_ptr [Hq, B, n_blocks, D] and dk_norm_ptr [Hkv, B, n_blocks, D] take the partial sums.
    """
    i_unit = tl.program_id(0) % n_units
    i_t = tl.program_id(0) // n_units
    i_b = tl.program_id(1)
    unit_ptr += i_unit * 4
    kind = tl.load(unit_ptr)
    i_h = tl.load(unit_ptr + 1)
    source_ptr += tl.load(unit_ptr + 2) * 6
    n_sources = tl.load(unit_ptr + 3)
    i_partial = (i_h * tl.num_programs(1) + i_b) * n_blocks + i_t
    if ROPE_DIM > 0:
        stride_rt = elements(stride_rt, ROPE_UNIT)
        cos_ptr += i_b * elements(stride_rb, ROPE_UNIT)
        sin_ptr += i_b * elements(stride_rb, ROPE_UNIT)
    if kind == 0:
        dq_ptr = head_of(dq_ptr, i_b, i_h, stride_dqb, stride_dqh, UNIT)
        if HAS_Q_NORM:
            q_ptr = head_of(q_ptr, i_b, i_h, stride_qb, stride_qh, UNIT)
            dq_norm_ptr += i_partial * D
        _unpack_grad_tile(
            source_ptr, n_sources, dq_ptr, elements(stride_dqt, UNIT), q_ptr, elements(stride_qt, UNIT), q_norm_ptr,
            dq_norm_ptr, eps, i_b, i_t, n_q, cos_ptr, sin_ptr, stride_rt,
            HAS_Q_NORM, ROPE_DIM, IS_INTERLEAVED, WIDE, False, UNIT, D, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    elif kind == 1:
        dk_ptr = head_of(dk_ptr, i_b, i_h, stride_dkb, stride_dkh, UNIT)
        if HAS_K_NORM:
            k_ptr = head_of(k_ptr, i_b, i_h, stride_kb, stride_kh, UNIT)
            dk_norm_ptr += i_partial * D
        _unpack_grad_tile(
            source_ptr, n_sources, dk_ptr, elements(stride_dkt, UNIT), k_ptr, elements(stride_kt, UNIT), k_norm_ptr,
            dk_norm_ptr, eps, i_b, i_t, n_k, cos_ptr, sin_ptr, stride_rt,
            HAS_K_NORM, ROPE_DIM, IS_INTERLEAVED, WIDE, HAS_PARTIAL, UNIT, D, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    else:
        dv_ptr = head_of(dv_ptr, i_b, i_h, stride_dvb, stride_dvh, UNIT)
        _unpack_grad_tile(
            source_ptr, n_sources, dv_ptr, elements(stride_dvt, UNIT), dv_ptr, stride_dvt, k_norm_ptr,
            dk_norm_ptr, eps, i_b, i_t, n_k, cos_ptr, sin_ptr, stride_rt,
            False, 0, IS_INTERLEAVED, WIDE, HAS_PARTIAL, UNIT, DV, BLOCK_T, BLOCK_DV,
        )  # fmt: skip


def unpack(rows: Sequence[ORows], out: Tensor, lse: Tensor | None) -> None:
    """Write the heads of O in each rank's rows to `out` [B, L, Hq, Dv], and their LSE to `lse` [B, L, Hq] if given.

    `lse` is fp32. Both have any strides, `out` a dense last dimension; what is in no rows is left alone.
    """
    B, L, _, Dv = out.shape
    assert lse is None or all(r.stat is not None for r in rows), "an LSE is asked for that the rows do not carry"
    units = o_units(o_places(rows), out.dtype, (L, B), unit(out), out.device)
    tiles = _config.tiles("unpack", out, (Dv, Dv), _config.SHARD)
    _config.launch(
        _unpack_kernel,
        (units.number * triton.cdiv(units.tokens, tiles["BLOCK_T"]), B),
        out_ptr=out, lse_ptr=lse, unit_ptr=units.table, n_units=units.number,
        **named_strides(units.unit, o=out), **named_strides(1, l=lse),
        HAS_LSE=lse is not None, DV=Dv, UNIT=units.unit, BLOCK_D=triton.next_power_of_2(Dv), **tiles,
    )  # fmt: skip


def unpack_grad(
    rows: Sequence[QKVRows], q: Tensor | None, k: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
    transform: Transform | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """As `unpack_grad_heads`, of all heads; returns the gradients of the norms' weights, each [D] fp32 or None."""
    dq_norm, dk_norm = unpack_grad_heads(rows, q, k, dq, dk, dv, transform)
    return None if dq_norm is None else dq_norm.sum(0), None if dk_norm is None else dk_norm.sum(0)


def unpack_grad_heads(
    rows: Sequence[QKVRows], q: Tensor | None, k: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
    transform: Transform | None = None, heads: HeadNumbers | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Write the gradients of what `pack` was given, from those of what it wrote; return shares of the norm weights'.

    `rows` hold each rank's gradients, k and v perhaps in fp32 where they are partial sums. q and k are the inputs of
    `pack`, read only where there is a norm. dq [B, L, Hq, D], dk [B, Lk, Hkv, D] and dv [B, Lk, Hkv, Dv] have any
    strides with a dense last dimension; all of them is written, or with `heads` these, from rows that may hold others,
    too. Returns each head's share of (dq_norm, dk_norm), [Hq, D] and [Hkv, D] fp32 or None; zero for other heads.
    """
    (B, L, Hq, D), (_, Lk, Hkv, Dv) = dq.shape, dv.shape
    tf = transform or Transform()
    raw_q, raw_k = q if tf.q_norm is not None else None, k if tf.k_norm is not None else None
    u = unit(dq, dk, dv, *(x for x in (raw_q, raw_k) if x is not None))
    wanted = heads or (tuple(range(Hq)), tuple(range(Hkv)))
    units, sources, u = _grad_units(qkv_places(rows), wanted, (L, Lk, Lk), B, dq.dtype, u, dq.device)
    n_units = len(wanted[0]) + 2 * len(wanted[1])
    cos, sin, rope_unit, stride_r = rope_arguments(tf)
    tiles = _config.tiles("unpack_grad", dq, (D, Dv), _config.SHARD)
    n_blocks = triton.cdiv(max(L, Lk), tiles["BLOCK_T"])
    new = dq.new_empty if heads is None else dq.new_zeros
    dq_norm = None if tf.q_norm is None else new(Hq, B, n_blocks, D, dtype=torch.float32)
    dk_norm = None if tf.k_norm is None else new(Hkv, B, n_blocks, D, dtype=torch.float32)
    _config.launch(
        _unpack_grad_kernel,
        (n_units * n_blocks, B),
        dq_ptr=dq, dk_ptr=dk, dv_ptr=dv, unit_ptr=units, source_ptr=sources,
        q_ptr=raw_q, k_ptr=raw_k, cos_ptr=cos, sin_ptr=sin, q_norm_ptr=tf.q_norm, k_norm_ptr=tf.k_norm,
        dq_norm_ptr=dq_norm, dk_norm_ptr=dk_norm, eps=tf.eps, n_units=n_units, n_blocks=n_blocks, n_q=L, n_k=Lk,
        **named_strides(u, dq=dq, dk=dk, dv=dv, q=raw_q, k=raw_k),
        stride_rb=stride_r[0], stride_rt=stride_r[1],
        HAS_Q_NORM=tf.q_norm is not None, HAS_K_NORM=tf.k_norm is not None, **rope_flags(tf),
        HAS_PARTIAL=any(r.k.dtype != dq.dtype or r.v.dtype != dq.dtype for r in rows),
        D=D, DV=Dv, UNIT=u, ROPE_UNIT=rope_unit,
        BLOCK_D=triton.next_power_of_2(D), BLOCK_DV=triton.next_power_of_2(Dv), **tiles,
    )  # fmt: skip
    return (
        None if dq_norm is None else dq_norm.sum(dim=(1, 2)),
        None if dk_norm is None else dk_norm.sum(dim=(1, 2)),
    )


@kept
def _grad_units(
    views: tuple[QKVPlace, ...], wanted: HeadNumbers, tokens: tuple[int, int, int], batch: int,
    dtype: torch.dtype, unit: int, device: torch.device,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """The units of `unpack_grad_heads`, their sources (a head's in the order of `views`), and the unit of strides."""
    unit = common_unit((where for *_, where in views), unit)
    found: list[dict[int, list[tuple[int, ...]]]]  # kind, head, source
    found = [{head: [] for head in of_kind} for of_kind in (wanted[0], wanted[1], wanted[1])]
    for kind, first, token, where in views:
        assert holds(where, token, tokens[kind], batch), "rows of other tokens"
        assert where[3] == dtype or (kind > 0 and where[3] == torch.float32), f"gradients in {where[3]} for {dtype}"
        for number, head in enumerate(heads(where, unit), first):
            if number in found[kind]:
                found[kind][number].append((*head, int(where[3] != dtype), token, where[1][0]))
    units: list[tuple[int, ...]] = []
    sources: list[tuple[int, ...]] = []
    for kind, of_kind in enumerate(found):
        for number, of_head in of_kind.items():
            units.append((kind, number, len(sources), len(of_head)))
            sources += of_head
    return table(units, device), table(sources, device), unit
