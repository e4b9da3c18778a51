"""One rank of `bench.retrieval`: sequences with needles, a model that may find them, its training and its examination.

    filler k3 v3 filler k1 v1 filler ... filler | k1 v1 k3 v3 ...
            needles, one in every n-th part       questions: after a key its value is to be told

Keys, values and filler are different bytes; filler is random. The keys of a sequence differ, so a value can only be
told by who found its key in the filler before. Attention is the only place where a token learns of others (a layer is
x + attention(norm(x))), and all of it goes through `ulysses_qkv_attention`: sequences are sharded over the ranks.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ulysses_triton import UlyssesGroup, shard_sequence, token_mean, ulysses_qkv_attention
from ulysses_triton.shard import IGNORE_INDEX

KINDS = 64  # of keys, and of values
KEYS, VALUES = 128, 192  # where they begin among the bytes; filler is below


class Stage(NamedTuple):
    """`steps` updates on `batch` sequences of `length` tokens, with as many needles each."""

    steps: int
    length: int
    batch: int
    needles: int


@dataclass(frozen=True)
class Asked:
    """A run: what to train on, at which lengths to examine how many sequences of how many needles."""

    ranks: int
    stages: tuple[Stage, ...]
    examined: tuple[tuple[int, int], ...]  # (length, sequences)
    needles: int = 10
    layers: int = 2
    width: int = 128
    heads: int = 4
    lr: float = 3e-3
    seed: int = 0


def draw(stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and labels [B, S], and in which of the parts the needle of each question lies: int64 [B, needles]."""
    _, length, batch, needles = stage
    body = length - 2 * needles
    edges = torch.arange(needles + 1) * body // needles
    tokens = torch.randint(0, KEYS, (batch, length), generator=generator)
    keys = KEYS + torch.rand(batch, KINDS, generator=generator).argsort(1)[:, :needles]
    values = VALUES + torch.randint(0, KINDS, (batch, needles), generator=generator)
    inside = torch.rand(batch, needles, generator=generator, dtype=torch.float64) * (edges.diff() - 1)
    places = edges[:-1] + inside.long()  # a part has room for the needle's two tokens
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
    order = torch.rand(batch, needles, generator=generator).argsort(1)
    tokens[:, body::2], tokens[:, body + 1 :: 2] = keys.gather(1, order), values.gather(1, order)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[:, body::2] = values.gather(1, order) - VALUES
    return tokens, labels, order


def frequencies(dim: int) -> Tensor:
    """RoPE's, for half of a head's channels: the others compare contents, at any distance. float64 [dim / 4]."""
    pairs = torch.arange(dim // 4, dtype=torch.float64)
    return 10_000 ** (-4 * pairs / dim)


class Layer(nn.Module):
    """x + attention(norm(x)), causal, with QK-norm and RoPE.

    Scores grow with the logarithm of the length (Chiang and Cholak 2022), so that one key stands out among more.
    """

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.heads, dim = asked.heads, asked.width // asked.heads
        self.norm = nn.RMSNorm(asked.width)
        self.qkv = nn.Linear(asked.width, 3 * asked.width)
        nn.init.zeros_(self.qkv.bias)
        self.out = nn.Linear(asked.width, asked.width, bias=False)
        self.q_norm = nn.Parameter(torch.full((dim,), 4.0))  # sharp enough to tell one key among thousands
        self.k_norm = nn.Parameter(torch.ones(dim))

    @torch.no_grad()
    def look_back(self) -> None:
        """Begin by attending to the token before: queries are keys turned back by one token, in the channels of RoPE.

        A value must learn which key it stands behind; that all by itself took most of the training. With the fastest
        channels alone many a token far away looks like the one before.
        """
        q, k, _ = self.qkv.bias.view(3, self.heads, -1)
        turn = frequencies(q.size(1))
        k[:, : len(turn)] = 3.0
        q[:, : 2 * len(turn)] = 3.0 * torch.cat([turn.cos(), -turn.sin()])

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], group: UlyssesGroup) -> Tensor:
        dim, length = len(self.q_norm), x.size(1) * group.size
        attended = ulysses_qkv_attention(
            self.qkv(self.norm(x)), group, heads=self.heads, kv_heads=self.heads, rope=rope,
            rope_dim=dim // 2, q_norm=self.q_norm, k_norm=self.k_norm, causal=True,
            scale=math.log(length, 64) / dim**0.5,
        )  # fmt: skip
        assert isinstance(attended, Tensor)
        return x + self.out(attended.flatten(2))


class Model(nn.Module):
    """Logits of the value to tell [B, L, 64] for this rank's tokens [B, L] at `positions` [L]."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.dim = asked.width // asked.heads
        self.embedding = nn.Embedding(256, asked.width)
        self.layers = nn.ModuleList(Layer(asked) for _ in range(asked.layers))
        self.layers[0].look_back()
        self.norm = nn.RMSNorm(asked.width)
        self.head = nn.Linear(asked.width, KINDS, bias=False)
        with torch.no_grad():  # a value is told by what it looks like: to copy is one map for all of them
            self.head.weight.copy_(self.embedding.weight[VALUES:] / asked.width**0.5)

    def forward(self, tokens: Tensor, positions: Tensor, group: UlyssesGroup) -> Tensor:
        angles = positions.double()[:, None] * frequencies(self.dim)
        rope = angles.cos().float(), angles.sin().float()
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, rope, group)
        return self.head(self.norm(x))


def serve(rank: int, port: int, asked: Asked, path: str) -> None:
    """Be a rank; rank 0 prints now and then, and writes what it measured to the JSON file `path`."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=asked.ranks)
    with UlyssesGroup() as group:
        torch.manual_seed(asked.seed)
        model = DistributedDataParallel(Model(asked))  # all begin with rank 0's weights; it averages gradients
        steps = list(_train(model, asked, group))
        examined = [_examine(model, asked, group, *lengths) for lengths in asked.examined]
    dist.destroy_process_group()
    if rank == 0:
        Path(path).write_text(json.dumps({"steps": steps, "examined": examined}))


def _train(model: nn.Module, asked: Asked, group: UlyssesGroup) -> Iterator[dict[str, float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(asked.seed)  # all ranks draw the same sequences
    steps = sum(stage.steps for stage in asked.stages)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)  # and no decay: long sequences come last
    step = 0
    for stage in asked.stages:
        for _ in range(stage.steps):
            began = time.perf_counter()
            tokens, labels, _ = draw(stage, generator)
            mine = shard_sequence(labels, group)
            logits = _logits(model, tokens, group)
            total = functional.cross_entropy(logits.flatten(0, 1), mine.flatten(), reduction="sum")
            loss = token_mean(total, (mine != IGNORE_INDEX).sum(), group)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            step += 1
            found = {"length": stage.length, "loss": loss.item(), "seconds": time.perf_counter() - began}
            if dist.get_rank() == 0 and step % 20 == 0:
                print(f"step {step}/{steps}, {stage.length} tokens: loss {found['loss']:.3f}, "
                      f"{found['seconds']:.2f} s", flush=True)  # fmt: skip
            yield found


@torch.no_grad()
def _examine(model: nn.Module, asked: Asked, group: UlyssesGroup, length: int, sequences: int) -> dict[str, Any]:
    """Ask for every needle of so many new sequences: how many values were told right, by the needle's part."""
    generator = torch.Generator().manual_seed(asked.seed + 1_000_003)
    right = torch.zeros(asked.needles, dtype=torch.int64)
    for _ in range(sequences):
        tokens, labels, order = draw(Stage(1, length, 1, asked.needles), generator)
        told = _logits(model, tokens, group).argmax(-1)
        whole = [torch.empty_like(told) for _ in range(asked.ranks)]
        dist.all_gather(whole, told)
        asked_for = labels != IGNORE_INDEX
        right[order[0]] += (torch.cat(whole, 1) == labels)[asked_for].long()
    return {"length": length, "sequences": sequences, "right": right.tolist()}


def _logits(model: nn.Module, tokens: Tensor, group: UlyssesGroup) -> Tensor:
    positions = shard_sequence(torch.arange(tokens.size(1)), group, dim=0)
    return model(shard_sequence(tokens, group), positions, group)
