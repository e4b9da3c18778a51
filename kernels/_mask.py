"""Which pairs (query, key) are attended, which tiles hold any, and the order in which tiles are launched.

Positions count tokens of the whole sequence from 0. Dense: every key. Causal: query i attends the keys j <= i, also
when there are more keys than queries or fewer (top-left alignment, as in PyTorch's SDPA). Window: query i attends the
keys i - left <= j <= i + right; a causal window has right = 0.

A tile of queries x keys is *full* when every pair in it is attended, *partial* when some are; other tiles are skipped.
The kernels run one loop helper over the full tiles and again over the partial ones, where it asks `keep`. Those of a
causal mask lie on one side of the full ones, those of a window on both: the loop steps over the gap (`partial_tile`).

Worked example: causal, BLOCK_M = BLOCK_N = 64, S = Sk = 200. The queries 128..191 have the full key tiles 0 and 64
(`tile_range` -> 0, 128, 128, 192): in the tile at 128 `keep` decides. The keys 64..127 are read by the query tiles 64
(partial) and 128, 192 (full): `tile_range_keys` -> 128, 200, 64, 128. With the window (150, 0) the queries 128..191
attend the keys 0..191, those of the tile at 0 not all: `tile_range` -> 64, 128, 0, 128, and `partial_tile` puts the
partial tiles 0 and 64 at 0 and 128.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._views import Options


@triton.jit
def tile_range(
    i_m, S, Sk, left, right,
    IS_CAUSAL: tl.constexpr, IS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """For the query tile at `i_m`: where its full key tiles begin and end, then where its partial ones do.

    The partial ones of a window are counted without the full ones in their midst, as `partial_tile` takes them.
    """
    full = 0
    full_end = Sk // BLOCK_N * BLOCK_N
    begin = full_end
    end = Sk
    if IS_CAUSAL:
        full_end = tl.minimum(Sk, i_m + 1) // BLOCK_N * BLOCK_N
        begin = full_end
        end = tl.minimum(Sk, tl.minimum(S, i_m + BLOCK_M))
    if IS_WINDOW:
        last = tl.minimum(S, i_m + BLOCK_M) - 1
        first = tl.maximum(0, i_m - left)
        end = tl.minimum(Sk, last + right + 1)
        begin = tl.where(first < end, first // BLOCK_N * BLOCK_N, end)  # none behind the last key
        full = tl.minimum(tl.cdiv(tl.maximum(0, last - left), BLOCK_N) * BLOCK_N, end)
        full_end = tl.maximum(tl.minimum(Sk, i_m + right + 1) // BLOCK_N * BLOCK_N, full)  # none in a narrow window
        end -= full_end - full
    return full, full_end, begin, end


@triton.jit
def tile_range_keys(
    i_n, S, Sk, left, right,
    IS_CAUSAL: tl.constexpr, IS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """For the key tile at `i_n`: where its full query tiles begin and end, then where its partial ones do.

    Its last query tile may reach past S and still count as full: the loads there are masked, and so weigh nothing.
    """
    full = 0
    full_end = S
    begin = 0
    end = 0
    if IS_CAUSAL:
        begin = i_n // BLOCK_M * BLOCK_M
        full = tl.minimum(tl.cdiv(i_n + BLOCK_N - 1, BLOCK_M) * BLOCK_M, S)
        end = full
    if IS_WINDOW:
        last = tl.minimum(Sk, i_n + BLOCK_N) - 1
        first = tl.maximum(0, i_n - right)
        end = tl.minimum(S, last + left + 1)
        begin = tl.where(first < end, first // BLOCK_M * BLOCK_M, end)
        full = tl.minimum(tl.cdiv(tl.maximum(0, last - right), BLOCK_M) * BLOCK_M, end)
        full_end = i_n + left + 1
        full_end = tl.maximum(tl.where(full_end < S, full_end // BLOCK_M * BLOCK_M, S), full)
        end -= full_end - full
    return full, full_end, begin, end


@triton.jit
def partial_tile(i, full, full_end, IS_WINDOW: tl.constexpr):
    """Where the tile of a step lies that counts partial tiles only: those of a window go on behind its full ones."""
    if IS_WINDOW:
        i = tl.where(i < full, i, i + full_end - full)
    return i


@triton.jit
def keep(q_pos, kv_pos, Sk, left, right, IS_CAUSAL: tl.constexpr, IS_WINDOW: tl.constexpr):
    """Whether the pairs are attended; `q_pos` and `kv_pos` broadcast against each other."""
    kept = kv_pos < Sk
    if IS_CAUSAL:
        kept = kept & (kv_pos <= q_pos)
    if IS_WINDOW:
        kept = kept & (kv_pos >= q_pos - left) & (kv_pos <= q_pos + right)
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


def mask(options: Options, S: int, Sk: int) -> dict[str, Any]:
    """The mask as kernel arguments. A side without a bound gets one that no pair reaches."""
    left, right = options.bounds
    window = left >= 0 or right > 0
    return {
        "left": S if left < 0 else min(left, S),
        "right": Sk if right < 0 else min(right, Sk),
        "IS_CAUSAL": right == 0 and not window,
        "IS_WINDOW": window,
    }
