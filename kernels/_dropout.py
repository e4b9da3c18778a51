"""Dropout by counters: what becomes of a pair depends on (batch, head, query, key) and a seed, and on nothing else.

Philox-4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3, table 2): the
counter is (key, query, head, batch) in positions of the whole problem, the key is the seed. The first word of the
result, as a number from 0 to 2^32 - 1, is held against p 2^32. So the ranks, the tiles, forward and backward, and the
plain-torch twin below all drop the same pairs, in any order.

Worked example: p = 0.25 keeps a pair where its word is at least 2^30.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._views import Dropout

ROUNDS = tl.constexpr(7)
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


@triton.jit
def stays(i_b, i_head, q_pos, kv_pos, seed_low, seed_high, threshold):
    """Whether the pairs stay, `[q_pos and kv_pos broadcast]`; seed and threshold are 32-bit words as signed numbers."""
    x0 = kv_pos.to(tl.uint32, bitcast=True) + tl.zeros_like(q_pos).to(tl.uint32, bitcast=True)
    x1 = q_pos.to(tl.uint32, bitcast=True) + tl.zeros_like(kv_pos).to(tl.uint32, bitcast=True)
    x2 = tl.zeros_like(x0) + tl.cast(i_head, tl.uint32)
    x3 = tl.zeros_like(x0) + tl.cast(i_b, tl.uint32)
    key0 = tl.cast(seed_low, tl.int32).to(tl.uint32, bitcast=True)
    key1 = tl.cast(seed_high, tl.int32).to(tl.uint32, bitcast=True)
    m0 = tl.full(x0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(x0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high0 = tl.umulhi(m0, x0)
        high1 = tl.umulhi(m1, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, m1 * x2, high0 ^ x3 ^ key1, m0 * x0
        key0 += tl.full((), 0x9E3779B9, tl.uint32)
        key1 += tl.full((), 0xBB67AE85, tl.uint32)
    return x0 >= tl.cast(threshold, tl.int32).to(tl.uint32, bitcast=True)


def words(seed: int, batch: Tensor, head: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    """Twin of the random word of each pair, int64 0 .. 2^32 - 1; the arguments broadcast against each other."""
    x = [t.long() for t in torch.broadcast_tensors(kv_pos, q_pos, head, batch)]
    key = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(ROUNDS.value):
        low, high = zip(*(_product(m, t) for m, t in zip(MULTIPLIERS, x[::2], strict=True)), strict=True)
        x = [high[1] ^ x[1] ^ key[0], low[1], high[0] ^ x[3] ^ key[1], low[0]]
        key = [(k + w) & _WORD for k, w in zip(key, WEYL, strict=True)]
    return x[0]


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high word of a product of two words: int64 wraps, and so keeps all 64 bits."""
    product = b * a
    return product & _WORD, product >> 32 & _WORD


def arguments(dropout: Dropout | None) -> dict[str, int]:
    """Kernel arguments: all words as signed 32-bit numbers, so that one binary serves every seed."""
    if dropout is None:
        return {"seed_low": 0, "seed_high": 0, "threshold": 0}
    found = {"seed_low": dropout.seed, "seed_high": dropout.seed >> 32, "threshold": threshold(dropout.p)}
    return {name: ((word & _WORD) ^ (1 << 31)) - (1 << 31) for name, word in found.items()}


def threshold(p: float) -> int:
    """The least word that stays."""
    return min(_WORD, round(p * 2**32))
