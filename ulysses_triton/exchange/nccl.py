"""NCCL through cupy: grouped sends and receives of a communicator of our own, on a stream of our own.

A hop is one NCCL group straight from and into the packed rows. A rank's own part never enters it: it is written where
it belongs, or copied there when the caller brings a send buffer. Streams wait for each other by events; the host waits
for nothing and can capture all of it into a CUDA graph, except the first hop, which connects the ranks.

Buffers are safe from the caching allocator because the exchange holds on to a hop until `finish`: from then on whoever
uses their memory again comes behind the hop on the caller's stream. (`record_stream` would do too, but gives memory
back later, at times that differ from run to run, and not before the end of a capture.) A hop that is never finished is
held until its communicator is gone.

Nobody on the host waits, so a watchdog looks after what is under way. At the deadline, when NCCL reports an error or
when a peer left a last word, it sets the flag that `kernels.poison` reads at the end of every hop, so that its rows
become NaN, and aborts the communicator, which lets the streams go on; the group then raises at the next call. Replays
of a captured graph have no host code, so none of this looks after them.

All ranks start their hops in one order. Communicators of others in the same process, such as FSDP's, go on beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import DeviceError, GroupError
from ..messages import Message
from .base import Control, Exchange, Hop
from .cuda import CudaStream
from .pool import Pool
from .watchdog import Watchdog
from .within import within

_TYPES = {torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9}  # ncclDataType_t
_RAW = 1  # of bytes, for every other dtype
_ID_BYTES = 128


class Stream(Protocol):
    """What an exchange asks of a device; `CudaStream` says what each does."""

    device: torch.device
    handle: int
    status: Tensor

    def bind(self) -> None: ...
    def capturing(self) -> bool: ...
    def follow(self) -> None: ...
    def copy(self, into: Tensor, source: Tensor) -> None: ...
    def poison(self, rows: Tensor, number: int) -> None: ...
    def mark(self) -> Any: ...
    def join(self, event: Any) -> None: ...


class NcclHop:
    peers = None

    def __init__(
        self,
        link: _Link,
        rank: int,
        messages: Sequence[Message],
        receive: Sequence[Tensor],
        send: Sequence[Tensor | None],
        pool: Pool,
    ) -> None:
        self._link = link
        self._receive = receive
        traffic = [sum(m.send[peer] + m.receive[peer] for m in messages) for peer in range(len(messages[0].send))]
        self.partners = [peer for peer, elements in enumerate(traffic) if elements and peer != rank]
        self._arriving = [torch.split(into, list(m.receive)) for into, m in zip(receive, messages, strict=True)]
        self._own: list[tuple[Tensor, Tensor]] = []  # (where it goes, where it lies) for a caller's send buffer
        self.blocks: list[list[Tensor]] = []
        for message, into, mine, arriving in zip(messages, receive, send, self._arriving, strict=True):
            if mine is None:
                sizes = [n if peer != rank else 0 for peer, n in enumerate(message.send)]
                blocks = list(torch.split(pool.take((sum(sizes),), into.dtype, into.device), sizes))
                blocks[rank] = arriving[rank]
            else:
                blocks = list(torch.split(mine, list(message.send)))
                self._own.append((arriving[rank], blocks[rank]))
            self.blocks.append(blocks)

    def start(self) -> None:
        link = self._link
        number = link.begin(self)
        link.stream.follow()
        for into, source in self._own:
            link.stream.copy(into, source)
        with link.group(bool(self.partners)):
            for sending, arriving in zip(self.blocks, self._arriving, strict=True):
                for peer in self.partners:
                    link.send(sending[peer], peer)
                    link.receive(arriving[peer], peer)
        for rows in self._receive:
            link.stream.poison(rows, number)
        self._complete = link.stream.mark()

    def finish(self) -> None:
        self._link.require()
        self._link.stream.join(self._complete)
        self._link.flight.discard(self)


class _Link:
    """One communicator and its stream: made by the first hop of a group, gone with the group."""

    def __init__(
        self,
        nccl: Any,
        communicator: Any,
        control: Control,
        stream: Stream,
        timeout: float,
        where: Callable[[], str],
    ) -> None:
        self._nccl, self._communicator, self._control, self._timeout = nccl, communicator, control, timeout
        self.stream = stream
        self._where = where
        self.flight: set[NcclHop] = set()  # started and not finished: their buffers may not be used again
        self._number = 0
        self._status = stream.status.numpy()  # reading it calls nothing of CUDA
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._watchdog = Watchdog(
            timeout,
            reached=lambda: int(self._status[1]),
            trouble=self._trouble,
            news=self._news,
            give_up=self.abort,
        )

    def begin(self, hop: NcclHop) -> int:
        """Look after a hop that starts now; its number, 0 where it is only captured."""
        self.require()
        self.flight.add(hop)
        if self.stream.capturing():
            return 0
        self._number += 1
        self._watchdog.watch(self._number, f"{self._where()} (NCCL hop {self._number}, with ranks {hop.partners})")
        return self._number

    @contextmanager
    def group(self, needed: bool) -> Iterator[None]:
        """What is sent and received inside travels at once, and cannot wait for each other."""
        if not needed:
            yield
            return
        self._nccl.groupStart()
        try:
            yield
        finally:
            self._nccl.groupEnd()

    def send(self, part: Tensor, peer: int) -> None:
        if part.numel():
            self._communicator.send(part.data_ptr(), *_counted(part), peer, self.stream.handle)

    def receive(self, part: Tensor, peer: int) -> None:
        if part.numel():
            self._communicator.recv(part.data_ptr(), *_counted(part), peer, self.stream.handle)

    def failure(self) -> str | None:
        return self._failure or self._watchdog.reason

    def require(self) -> None:
        failure = self.failure()
        if failure is not None:
            raise RuntimeError(failure)

    def abort(self, why: str) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = why
        self._status[0] = 1  # before the streams go on
        self._watchdog.close()
        with suppress(RuntimeError):
            within(self._timeout, lambda: self._leave(self._communicator.abort), "NCCL did not abort")

    def close(self) -> None:
        if self.failure() is None:
            self._watchdog.drain()
        if self.failure() is None:
            try:
                within(
                    self._timeout,
                    lambda: self._leave(self._communicator.destroy),
                    "NCCL did not destroy its communicator",
                )
            except RuntimeError as error:
                self._failure = f"{self._where()}: {error}: is a CUDA graph alive that captured it?"
        self._watchdog.close()

    def _leave(self, how: Callable[[], None]) -> None:
        how()  # where it does not come back, this thread keeps the buffers in flight for good
        self.flight.clear()

    def _trouble(self) -> str | None:
        try:
            self._communicator.check_async_error()
        except RuntimeError as error:
            return str(error)
        except KeyError:  # cupy has no name for "in progress", which is no error
            pass
        return None

    def _news(self) -> str | None:
        words = self._control.hear(0.0)
        words.pop(self._control.rank, None)
        return "; ".join(f"rank {rank} ended in {word}" for rank, word in sorted(words.items())) or None


class NcclExchange:
    """Collective hops between GPUs; rows on the CPU are left to `host`, the exchange of the process group.

    `nccl` is `cupy.cuda.nccl`.
    """

    name = "nccl"
    one_sided = False

    def __init__(
        self,
        nccl: Any,
        control: Control,
        pool: Pool,
        timeout: timedelta,
        *,
        host: Exchange | None = None,
        stream: Callable[[torch.device], Stream] = CudaStream,
    ) -> None:
        self._nccl, self._control, self._pool = nccl, control, pool
        self._timeout = timeout.total_seconds()
        self._host = host
        self._make_stream = stream
        self._link: _Link | None = None
        self._ended: str | None = None
        self.where: Callable[[], str] = lambda: "an exchange"

    def open(self, messages: Sequence[Message], receive: Sequence[Tensor], send: Sequence[Tensor | None]) -> Hop:
        device = receive[0].device
        if self._host is not None and device.type == "cpu":
            return self._host.open(messages, receive, send)
        return NcclHop(self._linked(device), self._control.rank, messages, receive, send, self._pool)

    def defers(self, device: str) -> bool:
        return self._host is None or device != "cpu"

    def failure(self) -> str | None:
        return self._ended if self._link is None else self._link.failure()

    def abort(self, why: str) -> None:
        self._ended = why
        if self._link is not None:
            self._link.abort(why)

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
            self._ended = link.failure()
        if self._host is not None:
            self._host.close()

    def _linked(self, device: torch.device) -> _Link:
        """The link, made by the first hop: only then is it known which device this rank is on."""
        if self._link is None:
            if self._ended is not None:
                raise RuntimeError(self._ended)
            stream = self._make_stream(device)
            if stream.capturing():
                raise GroupError(
                    "the first call over a group connects its ranks, which a CUDA graph cannot capture: make one call "
                    "before the capture"
                )
            communicator = self._connect(stream)
            self._link = _Link(self._nccl, communicator, self._control, stream, self._timeout, lambda: self.where())
        elif self._link.stream.device != device:
            raise DeviceError(
                f"tensors on {device}, but this group has exchanged tensors on {self._link.stream.device}: a group "
                "stays on one device per rank; use torch.cuda.set_device, or a group for each device"
            )
        return self._link

    def _connect(self, stream: Stream) -> Any:
        rank, size = self._control.rank, self._control.size
        mine = bytes(self._nccl.get_unique_id()) if rank == 0 else bytes(_ID_BYTES)
        shared = self._control.gather(mine)[0]

        def connect() -> Any:
            stream.bind()
            return self._nccl.NcclCommunicator(size, shared, rank)

        return within(self._timeout, connect, "NCCL did not connect")


def _counted(part: Tensor) -> tuple[int, int]:
    """How many of which NCCL data type."""
    kind = _TYPES.get(part.dtype)
    return (part.numel() * part.element_size(), _RAW) if kind is None else (part.numel(), kind)
