"""The one-sided exchange over PyTorch's symmetric memory, for GPUs of one NVLink domain.

Pack and attend store into the peers' buffers by themselves; this says where those are, and when. Its two halves:

    host    `announce`: every rank tells by a control message in which segment, and where there, its buffers lie. A rank
            that lacks room says how much (`GROW`); all ranks see that, map one segment of the largest size asked, and
            announce again. Segments are mapped for as long as the group lives, and serve for nothing else.
    device  kernels alone (`kernels.signals`), in the order of the caller's stream: my buffers are free (`READY`), wait
            until the peers' are; then, after the kernels that write, all is written (`ARRIVED`), wait until the peers
            have. The host waits for none of it, and a captured graph replays it.

A buffer that lies in no segment (there was no room, or it is the caller's) is received in one and copied at the end of
the hop. So the first calls copy, and grow the pool until later ones need neither.

Faults: a wait that ends without its signal leaves a word in pinned memory. `kernels.poison` then makes NaN of what
arrived, in this hop and all that follow, peers are told at the next signal, and the group raises at the next call. A
rank that gave up waiting for a peer's READY still writes there, as kernels that are queued cannot be called back: the
peer's waits fail from then on, but what it had handed out of those buffers by then is not marked.

Signals are atomics on the peers' memory, which NVLink carries. Not yet run on a GPU: the kernels run in Triton's
interpreter and are compiled ahead of time, and the rest runs over a fake of PyTorch's memory.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DeviceError, GroupError, OutOfMemoryError
from ..kernels import signals
from ..kernels.poison import poison
from ..messages import Message
from .base import Control
from .one_sided import OneSidedExchange, OneSidedHop
from .store import share
from .symm_pool import Streams, SymmetricPool, room

_STEP = 64 << 20  # bytes: a new segment is no smaller
_OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


class Memory(Protocol):
    """What is asked of PyTorch's symmetric memory."""

    device: torch.device

    def empty(self, size: int) -> Tensor:
        """So many bytes that can be mapped by peers. Raises RuntimeError where there are none."""

    def rendezvous(self, segment: Tensor) -> Any:
        """Map all ranks' segments of one size: a `_SymmetricMemory`. Collective."""


class TorchMemory:
    """PyTorch's symmetric memory of a process group."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.device = device
        self._group = group

    def empty(self, size: int) -> Tensor:
        # Not `symm_mem.empty`: its memory comes from a cache, in which a late peer's stores could meet the next user.
        from torch._C._distributed_c10d import _SymmetricMemory

        return _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self.device)

    def rendezvous(self, segment: Tensor) -> Any:
        from torch.distributed import _symmetric_memory

        return _symmetric_memory.rendezvous(segment, self._group)


class CudaStreams:
    """`Streams` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def marks(self, stream: torch.cuda.Stream) -> list[torch.cuda.Event]:
        return [s.record_event() for s in {stream, self.current()}]

    def join(self, marks: Sequence[torch.cuda.Event]) -> None:
        for mark in marks:
            self.current().wait_event(mark)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


class Symmetric:
    """One rank's transport. Making one is collective, as is every growth of its pool.

    Args:
        control: carries the announcements.
        memory: where segments come from.
        timeout: seconds that the device waits for a peer.
        step: bytes of the first segment, and at least of every other.
    """

    def __init__(
        self, control: Control, memory: Memory, streams: Streams, timeout: float, *, step: int = _STEP
    ) -> None:
        self.rank, self.size = control.rank, control.size
        self.pool = SymmetricPool(memory.device, streams)
        self._control, self._memory, self._streams = control, memory, streams
        self._timeout, self._step = timeout, step
        self._handles: list[Any] = []
        self._started = 0
        self._ended: str | None = None
        self._status = torch.zeros(
            signals.FLAGS + self.size, dtype=torch.int64, pin_memory=memory.device.type == "cuda"
        )
        self._words = self._status.numpy()  # reading it calls nothing of CUDA
        self._grow(0)
        words = signals.KINDS * self.size
        pads = [self._handles[0].get_signal_pad(rank, dtype=torch.int64) for rank in range(self.size)]
        if pads[0].numel() < words:
            raise GroupError(
                f"the signal pad of symmetric memory holds {pads[0].numel()} words, and {self.size} ranks need "
                f"{words}: call torch.distributed._symmetric_memory.set_signal_pad_size({8 * words}) before anything "
                "uses symmetric memory, or use another exchange"
            )
        self._pad = pads[self.rank]
        self._pads = torch.tensor([pad.data_ptr() for pad in pads], dtype=torch.int64, device=memory.device)
        self._counts = torch.zeros(signals.KINDS + 1, self.size, dtype=torch.int64, device=memory.device)

    def announce(self, buffers: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """As the protocol's; of a buffer that lies in no segment, this rank's is another that does."""
        mine: list[Tensor | None] = [None] * len(buffers)
        while True:
            mine = [self._landing(b) if found is None else found for b, found in zip(buffers, mine, strict=True)]
            missing = sum(room(b.nbytes) for b, found in zip(buffers, mine, strict=True) if found is None)
            frames = self._gather(missing, [number for found in mine for number in self._where(found)])
            asked = max(frame[0] for frame in frames)
            if asked == 0:
                break
            self._grow(asked)
        dtypes = [buffer.dtype for buffer in buffers]
        peers: list[Sequence[Tensor]] = [
            [
                self._peer(rank, dtype, *numbers[i : i + 3])
                for dtype, i in zip(dtypes, range(0, len(numbers), 3), strict=True)
            ]
            for rank, (_, *numbers) in enumerate(frames)
        ]
        peers[self.rank] = [found for found in mine if found is not None]
        signals.signal(self._pads, self._counts, self._status, signals.READY, self.rank)
        self._wait(signals.READY, 0)
        return peers

    def arrive(self, epoch: int) -> None:
        self._started = epoch
        signals.signal(self._pads, self._counts, self._status, signals.ARRIVED, self.rank)

    def wait(self, epoch: int) -> None:
        """As the protocol's, but it is the current stream that waits: `failure` says how that ended."""
        self._wait(signals.ARRIVED, self._started - epoch)

    def settle(self, rows: Tensor, landed: Tensor) -> None:
        """Bring what has arrived to where the caller wants it; NaN where it did not arrive."""
        if rows.numel():
            if rows is not landed:
                rows.view(-1).copy_(landed.view(-1))
            poison(self._status[: signals.FLAGS], rows, 0)

    def failure(self) -> str | None:
        """Why this rank has given up, as far as the device has come."""
        by_rank = self._words[signals.FLAGS :]
        silent = [rank for rank, word in enumerate(by_rank) if word == signals.SILENT]
        gave_up = [rank for rank, word in enumerate(by_rank) if word == signals.GAVE_UP]
        said = [f"no signal of ranks {silent} within {self._timeout:g} s"] if silent else []
        said += [f"ranks {gave_up} gave up"] if gave_up else []
        return self._ended or "; ".join(said) or None

    def abort(self, why: str) -> None:
        """End all waits, and let the peers' end too."""
        if self._ended is None:
            self._ended = why
            self._words[0] = 1
            with suppress(RuntimeError):  # a device in trouble takes no kernels
                for kind in range(signals.KINDS):
                    signals.signal(self._pads, self._counts, self._status, kind, self.rank)

    def close(self) -> None:
        if self._handles:
            with suppress(RuntimeError):
                self._streams.synchronize()  # kernels that write to peers; all waits end at the deadline
            self._ended = self.failure()
            self._handles.clear()
            self.pool.close()

    def _wait(self, kind: int, behind: int) -> None:
        signals.wait(self._pad, self._counts, self._status, kind, behind, self._timeout)

    def _landing(self, buffer: Tensor) -> Tensor | None:
        """Where peers write what is for `buffer`: itself where they can; None where there is no room."""
        if buffer.device != self.pool.device:
            raise DeviceError(
                f"tensors on {buffer.device}, but this group exchanges tensors on {self.pool.device}, the current "
                "device when it was made: use torch.cuda.set_device before, or a group for each device"
            )
        if not buffer.numel() or self.pool.find(buffer) is not None:
            return buffer
        return self.pool.place(buffer.shape, buffer.dtype)

    def _where(self, buffer: Tensor | None) -> tuple[int, int, int]:
        """(segment, first byte there, elements) of a buffer in a segment."""
        found = None if buffer is None or not buffer.numel() else self.pool.find(buffer)
        return (0, 0, 0) if buffer is None or found is None else (*found, buffer.numel())

    def _gather(self, missing: int, places: Sequence[int]) -> list[tuple[int, ...]]:
        """All ranks' numbers: bytes that are missing, then `_where` every buffer is."""
        numbers = [missing, *places]
        form = struct.Struct(f"<{len(numbers)}q")
        return [form.unpack(frame) for frame in self._control.gather(form.pack(*numbers))]

    def _peer(self, rank: int, dtype: torch.dtype, segment: int, start: int, elements: int) -> Tensor:
        if not elements:
            return torch.empty(0, dtype=dtype, device=self.pool.device)
        return self._handles[segment].get_buffer(rank, (elements,), dtype, start // dtype.itemsize)

    def _grow(self, asked: int) -> None:
        """Map one more segment; every rank with the same size."""
        if self._streams.capturing():
            raise GroupError(
                f"{asked:,} more bytes of symmetric memory are needed, which a CUDA graph cannot map: make a call of "
                "the same shapes, forward and backward, before the capture"
            )
        size = -(-max(asked, self._step) // self._step) * self._step
        segment, trouble = None, ""
        try:
            segment = self._memory.empty(size)
        except RuntimeError as error:
            trouble = str(error).splitlines()[0]
        failed = [rank for rank, (lacks,) in enumerate(self._gather(int(segment is None), ())) if lacks]
        if segment is None or failed:
            raise OutOfMemoryError(
                f"no room for {size:,} more bytes of symmetric memory beside {self.pool.held:,} bytes in use on ranks "
                f'{failed} {trouble}: use recompute="exchange", a smaller batch or shorter sequences'
            )
        self._handles.append(self._memory.rendezvous(segment))
        self.pool.add(segment)


class SymmetricHop(OneSidedHop):
    def __init__(self, exchange: SymmetricExchange, messages: Sequence[Message], receive: Sequence[Tensor]) -> None:
        super().__init__(exchange, messages, receive)
        self._symmetric = exchange.symmetric
        self._receive = receive

    def finish(self) -> None:
        super().finish()
        for rows, peers in zip(self._receive, self.peers, strict=True):
            self._symmetric.settle(rows, peers[self._symmetric.rank])


class SymmetricExchange(OneSidedExchange):
    """Hops over symmetric memory; the host waits for none of them, so that it is asked how they went (`Watched`)."""

    def __init__(self, symmetric: Symmetric) -> None:
        super().__init__("symm", symmetric)
        self.symmetric = symmetric
        self.where: Callable[[], str] = lambda: "an exchange"

    def open(
        self, messages: Sequence[Message], receive: Sequence[Tensor], send: Sequence[Tensor | None]
    ) -> SymmetricHop:
        return SymmetricHop(self, messages, receive)

    def defers(self, device: str) -> bool:
        return False

    def failure(self) -> str | None:
        return self.symmetric.failure()

    def abort(self, why: str) -> None:
        self.symmetric.abort(why)


def meet(group: dist.ProcessGroup, store: dist.Store, control: Control, timeout: timedelta) -> Symmetric | str:
    """The exchange of the ranks of `group`, or why they cannot have one; on every rank the same of the two."""
    mine = _about_me()
    everyone = [json.loads(text) for text in share(store, "symm", group, json.dumps(mine), timeout)]
    obstacle = _obstacle(everyone)
    if obstacle is None:
        seen = _unreachable(everyone)
        texts = share(store, "symm reach", group, json.dumps(seen), timeout)
        pairs = [(rank, peer) for rank, text in enumerate(texts) for peer in json.loads(text)]
        obstacle = f"no peer access between the GPUs of ranks {pairs[0][0]} and {pairs[0][1]}" if pairs else None
    if obstacle is not None:
        return obstacle
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        found, trouble = (
            Symmetric(control, TorchMemory(group, device), CudaStreams(device), timeout.total_seconds()),
            "",
        )
    except (RuntimeError, OutOfMemoryError) as error:
        found, trouble = None, str(error).splitlines()[0]
    troubles = share(store, "symm mapped", group, trouble, timeout)
    if found is not None and not any(troubles):
        return found
    if found is not None:
        found.close()
    return "; ".join(f"{text} (rank {rank})" for rank, text in enumerate(troubles) if text)


def _about_me() -> dict[str, str]:
    """What the ranks compare: where this one is, or the obstacle that it found by itself."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return {"obstacle": "no CUDA device"}
    try:
        from torch.distributed import _symmetric_memory
    except ImportError as error:
        return {"obstacle": f"this PyTorch has no symmetric memory ({error})"}
    device = torch.device("cuda", torch.cuda.current_device())
    backend = _symmetric_memory.get_backend(device)
    if backend != "CUDA":
        return {"obstacle": f"symmetric memory by {backend}; it must be by CUDA (TORCH_SYMMMEM=CUDA)"}
    return {"host": socket.gethostname(), "device": _uuid(device), "overlap": os.environ.get(_OVERLAP, "0")}


def _uuid(device: torch.device | int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _obstacle(everyone: Sequence[dict[str, str]]) -> str | None:
    """Why ranks that say this of themselves cannot exchange."""
    for rank, about in enumerate(everyone):
        if "obstacle" in about:
            return f"rank {rank}: {about['obstacle']}"
    for rank, about in enumerate(everyone):
        if about["host"] != everyone[0]["host"]:
            return f"rank {rank} is on host {about['host']}, rank 0 on {everyone[0]['host']}"
    devices = [about["device"] for about in everyone]
    if len(set(devices)) < len(devices) and any(about["overlap"] != "1" for about in everyone):
        shared = [rank for rank, device in enumerate(devices) if devices.count(device) > 1]
        return f"ranks {shared} share GPUs; {_OVERLAP}=1 on every rank allows that, for tests"
    return None


def _unreachable(everyone: Sequence[dict[str, str]]) -> list[int]:
    """Ranks whose GPU this process sees, and cannot write to from its own."""
    mine = torch.cuda.current_device()
    indices = {_uuid(index): index for index in range(torch.cuda.device_count())}
    visible = [(rank, indices[about["device"]]) for rank, about in enumerate(everyone) if about["device"] in indices]
    return [rank for rank, index in visible if index != mine and not torch.cuda.can_device_access_peer(mine, index)]
