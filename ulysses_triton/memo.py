"""Remembering what was made from some tensors, for as long as they are the same and nobody has written to them."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_Made = TypeVar("_Made")
KEPT = 16  # layers of one model differ in their masks, micro-batches in their documents


class Memo:
    """The latest `kept` results of `get`. It holds no tensor that it was given alive."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._made: OrderedDict[Hashable, tuple[list[weakref.ref[Tensor]], Any]] = OrderedDict()

    def get(self, tensors: Sequence[Tensor], key: Hashable, make: Callable[[], _Made]) -> _Made:
        """What `make` made when it was last asked for these very tensors, as they are now, and `key`.

        While a CUDA graph is captured everything is made anew, so that replays follow what is in the tensors then.
        """
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing or any(t.is_inference() for t in tensors):  # those keep no count of writes
            return make()
        found_at = (key, *((id(t), t._version) for t in tensors))
        known = self._made.pop(found_at, None)
        if known is None or any(ref() is not t for ref, t in zip(known[0], tensors, strict=True)):
            known = [weakref.ref(t) for t in tensors], make()
        self._made[found_at] = known
        if len(self._made) > self._kept:
            self._made.popitem(last=False)
        made: _Made = known[1]
        return made

    def clear(self) -> None:
        self._made.clear()
