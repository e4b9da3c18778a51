"""Buffers in memory that all ranks of an NVLink domain have mapped: parts of a few large segments.

Mapping is collective and slow, so segments are never given back before the end, and a rank that runs out of them waits
for the next hop to ask for another one (`symm`); until then it takes ordinary memory. A buffer is free again when the
storage over it is gone, as in `pool`, and is used again behind the work that its streams had then.

What a CUDA graph was captured with, its replays will write again: such buffers are used again by graphs only. During a
capture all free memory is one, so that a layer finds its buffers where it had them when it ran before: the tables of
their addresses are there already, and a graph cannot make new ones.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .pool import Pool, _filled

_ALIGN = 512  # bytes: buffers begin at multiples of it, as PyTorch's own do


class Place(NamedTuple):
    """Bytes `start` to `stop` of a segment."""

    segment: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Ranges:
    """Free places of segments, neighbours joined to one."""

    def __init__(self) -> None:
        self._places: list[Place] = []  # in order, none touching the next
        self.size = 0

    def give(self, place: Place) -> None:
        self.size += place.size
        at = bisect_left(self._places, place)
        after = self._places[at] if at < len(self._places) else None
        before = self._places[at - 1] if at else None
        if after is not None and (after.segment, after.start) == (place.segment, place.stop):
            place = place._replace(stop=self._places.pop(at).stop)
        if before is not None and (before.segment, before.stop) == (place.segment, place.start):
            place = place._replace(start=self._places.pop(at - 1).start)
        insort(self._places, place)

    def take(self, size: int) -> Place | None:
        """The beginning of the smallest place that is large enough, if there is one; `size` is not 0."""
        found = min((p for p in self._places if p.size >= size), key=lambda p: (p.size, p), default=None)
        if found is None:
            return None
        self._places.remove(found)
        self.size -= found.size
        mine = found._replace(stop=found.start + size)
        if mine.stop < found.stop:
            self.give(found._replace(start=mine.stop))
        return mine

    def take_from(self, place: Place) -> list[Place]:
        """What is free of a place."""
        parts = []
        for free in list(self._places):
            start, stop = max(free.start, place.start), min(free.stop, place.stop)
            if free.segment == place.segment and start < stop:
                self._places.remove(free)
                self.size -= free.size
                parts.append(free._replace(start=start, stop=stop))
                for rest in (free._replace(stop=start), free._replace(start=stop)):
                    if rest.size:
                        self.give(rest)
        return parts

    def take_all(self) -> list[Place]:
        places, self._places, self.size = self._places, [], 0
        return places


class Streams(Protocol):
    """What is asked of a device whose kernels run in streams."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a graph."""

    def current(self) -> Any:
        """The current stream."""

    def marks(self, stream: Any) -> list[Any]:
        """Events behind all that `stream` and the current stream have been given."""

    def join(self, marks: Sequence[Any]) -> None:
        """What comes next on the current stream waits for `marks`."""

    def synchronize(self) -> None:
        """Wait for all that the device has been given."""


class _Lease:
    """What the storage of a buffer holds on to; when it goes, so has the storage."""

    def __init__(self, segment: Tensor, place: Place) -> None:
        self.segment = segment  # its memory stays for as long as there is a tensor in it
        kind = "__cuda_array_interface__" if segment.is_cuda else "__array_interface__"
        data = {"data": (segment.data_ptr() + place.start, False), "shape": (place.size,), "typestr": "|u1"}
        setattr(self, kind, data | {"version": 3, "strides": None})

    def tensor(self) -> Tensor:
        device = self.segment.device
        return torch.as_tensor(self, device=device) if self.segment.is_cuda else torch.from_numpy(np.asarray(self))


class _Returned(NamedTuple):
    place: Place
    of_graph: bool
    marks: list[Any] | None  # None: it came back during a capture, in which nothing can wait for eager work


class SymmetricPool(Pool):
    """A pool of one rank. `held` and `free` count bytes of the segments."""

    def __init__(self, device: torch.device, streams: Streams) -> None:
        super().__init__()
        self.device = device
        self._streams = streams
        self._segments: list[Tensor] = []
        self._ranges = Ranges()
        self._of_graphs = Ranges()  # empty during a capture
        self._captured: list[Place] = []  # all that captures were given
        self._in_capture = False
        self._back: deque[_Returned] = deque()  # filled by finalizers, in any thread, without a lock

    def add(self, segment: Tensor) -> None:
        """Use another segment, bytes."""
        self._segments.append(segment)
        self._ranges.give(Place(len(self._segments) - 1, 0, segment.numel() // _ALIGN * _ALIGN))
        self._count()

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `Pool.take`; memory of PyTorch's own on another device, and where no segment has room."""
        found = self.place(shape, dtype) if device == self.device and 0 not in shape else None
        return _filled(torch.empty(shape, dtype=dtype, device=device) if found is None else found)

    def place(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """An uninitialised tensor in a segment, if one has room."""
        self._settle()
        size = room(math.prod(shape) * dtype.itemsize)
        place = self._ranges.take(size)
        if place is None:
            return None
        if self._in_capture:
            self._captured.append(place)
        self.held += size
        self._count()
        lease = _Lease(self._segments[place.segment], place)
        release = weakref.finalize(lease, self._came_back, place, self._in_capture, self._streams.current())
        release.atexit = False
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return torch.empty(0, dtype=dtype, device=self.device).set_(
            lease.tensor().untyped_storage(), 0, tuple(shape), strides
        )

    def find(self, tensor: Tensor) -> tuple[int, int] | None:
        """The segment that a tensor lies in and its first byte there; None for other memory."""
        address = tensor.data_ptr()
        for number, segment in enumerate(self._segments):
            if 0 <= address - segment.data_ptr() < segment.numel():
                return number, address - segment.data_ptr()
        return None

    def close(self) -> None:
        """Use nothing again: a late peer may still write. Segments live as long as tensors in them."""
        self._open = False
        self._segments.clear()
        self._ranges, self._of_graphs = Ranges(), Ranges()
        self._settle()
        self._count()

    def _came_back(self, place: Place, of_graph: bool, stream: Any) -> None:
        capturing = self._streams.capturing()
        self._back.append(_Returned(place, of_graph, None if capturing else self._streams.marks(stream)))

    def _settle(self) -> None:
        """Take back what finalizers returned.

        A capture begins on an idle device (`torch.cuda.graph` waits for that), so what was eager by then is done.
        """
        capturing = self._streams.capturing()
        if capturing and not self._in_capture:
            for place in self._of_graphs.take_all():
                self._ranges.give(place)
        if self._in_capture and not capturing:
            for place in self._captured:
                for part in self._ranges.take_from(place):
                    self._of_graphs.give(part)
        self._in_capture = capturing
        for _ in range(len(self._back)):
            back = self._back.popleft()
            if capturing and back.marks is None and not back.of_graph:
                self._back.append(back)
                continue
            self.held -= back.place.size
            if not self._open:
                continue
            if not capturing:
                self._streams.join(back.marks or [])
            (self._of_graphs if back.of_graph and not capturing else self._ranges).give(back.place)

    def _count(self) -> None:
        self.free = self._ranges.size + self._of_graphs.size


def room(size: int) -> int:
    """What `size` bytes take of a segment."""
    return -(-size // _ALIGN) * _ALIGN
