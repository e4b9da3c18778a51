"""Ranks for tests: eight worker processes that are started once per session, and throw-away sets of them.

    def double(ctx, x):                            # a module-level function of a test module; x comes by value
        y = x * (ctx.rank + 1)
        dist.all_reduce(y, group=ctx.group)
        return y                                   # goes back by value

    def test_double(pool):
        results = pool.run(4, double, torch.ones(3))          # a list, one result per rank

An exception on any rank fails the test and quotes the traceback of each failing rank; `expect_errors=True` returns a
`Failure` in the place of a result instead. A run that passes its deadline fails with the stack of every rank that was
still busy, and the next run gets new workers. Tests that kill or stop ranks use `pool.fresh`: processes of their own,
in which a rank may end by `os.kill(os.getpid(), signal.SIGKILL)` or stop a peer by its pid in `ctx.pids`.
"""

from __future__ import annotations

import environment  # noqa: F401  # isort: skip  (first: it sets TRITON_INTERPRET before anything imports triton)

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch.distributed as dist

SIZE = 8
GROUPS = (1, 2, 3, 4, 5, 8)  # a group of the first P ranks for each
DEADLINE = 120.0  # seconds for one run
GRACE = 20.0  # seconds for the other ranks once one has failed: they may be waiting for it in a collective
GLOO_TIMEOUT = timedelta(seconds=90)  # below DEADLINE, so that a collective says itself what it waited for


@dataclass(frozen=True)
class Context:
    """What a function learns about the rank it runs on."""

    rank: int
    size: int
    group: dist.ProcessGroup
    pids: tuple[int, ...]  # of all ranks of this run


@dataclass(frozen=True)
class Failure:
    """An exception that left the function on one rank."""

    kinds: tuple[str, ...]  # names of its class and its bases, the class first
    message: str
    traceback: str

    @staticmethod
    def of(error: BaseException) -> Failure:
        kinds = tuple(c.__name__ for c in type(error).__mro__)
        return Failure(kinds, str(error), "".join(traceback.format_exception(error)))

    @property
    def kind(self) -> str:
        return self.kinds[0]

    def __str__(self) -> str:
        return self.traceback


@dataclass(frozen=True)
class Exit:
    """A rank that ended, or was found stopped, without an answer."""

    code: int | None  # as `subprocess` has it: negative for a signal; None for a stopped rank

    @property
    def signal(self) -> int | None:
        return -self.code if self.code is not None and self.code < 0 else None

    @property
    def stopped(self) -> bool:
        return self.code is None

    def __str__(self) -> str:
        if self.stopped:
            return "the process was stopped"
        return f"the process ended by {signal.Signals(self.signal).name}" if self.signal else f"exit code {self.code}"


@dataclass(frozen=True)
class _Hung:
    stack: str

    def __str__(self) -> str:
        return f"no answer; its stack:\n{self.stack}"


@dataclass(frozen=True)
class _Request:
    path: list[str]  # sys.path, which pytest extends as it collects
    number: int
    size: int
    pids: tuple[int, ...]
    call: bytes  # pickled apart: what is wrong with it is an answer of this run, not the end of the worker


def is_stopped(pid: int) -> bool:
    """Whether a process has been stopped by a signal and not yet woken."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (FileNotFoundError, ProcessLookupError):
        return False


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    stacks: Path
    groups: tuple[int, int] = field(default=(0, 0))  # what the names of its next groups depend on

    def stack(self) -> str:
        """Where the worker is, as faulthandler writes it from inside its signal handler."""
        if is_stopped(self.process.pid):
            return "(the process is stopped)"
        os.kill(self.process.pid, signal.SIGUSR1)
        until = time.monotonic() + 2
        while time.monotonic() < until and not self.stacks.stat().st_size:
            time.sleep(0.05)
        time.sleep(0.1)
        return self.stacks.read_text()


# ---- in the workers


def _serve(rank: int, size: int, port: int, groups: tuple[int, ...], pipe: connection.Connection, stacks: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's to handle
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"), all_threads=True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=GLOO_TIMEOUT)
    made = {size: dist.group.WORLD}
    for P in groups:
        # With the rest as a group of its own every rank is in as many groups as any other, as on a mesh. torch names a
        # group made with use_local_synchronization by that number, and would wait forever where ranks differ in it.
        made |= {P: dist.new_group(range(P), timeout=GLOO_TIMEOUT)}
        if P < size:
            dist.new_group(range(P, size), timeout=GLOO_TIMEOUT)
    try:
        _answer(None, pipe)
        while (request := pickle.loads(pipe.recv_bytes())) is not None:
            _renew_store(store, request.number)
            _answer(_call(rank, made[request.size], request), pipe)
        dist.destroy_process_group()
    except (EOFError, OSError):  # pytest has gone
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort in an orderly end


def _renew_store(store: dist.Store, number: int) -> None:
    """Let every run find an empty store.

    A group made with use_local_synchronization where an equal one was destroyed has the same name, so gloo's ranks read
    each other's old addresses and hang, now and then. What happens within one run is the tested code's own affair.
    """
    pg_map = dist.distributed_c10d._world.pg_map
    backend, _ = pg_map[dist.group.WORLD]
    pg_map[dist.group.WORLD] = (backend, dist.PrefixStore(f"run {number}", store))


def _call(rank: int, group: dist.ProcessGroup, request: _Request) -> Any:
    sys.path[:] = request.path
    try:
        function, args, kwargs = pickle.loads(request.call)
        return function(Context(rank, request.size, group, request.pids), *args, **kwargs)
    except BaseException as error:  # pytest.fail and the like are no Exceptions
        return Failure.of(error)


def _answer(result: Any, pipe: connection.Connection) -> None:
    world = dist.distributed_c10d._world
    groups = (world.group_count, len(world.pg_names))
    try:
        message = pickle.dumps((result, groups))  # plain pickle: tensors by value, with their strides
    except Exception as error:
        message = pickle.dumps((Failure.of(error), groups))
    pipe.send_bytes(message)


# ---- in pytest's process


@contextmanager
def _environ(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep multiprocessing from running pytest's script again in every worker."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _forking() -> Any:
    """A server that has imported torch once and forks the workers: they start in no time and share its memory."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["environment", "pool"])
    with _environ(PYTHONPATH=os.pathsep.join(p for p in sys.path if p)):
        forkserver.ensure_running()
    return context


class _Set:
    """Worker processes that have met in one world, with the store they met at."""

    def __init__(self, size: int, groups: tuple[int, ...], env: dict[str, str] | None = None):
        # A torchrun-like host for the store: it outlives any rank. Port 0: whatever port is free.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="ulysses-triton-tests-")
        self._number = 0
        # Variables that torch and triton read when imported take processes that import them anew.
        context = multiprocessing.get_context("spawn") if env else _forking()
        self.workers: list[_Worker] = []
        with _without_main(), _environ(**(env or {})):
            for rank in range(size):
                ours, theirs = context.Pipe()
                stacks = Path(self._folder.name) / f"{rank}.txt"
                stacks.touch()
                args = (rank, size, self._store.port, groups, theirs, str(stacks))
                process = context.Process(target=_serve, args=args, daemon=True)
                process.start()
                theirs.close()
                self.workers.append(_Worker(process, ours, stacks))
        bad = [o for o in self.collect(self.workers, DEADLINE, GRACE) if o is not None]
        if bad:
            self.kill()
            raise RuntimeError("the workers did not start:\n" + "\n".join(str(o) for o in bad))

    def ask(self, size: int, call: tuple[Any, ...], deadline: float, grace: float) -> list[Any]:
        """Make a call on the first `size` workers."""
        workers = self.workers[:size]
        self._number += 1
        pids = tuple(w.process.pid for w in workers)
        request = pickle.dumps(_Request(list(sys.path), self._number, size, pids, pickle.dumps(call)))
        for worker in workers:
            worker.pipe.send_bytes(request)
        return self.collect(workers, deadline, grace)

    def collect(self, workers: list[_Worker], deadline: float, grace: float) -> list[Any]:
        """One answer per worker: its result, a `Failure`, an `Exit`, or `_Hung` at the deadline."""
        outcomes: dict[int, Any] = {}
        until = time.monotonic() + deadline
        while len(outcomes) < len(workers) and time.monotonic() < until:
            pending = {i: w for i, w in enumerate(workers) if i not in outcomes}
            if all(is_stopped(w.process.pid) for w in pending.values()):  # nobody is left to wake them
                outcomes.update({i: Exit(None) for i in pending})
                break
            connection.wait([w.pipe for w in pending.values()], timeout=0.5)
            for i, worker in pending.items():
                if not worker.pipe.poll():  # an end shows as EOF
                    continue
                try:
                    outcomes[i], worker.groups = pickle.loads(worker.pipe.recv_bytes())
                except (EOFError, OSError):
                    worker.process.join(5)
                    outcomes[i] = Exit(worker.process.exitcode)
                if isinstance(outcomes[i], Failure | Exit):
                    until = min(until, time.monotonic() + grace)
        for i, worker in enumerate(workers):
            if i not in outcomes:
                outcomes[i] = _Hung(worker.stack())
        return [outcomes[i] for i in range(len(workers))]

    def end(self, patience: float) -> None:
        """Let the workers leave their groups; kill those that do not within `patience` seconds."""
        for worker in self.workers:
            try:
                worker.pipe.send_bytes(pickle.dumps(None))
            except OSError:  # it is gone already
                continue
        until = time.monotonic() + patience
        for worker in self.workers:
            worker.process.join(max(0.0, until - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        for worker in self.workers:
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join(10)
            worker.pipe.close()
        self._folder.cleanup()


def _report(what: str, function: Callable[..., Any], outcomes: list[Any]) -> str:
    lines = [f"{function.__name__} on {len(outcomes)} ranks: {what}"]
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Failure | Exit | _Hung):
            lines.append(f"--- rank {rank}: {outcome}")
    return "\n".join(lines)


def _in_step(ctx: Context) -> None:
    dist.barrier(group=ctx.group)


class Pool:
    """See the module's docstring. A context manager; `run` starts the workers when there are none."""

    def __init__(self) -> None:
        self._set: _Set | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._set is not None:
            self._set.end(patience=10)
            self._set = None

    def run(
        self,
        size: int,
        function: Callable[..., Any],
        *args: Any,
        expect_errors: bool = False,
        deadline: float = DEADLINE,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `function(ctx, *args, **kwargs)` on the first `size` ranks, a size of GROUPS; return what they return.

        Raises AssertionError when a rank raises (unless `expect_errors`, which gives all ranks the whole deadline and
        returns a `Failure` for those that raise), when one dies, and at the deadline, in seconds.
        """
        workers = self._ready(size)
        try:
            outcomes = workers.ask(size, (function, args, kwargs), deadline, deadline if expect_errors else GRACE)
            lost = any(isinstance(o, _Hung | Exit) for o in outcomes)
            failed = any(isinstance(o, Failure) for o in outcomes)
            if lost or (failed and any(o is not None for o in workers.ask(size, (_in_step, (), {}), 15, 15))):
                self._discard()  # ranks that differ in how many collectives they have done would mix up the next
        except BaseException:  # pytest's timeout, Ctrl-C: the workers are anywhere
            self._discard()
            raise
        if lost:
            raise AssertionError(_report(f"not all answered within {deadline:g} s", function, outcomes))
        if failed and not expect_errors:
            raise AssertionError(_report("failed", function, outcomes))
        return outcomes

    def fresh(
        self,
        size: int,
        function: Callable[..., Any],
        *args: Any,
        env: dict[str, str] | None = None,
        deadline: float = DEADLINE,
        **kwargs: Any,
    ) -> list[Any]:
        """The same on `size` processes made for this call, whose world is the group; any of them may die or be stopped.

        Returns per rank the result, a `Failure` or an `Exit`; ranks that are stopped when all others have answered are
        an `Exit`, too. With `env` the processes start from nothing, with these variables set (some seconds slower).
        Raises AssertionError for a rank that is still running at the deadline.
        """
        workers = _Set(size, (), env)
        try:
            outcomes = workers.ask(size, (function, args, kwargs), deadline, deadline)
        except BaseException:
            workers.kill()
            raise
        whole = not any(isinstance(o, _Hung | Exit | Failure) for o in outcomes)
        workers.end(patience=10 if whole else 0)
        if any(isinstance(o, _Hung) for o in outcomes):
            raise AssertionError(_report(f"not all answered within {deadline:g} s", function, outcomes))
        return outcomes

    def _ready(self, size: int) -> _Set:
        if size not in GROUPS:
            raise ValueError(f"the pool has groups of {GROUPS} ranks, not of {size}")
        if self._set is not None:
            dead = [rank for rank, w in enumerate(self._set.workers) if not w.process.is_alive()]
            if dead:
                warnings.warn(f"ranks {dead} ended after the last run; starting new ones", stacklevel=3)
            # Ranks of a smaller run that made groups and kept them, where others made none: see _serve.
            if dead or len({w.groups for w in self._set.workers[:size]}) > 1:
                self._discard()
        if self._set is None:
            self._set = _Set(SIZE, GROUPS)
        return self._set

    def _discard(self) -> None:
        if self._set is not None:
            self._set.kill()
            self._set = None
