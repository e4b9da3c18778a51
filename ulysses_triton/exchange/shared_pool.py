"""Buffers that the processes of one host can all write: memory without a name, passed on by its descriptor.

Nothing of it outlives its processes, however they end: no file is ever visible, and the pages go with the last
descriptor and mapping. All pages are there from the start (`posix_fallocate`), so a lack of memory is an error here
and not a SIGBUS at the first touch. On first use they cost what anonymous memory does: about as many page faults.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OutOfMemoryError
from .pool import Block, Pool


@dataclass
class Segment:
    """A block that peers can map. Its number never comes again; the descriptor is closed once all peers have it."""

    number: int
    size: int
    descriptor: int | None

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class SharedPool(Pool):
    """A pool of segments. Small buffers are segments, too: peers may have to write them."""

    smallest = 1

    def __init__(self) -> None:
        super().__init__()
        self.released: list[int] = []  # segments that peers have mapped and that are used no more
        self._segments: dict[int, Segment] = {}  # by their address here
        self._numbers = itertools.count()

    def find(self, tensor: Tensor) -> tuple[Segment, int]:
        """The segment that a tensor of this pool lies in, and its first byte there."""
        address = tensor.untyped_storage().data_ptr()
        return self._segments[address], tensor.data_ptr() - address

    def close(self) -> None:
        super().close()
        for segment in self._segments.values():
            segment.close()

    def _allocate(self, capacity: int) -> memoryview:
        descriptor = -1
        try:
            descriptor = os.memfd_create("ulysses_triton")  # closed by exec
            os.posix_fallocate(descriptor, 0, capacity)
            block = mapped(descriptor, capacity)
        except (OSError, RuntimeError) as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise OutOfMemoryError(
                f"no shared memory for a buffer of {capacity:,} bytes beside {self.held:,} bytes in use ({error}): use "
                'recompute="exchange", a smaller batch or shorter sequences, or raise the limit of this process or '
                'container; exchange="torch" needs no shared memory'
            ) from error
        self._segments[_address(block)] = Segment(next(self._numbers), capacity, descriptor)
        return block

    def _release(self, block: Block) -> None:
        segment = self._segments.pop(_address(block))
        if segment.descriptor is None:
            self.released.append(segment.number)
        segment.close()


def mapped(descriptor: int, size: int) -> memoryview:
    """A file's memory, writable; unmapped with the last tensor over it.

    By PyTorch, as Python's own mmap would keep a descriptor open for every mapping.
    """
    memory: Any = torch.UntypedStorage.from_file(f"/proc/self/fd/{descriptor}", True, size)
    return memoryview(torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory).numpy().data)


def _address(block: Block) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))
