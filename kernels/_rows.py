"""Tiles from rows and back: loads, and stores that go to whichever span of tokens a tile lies in.

Every view is `[tokens, B, heads, dim]` with a dense last dimension. Strides arrive divided by UNIT, which is 8 when all
of them are multiples of 8 elements and all pointers of 16 bytes, so that the compiler sees the factor 8 (16-byte
vectors) whatever the values are; otherwise UNIT is 1 and accesses are narrow but right. Channels past D are masked, and
the mask bounds the vectors of the whole tile: in bf16 they are of 8 bytes where D is a multiple of 4 only, of 4 bytes
for other even D, and of 2 for odd ones.

Where a launch configuration says `descriptors` (tables of sm_90 and sm_100), q, k, v and dO are loaded by TMA instead:
the launcher describes each view as `[B, heads, tokens, dim]`, and hardware copies a tile to shared memory, with zeros
past the last row and past D, without an address or a mask in a register. That takes UNIT = 8; rows that begin elsewhere
come by pointers, in the same tiles. Stores are by pointers, and so is all on GPUs before Hopper and on AMD's, which
have no TMA. Warps are not specialised, neither here nor there.

Results go to `spans`, which cover the tokens in order: one span is one buffer, P spans are the buffers of P peers. The
kernels get them as an int64 table with the columns

    pointer 0, batch stride 0, pointer 1, batch stride 1, start, stop

of two views that are indexed alike (O and LSE; dk and dv; dq alone). Token and head strides are equal in all spans.

Worked example: 2 spans, tokens 0..99 and 100..199, BLOCK_M = 64. The tile at 64 lies in both: it stores its rows 0..35
with mask through the first pointer and its rows 36..63 through the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._cache import Tiles
from ._table import kept, table
from ._views import Span

L2_BYTES = 24 << 20  # what the rows of one section of heads may take: about half of the L2 of recent GPUs
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def batch_rows(rows, stride_n, stride_b, stride_h, i_b, UNIT: tl.constexpr, start=0):
    """The rows of a view in one batch entry, as `head_rows` takes them; `rows` is a pointer or a descriptor.

    The first of them is row number `start`.
    """
    if isinstance(rows, tl.tensor_descriptor):
        return rows, i_b.to(tl.int32), start
    else:
        return rows + (i_b * stride_b - start * tl.cast(stride_n, tl.int64)) * UNIT, stride_n, stride_h


@triton.jit
def head_rows(rows, i_h, UNIT: tl.constexpr):
    """The rows of a head, as `load_rows` takes them."""
    if isinstance(rows[0], tl.tensor_descriptor):
        return rows[0], rows[1], i_h.to(tl.int32), rows[2]
    else:
        return rows[0] + i_h.to(tl.int64) * rows[2] * UNIT, rows[1]


@triton.jit
def load_rows(
    rows, i_row, n_rows,
    UNIT: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows `i_row .. i_row + ROWS - 1` of a head as `[ROWS, BLOCK]`; zero past `n_rows` and past D.

    A descriptor knows where the rows end; by pointers `n_rows` is asked only if MASKED.
    """
    if isinstance(rows[0], tl.tensor_descriptor):
        return rows[0].load([rows[1], rows[2], i_row - rows[3], 0]).reshape([ROWS, BLOCK])
    else:
        return _load_rows(rows[0], i_row + tl.arange(0, ROWS), n_rows, rows[1], UNIT, MASKED, D, BLOCK)


@triton.jit
def _load_rows(
    ptr, o_row, n_rows, stride, UNIT: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    o_d = tl.arange(0, BLOCK)
    ptrs = ptr + o_row.to(tl.int64)[:, None] * stride * UNIT + o_d[None, :]  # [rows, BLOCK]
    if MASKED and D != BLOCK:
        return tl.load(ptrs, mask=(o_row < n_rows)[:, None] & (o_d < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=(o_row < n_rows)[:, None], other=0.0)
    elif D != BLOCK:
        return tl.load(ptrs, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def span_range(table_ptr, n_spans, i_begin, i_end):
    """First and one past the last span that holds any of the tokens `i_begin .. i_end - 1`."""
    first = 0
    last = 0
    for i in range(0, n_spans, 32):
        o_span = i + tl.arange(0, 32)
        start = tl.load(table_ptr + o_span * 6 + 4, mask=o_span < n_spans, other=2**62)  # [32]
        stop = tl.load(table_ptr + o_span * 6 + 5, mask=o_span < n_spans, other=2**62)  # [32]
        first += tl.sum((stop <= i_begin).to(tl.int32))
        last += tl.sum((start < i_end).to(tl.int32))
    return first, last


@triton.jit
def span_rows(table_ptr, i_span, o_row):
    """The places of `o_row` in a span, and which of them lie in it."""
    start = tl.load(table_ptr + i_span * 6 + 4)
    stop = tl.load(table_ptr + i_span * 6 + 5)
    return o_row - start, (o_row >= start) & (o_row < stop)


@triton.jit
def store_rows(
    table_ptr, i_span, i_b, i_h, o_row, tile, stride_n, stride_h,
    VIEW: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the rows of `tile [rows, BLOCK]` that lie in the span into its view number VIEW."""
    ptr = tl.load(table_ptr + i_span * 6 + 2 * VIEW).to(tl.pointer_type(tile.dtype))
    if UNIT == 8:
        ptr = tl.multiple_of(ptr, 16)  # known of kernel arguments, not of what a table holds
    ptr += tl.load(table_ptr + i_span * 6 + 2 * VIEW + 1) * i_b * UNIT
    row, inside = span_rows(table_ptr, i_span, o_row)
    o_d = tl.arange(0, BLOCK)
    ptrs = ptr + i_h.to(tl.int64) * stride_h * UNIT + row[:, None] * stride_n * UNIT + o_d[None, :]  # [rows, BLOCK]
    if D != BLOCK:
        tl.store(ptrs, tile, mask=inside[:, None] & (o_d < D)[None, :])
    else:
        tl.store(ptrs, tile, mask=inside[:, None])


def block(dim: int) -> int:
    """The tile's width for heads of `dim` channels: a power of two, and at least the 16 that `tl.dot` asks for."""
    assert 0 < dim <= 256, dim
    return max(16, triton.next_power_of_2(dim))


def strides(view: Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the dense last one; 0 for a dimension of one element, whose stride says nothing."""
    return tuple(s if n > 1 else 0 for s, n in zip(view.stride()[:3], view.shape[:3], strict=True))


def occupied(spans: Sequence[Span], tokens: int) -> tuple[Span, ...]:
    """The spans that hold any token, which must be exactly the tokens `0 .. tokens - 1`, in order."""
    kept = []
    end = 0
    for span in spans:
        n = _tokens(span)
        assert n == 0 or span.start == end, f"spans must be in order and without gaps: {span.start} after {end}"
        end += n
        if n:
            kept.append(span)
    assert end == tokens, f"spans cover {end} of {tokens} tokens"
    return tuple(kept)


def unit(*views: Tensor) -> int:
    """The unit in which strides are passed: 8 elements where every row of every view begins on 16 bytes, or else 1."""
    aligned = all(v.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides(v)) for v in views)
    assert all(v.stride(-1) == 1 or v.shape[-1] == 1 for v in views), "the last dimension must be dense"
    return 8 if aligned else 1


def in_units(view: Tensor, unit: int) -> tuple[int, ...]:
    """(token, batch, head) strides of `view` in units of `unit` elements."""
    return tuple(s // unit for s in strides(view))


def named(name: str, values: Sequence[int]) -> dict[str, int]:
    """Strides as kernel arguments: `stride_<name>n`, `b`, `h` for token, batch and head, or `n` and `h`.

    Not as a tuple: Triton specialises the integers of a tuple by value, also under `do_not_specialize`.
    """
    axes = "nbh" if len(values) == 3 else "nh"
    return {f"stride_{name}{axis}": value for axis, value in zip(axes, values, strict=True)}


def launched(tiles: Tiles, unit: int, **views: tuple[Tensor, str]) -> dict[str, Any]:
    """Arguments of a launch: the tiles, and views of rows with the name of the block that a tile of each has rows of.

    Views are read by descriptors if the tiles say so and all views allow it, and otherwise by pointers.
    """
    tiles = dict(tiles)
    described = tiles.pop("descriptors", False) and unit == 8 and all(_describable(view) for view, _ in views.values())
    found: dict[str, Any] = dict(tiles)
    for name, (view, rows) in views.items():
        found[f"{name}_ptr"] = _descriptor(view, tiles[rows]) if described else view
        found |= named(name, in_units(view, unit))
    return found


def _describable(view: Tensor) -> bool:
    """Whether a TMA descriptor takes the view: it has elements, and none lie on top of each other."""
    return view.numel() > 0 and all(s > 0 for s, n in zip(view.stride(), view.shape, strict=True) if n > 1)


def _descriptor(view: Tensor, rows: int) -> TensorDescriptor:
    """The view as `[B, heads, tokens, dim]`, for tiles of `rows` tokens of a head; it holds the tensor, and no copy.

    The tile's sizes of 1 come first: in this order the compiler drops them. A size of 1 gets a stride that is valid.
    """
    (tokens, B, heads, dim), width = view.shape, block(view.shape[3])
    token, batch, head = (stride or width for stride in strides(view))
    return TensorDescriptor(view, [B, heads, tokens, dim], [batch, head, token, 1], [1, 1, rows, width])


def span_table(spans: Sequence[Span], units: tuple[int, int], device: torch.device) -> Tensor:
    """The table of `spans` (without empty ones) on `device`; a table that recurs is not copied there again."""
    rows: list[int] = []
    for span in spans:
        for view, u in zip((*span.views, None)[:2], units, strict=True):
            rows += (0, 0) if view is None else (view.data_ptr(), strides(view)[1] // u)
        rows += (span.start, span.start + _tokens(span))
    return _table(tuple(rows), device).view(-1, 6)


_table = kept(table)


def shared_strides(spans: Sequence[Span], view: int, unit: int) -> tuple[int, int]:
    """(token, head) strides of view number `view`, which are the same in all spans."""
    views = views_of(spans, view)
    token = {strides(v)[0] for v in views if len(v) > 1} or {0}
    head = {strides(v)[2] for v in views} or {0}
    assert len(token) == 1 and len(head) == 1, f"spans differ in their token or head strides: {token}, {head}"
    return token.pop() // unit, head.pop() // unit


def section(heads: int, bytes_per_head: int) -> int:
    """How many of `heads` run side by side so that what they all read stays in L2."""
    return max(1, min(heads, L2_BYTES // max(1, bytes_per_head)))


def views_of(spans: Sequence[Span], view: int) -> list[Tensor]:
    """View number `view` of every span, none of which may be missing."""
    found = [v for span in spans for v in span.views[view : view + 1] if v is not None]
    assert len(found) == len(spans)
    return found


def _tokens(span: Span) -> int:
    return len(views_of([span], 0)[0])
