"""`trace`: every step of every rank, in the schedule's order, with the bytes that the design says, and its files."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import pytest
import torch
from layer import Case, run

from ulysses_triton import OptionError, UlyssesGroup, run_virtual, schedule, trace, tracing, ulysses_qkv_attention
from ulysses_triton.timeline import STREAMS, Event, Timeline, rows
from ulysses_triton.timeline_svg import KINDS, picture, tick

ITEM = {"fp32": 4, "bf16": 2, "fp64": 8}
SVG = "{http://www.w3.org/2000/svg}"


def on_virtual_ranks(case: Case, chunks: int | str = "auto") -> Timeline:
    with trace() as t:
        run_virtual(case.ranks, lambda group: run(case, group.rank, group), chunks=chunks)
    return t


def on_a_process(
    ctx: Any, case: Case, chunks: int | str = "auto", exchange: str = "torch"
) -> tuple[tuple[Event, ...], tuple[Event, ...]]:
    """What this rank recorded, and what all did."""
    with UlyssesGroup(ctx.group, exchange=exchange, chunks=chunks) as group:
        with trace() as t:
            run(case, ctx.rank, group)
        return t.events, t.gather(group).events


def steps_of(case: Case, one_sided: bool, chunks: int) -> list[tuple[str, schedule.Step]]:
    both = {
        "attention": schedule.forward(one_sided, chunks, recompute=case.recompute is not None),
        "attention backward": schedule.backward(case.recompute is not None, chunks),
    }
    return [(what, step) for what, steps in both.items() for step in steps]


def check_steps(timeline: Timeline, case: Case, one_sided: bool, chunks: int = 1) -> None:
    assert timeline.ranks == list(range(case.ranks))
    check_planned(timeline, steps_of(case, one_sided, chunks))


def check_planned(timeline: Timeline, planned: list[tuple[str, schedule.Step]]) -> None:
    for rank in timeline.ranks:
        events = timeline.of(rank).events
        for stream in STREAMS:
            found = [(e.what, e.step, e.chunk) for e in events if e.stream == stream]
            assert found == [(what, *step.which) for what, step in planned if step.stream == stream]
        assert [e.call for e in events] == [1 if e.what == "attention" else 2 for e in events]
        times = {(e.what, e.step, e.chunk): e for e in events}
        for what, step in planned:
            start = times[what, *step.which].start
            assert all(times[what, *which].end <= start for which in step.after)
        for e in events:
            assert 0 <= e.exposed <= e.seconds
            assert (e.stream == "exchange") or e.exposed == e.sent == 0


PLAIN = Case((6, 6), heads=4, kv_heads=4, recompute="exchange")


@pytest.mark.parametrize("recompute", [None, "exchange"])
def test_all_steps_of_virtual_ranks(recompute):
    case = replace(PLAIN, recompute=recompute, lens=(5, 5, 5, 5))
    check_steps(on_virtual_ranks(case), case, one_sided=True)


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("recompute", [None, "exchange"])
def test_all_steps_of_all_chunks(pool, chunks, recompute):
    """With the bytes of one chunk: rows of 16 channels need no padding here; one-sided, no row has any."""
    case = Case((6, 4), heads=12, kv_heads=6, recompute=recompute)
    whole, virtual = on_virtual_ranks(case), on_virtual_ranks(case, chunks)
    check_steps(virtual, case, True, chunks)
    processes = Timeline(pool.run(2, on_a_process, case, chunks)[0][1])
    check_steps(processes, case, False, chunks)
    assert sent_by_step(virtual)["exchange_out"] == sent_by_step(whole)["exchange_out"]
    for name in ("exchange_in", "exchange_grad_out"):
        assert sent_by_step(virtual)[name] == sent_by_step(processes)[name] == sent_by_step(whole)[name]


def projected(case: Case, group: Any) -> None:
    """A layer of `case` between projections from 24 and to 20 channels, and its backward."""
    sizes = {"weight": ((case.heads + 2 * case.kv_heads) * case.dim, 24), "out_weight": (20, case.heads * case.dim)}
    weights = {name: torch.ones(size, requires_grad=True) for name, size in sizes.items()}
    norm = torch.ones(case.dim)
    x, options = torch.ones(1, case.lens[group.rank], 24), {"lens": case.lens, "recompute": case.recompute}
    out = ulysses_qkv_attention(
        x, group, heads=case.heads, kv_heads=case.kv_heads, q_norm=norm, attention="reference", **weights, **options
    )
    out.sum().backward()


def projected_on_a_process(ctx: Any, case: Case, chunks: int) -> tuple[Event, ...]:
    with UlyssesGroup(ctx.group, exchange="torch", chunks=chunks) as group:
        with trace() as t:
            projected(case, group)
        return t.gather(group).events


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("recompute", [None, "exchange"])
def test_all_steps_of_a_layer_that_projects(pool, chunks, recompute):
    """It sends what one sends that does not, in as many exchanges; one-sided too, with one out for every chunk."""
    case = Case((6, 4), heads=12, kv_heads=6, recompute=recompute)
    with trace() as virtual:
        run_virtual(2, lambda group: projected(case, group), chunks=chunks)
    processes = Timeline(pool.run(2, projected_on_a_process, case, chunks)[0])
    plain = sent_by_step(on_virtual_ranks(case))
    for timeline, one_sided in ((virtual, True), (processes, False)):
        steps = {
            "attention": schedule.forward(one_sided, chunks, True, True, recompute is not None),
            "attention backward": schedule.backward(recompute is not None, chunks, True, True, True),
        }
        check_planned(timeline, [(what, step) for what, each in steps.items() for step in each])
        for name in ("exchange_in", "exchange_out", "exchange_grad_out"):
            assert sent_by_step(timeline)[name] == plain[name]


def sent_by_step(timeline: Timeline) -> Counter[str]:
    found: Counter[str] = Counter()
    for e in timeline.events:
        found[e.step] += e.sent
    return found


def test_all_steps_of_processes_on_one_clock(pool):
    found = pool.run(3, on_a_process, replace(PLAIN, lens=(6, 6, 6), heads=6, kv_heads=3))
    for rank, (mine, everything) in enumerate(found):
        assert {e.rank for e in mine} == {rank}
        assert everything == found[0][1] and [e for e in everything if e.rank == rank] == list(mine)
    whole = Timeline(found[0][1])
    check_steps(whole, replace(PLAIN, lens=(6, 6, 6)), one_sided=False)
    for name in ("exchange_in", "exchange_grad_out"):  # one clock: nobody has everything before everybody has sent
        hops = [e for e in whole.events if e.step == name and e.what == "attention backward"]
        assert max(e.start for e in hops) <= min(e.end for e in hops)


def padded(elements: int) -> int:
    return -(-elements // 16) * 16


def wire_bytes(case: Case, rank: int, one_sided: bool) -> dict[str, int]:
    """What a rank sends to others in each exchange, by the formulas of the design; head dims here are multiples of 8.

    A token's row is q, k and v of the destination's heads, with a head of k and v for every rank that works on it.
    """
    ranks, each = case.ranks, case.heads // case.ranks
    group = case.heads // case.kv_heads
    item, kv_lens = ITEM[case.dtype], case.kv_lens or case.lens
    kv = [((r + 1) * each - 1) // group + 1 - r * each // group for r in range(ranks)]
    stat = max(1, 4 // item)
    others = [r for r in range(ranks) if r != rank]
    partial = stat if sum(kv) > case.kv_heads else 1

    def q_and_kv(r: int, wide: int) -> list[int]:
        q, both = each * case.dim, kv[r] * (case.dim + case.value_dim) * wide
        return [padded(q), padded(both)] if case.kv_lens else [padded(q + both), 0]

    def inward(wide: int) -> int:
        return sum(case.lens[rank] * a + kv_lens[rank] * b for a, b in (q_and_kv(r, wide) for r in others))

    def outward(wide: int) -> int:
        a, b = q_and_kv(rank, wide)
        return sum(case.lens[r] * a + kv_lens[r] * b for r in others)

    out = each * (case.value_dim + stat * case.return_lse)
    delta = padded(each * (case.value_dim + stat))
    return {
        "exchange_in": inward(1) * case.batch * item,
        "exchange_out": sum(case.lens[r] for r in others) * (out if one_sided else padded(out)) * case.batch * item,
        "exchange_grad_in": len(others) * case.lens[rank] * delta * case.batch * item,
        "exchange_grad_out": outward(partial) * case.batch * item,
    }


WIRE = {
    "heads": Case((6, 6), heads=4, kv_heads=4),
    "grouped": Case((6, 6, 6), heads=6, kv_heads=3, batch=2, dtype="bf16"),
    "replicated kv": Case((4, 4, 4, 4), heads=8, kv_heads=2, dtype="bf16", recompute="exchange"),
    "one kv head": Case((5, 5, 5), heads=3, kv_heads=1, batch=2),
    "uneven": Case((3, 0, 9, 4), heads=4, kv_heads=4, value_dim=24, dtype="bf16"),
    "uneven, replicated": Case((1, 7), heads=6, kv_heads=1, dim=24, return_lse=True),
    "keys of another length": Case((6, 2), heads=4, kv_heads=2, kv_lens=(3, 8), causal=False),
    "lse": Case((2, 3, 1), heads=3, kv_heads=3, dtype="bf16", return_lse=True),
    "fp64": Case((2, 3), heads=2, kv_heads=1, dtype="fp64", return_lse=True),
}


def check_bytes(events: Any, case: Case, one_sided: bool) -> None:
    found = {rank: {e.step: e.sent for e in events if e.rank == rank and e.sent} for rank in range(case.ranks)}
    expected = {rank: wire_bytes(case, rank, one_sided) for rank in range(case.ranks)}
    assert found == {rank: {n: b for n, b in sizes.items() if b} for rank, sizes in expected.items()}
    again = sum(e.sent for e in events if e.step == "exchange_in" and e.what == "attention backward")
    total = sum(b for sizes in expected.values() for b in sizes.values())
    assert Timeline(events).sent() == total + again
    assert again == (sum(sizes["exchange_in"] for sizes in expected.values()) if case.recompute else 0)


@pytest.mark.parametrize("case", WIRE.values(), ids=list(WIRE))
def test_bytes_are_those_of_the_design_on_virtual_ranks(case):
    check_bytes(on_virtual_ranks(case).events, case, one_sided=True)


@pytest.mark.parametrize("exchange", ["shm", "torch"])
@pytest.mark.parametrize("case", WIRE.values(), ids=list(WIRE))
def test_bytes_are_those_of_the_design_on_processes(pool, case, exchange):
    found = pool.run(case.ranks, on_a_process, case, "auto", exchange)
    check_bytes(found[0][1], case, one_sided=exchange == "shm")


def test_the_volume_of_the_design():
    """Forward, per rank: S d (2 Hq + 2 max(Hkv, P)) / P x (P - 1) / P elements."""
    for ranks, heads, kv_heads in ((2, 4, 4), (4, 8, 2), (4, 8, 4), (3, 6, 1)):
        case = Case((8,) * ranks, heads, kv_heads, dim=16, value_dim=16)
        timeline = on_virtual_ranks(case)
        tokens, elements = sum(case.lens), 16 * (2 * heads + 2 * max(kv_heads, ranks))
        for rank in range(ranks):
            sent = sum(e.sent for e in timeline.of(rank).events if e.what == "attention")
            assert sent * ranks * ranks == tokens * elements * (ranks - 1) * 4


def test_a_callable_is_recorded_by_halves():
    def mean(q, k, v, **_):  # of all values
        return v.mean(1, keepdim=True).expand_as(q) + 0 * (q + k)

    timeline = on_virtual_ranks(replace(PLAIN, attention=mean, recompute=None))
    names = [(e.call, e.what, e.step) for e in timeline.of(1).events]
    assert names == [
        (1, "exchange in", "pack"),
        (1, "exchange in", "exchange_in"),
        (2, "exchange out", "exchange_out"),  # one-sided: written where it belongs
        (3, "exchange out backward", "pack_grad"),
        (3, "exchange out backward", "exchange_grad_in"),
        (4, "exchange in backward", "exchange_grad_out"),
        (4, "exchange in backward", "unpack_grad"),
    ]


def test_nothing_is_recorded_outside():
    case = replace(PLAIN, lens=(4,), heads=2, kv_heads=2)
    with UlyssesGroup() as group:
        run(case, 0, group)
        with trace() as t:
            pass
        run(case, 0, group)
        assert t.events == () and t.seconds() == t.busy() == t.exposed() == t.sent() == 0
        with trace() as t:
            run(case, 0, group)  # a group that was there before the block
            with UlyssesGroup() as second:
                run(case, 0, second)
        assert {e.group for e in t.events} == {g.name.rpartition(":")[0] for g in (group, second)}
        with pytest.raises(RuntimeError, match="off"), trace():
            raise RuntimeError("off")
        assert UlyssesGroup.recorder is None


def test_off_it_is_one_attribute(monkeypatch):
    """Nothing of `tracing` runs, and no clock is read."""

    def never(*_: object) -> None:
        raise AssertionError("recorded outside of a block")

    for name in ("_mark", "_event"):
        monkeypatch.setattr(tracing, name, never)
    monkeypatch.setattr(time, "perf_counter", never)
    with UlyssesGroup() as group:
        run(replace(PLAIN, lens=(4,), heads=2, kv_heads=2), 0, group)


def test_one_at_a_time():
    with trace() as t:
        with pytest.raises(OptionError, match="one at a time"), trace():
            pass
        with pytest.raises(OptionError, match="after the block"):
            t.gather()


def test_a_trace_of_virtual_ranks_gathers():
    case = replace(PLAIN, lens=(4, 4))

    t = on_virtual_ranks(case)
    assert [found.events for found in run_virtual(2, t.gather)] == [t.events] * 2


def clock_of_another_host(ctx: Any) -> list[float]:
    """Rank 2 believes to be on another host, whose clock is 1000 seconds ahead."""
    if ctx.rank < 2:
        with UlyssesGroup(ctx.group) as group:
            return tracing._offsets(group)
    clock = time.perf_counter
    boot = mock.Mock(exists=lambda: True, read_text=lambda: "another")
    with (
        mock.patch.object(time, "perf_counter", lambda: clock() + 1000),
        mock.patch.object(tracing, "_BOOT", boot),
        UlyssesGroup(ctx.group) as group,
    ):
        return tracing._offsets(group)


def test_the_clock_of_another_host_is_set(pool):
    for found in pool.run(3, clock_of_another_host):
        assert found[:2] == [0, 0] and abs(found[2] - 1000) < 0.5


# -- files


def timeline() -> Timeline:
    return on_virtual_ranks(replace(PLAIN, lens=(5, 6, 7, 8), recompute=None))


def test_the_trace_has_what_perfetto_needs(tmp_path):
    t = timeline()
    t.write(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())
    events = written["traceEvents"]
    complete = [e for e in events if e["ph"] == "X"]
    waits = [e for e in complete if e["name"].startswith("wait for exchange_")]
    assert len(complete) - len(waits) == len(t.events) and len(waits) == sum(e.exposed > 0 for e in t.events)
    for e in complete:
        assert set(e) == {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"}
        assert e["ts"] >= 0 and e["dur"] >= 0 and isinstance(e["pid"], int) and isinstance(e["tid"], int)
    names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    for rank in range(4):
        assert names["process_name", rank, 0] == f"rank {rank}"
        assert [names["thread_name", rank, i] for i in (0, 1)] == ["compute", "exchange"]
    assert sum(e["args"]["bytes"] for e in complete) == t.sent()
    assert max(e["ts"] + e["dur"] for e in complete) == pytest.approx(t.seconds() * 1e6, abs=1)
    for row in {(e["pid"], e["tid"]) for e in complete}:  # no two of a thread overlap
        times = sorted((e["ts"], e["ts"] + e["dur"]) for e in complete if (e["pid"], e["tid"]) == row)
        assert all(a[1] <= b[0] + 1e-3 for a, b in zip(times, times[1:], strict=False))


def test_the_picture_is_xml_with_a_lane_per_rank_and_stream(tmp_path):
    t = timeline()
    t.svg(tmp_path / "timeline.svg", "a < b & c")
    root = ElementTree.parse(tmp_path / "timeline.svg").getroot()
    lanes = [g for g in root.iter(f"{SVG}g") if g.get("class") == "lane"]
    names = [(g.get("data-rank"), g.get("data-stream")) for g in lanes]
    assert names == [(str(r), stream) for r in range(4) for stream in ("compute", "exchange")]
    bars = [[box for box in lane.iter(f"{SVG}rect") if box.find(f"{SVG}title") is not None] for lane in lanes]
    assert [len(b) for b in bars] == [5, 4] * 4 or [len(b) for b in bars] == [4, 4] * 4
    texts = [x.text for x in root.iter(f"{SVG}text")]
    assert any(text.startswith("a < b & c - ") and "exposed" in text for text in texts)
    assert set(KINDS) <= set(texts)
    width = float(root.get("width"))
    assert all(float(b.get("x")) + float(b.get("width")) <= width for lane in bars for b in lane)


def event(start: float, end: float, stream: str = "exchange", exposed: float = 0.0, rank: int = 0) -> Event:
    return Event(rank, 1, "attention", "exchange_in" if stream == "exchange" else "attend", 0, stream, start, end,
                 exposed=exposed)  # fmt: skip


def test_figures_of_the_example():
    t = Timeline([event(5, 9, "compute"), event(0, 2, "compute"), event(2, 5, exposed=3)])
    assert [e.start for e in t.events] == [0, 2, 5]
    assert (t.busy(), t.exposed(), t.exchanging(), t.seconds()) == (6, 3, 3, 9)
    assert t.steps() == {"attend": 6, "exchange_in": 3}
    both = Timeline([*t.events, event(1, 2, "compute", rank=1), event(2, 4, exposed=1, rank=1)])
    assert (both.busy(), both.exposed(), both.of(1).exposed(), both.ranks) == (3.5, 2, 1, [0, 1])


def test_events_that_overlap_lie_in_rows_of_their_own():
    events = [event(0, 4), event(1, 3), event(3, 6), event(4, 5)]
    assert rows(events, "exchange") == [[events[0], events[3]], [events[1], events[2]]]
    assert rows(events, "compute") == [[]]
    assert len(ElementTree.fromstring(picture({"": Timeline(events)})).findall(f"{SVG}g")) == 2


@pytest.mark.parametrize(("seconds", "distance"), [(6.0, 1.0), (7.0, 2.0), (0.0013, 5e-4), (25.0, 5.0)])
def test_marks_of_the_axis(seconds, distance):
    assert tick(seconds) == pytest.approx(distance)


def test_a_picture_of_nothing_is_a_picture():
    ElementTree.fromstring(picture({"nothing": Timeline()}))
