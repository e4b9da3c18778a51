"""`python -m bench.accuracy`: errors of the layer against fp64, beside the errors of PyTorch's own attention.

Virtual ranks on the CPU; the Triton kernels run in Triton's interpreter when TRITON_INTERPRET=1 is set. An error is the
norm of the difference by the norm of the truth. "PyTorch" is `scaled_dot_product_attention` on one device in the same
dtype, with kv heads repeated for GQA.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ulysses_triton import run_virtual, shard_sequence, ulysses_attention
from ulysses_triton.kernels._config import INTERPRET

NAMES = ("out", "dq", "dk", "dv")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMIT_FP32 = 2e-6


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> list[Tensor]:
    """out and gradients in fp64, from all scores at once."""
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    repeat = q.size(2) // k.size(2)
    q64, k64, v64 = leaves[0], *(t.repeat_interleave(repeat, 2) for t in leaves[1:])
    scores = torch.einsum("bqhd,bkhd->bhqk", q64, k64) / math.sqrt(q.size(3))
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v64)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.double())]


def pytorch(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> list[Tensor]:
    """The same by PyTorch in the tensors' own dtype."""
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    repeat = q.size(2) // k.size(2)
    parts = [leaves[0], *(t.repeat_interleave(repeat, 2) for t in leaves[1:])]
    out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in parts), is_causal=causal).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def sharded(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, ranks: int, attention: str) -> list[Tensor]:
    """The same by this library, every rank with its shard."""

    def one_rank(group) -> list[Tensor]:  # noqa: ANN001
        leaves = [shard_sequence(t, group).requires_grad_() for t in (q, k, v)]
        out = ulysses_attention(*leaves, group, causal=causal, attention=attention)
        return [out.detach(), *torch.autograd.grad(out, leaves, shard_sequence(dout, group))]

    return [torch.cat(parts, 1) for parts in zip(*run_virtual(ranks, one_rank), strict=True)]


def error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).norm() / truth.norm()).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    attentions = ("aten", "reference", "triton") if INTERPRET else ("aten", "reference")
    low = (torch.float32,) if INTERPRET else DTYPES  # the interpreter multiplies the bits of bf16 wrongly
    shapes = [(1, options.tokens, h, options.head_dim) for h in (options.heads, options.kv_heads, options.kv_heads)]
    print(f"{options}, errors relative to fp64")
    print(f"{'dtype':9} {'mask':7} {'attention':10} " + " ".join(f"{name:>9}" for name in NAMES) + "   times PyTorch's")
    held = True
    for dtype in low:
        inputs = [torch.randn(shape).to(dtype) for shape in (*shapes, shapes[0])]
        for causal in (False, True):
            truth = exact(*inputs, causal)
            peer = [error(r, t) for r, t in zip(pytorch(*inputs, causal), truth, strict=True)]
            rows = {"PyTorch": peer}
            for attention in attentions:
                results = sharded(*inputs, causal, options.ranks, attention)
                rows[attention] = [error(r, t) for r, t in zip(results, truth, strict=True)]
            for name, errors in rows.items():
                ratios = [e / p for e, p in zip(errors, peer, strict=True)]
                numbers = " ".join(f"{e:9.2e}" for e in errors)
                print(
                    f"{str(dtype)[6:]:9} {'causal' if causal else 'dense':7} {name:10} {numbers}   "
                    + " ".join(f"{r:5.2f}" for r in ratios)
                )
                limits = [LIMIT_FP32] * 4 if dtype == torch.float32 else [2 * p for p in peer]
                held &= all(e <= limit for e, limit in zip(errors, limits, strict=True))
    verdict = "holds" if held else "DOES NOT HOLD"
    print(f"fp32 at most {LIMIT_FP32:g}, bf16 and fp16 at most twice PyTorch's own: {verdict}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
