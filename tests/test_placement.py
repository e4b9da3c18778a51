"""Placement, row layouts and messages: pure functions, checked for every rank count at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_triton.errors import DtypeError, OptionError, ShapeError
from ulysses_triton.placement import chunk_count, inbound, outbound, place
from ulysses_triton.spec import Problem, differences


def problem(**changes: object) -> Problem:
    values = dict(
        batch=2, lens=(5, 7), kv_lens=(5, 7), heads=4, kv_heads=2, head_dim=64, value_dim=64, dtype="bfloat16",
        device="cpu", causal=True, scale=0.125,
    )  # fmt: skip
    return Problem(**(values | changes))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    ranks = draw(st.integers(1, 12))
    heads = ranks * draw(st.integers(1, 6))
    lens = tuple(draw(st.lists(st.integers(0, 50), min_size=ranks, max_size=ranks)))
    return problem(
        lens=lens,
        kv_lens=draw(st.sampled_from([lens, tuple(n + 1 for n in lens)])),
        heads=heads,
        kv_heads=draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        head_dim=draw(st.sampled_from([8, 24, 33, 128])),
        value_dim=draw(st.sampled_from([1, 8, 50, 64])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16", "float64"])),
        return_lse=draw(st.booleans()),
        chunks=draw(st.integers(1, heads // ranks)),
    )


@given(problems())
def test_every_query_head_once_beside_its_kv_head(p):
    placement = place(p)
    assert [h for s in placement.shares for h in range(s.q_start, s.q_stop)] == list(range(p.heads))
    for rank, share in enumerate(placement.shares):
        wanted = [h // placement.group for h in range(share.q_start, share.q_stop)]
        assert [share.kv_start + j for j in placement.kv_head_of(rank)] == wanted
        assert set(range(share.kv_start, share.kv_stop)) == set(wanted)
    owners = [h for s in placement.shares for h in range(s.kv_start, s.kv_stop)]
    assert placement.shared == (len(owners) > p.kv_heads)


@given(problems())
def test_fields_fill_rows_without_overlap_and_rows_are_aligned(p):
    placement = place(p)
    for chunk in placement.chunks:
        for section in (*chunk.qkv, *chunk.out, *chunk.grad_out, *chunk.grad_qkv):
            for row in section.rows:
                stop = 0
                for field in row.fields:
                    assert field.offset == stop and field.offset % 8 == 0
                    assert field.stride == (1 if field.name == "stat" else (field.dim + 7) // 8 * 8)
                    stop += field.heads * field.stride * field.width
                assert stop <= row.width < stop + 16 and row.width % 16 == 0


@given(problems())
def test_what_one_rank_sends_is_what_the_other_receives_and_blocks_tile_the_buffer(p):
    placement = place(p)
    for chunk in placement.chunks:
        for direction, section in (
            *((inbound, section) for section in (*chunk.qkv, *chunk.grad_out)),
            *((outbound, section) for section in (*chunk.out, *chunk.grad_qkv)),
        ):
            messages = [direction(section, p.batch, rank) for rank in range(p.ranks)]
            for to, receiver in enumerate(messages):
                stop = 0
                for sender in messages:
                    assert sender.land[to] == stop
                    stop += sender.send[to]
                assert stop == sum(receiver.receive)
                assert [sender.send[to] for sender in messages] == list(receiver.receive)


@given(problems())
def test_chunks_cover_a_rank_in_order_and_carry_each_kv_head_once(p):
    placement = place(p)
    assert len(placement.chunks) == p.chunks
    for rank, whole in enumerate(placement.shares):
        parts = [chunk.shares[rank] for chunk in placement.chunks]
        assert [h for s in parts for h in range(s.q_start, s.q_stop)] == list(range(whole.q_start, whole.q_stop))
        assert all(s.q_heads and s.kv_heads for s in parts)
        for s in parts:
            assert (s.kv_start, s.kv_stop) == (s.q_start // placement.group, (s.q_stop - 1) // placement.group + 1)
        names = ["q", "k", "v"]
        for direction, carriers in (("qkv", "holders"), ("grad_qkv", "senders")):
            carried = []
            for c, (chunk, s) in enumerate(zip(placement.chunks, parts, strict=True)):
                carrier = getattr(chunk, carriers)[rank]
                found = {f.name: f.heads for x in getattr(chunk, direction) for f in x.rows[rank].fields}
                assert list(found) == (names if carrier == c else ["q"]) and found["q"] == s.q_heads
                assert parts[carrier].kv_start == s.kv_start and parts[carrier].kv_stop == s.kv_stop
                assert carrier <= c if carriers == "holders" else carrier >= c
                carried += list(range(s.kv_start, s.kv_stop)) * (carrier == c)
            assert carried == list(range(whole.kv_start, whole.kv_stop)), "each once, in order"
        assert sum(chunk.out[0].rows[rank].fields[0].heads for chunk in placement.chunks) == whole.q_heads


@given(problems())
def test_what_goes_between_any_two_ranks_is_known_to_all(p):
    for chunk in place(p).chunks:
        for direction, section in (
            *((inbound, section) for section in (*chunk.qkv, *chunk.grad_out)),
            *((outbound, section) for section in (*chunk.out, *chunk.grad_qkv)),
        ):
            messages = [direction(section, p.batch, rank) for rank in range(p.ranks)]
            for known in messages:
                for source, message in enumerate(messages):
                    assert [known.between(source, to) for to in range(p.ranks)] == list(message.send)


@given(problems(), st.integers(1, 12))
def test_replicas_of_a_kv_head_stay_inside_a_node_where_nodes_end_with_kv_heads(p, each):
    """Ranks r, r + 1, ... of a node have neighbouring heads: a head is on two nodes only if they part its kv group."""
    placement = place(p)
    on_nodes = [{j for s in shares for j in range(s.kv_start, s.kv_stop)} for shares in batched(placement.shares, each)]
    for node, (before, after) in enumerate(pairwise(on_nodes), 1):
        parted = placement.head_offset(node * each) != 0
        assert bool(before & after) == parted
    if p.kv_heads % len(on_nodes) == 0 and p.ranks % each == 0:
        assert sum(map(len, on_nodes)) == p.kv_heads


def batched(shares, each):
    return [shares[first : first + each] for first in range(0, len(shares), each)]


@given(problems(), st.integers(1, 9))
def test_chunks_are_those_asked_for_as_far_as_every_rank_has_a_query_head(p, asked):
    assert chunk_count(p, asked) == min(asked, p.heads // p.ranks)
    assert chunk_count(replace(p, attention="callable"), asked) == 1


def test_the_chunks_in_the_example_of_the_module():
    def chunks(n: int) -> list[str]:
        placement = place(problem(lens=(4,), kv_lens=(4,), heads=8, kv_heads=2, chunks=n))
        rows = [[f"{f.name} {f.heads}" for f in chunk.qkv[0].rows[0].fields] for chunk in placement.chunks]
        return [", ".join(row) for row in rows]

    assert chunks(2) == ["q 4, k 1, v 1", "q 4, k 1, v 1"]
    assert chunks(3) == ["q 2, k 1, v 1", "q 2", "q 4, k 1, v 1"]
    placement = place(problem(lens=(4,), kv_lens=(4,), heads=8, kv_heads=2, chunks=3))
    assert [chunk.holders for chunk in placement.chunks] == [(0,), (0,), (2,)]
    assert [chunk.senders for chunk in placement.chunks] == [(1,), (1,), (2,)]
    assert "chunks of query heads 0..1, 2..3, 4..7" in placement.explain()


def test_a_section_that_nobody_has_heads_for_is_left_out():
    placement = place(problem(lens=(4, 4), kv_lens=(3, 3), heads=4, kv_heads=1, chunks=2))
    assert [len(chunk.qkv) for chunk in placement.chunks] == [2, 1]
    assert [len(chunk.grad_qkv) for chunk in placement.chunks] == [1, 2]


def test_partial_kv_gradients_travel_as_fp32_and_whole_ones_in_their_dtype():
    whole, partial = place(problem()), place(problem(kv_heads=1))
    assert [f.width for f in whole.chunks[0].grad_qkv[0].rows[0].fields] == [1, 1, 1]
    assert [f.width for f in partial.chunks[0].grad_qkv[0].rows[0].fields] == [1, 2, 2]


def test_the_rank_in_the_example_of_the_module():
    placement = place(problem(lens=(4,) * 6, kv_lens=(4,) * 6, heads=12, kv_heads=4))
    assert placement.shares[1] == (2, 4, 0, 2)
    assert placement.chunks[0].qkv[0].rows[1].width == 384
    padded = place(problem(lens=(4,) * 6, kv_lens=(4,) * 6, heads=12, kv_heads=4, head_dim=33))
    assert [(f.stride, f.offset) for f in padded.chunks[0].qkv[0].rows[1].fields] == [(40, 0), (40, 80), (64, 160)]


def test_heads_that_ranks_do_not_divide_name_the_group_sizes_that_fit():
    with pytest.raises(ShapeError, match="6 query heads cannot be divided over 4 ranks.*1, 2, 3, 6"):
        place(problem(lens=(4,) * 4, kv_lens=(4,) * 4, heads=6))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"dtype": "int64"}, DtypeError, "int64"),
        ({"heads": 6, "kv_heads": 4}, ShapeError, "multiple"),
        ({"kv_heads": 0}, ShapeError, "multiple"),
        ({"head_dim": 0}, ShapeError, "q and k have head dim 0; it must be from 1 to 256"),
        ({"head_dim": 257}, ShapeError, "head dim 257; it must be from 1 to 256"),
        ({"value_dim": 0}, ShapeError, "v have head dim 0"),
        ({"batch": 0}, ShapeError, "batch"),
        ({"lens": (3, -1), "kv_lens": (3, -1)}, ShapeError, "lens"),
        ({"kv_lens": (3,)}, ShapeError, "kv_lens"),
        ({"attention": "flash"}, OptionError, "flash"),
        ({"scale": float("nan")}, OptionError, "scale"),
        ({"rope_dim": 66}, OptionError, "rope_dim"),
        ({"rope_dim": 7}, OptionError, "rope_dim"),
    ],
    ids=str,
)
def test_impossible_problems_say_what_is_wrong(changes, error, match):
    with pytest.raises(error, match=match):
        problem(**changes).check()


def test_differences_name_the_ranks_and_the_values():
    signatures = [problem(causal=rank != 2, heads=8).signature for rank in range(4)]
    assert differences(signatures) == "causal: rank 2 has False, ranks 0, 1, 3 have True"
