"""The autograd op of a whole layer.

`torch.ops.ulysses_triton.attention` takes tensors, numbers and strings only, finds its group by name, and has a fake
and a backward op, so it traces. `abi` is bumped whenever what is saved or the backward changes: PyTorch's on-disk
cache of compiled graphs would otherwise replay the backward of an older version of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import executor
from .call import SCHEMA, Call, agreed, describe, split_qkv
from .errors import UlyssesError
from .executor import Inputs, SmallGrads
from .group import by_name
from .local import choose

ABI = 1

QKV: TypeAlias = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "ulysses_triton::attention", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor out, Tensor lse, Tensor workspace)"
)
def attention(*arguments: Any) -> QKV:
    """A `Call` -> (out [B, L, Hq, Dv], lse [B, L, Hq] or [0], workspace bytes that backward needs or [0])."""
    group, problem, inputs = agreed("attention", Call(*arguments))
    with group.call():
        return executor.forward(problem, group, inputs)


@attention.register_fake
def _(*arguments: Any) -> QKV:
    call = Call(*arguments)
    group = by_name(call.group)
    problem, (q, *_) = describe(group, call)
    stat = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (problem.batch, problem.lens[group.rank], problem.heads)
    return (
        q.new_empty((*shape, problem.value_dim)),
        q.new_empty(shape if call.return_lse else (0,), dtype=stat),
        q.new_empty((executor.workspace(problem, group.rank).size,), dtype=torch.uint8),
    )


@torch.library.custom_op(
    "ulysses_triton::attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor? out, Tensor workspace, bool fused, SymInt head_dim, SymInt kv_tokens, "
    f"bool of_slopes, {SCHEMA}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dq_norm, Tensor dk_norm, Tensor dsinks, Tensor dslopes)",
)
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    workspace: Tensor,
    fused: bool,
    head_dim: int,
    kv_tokens: int,
    of_slopes: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """-> (dq, dk, dv, dq_norm, dk_norm, dsinks, dslopes).

    The gradient of a fused qkv is dq, that of slopes is made if `of_slopes`, and what has no gradient is empty.
    """
    call = Call(*arguments)
    own = by_name(call.group)
    try:
        grads, views = like_inputs(dout, fused, call.kv_heads, head_dim, kv_tokens, own.pool.take)
    except UlyssesError as error:  # no memory for them
        own.refuse(error)
        raise
    if call.q is None:  # not saved, as not needed: only the shapes are
        call = call._replace(q=grads[0]) if fused else call._replace(q=views[0], k=views[1], v=views[2])
    group, problem, inputs = agreed("attention backward", call)
    with group.call():
        small = executor.backward(problem, group, inputs, Inputs(*views, None), workspace, out, dout, dlse, of_slopes)
    return (*grads, *small_grads(dout, small, _whole(call)))


@attention_backward.register_fake
def _(
    dout: Tensor, dlse: Any, out: Any, workspace: Any, fused: bool, head_dim: int, kv_tokens: int, of_slopes: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    call = Call(*arguments)
    grads, _ = like_inputs(dout, fused, call.kv_heads, head_dim, kv_tokens, torch.empty)
    made = _whole(call if of_slopes else call._replace(slopes=None))
    return (*grads, *small_grads(dout, made, _whole(call)))


def _whole(call: Call) -> SmallGrads:
    """What every rank was given whole, in the order of its gradients."""
    return SmallGrads(call.q_norm, call.k_norm, call.sinks, call.slopes)


def small_grads(like: Tensor, grads: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The gradients of what is given whole, as an op returns them: in its dtype, empty where there is none."""
    return tuple(
        like.new_empty(0) if grad is None or whole is None else grad.to(whole.dtype, copy=grad is whole)
        for grad, whole in zip(grads, given, strict=True)
    )


def like_inputs(
    like: Tensor, fused: bool, kv_heads: int, head_dim: int, kv_tokens: int, empty: Callable[..., Tensor]
) -> tuple[QKV, QKV]:
    """New tensors for the gradients of (q, k, v), or of a fused qkv as (qkv, empty, empty); and q, k, v views of them.

    `like` has the output's shape, dtype and device.
    """
    batch, tokens, heads, value_dim = like.shape

    def new(*shape: int) -> Tensor:
        return empty(shape, dtype=like.dtype, device=like.device)

    if fused:
        grad = new(batch, tokens, (heads + 2 * kv_heads) * head_dim)
        return (grad, new(0), new(0)), split_qkv(grad, heads, kv_heads)
    grads = (
        new(batch, tokens, heads, head_dim),
        new(batch, kv_tokens, kv_heads, head_dim),
        new(batch, kv_tokens, kv_heads, value_dim),
    )
    return grads, grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: QKV) -> None:
    call = Call(*inputs)
    out, _, workspace = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(workspace)
    problem, parts = describe(by_name(call.group), call)
    ctx.numbers = call._replace(kv_heads=problem.kv_heads, attention=problem.attention).numbers
    ctx.shape = (call.fused, problem.head_dim, parts.k.size(1))
    ctx.out = (out.shape, out.dtype, out.device)
    raw = call.recompute or problem.q_norm or problem.k_norm
    ctx.save_for_backward(
        None if choose(problem).keeps_output else out,
        workspace,
        *(call.tensors if raw else (None, None, None, *call.tensors[3:])),
    )


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:
    out, workspace, *tensors = ctx.saved_tensors
    of_slopes = bool(ctx.needs_input_grad[Call._fields.index("slopes")])
    if dout is None:
        shape, dtype, device = ctx.out
        dout = torch.zeros(shape, dtype=dtype, device=device)
    call = Call.of(tensors, ctx.numbers)
    dlse = dlse if call.return_lse else None
    grads = attention_backward(dout, dlse, out, workspace, *ctx.shape, of_slopes, *call)
    found = dict(zip(("q", "k", "v", "q_norm", "k_norm", "sinks", "slopes"), grads, strict=True))
    fused = ctx.shape[0]
    absent = {"k": fused, "v": fused, "slopes": not of_slopes}
    return grads_of(call, {n: g for n, g in found.items() if not absent.get(n, getattr(call, n) is None and n != "q")})


def grads_of(call: Call, found: dict[str, Tensor]) -> tuple[Any, ...]:
    """A gradient for every argument of an op, in order: those `found`, by name, and None for all others.

    PyTorch expects a list for a list of tensors, for which it also takes an empty list of numbers.
    """
    lists = {name: [None] * len(x) for name, x in call._asdict().items() if x == [] or name == "captured"}
    return tuple(lists.get(name, found.get(name)) for name in Call._fields)


attention.register_autograd(_backward, setup_context=_setup_context)
