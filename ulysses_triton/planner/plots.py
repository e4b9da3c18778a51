"""Pictures of a plan, as SVG files: time by ranks, waiting by link speed, limits by GPUs, and thousands of GPUs."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptionError
from .network import FatTree, Stragglers, simulate
from .plan import Plan, bottleneck_bandwidth, longest_sequence, slowest_link, with_link
from .setup import CHECKPOINTS
from .step import Step, step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "predicted, not measured"


def require_matplotlib() -> None:
    """Raise OptionError if nothing could be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--plots needs matplotlib: pip install 'ulysses-triton[plot]'")


def draw(plan: Plan, tree: FatTree, stragglers: Stragglers, folder: Path) -> list[Path]:
    """Draw all pictures into a folder, which is made if it is missing; returns their paths."""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    pictures: dict[str, Callable[[Axes], None]] = {
        "step-by-ranks": lambda axes: _by_ranks(axes, plan),
        "waiting-by-link": lambda axes: _by_link(axes, plan.best),
        "longest-by-gpus": lambda axes: _longest(axes, plan.best),
        "thousands-of-gpus": lambda axes: _scale(axes, plan.best, tree, stragglers),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, fill in pictures.items():
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        axes = figure.add_subplot()
        fill(axes)
        figure.legend(loc="outside right upper", fontsize=8)
        paths.append(folder / f"{name}.svg")
        with rc_context({"svg.hashsalt": name}):  # the same file for the same plan
            FigureCanvasSVG(figure).print_svg(paths[-1], metadata={"Date": None, "Creator": "ulysses-triton"})
    return paths


def _by_ranks(axes: Axes, plan: Plan) -> None:
    """The time of a step by phase, for a token, as numbers of sequences differ."""
    steps = sorted((plan.best, *plan.others), key=lambda s: s.setup.sequence_ranks)
    labels = [f"{s.setup.sequence_ranks}{'*' * (s is plan.best)}" for s in steps]
    bottom = [0.0] * len(steps)
    for name in steps[0].phases:
        heights = [1e6 * s.phases[name] / (s.setup.sequences * s.setup.seq) for s in steps]
        if any(heights):
            axes.bar(labels, heights, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    model, gpus = plan.best.model.name, f"{plan.best.cluster.gpus} {plan.best.cluster.gpu.name}"
    axes.set(xlabel="ranks that share a sequence (*: recommended)", ylabel="microseconds a token of the step")
    axes.set_title(f"{model}, {plan.best.setup.seq} tokens, {gpus}: {TITLE}", fontsize=10)


def _by_link(axes: Axes, best: Step) -> None:
    """How much of a step is waited for, over the speed of the link that exchanges wait on."""
    link = slowest_link(best.cluster, best.setup)
    speeds = [1e9 * 2 ** (n / 2) for n in range(21)]  # 1 to 1024 GB/s
    for chunks in sorted({1, best.setup.chunks}):
        shares = []
        for speed in speeds:
            other = with_link(best.cluster, link, speed)
            found = step(best.model, replace(best.setup, chunks=chunks), other)
            shares.append(100 * found.exposed / found.seconds)
        axes.plot([speed / 1e9 for speed in speeds], shares, label=f"{chunks} chunk{'s' * (chunks > 1)}")
    crossing = bottleneck_bandwidth(best.model, best.cluster, best.setup)
    if speeds[0] < crossing < speeds[-1]:
        axes.axvline(crossing / 1e9, color="0.4", linestyle=":", label="exchanges take as long as attention")
    axes.axvline(getattr(best.cluster, link) / 1e9, color="0.4", linestyle="--", label="this cluster")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="GB/s of a GPU", ylabel="exchange waited for, % of the step")
    axes.set_title(f"{best.setup.sequence_ranks} ranks a sequence, {best.setup.exchange}: {TITLE}", fontsize=10)


def _longest(axes: Axes, best: Step) -> None:
    """The most tokens of a sequence over all GPUs."""
    counts = [2**n for n in range(11)]
    for kind in CHECKPOINTS:
        limits = [longest_sequence(best.model, replace(best.cluster, gpus=n), best.setup, [kind])[0] for n in counts]
        fitting = [(n, limit) for n, limit in zip(counts, limits, strict=True) if limit]
        axes.plot([n for n, _ in fitting], [limit for _, limit in fitting], marker=".", label=f"checkpoints: {kind}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    axes.set(xlabel=f"GPUs ({best.cluster.gpu.name})", ylabel="tokens of a sequence that fit")
    axes.set_title(f"{best.model.name}: {TITLE}", fontsize=10)


def _scale(axes: Axes, best: Step, tree: FatTree, stragglers: Stragglers) -> None:
    """What a GPU gets done, from 8 to 4096 of them: of the plan's degree, or of as many as there are, in more rows."""
    curves: dict[str, tuple[FatTree, Stragglers]] = {
        "all ranks alike, full bandwidth": (FatTree(tree.leaf, tree.pod), Stragglers()),
        f"up-links {tree.oversubscription:g} : 1": (tree, Stragglers()),
        f"and stragglers: jitter {stragglers.jitter:g}, {stragglers.share:.1%} slower by {stragglers.slow:g}":
            (tree, stragglers),
    }  # fmt: skip
    counts = [2**k for k in range(3, 13)]
    for name, (shape, who) in curves.items():
        speeds = []
        for n in counts:
            ranks = math.gcd(n, best.setup.sequence_ranks)
            setup = replace(best.setup, sequence_ranks=ranks, rows=n // ranks, batch=None)
            seconds = simulate(best.model, setup, replace(best.cluster, gpus=n), shape, who).seconds
            speeds.append(setup.sequences * setup.seq / seconds / n)
        axes.plot(counts, speeds, marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="GPUs", ylabel="tokens/s a GPU")
    axes.set_title(
        f"{best.model.name}, {best.setup.sequence_ranks} ranks a sequence of {best.setup.seq}: simulated, {TITLE}",
        fontsize=10,
    )
