"""Seconds of a whole training step, by phase, in closed form.

In a layer's pass a GPU computes, and waits for those exchanges that the schedule does not hide. FSDP gathers the next
layer and scatters the last one's gradients meanwhile; all of it shares the links with the exchanges, so a pass takes
what its computing and waiting take, or what all that travels in it takes, whichever is longer. With checkpoints the
backward pass begins with a forward one. `network` walks through the same events rank by rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import OptionError
from .hardware import HOST_ADAM, Cluster
from .layer import Attention, attention, dense, loss, moves, scores
from .memory import Memory, memory
from .models import Model
from .setup import Setup
from .walk import walk

PHASES = (
    "matrix products",
    "attention",
    "rows packed and unpacked",
    "elementwise",
    "exchange, waited for",
    "FSDP, waited for",
    "computed again",
    "head and loss",
    "checkpoints on their way, waited for",
    "optimiser",
)


@dataclass(frozen=True)
class Pass:
    """A layer, forward or backward: seconds that it computes, by what; that it waits; and that links are in use."""

    computing: dict[str, float]
    exposed: float
    exchanging: float
    moving: float  # of FSDP
    hosted: float  # of checkpoints to or from the host, over a link of their own

    @property
    def alone(self) -> float:
        """Seconds if nothing else used the links."""
        return sum(self.computing.values()) + self.exposed

    @property
    def shared(self) -> float:
        """Seconds with FSDP's collectives on the same links."""
        return max(self.alone, self.exchanging + self.moving)


@dataclass(frozen=True)
class Step:
    """A training step: seconds by phase, and the figures that follow."""

    model: Model
    setup: Setup
    cluster: Cluster
    phases: dict[str, float]
    exchange: float  # seconds of all exchanges of a rank, waited for or not
    memory: Memory

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def exposed(self) -> float:
        return self.phases["exchange, waited for"]

    @property
    def tokens_per_second(self) -> float:
        return self.setup.sequences * self.setup.seq / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOP (of the pairs that a causal mask leaves, nothing counted twice) a second, of the peak of all."""
        done = self.setup.sequences * flops(self.model, self.setup.seq)
        return done / (self.seconds * self.setup.gpus * self.cluster.gpu.peak)

    def tflops(self, whole_mask: bool, recomputed: bool) -> float:
        """TFLOP/s of a GPU as others count them: masked pairs too, or what checkpointing computes again."""
        done = self.setup.sequences * flops(self.model, self.setup.seq, whole_mask, recomputed)
        return done / (self.seconds * self.setup.gpus) / 1e12


def flops(model: Model, seq: int, whole_mask: bool = False, recomputed: bool = False) -> float:
    """Of training on one sequence: forward, and twice as many backward; the layers once more if `recomputed`."""
    setup = Setup(seq, 1, skips_masked=not whole_mask)
    full = model.layers - model.windowed
    attended = model.windowed * scores(model, setup, True) + full * scores(model, setup, False)
    layers = 2.0 * seq * model.layers * model.layer_products + 4.0 * attended * model.q_width
    return (3 + recomputed) * layers + 6.0 * seq * model.head_parameters


def step(model: Model, setup: Setup, cluster: Cluster) -> Step:
    """The step that is predicted."""
    if setup.gpus != cluster.gpus:
        raise OptionError(
            f"{setup.sequence_ranks} x {setup.rows} ranks are {setup.gpus} GPUs, and the cluster has {cluster.gpus}; "
            "make them equal"
        )
    phases = dict.fromkeys(PHASES, 0.0)
    exchange = 0.0
    first = moves(model.layer_parameters + model.head_parameters, setup, cluster).gather
    for number in range(setup.micro_batches):
        last = number == setup.micro_batches - 1
        for windowed, layers in ((False, model.layers - model.windowed), (True, model.windowed)):
            for one in passes(model, setup, cluster, windowed, last):
                for name, seconds in one.computing.items():
                    phases[name] += layers * seconds
                phases["exchange, waited for"] += layers * one.exposed
                phases["FSDP, waited for"] += layers * (one.shared - one.alone)
                phases["checkpoints on their way, waited for"] += layers * max(0.0, one.hosted - one.shared)
                exchange += layers * one.exchanging
        phases["FSDP, waited for"] += first
        phases["head and loss"] += ending(model, setup, cluster, last)
    phases["optimiser"] = optimiser(model, setup, cluster)
    return Step(model, setup, cluster, phases, exchange, memory(model, setup, cluster))


def passes(model: Model, setup: Setup, cluster: Cluster, windowed: bool, last: bool) -> tuple[Pass, Pass]:
    """A layer forward and backward.

    `last`: of the step's micro-batches, when gradients that are whole on every rank are reduced.
    """
    moving = moves(model.layer_parameters, setup, cluster)
    reduce = moving.reduce if setup.zero == 3 or last else 0.0
    calls = [attention(model, setup, cluster, windowed, back) for back in (False, True)]
    parts = [computing(model, setup, cluster, call, back) for call, back in zip(calls, (False, True), strict=True)]
    waits, busy = [exposed(call) for call in calls], [call.exchanging for call in calls]
    away = hosted(model, setup, cluster)
    forward = Pass(parts[0], waits[0], busy[0], moving.gather, away)
    again = setup.checkpoint != "none"  # backward computes forward first
    backward = parts[1] | {"computed again": again * sum(parts[0].values())}
    return forward, Pass(backward, waits[1] + again * waits[0], busy[1] + again * busy[0], moving.gather + reduce, away)


def computing(model: Model, setup: Setup, cluster: Cluster, call: Attention, backward: bool) -> dict[str, float]:
    """Seconds that a rank computes in a layer's pass, by what."""
    besides = dense(model, setup, cluster, backward)
    attending = sum(call.seconds[s.name] for s in call.steps if s.name in ("attend", "attend_backward"))
    return {
        "matrix products": besides.matmul,
        "attention": attending,
        "rows packed and unpacked": call.computing - attending,
        "elementwise": besides.elementwise,
    }


def exposed(call: Attention) -> float:
    """Seconds in which a rank would only wait for the call's exchanges."""
    end, busy = walk(call.steps, call.seconds, np.zeros(1), np.ones(1), 1)
    return float(end[0] - busy[0])


def ending(model: Model, setup: Setup, cluster: Cluster, last: bool) -> float:
    """Seconds of the head and the loss; the head is gathered and its gradient reduced meanwhile."""
    moving = moves(model.head_parameters, setup, cluster)
    reduce = moving.reduce if setup.zero == 3 or last else 0.0
    return max(loss(model, setup, cluster).both, moving.gather + reduce)


def hosted(model: Model, setup: Setup, cluster: Cluster) -> float:
    """Seconds in which the input of a layer goes to the host, or comes back."""
    return setup.tokens * model.hidden * setup.item / cluster.gpu.host if setup.checkpoint == "offload" else 0.0


def optimiser(model: Model, setup: Setup, cluster: Cluster) -> float:
    """Seconds of the update, and of what follows it: gathering weights that ZeRO-1 or 2 updated in parts."""
    own = model.parameters / setup.divided(1)
    gather = cluster.gather(model.parameters * setup.item, setup.gpus) if setup.zero in (1, 2) else 0.0
    if setup.offload_optimizer:
        updating = own * min(cluster.node, setup.gpus) / HOST_ADAM
        return own * (setup.grad + setup.item) / cluster.gpu.host + updating + gather
    return own * (setup.grad + 2 * setup.states + setup.item) / cluster.gpu.copy + gather
