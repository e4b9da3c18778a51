"""Which exchange a process group gets, and what carries its control messages: the same answer on every rank."""

from __future__ import annotations

import sys
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from . import cost
from .errors import GroupError, OptionError
from .exchange import nccl_library, symm
from .exchange.base import Control, Exchange
from .exchange.nccl import NcclExchange
from .exchange.one_sided import OneSidedExchange
from .exchange.pool import Pool
from .exchange.store import meeting_point, share
from .exchange.torch_dist import GlooControl, TorchExchange
from .exchange.two_hop import TwoHopExchange
from .nodes import Nodes

if TYPE_CHECKING:
    from .exchange.shm import Shm


def carriers_of(
    exchange: str, check: str, group: dist.ProcessGroup, timeout: timedelta, nodes: Nodes | None = None
) -> tuple[Control, Exchange, Pool, str]:
    """What carries the control messages of a process group and its rows, where its buffers come from, and why.

    The same on every rank: what a rank finds out by itself, all ranks hear before they choose. `check` is that of the
    group: ranks that compare otherwise would send each other messages of other lengths. `nodes`: of a 2-D mesh.
    """
    store = meeting_point(group)
    for name, own in (("exchange", exchange), ("check", check)):
        asked = share(store, name, group, own, timeout)
        if len(set(asked)) > 1:
            raise OptionError(f"the ranks ask for different {name}=: {asked} in rank order; it must be one for all")
    why, devices = f"{exchange}: any process group can carry it", devices_of(group)
    if exchange == "shm" or (exchange == "auto" and devices == {"cpu"}):
        found = _shared_memory(group, store, timeout)
        if not isinstance(found, str):
            return found, OneSidedExchange("shm", found), found.pool, f"{exchange}: the ranks share this host's memory"
        if exchange == "shm":
            raise GroupError(
                f'exchange="shm" cannot carry group {group.group_name!r}: {found}. It needs all ranks to be processes '
                'of one Linux host, container and user; exchange="torch" needs nothing of that'
            )
        why = f"{why}; not shm: {found}"
    if exchange == "symm":
        control = GlooControl(group, timeout)
        symmetric = symm.meet(group, store, control, timeout)
        if not isinstance(symmetric, str):
            return control, symm.SymmetricExchange(symmetric), symmetric.pool, "symm: the GPUs write into each other"
        control.close()
        raise GroupError(
            f'exchange="symm" cannot carry group {group.group_name!r}: {symmetric}. It needs a CUDA GPU per rank, all '
            'on one host with peer access (NVLink); exchange="nccl" or "torch" needs nothing of that'
        )
    pool = Pool()
    control, over_group = GlooControl(group, timeout), TorchExchange(group, pool, timeout)
    if nodes is not None and exchange in ("auto", "two_hop"):
        news = partial(_failed, control)
        inner, outer = (TorchExchange(part, pool, timeout, news) for part in (nodes.inner, nodes.outer))
        two_hop = TwoHopExchange(control.rank, nodes.count, nodes.each, inner, outer)
        if exchange == "two_hop":
            return control, two_hop, pool, "two_hop: inside the nodes, then between them"
        below, reason = _two_hops_below(nodes, group, store, timeout)
        if below is not None:
            two_hop.take_one_hop(over_group, below)
            return control, two_hop, pool, f"auto: {reason}"
        why = f"{why}; not two_hop: {reason}"
    if exchange == "nccl" or (exchange == "auto" and "cuda" in devices):
        nccl, why_not = nccl_library.usable(control)
        if nccl is not None:
            why = f"{exchange}: cupy's NCCL for CUDA tensors, the process group for others"
            return control, NcclExchange(nccl, control, pool, timeout, host=over_group), pool, why
        if exchange == "nccl":
            raise GroupError(why_not)
        why = f"{why}; not nccl, as of {why_not}"
    return control, over_group, pool, why


def _two_hops_below(
    nodes: Nodes, group: dist.ProcessGroup, store: dist.Store, timeout: timedelta
) -> tuple[float | None, str]:
    """Bytes of a block below which two hops are predicted to be faster, None where it is not known; and why."""
    if nodes.count == 1 or nodes.each == 1:
        return None, "the mesh is one node" if nodes.count == 1 else "there is one rank on each node"
    if "cuda" not in devices_of(group):
        return None, "the cost model has no figures of a network between CPUs"
    names = set(share(store, "gpu", group, torch.cuda.get_device_name(), timeout))
    below = cost.two_hops_below(names.pop()) if len(names) == 1 else None
    if below is None:
        return None, "the cost model has no figures of these GPUs"
    return below, f"two hops below {below / 1e6:.2g} MB from a rank to another, as predicted, else one over the group"


def _failed(control: Control) -> str | None:
    """Which ranks left a last word, if any."""
    words = control.hear(0.0)
    return f"ranks {sorted(words)} failed" if words else None


def _shared_memory(group: dist.ProcessGroup, store: dist.Store, timeout: timedelta) -> Shm | str:
    """The exchange over shared memory, or why there is none."""
    if sys.platform != "linux":
        return f"this is {sys.platform}, not Linux"
    from .exchange.shm import meet  # uses what only Linux has

    return meet(group, store, timeout)


def devices_of(group: dist.ProcessGroup) -> frozenset[str]:
    """The device types whose tensors the group carries."""
    config = dist.distributed_c10d._world.pg_backend_config.get(group, "")
    pairs = [pair.split(":") for pair in str(config).split(",") if ":" in pair]
    found = {device for device, backend in pairs if not (backend == "gloo" and device == "cuda")}
    return frozenset(found or {"cpu" if dist.get_backend(group) == "gloo" else "cuda"})
