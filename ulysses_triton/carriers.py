"""Which exchange a process group gets, and what carries its control messages: the same answer on every rank."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from .errors import GroupError, OptionError
from .exchange import nccl_library, symm
from .exchange.base import Control, Exchange
from .exchange.nccl import NcclExchange
from .exchange.one_sided import OneSidedExchange
from .exchange.pool import Pool
from .exchange.store import meeting_point, share
from .exchange.torch_dist import GlooControl, TorchExchange

if TYPE_CHECKING:
    from .exchange.shm import Shm


def carriers_of(
    exchange: str, check: str, group: dist.ProcessGroup, timeout: timedelta
) -> tuple[Control, Exchange, Pool, str]:
    """What carries the control messages of a process group and its rows, where its buffers come from, and why.

    The same on every rank: what a rank finds out by itself, all ranks hear before they choose. `check` is that of the
    group: ranks that compare otherwise would send each other messages of other lengths.
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
    if exchange == "nccl" or (exchange == "auto" and "cuda" in devices):
        nccl, why_not = nccl_library.usable(control)
        if nccl is not None:
            why = f"{exchange}: cupy's NCCL for CUDA tensors, the process group for others"
            return control, NcclExchange(nccl, control, pool, timeout, host=over_group), pool, why
        if exchange == "nccl":
            raise GroupError(why_not)
        why = f"{why}; not nccl, as of {why_not}"
    return control, over_group, pool, why


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
