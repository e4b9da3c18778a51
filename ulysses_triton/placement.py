"""Which rank works on which heads, and what therefore lies in its rows and travels in its messages.

Pure functions of the problem. A rank takes `Hq / P` query heads in order and the kv heads that those attend to; with
`Hkv < P` neighbouring ranks share a kv head, and each receives it.

Example: Hq = 12, Hkv = 4, P = 6. Rank 1 has query heads 2 and 3; three query heads share a kv head, so it works with kv
heads 0 and 1. Its row on the way in, D = Dv = 64: `q2 q3 k0 k1 v0 v1`, 384 elements. With D = 33 every head of q and k
takes 40, of which the last 7 are never read: heads begin at multiples of 8 elements, so vector accesses stay aligned.

A rank's heads can go in chunks, so that the exchange of one hides behind the attention of another. A chunk is a part of
the rank's kv heads with all their query heads, where there are enough of them. Otherwise chunks share a kv head and
split its query heads; its k and v then travel with the first of these chunks, its dk and dv with the last.

Example: in 2 chunks, the rank with the query heads 0..7 and the kv heads 0 and 1 has the rows `q0 q1 q2 q3 k0 v0` and
`q4 q5 q6 q7 k1 v1`. In 3 they are `q0 q1 k0 v0`, `q2 q3` (which attend to the k0 and v0 of the chunk before) and
`q4 q5 q6 q7 k1 v1`, and dk0 and dv0 travel with dq2 and dq3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
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


class Heads(NamedTuple):
    """Numbers of the model's heads, in the order in which they lie side by side."""

    q: tuple[int, ...]
    kv: tuple[int, ...]


class Message(NamedTuple):
    """What one rank sends and receives for a section, in elements, and where its block lands at each peer.

    `between(a, b)` is what rank a sends to rank b, for any two: who passes blocks on has to know others' sizes.
    """

    send: tuple[int, ...]
    receive: tuple[int, ...]
    land: tuple[int, ...]
    between: Callable[[int, int], int]


class Chunk(NamedTuple):
    """What is exchanged and attended to at once: a part of every rank's share, and the sections of its four exchanges.

    A section that no rank has heads for is left out: k and v of other tokens than q, where an earlier chunk has them.
    """

    number: int
    shares: tuple[Share, ...]
    holders: tuple[int, ...]  # of every rank: the chunk whose rows hold k and v of its kv heads, at most this one
    senders: tuple[int, ...]  # and the one that their gradients leave with, at least this one
    qkv: tuple[Section, ...]
    out: tuple[Section, ...]
    grad_out: tuple[Section, ...]
    grad_qkv: tuple[Section, ...]

    @property
    def heads(self) -> Heads:
        """Those that all ranks' rows hold on the way in, in the ranks' order, each once."""
        holding = [share for share, holder in zip(self.shares, self.holders, strict=True) if holder == self.number]
        return Heads(
            tuple(h for share in self.shares for h in range(share.q_start, share.q_stop)),
            tuple(sorted({h for share in holding for h in range(share.kv_start, share.kv_stop)})),
        )


@dataclass(frozen=True)
class Placement:
    """Every rank's share, and the chunks that it goes in: as many on every rank."""

    shares: tuple[Share, ...]
    group: int  # G: query heads per kv head
    shared: bool  # whether some kv head is worked on by more than one rank
    chunks: tuple[Chunk, ...]

    def head_offset(self, rank: int) -> int:
        """The place of a rank's first query head inside its kv group."""
        return self.shares[rank].q_start % self.group

    def kv_head_of(self, rank: int) -> list[int]:
        """Which of a rank's own kv heads each of its own query heads attends to."""
        return [(h + self.head_offset(rank)) // self.group for h in range(self.shares[rank].q_heads)]

    def explain(self) -> str:
        """One line per rank: its heads, the elements of its rows, and the query heads of its chunks."""
        return "\n".join(map(self._line, range(len(self.shares))))

    def _line(self, rank: int) -> str:
        s = self.shares[rank]
        inward = sum(section.rows[rank].width for chunk in self.chunks for section in chunk.qkv)
        outward = sum(section.rows[rank].width for chunk in self.chunks for section in chunk.out)
        parts = [f"{chunk.shares[rank].q_start}..{chunk.shares[rank].q_stop - 1}" for chunk in self.chunks]
        return (
            f"rank {rank}: query heads {s.q_start}..{s.q_stop - 1}, kv heads {s.kv_start}..{s.kv_stop - 1}, "
            f"{inward} elements per token in, {outward} out"
        ) + (f", chunks of query heads {', '.join(parts)}" if len(parts) > 1 else "")


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
    parts = [_divided(share, group, problem.chunks) for share in shares]
    shared = any(a.kv_stop > b.kv_start for a, b in zip(shares, shares[1:], strict=False))
    by_chunk = enumerate(zip(*parts, strict=True))
    return Placement(shares, group, shared, tuple(_chunk(problem, c, of_ranks, shared) for c, of_ranks in by_chunk))


class _Part(NamedTuple):
    """Of one rank in a chunk: its heads, and the first and the last chunk that work with its kv heads."""

    share: Share
    first: int
    last: int


def _divided(share: Share, group: int, chunks: int) -> list[_Part]:
    """A rank's heads in as many parts, in order, none of which is empty; `chunks` is at most its query heads."""
    if chunks == 1:
        return [_Part(share, 0, 0)]
    parts: list[_Part] = []
    if share.kv_heads >= chunks:
        cuts = [share.kv_start + share.kv_heads * c // chunks for c in range(chunks + 1)]
        for c, (start, stop) in enumerate(pairwise(cuts)):
            parts.append(_Part(_of_kv_heads(share, group, start, stop), c, c))
        return parts
    each = [_of_kv_heads(share, group, j, j + 1) for j in range(share.kv_start, share.kv_stop)]
    counts = [1] * len(each)  # of chunks per kv head: the one with most query heads per chunk gets the next
    for _ in range(chunks - len(each)):
        largest = max(range(len(each)), key=lambda j: each[j].q_heads / counts[j])
        counts[largest] += 1
    for heads, count in zip(each, counts, strict=True):
        first = len(parts)
        for start, stop in pairwise(heads.q_start + heads.q_heads * i // count for i in range(count + 1)):
            parts.append(_Part(heads._replace(q_start=start, q_stop=stop), first, first + count - 1))
    return parts


def _of_kv_heads(share: Share, group: int, start: int, stop: int) -> Share:
    """Some kv heads of a share, with their query heads."""
    return Share(max(share.q_start, start * group), min(share.q_stop, stop * group), start, stop)


def _chunk(problem: Problem, number: int, parts: Sequence[_Part], shared: bool) -> Chunk:
    """The chunk of these parts of every rank's heads."""
    d, dv, stat = problem.head_dim, problem.value_dim, problem.stat_width
    shares, first, last = tuple(zip(*parts, strict=True))

    def section(lens: tuple[int, ...], rows: Sequence[list[tuple[str, int, int, int]]]) -> tuple[Section, ...]:
        return (Section(lens, tuple(_row(row) for row in rows)),) if any(rows) else ()

    def q_and_kv(carriers: Sequence[int], wide: int) -> tuple[Section, ...]:
        q = [[("q", s.q_heads, d, 1)] for s in shares]
        kv = [
            [("k", s.kv_heads, d, wide), ("v", s.kv_heads, dv, wide)] * (carrier == number)
            for s, carrier in zip(shares, carriers, strict=True)
        ]
        if problem.cross:
            return section(problem.lens, q) + section(problem.kv_lens, kv)
        return section(problem.lens, [a + b for a, b in zip(q, kv, strict=True)])

    def output(with_stat: bool) -> tuple[Section, ...]:
        return section(
            problem.lens, [[("o", s.q_heads, dv, 1)] + [("stat", s.q_heads, 1, stat)] * with_stat for s in shares]
        )

    return Chunk(
        number=number,
        shares=shares,
        holders=first,
        senders=last,
        qkv=q_and_kv(first, 1),
        out=output(problem.return_lse),
        grad_out=output(problem.sends_delta),
        grad_qkv=q_and_kv(last, stat if shared else 1),
    )


_placed = lru_cache(maxsize=256)(_place)


def chunk_count(problem: Problem, asked: int) -> int:
    """In how many chunks a layer goes where `asked` are wanted: every rank needs a query head for each of them.

    A callable gets all heads at once.
    """
    if asked == 1 or problem.attention == "callable":
        return 1
    return min(asked, *(int(share.q_heads) for share in place(problem).shares))


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
        between=lambda a, b: block_size(section, batch, owner=b, source=a),
    )


def outbound(section: Section, batch: int, rank: int) -> Message:
    """Head layout to sequence layout: to every rank my heads of its tokens, from every rank its heads of my tokens."""
    lens, widths = section.lens, [row.width for row in section.rows]
    return Message(
        send=tuple(n * batch * widths[rank] for n in lens),
        receive=tuple(lens[rank] * batch * w for w in widths),
        land=tuple(n * batch * sum(widths[:rank]) for n in lens),
        between=lambda a, b: block_size(section, batch, owner=a, source=b),
    )


def block_size(section: Section, batch: int, owner: int, source: int) -> int:
    """Elements of the rows in which `owner` has its heads of the tokens of `source`'s shard."""
    return section.lens[source] * batch * section.rows[owner].width
