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

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from .spec import Problem

ROW_MULTIPLE = 16  # elements: every row starts at a multiple of 16 bytes or more, so vector accesses stay aligned
HEAD_MULTIPLE = 8  # elements, for every head likewise
QUERY_TILE = 256  # tokens, from the first on: where heads are cut; a multiple of every kernel's tile of queries


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

    def results(self, rank: int, source: int) -> int:
        """How many outputs a rank computes of the tokens of `source`: one for each token and head."""
        pieces = zip(self.pieces[rank], self.out, strict=False)
        return sum(piece.q_heads * section.overlap(rank, source)[1] for piece, section in pieces)


@dataclass(frozen=True)
class Placement:
    """Every rank's heads, and the chunks that its work goes in: as many on every rank."""

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
    if not divides(problem) and not problem.concrete:  # where heads are cut follows from the lengths: no symbols
        lens, kv_lens = (tuple(int(n) for n in given) for given in (problem.lens, problem.kv_lens))
        problem = replace(problem, lens=lens, kv_lens=kv_lens, batch=int(problem.batch))
    return _placed(problem) if problem.concrete else _place(problem)


def divides(problem: Problem) -> bool:
    """Whether every rank gets as many query heads, for all tokens."""
    return problem.heads % problem.ranks == 0


def _place(problem: Problem) -> Placement:
    group = problem.heads // problem.kv_heads
    parts = _divided(problem, group) if divides(problem) else _cut(problem, group)
    shares = tuple(_share([piece for pieces in of_rank for piece in pieces]) for of_rank in parts)
    working = [share for share in shares if share.q_heads]
    shared = any(a.kv_stop > b.kv_start for a, b in pairwise(working))
    keys = [_keys(problem, of_rank) for of_rank in parts]
    by_chunk = enumerate(zip(*parts, strict=True))
    return Placement(shares, group, shared, tuple(_chunk(problem, c, pieces, keys, shared) for c, pieces in by_chunk))


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


# -- every rank's pieces, chunk by chunk


def _divided(problem: Problem, group: int) -> list[list[tuple[Piece, ...]]]:
    """As many query heads for every rank, in as many parts, in order, none of which is empty."""
    each, chunks = problem.heads // problem.ranks, problem.chunks
    found = []
    for start in range(0, problem.heads, each):
        share = Share(start, start + each, start // group, (start + each - 1) // group + 1)
        parts: list[tuple[Piece, ...]] = []
        for heads, count in _by_kv_heads(share, group, chunks):
            first = len(parts)
            for a, b in pairwise(heads.q_start + heads.q_heads * i // count for i in range(count + 1)):
                last = len(parts) == first + count - 1
                parts.append((Piece(a, b, heads.kv_start, heads.kv_stop, 0, problem.seq, first, last),))
        found.append(parts)
    return found


def _by_kv_heads(share: Share, group: int, chunks: int) -> list[tuple[Share, int]]:
    """Some kv heads of a share with their query heads, and in how many chunks those go: more than one for one alone."""
    counts = [1] * min(chunks, share.kv_heads)
    cuts = [share.kv_start + share.kv_heads * c // len(counts) for c in range(len(counts) + 1)]
    parts = [
        Share(max(share.q_start, start * group), min(share.q_stop, stop * group), start, stop)
        for start, stop in pairwise(cuts)
    ]
    for _ in range(chunks - len(counts)):  # the kv head with most query heads per chunk gets the next
        largest = max(range(len(parts)), key=lambda j: parts[j].q_heads / counts[j])
        counts[largest] += 1
    return list(zip(parts, counts, strict=True))


class _Range(NamedTuple):
    """Query heads, and the queries of each."""

    q_start: int
    q_stop: int
    start: int
    stop: int


def _cut(problem: Problem, group: int) -> list[list[tuple[Piece, ...]]]:
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


# -- where the work is cut


def _cuts(problem: Problem) -> Sequence[int]:
    """Where parts end, as numbers of queries in the order of the heads: between ranks, and between chunks of a rank."""
    if not takes_pieces(problem):
        return [head * problem.seq for head, _ in _whole_heads(problem)]
    return problem.cuts or cuts(problem, _work(problem.seq, problem.kv_seq, problem.bounds))


def _whole_heads(problem: Problem) -> list[tuple[int, int]]:
    parts = problem.ranks * problem.chunks
    return [((2 * problem.heads * i + parts) // (2 * parts), 0) for i in range(1, parts)]


def takes_pieces(problem: Problem) -> bool:
    """Whether what attends can be given some of a head's queries; PyTorch's kernel and a callable want all."""
    return problem.attention not in ("aten", "callable")


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


# -- sections


def _chunk(
    problem: Problem, number: int, pieces: Sequence[tuple[Piece, ...]], keys: Sequence[int], shared: bool
) -> Chunk:  # fmt: skip
    """The chunk of these pieces of every rank."""
    d, dv, stat = problem.head_dim, problem.value_dim, problem.stat_width
    whole = divides(problem) or not takes_pieces(problem) or problem.seq == 0
    slots = 1 if whole else max(1, *map(len, pieces))
    held = tuple(_kv_range([p for p in of_rank if p.holder == number]) for of_rank in pieces)
    sent = tuple(_kv_range([p for p in of_rank if p.last]) for of_rank in pieces)

    def of_queries(fields: Sequence[tuple[str, int, int]], more: Sequence[list[_Entry]] = ()) -> tuple[Section, ...]:
        """A section for every slot; `more` lies behind it in the rows of the only one."""
        found = []
        for slot in range(slots):
            mine = [of_rank[slot : slot + 1] for of_rank in pieces]
            heads = [sum(p.q_heads for p in some) for some in mine]
            rows: list[list[_Entry]] = [[(name, n, dim, width) for name, dim, width in fields] for n in heads]
            rows = [a + b for a, b in zip(rows, more, strict=True)] if more else rows
            ranges = None if whole else tuple((p[0].start, p[0].stop) if p else (0, 0) for p in mine)
            found.append(Section(problem.lens, tuple(map(_row, rows)), ranges))
        return tuple(found)

    def q_and_kv(carried: Sequence[range], wide: int) -> tuple[Section, ...]:
        kv = [[("k", len(heads), d, wide), ("v", len(heads), dv, wide)] * bool(heads) for heads in carried]
        if whole and not problem.cross:
            return of_queries([("q", d, 1)], kv)
        ranges = None if whole else tuple((0, n * bool(heads)) for n, heads in zip(keys, carried, strict=True))
        of_keys = (Section(problem.kv_lens, tuple(map(_row, kv)), ranges),) if any(kv) else ()
        return of_queries([("q", d, 1)]) + of_keys

    def output(with_stat: bool) -> tuple[Section, ...]:
        return of_queries([("o", dv, 1), *[("stat", 1, stat)] * with_stat])

    return Chunk(
        number=number,
        pieces=tuple(pieces),
        held=held,
        sent=sent,
        qkv=q_and_kv(held, 1),
        out=output(problem.return_lse),
        grad_out=output(problem.sends_delta),
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


_Entry = tuple[str, int, int, int]  # of a row: name, heads, dim, width


def _row(parts: list[_Entry]) -> Row:
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
