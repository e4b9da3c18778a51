"""The choice of local attention: which kernels move rows and attend on this device, for this problem.

The choice follows from the problem and the machine, never from the number of ranks, so results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import OptionError
from .kernels import reference
from .kernels._config import INTERPRET
from .kernels._views import HeadMap, Span
from .kernels.attend_backward import attend_backward
from .kernels.attend_forward import attend_forward
from .kernels.pack import pack, pack_grad
from .kernels.unpack import unpack, unpack_grad
from .spec import Problem

_aten = torch.ops.aten


@dataclass(frozen=True)
class Local:
    """What one call runs on a rank. `keeps_output`: backward needs O in head layout, and takes no delta."""

    name: str
    why: str
    pack: Callable[..., None]
    pack_grad: Callable[..., None]
    unpack: Callable[..., None]
    unpack_grad: Callable[..., tuple[Tensor | None, Tensor | None]]
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
        return _local("aten", "PyTorch's flash kernel for CPUs takes dense and causal attention with D = Dv")
    return _local("reference", "asked for" if asked == "reference" else obstacle or "rows are moved by PyTorch")


def _aten_obstacle(problem: Problem) -> str | None:
    """Why PyTorch's flash kernel for CPUs cannot do a problem, or None when it can."""
    if problem.device != "cpu":
        return f"the tensors are on {problem.device}, its kernel is for CPUs"
    if problem.dtype == "float64":
        return "float64 goes through the reference"
    if problem.head_dim != problem.value_dim:
        return f"q and k have head dim {problem.head_dim} and v has {problem.value_dim}"
    if problem.return_lse:
        return "its backward takes no gradient for the LSE"
    if problem.seq == 0 or problem.kv_seq == 0:
        return "there are no tokens to attend to"
    return None


def _local(name: str, why: str, *, triton: bool = False) -> Local:
    moves: dict[str, Any] = (
        {"pack": pack, "pack_grad": pack_grad, "unpack": unpack, "unpack_grad": unpack_grad}
        if triton
        else {key: getattr(reference, key) for key in ("pack", "pack_grad", "unpack", "unpack_grad")}
    )
    if triton:
        return Local(name, why, attend_forward=attend_forward, attend_backward=attend_backward, **moves)
    if name == "aten":
        return Local(
            name, why, attend_forward=_aten_forward, attend_backward=_aten_backward, keeps_output=True, **moves
        )
    return Local(name, why, attend_forward=reference.attend_forward, attend_backward=reference.attend_backward, **moves)


def _aten_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Sequence[Span],
    lse: Tensor | None,
    *,
    scale: float,
    causal: bool,
    heads: HeadMap,
) -> None:
    """As the kernels' `attend_forward`, by PyTorch's flash kernel for CPUs, one kv head at a time (it knows no GQA)."""
    for kv_head, (start, stop) in enumerate(_query_heads(q.size(2), k.size(2), heads)):
        shape = (-1, stop - start, -1, -1)
        o, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(
            _bhsd(q[:, :, start:stop]),
            _bhsd(k[:, :, kv_head : kv_head + 1]).expand(shape),
            _bhsd(v[:, :, kv_head : kv_head + 1]).expand(shape),
            0.0,
            causal,
            scale=scale,
        )
        _to_spans(out, 0, slice(start, stop), o)
        if lse is not None:
            lse[start:stop].copy_(log_sum.transpose(0, 1))


def _aten_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    o: Tensor,
    dq: Sequence[Span],
    dkv: Sequence[Span],
    *,
    scale: float,
    causal: bool,
    heads: HeadMap,
) -> None:
    """As the kernels' `attend_backward`, but with O in head layout in place of delta."""
    for kv_head, (start, stop) in enumerate(_query_heads(q.size(2), k.size(2), heads)):
        shape = (-1, stop - start, -1, -1)
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _bhsd(do[:, :, start:stop]),
            _bhsd(q[:, :, start:stop]),
            _bhsd(k[:, :, kv_head : kv_head + 1]).expand(shape),
            _bhsd(v[:, :, kv_head : kv_head + 1]).expand(shape),
            _bhsd(o[:, :, start:stop]),
            lse[start:stop].transpose(0, 1),
            0.0,
            causal,
            scale=scale,
        )
        _to_spans(dq, 0, slice(start, stop), grads[0])
        for view, grad in enumerate(grads[1:]):
            total = grad if stop - start == 1 else grad.sum(1, keepdim=True, dtype=torch.float32)
            _to_spans(dkv, view, slice(kv_head, kv_head + 1), total)


def _query_heads(q_heads: int, kv_heads: int, heads: HeadMap) -> list[tuple[int, int]]:
    """The local query heads that attend to each local kv head."""
    starts = [max(0, j * heads.group - heads.offset) for j in range(kv_heads)]
    return list(zip(starts, [*starts[1:], q_heads], strict=True))


def _bhsd(rows: Tensor) -> Tensor:
    return rows.permute(1, 2, 0, 3)  # [S, B, h, D] -> [B, h, S, D]


def _to_spans(spans: Sequence[Span], view: int, heads: slice, result: Tensor) -> None:
    for span in spans:
        into = span.views[view]
        if into is not None:
            _bhsd(into[:, :, heads]).copy_(result[:, :, span.start : span.start + into.size(0)])
