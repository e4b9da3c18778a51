"""What a layer holds at once beyond its inputs and results, by the number of chunks.

    python -m bench.memory_attention                          # some minutes
    python -m bench.memory_attention --ranks 4 --tokens 32768 --heads 8 --dim 64

One causal layer in fp32 with a window of 128 keys, so that it is fast: what is held depends on the window only in the
scores of 256 queries. Ranks are processes of this machine with one thread each. Of each exchange, with and without
`recompute="exchange"`, and of every number of chunks it shows MiB of the worst moment of forward and of backward on the
rank that has most: rows (what is exchanged, and what forward keeps for backward) + temporaries of attention, which do
not depend on chunks. Exit status 1 if a rank fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ulysses_triton import UlyssesGroup, ulysses_attention

from ._held import Held, watch

MIB = 1 << 20


def layer(group: UlyssesGroup, tokens: int, heads: int, kv_heads: int, dim: int, recompute: str | None) -> None:
    """Forward and backward of this rank's part: `heads` query heads on every rank."""
    shape = (1, tokens // group.size)
    q = torch.randn(*shape, heads * group.size, dim, requires_grad=True)
    k, v = (torch.randn(*shape, kv_heads, dim, requires_grad=True) for _ in range(2))
    out = ulysses_attention(q, k, v, group, causal=True, window=(127, 0), attention="reference", recompute=recompute)
    out.backward(torch.ones_like(out))


def _work(rank: int, folder: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), arguments.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=arguments.ranks)
    kv_heads = arguments.kv_heads or arguments.heads * arguments.ranks
    for exchange in arguments.exchanges:
        for recompute in (None, "exchange"):
            cells = []
            for chunks in arguments.chunks:
                with watch() as held, UlyssesGroup(exchange=exchange, chunks=chunks) as group:
                    layer(group, arguments.tokens, arguments.heads, kv_heads, arguments.dim, recompute)
                mine = [held[rank, name] for name in ("forward", "backward")]
                every: list[list[Held]] = [[] for _ in range(arguments.ranks)]
                dist.all_gather_object(every, mine)
                of_both = [[max(getattr(h[n], kind) for h in every) for kind in ("rows", "others")] for n in (0, 1)]
                cells.append(" / ".join(f"{rows / MIB:.0f} + {others / MIB:.0f}" for rows, others in of_both))
            if rank == 0:
                print(f"| {exchange} | {recompute or 'kept'} | {' | '.join(cells)} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768, help="of the whole sequence")
    parser.add_argument("--heads", type=int, default=8, help="query heads on every rank")
    parser.add_argument("--kv-heads", type=int, help="of the whole model; as many as query heads if left out")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--exchanges", nargs="+", default=["shm", "torch"])
    arguments = parser.parse_args()
    print(f"| exchange | rows | {' | '.join(f'{c} chunks' for c in arguments.chunks)} |", flush=True)
    print(f"|---|---|{'---|' * len(arguments.chunks)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (folder, arguments), nprocs=arguments.ranks)


if __name__ == "__main__":
    sys.exit(main())
