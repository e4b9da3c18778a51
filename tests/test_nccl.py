"""The NCCL exchange beyond `test_exchange`: order of streams, faults, ends, agreement, and who is chosen.

Its own code runs over a fake of NCCL and of CUDA's streams (`fake_nccl`); cupy's real NCCL is only asked for its
version and an id, which need no GPU. Not yet run on one.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import types
import venv
import weakref

import fake_nccl
import layer
import pytest
import torch
from fake_nccl import FakeNccl, FakeStream, Mismatch, settled
from layer import Case
from test_exchange import LARGE, NOTHING, UNEVEN, message, several_hops

from ulysses_triton import (
    ExchangeError,
    GroupError,
    ShapeError,
    UlyssesGroup,
    carriers,
    run_virtual,
    ulysses_attention,
)
from ulysses_triton.exchange import nccl_library
from ulysses_triton.exchange.virtual import VirtualWorld
from ulysses_triton.kernels import poison, reference

CASES = {
    "gqa": Case((5, 8, 3), heads=6, kv_heads=3, return_lse=True),
    "shared kv": Case((4, 7), heads=4, kv_heads=1, dtype="bf16"),
    "cross": Case((3, 6), heads=4, kv_heads=2, kv_lens=(5, 2), value_dim=24, causal=False),
    "recompute": Case((6, 6), heads=2, kv_heads=2, recompute="exchange", dropout=0.2),
    "fused": Case((4, 6), heads=4, kv_heads=2, fused=True, rope=16, norm=True),
    "kernels": Case((4, 6), heads=2, kv_heads=2, attention="triton"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_layer_gives_the_same_bits_as_over_the_virtual_exchange(case):
    def twice(group):
        return [
            layer.run(case, group.rank, group) for _ in range(2)
        ]  # the second one is compared with the others a call later

    for mine, theirs in zip(fake_nccl.run(case.ranks, twice), run_virtual(case.ranks, twice), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)


# -- streams


class NotBehindTheCaller(FakeStream):
    def follow(self):
        pass


class NotJoined(FakeStream):
    def join(self, event):
        pass


class MarkedTooEarly(FakeStream):
    def mark(self):
        return super().mark() - 3  # before the group and two kernels after it


def test_a_group_that_does_not_wait_for_the_caller_is_found():
    with pytest.raises(Mismatch, match="without waiting for the caller's stream"):
        fake_nccl.run(3, lambda group: several_hops(group, torch.float32), stream=NotBehindTheCaller, timeout=2.0)


@pytest.mark.parametrize("stream", [NotJoined, MarkedTooEarly])
def test_rows_that_are_not_waited_for_are_not_there(stream):
    def work(group):
        wrong = several_hops(group, torch.float32)
        run_to_the_end(group)
        return wrong

    assert all(fake_nccl.run(3, work, stream=stream, timeout=5.0))


def run_to_the_end(group):
    stream = group.exchange._link.stream
    stream.run(len(stream.work))


def opened(group, sizes=UNEVEN, dtype=torch.float32):
    """A hop whose blocks are written, and what it fills."""
    m = message(group.rank, sizes)
    receive = torch.empty(sum(m.receive), dtype=dtype)
    hop = group.exchange.open([m], [receive], [None])
    for block in hop.blocks[0]:
        block.fill_(group.rank)
    return hop, receive


def test_the_own_part_is_written_in_place_and_several_hops_are_under_way_at_a_time():
    def work(group):
        hops = [opened(group, sizes) for sizes in (UNEVEN, NOTHING, LARGE, UNEVEN)]
        for (hop, receive), sizes in zip(hops, (UNEVEN, NOTHING, LARGE, UNEVEN), strict=True):
            mine = hop.blocks[0][group.rank]
            assert mine.untyped_storage().data_ptr() == receive.untyped_storage().data_ptr()
            assert mine.numel() == sizes[group.rank][group.rank]
            hop.start()
        for hop, receive in hops:
            hop.finish()
            assert receive.isfinite().all()
        assert not group.exchange._link.flight

    fake_nccl.run(3, work)


def test_buffers_are_held_from_start_to_finish_and_no_longer():
    def work(group):
        hop, receive = opened(group, LARGE)
        sent = weakref.ref(hop.blocks[0][(group.rank + 1) % 3].untyped_storage())
        hop.start()
        held = group.pool.held
        if group.rank == 0:
            hop.finish()
            del hop
        else:  # never finished, as when something raised in between
            del hop
            gc.collect()
            assert len(group.exchange._link.flight) == 1
            run_to_the_end(group)
        gc.collect()
        group.pool._settle()
        assert held and sent
        assert group.pool.held == (0 if group.rank == 0 else held)
        return weakref.ref(group)

    fake_nccl.run(3, work)


def test_a_captured_hop_is_not_watched_and_the_first_one_cannot_be_captured():
    class Capturing(FakeStream):
        def __init__(self, nccl, device):
            super().__init__(nccl, device)
            self.captures = nccl.captures

    nccl = FakeNccl()
    nccl.captures = True

    def work(group):
        with pytest.raises(GroupError, match="make one call before the capture"):
            opened(group)
        group.control.gather(b" ")
        nccl.captures = False
        group.control.gather(b" ")
        hop, _ = opened(group)
        hop.start()
        hop.finish()
        stream = group.exchange._link.stream
        stream.captures = True
        for _ in range(2):
            hop, receive = opened(group)
            hop.start()
            hop.finish()
            assert receive.isfinite().all()
        assert stream.status.tolist() == [0, 1]  # the number of the one hop that was not captured

    fake_nccl.run(3, work, nccl, stream=Capturing)


# -- faults


def no_threads():
    return settled(lambda: not [t for t in threading.enumerate() if t.name.startswith("ulysses-triton")])


@pytest.mark.parametrize("how", ["late", "error"])
def test_what_does_not_arrive_is_nan_and_the_next_call_raises(how):
    """Rank 2 stays away after the agreement: the others' rows are NaN at the deadline, or at an error of NCCL's."""

    def work(group):
        with group.step("exchange_in"):
            for _ in range(2):
                hop, receive = opened(group)
                hop.start()
                hop.finish()
        group.control.gather(b" ")
        communicator = group.exchange._link._communicator
        if group.rank == 2:
            return settled(lambda: len(nccl.log) >= 2)
        started = time.monotonic()
        with group.step("exchange_out"):
            hop, receive = opened(group)
            hop.start()
            if how == "error":
                threading.Timer(0.5, lambda: setattr(communicator, "error", "remote process exited")).start()
            hop.finish()  # where a GPU's stream goes on after the abort
        took = time.monotonic() - started
        assert receive.isnan().all() and settled(lambda: len(nccl.log) >= 2)
        reason = "not complete after 1 s" if how == "late" else "remote process exited"
        said = rf"exchange_out \(NCCL hop 3, with ranks {[r for r in (0, 1, 2) if r != group.rank]}\): {reason}"
        said = said.replace("[", r"\[").replace("]", r"\]")
        with pytest.raises(ExchangeError, match=said):
            group.check()
        with pytest.raises(ExchangeError, match="cannot be used any more"):
            group.agree("call", "")
        return took < 4.0

    nccl = FakeNccl()
    assert fake_nccl.run(3, work, nccl, timeout=1.0 if how == "late" else 20.0) == [True] * 3
    assert sorted(nccl.log) == ["rank 0: abort", "rank 1: abort", "rank 2: destroy"]
    assert no_threads()


def test_close_raises_what_nobody_has_asked_for_and_does_so_once():
    nccl = FakeNccl()

    def work(group):
        hop, receive = opened(group)
        if group.rank:
            hop.start()
            with pytest.raises(ExchangeError, match="NCCL hop 1"):
                group.close()
            group.close()
            return nccl.log

    fake_nccl.run(2 + 1, work, nccl, timeout=0.5)
    assert no_threads()


def test_an_error_on_this_rank_ends_what_is_under_way():
    """A step raises between start and finish: no waiting for a deadline, neither there nor at the end."""

    def work(group):
        started = time.monotonic()
        hop, _ = opened(group)
        if group.rank < 2:
            with pytest.raises(ZeroDivisionError), group.call():
                hop.start()
                raise ZeroDivisionError
            with pytest.raises(ExchangeError, match="ZeroDivisionError"):
                group.check()
            assert not group.exchange._link.flight
            group.close()
        return time.monotonic() - started < 5

    assert all(fake_nccl.run(3, work, timeout=20.0))
    assert no_threads()


def test_a_send_that_nccl_refuses_ends_the_group():
    def work(group):
        hop, _ = opened(group)
        hop.start()
        hop.finish()
        group.exchange._link._communicator.abort()  # as if by somebody else
        hop, _ = opened(group)
        with pytest.raises(ExchangeError, match="invalid argument"), group.step("exchange_in"):
            hop.start()
        with pytest.raises(ExchangeError, match="cannot be used any more"):
            group.check()

    fake_nccl.run(2 + 1, work)


def test_an_abort_that_does_not_come_back_holds_nobody_up():
    def work(group):
        hop, _ = opened(group)
        communicator = group.exchange._link._communicator
        real, release = communicator.abort, threading.Event()
        communicator.abort = lambda: (release.wait(10), real())
        if group.rank:
            hop.start()
            assert settled(lambda: group.exchange.failure() is not None)
            started = time.monotonic()
            with pytest.raises(ExchangeError):
                group.check()
            with pytest.raises(ExchangeError, match="cannot be used"):
                group.check()
            link = weakref.ref(group.exchange._link)
            group.close()
            assert time.monotonic() - started < 3
            del hop
            gc.collect()
            assert len(link().flight) == 1  # until the abort is through, and for good if it never is
            release.set()
            return settled(lambda: communicator.state == "abort" and gc.collect() >= 0 and link() is None)

    assert fake_nccl.run(3, work, timeout=0.5)[1:] == [True, True]


def test_a_communicator_that_is_not_destroyed_in_time_is_an_error():
    """NCCL waits for CUDA graphs that captured it."""

    def work(group):
        hop, _ = opened(group)
        hop.start()
        hop.finish()
        communicator = group.exchange._link._communicator
        real = communicator.destroy
        communicator.destroy = lambda: (time.sleep(1.5), real())
        with pytest.raises(ExchangeError, match="did not destroy its communicator within 1 s.*CUDA graph"):
            group.close()
        return settled(lambda: communicator.state == "destroy")

    assert fake_nccl.run(3, work, timeout=1.0) == [True] * 3


def test_groups_end_where_no_thread_can_be_started(monkeypatch):
    """As at the exit of Python 3.12."""

    def work(group):
        hop, _ = opened(group)
        hop.start()
        hop.finish()
        group.control.gather(b" ")
        monkeypatch.setattr(threading.Thread, "start", refuse)
        group.close()

    def refuse(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    nccl = FakeNccl()
    fake_nccl.run(3, work, nccl)
    assert sorted(nccl.log) == [f"rank {rank}: destroy" for rank in range(3)]


def test_ranks_that_do_not_connect_are_an_error_at_the_deadline():
    def work(group):
        if group.rank == 2:
            group.control.gather(bytes(128))
            return time.sleep(2.5)
        with pytest.raises(ExchangeError, match="did not connect within 1 s"), group.step("exchange_in"):
            opened(group)

    nccl = FakeNccl()
    run_virtual(3, lambda group: work(fake_nccl.join(group, nccl, 1.0)))


def test_a_hundred_groups_leave_nothing_behind():
    nccl, worlds = FakeNccl(), []

    def work(rank):
        for world in worlds:
            with UlyssesGroup(world.member(rank)) as group:
                fake_nccl.join(group, nccl)
                hop, receive = opened(group)
                hop.start()
                hop.finish()
                assert receive.isfinite().all()
                alive.append(weakref.ref(group.exchange))
            group.close()

    alive: list[weakref.ref] = []
    worlds += [VirtualWorld(3) for _ in range(100)]
    before = threading.active_count()
    ranks = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(alive) == 300 and nccl.log == [f"rank {line[5]}: destroy" for line in nccl.log]
    nccl.streams.clear()
    nccl.worlds.clear()
    gc.collect()
    assert threading.active_count() == before and not nccl.living and not any(ref() for ref in alive)


def test_what_a_peer_left_as_its_last_word_ends_the_wait():
    """Rank 2 fails on its own: the others do not wait for the deadline."""

    def work(group):
        hop, receive = opened(group)
        if group.rank == 2:
            with pytest.raises(ZeroDivisionError), group.call():
                raise ZeroDivisionError
            return True
        started = time.monotonic()
        hop.start()
        hop.finish()
        assert receive.isnan().all()
        with pytest.raises(ExchangeError, match="rank 2 ended in between calls failed with ZeroDivisionError"):
            group.check()
        return time.monotonic() - started < 8

    assert fake_nccl.run(3, work, timeout=30.0) == [True] * 3


# -- the fake itself


def wrong_use(group, nccl, how):
    sizes = [list(row) for row in UNEVEN]
    if how == "size" and group.rank == 1:
        sizes[0][1] = 1
    dtype = torch.float16 if how == "type" and group.rank == 1 else torch.bfloat16 if how == "type" else torch.float32
    hop, receive = opened(group, sizes, dtype)
    other, _ = opened(group, LARGE)
    for each in (other, hop) if how == "order" and group.rank == 1 else (hop, other):
        each.start()
    hop.finish()


@pytest.mark.parametrize("how", ["size", "type", "order"])
def test_the_fake_finds_sends_that_fit_no_receive(how):
    nccl = FakeNccl()
    with pytest.raises(Mismatch, match="elements|has"):
        fake_nccl.run(3, lambda group: wrong_use(group, nccl, how), nccl, timeout=2.0)


# -- poison


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("elements", [0, 1, 4095, 140_001])
@pytest.mark.parametrize("flag", [0, 1])
def test_poison_and_its_twin(flag, elements, dtype):
    for number in (0, 9):
        mine, twins = ((torch.tensor([flag, 4]), torch.ones(elements + 3, dtype=dtype)) for _ in range(2))
        poison.poison(mine[0], mine[1][1:-2], number)
        reference.poison(twins[0], twins[1][1:-2], number)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(mine, twins, strict=True))
        assert mine[0].tolist() == [flag, number or 4] and mine[1][[0, -2, -1]].tolist() == [1, 1, 1]
        if dtype.is_floating_point:
            assert mine[1][1:-2].isnan().all() if flag else (mine[1] == 1).all()


# -- agreement


def attend(group, tokens=4, **options):
    q = torch.ones(1, tokens, 6, 16)
    return ulysses_attention(q, q, q, group, attention="reference", **options)


def test_a_call_that_was_made_before_waits_for_nobody():
    """Ranks 1 and 2 call only when rank 0 has gone through the comparison: for the second call, not for the first."""
    through = threading.Event()

    def work(group):
        attend(group)
        waiting = []
        group.control.gather(b" ")
        begin = group.control.begin_gather

        def counted(payload):
            take = begin(payload)
            return lambda: waiting.append(1) or take()

        group.control.begin_gather = counted
        agree = group.agree

        def agreed(*given, **options):
            if group.rank:
                through.wait(10)
            found = agree(*given, **options)
            through.set()
            return found

        group.agree = agreed
        attend(group)
        assert not waiting
        group.check()
        assert len(waiting) == 1
        attend(group, dropout_p=0.5)
        assert len(waiting) == 2  # a seed is waited for, and so is a new call
        attend(group, dropout_p=0.5)
        assert len(waiting) == 3
        return through.is_set()

    assert fake_nccl.run(3, work) == [True] * 3


@pytest.mark.parametrize("then", ["call", "check", "close"])
@pytest.mark.parametrize("new", [False, True], ids=["known", "new"])
def test_calls_that_differ_raise_on_every_rank_also_where_they_were_not_awaited(then, new):
    """Rank 1 makes another call than the others, which go ahead with one they know: all get the same error."""

    def work(group):
        attend(group)
        if not new:
            attend(group, causal=True)
        with pytest.raises(ShapeError, match="causal: rank 1 has True, ranks 0, 2 have False"):
            if group.rank == 1 and new:
                attend(group, causal=True)
            # As on a GPU, the host goes on while the hop hangs: only the agreement of the call, not its rows.
            group.agree("attention", known[group.rank == 1], device="cpu")
            {"call": lambda: attend(group), "check": group.check, "close": group.close}[then]()
        if then != "close":
            with pytest.raises(ExchangeError, match="the ranks made different calls"):
                attend(group)

    known = {}
    assert fake_nccl.run(3, lambda group: signatures(group, known)) == [None] * 3
    fake_nccl.run(3, work, timeout=10.0)


def signatures(group, known):
    """The texts that ranks agree on for two calls."""
    agree = group.agree
    for causal in (False, True):
        group.agree = lambda what, text, *rest, causal=causal, **more: (
            known.__setitem__(causal, text) or agree(what, text, *rest, **more)
        )
        attend(group, causal=causal)


def test_a_new_call_that_differs_raises_at_once_and_the_group_goes_on():
    def work(group):
        attend(group)
        with pytest.raises(ShapeError, match="softcap"):
            attend(group, softcap=float(group.rank + 1))
        attend(group)
        return attend(group).isfinite().all().item()

    assert fake_nccl.run(3, work) == [True] * 3


# -- who is chosen


def real_looking(monkeypatch, torchs=(2, 29, 7), **cupys):
    """A machine with GPUs, PyTorch for CUDA 13 and cupy with NCCL 2.29.7, to those who only look."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: torchs)
    nccl = types.SimpleNamespace(**({"available": True, "get_version": lambda: 22907} | cupys))
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", types.SimpleNamespace(nccl=nccl))
    return nccl


def test_the_same_nccl_as_pytorchs_is_taken(monkeypatch):
    nccl = real_looking(monkeypatch)
    assert nccl_library.library() is nccl
    nccl = real_looking(monkeypatch, torchs=(2, 29, 3, "suffix"))
    assert nccl_library.library() is nccl
    assert nccl_library.version(22907) == (2, 29, 7) and nccl_library.version(23203) == (2, 32, 3)


def test_without_a_gpu():
    with pytest.raises(GroupError, match=r'needs NVIDIA GPUs and a PyTorch for CUDA.*use exchange="torch"'):
        nccl_library.library()


def test_another_nccl_than_pytorchs_names_both_and_what_to_install(monkeypatch):
    real_looking(monkeypatch, torchs=(2, 27, 5))
    with pytest.raises(GroupError, match=r'2\.29\.7.*2\.27\.5.*ulysses-triton\[cuda13\]" "nvidia-nccl-cu13==2\.27\.5"'):
        nccl_library.library()


def test_cupy_without_nccl_names_the_package(monkeypatch):
    real_looking(monkeypatch, available=False)
    with pytest.raises(GroupError, match=r"nvidia-nccl-cu13 is missing; pip install \"ulysses-triton\[cuda13\]"):
        nccl_library.library()


def test_no_cupy_names_the_extra(monkeypatch):
    real_looking(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(GroupError, match=r"cannot be imported.*ulysses-triton\[cuda13\]"):
        nccl_library.library()


@pytest.mark.parametrize("found", ["all", "not on rank 1", "another on rank 1"])
def test_all_ranks_find_the_same(monkeypatch, found):
    nccl = types.SimpleNamespace(get_version=lambda: 22907)
    other = types.SimpleNamespace(get_version=lambda: 22800)

    def library():
        odd = threading.current_thread().name == "rank 1" and found != "all"
        if odd and found == "not on rank 1":
            raise GroupError("no cupy here")
        return other if odd else nccl

    monkeypatch.setattr(nccl_library, "library", library)
    answers = run_virtual(3, lambda group: nccl_library.usable(group.control))
    assert (
        answers
        == [
            {
                "all": (nccl, ""),
                "not on rank 1": (None, "ranks [1]: no cupy here"),
                "another on rank 1": (None, "ranks have different NCCL: 2.29.7, 2.28.0, 2.29.7"),
            }[found]
        ]
        * 3
    )


def choices(ctx):
    """What a process group gets, with and without NCCL, and where it carries CUDA tensors."""
    refused = []
    try:
        UlyssesGroup(ctx.group, exchange="nccl")
    except GroupError as error:
        refused.append(str(error))
    with UlyssesGroup(ctx.group) as group:
        plain = group.exchange.name, group.explain(), group.devices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carriers, "devices_of", lambda group: frozenset({"cpu", "cuda"}))
        with UlyssesGroup(ctx.group) as group:
            without = group.exchange.name, group.explain()
        patch.setattr(nccl_library, "library", lambda: FakeNccl())
        with UlyssesGroup(ctx.group) as group:
            found = group.exchange.name, group.explain()
            on_cpu = several_hops_of(group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nccl_library, "library", lambda: FakeNccl())
        with UlyssesGroup(ctx.group, exchange="nccl") as group:
            asked = group.exchange.name, group.devices
            calls = [attend(group).isfinite().all().item() for _ in range(2)]
    return refused, plain, without, found, on_cpu, asked, calls


def several_hops_of(group):
    m = message(group.rank, UNEVEN)
    receive = group.pool.take((sum(m.receive),), torch.float32, torch.device("cpu"))
    hop = group.exchange.open([m], [receive], [None])
    for block in hop.blocks[0]:
        block.fill_(group.rank)
    hop.start()
    hop.finish()
    return receive.tolist() == [float(r) for r, n in enumerate(m.receive) for _ in range(n)]


def test_a_process_group_gets_nccl_where_all_ranks_have_it(pool):
    for refused, plain, without, found, on_cpu, asked, calls in pool.run(3, choices):
        assert len(refused) == 1 and "ranks [0, 1, 2]" in refused[0] and "needs NVIDIA GPUs" in refused[0]
        assert plain[0] == "shm" and "auto: the ranks share" in plain[1] and plain[2] == {"cpu"}
        assert without[0] == "torch" and "not nccl, as of ranks [0, 1, 2]" in without[1]
        assert found[0] == "nccl" and "auto: cupy's NCCL for CUDA tensors" in found[1]
        assert on_cpu and calls == [True, True]  # rows on the CPU go over the process group
        assert asked == ("nccl", {"cpu", "cuda"})


@pytest.mark.slow
def test_cupys_own_nccl_has_what_is_asked_of_it(tmp_path):
    """400 MB from the registry, in an environment of its own: PyTorch stays as it is. No GPU is needed."""
    code = """
from cupy.cuda import nccl
assert nccl.available
assert nccl.get_version() // 10000 >= 2, nccl.get_version()
unique = nccl.get_unique_id()
assert isinstance(unique, bytes) and len(unique) == 128
assert (nccl.NCCL_UINT8, nccl.NCCL_FLOAT16, nccl.NCCL_FLOAT32, nccl.NCCL_FLOAT64, nccl.NCCL_BFLOAT16) == (1, 6, 7, 8, 9)
for name in ("send", "recv", "abort", "destroy", "check_async_error"):
    assert hasattr(nccl.NcclCommunicator, name), name
assert nccl.groupStart() is None and nccl.groupEnd() is None
assert issubclass(nccl.NcclError, RuntimeError)
"""
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "cupy-cuda13x>=14", "nvidia-nccl-cu13"], check=True)
    subprocess.run([python, "-c", code], check=True)
