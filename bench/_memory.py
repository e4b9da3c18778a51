"""What a training step holds at most: plain, and with less and less memory, with the same gradients.

The model is a decoder whose attention is PyTorch's own, over documents of 1,024 tokens: this is about what lies beside
attention. Bytes are those of all tensors that live at once, parameters and gradients among them: on a GPU what
PyTorch's allocator gave out, elsewhere the storages that operators returned. Checkpoints in host memory are apart.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ulysses_triton.training.config import ModelConfig
from ulysses_triton.training.model import SwiGLU
from ulysses_triton.training.offload import HostOffload
from ulysses_triton.training.tiles import loss_sum, tile_tokens

from ._check import Findings, Found
from ._record import table
from ._session import Session, verdict

DOCUMENT = 1024  # tokens


@dataclass(frozen=True)
class Step:
    """A training step on one sequence: the model's sizes, and what saves memory."""

    tokens: int = 16384
    width: int = 128
    layers: int = 12
    vocabulary: int = 32768
    tile: int = 1024
    checkpoints: bool = False
    loss: bool = False  # over tiles
    mlp: bool = False  # likewise
    offload: bool = False

    def __str__(self) -> str:
        on = {"checkpoints": self.checkpoints, "loss tiles": self.loss, "MLP tiles": self.mlp, "offload": self.offload}
        return " + ".join(name for name, is_on in on.items() if is_on) or "plain"


WAYS: tuple[dict[str, bool], ...] = (
    {},
    {"checkpoints": True},
    {"checkpoints": True, "loss": True},
    {"checkpoints": True, "loss": True, "mlp": True},
    {"checkpoints": True, "loss": True, "mlp": True, "offload": True},
)


class Block(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(step.width) for _ in range(2))
        self.qkv, self.out = nn.Linear(step.width, 3 * step.width), nn.Linear(step.width, step.width)
        self.mlp = SwiGLU(ModelConfig(width=step.width, hidden=4 * step.width))

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norms[0](x)).view(-1, min(DOCUMENT, x.size(0)), 3, x.size(1) // 64, 64)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Tokens [L] and labels [L] to the sum of losses."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.embedding = nn.Embedding(step.vocabulary, step.width)
        self.blocks = nn.ModuleList(Block(step) for _ in range(step.layers))
        self.norm = nn.RMSNorm(step.width)
        self.head = nn.Linear(step.width, step.vocabulary, bias=False)
        self.offload = HostOffload()
        if step.mlp:
            for block in self.blocks:
                tile_tokens(block.mlp, step.tile)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.step.offload:
                x = self.offload.checkpoint(block, x)
            else:
                x = checkpoint(block, x, use_reentrant=False) if self.step.checkpoints else block(x)
        if self.step.loss:
            return loss_sum(self.norm(x), labels, self.head.weight, tile=self.step.tile)
        return functional.cross_entropy(self.head(self.norm(x)).float(), labels, reduction="sum")


@dataclass
class Held:
    """What a step held at most, in bytes, and what it found."""

    peak: int
    host: int
    seconds: float
    grads: list[Tensor]


def measure(step: Step, device: torch.device) -> Held:
    torch.manual_seed(0)
    model = Model(step).to(device)
    tokens, labels = torch.randint(step.vocabulary, (2, step.tokens), device=device)
    host = [0]
    model.norm.register_forward_hook(lambda *_: host.append(model.offload.host_bytes))  # all checkpoints are saved
    begin = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        model(tokens, labels).backward()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        own = [*model.parameters(), tokens, labels]
        with Live(own, model.offload) as live:
            model(tokens, labels).backward()
        peak = live.peak
    return Held(
        peak, max(host), time.perf_counter() - begin, [p.grad for p in model.parameters() if p.grad is not None]
    )


class Live(TorchDispatchMode):
    """Counts the bytes of storages that live, `known` ones and all that operators return, but for host buffers."""

    def __init__(self, known: Sequence[Tensor], offload: HostOffload) -> None:
        super().__init__()
        self.offload, self.bytes, self.peak = offload, 0, 0
        self.seen: set[StorageWeakRef] = set()
        for x in known:
            self.add(x)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                self.add(x)
        self.peak = max(self.peak, self.bytes - self.offload.host_bytes)
        return made

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        ref = StorageWeakRef(storage)
        if ref not in self.seen:
            self.seen.add(ref)
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self.drop, ref, storage.nbytes())

    def drop(self, ref: StorageWeakRef, size: int) -> None:
        self.seen.discard(ref)
        self.bytes -= size


def records(session: Session, size: Step) -> Iterator[dict[str, Any]]:
    """Of every way in which a step is done, the plain one first: gradients are held against its."""
    done: list[Held] = []
    for way in WAYS:
        step = replace(size, **way)
        before = len(done)
        record = session.judge("memory", str(step), partial(_check, step, session.device, done))
        if len(done) > before:
            record |= {"peak_bytes": done[-1].peak, "host_bytes": done[-1].host, "seconds": done[-1].seconds}
        yield record


def _check(step: Step, device: torch.device, done: list[Held]) -> Findings:
    """Do a step. Checkpoints change no bit, and offload none of the step before it; tiles, the order of fp32 sums."""
    done.append(measure(step, device))
    like = done[-2 if step.offload else 0].grads
    apart = torch.stack([(a.double() - b.double()).norm() for a, b in zip(done[-1].grads, like, strict=True)]).norm()
    error = float(apart / torch.stack([b.double().norm() for b in like]).norm())
    return {"gradients": Found(error, 0.0 if step.offload or not step.loss else 1e-6)}


SIZES = (Step(tokens=32768, width=512, tile=2048),)
DRY = (Step(tokens=300, width=64, layers=2, vocabulary=64, tile=128),)


def run(session: Session) -> Iterator[list[dict[str, Any]]]:
    """The part `memory` of bench.gpu."""
    for size in session.in_time(DRY if session.dry else SIZES):
        yield list(records(session, size))


def show(found: list[dict[str, Any]]) -> str:
    rows = [
        (
            r["case"], _mebibytes(r, "peak_bytes"), _mebibytes(r, "host_bytes"), r.get("seconds"),
            r["errors"].get("gradients", {}).get("error"), verdict(r),
        )
        for r in found
    ]  # fmt: skip
    return table(("a step", "peak MiB", "in host memory", "s", "gradients off by", "check"), rows)


def _mebibytes(record: dict[str, Any], name: str) -> float | None:
    return record[name] / 2**20 if name in record else None
