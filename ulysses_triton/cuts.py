"""How the work of attention is divided: every rank's pieces, chunk by chunk, and where heads are cut.

Where the ranks divide the query heads each gets as many. Otherwise the queries of all heads, head by head, are cut into
parts of equal work, at ends of tiles; what attends takes pieces of heads, or where it cannot, whole heads as they come.

Worked example: 3 heads of 1024 queries on 2 ranks, not causal: the cut is at query 512 of head 1, so rank 0 has the
pieces (head 0, 0..1024), (head 1, 0..512), and rank 1 (head 1, 512..1024), (head 2, 0..1024).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

from .spec import Problem

QUERY_TILE = 256  # tokens, from the first on: where heads are cut; a multiple of every kernel's tile of queries

OfChunks = list[tuple["Piece", ...]]  # a rank's pieces in every chunk


class Piece(NamedTuple):
    """What is attended to at once: some query heads for the queries `start .. stop`, and the kv heads that they attend.

    A kv head that other pieces of the rank attend as well is alone in its piece.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    start: int
    stop: int
    holder: int  # the chunk whose rows hold k and v, at most this one
    last: bool  # whether dk and dv leave with this piece; otherwise the next one adds to them

    @property
    def q_heads(self) -> int:
        return self.q_stop - self.q_start

    @property
    def kv_heads(self) -> int:
        return self.kv_stop - self.kv_start

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def pieces(problem: Problem) -> list[OfChunks]:
    """Every rank's pieces, chunk by chunk."""
    group = problem.heads // problem.kv_heads
    return _divided(problem, group) if divides(problem) else _cut(problem, group)


def divides(problem: Problem) -> bool:
    """Whether every rank gets as many query heads, for all tokens."""
    return problem.heads % problem.ranks == 0


def takes_pieces(problem: Problem) -> bool:
    """Whether what attends can be given some of a head's queries; PyTorch's kernel and a callable want all."""
    return problem.attention not in ("aten", "callable")


def _divided(problem: Problem, group: int) -> list[OfChunks]:
    """As many query heads for every rank, in as many parts, in order, none of which is empty."""
    each, chunks = problem.heads // problem.ranks, problem.chunks
    found = []
    for start in range(0, problem.heads, each):
        parts: OfChunks = []
        for (q_start, q_stop, kv_start, kv_stop), count in _by_kv_heads(start, start + each, group, chunks):
            first = len(parts)
            for a, b in pairwise(q_start + (q_stop - q_start) * i // count for i in range(count + 1)):
                last = len(parts) == first + count - 1
                parts.append((Piece(a, b, kv_start, kv_stop, 0, problem.seq, first, last),))
        found.append(parts)
    return found


def _by_kv_heads(start: int, stop: int, group: int, chunks: int) -> list[tuple[tuple[int, int, int, int], int]]:
    """Of some query heads: kv heads with theirs, and in how many chunks those go: more than one for one kv head alone.

    The first are query heads from, to, kv heads from, to.
    """
    kv_start, kv_stop = start // group, (stop - 1) // group + 1
    counts = [1] * min(chunks, kv_stop - kv_start)
    bounds = [kv_start + (kv_stop - kv_start) * c // len(counts) for c in range(len(counts) + 1)]
    parts = [(max(start, a * group), min(stop, b * group), a, b) for a, b in pairwise(bounds)]
    for _ in range(chunks - len(counts)):  # the kv head with most query heads per chunk gets the next
        largest = max(range(len(parts)), key=lambda j: (parts[j][1] - parts[j][0]) / counts[j])
        counts[largest] += 1
    return list(zip(parts, counts, strict=True))


class _Range(NamedTuple):
    """Query heads, and the queries of each."""

    q_start: int
    q_stop: int
    start: int
    stop: int


def _cut(problem: Problem, group: int) -> list[OfChunks]:
    """Parts of equal work for every rank, of queries head by head."""
    cuts = [divmod(at, problem.seq) for at in _cuts(problem)] if problem.seq else _whole_heads(problem)
    ranges = [_ranges(a, b, problem.seq) for a, b in pairwise([(0, 0), *cuts, (problem.heads, 0)])]
    by_rank = [ranges[r * problem.chunks : (r + 1) * problem.chunks] for r in range(problem.ranks)]
    return [_pieces(of_rank, group) for of_rank in by_rank]


def _ranges(begin: tuple[int, int], end: tuple[int, int], seq: int) -> list[_Range]:
    """What lies between two (head, query): the rest of a head, whole heads, and the beginning of one."""
    (head, query), (last, stop) = begin, end
    found = []
    if query and head < last:
        found.append(_Range(head, head + 1, query, seq))
        head, query = head + 1, 0
    if head < last:
        found.append(_Range(head, last, 0, seq))
    if query < stop and head <= last:
        found.append(_Range(last, last + 1, query, stop))
    return found


def _pieces(chunks: Sequence[Sequence[_Range]], group: int) -> list[tuple[Piece, ...]]:
    """A rank's pieces in each chunk: kv heads that several of them attend are alone in each."""
    uses = [(c, j) for c, ranges in enumerate(chunks) for r in ranges for j in _kv_heads(r, group)]
    first = {j: c for c, j in reversed(uses)}
    left = {j: sum(j == k for _, k in uses) for j in first}
    alone = {j for j, n in left.items() if n > 1}
    found = []
    for ranges in chunks:
        pieces = []
        for r in ranges:
            for key, run in groupby(_kv_heads(r, group), key=lambda j: j if j in alone else -1):
                kv = list(run)
                if key >= 0:
                    left[key] -= 1
                q_start, q_stop = max(r.q_start, kv[0] * group), min(r.q_stop, (kv[-1] + 1) * group)
                last = key < 0 or left[key] == 0
                pieces.append(Piece(q_start, q_stop, kv[0], kv[-1] + 1, r.start, r.stop, first[kv[0]], last))
        found.append(tuple(pieces))
    return found


def _kv_heads(r: _Range, group: int) -> range:
    return range(r.q_start // group, (r.q_stop - 1) // group + 1)


# -- where


def _cuts(problem: Problem) -> Sequence[int]:
    """Where parts end, as numbers of queries in the order of the heads: between ranks, and between chunks of a rank."""
    if not takes_pieces(problem):
        return [head * problem.seq for head, _ in _whole_heads(problem)]
    return problem.cuts or cuts(problem, _work(problem.seq, problem.kv_seq, problem.bounds))


def _whole_heads(problem: Problem) -> list[tuple[int, int]]:
    parts = problem.ranks * problem.chunks
    return [((2 * problem.heads * i + parts) // (2 * parts), 0) for i in range(1, parts)]


def cuts(problem: Problem, work: Sequence[int]) -> tuple[int, ...]:
    """Where parts of equal work end, as numbers of queries in the order of the heads; at tiles' ends.

    `work` sums up: its n-th number is the work of the first n tiles of queries, of one head or of all of them in order.
    """
    parts, tiles = problem.ranks * problem.chunks, tile_count(problem)
    of_one = len(work) == tiles + 1
    total = work[-1] * (problem.heads if of_one else 1)
    if total == 0:  # nothing attends anything: parts of as many tiles
        work, of_one, total = range(tiles + 1), True, tiles * problem.heads
    found = []
    for i in range(1, parts):
        head, rest = divmod(total * i // parts, work[-1])  # of all heads in order: head is 0
        tile = bisect_left(work, rest)
        if tile and rest - work[tile - 1] < work[tile] - rest:
            tile -= 1
        head, tile = divmod(head * tiles + tile, tiles)
        found.append(head * problem.seq + min(tile * QUERY_TILE, problem.seq))
    return tuple(found)


def tile_count(problem: Problem) -> int:
    """The tiles of queries of one head."""
    return -(-problem.seq // QUERY_TILE)


@lru_cache(maxsize=64)
def _work(seq: int, kv_seq: int, bounds: tuple[int, int]) -> tuple[int, ...]:
    """The pairs that the first 0, 1, 2... tiles of queries attend."""
    return tuple(pairs(min(n, seq), kv_seq, *bounds) for n in range(0, seq + QUERY_TILE, QUERY_TILE))


def pairs(queries: int, keys: int, left: int, right: int) -> int:
    """How many (query i, key j) there are with i - left <= j <= i + right; -1 is no bound.

    Example: of 3 queries and 3 keys, causal (left -1, right 0): 6.
    """

    def below(offset: int) -> int:
        """Pairs with j < i + offset: the sum of i + offset over the queries, each between 0 and `keys`."""

        def until(stop: int) -> int:
            top = max(0, min(stop, keys + 1))
            return top * (top - 1) // 2 + max(0, stop - top) * keys

        return until(queries + offset) - until(offset)

    upper = queries * keys if right < 0 else below(right + 1)
    return upper - (0 if left < 0 else below(-left))
