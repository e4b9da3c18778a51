"""What `ulysses-triton doctor` has the ranks do together: meet, send each other rows, and run layers against fp64.

Between two steps every rank hears through the store how the others fared, so nobody waits for one that has given up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from . import chunk_cache, cost
from .case import Case, Inputs, Layer, Results, draw
from .doctor_checks import FAIL, OK, SKIPPED, Check
from .errors import ExchangeError
from .group import UlyssesGroup
from .kernels._config import INTERPRET
from .local import choose
from .messages import Message
from .placement import chunk_count
from .shard import exchanged
from .training.launch import under_torchrun
from .verify import compare, timed

REPEATS = 5  # of each size, of which the median counts
_KIB, _MIB = 1 << 10, 1 << 20
_SIZES = {"cpu": (16 * _KIB, _MIB, 16 * _MIB), "cuda": (16 * _KIB, 16 * _MIB, 256 * _MIB)}  # bytes that a rank has
_WRONG = "do not train here: run `ulysses-triton verify` with these options, and report what it says"

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Ranks:
    """The ranks that torchrun started, or this process alone, and the store that they meet at."""

    store: dist.Store
    rank: int
    size: int
    timeout: timedelta
    gone: set[int] = field(default_factory=set)  # ranks that gave no answer once, and are asked no more

    @staticmethod
    def meet(timeout: timedelta) -> Ranks:
        """Raises RuntimeError where the store is not to be reached in time."""
        if not under_torchrun():
            return Ranks(dist.HashStore(), 0, 1, timeout)
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        return Ranks(dist.PrefixStore("ulysses-triton doctor", store), rank, size, timeout)

    def share(self, what: str, text: str) -> list[str | None]:
        """Every rank's `text` on `what`, in rank order; None of those that gave none by the deadline."""
        self._say(what, text)
        keys = {rank: f"{what} of {rank}" for rank in range(self.size) if rank not in self.gone}
        found: list[str | None] = [None] * self.size
        found[self.rank] = text
        with suppress(RuntimeError):  # the store is gone, and with it whoever held it
            with suppress(RuntimeError):  # at the deadline: who is there is asked next
                self.store.wait(list(keys.values()), self.timeout)
            for rank, key in keys.items():
                if self.store.check([key]):
                    found[rank] = self.store.get(key).decode()
        self.gone.update(rank for rank in range(self.size) if found[rank] is None)
        return found

    def together(self, what: str, work: Callable[[], _Result]) -> _Result:
        """What `work` returns. Raises ExchangeError where it failed on another rank."""
        try:
            result = work()
        except Exception as error:  # nobody is waited for: the others may be waiting for this rank elsewhere
            self._say(what, f"{type(error).__name__}: {error}")
            raise
        words = enumerate(self.share(what, ""))
        failed = [f"rank {rank}: {word or 'no answer'}" for rank, word in words if word != ""]
        if failed:
            raise ExchangeError("; ".join(failed))
        return result

    def agreed(self, fit: bool) -> bool | None:
        """Rank 0's verdict, which counts for all; None where there is none."""
        word = self.share("verdict", f"{fit}")[0]
        if self.rank == 0:
            self.share("end", "")  # its process may hold the store, which the others read
            return fit
        self._say("end", "")
        return None if word is None else word == f"{True}"

    def _say(self, what: str, text: str) -> None:
        with suppress(RuntimeError):  # the store is gone
            self.store.set(f"{what} of {self.rank}", text)


@dataclass(frozen=True)
class Stages:
    """What is done one after the other. All ranks run each of them, and go on to the next only when all have."""

    ranks: Ranks
    device: torch.device
    exchange: str

    def join(self) -> list[Check]:
        """Make the process group."""
        if self.ranks.size == 1:
            found = "one process: `torchrun --nproc-per-node N -m ulysses_triton.cli doctor` tries and measures N ranks"
            return [Check("ranks", "ranks", SKIPPED, found)]
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        store = dist.PrefixStore("process group", self.ranks.store)
        rank, size, timeout = self.ranks.rank, self.ranks.size, self.ranks.timeout
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        dist.all_reduce(torch.zeros(1, device=self.device))
        return [Check("ranks", "process group", OK, f"{backend} over {size} ranks")]

    def exchanges(self) -> list[Check]:
        """What carries rows, what else is chosen, and how fast rows travel."""
        with self._group() as group:
            found = [*_choices(group, self.device.type)]
            if group.size > 1:
                found += [check for size in _SIZES[self.device.type] for check in self._measured(group, size)]
        return found

    def cases(self) -> list[Case]:
        """What `layer` is to be tried with."""
        return _cases(self.device.type, self.ranks.size)

    def layer(self, case: Case) -> list[Check]:
        """A layer on all ranks against fp64."""
        rows = torch.arange(case.tokens, device=self.device)
        try:
            with self._group() as group:

                def run() -> tuple[Inputs, Results]:
                    inputs = draw(case, self.device)
                    return inputs, Layer(case, inputs, group).results()

                inputs, results = self.ranks.together(str(case), run)
                found = compare(case, group.rank, results, inputs, rows)
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            remedy = "see the message; `ulysses-triton verify --debug` with these options prints all of it"
            return [Check("self-test", name_of(case), FAIL, said, remedy)]
        numbers = {row.name: row.error for row in found}
        worst = max(found, key=lambda row: row.error / row.allowed)
        said = f"{', '.join(row.name for row in found)}: {worst.name} is off most, by {worst.error:.1e}"
        said = f"{said}; {worst.allowed:.1e} is allowed"
        if all(row.ok for row in found):
            return [Check("self-test", name_of(case), OK, said, numbers=numbers)]
        return [Check("self-test", name_of(case), FAIL, f"WRONG: {said}", _WRONG, numbers=numbers)]

    def _group(self) -> UlyssesGroup:
        return UlyssesGroup(exchange=self.exchange, timeout=self.ranks.timeout)

    def _measured(self, group: UlyssesGroup, size: int) -> list[Check]:
        """An all-to-all of what every rank has, `size` bytes, over the exchange and over the process group."""
        P, me = group.size, group.rank
        n = size // (4 * P)
        message = Message((n,) * P, (n,) * P, (me * n,) * P, lambda source, to: n)
        rows = torch.arange(P, device=self.device, dtype=torch.float32).add_(me * P).repeat_interleave(n)
        want = torch.arange(P, device=self.device, dtype=torch.float32).mul_(P).add_(me).repeat_interleave(n)
        came = torch.empty_like(rows)
        group.agree("doctor", f"bytes={size}")

        def over_group() -> torch.Tensor:
            dist.all_to_all_single(came, rows, group=group.process_group)
            return came

        ways = {
            group.exchange.name: lambda: exchanged(group, "doctor", message, rows.split(n)),
            "process group": over_group,
        }
        found = []
        for way, send in ways.items():
            right = torch.equal(send(), want)
            seconds = timed(send, lambda out: None, REPEATS).forward / 1e3
            sent = 4 * n * (P - 1)
            said = f"{sent / seconds / 1e9:.3g} GB/s from each rank to the others, {seconds * 1e3:.3g} ms"
            if size < _MIB:
                said = f"{seconds * 1e3:.3g} ms: the latency"
            numbers = {"bytes": float(sent), "seconds": seconds, "bytes_per_second": sent / seconds}
            name = f"{way}, {f'{size // _MIB} MiB' if size >= _MIB else f'{size // _KIB} KiB'} a rank"
            if right:
                found.append(Check("ranks", name, OK, said, numbers=numbers))
            else:
                remedy = "do not train here: find out by NCCL_DEBUG=INFO or another exchange where rows are lost"
                found.append(Check("ranks", name, FAIL, f"WRONG rows arrive; {said}", remedy, numbers=numbers))
        return found


def _choices(group: UlyssesGroup, device: str) -> list[Check]:
    """What a layer of a usual model would be given here, and why."""
    prefix = "exchange: "
    said = next(line for line in group.explain().splitlines() if line.startswith(prefix))
    found = [Check("choices", "exchange", OK, said.removeprefix(prefix))] if group.size > 1 else []
    case = Case(8192 * group.size, 1, 32, 8, 128, 128, "bf16", ranks=group.size)
    for name, asked in {"causal": case, "documents": replace(case, documents=8)}.items():
        local = choose(asked.problem(device))
        found.append(Check("choices", f"attention, {name}", OK, f"{local.name} ({local.why})"))
    return [*found, Check("choices", "chunks", OK, _chunks(case, group, device))]


def _chunks(case: Case, group: UlyssesGroup, device: str) -> str:
    if device == "cpu" or group.size == 1:
        return f"1 ({'on CPUs overlap takes from attention what it hides' if device == 'cpu' else 'one rank'})"
    problem = replace(case.problem(device), attention="triton")
    one_host = group.size <= int(os.environ.get("LOCAL_WORLD_SIZE", group.size))
    key, name = chunk_cache.key_of(problem, group.exchange.name, one_host), torch.cuda.get_device_name()
    measured = None if key is None else chunk_cache.lookup(name, key)
    machine = cost.machine_of(name, one_host)
    why = f"for {case}"
    if measured is not None:
        return f"{chunk_count(problem, measured)} (as `tune --chunks` measured it, {why})"
    if machine is None:
        return f"1 (the cost model has no figures of {name})"
    predicted = cost.best_chunks(problem, machine, one_sided=group.exchange.one_sided)
    return f"{predicted} (as the cost model predicts for {machine.name}, {why})"


def _cases(device: str, ranks: int) -> list[Case]:
    """Layers that together use every kernel and most options, small enough for seconds."""
    plain = Case(ranks=ranks)
    options: dict[str, Any] = {"window": (100, -1), "documents": 5, "sinks": True}
    if INTERPRET:
        small = replace(plain, tokens=60, heads=4, head_dim=16, value_dim=16)
        packed = replace(small, window=(9, -1), documents=4)
        return [small, replace(small, dtype="fp16"), packed]  # the interpreter multiplies raw bits of bf16
    if device == "cpu":
        small = replace(plain, tokens=515)
        packed = replace(small, **options, uneven=True)
        fused = replace(small, rope=True, qk_norm=True, softcap=20.0, alibi=True)
        return [small, replace(small, dtype="bf16"), packed, replace(packed, dtype="bf16"), fused]
    large = replace(plain, tokens=2051, head_dim=128, value_dim=128, dtype="bf16")
    every = [replace(large, head_dim=dim, value_dim=dim) for dim in (64, 128, 256)]
    packed = replace(large, **options, uneven=True)
    fused = replace(large, rope=True, qk_norm=True, softcap=20.0, alibi=True)
    return [*every, replace(plain, tokens=2051, head_dim=128, value_dim=128), packed, fused]


def name_of(case: Case) -> str:
    """A layer in a few words."""
    marks = [*case.options, *["QK-norm"] * case.qk_norm, *["RoPE"] * case.rope, *["uneven shards"] * case.uneven]
    shape = f"{case.dtype}, {case.heads}/{case.kv_heads} heads of {case.head_dim}"
    return ", ".join([shape, *marks])
