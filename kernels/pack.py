"""Pack: heads in sequence layout -> rows in head layout, wherever those lie.

`pack` takes q, k and v `[B, L, H, D]` to each rank's rows, with QK-norm and RoPE on the way; `pack_grad` takes dO, and
delta with it. A program copies BLOCK_T tokens of one head; which head, and where to, stands in a table of units.

Worked example: 2 ranks, 4 query heads, 1 kv head that both need. The units of `pack`, (kind, source head, where to):

    q0 -> rank 0    q1 -> rank 0    k0 -> rank 0    v0 -> rank 0
    q2 -> rank 1    q3 -> rank 1    k0 -> rank 1    v0 -> rank 1

The units of one token block are neighbours in launch order: they share its lines of cos and sin, and write rows side
by side. A unit also says which of my tokens its rows begin with, and how many they are: a rank that works on the tokens
40 .. 63 of a head gets token 40, rotated as such, in its row 0.

delta: attention's backward needs `sum_j P_ij dP_ij = sum(dO_i * O_i)` of each query i; a gradient that reaches the LSE
adds `dLSE_i P_ij` to dS_ij, which is the same as taking it from delta (Dao 2023, FlashAttention-2, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _config
from ._rope_norm import half_partner, rms_scale, rope_half, rope_interleaved
from ._rows import strides, unit
from ._table import (
    Place,
    Units,
    common_unit,
    elements,
    head_in_table,
    head_of,
    heads,
    holds,
    kept,
    place,
    table,
    tile_mask,
)
from ._views import ORows, QKVRows, Transform

QKVPlace = tuple[int, int, int, Place]  # kind, first head, first token, view
OPlace = tuple[int, int, Place, Place | None]  # first head, first token, O, its stat

_PACK_INTS = (
    "n_units stride_qb stride_qt stride_qh stride_kb stride_kt stride_kh stride_vb stride_vt stride_vh "
    "stride_rb stride_rt"
).split()
_PACK_GRAD_INTS = (
    "n_units stride_gb stride_gt stride_gh stride_ob stride_ot stride_oh stride_lb stride_lt stride_lh"
).split()


@triton.jit
def _pack_tile(
    src_ptr, stride_st, dst_ptr, stride_dt, i_t, i_first, n_rows, cos_ptr, sin_ptr, stride_rt, norm_ptr, eps,
    HAS_NORM: tl.constexpr, ROPE_DIM: tl.constexpr, IS_INTERLEAVED: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A head's tokens from `i_first` on to the rows at `dst_ptr`, normalised if HAS_NORM, rotated if ROPE_DIM > 0."""
    o_r = i_t * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    o_t = i_first + o_r
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_r < n_rows
    m = tile_mask(m_t, o_d, D, BLOCK_D)
    src_row = src_ptr + o_t[:, None] * stride_st  # [BLOCK_T, 1]
    x = tl.load(src_row + o_d[None, :], mask=m, other=0.0)  # [BLOCK_T, BLOCK_D]
    if HAS_NORM:
        x = x.to(tl.float32)
        r = rms_scale(x, eps, D)  # [BLOCK_T]
        w = tl.load(norm_ptr + o_d, mask=o_d < D, other=0.0).to(tl.float32)  # [BLOCK_D]
        x = x * r[:, None] * w[None, :]
    if ROPE_DIM > 0:
        x = x.to(tl.float32)
        cos_row = cos_ptr + o_t[:, None] * stride_rt  # [BLOCK_T, 1]
        sin_row = sin_ptr + o_t[:, None] * stride_rt  # [BLOCK_T, 1]
        if IS_INTERLEAVED:
            x = rope_interleaved(x, cos_row, sin_row, m_t, ROPE_DIM, WIDE, False, BLOCK_T, BLOCK_D)
        else:
            o_p = half_partner(o_d, ROPE_DIM)
            m_p = tile_mask(m_t, o_d, ROPE_DIM, BLOCK_D)
            y = tl.load(src_row + o_p[None, :], mask=m_p, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
            if HAS_NORM:
                w_p = tl.load(norm_ptr + o_p, mask=o_d < ROPE_DIM, other=0.0).to(tl.float32)  # [BLOCK_D]
                y = y * r[:, None] * w_p[None, :]
            x = rope_half(x, y, cos_row, sin_row, m_t, ROPE_DIM, WIDE, False, BLOCK_D)
    tl.store(dst_ptr + o_r[:, None] * stride_dt + o_d[None, :], x.to(dst_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_PACK_INTS)
def _pack_kernel(
    q_ptr, k_ptr, v_ptr, unit_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, eps, n_units,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_rb, stride_rt,
    HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, ROPE_DIM: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, ROPE_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Units are rows of (kind, source head, first token, number of tokens, pointer, token stride, batch stride).

    Kinds are 0 q, 1 k, 2 v.
    """
    i_unit = tl.program_id(0) % n_units
    i_t = tl.program_id(0) // n_units
    i_b = tl.program_id(1)
    unit_ptr += i_unit * 7
    kind = tl.load(unit_ptr)
    i_h = tl.load(unit_ptr + 1)
    i_first = tl.load(unit_ptr + 2)
    n_rows = tl.load(unit_ptr + 3)
    dst_ptr, stride_dt = head_in_table(unit_ptr + 4, i_b, q_ptr.dtype.element_ty, UNIT)
    if ROPE_DIM > 0:
        stride_rt = elements(stride_rt, ROPE_UNIT)
        cos_ptr += i_b * elements(stride_rb, ROPE_UNIT)
        sin_ptr += i_b * elements(stride_rb, ROPE_UNIT)
    if kind == 0:
        q_ptr = head_of(q_ptr, i_b, i_h, stride_qb, stride_qh, UNIT)
        _pack_tile(
            q_ptr, elements(stride_qt, UNIT), dst_ptr, stride_dt, i_t, i_first, n_rows,
            cos_ptr, sin_ptr, stride_rt, q_norm_ptr, eps,
            HAS_Q_NORM, ROPE_DIM, IS_INTERLEAVED, WIDE, D, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    elif kind == 1:
        k_ptr = head_of(k_ptr, i_b, i_h, stride_kb, stride_kh, UNIT)
        _pack_tile(
            k_ptr, elements(stride_kt, UNIT), dst_ptr, stride_dt, i_t, i_first, n_rows,
            cos_ptr, sin_ptr, stride_rt, k_norm_ptr, eps,
            HAS_K_NORM, ROPE_DIM, IS_INTERLEAVED, WIDE, D, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    else:
        v_ptr = head_of(v_ptr, i_b, i_h, stride_vb, stride_vh, UNIT)
        _pack_tile(
            v_ptr, elements(stride_vt, UNIT), dst_ptr, stride_dt, i_t, i_first, n_rows,
            cos_ptr, sin_ptr, stride_rt, k_norm_ptr, eps,
            False, 0, IS_INTERLEAVED, WIDE, DV, BLOCK_T, BLOCK_DV,
        )  # fmt: skip


@triton.jit(do_not_specialize=_PACK_GRAD_INTS)
def _pack_grad_kernel(
    do_ptr, o_ptr, dlse_ptr, unit_ptr, n_units,
    stride_gb, stride_gt, stride_gh, stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh,
    HAS_DELTA: tl.constexpr, HAS_DLSE: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Units are as `o_units` makes them, with delta for a stat."""
    i_unit = tl.program_id(0) % n_units
    i_t = tl.program_id(0) // n_units
    i_b = tl.program_id(1)
    unit_ptr += i_unit * 9
    i_h = tl.load(unit_ptr)
    dst_ptr, stride_dt = head_in_table(unit_ptr + 3, i_b, do_ptr.dtype.element_ty, UNIT)
    o_r = i_t * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    o_t = tl.load(unit_ptr + 1) + o_r
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_r < tl.load(unit_ptr + 2)
    m = tile_mask(m_t, o_d, DV, BLOCK_D)
    do_ptr = head_of(do_ptr, i_b, i_h, stride_gb, stride_gh, UNIT)
    do_row = do_ptr + o_t[:, None] * elements(stride_gt, UNIT)  # [BLOCK_T, 1]
    b_do = tl.load(do_row + o_d[None, :], mask=m, other=0.0)  # [BLOCK_T, BLOCK_D]
    tl.store(dst_ptr + o_r[:, None] * stride_dt + o_d[None, :], b_do, mask=m)
    if HAS_DELTA:
        o_ptr = head_of(o_ptr, i_b, i_h, stride_ob, stride_oh, UNIT)
        o_row = o_ptr + o_t[:, None] * elements(stride_ot, UNIT)  # [BLOCK_T, 1]
        b_o = tl.load(o_row + o_d[None, :], mask=m, other=0.0)  # [BLOCK_T, BLOCK_D]
        delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)  # [BLOCK_T]
        if HAS_DLSE:
            dlse_ptr = head_of(dlse_ptr, i_b, i_h, stride_lb, stride_lh, 1)
            delta -= tl.load(dlse_ptr + o_t * elements(stride_lt, 1), mask=m_t, other=0.0)
        delta_ptr, stride_et = head_in_table(unit_ptr + 6, i_b, tl.float32, 1)
        tl.store(delta_ptr + o_r * stride_et, delta, mask=m_t)


def pack(q: Tensor, k: Tensor, v: Tensor, to: Sequence[QKVRows], transform: Transform | None = None) -> None:
    """Write the heads of q, k and v into each rank's rows, q and k normalised and rotated as `transform` says.

    q [B, L, Hq, D], k [B, Lk, Hkv, D] and v [B, Lk, Hkv, Dv] have any strides with a dense last dimension. Every
    element of the views in `to` is written and nothing between them; a kv head may go to several ranks.
    """
    (B, L, _, D), (_, Lk, _, Dv) = q.shape, v.shape
    tf = transform or Transform()
    cos, sin, rope_unit, stride_r = rope_arguments(tf)
    units = _pack_units(qkv_places(to), (L, Lk, Lk), B, q.dtype, unit(q, k, v), q.device)
    tiles = _config.tiles("pack", q, (D, Dv), _config.SHARD)
    _config.launch(
        _pack_kernel,
        (units.number * triton.cdiv(units.tokens, tiles["BLOCK_T"]), B),
        q_ptr=q, k_ptr=k, v_ptr=v, unit_ptr=units.table, cos_ptr=cos, sin_ptr=sin,
        q_norm_ptr=tf.q_norm, k_norm_ptr=tf.k_norm, eps=tf.eps, n_units=units.number,
        **named_strides(units.unit, q=q, k=k, v=v),
        stride_rb=stride_r[0], stride_rt=stride_r[1],
        HAS_Q_NORM=tf.q_norm is not None, HAS_K_NORM=tf.k_norm is not None, **rope_flags(tf), D=D, DV=Dv,
        UNIT=units.unit, ROPE_UNIT=rope_unit,
        BLOCK_D=triton.next_power_of_2(D), BLOCK_DV=triton.next_power_of_2(Dv), **tiles,
    )  # fmt: skip


def pack_grad(do: Tensor, o: Tensor | None, dlse: Tensor | None, to: Sequence[ORows]) -> None:
    """Write the heads of dO into each rank's rows, and `delta = sum(dO * O) - dLSE` where the rows have a place for it.

    do and o are [B, L, Hq, Dv], dlse [B, L, Hq] fp32; o only where delta is asked for, dlse None for zero.
    """
    B, L, _, Dv = do.shape
    if do.stride(-1) != 1:
        do = do.contiguous()  # an expanded gradient, as `sum().backward()` makes it
    has_delta = any(rows.stat is not None for rows in to)
    o = o if has_delta else None
    assert not has_delta or (o is not None and all(rows.stat is not None for rows in to)), "delta for all ranks or none"
    units = o_units(o_places(to), do.dtype, (L, B), unit(do, *(() if o is None else (o,))), do.device)
    tiles = _config.tiles("pack_grad", do, (Dv, Dv), _config.SHARD)
    _config.launch(
        _pack_grad_kernel,
        (units.number * triton.cdiv(units.tokens, tiles["BLOCK_T"]), B),
        do_ptr=do, o_ptr=o, dlse_ptr=dlse, unit_ptr=units.table, n_units=units.number,
        **named_strides(units.unit, g=do, o=o), **named_strides(1, l=dlse),
        HAS_DELTA=has_delta, HAS_DLSE=dlse is not None,
        DV=Dv, UNIT=units.unit, BLOCK_D=triton.next_power_of_2(Dv), **tiles,
    )  # fmt: skip


@kept
def _pack_units(
    views: tuple[QKVPlace, ...], tokens: tuple[int, int, int], batch: int, dtype: torch.dtype, unit: int,
    device: torch.device,
) -> Units:  # fmt: skip
    """The units of `pack`, in a unit of strides that suits rows and sources."""
    unit = common_unit((where for *_, where in views), unit)
    rows = []
    for kind, first, token, where in views:
        assert holds(where, token, tokens[kind], batch) and where[3] == dtype, "rows of other tokens or dtype"
        n = where[1][0]
        rows += [(kind, first + i, token, n, *head) for i, head in enumerate(heads(where, unit))]
    return Units(len(rows), max((where[1][0] for *_, where in views), default=0), table(rows, device), unit)


def qkv_places(rows: Sequence[QKVRows]) -> tuple[QKVPlace, ...]:
    """(kind, first head, first token, place) of all views in `rows` that hold any; kinds are 0 q, 1 k, 2 v."""
    return tuple(
        (kind, first, token, place(view))
        for r in rows
        for kind, first, token, view in (
            (0, r.q_head, r.q_token, r.q), (1, r.kv_head, r.kv_token, r.k), (2, r.kv_head, r.kv_token, r.v),
        )
        if view.shape[0] and view.shape[2]
    )  # fmt: skip


def o_places(rows: Sequence[ORows]) -> tuple[OPlace, ...]:
    """(first head, first token, place of O, place of its stat) of all views in `rows` that hold any."""
    return tuple(
        (r.q_head, r.token, place(r.o), None if r.stat is None else place(r.stat))
        for r in rows
        if r.o.shape[0] and r.o.shape[2]
    )


@kept
def o_units(
    views: tuple[OPlace, ...], dtype: torch.dtype, shape: tuple[int, int], unit: int, device: torch.device
) -> Units:
    """The units of a pass over O of `shape` (L, B) and over its stat.

    They are rows of (head, first token, number of tokens, pointer, token stride, batch stride, the last three of the
    stat).
    """
    unit = common_unit((o for _, _, o, _ in views), unit)
    rows = []
    for first, token, o, stat in views:
        assert holds(o, token, *shape) and o[3] == dtype, "rows of other tokens or dtype"
        stats = [(0, 0, 0)] * o[1][2] if stat is None else heads(stat, 1)
        for i, (head, s) in enumerate(zip(heads(o, unit), stats, strict=True)):
            rows.append((first + i, token, o[1][0], *head, *s))
    return Units(len(rows), max((o[1][0] for _, _, o, _ in views), default=0), table(rows, device), unit)


def rope_arguments(tf: Transform) -> tuple[Tensor | None, Tensor | None, int, tuple[int, int]]:
    """cos, sin, the unit of their strides, and their (batch, token) strides in it."""
    cos, sin = tf.cos, tf.sin
    if cos is None or sin is None:
        return None, None, 1, (0, 0)
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()  # small beside q: the kernels take one set of strides for both
    batch, token = ((0 if n == 1 else s) for n, s in zip(cos.shape[:2], cos.stride()[:2], strict=True))
    u = 8 if batch % 8 == token % 8 == cos.data_ptr() % 16 == sin.data_ptr() % 16 == 0 else 1
    return cos, sin, u, (batch // u, token // u)


def rope_flags(tf: Transform) -> dict[str, int | bool]:
    """The constexpr flags that say how channels are rotated; ROPE_DIM is 0 where they are not."""
    if tf.cos is None:
        return {"ROPE_DIM": 0, "IS_INTERLEAVED": False, "WIDE": False}
    return {"ROPE_DIM": tf.rope_dim, "IS_INTERLEAVED": tf.interleaved, "WIDE": tf.cos.shape[-1] == tf.rope_dim}


def named_strides(unit: int, **tensors: Tensor | None) -> dict[str, int]:
    """Kernel arguments `stride_<name><b, t or h>` in `unit` elements of tensors in sequence layout; 0 for None."""
    return {
        f"stride_{name}{dim}": 0 if x is None else strides(x)[i] // unit
        for name, x in tensors.items()
        for i, dim in enumerate("bth")
    }
