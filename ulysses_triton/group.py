"""The resources of one sequence-parallel group on one rank, and the registry by which the op finds them.

A `UlyssesGroup` owns the exchange, the control messages and the buffers of a process group. It also keeps the ranks
together: every call is agreed on before a byte moves (`agree`), a rank that cannot go on says so (`refuse`), and a peer
that does not come ends in an `ExchangeError` at the deadline (`step`).
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from . import errors, spec
from .errors import ExchangeError, GroupError, OptionError, ShapeError, UlyssesError
from .exchange import nccl_library, symm
from .exchange.base import Control, Exchange, Watched
from .exchange.nccl import NcclExchange
from .exchange.one_sided import OneSidedExchange
from .exchange.pool import Pool
from .exchange.store import meeting_point, share
from .exchange.torch_dist import GlooControl, TorchExchange
from .exchange.virtual import VirtualMember, VirtualWorld
from .local import Local
from .memo import Memo
from .placement import Placement

if TYPE_CHECKING:
    from .exchange.shm import Shm
    from .tracing import Trace

DEFAULT_TIMEOUT = timedelta(minutes=10)
EXCHANGES = ("auto", "shm", "nccl", "symm", "torch")
_RECORD = struct.Struct("<q?q8s")  # call number, refused, seed, hash of the signature
_TEXT_BYTES = 4096  # of a signature or a refusal, where ranks differ
_WORDS_SECONDS = 1.0  # how long a failing rank waits for its peers' last words

Groupish: TypeAlias = "UlyssesGroup | dist.ProcessGroup | DeviceMesh | None"
_Result = TypeVar("_Result")


class UlyssesGroup:
    """The ranks over which a sequence is sharded.

    Args:
        group: a `ProcessGroup`, a 1-D `DeviceMesh`, or None for the default group (one rank when `torch.distributed`
            is not initialised). None is wrong for jobs that also have data-parallel ranks: every rank of the default
            group would hold a part of one sequence.
        exchange: who carries the rows: "shm" (every rank writes into the others' memory; CPU tensors, ranks that are
            processes of one Linux host), "nccl" (a communicator of its own, through cupy; rows on the CPU still go over
            the group), "symm" (as "shm", between GPUs of one NVLink domain, over PyTorch's symmetric memory; not yet
            run on a GPU), "torch" (`all_to_all_single` on the group), or "auto": "shm" for a gloo group whose ranks
            find that they can, "nccl" for CUDA where they have it, otherwise "torch". The same on every rank.
        chunks: in how many parts a rank's heads go, so that the exchange of one hides behind the attention of another:
            a number, which calls with fewer query heads per rank lower to that, or "auto": on a GPU what the cost
            model predicts to be fastest, and 1 on CPUs, where overlap takes from attention what it hides, and in
            compiled graphs.
        check: what ranks compare before every call: "hash" of the call's signature, or "always" all of it.
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
        self.counts: Counter[str] = Counter()  # "control" messages, and the "data" exchanges of each kind of step
        self.memo = Memo()  # what was made once per batch of tokens: documents, lists of blocks
        self.process_group = None if isinstance(group, VirtualMember) else process_group(group)
        self.devices = frozenset({"cpu", "cuda"})
        if self.process_group is not None and self.process_group.size() > 1:
            carriers = _carriers(exchange, self.process_group, timeout)
            own = {"shm": frozenset({"cpu"}), "symm": frozenset({"cuda"})}
            self.devices = own.get(carriers[1].name) or _devices(self.process_group)
        else:
            member = group if isinstance(group, VirtualMember) else VirtualWorld(1).member(0)
            why = "one rank: nothing to exchange" if member.size == 1 else "ranks are threads of this process"
            carriers = member, OneSidedExchange("virtual", member), Pool(), why
        self.control: Control = carriers[0]
        self.exchange: Exchange = carriers[1]
        self.pool = carriers[2]
        self._why = carriers[3]
        if isinstance(self.exchange, Watched):
            self.exchange.where = lambda: self._doing
            self.devices |= {"cuda"}
        self.rank, self.size = self.control.rank, self.control.size
        self.implicit = False  # made by `resolve`, not by the user
        self.default = group is None
        self._check_all = check == "always"
        self._calls = 0
        self._agreed: set[bytes] = set()  # calls that all ranks made, and that need not wait for it the next time
        self._later: tuple[str, Callable[[], list[bytes]]] | None = None  # a call whose comparison is still to come
        self.latest = 0, ""  # the latest call: its number, and what it is
        self._doing = "between calls"
        self._broken: str | None = None
        self._closed = False
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

    def check(self) -> None:
        """Raise if this group cannot be used any more, here or because a peer failed.

        ExchangeError, GroupError, or ShapeError where ranks compare their calls late and the last ones differ.
        """
        self._settle()
        self._require_usable()
        words = self.control.hear(0.0)
        if words:
            raise self._fail(RuntimeError("a peer failed"))

    def explain(self) -> str:
        """What was chosen for this group and its latest call, and why."""
        lines = [
            f"rank {self.rank} of {self.size}, group {self.name!r}",
            f"exchange: {self.exchange.name} ({self._why})",
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

    # -- keeping the ranks together

    def agree(self, what: str, signature: str, seed: int | None = None, *, device: str | None = None) -> int:
        """Before a call moves anything: that every rank makes the same one. Returns rank 0's `seed`, 0 for None.

        Raises ShapeError on every rank when they differ, saying who differs in what; or, where a peer refused the call,
        that peer's error. `device`: that of the rows, where the exchange may let a call go ahead that all ranks made
        before: if it is not the same this time, the next call, `check` or `close` raises, and the group has ended.
        """
        self._settle()
        self._require_usable()
        self._calls += 1
        self.latest = self._calls, what
        self._doing = f"call {self._calls} ({what})"
        if self.size == 1:
            return seed or 0
        text = f"call={what}; {signature}"
        defers = seed is None and device is not None and self._defers(device)
        digest = _digest(text)
        if defers and digest in self._agreed:
            self._later = text, self._begin_gather(self._record(text))
            return 0
        seed = self._compare(text, seed or 0)
        if defers:
            self._agreed.add(digest)
        return seed

    def refuse(self, error: UlyssesError) -> None:
        """Take part in the agreement on a call that this rank cannot make, so that every rank raises."""
        if self.size == 1 or self._broken or self._closed:
            return
        self._settle()
        self._calls += 1
        self._doing = f"call {self._calls} (refused)"
        self._compare(f"{type(error).__name__}\n{error}", refused=error)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Around whatever waits for peers, so that what goes wrong there ends the group with an ExchangeError."""
        doing = self._doing
        self._doing = f"{doing}, {name}"
        try:
            yield
        except UlyssesError:
            raise
        except RuntimeError as error:
            raise self._fail(error) from error
        self._doing = doing

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call that was agreed on: when it fails on this rank alone, the peers can read why."""
        try:
            yield
        except BaseException as error:
            if self._broken is None:
                self._end(f"{self._doing} failed with {type(error).__name__}: {error}")
            raise
        self._doing = "between calls"

    def _compare(
        self,
        text: str,
        seed: int = 0,
        refused: UlyssesError | None = None,
        later: Callable[[], list[bytes]] | None = None,
    ) -> int:
        """Hold this call, `text`, against the others'; `later` is a gathering of the records that has begun."""
        with self.step("agreement"):
            texts: list[str] | None = None
            if later is not None:
                heads = later()
            elif self._check_all:
                blobs = self._begin_gather(self._record(text, seed, refused) + _padded(text))()
                heads, texts = [b[: _RECORD.size] for b in blobs], [_unpadded(b[_RECORD.size :]) for b in blobs]
            else:
                heads = self._begin_gather(self._record(text, seed, refused))()
            calls, refusals, seeds, hashes = zip(*map(_RECORD.unpack, heads), strict=True)
            if len(set(hashes)) == len(set(calls)) == 1 and not any(refusals):
                return int(seeds[0])
            if texts is None:
                texts = [_unpadded(blob) for blob in self._begin_gather(_padded(text))()]
        self._calls = max(calls)  # ranks that skipped a call are level again
        if self._agreed.intersection(hashes):  # of ranks that did not wait, and have begun to exchange
            self._end(f"{self._doing}: the ranks made different calls")
        self._doing = "between calls"
        if refused is not None:
            return seed
        if any(refusals):
            rank = refusals.index(True)
            name, _, message = texts[rank].partition("\n")
            raise getattr(errors, name, ShapeError)(f"rank {rank} refused this call: {message}")
        numbers = "" if len(set(calls)) == 1 else f"; their call numbers are {list(calls)}: did a rank skip a call?"
        raise ShapeError(f"the ranks make different calls: {spec.differences(texts)}{numbers}")

    def _record(self, text: str, seed: int = 0, refused: UlyssesError | None = None) -> bytes:
        return _RECORD.pack(self._calls, refused is not None, seed, _digest(text))

    def _begin_gather(self, payload: bytes) -> Callable[[], list[bytes]]:
        self.counts["control"] += 1
        return self.control.begin_gather(payload)

    def _defers(self, device: str) -> bool:
        """Whether a call on such a device that all ranks made before may go ahead before they have compared it."""
        return not self._check_all and isinstance(self.exchange, Watched) and self.exchange.defers(device)

    def _settle(self) -> None:
        """Compare the latest call, if that is still to be done."""
        if self._later is not None:
            (text, later), self._later = self._later, None
            self._compare(text, later=later)

    def _failure(self) -> str | None:
        """What the exchange found by itself."""
        return self.exchange.failure() if isinstance(self.exchange, Watched) else None

    def _require_usable(self) -> None:
        if self._closed:
            raise GroupError(f"group {self.name!r} is closed")
        if self._broken is not None:
            raise ExchangeError(f"group {self.name!r} cannot be used any more: {self._broken}; make a new one")
        failure = self._failure()
        if failure is not None:
            raise self._fail(RuntimeError(failure))

    def _end(self, why: str) -> None:
        """This group is of no use any more: tell the peers, and do not wait for them."""
        self._broken = why
        self._later = None
        self.pool.close()  # a late peer may still write to buffers in flight, so none is used again
        self.control.tell(why)
        if isinstance(self.exchange, Watched):
            self.exchange.abort(why)

    def _fail(self, error: RuntimeError) -> ExchangeError:
        """End the group: leave a last word, read the peers', and say who is where."""
        own = f"{self._doing}: {str(error).splitlines()[0]}"
        self._end(own)
        words = self.control.hear(_WORDS_SECONDS)
        words.pop(self.rank, None)
        silent = sorted(set(range(self.size)) - set(words) - {self.rank})
        parts = [f"rank {self.rank} in {own}"]
        parts += [f"rank {rank} in {word}" for rank, word in sorted(words.items())]
        if silent:
            parts.append(f"no word from ranks {silent}: died, stopped, or elsewhere")
        return ExchangeError("; ".join(parts))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _padded(text: str) -> bytes:
    return text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")


def _unpadded(blob: bytes) -> str:
    return blob.rstrip(b"\0").decode(errors="replace")


def process_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group meant by what a user gives; None when there is no distributed run."""
    if group is None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise OptionError(
                f"group is a DeviceMesh of {group.ndim} dimensions {group.mesh_dim_names}; pass the one dimension that "
                'the sequence is sharded over, e.g. mesh["sequence"]'
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise GroupError(
            f"group is a {type(group).__name__}; pass a ProcessGroup, a 1-D DeviceMesh, a UlyssesGroup or None (an int "
            "is what new_group gives to ranks outside the group: those make no call)"
        )
    return group


def _carriers(exchange: str, group: dist.ProcessGroup, timeout: timedelta) -> tuple[Control, Exchange, Pool, str]:
    """What carries the control messages of a process group and its rows, where its buffers come from, and why.

    The same on every rank: what a rank finds out by itself, all ranks hear before they choose.
    """
    store = meeting_point(group)
    asked = share(store, "exchange", group, exchange, timeout)
    if len(set(asked)) > 1:
        raise OptionError(
            f"the ranks ask for different exchanges: {asked} in rank order; exchange= must be one for all"
        )
    why, devices = f"{exchange}: any process group can carry it", _devices(group)
    if exchange == "shm" or (exchange == "auto" and devices == {"cpu"}):
        found = _shared_memory(group, store, timeout)
        if not isinstance(found, str):
            return found, OneSidedExchange("shm", found), found.pool, f"{exchange}: the ranks share this host's memory"
        if exchange == "shm":
            raise GroupError(
                f'exchange="shm" cannot carry group {group.group_name!r}: {found}. It needs all ranks to be processes '
                'of one Linux host, container and user; exchange="nccl" or "torch" needs nothing of that'
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


def _devices(group: dist.ProcessGroup) -> frozenset[str]:
    """The device types whose tensors the group carries."""
    config = dist.distributed_c10d._world.pg_backend_config.get(group, "")
    pairs = [pair.split(":") for pair in str(config).split(",") if ":" in pair]
    found = {device for device, backend in pairs if not (backend == "gloo" and device == "cuda")}
    return frozenset(found or {"cpu" if dist.get_backend(group) == "gloo" else "cuda"})


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
                UlyssesGroup(world.member(rank), chunks=chunks) as group,
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
