"""Two hops over a mesh of nodes: what one hop gives, with fewer messages between the nodes, and its faults."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from layer import Case, check, run
from pool import Exit
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ulysses_triton import (
    ExchangeError,
    OptionError,
    UlyssesGroup,
    carriers,
    gather_sequence,
    ulysses_attention,
)

NAMES = ("node", "gpu")
CASES = [
    Case((200, 150, 0, 100), heads=3, kv_heads=1),  # heads that are cut
    Case((150, 150, 150, 150), heads=5, kv_heads=5, causal=False, chunks=2, dtype="bf16"),
    Case((8, 8, 8, 8), heads=8, kv_heads=8),
    Case((5, 0, 9, 2), heads=8, kv_heads=2, chunks=2, return_lse=True, causal=False),
    Case((0, 0, 13, 1), heads=4, kv_heads=1, dim=33, value_dim=40, batch=2, recompute="exchange", chunks=4),
    Case((4, 7, 1, 3), heads=4, kv_heads=2, kv_lens=(0, 5, 6, 8), dtype="bf16", chunks=2),
    Case((6, 6, 6, 6), heads=4, kv_heads=4, fused=True, rope=16, norm=True, attention="aten"),
    Case((3, 8, 0, 2), heads=8, kv_heads=4, documents="mixed", dtype="fp64", dropout=0.4, sinks=True),
]


def mesh_of(shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=NAMES)


def both_ways(ctx, shape, cases):
    """Of every case: two hops' results, and whether they are the same bits as one hop's."""
    mesh, answers = mesh_of(shape), []
    for case in cases:
        found = []
        for exchange in ("two_hop", "torch"):
            with UlyssesGroup(mesh, exchange=exchange, chunks=case.chunks) as group:
                assert group.exchange.name == exchange
                found.append(run(case, group.rank, group))
        two, one = found
        answers.append((two, [name for name in one if not torch.equal(one[name], two[name])]))
    return answers


@pytest.mark.parametrize(
    ("shape", "cases"),
    [((2, 2), CASES), ((3, 2), [Case((4, 0, 3, 9, 1, 2), heads=6, kv_heads=3), Case((5,) * 6, heads=12, kv_heads=2)])],
    ids=["2 x 2", "3 x 2"],
)
def test_two_hops_equal_one_device_and_bit_for_bit_one_hop(pool, shape, cases):
    answers = pool.fresh(shape[0] * shape[1], both_ways, shape, cases)
    for case, results in zip(cases, zip(*answers, strict=True), strict=True):
        assert [different for _, different in results] == [[]] * len(results), case
        check(case, [found for found, _ in results])


def layer(group, tokens=4, causal=True):
    q = torch.randn(1, tokens, 12, 16, requires_grad=True)
    return ulysses_attention(q, q, q, group, causal=causal, attention="reference")


def messages_between_nodes(ctx, shape):
    """How many messages a rank sends to other nodes in a layer of four exchanges: in one hop, and in two."""
    mesh, sent = mesh_of(shape), Counter()
    all_to_all, ranks_of = dist.all_to_all_single, dist.get_process_group_ranks

    def counting(into, buffer, receive, send, group, async_op):
        others = [n for rank, n in zip(ranks_of(group), send, strict=True) if rank // shape[1] != ctx.rank // shape[1]]
        sent[exchange] += sum(n > 0 for n in others)
        return all_to_all(into, buffer, receive, send, group=group, async_op=async_op)

    dist.all_to_all_single = counting
    for exchange in ("torch", "two_hop"):
        with UlyssesGroup(mesh, exchange=exchange, chunks=1) as group:
            layer(group).sum().backward()
            assert sum(n for kind, n in group.counts.items() if kind != "control") == 4
    return sent["torch"], sent["two_hop"]


@pytest.mark.parametrize("shape", [(3, 2), (2, 3)], ids=str)
def test_two_hops_send_as_many_fewer_messages_between_nodes_as_a_node_has_ranks(pool, shape):
    nodes, each = shape
    found = pool.fresh(nodes * each, messages_between_nodes, shape)
    assert found == [(4 * (nodes - 1) * each, 4 * (nodes - 1))] * nodes * each


def chosen(ctx):
    """What a mesh gets on CPU ranks, what is said about it, and what is refused."""
    mesh = mesh_of((2, 2))
    with UlyssesGroup(mesh) as group:
        assert group.exchange.name == "shm" and group.rank == ctx.rank and layer(group).shape == (1, 4, 12, 16)
        assert "exchange: shm (auto: the ranks share this host's memory)\nnode 0: ranks 0..1, on " in group.explain()
    carriers._shared_memory = lambda *_: "for a test"
    with UlyssesGroup(mesh) as group:
        assert group.exchange.name == "torch" and layer(group).shape == (1, 4, 12, 16)
        assert "not shm: for a test; not two_hop: the cost model has no figures of a network between CPUs" in (
            group.explain()
        )
    with UlyssesGroup(mesh, exchange="two_hop") as group:
        lines = group.explain().splitlines()
        assert "exchange: two_hop (two_hop: inside the nodes, then between them)" in lines
        assert [line.partition(", on ")[0] for line in lines if line.startswith("node")] == [
            "node 0: ranks 0..1", "node 1: ranks 2..3",
        ]  # fmt: skip
        x = torch.arange(3.0) + 3 * ctx.rank
        assert torch.equal(gather_sequence(x, group, dim=0), torch.arange(12.0))
    for asked, wanted in (
        (None, "needs nodes"),
        (mesh["gpu"], "needs nodes"),
        (DeviceMesh("cpu", [[0, 1], [2, 3]]), "two that have names"),
        (init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("a", "b", "c")), "DeviceMesh of 3 dimensions"),
        (DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("turned", "round")), "rise row by row"),
    ):
        with pytest.raises(OptionError, match=wanted):
            UlyssesGroup(asked, exchange="two_hop")
    with pytest.raises(OptionError, match="or a UlyssesGroup of two: nodes and their ranks"):
        layer(mesh)
    return by_size(mesh)


def by_size(mesh):
    """With a figure as of GPUs, here 1000 bytes of a block: the hops of two layers."""
    carriers._two_hops_below = lambda *_: (1000.0, "for a test")
    hops = []
    with UlyssesGroup(mesh, chunks=1) as group:
        opened = group.exchange.open

        def telling(*arguments):
            hop = opened(*arguments)
            hops.append(type(hop).__name__)
            return hop

        group.exchange.open = telling
        for tokens in (1, 100):  # blocks of 3 x 3 heads of 16 in fp32, 576 bytes, then 100 times as many
            layer(group, tokens)
        assert "exchange: two_hop (auto: for a test)" in group.explain()
    return hops


def test_what_a_mesh_gets_is_said_and_large_blocks_take_one_hop(pool):
    answers = pool.fresh(4, chosen)
    assert answers == [["TwoHop"] * 2 + ["TorchHop"] * 2] * 4, answers


@pytest.mark.parametrize(
    ("names", "shape", "below", "reason"),
    [
        (["NVIDIA H100 80GB HBM3"] * 4, (2, 2), 4.77e6, "two hops below 4.8 MB from a rank to another"),
        (["NVIDIA H100 80GB HBM3", "NVIDIA H200"] * 2, (2, 2), None, "no figures of these GPUs"),
        (["NVIDIA GeForce RTX 4090"] * 4, (2, 2), None, "no figures of these GPUs"),
        (["NVIDIA H100 80GB HBM3"] * 4, (1, 4), None, "the mesh is one node"),
        (["NVIDIA H100 80GB HBM3"] * 4, (4, 1), None, "one rank on each node"),
    ],
    ids=["H100", "mixed", "unknown", "one node", "one rank a node"],
)
def test_figures_of_gpus_decide(monkeypatch, names, shape, below, reason):
    monkeypatch.setattr(carriers, "devices_of", lambda _: {"cuda"})
    monkeypatch.setattr(carriers, "share", lambda *_: names)  # what every rank tells
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: names[0])
    nodes = SimpleNamespace(count=shape[0], each=shape[1])
    found, why = carriers._two_hops_below(nodes, None, None, timedelta(seconds=1))
    assert found == pytest.approx(below) and reason in why


def beside_data(ctx):
    """Two sequences, each over two nodes of two ranks: the mesh's other dimension is data."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("data", *NAMES))
    x = torch.full((1,), float(ctx.rank))
    with UlyssesGroup(mesh["node", "gpu"], exchange="two_hop") as group:
        assert (group.rank, group.size) == (ctx.rank % 4, 4)
        return gather_sequence(x, group, dim=0).tolist()


def test_a_mesh_of_nodes_beside_data_parallel_ranks(pool):
    assert pool.fresh(8, beside_data) == [[0.0, 1.0, 2.0, 3.0]] * 4 + [[4.0, 5.0, 6.0, 7.0]] * 4


SECONDS = 2.0


def lose_a_rank(ctx, how, when):
    """Rank 3 is lost after the agreement, ahead of its first hop; the others say what they saw, and how late."""
    group = UlyssesGroup(mesh_of((2, 2)), exchange="two_hop", timeout=timedelta(seconds=SECONDS))
    out = layer(group)
    if ctx.rank == 3:
        opened = group.exchange.open

        def end(*arguments):
            os.kill(os.getpid(), how)
            return opened(*arguments)

        group.exchange.open = end
    started = time.monotonic()
    with pytest.raises(ExchangeError) as caught:
        out.sum().backward() if when == "backward" else layer(group)
    took = time.monotonic() - started
    with pytest.raises(ExchangeError, match="cannot be used any more"):
        layer(group)
    group.close()
    return str(caught.value), took


@pytest.mark.parametrize(("how", "when"), [(signal.SIGKILL, "forward"), (signal.SIGSTOP, "backward")])
def test_survivors_raise_in_time_and_name_hop_and_rank(pool, how, when):
    answers = pool.fresh(4, lose_a_rank, how, when)
    assert isinstance(answers[3], Exit)
    step = "exchange_grad_in" if when == "backward" else "exchange_in"
    hops = ["between nodes, ranks [0, 2]", "between nodes, ranks [1, 3]", "inside node 1, ranks [2, 3]"]
    for rank, (message, took) in enumerate(answers[:3]):
        assert message.startswith("group '0/0:") and "3]: died, stopped, or elsewhere" in message, message
        assert f"rank {rank} in call" in message and f"{step}: the hop {hops[rank]}: " in message, message
        assert took < SECONDS + 2, f"{took:.1f} s"
