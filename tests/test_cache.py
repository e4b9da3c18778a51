"""`UlyssesKVCache`: prefill and decoding over ranks are attention of the whole sequence, and errors lose nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pool import Exit

from ulysses_triton import (
    ExchangeError,
    OptionError,
    OutOfMemoryError,
    ShapeError,
    UlyssesGroup,
    UlyssesKVCache,
    gather_sequence,
    local,
    run_virtual,
    shard_lens,
    trace,
    ulysses_attention,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Case:
    """A sequence that comes in steps of (new tokens, how): "even" shards, or all on the "first" or "last" rank, or
    "all" on every rank."""

    steps: tuple[tuple[int, str], ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    value_dim: int = 8
    batch: int = 1
    dtype: str = "fp32"
    causal: bool = True
    scale: float | None = None
    window: tuple[int, int] | None = None
    softcap: float | None = None
    sinks: bool = False
    slopes: bool = False
    documents: str | None = None  # "left": padding of another length in front of each entry; "mixed"
    attention: str = "reference"
    capacity: int = 0
    seed: int = 0

    @property
    def tokens(self) -> int:
        return sum(n for n, _ in self.steps)


def drawn(case: Case) -> dict[str, torch.Tensor]:
    """The whole sequence."""
    random = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(DTYPES[case.dtype])

    B, S = case.batch, case.tokens
    found = {"q": normal(B, S, case.heads, case.dim), "k": normal(B, S, case.kv_heads, case.dim)}
    found |= {"v": normal(B, S, case.kv_heads, case.value_dim)}
    found |= {"sinks": normal(case.heads)} if case.sinks else {}
    found |= {"alibi_slopes": normal(case.heads).abs() / 8} if case.slopes else {}
    if case.documents == "left":
        padding = torch.arange(B)[:, None] * 3 + 2
        found["segment_ids"] = torch.where(torch.arange(S) < padding, -1, 0)
    elif case.documents == "mixed":
        found["segment_ids"] = torch.randint(-1, 3, (B, S), generator=random)
    return found


def truth(case: Case) -> torch.Tensor:
    """All tokens' outputs in fp64, [B, S, Hq, Dv]."""
    x, S = drawn(case), case.tokens
    documents = (x["segment_ids"],) * 2 if case.documents else None
    kept = oracle.allowed(S, S, causal=case.causal, window=case.window, documents=documents).unsqueeze(-3)
    if not case.causal:  # to what has come
        ends = list(accumulate(n for n, _ in case.steps))
        seen = torch.tensor([end for end, (n, _) in zip(ends, case.steps, strict=True) for _ in range(n)])
        kept = kept & (torch.arange(S) < seen[:, None])
    bias = -x["alibi_slopes"].double()[:, None, None] * oracle.distances(S, S) if case.slopes else None
    return oracle.attention(
        *(x[name].double() for name in "qkv"), kept=kept.expand(case.batch, case.heads, S, S), scale=case.scale,
        softcap=case.softcap, sinks=x["sinks"].double() if case.sinks else None, bias=bias,
    )[0]  # fmt: skip


def options(case: Case, x: dict[str, torch.Tensor]) -> dict[str, object]:
    per_head = {name: x[name] for name in ("sinks", "alibi_slopes") if name in x}
    return per_head | {
        "causal": case.causal, "scale": case.scale, "window": case.window, "softcap": case.softcap,
        "attention": case.attention,
    }  # fmt: skip


def lens_of(n: int, how: str, ranks: int) -> tuple[int, ...]:
    one_rank = {"first": 0, "last": ranks - 1}
    return tuple(n * (r == one_rank[how]) for r in range(ranks)) if how in one_rank else shard_lens(n, ranks)


def step(cache, group, case, x, at, n, how, layer=0):
    """This rank's call for the new tokens `at .. at + n`, and its output."""
    lens = (n,) * group.size if how == "all" else lens_of(n, how, group.size)
    first = at if how == "all" else at + sum(lens[: group.rank])
    part = slice(first, first + lens[group.rank])
    q, k, v = (x[name][:, part] for name in "qkv")
    ids = {"segment_ids": x["segment_ids"][:, part]} if "segment_ids" in x else {}
    given = {"replicated": True} if how == "all" else {"lens": lens if len(set(lens)) > 1 else None}
    return cache.attend(layer, q, k, v, **given, **ids, **options(case, x))


def play(group, case: Case) -> list[torch.Tensor]:
    """This rank's outputs, step by step."""
    cache, x = UlyssesKVCache(group, capacity=case.capacity), drawn(case)
    starts = accumulate((n for n, _ in case.steps), initial=0)
    outs = [step(cache, group, case, x, at, n, how) for at, (n, how) in zip(starts, case.steps, strict=False)]
    assert cache.length() == case.tokens
    return outs


def joined(case: Case, by_rank: list[list[torch.Tensor]]) -> torch.Tensor:
    """The outputs of all tokens, [B, S, Hq, Dv], of those of all ranks."""
    found = []
    for (_, how), outs in zip(case.steps, zip(*by_rank, strict=True), strict=True):
        assert how != "all" or all(torch.equal(out, outs[0]) for out in outs)
        found.append(outs[0] if how == "all" else torch.cat(outs, 1))
    return torch.cat(found, 1)


@contextmanager
def without_interpreter() -> Iterator[None]:
    """As on a CPU where Triton runs nothing: PyTorch moves the rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "INTERPRET", False)
        yield


@pytest.fixture(autouse=True)
def moves(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if "triton" in request.node.name else without_interpreter():
        yield


def play_on_a_process(ctx, cases, exchange="auto"):
    with UlyssesGroup(ctx.group, exchange=exchange) as group, without_interpreter():
        return [play(group, case) for case in cases]


def check(case: Case, found: list[torch.Tensor]) -> None:
    """All the same bits, and as near to the truth as the dtype allows."""
    expected = truth(case)
    for out in found:
        assert torch.equal(out, found[0])
    error = oracle.relative_error(found[0], expected)
    if case.dtype == "bf16":
        rounded = oracle.relative_error(expected.bfloat16(), expected)
        assert error < 4 * rounded
    else:
        assert error < {"fp32": 1e-6, "fp64": 1e-14}[case.dtype]


ONE_BY_ONE = ((1, "all"),) * 21 + ((1, "first"),) * 10 + ((1, "last"),) * 10
LONG = ((37, "even"), *ONE_BY_ONE)  # a prompt of an odd length and 41 tokens
CHUNKED = ((19, "even"), (2, "even"), (0, "even"), (5, "all"), (7, "last"), (3, "even"), *ONE_BY_ONE[20:22])
CASES = {
    "GQA": Case(LONG),
    "MHA": Case(CHUNKED, heads=12, kv_heads=12),
    "MQA": Case(CHUNKED, heads=12, kv_heads=1, batch=2),
    "6 heads": Case(CHUNKED, heads=6, kv_heads=3),
    "3 heads": Case(CHUNKED, heads=3, kv_heads=3, dim=5, value_dim=12),
    "aten": Case(((300, "even"), *ONE_BY_ONE), attention="aten", batch=2),
    "auto": Case(CHUNKED, attention="auto", capacity=64),
    "dense": Case(CHUNKED, causal=False),
    "window": Case(CHUNKED, window=(9, 0), heads=3, kv_heads=1),
    "window ahead": Case(CHUNKED, causal=False, window=(6, 4), scale=0.3),
    "gpt-oss": Case(CHUNKED, window=(20, 0), sinks=True),
    "gemma": Case(CHUNKED, softcap=2.0, heads=8, kv_heads=4),
    "alibi": Case(CHUNKED, slopes=True, heads=6, kv_heads=2),
    "left padding": Case(LONG, documents="left", batch=3),
    "documents": Case(CHUNKED, documents="mixed", batch=2, window=(11, 0), sinks=True, slopes=True, softcap=3.0),
    "bf16": Case(CHUNKED, dtype="bf16", value_dim=16, batch=2),
    "fp64": Case(CHUNKED, dtype="fp64", slopes=True),
}


def test_it_is_attention_of_the_whole_sequence(pool) -> None:
    """On processes, in the same bits on every rank and for every number of ranks."""
    cases = list(CASES.values())
    found = [pool.run(ranks, play_on_a_process, cases) for ranks in (1, 2, 3, 4)]
    for i, case in enumerate(cases):
        check(case, [joined(case, [outs[i] for outs in by_rank]) for by_rank in found])


def test_more_ranks_than_kv_heads(pool) -> None:
    cases = [Case(CHUNKED, heads=heads, kv_heads=kv_heads) for heads, kv_heads in ((8, 1), (28, 4), (3, 1))]
    for case, *by_rank in zip(cases, *pool.run(8, play_on_a_process, cases), strict=True):
        check(case, [joined(case, by_rank)])


def test_over_the_process_group(pool) -> None:
    cases = [CASES["6 heads"], CASES["documents"], CASES["bf16"]]
    for case, *by_rank in zip(cases, *pool.run(4, play_on_a_process, cases, "torch"), strict=True):
        check(case, [joined(case, by_rank)])


@pytest.mark.parametrize(
    "case",
    [
        Case((), heads=3, kv_heads=3, dim=16),
        Case((), window=(17, 0), sinks=True, softcap=2.0, slopes=True, dtype="bf16"),
        Case((), documents="left", batch=2),
        Case((), causal=False, dim=12),
    ],
    ids=["causal", "window", "left padding", "dense"],
)
def test_triton(case: Case) -> None:
    """In the interpreter, kernels and moves."""
    case = replace(case, attention="triton", steps=((21, "even"), (3, "all"), (14, "even"), (1, "first"), (1, "all")))
    check(case, [joined(case, run_virtual(ranks, lambda group: play(group, case))) for ranks in (1, 2)])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    group, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    how = st.sampled_from(["even", "first", "last", "all"])
    return Case(
        steps=tuple(draw(st.lists(st.tuples(st.sampled_from([0, 1, 1, 2, 5, 30]), how), min_size=1, max_size=9))),
        heads=group * kv_heads,
        kv_heads=kv_heads,
        dim=draw(st.sampled_from([3, 8, 16])),
        value_dim=draw(st.sampled_from([8, 11])),
        batch=draw(st.integers(1, 2)),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(*[st.integers(-1, 20)] * 2)),
        softcap=draw(st.sampled_from([None, 2.0])),
        sinks=draw(st.booleans()),
        slopes=draw(st.booleans()),
        documents=draw(st.sampled_from([None, "left", "mixed"])),
        capacity=draw(st.sampled_from([0, 7, 100])),
        seed=draw(st.integers(0, 2**16)),
    )


@given(cases(), st.integers(1, 5))
def test_any_steps(case: Case, ranks: int) -> None:
    check(case, [joined(case, run_virtual(ranks, lambda group: play(group, case)))])


@pytest.mark.parametrize("attention", ["aten", "reference", "triton"])
@pytest.mark.parametrize("heads", [(4, 2), (6, 3)], ids=str)
def test_prefill_is_ulysses_attention_to_the_bit(heads, attention: str) -> None:
    case = Case(((15, "even"),), *heads, attention=attention, dim=16, value_dim=16)

    def both(group):
        x, lens = drawn(case), shard_lens(case.tokens, group.size)
        first = sum(lens[: group.rank])
        q, k, v = (x[name][:, first : first + lens[group.rank]] for name in "qkv")
        layer = ulysses_attention(q, k, v, group, lens=lens, causal=True, attention=attention)
        return layer, UlyssesKVCache(group).attend(0, q, k, v, lens=lens, attention=attention)

    for layer, cached in run_virtual(4, both):
        assert torch.equal(layer, cached)


# -- what travels, and what is kept


def counted(ctx, exchange):
    case = Case(((24, "even"), (1, "first"), (1, "all")), heads=8, kv_heads=4, dim=16, value_dim=16, batch=2)
    with UlyssesGroup(ctx.group, exchange=exchange) as group, without_interpreter():
        cache, x, found = UlyssesKVCache(group, capacity=32), drawn(case), []
        for at, (n, how) in ((0, case.steps[0]), (24, case.steps[1]), (25, case.steps[2])):
            before = dict(group.counts)
            lens = (n,) * 4 if how == "all" else lens_of(n, how, 4)
            first = at + (0 if how == "all" else sum(lens[: ctx.rank]))
            q, k, v = (x[name][:, first : first + lens[ctx.rank]] for name in "qkv")
            with trace() as t:
                cache.attend(0, q, k, v, replicated=how == "all", lens=None if how == "all" else lens)
            sent = {e.step: e.sent for e in t.events if e.stream == "exchange" and e.rank == ctx.rank}
            found.append((sent, {name: n - before.get(name, 0) for name, n in group.counts.items()}))
        return found, cache.bytes


@pytest.mark.parametrize("exchange", ["shm", "torch"])
def test_one_exchange_each_way_and_its_bytes(pool, exchange) -> None:
    """In go the tokens that a rank has, to every other one its heads; out goes what it found for others' tokens.

    Of 8 heads and 4 kv heads a rank has 2 and 1.
    """
    q, kv, o = (2 * heads * 16 * 4 for heads in (2, 2, 2))  # bytes of a token: batch x heads x dim x fp32
    for rank, (found, kept) in enumerate(pool.run(4, counted, exchange)):
        has, all_ranks = int(rank == 0), {"control": 1, "exchange_out": 1}
        assert found[0] == (
            {"exchange_in": 3 * 6 * (q + kv), "exchange_out": 18 * o}, {"exchange_in": 1, **all_ranks}
        )  # fmt: skip
        assert found[1] == (
            {"exchange_in": 3 * has * (q + kv), "exchange_out": (1 - has) * o}, {"exchange_in": 1, **all_ranks}
        )  # fmt: skip
        assert found[2] == ({"exchange_out": 3 * o}, {"exchange_in": 0, **all_ranks})
        assert kept == 32 * kv


@pytest.mark.parametrize(("ranks", "heads", "kv_heads", "kept"), [(4, 6, 3, (1, 2, 1, 1)), (4, 3, 3, (1, 0, 1, 1))])
def test_a_rank_keeps_its_kv_heads_only(ranks, heads, kv_heads, kept) -> None:
    case = Case(((10, "even"),), heads=heads, kv_heads=kv_heads)

    def work(group):
        cache = UlyssesKVCache(group)
        step(cache, group, case, drawn(case), 0, 10, "even")
        return cache.bytes

    assert sorted(run_virtual(ranks, work)) == sorted(10 * n * (8 + 8) * 4 for n in kept)


def test_buffers_grow_by_half_and_keep_what_they_hold() -> None:
    case = Case(((10, "all"), *[(1, "all")] * 25), attention="aten")
    cache, x, sizes = UlyssesKVCache(capacity=4), drawn(case), []
    with UlyssesGroup() as group:
        cache = UlyssesKVCache(group, capacity=4)
        outs = [step(cache, group, case, x, 0, 10, "all")]
        for at in range(10, 35):
            outs.append(step(cache, group, case, x, at, 1, "all"))
            sizes.append(cache.bytes // (2 * 2 * 8 * 4))
    check(case, [torch.cat(outs, 1)])
    assert sizes == [15] * 5 + [22] * 7 + [33] * 11 + [49] * 2
    cache.reset()
    assert cache.bytes == cache.length() == 0


def test_documents_are_gathered_once_for_all_layers() -> None:
    case = Case(((9, "even"), (1, "first"), (1, "all")), documents="left", batch=2)

    def work(group):
        cache, x, counts = UlyssesKVCache(group), drawn(case), []
        for at, n, how in ((0, 9, "even"), (9, 1, "first"), (10, 1, "all")):
            before = group.counts["segment_ids"]
            lens = (n,) * group.size if how == "all" else lens_of(n, how, group.size)
            first = at + (0 if how == "all" else sum(lens[: group.rank]))
            q, k, v, ids = (x[name][:, first : first + lens[group.rank]] for name in ("q", "k", "v", "segment_ids"))
            given = {"replicated": True} if how == "all" else {"lens": lens}
            outs = [cache.attend(n, q, k, v, segment_ids=ids, **given) for n in range(3)]
            assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
            counts.append(group.counts["segment_ids"] - before)
        return counts

    assert run_virtual(3, work) == [[1, 1, 0]] * 3


# -- what else it can do


def test_crop_begins_again_from_there() -> None:
    case = Case(((12, "even"), (5, "all"), (3, "even")), documents="left", batch=2)

    def work(group):
        cache, x = UlyssesKVCache(group), drawn(case)
        for layer in (0, 1):
            step(cache, group, case, x, 0, 12, "even", layer)
        step(cache, group, case, x, 12, 5, "all")
        cache.crop(9)
        assert cache.length(0) == cache.length(1) == 9
        return [step(cache, group, case, x, 9, 11, "all", layer) for layer in (0, 1)]

    for outs in run_virtual(3, work):
        assert all(oracle.relative_error(out, truth(case)[:, 9:]) < 1e-6 for out in outs)


@pytest.mark.parametrize("index", [[1, 0], [1, 1, 0], [1]], ids=str)
def test_reorder_moves_entries_of_the_batch(index) -> None:
    case = Case(((13, "even"), (1, "all"), (2, "even")), documents="left", batch=2)

    def work(group):
        cache, x = UlyssesKVCache(group), drawn(case)
        for layer in (0, 4):
            step(cache, group, case, x, 0, 13, "even", layer)
        cache.reorder(torch.tensor(index, dtype=torch.int32))
        x = {name: t[index] for name, t in x.items()}
        return [step(cache, group, replace(case, batch=len(index)), x, 13, 3, "all", layer) for layer in (0, 4)]

    for outs in run_virtual(2, work):
        assert all(oracle.relative_error(out, truth(case)[index, 13:]) < 1e-6 for out in outs)


def test_repeat_is_for_beams() -> None:
    case = Case(((13, "even"), (3, "all")), batch=2, heads=3, kv_heads=3)

    def work(group):
        cache, x = UlyssesKVCache(group), drawn(case)
        cache.repeat(5)  # of nothing
        step(cache, group, case, x, 0, 13, "even")
        cache.repeat(2)
        x = {name: t.repeat_interleave(2, 0) for name, t in x.items()}
        return step(cache, group, replace(case, batch=4), x, 13, 3, "all")

    for out in run_virtual(4, work):
        assert oracle.relative_error(out, truth(case).repeat_interleave(2, 0)[:, 13:]) < 1e-6


def test_inference_mode_autocast_and_compiled_code() -> None:
    """Filled in inference mode it goes on outside of it; autocast rounds nothing; a graph breaks around it."""
    case = Case(((8, "all"), (3, "all"), (2, "all")))
    x = drawn(case)
    with UlyssesGroup() as group:
        cache = UlyssesKVCache(group, capacity=16)
        with torch.inference_mode():
            outs = [step(cache, group, case, x, 0, 8, "all").clone()]
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(step(cache, group, case, x, 8, 3, "all"))
        compiled = torch.compile(lambda q, k, v: cache.attend(0, q + 0, k, v) * 1, backend="eager")
        outs.append(compiled(*(x[name][:, 11:] for name in "qkv")))
    check(case, [torch.cat(outs, 1)])


# -- errors


def attempt(cache, group, kind, error, text, **changed):
    """What a rank sees of a call that is wrong on rank 1: that error, and a cache that is what it was."""
    held = cache.length(0), cache.length(1), cache.bytes
    given = {"layer": 0, **{name: torch.ones(2, 3, heads, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}}
    given |= changed if group.rank == 1 else {}
    with pytest.raises(error, match=text) as caught:
        cache.attend(**given)
    assert (cache.length(0), cache.length(1), cache.bytes) == held
    return type(caught.value).__name__


WRONG = {
    "another layer": (ShapeError, "layer: rank 1 has 1, ranks 0, 2 have 0", {"layer": 1}),
    "no layer": (OptionError, "layer = -1", {"layer": -1}),
    "replicated": (ShapeError, "replicated: rank 1 has True", {"replicated": True}),
    "lens": (OptionError, "lens goes with new tokens that are sharded", {"replicated": True, "lens": (3, 3, 3)}),
    "lens of words": (OptionError, "lens = 'abc'", {"lens": "abc"}),
    "lens of others": (ShapeError, "lens", {"lens": (3, 2, 3)}),
    "not causal": (ShapeError, "causal: rank 1 has False", {"causal": False}),
    "batch": (ShapeError, "a batch of 2, this call has 1", {n: torch.ones(1, 3, 2, 8) for n in "qkv"}),
    "heads": (ShapeError, "query and kv heads", {"q": torch.ones(2, 3, 2, 8)}),
    "head dim": (ShapeError, "head dim of v 8, this call has 9", {"v": torch.ones(2, 3, 2, 9)}),
    "no dims": (ShapeError, "q has shape", {"q": torch.tensor(1.0)}),
    "no tensor": (TypeError, "k is a list", {"k": [1]}),
    "dtype": (TypeError, "dtype", {n: torch.ones(2, 3, h, 8).double() for n, h in (("q", 4), ("k", 2), ("v", 2))}),
    "window": (OptionError, "window", {"window": 5}),
    "softcap": (OptionError, "softcap", {"softcap": "big"}),
    "scale": (OptionError, "scale", {"scale": "big"}),
    "sinks": (ShapeError, "sinks", {"sinks": torch.ones(3)}),
    "attention": (OptionError, "over a cache it must be", {"attention": "callable"}),
    "aten": (OptionError, "takes the first tokens of a sequence", {"attention": "aten"}),
    "gradient": (OptionError, "q require grad.*no_grad", {"q": torch.ones(2, 3, 4, 8, requires_grad=True)}),
    "documents": (OptionError, "segment_ids.*the new ones", {"segment_ids": None}),
    "ids of others": (ShapeError, "segment_ids has shape", {"segment_ids": torch.zeros(2, 4, dtype=torch.int64)}),
}  # fmt: skip


def make_mistakes(ctx):
    """Every call of WRONG on rank 1, between right ones."""
    case = Case(((9, "even"), (1, "all"), (9, "even")), batch=2)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with UlyssesGroup(ctx.group, timeout=timedelta(seconds=30)) as group, without_interpreter():
        cache, x, seen = UlyssesKVCache(group), drawn(case), {}
        packed = UlyssesKVCache(group)
        packed.attend(0, *(torch.ones(2, 3, h, 8) for h in (4, 2, 2)), segment_ids=ids)
        step(cache, group, case, x, 0, 9, "even")
        for kind, (error, text, changed) in WRONG.items():
            of_ids = "segment_ids" in changed
            if of_ids:
                changed = {"segment_ids": ids} | changed
                seen[kind] = attempt_packed(packed, group, error, text, ids, changed)
            else:
                seen[kind] = attempt(cache, group, kind, error, text, **changed)
        out = step(cache, group, case, x, 9, 1, "all")
        if ctx.rank == 1:
            cache.crop(5)
        seen["crop"] = attempt(cache, group, "crop", ShapeError, "tokens held: rank 1 has 5, ranks 0, 2 have 10")
        return seen, out


def attempt_packed(cache, group, error, text, ids, changed):
    q, k, v = (torch.ones(2, 3, h, 8) for h in (4, 2, 2))
    with pytest.raises(error, match=text) as caught:
        cache.attend(0, q, k, v, segment_ids=changed["segment_ids"] if group.rank == 1 else ids)
    assert cache.length() == 9
    return type(caught.value).__name__


def test_a_mistake_of_one_rank_raises_on_all_and_loses_nothing(pool) -> None:
    expected = truth(Case(((10, "all"), (9, "even")), batch=2))[:, 9:10]
    for _, out in (results := pool.run(3, make_mistakes)):
        assert oracle.relative_error(out, expected) < 1e-6
    assert all(seen == results[0][0] for seen, _ in results)


def test_mistakes_with_a_cache_of_one_rank() -> None:
    for capacity in (-1, 2.5, True):
        with pytest.raises(OptionError, match="capacity"):
            UlyssesKVCache(capacity=capacity)
    cache = UlyssesKVCache()
    cache.attend(0, *(torch.ones(2, 3, 2, 4),) * 3)
    for wrong in (-1, 1.0, None):
        with pytest.raises(OptionError, match="length"):
            cache.crop(wrong)
        with pytest.raises(OptionError, match="times"):
            cache.repeat(wrong)
    for wrong in ([0], torch.ones(2), torch.zeros(1, 1, dtype=torch.int64)):
        with pytest.raises(OptionError, match="index"):
            cache.reorder(wrong)
    for wrong in ([2], [-1, 0], []):
        with pytest.raises(ShapeError, match="index"):
            cache.reorder(torch.tensor(wrong, dtype=torch.int64))
    with pytest.raises(OutOfMemoryError, match="no memory on cpu for the keys"):
        UlyssesKVCache(capacity=1 << 50).attend(0, *(torch.ones(2, 3, 2, 4),) * 3)
    assert cache.length() == 3


def lose_a_rank(ctx, how):
    """Rank 1 is killed, or closes its group, between two steps of decoding."""
    case = Case(((6, "even"), (1, "all")))
    group, x = UlyssesGroup(ctx.group, timeout=timedelta(seconds=5)), drawn(case)
    cache = UlyssesKVCache(group)
    step(cache, group, case, x, 0, 6, "even")
    if ctx.rank == 1:
        if how == "closed":
            return group.close()
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(ExchangeError, match="rank 1|ranks \\[1\\]"):
        step(cache, group, case, x, 6, 1, "all")
    return cache.length(), time.monotonic() - started < 15


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_a_rank_that_is_lost(pool, how: str) -> None:
    found = pool.fresh(3, lose_a_rank, how)
    assert found[0] == found[2] == (6, True)
    assert how == "closed" or isinstance(found[1], Exit)


# -- a whole model


class Decoder:
    """Two layers with RoPE, GQA and RMS norms, in one dtype, of weights drawn in fp64."""

    HEADS, KV_HEADS, DIM, WIDTH, WORDS = 6, 3, 8, 48, 97

    def __init__(self, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(8)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=random, dtype=torch.float64) * columns**-0.5).to(dtype)

        qkv, inner = (self.HEADS + 2 * self.KV_HEADS) * self.DIM, self.HEADS * self.DIM
        self.words, self.head = weight(self.WORDS, self.WIDTH) * 7, weight(self.WORDS, self.WIDTH)
        self.layers = [
            (weight(qkv, self.WIDTH) * 2, weight(self.WIDTH, inner), weight(96, self.WIDTH), weight(self.WIDTH, 96))
            for _ in range(2)
        ]

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        """tokens and positions [n]; `attend(layer, q, k, v)` of [1, n, heads, D]."""
        x = self.words[tokens][None]
        angles = positions[:, None].double() * 10 ** (-torch.arange(self.DIM // 2, dtype=torch.float64) / 2)
        sizes = [self.HEADS, self.KV_HEADS, self.KV_HEADS]
        for n, (qkv, out, up, down) in enumerate(self.layers):
            q, k, v = (self.norm(x) @ qkv.T).unflatten(-1, (-1, self.DIM)).split(sizes, 2)
            q, k = (oracle.rope(t, angles.to(t.dtype), False) for t in (q, k))
            x = x + attend(n, q, k, v).flatten(2) @ out.T
            x = x + torch.nn.functional.gelu(self.norm(x) @ up.T) @ down.T
        return (self.norm(x) @ self.head.T)[0]


PROMPT = torch.arange(29) * 5 % 97
NEW = 64


def greedy_by_one() -> tuple[list[int], float]:
    """In fp64, without a cache, all over again for every token; and the least lead of a best token."""
    model, tokens, leads = Decoder(torch.float64), PROMPT.tolist(), []

    def attend(_, q, k, v):
        kept = oracle.allowed(q.size(1), q.size(1), causal=True)
        return oracle.attention(q, k, v, kept=kept)[0]

    for _ in range(NEW):
        best = model.logits(torch.tensor(tokens), torch.arange(len(tokens)), attend)[-1].topk(2)
        leads.append((best.values[0] - best.values[1]).item())
        tokens.append(int(best.indices[0]))
    return tokens[len(PROMPT) :], min(leads)


def greedy(ctx, new: int, replicated: bool):
    """In fp32: a sharded prompt, then tokens that every rank has, or that rank 0 alone has."""
    model, found = Decoder(torch.float32), []
    with UlyssesGroup(ctx.group) as group, torch.no_grad(), without_interpreter():
        cache = UlyssesKVCache(group, capacity=40)
        lens = shard_lens(len(PROMPT), group.size)
        first = sum(lens[: ctx.rank])
        mine = PROMPT[first : first + lens[ctx.rank]]
        logits = model.logits(
            mine, torch.arange(first, first + len(mine)), lambda n, *qkv: cache.attend(n, *qkv, lens=lens)
        )
        logits = gather_sequence(logits, group, 0, lens)[-1]
        lens = (1,) + (0,) * (group.size - 1)
        given = {"replicated": True} if replicated else {"lens": lens}
        while len(found) < new:
            found.append(int(logits.argmax()))
            has = 1 if replicated else lens[ctx.rank]
            token, at = torch.tensor(found[-1:] * has, dtype=torch.int64), torch.tensor([cache.length()] * has)
            logits = model.logits(token, at, lambda n, *qkv: cache.attend(n, *qkv, **given))
            logits = (logits if replicated else gather_sequence(logits, group, 0, lens))[0]
    return found


def test_greedy_tokens_are_those_of_one_device(pool) -> None:
    tokens, lead = greedy_by_one()
    assert lead > 5e-3 and len(set(tokens)) > 10
    for new, replicated in ((NEW, True), (NEW // 4, False)):
        assert pool.run(4, greedy, new, replicated) == [tokens[:new]] * 4
