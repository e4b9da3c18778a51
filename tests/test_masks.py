"""Predicates and their twins, and block masks, held against Triton's interpreter, brute force and FlexAttention."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import triton
import triton.language as language
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from oracle import allowed
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from triton.language import int32, load, where

from ulysses_triton import OptionError, masks
from ulysses_triton.kernels import _blocks
from ulysses_triton.kernels._predicate import evaluate
from ulysses_triton.kernels._views import Blocks, Documents, HeadMap, Options, Predicate

STRIDE = tl.constexpr(3)
PLAIN = 3


@masks.register
@triton.jit
def prefix(batch, head, q_pos, kv_pos, lens):
    return (kv_pos <= q_pos) | (kv_pos < tl.load(lens + batch))


@masks.register
@triton.jit
def packed(batch, head, q_pos, kv_pos, q_ids, k_ids, n):
    size = tl.load(n)
    return language.load(q_ids + batch * size + q_pos) == tl.load(batch * size + k_ids + kv_pos)


@masks.register
@triton.jit
def strided(batch, head, q_pos, kv_pos):
    behind = q_pos - kv_pos  # of either sign
    return (behind % STRIDE == -2) | (behind // 4 == 0) | ((3 - behind) % 5 == 1) | (7 // (behind * 2 + 1) == -2)


@masks.register
@triton.jit
def by_head(batch, head, q_pos, kv_pos):
    reach = tl.where(head % 2 == 0, 2, 5) + tl.minimum(batch, 3)
    return (tl.abs(q_pos - kv_pos) <= reach) & ~(kv_pos == 4) & (tl.maximum(q_pos, 2) < 9)


@triton.jit
def near(distance, REACH: tl.constexpr = 2):
    return tl.exp(-distance.to(tl.float32) / 2) > tl.sqrt(REACH / (1.0 + distance * distance)) / 3


@masks.register
@triton.jit
def with_helper(batch, head, q_pos, kv_pos):
    kept = near(q_pos - kv_pos)
    for i in range(2):
        kept = kept | (tl.cdiv(kv_pos, 3) == (q_pos >> 1) + i) ^ near(kv_pos, 4)
    return kept


@masks.register
@triton.jit
def looked_up(batch, head, q_pos, kv_pos, table, flags):
    place = kv_pos - q_pos  # elements before the first one are not read
    score = tl.load(table + 2 * place, mask=(place >= 0) & (place < 4), other=-1.0)
    return (score > 0.5) & (tl.load(flags + head) | (q_pos == kv_pos))


@triton.jit
def table_of(out, sizes, captured, PREDICATE: tl.constexpr):
    """out [B, H, S, Sk] = the predicate, a program for every batch and head."""
    S, Sk = tl.load(sizes), tl.load(sizes + 1)
    i_b, i_h = tl.program_id(0), tl.program_id(1)
    q_pos, kv_pos = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    inside = (q_pos < S) & (kv_pos < Sk)
    kept = PREDICATE(i_b, i_h, tl.minimum(q_pos, S - 1), tl.minimum(kv_pos, Sk - 1), *captured)
    at = ((i_b * tl.num_programs(1) + i_h) * S + q_pos) * Sk + kv_pos
    tl.store(out + at, kept.to(tl.int8), mask=inside)


def indices(B: int, H: int, S: int, Sk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, i, j = (torch.arange(n) for n in (B, H, S, Sk))
    return b[:, None, None, None], h[:, None, None], i[:, None], j


IDS = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3], [5, 5, 5, 5, 6, 6, 7, 8, 8, 8, 8]])
CASES: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "prefix": (prefix, (torch.tensor([7, 2]),)),
    "packed": (packed, (IDS, IDS.flip(1).contiguous().int(), torch.tensor([11]))),
    "strided": (strided, ()),
    "by_head": (by_head, ()),
    "with_helper": (with_helper, ()),
    "looked_up": (looked_up, (torch.tensor([0.9, 9.0, 0.1, 9.0, 0.4, 9.0, 0.7]), torch.tensor([True, False, True]))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_twin_agrees_with_triton(name: str) -> None:
    function, captured = CASES[name]
    B, H, S, Sk = 2, 3, 11, 11
    out = torch.full((B, H, S, Sk), -1, dtype=torch.int8)
    table_of[(B, H)](out, torch.tensor([S, Sk], dtype=torch.int32), captured, PREDICATE=function)
    found = evaluate(Predicate(function, captured), *indices(B, H, S, Sk))
    assert found.dtype == torch.bool and found.shape == out.shape
    assert 0 < found.sum() < found.numel()
    assert torch.equal(found, out == 1) and out.min() == 0


def test_integers_divide_as_in_c() -> None:
    behind = torch.arange(11)[:, None] - torch.arange(11)
    expected = (
        (behind.fmod(3) == -2)
        | (torch.div(behind, 4, rounding_mode="trunc") == 0)
        | ((3 - behind).fmod(5) == 1)
        | (torch.div(torch.tensor(7), behind * 2 + 1, rounding_mode="trunc") == -2)
    )
    assert torch.equal(evaluate(Predicate(strided), *indices(1, 1, 11, 11))[0, 0], expected)


def test_a_twin_knows_names_that_the_interpreter_does_not() -> None:
    """Closures and names imported one by one, which compiled kernels may use; numbers for batch and head."""
    reach = tl.constexpr(2)

    @triton.jit
    def enclosed(batch, head, q_pos, kv_pos, lens):
        longer = where(head > 0, reach + head, triton.language.load(lens + batch))
        return (near(q_pos - kv_pos) | (tl.math.abs(q_pos - kv_pos) <= longer)) & (load(lens + batch).to(int32) > 3)

    predicate = Predicate(enclosed, (torch.tensor([1, 4, 2]),))
    _, _, i, j = indices(1, 1, 6, 6)
    assert not evaluate(predicate, 0, 1, i, j).any()
    near_ones = evaluate(Predicate(with_neither), 0, 0, i, j)
    assert torch.equal(evaluate(predicate, 1, 1, i, j), near_ones | ((i - j).abs() <= 3))
    assert torch.equal(evaluate(predicate, *indices(2, 2, 6, 6))[1, 0], near_ones | ((i - j).abs() <= 4))


@triton.jit
def sparse(batch, head, q_pos, kv_pos, n, ids):
    return tl.load(ids + kv_pos, mask=kv_pos < tl.load(n)) == q_pos


def test_a_load_reads_nothing_where_its_mask_is_false() -> None:
    for n in (0, 2):
        found = evaluate(Predicate(sparse, (torch.tensor([n]), torch.tensor([2, 1][:n]))), *indices(1, 1, 3, 4))
        expected = torch.tensor([2, 1, 0, 0] if n else [0, 0, 0, 0]) == torch.arange(3)[:, None]
        assert torch.equal(found[0, 0], expected)


@triton.jit
def with_neither(batch, head, q_pos, kv_pos):
    return near(q_pos - kv_pos)


@triton.jit
def asks_if(batch, head, q_pos, kv_pos):
    if q_pos > kv_pos:
        return kv_pos > 0
    return kv_pos > 1


@triton.jit
def asks_and(batch, head, q_pos, kv_pos):
    return q_pos >= kv_pos and kv_pos > 1


@triton.jit
def reads_a_global(batch, head, q_pos, kv_pos):
    return q_pos > kv_pos + PLAIN


@triton.jit
def multiplies(batch, head, q_pos, kv_pos):
    return tl.dot(q_pos, kv_pos) > 0


@triton.jit
def indexes(batch, head, q_pos, kv_pos):
    return q_pos[:, None] > kv_pos


@triton.jit
def returns_a_number(batch, head, q_pos, kv_pos):
    return q_pos - kv_pos


@triton.jit
def divides_floats(batch, head, q_pos, kv_pos):
    return (q_pos / 2) // 2 > kv_pos


@triton.jit
def exp_of_integers(batch, head, q_pos, kv_pos):
    return tl.exp(q_pos) > kv_pos


@triton.jit
def adds_bools(batch, head, q_pos, kv_pos):
    return (q_pos > 1) + (kv_pos > 1) == 2


@triton.jit
def pythons_abs(batch, head, q_pos, kv_pos):
    return abs(q_pos - kv_pos) < 3


@triton.jit
def pythons_max(batch, head, q_pos, kv_pos):
    return max(q_pos, kv_pos) < 3


@triton.jit
def reads_beyond(batch, head, q_pos, kv_pos, lens):
    return tl.load(lens + q_pos) > kv_pos


@triton.jit
def reads_before(batch, head, q_pos, kv_pos, lens):
    return tl.load(lens - kv_pos) > q_pos


@triton.jit
def loads_nothing(batch, head, q_pos, kv_pos, lens):
    return (lens == 3) | (q_pos > kv_pos)


@triton.jit
def loads_too_late(batch, head, q_pos, kv_pos, lens):
    return q_pos != lens


@triton.jit
def adds_pointers(batch, head, q_pos, kv_pos, lens, more):
    return tl.load(lens + q_pos + more) > 0


@triton.jit
def returns_nothing(batch, head, q_pos, kv_pos):
    kv_pos < q_pos  # noqa: B015


@triton.jit
def reads_an_index(batch, head, q_pos, kv_pos):
    return tl.load(q_pos) > kv_pos


@triton.jit
def uses_a_method(batch, head, q_pos, kv_pos):
    return q_pos.max() > kv_pos


LENS = torch.tensor([4, 5])


@pytest.mark.parametrize(
    "function, captured, reason",
    [
        (asks_if, (), "truth of a tensor"),
        (asks_and, (), "truth of a tensor"),
        (reads_a_global, (), r"PLAIN = 3 from outside; write PLAIN = tl.constexpr"),
        (multiplies, (), "uses tl.dot"),
        (indexes, (), "not subscriptable"),
        (returns_a_number, (), "returns torch.int64 instead of bool"),
        (divides_floats, (), "// on floats"),
        (exp_of_integers, (), "tl.exp of torch.int64: cast it first"),
        (adds_bools, (), "two bools"),
        (pythons_abs, (), "'abs' is not defined"),
        (pythons_max, (), "'max' is not defined.*maximum"),
        (reads_beyond, (LENS,), "element 2 of captured tensor 0, which has 2; give tl.load a mask"),
        (reads_before, (LENS,), "element -1 of captured tensor 0"),
        (loads_nothing, (LENS,), "compares captured tensor 0, which it has to tl.load first"),
        (loads_too_late, (LENS,), "computes with captured tensor 0"),
        (adds_pointers, (LENS, LENS), "adds captured tensor 1, not yet loaded, to captured tensor 0"),
        (returns_nothing, (), "NoneType"),
        (reads_an_index, (), "something else than a captured tensor"),
        (uses_a_method, (), r"uses \.max of a tensor"),
        (prefix, (), "missing 1 required positional argument"),
    ],
)
def test_what_a_twin_cannot_do_is_an_error_that_says_so(
    function: Any, captured: tuple[Tensor, ...], reason: str
) -> None:
    with pytest.raises(TypeError, match=f"{function.fn.__name__} cannot run in PyTorch: .*{reason}.*write tl.where"):
        evaluate(Predicate(function, captured), *indices(1, 1, 4, 4))


# Block masks. Small blocks, so that brute force is cheap.

BLOCK = 4


def dense_status(kept: Tensor, block: int) -> Tensor:
    """[B, H, S, Sk] -> status, block by block."""
    B, H, S, Sk = kept.shape
    n_q, n_k = math.ceil(S / block), math.ceil(Sk / block)
    status = torch.empty(B, H, n_q, n_k, dtype=torch.uint8)
    for b, h, m, n in product(range(B), range(H), range(n_q), range(n_k)):
        tile = kept[b, h, m * block : m * block + block, n * block : n * block + block]
        status[b, h, m, n] = 2 if tile.all() else 1 if tile.any() else 0
    return status


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("S, Sk", [(11, 11), (8, 9), (3, 4)])
def test_status_by_brute_force(name: str, S: int, Sk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "PAIRS", 3 * BLOCK * BLOCK * 2)  # two key blocks at once
    predicate = Predicate(*CASES[name])
    found = _blocks.status(predicate, 2, 3, S, Sk, torch.device("cpu"), block=BLOCK)
    assert torch.equal(found, dense_status(evaluate(predicate, *indices(2, 3, S, Sk)), BLOCK))


def documents_of(q_ids: Tensor, k_ids: Tensor) -> tuple[Documents, Tensor, Tensor]:
    """By loops: the queries' side, the pairs of equal documents, and how far each query lies behind each key."""
    (B, S), Sk = q_ids.shape, k_ids.shape[1]
    side = torch.zeros(5, B, S, dtype=torch.int32)
    same, behind = torch.zeros(B, S, Sk, dtype=torch.bool), torch.zeros(B, S, Sk, dtype=torch.long)
    for b in range(B):
        for i in range(S):
            keys = (k_ids[b] == q_ids[b, i]).nonzero().flatten()
            first = int((q_ids[b] == q_ids[b, i]).nonzero()[0])
            low, high = (int(keys[0]), int(keys[-1]) + 1) if len(keys) else (0, 0)
            place = low + i - first
            side[:, b, i] = torch.tensor(
                [int(q_ids[b, i]), low, high, high if len(keys) == high - low else low, place], dtype=torch.int32
            )
            same[b, i] = (k_ids[b] == q_ids[b, i]) & (q_ids[b, i] >= 0)
            behind[b, i] = place - torch.arange(Sk)
    return Documents(side, side), same, behind


@given(st.data())
def test_combine_by_brute_force(data: st.DataObject) -> None:
    draw: Callable[[st.SearchStrategy[Any]], Any] = data.draw
    B, S, Sk = draw(st.integers(1, 2)), draw(st.integers(1, 19)), draw(st.integers(1, 19))
    bound = st.integers(-1, 12)
    causal, left = draw(st.booleans()), draw(bound)
    window = draw(st.sampled_from([None, (left, 0 if causal else draw(bound))]))
    options = Options(1.0, causal, HeadMap(1, 0), window)
    left, right = options.bounds
    behind = (torch.arange(S)[:, None] - torch.arange(Sk))[None]
    same, one_run = torch.ones_like(behind, dtype=torch.bool), True
    if draw(st.booleans()):
        ids = [
            torch.tensor([draw(st.lists(st.integers(-1, 3), min_size=n, max_size=n)) for _ in range(B)])
            for n in (S, Sk)
        ]
        if draw(st.booleans()):
            ids = [x.sort(-1).values for x in ids]
        else:
            one_run = False
        documents, same, behind = documents_of(*ids)
        options = options._replace(documents=documents)
    kept = same & ((behind <= left) | (left < 0)) & ((-behind <= right) | (right < 0))

    found = _blocks.combine(None, options, S, Sk, block=BLOCK)
    exact = dense_status(kept[:, None], BLOCK)
    if Sk % BLOCK:  # loads of a block that reaches past the keys need a mask
        exact[..., -1].clamp_(max=1)
    assert found.dtype == torch.uint8 and found.shape == exact.shape
    if one_run:
        assert torch.equal(found, exact)
    else:  # an interval with keys of others in it: never too little
        assert not ((found == 0) & (exact > 0)).any() and not ((found == 2) & (exact < 2)).any()

    given_status = torch.randint(3, (draw(st.sampled_from([1, B])), draw(st.integers(1, 3)), *exact.shape[2:])).byte()
    both = _blocks.combine(given_status, options, S, Sk, block=BLOCK)
    assert torch.equal(both, torch.minimum(found, given_status).to(torch.uint8))


def dense(blocks: Blocks, heads: HeadMap, hq: int) -> tuple[Tensor, Tensor]:
    """The status that each of the two sides tells, [B, heads, n_q, n_k]; what is listed twice fails."""
    B, H, n_q, _ = blocks.q_rows.shape
    hkv, n_k = blocks.k_rows.shape[1:3]
    by_query, by_key = (torch.zeros(B, h, n_q, n_k, dtype=torch.uint8) for h in (H, hq))
    for b, h, m in product(range(B), range(H), range(n_q)):
        start, middle, end = blocks.q_rows[b, h, m].tolist()
        for part, tiles in enumerate((blocks.q_tiles[start:middle], blocks.q_tiles[middle:end])):
            assert tiles.tolist() == sorted(set(tiles.tolist()))
            by_query[b, h, m, tiles.long()] += part + 1
    for b, g, n in product(range(B), range(hkv), range(n_k)):
        start, middle, end = blocks.k_rows[b, g, n].tolist()
        for part, tiles in enumerate((blocks.k_tiles[start:middle], blocks.k_tiles[middle:end])):
            assert tiles.tolist() == sorted(set(tiles.tolist()))
            for h, m in (divmod(x, n_q) for x in tiles.tolist()):
                assert (h + heads.offset) // heads.group == g
                by_key[b, h, m, n] += part + 1
    return by_query, by_key


@given(st.data())
def test_lists_tell_the_status_on_both_sides(data: st.DataObject) -> None:
    draw: Callable[[st.SearchStrategy[Any]], Any] = data.draw
    B, hq, n_q, n_k = (draw(st.integers(1, 4)) for _ in range(4))
    group = draw(st.integers(1, 3))
    heads = HeadMap(group, draw(st.integers(0, 5)))
    hkv = (hq - 1 + heads.offset) // group + 1
    H = draw(st.sampled_from([1, hq]))
    status = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=B * H * n_q * n_k, max_size=B * H * n_q * n_k)))
    status = status.view(B, H, n_q, n_k).byte()
    blocks = _blocks.lists(status, heads, hq, hkv)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in blocks)
    assert blocks.q_rows.shape == (B, H, n_q, 3) and blocks.k_rows.shape == (B, hkv, n_k, 3)
    by_query, by_key = dense(blocks, heads, hq)
    assert torch.equal(by_query, status) and torch.equal(by_key, status.expand(B, hq, n_q, n_k))
    assert len(blocks.q_tiles) == (status > 0).sum() and len(blocks.k_tiles) == (by_key > 0).sum()


def test_the_worked_example() -> None:
    options = Options(1.0, True, HeadMap(1, 0))
    alone = dense_status((torch.arange(10) < 8).expand(1, 1, 10, 10), 4)
    assert alone[0, 0].tolist() == [[2, 2, 0]] * 3
    status = _blocks.combine(alone, options, 10, 10, block=4)
    assert status[0, 0].tolist() == [[1, 0, 0], [2, 1, 0], [2, 2, 0]]
    blocks = _blocks.lists(status, options.heads, 1, 1)
    assert blocks.q_rows[0, 0].tolist() == [[0, 1, 1], [1, 2, 3], [3, 3, 5]]
    assert blocks.q_tiles.tolist() == [0, 1, 0, 0, 1]
    assert blocks.k_rows[0, 0].tolist() == [[0, 1, 3], [3, 4, 5], [5, 5, 5]]
    assert blocks.k_tiles.tolist() == [0, 1, 2, 1, 2]


def test_lists_that_do_not_fit_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    status = torch.ones(1, 1, 1, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="count in int32"):
        _blocks._lists(torch.zeros(1, dtype=torch.long), status.flatten() == 2, torch.zeros(1).long(), 1, 2**31)


# What users call.


def test_a_block_mask_agrees_with_flex_attention() -> None:
    lens = torch.tensor([300, 20])
    found = masks.block_mask((prefix, lens), batch=2, q_len=512, kv_len=384)
    theirs = create_block_mask(
        lambda b, h, i, j: (j <= i) | (j < lens[b]), 2, None, 512, 384, device="cpu", BLOCK_SIZE=128
    )
    assert theirs.full_kv_num_blocks is not None
    assert torch.equal((found.status == 1).sum(-1).int(), theirs.kv_num_blocks)
    assert torch.equal((found.status == 2).sum(-1).int(), theirs.full_kv_num_blocks)
    assert found.sparsity() == theirs.sparsity() / 100 > 0


def test_a_block_mask_is_what_it_was_made_of() -> None:
    lens = torch.tensor([300])
    mask = masks.block_mask((prefix, lens), q_len=700)
    assert (mask.name, mask.batch, mask.heads, mask.q_len, mask.kv_len) == ("prefix", None, None, 700, 700)
    assert mask.status.shape == (1, 1, 6, 6) and mask.predicate.captured[0] is lens
    assert repr(mask) == "BlockMask(prefix, batch=None, heads=None, q_len=700, kv_len=700, 33% empty)"
    name, captured, status = masks.parse(mask)
    assert name == "prefix" and captured == (lens,) and status is mask.status
    assert allowed(700, 700, causal=True).logical_or(torch.arange(700) < 300)[:, 640:].any()
    with pytest.raises(OptionError, match="got a block mask"):
        masks.block_mask(mask, q_len=700)


def test_masks_are_registered_once_by_name() -> None:
    assert masks.by_name("prefix") is prefix and masks.register(prefix) is prefix
    assert masks.parse(prefix.fn.__globals__["strided"]) == ("strided", (), None)

    def again() -> Any:
        @triton.jit
        def prefix(batch, head, q_pos, kv_pos):
            return kv_pos <= q_pos

        return prefix

    with pytest.raises(OptionError, match="prefix is registered already; rename one of them"):
        masks.register(again())
    with pytest.raises(OptionError, match=r"masks.register\(prefix\)"):
        masks.parse(again())
    with pytest.raises(OptionError, match=r"near takes \(distance, REACH\)"):
        masks.register(near)
    with pytest.raises(OptionError, match="no @triton.jit function"):
        masks.register(lambda batch, head, q_pos, kv_pos: kv_pos <= q_pos)
    with pytest.raises(OptionError, match="no mask predicate is named nothing"):
        masks.by_name("nothing")


@pytest.mark.parametrize(
    "mask, reason",
    [
        (lambda b, h, i, j: j <= i, "mask is <function .*expected a predicate under @masks.register"),
        ((), "mask is"),
        ("prefix", "mask is 'prefix'"),
        (None, "mask is None"),
        (near, "near is not registered"),
        ((prefix, 3), "captured value 0 of the mask predicate prefix is 3"),
        ((prefix, torch.ones(4)[::2]), r"has strides \(2,\).*contiguous"),
        (prefix, "given 0 captured tensors"),
        ((prefix, LENS, LENS), "given 2 captured tensors"),
    ],
)
def test_masks_that_are_none(mask: Any, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        masks.parse(mask)


def test_block_masks_that_cannot_be() -> None:
    for wrong in ({"q_len": 0}, {"q_len": 4, "batch": -1}, {"q_len": 4, "heads": 2.0}, {"q_len": 4, "kv_len": 0}):
        with pytest.raises(OptionError, match="it must be an integer of at least 1"):
            masks.block_mask(strided, **wrong)
    with pytest.raises(OptionError, match="prefix cannot run in PyTorch: it loads element 2"):
        masks.block_mask((prefix, LENS), batch=3, q_len=4)
