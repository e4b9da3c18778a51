"""Bytes on a GPU at the two moments when most are in use: in the loss, and in the backward pass of a layer.

Every term has a name and a formula of its own. Example: Llama-3-8B on 8 GPUs with ZeRO-3 keeps 8.03e9 x 2 / 8 bytes of
weights, as many of gradients and 8.03e9 x 12 / 8 of optimiser states, 16.1 GB in all; of 131,072 tokens each GPU has
16,384, so 32 layers' inputs take 32 x 16,384 x 4096 x 2 bytes = 4.3 GB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .hardware import Cluster
from .models import Model
from .rows import Rows
from .setup import Setup

CONTEXT = 2e9  # taken for CUDA's context, libraries' workspaces and NCCL's buffers
FRAGMENTED = 0.05  # of what comes and goes: taken for gaps in PyTorch's allocator
LOGIT_TILE = 1024  # tokens


@dataclass(frozen=True)
class Memory:
    """Bytes of every term at each moment, and what lies in the memory of a node's host."""

    loss: dict[str, float]
    backward: dict[str, float]
    host: dict[str, float]

    @property
    def moment(self) -> str:
        return max(("loss", "backward"), key=lambda name: sum(getattr(self, name).values()))

    @property
    def terms(self) -> dict[str, float]:
        """Of the moment that takes most."""
        found: dict[str, float] = getattr(self, self.moment)
        return found

    @property
    def peak(self) -> float:
        return sum(self.terms.values())

    @property
    def on_host(self) -> float:
        return sum(self.host.values())

    def fits(self, cluster: Cluster) -> bool:
        return self.peak <= cluster.gpu.memory and self.on_host <= cluster.host_memory


def memory(model: Model, setup: Setup, cluster: Cluster) -> Memory:
    """What a rank keeps, and its node's host."""
    kept = _states(model, setup)
    saved = model.layers * _saved(model, setup)
    working: dict[str, float] = {}
    if setup.checkpoint == "none":
        kept["activations of all layers"] = saved
    else:
        working["activations of one layer"] = _saved(model, setup)
        inputs = float(model.layers * setup.tokens * model.hidden * setup.item)
        if setup.checkpoint == "full":
            kept["checkpoints: inputs of the layers"] = inputs
        else:  # one that is leaving or has come back, and the one beside it
            kept["checkpoints on their way"] = 2 * inputs / model.layers
    loss = kept | _logits(model, setup)
    backward = kept | working | _backward(model, setup)
    return Memory(_allowing(loss, kept), _allowing(backward, kept), _host(model, setup, cluster))


def _states(model: Model, setup: Setup) -> dict[str, float]:
    """What lasts through the step."""
    n = float(model.parameters)
    found = {"weights": n * setup.item / setup.divided(3)}
    if setup.offload_optimizer and setup.zero >= 2:
        return found  # gradients go to the host layer by layer
    found["gradients"] = n * setup.grad / setup.divided(2)
    if not setup.offload_optimizer:
        found["optimiser"] = n * setup.states / setup.divided(1)
    return found


def _saved(model: Model, setup: Setup) -> float:
    """What a layer keeps for its backward: inputs of norms and products, what attention saves, and the MLP."""
    hidden = 4.0 * setup.tokens * model.hidden * setup.item
    return hidden + saved_by_attention(model, setup) + _mlp(model, setup, 4 if model.gated else 2)


def saved_by_attention(model: Model, setup: Setup) -> float:
    """The rows that a rank received (or sent, to exchange them again), O, and LSE in fp32."""
    rows = Rows.of(model, setup)
    kept = _projected(model, setup) if setup.recompute_exchange else rows.qkv
    return kept + rows.out + 4.0 * setup.tokens * model.heads


def _projected(model: Model, setup: Setup) -> float:
    """q, k and v of a rank's own tokens, every head once."""
    return float(setup.tokens * (model.q_width + 2 * model.kv_width) * setup.item)


def _mlp(model: Model, setup: Setup, tensors: int) -> float:
    """So many tensors [tokens, intermediate]; tiled, of as many tokens at once as the model has hidden channels."""
    tokens = min(setup.tokens, model.hidden) if setup.tiled_mlp else setup.tokens
    return float(tensors * tokens * model.intermediate * setup.item)


def _logits(model: Model, setup: Setup) -> dict[str, float]:
    """The head's own: logits in `item` bytes, in fp32, and their gradient in fp32."""
    tokens = min(setup.tokens, LOGIT_TILE) if setup.tiled_logits else setup.tokens
    found = {
        "logits": float(tokens * model.vocabulary * (setup.item + 4 + 4)),
        "last hidden states and their gradient": 2.0 * setup.tokens * model.hidden * setup.item,
    }
    if setup.zero == 3:
        found["the head, gathered, and its gradient"] = float(model.head_parameters * (setup.item + setup.grad))
    return found


def _backward(model: Model, setup: Setup) -> dict[str, float]:
    """What the backward pass of one layer needs besides what was saved.

    Received dO goes with its chunk, and one more is on its way. Gradients that came back stay until the call ends, or
    two chunks of them where rows are exchanged again. A collective exchange also has what it sends: while dq, dk and dv
    of a chunk are on their way, those of the next one are computed, and its dO has just left.
    """
    rows, chunks = Rows.of(model, setup), setup.chunks
    sends = 0 if setup.one_sided else 1
    two = min(2, chunks) / chunks
    buffers = two * rows.grad_out + sends * (two * rows.grad_qkv + (chunks > 1) * rows.grad_out / chunks)
    buffers += two * (rows.grad_qkv + rows.qkv) if setup.recompute_exchange else rows.grad_qkv
    found = {
        "exchange buffers": buffers,
        "gradients of hidden states": 3.0 * setup.tokens * model.hidden * setup.item,
        "gradients of q, k and v": _projected(model, setup),
        "gradients in the MLP": _mlp(model, setup, 3 if model.gated else 2),
    }
    if setup.zero == 3:  # this layer and the next one on its way, and this one's gradient
        found["gathered layers and a gradient"] = float(model.layer_parameters * (2 * setup.item + setup.grad))
    return found


def _allowing(terms: dict[str, float], kept: dict[str, float]) -> dict[str, float]:
    """With the allowances, which are taken and not derived."""
    moving = sum(value for name, value in terms.items() if name not in kept)
    return terms | {"allowance: gaps in the allocator": FRAGMENTED * moving, "allowance: CUDA and NCCL": CONTEXT}


def _host(model: Model, setup: Setup, cluster: Cluster) -> dict[str, float]:
    """Of one node: what its GPUs put there."""
    gpus = min(cluster.node, setup.gpus)
    found = {}
    if setup.offload_optimizer:
        found["optimiser and gradients"] = gpus * model.parameters * (setup.states + setup.grad) / setup.divided(1)
    if setup.checkpoint == "offload":
        found["checkpoints"] = float(gpus * model.layers * setup.tokens * model.hidden * setup.item)
    return found


def longest(model: Model, setup: Setup, cluster: Cluster) -> int:
    """The most tokens for which such a setup fits, in steps of one token per rank; 0 if none does."""

    def fits(tokens: int) -> bool:
        return memory(model, replace(setup, seq=tokens * setup.sequence_ranks), cluster).fits(cluster)

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * setup.sequence_ranks
