"""Timelines as a picture: a self-contained SVG with a lane for each rank and stream."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from .timeline import STREAMS, Event, Timeline, rows

KINDS = {
    "project": "#b07aa1",
    "pack": "#4e79a7",
    "attend": "#59a14f",
    "unpack": "#9c755f",
    "exchange": "#f28e2b",
}  # a step's name begins so
EXPOSED = "#e15759"
_LEFT, _WIDTH, _ROW, _GAP = 130, 900, 16, 5  # pixels: labels, the time axis, a row of bars, between ranks
_TICKS = 6


def draw(path: str | Path, timelines: Mapping[str, Timeline]) -> None:
    """Draw timelines by name to an SVG file, one below the other on one scale of time."""
    Path(path).write_text(picture(timelines))


def picture(timelines: Mapping[str, Timeline]) -> str:
    """The SVG of timelines by name."""
    seconds = max((t.seconds() for t in timelines.values()), default=0.0) or 1.0
    parts, y = _legend(), 40.0
    for name, timeline in timelines.items():
        panel, y = _panel(name, timeline, seconds, y)
        parts += panel
    size = f'width="{_LEFT + _WIDTH + 30}" height="{y:g}" viewBox="0 0 {_LEFT + _WIDTH + 30} {y:g}"'
    style = 'font-family="sans-serif" font-size="11" fill="#333"'
    white = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', white, *parts, "</svg>"]) + "\n"


def _legend() -> list[str]:
    found, x = [], _LEFT
    for name, colour in {**KINDS, "waiting for an exchange": EXPOSED}.items():
        found += [_box(x, 10, 12, 12, colour, ""), _text(x + 17, 20, name)]
        x += 40 + 6 * len(name)
    return found


def _panel(name: str, timeline: Timeline, seconds: float, y: float) -> tuple[list[str], float]:
    """One timeline from `y` downwards, and where it ends."""
    figures = (
        f"{_time(timeline.seconds())}: busy {_time(timeline.busy())}, exchanging {_time(timeline.exchanging())}, "
        f"of which exposed {_time(timeline.exposed())}"
    )
    found = [_text(5, y + 12, " - ".join(part for part in (name, figures) if part), bold=True)]
    y += 22
    top, begin = y, min((e.start for e in timeline.events), default=0.0)

    def x(at: float) -> float:
        return _LEFT + (at - begin) / seconds * _WIDTH

    for rank in timeline.ranks:
        events = timeline.of(rank).events
        for stream in STREAMS:
            lane = rows(events, stream)
            bars = []
            for number, row in enumerate(lane):
                for event in row:
                    at = y + number * _ROW
                    bars.append(_box(x(event.start), at, event.seconds / seconds * _WIDTH, _ROW - 2, _colour(event),
                                     _says(event)))  # fmt: skip
                    if event.exposed > 0:
                        width = event.exposed / seconds * _WIDTH
                        bars.append(_box(x(event.end - event.exposed), at + _ROW - 6, width, 4, EXPOSED, ""))
            label = _text(5, y + _ROW - 4, f"rank {rank} {stream}")
            found += [f'<g class="lane" data-rank="{rank}" data-stream="{stream}">', label, *bars, "</g>"]
            y += len(lane) * _ROW
        y += _GAP
    step = tick(seconds)
    for i in range(int(seconds / step) + 1):
        at = _LEFT + i * step / seconds * _WIDTH
        line = f'<line x1="{at:.2f}" y1="{top}" x2="{at:.2f}" y2="{y}" stroke="#ccc" stroke-width="0.5"/>'
        found += [line, _text(at, y + 12, _time(i * step), middle=True)]
    return found, y + 30


def tick(seconds: float) -> float:
    """The distance of marks on an axis: 1, 2 or 5 times a power of ten, for some six marks."""
    power = 10.0 ** math.floor(math.log10(seconds / _TICKS))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= seconds / _TICKS * 0.999)


def _colour(event: Event) -> str:
    return next(colour for kind, colour in KINDS.items() if event.step.startswith(kind))


def _says(event: Event) -> str:
    lines = [f"{event.step}, chunk {event.chunk}, call {event.call} ({event.what})", _time(event.seconds)]
    if event.stream == "exchange":
        lines.append(f"{event.sent:,} bytes to other ranks, {_time(event.exposed)} exposed")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us"


def _box(x: float, y: float, width: float, height: float, colour: str, says: str) -> str:
    title = f"<title>{escape(says)}</title>" if says else ""
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.3):.2f}" height="{height}" fill="{colour}">{title}</rect>'
    )


def _text(x: float, y: float, text: str, *, bold: bool = False, middle: bool = False) -> str:
    extra = ' font-weight="bold"' * bold + ' text-anchor="middle"' * middle
    return f'<text x="{x:.2f}" y="{y:.2f}"{extra}>{escape(text)}</text>'
