"""`trace`: what every step of every call took, recorded while it runs.

    with ulysses_triton.trace() as t:
        loss(model(x)).backward()
    everything = t.gather(group)  # of all ranks; every rank does it
    everything.write("trace.json")
    everything.svg("timeline.svg")

On a CPU times come from the clock, on a GPU from events on the stream that computes, read when the block ends, so
nothing waits inside. An exchange lasts from its start to the end of the wait for it; what of that was waiting is its
exposed time. Ranks of one host share a clock. The clock of another host is set by a control message, and may be off by
as long as one takes.
"""

from __future__ import annotations

import json
import platform
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TypeAlias

import torch

from .errors import OptionError
from .exchange.base import Hop
from .group import Groupish, UlyssesGroup, resolve
from .schedule import Step
from .timeline import Event, Timeline

_ROUNDS = 5  # of control messages that compare clocks
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # one per running kernel, and so per clock
_lock = threading.Lock()

Mark: TypeAlias = "float | torch.cuda.Event"
_Marks = tuple[Event, torch.device, tuple[Mark, ...]]  # an event without its times, and its start, wait and end


class Trace(Timeline):
    """A timeline that records the steps of all groups of this process, those made inside the block too.

    After the block `events` are those of this process's ranks. One at a time; raises OptionError for a second one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marks: list[_Marks] = []  # appended to by the threads of virtual ranks and of autograd

    def __enter__(self) -> Trace:
        with _lock:
            if UlyssesGroup.recorder is not None:
                raise OptionError("trace() inside another trace(): one at a time records all groups of a process")
            UlyssesGroup.recorder = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        UlyssesGroup.recorder = None
        clocks = {device: _clock(device) for device in {device for _, device, _ in self._marks}}
        super().__init__([_timed(event, clocks[device], marks) for event, device, marks in self._marks])
        self._marks.clear()

    @contextmanager
    def step(self, group: UlyssesGroup, step: Step, device: torch.device) -> Iterator[None]:
        """Around a step that computes."""
        begin = _mark(device)
        yield
        self._marks.append((_event(group, step), device, (begin, _mark(device))))

    def hop(self, group: UlyssesGroup, name: str, chunk: int, hop: Hop, sent: int, device: torch.device) -> Hop:
        """A hop that records itself; `sent` bytes go to other ranks."""
        event = _event(group, Step(name, "exchange", chunk))._replace(sent=sent)
        return _TracedHop(self, hop, event, device)

    def gather(self, group: Groupish = None) -> Timeline:
        """The timeline of all ranks of a group, on every rank; collective, after the block."""
        if UlyssesGroup.recorder is self:
            raise OptionError("gather() inside its trace(): call it after the block")
        own = resolve(group)
        own.agree("gather of a trace", "")
        mine = [e for e in self.events if e.rank == own.rank and e.group == _name(own)]
        offsets = _offsets(own)
        parts = _exchanged(own, json.dumps(mine).encode())
        return Timeline(
            event._replace(start=event.start - offset, end=event.end - offset)
            for part, offset in zip(parts, offsets, strict=True)
            for event in map(Event._make, json.loads(part))
        )


def trace() -> Trace:
    """Record every step of every call made in the `with` block, on all ranks of this process.

    Outside of it nothing is recorded, at the cost of looking at one attribute per step. Every rank opens its own.
    """
    return Trace()


class _TracedHop:
    """A hop that notes when it was started, waited for and finished."""

    def __init__(self, trace: Trace, hop: Hop, event: Event, device: torch.device) -> None:
        self._trace, self._hop, self._event, self._device = trace, hop, event, device
        self.blocks, self.peers = hop.blocks, hop.peers

    def start(self) -> None:
        self._begin = _mark(self._device)
        self._hop.start()

    def finish(self) -> None:
        wait = _mark(self._device)
        self._hop.finish()
        marks = self._begin, wait, _mark(self._device)
        self._trace._marks.append((self._event, self._device, marks))


def _event(group: UlyssesGroup, step: Step) -> Event:
    call, what = group.latest
    return Event(group.rank, call, what, step.name, step.chunk, step.stream, 0.0, 0.0, group=_name(group))


def _name(group: UlyssesGroup) -> str:
    """The group's name without the rank in it."""
    return group.name.rpartition(":")[0]


# -- clocks


def _mark(device: torch.device) -> Mark:
    """Now: on a GPU, when the current stream has come here."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _clock(device: torch.device) -> tuple[torch.cuda.Event, float] | None:
    """An event on a GPU and the time at which it happened; None on a CPU, whose marks are times."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    event.synchronize()
    return event, time.perf_counter()


def _timed(event: Event, clock: tuple[torch.cuda.Event, float] | None, marks: tuple[Mark, ...]) -> Event:
    times = [_seconds(mark, clock) for mark in marks]
    return event._replace(start=times[0], end=times[-1], exposed=times[-1] - times[1] if len(times) > 2 else 0.0)


def _seconds(mark: Mark, clock: tuple[torch.cuda.Event, float] | None) -> float:
    if isinstance(mark, float):
        return mark
    assert clock is not None
    reference, at = clock
    return at - float(mark.elapsed_time(reference)) / 1e3


def _offsets(group: UlyssesGroup) -> list[float]:
    """How far each rank's clock is ahead of rank 0's: nothing on one host, else as control messages show."""
    host = _BOOT.read_text() if _BOOT.exists() else platform.node()
    hosts = _exchanged(group, host.encode())
    readings = []
    for _ in range(_ROUNDS):
        _exchanged(group, b" ")
        readings.append(time.perf_counter())  # all ranks come here at nearly one time
    clocks = [struct.unpack(f"{_ROUNDS}d", part) for part in _exchanged(group, struct.pack(f"{_ROUNDS}d", *readings))]
    firsts = [hosts.index(host) for host in hosts]  # ranks of one host are set alike
    return [median(a - b for a, b in zip(clocks[first], clocks[0], strict=True)) for first in firsts]


def _exchanged(group: UlyssesGroup, payload: bytes) -> list[bytes]:
    """Every rank's payload, of any length, as control messages."""
    with group.step("gather of a trace"):
        sizes = [struct.unpack("<q", part)[0] for part in group.control.gather(struct.pack("<q", len(payload)))]
        parts = group.control.gather(payload.ljust(max(sizes), b"\0"))
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]
