"""Pictures of results, as SVG files whose text stays text; `_sections` says what goes into them.

A picture carries a short hash of what it was drawn from, so that a test can tell whether it is of today's records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#9c755f", "#edc948")


@dataclass(frozen=True)
class Curve:
    """Points by `x`; `low` and `high`, where given, bound what each may be."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False
    marked: bool = True  # every point, as there are few; else lines alone


@dataclass(frozen=True)
class Picture:
    """Panels beside each other, in the SVG file `name`.svg."""

    name: str
    about: str
    panels: Sequence[Panel]

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def draw(picture: Picture, folder: Path) -> Path:
    """Write the picture's file."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": picture.name, "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.2 * len(picture.panels), 3.6), layout="constrained", facecolor="white")
        for axes, panel in zip(figure.subplots(1, len(picture.panels), squeeze=False)[0], picture.panels, strict=True):
            _fill(axes, panel)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{picture.name}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": "bench.report", "Description": picture.hash})
    text = path.read_text()
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")  # as git wants it
    return path


def _fill(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for number, curve in enumerate(panel.curves):
        color = COLORS[number % len(COLORS)]
        marker = "os^DvP*X"[number % 8] if panel.marked else ""
        axes.plot(curve.x, curve.y, color=color, marker=marker, markersize=5, linewidth=1.4, label=curve.name)
        if curve.low:
            axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
    if panel.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({x for curve in panel.curves for x in curve.x})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if panel.log_y:
        axes.set_yscale("log")
        if max(y for curve in panel.curves for y in curve.y) >= 1:  # 20 and not 2 x 10^1
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.title.set_fontsize(10)
    axes.grid(color="0.9")
    axes.legend(fontsize=8)
