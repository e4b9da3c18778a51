"""One rank of the part `exchange`: a process of its own, which may share its GPU with the other ranks.

    python -m bench._exchange_worker FOLDER EXCHANGE RANK RANKS [--graph]

FOLDER has `case.pt`, the layer and the whole sequence; `RANK.pt` there gets this rank's results, or with `--graph` how
many elements of each differ between replays of a captured layer and the layer run eagerly, with inputs that change.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ulysses_triton.case import Case, Inputs, Layer
from ulysses_triton.group import UlyssesGroup

TIMEOUT = timedelta(seconds=60)
REPLAYS = 3


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("exchange")
    parser.add_argument("rank", type=int)
    parser.add_argument("ranks", type=int)
    parser.add_argument("--graph", action="store_true")
    asked = parser.parse_args(argv)
    case, inputs = torch.load(asked.folder / "case.pt", weights_only=False)
    store = dist.FileStore(str(asked.folder / f"store of {asked.exchange}"), asked.ranks)
    dist.init_process_group("gloo", store=store, rank=asked.rank, world_size=asked.ranks, timeout=TIMEOUT)
    with _group(asked.exchange, asked.ranks) as group:
        found = _replayed(case, inputs, group) if asked.graph else Layer(case, inputs, group).results()
        torch.save({name: x.cpu() for name, x in found.items()}, asked.folder / f"{asked.rank}.pt")
    os._exit(0)  # gloo sometimes aborts when a process ends


def _group(exchange: str, ranks: int) -> UlyssesGroup:
    if (exchange, ranks) != ("nccl", 1):
        return UlyssesGroup(exchange=exchange, timeout=TIMEOUT)
    from cupy.cuda import nccl

    from ulysses_triton.exchange.nccl import NcclExchange

    group = UlyssesGroup()  # a group of one rank exchanges nothing by itself
    group.exchange = NcclExchange(nccl, group.control, group.pool, TIMEOUT)
    return group


def _replayed(case: Case, inputs: Inputs, group: UlyssesGroup) -> dict[str, torch.Tensor]:
    """How many elements of `out` and each gradient differ, for every replay."""
    layer = Layer(case, inputs, group)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is made once: connections, segments, tables, compiled kernels
            layer.backward(layer.forward())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.forward()
        captured = [out, *layer.backward(out)]
    found = {}
    for number in range(REPLAYS):
        for leaf in layer.leaves:
            leaf.data.copy_(leaf.data.roll(1, 1) * (1 - 0.125 * number))
        graph.replay()
        replayed = [x.detach().clone() for x in captured]
        out = layer.forward()
        eager = [out, *layer.backward(out)]
        for i, (a, b) in enumerate(zip(replayed, eager, strict=True)):
            found[f"replay {number}, result {i}"] = (a != b).sum()
    group.check()
    return found


if __name__ == "__main__":
    main()
