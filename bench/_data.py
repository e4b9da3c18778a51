"""Inputs and outputs for checks and timings: random data, and memory that holds NaN until a kernel writes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulysses_triton.kernels import _blocks
from ulysses_triton.kernels._documents import documents
from ulysses_triton.kernels._views import Dropout, HeadMap, Options, ORows, Predicate, QKVRows, Span
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

    `aligned`: rows and heads begin on 16 bytes and strides are multiples of 8 elements, as in the buffers of a group.
    """

    def __init__(self, device: torch.device, *, aligned: bool = True, seed: int = 0) -> None:
        self.device = device
        self.random = torch.Generator(device).manual_seed(seed)
        self._lead, self._gap = (16, 16) if aligned else (3, 5)
        self._step = 8 if aligned else 1  # on which the heads of a row begin
        self._rows: list[tuple[Tensor, list[Tensor]]] = []

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.random, device=self.device).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random, device=self.device)

    def nan(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=self.device)

    def rows(self, tokens: int, B: int, *heads: tuple[int, int], dtype: torch.dtype, step: int = 0) -> list[Tensor]:
        """Views `[tokens, B, heads, dim]` of NaN, side by side in one row for each (heads, dim).

        Heads begin on multiples of `step` elements; 1 for a user's tensor, whose heads lie side by side.
        """
        step = step or self._step
        widths = [-(-d // step) * step for _, d in heads]
        used = self._lead + sum(h * w for (h, _), w in zip(heads, widths, strict=True)) + self._gap
        buffer = self.nan(tokens, B, used + -used % (16 if self._step == 8 else 1), dtype=dtype)
        views, start = [], self._lead
        for (h, d), w in zip(heads, widths, strict=True):
            views.append(buffer[..., start : start + h * w].unflatten(-1, (h, w))[..., :d])
            start += h * w
        self._rows.append((buffer, views))
        return views

    def filled(self, tokens: int, B: int, *heads: tuple[int, int], dtype: torch.dtype, step: int = 0) -> list[Tensor]:
        """As `rows`, with random numbers in the views."""
        views = self.rows(tokens, B, *heads, dtype=dtype, step=step)
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
        q, k, v = memory.filled(self.B, self.L, *heads, dtype=self.torch_dtype, step=1)
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


FIRST = 2  # kv groups of the model ahead of the local heads: predicates and dropout count the model's heads
SEED = (1 << 40) + (1 << 31) + 12345  # of dropout: both words of it, and a sign bit


@triton.jit
def prefix(batch, head, q_pos, kv_pos, lengths):
    return (kv_pos <= q_pos) | (kv_pos < tl.load(lengths + batch) * (head % 3))


@dataclass(frozen=True)
class Attention:
    """One local attention; its first query head has place `offset` in a group of `group`; spans end at `cuts`."""

    S: int
    Sk: int = 0  # 0 for S
    B: int = 1
    hq: int = 4
    group: int = 2
    offset: int = 0
    D: int = 128
    Dv: int = 0  # 0 for D
    causal: bool = True
    dtype: str = "bf16"
    scale: float = 0.0  # 0 for 1 / sqrt(D)
    cuts: tuple[int, ...] = ()
    aligned: bool = True
    partial: bool = False  # dk and dv in fp32
    window: tuple[int, int] | None = None
    softcap: float | None = None
    documents: tuple[int, ...] = ()  # numbers of runs of equally many tokens; negative for padding
    sinks: bool = False
    alibi: bool = False
    dropout: float = 0.0
    predicate: bool = False  # `prefix`
    blocks: bool = False  # tiles come from lists

    @property
    def keys(self) -> int:
        return self.Sk or self.S

    @property
    def value_dim(self) -> int:
        return self.Dv or self.D

    @property
    def hkv(self) -> int:
        return (self.hq - 1 + self.offset) // self.group + 1

    @property
    def factor(self) -> float:
        return self.scale or self.D**-0.5

    @property
    def kv_of(self) -> list[int]:
        return [(h + self.offset) // self.group for h in range(self.hq)]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def bounds(self) -> tuple[float, float]:
        """How far back and how far ahead a query attends."""
        left, right = (math.inf if n < 0 else n for n in self.window or (-1, -1))
        return left, 0 if self.causal else right

    @property
    def flags(self) -> tuple[str, ...]:
        """Its mask and what else it is besides a softmax of scores, by name."""
        names = ("window", "softcap", "documents", "sinks", "alibi", "dropout", "predicate", "blocks")
        return ("causal" if self.causal else "dense", *(name for name in names if getattr(self, name)))

    def __str__(self) -> str:
        dims = f"{self.D}" if self.value_dim == self.D else f"{self.D}-{self.Dv}"
        sizes = f"S {self.S}" + f" Sk {self.Sk}" * bool(self.Sk) + f" B {self.B} heads {self.hq}/{self.hkv} D {dims}"
        said = {"window": f"window {self.window}", "softcap": f"softcap {self.softcap}"}
        said |= {"documents": f"{len(set(self.documents))} documents", "dropout": f"dropout {self.dropout}"}
        marks = [said.get(name, name) for name in self.flags] + ["unaligned"] * (not self.aligned)
        marks += [f"offset {self.offset}"] * bool(self.offset) + [f"scale {self.scale:g}"] * bool(self.scale)
        marks += [f"{len(self.cuts) + 1} spans"] * bool(self.cuts) + ["partial"] * self.partial
        return " ".join([self.dtype, sizes, *marks])

    def ids(self, tokens: int, device: torch.device) -> Tensor:
        """The number of each token's document, `[B, tokens]`; every sequence begins one run later."""
        runs = torch.tensor(self.documents, device=device)
        of_run = torch.arange(tokens, device=device) * len(runs) // tokens
        return torch.stack([runs.roll(-b)[of_run] for b in range(self.B)])

    def lengths(self, device: torch.device) -> Tensor:
        """What the predicate captures, `[B]`."""
        return torch.arange(self.B, device=device, dtype=torch.int32) * 40 + self.keys // 5

    def options(self, device: torch.device) -> Options:
        """What the kernels are told; sinks and slopes are random."""
        random = torch.Generator(device).manual_seed(3)
        sinks = torch.randn(self.hq, generator=random, device=device)
        slopes = torch.rand(self.hq, generator=random, device=device) / 8
        found = Options(
            self.factor,
            self.causal,
            HeadMap(self.group, FIRST * self.group + self.offset),
            self.window,
            self.softcap,
            documents(self.ids(self.S, device), self.ids(self.keys, device)) if self.documents else None,
            sinks if self.sinks else None,
            slopes if self.alibi else None,
            Dropout(self.dropout, SEED) if self.dropout else None,
            Predicate(prefix, (self.lengths(device),)) if self.predicate else None,
        )
        if not self.blocks:
            return found
        status, first = None, found.heads.first
        if found.predicate is not None:
            status = _blocks.status(found.predicate, self.B, first + self.hq, self.S, self.keys, device)[:, first:]
        left = _blocks.combine(status, found, self.S, self.keys)
        return found._replace(blocks=_blocks.lists(left, found.heads, self.hq, self.hkv))


def spans(memory: Memory, tokens: int, cuts: Sequence[int], B: int, *heads: tuple[int, int], dtype: torch.dtype):
    """A span of NaN between each two cuts, with a view for each (heads, dim)."""
    edges = pairwise((0, *cuts, tokens))
    return [Span(start, tuple(memory.rows(stop - start, B, *heads, dtype=dtype))) for start, stop in edges]
