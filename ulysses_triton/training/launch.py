"""Starting the ranks of a run: processes of our own, or the ones that `torchrun` started.

The starting process holds the store that ranks meet at, so its port is free by construction and it outlives every
rank. A rank reports an error through a pipe; one that is killed cannot, and shows by its exit status. Whichever comes
first ends all ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import NoReturn

import torch
import torch.distributed as dist

from .. import errors
from ..errors import GroupError, OptionError
from .config import TrainConfig

GRACE_SECONDS = 1.0  # after the first rank failed: time for others that fail for the same reason to say so
STOP_SECONDS = 3.0  # between asking a rank to end and killing it
_HOST = "127.0.0.1"
_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TRACEBACK_CHARACTERS = 20_000  # a pipe takes 64 KiB without a reader

RankTask = Callable[[TrainConfig], None]


class RankError(GroupError):
    """A rank that was killed, or that failed in a way nobody foresaw."""


class RankTraceback(Exception):
    """A rank's traceback as text: the cause of the error that is raised in the starting process."""


@dataclass(frozen=True)
class Failure:
    """How a rank ended: `kind` and `message` of its exception, or no kind and the exit status of its process."""

    rank: int
    exit_status: int | None = None
    kind: str = ""
    message: str = ""
    details: str = ""

    @property
    def is_lost_peer(self) -> bool:
        """Whether the rank failed only because another one had gone."""
        signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
        kinds = (errors.ExchangeError.__name__, "DistBackendError", "DistNetworkError")
        return self.kind in kinds or any(sign in self.message for sign in signs)


def under_torchrun() -> bool:
    """Whether this process already is a rank."""
    return all(name in os.environ for name in _TORCHRUN_VARIABLES)


def torchrun_ranks() -> int:
    return int(os.environ["WORLD_SIZE"])


def cores_per_rank(ranks: int) -> int:
    """Threads for each of `ranks` ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


def run_as_torchrun_rank(task: RankTask, config: TrainConfig) -> None:
    """Do this process's part of `task`; the caller then ends the process with `leave`."""
    if config.ranks != torchrun_ranks():
        raise OptionError(f"--ranks {config.ranks} differs from the {torchrun_ranks()} ranks that torchrun started")
    with _process_group(config, store=None):
        task(config)


def leave(status: int) -> NoReturn:
    """End a rank's process without running destructors: gloo sometimes aborts in them after all work is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_on_own_ranks(task: RankTask, config: TrainConfig) -> None:
    """Run `task(config)` on `config.ranks` processes of this machine, each a rank of the default process group.

    `task` must be importable. Returns when all have ended well; otherwise none is left running: raises RankError for
    a rank that died, the rank's own error where it is a UlyssesError, KeyboardInterrupt on Ctrl-C.
    """
    store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    receivers: list[Connection] = []
    try:
        with _interrupts_ignored():  # ranks inherit that: Ctrl-C is for this process, which then ends them
            for rank in range(config.ranks):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_rank_main, args=(task, config, rank, store.port, sender), daemon=True)
                process.start()
                processes.append(process)
                receivers.append(receiver)
                sender.close()
        ended = _wait(processes)
        failures = [
            _failure(rank, processes[rank], receivers[rank]) for rank in sorted(ended) if processes[rank].exitcode != 0
        ]
    finally:
        _stop(processes)
    if failures:
        raise_root_cause(failures, config.ranks)


def _rank_main(task: RankTask, config: TrainConfig, rank: int, port: int, sender: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    ranks = str(config.ranks)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
    os.environ.update(MASTER_ADDR=_HOST, MASTER_PORT=str(port))
    try:
        with _process_group(config, dist.TCPStore(_HOST, port, is_master=False)):
            task(config)
    except BaseException as error:  # the starting process decides what to make of it, SystemExit included
        details = traceback.format_exc()[-_TRACEBACK_CHARACTERS:]
        sender.send(
            Failure(rank, kind=type(error).__name__, message=str(error)[:_TRACEBACK_CHARACTERS], details=details)
        )
        leave(1)
    leave(0)


def _end_with_parent() -> None:
    """A starting process that is killed cannot end its ranks: they notice."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _process_group(config: TrainConfig, store: dist.Store | None) -> Iterator[None]:
    """The default process group; after an error it stays as it is, because closing it could wait for lost peers."""
    rank = int(os.environ["RANK"])
    backend = "gloo"
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=config.ranks)
    yield
    dist.destroy_process_group()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives Ctrl-C, and only it may set this
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _wait(processes: Sequence[SpawnProcess]) -> set[int]:
    """Wait until all ranks ended, or until shortly after the first failed; returns the ranks that ended."""
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    ended: set[int] = set()
    deadline: float | None = None
    while running:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = connection.wait(list(running), timeout)
        if not ready:
            break
        for sentinel in ready:
            assert isinstance(sentinel, int)
            rank = running.pop(sentinel)
            ended.add(rank)
            processes[rank].join()
            if processes[rank].exitcode != 0 and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
    return ended


def _stop(processes: Sequence[SpawnProcess]) -> None:
    """End what still runs, politely first."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


def _failure(rank: int, process: SpawnProcess, receiver: Connection) -> Failure:
    if receiver.poll():
        with suppress(EOFError):  # it ended before it could report
            failure = receiver.recv()
            assert isinstance(failure, Failure)
            return failure
    return Failure(rank, exit_status=process.exitcode)


def raise_root_cause(failures: Sequence[Failure], ranks: int) -> NoReturn:
    """Raise what started it: a rank that was killed before one that raised before one that lost its peer."""
    first = min(failures, key=lambda failure: (failure.is_lost_peer, bool(failure.kind), failure.rank))
    others = "; the other ranks were stopped" if ranks > 1 else ""
    if not first.kind:
        raise RankError(f"rank {first.rank} {_ending(first.exit_status)}{others}")
    cause = RankTraceback(first.details)
    known = getattr(errors, first.kind, None)
    if known is None or first.is_lost_peer:
        raise RankError(f"rank {first.rank} failed with {first.kind}: {first.message}{others}") from cause
    everywhere = len(failures) == ranks and len({failure.message for failure in failures}) == 1
    raise known(first.message if everywhere else f"rank {first.rank}: {first.message}") from cause


def _ending(exit_status: int | None) -> str:
    if exit_status is not None and exit_status < 0:
        return f"was killed by {signal.Signals(-exit_status).name}"
    return f"ended with exit status {exit_status} before its work was done"
