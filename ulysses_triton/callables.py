"""A user's own attention: a callable between the two halves of the exchange, with PyTorch's projections around it.

It gets whole heads, q, k and v of the whole sequence `[B, S, h, D]`, on every rank that has any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import halves
from .call import Call, describe
from .errors import ExchangeError, ShapeError, UlyssesError
from .group import UlyssesGroup, told_to_peers
from .placement import place
from .spec import Problem


def by_callable(
    group: UlyssesGroup, attention: Callable[..., Tensor], call: Call, packing: tuple[Any, Any, Any]
) -> Tensor:
    """A callable between the two halves of the exchange, which PyTorch projects around."""
    around = call.projection
    if any(given is not None for given in around):
        assert call.q is not None
        with told_to_peers(group):
            describe(group, call)
        qkv = call.q if around.weight is None else F.linear(call.q, around.weight, around.bias)
        call = call._replace(q=qkv, weight=None, bias=None, out_weight=None, out_bias=None)
    rows, kv_rows = halves.exchange_in(*call)
    problem, _ = describe(group, call)
    received = [rows, kv_rows] if problem.cross else [rows]
    views = halves.received_views(problem, group, received)
    if place(problem).shares[group.rank].q_heads:
        out = _asked(attention, group, problem, call, packing, views)
    else:  # fewer heads than ranks, and none for this one
        out = views["q"].transpose(0, 1).flatten(2).view(problem.batch, problem.seq, 0, problem.value_dim)
        for given in (call.sinks, call.slopes):  # which get a gradient of zeros
            out = out if given is None else out + given[:0].sum().to(out.dtype)
    result = halves.exchange_out(
        out.transpose(0, 1),
        group.name,
        problem.heads,
        problem.kv_heads,
        problem.head_dim,
        list(problem.lens),
        problem.causal,
    )
    return result if around.out_weight is None else F.linear(result.flatten(2), around.out_weight, around.out_bias)


def _asked(
    attention: Callable[..., Tensor],
    group: UlyssesGroup,
    problem: Problem,
    call: Call,
    packing: tuple[Any, Any, Any],
    views: dict[str, Tensor],
) -> Tensor:
    """What the callable makes of this rank's heads, `[B, S, hq, Dv]`; where it fails, all ranks learn of it."""
    q, k, v = (views[name].transpose(0, 1) for name in ("q", "k", "v"))
    index = place(problem).kv_head_of(group.rank)
    if len(index) % k.size(2) or index != [h // (len(index) // k.size(2)) for h in range(len(index))]:
        k, v = k[:, :, index], v[:, :, index]  # query heads that begin inside a kv group: one kv head for each
    share = place(problem).shares[group.rank]
    sinks, slopes = (None if x is None else x[share.q_start : share.q_stop] for x in (call.sinks, call.slopes))
    segment_ids, cu_seqlens, cu_seqlens_k = packing
    if segment_ids is not None and call.q_documents is not None:
        segment_ids = call.q_documents[0]  # of all ranks' tokens, numbered anew
    given = {
        "window": problem.window, "softcap": problem.softcap, "sinks": sinks, "alibi_slopes": slopes,
        "segment_ids": segment_ids, "cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    try:
        out = attention(q, k, v, causal=problem.causal, scale=problem.scale, **options)
        expected = (*q.shape[:3], v.size(3))
        if not isinstance(out, Tensor) or out.shape != expected or out.dtype != q.dtype:
            got = f"{list(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
            raise ShapeError(f"the attention callable returned {got}; expected {list(expected)} {q.dtype}")
    except Exception as error:
        told = f"the attention callable failed with {type(error).__name__}: {error}"
        group.refuse(error if isinstance(error, UlyssesError) else ExchangeError(told))
        raise
    return out
