"""Tables of heads: where each head of one side of a copy lies, wherever that is.

A table is an int64 tensor with one row per head: pointer, token stride, batch stride, and what the kernel adds. It
serves one buffer, P message blocks of it and P peers' buffers alike. Strides are divided by UNIT, as in `_rows`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype]  # pointer, shape, strides, dtype
TABLES = 4096  # that each kind of pass keeps
_Made = TypeVar("_Made")


class Units(NamedTuple):
    """What programs of a pass do: a row each in a table, for as many blocks of tokens as the longest one has."""

    number: int
    tokens: int  # that the longest one has
    table: Tensor
    unit: int  # of its strides, in elements


@triton.jit
def elements(stride, UNIT: tl.constexpr):
    """A stride in elements, int64, from the units in which it is passed."""
    return stride.to(tl.int64) * UNIT


@triton.jit
def head_of(ptr, i_b, i_h, stride_b, stride_h, UNIT: tl.constexpr):
    """Where the head `i_h` (int64) of batch `i_b` begins in a tensor in sequence layout."""
    return ptr + (i_b * stride_b.to(tl.int64) + i_h * stride_h) * UNIT


@triton.jit
def head_in_table(entry_ptr, i_b, DTYPE: tl.constexpr, UNIT: tl.constexpr):
    """Where batch `i_b` of a head begins, and its token stride, from (pointer, token stride, batch stride)."""
    ptr = tl.load(entry_ptr).to(tl.pointer_type(DTYPE))
    if UNIT == 8:
        ptr = tl.multiple_of(ptr, 16)  # known of kernel arguments, not of what a table holds
    stride_t = tl.load(entry_ptr + 1) * UNIT
    return ptr + i_b * tl.load(entry_ptr + 2) * UNIT, stride_t


@triton.jit
def tile_mask(m_t, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a tile exist; a tile of D channels without padding needs no channel mask."""
    if BLOCK_D == D:
        return m_t[:, None]  # [BLOCK_T, 1]
    else:
        return m_t[:, None] & (o_d < D)[None, :]  # [BLOCK_T, BLOCK_D]


def place(view: Tensor) -> Place:
    """Where a view lies: what a table is made of, and the key under which it is kept."""
    return view.data_ptr(), view.shape, view.stride(), view.dtype


def heads(view: Place, unit: int) -> Iterator[tuple[int, int, int]]:
    """Pointer, token stride and batch stride of each head of a view [tokens, B, heads, ...]; strides by `unit`."""
    ptr, shape, stride, dtype = view
    token, batch, head = (s if n > 1 else 0 for n, s in zip(shape[:3], stride[:3], strict=True))
    for i in range(shape[2]):
        yield ptr + i * head * dtype.itemsize, token // unit, batch // unit


def holds(view: Place, token: int, tokens: int, batch: int) -> bool:
    """Whether the rows of a view may be those of `token` and what follows, of so many tokens."""
    n, in_batch = view[1][:2]
    return 0 <= token <= tokens - n and in_batch == batch


def common_unit(views: Iterable[Place], unit: int) -> int:
    """`unit`, or 1 where a row of any of `views` does not start on 16 bytes and a multiple of 8 elements."""
    for ptr, shape, stride, _ in views:
        assert stride[-1] == 1 or shape[-1] == 1, "the last dimension must be dense"
        if ptr % 16 or any(n > 1 and s % 8 for n, s in zip(shape[:3], stride[:3], strict=True)):
            return 1
    return unit


def kept(make: Callable[..., _Made]) -> Callable[..., _Made]:
    """`make`, of tables, keeping what it made for the latest arguments: pooled buffers recur, so that in the steady
    state nothing is copied. It keeps more tables than a GPU queues launches: no kernel has to read one that is dropped.

    What is made while a CUDA graph is captured belongs to the graph, and is filled only when that is replayed.
    """
    found: OrderedDict[Any, _Made] = OrderedDict()

    @wraps(make)
    def get(*key: Any) -> _Made:
        with suppress(KeyError):
            found.move_to_end(key)
            return found[key]
        made = make(*key)
        if not _capturing():
            found[key] = made
            if len(found) > TABLES:
                with suppress(KeyError):  # another thread's rank dropped it
                    found.popitem(last=False)
        return made

    return get


def table(rows: Sequence[tuple[int, ...]] | tuple[int, ...], device: torch.device) -> Tensor:
    """`rows` as an int64 tensor on `device`; the host does not wait for it to get there."""
    made = torch.tensor(rows, dtype=torch.int64)
    if device.type != "cuda":
        return made.to(device)
    made = made.pin_memory()
    if _capturing():
        _replayed.append(made)
    return made.to(device, non_blocking=True)


_replayed: list[Tensor] = []  # which graphs copy from at every replay, some hundred bytes each


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
