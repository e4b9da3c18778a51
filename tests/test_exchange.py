"""One contract for all exchanges: whatever carries them, blocks arrive where they belong, in the order of the ranks."""

from __future__ import annotations

from datetime import timedelta

import fake_nccl
import fake_symm
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ulysses_triton import ExchangeError, UlyssesGroup, run_virtual
from ulysses_triton.exchange.nccl import NcclExchange
from ulysses_triton.exchange.two_hop import TwoHopExchange
from ulysses_triton.exchange.virtual import VirtualWorld
from ulysses_triton.messages import Message


def message(rank: int, sizes: list[list[int]]) -> Message:
    """`sizes[a][b]` elements go from rank a to rank b; blocks lie in rank order at the receiver."""
    ranks = range(len(sizes))
    return Message(
        send=tuple(sizes[rank]),
        receive=tuple(sizes[a][rank] for a in ranks),
        land=tuple(sum(sizes[a][b] for a in range(rank)) for b in ranks),
        between=lambda a, b: sizes[a][b],
    )


UNEVEN = [[3, 0, 5], [1, 1, 1], [0, 4, 2]]
NOTHING = [[0] * 3] * 3
LARGE = [[50_000, 20_000, 1] for _ in range(3)]


def for_all(group: UlyssesGroup, sizes: list[list[int]]) -> list[list[int]]:
    """Such sizes for the ranks of a group; the fourth sends nothing."""
    return [[sizes[a % 3][b % 3] * (a != 3) for b in range(group.size)] for a in range(group.size)]


def filled(source: int, target: int, n: int, dtype: torch.dtype, hop: int) -> torch.Tensor:
    """What travels from one rank to another in a hop: any bits, NaN patterns too."""
    bits = torch.arange(n * dtype.itemsize, dtype=torch.int64) * 31 + 7 * source + 13 * target + 17 * hop
    return bits.to(torch.uint8).view(dtype)


def several_hops(group, dtype):
    """Hops of several sections one after the other, with a hop of nothing between; returns what was wrong."""
    wrong = []
    for hop, sections in enumerate([[UNEVEN], [UNEVEN, LARGE], [NOTHING], [LARGE, NOTHING], [UNEVEN]]):
        messages = [message(group.rank, for_all(group, sizes)) for sizes in sections]
        receive = [group.pool.take((sum(m.receive),), dtype, torch.device("cpu")) for m in messages]
        opened = group.exchange.open(messages, receive, [None] * len(messages))
        for blocks, m in zip(opened.blocks, messages, strict=True):
            for target, (block, n) in enumerate(zip(blocks, m.send, strict=True)):
                assert block.shape == (n,)
                block.copy_(filled(group.rank, target, n, dtype, hop))
        opened.start()
        opened.finish()
        for got, m in zip(receive, messages, strict=True):
            expected = [filled(source, group.rank, n, dtype, hop) for source, n in enumerate(m.receive)]
            if not torch.equal(got.view(torch.uint8), torch.cat(expected).view(torch.uint8)):
                wrong.append((hop, got))
        assert (opened.peers is not None) == group.exchange.one_sided
    return wrong


def on_a_process(ctx, name, work, *arguments):
    with UlyssesGroup(ctx.group, exchange=name) as group:
        assert group.exchange.name == name
        return work(group, *arguments)


def on_exchange(name, pool, work, *arguments):
    """What `work(group, *arguments)` returns on three ranks of an exchange."""
    if name == "nccl":
        return fake_nccl.run(3, lambda g: work(g, *arguments))
    if name == "symm":
        return fake_symm.run(3, work, *arguments)
    if name == "virtual":
        return run_virtual(3, lambda g: work(g, *arguments))
    return pool.run(3, on_a_process, name, work, *arguments)


# nccl and symm: their own code over fakes of NCCL, CUDA's streams and symmetric memory
every_exchange = pytest.mark.parametrize("name", ["torch", "shm", "nccl", "symm", "virtual"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@every_exchange
def test_blocks_arrive_bit_for_bit(pool, name, dtype):
    assert on_exchange(name, pool, several_hops, dtype) == [[]] * 3


def overlapping_hops(group):
    """Hops that are open, started and finished across each other; returns whether all arrived."""
    m = message(group.rank, for_all(group, UNEVEN))

    def opened(number):
        receive = group.pool.take((sum(m.receive),), torch.float32, torch.device("cpu"))
        hop = group.exchange.open([m], [receive], [None])
        return hop, receive, number

    def write(hop, _, number):
        for target, (block, n) in enumerate(zip(hop.blocks[0], m.send, strict=True)):
            block.copy_(filled(group.rank, target, n, torch.float32, number))
        hop.start()

    def arrived(hop, receive, number):
        hop.finish()
        parts = [filled(source, group.rank, n, torch.float32, number) for source, n in enumerate(m.receive)]
        return torch.equal(receive.view(torch.int32), torch.cat(parts).view(torch.int32))

    a, b = opened(0), opened(1)
    write(*a)
    write(*b)
    first = arrived(*a), arrived(*b)
    a, b = opened(2), opened(3)  # b starts and ends while a is only open
    write(*b)
    second = arrived(*b)
    write(*a)
    return [*first, second, arrived(*a)]


@every_exchange
def test_hops_may_overlap(pool, name):
    assert on_exchange(name, pool, overlapping_hops) == [[True] * 4] * 3


def own_send_buffer(group):
    """A send buffer of the caller's own is what travels, and is only read."""
    m = message(group.rank, for_all(group, UNEVEN))
    mine = torch.cat([filled(group.rank, target, n, torch.float32, 0) for target, n in enumerate(m.send)])
    before = mine.clone()
    receive = group.pool.take((sum(m.receive),), torch.float32, torch.device("cpu"))
    hop = group.exchange.open([m], [receive], [mine])
    if group.exchange.one_sided:
        for block, part in zip(hop.blocks[0], torch.split(mine, list(m.send)), strict=True):
            block.copy_(part)
    hop.start()
    hop.finish()
    expected = torch.cat([filled(source, group.rank, n, torch.float32, 0) for source, n in enumerate(m.receive)])
    same = torch.equal(mine.view(torch.int32), before.view(torch.int32))
    return same and torch.equal(receive.view(torch.int32), expected.view(torch.int32))


@every_exchange
def test_an_own_send_buffer_travels(pool, name):
    assert all(on_exchange(name, pool, own_send_buffer))


def gathers(group):
    """Control messages: in rank order, all of them, apart from the data."""
    for number in range(5):
        found = group.control.gather(bytes([group.rank, number]))
        if found != [bytes([rank, number]) for rank in range(group.size)]:
            return found
    first, second = (group.control.begin_gather(bytes([group.rank, number])) for number in (7, 8))
    between = group.control.gather(bytes([group.rank]))
    if between != [bytes([rank]) for rank in range(group.size)]:
        return between
    for take, number in ((first, 7), (second, 8)):
        if take() != [bytes([rank, number]) for rank in range(group.size)]:
            return number
    group.control.tell(f"word of {group.rank}")
    return group.control.hear(5.0) == {rank: f"word of {rank}" for rank in range(group.size)}


@every_exchange
def test_control_messages(pool, name):
    assert on_exchange(name, pool, gathers) == [True] * 3


def gathers_at_length(group):
    """Payloads that no connection has room for, from all ranks at once."""
    payloads = [bytes([rank + 1]) * 3_000_000 for rank in range(group.size)]
    return group.control.gather(payloads[group.rank]) == payloads


@every_exchange
def test_long_control_messages(pool, name):
    assert on_exchange(name, pool, gathers_at_length) == [True] * 3


def groups_again_and_again(ctx):
    """Groups over the same ranks, one after the other and two at once: none meets another's messages."""
    for number in range(10):
        both = [("torch", "torch"), ("shm", "shm"), ("torch", "shm")][number % 3]
        first, second = (UlyssesGroup(ctx.group, exchange=name) for name in both)
        with first, second:
            assert first.name != second.name
            assert several_hops(first, torch.float32) == several_hops(second, torch.float32) == []
            assert second.control.gather(b"b") == [b"b"] * 3 and first.control.gather(b"a") == [b"a"] * 3
    if ctx.rank < 2:  # a rank that is in more groups than its peers
        dist.new_group([0, 1], use_local_synchronization=True)
    with UlyssesGroup(ctx.group) as third:
        return third.control.gather(b"c") == [b"c"] * 3


def test_groups_can_be_made_again(pool):
    assert pool.fresh(3, groups_again_and_again) == [True] * 3


def test_a_virtual_rank_that_does_not_arrive_is_named():
    def work(group):
        m = message(group.rank, UNEVEN)
        with group.step("exchange_in"):
            hop = group.exchange.open([m], [torch.empty(sum(m.receive))], [None])
            if group.rank == 2:
                return
            hop.start()
            hop.finish()

    with pytest.raises(ExchangeError, match=r"waiting for ranks \[2\]: rank 2 has closed the group"):
        run_virtual(3, work, timeout=0.5)


# -- two hops: the same contract, on nodes x ranks of a node

shapes = pytest.mark.parametrize("shape", [(2, 2), (2, 3), (3, 2)], ids=str)


def contract(group):
    """All of the above on one group; the name of what does not hold."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    held = {
        "bit for bit": all(several_hops(group, dtype) == [] for dtype in dtypes),
        "overlapping": overlapping_hops(group) == [True] * 4,
        "own send buffer": own_send_buffer(group),
        "control": gathers_at_length(group) and gathers(group) is True,
    }
    return [name for name, holds in held.items() if not holds]


def contract_on_a_mesh(ctx, shape):
    with UlyssesGroup(init_device_mesh("cpu", shape, mesh_dim_names=("node", "gpu")), exchange="two_hop") as group:
        assert group.exchange.name == "two_hop" and group.size == shape[0] * shape[1]
        return contract(group)


@shapes
def test_two_hops_hold_the_contract(pool, shape):
    ranks = shape[0] * shape[1]
    assert pool.fresh(ranks, contract_on_a_mesh, shape) == [[]] * ranks


@shapes
def test_two_hops_hold_the_contract_over_nccl(shape):
    """Over fakes of NCCL, with a communicator for each node and one for each number."""
    nccl, (nodes, each) = fake_nccl.FakeNccl(), shape
    inner, outer = [VirtualWorld(each) for _ in range(nodes)], [VirtualWorld(nodes) for _ in range(each)]

    def work(group):
        def over(member):
            return NcclExchange(
                nccl,
                member,
                group.pool,
                timedelta(seconds=60),
                stream=lambda device: fake_nccl.FakeStream(nccl, device),
            )

        node, number = divmod(group.rank, each)
        parts = over(inner[node].member(number)), over(outer[number].member(node))
        group.exchange = TwoHopExchange(group.rank, nodes, each, *parts)
        return contract(group)

    assert run_virtual(nodes * each, work) == [[]] * (nodes * each)
    assert not nccl.living and nccl.mismatch is None
