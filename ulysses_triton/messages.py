"""What lies in a rank's rows, and which blocks of them travel: fields, rows, sections and messages.

A section is one kind of message: rows of every rank that works on heads, for all tokens or a range of them, sent by the
ranks that have these tokens (inbound) or to them (outbound). Pure functions; sizes count elements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

ROW_MULTIPLE = 16  # elements: every row starts at a multiple of 16 bytes or more, so vector accesses stay aligned
HEAD_MULTIPLE = 8  # elements, for every head likewise


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
    """One kind of message: every rank's row layout, for all tokens of `lens` or those from `ranges[rank]` alone."""

    lens: tuple[int, ...]
    rows: tuple[Row, ...]
    ranges: tuple[tuple[int, int], ...] | None = None  # of every rank that works on rows: from token, to token

    def tokens(self, owner: int) -> int:
        """How many tokens the rows of a rank are for."""
        if self.ranges is None:
            return sum(self.lens)
        start, stop = self.ranges[owner]
        return stop - start

    def overlap(self, owner: int, source: int) -> tuple[int, int]:
        """Of the shard of `source`, the first token that the rows of `owner` hold, and how many they hold."""
        if self.ranges is None:
            return 0, self.lens[source]
        before = sum(self.lens[:source])
        first, last = (min(max(n - before, 0), self.lens[source]) for n in self.ranges[owner])
        return first, last - first

    def before(self, owner: int, source: int) -> int:
        """How many tokens the rows of `owner` hold ahead of those of the shard of `source`."""
        tokens = sum(self.lens[:source])
        if self.ranges is None:
            return tokens
        start, stop = self.ranges[owner]
        return min(max(tokens - start, 0), stop - start)


class Message(NamedTuple):
    """What one rank sends and receives for a section, in elements, and where its block lands at each peer.

    `between(a, b)` is what rank a sends to rank b, for any two: who passes blocks on has to know others' sizes.
    """

    send: tuple[int, ...]
    receive: tuple[int, ...]
    land: tuple[int, ...]
    between: Callable[[int, int], int]


Entry = tuple[str, int, int, int]  # of a row: name, heads, dim, width


def row_of(parts: list[Entry]) -> Row:
    unplaced = [Field(name, heads, dim, _stride(name, dim), 0, width) for name, heads, dim, width in parts]
    offsets = accumulate((field.size for field in unplaced), initial=0)
    fields = tuple(field._replace(offset=offset) for field, offset in zip(unplaced, offsets, strict=False))
    return Row(fields, round_up(sum(field.size for field in fields), ROW_MULTIPLE))


def _stride(name: str, dim: int) -> int:
    """How far apart the heads of a field lie, in numbers. An LSE or delta is one number a head, read as such."""
    return dim if name == "stat" else round_up(dim, HEAD_MULTIPLE)


def round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


def block_size(section: Section, batch: int, owner: int, source: int) -> int:
    """Elements of the rows in which `owner` has its heads of the tokens of `source`'s shard."""
    return section.overlap(owner, source)[1] * batch * section.rows[owner].width


def inbound(section: Section, batch: int, rank: int) -> Message:
    """Sequence layout to head layout: to every rank its heads of my tokens, from every rank my heads of its tokens."""
    ranks = range(len(section.lens))
    return Message(
        send=tuple(block_size(section, batch, r, rank) for r in ranks),
        receive=tuple(block_size(section, batch, rank, r) for r in ranks),
        land=tuple(section.before(r, rank) * batch * section.rows[r].width for r in ranks),
        between=lambda a, b: block_size(section, batch, owner=b, source=a),
    )


def outbound(section: Section, batch: int, rank: int) -> Message:
    """Head layout to sequence layout: to every rank my heads of its tokens, from every rank its heads of my tokens."""
    return (_outbound if section.ranges is None else _outbound_kept)(section, batch, rank)


def _outbound(section: Section, batch: int, rank: int) -> Message:
    ranks = range(len(section.lens))
    return Message(
        send=tuple(block_size(section, batch, rank, r) for r in ranks),
        receive=tuple(block_size(section, batch, r, rank) for r in ranks),
        land=tuple(sum(block_size(section, batch, s, r) for s in range(rank)) for r in ranks),
        between=lambda a, b: block_size(section, batch, owner=a, source=b),
    )


_outbound_kept = lru_cache(maxsize=256)(_outbound)  # a sum for every two ranks
