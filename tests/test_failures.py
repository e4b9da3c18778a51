"""A rank that dies, stops or goes elsewhere: an ExchangeError on every survivor, in time, and never a hang."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import fake_nccl
import pytest
import torch
import torch.distributed as dist
from fake_nccl import FakeNccl
from pool import Exit

from ulysses_triton import ExchangeError, ShapeError, UlyssesGroup, local, run_virtual, ulysses_attention
from ulysses_triton.group import _GROUPS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benches are in no package that is installed

from bench import _faults, faults  # noqa: E402
from bench._faults import FAULTS, LOST, RANKS, Seen, goes_on, happen  # noqa: E402

sys.path.remove(str(ROOT))  # where `kernels` would pass for another project's package

SECONDS = 2.0


def layer(group, causal=True):
    q = torch.randn(1, 4, 6, 16, requires_grad=True)
    return ulysses_attention(q, q, q, group, causal=causal, attention="reference")


def lose_a_rank(ctx, exchange, how, when, seconds):
    """Rank 1 is lost at a certain point; the others say what they saw, and go on with a new group of survivors."""
    with_deadline = UlyssesGroup(ctx.group, exchange=exchange, chunks=2, timeout=timedelta(seconds=seconds))
    out = layer(with_deadline)
    if ctx.rank == 1:
        if when == "inside":
            carrier = with_deadline.exchange
            opened = carrier.open

            def end(*_):
                lose(how)
                return opened(*_)

            carrier.open = end  # after the agreement, before its rows are sent
            layer(with_deadline)
        lose(how)
    started = time.monotonic()
    try:
        out.sum().backward() if when == "backward" else layer(with_deadline)
    except ExchangeError as error:
        message, took = str(error), time.monotonic() - started
    else:
        return "nothing raised"
    try:
        layer(with_deadline)
    except ExchangeError as error:
        again = str(error)
    survivors = dist.new_group([0, 2], use_local_synchronization=True)
    with UlyssesGroup(survivors, exchange=exchange, timeout=timedelta(seconds=20)) as group:
        after = torch.isfinite(layer(group)).all().item()
    with_deadline.close()
    return message, took, again, after


def lose(how):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("when", ["forward", "backward", "inside"])
@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("exchange", ["shm", "torch"])
def test_survivors_raise_in_time_name_the_rank_and_can_go_on(pool, exchange, how, when):
    at_once = exchange == "shm" and how == "killed"  # its connections close with it
    answers = pool.fresh(3, lose_a_rank, exchange, how, when, 60.0 if at_once else SECONDS)
    assert isinstance(answers[1], Exit) and answers[1].stopped == (how == "stopped")
    for rank in (0, 2):
        message, took, again, after = answers[rank]
        assert "no word from ranks [1]" in message and f"rank {rank} in call" in message, message
        assert message.startswith("group '0/0:") and took < (4 if at_once else SECONDS + 2), f"{took:.1f} s"
        assert "cannot be used any more" in again and after


# Every fault after which the rank's process lives, on one set of processes.
MATRIX = [
    (fault, when, chunks)
    for when, chunks in (("forward", 1), ("backward", 2))
    for fault in FAULTS
    if "killed" not in fault and "stopped" not in fault
]


# What is found at the deadline only. Over NCCL ranks go ahead with calls that all made before, and meet in hops.
AWAITED = {
    "torch": {"stays away", "fails inside"},
    "nccl": {"stays away", "closes early", "one call fewer", "another shape", "raises in a callable"},
}


def deadline(exchange, fault):
    """Short where ranks wait for it; otherwise so long that an error at the deadline fails the test."""
    if fault not in AWAITED.get(exchange, {"stays away"}):
        return 30.0
    return 2.0 if exchange == "nccl" else 1.0  # it holds for the calls before the fault, too: the fake is slow


def through_the_matrix(ctx, exchange):
    return [_faults.on_process(ctx.rank, exchange, *case, deadline(exchange, case[0])) for case in MATRIX]


def holds(exchange, fault, when, seen):
    """What every survivor's error says, how soon it comes, and what becomes of the group."""
    for rank in (r for r in range(RANKS) if r != LOST):
        kind, message, seconds, again = seen[rank]
        where = f"{exchange}, {fault}, {when}, rank {rank}: {kind} after {seconds:.1f} s: {message}; then {again!r}"
        ahead = exchange == "nccl" and (fault, when) != ("another shape", "backward")  # rows moved before it was found
        known = fault in ("another shape", "one call fewer") and not ahead
        assert kind == ("ShapeError" if known else "ExchangeError"), where
        assert "group '" in message and f"{rank}of3'" in message and "call " in message, where
        assert "agreement" in message or "exchange_" in message, where
        assert f"rank {LOST}" in message or f"ranks [{LOST}" in message, where
        limit = deadline(exchange, fault)
        assert seconds < (limit + 2 if limit < 10 else limit / 2), where
        assert not again if goes_on(fault, when) and not ahead else "cannot be used any more" in again, where


@pytest.mark.parametrize("exchange", ["shm", "torch"])
def test_survivors_of_every_other_fault(pool, exchange):
    answers = pool.fresh(RANKS, through_the_matrix, exchange)
    for at, (fault, when, _) in enumerate(MATRIX):
        holds(exchange, fault, when, [answer[at][0] for answer in answers])
        assert all(answer[at][1] for answer in answers), "a new group of the survivors does not work"


@pytest.mark.parametrize("fault, when, chunks", MATRIX)
def test_survivors_among_virtual_ranks(fault, when, chunks):
    seen = run_virtual(
        RANKS, lambda group: happen(group, fault, when), chunks=chunks, timeout=deadline("virtual", fault)
    )
    holds("virtual", fault, when, seen)


@pytest.mark.parametrize("fault, when, chunks", MATRIX)
def test_survivors_over_nccl(fault, when, chunks):
    """Over the fake, whose communicators wait as NCCL's do for what does not come or does not fit."""
    nccl, seconds = FakeNccl(hangs=True), deadline("nccl", fault)

    def work(group):
        return happen(fake_nccl.join(group, nccl, timeout=seconds), fault, when)

    holds("nccl", fault, when, run_virtual(RANKS, work, chunks=chunks, timeout=seconds))
    assert not nccl.living and nccl.mismatch is None


def test_the_bench_says_what_does_not_hold():
    fine = [Seen("ExchangeError", "", 3.0, "")] * 4
    assert faults._why_not(fine, 4.0) == ""
    assert faults._why_not(fine[1:], 4.0) == "1 without an answer, or a new group that works"
    assert faults._why_not([], 4.0).startswith("4 without an answer")
    wrong = [*fine[2:], Seen("", "", 4.5, ""), Seen("ExchangeError", "", 4.25, "")]
    assert faults._why_not(wrong, 4.0) == "1 without an error; 2 after more than 4 s: 4.50"


def test_a_killed_peer_that_nccl_reports_is_found_at_once():
    """A thread cannot be killed: it does nothing more, and the others' communicators say what NCCL's say then."""
    nccl, over = FakeNccl(), threading.Event()

    def work(group):
        fake_nccl.join(group, nccl, timeout=30)
        layer(group)
        if group.rank == LOST:
            for communicator in nccl.living:
                communicator.error = "remote process exited or there was a network error"
            return over.wait(30)
        started = time.monotonic()
        with pytest.raises(ExchangeError, match="call 2 .attention., exchange_in .*remote process exited") as raised:
            layer(group)
            group.check()
        took = time.monotonic() - started
        again = pytest.raises(ExchangeError, layer, group)
        if group.rank == RANKS - 1:
            over.set()
        return str(raised.value), took, str(again.value)

    answers = run_virtual(RANKS, work, timeout=30)
    for message, took, again in (answers[0], answers[2]):
        assert message.startswith("group 'local/0:") and f"ranks [{LOST}" in message, message
        assert took < 4 and "cannot be used any more" in again, f"{took:.1f} s"


def check_after_a_peer_ended(ctx, killed):
    """Nobody calls: `check` alone finds that a peer was killed, and takes a peer that closed for what it is."""
    group = UlyssesGroup(ctx.group, exchange="shm", timeout=timedelta(seconds=60))
    layer(group)
    if ctx.rank == 1:
        lose("killed") if killed else group.close()
        return None
    until = time.monotonic() + 10
    while not (group.control.gone() or group.control.closed()) and time.monotonic() < until:
        time.sleep(0.01)
    if not killed:
        return group.check()
    with pytest.raises(ExchangeError, match=r"ranks \[1\] are gone"):
        group.check()
    with pytest.raises(ExchangeError, match="cannot be used any more"):
        group.check()
    return None


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "closed"])
def test_check_finds_a_killed_peer_over_shared_memory(pool, killed):
    answers = pool.fresh(3, check_after_a_peer_ended, killed)
    assert answers[0] is None and answers[2] is None


def host_of_the_store(ctx, seconds):
    """The rank that serves the store is stopped: nobody can read a last word, and nobody waits for one."""
    address = Path(os.environ["STORE_FILE"])
    if ctx.rank == 1:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        address.write_text(str(store.port))
    dist.barrier(group=ctx.group)
    if ctx.rank != 1:
        store = dist.TCPStore("127.0.0.1", int(address.read_text()), is_master=False)
    pg_map = dist.distributed_c10d._world.pg_map
    pg_map[dist.group.WORLD] = (pg_map[dist.group.WORLD][0], store)
    group = UlyssesGroup(ctx.group, timeout=timedelta(seconds=seconds))
    layer(group)
    if ctx.rank == 1:
        lose("stopped")
    started = time.monotonic()
    with pytest.raises(ExchangeError, match=r"waiting for ranks \[1\]"):
        layer(group)
    group.close()
    return time.monotonic() - started


def test_a_stopped_rank_that_serves_the_store_holds_nobody_up(pool, tmp_path):
    answers = pool.fresh(3, host_of_the_store, 1.0, env={"STORE_FILE": str(tmp_path / "port")})
    assert answers[0] < 6 and answers[2] < 6  # on a busy machine; to wait for the store would take 300 s


def resources():
    gc.collect()
    shared = Path("/proc/self/maps").read_text().count("memfd:ulysses_triton")
    tasks = len(os.listdir("/proc/self/task"))
    return len(os.listdir("/proc/self/fd")), threading.active_count(), tasks, shared, len(_GROUPS)


def work_and_fail(group):
    """A step that goes well, a call that differs, and an error: the bytes that the group's pool then still holds."""
    layer(group).sum().backward()
    with suppress(ShapeError):
        layer(group, causal=group.rank == LOST)
    with suppress(ExchangeError, ZeroDivisionError), group:
        if group.rank == LOST:
            raise ZeroDivisionError("in the user's code")
        layer(group)
    gc.collect()
    group.pool._settle()
    return group.pool.held + group.pool.free


def rebuilt(ctx, exchange, times):
    def once():
        return work_and_fail(UlyssesGroup(ctx.group, exchange=exchange, timeout=timedelta(seconds=30)))

    kept = [once() for _ in range(3)]
    dist.barrier(group=ctx.group)
    before = resources()
    kept += [once() for _ in range(times)]
    dist.barrier(group=ctx.group)
    return before, resources(), kept


rebuilds = pytest.mark.parametrize("times", [8, pytest.param(100, marks=pytest.mark.slow)])


@rebuilds
@pytest.mark.parametrize("exchange", ["shm", "torch"])
def test_groups_that_failed_leave_nothing(pool, exchange, times):
    for before, after, kept in pool.fresh(3, rebuilt, exchange, times):
        assert after == before and not any(kept)


@rebuilds
def test_virtual_groups_that_failed_leave_nothing(times):
    before = resources()
    for _ in range(times):
        assert run_virtual(RANKS, work_and_fail, timeout=30) == [0] * RANKS
    assert resources() == before


def stay_away(ctx):
    """Rank 1 never makes the call, and asks its group later."""
    group = UlyssesGroup(ctx.group, timeout=timedelta(seconds=SECONDS))
    layer(group)
    try:
        if ctx.rank == 1:
            time.sleep(SECONDS + 2)
            group.check()
        else:
            layer(group)
    except ExchangeError as error:
        return str(error)
    return "nothing raised"


def test_a_rank_that_never_calls_learns_of_it_too(pool):
    answers = pool.fresh(3, stay_away)
    assert "rank 0 in call 2 (attention), agreement" in answers[1], answers[1]
    for rank in (0, 2):
        assert "no word from ranks [1]" in answers[rank], answers[rank]


def test_a_virtual_rank_that_fails_ends_the_others_at_once():
    def work(group):
        layer(group)
        if group.rank == 1:
            raise ZeroDivisionError("in rank 1")
        started = time.monotonic()
        with pytest.raises(ExchangeError, match="rank 1"):
            layer(group)
        assert time.monotonic() - started < 5

    with pytest.raises(ZeroDivisionError):
        run_virtual(3, work, timeout=30)


def test_a_virtual_rank_that_stays_away_ends_in_an_error_at_the_deadline():
    def work(group):
        if group.rank == 1:
            return time.sleep(1.5)
        with pytest.raises(ExchangeError, match=r"no word from ranks \[1\]"):
            layer(group)

    run_virtual(3, work, timeout=0.5)


def test_a_kernel_that_fails_on_one_rank_is_told_to_the_others(monkeypatch):
    original = local.reference.attend_forward

    def failing(*args, **options):
        if threading.current_thread().name == "rank 1":
            raise MemoryError("no room for scores")
        return original(*args, **options)

    monkeypatch.setattr(local.reference, "attend_forward", failing)

    def work(group):
        with pytest.raises((MemoryError, ExchangeError)) as raised:
            layer(group)
        return raised.typename, str(raised.value)

    answers = run_virtual(2, work, timeout=5)
    assert answers[1] == ("MemoryError", "no room for scores")
    assert answers[0][0] == "ExchangeError" and "no room for scores" in answers[0][1]


def implicit_group_after_destroy(ctx):
    """A group made at first use belongs to its process group: another default group gets another one."""
    q = torch.randn(1, 4, 2, 16)
    ulysses_attention(q, q, q)
    dist.destroy_process_group()
    alone = ulysses_attention(q, q, q)
    store = dist.TCPStore("127.0.0.1", int(os.environ["SECOND_PORT"]), 2, ctx.rank == 0)
    dist.init_process_group("gloo", store=store, rank=ctx.rank, world_size=2)
    together = ulysses_attention(q, q, q)
    return torch.isfinite(alone).all().item() and not torch.equal(alone, together)


def test_implicit_groups_end_with_their_process_group(pool):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert pool.fresh(2, implicit_group_after_destroy, env={"SECOND_PORT": str(port)}) == [True, True]
