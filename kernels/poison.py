"""Poison: the last kernel of an exchange says that it ran, and spoils what arrived when the exchange was given up.

A hop that is aborted lets its stream go on, over rows of which some never came. `status` is two int64 that the host can
read and write at any time (pinned memory): `status[0]` is set by whoever gives up, and then all bytes of the received
rows become 255, a NaN in every floating-point dtype; `status[1]` is the number of the latest hop whose stream came so
far, which tells the host how far the exchanges are without a call to CUDA.

Worked example: hops 7 and 8 are under way, the host reads status = [0, 7] for longer than its deadline, writes
status[0] = 1 and aborts. The stream of hop 8 goes on: its rows become NaN, and status = [1, 8].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _config

_PROGRAMS = 32  # few: they have nothing to do but in a fault
_BLOCK = 4096


@triton.jit(do_not_specialize=["n_bytes", "number"])
def _poison_kernel(status_ptr, rows_ptr, n_bytes, number, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    if (i == 0) & (number > 0):
        tl.store(status_ptr + 1, number)
    if tl.load(status_ptr, volatile=True) != 0:
        o = i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        for _ in range(i, tl.cdiv(n_bytes, BLOCK), PROGRAMS):
            tl.store(rows_ptr + o, 255, mask=o < n_bytes)
            o += PROGRAMS * BLOCK


def poison(status: Tensor, rows: Tensor, number: int) -> None:
    """Write `number` to `status[1]` (0: leave it), and 255 to every byte of `rows` if `status[0]` is set.

    `status` [2] int64, on the device or in pinned memory; `rows` contiguous, any dtype.
    """
    raw = rows.view(-1).view(torch.uint8)
    _config.launch(
        _poison_kernel,
        (_PROGRAMS,),
        status_ptr=status, rows_ptr=raw, n_bytes=raw.numel(), number=number, PROGRAMS=_PROGRAMS, BLOCK=_BLOCK,
        num_warps=4, num_stages=1,
    )  # fmt: skip
