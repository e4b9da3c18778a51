"""A plan as a page to read and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .network import Simulation
from .plan import Plan, bottleneck_bandwidth, bottleneck_ranks, slowest_link
from .setup import Setup
from .step import Step

PREDICTION = "a prediction from datasheets and reported rates: no GPU was measured for it"
GIB = 2**30
_LINKS = {"inside": "inside a node", "between": "of the network"}


def page(plan: Plan, simulation: Simulation | None) -> str:
    """The plan in words and tables."""
    s = plan.best
    model, cluster, setup = s.model, s.cluster, s.setup
    limit, where = plan.longest_of_all
    parts = [
        f"Plan for {model.name} ({model.parameters / 1e9:.2f}e9 parameters) on {cluster.gpus} {cluster.gpu.name}, "
        f"{cluster.node} a node, sequences of {setup.seq} tokens:",
        f"{PREDICTION}.",
        "",
        f"recommended   {_words(setup)}",
        f"step          {s.seconds:.3f} s for {setup.sequences} sequences, {s.tokens_per_second:,.0f} tokens/s",
        f"MFU           {s.mfu:.1%} of {cluster.gpu.peak / 1e12:,.3g} TFLOP/s a GPU (FLOP of the model: the pairs that "
        "the causal mask leaves, nothing counted twice)",
        f"exchange      {s.exchange:.3f} s in a step, {s.exposed:.3f} s of it waited for: {s.exposed / s.seconds:.1%}",
        f"longest       {plan.longest:,} tokens fit with this setup; {limit:,} at most, with {_words(where)}",
        *_bottlenecks(s),
        *_simulated(s, simulation),
        "",
        _table("seconds of a step, by phase", s.phases, "{:10.3f}", s.seconds),
        "",
        _table(
            f"GiB on a GPU at the fullest moment ({_MOMENTS[s.memory.moment]}), of {cluster.gpu.memory / GIB:.1f}",
            {name: value / GIB for name, value in s.memory.terms.items()}, "{:10.3f}", s.memory.peak / GIB,
        ),
    ]  # fmt: skip
    if s.memory.host:
        on_host = {name: value / GIB for name, value in s.memory.host.items()}
        parts += ["", _table("GiB in the memory of a node's host", on_host, "{:10.1f}", s.memory.on_host / GIB)]
    return "\n".join([*parts, "", _others(plan)])


_MOMENTS = {"loss": "the loss", "backward": "backward of a layer"}


def _words(setup: Setup) -> str:
    kept = {"none": "no checkpoints", "full": "checkpoints", "offload": "checkpoints on the host"}[setup.checkpoint]
    options = {
        "optimiser on the host": setup.offload_optimizer,
        "tiled MLP": setup.tiled_mlp,
        "tiled loss": setup.tiled_logits,
        'recompute="exchange"': setup.recompute_exchange,
    }
    said = [
        f"sequence x data ranks {setup.sequence_ranks} x {setup.rows}",
        f"exchange {setup.exchange}",
        f"{setup.chunks} chunk{'s' * (setup.chunks > 1)}",
        f"ZeRO-{setup.zero}",
        kept,
        *(name for name, on in options.items() if on),
    ]
    return ", ".join(said)


def _bottlenecks(s: Step) -> list[str]:
    """Where the exchanges would take longer than attention, so that nothing could hide them."""
    at = bottleneck_ranks(s.model, s.cluster, s.setup)
    each = bottleneck_ranks(s.model, s.cluster, s.setup, s.setup.tokens)
    found = [
        "bottleneck    exchanges take longer than attention, whatever overlaps, "
        + (f"from {at} ranks a sequence" if at else "on no number of ranks")
        + f"; with {s.setup.tokens} tokens on each rank {f'from {each}' if each else 'on none'}"
    ]
    speed = bottleneck_bandwidth(s.model, s.cluster, s.setup)
    if speed:
        link = slowest_link(s.cluster, s.setup)
        now = getattr(s.cluster, link)
        below = f"below {speed / 1e9:.2f} GB/s a GPU" if math.isfinite(speed) else "at any speed: it is the latencies"
        found.append(f"              on these ranks {below}, where the link {_LINKS[link]} has {now / 1e9:.0f}")
    return found


def _simulated(s: Step, simulation: Simulation | None) -> list[str]:
    if simulation is None:
        return []
    slower = round(simulation.seconds / s.seconds - 1, 3) + 0.0  # never -0.0
    return [
        f"simulated     {simulation.seconds:.3f} s rank by rank over the fat tree with its stragglers ({slower:+.1%}); "
        f"a rank waits {simulation.waiting:.3f} s of it"
    ]


def _table(title: str, values: Mapping[str, float], form: str, total: float) -> str:
    rows = [f"{name:46}{form.format(value)}{value / total:8.1%}" for name, value in values.items() if value]
    return "\n".join([title, *rows, f"{'in all':46}{form.format(total)}"])


def _others(plan: Plan) -> str:
    lines = [
        "the best of each sequence degree that fits",
        f"{'ranks':>6}{'rows':>6}  {'exchange':9}{'chunks':>6}  {'checkpoint':11}{'s':>10}{'tokens/s':>14}{'MFU':>8}"
        f"{'waits':>8}{'GiB':>8}",
    ]
    for s in sorted((plan.best, *plan.others), key=lambda s: s.setup.sequence_ranks):
        u = s.setup
        lines.append(
            f"{u.sequence_ranks:6}{u.rows:6}  {u.exchange:9}{u.chunks:6}  {u.checkpoint:11}{s.seconds:10.3f}"
            f"{s.tokens_per_second:14,.0f}{s.mfu:8.1%}{s.exposed / s.seconds:8.1%}{s.memory.peak / GIB:8.1f}"
            + ("  <" if s is plan.best else "")
        )
    return "\n".join(lines)


def as_json(plan: Plan, simulation: Simulation | None) -> dict[str, Any]:
    """All of it as one object: `setup`, `model` and `cluster` are the arguments of their classes."""
    s = plan.best
    speed = bottleneck_bandwidth(s.model, s.cluster, s.setup)
    return {
        "note": PREDICTION,
        "model": asdict(s.model) | {"parameters": s.model.parameters},
        "cluster": asdict(s.cluster),
        **_numbers(s),
        "longest": plan.longest,
        "longest_of_all": {"tokens": plan.longest_of_all[0], "setup": asdict(plan.longest_of_all[1])},
        "bottleneck": {
            "ranks": bottleneck_ranks(s.model, s.cluster, s.setup),
            "ranks_at_equal_tokens": bottleneck_ranks(s.model, s.cluster, s.setup, s.setup.tokens),
            "bandwidth": speed if math.isfinite(speed) else None,
        },
        "simulation": None if simulation is None else asdict(simulation),
        "others": [_numbers(other) for other in plan.others],
    }


def _numbers(s: Step) -> dict[str, Any]:
    """A step's setup and what is predicted for it: seconds and bytes."""
    return {
        "setup": asdict(s.setup),
        "seconds": s.seconds,
        "phases": s.phases,
        "exchange": s.exchange,
        "exposed": s.exposed,
        "tokens_per_second": s.tokens_per_second,
        "mfu": s.mfu,
        "memory": {"moment": s.memory.moment, "peak": s.memory.peak, "terms": s.memory.terms, "host": s.memory.host},
    }
