"""Which rank works on which heads, and what therefore lies in its rows and travels in its messages.

Pure functions of the problem. A rank takes `Hq / P` query heads in order and the kv heads that those attend to; with
`Hkv < P` neighbouring ranks share a kv head, and each receives it.

Example: Hq = 12, Hkv = 4, P = 6. Rank 1 has query heads 2 and 3; three query heads share a kv head, so it works with kv
heads 0 and 1. Its row on the way in, D = Dv = 64: `q2 q3 k0 k1 v0 v1`, 384 elements. With D = 33 every head of q and k
takes 40, of which the last 7 are never read: heads begin at multiples of 8 elements, so vector accesses stay aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from .errors import ShapeError
from .spec import Problem

ROW_MULTIPLE = 16  # elements: every row starts at a multiple of 16 bytes or more, so vector accesses stay aligned
HEAD_MULTIPLE = 8  # elements, for every head likewise


class Share(NamedTuple):
    """One rank's heads: query heads `q_start .. q_stop`, kv heads `kv_start .. kv_stop`, for all tokens."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int

    @property
    def q_heads(self) -> int:
        return self.q_stop - self.q_start

    @property
    def kv_heads(self) -> int:
        return self.kv_stop - self.kv_start


class Field(NamedTuple):
    """Some heads in a row: `dim` numbers every `stride`, from element `offset` on, each number `width` elements wide.

    `width` is more than 1 for numbers that travel in a wider type than the row's: fp32 in a bf16 row.
    """

    name: str
    heads: int
    dim: int
    stride: int
    offset: int
    width: int

    @property
    def size(self) -> int:
        """The elements that it takes in a row."""
        return self.heads * self.stride * self.width


class Row(NamedTuple):
    """The layout of one rank's rows of a section: its fields and the padded width in elements."""

    fields: tuple[Field, ...]
    width: int


class Section(NamedTuple):
    """One kind of message: for the tokens of `lens`, every rank's row layout."""

    lens: tuple[int, ...]
    rows: tuple[Row, ...]


class Message(NamedTuple):
    """What one rank sends and receives for a section, in elements, and where its block lands at each peer."""

    send: tuple[int, ...]
    receive: tuple[int, ...]
    land: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Every rank's share, and the sections of the four exchanges of a layer."""

    shares: tuple[Share, ...]
    group: int  # G: query heads per kv head
    shared: bool  # whether some kv head is worked on by more than one rank
    qkv: tuple[Section, ...]
    out: tuple[Section, ...]
    grad_out: tuple[Section, ...]
    grad_qkv: tuple[Section, ...]

    def head_offset(self, rank: int) -> int:
        """The place of a rank's first query head inside its kv group."""
        return self.shares[rank].q_start % self.group

    def kv_head_of(self, rank: int) -> list[int]:
        """Which of a rank's own kv heads each of its own query heads attends to."""
        return [(h + self.head_offset(rank)) // self.group for h in range(self.shares[rank].q_heads)]

    def explain(self) -> str:
        """One line per rank: its heads, and the elements of its rows."""
        return "\n".join(
            f"rank {rank}: query heads {s.q_start}..{s.q_stop - 1}, kv heads {s.kv_start}..{s.kv_stop - 1}, "
            f"{sum(section.rows[rank].width for section in self.qkv)} elements per token in, "
            f"{sum(section.rows[rank].width for section in self.out)} out"
            for rank, s in enumerate(self.shares)
        )


def place(problem: Problem) -> Placement:
    """The placement of a problem on its `len(lens)` ranks.

    Raises ShapeError when the ranks do not divide the query heads.
    """
    return _placed(problem) if problem.concrete else _place(problem)


def _place(problem: Problem) -> Placement:
    ranks, group = problem.ranks, problem.heads // problem.kv_heads
    if problem.heads % ranks:
        fitting = [n for n in range(1, problem.heads + 1) if problem.heads % n == 0]
        raise ShapeError(
            f"{problem.heads} query heads cannot be divided over {ranks} ranks: use a sequence-parallel group of "
            f"{', '.join(map(str, fitting))} ranks"
        )
    each = problem.heads // ranks
    shares = tuple(
        Share(r * each, (r + 1) * each, r * each // group, ((r + 1) * each - 1) // group + 1) for r in range(ranks)
    )
    shared = any(a.kv_stop > b.kv_start for a, b in zip(shares, shares[1:], strict=False))
    d, dv, stat = problem.head_dim, problem.value_dim, problem.stat_width
    partial = stat if shared else 1

    def section(lens: tuple[int, ...], rows: Sequence[list[tuple[str, int, int, int]]]) -> Section:
        return Section(lens, tuple(_row(row) for row in rows))

    def q_and_kv(wide: int) -> tuple[Section, ...]:
        q = [[("q", s.q_heads, d, 1)] for s in shares]
        kv = [[("k", s.kv_heads, d, wide), ("v", s.kv_heads, dv, wide)] for s in shares]
        if problem.cross:
            return section(problem.lens, q), section(problem.kv_lens, kv)
        return (section(problem.lens, [a + b for a, b in zip(q, kv, strict=True)]),)

    def output(with_stat: bool) -> tuple[Section, ...]:
        return (
            section(
                problem.lens,
                [[("o", s.q_heads, dv, 1)] + [("stat", s.q_heads, 1, stat)] * with_stat for s in shares],
            ),
        )

    return Placement(
        shares=shares,
        group=group,
        shared=shared,
        qkv=q_and_kv(1),
        out=output(problem.return_lse),
        grad_out=output(problem.sends_delta),
        grad_qkv=q_and_kv(partial),
    )


_placed = lru_cache(maxsize=256)(_place)


def _row(parts: list[tuple[str, int, int, int]]) -> Row:
    unplaced = [Field(name, heads, dim, _stride(name, dim), 0, width) for name, heads, dim, width in parts]
    offsets = accumulate((field.size for field in unplaced), initial=0)
    fields = tuple(field._replace(offset=offset) for field, offset in zip(unplaced, offsets, strict=False))
    return Row(fields, round_up(sum(field.size for field in fields), ROW_MULTIPLE))


def _stride(name: str, dim: int) -> int:
    """How far apart the heads of a field lie, in numbers. An LSE or delta is one number a head, read as such."""
    return dim if name == "stat" else round_up(dim, HEAD_MULTIPLE)


def round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


def inbound(section: Section, batch: int, rank: int) -> Message:
    """Sequence layout to head layout: to every rank its heads of my tokens, from every rank my heads of its tokens."""
    lens, widths = section.lens, [row.width for row in section.rows]
    return Message(
        send=tuple(lens[rank] * batch * w for w in widths),
        receive=tuple(n * batch * widths[rank] for n in lens),
        land=tuple(sum(lens[:rank]) * batch * w for w in widths),
    )


def outbound(section: Section, batch: int, rank: int) -> Message:
    """Head layout to sequence layout: to every rank my heads of its tokens, from every rank its heads of my tokens."""
    lens, widths = section.lens, [row.width for row in section.rows]
    return Message(
        send=tuple(n * batch * widths[rank] for n in lens),
        receive=tuple(lens[rank] * batch * w for w in widths),
        land=tuple(n * batch * sum(widths[:rank]) for n in lens),
    )
