"""Which pairs (query, key) are attended, which tiles hold any, and the order in which tiles are launched.

Positions count tokens of the whole sequence from 0, also where q and k hold a part of it (`rows_held`). Dense: every
key. Causal: query i attends the keys j <= i, also when there are more keys than queries or fewer (top-left alignment,
as in PyTorch's SDPA). Window: query i attends the keys i - left <= j <= i + right; a causal window has right = 0.
Documents: a query attends the keys of its own document only, and where documents begin at other positions among the
keys, i above is its place counted from there (`_documents`). A user's predicate is asked on top of these. Blocks: all
of these together, as lists of tiles made ahead (`_blocks`).

A tile of queries x keys is *full* when every pair in it is attended, *partial* when some are; other tiles are skipped.
The kernels run one loop helper over the full tiles and again over the partial ones, where it asks `keep`. Those of a
causal mask lie on one side of the full ones, those of a window or of documents on both: the loop steps over the gap
(`tile_at`). A predicate alone leaves no tile full, only a block mask built from it does.

Worked example: causal, BLOCK_M = BLOCK_N = 64, S = Sk = 200. The queries 128..191 have the full key tiles 0 and 64
(`tile_range` -> 0, 128, 128, 192): in the tile at 128 `keep` decides. The keys 64..127 are read by the query tiles 64
(partial) and 128, 192 (full): `tile_range_keys` -> 128, 200, 64, 128. With the window (150, 0) the queries 128..191
attend the keys 0..191, those of the tile at 0 not all: `tile_range` -> 64, 128, 0, 128, and `tile_at` puts the partial
tiles 0 and 64 at 0 and 128.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)  # of `Blocks`; a multiple of every BLOCK_M and BLOCK_N

# What the functions below take as `m`: (batch, B, S, Sk, left, right, documents, captured).


class Flags(NamedTuple):
    """Which options a kernel is compiled for: one constexpr. The predicate is apart, so that Triton sees its source."""

    causal: bool
    window: bool
    documents: bool
    blocks: bool
    predicate: bool
    softcap: bool
    alibi: bool
    dropout: bool
    part: bool

    @property
    def gaps(self) -> bool:
        """Whether partial tiles lie on both sides of the full ones."""
        return self.window or self.documents


@triton.jit
def rows_held(start, n_rows, n_keys, S, Sk, HAS: tl.constexpr):
    """The query in the first row of q, and how many rows q and k have."""
    if HAS.part:
        return start, n_rows, n_keys
    else:
        return 0, S, Sk


@triton.jit
def tokens(m, SIDE: tl.constexpr, o, n, HAS: tl.constexpr):
    """The document of each of the tokens `o` of a side, and its spot among the positions of the other side."""
    i_b, B, documents = m[0], m[1], m[6]
    doc = o
    spot = o
    if HAS.documents:
        ptrs = documents[SIDE] + i_b * n + o
        doc = tl.load(ptrs, mask=o < n, other=-1 - SIDE)
        spot = tl.load(ptrs + 4 * tl.cast(B, tl.int64) * n, mask=o < n, other=0)
    return doc, spot


@triton.jit
def _reach(m, SIDE: tl.constexpr, o, n, n_other, before, after):
    """From the first to the last token of the other side that any of `o` meets; and of those that all of `o` meet."""
    i_b, B, documents = m[0], m[1], m[6]
    plane = tl.cast(B, tl.int64) * n
    ptrs = documents[SIDE] + i_b * n + o
    inside = o < n
    spot = tl.load(ptrs + 4 * plane, mask=inside, other=0)
    begin = tl.maximum(tl.load(ptrs + plane, mask=inside, other=0), spot - before)
    stop = spot + after + 1
    end = tl.minimum(tl.load(ptrs + 2 * plane, mask=inside, other=0), stop)
    run_end = tl.minimum(tl.load(ptrs + 3 * plane, mask=inside, other=0), stop)
    some = inside & (begin < end)
    return (
        tl.min(tl.where(some, begin, n_other)),
        tl.max(tl.where(some, end, 0)),
        tl.max(tl.where(inside, begin, 0)),
        tl.min(tl.where(inside, run_end, n_other)),
    )


@triton.jit
def _listed(blocks, i_row):
    """The ranges of a list of blocks, counted in tokens of the list, and where it begins."""
    row = blocks[0] + i_row * 3
    start = tl.load(row)
    full = (tl.load(row + 1) - start) * BLOCK
    return full, (tl.load(row + 2) - start) * BLOCK, 0, full, blocks[1] + start


@triton.jit
def tile_range(
    i_m, i_row, m, blocks, HAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """For the query tile at `i_m`: where its full key tiles begin and end, then where its partial ones do.

    The partial ones of a window or of documents are counted without the full ones in their midst, as `tile_at` takes
    them. `i_row` is the row of `blocks`, where there are any; last comes where its list begins.
    """
    tiles_ptr = 0
    S, Sk, left, right = m[2], m[3], m[4], m[5]
    full = 0
    full_end = Sk // BLOCK_N * BLOCK_N
    begin = full_end
    end = Sk
    if HAS.documents:
        o_m = i_m + tl.arange(0, BLOCK_M)
        first, end, full, full_end = _reach(m, 0, o_m, S, Sk, left, right)
        begin = tl.where(first < end, first // BLOCK_N * BLOCK_N, end)
        full = tl.minimum(tl.cdiv(full, BLOCK_N) * BLOCK_N, end)
        full_end = tl.maximum(tl.minimum(full_end // BLOCK_N * BLOCK_N, end), full)
    elif HAS.window:
        last = tl.minimum(S, i_m + BLOCK_M) - 1
        first = tl.maximum(0, i_m - left)
        end = tl.minimum(Sk, last + right + 1)
        begin = tl.where(first < end, first // BLOCK_N * BLOCK_N, end)  # none behind the last key
        full = tl.minimum(tl.cdiv(tl.maximum(0, last - left), BLOCK_N) * BLOCK_N, end)
        full_end = tl.maximum(tl.minimum(Sk, i_m + right + 1) // BLOCK_N * BLOCK_N, full)  # none in a narrow window
    elif HAS.causal:
        full_end = tl.minimum(Sk, i_m + 1) // BLOCK_N * BLOCK_N
        begin = full_end
        end = tl.minimum(Sk, tl.minimum(S, i_m + BLOCK_M))
    if HAS.predicate:
        if not HAS.gaps:
            begin = 0
        full_end = full
    if HAS.gaps:
        end -= full_end - full
    if HAS.blocks:
        full, full_end, begin, end, tiles_ptr = _listed(blocks, i_row)
    return full, full_end, begin, end, tiles_ptr


@triton.jit
def tile_range_keys(
    i_n, i_row, m, blocks, HAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """For the key tile at `i_n`: where its full query tiles begin and end, then where its partial ones do.

    Its last query tile may reach past S and still count as full: the loads there are masked, and so weigh nothing.
    Listed blocks are those of all query heads of the kv head.
    """
    tiles_ptr = 0
    S, Sk, left, right = m[2], m[3], m[4], m[5]
    full = 0
    full_end = S
    begin = 0
    end = 0
    if HAS.documents:
        o_n = i_n + tl.arange(0, BLOCK_N)
        first, end, full, full_end = _reach(m, 1, o_n, Sk, S, right, left)
        begin = tl.where(first < end, first // BLOCK_M * BLOCK_M, end)
        full = tl.minimum(tl.cdiv(full, BLOCK_M) * BLOCK_M, end)
        full_end = tl.where(full_end < S, full_end // BLOCK_M * BLOCK_M, S)
        full_end = tl.maximum(tl.minimum(full_end, end), full)
    elif HAS.window:
        last = tl.minimum(Sk, i_n + BLOCK_N) - 1
        first = tl.maximum(0, i_n - right)
        end = tl.minimum(S, last + left + 1)
        begin = tl.where(first < end, first // BLOCK_M * BLOCK_M, end)
        full = tl.minimum(tl.cdiv(tl.maximum(0, last - right), BLOCK_M) * BLOCK_M, end)
        full_end = i_n + left + 1
        full_end = tl.maximum(tl.where(full_end < S, full_end // BLOCK_M * BLOCK_M, S), full)
    elif HAS.causal:
        begin = i_n // BLOCK_M * BLOCK_M
        full = tl.minimum(tl.cdiv(i_n + BLOCK_N - 1, BLOCK_M) * BLOCK_M, S)
        end = full
    if HAS.predicate:
        if not HAS.gaps:
            end = S
        full_end = full
    if HAS.gaps:
        end -= full_end - full
    if HAS.blocks:
        full, full_end, begin, end, tiles_ptr = _listed(blocks, i_row)
    return full, full_end, begin, end, tiles_ptr


@triton.jit
def within(full, full_end, begin, end, start, stop, HAS: tl.constexpr):
    """Of the ranges of `tile_range_keys`, what lies in the queries `start .. stop - 1`; lists hold no others."""
    if not HAS.blocks:
        if HAS.gaps:
            end += full_end - full
        full = tl.minimum(tl.maximum(full, start), stop)
        full_end = tl.minimum(tl.maximum(full_end, start), stop)
        begin = tl.minimum(tl.maximum(begin, start), stop)
        end = tl.minimum(tl.maximum(end, start), stop)
        if HAS.gaps:
            end -= full_end - full
    return full, full_end, begin, end


@triton.jit
def tile_at(i, full, full_end, tiles_ptr, MASKED: tl.constexpr, HAS: tl.constexpr):
    """Where the tile of a step lies: in the list, or for partial tiles behind the full ones in their midst."""
    if HAS.blocks:
        i = tl.load(tiles_ptr + i // BLOCK) * BLOCK + i - i // BLOCK * BLOCK
    elif MASKED and HAS.gaps:
        i = tl.where(i < full, i, i + full_end - full)
    return i


@triton.jit
def keep(m, i_head, q_pos, kv_pos, q_spot, q_doc, kv_doc, HAS: tl.constexpr, PREDICATE: tl.constexpr):
    """Whether the pairs are attended; what is of queries and what is of keys broadcasts against each other.

    `i_head` counts the model's heads. A predicate is never asked beyond the sequence, where captured tensors end.
    """
    i_b, S, Sk, left, right, captured = m[0], m[2], m[3], m[4], m[5], m[7]
    kept = kv_pos < Sk
    if HAS.causal:
        kept = kept & (kv_pos <= q_spot)
    if HAS.window:
        kept = kept & (kv_pos >= q_spot - left) & (kv_pos <= q_spot + right)
    if HAS.documents:
        kept = kept & (q_doc == kv_doc)
    if HAS.predicate:
        kept = kept & PREDICATE(i_b, i_head, tl.minimum(q_pos, S - 1), tl.minimum(kv_pos, Sk - 1), *captured)
    return kept


@triton.jit
def place(pid, n_tiles, n_heads, section, REVERSE: tl.constexpr):
    """Tile and head of a program: heavy tiles first, `section` heads side by side so that their rows stay in L2.

    Under a causal mask the last query tile and the first key tile are the heavy ones: query kernels pass REVERSE.
    """
    first = pid // (section * n_tiles) * section  # head with which this program's section begins
    width = tl.minimum(section, n_heads - first)
    local = pid - first * n_tiles
    i_tile = local // width
    if REVERSE:
        i_tile = n_tiles - 1 - i_tile
    return i_tile, first + local % width
