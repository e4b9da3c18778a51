"""Documents of a sharded batch, from positions that start anew and from padding, numbered alike on all ranks.

Positions [0 1 2 3 | 0 1 0 1 | 2 3] in shards of 4, 4 and 2 tokens are three documents: 0 0 0 0 | 1 1 2 2 | 2 2. Only
the whole sequence tells, so the ranks gather their positions, once per batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..group import UlyssesGroup, by_name
from ..shard import gathered


def document_ids(
    group: UlyssesGroup, position_ids: Tensor, attention_mask: Tensor | None, lens: Sequence[int] | None
) -> Tensor | None:
    """int64 `[B, L]`, the document of each of this rank's tokens, -1 for padding; None where all is one document.

    Args:
        position_ids: int `[B or 1, L]`, from 0, of this rank's tokens.
        attention_mask: `[B, L]`, 0 for padding; None for none.
        lens: every rank's L; None when all are equal.

    Collective where the tensors are new. While a graph is traced it never says None, as that depends on values.
    """
    if torch.compiler.is_compiling():
        found: Tensor = _traced(position_ids, attention_mask, group.name, lens)
        return found
    given = [x for x in (position_ids, attention_mask) if x is not None]
    key = ("documents of positions", attention_mask is None, None if lens is None else tuple(lens))

    def make() -> Tensor | None:
        ids = _gathered(position_ids, attention_mask, group, lens)
        return None if not ids.any() else _own(ids, group, lens)

    return group.memo.get(given, key, make)


@torch.library.custom_op("ulysses_triton::document_ids", mutates_args=())
def _traced(
    position_ids: Tensor, attention_mask: Tensor | None, group: str, lens: Sequence[int] | None
) -> Tensor:  # fmt: skip
    own = by_name(group)
    return _own(_gathered(position_ids, attention_mask, own, lens), own, lens)


@_traced.register_fake
def _(position_ids: Tensor, attention_mask: Tensor | None, group: str, lens: Sequence[int] | None) -> Tensor:
    like = position_ids if attention_mask is None else attention_mask
    return like.new_empty(like.shape, dtype=torch.int64)


def real_tokens(group: UlyssesGroup, attention_mask: Tensor, lens: Sequence[int]) -> Tensor | None:
    """int8 `[B, S]` of all ranks' tokens, from this rank's mask `[B, L]`: 0 for padding. None where there is none.

    As `document_ids`, collective where the mask is new, and never None in a traced graph.
    """
    if torch.compiler.is_compiling():
        found: Tensor = _traced_mask(attention_mask, group.name, lens)
        return found

    def make() -> Tensor | None:
        real = _gathered_mask(attention_mask, group, lens)
        return None if real.all() else real

    return group.memo.get([attention_mask], ("real tokens", tuple(lens)), make)


@torch.library.custom_op("ulysses_triton::real_tokens", mutates_args=())
def _traced_mask(attention_mask: Tensor, group: str, lens: Sequence[int]) -> Tensor:
    return _gathered_mask(attention_mask, by_name(group), lens)


@_traced_mask.register_fake
def _(attention_mask: Tensor, group: str, lens: Sequence[int]) -> Tensor:
    return attention_mask.new_empty((attention_mask.size(0), sum(lens)), dtype=torch.int8)


def _gathered_mask(attention_mask: Tensor, group: UlyssesGroup, lens: Sequence[int]) -> Tensor:
    real = attention_mask.bool().to(torch.int8)
    return gathered(group, "encoder_attention_mask", real.T, lens).T.contiguous()


def _gathered(
    position_ids: Tensor, attention_mask: Tensor | None, group: UlyssesGroup, lens: Sequence[int] | None
) -> Tensor:
    """`[B or 1, S]`."""
    positions = position_ids.long()
    if attention_mask is not None:
        positions = torch.where(attention_mask.bool(), positions, -1)
    lens = lens or (positions.size(1),) * group.size
    return numbered(gathered(group, "position_ids", positions.T, lens).T)


def _own(ids: Tensor, group: UlyssesGroup, lens: Sequence[int] | None) -> Tensor:
    size = ids.size(1) // group.size
    start, stop = (sum(lens[:n]) if lens else n * size for n in (group.rank, group.rank + 1))
    return ids[:, start:stop].contiguous()


def numbered(positions: Tensor) -> Tensor:
    """`[B, S]` positions, -1 for padding -> the number of every token's document, -1 for padding.

    A document ends where positions do not go on by one. In a row with padding, whose positions may count that too, it
    ends where they do not rise from one token to the next that is no padding.
    """
    real = positions >= 0
    latest = torch.where(real, torch.arange(positions.size(1), device=positions.device), -1).cummax(1).values
    before = torch.nn.functional.pad(latest, (1, 0), value=-1)[:, :-1]  # the token before that is no padding
    previous = positions.gather(1, before.clamp(min=0))
    anew = torch.where(real.all(1, keepdim=True), positions != previous + 1, positions <= previous)
    return torch.where(real, (anew & real & (before >= 0)).cumsum(1), -1)
