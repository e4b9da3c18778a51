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
from .call import SCHEMA, Call, agreed, describe
from .errors import UlyssesError
from .executor import Inputs, SmallGrads
from .group import by_name
from .local import choose
from .projection import Projection, split_qkv

ABI = 1

QKV: TypeAlias = tuple[Tensor, Tensor, Tensor]
_GRADS = ("q", "k", "v", "q_norm", "k_norm", "sinks", "slopes", "weight", "bias", "out_weight", "out_bias")
# Of these, what costs work of its own and is made only where it is asked for; of q only where it is x.
ASKED = ("slopes", "q", "weight", "bias", "out_weight", "out_bias")


@torch.library.custom_op(
    "ulysses_triton::attention", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor out, Tensor lse, Tensor workspace)"
)
def attention(*arguments: Any) -> QKV:
    """A `Call` -> (out [B, L, Hq, Dv], lse [B, L, Hq] or [0], workspace bytes that backward needs or [0]).

    With an output projection out is [B, L, E2].
    """
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
    ends = (problem.heads, problem.value_dim) if problem.out_features is None else (problem.out_features,)
    return (
        q.new_empty((*shape[:2], *ends)),
        q.new_empty(shape if call.return_lse else (0,), dtype=stat),
        q.new_empty((executor.workspace(problem, group.rank).size,), dtype=torch.uint8),
    )


@torch.library.custom_op(
    "ulysses_triton::attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor? out, Tensor workspace, bool fused, SymInt head_dim, SymInt kv_tokens, "
    f"bool[] asked, {SCHEMA}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dq_norm, Tensor dk_norm, Tensor dsinks, Tensor dslopes, "
    "Tensor dweight, Tensor dbias, Tensor dout_weight, Tensor dout_bias)",
)
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    workspace: Tensor,
    fused: bool,
    head_dim: int,
    kv_tokens: int,
    asked: list[bool],
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """-> (dq, dk, dv, dq_norm, dk_norm, dsinks, dslopes, dweight, dbias, dout_weight, dout_bias).

    The gradient of a fused qkv, or of x, is dq; those of ASKED are made where `asked`, and what has none is empty.
    """
    call, wanted = Call(*arguments), dict(zip(ASKED, asked, strict=True))
    own = by_name(call.group)
    try:
        around = around_grads(call, wanted, own.pool.take)
        grads, views = input_grads(dout, call, around, fused, head_dim, kv_tokens, own.pool.take)
    except UlyssesError as error:  # no memory for them
        own.refuse(error)
        raise
    if call.q is None:  # not saved, as not needed: only the shapes are
        call = call._replace(q=grads[0]) if fused else call._replace(q=views[0], k=views[1], v=views[2])
    group, problem, inputs = agreed("attention backward", call)
    with group.call():
        into = Inputs(*views, None, projection=around)
        small = executor.backward(problem, group, inputs, into, workspace, out, dout, dlse, wanted["slopes"])
    return (*grads, *small_grads(dout, small, _whole(call)), *_or_empty(dout, around[1:]))


@attention_backward.register_fake
def _(
    dout: Tensor, dlse: Any, out: Any, workspace: Any, fused: bool, head_dim: int, kv_tokens: int, asked: list[bool],
    *arguments: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    call, wanted = Call(*arguments), dict(zip(ASKED, asked, strict=True))
    around = around_grads(call, wanted, torch.empty)
    grads, _ = input_grads(dout, call, around, fused, head_dim, kv_tokens, torch.empty)
    made = _whole(call if wanted["slopes"] else call._replace(slopes=None))
    return (*grads, *small_grads(dout, made, _whole(call)), *_or_empty(dout, around[1:]))


def _whole(call: Call) -> SmallGrads:
    """What every rank was given whole, in the order of its gradients."""
    return SmallGrads(call.q_norm, call.k_norm, call.sinks, call.slopes)


def small_grads(like: Tensor, grads: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The gradients of what is given whole, as an op returns them: in its dtype, empty where there is none."""
    return tuple(
        like.new_empty(0) if grad is None or whole is None else grad.to(whole.dtype, copy=grad is whole)
        for grad, whole in zip(grads, given, strict=True)
    )


def _or_empty(like: Tensor, grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [like.new_empty(0) if grad is None else grad for grad in grads]


def around_grads(call: Call, wanted: dict[str, bool], empty: Callable[..., Tensor]) -> Projection:
    """New tensors for the gradients of x and the projections that are wanted.

    Those of parameters stay with the model, so they are not of the group's pool, which `empty` takes from.
    """
    asked = {n: t for n, t in call.projection._asdict().items() if t is not None and wanted["q" if n == "x" else n]}
    makers = {name: empty if name == "x" else torch.empty for name in asked}
    return Projection(**{n: makers[n](tuple(t.shape), dtype=t.dtype, device=t.device) for n, t in asked.items()})


def input_grads(
    dout: Tensor,
    call: Call,
    around: Projection,
    fused: bool,
    head_dim: int,
    kv_tokens: int,
    empty: Callable[..., Tensor],
) -> tuple[QKV, QKV]:
    """As `like_inputs`, from what the backward op is given; that of x in place of a fused qkv where it is projected."""
    if call.out_weight is not None:
        dout = dout.new_empty(1).expand(*dout.shape[:2], call.heads, head_dim)
    if call.weight is None:
        return like_inputs(dout, fused, call.kv_heads, head_dim, kv_tokens, empty)
    nothing = dout.new_empty(0)
    dx = dout.new_empty(0) if around.x is None else around.x
    return (dx, dout.new_empty(0), dout.new_empty(0)), (nothing, nothing, nothing)


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
    raw = call.recompute or problem.needs_raw or problem.projects
    ctx.save_for_backward(
        None if choose(problem).keeps_output or problem.projects_out else out,
        workspace,
        *(call.tensors if raw else (None, None, None, *call.tensors[3:])),
    )


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:
    out, workspace, *tensors = ctx.saved_tensors
    asked = [bool(ctx.needs_input_grad[Call._fields.index(name)]) for name in ASKED]
    if dout is None:
        shape, dtype, device = ctx.out
        dout = torch.zeros(shape, dtype=dtype, device=device)
    call = Call.of(tensors, ctx.numbers)
    dlse = dlse if call.return_lse else None
    grads = attention_backward(dout, dlse, out, workspace, *ctx.shape, asked, *call)
    found = dict(zip(_GRADS, grads, strict=True))
    fused = ctx.shape[0]
    absent = {name: not wanted for name, wanted in zip(ASKED, asked, strict=True)} | {"k": fused, "v": fused}
    if call.weight is None:
        absent["q"] = False
    return grads_of(call, {n: g for n, g in found.items() if not absent.get(n, getattr(call, n) is None)})


def grads_of(call: Call, found: dict[str, Tensor]) -> tuple[Any, ...]:
    """A gradient for every argument of an op, in order: those `found`, by name, and None for all others.

    PyTorch expects a list for a list of tensors, for which it also takes an empty list of numbers.
    """
    lists = {name: [None] * len(x) for name, x in call._asdict().items() if x == [] or name == "captured"}
    return tuple(lists.get(name, found.get(name)) for name in Call._fields)


attention.register_autograd(_backward, setup_context=_setup_context)
