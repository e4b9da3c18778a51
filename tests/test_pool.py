"""The pool of ranks that other tests stand on."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from pool import Context, Exit, Failure, Pool, is_stopped

from ulysses_triton.errors import ShapeError


def who(ctx: Context) -> tuple[int, int, int, int]:
    return ctx.rank, ctx.size, dist.get_rank(ctx.group), dist.get_world_size(ctx.group)


def total(ctx: Context, x: torch.Tensor, *, times: int) -> torch.Tensor:
    x = x * times * (ctx.rank + 1)
    dist.all_reduce(x, group=ctx.group)
    return x


def pid(ctx: Context) -> int:
    assert ctx.pids[ctx.rank] == os.getpid()
    return os.getpid()


def settings(ctx: Context) -> tuple[object, ...]:
    import triton

    return triton.knobs.runtime.interpret, torch.get_num_threads(), bool(torch.empty(3).isnan().all())


def strange_tensors(ctx: Context) -> dict[str, torch.Tensor]:
    x = torch.arange(12.0, requires_grad=True)
    return {
        "transposed": x.detach().view(3, 4).t(),
        "bf16": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "with a graph": x * 2,
        "empty": torch.zeros(0, 3),
    }


def raise_on_odd_ranks(ctx: Context) -> str:
    if ctx.rank % 2:
        raise ShapeError(f"rank {ctx.rank} says no")
    return "fine"


def leave_others_waiting(ctx: Context) -> None:
    if ctx.rank == 1:
        time.sleep(3600)
    dist.barrier(group=ctx.group)


def unpicklable(ctx: Context) -> object:
    return lambda: None


def end(ctx: Context, by: int) -> str:
    if ctx.rank == 1:
        os.kill(os.getpid(), by)
    return "alive"


def keep_a_group(ctx: Context) -> None:
    dist.new_group(range(ctx.size), use_local_synchronization=True)


def use_a_group(ctx: Context) -> int:
    group = dist.new_group(range(ctx.size), use_local_synchronization=True)
    x = torch.ones(1)
    dist.all_reduce(x, group=group)
    dist.destroy_process_group(group)
    return int(x)


def stop_and_wake(ctx: Context) -> str:
    if ctx.rank == 0:
        while not is_stopped(ctx.pids[1]):
            time.sleep(0.01)
        os.kill(ctx.pids[1], signal.SIGCONT)
    else:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier(group=ctx.group)
    return "woken"


def variable(ctx: Context) -> tuple[str | None, int]:
    x = torch.ones(1)
    dist.all_reduce(x, group=ctx.group)
    return os.environ.get("ULYSSES_TRITON_TEST"), int(x)


@pytest.mark.parametrize("P", [1, 2, 3, 4, 8])
def test_runs_on_the_first_ranks(pool: Pool, P: int) -> None:
    assert pool.run(P, who) == [(rank, P, rank, P) for rank in range(P)]
    expected = torch.full((3,), 2.0 * P * (P + 1) / 2)
    assert all(torch.equal(x, expected) for x in pool.run(P, total, torch.ones(3), times=2))


def test_workers_are_started_once(pool: Pool) -> None:
    assert pool.run(4, pid) == pool.run(8, pid)[:4]


def test_workers_are_set_up_as_pytest_is(pool: Pool) -> None:
    here = settings(Context(0, 1, dist.GroupMember.NON_GROUP_MEMBER, ()))
    assert here[1:] == (1, True)
    assert pool.run(2, settings) == [here] * 2


def test_tensors_come_by_value(pool: Pool) -> None:
    (tensors,) = pool.run(1, strange_tensors)
    x = torch.arange(12.0)
    assert torch.equal(tensors["transposed"], x.view(3, 4).t()) and tensors["transposed"].stride() == (1, 4)
    assert tensors["bf16"].dtype == torch.bfloat16 and tensors["bf16"].isnan().tolist() == [False, True]
    assert torch.equal(tensors["with a graph"], x * 2)
    assert tensors["empty"].shape == (0, 3)


def test_an_exception_fails_with_every_traceback(pool: Pool) -> None:
    with pytest.raises(AssertionError) as caught:
        pool.run(4, raise_on_odd_ranks)
    message = str(caught.value)
    assert "rank 1 says no" in message and "rank 3 says no" in message and "in raise_on_odd_ranks" in message
    assert "--- rank 0" not in message


def test_expected_errors_are_returned_and_the_workers_live_on(pool: Pool) -> None:
    before = pool.run(4, pid)
    even, odd, _, _ = pool.run(4, raise_on_odd_ranks, expect_errors=True)
    assert even == "fine"
    assert isinstance(odd, Failure) and odd.kind == "ShapeError" and "ValueError" in odd.kinds
    assert odd.message == "rank 1 says no"
    assert pool.run(4, pid) == before


def test_a_result_that_cannot_travel_is_an_error(pool: Pool) -> None:
    with pytest.raises(AssertionError, match="pickle"):
        pool.run(1, unpicklable)


def test_a_hang_shows_stacks_and_the_next_run_has_new_workers(pool: Pool) -> None:
    before = pool.run(2, pid)
    with pytest.raises(AssertionError, match="not all answered within 3 s") as caught:
        pool.run(2, leave_others_waiting, deadline=3)
    assert str(caught.value).count("in leave_others_waiting") == 2
    after = pool.run(2, pid)
    assert not set(before) & set(after)


def test_a_dead_worker_fails_the_run(pool: Pool) -> None:
    with pytest.raises(AssertionError, match="rank 1: the process ended by SIGABRT"):
        pool.run(2, end, signal.SIGABRT)
    assert pool.run(2, total, torch.ones(1), times=1)[0] == 3


def test_groups_that_some_ranks_kept_do_not_hang_the_next_run(pool: Pool) -> None:
    pool.run(2, keep_a_group)
    assert pool.run(4, use_a_group) == [4] * 4


def test_ranks_can_make_groups_of_their_own_again_and_again(pool: Pool) -> None:
    before = pool.run(3, pid)
    for P in (3, 2, 3, 3, 3, 3, 3, 3):
        assert pool.run(P, use_a_group) == [P] * P
    assert pool.run(3, pid) == before


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_fresh_ranks_may_die_or_stop(pool: Pool, by: signal.Signals) -> None:
    before = pool.run(2, pid)
    alive, ended, _ = pool.fresh(3, end, by)
    assert alive == "alive"
    assert isinstance(ended, Exit) and ended.stopped == (by == signal.SIGSTOP)
    assert ended.signal == (signal.SIGKILL if by == signal.SIGKILL else None)
    assert pool.run(2, pid) == before


def test_a_fresh_rank_may_be_woken(pool: Pool) -> None:
    assert pool.fresh(2, stop_and_wake) == ["woken"] * 2


def test_fresh_ranks_take_variables(pool: Pool) -> None:
    assert pool.fresh(2, variable, env={"ULYSSES_TRITON_TEST": "yes"}) == [("yes", 2)] * 2
    assert "ULYSSES_TRITON_TEST" not in os.environ
