"""Shared memory between ranks: who may take part, what it costs to keep, and what happens when there is none."""

from __future__ import annotations

import gc
import os
import resource
import stat
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from test_exchange import UNEVEN, message

from ulysses_triton import GroupError, OptionError, UlyssesGroup, ulysses_attention
from ulysses_triton.exchange import shared_pool, shm, unix_socket
from ulysses_triton.exchange.shared_pool import SharedPool
from ulysses_triton.exchange.unix_socket import Listener, connect

CPU = torch.device("cpu")
AT_ONCE = 5.0  # seconds, far below the deadline of the group


def layer(group, tokens=4):
    q = torch.randn(1, tokens, 6, 16, requires_grad=True)
    return ulysses_attention(q, q, q, group, causal=True, attention="reference")


# -- finding out whether it can be had


def chosen_groups(ctx):
    started = time.time()
    with UlyssesGroup(ctx.group) as auto, UlyssesGroup(ctx.group, exchange="shm") as asked:
        assert auto.explain().splitlines()[1] == "exchange: shm (auto: the ranks share this host's memory)"
        assert asked.explain().splitlines()[1] == "exchange: shm (shm: the ranks share this host's memory)"
        assert auto.devices == {"cpu"} and not hasattr(auto.control, "_gloo")
        layer(auto).sum().backward()
    mine = [p for p in Path(tempfile.gettempdir()).glob("ulysses_triton-*") if p.stat().st_uid == os.getuid()]
    return [p for p in mine if p.stat().st_mtime > started]


def test_ranks_of_one_host_use_it_and_leave_no_file(pool):
    assert pool.run(3, chosen_groups) == [[]] * 3


def failing(error):
    def fail(*_):
        raise type(error)(*error.args)  # a new one, as it keeps what its frames hold

    return fail


OBSTACLES = {
    "another host": (shm, "_host", lambda: "elsewhere", "ranks [1] are on another host than rank 0"),
    "no /proc": (shm, "_host", failing(FileNotFoundError(2, "no boot_id here")), "no boot_id here"),
    "no socket": (shm, "Listener", failing(PermissionError(13, "read-only file system")), "read-only file system"),
    "no connection": (shm, "connect", failing(FileNotFoundError(2, "not in this container")), "this container"),
    "a stranger": (unix_socket, "_credentials", lambda _: (1, 0), "process 1 of user 0"),
    "no memory": (os, "memfd_create", failing(OSError(38, "not implemented")), "no shared memory"),
    "no mapping": (shm, "mapped", failing(RuntimeError("mmap failed")), "mmap failed"),
    "other memory": (shm, "mapped", lambda _, size: memoryview(bytearray(size)), "does not show there"),
}


def with_an_obstacle(ctx, name):
    """Rank 1 finds one; all groups are made all the same, or none."""
    module, attribute, value, _ = OBSTACLES[name]
    original = getattr(module, attribute)
    if ctx.rank == 1:
        setattr(module, attribute, value)
    try:
        with UlyssesGroup(ctx.group, timeout=timedelta(seconds=60)) as group:
            layer(group).sum().backward()
            why = group.explain().splitlines()[1]
        with pytest.raises(GroupError) as raised:
            UlyssesGroup(ctx.group, exchange="shm", timeout=timedelta(seconds=60))
    finally:
        setattr(module, attribute, original)
    return group.exchange.name, why, str(raised.value)


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_obstacle_on_one_rank_is_every_ranks(pool, name):
    started = time.monotonic()
    for exchange, why, error in pool.run(3, with_an_obstacle, name):
        assert exchange == "torch" and OBSTACLES[name][3] in why and "not shm" in why
        assert OBSTACLES[name][3] in error and 'exchange="torch"' in error
    assert time.monotonic() - started < 2 * AT_ONCE


def asks_for_another(ctx):
    UlyssesGroup(ctx.group, exchange="torch" if ctx.rank == 1 else "shm")


def test_ranks_that_ask_for_different_exchanges_all_learn_of_it(pool):
    for failure in pool.run(3, asks_for_another, expect_errors=True):
        assert failure.kind == "OptionError" and "['shm', 'torch', 'shm']" in failure.message


def comes_or_not(ctx):
    if ctx.rank != 1:
        UlyssesGroup(ctx.group, timeout=timedelta(seconds=1))


def test_a_rank_that_does_not_make_the_group_is_named(pool):
    for failure in pool.fresh(3, comes_or_not)[::2]:
        assert failure.kind == "ExchangeError" and "no sign of ranks [1] within 1 s" in failure.message


def test_an_unknown_exchange():
    with pytest.raises(OptionError, match="one of 'auto', 'shm', 'nccl'"):
        UlyssesGroup(exchange="mpi")


# -- sockets


def test_only_this_user_reaches_the_socket_and_it_goes():
    listener = Listener(2)
    file = Path(listener.address)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert not os.get_inheritable(listener.socket.fileno())
    listener.close()
    assert not file.parent.exists()
    listener.close()


def test_a_long_path_is_no_obstacle(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    listener = Listener(2)
    connect(listener.address, os.getpid()).close()
    listener.close()
    assert not list(folder.iterdir())


def test_a_connection_of_somebody_else_is_refused(monkeypatch):
    listener, here = Listener(2), os.getpid()
    with pytest.raises(PermissionError, match=f"process {here} of user"):
        connect(listener.address, here + 1)
    ends = [connect(listener.address, here) for _ in range(2)]
    with pytest.raises(PermissionError, match=f"connection of process {here}"):
        listener.accept([0, here + 1], 0, timedelta(seconds=5))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="which is no peer's"):
        listener.accept([0, here], 0, timedelta(seconds=5))
    for end in ends:
        end.close()
    listener.close()


# -- memory


def test_a_pool_of_shared_memory():
    """What one mapping writes shows in another, the memory is used again, and little stays open."""
    pool = SharedPool()
    first = pool.take((3, 5), torch.float32, CPU)
    segment, start = pool.find(first.view(-1)[5:])
    assert start == 20 and segment.size == 4096
    again = torch.frombuffer(shared_pool.mapped(segment.descriptor, segment.size), dtype=torch.float32, count=15)
    again.copy_(torch.arange(15.0))
    assert torch.equal(first, torch.arange(15.0).view(3, 5))
    pointer = first.data_ptr()
    del first
    assert pool.take((1,), torch.uint8, CPU).data_ptr() == pointer
    pool.close()
    assert segment.descriptor is None and again[14] == 14


def test_no_descriptor_survives_a_pool():
    before = len(os.listdir("/proc/self/fd"))
    pool = SharedPool()
    held = [pool.take((5000 * n,), torch.float32, CPU) for n in range(1, 9)]
    assert len(os.listdir("/proc/self/fd")) == before + 8
    del held[::2]
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before


def mappings():
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:ulysses_triton" in line]


def sizes_that_change(ctx):
    """Buffers that nobody needs any more are unmapped by all ranks."""
    sizes = [2**18 + 2**15 * n for n in range(8)]
    m = message(ctx.rank, UNEVEN)
    of_others = len(mappings())
    with UlyssesGroup(ctx.group, exchange="shm") as group:
        for elements in sizes:
            receive = group.pool.take((elements,), torch.float32, CPU)
            group.exchange.open([m], [receive], [None])
            del receive
        group.pool._settle()
        group.exchange.open([m], [group.pool.take((1,), torch.float32, CPU)], [None])
        gc.collect()
        kept = (group.pool.held + group.pool.free) / (4 * sum(sizes))
        counts = len(mappings()) - of_others, len(group.control._mapped), len(group.pool._segments)
    return kept, counts


def test_peers_unmap_what_is_given_back(pool):
    for kept, (mapped, of_peers, own) in pool.run(3, sizes_that_change):
        assert kept < 0.5
        assert of_peers == 2 * own and mapped <= 3 * own


def without_memory(ctx, when):
    """Rank 1 may have no more of it, from some point on."""
    with UlyssesGroup(ctx.group, timeout=timedelta(seconds=60)) as group:
        out = layer(group)
        if ctx.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        started = time.monotonic()
        try:
            layer(group, 400) if when == "forward" else out.sum().backward()
        except (RuntimeError, MemoryError) as error:
            return type(error).__name__, str(error), time.monotonic() - started
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_no_memory_is_an_error_on_every_rank(pool, when):
    answers = pool.fresh(3, without_memory, when)
    for rank, (kind, message_, took) in enumerate(answers):
        assert took < AT_ONCE and 'recompute="exchange"' in message_ and "bytes" in message_
        if rank == 1 or when == "backward":  # memory for gradients is taken before the ranks agree on the call
            assert kind == "OutOfMemoryError"
        else:
            assert kind == "ExchangeError" and "rank 1 in call 2 (attention)" in message_
        assert "refused" not in message_ or rank != 1


# -- ends


def closes_early(ctx):
    group = UlyssesGroup(ctx.group, timeout=timedelta(seconds=60))
    layer(group)
    if ctx.rank == 1:
        return group.close()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="rank . is gone"):
        layer(group)
    group.close()
    return time.monotonic() - started


def test_a_rank_that_closes_early_ends_its_peers_wait(pool):
    zero, one, two = pool.run(3, closes_early)
    assert one is None and zero < AT_ONCE and two < AT_ONCE


def raises_in_a_kernel(ctx):
    from ulysses_triton import local

    group = UlyssesGroup(ctx.group, timeout=timedelta(seconds=60))
    layer(group)
    if ctx.rank == 1:
        local.reference.attend_forward = failing(ZeroDivisionError("in rank 1"))
    started = time.monotonic()
    try:
        layer(group)
    except (RuntimeError, ZeroDivisionError) as error:
        return str(error), time.monotonic() - started


def test_a_rank_that_fails_alone_ends_its_peers_wait(pool):
    for message_, took in pool.fresh(3, raises_in_a_kernel):
        assert "in rank 1" in message_ and took < AT_ONCE


def fork_in_a_group(ctx):
    """A forked process has no part in the connections, and its end does not end them."""
    with UlyssesGroup(ctx.group, exchange="shm", timeout=timedelta(seconds=20)) as group:
        layer(group)
        child = os.fork()
        if child == 0:
            os._exit(sum(peer.socket.fileno() != -1 for peer in group.control._mesh._peers))
        _, status = os.waitpid(child, 0)
        return status, torch.isfinite(layer(group)).all().item()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_does_not_hold_the_connections(pool):
    assert pool.run(2, fork_in_a_group) == [(0, True)] * 2


def rebuilt_often(ctx, times):
    def resources():
        gc.collect()
        maps = Path("/proc/self/maps").read_text().splitlines()
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task")), len(maps)

    def once():
        with UlyssesGroup(ctx.group, exchange="shm") as group:
            layer(group).sum().backward()

    for _ in range(3):
        once()
    before = resources()
    for _ in range(times):
        once()
    return before, resources(), mappings()


def test_groups_made_and_closed_leave_nothing(pool):
    for before, after, shared in pool.fresh(3, rebuilt_often, 100):
        assert shared == []
        assert after[:3] == before[:3]
        assert after[3] <= before[3] + 10, "mappings"  # of malloc, which has its own mind
