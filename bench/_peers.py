"""One rank of `bench.peers`: which contestants are right, what they move and keep, and their times."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_triton import truth
from ulysses_triton.case import Case, Inputs, Results, draw, exact, peer

from ._contestants import Contestant, contestants, groups
from ._costs import Costs
from ._measure import Timing, quantiles

LEAST = 3  # repeats, but of what is very slow
ROWS = 64  # of the sequence, whose truth is computed in fp64
TIMEOUT = timedelta(minutes=30)  # ranks wait for rank 0, which computes the truth


@dataclass(frozen=True)
class Asked:
    """What every rank is told: (part, case) in order, at most how many repeats, in about how many seconds a table."""

    tables: tuple[tuple[str, Case], ...]
    peers: tuple[str, ...]
    repeat: int
    seconds: float
    device: str = "cpu"

    @property
    def ranks(self) -> int:
        return self.tables[0][1].ranks


# ---- checks


def identity_results(case: Case, inputs: Inputs) -> Results:
    """What a layer around `identity` must give: a rank's first query heads' gradients are those of its kv heads."""
    heads, per_kv = case.heads // case.ranks, case.heads // case.kv_heads
    dkv = torch.zeros_like(inputs.k, dtype=torch.float64)
    for first in range(0, case.heads, heads):
        kv = slice(first // per_kv, (first + heads - 1) // per_kv + 1)
        dkv[:, :, kv] += inputs.dout[:, :, first : first + kv.stop - kv.start]
    return {"out": inputs.q, "dq": inputs.dout, "dk": dkv, "dv": dkv}


def check(case: Case, part: str, inputs: Inputs, results: Results) -> dict[str, dict[str, Any]]:
    """The errors of the whole sequence's results: attention's against fp64 in some rows, where alone dout is not 0."""
    found = {}
    if part == "exchange":
        for name, want in identity_results(case, inputs).items():
            limit = 0.0 if name in ("out", "dq") else truth.allowed(case.torch_dtype, 0.0)
            found[name] = (truth.relative_error(results[name], want), limit)
    else:
        rows = checked_rows(case)
        expected = exact(case, inputs, rows)
        low = peer(case, inputs) if case.dtype in ("bf16", "fp16") else {}
        for name, want in expected.items():
            by_row = name in ("out", "dq")
            got, theirs = (x if x is None or not by_row else x[:, rows] for x in (results[name], low.get(name)))
            reached = 0.0 if theirs is None else truth.relative_error(theirs, want)
            found[name] = (truth.relative_error(got, want), truth.allowed(case.torch_dtype, reached))
        elsewhere = torch.ones(case.tokens, dtype=torch.bool).index_fill_(0, rows, False)
        found["dq elsewhere"] = (float(results["dq"][:, elsewhere].abs().amax()) if elsewhere.any() else 0.0, 0.0)
        found["out elsewhere"] = (float(results["out"].isfinite().logical_not().sum()), 0.0)
    return {name: {"error": e, "allowed": limit, "ok": e <= limit} for name, (e, limit) in found.items()}


def checked_rows(case: Case) -> Tensor:
    """Some positions, in ascending order, of every shard and in no step that an exchange has."""
    random = torch.Generator().manual_seed(case.seed)
    return torch.randperm(case.tokens, generator=random)[: max(ROWS, case.ranks)].sort().values


def gathered(case: Case, contestant: Contestant, results: Sequence[Tensor]) -> Results | None:
    """All ranks' results as one, [B, S, H, D] in the order of the sequence, on rank 0."""
    order, whole = contestant.order(case.tokens), {}
    for name, mine in zip(("out", "dq", "dk", "dv"), results, strict=True):
        mine = mine.transpose(0, 1) if contestant.tokens_first else mine
        mine = mine.detach().cpu().contiguous()
        parts = [torch.empty_like(mine) for _ in range(case.ranks)] if dist.get_rank() == 0 else None
        dist.gather(mine, parts)
        if parts is not None:
            dealt = torch.cat(parts, 1)
            whole[name] = torch.empty_like(dealt).index_copy_(1, order, dealt)
    return whole or None


def shards(case: Case, contestant: Contestant, inputs: Inputs, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """q, k and v of this rank, and dout, as a contestant takes them."""
    mine = contestant.order(case.tokens)[case.shard(dist.get_rank())]
    *leaves, dout = contestant.given([x[:, mine].to(device) for x in (*inputs[:3], inputs.dout)])
    return [x.detach().requires_grad_() for x in leaves], dout.detach()


def warm_up(case: Case, contestant: Contestant, device: torch.device) -> None:
    """A layer of a few tokens: what is imported, compiled or set up once is no cost of the one that is counted."""
    few = replace(case, tokens=16 * case.ranks)
    contestant.run(*shards(few, contestant, draw(few, torch.device("cpu")), device))


def tried(
    case: Case, part: str, contestant: Contestant, inputs: Inputs, device: torch.device
) -> tuple[dict[str, Any], float]:
    """The record of a contestant before it is timed: what it cannot do, or whether it is right and what it costs.

    Also the seconds that it took. On rank 0 it is whole; elsewhere its `ok` is.
    """
    costs, failure, results, begin = Costs(), "", (), time.perf_counter()
    try:
        leaves, dout = shards(case, contestant, inputs, device)
        warm_up(case, contestant, device)
        first = Costs()
        if part == "scaling" and contestant.group is not None and contestant.group.exchange.one_sided:
            # It maps its peers' buffers once, which PyTorch reports as if they were allocated here.
            with first.counted(contestant.group, leaves):
                contestant.run(leaves, dout)
        begin = time.perf_counter()
        with costs.counted(contestant.group, leaves):
            results = contestant.run(leaves, dout)
        costs.rss_bytes = max(filter(None, (first.rss_bytes, costs.rss_bytes)), default=costs.rss_bytes)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - begin
    failures: list[Any] = [None] * case.ranks
    dist.all_gather_object(failures, failure)
    if any(failures):
        return {"ok": False, "cannot": next(filter(None, failures))[:500]}, seconds
    whole = gathered(case, contestant, results)
    record: dict[str, Any] = {}
    if whole is not None:
        errors = check(case, part, inputs, whole)
        formula = contestant.formula(case) if contestant.formula else None
        record = {"errors": errors, "formula_bytes": formula, **costs.record()}
        if part != "scaling":  # where what ran before may have left buffers to be used again
            record |= {"live_bytes": None, "rss_bytes": None}
        record["ok"] = all(e["ok"] for e in errors.values())
    said = [record.get("ok")]
    dist.broadcast_object_list(said)
    return record | {"ok": said[0]}, seconds


# ---- times


def times(
    runs: dict[str, Callable[[], object]], repeat: int, seconds: float, took: dict[str, float]
) -> dict[str, Timing]:
    """By turns, in another order each time, drawn alike on all ranks; of every repeat the slowest rank's time.

    So a call follows any other's as often, and meets memory and caches as these left them, as a layer does in a model.
    All have about the same share of `seconds`: the slow ones have fewer turns, three at least, and one if a call takes
    more than three times the share.
    """
    names = list(runs)
    share = seconds / max(len(names), 1)

    def one(name: str) -> float:
        dist.barrier()
        _settled()
        begin = time.perf_counter()
        runs[name]()
        _settled()
        return time.perf_counter() - begin

    gc.collect()
    likely = _slowest([took[name] for name in names])  # these were counted meanwhile, which takes time
    likely = _slowest([t if t > share else one(name) for name, t in zip(names, likely, strict=True)])
    turns = {
        name: min(repeat, max(LEAST if t <= 3 * share else 1, int(share / max(t, 1e-6))))
        for name, t in zip(names, likely, strict=True)
    }
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(max(turns.values(), default=0)):
        left = [name for name in names if i < turns[name]]
        for name in random.Random(i).sample(left, len(left)):
            found[name].append(one(name))
    return {name: quantiles([t * 1e3 for t in _slowest(row)]) for name, row in found.items()}


def _slowest(seconds: Sequence[float]) -> list[float]:
    """The longest that any rank took, of each."""
    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.tolist()


def _settled() -> None:
    """What was launched on a GPU has been done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Others:
    """How many cores processes other than the ranks kept busy since this was made."""

    def __init__(self) -> None:
        self.since = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: of the clock, of all processors' work, of this process."""
        user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
        return time.perf_counter(), (user + nice + system) / os.sysconf("SC_CLK_TCK"), time.process_time()

    def cores(self) -> float:
        clock, work, own = (b - a for a, b in zip(self.since, self._now(), strict=True))
        total = torch.tensor([own], dtype=torch.float64)
        dist.all_reduce(total)
        return max(0.0, (work - total.item()) / clock)


def measured(case: Case, part: str, field: Sequence[Contestant], default: str, asked: Asked) -> list[dict[str, Any]]:
    """The records of all contestants for one case, on rank 0."""
    device = torch.device(asked.device, dist.get_rank() if asked.device == "cuda" else None)
    inputs = draw(case, torch.device("cpu"))
    some = inputs.zero_but(checked_rows(case)) if part != "exchange" else inputs
    records, right, took = [], [], {}
    for contestant in field:
        record, seconds = tried(case, part, contestant, some, device)
        about = {"part": part, "case": str(case), "device": asked.device, "contestant": contestant.name}
        about |= {"kind": contestant.kind, "ours": contestant.kind == "ours"}
        about |= {key: getattr(case, key) for key in ("tokens", "ranks", "heads", "kv_heads", "head_dim", "dtype")}
        if contestant.group is not None:
            about |= {"exchange": contestant.group.exchange.name, "default": contestant.group.exchange.name == default}
        records.append(about | record)
        if record["ok"]:
            right.append(contestant)
            took[contestant.name] = seconds
    runs: dict[str, Callable[[], object]] = {}
    for contestant in right:
        leaves, dout = shards(case, contestant, inputs, device)
        runs[contestant.name] = lambda c=contestant, x=leaves, d=dout: c.run(x, d)
    del inputs, some
    others = Others()
    found = times(runs, asked.repeat, asked.seconds, took) if runs else {}
    busy = others.cores()
    for record in records:
        if record["contestant"] in found:
            record |= {"ms": found[record["contestant"]]._asdict(), "others_cores": busy}
    return records


def serve(rank: int, port: int, asked: Asked, pipe: Connection) -> None:
    """What a rank's process does: send the records of every table (rank 0), then None; or why it failed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        backend = "gloo"
        if asked.device == "cuda":
            torch.cuda.set_device(rank)
            backend = "cpu:gloo,cuda:nccl"  # what ranks tell each other about results is on CPUs
        dist.init_process_group(backend, store=store, rank=rank, world_size=asked.ranks, timeout=TIMEOUT)
        mine, default = groups(asked.device)
        parts = dict.fromkeys(part for part, _ in asked.tables)
        fields = {part: contestants(part, mine, asked.peers, asked.device) for part in parts}
        for part, case in asked.tables:
            records = measured(case, part, fields[part], default, asked)
            if rank == 0:
                pipe.send(records)
        for group in mine.values():
            group.close()
        dist.barrier()
        pipe.send(None)
    except BaseException:
        pipe.send(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # gloo's threads sometimes abort in an orderly end


def _end_with_parent() -> None:
    """A parent that was killed ends nothing itself, and ranks would wait for each other for long."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def variables(rank: int, ranks: int, port: int, device: str = "cpu") -> dict[str, str]:
    """A rank's environment: DeepSpeed reads who it is from there, and OpenMP how many threads."""
    return {
        "DS_ACCELERATOR": device,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
