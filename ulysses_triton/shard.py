"""Splitting sequences over ranks, joining them again, and the loss over shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import DtypeError, OptionError, ShapeError
from .group import Groupish, UlyssesGroup, by_name, process_group, resolve, told_to_peers
from .messages import Message

IGNORE_INDEX = -100  # the label that torch's cross_entropy leaves out


def shard_lens(tokens: int, ranks: int) -> tuple[int, ...]:
    """Lengths of `ranks` shards of `tokens` tokens: as equal as they can be, the longer ones first."""
    return tuple(tokens // ranks + (rank < tokens % ranks) for rank in range(ranks))


def shard_sequence(x: Tensor, group: Groupish = None, dim: int = 1, lens: Sequence[int] | None = None) -> Tensor:
    """This rank's shard of a tensor that every rank holds whole; contiguous tokens in rank order.

    Args:
        x: any shape; `dim` is the sequence dimension, S tokens.
        group: as for `ulysses_attention`.
        lens: every rank's length in tokens; None for lengths as equal as they can be, the first `S % P` ranks having
            one token more. When P does not divide S, give `ulysses_attention` the same: `lens=shard_lens(S, P)`.

    Returns a contiguous tensor with this rank's length at `dim`. Its gradient is zero outside the shard: the sum over
    the ranks is the gradient of x. Raises ShapeError when `lens` does not add up to S.
    """
    own = resolve(group)
    dim = dim_of(x, dim)
    lengths = tuple(lens) if lens is not None else shard_lens(x.size(dim), own.size)
    if len(lengths) != own.size or sum(lengths) != x.size(dim) or min(lengths) < 0:
        raise ShapeError(
            f"lens = {list(lengths)} must hold one length for each of the {own.size} ranks and add up to the "
            f"{x.size(dim)} tokens of dim {dim}"
        )
    return x.narrow(dim, sum(lengths[: own.rank]), lengths[own.rank]).contiguous()


def gather_sequence(x: Tensor, group: Groupish = None, dim: int = 1, lens: Sequence[int] | None = None) -> Tensor:
    """The whole sequence on every rank, from every rank's shard.

    Args:
        x: this rank's shard, L tokens at `dim`.
        group: as for `ulysses_attention`.
        lens: every rank's length in tokens; None when all are equal.

    Returns a tensor with S tokens at `dim`. In backward every rank gets the sum over all ranks of the gradients of its
    tokens, added in rank order. Raises ShapeError on every rank when shapes do not fit.
    """
    own = resolve(group)
    dim = dim_of(x, dim)
    lengths = tuple(lens) if lens is not None else (x.size(dim),) * own.size
    with told_to_peers(own):
        if len(lengths) != own.size or lengths[own.rank] != x.size(dim):
            raise ShapeError(
                f"lens = {list(lengths)} does not fit rank {own.rank} of {own.size}, which has {x.size(dim)} tokens"
            )
        check_carried(x, own)
    return _Gather.apply(x.movedim(dim, 0), own.name, lengths).movedim(0, dim)


def gathered(group: UlyssesGroup, what: str, x: Tensor, lens: Sequence[int]) -> Tensor:
    """All ranks' `x` [L, ...] as one, by one exchange that they agree on as `what`; without a gradient."""
    each = math.prod(x.shape[1:])
    group.agree(what, _signature(x, lens))
    sizes = tuple(n * each for n in lens)
    mine, at = sizes[group.rank], sum(sizes[: group.rank])
    message = Message((mine,) * group.size, sizes, (at,) * group.size, lambda a, b: sizes[a])
    whole = exchanged(group, what, message, [x.contiguous().view(-1)] * group.size)
    return whole.view(sum(lens), *x.shape[1:])


class _Gather(torch.autograd.Function):
    """Gather along dim 0; backward is a reduce-scatter by one exchange and a sum in rank order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, lens: tuple[int, ...]) -> Tensor:
        ctx.name, ctx.lens = name, lens
        return gathered(by_name(name), "gather_sequence", x, lens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        group, lens = by_name(ctx.name), ctx.lens
        grad = grad.contiguous()
        group.agree("gather_sequence backward", _signature(grad, lens))
        parts = [part.reshape(-1) for part in torch.split(grad, list(lens))]
        mine = parts[group.rank].numel()
        sizes = tuple(part.numel() for part in parts)
        message = Message(sizes, (mine,) * group.size, tuple(n * group.rank for n in sizes), lambda a, b: sizes[b])
        received = exchanged(group, "gather_sequence backward", message, parts)
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        total = received.view(group.size, mine).sum(0, dtype=wide).to(grad.dtype)
        return total.view(lens[group.rank], *grad.shape[1:]), None, None


def _signature(x: Tensor, lens: Sequence[int]) -> str:
    return f"lens={tuple(lens)}; shape of a token={tuple(x.shape[1:])}; dtype={x.dtype}"


def exchanged(group: UlyssesGroup, name: str, message: Message, parts: Sequence[Tensor]) -> Tensor:
    """One hop that sends `parts[rank]` to every rank, any shape and strides; returns what arrives, flat."""
    group.counts[name] += 1
    with group.call():
        receive = group.pool.take((sum(message.receive),), parts[0].dtype, parts[0].device)
        with group.step(name):
            hop = group.exchange.open([message], [receive], [None])
        for block, part in zip(hop.blocks[0], parts, strict=True):
            block.view(part.shape).copy_(part)
        with group.step(name):
            hop.start()
            hop.finish()
    return receive


def check_carried(x: Tensor, group: UlyssesGroup) -> None:
    if x.device.type not in group.devices:
        raise DtypeError(f"x is on {x.device}; the group carries tensors on {' and '.join(sorted(group.devices))}")


def dim_of(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ShapeError(f"dim = {dim} is outside a tensor of shape {list(x.shape)}")
    return dim % x.dim()


def count_tokens(labels: Tensor, group: Any = None, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The number of labels that count, over all ranks of `group`.

    Args:
        labels: integers, any shape: this rank's labels. Shift them before sharding: shifting per shard loses the label
            at every boundary.
        group: the group gradients are averaged over (data x sequence ranks): a ProcessGroup, a 1-D DeviceMesh, or None
            for the default group.
        ignore_index: the label that does not count.

    Returns a 0-dim int64 tensor, equal on every rank.
    """
    count = (labels != ignore_index).sum()
    found = process_group(group.process_group if isinstance(group, UlyssesGroup) else group)
    if found is not None:
        dist.all_reduce(count, group=found)
    return count


def token_mean(
    loss_sum: Tensor,
    token_count: Tensor | int,
    group: Any = None,
    *,
    total_tokens: Tensor | int | None = None,
    reduce: str = "mean",
) -> Tensor:
    """The mean loss per token over all ranks; its gradient is right once gradients are averaged (or summed) over them.

    The mean of every rank's mean is wrong when ranks count different numbers of tokens; this weights every token alike.

    Args:
        loss_sum: 0-dim: the sum of this rank's token losses.
        token_count: how many tokens this rank counted.
        group: the group gradients are averaged over (data x sequence ranks), not the attention group: a ProcessGroup,
            a 1-D DeviceMesh, or None for the default group.
        total_tokens: tokens over all ranks and all accumulation steps (`count_tokens`, summed); None: this step's.
            With accumulation the values of the steps add up to the mean.
        reduce: "mean" when gradients are averaged over the ranks (DDP, FSDP), "sum" when they are summed.

    Returns a 0-dim tensor, equal on every rank: the sum over all ranks by the total. Its gradient is that of
    `loss_sum * ranks / total` ("mean") or `loss_sum / total` ("sum"). A total of zero gives zero.
    """
    if reduce not in ("mean", "sum"):
        raise OptionError(f'reduce = {reduce!r}; it must be "mean" or "sum"')
    if loss_sum.dim() != 0:
        raise ShapeError(
            f"loss_sum has shape {list(loss_sum.shape)}; it must be the sum over this rank's tokens, 0-dim"
        )
    found = process_group(group.process_group if isinstance(group, UlyssesGroup) else group)
    numbers = torch.stack([loss_sum.detach().double(), torch.as_tensor(token_count).to(loss_sum.device).double()])
    ranks = 1
    if found is not None:
        dist.all_reduce(numbers, group=found)
        ranks = found.size()
    given = numbers[1] if total_tokens is None else torch.as_tensor(total_tokens).to(loss_sum.device).double()
    total = given.clamp(min=1)
    weight = (ranks if reduce == "mean" else 1) / total
    return _WithGradient.apply(loss_sum, numbers[0] / total, weight)


class _WithGradient(torch.autograd.Function):
    """`value` as the result, with the gradient of `x * weight`: so the value is the same bits on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight.to(x.dtype))
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad * weight, None, None
