"""Splitting, joining and the loss over shards, against the same on one device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ulysses_triton import (
    GroupError,
    OptionError,
    ShapeError,
    UlyssesGroup,
    count_tokens,
    gather_sequence,
    run_virtual,
    shard_lens,
    shard_sequence,
    token_mean,
    ulysses_attention,
)


@pytest.mark.parametrize("lens", [None, (3, 0, 7)], ids=["equal as can be", "given"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gather_inverts_shard(lens, dim):
    whole = torch.randn(10, 10, 10)

    def there_and_back(group):
        mine = shard_sequence(whole, group, dim=dim, lens=lens)
        assert mine.is_contiguous() and mine.size(dim) == (lens or (4, 3, 3))[group.rank]
        return gather_sequence(mine, group, dim=dim, lens=lens or shard_lens(10, 3))

    assert all(torch.equal(found, whole) for found in run_virtual(3, there_and_back))


def gather_gradients(rank, group, dtype):
    """Each rank weighs the whole sequence its own way: a token's gradient is the sum over ranks."""
    lens = (2, 5, 0)
    x = torch.arange(14, dtype=dtype).view(2, 7)[:, sum(lens[:rank]) : sum(lens[: rank + 1])].clone().requires_grad_()
    whole = gather_sequence(x, group, lens=lens)
    weights = torch.randn(2, 7, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)
    (grad,) = torch.autograd.grad((whole * whole * weights).sum(), x)
    return grad, 2 * whole.detach() * weights


def hold_gather_gradients(answers, tolerance):
    expected = torch.stack([share.double() for _, share in answers]).sum(0)
    got = torch.cat([grad for grad, _ in answers], dim=1).double()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def gather_on_process(ctx, dtype):
    return gather_gradients(ctx.rank, ctx.group, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_gather_is_the_sum_over_ranks(pool, dtype):
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3}[
        dtype
    ]  # bf16: one rounding of the sum
    hold_gather_gradients(run_virtual(3, lambda g: gather_gradients(g.rank, g, dtype)), tolerance)
    hold_gather_gradients(pool.run(3, gather_on_process, dtype), tolerance)


def test_gradient_of_shard_is_zero_elsewhere():
    whole = torch.randn(1, 5, 2, requires_grad=True)

    def gradient(group):
        leaf = whole.detach().clone().requires_grad_()
        return torch.autograd.grad((3 * shard_sequence(leaf, group)).sum(), leaf)[0]

    grads = run_virtual(2, gradient)
    assert torch.equal(sum(grads), torch.full((1, 5, 2), 3.0)) and torch.equal(grads[0][:, 3:], torch.zeros(1, 2, 2))


def test_one_rank_shards_nothing():
    x = torch.randn(2, 5)
    assert torch.equal(shard_sequence(x), x) and torch.equal(gather_sequence(x), x)


@pytest.mark.parametrize(("lens", "dim"), [((1, 2), 1), ((5,), 1), ((6, -1), 1), (None, 3)])
def test_impossible_shards(lens, dim):
    def refused(group):
        with pytest.raises(ShapeError):
            shard_sequence(torch.ones(2, 5), group, dim=dim, lens=lens)

    run_virtual(2, refused)


# -- loss


def uneven_loss(ctx, reduce, given_total):
    """A linear model; ranks count 3, 0, 1 and 6 labels over two accumulation steps each."""
    torch.manual_seed(0)
    weight = torch.randn(4, 5, dtype=torch.float64)
    data = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 4, generator=data, dtype=torch.float64)  # [step, rank, token, width]
    labels = torch.randint(0, 5, (2, 4, 8), generator=data)
    for rank, kept in enumerate([3, 0, 1, 6]):
        labels[0, rank, kept:] = -100
        labels[1, rank, : 8 - kept] = -100
    leaf = weight.clone().requires_grad_()
    total = sum(count_tokens(labels[step, ctx.rank], ctx.group) for step in range(2)) if given_total else None
    steps = range(2) if given_total else range(1)
    value = torch.zeros((), dtype=torch.float64)
    for step in steps:
        mine = labels[step, ctx.rank]
        loss_sum = torch.nn.functional.cross_entropy(x[step, ctx.rank] @ leaf, mine, reduction="sum")
        loss = token_mean(loss_sum, (mine != -100).sum(), ctx.group, total_tokens=total, reduce=reduce)
        loss.backward()
        value += loss.detach()
    grad = leaf.grad.clone()
    dist.all_reduce(grad, group=ctx.group)
    if reduce == "mean":
        grad /= ctx.size
    alone = weight.clone().requires_grad_()
    used = slice(0, len(steps))
    expected = torch.nn.functional.cross_entropy((x[used] @ alone).flatten(0, 2), labels[used].flatten())
    expected.backward()
    return value, grad, expected.detach(), alone.grad


@pytest.mark.parametrize("given_total", [False, True], ids=["this step", "accumulated"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_token_mean_is_the_mean_over_all_tokens(pool, reduce, given_total):
    answers = pool.run(4, uneven_loss, reduce, given_total)
    for value, grad, expected, expected_grad in answers:
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)
        assert torch.equal(value, answers[0][0]), "the same bits on every rank"


def test_token_mean_without_ranks_and_without_tokens():
    x = torch.tensor(6.0, requires_grad=True)
    loss = token_mean(x, 3)
    assert loss.item() == 2 and torch.autograd.grad(loss, x)[0].item() == pytest.approx(1 / 3)
    assert token_mean(torch.tensor(0.0), 0).item() == 0
    with pytest.raises(OptionError, match="reduce"):
        token_mean(x, 3, reduce="max")
    with pytest.raises(ShapeError, match="0-dim"):
        token_mean(torch.ones(2), 3)


# -- what may be given as a group


def test_meshes_and_process_groups(pool):
    # Eight ranks as 2 x 4: the mesh's sequence dimension is another set of ranks than the pool's group of eight.
    answers = pool.fresh(8, mesh_answers)
    assert answers == [True] * 8, answers


def mesh_answers(ctx):
    q = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(ctx.rank))
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "sequence"))
    rows = ulysses_attention(q, q, q, mesh["sequence"])
    with UlyssesGroup(mesh["sequence"].get_group()) as group:
        assert (group.rank, group.size) == (ctx.rank % 4, 4)
        assert torch.equal(rows, ulysses_attention(q, q, q, group))
    whole = torch.cat(
        [torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(ctx.rank // 4 * 4 + r)) for r in range(4)], 1
    )
    alone = torch.nn.functional.scaled_dot_product_attention(*(whole.transpose(1, 2),) * 3).transpose(1, 2)
    torch.testing.assert_close(rows, alone[:, ctx.rank % 4 * 4 :][:, :4])
    for wrong in (mesh, 3, "default", dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises((OptionError, GroupError), match="group is a"):
            ulysses_attention(q, q, q, wrong)
    return True
