"""Pictures of losses."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import OptionError
from .run_directory import StepMetrics

SMOOTHING = 20  # steps
REFERENCES = {  # what the figures of a summary are called in a picture
    "byte_entropy": "entropy of a byte",
    "token_entropy": "entropy of a token",
    "bigram_entropy": "given the byte before",
    "held_out_loss": "held out, at the end",
}


def require_matplotlib() -> None:
    """Raise OptionError if the plot could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("loss.png needs matplotlib: pip install 'ulysses-triton[train]'")


def plot_loss(
    curves: Mapping[str, Sequence[StepMetrics]], picture: Path, references: Mapping[str, float], unit: str
) -> None:
    """Draw the losses of runs, by name, and their running means to the PNG file `picture`.

    `references` are horizontal lines: a name and nats per `unit` ("byte", "token"), as losses are. Raises OptionError
    without matplotlib.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (name, metrics), color, style in zip(curves.items(), ("tab:blue", "tab:orange"), ("-", "--"), strict=False):
        steps, losses = [row.step for row in metrics], [row.loss for row in metrics]
        axes.plot(steps, losses, color=color, alpha=0.3, linewidth=1, label=f"{name}, each step")
        axes.plot(steps, _running_mean(losses), color=color, linestyle=style, label=f"mean of the last {SMOOTHING}")
    for (name, value), style in zip(references.items(), ("--", ":", "-.", "-"), strict=False):
        axes.axhline(value, color="0.4", linestyle=style, linewidth=1, label=f"{name}: {value:.2f}")
    axes.set(xlabel="step", ylabel=f"loss, nats per {unit}")
    axes.legend()
    partial = picture.with_name(f".{picture.name}.partial")
    FigureCanvasAgg(figure).print_png(partial, metadata={"Software": "ulysses-triton"})
    partial.replace(picture)


def _running_mean(values: list[float]) -> list[float]:
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - SMOOTHING) : end]
        means.append(sum(part) / len(part))
    return means
