"""bf16 in Triton's interpreter, which multiplies its raw bits in `tl.dot` and truncates where GPUs round.

Only for tests: nothing that users run depends on it. fp32 products of widened bf16 operands are exact, as on a GPU.
"""

from __future__ import annotations

import numpy as np
import torch


def install() -> None:
    """Make `tl.dot` and casts of bf16 right in the interpreter."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "_bf16_is_right", False):
        return
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(data: np.ndarray) -> np.ndarray:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def narrow(data: np.ndarray) -> np.ndarray:
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def create_dot(self, a, b, d, *args):
        a, b = (TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *args)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(widen(src.data), target)
        if source == tl.float32 and target == tl.bfloat16:
            return TensorHandle(narrow(src.data), target)
        return cast(self, src, dst_type)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder._bf16_is_right = True
