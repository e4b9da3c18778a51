"""In how many chunks a layer goes fastest: all ranks run it in 1, 2 and 4 over their exchange, and time it.

Each number is held against fp64 first. A time is that of the slowest rank of each repeat, so all ranks find the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from . import chunk_cache, tuner, verify
from .case import DTYPES, Case, Layer, draw
from .chunk_cache import Entry, Key
from .group import UlyssesGroup
from .kernels import _cache
from .machine import Machine
from .placement import chunk_count

CANDIDATES = (1, 2, 4)
WORTH = 1.02  # more chunks take more launches and memory: by less than 2 % they do not win
_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


def keys_of(
    exchange: str, ranks: int, heads: tuple[int, int], dims: Sequence[tuple[int, int]], dtypes: Sequence[str],
    seqs: Sequence[int], flags: Sequence[tuple[str, ...]],
) -> list[Key]:  # fmt: skip
    """Every layer to time: with and without backward."""
    one_host = ranks <= int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return [
        Key(exchange, ranks, one_host, *heads, of, dtype, causal, backward, _cache.bucket(seq))
        for dtype in dtypes
        for of in dims
        for causal in sorted({"causal" in on for on in flags}, reverse=True)
        for seq in sorted(set(map(_cache.bucket, seqs)))
        for backward in (False, True)
    ]


def case_of(key: Key, tokens: int) -> Case:
    """The layer of a key, over so many tokens."""
    return Case(
        tokens=tokens, heads=key.heads, kv_heads=key.kv_heads, head_dim=key.dims[0], value_dim=key.dims[1],
        dtype=_NAMES[key.dtype], causal=key.causal, attention="triton", ranks=key.ranks,
    )  # fmt: skip


def fastest(key: Key, machine: Machine, exchange: str, repeats: int) -> Entry:
    """The entry of a key. Every rank of the default group calls it, and gets the same."""
    case, gate = case_of(key, key.seq), case_of(key, machine.gate_tokens[0])
    problem = case.problem(machine.device.type)
    inputs, gate_inputs = draw(case, machine.device), draw(gate, machine.device)
    ms: dict[int, float] = {}
    for chunks in CANDIDATES:
        if chunk_count(problem, chunks) < chunks:
            break  # there are too few heads
        with UlyssesGroup(exchange=exchange, chunks=chunks) as group:
            rows = verify.sampled(gate, machine.device, gate.tokens)
            found = verify.compare(gate, group.rank, Layer(gate, gate_inputs, group).results(), gate_inputs, rows)
            if not all(row.ok for row in found):
                raise RuntimeError(f"{named(key)} is wrong in {chunks} chunks: {found}")
            ms[chunks] = milliseconds(Layer(case, inputs, group), key.backward, repeats)
    best = min(chunks for chunks, time in ms.items() if time <= WORTH * min(ms.values()))
    times = {str(chunks): time for chunks, time in ms.items()}
    return {**key._asdict(), "chunks": best, "ms": times, "source": chunk_cache.source()}


def write(path: Path, gpu: str, entries: Sequence[Entry]) -> None:
    """Add entries to a GPU's file, over those with the same keys. Processes that do so at once wait for each other."""
    with tuner.writing(path):
        found = chunk_cache.read(path) | {Key.of(entry): entry for entry in entries}
        tuner.replace(path, chunk_cache.text(gpu, found.values()))


def milliseconds(layer: Layer, backward: bool, repeats: int) -> float:
    """The median time of a layer, by the slowest rank of each repeat."""
    with torch.set_grad_enabled(backward):
        times = verify.timed(layer.forward, layer.backward if backward else lambda out: None, repeats)
    return float(f"{sum(times) if backward else times.forward:.4g}")


def named(key: Key) -> str:
    hosts = "one host" if key.one_host else "several hosts"
    what = ("causal" if key.causal else "dense") + " with backward" * key.backward
    dims = "/".join(map(str, key.dims))
    return (
        f"{key.exchange} over {key.ranks} ranks of {hosts}: {key.heads}/{key.kv_heads} heads {key.dtype} {dims} {what} "
        f"{key.seq}"
    )
