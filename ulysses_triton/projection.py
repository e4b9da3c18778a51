"""The projections around a layer's attention: x to q, k and v, and the attended values to the layer's output.

In chunks each is one matrix product per chunk, over the heads of all ranks in it. Their rows of the weight (columns, on
the way out) lie apart, as each rank has its own part of the model's heads. A chunk copies its own side by side: a call
so copies a weight once, which is little beside products over all tokens, and products stay few and large. One chunk
takes the weight as it is. Where ranks share a kv head but not its chunk, both chunks project it.

Example: 2 ranks, 4 query and 4 kv heads, 2 chunks: the first has q0 q2 k0 k2 v0 v2, the heads 0, 2, 4, 6, 8 and 10 of
the weight's 12; O of the first is o0 o2, and the output is O_0 Wo[:, o0 o2]^T + O_1 Wo[:, o1 o3]^T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import DeviceError, DtypeError, OptionError, ShapeError
from .placement import Heads
from .spec import Problem


class Projection(NamedTuple):
    """What is given for the projections, or gradients of it; None for what is not."""

    x: Tensor | None = None  # [B, L, E]
    weight: Tensor | None = None  # [(Hq + 2 Hkv) D, E]
    bias: Tensor | None = None  # [(Hq + 2 Hkv) D]
    out_weight: Tensor | None = None  # [E2, Hq D]
    out_bias: Tensor | None = None  # [E2]


def split_qkv(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a projection's output `[B, L, (heads + 2 kv_heads) D]` (or of its gradient) as q, k and v."""
    dim = qkv.size(-1) // (heads + 2 * kv_heads)
    q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    return q.unflatten(-1, (heads, dim)), k.unflatten(-1, (kv_heads, dim)), v.unflatten(-1, (kv_heads, dim))


def check(given: Projection, first: Tensor) -> None:
    """Raise for what is wrong with the projections of a call whose first argument, x or qkv, is `first` [B, L, ...].

    The width of `out_weight` is for `check_output`, which knows the heads.
    """
    name = "x" if given.weight is not None else "qkv"
    for bias, weight in (("bias", "weight"), ("out_bias", "out_weight")):
        if getattr(given, bias) is not None and getattr(given, weight) is None:
            raise OptionError(f"{bias} is given without {weight}: pass both, or add the bias outside of the call")
    for other, tensor in given._asdict().items():
        if tensor is None or other == "x":
            continue
        if tensor.dtype != first.dtype:
            raise DtypeError(
                f"{name} has dtype {first.dtype} and {other} has {tensor.dtype}; the call takes one dtype for both (it "
                "does not follow autocast): cast one of them"
            )
        if tensor.device != first.device:
            raise DeviceError(f"{name} is on {first.device} and {other} on {tensor.device}; all must be on one device")
    if given.weight is not None:
        if given.weight.dim() != 2 or given.weight.size(1) != first.size(2):
            raise ShapeError(
                f"weight has shape {list(given.weight.shape)}; expected [(heads + 2 kv_heads) D, E] with the E = "
                f"{first.size(2)} channels of x"
            )
        _check_bias("bias", given.bias, given.weight)


def check_output(given: Projection, heads: int, dim: int) -> None:
    """Raise for an output projection that does not fit `heads` of `dim` channels."""
    if given.out_weight is None:
        return
    if given.out_weight.dim() != 2 or given.out_weight.size(1) != heads * dim:
        raise ShapeError(
            f"out_weight has shape {list(given.out_weight.shape)}; expected [E2, heads D] with {heads} x {dim} = "
            f"{heads * dim} columns"
        )
    _check_bias("out_bias", given.out_bias, given.out_weight)


def _check_bias(name: str, bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"{name} has shape {list(bias.shape)}; expected one number per row of its weight, "
                         f"[{weight.size(0)}]")  # fmt: skip


def qkv(
    problem: Problem, given: Projection, heads: Heads, new: Callable[..., Tensor], values: bool = True
) -> list[Tensor]:
    """q, k and v `[B, L, h, D]` of some heads as views of one product, or q and k without `values`."""
    p, counts = problem, [len(heads.q), len(heads.kv), len(heads.kv)][: 2 + values]
    wanted = [*heads.q, *(p.heads + h for h in heads.kv)]
    if values:
        wanted += [p.heads + p.kv_heads + h for h in heads.kv]
    assert given.x is not None and given.weight is not None
    rows = channels(wanted, p.head_dim)
    found = new(*given.x.shape[:2], len(wanted) * p.head_dim)
    bias = None if given.bias is None else picked(given.bias, rows, 0)
    _linear(_flat(given.x), picked(given.weight, rows, 0), bias, _flat(found))
    return list(found.unflatten(2, (len(wanted), p.head_dim)).split(counts, 2))


def fold(out: Tensor, o: Tensor, given: Projection, heads: Sequence[int], *, first: bool) -> None:
    """Into out `[B, L, E2]` the projection of o `[B, L, h, Dv]`, some heads; added to what is there if not `first`."""
    assert given.out_weight is not None
    weight = picked(given.out_weight, channels(heads, o.size(3)), 1)
    if first:
        _linear(_flat(o), weight, given.out_bias, _flat(out))
    else:
        _flat(out).addmm_(_flat(o), weight.t())


def output_grad(dout: Tensor, given: Projection, heads: Sequence[int], do: Tensor) -> Tensor:
    """Into do `[B, L, h, Dv]` the gradient of some heads' output, from that of the projected one, dout `[B, L, E2]`."""
    assert given.out_weight is not None
    torch.mm(_flat(dout), picked(given.out_weight, channels(heads, do.size(3)), 1), out=_flat(do))
    return do


def out_weight_grads(dout: Tensor, outputs: Sequence[tuple[Tensor, Sequence[int]]], grads: Projection) -> None:
    """Into `grads` those of the output projection that are asked for; `outputs` are `[B, L, h, Dv]` and their heads."""
    y = _flat(dout)
    if grads.out_weight is not None and len(outputs) == 1:
        torch.mm(y.t(), _flat(outputs[0][0]), out=grads.out_weight)
    elif grads.out_weight is not None:
        for o, heads in outputs:
            put(grads.out_weight, torch.mm(y.t(), _flat(o)), channels(heads, o.size(3)))
    if grads.out_bias is not None:
        torch.sum(y, 0, out=grads.out_bias)


def input_grads(dqkv: Tensor, given: Projection, grads: Projection) -> None:
    """Into `grads` those of x, weight and bias that are asked for, from dqkv `[B, L, (Hq + 2 Hkv) D]`."""
    assert given.x is not None and given.weight is not None
    dqkv = _flat(dqkv)
    if grads.x is not None:
        torch.mm(dqkv, given.weight, out=_flat(grads.x))
    if grads.weight is not None:
        torch.mm(dqkv.t(), _flat(given.x), out=grads.weight)
    if grads.bias is not None:
        torch.sum(dqkv, 0, out=grads.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _flat(x: Tensor) -> Tensor:
    """`[B, L, E]` or `[B, L, h, D]` as a matrix of tokens; a copy where its strides allow no view."""
    return x.flatten(0, 1).flatten(1)


def channels(heads: Sequence[int], dim: int = 1) -> list[slice]:
    """The channels of heads in their order, as few slices as there are runs of neighbours."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and runs[-1][1] == head:
            runs[-1][1] += 1
        else:
            runs.append([head, head + 1])
    return [slice(start * dim, stop * dim) for start, stop in runs]


def picked(x: Tensor, parts: Sequence[slice], dim: int = -1) -> Tensor:
    """These parts of a dim side by side; a view where they lie so."""
    found = [x.narrow(dim, s.start, s.stop - s.start) for s in parts]
    return found[0] if len(found) == 1 else torch.cat(found, dim)


def put(into: Tensor, x: Tensor, parts: Sequence[slice]) -> None:
    """The inverse of `picked` for the last dim."""
    for s, part in zip(parts, x.split([s.stop - s.start for s in parts], -1), strict=True):
        into[..., s] = part
