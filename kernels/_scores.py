"""From products q k^T to scores: the softcap, and ALiBi.

A softcap makes `c tanh(x / c)` of `x = scale q k^T`, which never leaves (-c, c). With u = 2 / (e^(2|y|) + 1) are tanh
|y| = 1 - u and tanh'(y) = 1 - tanh^2 y = u (2 - u). The first loses all digits to cancellation as y goes to 0, so a
polynomial takes over there (Cephes, tanhf); the second keeps its digits where tanh saturates, which 1 - tanh^2 would
not. exp2 is the only function used, which every target has.

ALiBi (Press et al. 2022, "Train short, test long", section 3) then takes `slope * |i - j|` away, a slope per head.

Worked example: scale = 0.1, softcap 50. tanh is taken of `q k^T * 0.002`, and scores in base 2 are `50 log2(e)` times
that: the kernels multiply by `cap_scale` inside and by `qk_scale` outside.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ._views import Options

LOG2_E = math.log2(math.e)


@triton.jit
def tanh(y):
    """tanh y and its derivative at y, each within a few units of the last place of fp32."""
    size = tl.abs(y)
    u = 2.0 / (tl.math.exp2(size * 2.8853900817779268) + 1.0)  # 2 log2(e); past the range of exp2 it is 0
    z = y * y
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = series * z - 5.37397155531e-2
    series = series * z + 1.33314422036e-1
    series = series * z - 3.33332819422e-1
    large = tl.where(y < 0, u - 1.0, 1.0 - u)
    return tl.where(size < 0.625, y + y * z * series, large), u * (2.0 - u)


@triton.jit
def distance(q_spot, kv_pos):
    """|i - j| in fp32, which holds all whole numbers up to 2^24 and rounds larger ones."""
    return tl.abs(q_spot - kv_pos).to(tl.float32)


def scales(options: Options) -> dict[str, float]:
    """Kernel arguments: scores in base 2 are `qk_scale * q k^T`, or `qk_scale * tanh(cap_scale * q k^T)`."""
    if options.softcap is None:
        return {"qk_scale": options.scale * LOG2_E, "cap_scale": 0.0}
    return {"qk_scale": options.softcap * LOG2_E, "cap_scale": options.scale / options.softcap}
