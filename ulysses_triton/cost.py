"""A model of what a layer costs: the steps of the schedule, with times from a few figures of a machine.

A step that computes takes as long as its matrix products or as moving its bytes, whichever is longer; an exchange
begins when every rank has come to it and takes its messages' latencies and its bytes over the bandwidth. With a
one-sided exchange the bytes travel while a kernel writes them, and only the arrival is an exchange of its own. Each
stream does one thing at a time. Example: 4 ranks that send 300 MB each at 300 GB/s exchange for 1 ms; if attention of
2 chunks takes 2 ms each, the second chunk's exchange hides behind the first one's attention.

Projections count as many products per second as attention's forward, and all gradients that there may be.
What documents, masks and blocks leave out is not known on the host, so attention counts as if they left out nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from . import schedule
from .cuts import Piece, pairs
from .messages import Message, Section, inbound, outbound
from .placement import chunk_count, place
from .schedule import Step, Which
from .spec import Problem
from .timeline import STREAMS, Event, Timeline

MAX_CHUNKS = 8


@dataclass(frozen=True)
class Machine:
    """What one rank reaches, for long sequences and bf16; other dtypes take longer as they have more bytes."""

    name: str
    forward: float  # FLOP/s of attention
    backward: float
    copy: float  # bytes/s read and written together
    exchange: float  # bytes/s sent, and as many received
    latency: float  # seconds per message
    launch: float  # seconds per kernel


# Attention: for long causal sequences of head dim 128, as reported: FlashAttention-2 on A100 (its backward in the
# proportion that it has on H100, 322 to 370), FlashAttention-3 on H100, cuDNN on H200 and GB200; MI300X is assumed to
# reach 0.4 of its peak of 1307 TFLOP/s. Copies: 4.3 TB/s measured on an H200, 0.9 of its datasheet's 4.8; the same
# share of the datasheets' 2.04, 3.35, 8.0 and 5.3 for the others.
# Links: the datasheets' peak in one direction (NVLink 3, 4 and 5: 300, 450 and 900 GB/s; Infinity Fabric of MI300X:
# 7 links of 64 GB/s), or a network of 400 Gb/s per GPU. Latency of a message: what NCCL's own model takes for a step
# (tuning.cc, hwLat of the simple protocol: NVLink 3.4 us, network 14 us). A launch is taken as 5 us.
_GPUS = {
    "a100": (190e12, 165e12, 1.8e12, 300e9),
    "h100": (616e12, 561e12, 3.0e12, 450e9),
    "h200": (673e12, 579e12, 4.3e12, 450e9),
    "b200": (1708e12, 1328e12, 7.2e12, 900e9),
    "mi300x": (520e12, 450e12, 4.7e12, 448e9),
}
MACHINES = {
    name: machine
    for gpu, (forward, backward, copy, link) in _GPUS.items()
    for name, machine in {
        gpu: Machine(gpu, forward, backward, copy, link, 3.4e-6, 5e-6),
        f"{gpu}-network": Machine(f"{gpu}-network", forward, backward, copy, 50e9, 14e-6, 5e-6),
    }.items()
}


def machine_of(device: str, one_host: bool) -> Machine | None:
    """The machine with this GPU, as its driver calls it ("NVIDIA H100 80GB HBM3"); None for one of no known figures.

    `one_host`: all ranks are on one host, with its links between them, and not a network.
    """
    words = device.lower().replace("-", " ").split()
    found = next((gpu for gpu in _GPUS if gpu in words), None)
    return None if found is None else MACHINES[found if one_host else f"{found}-network"]


def two_hops_below(device: str) -> float | None:
    """Bytes of a block, from one rank to another, below which `exchange.two_hop` takes less time than one hop.

    None for a GPU of no known figures. With N nodes of n ranks, two hops save (N - 1) (n - 1) messages over the network
    and make as many more inside a node; and of the N blocks that a rank gives each other rank of its node, N - 1 are
    more than in one hop. So they pay where one block's time inside the node is less than what a message saves, whatever
    N and n. Example: on H100 (14 - 3.4) us at 450 GB/s, 4.8 MB.
    """
    inside, network = machine_of(device, True), machine_of(device, False)
    if inside is None or network is None:
        return None
    return (network.latency - inside.latency) * inside.exchange


def cpu(cores: float = 1.0) -> Machine:
    """A rank on so many cores of a CPU like the one this was written on (AMD EPYC, AVX-512), by gloo.

    Measured there on one core: aten's flash kernel at 84 GFLOP/s forward and 80 backward in fp32 (so 168 and 160 at
    half the bytes, a little more than it has in bf16), copies at 26 GB/s read and written; 0.8 GB/s and 3.5 ms for
    three messages between 4 ranks.
    """
    return Machine("cpu", 168e9 * cores, 160e9 * cores, 26e9, 0.8e9, 1.2e-3, 10e-6)


def timeline(problem: Problem, machine: Machine, *, one_sided: bool = False) -> Timeline:
    """The predicted events of a layer on all ranks: forward, and where the problem has a gradient also backward."""
    events: list[Event] = []
    calls = ["attention", "attention backward"] if problem.grad else ["attention"]
    for call, what in enumerate(calls, 1):
        begin = max((e.end for e in events), default=0.0)
        steps = schedule.of(problem, one_sided) if call == 1 else schedule.of_backward(problem)
        blank = Event(0, call, what, "", 0, "", begin, begin)
        events += _exposed(_walk(steps, _Costs(problem, machine, one_sided), blank, problem.ranks), begin)
    return Timeline(events)


def exposed(problem: Problem, machine: Machine, *, one_sided: bool = False) -> float:
    """Seconds in which a rank would only wait for exchanges, mean over the ranks."""
    return timeline(problem, machine, one_sided=one_sided).exposed()


@lru_cache(maxsize=256)
def best_chunks(problem: Problem, machine: Machine, *, one_sided: bool = False) -> int:
    """The number of chunks that is predicted to take the least time, the smallest of equals; 1 on a CPU."""
    if problem.device == "cpu":
        return 1
    counts = range(1, chunk_count(problem, MAX_CHUNKS) + 1)
    return min(counts, key=lambda n: timeline(replace(problem, chunks=n), machine, one_sided=one_sided).seconds())


# -- the cost of a step

_CARRIED = {  # by each exchange: in which direction, and what
    "exchange_in": (inbound, "qkv"),
    "exchange_out": (outbound, "out"),
    "exchange_grad_in": (inbound, "grad_out"),
    "exchange_grad_out": (outbound, "grad_qkv"),
}
_WRITES = {"pack": "exchange_in", "attend": "exchange_out", "pack_grad": "exchange_grad_in",
           "attend_backward": "exchange_grad_out"}  # fmt: skip
_READS = {"unpack": "exchange_out", "unpack_grad": "exchange_grad_out"}


class _Costs:
    """Seconds and bytes of the steps of a problem on a machine."""

    def __init__(self, problem: Problem, machine: Machine, one_sided: bool) -> None:
        self.problem, self.machine, self.one_sided = problem, machine, one_sided
        self.chunks = place(problem).chunks

    def seconds(self, step: Step, rank: int) -> float:
        """On a rank; of an exchange, from when all ranks have come to it."""
        p, m = self.problem, self.machine
        if step.stream == "exchange":
            moving = 0.0 if self.one_sided else max(self.wire(step.name, step.chunk, rank)) / m.exchange
            return (p.ranks - 1) * m.latency + moving
        if step.name.startswith("project"):
            multiplications, elements = self._projected(step, rank)
            wide = p.item_size / 2  # as many products as if they were of 2 bytes
            return m.launch + max(2.0 * multiplications * wide / m.forward, elements * p.item_size / m.copy)
        storing = 0.0
        if self.one_sided and step.name in _WRITES:
            storing = self.wire(_WRITES[step.name], step.chunk, rank)[0] / m.exchange
        launches = m.launch * len(self.chunks[step.chunk].pieces[rank])
        if step.name == "attend":
            return launches + max(storing, self._products(step, rank, p.head_dim + p.value_dim) / m.forward)
        if step.name == "attend_backward":  # two kernels, which both compute the scores: counted once, as is usual
            products = self._products(step, rank, 3 * p.head_dim + 2 * p.value_dim)
            return 2 * launches + max(storing, products / m.backward)
        return m.launch + max(storing, self._copied(step, rank) / m.copy)

    def sent(self, step: Step, rank: int) -> int:
        """Bytes that a rank sends in an exchange; a one-sided way out is one for all chunks."""
        all_at_once = self.one_sided and step.name == "exchange_out" and not self.problem.projects_out
        chunks = range(len(self.chunks)) if all_at_once else [step.chunk]
        return sum(self.wire(step.name, chunk, rank)[0] for chunk in chunks)

    def wire(self, exchange: str, chunk: int, rank: int) -> tuple[int, int]:
        """Bytes that a rank sends to others in an exchange, and receives from them."""
        if self.one_sided and exchange == "exchange_out":
            return self._straight(chunk, rank)
        sent = received = 0
        for message in self._messages(exchange, chunk, rank):
            sent += sum(message.send) - message.send[rank]
            received += sum(message.receive) - message.receive[rank]
        return sent * self.problem.item_size, received * self.problem.item_size

    def _straight(self, chunk: int, rank: int) -> tuple[int, int]:
        """Of a one-sided way out: attend writes results where they belong, without rows, and not padded."""
        part, others = self.chunks[chunk], [other for other in range(self.problem.ranks) if other != rank]
        sent = sum(part.results(rank, other) for other in others)
        received = sum(part.results(other, rank) for other in others)
        return sent * self.problem.result_size, received * self.problem.result_size

    def _messages(self, exchange: str, chunk: int, rank: int) -> list[Message]:
        direction, what = _CARRIED[exchange]
        sections: tuple[Section, ...] = getattr(self.chunks[chunk], what)
        return [direction(section, self.problem.batch, rank) for section in sections]

    def _products(self, step: Step, rank: int, dims: int) -> float:
        """FLOP of products over `dims` channels of the chunk's heads, as many as if they were of 2 bytes."""
        scores = sum(self._scores(piece) for piece in self.chunks[step.chunk].pieces[rank])
        return 2.0 * scores * dims * self.problem.item_size / 2

    def _scores(self, piece: Piece) -> int:
        p = self.problem
        stop, start = (pairs(n, p.kv_seq, *p.bounds) for n in (piece.stop, piece.start))
        return (stop - start) * piece.q_heads * p.batch

    def _projected(self, step: Step, rank: int) -> tuple[int, int]:
        """Of a step's matrix products: how many multiplications they are, and the elements of their three matrices."""
        p, tokens = self.problem, self.problem.batch * self.problem.lens[rank]
        features, out_features = p.features or 0, p.out_features or 0

        def product(*sizes: int, times: int = 1) -> tuple[int, int]:
            a, b, c = sizes
            return times * a * b * c, times * (a * b + b * c + a * c)

        if step.name in ("project", "project_raw", "project_grad"):
            heads = p.heads + p.kv_heads * (1 if step.name == "project_raw" and not p.recompute else 2)
            if step.name == "project":
                mine = self.chunks[step.chunk].heads
                heads = len(mine.q) + 2 * len(mine.kv)
            return product(tokens, features, heads * p.head_dim, times=2 if step.name == "project_grad" else 1)
        every = step.name == "project_out_weight_grad"
        heads = p.heads if every else len(self.chunks[step.chunk].heads.q)
        return product(tokens, heads * p.value_dim, out_features)

    def _copied(self, step: Step, rank: int) -> int:
        """Bytes read and written by a step that moves rows; pack_grad reads O, too, for its delta."""
        if step.name in _WRITES:
            rows = sum(sum(m.send) for m in self._messages(_WRITES[step.name], step.chunk, rank))
            passes = 3 if step.name == "pack_grad" and self.problem.sends_delta else 2
        else:
            of_one = self.problem.recompute or (step.name == "unpack" and self.problem.projects_out)
            chunks = [step.chunk] if of_one else range(len(self.chunks))
            rows = sum(sum(m.receive) for c in chunks for m in self._messages(_READS[step.name], c, rank))
            passes = 2
        return passes * rows * self.problem.item_size


def _walk(steps: Sequence[Step], costs: _Costs, blank: Event, ranks: int) -> list[Event]:
    """The events of one call on all ranks, which begin it together."""
    free = {stream: [blank.start] * ranks for stream in STREAMS}
    ends: dict[Which, list[float]] = {}
    events = []
    for step in steps:
        awaited = [ends[which] for which in step.after if which in ends]
        starts = [max(free[step.stream][r], *(end[r] for end in awaited), blank.start) for r in range(ranks)]
        level = [max(starts)] * ranks if step.stream == "exchange" else starts
        now = [at + costs.seconds(step, r) for r, at in enumerate(level)]
        free[step.stream] = ends[step.which] = now
        for rank in range(ranks):
            sent = costs.sent(step, rank) if step.stream == "exchange" else 0
            events.append(
                blank._replace(
                    rank=rank,
                    step=step.name,
                    chunk=step.chunk,
                    stream=step.stream,
                    start=starts[rank],
                    end=now[rank],
                    sent=sent,
                )  # fmt: skip
            )
    return events


def _exposed(events: Sequence[Event], begin: float) -> list[Event]:
    """The events of a call, with how much of each exchange lies where its rank computes nothing."""
    found = []
    for event in events:
        idle = 0.0
        if event.stream == "exchange":
            own = [e for e in events if e.rank == event.rank]
            busy = sorted((e.start, e.end) for e in own if e.stream == "compute")
            edges = [begin, *(t for times in busy for t in times), max(e.end for e in own)]
            for a, b in zip(edges[::2], edges[1::2], strict=True):  # in which it computes nothing
                idle += max(0.0, min(b, event.end) - max(a, event.start))
        found.append(event._replace(exposed=idle))
    return found
