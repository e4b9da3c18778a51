"""Seconds of a layer's parts on one rank: what it computes, its attention step by step, and what FSDP moves for it.

Matrix products run at the GPU's share of its peak, attention at the rates that `cost` has for it, everything between
them at the speed of copies. The steps of attention take what they take in `cost`, whose timeline of a layer this is for
equal shards; a C-th of it for each of C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .. import schedule
from ..cuts import pairs
from ..errors import OptionError
from .hardware import Cluster
from .models import Model
from .rows import Rows, travelling
from .setup import Setup

_SENT = {"exchange_in": "qkv", "exchange_out": "out", "exchange_grad_in": "grad_out", "exchange_grad_out": "grad_qkv"}


@dataclass(frozen=True)
class Attention:
    """One call: the steps of `schedule`, seconds by a step's name, and the bytes that its exchanges send to others."""

    steps: tuple[schedule.Step, ...]
    seconds: dict[str, float]
    sent: dict[str, float]

    @property
    def exchanging(self) -> float:
        """Seconds of all exchanges."""
        return sum(self.seconds[s.name] for s in self.steps if s.stream == "exchange")

    @property
    def computing(self) -> float:
        return sum(self.seconds[s.name] for s in self.steps if s.stream == "compute")


def scores(model: Model, setup: Setup, windowed: bool) -> float:
    """Pairs of a query and a key that all ranks compute for one head."""
    if not setup.skips_masked:
        return float(setup.seq) ** 2
    return float(pairs(setup.seq, setup.seq, model.window - 1 if windowed and model.window else -1, 0))


@lru_cache(maxsize=4096)
def attention(model: Model, setup: Setup, cluster: Cluster, windowed: bool, backward: bool) -> Attention:
    """Attention of a layer, forward or backward, without its projections."""
    if setup.one_sided and setup.sequence_ranks > cluster.node:
        raise OptionError(
            f"exchange = 'symm' is for ranks of one node, and {setup.sequence_ranks} share a sequence on nodes of "
            f"{cluster.node} GPUs; use 'nccl' or 'two_hop'"
        )
    gpu, ranks, chunks = cluster.gpu, setup.sequence_ranks, setup.chunks
    again = setup.recompute_exchange
    by_chunk = chunks if again else 1
    steps = (
        schedule.backward(again, chunks)
        if backward
        else schedule.forward(setup.one_sided, chunks, recompute=again)
    )  # fmt: skip
    rows = Rows.of(model, setup)
    stored = setup.one_sided  # kernels store what they compute into the peers' memory
    sent, seconds = {}, {}
    for name in {step.name for step in steps if step.stream == "exchange"}:
        whole = name == "exchange_out" and stored  # one for all chunks
        sent[name] = travelling(getattr(rows, _SENT[name]), ranks) / (1 if whole else chunks)
        seconds[name] = cluster.exchange(0.0 if stored else sent[name], ranks, setup.exchange == "two_hop")

    def storing(bytes_: float) -> float:
        return travelling(bytes_, ranks) / chunks / cluster.inside if stored else 0.0

    products = 2.0 * scores(model, setup, windowed) * model.q_width / ranks / chunks * setup.item / 2
    if backward:
        seconds["attend_backward"] = 2 * cluster.launch + max(5 * products / gpu.backward, storing(rows.grad_qkv))
        seconds["pack_grad"] = cluster.launch + max(3 * rows.grad_out / chunks / gpu.copy, storing(rows.grad_out))
        seconds["unpack_grad"] = cluster.launch + 2 * rows.grad_qkv / by_chunk / gpu.copy
    else:
        seconds["attend"] = cluster.launch + max(2 * products / gpu.forward, storing(rows.out))
        seconds["unpack"] = cluster.launch + 2 * rows.out / by_chunk / gpu.copy
    seconds["pack"] = cluster.launch + max(2 * rows.qkv / chunks / gpu.copy, storing(rows.qkv))
    return Attention(steps, seconds, sent)


@dataclass(frozen=True)
class Dense:
    """Seconds of what a layer computes besides attention: matrix products, and what only moves bytes."""

    matmul: float
    elementwise: float

    @property
    def both(self) -> float:
        return self.matmul + self.elementwise


def dense(model: Model, setup: Setup, cluster: Cluster, backward: bool = False) -> Dense:
    """Of one layer: projections, MLP, two norms, two residual sums and the activation, each an operation of its own."""
    weights = model.layer_products * (2 if backward else 1)
    if backward and setup.tiled_mlp:  # a tile is computed again
        weights += model.mlp_products
    matmul = 2.0 * setup.tokens * weights * setup.item / 2 / cluster.gpu.matmul
    elements = setup.tokens * (10 * model.hidden + (5 if model.gated else 2) * model.intermediate)
    return Dense(matmul, (2 if backward else 1) * elements * setup.item / cluster.gpu.copy)


def loss(model: Model, setup: Setup, cluster: Cluster) -> Dense:
    """The head and the loss, forward and backward: logits are read and written in `item` bytes, then in fp32."""
    logits = float(setup.tokens) * model.vocabulary
    matmul = 6.0 * logits * model.hidden * setup.item / 2 / cluster.gpu.matmul
    return Dense(matmul, logits * (3 * setup.item + 6 * 4) / cluster.gpu.copy)


@dataclass(frozen=True)
class Moves:
    """Seconds that FSDP's collectives take for a layer (or the embedding), if nothing else uses the links."""

    gather: float
    reduce: float


def moves(parameters: int, setup: Setup, cluster: Cluster) -> Moves:
    """Of so many parameters: gathered in ZeRO-3; gradients are scattered, or, unsharded, reduced to all ranks."""
    gather = cluster.gather(parameters * setup.item, setup.gpus) if setup.zero == 3 else 0.0
    reduce = cluster.gather(parameters * setup.grad, setup.gpus) * (1 if setup.zero >= 1 else 2)
    return Moves(gather, reduce)
