"""Heads that ranks do not divide, on real processes and virtual ranks, against single-device attention in fp64.

Heads are cut every 256 queries, so sequences are longer here than in other tests, and heads smaller.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import fake_nccl
import fake_symm
import pytest
import test_projection
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from layer import Case, cases, check, joined, run
from test_attention import hold_chunks, on_process, on_torch, sdpa, virtually

from ulysses_triton import UlyssesGroup, cost, run_virtual, trace, ulysses_attention
from ulysses_triton.cuts import QUERY_TILE
from ulysses_triton.placement import place
from ulysses_triton.spec import Problem

S = 2 * QUERY_TILE + 100


@st.composite
def uneven(draw: st.DrawFn, ranks: int, attentions: tuple[str, ...] = ("reference",), tokens: int = S) -> Case:
    """Cases of any heads, most often more than one tile of queries, in shards of any lengths."""
    base = draw(cases(1, attentions, max_tokens=30))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 6 // kv_heads))

    def split(n: int) -> tuple[int, ...]:
        cuts = sorted(draw(st.lists(st.integers(0, n), min_size=ranks - 1, max_size=ranks - 1)))
        return tuple(b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True))

    dim = draw(st.sampled_from([8, 9, 16]))
    return replace(
        base,
        lens=split(draw(st.sampled_from([tokens, tokens - 60, QUERY_TILE, 62]))),
        kv_lens=base.kv_lens and split(draw(st.sampled_from([30, 300, tokens]))),
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=dim if base.fused or base.attention == "aten" else min(base.value_dim, 24),
        rope=min(base.rope, dim // 2 * 2),
        slopes=base.slopes and base.dtype in ("fp32", "fp64"),  # at such distances only few bits of bf16 are right
        batch=1 if tokens > 300 else base.batch,
        window=base.window and tuple(n * draw(st.sampled_from([1, 20])) if n > 0 else n for n in base.window),
    )


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_processes_equal_one_device(pool, ranks):
    @settings(max_examples=6)
    @given(uneven(ranks), st.sampled_from([on_process, on_process, on_torch]))
    def holds(case, process):
        check(case, pool.run(ranks, process, case))

    holds()


@pytest.mark.parametrize("ranks", [2, 3, 5, 7, 11, 16])
def test_virtual_ranks_equal_one_device(ranks):
    @settings(max_examples=6)
    @given(uneven(ranks, ("reference", "reference", "aten", "callable")))
    def holds(case):
        if case.attention == "callable":
            case = replace(case, attention=sdpa, recompute=None, return_lse=False)
        check(case, virtually(case))

    holds()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_triton_kernels_equal_one_device(ranks):
    @settings(max_examples=2)
    @given(uneven(ranks, ("triton",), tokens=QUERY_TILE + 44))
    def holds(case):
        check(case, virtually(case))

    holds()


# Cases that others refuse or get wrong, by name.
NAMED = {
    "Hq 6 / P 4": Case((S,), 6, 6).on(4),
    "Hq 8, Hkv 2 / P 4": Case((S,), 8, 2).on(4),
    "MQA / P 8": Case((S,), 8, 1).on(8),
    "MQA, Hq 6 / P 8": Case((S,), 6, 1).on(8),
    "Hq 3 / P 4": Case((S,), 3, 3).on(4),
    "Hq 28, Hkv 4 / P 8": Case((QUERY_TILE + 50,), 28, 4, dim=8, value_dim=8).on(8),
    "S = 62 / P 4": Case((62,), 4, 2, dim=16).on(4),
    "S = 62, Hq 6 / P 4": Case((62,), 6, 2, dim=16).on(4),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "dense"])
def test_cases_others_fail_on(pool, name, causal):
    """Also bitwise what one rank computes, and in chunks."""
    case = replace(NAMED[name], causal=causal)
    results = pool.run(case.ranks, on_process, case)
    check(case, results)
    one = joined(case.on(1), virtually(case.on(1)))
    for found in (results, pool.run(case.ranks, on_torch, case), virtually(replace(case, chunks=3))):
        many = joined(case, found)
        assert torch.equal(one["out"], many["out"]) and torch.equal(one["dq"], many["dq"])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "dense"])
def test_40_heads_on_16_ranks(causal):
    case = replace(Case((2 * QUERY_TILE,), 40, 8, dim=8, value_dim=8).on(16), causal=causal)
    results = virtually(case)
    check(case, results)
    assert torch.equal(joined(case, results)["out"], joined(case.on(1), virtually(case.on(1)))["out"])


@pytest.mark.parametrize(("dtype", "ranks"), [("fp32", 2), ("bf16", 5)])
def test_forward_of_the_kernels_is_the_same_bits_for_every_number_of_ranks(dtype, ranks):
    case = Case((QUERY_TILE + 30,), 3, 1, dim=16, dtype=dtype, attention="triton", return_lse=True)
    one, many = (joined(c, virtually(c)) for c in (case, case.on(ranks)))
    assert all(torch.equal(one[name], many[name]) for name in ("out", "lse", "dq"))


OPTIONS = {
    "window, softcap": {"window": (300, 40), "softcap": 2.0, "causal": False, "recompute": "exchange"},
    "dropout, sinks, ALiBi, LSE": {"dropout": 0.3, "sinks": True, "slopes": True, "return_lse": True},
    "documents, predicate": {"documents": "runs", "mask": "gapped"},
    "offsets": {"documents": "offsets", "dtype": "bf16"},
    "offsets, keys of their own": {"documents": "offsets", "kv_lens": (500, 90, 11), "slopes": True},
    "block mask": {"mask": "ahead blocks", "return_lse": True, "recompute": "exchange"},
    "cross": {"kv_lens": (400, 0, 20), "slopes": True, "value_dim": 7, "dim": 9},
    "fused": {"fused": True, "rope": 8, "norm": True, "layout": "slice"},
    "fused bf16": {"dtype": "bf16", "fused": True, "rope": 16, "interleaved": True, "norm": True,
                   "recompute": "exchange"},
}  # fmt: skip


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (2, 2), (5, 5)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(pool, options, heads):
    """Shards of different lengths, one of them empty, whole and in two chunks."""
    case = Case((S - 300, 0, 300), *heads, **OPTIONS[options])
    for chunks, process in ((1, on_process), (2, on_torch)):
        case = replace(case, chunks=chunks)
        check(case, pool.run(3, process, case))
    one = joined(case.on(1), virtually(replace(case, chunks=1).on(1)))
    assert torch.equal(one["out"], joined(case, virtually(case))["out"])


@pytest.mark.parametrize(
    "options",
    ["window, softcap", "dropout, sinks, ALiBi, LSE", "documents, predicate", "offsets", "block mask", "fused"],
)
def test_options_of_the_kernels(options):
    case = Case((200, 0, QUERY_TILE - 150), 2, 1, attention="triton", **OPTIONS[options])
    check(case, virtually(case))
    check(case, virtually(replace(case, chunks=2)))


@pytest.mark.parametrize("heads", [(5, 5), (6, 2), (4, 1)], ids=str)
def test_chunks_are_the_same_bits(heads):
    """But for dk and dv, which are sums over other parts."""
    case = Case((S,), *heads, dtype="bf16", batch=2).on(4 if heads[0] % 4 else 3)
    one = joined(case, virtually(case))
    for chunks in (2, 3, 5):
        many = joined(case, virtually(replace(case, chunks=chunks)))
        for name in ("out", "dq"):
            assert torch.equal(many[name], one[name])
        for name in ("dk", "dv"):
            torch.testing.assert_close(many[name], one[name], rtol=2e-2, atol=1e-2)


PROJECTED = test_projection.Case(
    (QUERY_TILE, QUERY_TILE - 30), 3, 1, test_projection.EVERYTHING, batch=1, rope=True, return_lse=True
)


@pytest.mark.parametrize("recompute", [None, "exchange"], ids=["kept", "recompute"])
@pytest.mark.parametrize("exchange", ["shm", "torch"])
def test_projections(pool, exchange, recompute):
    case = replace(PROJECTED, recompute=recompute, chunks=2)
    test_projection.check(case, pool.run(2, test_projection.on_a_process, case, exchange))


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("run_ranks", [fake_nccl.run, partial(fake_symm.run, step=1 << 17)], ids=["nccl", "symm"])
def test_fakes_of_the_exchanges_of_gpus(run_ranks, chunks):
    case = Case((S,), 5, 5, return_lse=True, recompute="exchange").on(3)

    def layers(group):
        group.chunks = chunks
        return [run(case, group.rank, group) for _ in range(2)]

    for results in zip(*run_ranks(3, layers), strict=True):
        check(case, list(results))


def traced(ctx, exchange, case):
    with UlyssesGroup(ctx.group, exchange=exchange, chunks=case.chunks) as group, trace() as t:
        run(case, ctx.rank, group)
    return t.sent()


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("exchange", ["shm", "torch"])
def test_bytes_on_the_wire_are_those_of_the_placement(pool, exchange, chunks):
    """q, dq, O and dO once, with delta; k, v and their gradients once per rank that works on them; but for its own."""
    case = Case((S,), 3, 3, causal=False, chunks=chunks, dim=16, value_dim=16, batch=2).on(2)
    problem = Problem(
        batch=2, lens=case.lens, kv_lens=case.lens, heads=3, kv_heads=3, head_dim=16, value_dim=16, dtype="float32",
        device="cpu", causal=False, scale=0.25, attention="reference", grad=True, chunks=chunks,
    )  # fmt: skip
    predicted = cost.timeline(problem, cost.cpu(1.0), one_sided=exchange == "shm")
    assert pool.run(2, traced, exchange, case) == [predicted.of(rank).sent() for rank in (0, 1)]
    if chunks > 1:
        return
    rows = 0  # elements from one rank to the other
    for rank, pieces in enumerate(place(problem).chunks[0].pieces):
        other = 1 - rank
        start = sum(case.lens[:other])
        theirs = [min(s.stop, start + case.lens[other]) - max(s.start, start) for s in pieces]
        queries = sum(s.q_heads * max(0, n) for s, n in zip(pieces, theirs, strict=True))
        with_delta = sum(-(-17 * s.q_heads // 16) * 16 * max(0, n) for s, n in zip(pieces, theirs, strict=True))
        keys = place(problem).shares[rank].kv_heads * case.lens[other]
        rows += queries * 3 * 16 + with_delta + keys * 4 * 16
    assert predicted.sent() == rows * 2 * 4


def compiled(ctx):
    """A layer in one graph, also with dynamic shapes, is what it is without."""
    generator = torch.Generator().manual_seed(ctx.rank)
    with UlyssesGroup(ctx.group) as group:

        def layer(q, k, v):
            return ulysses_attention(q, k, v, group, causal=True, attention="reference")

        for dynamic in (False, True):
            torch._dynamo.reset()
            graph = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
            for tokens in (300, 200):
                q, k, v = (torch.randn(1, tokens, n, 8, generator=generator, requires_grad=True) for n in (3, 1, 1))
                results = []
                for call in (layer, graph):
                    out = call(q, k, v)
                    results.append((out, *torch.autograd.grad((out * out).sum(), (q, k, v))))
                for a, b in zip(*results, strict=True):
                    torch.testing.assert_close(a, b)
    return True


def test_a_layer_compiles(pool):
    assert pool.run(2, compiled) == [True, True]


def two_configurations(ctx, exchange):
    """Layers of two models in one step, over one group and over groups of other sizes beside it."""
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1, 2])
    tower = Case((300,), 3, 3, dim=8, value_dim=8, causal=False).on(3)
    decoder = Case((QUERY_TILE * 2,), 4, 2, dim=16, seed=1).on(3)
    pair = Case((400,), 5, 1, dim=8, value_dim=8, seed=2).on(2)
    with UlyssesGroup(second, exchange=exchange) as all_three:
        found = [run(case, ctx.rank, all_three) for case in (tower, decoder, tower)]
        if ctx.rank < 2:
            with UlyssesGroup(first, exchange=exchange) as two:
                found.append(run(pair, ctx.rank, two))
        found.append(run(decoder, ctx.rank, all_three))
    return found, (tower, decoder, tower, pair)


@pytest.mark.parametrize("exchange", ["shm", "torch"])
def test_two_head_configurations_and_groups_of_other_sizes_in_one_step(pool, exchange):
    by_rank = pool.run(3, two_configurations, exchange)
    for number, case in enumerate(by_rank[0][1]):
        check(case, [found[number] for found, _ in by_rank[: case.ranks]])
    first, again = ([found[at] for found, _ in by_rank] for at in (1, -1))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again, strict=True) for name in a)


def one_step(ctx):
    """A tower and a decoder in one graph: the decoder's input is the tower's output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2 * QUERY_TILE, 3, 8, generator=generator)
    part = x.tensor_split(ctx.size, dim=1)[ctx.rank].requires_grad_()
    lens = [len(p) for p in torch.arange(x.size(1)).tensor_split(ctx.size)]
    y = ulysses_attention(part, part, part, ctx.group, lens=lens, attention="reference")
    z = y.flatten(2).unflatten(2, (12, 2))
    out = ulysses_attention(z, z[:, :, :4], z[:, :, :4], ctx.group, causal=True, lens=lens, attention="reference")
    (grad,) = torch.autograd.grad((out * out).sum(), part)
    return out.detach(), grad


def test_a_graph_of_two_head_configurations(pool):
    whole = pool.run(1, one_step)[0]
    for ranks in (2, 4):
        parts = pool.run(ranks, one_step)
        for n in (0, 1):
            torch.testing.assert_close(torch.cat([p[n] for p in parts], 1), whole[n], rtol=1e-4, atol=1e-6)


def test_even_heads_are_not_cut():
    """Whole heads travel and are attended to as ever, whatever the chunks."""
    hold_chunks(Case((QUERY_TILE + 5, QUERY_TILE), 4, 4, dtype="bf16"), virtually, (2, 4))


def explained(group):
    q = torch.randn(1, 400, 3, 8)
    ulysses_attention(q, q, q, group, attention="reference", causal=True)
    return group.explain()


def test_explain_says_what_each_rank_works_on_and_how_much_travels():
    text = run_virtual(2, explained)[0]
    assert "rank 0: query head" in text and "from 0 to" in text and "elements in and" in text
