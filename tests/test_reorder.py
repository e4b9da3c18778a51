"""Zigzag and striped shards to contiguous ones and back, against index arithmetic on the whole sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ulysses_triton import (
    ShapeError,
    UlyssesGroup,
    from_striped,
    from_zigzag,
    run_virtual,
    shard_sequence,
    to_striped,
    to_zigzag,
    ulysses_attention,
)

WAYS = {"zigzag": (from_zigzag, to_zigzag), "striped": (from_striped, to_striped)}


def tokens_of(order, rank, ranks, tokens):
    """The whole sequence's numbers of a rank's tokens."""
    if order == "contiguous":
        return torch.arange(rank * tokens, (rank + 1) * tokens)
    if order == "striped":
        return torch.arange(ranks * tokens)[rank::ranks]
    chunks = torch.arange(ranks * tokens).view(2 * ranks, tokens // 2)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def there_and_back(group, order, tokens, shape, dim, dtype):
    """What is wrong with both ways and their gradients: x is [..., S, ...] with S at `dim`."""
    whole = torch.randn(shape[:dim] + (group.size * tokens,) + shape[dim:], generator=torch.Generator().manual_seed(0))
    weights = (whole.flip(dim) * 3).to(dtype)
    whole = whole.to(dtype)
    named = {n: tokens_of(n, group.rank, group.size, tokens) for n in (order, "contiguous")}
    wrong = []
    for way, source, target in zip(WAYS[order], (order, "contiguous"), ("contiguous", order), strict=True):
        before = sum(n for kind, n in group.counts.items() if kind != "control")
        x = whole.index_select(dim, named[source]).requires_grad_()
        y = way(x, group, dim - whole.dim())
        if not torch.equal(y, whole.index_select(dim, named[target])):
            wrong.append(way.__name__)
        dy = weights.index_select(dim, named[target]).transpose(0, -1).contiguous().transpose(0, -1)  # any strides
        (grad,) = torch.autograd.grad(y, x, dy)
        if not torch.equal(grad, weights.index_select(dim, named[source])):
            wrong.append(f"gradient of {way.__name__}")
        if sum(n for kind, n in group.counts.items() if kind != "control") - before != 2:
            wrong.append(f"exchanges of {way.__name__}")
    return wrong


@given(
    st.sampled_from(list(WAYS)),
    st.integers(1, 4),
    st.integers(0, 9),
    st.lists(st.integers(0, 3), max_size=3),
    st.data(),
)
def test_both_orders_follow_index_arithmetic(order, ranks, tokens, shape, data):
    tokens = tokens * 2 if order == "zigzag" else tokens
    dim = data.draw(st.integers(0, len(shape)))
    found = run_virtual(ranks, lambda g: there_and_back(g, order, tokens, tuple(shape), dim, torch.float32))
    assert found == [[]] * ranks


def on_process(ctx, exchange):
    with UlyssesGroup(ctx.group, exchange=exchange) as group:
        cases = [("zigzag", 6, (2, 5), 1), ("zigzag", 0, (3,), 0), ("striped", 7, (2, 5), 1), ("striped", 1, (), 0)]
        return [there_and_back(group, *case, dtype) for case in cases for dtype in (torch.float64, torch.bfloat16)]


@pytest.mark.parametrize("exchange", ["shm", "torch"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_both_orders_on_processes(pool, ranks, exchange):
    assert pool.run(ranks, on_process, exchange) == [[[]] * 8] * ranks


def zigzag_layer(ctx):
    """Causal attention in a model that keeps its tokens in zigzag, and its gradients."""
    torch.manual_seed(0)  # the same on every rank
    with UlyssesGroup(ctx.group) as group:
        attention_of_zigzag_shards(group)


def attention_of_zigzag_shards(group):
    q, k, v, dout = torch.randn(4, 1, 8 * group.size, 4, 16, dtype=torch.float64)
    mine = [to_zigzag(shard_sequence(x, group), group).requires_grad_() for x in (q, k, v)]
    out = to_zigzag(ulysses_attention(*(from_zigzag(x, group) for x in mine), group, causal=True), group)
    grads = torch.autograd.grad(out, mine, to_zigzag(shard_sequence(dout, group), group))
    leaves = [x.transpose(1, 2).requires_grad_() for x in (q, k, v)]
    whole = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    expected = [whole, *torch.autograd.grad(whole, leaves, dout.transpose(1, 2))]
    here = tokens_of("zigzag", group.rank, group.size, 8)
    for found, wanted in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(found, wanted.transpose(1, 2)[:, here])


def test_a_layer_of_zigzag_shards_on_processes(pool):
    pool.run(4, zigzag_layer)


def test_lengths_that_do_not_fit_raise_on_every_rank():
    def odd(group):
        with pytest.raises(ShapeError, match="needs a multiple of 6 tokens" if group.rank == 1 else "rank 1 refused"):
            from_zigzag(torch.ones(1, 5 if group.rank == 1 else 4), group)
        with pytest.raises(ShapeError, match="tokens: rank 0 has 3, ranks 1, 2 have 2"):
            from_striped(torch.ones(1, 3 if group.rank == 0 else 2), group)
        with pytest.raises(ShapeError, match="dim = 2 is outside"):
            to_striped(torch.ones(1, 2), group, dim=2)

    run_virtual(3, odd)
