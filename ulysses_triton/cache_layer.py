"""What one rank keeps of one layer in a cache: k and v of its own kv heads, in buffers with room for more tokens.

A value: whoever changes it gets another one. Rows are written behind the tokens that it counts, so a call that fails
has changed nothing. Example: 10 tokens in buffers of 15; 7 more need others, of 22, half as many again; 2 more then go
to rows 17 and 18 of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import DeviceError, DtypeError, OptionError, OutOfMemoryError, ShapeError
from .placement import Share
from .spec import Problem

GROWTH = 1.5  # of full buffers: what is copied in all stays linear in the tokens


class CacheLayer(NamedTuple):
    """k and v of some kv heads, of the first `length` tokens of the buffers, which hold garbage behind them."""

    k: Tensor  # [capacity, B, hkv, D]
    v: Tensor  # [capacity, B, hkv, Dv]
    heads: tuple[int, int]  # query heads and kv heads of the model: they say which ones a rank has
    length: int = 0
    ids: Tensor | None = None  # int64 [B, length]: the document of every token, where documents are given

    @staticmethod
    def empty(problem: Problem, share: Share, like: Tensor, capacity: int) -> CacheLayer:
        shape = capacity, problem.batch, share.kv_heads
        k, v = (_buffer((*shape, dim), like) for dim in (problem.head_dim, problem.value_dim))
        return CacheLayer(k, v, (problem.heads, problem.kv_heads))

    @property
    def batch(self) -> int:
        return self.k.size(1)

    def first(self, tokens: int) -> tuple[Tensor, Tensor]:
        """k and v of so many tokens."""
        return self.k[:tokens], self.v[:tokens]

    def with_room(self, tokens: int) -> CacheLayer:
        """The same, in buffers for at least so many tokens."""
        if tokens <= len(self.k):
            return self
        capacity = max(tokens, int(len(self.k) * GROWTH))
        k, v = (_buffer((capacity, *x.shape[1:]), x) for x in (self.k, self.v))
        for new, old in zip((k, v), self.first(self.length), strict=True):
            new[: self.length].copy_(old)
        return self._replace(k=k, v=v)

    def write(self, kv: Sequence[Tensor]) -> None:
        """Put k and v of new tokens, `[n, B, hkv, D or Dv]`, behind those that it counts."""
        for buffer, rows in zip((self.k, self.v), kv, strict=True):
            buffer[self.length : self.length + len(rows)].copy_(rows)

    def reordered(self, index: Tensor) -> CacheLayer:
        """With the entries `index` of the batch as its batch; the ids stay what they are."""
        k, v = (_buffer((len(x), len(index), *x.shape[2:]), x) for x in (self.k, self.v))
        for new, old in zip((k, v), self.first(self.length), strict=True):
            torch.index_select(old, 1, index.to(old.device), out=new[: self.length])
        return self._replace(k=k, v=v)

    def check(self, name: str, problem: Problem, like: Tensor, segment_ids: Tensor | None) -> None:
        """Raise where new tokens, of dtype and device as `like`, do not fit those that the layer `name` holds."""
        found = (
            (ShapeError, "a batch of", self.batch, problem.batch),
            (ShapeError, "query and kv heads", self.heads, (problem.heads, problem.kv_heads)),
            (ShapeError, "head dim of k", self.k.size(3), problem.head_dim),
            (ShapeError, "head dim of v", self.v.size(3), problem.value_dim),
            (DtypeError, "dtype", self.k.dtype, like.dtype),
            (DeviceError, "device", self.k.device, like.device),
        )  # fmt: skip
        for error, what, held, given in found:
            if held != given:
                raise error(
                    f"{name} of the cache has {what} {held}, this call has {given}: use another cache, or reset() this "
                    "one, or reorder() it for another batch"
                )
        if self.length and (self.ids is None) != (segment_ids is None):
            without = "those of the cache" if self.ids is None else "the new ones"
            raise OptionError(
                f"of {self.length} tokens that {name} of the cache holds and the new ones only some have segment_ids, "
                f"{without} have none: give them with every call or with none"
            )


def _buffer(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory that can be written inside and outside of inference mode."""
    try:
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=like.dtype, device=like.device)
    except RuntimeError as error:  # so is torch.OutOfMemoryError
        raise OutOfMemoryError(
            f"no memory on {like.device} for the keys or values of a layer, {list(shape)} of {like.dtype}: use more "
            "ranks (up to one for each kv head), a lower capacity or a smaller batch"
        ) from error
