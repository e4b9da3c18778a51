"""The two halves of a layer as ops of their own, for attention that is the user's callable.

`exchange_in` turns sequence shards into rows in head layout, `exchange_out` turns the callable's output back; each has
a backward that makes the opposite trip. An op cannot take a Python object, so the callable runs between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import executor, layout
from .call import SCHEMA, Call, agreed, describe
from .executor import Inputs
from .group import UlyssesGroup, by_name, told_to_peers
from .op import QKV, grads_of, like_inputs, small_grads
from .placement import place
from .spec import Problem


@torch.library.custom_op(
    "ulysses_triton::exchange_in", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor rows, Tensor kv_rows)"
)
def exchange_in(*arguments: Any) -> tuple[Tensor, Tensor]:
    """A `Call` -> (received rows [S, B, row], [0]), or for keys of another length (rows of q, rows of k and v)."""
    group, problem, inputs = agreed("exchange in", Call(*arguments))
    with group.call():
        return _pair(executor.exchange_in(problem, group, inputs))


@exchange_in.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = Call(*arguments)
    group = by_name(call.group)
    problem, (q, *_) = describe(group, call)
    shapes = [(sum(s.lens), problem.batch, s.rows[group.rank].width) for s in place(problem).chunks[0].qkv]
    return _pair([q.new_empty(shape) for shape in shapes])


def _pair(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return rows[0], rows[1] if len(rows) > 1 else rows[0].new_empty(0)


@torch.library.custom_op(
    "ulysses_triton::exchange_in_backward",
    mutates_args=(),
    schema=f"(Tensor rows, Tensor kv_rows, {SCHEMA}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dq_norm, Tensor dk_norm)",
)
def exchange_in_backward(rows: Tensor, kv_rows: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """-> (dq, dk, dv, dq_norm, dk_norm), as the layer's backward."""
    call = Call(*arguments)
    group, problem, inputs = agreed("exchange in backward", call)
    with group.call():
        grads, views = _grads(problem, inputs, call, group.pool.take)
        norms = executor.exchange_in_backward(problem, group, inputs, Inputs(*views, None), [rows, kv_rows])
    return (*grads, *small_grads(inputs.q, norms, (call.q_norm, call.k_norm)))


@exchange_in_backward.register_fake
def _(rows: Tensor, kv_rows: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    problem, inputs = describe(by_name(call.group), call)
    grads, _ = _grads(problem, inputs, call, torch.empty)
    return (*grads, *small_grads(inputs.q, (call.q_norm, call.k_norm), (call.q_norm, call.k_norm)))


def _grads(problem: Problem, inputs: Inputs, call: Call, empty: Callable[..., Tensor]) -> tuple[QKV, QKV]:
    like = inputs.q.new_empty(1).expand(*inputs.q.shape[:3], problem.value_dim)
    return like_inputs(like, call.fused, problem.kv_heads, problem.head_dim, inputs.k.size(1), empty)


def _setup_in(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = Call(*inputs)
    ctx.save_for_backward(*call.tensors)
    ctx.numbers = call.numbers


def _backward_in(ctx: Any, rows: Tensor, kv_rows: Tensor) -> tuple[Any, ...]:
    call = Call.of(ctx.saved_tensors, ctx.numbers)
    grads = exchange_in_backward(rows, kv_rows, *call)
    found = zip(("q", "k", "v", "q_norm", "k_norm"), grads, strict=True)
    return grads_of(call, {name: grad for name, grad in found if getattr(call, name) is not None})


exchange_in.register_autograd(_backward_in, setup_context=_setup_in)


class _Split(torch.autograd.Function):
    """Parts of rows, whose gradients are joined in memory of the group's: fresh pages would cost more than the rest."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: UlyssesGroup) -> tuple[Tensor, ...]:
        ctx.shape, ctx.group = rows.shape, group
        return tuple(layout.split(rows, sizes))

    @staticmethod
    @once_differentiable  # or no `out=` with create_graph
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        with told_to_peers(ctx.group):  # that there is no memory for them
            rows = ctx.group.pool.take(ctx.shape, grads[0].dtype, grads[0].device)
        return torch.cat(grads, -1, out=rows), None, None


def received_views(problem: Problem, group: UlyssesGroup, received: Sequence[Tensor]) -> dict[str, Tensor]:
    """q, k and v in what `exchange_in` returned, as the callable gets them; of a rank without heads q alone."""
    split = layout.split if torch.compiler.is_compiling() else lambda rows, sizes: _Split.apply(rows, sizes, group)
    views: dict[str, Tensor] = {}
    for of_section in layout.views_of_rows(problem, group.rank, received, split=split):
        views |= of_section
    return views


@torch.library.custom_op("ulysses_triton::exchange_out", mutates_args=())
def exchange_out(
    o: Tensor, group: str, heads: int, kv_heads: int, head_dim: int, lens: list[int], causal: bool
) -> Tensor:
    """o [S, B, hq, Dv] in head layout -> out [B, L, Hq, Dv]."""
    own = by_name(group)
    problem = _output_problem(o, heads, kv_heads, head_dim, lens, causal)
    own.agree("exchange out", problem.signature, device=problem.device)
    with own.call():
        return executor.exchange_out(problem, own, Inputs(o, o, o, None), o)


@exchange_out.register_fake
def _(o, group, heads, kv_heads, head_dim, lens, causal):
    return o.new_empty((o.size(1), lens[by_name(group).rank], heads, o.size(3)))


@torch.library.custom_op("ulysses_triton::exchange_out_backward", mutates_args=())
def exchange_out_backward(
    dout: Tensor, group: str, heads: int, kv_heads: int, head_dim: int, lens: list[int], causal: bool
) -> Tensor:
    """dout [B, L, Hq, Dv] -> rows [S, B, row] that hold do [hq, Dv] in head layout."""
    own = by_name(group)
    problem = _output_problem(dout.transpose(0, 1), heads, kv_heads, head_dim, lens, causal)
    own.agree("exchange out backward", problem.signature, device=problem.device)
    with own.call():
        return executor.exchange_out_backward(problem, own, Inputs(dout, dout, dout, None), dout)


@exchange_out_backward.register_fake
def _(dout, group, heads, kv_heads, head_dim, lens, causal):
    problem = _output_problem(dout.transpose(0, 1), heads, kv_heads, head_dim, lens, causal)
    width = place(problem).chunks[0].out[0].rows[by_name(group).rank].width
    return dout.new_empty((sum(lens), dout.size(0), width))


def _output_problem(o: Tensor, heads: int, kv_heads: int, head_dim: int, lens: list[int], causal: bool) -> Problem:
    return Problem(
        batch=o.size(1),
        lens=tuple(lens),
        kv_lens=tuple(lens),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=o.size(3),
        dtype=str(o.dtype).removeprefix("torch."),
        device=o.device.type,
        causal=causal,
        scale=1.0,
        attention="callable",
    )


def _setup_out(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.fixed = inputs[1:]


def _backward_out(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    rows = exchange_out_backward(dout, *ctx.fixed)
    group, *numbers = ctx.fixed
    problem = _output_problem(dout.transpose(0, 1), *numbers)
    return (layout.o_of_rows(problem, by_name(group).rank, rows), *(None,) * 6)


exchange_out.register_autograd(_backward_out, setup_context=_setup_out)
