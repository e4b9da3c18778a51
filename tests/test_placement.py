"""Placement, row layouts and messages: pure functions, checked for every rank count at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_triton.cuts import QUERY_TILE, Piece
from ulysses_triton.errors import DtypeError, OptionError, ShapeError
from ulysses_triton.messages import inbound, outbound
from ulysses_triton.placement import Placement, chunk_count, place
from ulysses_triton.spec import Problem, differences


def problem(**changes: object) -> Problem:
    values = dict(
        batch=2, lens=(5, 7), kv_lens=(5, 7), heads=4, kv_heads=2, head_dim=64, value_dim=64, dtype="bfloat16",
        device="cpu", causal=True, scale=0.125,
    )  # fmt: skip
    return Problem(**(values | changes))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Of any heads on any ranks; where ranks do not divide heads, those are cut, unless PyTorch's kernel attends."""
    ranks, heads = draw(st.integers(1, 12)), draw(st.integers(1, 24))
    if draw(st.booleans()):
        heads *= ranks
    lens = tuple(draw(st.lists(st.integers(0, 400), min_size=ranks, max_size=ranks)))
    found = problem(
        lens=lens,
        kv_lens=draw(st.sampled_from([lens, tuple(n + 1 for n in lens)])),
        heads=heads,
        kv_heads=draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        head_dim=draw(st.sampled_from([8, 24, 33, 128])),
        value_dim=draw(st.sampled_from([1, 8, 50, 64])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16", "float64"])),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, (100, 30), (-1, 5)])),
        attention=draw(st.sampled_from(["triton", "triton", "reference", "aten"])),
        return_lse=draw(st.booleans()),
    )
    return replace(found, chunks=chunk_count(found, draw(st.integers(1, 5))))


def pieces_of(placement: Placement, rank: int) -> list[tuple[int, Piece]]:
    """A rank's pieces and their chunks, in order."""
    return [(chunk.number, piece) for chunk in placement.chunks for piece in chunk.pieces[rank]]


@given(problems())
def test_every_query_of_every_head_once_and_in_order(p):
    placement = place(p)
    assert len(placement.chunks) == p.chunks
    done = [0] * p.heads  # queries of each head
    for rank in range(p.ranks):
        for _, piece in pieces_of(placement, rank):
            assert piece.q_heads and (piece.tokens or p.seq == 0)
            for head in range(piece.q_start, piece.q_stop):
                assert piece.start == done[head] and all(n == p.seq for n in done[:head])
                done[head] = piece.stop
            cut = piece.tokens < p.seq
            assert not cut or (p.heads % p.ranks and p.attention != "aten")
            assert all(at % QUERY_TILE == 0 or at == p.seq for at in (piece.start, piece.stop))
    assert done == [p.seq] * p.heads


@given(problems())
def test_a_rank_has_its_kv_heads_once_as_far_as_its_queries_attend(p):
    placement = place(p)
    owners = []
    for rank, share in enumerate(placement.shares):
        pieces = pieces_of(placement, rank)
        wanted = sorted({h // placement.group for _, s in pieces for h in range(s.q_start, s.q_stop)})
        assert wanted == list(range(share.kv_start, share.kv_stop))
        owners += wanted
        for what, name in (("held", "qkv"), ("sent", "grad_qkv")):
            carried = [getattr(chunk, what)[rank] for chunk in placement.chunks]
            assert [h for heads in carried for h in heads] == wanted, "each once, in order"
            for chunk, heads in zip(placement.chunks, carried, strict=True):
                fields = [f for section in getattr(chunk, name) for f in section.rows[rank].fields if f.heads]
                assert [(f.name, f.heads) for f in fields if f.name != "q"] == [(n, len(heads)) for n in "kv" if heads]
                assert [f.heads for f in fields if f.name == "q"] == [s.q_heads for s in chunk.pieces[rank]]
        for at, (c, piece) in enumerate(pieces):
            assert (piece.kv_start, piece.kv_stop) == (
                piece.q_start // placement.group,
                (piece.q_stop - 1) // placement.group + 1,
            )
            later = [s for _, s in pieces[at + 1 :] if s.kv_start < piece.kv_stop]
            assert piece.last == (not later) and (piece.last or piece.kv_heads == 1)
            assert all(s.kv_heads == 1 for s in later)
            assert piece.holder == min(d for d, s in pieces if s.kv_start <= piece.kv_start < s.kv_stop) <= c
            section = placement.chunks[piece.holder].qkv[-1]
            right = p.bounds[1]
            reached = p.kv_seq if right < 0 else min(p.kv_seq, piece.stop + right)
            assert reached <= section.tokens(rank) <= p.kv_seq
    assert placement.shared == (len(owners) > p.kv_heads)


@given(problems(), st.integers(1, 3))
def test_volume_is_q_and_o_once_and_a_kv_head_once_per_rank_that_works_on_it(p, batch):
    placement = place(p)

    def numbers(name: str, fields: str) -> int:
        """Heads x tokens that all ranks receive, without padding."""
        return sum(
            section.tokens(rank) * sum(f.heads for f in row.fields if f.name in fields)
            for chunk in placement.chunks
            for section in getattr(chunk, name)
            for rank, row in enumerate(section.rows)
        )

    workers = sum(share.kv_heads for share in placement.shares)
    for name in ("qkv", "grad_qkv"):
        assert numbers(name, "q") == p.heads * p.seq
        assert numbers(name, "k") == numbers(name, "v") <= workers * p.kv_seq
    assert numbers("out", "o") == numbers("grad_out", "o") == p.heads * p.seq
    shards = range(p.ranks)
    assert sum(chunk.results(r, s) for chunk in placement.chunks for r in shards for s in shards) == p.heads * p.seq


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
    """Ranks r, r + 1, ... of a node have neighbouring heads: at most one is on two nodes, if they part its kv group."""
    placement = place(p)
    on_nodes = [{j for s in shares for j in range(s.kv_start, s.kv_stop)} for shares in batched(placement.shares, each)]
    for node, (before, after) in enumerate(pairwise(on_nodes), 1):
        assert len(before & after) <= 1
        if p.heads % p.ranks == 0:
            assert bool(before & after) == (placement.head_offset(node * each) != 0)
    if p.heads % p.ranks == 0 and p.kv_heads % len(on_nodes) == 0 and p.ranks % each == 0:
        assert sum(map(len, on_nodes)) == p.kv_heads


def batched(shares, each):
    return [shares[first : first + each] for first in range(0, len(shares), each)]


@given(problems(), st.integers(1, 9))
def test_chunks_are_those_asked_for_as_far_as_every_rank_has_something_for_each(p, asked):
    tiles = -(-p.seq // QUERY_TILE) * p.heads // p.ranks
    most = p.heads // p.ranks if p.heads % p.ranks == 0 else 1 if p.attention == "aten" else max(1, tiles)
    assert chunk_count(p, asked) == min(asked, most)
    assert chunk_count(replace(p, attention="callable"), asked) == 1


def test_the_chunks_in_the_example_of_the_module():
    def chunks(n: int) -> list[str]:
        placement = place(problem(lens=(4,), kv_lens=(4,), heads=8, kv_heads=2, chunks=n))
        rows = [[f"{f.name} {f.heads}" for f in chunk.qkv[0].rows[0].fields] for chunk in placement.chunks]
        return [", ".join(row) for row in rows]

    assert chunks(2) == ["q 4, k 1, v 1", "q 4, k 1, v 1"]
    assert chunks(3) == ["q 2, k 1, v 1", "q 2", "q 4, k 1, v 1"]
    placement = place(problem(lens=(4,), kv_lens=(4,), heads=8, kv_heads=2, chunks=3))
    assert [chunk.pieces[0][0].holder for chunk in placement.chunks] == [0, 0, 2]
    assert [chunk.pieces[0][0].last for chunk in placement.chunks] == [False, True, True]
    assert "chunks of query heads 0..1 from 0 to 4; query heads 2..3 from 0 to 4; query" in placement.explain()


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


def test_the_shared_head_in_the_example_of_the_module():
    S = 4 * QUERY_TILE
    placement = place(problem(lens=(S // 2,) * 2, kv_lens=(S // 2,) * 2, heads=3, kv_heads=3, causal=False))
    found = [[(s.q_start, s.q_stop, s.start, s.stop) for s in placement.chunks[0].pieces[r]] for r in (0, 1)]
    assert found == [[(0, 1, 0, S), (1, 2, 0, S // 2)], [(1, 2, S // 2, S), (2, 3, 0, S)]]
    assert [share.kv_heads for share in placement.shares] == [2, 2] and placement.shared
    assert "rank 1: query head 1 from 512 to 1024, query head 2 from 0 to 1024, kv heads 1..2" in placement.explain()
    out = 3 * S * 64
    assert f"in all {3 * S * 64 + 4 * S * 128} elements in and {out} out" in placement.explain()


def test_whoever_starts_in_a_head_gets_the_keys_up_to_its_last_query():
    lens = (QUERY_TILE * 2,) * 4
    sections = place(problem(lens=lens, kv_lens=lens, heads=2, kv_heads=2)).chunks[0].qkv
    stop = sections[0].ranges[0][1]
    assert [n for _, n in sections[-1].ranges] == [stop, sum(lens), stop, sum(lens)]
    assert stop * stop > sum(lens) ** 2 / 2 > (stop - QUERY_TILE) ** 2, "half of the pairs"


def test_ranks_beyond_all_tiles_have_no_work():
    placement = place(problem(lens=(62,) + (0,) * 3, kv_lens=(62,) + (0,) * 3, heads=3, kv_heads=1))
    assert sum(share.q_heads > 0 for share in placement.shares) == 3 and "no work" in placement.explain()


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
