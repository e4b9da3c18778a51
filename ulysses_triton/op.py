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
from .executor import Inputs
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
    f"{SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_norm, Tensor dk_norm)",
)
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    workspace: Tensor,
    fused: bool,
    head_dim: int,
    kv_tokens: int,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """-> (dq, dk, dv, dq_norm, dk_norm); the gradient of a fused qkv is dq, and what has no gradient is empty."""
    call = Call(*arguments)
    grads, views = like_inputs(dout, fused, call.kv_heads, head_dim, kv_tokens, by_name(call.group).pool.take)
    if call.q is None:  # not saved, as not needed: only the shapes are
        call = call._replace(q=grads[0]) if fused else call._replace(q=views[0], k=views[1], v=views[2])
    group, problem, inputs = agreed("attention backward", call)
    with group.call():
        norms = executor.backward(problem, group, inputs, Inputs(*views, None), workspace, out, dout, dlse)
    return (*grads, *weight_grads(dout, norms, (call.q_norm, call.k_norm)))


@attention_backward.register_fake
def _(
    dout: Tensor, dlse: Any, out: Any, workspace: Any, fused: bool, head_dim: int, kv_tokens: int, *arguments: Any
) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    grads, _ = like_inputs(dout, fused, call.kv_heads, head_dim, kv_tokens, torch.empty)
    return (*grads, *weight_grads(dout, (call.q_norm, call.k_norm), (call.q_norm, call.k_norm)))


def weight_grads(
    like: Tensor, grads: Sequence[Tensor | None], weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The gradients of both norm weights as an op returns them: in the weight's dtype, empty where there is none."""
    q_grad, k_grad = (
        like.new_empty(0) if grad is None or weight is None else grad.to(weight.dtype, copy=grad is weight)
        for grad, weight in zip(grads, weights, strict=True)
    )
    return q_grad, k_grad


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
    ctx.numbers = call._replace(kv_heads=problem.kv_heads, attention=problem.attention)[7:]
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
    if dout is None:
        shape, dtype, device = ctx.out
        dout = torch.zeros(shape, dtype=dtype, device=device)
    call = Call(*tensors, *ctx.numbers)
    dlse = dlse if call.return_lse else None
    dq, dk, dv, dq_norm, dk_norm = attention_backward(dout, dlse, out, workspace, *ctx.shape, *call)
    fused = ctx.shape[0]
    return (
        *(dq, None if fused else dk, None if fused else dv),
        *(None, None),
        *(None if weight is None else grad for weight, grad in ((call.q_norm, dq_norm), (call.k_norm, dk_norm))),
        *[None] * len(ctx.numbers),
    )


attention.register_autograd(_backward, setup_context=_setup_context)
