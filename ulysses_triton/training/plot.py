"""`loss.png` from `metrics.csv`."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from ..errors import OptionError

SMOOTHING = 20  # steps


def require_matplotlib() -> None:
    """Raise OptionError if the plot could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("loss.png needs matplotlib: pip install 'ulysses-triton[train]'")


def plot_loss(metrics: Path, picture: Path, references: Mapping[str, float]) -> None:
    """Draw the loss of every step in the file `metrics` and its running mean to the PNG file `picture`.

    `references` are horizontal lines: a name and nats per byte. Raises OptionError without matplotlib.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = read_losses(metrics)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    axes.plot(steps, _running_mean(losses), color="tab:blue", label=f"mean of the last {SMOOTHING}")
    for (name, value), style in zip(references.items(), ("--", ":", "-.", "-"), strict=False):
        axes.axhline(value, color="0.4", linestyle=style, linewidth=1, label=f"{name}: {value:.2f}")
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.legend()
    partial = picture.with_name(f".{picture.name}.partial")
    FigureCanvasAgg(figure).print_png(partial, metadata={"Software": "ulysses-triton"})
    partial.replace(picture)


def read_losses(metrics: Path) -> tuple[list[int], list[float]]:
    """The columns `step` and `loss` of a `metrics.csv`."""
    with metrics.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]


def _running_mean(values: list[float]) -> list[float]:
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - SMOOTHING) : end]
        means.append(sum(part) / len(part))
    return means
