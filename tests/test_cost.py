"""The cost model: small examples by hand, and what holds for all problems and machines."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_triton import cost, schedule
from ulysses_triton.cost import MACHINES, Machine, best_chunks, exposed, machine_of, pairs, timeline
from ulysses_triton.placement import chunk_count
from ulysses_triton.spec import Problem

# One of everything a second, but nothing for latency and launches.
UNIT = Machine("unit", forward=1.0, backward=1.0, copy=1.0, exchange=1.0, latency=0.0, launch=0.0)


def problem(**changes: object) -> Problem:
    values = dict(
        batch=1, lens=(2, 2), kv_lens=(2, 2), heads=2, kv_heads=2, head_dim=16, value_dim=16, dtype="bfloat16",
        device="cuda", causal=False, scale=0.125,
    )  # fmt: skip
    return Problem(**(values | changes))


LONG = problem(
    lens=(8192,) * 8, kv_lens=(8192,) * 8, heads=64, kv_heads=8, head_dim=128, value_dim=128, causal=True, grad=True
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    ranks = draw(st.integers(1, 5))
    heads = draw(st.one_of(st.integers(1, 4).map(lambda n: n * ranks), st.integers(1, 9)))
    lens = tuple(draw(st.lists(st.integers(1, 5000), min_size=ranks, max_size=ranks)))
    found = problem(
        lens=lens,
        kv_lens=draw(st.sampled_from([lens, tuple(n + 1 for n in lens)])),
        heads=heads,
        kv_heads=draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        head_dim=draw(st.sampled_from([16, 33, 128])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(*[st.integers(-1, 6000)] * 2)),
        grad=draw(st.booleans()),
        recompute=draw(st.booleans()),
        return_lse=draw(st.booleans()),
        features=draw(st.sampled_from([None, 64])),
        out_features=draw(st.sampled_from([None, 48])),
        q_norm=draw(st.booleans()),
    )
    return replace(found, chunks=chunk_count(found, draw(st.integers(1, 4))))


machines = st.sampled_from([*MACHINES.values(), UNIT, cost.cpu(0.5)])


@given(*[st.integers(0, 9)] * 2, *[st.integers(-1, 10)] * 2)
def test_pairs_are_counted(queries, keys, left, right):
    def kept(i: int, j: int) -> bool:
        return (left < 0 or j >= i - left) and (right < 0 or j <= i + right)

    assert pairs(queries, keys, left, right) == sum(kept(i, j) for i in range(queries) for j in range(keys))


def test_a_forward_by_hand():
    """Two ranks with 2 tokens each and one head of 16 each, bf16: a row of q, k, v is 48 elements, of O 16.

    pack writes 2 x 2 x 48 elements of 2 bytes and reads as many: 768. The exchange sends half of them: 192. Attention
    is 4 x 4 scores times 2 x (16 + 16) = 1024. O goes out in 2 x 16 x 2 bytes to the other rank: 64, and unpack reads
    and writes 2 x (2 x 2 x 16) x 2 bytes: 256.
    """
    events = timeline(problem(), UNIT).of(1).events
    assert [(e.step, e.start, e.end, e.sent, e.exposed) for e in events] == [
        ("pack", 0, 768, 0, 0),
        ("exchange_in", 768, 960, 192, 192),
        ("attend", 960, 1984, 0, 0),
        ("exchange_out", 1984, 2048, 64, 64),
        ("unpack", 2048, 2304, 0, 0),
    ]
    assert exposed(problem(), UNIT) == 256


def test_one_sided_by_hand():
    """The bytes travel while kernels write them: 768 to copy beside 192 to send, 1024 to attend beside 64."""
    t = timeline(problem(), replace(UNIT, latency=10, launch=1), one_sided=True)
    assert [(e.step, e.start, e.end, e.sent) for e in t.of(0).events] == [
        ("pack", 0, 769, 0),
        ("exchange_in", 769, 779, 192),
        ("attend", 779, 1804, 0),
        ("exchange_out", 1804, 1814, 64),
    ]
    slow = timeline(problem(), replace(UNIT, exchange=0.1), one_sided=True)
    assert [e.seconds for e in slow.of(0).events] == [1920, 0, 1024, 0]


def test_a_backward_by_hand():
    """dO and delta are 16 + 2 elements a row, padded to 32; products are 2 x (3 x 16 + 2 x 16) a score, 2 launches."""
    t = timeline(problem(grad=True), replace(UNIT, launch=1))
    found = {e.step: e.seconds for e in t.of(0).events if e.what == "attention backward"}
    assert found == {
        "pack_grad": 1 + 3 * 2 * 2 * 32 * 2,
        "exchange_grad_in": 2 * 32 * 2,
        "attend_backward": 2 + 16 * 160,
        "exchange_grad_out": 2 * 48 * 2,
        "unpack_grad": 1 + 2 * 2 * 2 * 48 * 2,
    }


def test_projections_by_hand():
    """2 tokens a rank, 32 channels, 6 heads of 16: 2 x 2 x 32 x 96 FLOP; out of 2 heads to 24: 2 x 2 x 32 x 24.

    On the way back dx and dW are as much each, and so are dO and dWo; QK-norm projects the 4 heads of q and k again.
    """
    p = problem(features=32, out_features=24, q_norm=True, grad=True)
    found = {(e.what, e.step): e.seconds for e in timeline(p, replace(UNIT, copy=1e9)).of(0).events}
    expected = {
        ("attention", "project"): 2 * 2 * 32 * 96,
        ("attention", "project_out"): 2 * 2 * 32 * 24,
        ("attention backward", "project_out_grad"): 2 * 2 * 32 * 24,
        ("attention backward", "project_out_weight_grad"): 2 * 2 * 32 * 24,
        ("attention backward", "project_raw"): 2 * 2 * 32 * 64,
        ("attention backward", "project_grad"): 2 * 2 * 2 * 32 * 96,
    }
    assert {key: n for key, n in found.items() if key[1].startswith("project")} == pytest.approx(expected)
    moved = timeline(p, replace(UNIT, forward=1e9)).of(0).steps()
    assert moved["project"] == 2 * (2 * 32 + 32 * 96 + 2 * 96), "bytes of the matrices, where they take longer"


def test_all_chunks_project_what_one_does_and_hide_exchanges():
    p = replace(LONG, heads=64, kv_heads=64, features=8192, out_features=8192)
    network = replace(MACHINES["h100-network"], latency=0.0, launch=0.0)
    whole, parts = (timeline(replace(p, chunks=n), network) for n in (1, 4))
    for step in ("project", "project_out", "project_out_grad", "project_grad"):
        assert parts.steps()[step] == pytest.approx(whole.steps()[step])
    apart = timeline(replace(p, features=None, out_features=None, chunks=4), network)
    assert parts.exposed() < apart.exposed() < whole.exposed()


def test_an_exchange_waits_for_the_last_rank():
    """With 1 and 3 tokens rank 0 has packed long before rank 1, and gets all only after that."""
    p = problem(lens=(1, 3), kv_lens=(1, 3))
    first, second = (timeline(p, UNIT).of(rank).events for rank in (0, 1))
    assert (first[0].end, second[0].end) == (384, 1152)
    assert (first[1].start, first[1].end, first[1].exposed) == (384, 1152 + 3 * 96, 768 + 288)
    assert (second[1].start, second[1].end, second[1].exposed) == (1152, 1152 + 288, 288)


@given(problems(), st.booleans())
def test_it_walks_the_steps_of_the_schedule(p, one_sided):
    planned = [*schedule.of(p, one_sided), *(schedule.of_backward(p) if p.grad else ())]
    t = timeline(p, UNIT, one_sided=one_sided)
    for rank in range(p.ranks):
        for stream in ("compute", "exchange"):
            events = [(e.step, e.chunk) for e in t.of(rank).events if e.stream == stream]
            assert events == [s.which for s in planned if s.stream == stream]


@given(problems(), machines, st.booleans())
def test_exposed_time_is_within_the_exchanges(p, machine, one_sided):
    t = timeline(p, machine, one_sided=one_sided)
    assert 0 <= t.exposed() <= t.exchanging() * (1 + 1e-12) <= t.seconds() * (1 + 1e-9)
    for e in t.events:
        assert e.start <= e.end and 0 <= e.exposed <= e.seconds * (1 + 1e-9) + 1e-15
        assert e.stream == "exchange" or e.exposed == e.sent == 0
    for rank in range(p.ranks):
        for stream in ("compute", "exchange"):  # one thing at a time
            events = [e for e in t.of(rank).events if e.stream == stream]
            assert all(a.end <= b.start for a, b in zip(events, events[1:], strict=False))


@given(problems(), machines, st.booleans(), st.sampled_from(["exchange", "copy", "forward", "backward"]))
def test_a_faster_machine_is_never_slower(p, machine, one_sided, figure):
    faster = replace(machine, **{figure: 3 * getattr(machine, figure)})
    before, after = (timeline(p, m, one_sided=one_sided) for m in (machine, faster))
    assert after.seconds() <= before.seconds() * (1 + 1e-9)


def test_causal_and_windows_cost_less():
    def attend(**changes: object) -> float:
        return timeline(replace(LONG, **changes), UNIT).steps()["attend"]

    dense = attend(causal=False)
    assert attend() / dense == pytest.approx(0.5, abs=1e-4)
    assert attend(window=(655, -1)) / dense == pytest.approx(0.01, rel=0.01)


def test_wider_numbers_take_longer():
    """fp32 has half of the products per second and twice the bytes."""
    narrow, wide = (timeline(replace(LONG, dtype=dtype), UNIT).steps() for dtype in ("bfloat16", "float32"))
    for name in ("attend", "attend_backward", "exchange_in", "pack"):
        assert wide[name] == pytest.approx(2 * narrow[name])


def test_more_than_one_chunk_only_where_it_pays():
    h100 = MACHINES["h100"]
    assert best_chunks(replace(LONG, device="cpu"), h100) == 1
    assert best_chunks(LONG, replace(h100, latency=1.0)) == 1
    assert best_chunks(problem(), h100) == 1
    alone = replace(LONG, lens=(65536,), kv_lens=(65536,))
    assert best_chunks(alone, h100) == 1


@pytest.mark.parametrize(
    ("device", "machine"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_machines_are_found_by_the_name_of_their_gpu(device, machine):
    assert machine_of(device, True) == MACHINES.get(machine)
    assert machine_of(device, False) == MACHINES.get(f"{machine}-network")


def test_chunks_hide_exchanges():
    """Many heads over a network: the first and the last chunk's exchanges are what cannot hide."""
    network = replace(MACHINES["h100-network"], latency=0.0, launch=0.0)
    found = [exposed(replace(LONG, chunks=n), network) for n in (1, 2, 4, 8)]
    assert found[0] == pytest.approx(timeline(LONG, network).exchanging())
    assert all(after < before for before, after in zip(found, found[1:], strict=False))
    assert best_chunks(LONG, MACHINES["h100-network"]) > 1


def test_all_chunks_together_send_what_one_does():
    """Without delta, of which every chunk's row has its own padding."""
    plain = replace(LONG, attention="aten")
    for one_sided in (False, True):
        sent = [timeline(replace(plain, chunks=n), UNIT, one_sided=one_sided).sent() for n in (1, 2, 8)]
        assert len(set(sent)) == 1


@given(st.sampled_from(["NVIDIA H100 80GB HBM3", "NVIDIA B200"]), *[st.integers(2, 16)] * 2, st.floats(1e3, 1e8))
def test_two_hops_are_for_small_blocks(device, nodes, each, block):
    """Messages and bytes of both ways, counted: two hops are faster below one size, whatever the mesh."""
    inside, network = machine_of(device, True), machine_of(device, False)
    direct = nodes * each - each, each - 1  # messages of a rank over the network, and inside its node
    staged = nodes - 1, nodes * (each - 1)
    over_network = (nodes - 1) * each * block / network.exchange
    one, two = (
        over_network + far * network.latency + near * (inside.latency + block / inside.exchange)
        for far, near in (direct, staged)
    )
    below = cost.two_hops_below(device)
    assert (two < one) == (block < below) or two == pytest.approx(one, rel=1e-9)
    assert cost.two_hops_below("NVIDIA GeForce RTX 4090") is None


def test_machines_are_plausible():
    for name, m in MACHINES.items():
        assert m.name == name and 1e14 < m.backward < m.forward < 3e15 and m.exchange < m.copy
        assert MACHINES[f"{name.removesuffix('-network')}-network"].exchange == 50e9
