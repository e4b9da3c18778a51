"""The order of steps, checked by acting it out: ranks that move in any order, and what they read, write and wait for.

The model knows what a step reads and writes, from the placement alone, and nothing of the order. On each rank steps of
the compute stream run one after the other and exchanges run beside them, started and awaited as the executor does it.
Received rows are there from the step that opens their exchange until the placement says that nothing reads them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_triton import schedule
from ulysses_triton.placement import Placement, chunk_count, place
from ulysses_triton.schedule import Step, Which
from ulysses_triton.spec import Problem

WRITES = {  # what an exchange carries away once a step has written it
    "pack": "exchange_in",
    "attend": "exchange_out",
    "pack_grad": "exchange_grad_in",
    "attend_backward": "exchange_grad_out",
}


def problem(ranks: int, heads: int, kv_heads: int, chunks: int, tokens: int = 4, **changes: object) -> Problem:
    lens = (tokens,) * ranks
    return Problem(
        batch=1, lens=lens, kv_lens=lens, heads=heads, kv_heads=kv_heads, head_dim=8, value_dim=8, dtype="float32",
        device="cpu", causal=True, scale=1.0, chunks=chunks, **changes,
    )  # fmt: skip


@dataclass
class Rank:
    """One rank on its way through a schedule."""

    number: int
    steps: tuple[Step, ...]
    problem: Problem
    placement: Placement
    one_sided: bool
    place: int = 0
    done: list[Which] = field(default_factory=list)
    started: list[Which] = field(default_factory=list)
    finished: set[Which] = field(default_factory=set)
    read: set[tuple[str, int]] = field(default_factory=set)  # the rows that attention read
    live: set[Which] = field(default_factory=set)  # exchanges whose received rows are there
    gone: set[Which] = field(default_factory=set)  # and those whose are not any more
    most: dict[str, int] = field(default_factory=dict)  # of each kind of exchange, the most that were there at once

    @property
    def over(self) -> bool:
        return self.place == len(self.steps)


class World:
    """All ranks. An exchange has arrived when every rank has started it."""

    def __init__(self, ranks: list[Rank]) -> None:
        self.ranks = ranks

    def arrived(self, which: Which) -> bool:
        return all(which in rank.started for rank in self.ranks)

    def can_move(self, rank: Rank) -> bool:
        """Whether a rank's next step can begin: the exchanges that it waits for have come, as the executor waits."""
        waits = [w for w in rank.steps[rank.place].after if w[0].startswith("exchange") and w in rank.started]
        return all(self.arrived(which) for which in waits)

    def move(self, rank: Rank) -> None:
        step = rank.steps[rank.place]
        for which in step.after:
            assert which in rank.done or which in rank.started, f"{step.which} waits for {which}, which comes later"
            if which in rank.started:
                rank.finished.add(which)
        if step.stream == "exchange":
            self.start(rank, step)
        else:
            self.compute(rank, step)
            rank.done.append(step.which)
        rank.place += 1

    def start(self, rank: Rank, step: Step) -> None:
        assert step.which not in rank.started, "one exchange, started twice"
        writer = next(name for name, exchange in WRITES.items() if exchange == step.name)
        one_for_all = rank.one_sided and step.name == "exchange_out" and not rank.problem.projects_out
        for c in range(len(rank.placement.chunks)) if one_for_all else (step.chunk,):
            assert (writer, c) in rank.done and (writer, c) in step.after, (
                f"{step.which} sends what {writer} has not written"
            )
        rank.started.append(step.which)

    def compute(self, rank: Rank, step: Step) -> None:
        name, c = step.which
        chunk, chunks = rank.placement.chunks[c], range(len(rank.placement.chunks))
        again = ("pack", 0) in [s.which for s in rank.steps]
        needed: list[Which] = []
        if name == "attend" or (name == "attend_backward" and again):
            needed += [("exchange_in", c), *(("exchange_in", piece.holder) for piece in chunk.pieces[rank.number])]
        if name == "attend_backward":
            needed.append(("exchange_grad_in", c))
            for piece in chunk.pieces[rank.number]:
                before = [("attend_backward", b) in rank.done for b in range(piece.holder, c)]
                assert all(before), "sums of earlier chunks"
        if name in ("unpack", "unpack_grad"):
            source = {"unpack": "exchange_out", "unpack_grad": "exchange_grad_out"}[name]
            needed += [(source, b) for b in (chunks if not rank.problem.recompute else self.unpacked(rank, step))]
        self.project(rank, step)
        if name == "unpack" and rank.problem.projects_out:
            needed = [("exchange_out", c)]
        if name == "project_out" and rank.one_sided:
            needed = [("exchange_out", c)]
        for which in needed:
            assert which in rank.finished, f"{step.which} reads what {which} may not have brought"
            assert which not in rank.gone, f"{step.which} reads what {which} brought, which was let go"
        if name in WRITES and not (rank.one_sided and name == "attend"):
            assert (WRITES[name], c) not in rank.started, f"{step.which} writes to what is travelling"
        assert step.which not in rank.done, "written twice"
        if name.startswith("attend"):
            rank.read.add((name, c))
        self.hold(rank, step)

    def hold(self, rank: Rank, step: Step) -> None:
        """The rows that are received from a step on, and those that are let go behind it, as the executor does it."""
        (name, c), p = step.which, rank.problem
        if name in WRITES and not (rank.one_sided and name == "attend"):
            rank.live.add((WRITES[name], c))
        for kind in {kind for kind, _ in rank.live}:
            rank.most[kind] = max(rank.most.get(kind, 0), sum(kind == other for other, _ in rank.live))
        done: list[Which] = []
        if name.startswith("attend"):
            done = [("exchange_in", b) for b in rank.placement.last_reads(rank.number, c)]
            done += [("exchange_grad_in", c)] * (name == "attend_backward")
        every = range(len(rank.placement.chunks))
        if name == "unpack":
            done = [("exchange_out", b) for b in ([c] if p.recompute or p.projects_out else every)]
        if name == "unpack_grad":
            done = [("exchange_grad_out", b) for b in (rank.placement.returns[c].done if p.recompute else every)]
        rank.live -= set(done)
        rank.gone |= set(done)

    def unpacked(self, rank: Rank, step: Step) -> list[int]:
        """The chunks that a step which unpacks by chunk reads: for gradients, all that have any of its heads."""
        if step.name == "unpack":
            return [step.chunk]
        q, kv = rank.placement.returns[step.chunk].heads
        chunks = rank.placement.chunks
        return [b for b, c in enumerate(chunks) if set(q) & set(c.returned.q) or set(kv) & set(c.returned.kv)]

    def project(self, rank: Rank, step: Step) -> None:
        """What a step needs to have been projected, or what a projection needs."""
        (name, c), p, every = step.which, rank.problem, range(len(rank.placement.chunks))
        backward = any(s.name == "unpack_grad" for s in rank.steps)
        sources: list[tuple[Which, ...]] = []  # of each tuple, one
        if name == "pack" and p.projects:
            sources.append((("project", c), ("project_raw", 0)))
        if name == "unpack_grad" and p.projects and p.needs_raw:
            sources.append((("project_raw", 0),))
        if name == "project_grad":
            sources += [(s.which,) for s in rank.steps if s.name == "unpack_grad"]
        if name == "project_out" and not rank.one_sided:
            sources.append((("unpack", c),))
        if name == "project_out" and c > 0:
            sources.append((("project_out", 0),))
        if name == "pack_grad" and p.projects_out:
            sources.append((("project_out_grad", c),))
        if name.startswith("project"):
            assert p.projects_out if "out" in name else p.projects
            assert backward or step.which in [(n, b) for n in ("project", "project_out") for b in every]
        for either in sources:
            assert sum(which in rank.done for which in either) == 1, f"{step.which} comes ahead of {either}"


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Problem, tuple[Step, ...], bool]:
    ranks = draw(st.integers(1, 4))
    heads = draw(st.one_of(st.integers(1, 6).map(lambda n: n * ranks), st.integers(1, 12)))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    one_sided, backward = draw(st.booleans()), draw(st.booleans())
    options = {name: draw(st.booleans()) for name in ("recompute", "q_norm")}
    options |= {name: draw(st.sampled_from([None, 24])) for name in ("features", "out_features")}
    p = problem(ranks, heads, kv_heads, 1, draw(st.sampled_from([4, 600])), **options)
    p = replace(p, chunks=chunk_count(p, draw(st.integers(1, 6))))
    return p, schedule.of_backward(p) if backward else schedule.of(p, one_sided), one_sided and not backward


@given(schedules(), st.data())
def test_ranks_with_any_delays_come_to_the_end_and_read_only_what_is_there(drawn, data):
    """Whichever rank moves next: none deadlocks, each reads all of its chunks, and exchanges start in one order."""
    p, steps, one_sided = drawn
    placement = place(p)
    ranks = [Rank(number, steps, p, placement, one_sided) for number in range(p.ranks)]
    world = World(ranks)
    while not all(rank.over for rank in ranks):
        ready = [rank for rank in ranks if not rank.over and world.can_move(rank)]
        assert ready, f"deadlock at {[rank.steps[rank.place].which for rank in ranks if not rank.over]}"
        world.move(data.draw(st.sampled_from(ready)))
    assert len({tuple(rank.started) for rank in ranks}) == 1
    for rank in ranks:
        assert {c for _, c in rank.read} == set(range(len(placement.chunks)))
        assert all(world.arrived(which) for which in rank.started)
        outputs = {c for name, c in rank.done if name == "project_out"}
        assert outputs == {s.chunk for s in steps if s.name == "attend" and p.projects_out}
        assert not rank.live
        if p.recompute:
            hold_few(rank)


def hold_few(rank: Rank) -> None:
    """Exchanged again, the rows of two chunks of each kind are there at most: one that is worked on, one on its way.

    So are the rows that a kv head of several chunks came in, and the gradients of heads that ranks share.
    """
    p, chunks = rank.problem, rank.placement.chunks
    holders = {piece.holder for chunk in chunks for piece in chunk.pieces[rank.number] if piece.holder < chunk.number}
    assert rank.most.get("exchange_in", 0) <= 2 + len(holders)
    assert rank.most.get("exchange_grad_in", 0) <= 2
    assert rank.most.get("exchange_out", 0) <= 2
    apart = not rank.placement.shared and p.heads % p.ranks == 0
    assert rank.most.get("exchange_grad_out", 0) <= (2 if apart else len(chunks))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.integers(1, 6), st.integers(1, 12))
def test_every_gradient_is_unpacked_once_and_every_chunk_let_go_once(ranks, group, kv_heads, asked, extra):
    p = problem(ranks, group * kv_heads, kv_heads, 1, 64 * extra, recompute=True)
    placement = place(replace(p, chunks=chunk_count(p, asked)))
    q, kv = (sorted(h for r in placement.returns for h in r.heads[kind]) for kind in (0, 1))
    assert (q, kv) == (list(range(p.heads)), list(range(p.kv_heads)))
    assert sorted(b for r in placement.returns for b in r.done) == list(range(len(placement.chunks)))
    for rank in range(ranks):
        last = [placement.last_reads(rank, c) for c in range(len(placement.chunks))]
        assert sorted(b for some in last for b in some) == list(range(len(placement.chunks)))
        for c, chunk in enumerate(placement.chunks):
            before = {b for some in last[:c] for b in some}
            assert not before & {c, *(piece.holder for piece in chunk.pieces[rank])}


@given(schedules())
def test_waits_have_no_cycle_and_name_steps_that_come_before(drawn):
    _, steps, _ = drawn
    places = {step.which: number for number, step in enumerate(steps)}
    assert len(places) == len(steps)
    for step in steps:
        assert all(places[which] < places[step.which] for which in step.after)
        assert step.stream == ("exchange" if step.name.startswith("exchange") else "compute")


def under_way(steps: tuple[Step, ...], name: str, c: int) -> set[str]:
    """The exchanges that are started before a step and awaited by none up to it."""
    at = [step.which for step in steps].index((name, c))
    started = {step.which for step in steps[:at] if step.stream == "exchange"}
    awaited = {which for step in steps[: at + 1] for which in step.after}
    return {f"{exchange} {number}" for exchange, number in started - awaited}


def test_an_exchange_in_and_one_out_run_under_every_attention():
    steps = schedule.forward(False, 3)
    assert under_way(steps, "attend", 0) == {"exchange_in 1"}
    assert under_way(steps, "attend", 1) == {"exchange_in 2", "exchange_out 0"}
    assert under_way(steps, "attend", 2) == {"exchange_out 0", "exchange_out 1"}
    steps = schedule.backward(True, 2)
    assert under_way(steps, "attend_backward", 0) == {"exchange_in 1", "exchange_grad_in 1"}
    assert under_way(steps, "attend_backward", 1) == {"exchange_grad_out 0"}


@pytest.mark.parametrize("one_sided", [False, True], ids=["collective", "one-sided"])
def test_projections_run_under_exchanges(one_sided):
    steps = schedule.forward(one_sided, 3, True, True)
    for c in (0, 1):
        assert f"exchange_in {c}" in under_way(steps, "project", c + 1)
        assert f"exchange_out {c + 1}" in under_way(steps, "project_out", c)
    for recompute in (False, True):
        steps = schedule.backward(recompute, 3, True, True)
        assert "exchange_grad_in 0" in under_way(steps, "project_out_weight_grad", 0)
        assert "exchange_grad_in 0" in under_way(steps, "project_out_grad", 1)
    steps = schedule.backward(False, 2, True, False, True)
    assert "exchange_grad_out 1" in under_way(steps, "project_raw", 0)


@pytest.mark.parametrize("one_sided", [False, True], ids=["collective", "one-sided"])
def test_one_chunk_is_the_schedule_without_chunks(one_sided):
    def names(steps: tuple[Step, ...]) -> list[str]:
        return [step.name for step in steps]

    forward = ["pack", "exchange_in", "attend", "exchange_out", "unpack"]
    assert names(schedule.forward(one_sided)) == (forward[:-1] if one_sided else forward)
    backward = ["pack_grad", "exchange_grad_in", "attend_backward", "exchange_grad_out", "unpack_grad"]
    assert names(schedule.backward(False)) == backward
    assert names(schedule.backward(True)) == ["pack", "exchange_in", *backward]
