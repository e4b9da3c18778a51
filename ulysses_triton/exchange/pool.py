"""Buffers that are used again: on CPU a fresh large buffer costs more in page faults than the exchange itself.

A buffer goes back to the pool when the last tensor over its storage is gone, whoever holds it: a call, autograd's saved
tensors, the user. On accelerators PyTorch's caching allocator is such a pool already and is used as it is.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

_CLASSES = 8  # size classes per power of two: at most an eighth of a buffer is unused
_SMALLEST = mmap.PAGESIZE

Block: TypeAlias = mmap.mmap | memoryview


class Pool:
    """Buffers of one group. `held` and `free` count bytes, in use and waiting: together twice the most ever in use.

    That is room for a forward and a backward of different sizes, so that a step takes no new memory. Tensors of less
    than `smallest` bytes are PyTorch's own.
    """

    smallest = _SMALLEST

    def __init__(self) -> None:
        self.held = 0
        self.free = 0
        self._peak = 0
        self._blocks: dict[int, list[Block]] = {}  # that wait, by size; the size last returned is the last
        self._returned: deque[Block] = deque()  # filled by finalizers, in any thread, without a lock
        self._open = True

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor; no view, so its storage is its own."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < self.smallest:
            return _filled(torch.empty(shape, dtype=dtype, device=device))
        self._settle()
        capacity = size_class(size)
        if capacity in self._blocks:
            block = self._waiting(capacity)
        else:
            block = self._allocate(capacity)
        self.held += capacity
        self._peak = max(self._peak, self.held)
        lease = (ctypes.c_char * size).from_buffer(block)
        weakref.finalize(lease, self._returned.append, block).atexit = False
        storage = torch.frombuffer(lease, dtype=dtype).untyped_storage()
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return _filled(torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), strides))

    def close(self) -> None:
        """Keep nothing any more: blocks that come back are freed by whoever held them last."""
        self._open = False
        self._settle()

    def _waiting(self, capacity: int) -> Block:
        """A block of those that wait, which waits no more."""
        blocks = self._blocks[capacity]
        if len(blocks) == 1:
            del self._blocks[capacity]
        self.free -= capacity
        return blocks.pop()

    def _allocate(self, capacity: int) -> Block:
        return mmap.mmap(-1, capacity)

    def _release(self, block: Block) -> None:
        """A block that is not kept; its memory goes with the last reference to it."""

    def _settle(self) -> None:
        """Take back what finalizers returned, and free what is too much: the sizes that were not used for longest."""
        while self._returned:
            block = self._returned.popleft()
            capacity = len(block)
            self.held -= capacity
            self.free += capacity
            self._blocks[capacity] = [*self._blocks.pop(capacity, ()), block]
        most = 2 * self._peak - self.held if self._open else 0
        while self.free > most:
            self._release(self._waiting(next(iter(self._blocks))))


def _filled(tensor: Tensor) -> Tensor:
    """Under PyTorch's deterministic mode uninitialised memory is filled; all bits set are NaN in every float dtype."""
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        tensor.view(-1).view(torch.uint8).fill_(255)
    return tensor


def size_class(size: int) -> int:
    """`size` rounded up to a class: pages, then eight steps for every power of two."""
    step = max(_SMALLEST, 1 << max(0, size.bit_length() - 1 - int(math.log2(_CLASSES))))
    return (size + step - 1) // step * step
