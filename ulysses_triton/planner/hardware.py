"""GPUs and the cluster they stand in: what `cost.MACHINES` knows of them, and what a whole training step asks besides.

A `Cluster` joins the two machines that `cost` has for a GPU, one with the links inside a node and one with the network,
and says what an exchange over some of its ranks takes. Example: 16 ranks on two nodes of 8 send 15 MB each; 7 of 15
parts go over NVLink at 450 GB/s, 8 of 15 over the network at 50 GB/s: 8 MB / 50 GB/s = 160 us and 15 latencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .. import cost
from ..errors import OptionError

# Of the peak, what matrix products of a model reach: a bf16 product of 8192^3 ran at 788 of 989 TFLOP/s on an H200.
MATMUL_SHARE = 0.8
# Adam on a host's CPU: 4e9 parameters a second and node, about what ZeRO-Offload's authors report for theirs.
HOST_ADAM = 4e9
MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU: products in FLOP/s for 2-byte numbers, memory in bytes, other rates in bytes/s."""

    name: str
    matmul: float  # reached by matrix products
    peak: float  # of the datasheet, for MFU
    memory: float
    forward: float  # FLOP/s of attention
    backward: float
    copy: float
    host: float  # to and from the host's memory, each


@dataclass(frozen=True)
class Cluster:
    """So many GPUs in nodes of `node`. Links in bytes/s that a GPU sends, latencies in seconds per message."""

    gpu: Gpu
    gpus: int
    node: int
    inside: float
    between: float
    inside_latency: float
    between_latency: float
    launch: float
    host_memory: float = 2e12  # bytes of a node

    def __post_init__(self) -> None:
        for name in ("gpus", "node"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} = {getattr(self, name)}; a cluster needs at least 1")
        for name in ("inside", "between"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"a link {name} of {getattr(self, name)} bytes/s; it must be a number above 0")

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.node)

    def exchange(self, sent: float, ranks: int, two_hop: bool = False) -> float:
        """Seconds in which each of `ranks` neighbours sends `sent` bytes to the others, in equal parts.

        In two hops all blocks for the ranks of other nodes first travel inside the node.
        """
        if ranks == 1:
            return 0.0
        near = min(ranks, self.node) - 1
        far = ranks - 1 - near
        block = sent / (ranks - 1)
        if not two_hop:
            moving = max(near * block / self.inside, far * block / self.between)
            return moving + near * self.inside_latency + far * self.between_latency
        nodes = math.ceil(ranks / self.node)
        first = near * nodes * block / self.inside + near * self.inside_latency
        return first + far * block / self.between + (nodes - 1) * self.between_latency

    def gather(self, bytes_: float, ranks: int) -> float:
        """Seconds of an all-gather to `bytes_` on every rank, or of a reduce-scatter from there.

        A ring through all nodes on every rail, while as much travels inside; latencies of a tree.
        """
        if ranks == 1:
            return 0.0
        near = min(ranks, self.node)
        nodes = math.ceil(ranks / near)
        inside = bytes_ * (near - 1) / near / self.inside
        between = bytes_ * (nodes - 1) / nodes / (near * self.between)
        steps = (near - 1) * self.inside_latency + math.ceil(math.log2(nodes)) * self.between_latency
        return max(inside, between) + steps


# Dense bf16 peaks, memory as drivers report it (MiB) and the PCIe link to the host, 0.8 of its peak in one direction.
_FIGURES = {
    "a100": ("a100", 312e12, 81920, 25e9),
    "a100-40gb": ("a100", 312e12, 40960, 25e9),
    "h100": ("h100", 989e12, 81559, 50e9),
    "h200": ("h200", 989e12, 143771, 50e9),
    "b200": ("b200", 2250e12, 183359, 50e9),
    "mi300x": ("mi300x", 1307e12, 196592, 50e9),
}
NAMES = (*_FIGURES, "cpu")


def cluster(name: str, gpus: int, node: int = 8, between: float | None = None, inside: float | None = None) -> Cluster:
    """So many GPUs of a name in `NAMES`; `between` and `inside` replace the bytes/s of the links that `cost` knows."""
    if name == "cpu":
        return cpu(gpus)
    if name not in _FIGURES:
        raise OptionError(f"no figures are known of the GPU {name!r}; there are {', '.join(NAMES)}")
    machine, peak, memory, host = _FIGURES[name]
    near, far = cost.MACHINES[machine], cost.MACHINES[f"{machine}-network"]
    gpu = Gpu(name, MATMUL_SHARE * peak, peak, memory * MIB, near.forward, near.backward, near.copy, host)
    return Cluster(
        gpu,
        gpus,
        node,
        near.exchange if inside is None else inside,
        far.exchange if between is None else between,
        near.latency,
        far.latency,
        near.launch,
    )


# fp32 products of the training command's sizes, 2048 x 128 x 256 and such, ran at 82 to 103 GFLOP/s on one core of the
# CPU of `cost.cpu`.
CPU_MATMUL = 95e9


def cpu(ranks: int, cores: int = 2) -> Cluster:
    """Ranks that share the cores of one CPU like that of `cost.cpu`. A core's products are those of 4-byte numbers."""
    machine = cost.cpu(min(1.0, cores / ranks))
    share = min(1.0, cores / ranks)
    products = 2 * CPU_MATMUL * share  # of 2-byte numbers, as everywhere
    gpu = Gpu("cpu", products, products, 8e9, machine.forward, machine.backward, machine.copy * share, machine.copy)
    return Cluster(gpu, ranks, ranks, machine.exchange, machine.exchange, machine.latency, machine.latency, 1e-5)


def with_attention(cluster: Cluster, forward: float, backward: float) -> Cluster:
    """The cluster with attention at other rates (FLOP/s), such as those of another kernel."""
    return replace(cluster, gpu=replace(cluster.gpu, forward=forward, backward=backward))
