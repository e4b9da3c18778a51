"""The exchange over symmetric memory: its kernels, its pool, and its protocol over a fake of PyTorch's memory.

Not on a GPU: the kernels run in Triton's interpreter, a wait after what it waits for, and are compiled ahead of time.
"""

from __future__ import annotations

import gc
import threading
import time

import fake_symm
import layer
import pytest
import test_aot
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_exchange import UNEVEN, message

from ulysses_triton import ExchangeError, UlyssesGroup, run_virtual
from ulysses_triton.errors import GroupError, OutOfMemoryError
from ulysses_triton.exchange import symm
from ulysses_triton.exchange.symm_pool import Place, Ranges, SymmetricPool
from ulysses_triton.exchange.virtual import VirtualWorld
from ulysses_triton.kernels import pack, reference, unpack
from ulysses_triton.kernels._table import table
from ulysses_triton.kernels.signals import ARRIVED, FLAGS, GAVE_UP, KINDS, READY, SILENT, signal, wait

CPU = torch.device("cpu")


class Pads:
    """The signals of some ranks, all in this process."""

    def __init__(self, ranks: int) -> None:
        self.pad = [torch.zeros(KINDS * ranks, dtype=torch.int64) for _ in range(ranks)]
        self.table = torch.tensor([pad.data_ptr() for pad in self.pad])
        self.counts = [torch.zeros(KINDS + 1, ranks, dtype=torch.int64) for _ in range(ranks)]
        self.status = [torch.zeros(FLAGS + ranks, dtype=torch.int64) for _ in range(ranks)]

    def signal(self, rank: int, kind: int) -> None:
        signal(self.table, self.counts[rank], self.status[rank], kind, rank)

    def wait(self, rank: int, kind: int, behind: int = 0) -> list[int]:
        """The status after a wait of 50 polls: whether it gave up, of `poison`, and by rank."""
        wait(self.pad[rank], self.counts[rank], self.status[rank], kind, behind, 0.05)
        first, *others = self.status[rank].tolist()
        return [int(first != 0), *others]


def test_signals_are_counted_by_kind_and_source():
    pads = Pads(3)
    for rank in range(3):
        pads.signal(rank, READY)
    pads.signal(1, ARRIVED)
    pads.signal(1, ARRIVED)
    for pad in pads.pad:
        assert pad.tolist() == [1, 1, 1, 0, 2, 0]
    for rank in range(3):
        assert pads.wait(rank, READY) == [0] * 5


def test_a_wait_is_for_the_signals_up_to_one_of_this_rank():
    """`behind` says which, so hops may be finished in another order, and later than the next one is started."""
    pads = Pads(2)
    for _ in range(3):
        pads.signal(0, ARRIVED)
    pads.signal(1, ARRIVED)
    assert pads.wait(0, ARRIVED, behind=2) == [0] * 4
    assert pads.wait(0, ARRIVED, behind=1) == [1, 0, 0, SILENT]


def test_a_replay_counts_on():
    """The same launches again and again, as a graph has them."""
    pads = Pads(2)
    for _ in range(4):
        for kind in (READY, ARRIVED):
            pads.signal(0, kind)
            pads.signal(1, kind)
            assert pads.wait(0, kind) == pads.wait(1, kind) == [0] * 4
    assert pads.pad[0].tolist() == [4] * 4


def test_who_gave_up_is_not_waited_for_and_says_so():
    pads = Pads(3)
    pads.signal(0, READY)
    assert pads.wait(0, READY) == [1, 0, 0, SILENT, SILENT]
    pads.signal(0, ARRIVED)  # it goes on, but what it writes is not to be read
    pads.signal(1, ARRIVED)
    pads.signal(2, ARRIVED)
    assert pads.wait(1, ARRIVED) == [1, 0, GAVE_UP, 0, 0]


def test_the_host_can_end_a_wait():
    pads = Pads(2)
    pads.signal(0, READY)
    pads.status[0][0] = 1
    wait(pads.pad[0], pads.counts[0], pads.status[0], READY, 0, 1e6)  # until its first look, not for 11 days
    assert pads.status[0].tolist() == [1, 0, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 1), st.integers(0, 2)), max_size=12))
def test_signals_are_what_their_twins_are(steps):
    """Signals, waits and words of the host, of three ranks in any order."""
    ours, twins = Pads(3), Pads(3)
    for action, rank, kind, behind in steps:
        if action < 2:
            ours.signal(rank, kind)
            reference.signal(twins.pad, twins.counts[rank], twins.status[rank], kind, rank)
        elif action < 4:
            ours.wait(rank, kind, behind)
            reference.wait(twins.pad[rank], twins.counts[rank], twins.status[rank], kind, behind)
        else:
            ours.status[rank][0] = twins.status[rank][0] = 1
        for name in ("pad", "counts", "status"):
            assert torch.equal(torch.stack(getattr(ours, name)), torch.stack(getattr(twins, name))), name


PTX = """
import json, re, sys
import torch, triton
from bench import aot
from ulysses_triton.kernels import poison, signals

def call():
    numbers = torch.zeros(9, dtype=torch.int64)
    counts = torch.zeros(signals.KINDS + 1, 3, dtype=torch.int64)
    signals.signal(numbers[:3], counts, numbers, signals.READY, 1)
    signals.wait(numbers, counts, numbers, signals.ARRIVED, 0, 600.0)
    poison.poison(numbers[:2], numbers, 0)

found = {}
for launch in aot.capture(sys.argv[1], call):
    source, options = aot.specialise(launch, sys.argv[1])
    compiled = triton.compile(source, target=aot.TARGETS[sys.argv[1]], options=options)
    found[launch.kernel.__name__] = compiled.asm["ptx"].split(".section")[0]
print(json.dumps(found))
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_signals_release_and_waits_acquire_for_the_whole_system(target):
    ptx = test_aot.run(PTX, target)
    assert "atom.global.sys.release.exch.b64" in ptx["_signal_kernel"]
    polls = [line for line in ptx["_wait_kernel"].splitlines() if "ld.global.sys.acquire.b64" in line]
    assert len(polls) == 2  # before the loop and in it
    assert "globaltimer" in ptx["_wait_kernel"]
    assert not [name for name, text in ptx.items() if "trap" in text]


# -- the pool


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_ranges_never_overlap_and_join_again(steps):
    ranges, taken = Ranges(), []
    for segment in range(2):
        ranges.give(Place(segment, 0, 100))
    for is_take, number in steps:
        if is_take:
            place = ranges.take(number)
            assert place is not None or ranges.size < 200
            taken += [place] if place is not None else []
        elif taken:
            ranges.give(taken.pop(number % len(taken)))
        used = {(p.segment, i) for p in taken for i in range(p.start, p.stop)}
        assert len(used) == sum(p.size for p in taken) == 200 - ranges.size
    middle = [part for segment in range(2) for part in ranges.take_from(Place(segment, 20, 60))]
    assert all(20 <= p.start < p.stop <= 60 for p in middle) and not ranges.take_from(Place(0, 20, 60))
    for part in middle:
        ranges.give(part)
    assert ranges.size == 200 - sum(p.size for p in taken)
    for place in taken:
        ranges.give(place)
    assert [ranges.take(100), ranges.take(100), ranges.take(1)] == [Place(0, 0, 100), Place(1, 0, 100), None]


def made_pool(size=4096):
    streams = fake_symm.FakeStreams()
    pool = SymmetricPool(CPU, streams)
    pool.add(torch.zeros(size, dtype=torch.uint8))
    return pool, streams


def test_a_buffer_is_free_again_when_its_storage_is_gone():
    pool, _ = made_pool()
    tensor = pool.take((2, 3, 100), torch.float32, CPU)
    assert tensor.shape == (2, 3, 100) and tensor.is_contiguous() and pool.find(tensor) == (0, 0)
    view = tensor[1, :, 7]
    assert pool.find(view) == (0, 4 * 307) and pool.held == 2560 and pool.free == 4096 - 2560
    del tensor
    assert pool.find(pool.take((9,), torch.float64, CPU)) == (0, 2560)
    del view
    assert pool.find(pool.take((512,), torch.float32, CPU)) == (0, 0)


def test_memory_of_its_own_where_there_is_no_room():
    pool, _ = made_pool()
    large = pool.take((4097,), torch.uint8, CPU)
    assert pool.find(large) is None and pool.held == 0
    assert pool.take((0,), torch.uint8, CPU).numel() == 0


def test_what_a_graph_uses_stays_with_graphs():
    pool, streams = made_pool()
    eager = pool.take((512,), torch.uint8, CPU)
    streams.graph = True
    captured = pool.take((512,), torch.uint8, CPU)
    assert pool.find(captured) == (0, 512)
    del captured, eager
    again = pool.take((512,), torch.uint8, CPU)  # what was captured; the eager one's work may not be done
    assert pool.find(again) == (0, 512)
    del again
    streams.graph = False
    first, second = pool.take((512,), torch.uint8, CPU), pool.take((512,), torch.uint8, CPU)
    assert (pool.find(first), pool.find(second)) == ((0, 0), (0, 1024))


def test_tensors_outlive_a_closed_pool():
    pool, _ = made_pool()
    tensor = pool.take((8,), torch.float32, CPU).fill_(3.0)
    pool.close()
    gc.collect()
    assert tensor.tolist() == [3.0] * 8
    del tensor
    assert pool.free == 0 and pool.find(pool.take((8,), torch.float32, CPU)) is None


# -- the protocol


def hop(group, receive, number=0.0):
    m = message(group.rank, UNEVEN)
    opened = group.exchange.open([m], [receive], [None])
    for block in opened.blocks[0]:
        block.fill_(10 * number + group.rank)
    opened.start()
    return opened


def came(rank, number=0.0):
    return [10 * number + source for source, sizes in enumerate(UNEVEN) for _ in range(sizes[rank])]


def different_orders(group):
    """Ranks allocate and free in orders of their own: what counts is what they announce."""
    sizes, kept = [3000, 700, 5000], []
    for number in range(6):
        kept += [group.pool.take((sizes[(number + group.rank) % 3],), torch.float32, CPU) for _ in range(group.rank)]
        receive = group.pool.take((sum(m[group.rank] for m in UNEVEN),), torch.float32, CPU)
        hop(group, receive, number).finish()
        if receive.tolist() != came(group.rank, number):
            return number, receive
        if number % (group.rank + 2) == 1:
            kept.clear()
    return None


def test_ranks_allocate_as_they_like():
    assert fake_symm.run(3, different_orders, step=4096) == [None] * 3


def grows(group):
    """Rank 1 alone lacks room: all map a segment, once, and its buffer is copied until it lies in one."""
    memory = group.exchange.symmetric._memory
    before = list(memory.mapped)
    m = message(group.rank, [[5000] * 3] * 3)
    full = group.pool.take((4096,), torch.uint8, CPU) if group.rank == 1 else None
    for number in range(3):
        receive = group.pool.take((15000,), torch.uint8, CPU)
        inside = group.pool.find(receive) is not None
        opened = group.exchange.open([m], [receive], [None])
        for block in opened.blocks[0]:
            block.fill_(number + group.rank)
        opened.start()
        opened.finish()
        assert receive.tolist() == [number + source for source in range(3) for _ in range(5000)]
        assert inside == (number > 0 or group.rank != 1)
        del receive, opened, block
        group.pool._settle()
        while group.pool.held > (0 if full is None else 4096):
            gc.collect()  # what the interpreter has been given lives until then, and one thread at a time collects
            time.sleep(0.001)
            group.pool._settle()
    return before, memory.mapped, full is None


def test_a_segment_is_mapped_by_all_when_one_lacks_room():
    answers = fake_symm.run(3, grows, step=16384)
    assert [(a, b) for a, b, _ in answers] == [([16384], [16384, 16384])] * 3


def lacks(group):
    with pytest.raises(OutOfMemoryError, match=r'on ranks \[0, 1, 2\].*recompute="exchange"'):
        hop(group, torch.empty(sum(m[group.rank] for m in UNEVEN)).expand(1, -1)[0])
        group.exchange.open([message(group.rank, [[9000] * 3] * 3)], [torch.empty(27000)], [None])
    return True


def test_no_memory_left_is_an_error_of_all_ranks():
    assert fake_symm.run(3, lacks, step=4096, capacity=8192) == [True] * 3


def too_small(group):
    with pytest.raises(GroupError, match=r"holds 4 words, and 3 ranks need 6: .*set_signal_pad_size\(48\)"):
        fake_symm.over_symm(group, WORLD, 1.0, 4096, pad_bytes=32)
    return True


WORLD = VirtualWorld(3)


def test_a_signal_pad_for_too_few_ranks():
    assert run_virtual(3, too_small) == [True] * 3


def captured(group):
    """In a capture there is room for what was warmed up, and none for more."""
    streams = group.exchange.symmetric._streams
    receive = group.pool.take((sum(m[group.rank] for m in UNEVEN),), torch.float32, CPU)
    streams.graph = True
    hop(group, receive).finish()
    with pytest.raises(GroupError, match=r"which a CUDA graph cannot map: make a call .* before the capture"):
        group.exchange.open([message(group.rank, [[9000] * 3] * 3)], [torch.empty(27000)], [None])
    streams.graph = False
    return receive.tolist() == came(group.rank)


def test_a_capture_maps_nothing():
    assert fake_symm.run(3, captured) == [True] * 3


# -- a whole layer


def layers(group, case, steps):
    """The results of a layer, several times over, and the segments that were mapped meanwhile."""
    found = [layer.run(case, group.rank, group) for _ in range(steps)]
    symmetric = getattr(group.exchange, "symmetric", None)
    return found, [] if symmetric is None else list(symmetric._memory.mapped)


CASES = [
    layer.Case((9, 8), heads=4, kv_heads=2, return_lse=True),
    layer.Case((7, 6, 4), heads=6, kv_heads=3, dtype="bf16"),
    layer.Case((5, 6, 7), heads=3, kv_heads=1, attention="triton", fused=True, rope=8, norm=True, recompute="exchange"),
]


@pytest.mark.parametrize("case", CASES, ids=["2 ranks", "3 ranks bf16", "3 ranks kernels"])
def test_a_layer_is_what_it_is_over_the_virtual_exchange(case):
    expected = run_virtual(case.ranks, lambda group: layers(group, case, 1))
    answers = fake_symm.run(case.ranks, layers, case, 3, step=8192)
    for (found, mapped), ((one, *_), _) in zip(answers, expected, strict=True):
        for again in found:
            assert again.keys() == one.keys()
            for name, tensor in one.items():
                assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name
        assert mapped == answers[0][1]


def tables_by_step(group, case, level, made):
    """How many tables of addresses two ranks made in each step: three eager, one captured, one eager."""
    counts = []
    for captures in (False, False, False, True, False):
        gc.collect()  # what the interpreter has been given lives until then
        level.wait()  # in a capture, of either rank, nothing eager comes back: the other's collection may free it here
        group.exchange.symmetric._streams.graph = captures
        before = len(made)
        layer.run(case, group.rank, group)
        level.wait()
        counts.append(len(made) - before)
    return counts


def test_a_captured_layer_needs_no_new_tables(monkeypatch):
    made = []
    for module in (pack, unpack):
        monkeypatch.setattr(module, "table", lambda *given: made.append(given) or table(*given))
    case = layer.Case((9, 8), heads=4, kv_heads=2, return_lse=True, attention="triton")
    answers = fake_symm.run(2, tables_by_step, case, threading.Barrier(2, timeout=60), made, step=1 << 20)
    for first, *others in answers:
        assert first > 0 and others[:3] == [0, 0, 0] and others[3] > 0  # what is the graph's now is not used eagerly


# -- faults


def one_does_not_start(group):
    """Rank 2 opens a hop, and goes."""
    receive = group.pool.take((sum(m[group.rank] for m in UNEVEN),), torch.float32, CPU)
    done = DONE[group.rank]
    if group.rank == 2:
        group.exchange.open([message(2, UNEVEN)], [receive], [None])
        DONE[0].wait(10), DONE[1].wait(10)
        return None
    hop(group, receive).finish()
    done.set()
    spoilt = bool(receive.isnan().all())
    with pytest.raises(ExchangeError, match=r"no signal of ranks \[.*2\] within 0.3 s") as first:
        group.check()
    with pytest.raises(ExchangeError, match="cannot be used any more"):
        group.agree("a call", "")
    group.close()
    return spoilt, str(first.value)


DONE = [threading.Event() for _ in range(3)]


def test_a_rank_that_does_not_arrive_is_named_and_its_rows_are_nan():
    answers = fake_symm.run(3, one_does_not_start, timeout=0.3)
    for spoilt, said in answers[:2]:
        assert spoilt and "no signal of ranks [" in said


def found_at_the_end(group):
    receive = group.pool.take((sum(m[group.rank] for m in UNEVEN),), torch.float32, CPU)
    if group.rank == 1:
        group.exchange.abort("its user gave up")
    opened = group.exchange.open([message(group.rank, UNEVEN)], [receive], [None])
    opened.start()
    opened.finish()
    with pytest.raises(ExchangeError, match=r"its user gave up" if group.rank == 1 else r"ranks \[1.*\] gave up"):
        group.close()
    group.close()
    return bool(receive.isnan().all())


def test_a_rank_that_gives_up_tells_its_peers():
    assert fake_symm.run(3, found_at_the_end) == [True] * 3


# -- who may take part


def about(host="a", device="0", overlap="0"):
    return {"host": host, "device": device, "overlap": overlap}


@pytest.mark.parametrize(
    "everyone, expected",
    [
        ([about(), about(device="1")], None),
        ([about(overlap="1"), about(overlap="1")], None),
        ([about(overlap="1"), about()], "ranks [0, 1] share GPUs; TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1"),
        ([about(), about(host="b")], "rank 1 is on host b, rank 0 on a"),
        ([about(), {"obstacle": "no CUDA device"}], "rank 1: no CUDA device"),
    ],
    ids=["two", "one GPU for tests", "one GPU", "hosts", "none"],
)
def test_what_is_in_the_way(everyone, expected):
    found = symm._obstacle(everyone)
    assert found == expected if expected is None else found.startswith(expected)


def asks_for_symm(ctx):
    with pytest.raises(GroupError, match=r'exchange="symm" cannot carry group .*: rank 0: no CUDA device'):
        UlyssesGroup(ctx.group, exchange="symm")
    return True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_gpus_there_is_a_clear_error(pool):
    assert pool.run(2, asks_for_symm) == [True] * 2
