"""The autograd ops: one for a whole layer, and two halves around a user's own attention.

`torch.ops.ulysses_triton.attention` takes tensors, numbers and strings only, finds its group by name, and has a fake
and a backward op, so it traces. `abi` is bumped whenever what is saved or the backward changes: PyTorch's on-disk
cache of compiled graphs would otherwise replay the backward of an older version of this file.

The raw projection output is passed as `q` with `k` and `v` None; `heads` and `kv_heads` then say how to split it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import executor
from .errors import DeviceError, DtypeError, ShapeError, UlyssesError
from .executor import Inputs
from .group import UlyssesGroup, by_name
from .kernels._views import Transform
from .local import choose
from .placement import place
from .spec import Problem

ABI = 1

QKV: TypeAlias = tuple[Tensor, Tensor, Tensor]


# -- from an op's arguments to a problem


def split_qkv(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a projection's output `[B, L, (heads + 2 kv_heads) D]` (or of its gradient) as q, k and v."""
    dim = qkv.size(-1) // (heads + 2 * kv_heads)
    q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    return q.unflatten(-1, (heads, dim)), k.unflatten(-1, (kv_heads, dim)), v.unflatten(-1, (kv_heads, dim))


def describe(
    group: UlyssesGroup,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    *,
    heads: int,
    kv_heads: int,
    lens: Sequence[int],
    kv_lens: Sequence[int],
    causal: bool,
    scale: float,
    rope_interleaved: bool,
    rope_dim: int,
    norm_eps: float,
    attention: str,
    recompute: bool,
    return_lse: bool,
    grad: bool,
) -> tuple[Problem, Inputs]:
    """The problem that the arguments of a call state, and its tensors as the executor takes them.

    Raises the `UlyssesError` that names the argument that is wrong.
    """
    if q.dim() != (3 if k is None else 4):
        raise ShapeError(
            f"qkv has shape {list(q.shape)}; expected [B, L, (heads + 2 kv_heads) D]"
            if k is None
            else f"q has shape {list(q.shape)}; expected [B, L, Hq, D]"
        )
    if k is None or v is None:
        if heads < 1 or kv_heads < 1 or q.size(-1) % (heads + 2 * kv_heads):
            raise ShapeError(
                f"qkv has {q.size(-1)} channels, which {heads} query heads and 2 x {kv_heads} kv heads do not divide: "
                "check heads= and kv_heads="
            )
        q, k, v = split_qkv(q, heads, kv_heads)
    _check_shapes(q, k, v)
    _check_alike({"q": q, "k": k, "v": v}, cos, sin, q_norm, k_norm)
    transform = _transform(q, cos, sin, q_norm, k_norm, rope_dim, rope_interleaved, norm_eps)
    all_lens = _all_lens("lens", "q", lens, q.size(1), group)
    own_kv_lens = kv_lens or (lens if k.size(1) == q.size(1) else ())
    if lens and not own_kv_lens and group.size > 1:
        raise ShapeError(f"q has {q.size(1)} tokens here and k has {k.size(1)}: pass kv_lens= beside lens=")
    problem = Problem(
        batch=q.size(0),
        lens=all_lens,
        kv_lens=_all_lens("kv_lens", "k", own_kv_lens, k.size(1), group),
        heads=q.size(2),
        kv_heads=k.size(2),
        head_dim=q.size(3),
        value_dim=v.size(3),
        dtype=str(q.dtype).removeprefix("torch."),
        device=q.device.type,
        causal=causal,
        scale=scale,
        rope_dim=0 if transform is None else transform.rope_dim,
        rope_interleaved=rope_interleaved,
        q_norm=q_norm is not None,
        k_norm=k_norm is not None,
        norm_eps=norm_eps,
        attention=attention,
        recompute=recompute,
        return_lse=return_lse,
        grad=grad,
    )
    problem.check()
    place(problem)
    chosen = choose(problem).name
    return replace(problem, attention=chosen if attention != "callable" else attention), Inputs(q, k, v, transform)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor, letters in (("k", k, "[B, Lk, Hkv, D]"), ("v", v, "[B, Lk, Hkv, Dv]")):
        if tensor.dim() != 4:
            raise ShapeError(f"{name} has shape {list(tensor.shape)}; expected {letters}")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.size(0) == k.size(0) == v.size(0):
        raise ShapeError(f"q, k and v differ in batch size: {shapes}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ShapeError(f"k and v differ in tokens or heads: {shapes}; both are [B, Lk, Hkv, ...]")
    if q.size(3) != k.size(3):
        raise ShapeError(f"q and k differ in head dim: {shapes}")


def _check_alike(
    qkv: dict[str, Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> None:
    q = qkv["q"]
    others = {"rope cos": cos, "rope sin": sin, "q_norm": q_norm, "k_norm": k_norm}
    every = qkv | {name: tensor for name, tensor in others.items() if tensor is not None}
    for name, tensor in every.items():
        if name in qkv and tensor.dtype != q.dtype:
            raise DtypeError(f"q has dtype {q.dtype} and {name} has {tensor.dtype}; q, k and v must have one dtype")
        if not tensor.dtype.is_floating_point:
            raise DtypeError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")
        if tensor.device != q.device:
            raise DeviceError(f"q is on {q.device} and {name} on {tensor.device}; all must be on one device")


def _transform(
    q: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    rope_dim: int,
    interleaved: bool,
    eps: float,
) -> Transform | None:
    batch, tokens, _, dim = q.shape
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and weight.shape != (dim,):
            raise ShapeError(f"{name} has shape {list(weight.shape)}; expected [D] = [{dim}]")
    if cos is None or sin is None:
        return None if q_norm is None and k_norm is None else Transform(None, None, 0, False, q_norm, k_norm, eps)
    if cos.shape != sin.shape or cos.dim() not in (2, 3) or cos.size(-2) != tokens:
        raise ShapeError(
            f"rope cos {list(cos.shape)} and sin {list(sin.shape)} must have one shape, [L, R/2] or [L, R] with or "
            f"without a leading B, for this rank's own L = {tokens} tokens"
        )
    if cos.dim() == 3 and cos.size(0) not in (1, batch):
        raise ShapeError(f"rope cos {list(cos.shape)} has a leading {cos.size(0)}; the batch size is {batch}")
    width = cos.size(-1)
    # Without rope_dim the whole head rotates when the width is D or D/2; a smaller width is one column per channel.
    rotated = rope_dim or (dim if 2 * width == dim else width)
    if rotated > dim or width not in (rotated, rotated // 2) or rotated % 2:
        raise ShapeError(
            f"rope cos has {width} columns, which fits neither R nor R/2 for R = {rotated} rotated channels of a head "
            f"dim of {dim}: pass rope_dim="
        )
    cos, sin = (cos, sin) if cos.dim() == 3 else (cos.unsqueeze(0), sin.unsqueeze(0))
    return Transform(cos, sin, rotated, interleaved, q_norm, k_norm, eps)


def _all_lens(name: str, tensor: str, lens: Sequence[int], own: int, group: UlyssesGroup) -> tuple[int, ...]:
    if not lens:
        return (own,) * group.size
    if len(lens) != group.size:
        raise ShapeError(f"{name} = {list(lens)} has {len(lens)} entries; the group has {group.size} ranks")
    if lens[group.rank] != own:
        raise ShapeError(f"{name}[{group.rank}] is {lens[group.rank]}, but {tensor} has {own} tokens on this rank")
    return tuple(lens)


def agreed(what: str, group_name: str, *tensors: Any, **options: Any) -> tuple[UlyssesGroup, Problem, Inputs]:
    """The problem of a call that every rank of the group makes; raises on every rank when one cannot, or differs."""
    group = by_name(group_name)
    try:
        problem, inputs = describe(group, *tensors, **options)
    except UlyssesError as error:
        group.refuse(error)
        raise
    group.agree(what, problem.signature)
    return group, problem, inputs


# -- the layer


@torch.library.custom_op("ulysses_triton::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    group: str,
    heads: int,
    kv_heads: int,
    lens: list[int],
    kv_lens: list[int],
    causal: bool,
    scale: float,
    rope_interleaved: bool,
    rope_dim: int,
    norm_eps: float,
    attention: str,
    recompute: bool,
    return_lse: bool,
    grad: bool,
    abi: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (out [B, L, Hq, Dv], lse [B, L, Hq] or [0], workspace bytes that backward needs or [0])."""
    own, problem, inputs = agreed("attention", group, q, k, v, cos, sin, q_norm, k_norm, **options_of(locals()))
    with own.call():
        return executor.forward(problem, own, inputs)


@attention.register_fake
def _(
    q, k, v, cos, sin, q_norm, k_norm, group, heads, kv_heads, lens, kv_lens, causal, scale, rope_interleaved, rope_dim,
    norm_eps, attention, recompute, return_lse, grad, abi,
):  # fmt: skip
    own = by_name(group)
    problem, _ = describe(own, q, k, v, cos, sin, q_norm, k_norm, **options_of(locals()))
    stat = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (problem.batch, problem.lens[own.rank], problem.heads)
    return (
        q.new_empty((*shape, problem.value_dim)),
        q.new_empty(shape if return_lse else (0,), dtype=stat),
        q.new_empty((executor.workspace(problem, own.rank).size,), dtype=torch.uint8),
    )


@torch.library.custom_op("ulysses_triton::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    rows: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    group: str,
    fused: bool,
    kv_heads: int,
    head_dim: int,
    kv_tokens: int,
    lens: list[int],
    kv_lens: list[int],
    causal: bool,
    scale: float,
    rope_interleaved: bool,
    rope_dim: int,
    norm_eps: float,
    attention: str,
    recompute: bool,
    return_lse: bool,
    abi: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> (dq, dk, dv, dq_norm, dk_norm); the gradient of a fused qkv is dq, and what has no gradient is empty."""
    grads, views = like_inputs(dout, fused, kv_heads, head_dim, kv_tokens, by_name(group).pool.take)
    given = (q, k, v) if q is not None else views if not fused else (grads[0], None, None)
    options = options_of(locals()) | {"heads": dout.size(2), "grad": True}
    own, problem, inputs = agreed("attention backward", group, *given, cos, sin, q_norm, k_norm, **options)
    gradients = Inputs(*views, None)
    with own.call():
        norms = executor.backward(problem, own, inputs, gradients, rows, out, dout, dlse)
    return (*grads, *weight_grads(dout, norms, (q_norm, k_norm)))


@attention_backward.register_fake
def _(
    dout, dlse, out, rows, q, k, v, cos, sin, q_norm, k_norm, group, fused, kv_heads, head_dim, kv_tokens, lens,
    kv_lens, causal, scale, rope_interleaved, rope_dim, norm_eps, attention, recompute, return_lse, abi,
):  # fmt: skip
    grads, _ = like_inputs(dout, fused, kv_heads, head_dim, kv_tokens, torch.empty)
    return (*grads, *weight_grads(dout, (q_norm, k_norm), (q_norm, k_norm)))


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


OPTION_NAMES = (
    "heads", "kv_heads", "lens", "kv_lens", "causal", "scale", "rope_interleaved", "rope_dim", "norm_eps", "attention",
    "recompute", "return_lse", "grad",
)  # fmt: skip


def options_of(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in OPTION_NAMES if name in arguments}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, cos, sin, q_norm, k_norm, group, *numbers = inputs
    options = dict(zip((*OPTION_NAMES, "abi"), numbers, strict=True))
    out, _, rows = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rows)
    problem, parts = describe(
        by_name(group), q, k, v, cos, sin, q_norm, k_norm, **{name: options[name] for name in OPTION_NAMES}
    )
    raw = problem.recompute or problem.q_norm or problem.k_norm
    ctx.out_meta = (out.shape, out.dtype, out.device)
    ctx.fixed = {
        "group": group,
        "fused": k is None,
        "kv_heads": problem.kv_heads,
        "head_dim": problem.head_dim,
        "kv_tokens": parts.k.size(1),
    } | {name: options[name] for name in (*OPTION_NAMES[2:-1], "abi")}
    ctx.fixed["attention"] = problem.attention
    ctx.save_for_backward(
        None if choose(problem).keeps_output else out,
        rows,
        *((q, k, v) if raw else (None, None, None)),
        cos,
        sin,
        q_norm,
        k_norm,
    )


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if dout is None:
        shape, dtype, device = ctx.out_meta
        dout = torch.zeros(shape, dtype=dtype, device=device)
    if not ctx.fixed["return_lse"]:
        dlse = None
    dq, dk, dv, dq_norm, dk_norm = attention_backward(dout, dlse, *saved, **ctx.fixed)
    fused = ctx.fixed["fused"]
    wanted = (dq, None if fused else dk, None if fused else dv, None, None, dq_norm, dk_norm)
    weights = saved[-2:]
    norms = tuple(grad if weight is not None else None for grad, weight in zip(wanted[-2:], weights, strict=True))
    return (*wanted[:5], *norms, *(None,) * (len(OPTION_NAMES) + 2))


attention.register_autograd(_backward, setup_context=_setup_context)
