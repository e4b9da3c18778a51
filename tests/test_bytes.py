"""The CPU path moves each byte once: every copy that PyTorch makes in a layer is counted, not assumed."""

from __future__ import annotations

import math

import pytest
import torch

from ulysses_triton import UlyssesGroup, ulysses_attention

BATCH, TOKENS, HEADS, DIM = 1, 128, 4, 16  # on two ranks, fp32
PART = BATCH * (TOKENS // 2) * HEADS * DIM * 4  # bytes of one of q, k, v, O on a rank, in either layout
CONTROL = 100  # elements, more than a control message has and fewer than anything else here
LSE = BATCH * TOKENS * (HEADS // 2) * 4


def copied_bytes(profile) -> int:
    """Bytes written by copies; clone, contiguous, to and reshape are copies inside. Control messages are apart."""
    copies = [math.prod(e.input_shapes[0]) for e in profile.function_events if e.name in ("aten::copy_", "aten::cat")]
    return sum(4 * n for n in copies if n > CONTROL)


def copies_of_a_layer(ctx, attention):
    q, k, v = (torch.randn(BATCH, TOKENS // 2, HEADS, DIM, requires_grad=True) for _ in range(3))
    dout = torch.randn(BATCH, TOKENS // 2, HEADS, DIM)
    with UlyssesGroup(ctx.group) as group:
        with torch.autograd.profiler.profile(record_shapes=True) as forward:
            out = ulysses_attention(q, k, v, group, attention=attention)
        with torch.autograd.profiler.profile(record_shapes=True) as backward:
            torch.autograd.grad(out, (q, k, v), dout)
    return copied_bytes(forward), copied_bytes(backward)


@pytest.mark.parametrize("attention", ["aten", "reference"])
def test_a_layer_copies_each_byte_once(pool, attention):
    """Pack q, k, v; place O; unpack it. Back: pack dO; place dq, dk, dv; unpack them.

    aten allocates its LSE, which costs a copy of it; in backward it insists on a dO of its own order, which for B > 1
    or under GQA costs a copy of that. The reference brings what it computes with to temporaries: q, k and v, and in
    backward q, k, v, dO, LSE and delta; and delta is a copy into its place.
    """
    for forward, backward in pool.run(2, copies_of_a_layer, attention):
        if attention == "aten":
            assert (forward, backward) == (3 * PART + PART + LSE + PART, PART + 3 * PART + 3 * PART)
        else:
            assert forward == 3 * PART + PART + LSE + PART + 3 * PART
            assert backward == PART + LSE + 3 * PART + 3 * PART + 4 * PART + 2 * LSE
