"""How evenly placements spread the work of attention: pure functions, over every number of heads and ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from ulysses_triton.balance import block_work, document_work
from ulysses_triton.cuts import QUERY_TILE, cuts, pairs
from ulysses_triton.kernels._views import CUT
from ulysses_triton.placement import place
from ulysses_triton.spec import Problem

PLAIN = Problem(
    batch=1, lens=(), kv_lens=(), heads=1, kv_heads=1, head_dim=64, value_dim=64, dtype="bfloat16", device="cuda",
    causal=True, scale=0.125, attention="triton",
)  # fmt: skip


def problem(heads: int, ranks: int, tiles: int, **changes: object) -> Problem:
    S = tiles * QUERY_TILE
    lens = tuple(S * (r + 1) // ranks - S * r // ranks for r in range(ranks))
    return replace(PLAIN, lens=lens, kv_lens=lens, heads=heads, kv_heads=heads, **changes)


def excess(p: Problem, work: Sequence[int]) -> float:
    """By how much the largest rank's work is above the mean; `work` sums up one head's tiles."""

    def until(token: int) -> int:
        return work[-(-token // QUERY_TILE)]

    placement = place(p)
    of_ranks = [
        sum(s.q_heads * (until(s.stop) - until(s.start)) for chunk in placement.chunks for s in chunk.pieces[rank])
        for rank in range(p.ranks)
    ]
    assert sum(of_ranks) == p.heads * work[-1]
    return max(of_ranks) / (sum(of_ranks) / p.ranks) - 1


@cache
def causal_work(tiles: int) -> list[int]:
    S = tiles * QUERY_TILE
    return [pairs(n * QUERY_TILE, S, -1, 0) for n in range(tiles + 1)]


@pytest.mark.parametrize("heads", range(1, 65))
def test_causal_work_is_within_3_percent_of_the_mean_on_every_number_of_ranks(heads):
    for ranks in range(1, 65):
        tiles = -(-128 * max(ranks, heads) // heads)  # 128 x max(1, P / Hq)
        assert excess(problem(heads, ranks, tiles), causal_work(tiles)) <= 0.03, (heads, ranks)


@pytest.mark.parametrize("seed", range(20))
def test_packed_documents_are_within_10_percent(seed):
    draw = random.Random(seed)
    for _ in range(10):
        heads, ranks = draw.randint(1, 64), draw.randint(1, 64)
        tiles = -(-128 * max(ranks, heads) // heads)
        S = tiles * QUERY_TILE
        offsets = sorted([0, *(draw.randrange(S) for _ in range(draw.randint(0, 60))), S])
        causal = draw.random() < 0.7
        p = problem(heads, ranks, tiles, causal=causal, documents=True)
        work = document_work(S, offsets, offsets, p.bounds)
        assert excess(replace(p, cuts=cuts(p, work)), work) <= 0.10, (heads, ranks, offsets)


def test_the_work_of_documents_and_blocks_is_what_a_mask_leaves():
    assert document_work(512, [0, 300, 512], [0, 300, 512], (-1, -1)) == (0, 256 * 300, 300**2 + 212**2)
    draw = random.Random(7)
    for bounds in ((-1, -1), (-1, 0), (100, 0), (40, 70)):
        S, Sk = 900, 700
        q_offsets, k_offsets = (sorted([0, *(draw.randrange(n) for _ in range(5)), n]) for n in (S, Sk))
        q_doc, k_doc = (
            torch.repeat_interleave(torch.arange(6), torch.tensor(x).diff()) for x in (q_offsets, k_offsets)
        )
        q_pos, k_pos = (
            torch.arange(n) - torch.tensor(x)[doc] for n, x, doc in ((S, q_offsets, q_doc), (Sk, k_offsets, k_doc))
        )
        away = k_pos[None] - q_pos[:, None]
        kept = q_doc[:, None] == k_doc[None]
        left, right = bounds
        kept &= (away <= right if right >= 0 else True) & (away >= -left if left >= 0 else torch.tensor(True))
        sums = kept.sum(1).cumsum(0)
        expected = (0, *(int(sums[min(n, S) - 1]) for n in range(QUERY_TILE, S + QUERY_TILE, QUERY_TILE)))
        assert document_work(S, q_offsets, k_offsets, bounds) == expected


def test_a_block_mask_weighs_heads_apart():
    p = problem(3, 2, 4, causal=False)
    status = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    status[:, 0] = 2
    status[:, 1, :, :2] = 1
    work = block_work(p, status, None)
    assert work == (0, 16, 32, 48, 64, 68, 72, 76, 80, 80, 80, 80, 80)
    assert cuts(p, work) == (3 * QUERY_TILE,)  # 40 of 80 blocks: 32 or 48 are as near
    assert cuts(replace(p, causal=True), block_work(replace(p, causal=True), status, None))[0] < 4 * QUERY_TILE


def test_nothing_to_attend_is_spread_by_tiles():
    p = problem(3, 2, 4)
    assert cuts(p, [0] * 5) == (6 * QUERY_TILE,)


def test_kernels_are_cut_where_placements_cut():
    assert CUT == QUERY_TILE
