"""A part of the queries in a call of its own: the same bits as in one call on all, and gradients that add up to its."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from test_attend import (
    KERNELS,
    NAMES,
    TWINS,
    Case,
    Memory,
    Problem,
    assert_close,
    joined,
    mask_of,
    partial_tiles,
    problem,
    run,
    spans_of,
    with_tiles,
)
from torch import Tensor

from ulysses_triton.kernels import _config, _mask, _options
from ulysses_triton.kernels._views import CUT, HeadGrads, Span

TILES = {"BLOCK_M": 128, "BLOCK_N": 128}
BY_QUERY = ("out", "lse", "dq")


def keys_of(case: Case, stop: int) -> int:
    """How many of the first keys the queries before `stop` need."""
    return min(case.Sk, stop) if case.causal and (case.documents is None or case.S == case.Sk) else case.Sk


def run_part(
    launchers, case: Case, p: Problem, memory: Memory, queries: range, keys: int,
    start: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Forward and backward of some queries; dk and dv in the type of sums, each in two spans."""
    forward, backward = launchers
    n, wide, at = len(queries), p.lse.dtype, slice(queries.start, queries.stop)
    out = spans_of(memory, n, (n // 3,), case.B, (case.hq, case.Dv, case.dtype), (case.hq, 0, wide))
    dq = spans_of(memory, n, (n // 2,), case.B, (case.hq, case.D, case.dtype))
    dkv = spans_of(memory, keys, (keys // 3,), case.B, (case.hkv, case.D, wide), (case.hkv, case.Dv, wide))
    lse = torch.full_like(p.lse[:, :, at], math.nan, memory_format=torch.contiguous_format)
    options = case.options_of(queries)
    heads = HeadGrads(*(None if x is None else torch.full_like(x, math.nan) for x in case.per_head()))
    q, k, v = p.q[at], p.k[:keys], p.v[:keys]
    forward(q, k, v, out, lse, options)
    backward(q, k, v, p.do[at], p.lse[:, :, at].contiguous(), p.delta[at], dq, dkv, options, heads, start)
    assert torch.equal(lse.permute(2, 1, 0), joined(out, 1))
    results = (joined(out, 0), joined(out, 1), joined(dq, 0), joined(dkv, 0), joined(dkv, 1))
    found = dict(zip(NAMES, results, strict=True)) | {"dsinks": heads.sinks, "dslopes": heads.slopes}
    return {name: result for name, result in found.items() if result is not None}


def summed(parts: list[dict[str, Tensor]], keys: int) -> dict[str, Tensor]:
    """The results of all queries from those of parts that follow each other."""
    found = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        if name in ("dk", "dv"):
            pieces = [torch.cat([x, x.new_zeros(keys - len(x), *x.shape[1:])]) for x in pieces]
        found[name] = torch.cat(pieces) if name in BY_QUERY else torch.stack(pieces).sum(0)
    return found


SHORT = Case(S=300, Sk=300, D=16, Dv=16, hq=1, scale=0.25, partial=True)
CASES = {
    "causal": replace(SHORT, S=600, Sk=600),
    "dense": replace(SHORT, causal=False, Sk=200),
    "more keys causal": replace(SHORT, Sk=410, softcap=2.0, scale=-0.3),
    "more queries GQA": replace(SHORT, Sk=200, hq=3, group=2, offset=1, Dv=24, sinks=True, slopes=True),
    "window": replace(SHORT, S=600, Sk=600, window=(300, 20), causal=False),
    "documents": replace(SHORT, B=2, documents="runs"),
    "documents of other keys": replace(SHORT, Sk=400, documents="runs"),
    "documents mixed window": replace(SHORT, documents="mixed", causal=False, window=(70, 9)),
    "dropout predicate": replace(SHORT, dropout=0.3, predicate="woven"),
    "lists": replace(SHORT, Sk=200, predicate="woven", causal=False, listed=True),
    "lists more keys": replace(SHORT, Sk=500, listed=True),
    "lists documents": replace(SHORT, hq=2, group=2, documents="mixed", listed=True),
    "D 256 bf16": replace(SHORT, D=256, Dv=256, scale=0.0625, dtype=torch.bfloat16),
    "fp16 window unaligned": replace(SHORT, D=33, Dv=17, aligned=False, dtype=torch.float16, window=(100, 0)),
    "everything": replace(
        SHORT, documents="runs", window=(60, 0), softcap=2.0, sinks=True, slopes=True, dropout=0.2,
        predicate="woven",
    ),
}  # fmt: skip


def check_parts(launchers, case: Case) -> None:
    """Parts of one, two and the last tiles together are one call on everything; every row of its results is its own."""
    memory = Memory(case.aligned)
    p = problem(case, memory)
    whole = run(launchers, case, p, memory)
    cuts = (*range(0, case.S, CUT), case.S)
    parts = [run_part(launchers, case, p, memory, range(*cut), keys_of(case, cut[1])) for cut in pairwise(cuts)]
    found = summed(parts, case.Sk)
    assert found.keys() == whole.keys()
    for name in BY_QUERY:
        assert torch.equal(found[name], whole[name]), name
    assert_close(case, p, found)
    memory.assert_gaps_untouched()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parts_of_the_queries(case: Case) -> None:
    with with_tiles(**TILES):
        check_parts(KERNELS, case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parts_of_the_queries_in_the_twin(case: Case) -> None:
    check_parts(TWINS, case)
    if case.dtype == torch.float32:
        check_parts(TWINS, replace(case, dtype=torch.float64))


@pytest.mark.parametrize("name", ["more keys causal", "lists"])
def test_parts_by_descriptors(name: str) -> None:
    with with_tiles(BLOCK_M=128, BLOCK_N=64, descriptors=True):
        check_parts(KERNELS, CASES[name])


CHAINED = {
    "causal": CASES["causal"],
    "dense": CASES["dense"],
    "softcap slopes": replace(SHORT, softcap=2.0, slopes=True),
    "predicate dropout bf16": replace(SHORT, predicate="woven", dropout=0.3, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("case", CHAINED.values(), ids=CHAINED)
def test_sums_that_start_from_the_part_before(case: Case) -> None:
    """The same bits as in one call, where the partial tiles of a key tile come ahead of the full ones in any case."""
    memory = Memory(True)
    p = problem(case, memory)
    with with_tiles(**TILES):
        whole = run(KERNELS, case, p, memory)
        start = None
        for cut in pairwise((*range(0, case.S, CUT), case.S)):
            keys = keys_of(case, cut[1])
            if start is not None:
                start = tuple(torch.nn.functional.pad(x, (0, 0, 0, keys - x.size(2))) for x in start)
            found = run_part(KERNELS, case, p, memory, range(*cut), keys, start)
            start = tuple(found[name].permute(2, 1, 0, 3).contiguous() for name in ("dk", "dv"))
    assert torch.equal(found["dk"], whole["dk"]) and torch.equal(found["dv"], whole["dv"])


@pytest.mark.parametrize("launchers", [KERNELS, TWINS], ids=["triton", "reference"])
@pytest.mark.parametrize("window", [None, (100, 0)], ids=str)
def test_one_part_with_a_start(launchers, window: tuple[int, int] | None) -> None:
    """A part that is not the last, on top of what was there; at any scale."""
    case = replace(SHORT, S=600, Sk=600, window=window, scale=0.3)
    memory = Memory(True)
    p = problem(case, memory)
    g = torch.Generator().manual_seed(5)
    start = tuple(torch.randn(case.hkv, case.B, 512, n, generator=g) for n in (case.D, case.Dv))
    with with_tiles(**TILES):
        alone, on_top = (run_part(launchers, case, p, memory, range(256, 512), 512, s) for s in (None, start))
    for name, before in zip(("dk", "dv"), start, strict=True):
        torch.testing.assert_close(on_top[name], alone[name] + before.permute(2, 1, 0, 3), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(on_top[name], alone[name]) for name in BY_QUERY)


@pytest.mark.parametrize("launchers", [KERNELS, TWINS], ids=["triton", "reference"])
def test_a_part_without_queries(launchers) -> None:
    memory = Memory(True)
    found = run_part(launchers, SHORT, problem(SHORT, memory), memory, range(256, 256), 256)
    assert len(found["out"]) == 0 and all(found[name].count_nonzero() == 0 for name in ("dk", "dv"))


@pytest.mark.parametrize("launchers", [KERNELS, TWINS], ids=["triton", "reference"])
@pytest.mark.parametrize("queries", [range(128, 256), range(256, 299)], ids=str)
def test_parts_end_where_tiles_do(launchers, queries: range) -> None:
    memory = Memory(True)
    with pytest.raises(AssertionError, match="a part of queries"):
        run_part(launchers, SHORT, problem(SHORT, memory), memory, queries, 300)


@pytest.mark.parametrize("launchers", [KERNELS, TWINS], ids=["triton", "reference"])
@pytest.mark.parametrize("name", ["more queries GQA", "window", "documents mixed window"])
def test_last_queries_begin_anywhere_in_forward(launchers, name: str) -> None:
    case = CASES[name]
    p = problem(case, Memory(True))
    found = {}
    with with_tiles(**TILES):
        for first in (0, 137, case.S - 1):
            options = case.options if first == 0 else case.options_of(range(first, case.S))
            found[first] = p.q.new_empty(case.S - first, case.B, case.hq, case.Dv)
            launchers[0](p.q[first:], p.k, p.v, [Span(0, (found[first], None))], None, options)
    for first, out in found.items():
        torch.testing.assert_close(out, found[0][first:], rtol=1e-5, atol=1e-5)


def test_tiles_of_a_part_are_those_of_the_whole_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they are looked up by is the same, so that every query gets the same bits."""
    asked, look_up = [], _config.tiles
    monkeypatch.setattr(_config, "tiles", lambda *args: asked.append((args[0], *args[2:])) or look_up(*args))
    case = replace(SHORT, S=300, Sk=410)
    memory = Memory(True)
    p = problem(case, memory)
    with _config.capture("sm_90"):
        for first, keys, options in ((0, 410, case.options), (256, 300, case.options_of(range(256, 300)))):
            out = [Span(0, (torch.empty(300 - first, 1, 1, 16), None))]
            KERNELS[0](p.q[first:], p.k[:keys], p.v[:keys], out, None, options)
    assert asked[0] == asked[1]


@triton.jit
def _within_kernel(
    whole_ptr, parts_ptr, cuts_ptr, n_parts, B, S, Sk, left, right, documents,
    HAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = (0, B, S, Sk, left, right, documents, ())
    for i in range(0, tl.cdiv(Sk, BLOCK_N)):
        full, full_end, begin, end, _ = _mask.tile_range_keys(i * BLOCK_N, 0, m, (), HAS, BLOCK_M, BLOCK_N)
        tl.store(whole_ptr + 4 * i, full)
        tl.store(whole_ptr + 4 * i + 1, full_end)
        tl.store(whole_ptr + 4 * i + 2, begin)
        tl.store(whole_ptr + 4 * i + 3, end)
        for j in range(0, n_parts):
            start = tl.load(cuts_ptr + j)
            stop = tl.load(cuts_ptr + j + 1)
            found = _mask.within(full, full_end, begin, end, start, stop, HAS)
            row = parts_ptr + 4 * (i * n_parts + j)
            tl.store(row, found[0])
            tl.store(row + 1, found[1])
            tl.store(row + 2, found[2])
            tl.store(row + 3, found[3])


@given(
    S=st.integers(1, 60), Sk=st.integers(1, 60), causal=st.booleans(), M=st.sampled_from([8, 16]),
    N=st.sampled_from([8, 16]), window=st.none() | st.tuples(*[st.integers(-1, 70)] * 2), chosen=st.integers(0, 255),
    documents=st.sampled_from([None, "runs", "mixed"]), predicate=st.sampled_from([None, "woven"]),
)  # fmt: skip
def test_parts_share_the_tiles_among_them(S, Sk, causal, M, N, window, chosen, documents, predicate) -> None:
    """Every query tile that a key tile meets falls to one part, full or partial as it is; none to the others."""
    case = Case(S, Sk, causal=causal, window=window, documents=documents, predicate=predicate)
    cuts = [0, *(i for i in range(M, S, M) if chosen >> i // M & 1), S]
    whole = torch.zeros(-(-Sk // N), 4, dtype=torch.int32)
    parts = torch.zeros(len(whole), len(cuts) - 1, 4, dtype=torch.int32)
    mask = mask_of(case.options, S, Sk)
    _config.launch(
        _within_kernel, (1,), num_warps=4, num_stages=1, whole_ptr=whole, parts_ptr=parts, n_parts=len(cuts) - 1,
        cuts_ptr=torch.tensor(cuts, dtype=torch.int32), B=1, S=S, Sk=Sk, BLOCK_M=M, BLOCK_N=N, **mask,
    )  # fmt: skip
    gaps = _options.flags(case.options).gaps
    for i, row in enumerate(whole.tolist()):
        for tiles_of in (lambda r: list(range(*r[:2], M)), lambda r: partial_tiles(r, M, gaps)):
            shared = [tiles_of(found) for found in parts[i].tolist()]
            assert [t for tiles in shared for t in tiles] == tiles_of(row)
            assert all(a <= t < z for tiles, (a, z) in zip(shared, pairwise(cuts), strict=True) for t in tiles)
