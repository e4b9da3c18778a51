"""Which rank works on which heads and queries, and what therefore lies in its rows and travels in its messages.

Pure functions of the problem. Where the ranks divide the query heads, a rank takes `Hq / P` of them in order and the kv
heads that those attend to; with `Hkv < P` neighbouring ranks share a kv head, and each receives it.

Example: Hq = 12, Hkv = 4, P = 6. Rank 1 has query heads 2 and 3; three query heads share a kv head, so it works with kv
heads 0 and 1. Its row on the way in, D = Dv = 64: `q2 q3 k0 k1 v0 v1`, 384 elements. With D = 33 every head of q and k
takes 40, of which the last 7 are never read: heads begin at multiples of 8 elements, so vector accesses stay aligned.

Otherwise the queries of all heads, head by head, are cut into P parts of equal work, and a head that a cut falls into
is shared: each of its ranks takes a contiguous range of its queries, and k and v as far as those attend them.

Example: Hq = 3, Hkv = 3, P = 2, not causal. Rank 0 has the *pieces* head 0 with all queries and head 1 with the first
half of them; rank 1 has the second half of head 1, and head 2. Each receives two kv heads. The n-th pieces of all ranks
are a section of messages, k and v are another.

A rank's work can go in chunks, so that the exchange of one hides behind the attention of another. A chunk is a part of
the rank's kv heads with all their query heads, where there are enough of them. Otherwise chunks share a kv head and
split its query heads; its k and v then travel with the first of these chunks, its dk and dv with the last.

Example: in 2 chunks, the rank with the query heads 0..7 and the kv heads 0 and 1 has the rows `q0 q1 q2 q3 k0 v0` and
`q4 q5 q6 q7 k1 v1`. In 3 they are `q0 q1 k0 v0`, `q2 q3` (which attend to the k0 and v0 of the chunk before) and
`q4 q5 q6 q7 k1 v1`, and dk0 and dv0 travel with dq2 and dq3. Where heads are shared the chunks are parts of equal work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

from .cuts import Piece, divides, pieces, takes_pieces, tile_count
from .messages import Entry, Section, row_of
from .spec import Problem


class Share(NamedTuple):
    """One rank's heads: query heads `q_start .. q_stop`, kv heads `kv_start .. kv_stop`, those that it shares too."""

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


class Heads(NamedTuple):
    """Numbers of the model's heads, in the order in which they lie side by side."""

    q: tuple[int, ...]
    kv: tuple[int, ...]


class Chunk(NamedTuple):
    """What is exchanged at once: a part of every rank's work, and the sections of its four exchanges.

    The n-th section holds every rank's n-th piece, the last one also k and v; of a kind that no rank has heads for
    there is no section: k and v of other tokens than q, where an earlier chunk has them.
    """

    number: int
    pieces: tuple[tuple[Piece, ...], ...]  # of every rank
    held: tuple[range, ...]  # of every rank: the kv heads whose k and v travel with this chunk
    sent: tuple[range, ...]  # and those whose gradients do
    qkv: tuple[Section, ...]
    out: tuple[Section, ...]
    grad_out: tuple[Section, ...]
    grad_qkv: tuple[Section, ...]

    @property
    def heads(self) -> Heads:
        """Those that any rank's rows hold on the way in, each once."""
        q = {h for of_rank in self.pieces for piece in of_rank for h in range(piece.q_start, piece.q_stop)}
        return Heads(tuple(sorted(q)), tuple(sorted({h for held in self.held for h in held})))

    @property
    def returned(self) -> Heads:
        """Those that any rank's rows hold as gradients, each once."""
        return Heads(self.heads.q, tuple(sorted({h for sent in self.sent for h in sent})))

    def results(self, rank: int, source: int) -> int:
        """How many outputs a rank computes of the tokens of `source`: one for each token and head."""
        pieces = zip(self.pieces[rank], self.out, strict=False)
        return sum(piece.q_heads * section.overlap(rank, source)[1] for piece, section in pieces)


class Return(NamedTuple):
    """What can be unpacked once the gradients of a chunk, and of all chunks before it, have come back."""

    heads: Heads  # whose gradients are whole now, and were not before
    done: tuple[int, ...]  # the chunks of which nothing is needed any more then


@dataclass(frozen=True)
class Placement:
    """Every rank's heads, and the chunks that its work goes in: as many on every rank."""

    shares: tuple[Share, ...]
    heads: tuple[int, int]  # of the model: query heads, kv heads
    group: int  # G: query heads per kv head
    shared: bool  # whether some kv head is worked on by more than one rank
    chunks: tuple[Chunk, ...]

    def last_reads(self, rank: int, c: int) -> list[int]:
        """The chunks whose q, k and v a rank needs for its chunk c, and for none after it."""
        readers = {b: b for b in range(len(self.chunks))}
        readers |= {piece.holder: b for b, chunk in enumerate(self.chunks) for piece in chunk.pieces[rank]}
        return [b for b, last in readers.items() if last == c]

    @cached_property
    def returns(self) -> tuple[Return, ...]:
        """Of every chunk, what its gradients make whole; heads that no chunk sends count to the last one."""
        chunks = range(len(self.chunks))
        q, kv = whole = [dict.fromkeys(range(n), chunks[-1]) for n in self.heads]  # by which chunk a head is whole
        for chunk in self.chunks:
            for by_head, heads in zip(whole, chunk.returned, strict=True):
                by_head |= dict.fromkeys(heads, chunk.number)
        ends = [
            max([q[h] for h in chunk.returned.q] + [kv[h] for h in chunk.returned.kv], default=chunk.number)
            for chunk in self.chunks
        ]
        found = []
        for c in chunks:
            now = (tuple(h for h, when in by_head.items() if when == c) for by_head in whole)
            found.append(Return(Heads(*now), tuple(b for b in chunks if ends[b] == c)))
        return tuple(found)

    def head_offset(self, rank: int) -> int:
        """The place of a rank's first query head inside its kv group."""
        return self.shares[rank].q_start % self.group

    def kv_head_of(self, rank: int) -> list[int]:
        """Which of a rank's own kv heads each of its own query heads attends to."""
        return [(h + self.head_offset(rank)) // self.group for h in range(self.shares[rank].q_heads)]

    def explain(self) -> str:
        """One line per rank: its heads and queries, what its rows take, its chunks; then how much travels in all."""
        lines = [self._line(rank) for rank in range(len(self.shares))]
        return "\n".join([*lines, self._volume()])

    def _line(self, rank: int) -> str:
        pieces = [[_words(piece) for piece in chunk.pieces[rank]] for chunk in self.chunks]
        if not any(pieces):
            return f"rank {rank}: no work"
        s = self.shares[rank]
        inward, outward = (self._elements(rank, name) for name in ("qkv", "out"))
        parts = f", chunks of {'; '.join(', '.join(words) or 'nothing' for words in pieces)}" * (len(pieces) > 1)
        queries = f"query heads {s.q_start}..{s.q_stop - 1}" if len(pieces) > 1 else ", ".join(pieces[0])
        return (
            f"rank {rank}: {queries}, kv heads {s.kv_start}..{s.kv_stop - 1}, "
            f"{inward} elements in, {outward} out{parts}"
        )

    def _elements(self, rank: int, name: str) -> int:
        sections = [section for chunk in self.chunks for section in getattr(chunk, name)]
        return sum(section.tokens(rank) * section.rows[rank].width for section in sections)

    def _volume(self) -> str:
        inward, outward = (sum(self._elements(r, name) for r in range(len(self.shares))) for name in ("qkv", "out"))
        return (
            f"in all {inward} elements in and {outward} out per batch entry: q and o once, a kv head once per rank "
            "that works on it"
        )


def _words(piece: Piece) -> str:
    heads = f"query head {piece.q_start}" if piece.q_heads == 1 else f"query heads {piece.q_start}..{piece.q_stop - 1}"
    return f"{heads} from {piece.start} to {piece.stop}"


def place(problem: Problem) -> Placement:
    """The placement of a problem on its `len(lens)` ranks."""
    if not divides(problem) and not problem.concrete:  # where heads are cut follows from all lengths
        problem = problem.as_numbers()
    return _placed(problem) if problem.concrete else _place(problem)


def _place(problem: Problem) -> Placement:
    group = problem.heads // problem.kv_heads
    parts = pieces(problem)
    shares = tuple(_share([piece for pieces in of_rank for piece in pieces]) for of_rank in parts)
    working = [share for share in shares if share.q_heads]
    shared = any(a.kv_stop > b.kv_start for a, b in pairwise(working))
    keys = [_keys(problem, of_rank) for of_rank in parts]
    by_chunk = enumerate(zip(*parts, strict=True))
    chunks = tuple(_chunk(problem, c, pieces, keys, shared) for c, pieces in by_chunk)
    return Placement(shares, (problem.heads, problem.kv_heads), group, shared, chunks)


def _share(pieces: Sequence[Piece]) -> Share:
    if not pieces:
        return Share(0, 0, 0, 0)
    return Share(pieces[0].q_start, pieces[-1].q_stop, pieces[0].kv_start, pieces[-1].kv_stop)


def _keys(problem: Problem, of_rank: Sequence[Sequence[Piece]]) -> int:
    """How many keys a rank needs, from the first on: as far as any of its queries may attend."""
    stop = max((piece.stop for pieces in of_rank for piece in pieces), default=0)
    right = problem.bounds[1]
    if divides(problem) or right < 0 or stop == problem.seq or (problem.documents and problem.cross):
        return problem.kv_seq if divides(problem) or stop else 0
    return min(problem.kv_seq, stop + right)


def _chunk(
    problem: Problem, number: int, pieces: Sequence[tuple[Piece, ...]], keys: Sequence[int], shared: bool
) -> Chunk:  # fmt: skip
    """The chunk of these pieces of every rank."""
    d, dv, stat = problem.head_dim, problem.value_dim, problem.stat_width
    whole = divides(problem) or not takes_pieces(problem) or problem.seq == 0
    slots = 1 if whole else max(1, *map(len, pieces))
    held = tuple(_kv_range([p for p in of_rank if p.holder == number]) for of_rank in pieces)
    sent = tuple(_kv_range([p for p in of_rank if p.last]) for of_rank in pieces)

    def of_queries(fields: Sequence[tuple[str, int, int]], more: Sequence[list[Entry]] = ()) -> tuple[Section, ...]:
        """A section for every slot; `more` lies behind it in the rows of the only one."""
        found = []
        for slot in range(slots):
            mine = [of_rank[slot : slot + 1] for of_rank in pieces]
            heads = [sum(p.q_heads for p in some) for some in mine]
            rows: list[list[Entry]] = [[(name, n, dim, width) for name, dim, width in fields] for n in heads]
            rows = [a + b for a, b in zip(rows, more, strict=True)] if more else rows
            ranges = None if whole else tuple((p[0].start, p[0].stop) if p else (0, 0) for p in mine)
            found.append(Section(problem.lens, tuple(map(row_of, rows)), ranges))
        return tuple(found)

    def q_and_kv(carried: Sequence[range], wide: int) -> tuple[Section, ...]:
        kv = [[("k", len(heads), d, wide), ("v", len(heads), dv, wide)] * bool(heads) for heads in carried]
        if whole and not problem.cross:
            return of_queries([("q", d, 1)], kv)
        ranges = None if whole else tuple((0, n * bool(heads)) for n, heads in zip(keys, carried, strict=True))
        of_keys = (Section(problem.kv_lens, tuple(map(row_of, kv)), ranges),) if any(kv) else ()
        return of_queries([("q", d, 1)]) + of_keys

    def output(with_stat: bool, again: bool = False) -> tuple[Section, ...]:
        return of_queries([("o", dv, 1), *[("again", dv, 1)] * again, *[("stat", 1, stat)] * with_stat])

    return Chunk(
        number=number,
        pieces=tuple(pieces),
        held=held,
        sent=sent,
        qkv=q_and_kv(held, 1),
        out=output(problem.return_lse),
        grad_out=output(problem.sends_delta, problem.sends_output),
        grad_qkv=q_and_kv(sent, stat if shared else 1),
    )


def _kv_range(pieces: Sequence[Piece]) -> range:
    return range(pieces[0].kv_start, pieces[-1].kv_stop) if pieces else range(0)


_placed = lru_cache(maxsize=256)(_place)


def chunk_count(problem: Problem, asked: int) -> int:
    """In how many chunks a layer goes where `asked` are wanted: every rank needs a query head for each of them.

    Where heads are shared, a tile of queries. A callable gets all heads at once, and so do projections then.
    """
    if asked == 1 or problem.attention == "callable":
        return 1
    if divides(problem):
        return min(asked, problem.heads // problem.ranks)
    if not takes_pieces(problem) or problem.projects or problem.projects_out:
        return 1
    return max(1, min(asked, problem.heads * int(tile_count(problem)) // problem.ranks))
