"""With recompute="exchange" a layer holds a few chunks of its rows, however many chunks there are; and stays right."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layer import Case, check, joined, run

from ulysses_triton import UlyssesGroup, ulysses_attention
from ulysses_triton.group import run_virtual

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benches are in no package that is installed

from bench._held import watch  # noqa: E402

sys.path.remove(str(ROOT))  # where `kernels` would pass for another project's package

RANKS, TOKENS, HEADS, DIM = 2, 512, 8, 32  # HEADS on every rank; fp32
CHUNKS = (1, 2, 4, 8)
HEAD = TOKENS * DIM * 4  # bytes of one head in head layout, and of HEAD / RANKS x RANKS heads in sequence layout
LSE = TOKENS * HEADS * 4
SLACK = 4096  # bytes that regions of a buffer may be apart


def layer(group: UlyssesGroup, kv_heads: int, attention: str) -> int:
    """Forward and backward; the bytes that the group's pool has then, in use or waiting."""
    shape = (1, TOKENS // RANKS)
    q = torch.randn(*shape, HEADS * RANKS, DIM, requires_grad=True)
    k, v = (torch.randn(*shape, kv_heads, DIM, requires_grad=True) for _ in range(2))
    window = None if attention == "aten" else (31, 0)
    out = ulysses_attention(q, k, v, group, window=window, causal=True, attention=attention, recompute="exchange")
    out.backward(torch.ones_like(out))
    return group.pool.held + group.pool.free


def held_by(ctx, exchange, kv_heads, attention):
    found = []
    for chunks in CHUNKS:
        with watch() as held, UlyssesGroup(ctx.group, exchange=exchange, chunks=chunks) as group:
            waiting = layer(group, kv_heads, attention)
        found.append((chunks, held[ctx.rank, "forward"], held[ctx.rank, "backward"], waiting))
    return found


def bounds(chunks: int, kv_heads: int, attention: str, one_sided: bool) -> tuple[int, int]:
    """Bytes of rows in a forward and a backward, at most.

    Of a chunk: `q` is what its query heads take, `kv` its k and v, `do` what comes with dO: delta, or for aten O.
    Received rows of the chunk that is attended and of the next one are there, and over a process group what is sent of
    them until it has arrived; and the results of two chunks, which are under way. Where all chunks have one kv head,
    the first one's rows stay, and dk and dv are summed in buffers of their own.
    """
    heads = HEADS // chunks
    q, do = heads * HEAD, TOKENS * (2 * heads * DIM if attention == "aten" else -(-heads * (DIM + 1) // 16) * 16) * 4
    if kv_heads > 1:
        kv = 2 * HEAD * max(1, kv_heads // RANKS // chunks)
        split = chunks > kv_heads // RANKS  # chunks share a kv head
    else:
        kv, split = 2 * HEAD, chunks > 1
    stays = split * (q + kv)
    sums = split * 2 * kv
    if chunks == 1:
        forward, backward = (
            (q + kv, 2 * (q + kv) + do)
            if one_sided
            else (q + kv + max(q + kv, 2 * q), 2 * (q + kv) + do + max(q + kv, do))
        )
    elif one_sided:
        forward, backward = 2 * (q + kv), 4 * (q + kv) + 2 * do
    else:
        forward, backward = 4 * (q + kv) + 2 * q, 6 * (q + kv) + 3 * do + max(q + kv, do)
    late = 0 if one_sided else max(q + kv, 2 * q, do)  # gloo's thread may let go of what it moved a moment later
    return LSE + stays + forward + late, LSE + stays + sums + backward + late


@pytest.mark.parametrize("kv_heads", [HEADS * RANKS, HEADS, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("exchange", ["shm", "torch"])
def test_rows_are_those_of_a_few_chunks(pool, exchange, kv_heads):
    """So they fall as 1 / chunks. The pool has results and gradients, and rows of one forward and one backward.

    aten takes its results and gradients of a chunk; the temporaries of the reference do not depend on chunks.
    """
    for attention in ("reference", "aten"):
        for found in pool.run(RANKS, held_by, exchange, kv_heads, attention):
            for chunks, forward, backward, waiting in found:
                most = bounds(chunks, kv_heads, attention, exchange == "shm")
                assert forward.rows <= most[0] + SLACK, (attention, chunks)
                assert backward.rows <= most[1] + SLACK, (attention, chunks)
                results = 2 * HEADS * HEAD + 2 * kv_heads * HEAD // RANKS
                assert waiting <= 1.125 * (results + sum(most)) + SLACK
                if attention == "aten":
                    # per kv head under GQA, so a chunk's heads and the k and v that they attend
                    assert max(forward.others, backward.others) <= 3.5 * HEAD * HEADS // chunks + 2 * HEAD
                else:
                    assert backward.others <= found[0][2].others + SLACK


@pytest.mark.parametrize("kv_heads", [HEADS * RANKS, 1], ids=["MHA", "MQA"])
def test_rows_of_virtual_ranks(kv_heads):
    """Peers have my buffers until they have come as far as I have, which is one chunk later at most."""
    for chunks in CHUNKS[1:]:
        with watch() as held:
            run_virtual(RANKS, lambda group: layer(group, kv_heads, "reference"), chunks=chunks)
        later = HEAD * (HEADS // chunks + 2 * max(1, kv_heads // RANKS // chunks))
        forward, backward = bounds(chunks, kv_heads, "reference", True)
        for rank in range(RANKS):
            assert held[rank, "forward"].rows <= forward + later + SLACK
            assert held[rank, "backward"].rows <= backward + 2 * later + SLACK


def results(ctx, exchange, case):
    with UlyssesGroup(ctx.group, exchange=exchange, chunks=case.chunks) as group:
        return run(case, ctx.rank, group)


CASES = {
    "MHA": Case((13, 0, 6, 9), 12, 12, batch=2),
    "GQA": Case((13, 0, 6, 9), 16, 8, value_dim=24),
    "ranks and chunks share kv heads": Case((3, 8, 5, 1), 24, 3, return_lse=True, sinks=True, slopes=True),
    "MQA": Case((13, 0, 6, 9), 12, 1, dtype="bf16"),
    "QK-norm, RoPE": Case((7, 8, 1, 4), 12, 4, fused=True, rope=8, norm=True),
    "heads are cut": Case((200, 130, 0, 251), 5, 5, window=(300, -1)),
    "cross-attention": Case((4, 5, 9, 2), 12, 4, kv_lens=(3, 0, 8, 7), causal=False),
    "aten, MHA": Case((13, 0, 6, 9), 12, 12, attention="aten"),
    "aten, GQA": Case((13, 0, 6, 9), 24, 8, attention="aten", batch=2),
    "aten, MQA": Case((13, 0, 6, 9), 12, 1, attention="aten", dtype="bf16"),
    "triton": Case((5, 2, 0, 4), 8, 2, attention="triton"),
    "triton, QK-norm": Case((5, 2), 4, 4, attention="triton", fused=True, rope=8, norm=True),
}


@pytest.mark.parametrize("exchange", ["shm", pytest.param("torch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_gradients_that_come_back_chunk_by_chunk(pool, case, exchange):
    """Right, and the bits of those that come back at once."""
    for chunks in (2, 3):
        case = replace(case, chunks=chunks)
        again = pool.run(case.ranks, results, exchange, replace(case, recompute="exchange"))
        check(case, again)
        found, expected = joined(case, again), joined(case, pool.run(case.ranks, results, exchange, case))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
