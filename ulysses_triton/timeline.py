"""What ranks did when, or would do: the steps of calls as events, the figures they add up to, and files of them.

`tracing` records events, `cost` predicts them; both are a `Timeline`, so both write the same picture. Example, of one
call on one rank: `pack` from 0 to 2 on the compute stream, `exchange_in` from 2 to 5 on the exchange stream, of which
3 were waited for, `attend` from 5 to 9. `busy()` is 6 seconds, `exposed()` 3.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STREAMS = ("compute", "exchange")


class Event(NamedTuple):
    """One step of one call on one rank. Times in seconds, on a clock that all events of a timeline share."""

    rank: int
    call: int  # its number in the group
    what: str  # "attention", "attention backward", ...
    step: str  # its name in the schedule
    chunk: int
    stream: str
    start: float
    end: float
    sent: int = 0  # bytes to other ranks
    exposed: float = 0.0  # seconds, the last ones of an exchange, in which the rank did nothing but wait for it
    group: str = ""

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Timeline:
    """Events of one or more ranks, in the order of their starts. Figures are means over the ranks."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.events: tuple[Event, ...] = _ordered(events)

    @property
    def ranks(self) -> list[int]:
        return sorted({e.rank for e in self.events})

    def of(self, rank: int) -> Timeline:
        """The events of one rank."""
        return Timeline(e for e in self.events if e.rank == rank)

    def seconds(self) -> float:
        """From the first start to the last end on any rank."""
        return max(e.end for e in self.events) - min(e.start for e in self.events) if self.events else 0.0

    def busy(self) -> float:
        """Seconds in which a rank computes."""
        return self._mean(e.seconds for e in self.events if e.stream == "compute")

    def exchanging(self) -> float:
        """Seconds in which exchanges are under way."""
        return self._mean(e.seconds for e in self.events if e.stream == "exchange")

    def exposed(self) -> float:
        """Seconds in which a rank only waits for an exchange: what overlap can still hide."""
        return self._mean(e.exposed for e in self.events)

    def steps(self) -> dict[str, float]:
        """Seconds of each step by name, over all calls and chunks."""
        names = dict.fromkeys(e.step for e in self.events)
        return {name: self._mean(e.seconds for e in self.events if e.step == name) for name in names}

    def sent(self) -> int:
        """Bytes that all ranks together sent to others."""
        return sum(e.sent for e in self.events)

    def write(self, path: str | Path) -> None:
        """Write a trace that Perfetto (ui.perfetto.dev) and chrome://tracing show: a process per rank."""
        Path(path).write_text(json.dumps({"traceEvents": self._chrome(), "displayTimeUnit": "ms"}))

    def svg(self, path: str | Path, title: str = "") -> None:
        """Draw the timeline to an SVG file that needs nothing else."""
        from .timeline_svg import draw

        draw(path, {title: self})

    def _mean(self, seconds: Iterable[float]) -> float:
        return sum(seconds) / max(1, len(self.ranks))

    def _chrome(self) -> list[dict[str, Any]]:
        begin = min((e.start for e in self.events), default=0.0)
        found: list[dict[str, Any]] = []
        for rank in self.ranks:
            found.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
            thread = 0
            for stream in STREAMS:
                for row in rows(self.of(rank).events, stream):
                    named = {"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": stream}}
                    found += [named, *(_complete(e, begin, thread) for e in row)]
                    found += [_complete(_wait(e), begin, 0) for e in row if e.exposed > 0]
                    thread += 1
        return found


def rows(events: Sequence[Event], stream: str) -> list[list[Event]]:
    """The events of a stream, in as few rows as keep those apart that overlap; one row at least."""
    found: list[list[Event]] = [[]]
    for event in events:
        if event.stream == stream:
            free = (row for row in found if not row or row[-1].end <= event.start)
            row = next(free, None)
            if row is None:
                found.append(row := [])
            row.append(event)
    return found


def _ordered(events: Iterable[Event]) -> tuple[Event, ...]:
    return tuple(sorted(events, key=lambda e: (e.start, e.rank, e.end)))


def _wait(event: Event) -> Event:
    """The time for which compute waits for an exchange, as an event of its own on the compute stream."""
    return event._replace(step=f"wait for {event.step}", stream="compute", start=event.end - event.exposed, sent=0)


def _complete(event: Event, begin: float, thread: int) -> dict[str, Any]:
    """A "complete event" of the Trace Event Format; times in microseconds."""
    return {
        "ph": "X",
        "name": event.step,
        "cat": event.stream,
        "pid": event.rank,
        "tid": thread,
        "ts": (event.start - begin) * 1e6,
        "dur": event.seconds * 1e6,
        "args": {
            "call": event.call,
            "what": event.what,
            "chunk": event.chunk,
            "bytes": event.sent,
            "exposed_us": event.exposed * 1e6,
            "group": event.group,
        },
    }
