"""The one-sided exchange over shared memory, for ranks that are processes of one Linux host; and its control messages.

Every rank receives in memory that its peers have mapped, so pack and attend write there and nothing is copied. Where a
peer receives (`announce`) and that all is written (`arrive`) are frames on the sockets of `unix_socket`; a segment's
descriptor travels with the first announcement of a buffer in it, and the mapping is kept.

`meet` finds out whether the ranks can do this: by trying, with an answer that is the same on every rank.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from socket import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UlyssesError
from .shared_pool import SharedPool, mapped
from .store import LastWords, share
from .unix_socket import Listener, Mesh, connect

_GATHER, _ANNOUNCE, _ARRIVE = b"G", b"A", b"R"
_NAMESPACES = ("mnt", "pid", "user")  # in which an address, a process and a user mean the same


class Shm(LastWords):
    """One rank's transport and control."""

    def __init__(self, store: dist.Store, rank: int, size: int, mesh: Mesh) -> None:
        super().__init__(store, rank, size)
        self.pool = SharedPool()
        self._mesh = mesh
        self._mapped: dict[tuple[int, int], memoryview] = {}  # by rank and number of the segment
        self._gathers = self._next = 0  # begun, and received
        self._gathered: dict[int, dict[int, bytes]] = {}  # by number: received ahead of whoever asks for it
        self._epoch = -1  # at which all have arrived; 0 is that of trying out

    # -- control

    def gather(self, payload: bytes) -> list[bytes]:
        return self.begin_gather(payload)()

    def begin_gather(self, payload: bytes) -> Callable[[], list[bytes]]:
        number, self._gathers = self._gathers, self._gathers + 1
        self._mesh.send(_GATHER, payload)

        def finish() -> list[bytes]:
            while number not in self._gathered:  # frames come in the order of the gathers
                self._gathered[self._next] = self._mesh.receive(_GATHER)
                self._next += 1
            every = self._gathered.pop(number) | {self.rank: payload}
            return [every[rank] for rank in range(self.size)]

        return finish

    def tell(self, text: str) -> None:
        super().tell(text)
        self._mesh.close()  # whoever waits for this rank wakes up and reads its word

    def closed(self) -> set[int]:
        return {rank for rank, in_order in self._mesh.ended().items() if in_order}

    def gone(self) -> set[int]:
        return {rank for rank, in_order in self._mesh.ended().items() if not in_order}

    # -- transport

    def announce(self, buffers: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """As the protocol's. All ranks offer as many, of the same dtypes; those that are not empty come from `pool`.

        A frame is int64 numbers: how many segments are new and how many are gone; number and size of those, numbers of
        these; and for every buffer its segment, first byte there and elements.
        """
        places, new = [], []
        for buffer in buffers:
            number = start = 0
            if buffer.numel():
                segment, start = self.pool.find(buffer)
                number = segment.number
                if segment.descriptor is not None and segment not in new:
                    new.append(segment)
            places += [number, start, buffer.numel()]
        gone, self.pool.released = self.pool.released, []
        numbers = [len(new), len(gone), *(n for s in new for n in (s.number, s.size)), *gone, *places]
        files = [s.descriptor for s in new if s.descriptor is not None]
        self._mesh.send(_ANNOUNCE, struct.pack(f"<{len(numbers)}q", *numbers), files)
        for segment in new:
            segment.close()
        frames = self._mesh.receive(_ANNOUNCE)
        dtypes = [buffer.dtype for buffer in buffers]
        return [
            buffers if rank == self.rank else self._offered(rank, frames[rank], dtypes) for rank in range(self.size)
        ]

    def _offered(self, rank: int, frame: bytes, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """The buffers of a peer's announcement."""
        numbers = iter(struct.unpack(f"<{len(frame) // 8}q", frame))
        new, gone = next(numbers), next(numbers)
        for _ in range(new):
            number, size = next(numbers), next(numbers)
            descriptor = self._mesh.descriptor_of(rank)
            try:
                self._mapped[rank, number] = mapped(descriptor, size)
            finally:
                os.close(descriptor)
        for _ in range(gone):
            del self._mapped[rank, next(numbers)]  # unmapped once no tensor of an earlier hop is left
        return [
            torch.frombuffer(self._mapped[rank, number], dtype=dtype, count=count, offset=start)
            if count
            else torch.empty(0, dtype=dtype, device="cpu")
            for dtype, number, start, count in zip(dtypes, numbers, numbers, numbers, strict=True)
        ]

    def arrive(self, epoch: int) -> None:
        # Whoever has received this frame sees what this rank stored to its memory before: x86 keeps stores in order,
        # and elsewhere the locks of the socket's queue do, taken to release it here and to acquire it there.
        self._mesh.send(_ARRIVE)

    def wait(self, epoch: int) -> None:
        while self._epoch < epoch:
            self._mesh.receive(_ARRIVE)
            self._epoch += 1

    def close(self) -> None:
        self._mesh.close(in_order=True)
        self._mapped.clear()


def meet(group: dist.ProcessGroup, store: dist.Store, timeout: timedelta) -> Shm | str:
    """The exchange of the ranks of `group`, or why they cannot have one; on every rank the same of the two.

    `store` is for this alone. Raises ExchangeError at the deadline. After each step every rank reads how all others
    fared, so nobody waits for a rank that has given up.
    """
    attempt = _Attempt(group, store, timeout)
    heard: list[Any] = []
    try:
        for step in (attempt.listen, attempt.connect, attempt.accept, attempt.write):
            try:
                mine: dict[str, Any] = {"done": step(heard)}
            except (OSError, RuntimeError, UlyssesError) as error:
                attempt.undo()
                mine = {"obstacle": str(error)}
            answers = [json.loads(text) for text in share(store, step.__name__, group, json.dumps(mine), timeout)]
            obstacles: dict[str, list[int]] = {}
            for rank, answer in enumerate(answers):
                if "obstacle" in answer:
                    obstacles.setdefault(answer["obstacle"], []).append(rank)
            if obstacles:
                attempt.undo()
                return "; ".join(f"{text} (ranks {ranks})" for text, ranks in obstacles.items())
            heard = [answer["done"] for answer in answers]
    except BaseException:
        attempt.undo()
        raise
    assert attempt.shm is not None
    return attempt.shm


class _Attempt:
    """One rank's steps to an exchange. Each is given what all ranks returned from the one before."""

    def __init__(self, group: dist.ProcessGroup, store: dist.Store, timeout: timedelta) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.shm: Shm | None = None
        self._store = store
        self._timeout = timeout
        self._listener: Listener | None = None
        self._sockets: dict[int, socket] = {}
        self._pids: list[int] = []

    def listen(self, _: list[Any]) -> tuple[str, int, str]:
        """-> (this host, this process, where it listens)."""
        self._listener = Listener(self.size)
        return _host(), os.getpid(), self._listener.address

    def connect(self, heard: list[tuple[str, int, str]]) -> None:
        """To all lower ranks; they have room for it without doing anything."""
        hosts, self._pids = [host for host, _, _ in heard], [pid for _, pid, _ in heard]
        if len(set(hosts)) > 1:
            others = [rank for rank, host in enumerate(hosts) if host != hosts[0]]
            raise RuntimeError(f"ranks {others} are on another host than rank 0, or in another container")
        if len(set(self._pids)) < self.size:
            raise RuntimeError("several ranks are one process")
        for rank, (_, pid, address) in enumerate(heard[: self.rank]):
            self._sockets[rank] = connect(address, pid)

    def accept(self, _: list[Any]) -> None:
        """All higher ranks, which have connected by now."""
        assert self._listener is not None
        self._sockets |= self._listener.accept(self._pids, self.rank, self._timeout)
        self._listener.close()
        self.shm = Shm(self._store, self.rank, self.size, Mesh(self._sockets, self._timeout))

    def write(self, _: list[Any]) -> None:
        """Into the memory of all ranks, and read what they wrote here."""
        assert self.shm is not None
        mine = self.shm.pool.take((self.size,), torch.float32, torch.device("cpu"))
        for (theirs,) in self.shm.announce([mine]):
            theirs[self.rank] = self.rank
        self.shm.arrive(0)
        self.shm.wait(0)
        if mine.tolist() != list(range(self.size)):
            raise RuntimeError(f"what others wrote to its memory does not show there: {mine.tolist()}")

    def undo(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for end in self._sockets.values():
            end.close()
        if self.shm is not None:
            self.shm.close()
            self.shm.pool.close()


def _host() -> str:
    """What is equal for two processes that can reach each other's sockets and name each other's processes and users."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return " ".join([boot, *(os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES)])
