"""Which pairs (query, key) are attended, which tiles hold any, and the order in which tiles are launched.

Positions count tokens of the whole sequence from 0. Dense: every key. Causal: query i attends the keys j <= i, also
when there are more keys than queries or fewer (top-left alignment, as in PyTorch's SDPA).

A tile of queries x keys is *full* when every pair in it is attended, *partial* when some are; other tiles are skipped.
The kernels run one loop helper over the full tiles and again over the partial ones, where it asks `keep`.

Worked example: causal, BLOCK_M = BLOCK_N = 64, S = Sk = 200. The queries 128..191 have the full key tiles 0 and 64
(`tile_range` -> 128, 192): in the tile at 128 `keep` decides. The keys 64..127 are read by the query tiles 64 (partial)
and 128, 192 (full): `tile_range_keys` -> 64, 128.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_range(i_m, S, Sk, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For the query tile at `i_m`: where its full key tiles end, and where its key tiles end (partial ones last)."""
    full = Sk
    end = Sk
    if IS_CAUSAL:
        full = tl.minimum(Sk, i_m + 1)
        end = tl.minimum(Sk, tl.minimum(S, i_m + BLOCK_M))
    return full // BLOCK_N * BLOCK_N, end


@triton.jit
def tile_range_keys(i_n, S, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For the key tile at `i_n`: where its query tiles begin (partial ones first), and where its full ones begin.

    Its last query tile may reach past S and still count as full: the loads there are masked, and so weigh nothing.
    """
    begin = 0
    full = 0
    if IS_CAUSAL:
        begin = i_n // BLOCK_M * BLOCK_M
        full = tl.minimum(tl.cdiv(i_n + BLOCK_N - 1, BLOCK_M) * BLOCK_M, S)
    return begin, full


@triton.jit
def keep(q_pos, kv_pos, Sk, IS_CAUSAL: tl.constexpr):
    """Whether the pairs are attended; `q_pos` and `kv_pos` broadcast against each other."""
    kept = kv_pos < Sk
    if IS_CAUSAL:
        kept = kept & (kv_pos <= q_pos)
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
