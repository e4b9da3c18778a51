"""The launches that `bench.aot` shows: one line per case, in `ATTENTION` or `TRANSFORMS`. Rows of all are aligned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ulysses_triton.kernels._blocks import BLOCK
from ulysses_triton.kernels._documents import documents
from ulysses_triton.kernels._views import (
    CUT,
    Blocks,
    Dropout,
    HeadGrads,
    HeadMap,
    Options,
    ORows,
    Part,
    Predicate,
    QKVRows,
    Span,
    Transform,
)
from ulysses_triton.kernels.attend_backward import attend_backward
from ulysses_triton.kernels.attend_forward import attend_forward
from ulysses_triton.kernels.pack import pack, pack_grad
from ulysses_triton.kernels.unpack import unpack, unpack_grad

Case = tuple[str, Callable[[], None]]

OTHERS = {  # at three head dims
    "documents": {"also": "documents"},
    "sinks": {"also": "sinks"},
    "alibi": {"also": "slopes"},
    "dropout": {"also": "dropout"},
    "predicate": {"also": "predicate", "causal": False},
    "blocks": {"also": "predicate blocks", "causal": False},
    "everything": {"also": "documents sinks slopes dropout predicate blocks", "window": (128, 0), "softcap": 50.0},
}
ATTENTION = {
    "bf16 D=128 causal": {},
    "bf16 D=128 dense": {"causal": False},
    "bf16 D=128 window": {"window": (128, 0)},
    "bf16 D=128 softcap": {"softcap": 50.0},
    "bf16 D=128 window softcap": {"window": (128, 0), "softcap": 50.0},
    "bf16 D=128 partial": {"partial": True},
    "bf16 D=128 start": {"start": True},
    "bf16 D=128 part": {"part": True},
    "bf16 D=128 part start": {"part": True, "start": True, "partial": True},
    "bf16 D=128 part window": {"part": True, "window": (128, 0)},
    "bf16 D=32 causal": {"D": 32},
    "bf16 D=64 causal": {"D": 64},
    "bf16 D=64 dense": {"D": 64, "causal": False},
    "bf16 D=64 window": {"D": 64, "window": (128, 0)},
    "bf16 D=64 softcap": {"D": 64, "softcap": 50.0},
    "bf16 D=64 part": {"D": 64, "part": True},
    "bf16 D=96 causal": {"D": 96},
    "bf16 D=192/128 causal": {"D": 192, "Dv": 128},
    "bf16 D=256 causal": {"D": 256},
    "bf16 D=256 dense": {"D": 256, "causal": False},
    "bf16 D=256 window": {"D": 256, "window": (128, 0)},
    "bf16 D=256 softcap": {"D": 256, "softcap": 50.0},
    "bf16 D=256 part": {"D": 256, "part": True},
    "fp16 D=128 causal": {"dtype": torch.float16},
    "fp32 D=64 causal": {"dtype": torch.float32, "D": 64},
    "fp32 D=128 causal": {"dtype": torch.float32},
    "fp32 D=128 part": {"dtype": torch.float32, "part": True},
    "fp32 D=128 window softcap": {"dtype": torch.float32, "window": (128, 0), "softcap": 50.0},
    "fp32 D=256 causal": {"dtype": torch.float32, "D": 256},
    **{f"bf16 D={D} {name}": {"D": D, **options} for D in (64, 128, 256) for name, options in OTHERS.items()},
    "bf16 D=128 part everything": {"part": True, **OTHERS["everything"]},
}
TRANSFORMS = {  # of q and k in pack and unpack_grad; rope as a share of the channels
    "half": {"rope": 1.0, "norm": True},
    "inter": {"rope": 1.0, "norm": True, "interleaved": True},
    "half part": {"rope": 0.5, "wide": True},
    "inter part": {"rope": 0.5, "wide": True, "interleaved": True},
}
HEAD_DIMS = (64, 96, 128, 256)


def cases() -> Iterator[Case]:
    """Every launch that the table shows, by name."""
    for label, options in ATTENTION.items():
        forward, backward = attention_case(**options)
        yield f"{label} forward", forward
        yield f"{label} backward", backward
    for D in HEAD_DIMS:
        for kernel, call in movement_case(D=D).items():
            yield f"bf16 D={D} {kernel}", call
        for label, transform in TRANSFORMS.items():
            calls = movement_case(D=D, **(transform | {"rope": int(transform["rope"] * D)}))
            for kernel in ("pack", "unpack_grad"):
                yield f"bf16 D={D} {kernel} {label}", calls[kernel]


def attention_case(
    dtype: torch.dtype = torch.bfloat16, *, D: int = 128, Dv: int | None = None, causal: bool = True, S: int = 512,
    hq: int = 4, hkv: int = 2, lse: bool = True, partial: bool = False, padding: int = 16,
    window: tuple[int, int] | None = None, softcap: float | None = None, also: str = "",
    part: bool = False, start: bool = False,
) -> tuple[Callable[[], None], Callable[[], None]]:  # fmt: skip
    """Forward and backward of one attention over packed rows, as callables; `partial` asks for dk and dv in fp32.

    `also` names what of `_others` is on. `part`: the rows are a part of a longer sequence; `start`: there are sums that
    dk and dv start from.
    """
    Dv = Dv or D
    options = Options(D**-0.5, causal, HeadMap(hq // hkv, 0), window, softcap)
    options = options._replace(**{k: v for k, v in _others(S, hq, hkv).items() if k in also.split()})
    if part:
        options = options._replace(part=Part(CUT, CUT + S, CUT + S))
    head_grads = HeadGrads(options.sinks, options.slopes)

    def packed(heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        each = (dim + 7) // 8 * 8  # as heads lie in the rows of a group
        rows = torch.empty(S, 1, heads * each + padding, dtype=dtype)
        return rows[..., : heads * each].unflatten(-1, (heads, each))[..., :dim]

    q, k, v, o = packed(hq, D, dtype), packed(hkv, D, dtype), packed(hkv, Dv, dtype), packed(hq, Dv, dtype)
    sum_dtype = torch.float32 if partial else dtype
    dk, dv = packed(hkv, D, sum_dtype), packed(hkv, Dv, sum_dtype)
    stat, delta = torch.empty(hq, 1, S), packed(hq, 1, torch.float32)[..., 0]

    sums = (torch.empty(hkv, 1, S, D), torch.empty(hkv, 1, S, Dv)) if start else None

    def forward() -> None:
        attend_forward(q, k, v, [Span(0, (o, None))], stat if lse else None, options)

    def backward() -> None:
        attend_backward(q, k, v, o, stat, delta, [Span(0, (q,))], [Span(0, (dk, dv))], options, head_grads, sums)

    return forward, backward


@triton.jit
def prefix(batch, head, q_pos, kv_pos, lengths_ptr):
    return (kv_pos <= q_pos) | (kv_pos < tl.load(lengths_ptr + batch))


def _others(S: int, hq: int, hkv: int) -> dict[str, Any]:
    """Options whose values do not matter to the compiler."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    n = -(-S // BLOCK)
    return {
        "documents": documents(numbers(1, S)),
        "sinks": torch.zeros(hq),
        "slopes": torch.zeros(hq),
        "dropout": Dropout(0.1, 1),
        "predicate": Predicate(prefix, (numbers(1),)),
        "blocks": Blocks(numbers(1, 1, n, 3), numbers(n * n), numbers(1, hkv, n, 3), numbers(hq * n * n)),
    }


def movement_case(
    dtype: torch.dtype = torch.bfloat16, *, D: int = 128, rope: int = 0, interleaved: bool = False,
    wide: bool = False, norm: bool = False, partial: bool = True, L: int = 512,
) -> dict[str, Callable[[], None]]:  # fmt: skip
    """The four layout kernels: a fused projection's 8 query and 2 kv heads on 2 ranks; `partial`: fp32 dk and dv."""
    Hq, Hkv = 8, 2
    q, k, v = torch.empty(1, L, Hq + 2 * Hkv, D, dtype=dtype).split([Hq, Hkv, Hkv], 2)
    cos = torch.empty(1, L, rope if wide else rope // 2) if rope else None
    weight = torch.empty(D, dtype=dtype) if norm else None
    transform = Transform(cos, cos, rope, interleaved, weight, weight)
    o, lse = torch.empty(1, L, Hq, D, dtype=dtype), torch.empty(1, L, Hq)
    rows, gradients, o_rows = [], [], []
    for rank in range(2):
        r_q, r_k, r_v = torch.empty(L, 1, 6, D, dtype=dtype).split([4, 1, 1], 2)
        rows.append(QKVRows(r_q, r_k, r_v, 4 * rank, rank))
        sums = torch.empty(2, L, 1, Hkv, D, dtype=torch.float32 if partial else dtype)
        gradients.append(QKVRows(r_q, sums[0], sums[1], 4 * rank, 0))
        o_rows.append(ORows(torch.empty(L, 1, 4, D, dtype=dtype), torch.empty(L, 1, 4), 4 * rank))

    def unpack_gradients() -> None:
        unpack_grad(gradients, q, k, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), transform)

    return {
        "pack": lambda: pack(q, k, v, rows, transform),
        "unpack_grad": unpack_gradients,
        "pack_grad": lambda: pack_grad(o, o, lse, o_rows),
        "unpack": lambda: unpack(o_rows, o, lse),
    }
