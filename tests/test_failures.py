"""A rank that dies, stops or goes elsewhere: an ExchangeError on every survivor, in time, and never a hang."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from pool import Exit

from ulysses_triton import ExchangeError, UlyssesGroup, local, run_virtual, ulysses_attention

SECONDS = 2.0


def layer(group, causal=True):
    q = torch.randn(1, 4, 6, 16, requires_grad=True)
    return ulysses_attention(q, q, q, group, causal=causal, attention="reference")


def lose_a_rank(ctx, exchange, how, when, seconds):
    """Rank 1 is lost at a certain point; the others say what they saw, and go on with a new group of survivors."""
    with_deadline = UlyssesGroup(ctx.group, exchange=exchange, timeout=timedelta(seconds=seconds))
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
        assert took < (4 if at_once else 2 * SECONDS + 2), f"{took:.1f} s"
        assert "cannot be used any more" in again and after


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
