"""What one forward and backward of a contestant moves, keeps and needs on this rank."""

from __future__ import annotations

import ctypes
import gc
import inspect
import math
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ulysses_triton import UlyssesGroup, trace

SMALL = 1024  # elements: control messages and statistics have fewer, every block of rows here has more
BYTES_SENT = 200  # where Linux has `tcpi_bytes_sent` in its struct tcp_info, 8 bytes


@dataclass
class Costs:
    """Counted in one run; a copy is into memory that a tensor has here, a None could not be measured."""

    collectives: int | None = 0  # of the data: calls of torch.distributed, or hops of a one-sided exchange
    wire_bytes: int | None = 0  # sent to other ranks, by the sizes of what is handed over
    socket_bytes: int | None = None  # sent by this process's TCP sockets, with headers
    control_messages: int = 0
    copies: int = 0
    copied_bytes: int = 0
    saved_bytes: int = 0  # for backward, beside the inputs
    live_bytes: int = 0  # the most that tensors and a group's buffers had at a time, beside the inputs
    rss_bytes: int | None = None  # the most by which resident memory grew
    _saved: dict[int, int] = field(default_factory=dict, repr=False)

    @contextmanager
    def counted(self, group: UlyssesGroup | None, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Count what the block does. `group`: of ours."""
        inputs = {x.untyped_storage().data_ptr() for x in leaves}
        before = group.counts["control"] if group else 0
        with self._collectives(group), saved_tensors_hooks(self._save, lambda x: x), self._memory(group, leaves[0]):
            with _quiet(), torch.autograd.profiler.profile(record_shapes=True, profile_memory=True) as profile:
                yield
        events = [e for e in profile.function_events if e.name in ("aten::copy_", "aten::cat")]
        copies = [n for e in events if (n := math.prod(e.input_shapes[0])) >= SMALL]
        self.copies, self.copied_bytes = len(copies), sum(copies) * leaves[0].itemsize
        self.control_messages = group.counts["control"] - before if group else 0
        self.saved_bytes = sum(size for at, size in self._saved.items() if at not in inputs)
        if not leaves[0].is_cuda:
            self.live_bytes += _most_live(profile)

    def _save(self, x: Tensor) -> Tensor:
        self._saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    @contextmanager
    def _collectives(self, group: UlyssesGroup | None) -> Iterator[None]:
        if group is None or not group.exchange.one_sided:
            with ExitStack() as patched:
                for name, sent in SENT.items():
                    patched.enter_context(mock.patch.object(dist, name, self._counting(getattr(dist, name), sent)))
                yield
            if group is None and not self.collectives and dist.get_world_size() > 1:  # by a way that is not patched
                self.collectives = self.wire_bytes = None
        else:  # what ranks write into each other's memory, no collective shows
            with trace() as t:
                yield
            self.collectives = sum(e.stream == "exchange" for e in t.events)
            self.wire_bytes = t.sent()

    def _counting(self, carry: Callable[..., Any], sent: Callable[..., int]) -> Callable[..., Any]:
        signature = inspect.signature(carry)

        def counting(*args: Any, **more: Any) -> Any:
            given = signature.bind(*args, **more).arguments
            if size := sent(given, dist.get_world_size(given.get("group"))):
                self.collectives = (self.collectives or 0) + 1
                self.wire_bytes = (self.wire_bytes or 0) + size
            return carry(*args, **more)

        return counting

    @contextmanager
    def _memory(self, group: UlyssesGroup | None, leaf: Tensor) -> Iterator[None]:
        """The growth of what this process has; of tensors on CPUs the profiler knows."""
        if leaf.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            yield
            torch.cuda.synchronize()
            self.live_bytes = torch.cuda.max_memory_allocated() - held
            return
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or blocks that earlier runs freed would be taken without growth
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory begins anew
        resident, sent = _status("VmRSS"), bytes_sent()
        yield
        self.socket_bytes = bytes_sent() - sent
        self.rss_bytes = max(0, _status("VmHWM") - resident)
        self.live_bytes = group.pool.held + group.pool.free if group else 0  # the profiler does not know of these

    def record(self) -> dict[str, int | None]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


# ---- what a call of torch.distributed sends, by its arguments and the ranks of its group; 0 for control messages


def _all_to_all(given: dict[str, Any], ranks: int) -> int:
    x, splits = given["input"], given.get("input_split_sizes")
    if splits:
        own = splits[dist.get_rank(given.get("group"))] * x[0].numel()
    else:
        own = x.numel() // ranks
    return (x.numel() - own) * x.itemsize


def _all_gather(given: dict[str, Any], ranks: int) -> int:
    return _size(given["tensor"]) * (ranks - 1)


def _reduce_scatter(given: dict[str, Any], ranks: int) -> int:
    return _size(given["output"]) * (ranks - 1)


def _all_reduce(given: dict[str, Any], ranks: int) -> int:
    return 2 * _size(given["tensor"]) * (ranks - 1) // ranks


def _hops(given: dict[str, Any], ranks: int) -> int:
    return sum(_size(op.tensor) for op in given["p2p_op_list"] if op.op is dist.isend)


def _size(x: Tensor) -> int:
    return x.nbytes if x.numel() >= SMALL else 0


SENT: dict[str, Callable[[dict[str, Any], int], int]] = {
    "all_to_all_single": _all_to_all,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
    "batch_isend_irecv": _hops,
}


# ---- what the system knows


def bytes_sent() -> int:
    """By the TCP sockets that this process has open: the meeting point's, and gloo's to the other ranks."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(link).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                    info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, BYTES_SENT)[0]
        except OSError:  # closed meanwhile
            continue
    return total


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _most_live(profile: torch.autograd.profiler.profile) -> int:
    """Bytes that tensors on the CPU had at a time above those at the beginning, at most."""
    results = profile.kineto_results
    assert results is not None
    live = most = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"):
        live += size
        most = max(most, live)
    return most


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
