"""The layer against single-device attention in fp64: outputs and all gradients, on real processes and virtual ranks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random

import oracle
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from layer import Case, cases, check, joined, run, whole_inputs

from ulysses_triton import OptionError, UlyssesGroup, local, run_virtual, ulysses_attention, ulysses_qkv_attention


def on_process(ctx, case):
    """The case on one real rank; without chunks the group is made at its first use and lives on, as a user's does."""
    if case.chunks == 1:
        return run(case, ctx.rank, ctx.group)
    with UlyssesGroup(ctx.group, chunks=case.chunks) as group:
        return run(case, ctx.rank, group)


def on_torch(ctx, case):
    """The same over the collective exchange; shared memory is the default of these ranks."""
    with UlyssesGroup(ctx.group, exchange="torch") as group:
        return run(case, ctx.rank, group)


def virtually(case: Case) -> list:
    return run_virtual(case.ranks, lambda group: run(case, group.rank, group), chunks=case.chunks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_processes_equal_one_device(pool, ranks):
    @given(cases(ranks, ("reference", "aten", "callable"), max_tokens=40 if ranks < 8 else 12))
    def holds(case):
        case = callable_case(case) if case.attention == "callable" else case
        check(case, pool.run(ranks, on_process, case))

    holds()


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one_device_over_all_to_alls(pool, ranks):
    @given(cases(ranks, ("reference", "aten"), max_tokens=40))
    def holds(case):
        check(case, pool.run(ranks, on_torch, case))

    holds()


def callable_case(case: Case) -> Case:
    return replace(case, attention=sdpa, recompute=None, return_lse=False)


def sdpa(
    q, k, v, *, causal, scale, window=None, softcap=None, segment_ids=None, cu_seqlens=None, sinks=None,
    alibi_slopes=None,
):  # fmt: skip
    """A user's attention, [B, S, h, D] in and out: PyTorch's own, or the oracle for what that does not have."""
    if cu_seqlens is not None:
        segment_ids = torch.arange(len(cu_seqlens) - 1).repeat_interleave(torch.tensor(cu_seqlens).diff())[None]
    ids = None if segment_ids is None else (segment_ids, segment_ids)
    kept = oracle.allowed(q.size(1), k.size(1), causal=causal, window=window, documents=ids).unsqueeze(-3)
    if any(x is not None for x in (window, softcap, ids, sinks, alibi_slopes)):
        bias = None
        if alibi_slopes is not None:
            bias = -alibi_slopes[:, None, None] * oracle.distances(q.size(1), k.size(1), ids).unsqueeze(1)
        out, _ = oracle.attention(
            q.float(), k.float(), v.float(), kept=kept, scale=scale, softcap=softcap, sinks=sinks, bias=bias
        )
        return out.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_triton_kernels_on_processes_equal_one_device(pool, ranks):
    @settings(max_examples=4)
    @given(cases(ranks, ("triton",), max_tokens=24))
    def holds(case):
        check(case, pool.run(ranks, on_process, case))

    holds()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_virtual_ranks_equal_one_device(ranks):
    @given(cases(ranks, ("reference", "aten", "callable"), max_tokens=32))
    def holds(case):
        case = callable_case(case) if case.attention == "callable" else case
        check(case, virtually(case))

    holds()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_triton_kernels_on_virtual_ranks_equal_one_device(ranks):
    @settings(max_examples=6)
    @given(cases(ranks, ("triton",), max_tokens=24))
    def holds(case):
        check(case, virtually(case))

    holds()


@pytest.mark.parametrize(
    ("attention", "dtype", "kv_heads"),
    [
        *itertools.product(["reference", "aten"], ["fp32", "bf16"], [4, 8]),
        ("triton", "fp32", 8),
        ("triton", "bf16", 4),
    ],
)
def test_forward_is_the_same_bits_for_every_number_of_ranks(pool, attention, dtype, kv_heads):
    """And so are the gradients, where every kv head is whole on its rank."""
    case = Case((45,), 8, kv_heads, dim=16, batch=2, dtype=dtype, attention=attention)
    one = joined(case, virtually(case))
    for ranks, process in ((2, on_process), (4, on_torch)):
        for results in ran(case.on(ranks), pool, process):
            many = joined(case.on(ranks), results)
            for name in ("out", "dq", "dk", "dv"):
                assert torch.equal(one[name], many[name]), f"{name} differs between 1 and {ranks} ranks"


def ran(case: Case, pool, process):
    """The results on virtual ranks and on processes; of interpreted kernels, which take seconds, on processes alone."""
    if case.attention != "triton":
        yield virtually(case)
    yield pool.run(case.ranks, process, case)


@pytest.mark.parametrize("attention", ["triton", "reference", "aten"])
def test_fused_forward_is_the_same_bits_for_every_number_of_ranks(attention):
    """With RoPE and QK-norm on the way; the gradients of the weights are sums over ranks, so those are close only."""
    case = Case((45,), 4, 4, dim=16, batch=2, dtype="bf16", attention=attention, fused=True, rope=16, norm=True)
    one = joined(case, virtually(case))
    for ranks in (2, 4):
        many = joined(case.on(ranks), virtually(case.on(ranks)))
        for name in ("out", "dq", "dk", "dv"):
            assert torch.equal(one[name], many[name]), f"{name} differs between 1 and {ranks} ranks"
        for name in ("dq_norm", "dk_norm"):
            torch.testing.assert_close(one[name], many[name], rtol=8e-3, atol=1e-2)  # bf16 shares, rounded per rank


@pytest.mark.parametrize(
    "options",
    [
        {"window": (9, 0)},
        {"window": (3, 14), "softcap": 2.0},
        {"dropout": 0.3, "sinks": True, "slopes": True},
        {"documents": "runs", "mask": "gapped", "causal": True},
        {"mask": "ahead blocks", "dropout": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("attention", ["triton", "reference"])
def test_options_are_the_same_bits_for_every_number_of_ranks(pool, attention, options):
    """Shards of the window's own length and shorter, on all exchanges."""
    case = Case((45,), 4, 4, dtype="bf16", attention=attention, **{"causal": False, "return_lse": True} | options)
    one = joined(case, virtually(case))
    for many, process in (
        (case.on(2), on_torch),
        (case.on(4), on_process),
        (replace(case, lens=(1, 40, 0, 4)), on_process),
        (replace(case, lens=(0, 45)), on_torch),
    ):
        for results in ran(many, pool, process):
            found = joined(many, results)
            assert all(torch.equal(one[name], found[name]) for name in ("out", "lse", "dq", "dk", "dv"))


def hold_chunks(case: Case, results, chunks: tuple[int, ...] = (2, 3, 4)) -> None:
    """`results` gives all ranks' of a case: in chunks the same bits, but for dk and dv of kv heads that chunks share.

    Those differ by the order of fp32 sums, and with them what follows from dk.
    """
    one = joined(case, results(case))
    whole = case.kv_heads // case.ranks
    for number in chunks:
        many = joined(case, results(replace(case, chunks=number)))
        for name, expected in one.items():
            if number > whole and name in ("dk", "dv", "dk_norm"):
                rtol, atol = (2e-5, 1e-5) if case.dtype == "fp32" else (2e-2, 1e-2)  # of bf16: another rounding
                torch.testing.assert_close(many[name], expected, rtol=rtol, atol=atol)
            else:
                assert torch.equal(many[name], expected), f"{name} in {number} chunks"


HEADS = {"MHA": (8, 8), "GQA": (8, 4), "one kv head a rank": (8, 2), "MQA": (8, 1), "uneven GQA": (12, 3)}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("attention", ["reference", "aten"])
def test_chunks_are_the_same_bits(pool, attention, heads):
    case = Case((13, 6), *HEADS[heads], batch=2, dtype="bf16", attention=attention)
    hold_chunks(case, virtually)
    hold_chunks(case, lambda case: pool.run(2, on_process, case))


@pytest.mark.parametrize("heads", [(4, 4), (8, 4), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_chunks_of_the_kernels_are_the_same_bits(pool, heads):
    case = Case((13, 6), *heads, attention="triton")
    hold_chunks(case, virtually, (2, 4))
    hold_chunks(case, lambda case: pool.run(2, on_process, case), (2,))


@pytest.mark.parametrize(
    "options",
    [
        {"window": (9, 3), "softcap": 2.0, "causal": False, "recompute": "exchange"},
        {"dropout": 0.3, "sinks": True, "slopes": True, "return_lse": True},
        {"documents": "runs", "mask": "gapped"},
        {"mask": "ahead blocks", "dropout": 0.1, "return_lse": True, "recompute": "exchange"},
        {"kv_lens": (4, 0, 20), "causal": False, "slopes": True, "value_dim": 17, "dim": 33},
        {"fused": True, "rope": 8, "norm": True, "layout": "slice"},
        {"dtype": "bf16", "fused": True, "rope": 16, "interleaved": True, "norm": True, "recompute": "exchange"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kv_heads", [3, 6], ids=["kv3", "kv6"])
@pytest.mark.parametrize("attention", ["triton", "reference"])
def test_options_are_the_same_bits_in_chunks(attention, kv_heads, options):
    """Shards of different lengths, one of them empty; two chunks share a kv head, or have one each."""
    case = Case((9, 0, 14), 6, kv_heads, attention=attention, **options)
    hold_chunks(case, virtually, (2,))
    check(replace(case, chunks=2), virtually(replace(case, chunks=2)))


@pytest.mark.parametrize("attention", ["triton", "reference"])
def test_shared_kv_heads_change_only_the_order_of_a_sum(attention):
    case = Case((40,), 4, 1, dtype="fp32", attention=attention)
    one, four = joined(case, virtually(case)), joined(case, virtually(case.on(4)))
    assert torch.equal(one["out"], four["out"]) and torch.equal(one["dq"], four["dq"])
    for name in ("dk", "dv"):
        torch.testing.assert_close(one[name], four[name], rtol=1e-5, atol=1e-6)


def test_every_exchange_gives_the_same_bits(pool):
    case = Case((9, 14, 0), 6, 2, dim=24, batch=2, dtype="bf16", return_lse=True)
    collective, shared, one_sided = pool.run(3, on_torch, case), pool.run(3, on_process, case), virtually(case)
    for a, b, c in zip(collective, shared, one_sided, strict=True):
        assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 0), 2, 1, dtype="fp32"),
        Case((0, 0, 3), 3, 3, dtype="fp32", causal=False),
        Case((3, 2), 2, 2, kv_lens=(0, 0), dtype="fp32", causal=False, return_lse=True),
        Case((0, 0), 2, 2, kv_lens=(2, 1), dtype="fp32"),
        Case((2, 3), 2, 2, kv_lens=(1, 0), dtype="fp32", return_lse=True),
        Case((20, 9), 2, 2, kv_lens=(3, 4), dtype="fp32", causal=False, window=(4, 2), softcap=1.0, return_lse=True),
        Case((17, 16), 2, 1, dim=256, value_dim=256, dtype="bf16"),
        Case((17, 16), 4, 2, dim=192, value_dim=128, dtype="bf16"),
        Case((17, 16), 4, 2, dim=65, value_dim=17, dtype="bf16", return_lse=True),
        Case((9, 9, 1, 5), 4, 1, dim=33, value_dim=50, dtype="bf16", return_lse=True),
        Case((9, 1, 5), 6, 2, dim=1, value_dim=3, dtype="fp32", recompute="exchange"),
        Case((9, 8), 4, 1, dim=33, value_dim=33, dtype="fp16", fused=True, rope=32, norm=True),
        Case((9, 8), 2, 2, dim=3, value_dim=3, fused=True, rope=2, interleaved=True, norm=True, layout="slice"),
        Case((6, 3), 4, 2, dim=100, value_dim=5, kv_lens=(4, 7), layout="slice", recompute="exchange"),
        Case((6, 3), 12, 3, dim=33, value_dim=17, dtype="bf16", attention=sdpa),
        Case((6, 5), 4, 2, dim=5, value_dim=5, fused=True, rope=4, norm=True, attention=sdpa),
        Case((6, 6, 6, 6, 6, 6), 12, 4, dim=8, value_dim=8, dtype="fp32"),
        Case((6, 6), 10, 5, dim=8, value_dim=8, dtype="fp32", attention=sdpa),
        Case((6, 6), 12, 3, dim=8, value_dim=8, dtype="fp32", attention=sdpa),
        Case((6, 3), 4, 2, kv_lens=(0, 11), dim=8, value_dim=24, dtype="fp32", batch=2, attention=sdpa),
    ],
    ids=[
        "one token", "empty ranks", "no keys", "no queries", "masked rows", "window past the keys", "D 256", "MLA dims",
        "odd dims LSE", "odd dims shared kv", "D 1", "odd fused", "D 3 fused", "D 100 cross", "odd callable",
        "odd fused callable", "uneven kv", "callable GQA", "callable uneven kv", "callable cross",
    ],
)  # fmt: skip
@pytest.mark.parametrize("attention", ["reference", "triton"])
def test_edges(case, attention):
    case = case if callable(case.attention) else replace(case, attention=attention)
    check(case, virtually(case))


ODD = {
    "shared kv": {"kv_heads": 1, "dim": 33, "value_dim": 17, "return_lse": True},
    "D 1": {"kv_heads": 4, "dim": 1, "value_dim": 100},
    "fused": {"kv_heads": 2, "dim": 33, "value_dim": 33, "fused": True, "rope": 32, "norm": True},
    "recompute": {"kv_heads": 2, "dim": 50, "value_dim": 3, "recompute": "exchange"},
    "aten": {"kv_heads": 2, "dim": 65, "value_dim": 65, "attention": "aten"},
    "callable": {"kv_heads": 1, "dim": 33, "value_dim": 17, "attention": sdpa},
    "kernels": {"kv_heads": 1, "dim": 33, "value_dim": 17, "attention": "triton"},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ODD)
def test_head_dims_that_are_no_multiple_of_8(pool, name, dtype):
    """On processes, where rows travel with whatever lies between their heads."""
    case = Case((13,), 4, batch=2, dtype=dtype, **ODD[name])
    for ranks, process in ((1, on_process), (2, on_process), (2, on_torch), (4, on_process)):
        check(case.on(ranks), pool.run(ranks, process, case.on(ranks)))


def test_no_process_group_is_plain_attention():
    q, k, v = (torch.randn(2, 20, 4, 16, requires_grad=True) for _ in range(3))
    out = ulysses_attention(q, k, v, causal=True, attention="reference")
    expected = sdpa(q, k, v, causal=True, scale=None)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q)[0], torch.autograd.grad(expected.sum(), q)[0])


def test_a_callable_gets_window_and_softcap_only_where_they_are_given():
    seen = []

    def attention(q, k, v, **options):
        seen.append(options)
        return v

    q = torch.randn(1, 4, 2, 16)
    ulysses_attention(q, q, q, attention=attention)
    ulysses_attention(q, q, q, attention=attention, window=(2, -1), softcap=5)
    plain = {"causal": False, "scale": 0.25}
    assert seen == [plain, plain | {"window": (2, -1), "softcap": 5.0}]


def test_inputs_are_not_written_to():
    q, k, v = (torch.randn(1, 12, 2, 16, requires_grad=True) for _ in range(3))
    before = [t.detach().clone() for t in (q, k, v)]
    out = ulysses_attention(q, k, v, causal=True)
    kept = out.detach().clone()
    out.backward(torch.randn_like(out))
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True)) and torch.equal(out, kept)


def test_fused_gradient_is_one_tensor_in_the_layout_of_the_projection():
    qkv = torch.randn(2, 12, 8 * 16, requires_grad=True)
    out = ulysses_qkv_attention(qkv, heads=4, kv_heads=2, causal=True)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert grad.is_contiguous() and grad.shape == qkv.shape and torch.isfinite(grad).all()


def count_exchanges(ctx, exchange, case):
    """Exchanges of rows (all-to-alls on the data group, arrivals in memory) and messages apart from them, for a layer.

    Forward and backward.
    """
    seen = {"data": 0, "control": 0}

    def counting(what, original):
        def counted(*args, **kwargs):
            seen[what] += 1
            return original(*args, **kwargs)

        return counted

    with UlyssesGroup(ctx.group, exchange=exchange, chunks=case.chunks) as group:
        run(case, ctx.rank, group)  # whatever a first call sets up
        group.control.begin_gather = counting("control", group.control.begin_gather)
        carrier, name = (dist, "all_to_all_single") if exchange == "torch" else (group.exchange.transport, "arrive")
        original = getattr(carrier, name)
        setattr(carrier, name, counting("data", original))
        try:
            run(case, ctx.rank, group)
        finally:
            setattr(carrier, name, original)
        return seen, dict(group.counts)


@pytest.mark.parametrize(
    ("changes", "collectives", "exchanges"),
    [({}, 4, 4), ({"recompute": "exchange"}, 5, 5), ({"kv_lens": (3, 9)}, 6, 4)],
    ids=["plain", "recompute", "cross-attention: q beside k and v"],
)
@pytest.mark.parametrize("exchange", ["shm", "torch"])
def test_one_exchange_in_and_one_out_per_direction(pool, exchange, changes, collectives, exchanges):
    case = replace(Case((8, 8), 4, 2), **changes)
    for seen, counts in pool.run(2, count_exchanges, exchange, case):
        assert seen == {"data": collectives if exchange == "torch" else exchanges, "control": 2}
        steps = ["exchange_in", "exchange_out", "exchange_grad_in", "exchange_grad_out"]
        expected = {step: 2 for step in steps} | {"control": 4}
        if "recompute" in changes:
            expected["exchange_in"] = 4
        assert counts == expected


def counted(group, case):
    run(case, group.rank, group)
    return {name: n for name, n in group.counts.items() if name != "control"}, group.explain()


@pytest.mark.parametrize("chunks", [2, 3])
def test_every_chunk_has_its_exchanges(pool, chunks):
    """4 C of them, or one-sided 3 C + 1: attention writes the output of all chunks straight to where it belongs."""
    case = Case((8, 8), 8, 2, chunks=chunks)
    for exchange, n in ("torch", 4 * chunks), ("shm", 3 * chunks + 1):
        for seen, counts in pool.run(2, count_exchanges, exchange, case):
            assert seen == {"data": n, "control": 2} and sum(counts.values()) == 2 * n + 4
    for counts, text in run_virtual(2, lambda group: counted(group, case), chunks=chunks):
        once = {"exchange_out": 1}
        assert counts == dict.fromkeys(("exchange_in", "exchange_grad_in", "exchange_grad_out"), chunks) | once
        assert f"chunks: {chunks} of each rank's heads (asked for: {chunks})" in text
        assert "chunks of query heads 0..1" in text or chunks == 3
    assert "chunks: 4 of each" in run_virtual(2, lambda group: counted(group, case), chunks=99)[0][1]


@pytest.mark.parametrize("chunks", [0, -1, True, 1.5, "many", None], ids=str)
def test_chunks_that_are_no_number_are_an_option_error(chunks):
    with pytest.raises(OptionError, match="chunks = .*a number of at least 1, or .auto."):
        UlyssesGroup(chunks=chunks)


def in_other_chunks(ctx):
    with UlyssesGroup(ctx.group, chunks=1 + ctx.rank) as group:
        q = torch.randn(1, 4, 4, 16)
        ulysses_attention(q, q, q, group)


def test_ranks_agree_on_the_chunks(pool):
    for failure in pool.run(2, in_other_chunks, expect_errors=True):
        assert failure.kind == "ShapeError" and "chunks: rank 0 has 1, rank 1 has 2" in failure.message


class Slow:
    """An exchange whose hops travel for a while, one after the other, in a thread of its own."""

    def __init__(self, exchange, seconds: Callable[[], float]) -> None:
        self.exchange, self.seconds, self.travelling = exchange, seconds, ThreadPoolExecutor(1)
        self.name, self.one_sided = exchange.name, exchange.one_sided

    def open(self, messages, receive, send):
        return SlowHop(self, self.exchange.open(messages, receive, send))

    def close(self) -> None:
        self.travelling.shutdown()
        self.exchange.close()


class SlowHop:
    def __init__(self, exchange: Slow, hop) -> None:
        self.exchange, self.hop, self.blocks, self.peers = exchange, hop, hop.blocks, hop.peers

    def start(self) -> None:
        self.sent = self.exchange.travelling.submit(self.travel)

    def travel(self) -> None:
        time.sleep(self.exchange.seconds())
        self.hop.start()

    def finish(self) -> None:
        self.sent.result()
        self.hop.finish()


TRAVEL, ATTENTION = 0.05, 0.05  # seconds, of a chunk; far longer than what else a step takes


def timed_with_slow_hops(ctx, chunks):
    """Seconds of one forward whose hops and attention take a known time, and what it gave."""

    def attend(*arguments, **options):
        time.sleep(ATTENTION)
        return attend_forward(*arguments, **options)

    attend_forward = local.reference.attend_forward
    local.reference.attend_forward = attend
    try:
        with UlyssesGroup(ctx.group, exchange="torch", chunks=chunks) as group:
            q = whole_inputs(Case((8, 8), 8, 8))["q"].chunk(2, dim=1)[ctx.rank]
            group.exchange = Slow(group.exchange, lambda: TRAVEL)
            ulysses_attention(q, q, q, group, attention="reference")
            dist.barrier(ctx.group)
            begin = time.perf_counter()
            out = ulysses_attention(q, q, q, group, attention="reference")
            return time.perf_counter() - begin, out
    finally:
        local.reference.attend_forward = attend_forward


def test_rows_travel_while_attention_computes(pool):
    """With 4 chunks, 8 hops and 4 attentions would take 12 of these times in a row; hops alone take 8."""
    chunks = 4
    for seconds, out in pool.run(2, timed_with_slow_hops, chunks):
        assert 2 * chunks * TRAVEL <= seconds < chunks * (2 * TRAVEL + ATTENTION) - 2 * ATTENTION
        assert out.isfinite().all()


def with_random_delays(group, case):
    random = Random(group.rank)
    group.exchange = Slow(group.exchange, lambda: random.uniform(0, 0.01))
    return run(case, group.rank, group)


@pytest.mark.parametrize("recompute", [None, "exchange"])
def test_delays_change_nothing(recompute):
    case = Case((5, 9, 2), 12, 3, dtype="bf16", return_lse=True, recompute=recompute, chunks=3)
    expected = virtually(case)
    results = run_virtual(3, lambda group: with_random_delays(group, case), chunks=3)
    for a, b in zip(results, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("exchange", ["shm", "torch"])
def test_low_precision_bits_survive_the_exchange(pool, exchange, ranks):
    """Rows are moved, never computed with: all 65,536 patterns of 16 bits come back as they were."""
    assert all(pool.run(ranks, bits_come_back, exchange))


def bits_come_back(ctx, exchange):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(1, -1, ctx.size, 16)
    mine = bits.chunk(ctx.size, dim=1)[ctx.rank]
    v = mine.view(torch.bfloat16)
    with UlyssesGroup(ctx.group, exchange=exchange) as group:
        out = ulysses_attention(torch.zeros_like(v), torch.zeros_like(v), v, group, attention=identity_on_v)
    return torch.equal(out.view(torch.int16), mine)


def identity_on_v(q, k, v, **_):
    return v


@pytest.mark.parametrize("options", [{}, {"window": (9, 0)}, {"norm": True, "fused": True, "rope": 16}], ids=str)
def test_autocast_rounds_nothing(options):
    case = Case(lens=(40,), heads=4, kv_heads=2, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(case, 0, None)
    check(case, [found])
