"""A training step rank by rank over a fat tree: who waits for whom, with slow ranks and links that ranks share.

Nodes of some GPUs hang at leaf switches, leaves at the spine of a pod, pods at a core. What leaves a leaf or a pod goes
through up-links that are `oversubscription` times slower than all the links below them. Every row of ranks exchanges
at the same time, so a link carries the bytes of all ranks behind it; FSDP's rings cross an up-link once and are not
slowed. A rank's kernels take `slow` times as long if it is one of the stragglers, and vary from layer to layer by
`jitter`.

Example: 8 GPUs a node at 50 GB/s, 4 nodes a leaf, oversubscribed 2 : 1. Rows of 64 ranks lie on two leaves, so half of
what a rank sends goes through the up-links; at 2 : 1 it takes as long as all of it would take through its own link.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError
from .hardware import Cluster
from .layer import Attention, attention, moves
from .models import Model
from .setup import Setup
from .step import computing, ending, hosted, optimiser
from .walk import Seconds, latest, walk


@dataclass(frozen=True)
class FatTree:
    """Nodes at a leaf switch, leaves in a pod (0: all of them), and how much narrower the up-links of both are."""

    leaf: int = 16
    pod: int = 0
    oversubscription: float = 1.0
    core_oversubscription: float = 1.0

    def __post_init__(self) -> None:
        if self.leaf < 1 or self.pod < 0:
            raise OptionError(
                f"a fat tree of {self.leaf} nodes a leaf and {self.pod} leaves a pod; use 1 or more, and 0 or more"
            )
        if not (self.oversubscription >= 1 and self.core_oversubscription >= 1):
            raise OptionError(
                f"oversubscription = {self.oversubscription} and {self.core_oversubscription}; up-links are at most as "
                "wide as the links below: use 1 or more"
            )


@dataclass(frozen=True)
class Stragglers:
    """How ranks differ: relative spread of a layer's time, what share of ranks is slow, and by what factor."""

    jitter: float = 0.0
    share: float = 0.0
    slow: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.jitter >= 0 and 0 <= self.share <= 1 and self.slow >= 1 and self.seed >= 0):
            raise OptionError(
                f"stragglers with jitter {self.jitter}, share {self.share}, slow {self.slow}, seed {self.seed}; jitter "
                "and seed are at least 0, the share is from 0 to 1 and slow at least 1"
            )


@dataclass(frozen=True)
class Simulation:
    """Seconds of a step: until the last rank is done, and means over ranks of what they computed and waited."""

    seconds: float
    computing: float
    waiting: float
    steps: int  # of the schedule that were walked through, on every rank


def simulate(
    model: Model, setup: Setup, cluster: Cluster, tree: FatTree | None = None, stragglers: Stragglers | None = None
) -> Simulation:
    """One step of the setup, event by event."""
    return _Run(model, setup, cluster, tree or FatTree(), stragglers or Stragglers()).whole()


class _Run:
    """The clocks of all ranks. Gathers and reductions of ZeRO involve all of them, exchanges those of a row."""

    def __init__(self, model: Model, setup: Setup, cluster: Cluster, tree: FatTree, stragglers: Stragglers) -> None:
        self.model, self.setup, self.cluster, self.stragglers = model, setup, cluster, stragglers
        self.routes = Routes(setup, cluster, tree)
        self.random = np.random.default_rng(stragglers.seed)
        ranks = setup.gpus
        slow = self.random.permutation(ranks) < round(stragglers.share * ranks)
        self.slow = np.where(slow, stragglers.slow, 1.0)
        self.now, self.busy = np.zeros(ranks), np.zeros(ranks)
        self.steps = 0

    def whole(self) -> Simulation:
        model, setup, cluster = self.model, self.setup, self.cluster
        kinds = [False] * (model.layers - model.windowed) + [True] * model.windowed
        for number in range(setup.micro_batches):
            last = number == setup.micro_batches - 1
            first = moves(model.layer_parameters + model.head_parameters, setup, cluster).gather
            self._together(first)
            for windowed in kinds:
                self._layer(windowed, False, last)
            self._compute(ending(model, setup, cluster, last))
            for windowed in reversed(kinds):
                self._layer(windowed, True, last)
        self._together(0.0)
        self._compute(optimiser(model, setup, cluster))
        end = float(self.now.max())
        computing = float(self.busy.mean())
        return Simulation(end, computing, end - computing, self.steps)

    def _layer(self, windowed: bool, back: bool, last: bool) -> None:
        """One pass of a layer, while the links carry the next layer's weights and the last one's gradients."""
        begin, setup = self.now, self.setup
        travelling = np.zeros_like(begin)
        again = back and setup.checkpoint != "none"
        for backward in [False, True][back - again : back + 1]:
            call = attention(self.model, setup, self.cluster, windowed, backward)
            seconds = self.routes.seconds(call)
            slower = self._slower()
            parts = computing(self.model, setup, self.cluster, call, backward)
            self._compute(sum(parts.values()) - call.computing, slower)
            self.now, busy = walk(call.steps, seconds, self.now, slower, setup.sequence_ranks)
            self.busy = self.busy + busy
            self.steps += len(call.steps)
            travelling = travelling + sum(seconds[s.name] for s in call.steps if s.stream == "exchange")
        moving = moves(self.model.layer_parameters, setup, self.cluster)
        reduce = moving.reduce if back and (setup.zero == 3 or last) else 0.0
        shared = moving.gather + reduce
        arrived = begin + travelling
        if shared:  # of all ranks: begins when the last one has come
            arrived = np.full_like(begin, float(arrived.max()) + shared)
        on_host = begin + hosted(self.model, setup, self.cluster)
        self.now = np.maximum(np.maximum(self.now, arrived), on_host)

    def _compute(self, seconds: float, slower: Seconds | float = 1.0) -> None:
        took = seconds * (self.slow if isinstance(slower, float) else slower)
        self.now, self.busy = self.now + took, self.busy + took

    def _together(self, seconds: float) -> None:
        """What all ranks begin and end together."""
        self.now = np.full_like(self.now, self.now.max() + seconds)

    def _slower(self) -> Seconds:
        """What this layer's kernels are multiplied by on every rank; the jitter's mean is 1."""
        spread = self.stragglers.jitter
        if not spread:
            return self.slow
        varying: Seconds = self.random.lognormal(-(spread**2) / 2, spread, self.setup.gpus)
        return self.slow * varying


class Routes:
    """How many of its row's ranks each rank finds in its node, leaf and pod, and what exchanges therefore take."""

    def __init__(self, setup: Setup, cluster: Cluster, tree: FatTree) -> None:
        self.setup, self.cluster, self.tree = setup, cluster, tree
        ranks = np.arange(setup.gpus)
        row, node = ranks // setup.sequence_ranks, ranks // cluster.node
        self.leaf = node // tree.leaf
        self.pod = self.leaf // tree.pod if tree.pod else np.zeros_like(self.leaf)
        self.near, self.at_leaf, self.in_pod = (_shared(row, place) for place in (node, self.leaf, self.pod))

    def seconds(self, call: Attention) -> dict[str, float | Seconds]:
        """Of all steps of a call; of an exchange, for every rank the slowest of its row."""
        found: dict[str, float | Seconds] = dict(call.seconds)
        for name, sent in call.sent.items():
            found[name] = self.exchange(0.0 if self.setup.one_sided else sent)
        return found

    def exchange(self, sent: float) -> Seconds:
        """Every rank sends so many bytes to the others of its row, in equal parts, and all rows do at the same time."""
        c, tree, peers = self.cluster, self.tree, self.setup.sequence_ranks - 1
        if not peers:
            return np.zeros_like(self.near)
        block = sent / peers
        far = self.setup.sequence_ranks - self.near
        two_hop = self.setup.exchange == "two_hop"
        nodes = -(-self.setup.sequence_ranks // c.node)
        inside = (self.near - 1) * block / c.inside * (nodes if two_hop else 1)
        hops = (nodes - 1 if two_hop else far) * c.between_latency
        wire = far * block / c.between
        for place, here, narrow in (
            (self.leaf, self.at_leaf, tree.oversubscription),
            (self.pod, self.in_pod, tree.core_oversubscription * tree.oversubscription),
        ):
            leaving = (self.setup.sequence_ranks - here) * block  # bytes of each rank
            width = np.bincount(place) * c.between / narrow
            wire = np.maximum(wire, (np.bincount(place, leaving) / width)[place])
        near = (self.near - 1) * c.inside_latency
        took = inside + near + wire + hops if two_hop else np.maximum(inside, wire) + near + hops
        return latest(took, self.setup.sequence_ranks)


def _shared(row: NDArray[np.int64], place: NDArray[np.int64]) -> Seconds:
    """For each rank, how many of its row are at its place, itself too."""
    _, which, count = np.unique(np.stack([row, place]), axis=1, return_inverse=True, return_counts=True)
    found: Seconds = count[which.reshape(-1)].astype(np.float64)
    return found
