"""Inputs and outputs for checks and timings: random data, and memory that holds NaN until a kernel writes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ulysses_triton.kernels._views import ORows, QKVRows, Span
from ulysses_triton.kernels.attend_backward import attend_backward
from ulysses_triton.kernels.attend_forward import attend_forward
from ulysses_triton.kernels.pack import pack, pack_grad
from ulysses_triton.kernels.unpack import unpack, unpack_grad

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Kernels(NamedTuple):
    """The launchers under test."""

    pack: Callable[..., None] = pack
    pack_grad: Callable[..., None] = pack_grad
    unpack: Callable[..., None] = unpack
    unpack_grad: Callable[..., tuple[Tensor | None, Tensor | None]] = unpack_grad
    attend_forward: Callable[..., None] = attend_forward
    attend_backward: Callable[..., None] = attend_backward


class Memory:
    """Hands out views of rows on a device, and counts what was written beside them.

    `aligned`: rows begin on 16 bytes and strides are multiples of 8 elements, as in the buffers of a group.
    """

    def __init__(self, device: torch.device, *, aligned: bool = True, seed: int = 0) -> None:
        self.device = device
        self.random = torch.Generator(device).manual_seed(seed)
        self._lead, self._gap = (16, 16) if aligned else (3, 5)
        self._rows: list[tuple[Tensor, list[Tensor]]] = []

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.random, device=self.device).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random, device=self.device)

    def nan(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=self.device)

    def rows(self, tokens: int, B: int, *heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
        """Views `[tokens, B, heads, dim]` of NaN, side by side in one row for each (heads, dim)."""
        used = self._lead + sum(h * d for h, d in heads) + self._gap
        width = used + (self._lead == 16) * (-used % 16)
        buffer = self.nan(tokens, B, width, dtype=dtype)
        views, start = [], self._lead
        for h, d in heads:
            views.append(buffer[..., start : start + h * d].unflatten(-1, (h, d)))
            start += h * d
        self._rows.append((buffer, views))
        return views

    def filled(self, tokens: int, B: int, *heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
        """As `rows`, with random numbers in the views."""
        views = self.rows(tokens, B, *heads, dtype=dtype)
        for view in views:
            view.copy_(self.normal(*view.shape))
        return views

    def written_beside(self) -> int:
        """How many elements outside of all views are no longer NaN; ends the use of the views."""
        for _, views in self._rows:
            for view in views:
                view.fill_(math.nan)
        return sum(int(buffer.isnan().logical_not().sum()) for buffer, _ in self._rows)


@dataclass(frozen=True)
class Movement:
    """What the four layout kernels move for one rank: its L tokens, and the heads of each of `ranks` ranks."""

    L: int
    B: int = 1
    Hq: int = 8
    Hkv: int = 2
    D: int = 128
    Dv: int = 128
    ranks: int = 2
    dtype: str = "bf16"
    aligned: bool = True
    rope: int = 0  # channels that rotate
    interleaved: bool = False
    norm: bool = False

    @property
    def owners(self) -> list[tuple[int, int, int, int]]:
        """Of every rank: first query head, query heads, first kv head, kv heads."""
        each, group = self.Hq // self.ranks, self.Hq // self.Hkv
        starts = range(0, self.Hq, each)
        return [(q, each, q // group, (q + each - 1) // group + 1 - q // group) for q in starts]

    @property
    def shared(self) -> bool:
        """Whether ranks share kv heads, whose partial gradients then travel in fp32."""
        return sum(kv for *_, kv in self.owners) > self.Hkv

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        dims = str(self.D) if self.D == self.Dv else f"{self.D}-{self.Dv}"
        marks = [f"rope {self.rope}{' interleaved' * self.interleaved}"] if self.rope else []
        marks += ["norm"] * self.norm + ["unaligned"] * (not self.aligned)
        sizes = f"L {self.L} B {self.B} heads {self.Hq}/{self.Hkv} D {dims} ranks {self.ranks}"
        return " ".join([self.dtype, sizes, *marks])

    def projection(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v [B, L, H, D] as views of one projection's output."""
        heads = ((self.Hq, self.D), (self.Hkv, self.D), (self.Hkv, self.Dv))
        q, k, v = memory.filled(self.B, self.L, *heads, dtype=self.torch_dtype)
        return q, k, v

    def qkv_rows(self, memory: Memory, *, gradients: bool = False) -> list[QKVRows]:
        """Each rank's rows, of NaN; as gradients, random, with partial sums in fp32."""
        make = memory.filled if gradients else memory.rows
        wide = gradients and self.shared
        rows = []
        for first, hq, kv_first, hkv in self.owners:
            if wide:
                (q,) = make(self.L, self.B, (hq, self.D), dtype=self.torch_dtype)
                k, v = make(self.L, self.B, (hkv, self.D), (hkv, self.Dv), dtype=torch.float32)
            else:
                heads = ((hq, self.D), (hkv, self.D), (hkv, self.Dv))
                q, k, v = make(self.L, self.B, *heads, dtype=self.torch_dtype)
            rows.append(QKVRows(q, k, v, first, kv_first))
        return rows

    def o_rows(self, memory: Memory, *, filled: bool) -> list[ORows]:
        """Each rank's rows of O (or dO), with the fp32 number of each head bit-cast at their end as it travels."""
        rows = []
        for first, hq, *_ in self.owners:
            width = 4 // self.torch_dtype.itemsize
            tail = hq * width if memory._lead % width == 0 else 0
            if tail:
                o, stat = memory.rows(self.L, self.B, (hq, self.Dv), (1, tail), dtype=self.torch_dtype)
                stat = stat[:, :, 0].view(torch.float32)
            else:  # an odd place cannot hold fp32
                (o,) = memory.rows(self.L, self.B, (hq, self.Dv), dtype=self.torch_dtype)
                stat = memory.rows(self.L, self.B, (hq, 1), dtype=torch.float32)[0][..., 0]
            if filled:
                o.copy_(memory.normal(*o.shape))
                stat.copy_(memory.normal(*stat.shape))
            rows.append(ORows(o, stat, first))
        return rows


def spans(memory: Memory, tokens: int, cuts: Sequence[int], B: int, *heads: tuple[int, int], dtype: torch.dtype):
    """A span of NaN between each two cuts, with a view for each (heads, dim)."""
    edges = pairwise((0, *cuts, tokens))
    return [Span(start, tuple(memory.rows(stop - start, B, *heads, dtype=dtype))) for start, stop in edges]
