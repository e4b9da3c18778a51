"""PyTorch's symmetric memory for ranks that are threads: CPU tensors that all of them see, and no streams."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ulysses_triton import UlyssesGroup, run_virtual
from ulysses_triton.exchange.symm import Symmetric, SymmetricExchange
from ulysses_triton.exchange.virtual import VirtualMember, VirtualWorld

STEP = 1 << 16
PAD_BYTES = 2048


class FakeHandle:
    """What is used of a `_SymmetricMemory`."""

    def __init__(self, segments: list[Tensor], pads: list[Tensor]) -> None:
        self._segments, self._pads = segments, pads

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int = 0) -> Tensor:
        (n,) = sizes
        return self._segments[rank].view(dtype)[storage_offset : storage_offset + n]

    def get_signal_pad(self, rank: int, sizes: tuple[int, ...] = (), dtype: torch.dtype = torch.uint32) -> Tensor:
        assert not sizes
        return self._pads[rank].view(dtype)


class FakeMemory:
    """`capacity`: bytes that this rank may have in all."""

    device = torch.device("cpu")

    def __init__(self, member: VirtualMember, capacity: int = 1 << 40, pad_bytes: int = PAD_BYTES) -> None:
        self.mapped: list[int] = []  # sizes
        self._member, self._left, self._pad_bytes = member, capacity, pad_bytes

    def empty(self, size: int) -> Tensor:
        if size > self._left:
            raise torch.OutOfMemoryError(f"tried to allocate {size} bytes")
        self._left -= size
        return torch.empty(size, dtype=torch.uint8)

    def rendezvous(self, segment: Tensor) -> FakeHandle:
        self.mapped.append(segment.numel())
        mine = segment, torch.zeros(self._pad_bytes, dtype=torch.uint8)
        segments, pads = zip(*self._member.gather(mine), strict=True)
        assert len({s.numel() for s in segments}) == 1, "segments of different sizes"
        return FakeHandle(list(segments), list(pads))


class FakeStreams:
    """One stream, in which everything has been done; a capture is a flag."""

    def __init__(self) -> None:
        self.graph = False

    def capturing(self) -> bool:
        return self.graph

    def current(self) -> None:
        return None

    def marks(self, stream: None) -> list[Any]:
        return []

    def join(self, marks: list[Any]) -> None:
        pass

    def synchronize(self) -> None:
        pass


class ThreadedSymmetric(Symmetric):
    """The interpreter runs one kernel at a time, so a wait is launched when it has nothing to wait for any more."""

    def _wait(self, kind: int, behind: int) -> None:
        words = self._pad[kind * self.size : (kind + 1) * self.size]
        wanted = self._counts[kind] - behind
        deadline = time.monotonic() + self._timeout
        while not bool(((words < 0) | (words >= wanted)).all()) and time.monotonic() < deadline and not self._status[0]:
            time.sleep(0.001)
        super()._wait(kind, behind)


def over_symm(group: UlyssesGroup, world: VirtualWorld, timeout: float, step: int, **memory: int) -> UlyssesGroup:
    """Let a virtual group exchange over the fake."""
    fake = FakeMemory(world.member(group.rank), **memory)
    symmetric = ThreadedSymmetric(group.control, fake, FakeStreams(), timeout, step=step)
    group.exchange, group.pool = SymmetricExchange(symmetric), symmetric.pool
    return group


def run(
    ranks: int, work: Callable[..., Any], *arguments: Any, timeout: float = 20.0, step: int = STEP, **memory: int
) -> list[Any]:
    """`work(group, *arguments)` on ranks that are threads."""
    world = VirtualWorld(ranks)
    return run_virtual(
        ranks, lambda group: work(over_symm(group, world, timeout, step, **memory), *arguments), timeout=timeout
    )
