"""The resources of one sequence-parallel group on one rank, and the registry by which the op finds them.

A `UlyssesGroup` owns the exchange, the control messages and the buffers of a process group. What keeps its ranks
together is `agreement`'s.
"""

from __future__ import annotations

import atexit
import itertools
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .agreement import AgreeingRanks
from .carriers import carriers_of, devices_of
from .errors import ExchangeError, GroupError, OptionError, UlyssesError
from .exchange.base import Watched
from .exchange.one_sided import OneSidedExchange
from .exchange.pool import Pool
from .exchange.virtual import VirtualMember, VirtualWorld
from .local import Local
from .memo import Memo
from .nodes import Nodes, nodes_of
from .placement import Placement

if TYPE_CHECKING:
    from .tracing import Trace

DEFAULT_TIMEOUT = timedelta(minutes=5)
EXCHANGES = ("auto", "shm", "nccl", "symm", "torch", "two_hop")

Groupish: TypeAlias = "UlyssesGroup | dist.ProcessGroup | DeviceMesh | None"
_Result = TypeVar("_Result")


class UlyssesGroup(AgreeingRanks):
    """The ranks over which a sequence is sharded.

    Args:
        group: a `ProcessGroup`, a 1-D `DeviceMesh`, a 2-D one (nodes over a network, and the ranks of a node: the
            sequence is sharded over it row by row), or None for the default group (one rank when `torch.distributed` is
            not initialised). None is wrong for jobs that also have data-parallel ranks: every rank of the default
            group would hold a part of one sequence.
        exchange: who carries the rows: "shm" (every rank writes into the others' memory; CPU tensors, ranks that are
            processes of one Linux host), "nccl" (a communicator of its own, through cupy; rows on the CPU still go over
            the group), "symm" (as "shm", between GPUs of one NVLink domain, over PyTorch's symmetric memory; not yet
            run on a GPU), "torch" (`all_to_all_single` on the group), "two_hop" (a 2-D mesh only: all-to-alls on its
            groups, inside the nodes and then between them, for fewer messages over the network), or "auto": "shm" for a
            gloo group whose ranks find that they can; for GPUs in a 2-D mesh "two_hop" where the cost model predicts it
            to be faster; "nccl" for CUDA where they have it, otherwise "torch". The same on every rank.
        chunks: in how many parts a rank's heads go, so that the exchange of one hides behind the attention of another:
            a number, which calls with fewer query heads per rank lower to that, or "auto": on a GPU what
            `ulysses-triton tune --chunks` found fastest for such layers, otherwise what the cost model predicts; and 1
            on CPUs, where overlap takes from attention what it hides, and in compiled graphs.
        check: what ranks compare before every call: "hash" of the call's signature, or "always" all of it. The same on
            every rank.
        timeout: how long a rank waits for its peers.

    Raises GroupError for a group this rank is not in or that the exchange cannot carry, OptionError for an unknown
    option, ExchangeError for ranks that do not come. Making one is collective: every rank of `group` does. A context
    manager; `close` gives everything back.
    """

    recorder: ClassVar[Trace | None] = None  # of all groups of this process, inside `trace()`

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | VirtualMember | None = None,
        *,
        exchange: str = "auto",
        chunks: int | str = "auto",
        check: str = "hash",
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        if exchange not in EXCHANGES:
            raise OptionError(f"exchange = {exchange!r}; it must be one of {', '.join(map(repr, EXCHANGES))}")
        if chunks != "auto" and not (type(chunks) is int and chunks >= 1):
            raise OptionError(f'chunks = {chunks!r}; it must be a number of at least 1, or "auto"')
        if check not in ("hash", "always"):
            raise OptionError(f'check = {check!r}; it must be "hash" or "always"')
        self.timeout = timeout
        self.chunks = chunks
        self.memo = Memo()  # what was made once per batch of tokens: documents, lists of blocks
        self.process_group: dist.ProcessGroup | None = None
        self.nodes: Nodes | None = None
        if isinstance(group, DeviceMesh) and group.ndim > 1:
            self.nodes = nodes_of(group, timeout)
            self.process_group = self.nodes.whole
        elif exchange == "two_hop":
            raise OptionError(
                'exchange="two_hop" needs nodes: pass a 2-D DeviceMesh of nodes x ranks of a node, e.g. '
                'init_device_mesh("cuda", (4, 8), mesh_dim_names=("node", "gpu"))'
            )
        elif not isinstance(group, VirtualMember):
            self.process_group = process_group(group)
        self.devices = frozenset({"cpu", "cuda"})
        if self.process_group is not None and self.process_group.size() > 1:
            control, carrier, pool, self._why = carriers_of(exchange, check, self.process_group, timeout, self.nodes)
            own = {"shm": frozenset({"cpu"}), "symm": frozenset({"cuda"})}
            self.devices = own.get(carrier.name) or devices_of(self.process_group)
        else:
            member = group if isinstance(group, VirtualMember) else VirtualWorld(1).member(0)
            control, carrier, pool = member, OneSidedExchange("virtual", member), Pool()
            self._why = "one rank: nothing to exchange" if member.size == 1 else "ranks are threads of this process"
        super().__init__(control, carrier, pool, check_all=check == "always")
        if isinstance(carrier, Watched):
            self.devices |= {"cuda"}
        self.implicit = False  # made by `resolve`, not by the user
        self.default = group is None
        self._chosen: tuple[Local, Placement] | None = None  # of the latest call
        self.name = _register(self)

    def __enter__(self) -> UlyssesGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self._broken is None and not self._closed:
            self._end(f"{self._doing}: {type(error).__name__}: {error}")
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> UlyssesGroup:
        return self

    def __reduce__(self) -> NoReturn:
        raise GroupError("a UlyssesGroup cannot be pickled: it holds connections; make one in the process that uses it")

    def close(self) -> None:
        """Give everything back. Idempotent; every rank does it.

        Raises what the last calls have left to raise: ExchangeError or ShapeError where an exchange is not awaited.
        """
        if self._closed:
            return
        try:
            if self._broken is None:
                self._settle()
        finally:
            self._closed = True
            _GROUPS.pop(self.name, None)
            self.exchange.close()
            failure = None if self._broken else self._failure()
            error = None if failure is None else self._fail(RuntimeError(failure))
            self.control.close()
            self.pool.close()
            self.memo.clear()
        if error is not None:
            raise error

    def explain(self) -> str:
        """What was chosen for this group and its latest call, and why."""
        lines = [
            f"rank {self.rank} of {self.size}, group {self.name!r}",
            f"exchange: {self.exchange.name} ({self._why})",
            *([] if self.nodes is None else [self.nodes.explain()]),
            f"devices: {', '.join(sorted(self.devices))}; deadline {self.timeout.total_seconds():g} s",
            f"calls: {self._calls}; control messages: {self.counts['control']}; "
            f"data exchanges: {sum(n for kind, n in self.counts.items() if kind != 'control')}",
            f"buffers: {self.pool.held:,} bytes in use, {self.pool.free:,} waiting",
        ]
        if self.default and self.size > 1:
            lines.append("group=None: all ranks of the default group share one sequence; there is no data parallelism")
        if self._chosen is not None:
            local, placement = self._chosen
            lines += [
                f"attention: {local.name} ({local.why})",
                f"chunks: {len(placement.chunks)} of each rank's heads (asked for: {self.chunks})",
                f"placement:\n{placement.explain()}",
            ]
        return "\n".join(lines)

    def note(self, local: Local, placement: Placement) -> None:
        """Remember what the latest call chose, for `explain`."""
        self._chosen = local, placement


class told_to_peers:
    """When this rank cannot make the call, let the peers know in the agreement, so that all raise."""

    def __init__(self, group: UlyssesGroup) -> None:
        self.group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UlyssesError):
            self.group.refuse(error)


def process_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group meant by what a user gives; None when there is no distributed run."""
    if group is None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise OptionError(
                f"group is a DeviceMesh of {group.ndim} dimensions {group.mesh_dim_names}; pass the one dimension that "
                'the sequence is sharded over, e.g. mesh["sequence"], or a UlyssesGroup of two: nodes and their ranks'
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise GroupError(
            f"group is a {type(group).__name__}; pass a ProcessGroup, a 1-D DeviceMesh, a UlyssesGroup or None (an int "
            "is what new_group gives to ranks outside the group: those make no call)"
        )
    return group


# -- the registry: the op knows its group by name

_GROUPS: dict[str, UlyssesGroup] = {}
_lock = threading.Lock()


def _register(group: UlyssesGroup) -> str:
    """A name that says which rank of which group it is, the same from run to run.

    Chunks are in it as they shape what a forward keeps: PyTorch's on-disk cache must not mix up their graphs.
    """
    label = "local" if group.process_group is None else group.process_group.group_name
    with _lock:
        for number in itertools.count():
            name = f"{label}/{number}:{group.rank}of{group.size}"
            if name not in _GROUPS:
                _GROUPS[name] = group
                return name
    raise AssertionError


def by_name(name: str) -> UlyssesGroup:
    """The group registered under `name`. Raises GroupError when it is closed or was never there."""
    try:
        return _GROUPS[name]
    except KeyError:
        raise GroupError(f"there is no open group {name!r} in this process: it was closed, or made elsewhere") from None


def resolve(group: Groupish) -> UlyssesGroup:
    """The `UlyssesGroup` for what a user gives: itself, or one made for the process group at its first use.

    One made here is closed when its process group has been destroyed, at the next call, or at exit.
    """
    return group if isinstance(group, UlyssesGroup) else by_name(_implicit(group))


@torch.compiler.assume_constant_result
def _implicit(group: dist.ProcessGroup | DeviceMesh | None) -> str:
    """The name of the group made for a process group; while a graph is traced it is made, not traced."""
    group = getattr(group, "real_obj", group)  # what Dynamo wraps a process group in
    found = process_group(group)
    for known in list(_GROUPS.values()):
        if known.implicit and known.process_group is found:
            return known.name
        if known.implicit and known.process_group not in (None, *dist.distributed_c10d._world.pg_map):
            known.close()
    made = UlyssesGroup(found)
    made.implicit, made.default = True, group is None
    return made.name


@atexit.register
def _close_all() -> None:
    for group in list(_GROUPS.values()):
        try:
            group.close()
        except UlyssesError as error:  # there is nobody left to catch it, and there are other groups
            print(error, file=sys.stderr)


def run_virtual(
    ranks: int, function: Callable[[UlyssesGroup], _Result], *, chunks: int | str = "auto", timeout: float = 60.0
) -> list[_Result]:
    """Run `function(group)` on `ranks` virtual ranks, threads of this process, and return their results in rank order.

    For tests and single-GPU timing. Raises the first rank's error. Backward runs in the calling thread of each rank, as
    one shared autograd thread would wait for itself at an exchange.
    """
    world = VirtualWorld(ranks, timeout)
    results: list[Any] = [None] * ranks
    failures: dict[int, BaseException] = {}

    def work(rank: int) -> None:
        try:
            with (
                torch.autograd.set_multithreading_enabled(False),
                UlyssesGroup(world.member(rank), chunks=chunks, timeout=timedelta(seconds=timeout)) as group,
            ):
                results[rank] = function(group)
        except BaseException as error:
            world.tell(rank, f"{type(error).__name__}: {error}")
            failures[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        first = min(failures, key=lambda rank: (isinstance(failures[rank], ExchangeError), rank))
        raise failures[first]
    return results
