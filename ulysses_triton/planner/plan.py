"""The way to train that is predicted to be fastest, and where the limits lie.

A plan is found by trying: every sequence degree that divides the GPUs, chunks, exchanges and ways to checkpoint, each
with its memory and its time. What does not fit is left out, and of those that are about as fast as the fastest the one
is taken that leaves most memory free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import OptionError
from .hardware import Cluster
from .layer import attention
from .memory import longest, memory
from .models import Model
from .setup import CHECKPOINTS, Setup
from .step import Step, step

CHUNKS = (1, 2, 4, 8)
ALIKE = 0.98  # of the speed: predictions are not good for less
MOST_RANKS = 4096  # that `bottleneck_ranks` looks at


@dataclass(frozen=True)
class Plan:
    """What is recommended, the best of every other sequence degree, and the most tokens a sequence may have."""

    best: Step
    others: tuple[Step, ...]
    longest: int  # of the recommended setup
    longest_of_all: tuple[int, Setup]  # of any


def plan(model: Model, cluster: Cluster, given: Setup, checkpoints: Sequence[str] = CHECKPOINTS) -> Plan:
    """The fastest setup that fits: `given` says all but degrees, chunks, exchange and which of `checkpoints` to use."""
    found = [s for s in _candidates(model, cluster, given, checkpoints) if memory(model, s, cluster).fits(cluster)]
    limit, where = longest_sequence(model, cluster, given, checkpoints)
    if not found:
        least = min(_candidates(model, cluster, given, checkpoints), key=lambda s: memory(model, s, cluster).peak)
        need = memory(model, least, cluster)
        raise OptionError(
            f"{model.name} with sequences of {given.seq} tokens does not fit on {cluster.gpus} {cluster.gpu.name}: at "
            f"least {need.peak / 2**30:.1f} of {cluster.gpu.memory / 2**30:.1f} GiB a GPU and "
            f"{need.on_host / 2**30:.0f} of {cluster.host_memory / 2**30:.0f} GiB a host; the longest that fits is "
            f"{limit} tokens. Use more GPUs, offload the optimiser or tile the MLP"
        )
    steps = [step(model, s, cluster) for s in found]
    best = _leanest(steps)
    degrees = sorted({s.setup.sequence_ranks for s in steps} - {best.setup.sequence_ranks})
    others = tuple(_leanest([s for s in steps if s.setup.sequence_ranks == degree]) for degree in degrees)
    return Plan(best, others, longest(model, best.setup, cluster), (limit, where))


def _leanest(steps: Sequence[Step]) -> Step:
    """Of those that are about as fast as the fastest, the one that leaves most memory free."""
    fastest = max(s.tokens_per_second for s in steps)
    return min((s for s in steps if s.tokens_per_second >= ALIKE * fastest), key=lambda s: s.memory.peak)


def longest_sequence(
    model: Model, cluster: Cluster, given: Setup, checkpoints: Sequence[str] = CHECKPOINTS
) -> tuple[int, Setup]:  # fmt: skip
    """The most tokens that fit on all GPUs, whatever time they take, and the setup; 0 if the model alone does not."""
    every = replace(given, seq=cluster.gpus, sequence_ranks=cluster.gpus, rows=1, batch=None)
    exchange = "symm" if cluster.gpus <= cluster.node else "nccl"
    tried = [
        replace(every, checkpoint=kind, chunks=chunks, exchange=exchange, recompute_exchange=again)
        for kind in checkpoints
        for chunks in _chunks(model, cluster.gpus)
        for again in (False, True)
    ]
    limits = [longest(model, setup, cluster) for setup in tried]
    best = max(range(len(tried)), key=limits.__getitem__)
    return limits[best], replace(tried[best], seq=max(limits[best], cluster.gpus))


def bottleneck_ranks(model: Model, cluster: Cluster, setup: Setup, tokens_each: int | None = None) -> int | None:
    """The fewest ranks, of powers of two, whose exchanges take longer than their attention; None up to MOST_RANKS.

    From there on no number of chunks can hide them. The sequence is the setup's, or `tokens_each` for every rank.
    """
    ranks = 2
    while ranks <= min(MOST_RANKS, setup.seq if tokens_each is None else MOST_RANKS):
        seq = setup.seq if tokens_each is None else tokens_each * ranks
        now = replace(setup, seq=seq, sequence_ranks=ranks, rows=1, batch=None)
        exchanging, computing = _balance(model, now, replace(cluster, gpus=ranks))
        if exchanging > computing:
            return ranks
        ranks *= 2
    return None


def bottleneck_bandwidth(model: Model, cluster: Cluster, setup: Setup) -> float:
    """Bytes/s of the slowest link that is used below which the exchanges take longer than attention.

    That is the network's where the ranks of a sequence are on several nodes, else the one inside a node. inf if they
    take longer over any link, 0 for one rank.
    """
    if setup.sequence_ranks == 1:
        return 0.0
    link = slowest_link(cluster, setup)

    def hides(speed: float) -> bool:
        exchanging, computing = _balance(model, setup, with_link(cluster, link, speed))
        return exchanging <= computing

    low, high = 1e3, 1e15
    if not hides(high):
        return float("inf")
    while high / low > 1.0001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if hides(middle) else (middle, high)
    return high


def slowest_link(cluster: Cluster, setup: Setup) -> str:
    """The field of the cluster that says how fast the link is on which an exchange waits."""
    return "between" if setup.sequence_ranks > cluster.node else "inside"


def with_link(cluster: Cluster, link: str, speed: float) -> Cluster:
    """The cluster with another speed of the link that `slowest_link` names."""
    return replace(cluster, between=speed) if link == "between" else replace(cluster, inside=speed)


def _balance(model: Model, setup: Setup, cluster: Cluster) -> tuple[float, float]:
    """Seconds of a layer's exchanges, forward and backward in one chunk each, and of its attention."""
    plain = replace(setup, chunks=1, exchange="nccl" if setup.one_sided else setup.exchange)
    calls = [attention(model, plain, cluster, False, back) for back in (False, True)]
    attending = sum(call.seconds[name] for call, name in zip(calls, ("attend", "attend_backward"), strict=True))
    return sum(call.exchanging for call in calls), attending


def _candidates(model: Model, cluster: Cluster, given: Setup, checkpoints: Sequence[str]) -> Iterator[Setup]:
    n = cluster.gpus
    degrees = [p for p in range(1, n + 1) if n % p == 0 and p <= given.seq]
    degrees = [p for p in degrees if given.batch is None or given.batch % (n // p) == 0]
    if not degrees:
        raise OptionError(
            f"a batch of {given.batch} sequences of {given.seq} tokens cannot be shared by {n} GPUs: no number of "
            "data-parallel rows divides both; change one of them"
        )
    for ranks in degrees:
        for exchange in _exchanges(cluster, ranks):
            for chunks in _chunks(model, ranks):
                for kind in checkpoints:
                    yield replace(
                        given, sequence_ranks=ranks, rows=n // ranks, exchange=exchange, chunks=chunks, checkpoint=kind
                    )


def _exchanges(cluster: Cluster, ranks: int) -> tuple[str, ...]:
    if ranks == 1 or cluster.gpu.name == "cpu":
        return ("symm",)  # on CPUs shared memory, which is one-sided too
    if ranks <= cluster.node:
        return ("symm", "nccl")
    return ("nccl", "two_hop") if ranks % cluster.node == 0 else ("nccl",)


def _chunks(model: Model, ranks: int) -> tuple[int, ...]:
    """Where ranks divide the heads, a chunk needs one on every rank; cut heads are taken to give enough."""
    most = model.heads // ranks if model.heads % ranks == 0 else CHUNKS[-1]
    return tuple(c for c in CHUNKS if ranks > 1 or c == 1 if c <= most)
