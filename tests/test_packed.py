"""Packed documents: what they mean, and that their numbers travel once per batch of tokens."""

from __future__ import annotations

import pytest
import torch

from ulysses_triton import ShapeError, UlyssesGroup, run_virtual, ulysses_attention

LENGTHS = [5, 0, 1, 12, 0, 2, 20]  # of documents, 40 tokens in all
OFFSETS = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
TOKENS = sum(LENGTHS)
IDS = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]


def inputs(tokens=TOKENS, batch=1, requires_grad=False):
    random = torch.Generator().manual_seed(3)
    return [
        torch.randn(batch, tokens, h, 16, generator=random).requires_grad_(requires_grad) for h in (4, 2, 2)
    ]  # fmt: skip


def shards(tensors, group):
    each = tensors[0].size(1) // group.size
    return [x[:, group.rank * each : (group.rank + 1) * each] for x in tensors]


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("attention", ["reference", "triton"])
def test_every_document_is_as_if_alone(attention, causal):
    """Empty ones, single tokens and long ones; with a window too, which then counts inside of the document."""
    for options in ({}, {"window": (4, 2)}):
        q, k, v = inputs(requires_grad=True)
        whole = ulysses_attention(q, k, v, cu_seqlens=OFFSETS, causal=causal, attention=attention, **options)
        grads = torch.autograd.grad(whole.square().sum(), (q, k, v))
        for begin, end in zip(OFFSETS, OFFSETS[1:], strict=False):
            part = [x.detach()[:, begin:end].clone().requires_grad_() for x in (q, k, v)]
            alone = ulysses_attention(*part, causal=causal, attention=attention, **options)
            torch.testing.assert_close(whole[:, begin:end], alone, rtol=1e-5, atol=2e-6)
            for whole_grad, grad in zip(grads, torch.autograd.grad(alone.square().sum(), part), strict=True):
                torch.testing.assert_close(whole_grad[:, begin:end], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["reference", "triton"])
def test_offsets_of_keys_align_at_the_beginning_of_each_document(attention):
    """Queries of a document without keys get zeros; causal counts from the document's first query and first key."""
    key_lengths = [3, 4, 0, 12, 1, 9, 6]
    key_offsets = [0, *torch.tensor(key_lengths).cumsum(0).tolist()]
    q, k, v = inputs()
    k, v = k[:, : key_offsets[-1]], v[:, : key_offsets[-1]]
    whole = ulysses_attention(
        q, k, v, cu_seqlens=OFFSETS, cu_seqlens_k=torch.tensor(key_offsets), causal=True, attention=attention
    )
    for i, (begin, end) in enumerate(zip(OFFSETS, OFFSETS[1:], strict=False)):
        keys = slice(key_offsets[i], key_offsets[i + 1])
        alone = ulysses_attention(q[:, begin:end], k[:, keys], v[:, keys], causal=True, attention=attention)
        torch.testing.assert_close(whole[:, begin:end], alone, rtol=1e-5, atol=2e-6)
        if not key_lengths[i]:
            assert not whole[:, begin:end].any()


def test_offsets_and_numbers_say_the_same():
    q, k, v = inputs()
    given = [
        {"cu_seqlens": OFFSETS}, {"cu_seqlens": tuple(OFFSETS)}, {"cu_seqlens": torch.tensor(OFFSETS)},
        {"cu_seqlens": torch.tensor(OFFSETS, dtype=torch.int32)}, {"segment_ids": IDS},
        {"segment_ids": (IDS * 7 + 1000).int()}, {"segment_ids": 10 - IDS},
    ]  # fmt: skip
    results = [ulysses_attention(q, k, v, causal=True, attention="reference", **options) for options in given]
    assert all(torch.equal(result, results[0]) for result in results)


def test_padding_gives_zeros_and_takes_none_of_the_rest():
    ids = torch.stack([torch.tensor([-1] * 3 + [0] * 30 + [-1] * 7), torch.tensor([2] * 39 + [-5])])
    q, k, v = inputs(batch=2, requires_grad=True)
    out, lse = ulysses_attention(q, k, v, segment_ids=ids, attention="reference", return_lse=True)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for x in (out, *grads):
        assert not x[ids < 0].any() and x[ids >= 0].any()
    assert (lse[ids < 0] == -torch.inf).all()
    alone = ulysses_attention(*(x[:1, 3:33] for x in (q, k, v)), attention="reference")
    torch.testing.assert_close(out[:1, 3:33], alone)


def gathers(group, _=None):
    """How often numbers were gathered: for one tensor, again, once it was written to, and for another like it."""
    q, k, v = (x.detach().requires_grad_() for x in shards(inputs(), group))
    (ids,) = shards([IDS], group)
    ids = ids.clone()

    def layer(ids):
        out = ulysses_attention(q, k, v, group, segment_ids=ids, attention="reference")
        torch.autograd.grad(out.sum(), (q, k, v))
        return out.detach(), group.counts["segment_ids"]

    first, once = layer(ids)
    again, still = layer(ids)
    changed, twice = layer(ids.zero_())
    _, thrice = layer(torch.zeros_like(ids))
    assert torch.equal(first, again) and not torch.equal(first, changed)
    plain = ulysses_attention(q, k, v, group, attention="reference")
    torch.testing.assert_close(changed, plain.detach())
    return once, still, twice, thrice


def gathers_on_a_process(ctx):
    with UlyssesGroup(ctx.group) as group:
        return gathers(group)


def test_numbers_are_gathered_once_per_batch_of_tokens(pool):
    assert set(run_virtual(2, gathers)) == {(1, 1, 2, 3)}
    assert set(pool.run(4, gathers_on_a_process)) == {(1, 1, 2, 3)}


def test_offsets_are_compared_once(pool):
    def work(group):
        q, k, v = shards(inputs(), group)
        counts = []
        offsets = torch.tensor(OFFSETS)
        for _ in range(3):
            before = group.counts["control"]
            ulysses_attention(q, k, v, group, cu_seqlens=offsets, attention="reference")
            counts.append(group.counts["control"] - before)
        return counts

    assert run_virtual(2, work) == [[2, 1, 1]] * 2


@pytest.mark.parametrize("documents", [3, 40], ids=["few", "many"])
def test_offsets_that_differ_raise_on_every_rank(documents):
    def work(group):
        q, k, v = shards(inputs(), group)
        offsets = [*range(documents), TOKENS] if group.rank != 1 else [0, *range(documents - 1), TOKENS]
        with pytest.raises(ShapeError, match="cu_seqlens: rank 1 has .*, ranks 0, 2, 3 have"):
            ulysses_attention(q, k, v, group, cu_seqlens=offsets, attention="reference")
        return torch.isfinite(ulysses_attention(q, k, v, group, cu_seqlens=OFFSETS, attention="reference")).all()

    assert all(run_virtual(4, work))


def test_in_inference_mode():
    """Tensors made there keep no count of writes, so nothing is remembered for them."""
    with torch.inference_mode():
        ids = IDS.clone()
        q, k, v = inputs()
        first = ulysses_attention(q, k, v, segment_ids=ids)
        ids.zero_()
        torch.testing.assert_close(ulysses_attention(q, k, v, segment_ids=ids), ulysses_attention(q, k, v))
        assert not torch.equal(first, ulysses_attention(q, k, v))


def drawn_on_a_process(ctx, seed):
    """Every rank draws from a generator of its own."""
    torch.manual_seed(100 + ctx.rank)
    q, k, v = shards(inputs(), ctx)
    return ulysses_attention(q, k, v, ctx.group, dropout_p=0.5, dropout_seed=seed, attention="reference")


def test_a_drawn_seed_is_rank_0s(pool):
    torch.manual_seed(100)
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    drawn = torch.cat(pool.run(4, drawn_on_a_process, None), 1)
    assert torch.equal(drawn, torch.cat(pool.run(2, drawn_on_a_process, seed), 1))
