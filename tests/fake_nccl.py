"""cupy's NCCL and a CUDA stream, faked on CPU tensors: ranks are threads, and every fault of order shows.

    results = fake_nccl.run(3, function)                # function(group) on three virtual ranks, with NCCL as exchange
    nccl = FakeNccl(); join(group, nccl)                # the same by hand; `nccl` is in place of `cupy.cuda.nccl`

The caller's stream is the calling thread: what it does is done. The exchange's stream runs nothing when it is told to,
but at the last moment: when the caller's stream waits for an event of it. So what nobody waits for is not there, and
memory that was given back too early has other contents. A send is matched to the receive of its peer in the order in
which they were given, as NCCL does; where their sizes, types or order do not fit, every rank gets a `Mismatch` at once,
where NCCL would hang, and `FakeNccl(hangs=True)` does. A group of operations that is not ordered behind the caller's
stream since the last one is a `Mismatch`, too.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from ulysses_triton import UlyssesGroup, run_virtual
from ulysses_triton.exchange.nccl import NcclExchange
from ulysses_triton.kernels import _config, poison, reference

T = TypeVar("T")

SIZES = {1: 1, 6: 2, 7: 4, 8: 8, 9: 2}  # bytes of ncclDataType_t
SECONDS = 60.0  # until a test that hangs is told so


class Mismatch(Exception):
    """Wrong use of NCCL or of streams; not a RuntimeError, which the group would take for a peer that is gone."""


class NcclError(RuntimeError):
    pass


@dataclass
class Transfer:
    """A send and a receive that met."""

    ends: list[Group]
    source: int
    target: int
    size: int
    done: bool = False


@dataclass(eq=False)
class Group:
    """The operations between groupStart and groupEnd, at one place of a stream."""

    communicator: NcclCommunicator
    stream: FakeStream
    calls: list[tuple[str, int, int, int, int]] = field(default_factory=list)  # (kind, pointer, count, type, peer)
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def matched(self) -> bool:
        return len(self.transfers) == len(self.calls)


class FakeNccl:
    """What `cupy.cuda.nccl` has, shared by all ranks."""

    available = True
    NcclError = NcclError

    def __init__(self, code: int = 22907, hangs: bool = False) -> None:
        self.code, self.hangs = code, hangs
        self.changed = threading.Condition(threading.RLock())
        self.streams: dict[int, FakeStream] = {}
        self.worlds: dict[bytes, dict[int, NcclCommunicator]] = defaultdict(dict)  # by unique id, by rank
        self.living: set[NcclCommunicator] = set()
        self.log: list[str] = []  # what became of communicators
        self.mismatch: str | None = None
        self._ids = 0
        self._thread = threading.local()

    def get_version(self) -> int:
        return self.code

    def get_unique_id(self) -> bytes:
        self._ids += 1
        return self._ids.to_bytes(128, "little")

    def NcclCommunicator(self, size: int, unique_id: bytes, rank: int) -> NcclCommunicator:
        return NcclCommunicator(self, size, unique_id, rank)

    def groupStart(self) -> None:
        assert getattr(self._thread, "group", None) is None, "groups are not nested"
        self._thread.group = []

    def groupEnd(self) -> None:
        calls, self._thread.group = self._thread.group, None
        if not calls:
            return
        communicator, stream = calls[0][0], self.streams[calls[0][1]]
        if any(c is not communicator or self.streams[s] is not stream for c, s, *_ in calls):
            self.fail("one group, two communicators or streams")
        communicator.post(Group(communicator, stream, [call[2:] for call in calls]))

    def fail(self, text: str) -> None:
        with self.changed:
            self.mismatch = self.mismatch or text
            self.changed.notify_all()
        raise Mismatch(text)

    def call(self, communicator: NcclCommunicator, stream: int, *call: int | str) -> None:
        if getattr(self._thread, "group", None) is None:
            self.fail("a send or receive outside of a group")
        if communicator.state != "open":
            raise NcclError("invalid argument")
        self._thread.group.append((communicator, stream, *call))

    def wait(self, stop: Callable[[], bool]) -> None:
        """Until something changed, with `changed` held."""
        if self.mismatch:
            raise Mismatch(self.mismatch)
        if not stop() and not self.changed.wait(SECONDS):
            self.fail(f"nothing happened for {SECONDS:g} s")


class NcclCommunicator:
    """One rank's end. `error` is what `check_async_error` raises."""

    def __init__(self, nccl: FakeNccl, size: int, unique_id: bytes, rank: int) -> None:
        assert len(unique_id) == 128
        self.nccl, self.rank = nccl, rank
        self.state = "open"
        self.error: str | None = None
        self.waiting: dict[tuple[str, int], deque[tuple[Group, int, int, int]]] = defaultdict(deque)
        with nccl.changed:
            nccl.living.add(self)
            self.peers = nccl.worlds[unique_id]
            self.peers[rank] = self
            nccl.changed.notify_all()
            while len(self.peers) < size:
                nccl.wait(lambda: len(self.peers) == size)

    def send(self, pointer: int, count: int, kind: int, peer: int, stream: int) -> None:
        self.nccl.call(self, stream, "send", pointer, count, kind, peer)

    def recv(self, pointer: int, count: int, kind: int, peer: int, stream: int) -> None:
        self.nccl.call(self, stream, "recv", pointer, count, kind, peer)

    def check_async_error(self) -> None:
        if self.error is not None:
            raise NcclError(self.error)

    def abort(self) -> None:
        self._leave("abort")

    def destroy(self) -> None:
        self._leave("destroy")

    def _leave(self, how: str) -> None:
        with self.nccl.changed:
            if self.state == "open":
                self.state = how
                self.nccl.log.append(f"rank {self.rank}: {how}")
                self.nccl.living.discard(self)
                self.nccl.changed.notify_all()

    def post(self, group: Group) -> None:
        nccl = self.nccl
        with nccl.changed:
            if not group.stream.ordered:
                nccl.fail(f"rank {self.rank} sends without waiting for the caller's stream")
            group.stream.ordered = False
            for kind, pointer, count, dtype, peer in group.calls:
                if peer == self.rank or count == 0:
                    nccl.fail(f"rank {self.rank}: {kind} of {count} elements with rank {peer}")
                other = self.peers[peer]
                theirs = other.waiting["recv" if kind == "send" else "send", self.rank]
                if not theirs:
                    self.waiting[kind, peer].append((group, pointer, count, dtype))
                    continue
                met, far, size, form = theirs.popleft()
                if (size, form) != (count, dtype) and nccl.hangs:
                    continue  # neither of the two groups is ever whole
                if (size, form) != (count, dtype):
                    nccl.fail(f"rank {self.rank}: {kind} of {count} x type {dtype}, rank {peer} has {size} x {form}")
                ends = (pointer, far) if kind == "send" else (far, pointer)
                transfer = Transfer([group, met], *ends, count * SIZES[dtype])
                group.transfers.append(transfer)
                met.transfers.append(transfer)
            group.stream.give(group)
            nccl.changed.notify_all()


class FakeStream:
    """`CudaStream` for CPU tensors. `captures`: whether the caller is capturing."""

    def __init__(self, nccl: FakeNccl, device: torch.device) -> None:
        self.nccl, self.device = nccl, device
        self.status = torch.zeros(2, dtype=torch.int64)
        self.ordered = False  # behind the caller's stream, since the latest group
        self.captures = False
        self.work: list[Group | Callable[[], None]] = []
        self.finished = 0
        with nccl.changed:
            self.handle = len(nccl.streams) + 1
            nccl.streams[self.handle] = self

    def bind(self) -> None:
        pass

    def capturing(self) -> bool:
        return self.captures

    def follow(self) -> None:
        self.ordered = True

    def give(self, item: Group | Callable[[], None]) -> None:
        with self.nccl.changed:
            self.work.append(item)
            self.nccl.changed.notify_all()

    def copy(self, into: Tensor, source: Tensor) -> None:
        self.give(lambda: self.do(into.copy_, source))

    def poison(self, rows: Tensor, number: int) -> None:
        kernel = poison.poison if _config.INTERPRET else reference.poison
        self.give(lambda: self.do(kernel, self.status, rows, number))

    @staticmethod
    def do(function: Callable[..., Any], *arguments: Any) -> None:
        function(*arguments)

    def mark(self) -> int:
        return len(self.work)

    def join(self, event: int) -> None:
        self.run(event)

    def run(self, stop: int, above: tuple[FakeStream, ...] = ()) -> None:
        """Do what this stream was given, up to `stop`, and what it needs of other ranks' streams."""
        with self.nccl.changed:
            while self.finished < stop:
                at, item = self.finished, self.work[self.finished]
                if isinstance(item, Group):
                    if not self._arrived(item, above) or self.finished != at:
                        continue
                else:
                    item()
                self.work[at] = lambda: None  # what it held is free
                self.finished += 1
                self.nccl.changed.notify_all()

    def _arrived(self, group: Group, above: tuple[FakeStream, ...]) -> bool:
        """Move what a group sends and receives; False to try again."""
        if self.nccl.mismatch:
            raise Mismatch(self.nccl.mismatch)
        if group.communicator.state == "abort":
            return True
        if not group.matched:
            self.nccl.wait(lambda: group.matched or group.communicator.state == "abort")
            return False
        for transfer in group.transfers:
            other = next(end for end in transfer.ends if end is not group)
            if transfer.done:
                continue
            if other.communicator.state == "abort":  # it never comes
                self.nccl.wait(lambda: group.communicator.state == "abort")
                return False
            if other.stream in above:
                self.nccl.fail("ranks wait for each other in a circle")
            where = other.stream.work.index(other)
            if other.stream.finished < where:
                other.stream.run(where, (*above, self))
                return False
            ctypes.memmove(transfer.target, transfer.source, transfer.size)
            transfer.done = True
        return True


def join(
    group: UlyssesGroup, nccl: FakeNccl, timeout: float = 60.0, stream: Callable[..., FakeStream] = FakeStream
) -> UlyssesGroup:
    """The virtual rank's group, from now on with NCCL as its exchange."""
    group.exchange = NcclExchange(
        nccl, group.control, group.pool, timedelta(seconds=timeout), stream=lambda device: stream(nccl, device)
    )
    group.exchange.where = lambda: group._doing
    return group


def run(ranks: int, function: Callable[[UlyssesGroup], T], nccl: FakeNccl | None = None, **options: Any) -> list[T]:
    """`run_virtual` over the fake: each rank's result. Nothing is left behind."""
    nccl = nccl or FakeNccl()
    timeout = options.get("timeout", 60.0)
    results = run_virtual(ranks, lambda group: function(join(group, nccl, **options)), timeout=timeout)
    assert not nccl.living and nccl.mismatch is None
    return results


def settled(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()
