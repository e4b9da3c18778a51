"""From the orders in which ring attention shards a sequence to contiguous shards, and back.

Ring attention gives every rank early and late tokens, so that a causal mask leaves all of them as much to do. With P
ranks of L tokens each:

- zigzag (Megatron-LM, TransformerEngine, torchtitan's context parallelism): the sequence is cut into 2 P chunks, and
  rank r has chunk r and after it chunk 2 P - 1 - r.
- striped (Striped Attention): rank r has the tokens r, r + P, r + 2 P, ...

Example: 8 tokens on 2 ranks are 0 1 2 3 | 4 5 6 7 in contiguous shards, 0 1 6 7 | 2 3 4 5 zigzag, 0 2 4 6 | 1 3 5 7
striped.

All here rests on one thing that both have in common: what a rank has of a contiguous shard is a slice of that shard. So
blocks are slices on the one side, and lie side by side on the other, and one exchange does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import ShapeError
from .group import Groupish, by_name, resolve, told_to_peers
from .messages import Message
from .shard import check_carried, dim_of, exchanged


def from_zigzag(x: Tensor, group: Groupish = None, dim: int = 1) -> Tensor:
    """This rank's contiguous shard, from zigzag shards: see above.

    Args:
        x: this rank's zigzag shard, L tokens at `dim`, the same even number on every rank.
        group: as for `ulysses_attention`.

    Returns a tensor like x; its gradient comes back as `to_zigzag` would take it. Raises ShapeError on every rank for
    an odd L and where lengths differ: pad to a multiple of 2 P tokens, as all who shard in zigzag do.
    """
    return _reordered(x, group, dim, "from_zigzag")


def to_zigzag(x: Tensor, group: Groupish = None, dim: int = 1) -> Tensor:
    """The inverse of `from_zigzag`: this rank's zigzag shard, from contiguous shards."""
    return _reordered(x, group, dim, "to_zigzag")


def from_striped(x: Tensor, group: Groupish = None, dim: int = 1) -> Tensor:
    """This rank's contiguous shard, from striped shards: see above.

    Args:
        x: this rank's striped shard, L tokens at `dim`, the same number on every rank.
        group: as for `ulysses_attention`.

    Returns a tensor like x; its gradient comes back as `to_striped` would take it. Raises ShapeError on every rank
    where lengths differ: pad to a multiple of P tokens.
    """
    return _reordered(x, group, dim, "from_striped")


def to_striped(x: Tensor, group: Groupish = None, dim: int = 1) -> Tensor:
    """The inverse of `from_striped`: this rank's striped shard, from contiguous shards."""
    return _reordered(x, group, dim, "to_striped")


def zigzag(ranks: int, tokens: int, rank: int, shard: int) -> slice:
    """What `rank` has, in zigzag, of a contiguous shard of so many tokens. Neighbouring chunks are a shard."""
    first, second = (chunk in (rank, 2 * ranks - 1 - rank) for chunk in (2 * shard, 2 * shard + 1))
    half = tokens // 2
    return slice(0 if first else half, tokens if second else half)


def striped(ranks: int, tokens: int, rank: int, shard: int) -> slice:
    """The same for stripes: the first token of the shard has the number `shard * tokens`."""
    return slice((rank - shard * tokens) % ranks, tokens, ranks)


_ORDERS: dict[str, Callable[[int, int, int, int], slice]] = {"zigzag": zigzag, "striped": striped}
_INVERSE = {f"{way}_{order}": f"{back}_{order}" for way, back in (("from", "to"), ("to", "from")) for order in _ORDERS}


def _reordered(x: Tensor, group: Groupish, dim: int, name: str) -> Tensor:
    own = resolve(group)
    dim = dim_of(x, dim)
    with told_to_peers(own):
        if "zigzag" in name and x.size(dim) % 2:
            raise ShapeError(
                f"{name}: dim {dim} has {x.size(dim)} tokens; a zigzag shard is two chunks of equal length, so the "
                f"whole sequence needs a multiple of {2 * own.size} tokens: pad it"
            )
        check_carried(x, own)
    return _Reorder.apply(x.movedim(dim, 0), own.name, name).movedim(0, dim)


class _Reorder(torch.autograd.Function):
    """Reorder along dim 0; backward is the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, name: str) -> Tensor:
        ctx.group, ctx.name = group, name
        return _exchange(x, group, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(grad, ctx.group, _INVERSE[ctx.name], f"{ctx.name} backward"), None, None


def _exchange(x: Tensor, group_name: str, name: str, what: str | None = None) -> Tensor:
    """All-to-all of x [L, ...], as `name` says; ranks agree on it as `what`."""
    group, (tokens, *rest) = by_name(group_name), x.shape
    way, _, order = name.partition("_")
    group.agree(what or name, f"tokens={tokens}; shape of a token={tuple(rest)}; dtype={x.dtype}")
    ranks, each = range(group.size), math.prod(rest)
    part = partial(_ORDERS[order], group.size, tokens)  # (rank, contiguous shard)

    def count(source: int, destination: int) -> int:
        rank, shard = (source, destination) if way == "from" else (destination, source)
        return len(range(tokens)[part(rank, shard)])

    mine = group.rank
    sent, came = [count(mine, to) for to in ranks], [count(source, mine) for source in ranks]
    message = Message(
        send=tuple(n * each for n in sent),
        receive=tuple(n * each for n in came),
        land=tuple(sum(count(source, to) for source in range(mine)) * each for to in ranks),
        between=lambda source, to: count(source, to) * each,
    )
    of_shard = [part(rank, mine) for rank in ranks]
    blocks = [x[piece] for piece in of_shard] if way == "to" else torch.split(x, sent)
    received = exchanged(group, what or name, message, blocks).view(x.shape)
    if way == "to":
        return received
    result = torch.empty_like(received)
    for piece, block in zip(of_shard, torch.split(received, came), strict=True):
        result[piece] = block
    return result
