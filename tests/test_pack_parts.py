"""pack, pack_grad, unpack and unpack_grad on rows that hold some of my tokens: as with all, for these alone."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_pack import (
    EVEN,
    FLOOR,
    FP32,
    LAYOUTS,
    MQA,
    SHARED,
    SOME,
    TRANSFORMS,
    Layout,
    Options,
    Shape,
    both,
    cast,
    error,
    expected_gradients,
    expected_rows,
    fused,
    held,
    kernels,
    layouts,
    low,
    make_transform,
    o_rows,
    poisoned,
    qkv_rows,
    twins,
)
from torch import Tensor

from ulysses_triton.kernels import _config
from ulysses_triton.kernels._views import ORows, QKVRows, Transform

some = pytest.mark.parametrize("options", [None, *(TRANSFORMS[name] for name in SOME)], ids=["none", *SOME])


def part(r: QKVRows, q: slice, kv: slice) -> QKVRows:
    """The rows of these tokens of q, and of those of k and v."""
    return r._replace(q=r.q[q], k=r.k[kv], v=r.v[kv], q_token=q.start, kv_token=kv.start)


def cut(rows: list[QKVRows], i: int) -> tuple[int, int]:
    """Where the tokens of rank i's q, and of its k and v, are cut: not where tiles of 32 are, and once at an end."""
    return [(9, 21), (30, 4), (33, 0), (0, 33)][i % 4]


def parted(rows: list[QKVRows]) -> list[QKVRows]:
    """Each rank's rows in parts that hold each token once: with other ranges of k and v, without them, without q."""
    found = []
    for i, r in enumerate(rows):
        n, n_k = cut(rows, i)
        found += [
            part(r, slice(n, len(r.q)), slice(0, n_k)),
            part(r, slice(0, n), slice(n_k, n_k)),
            part(r._replace(q=r.q[:, :, :0]), slice(5, 9), slice(n_k, len(r.k))),
        ]
    return found


def some_of(rows: list[QKVRows]) -> list[QKVRows]:
    """Of each rank one part, of few tokens or of many, so that some tokens have no source, one or several."""
    cuts = [cut(rows, i) for i in range(len(rows))]
    return [
        part(r, slice(n, len(r.q)), slice(0, n_k)) if i % 2 else part(r, slice(0, n), slice(n_k // 2, len(r.k)))
        for i, (r, (n, n_k)) in enumerate(zip(rows, cuts, strict=True))
    ]


def o_parts(rows: list[ORows]) -> list[ORows]:
    """Each rank's rows of O in two parts, of which a token between is in neither."""
    found = []
    for i, r in enumerate(rows):
        n = (7 * i + 3) % len(r.o)
        for token, stop in ((0, n), (n + 1, len(r.o))):
            stat = None if r.stat is None else r.stat[token:stop]
            found.append(ORows(r.o[token:stop], stat, r.q_head, token))
    return found


def filled(rows: list[QKVRows]) -> list[QKVRows]:
    for r in rows:
        for view in r[:3]:
            view.copy_(torch.randn(view.shape))
    return rows


@both
@layouts
@some
def test_pack_writes_parts_and_nothing_else(impl: ModuleType, layout: Layout, options: Options | None) -> None:
    shape = Shape(L=37)
    tf = make_transform(options, shape) if options else Transform()
    q, k, v = fused(layout, shape, torch.float32)
    whole, buffers = qkv_rows(layout, shape, torch.float32)
    rows = some_of(whole)
    impl.pack(q, k, v, rows, tf)
    expected = expected_rows(rows, q.double(), k.double(), v.double(), cast(tf, torch.float64))
    assert all(error(x, y) < FP32 for r, e in zip(rows, expected, strict=True) for x, y in zip(r[:3], e, strict=True))
    for r in rows:
        for view in r[:3]:
            view.fill_(float("nan"))
    assert all(buffer.isnan().all() for buffer in buffers)


@both
@layouts
@some
def test_unpack_grad_of_parts_is_the_vjp(impl: ModuleType, layout: Layout, options: Options | None) -> None:
    """Also of tokens that several parts hold, and none: those get zero."""
    shape = Shape(L=37)
    tf = make_transform(options, shape) if options else Transform()
    qkv = fused(layout, shape, torch.float32)
    rows = some_of(filled(qkv_rows(layout, shape, torch.float32)[0]))
    grads = tuple(poisoned(*x.shape, dtype=x.dtype) for x in qkv)
    norms = impl.unpack_grad(rows, qkv[0], qkv[1], *grads, tf)
    expected = expected_gradients(rows, qkv, tf, torch.float64)
    assert any((x == 0).all(-1).any() for x in expected[:3])
    for x, y in zip((*grads, *norms), expected, strict=True):
        assert x is None if y is None else error(x, y) < FP32 and (x[y == 0] == 0).all()


@both
@low
@some
def test_parts_are_rounded_once(impl: ModuleType, options: Options | None, dtype: torch.dtype) -> None:
    shape = Shape(B=1, L=37)
    tf = make_transform(options, shape) if options else Transform()
    qkv = fused(SHARED, shape, dtype)
    rows = some_of(filled(qkv_rows(SHARED, shape, dtype, torch.float32)[0]))
    grads = fused(SHARED, shape, dtype, lambda *s: poisoned(*s, dtype=dtype))
    norms = impl.unpack_grad(rows, qkv[0], qkv[1], *grads, tf)
    expected = expected_gradients(rows, qkv, tf, torch.float64)
    assert all(error(x, y) < FLOOR[dtype] for x, y in zip(grads, expected, strict=False))
    for x, y in zip(norms, expected[3:], strict=True):
        assert x is None if y is None else x.dtype == torch.float32 and error(x, y) < FP32


@both
@some
def test_parts_of_all_tokens_give_the_bits_of_all_tokens(impl: ModuleType, options: Options | None) -> None:
    """How tokens are divided changes no result; k and v of another length, where no table of RoPE says theirs."""
    shape = Shape(L=37)
    keys = shape if options and options.rope_dim else Shape(L=70)
    tf = make_transform(options, shape) if options else None
    q, (_, k, v) = fused(MQA, shape, torch.bfloat16)[0], fused(MQA, keys, torch.bfloat16)
    filled_q, filled_kv = (filled(qkv_rows(MQA, s, torch.bfloat16, torch.float32)[0]) for s in (shape, keys))
    gradients = [a._replace(k=b.k, v=b.v) for a, b in zip(filled_q, filled_kv, strict=True)]
    results = []
    for divide in (list, parted):
        of_q, of_kv = (qkv_rows(MQA, s, torch.bfloat16)[0] for s in (shape, keys))
        rows = [a._replace(k=b.k, v=b.v) for a, b in zip(of_q, of_kv, strict=True)]
        impl.pack(q, k, v, divide(rows), tf)
        grads = tuple(poisoned(*x.shape, dtype=x.dtype) for x in (q, k, v))
        norms = impl.unpack_grad(divide(gradients), q, k, *grads, tf)
        results.append([x for r in rows for x in r[:3]] + [*grads, *(x for x in norms if x is not None)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_parts_of_o(impl: ModuleType, dtype: torch.dtype) -> None:
    """dO and delta go to the parts' own tokens; O and the LSE come back to these, and nothing else is touched."""
    shape = Shape(L=37)
    rows = o_parts(o_rows(SHARED, shape, dtype, torch.float32))
    do, o = (torch.randn(shape.B, shape.L, SHARED.Hq, shape.Dv).to(dtype) for _ in range(2))
    dlse = torch.randn(shape.B, shape.L, SHARED.Hq)
    impl.pack_grad(do, o, dlse, rows)
    delta = (do.double() * o.double()).sum(-1) - dlse.double()
    for r in rows:
        assert torch.equal(r.o, held(do, r.q_head, r.token, r.o))
        assert error(r.stat, held(delta, r.q_head, r.token, r.stat)) < FP32
    out, lse = torch.full_like(do, 7), torch.full_like(dlse, 7)
    impl.unpack(rows, out, lse)
    written = torch.zeros(do.shape[:3], dtype=torch.bool)
    for r in rows:
        held(written, r.q_head, r.token, r.o).fill_(True)
        assert torch.equal(held(out, r.q_head, r.token, r.o), r.o)
        assert torch.equal(held(lse, r.q_head, r.token, r.stat), r.stat)
    assert written.any() and not written.all()
    assert (out[~written] == 7).all() and (lse[~written] == 7).all()


@both
@some
@pytest.mark.parametrize("L", [0, 6])
def test_parts_without_tokens(impl: ModuleType, options: Options | None, L: int) -> None:
    shape = Shape(L=L)
    tf = make_transform(options, shape) if options else None
    qkv = fused(MQA, shape, torch.float32)
    rows = [part(r, slice(L, L), slice(0, 0)) for r in qkv_rows(MQA, shape, torch.float32)[0]]
    impl.pack(*qkv, rows, tf)
    grads = tuple(poisoned(*x.shape, dtype=x.dtype) for x in qkv)
    norms = impl.unpack_grad(rows, qkv[0], qkv[1], *grads, tf)
    assert all((x == 0).all() for x in (*grads, *norms) if x is not None)
    to = [ORows(r.o[:0], r.stat[:0], r.q_head, L) for r in o_rows(MQA, shape, torch.float32, torch.float32)]
    o, lse = torch.randn(shape.B, L, MQA.Hq, shape.Dv), torch.randn(shape.B, L, MQA.Hq)
    before = o.clone()
    impl.pack_grad(o, o, None, to)
    impl.unpack(to, o, lse)
    assert torch.equal(o, before)


@st.composite
def ranges(draw: st.DrawFn, tokens: int) -> slice:
    start, stop = sorted(draw(st.tuples(*[st.integers(0, tokens)] * 2)))
    return slice(start, stop)


@given(
    data=st.data(), B=st.integers(1, 2), L=st.integers(0, 70), D=st.sampled_from([8, 24, 33]),
    options=st.sampled_from([None, *TRANSFORMS.values()]), layout=st.sampled_from(list(LAYOUTS.values())),
    parts=st.integers(1, 3), offset=st.sampled_from([0, 1]),
)  # fmt: skip
def test_kernel_matches_twin_on_any_parts(
    data: st.DataObject, B: int, L: int, D: int, options: Options | None, layout: Layout, parts: int, offset: int
) -> None:
    shape = Shape(B, L, D)
    tf = make_transform(options._replace(rope_dim=min(options.rope_dim, D // 2 * 2)), shape) if options else None
    qkv = fused(layout, shape, torch.float32)
    held_by = [[data.draw(st.tuples(ranges(L), ranges(L))) for _ in range(parts)] for _ in layout.owners]
    given_rows = filled(qkv_rows(layout, shape, torch.float32, offset=offset)[0])

    def some_parts(rows: list[QKVRows]) -> list[QKVRows]:
        return [part(r, q, kv) for r, of_rank in zip(rows, held_by, strict=True) for q, kv in of_rank]

    results: list[list[Tensor]] = []
    for impl in (kernels, twins):
        rows = qkv_rows(layout, shape, torch.float32, offset=offset)[0]
        for r in rows:
            for view in r[:3]:
                view.zero_()
        impl.pack(*qkv, some_parts(rows), tf)  # where they overlap, they are written alike
        grads = tuple(poisoned(*x.shape, dtype=x.dtype) for x in qkv)
        norms = impl.unpack_grad(some_parts(given_rows), qkv[0], qkv[1], *grads, tf)
        results.append([x for r in rows for x in r[:3]] + [*grads, *(n for n in norms if n is not None)])
    assert all(error(x, y) < 2 * FP32 for x, y in zip(*results, strict=True))


def test_other_tokens_in_the_same_rows() -> None:
    """What is kept of one call is not taken for another that differs in its tokens alone."""
    q, k, v = fused(EVEN, Shape(L=12), torch.float32)
    rows = [part(r, slice(0, 5), slice(0, 5)) for r in qkv_rows(EVEN, Shape(L=5), torch.float32)[0]]
    for token in (0, 7):
        kernels.pack(q, k, v, [r._replace(q_token=token, kv_token=token) for r in rows])
        assert torch.equal(rows[1].q, held(q, 2, token, rows[1].q))
        assert torch.equal(rows[1].k, held(k, 1, token, rows[1].k))


def test_one_launch_as_long_as_the_longest_part() -> None:
    shape = Shape(B=1, L=512)
    q, k, v = fused(EVEN, shape, torch.bfloat16)
    rows = qkv_rows(EVEN, shape, torch.bfloat16)[0]
    parts = [part(rows[0], slice(100, 150), slice(0, 20)), part(rows[1], slice(0, 5), slice(7, 7))]
    o = torch.randn(shape.B, shape.L, 4, shape.Dv)
    to = [ORows(r.o[:50], None, r.q_head, 30) for r in o_rows(EVEN, shape, torch.float32, None)]
    with _config.capture("sm_90") as launches:
        kernels.pack(q, k, v, parts)
        kernels.pack_grad(o, None, None, to)
        kernels.unpack(to, o, None)
    units = [2 + 1 + 1 + 2, 4, 4]
    assert [launch.grid for launch in launches] == [
        (n * -(-50 // launch.args["BLOCK_T"]), 1) for n, launch in zip(units, launches, strict=True)
    ]


def test_rows_past_the_last_token_are_refused() -> None:
    q, k, v = fused(EVEN, Shape(L=9), torch.float32)
    rows = [r._replace(q_token=5) for r in qkv_rows(EVEN, Shape(L=5), torch.float32)[0]]
    with pytest.raises(AssertionError, match="rows of other tokens"):
        kernels.pack(q, k, v, rows)
