"""The choice of local attention: which kernels move rows and attend on this device, for this problem.

The choice follows from the problem and the machine, never from the number of ranks, so results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import OptionError
from .kernels import reference
from .kernels._config import INTERPRET
from .kernels._views import HeadGrads, HeadMap, Options, Span
from .kernels.attend_backward import attend_backward
from .kernels.attend_forward import attend_forward
from .kernels.pack import pack, pack_grad
from .kernels.unpack import unpack, unpack_grad_heads
from .spec import Problem

_aten = torch.ops.aten


@dataclass(frozen=True)
class Local:
    """What one call runs on a rank. `keeps_output`: forward keeps O in head layout, which backward needs."""

    name: str
    why: str
    pack: Callable[..., None]
    pack_grad: Callable[..., None]
    unpack: Callable[..., None]
    unpack_grad_heads: Callable[..., tuple[Tensor | None, Tensor | None]]
    attend_forward: Callable[..., None]
    attend_backward: Callable[..., None]
    keeps_output: bool = False


def choose(problem: Problem) -> Local:
    """The local attention of a problem.

    Raises OptionError when the problem names one that cannot do it here.
    """
    triton_runs = problem.device == "cuda" or INTERPRET
    obstacle = _aten_obstacle(problem)
    asked = problem.attention
    if asked == "triton" or (asked in ("auto", "callable") and triton_runs and problem.dtype != "float64"):
        if not triton_runs:
            raise OptionError(
                'attention="triton" needs a GPU: on a CPU the kernels run only in Triton\'s interpreter, which '
                "TRITON_INTERPRET=1 in the environment turns on before Python starts"
            )
        if problem.dtype == "float64":
            raise OptionError('attention="triton" takes float32, bfloat16 and float16; float64 is for the reference')
        return _local("triton", "a GPU" if not INTERPRET else "TRITON_INTERPRET=1", triton=True)
    if asked == "aten" or (asked == "auto" and obstacle is None):
        if obstacle is not None:
            raise OptionError(f'attention="aten" cannot do this call: {obstacle}; use attention="auto"')
        found = _local("aten", "PyTorch's flash kernel for CPUs takes dense and causal attention with D = Dv")
        return replace(found, keeps_output=not problem.recompute)
    return _local("reference", "asked for" if asked == "reference" else obstacle or "rows are moved by PyTorch")


def _aten_obstacle(problem: Problem) -> str | None:
    """Why PyTorch's flash kernel for CPUs cannot do a problem, or None when it can."""
    if problem.device != "cpu":
        return f"the tensors are on {problem.device}, its kernel is for CPUs"
    if problem.dtype == "float64":
        return "float64 goes through the reference"
    if problem.head_dim != problem.value_dim:
        return f"q and k have head dim {problem.head_dim} and v has {problem.value_dim}"
    options = {
        "window": problem.window, "softcap": problem.softcap, "documents": problem.documents, "sinks": problem.sinks,
        "alibi_slopes": problem.slopes, "dropout": problem.dropout_p, "mask": problem.predicate,
    }  # fmt: skip
    found = [name for name, value in options.items() if value]
    if found:
        return f"it does not know {', '.join(found)}"
    if problem.return_lse:
        return "its backward takes no gradient for the LSE"
    if problem.seq == 0 or problem.kv_seq == 0:
        return "there are no tokens to attend to"
    return None


def _local(name: str, why: str, *, triton: bool = False) -> Local:
    moves: dict[str, Any] = (
        {"pack": pack, "pack_grad": pack_grad, "unpack": unpack, "unpack_grad_heads": unpack_grad_heads}
        if triton
        else {key: getattr(reference, key) for key in ("pack", "pack_grad", "unpack", "unpack_grad_heads")}
    )
    if triton:
        return Local(name, why, attend_forward=attend_forward, attend_backward=attend_backward, **moves)
    if name == "aten":
        return Local(name, why, attend_forward=_aten_forward, attend_backward=_aten_backward, **moves)
    return Local(name, why, attend_forward=reference.attend_forward, attend_backward=reference.attend_backward, **moves)


def _aten_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Sequence[Span],
    lse: Tensor | None,
    options: Options,
) -> None:
    """As the kernels' `attend_forward`, by PyTorch's flash kernel for CPUs; it knows no GQA."""
    for mine, theirs in _parts(q.size(2), k.size(2), options.heads):
        q_part, k_part, v_part = _expanded(q[:, :, mine], k[:, :, theirs], v[:, :, theirs])
        o, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(
            q_part, k_part, v_part, 0.0, options.causal, scale=options.scale
        )  # fmt: skip
        _to_spans(out, 0, mine, o)
        if lse is not None:
            lse[mine].copy_(log_sum.transpose(0, 1))


def _aten_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    o: Tensor,
    dq: Sequence[Span],
    dkv: Sequence[Span],
    options: Options,
    _: HeadGrads,
    start: tuple[Tensor, Tensor] | None = None,
) -> None:
    """As the kernels' `attend_backward`, with O in head layout in place of delta; it has neither sinks nor slopes."""
    for mine, theirs in _parts(q.size(2), k.size(2), options.heads):
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _bhsd(do[:, :, mine]),
            *_expanded(q[:, :, mine], k[:, :, theirs], v[:, :, theirs]),
            _bhsd(o[:, :, mine]),
            lse[mine].transpose(0, 1),
            0.0,
            options.causal,
            scale=options.scale,
        )
        _to_spans(dq, 0, mine, grads[0])
        for view, grad in enumerate(grads[1:]):
            total = grad if options.heads.group == 1 else grad.sum(1, keepdim=True, dtype=torch.float32)
            if start is not None:
                total = total + start[view][theirs].transpose(0, 1)
            _to_spans(dkv, view, theirs, total)


def _parts(q_heads: int, kv_heads: int, heads: HeadMap) -> list[tuple[slice, slice]]:
    """Local query heads and the local kv heads that they attend to: all at once, or under GQA one kv head at a time."""
    if heads.group == 1:
        return [(slice(0, q_heads), slice(0, kv_heads))]
    starts = [max(0, j * heads.group - heads.offset) for j in range(kv_heads)]
    stops = [*starts[1:], q_heads]
    return [(slice(a, b), slice(j, j + 1)) for j, (a, b) in enumerate(zip(starts, stops, strict=True))]


def _expanded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = (-1, q.size(2), -1, -1)
    return _bhsd(q), _bhsd(k).expand(shape), _bhsd(v).expand(shape)


def _bhsd(rows: Tensor) -> Tensor:
    return rows.permute(1, 2, 0, 3)  # [S, B, h, D] -> [B, h, S, D]


def _to_spans(spans: Sequence[Span], view: int, heads: slice, result: Tensor) -> None:
    for span in spans:
        into = span.views[view]
        if into is not None:
            _bhsd(into[:, :, heads]).copy_(result[:, :, span.start : span.start + into.size(0)])
