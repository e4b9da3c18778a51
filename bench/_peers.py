"""One rank of `bench.peers`: the contestants, whether they are right, what they move and keep, and their times."""

from __future__ import annotations

import gc
import importlib.util
import math
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ulysses_triton import UlyssesGroup, trace, truth, ulysses_attention
from ulysses_triton.case import Case, Inputs, Results, draw, exact, peer
from ulysses_triton.errors import OptionError

from ._measure import Timing, quantiles

EXCHANGES = ("shm", "torch")  # of ours, between CPU ranks of one host
PEERS = ("deepspeed", "yunchang")
PARTS = ("attention", "exchange")
LEAST = 3  # repeats, also of what takes longer than its budget
SMALL = 1024  # elements: control messages and statistics have fewer, every block of rows here has more
ROWS = 64  # of the sequence, whose truth is computed in fp64
TIMEOUT = timedelta(minutes=30)  # ranks wait for rank 0, which computes the truth

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Asked:
    """What every rank is told: cases in order, and at most how many repeats, in about how many seconds a table."""

    cases: tuple[Case, ...]
    parts: tuple[str, ...]
    peers: tuple[str, ...]
    repeat: int
    seconds: float


def sdpa(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """Causal attention of `[B, S, h, D]` by PyTorch's SDPA, whatever the other arguments a layer passes."""
    parts = (x.transpose(1, 2) for x in (q, k, v))
    grouped = k.size(2) < q.size(2)
    return torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=grouped).transpose(1, 2)


class _Identity(torch.autograd.Function):
    """q for the output; in backward its gradient for those of q, k and v: every exchange takes place, nothing else."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.kv_heads = k.size(2)
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dkv = dout[:, :, : ctx.kv_heads]
        return dout, dkv, dkv


def identity(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    return _Identity.apply(q, k, v)


def identity_results(case: Case, inputs: Inputs) -> Results:
    """What a layer around `identity` must give: a rank's first query heads' gradients are those of its kv heads."""
    heads, per_kv = case.heads // case.ranks, case.heads // case.kv_heads
    dkv = torch.zeros_like(inputs.k, dtype=torch.float64)
    for first in range(0, case.heads, heads):
        kv = slice(first // per_kv, (first + heads - 1) // per_kv + 1)
        dkv[:, :, kv] += inputs.dout[:, :, first : first + kv.stop - kv.start]
    return {"out": inputs.q, "dq": inputs.dout, "dk": dkv, "dv": dkv}


class Contestant(NamedTuple):
    """A layer under test: q, k, v of this rank's tokens to the output, `[B, L, H, D]`, or `[L, B, H, D]`."""

    name: str
    layer: Callable[[Tensor, Tensor, Tensor], Tensor]
    tokens_first: bool = False
    group: UlyssesGroup | None = None  # of ours

    def run(self, leaves: Sequence[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
        """out, dq, dk, dv."""
        out = self.layer(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    def given(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous tensors in the layout that it is made for."""
        return [(x.transpose(0, 1) if self.tokens_first else x).contiguous() for x in shards]


def groups() -> tuple[dict[str, UlyssesGroup], str]:
    """A group for each exchange that there is on this machine, and the name of the default's."""
    with UlyssesGroup() as group:
        default = group.exchange.name
    found = {}
    for name in EXCHANGES:
        try:
            found[name] = UlyssesGroup(exchange=name)
        except OptionError:  # on every rank alike
            continue
    return found, default


def contestants(part: str, mine: dict[str, UlyssesGroup], peers: Sequence[str]) -> list[Contestant]:
    """Ours over every exchange, with PyTorch's kernel as we call it and with the callable of the peers; the peers."""
    attend = sdpa if part == "attention" else identity
    found = []
    for name, group in mine.items():
        if part == "attention":
            found.append(Contestant(f"ours {name}", _ours(group, "aten"), group=group))
        found.append(Contestant(f"ours {name}, {attend.__name__}", _ours(group, attend), group=group))
    builders = {"deepspeed": _deepspeed, "yunchang": _yunchang}
    return found + [builders[name](attend) for name in peers]


def _ours(group: UlyssesGroup, attend: str | Attention) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: ulysses_attention(q, k, v, group, causal=True, attention=attend)  # type: ignore[return-value]


def _deepspeed(attend: Attention) -> Contestant:
    import deepspeed.comm
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles C++ for reductions, not used here
    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
    from deepspeed.sequence.layer import DistributedAttention

    def local(*qkv: Tensor) -> Tensor:  # [S, B, h, D]
        return attend(*(x.transpose(0, 1) for x in qkv)).transpose(0, 1)

    layer = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=0)
    return Contestant("deepspeed", lambda q, k, v: layer(q, k, v, 1), tokens_first=True)


def _yunchang(attend: Attention) -> Contestant:
    from yunchang.kernels import AttnType
    from yunchang.ulysses.attn_layer import UlyssesAttention

    layer = UlyssesAttention(dist.group.WORLD, attn_type=AttnType.TORCH_FLASH)
    layer.attn_fn = attend
    return Contestant("yunchang", lambda q, k, v: layer(q, k, v, causal=True))


def missing(peers: Sequence[str]) -> list[str]:
    return [name for name in peers if importlib.util.find_spec(name) is None]


# ---- costs


@dataclass
class Costs:
    """What one forward and backward moved and kept on this rank; a copy is into memory that a tensor has here."""

    collectives: int = 0  # of the data: all-to-alls, or hops of a one-sided exchange
    wire_bytes: int = 0  # sent to other ranks
    control_messages: int = 0
    copies: int = 0
    copied_bytes: int = 0
    saved_bytes: int = 0  # for backward, beside the inputs
    _saved: dict[int, int] = field(default_factory=dict, repr=False)

    @contextmanager
    def counted(self, contestant: Contestant, leaves: Sequence[Tensor]) -> Iterator[None]:
        group, inputs = contestant.group, {x.untyped_storage().data_ptr() for x in leaves}
        before = group.counts["control"] if group else 0
        with self._collectives(group), saved_tensors_hooks(self._save, lambda x: x), _quiet():
            with torch.autograd.profiler.profile(record_shapes=True) as profile:
                yield
        events = [e for e in profile.function_events if e.name in ("aten::copy_", "aten::cat")]
        copies = [n for e in events if (n := math.prod(e.input_shapes[0])) >= SMALL]
        self.copies, self.copied_bytes = len(copies), sum(copies) * leaves[0].itemsize
        self.control_messages = group.counts["control"] - before if group else 0
        self.saved_bytes = sum(size for at, size in self._saved.items() if at not in inputs)

    def _save(self, x: Tensor) -> Tensor:
        self._saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    @contextmanager
    def _collectives(self, group: UlyssesGroup | None) -> Iterator[None]:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        carry = dist.all_to_all_single

        def counting(
            output: Tensor, input: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None, **more: Any
        ) -> Any:
            own = input_split_sizes[rank] * input[0].numel() if input_split_sizes else input.numel() // ranks
            self.collectives += 1
            self.wire_bytes += (input.numel() - own) * input.itemsize
            return carry(output, input, output_split_sizes, input_split_sizes, **more)

        if group is None or not group.exchange.one_sided:
            with mock.patch.object(dist, "all_to_all_single", counting):
                yield
        else:  # what ranks write into each other's memory, no collective shows
            with trace() as t:
                yield
            self.collectives = sum(e.stream == "exchange" for e in t.events)
            self.wire_bytes = t.sent()

    def record(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that the profiler's C++ writes to stderr as it begins and ends."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# ---- checks


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


def gathered(case: Case, results: Sequence[Tensor]) -> Results | None:
    """All ranks' results as one, on rank 0."""
    whole = {}
    for name, mine in zip(("out", "dq", "dk", "dv"), results, strict=True):
        mine = mine.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in range(case.ranks)] if dist.get_rank() == 0 else None
        dist.gather(mine, parts)
        if parts is not None:
            whole[name] = torch.cat(parts, 1)
    return whole or None


def tried(case: Case, part: str, contestant: Contestant, inputs: Inputs) -> tuple[dict[str, Any], float]:
    """The record of a contestant before it is timed: what it cannot do, or whether it is right and what it costs.

    Also the seconds that it took. On rank 0 it is whole; elsewhere its `ok` is.
    """
    mine = case.shard(dist.get_rank())
    leaves = [x.requires_grad_() for x in contestant.given([x[:, mine].detach() for x in inputs[:3]])]
    (dout,) = contestant.given([inputs.dout[:, mine]])
    costs, failure, results, begin = Costs(), "", (), time.perf_counter()
    try:
        with costs.counted(contestant, leaves):
            results = contestant.run(leaves, dout)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - begin
    failures: list[Any] = [None] * case.ranks
    dist.all_gather_object(failures, failure)
    if any(failures):
        return {"ok": False, "cannot": next(filter(None, failures))[:500]}, seconds
    order = [x.transpose(0, 1) if contestant.tokens_first else x for x in results]
    whole = gathered(case, order)
    record: dict[str, Any] = {}
    if whole is not None:
        errors = check(case, part, inputs, whole)
        record = {"ok": all(e["ok"] for e in errors.values()), "errors": errors, **costs.record()}
    said = [record.get("ok")]
    dist.broadcast_object_list(said)
    return record | {"ok": said[0]}, seconds


# ---- times


def times(runs: dict[str, Callable[[], object]], repeat: int, seconds: float, took: float) -> dict[str, Timing]:
    """All in turn, again and again, beginning with another each time; of every repeat the slowest rank's time."""
    names, limit = list(runs), torch.tensor([took])
    dist.all_reduce(limit, dist.ReduceOp.MAX)
    repeats = min(repeat, max(LEAST, int(seconds / max(limit.item(), 1e-6))))
    found = torch.zeros(len(runs), repeats, dtype=torch.float64)
    gc.collect()
    for i in range(-1 if repeats > LEAST else 0, repeats):  # the first one warms up; what is slow has run once already
        for j in range(len(names)):
            number = (i + j) % len(names)
            dist.barrier()
            begin = time.perf_counter()
            runs[names[number]]()
            if i >= 0:
                found[number, i] = (time.perf_counter() - begin) * 1e3
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return {name: quantiles(row) for name, row in zip(names, found.tolist(), strict=True)}


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
    inputs = draw(case, torch.device("cpu"))
    some = inputs.zero_but(checked_rows(case)) if part == "attention" else inputs
    records, right, took = [], [], 0.0
    for contestant in field:
        record, seconds = tried(case, part, contestant, some)
        about = {"part": part, "case": str(case), "contestant": contestant.name, "ours": contestant.group is not None}
        about |= {key: getattr(case, key) for key in ("tokens", "ranks", "heads", "kv_heads", "head_dim", "dtype")}
        if contestant.group is not None:
            about |= {"exchange": contestant.group.exchange.name, "default": contestant.group.exchange.name == default}
        records.append(about | record)
        if record["ok"]:
            right.append(contestant)
            took += seconds
    mine = case.shard(dist.get_rank())
    shards = [x[:, mine].clone() for x in (*inputs[:3], inputs.dout)]
    del inputs, some
    runs = {}
    for contestant in right:
        *leaves, dout = contestant.given(shards)
        leaves = [x.detach().requires_grad_() for x in leaves]
        runs[contestant.name] = lambda c=contestant, x=leaves, d=dout: c.run(x, d)
    others = Others()
    found = times(runs, asked.repeat, asked.seconds, took) if runs else {}
    busy = others.cores()
    for record in records:
        if record["contestant"] in found:
            record |= {"ms": found[record["contestant"]]._asdict(), "others_cores": busy}
    return records


def serve(rank: int, port: int, asked: Asked, pipe: Connection) -> None:
    """What a rank's process does: send the records of every case and part (rank 0), then None; or why it failed."""
    ranks = asked.cases[0].ranks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
        mine, default = groups()
        fields = {part: contestants(part, mine, asked.peers) for part in asked.parts}
        for case in asked.cases:
            for part, competing in fields.items():
                records = measured(case, part, competing, default, asked)
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


def variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """A rank's environment: DeepSpeed reads who it is from there, and OpenMP how many threads."""
    return {
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
