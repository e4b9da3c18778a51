"""pack, pack_grad, unpack and unpack_grad: kernels and twins against an fp64 autograd formulation of their own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ulysses_triton.kernels import _config
from ulysses_triton.kernels import pack as pack_file
from ulysses_triton.kernels import reference as twins
from ulysses_triton.kernels import unpack as unpack_file
from ulysses_triton.kernels._views import ORows, QKVRows, Transform

kernels = SimpleNamespace(
    pack=pack_file.pack, pack_grad=pack_file.pack_grad, unpack=unpack_file.unpack, unpack_grad=unpack_file.unpack_grad
)
both = pytest.mark.parametrize("impl", [pytest.param(kernels, id="kernel"), pytest.param(twins, id="twin")])
low = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])

FP32 = 2e-6  # relative norm
FLOOR = {torch.bfloat16: 2**-9, torch.float16: 2**-12}  # half a unit in the last place: one rounding


class Layout(NamedTuple):
    """Who owns which heads: (first query head, query heads, first kv head, kv heads) of each rank."""

    Hq: int
    Hkv: int
    owners: tuple[tuple[int, int, int, int], ...]


EVEN = Layout(4, 2, ((0, 2, 0, 1), (2, 2, 1, 1)))
UNEVEN = Layout(6, 3, ((0, 4, 0, 2), (4, 2, 2, 1), (6, 0, 3, 0)))
MQA = Layout(3, 1, ((0, 1, 0, 1), (1, 1, 0, 1), (2, 1, 0, 1)))
SHARED = Layout(12, 4, tuple((2 * r, 2, 2 * r // 3, (2 * r + 1) // 3 - 2 * r // 3 + 1) for r in range(6)))
LAYOUTS = {"even": EVEN, "uneven": UNEVEN, "mqa": MQA, "shared-kv": SHARED}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


class Shape(NamedTuple):
    B: int = 2
    L: int = 37
    D: int = 24
    Dv: int = 40


def error(x: Tensor, expected: Tensor) -> float:
    """Relative norm; 0 for two empty tensors."""
    assert x.shape == expected.shape and not x.isnan().any()
    return (torch.linalg.vector_norm(x.double() - expected.double()) / expected.double().norm().clamp_min(1e-30)).item()


def padded(dim: int) -> int:
    return (dim + 7) // 8 * 8


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def fused(
    layout: Layout, shape: Shape, dtype: torch.dtype, fill: Callable[..., Tensor] = torch.randn
) -> tuple[Tensor, ...]:
    """q, k and v as views of one projection output [B, L, Hq D + Hkv D + Hkv Dv]."""
    sizes = [layout.Hq * shape.D, layout.Hkv * shape.D, layout.Hkv * shape.Dv]
    q, k, v = fill(shape.B, shape.L, sum(sizes)).to(dtype).split(sizes, -1)
    return q.unflatten(-1, (-1, shape.D)), k.unflatten(-1, (-1, shape.D)), v.unflatten(-1, (-1, shape.Dv))


def heads_first(layout: Layout, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    B, L, D, Dv = shape
    sizes = ((layout.Hq, D), (layout.Hkv, D), (layout.Hkv, Dv))
    return tuple(torch.randn(B, h, L, d).to(dtype).transpose(1, 2) for h, d in sizes)


def unaligned(layout: Layout, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One element past an aligned address, with an odd token stride."""
    B, L, D, Dv = shape
    sizes = ((layout.Hq, D), (layout.Hkv, D), (layout.Hkv, Dv))
    return tuple(torch.randn(B, L, h * d + 3).to(dtype)[..., 1:-2].unflatten(-1, (h, d)) for h, d in sizes)


SOURCES = {"fused": fused, "heads-first": heads_first, "unaligned": unaligned}


def qkv_rows(
    layout: Layout, shape: Shape, dtype: torch.dtype, kv_dtype: torch.dtype | None = None, offset: int = 0, gap: int = 8
) -> tuple[list[QKVRows], list[Tensor]]:
    """Each rank's rows, NaN everywhere, and the buffers below; `gap` elements lie between the parts of a row.

    Heads begin at multiples of 8 elements after the `offset`.
    """
    B, L, D, Dv = shape
    rows, buffers = [], []
    for q_head, hq, kv_head, hkv in layout.owners:
        views = []
        for parts in ([(hq, D, dtype)], [(hkv, D, kv_dtype or dtype), (hkv, Dv, kv_dtype or dtype)]):
            buffer = poisoned(L, B, offset + sum(h * padded(d) + gap for h, d, _ in parts), dtype=parts[0][2])
            buffers.append(buffer)
            start = offset
            for h, d, _ in parts:
                stop = start + h * padded(d)
                views.append(buffer[..., start:stop].unflatten(-1, (h, padded(d)))[..., :d])
                start = stop + gap
        rows.append(QKVRows(*views, q_head, kv_head))
    return rows, buffers


def o_rows(layout: Layout, shape: Shape, dtype: torch.dtype, stat: torch.dtype | None) -> list[ORows]:
    """Each rank's rows of O, NaN everywhere, with the stat bit-cast at the end of the row as it travels."""
    B, L, _, Dv = shape
    rows = []
    for q_head, hq, _, _ in layout.owners:
        extra = 0 if stat is None else hq * stat.itemsize // dtype.itemsize
        size = hq * padded(Dv)
        buffer = poisoned(L, B, (size + extra + 16) // 16 * 16, dtype=dtype)
        o = buffer[..., :size].unflatten(-1, (hq, padded(Dv)))[..., :Dv]
        tail = None if stat is None else buffer[..., size:].view(stat)[..., :hq]
        rows.append(ORows(o, tail, q_head))
    return rows


def transformed(x: Tensor, tf: Transform, weight: Tensor | None) -> Tensor:
    """QK-norm and RoPE written out pair by pair, differentiable, in the dtype of `x`."""
    if weight is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + tf.eps) * weight.to(x.dtype)
    if tf.cos is None:
        return x
    R = tf.rope_dim
    channels = list(x.unbind(-1))
    cos, sin = (t.to(x.dtype).unsqueeze(2).expand(x.shape[0], -1, -1, -1) for t in (tf.cos, tf.sin))
    for i in range(R // 2):
        a, b = (2 * i, 2 * i + 1) if tf.interleaved else (i, i + R // 2)
        c_a, c_b = (a, b) if cos.shape[-1] == R else (i, i)
        x_a, x_b = channels[a], channels[b]
        channels[a] = x_a * cos[..., c_a] - x_b * sin[..., c_a]
        channels[b] = x_b * cos[..., c_b] + x_a * sin[..., c_b]
    return torch.stack(channels, -1)


def held(x: Tensor, head: int, token: int, view: Tensor) -> Tensor:
    """What of `x` [B, L, H, ...] a view of rows holds that begins with this head and this token."""
    return x[:, token : token + view.shape[0], head : head + view.shape[2]].transpose(0, 1)


def expected_rows(rows: list[QKVRows], q: Tensor, k: Tensor, v: Tensor, tf: Transform) -> list[tuple[Tensor, ...]]:
    q, k = transformed(q, tf, tf.q_norm), transformed(k, tf, tf.k_norm)
    return [
        (
            held(q, r.q_head, r.q_token, r.q),
            held(k, r.kv_head, r.kv_token, r.k),
            held(v, r.kv_head, r.kv_token, r.v),
        )
        for r in rows
    ]


class Options(NamedTuple):
    rope_dim: int = 0
    interleaved: bool = False
    wide: bool = False
    batch: bool = False  # cos and sin differ from batch to batch
    q_norm: bool = False
    k_norm: bool = False
    dtype: torch.dtype = torch.float32  # of cos, sin and the weights


TRANSFORMS = {
    "half": Options(24),
    "half-wide": Options(24, wide=True),
    "half-partial": Options(12, batch=True),
    "half-partial-wide-norm": Options(16, wide=True, q_norm=True, k_norm=True),
    "half-norm": Options(24, q_norm=True, k_norm=True),
    "half-k-norm-fp64-tables": Options(24, k_norm=True, dtype=torch.float64),
    "interleaved": Options(24, True),
    "interleaved-wide-norm": Options(24, True, wide=True, q_norm=True, k_norm=True),
    "interleaved-partial": Options(12, True, q_norm=True),
    "interleaved-partial-wide": Options(20, True, wide=True, batch=True),
    "norm": Options(q_norm=True, k_norm=True),
    "norm-bf16-weights": Options(8, q_norm=True, k_norm=True, dtype=torch.bfloat16),
}
transforms = pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
SOME = ["half-norm", "interleaved-wide-norm", "norm"]
some_transforms = pytest.mark.parametrize("options", [TRANSFORMS[name] for name in SOME], ids=SOME)


def make_transform(options: Options, shape: Shape) -> Transform:
    columns = options.rope_dim if options.wide else options.rope_dim // 2
    batch = shape.B if options.batch else 1
    cos, sin = (torch.randn(batch, shape.L, columns).to(options.dtype) for _ in range(2))
    q_norm, k_norm = (torch.rand(shape.D).add(0.5).to(options.dtype) if has else None for has in options[4:6])
    if not options.rope_dim:
        return Transform(q_norm=q_norm, k_norm=k_norm)
    return Transform(cos, sin, options.rope_dim, options.interleaved, q_norm, k_norm)


def cast(tf: Transform, dtype: torch.dtype) -> Transform:
    return Transform(*(x.to(dtype) if isinstance(x, Tensor) else x for x in tf))


# pack


dims = pytest.mark.parametrize("shape", [Shape(), Shape(D=33, Dv=17), Shape(D=1, Dv=100)], ids=["24", "33", "1"])


@both
@layouts
@dims
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_pack_writes_all_of_its_views_and_nothing_else(
    impl: ModuleType, layout: Layout, shape: Shape, source: Callable
) -> None:
    q, k, v = source(layout, shape, torch.bfloat16)
    rows, buffers = qkv_rows(layout, shape, torch.bfloat16)
    impl.pack(q, k, v, rows)
    for r, views in zip(rows, expected_rows(rows, q, k, v, Transform()), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(r[:3], views, strict=True))
    for r in rows:
        for view in r[:3]:
            view.fill_(float("nan"))
    assert all(buffer.isnan().all() for buffer in buffers)


@both
@transforms
@pytest.mark.parametrize("D", [24, 33])
def test_pack_transforms_q_and_k(impl: ModuleType, options: Options, D: int) -> None:
    shape = Shape(D=D)
    tf = make_transform(options, shape)
    q, k, v = fused(EVEN, shape, torch.float32)
    rows, _ = qkv_rows(EVEN, shape, torch.float32)
    impl.pack(q, k, v, rows, tf)
    expected = expected_rows(rows, q.double(), k.double(), v.double(), cast(tf, torch.float64))
    for r, (x_q, x_k, x_v) in zip(rows, expected, strict=True):
        assert error(r.q, x_q) < FP32 and error(r.k, x_k) < FP32 and torch.equal(r.v.double(), x_v)


@both
@low
@some_transforms
def test_pack_rounds_once(impl: ModuleType, options: Options, dtype: torch.dtype) -> None:
    shape = Shape(B=1, L=33)
    tf = make_transform(options, shape)
    q, k, v = fused(MQA, shape, dtype)
    rows, _ = qkv_rows(MQA, shape, dtype)
    impl.pack(q, k, v, rows, tf)
    expected = expected_rows(rows, q.double(), k.double(), v.double(), cast(tf, torch.float64))
    plain = expected_rows(rows, q, k, v, cast(tf, dtype))
    for r, exact, same in zip(rows, expected, plain, strict=True):
        for x, y, z in zip(r[:2], exact[:2], same[:2], strict=True):
            assert error(x, y) < min(FLOOR[dtype], 2 * error(z, y) + FLOOR[dtype])


@both
@pytest.mark.parametrize("source", [heads_first, unaligned], ids=["heads-first", "unaligned"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_pack_transforms_any_strides(impl: ModuleType, source: Callable, interleaved: bool) -> None:
    shape = Shape(B=1, L=33)
    tf = make_transform(Options(16, interleaved, q_norm=True), shape)
    tf = tf._replace(cos=tf.cos.transpose(1, 2).contiguous().transpose(1, 2))  # its last dimension is not dense
    q, k, v = source(EVEN, shape, torch.float32)
    rows, _ = qkv_rows(EVEN, shape, torch.float32, offset=1, gap=5)
    impl.pack(q, k, v, rows, tf)
    expected = expected_rows(rows, q.double(), k.double(), v.double(), cast(tf, torch.float64))
    assert all(error(x, y) < FP32 for r, e in zip(rows, expected, strict=True) for x, y in zip(r[:3], e, strict=True))


@both
def test_pack_takes_keys_of_another_length(impl: ModuleType) -> None:
    queries, keys = Shape(L=5), Shape(L=70)
    q, _, _ = fused(SHARED, queries, torch.float32)
    _, k, v = fused(SHARED, keys, torch.float32)
    of_queries, _ = qkv_rows(SHARED, queries, torch.float32)
    of_keys, _ = qkv_rows(SHARED, keys, torch.float32)
    rows = [a._replace(k=b.k, v=b.v) for a, b in zip(of_queries, of_keys, strict=True)]
    impl.pack(q, k, v, rows)
    for r, views in zip(rows, expected_rows(rows, q, k, v, Transform()), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(r[:3], views, strict=True))
    dq, dk, dv = (poisoned(*x.shape, dtype=x.dtype) for x in (q, k, v))
    impl.unpack_grad(rows, None, None, dq, dk, dv)
    times = torch.tensor([sum(k0 <= h < k0 + n for _, _, k0, n in SHARED.owners) for h in range(4)])[:, None]
    assert torch.equal(dq, q) and error(dk, k * times) < FP32 and error(dv, v * times) < FP32


# pack_grad and unpack


@both
@layouts
@dims
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pack_grad_sends_gradient_and_delta(impl: ModuleType, layout: Layout, shape: Shape, dtype: torch.dtype) -> None:
    rows = o_rows(layout, shape, dtype, torch.float32)
    do, o = (torch.randn(shape.B, layout.Hq, shape.L, shape.Dv).to(dtype).transpose(1, 2) for _ in range(2))
    dlse = torch.randn(shape.B, layout.Hq, shape.L).transpose(1, 2)
    for given_dlse in (dlse, None):
        impl.pack_grad(do, o, given_dlse, rows)
        delta = (do.double() * o.double()).sum(-1) - (0 if given_dlse is None else given_dlse.double())
        for r, (q0, hq, _, _) in zip(rows, layout.owners, strict=True):
            assert torch.equal(r.o, do[:, :, q0 : q0 + hq].transpose(0, 1))
            assert error(r.stat, delta[:, :, q0 : q0 + hq].transpose(0, 1)) < FP32


@both
def test_pack_grad_takes_an_expanded_gradient_and_no_delta(impl: ModuleType) -> None:
    shape = Shape(L=33)
    do = torch.full((), 0.5).expand(shape.B, shape.L, EVEN.Hq, shape.Dv)
    rows = o_rows(EVEN, shape, torch.float32, None)
    impl.pack_grad(do, None, None, rows)
    assert all((r.o == 0.5).all() for r in rows)


@both
@layouts
@dims
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unpack_inverts_the_way_back(impl: ModuleType, layout: Layout, shape: Shape, dtype: torch.dtype) -> None:
    rows = o_rows(layout, shape, dtype, torch.float32)
    o, lse = torch.randn(shape.B, shape.L, layout.Hq, shape.Dv).to(dtype), torch.randn(shape.B, shape.L, layout.Hq)
    for r, (q0, hq, _, _) in zip(rows, layout.owners, strict=True):
        r.o.copy_(o[:, :, q0 : q0 + hq].transpose(0, 1))
        r.stat.copy_(lse[:, :, q0 : q0 + hq].transpose(0, 1))
    out, out_lse = poisoned(*o.shape, dtype=dtype), poisoned(*lse.shape, dtype=lse.dtype)
    impl.unpack(rows, out, out_lse)
    assert torch.equal(out, o) and torch.equal(out_lse, lse)
    strided = poisoned(shape.B, layout.Hq, shape.L, shape.Dv + 1, dtype=dtype)
    impl.unpack(rows, strided[..., 1:].transpose(1, 2), None)
    assert torch.equal(strided[..., 1:].transpose(1, 2), o) and strided[..., 0].isnan().all()


# unpack_grad


def gradient_rows(
    layout: Layout, shape: Shape, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
) -> list[QKVRows]:
    rows, _ = qkv_rows(layout, shape, dtype, kv_dtype)
    for r in rows:
        for view in r[:3]:
            view.copy_(torch.randn(view.shape))
    return rows


def expected_gradients(
    rows: list[QKVRows], qkv: tuple[Tensor, ...], tf: Transform, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and both weights by autograd through the plain formulation in `dtype`."""
    tf = cast(tf, dtype)
    leaves = [None if x is None else x.to(dtype).detach().requires_grad_() for x in (*qkv, tf.q_norm, tf.k_norm)]
    q, k, v, q_norm, k_norm = leaves
    packed = expected_rows(rows, q, k, v, tf._replace(q_norm=q_norm, k_norm=k_norm))
    outputs = [x for views in packed for x in views]
    torch.autograd.backward(outputs, [view.to(dtype) for r in rows for view in r[:3]])
    return tuple(None if x is None else x.grad for x in leaves)


@both
@transforms
@pytest.mark.parametrize("D", [24, 33])
def test_unpack_grad_is_the_vjp_of_pack(impl: ModuleType, options: Options, D: int) -> None:
    shape = Shape(D=D)
    tf = make_transform(options, shape)
    qkv = fused(EVEN, shape, torch.float32)
    rows = gradient_rows(EVEN, shape, torch.float32)
    grads = fused(EVEN, shape, torch.float32, lambda *s: poisoned(*s, dtype=torch.float32))
    norms = impl.unpack_grad(rows, qkv[0], qkv[1], *grads, tf)
    expected = expected_gradients(rows, qkv, tf, torch.float64)
    for x, y in zip((*grads, *norms), expected, strict=True):
        assert x is None if y is None else error(x, y) < FP32


@both
@layouts
@some_transforms
def test_unpack_grad_sums_shared_heads(impl: ModuleType, layout: Layout, options: Options) -> None:
    shape = Shape(B=1, L=33)
    tf = make_transform(options, shape)
    qkv = fused(layout, shape, torch.float32)
    rows = gradient_rows(layout, shape, torch.float32)
    grads = tuple(poisoned(*x.shape, dtype=x.dtype) for x in qkv)
    norms = impl.unpack_grad(rows, qkv[0], qkv[1], *grads, tf)
    expected = expected_gradients(rows, qkv, tf, torch.float64)
    assert all(error(x, y) < FP32 for x, y in zip((*grads, *norms), expected, strict=True) if y is not None)


@both
@low
@pytest.mark.parametrize("partial", [False, True], ids=["own-dtype", "fp32-partials"])
@pytest.mark.parametrize("options", [None, *(TRANSFORMS[name] for name in SOME)], ids=["none", *SOME])
@pytest.mark.parametrize("D", [24, 33])
def test_unpack_grad_rounds_once(
    impl: ModuleType, options: Options | None, partial: bool, dtype: torch.dtype, D: int
) -> None:
    shape = Shape(B=1, L=33, D=D)
    tf = make_transform(options, shape) if options else Transform()
    qkv = fused(SHARED, shape, dtype)
    rows = gradient_rows(SHARED, shape, dtype, torch.float32 if partial else None)
    grads = fused(SHARED, shape, dtype, lambda *s: poisoned(*s, dtype=dtype))
    dq_norm, dk_norm = impl.unpack_grad(rows, qkv[0], qkv[1], *grads, tf)
    expected = expected_gradients(rows, qkv, tf, torch.float64)
    plain = expected_gradients(rows, qkv, tf, dtype)
    for x, y, same in zip(grads, expected, plain, strict=False):
        assert error(x, y) < min(FLOOR[dtype], 2 * error(same, y) + FLOOR[dtype])
    for x, y in ((dq_norm, expected[3]), (dk_norm, expected[4])):
        assert x is None if y is None else x.dtype == torch.float32 and error(x, y) < FP32


def test_kernel_and_twin_sum_in_the_same_order() -> None:
    shape = Shape()
    rows = gradient_rows(SHARED, shape, torch.bfloat16, torch.float32)
    results = []
    for impl in (kernels, twins):
        grads = fused(SHARED, shape, torch.bfloat16, lambda *s: poisoned(*s, dtype=torch.bfloat16))
        impl.unpack_grad(rows, None, None, *grads)
        results.append(grads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_head_that_no_rank_worked_on_has_gradient_zero(impl: ModuleType, dtype: torch.dtype) -> None:
    shape = Shape(B=1, L=5)
    rows = gradient_rows(Layout(4, 2, ((2, 1, 1, 1),)), shape, dtype)
    dq, dk, dv = fused(EVEN, shape, dtype, lambda *s: poisoned(*s, dtype=dtype))
    impl.unpack_grad(rows, None, None, dq, dk, dv)
    for x, head, row in ((dq, 2, rows[0].q), (dk, 1, rows[0].k), (dv, 1, rows[0].v)):
        assert torch.equal(x[:, :, head : head + 1].transpose(0, 1), row)
    assert (dq[:, :, [0, 1, 3]] == 0).all() and (dk[:, :, 0] == 0).all() and (dv[:, :, 0] == 0).all()


def test_twins_compute_in_fp64() -> None:
    shape = Shape(B=1, L=9)
    tf = make_transform(TRANSFORMS["half-partial-wide-norm"]._replace(dtype=torch.float64), shape)
    qkv = fused(EVEN, shape, torch.float64)
    rows, _ = qkv_rows(EVEN, shape, torch.float64)
    twins.pack(*qkv, rows, tf)
    for r, views in zip(rows, expected_rows(rows, *qkv, tf), strict=True):
        assert all(error(x, y) < 1e-14 for x, y in zip(r[:3], views, strict=True))
    grads = tuple(poisoned(*x.shape, dtype=x.dtype) for x in qkv)
    norms = twins.unpack_grad(rows, qkv[0], qkv[1], *grads, tf)
    for x, y in zip((*grads, *norms), expected_gradients(rows, qkv, tf, torch.float64), strict=True):
        assert x.dtype == torch.float64 and error(x, y) < 1e-14
    o, do, dlse = qkv[0], torch.randn_like(qkv[0]), torch.randn(1, 9, 4, dtype=torch.float64)
    to = o_rows(EVEN, shape._replace(Dv=shape.D), torch.float64, torch.float64)
    twins.pack_grad(do, o, dlse, to)
    out = poisoned(1, 9, 4, dtype=torch.float64)
    twins.unpack(to, torch.empty_like(do), out)
    assert error(out, (do * o).sum(-1) - dlse) < 1e-14


# all of them


@both
@pytest.mark.parametrize("L", [0, 1])
@pytest.mark.parametrize("options", [None, *TRANSFORMS.values()], ids=["none", *TRANSFORMS])
def test_no_token_and_one_token(impl: ModuleType, L: int, options: Options | None) -> None:
    shape = Shape(L=L)
    tf = make_transform(options, shape) if options else None
    qkv = fused(MQA, shape, torch.float32)
    rows, _ = qkv_rows(MQA, shape, torch.float32)
    impl.pack(*qkv, rows, tf)
    grads = tuple(poisoned(*x.shape, dtype=x.dtype) for x in qkv)
    norms = impl.unpack_grad(rows, qkv[0], qkv[1], *grads, tf)
    assert not any(x.isnan().any() for r in rows for x in r[:3])
    assert not any(x.isnan().any() for x in (*grads, *norms) if x is not None)
    assert L == 1 or all((x == 0).all() for x in norms if x is not None)
    to = o_rows(MQA, shape, torch.float32, torch.float32)
    o = torch.randn(shape.B, L, MQA.Hq, shape.Dv)
    impl.pack_grad(o, o, None, to)
    out = torch.empty_like(o)
    impl.unpack(to, out, None)
    assert torch.equal(out, o)


@given(
    B=st.integers(1, 2), L=st.integers(0, 70), D=st.sampled_from([1, 3, 8, 16, 33, 40, 64, 100]),
    Dv=st.sampled_from([1, 8, 17, 48]),
    pairs=st.integers(0, 4), flags=st.sampled_from(list(product([False, True], repeat=5))),
    layout=st.sampled_from(list(LAYOUTS.values())), source=st.sampled_from(list(SOURCES.values())),
    offset=st.sampled_from([0, 1, 8]),
)  # fmt: skip
def test_kernel_matches_twin(
    B: int, L: int, D: int, Dv: int, pairs: int, flags: tuple[bool, ...], layout: Layout, source: Callable, offset: int
) -> None:
    shape = Shape(B, L, D, Dv)
    tf = make_transform(Options(2 * min(pairs, D // 2), *flags), shape)
    qkv = source(layout, shape, torch.float32)
    results = []
    for impl in (kernels, twins):
        rows, _ = qkv_rows(layout, shape, torch.float32, offset=offset)
        impl.pack(*qkv, rows, tf)
        grads = tuple(poisoned(*x.shape, dtype=x.dtype) for x in qkv)
        norms = impl.unpack_grad(rows, qkv[0], qkv[1], *grads, tf)
        results.append([x for r in rows for x in r[:3]] + [*grads, *(n for n in norms if n is not None)])
    assert all(error(x, y) < 2 * FP32 for x, y in zip(*results, strict=True))


def test_one_launch_each() -> None:
    shape = Shape()
    qkv = fused(SHARED, shape, torch.bfloat16)
    rows, _ = qkv_rows(SHARED, shape, torch.bfloat16)
    tf = make_transform(TRANSFORMS["half-norm"], shape)
    o, lse = torch.randn(shape.B, shape.L, 12, shape.Dv), torch.randn(shape.B, shape.L, 12)
    to = o_rows(SHARED, shape, torch.float32, torch.float32)
    for call in (
        lambda: kernels.pack(*qkv, rows, tf),
        lambda: kernels.unpack_grad(rows, qkv[0], qkv[1], *qkv, tf),
        lambda: kernels.pack_grad(o, o, lse, to),
        lambda: kernels.unpack(to, o, lse),
    ):
        with _config.capture("sm_90") as launches:
            call()
        assert len(launches) == 1


def test_tables_of_buffers_that_recur_are_built_once(monkeypatch) -> None:
    shape = Shape(L=3)
    qkv = fused(EVEN, shape, torch.float32)
    rows, _ = qkv_rows(EVEN, shape, torch.float32)
    kernels.pack(*qkv, rows)
    monkeypatch.setattr(pack_file, "table", None)  # no other one is made
    kernels.pack(*fused(EVEN, shape, torch.float32), rows)
