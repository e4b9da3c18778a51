"""What a layer moves and launches, counted, not assumed: on the CPU path each byte once, and no option adds a pass."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl

from ulysses_triton import UlyssesGroup, masks, ulysses_attention
from ulysses_triton.kernels import _config

BATCH, TOKENS, HEADS, DIM = 1, 128, 4, 16  # on two ranks, fp32
PART = BATCH * (TOKENS // 2) * HEADS * DIM * 4  # bytes of one of q, k, v, O on a rank, in either layout
CONTROL = 100  # elements, more than a control message has and fewer than anything else here
LSE = BATCH * TOKENS * (HEADS // 2) * 4


def copied_bytes(profile) -> int:
    """Bytes written by copies; clone, contiguous, to and reshape are copies inside. Control messages are apart."""
    copies = [math.prod(e.input_shapes[0]) for e in profile.function_events if e.name in ("aten::copy_", "aten::cat")]
    return sum(4 * n for n in copies if n > CONTROL)


def copies_of_a_layer(ctx, exchange, attention, dtype=torch.float32):
    q, k, v = (torch.randn(BATCH, TOKENS // 2, HEADS, DIM, dtype=dtype, requires_grad=True) for _ in range(3))
    dout = torch.randn(BATCH, TOKENS // 2, HEADS, DIM, dtype=dtype)
    with UlyssesGroup(ctx.group, exchange=exchange) as group:
        with torch.autograd.profiler.profile(record_shapes=True) as forward:
            out = ulysses_attention(q, k, v, group, attention=attention)
        with torch.autograd.profiler.profile(record_shapes=True) as backward:
            torch.autograd.grad(out, (q, k, v), dout)
    return copied_bytes(forward), copied_bytes(backward)


@pytest.mark.parametrize("attention", ["aten", "reference"])
@pytest.mark.parametrize("exchange", ["shm", "torch"])
def test_a_layer_copies_each_byte_once(pool, exchange, attention):
    """Pack q, k, v; place O; unpack it. Back: pack dO; place dq, dk, dv; unpack them.

    Over shared memory O is placed where it belongs, and is not unpacked.

    aten allocates its LSE, which costs a copy of it; in backward it insists on a dO of its own order, which for B > 1
    or under GQA costs a copy of that, and it needs the O that is kept beside the one that is sent. The reference brings
    what it computes with to temporaries: q, k and v, and in backward q, k, v, dO, LSE and delta; and delta is a copy
    into its place.
    """
    unpack = PART if exchange == "torch" else 0
    keep = PART if exchange == "shm" else 0  # O as sent lies at the peers, so what backward needs of it is another one
    for forward, backward in pool.run(2, copies_of_a_layer, exchange, attention):
        if attention == "aten":
            assert (forward, backward) == (3 * PART + PART + keep + LSE + unpack, PART + 3 * PART + 3 * PART)
        else:
            assert forward == 3 * PART + PART + LSE + unpack + 3 * PART
            assert backward == PART + LSE + 3 * PART + 3 * PART + 4 * PART + 2 * LSE


class OneForAll(torch.autograd.Function):
    """An attention that moves nothing: q for the output, and its gradient for those of q, k and v."""

    @staticmethod
    def forward(ctx, q, k, v):
        return q.view_as(q)

    @staticmethod
    def backward(ctx, dout):
        return dout, dout, dout


def of_a_callable(q, k, v, **_):
    return OneForAll.apply(q, k, v)


def of_a_callable_that_copies(q, k, v, **_):
    return OneForAll.apply(q, k, v).contiguous()


@pytest.mark.parametrize("attention", [of_a_callable, of_a_callable_that_copies])
@pytest.mark.parametrize("exchange", ["shm", "torch"])
def test_the_halves_around_a_callable_copy_each_byte_once(pool, exchange, attention):
    """Pack q, k, v; place O; unpack it. Back: pack dO; unpack dq, dk, dv, which autograd has joined to rows.

    It joins them in one `aten::cat`, whose sizes the profiler does not tell, and not slice by slice with zeros around.
    Over shared memory O goes straight to its place, and rows of gradients are copied to the peers. Over the process
    group an output that is contiguous travels as it lies.
    """
    own = PART if attention is of_a_callable_that_copies else 0
    forward = 3 * PART + own + (PART if exchange == "shm" else PART + PART - own)
    backward = PART + (3 * PART if exchange == "shm" else 0) + 3 * PART
    fp64 = torch.float64  # whose rows PyTorch moves here, too; an element counts as 4 bytes all the same
    assert pool.run(2, copies_of_a_layer, exchange, attention, fp64) == [(forward, backward)] * 2


@masks.register
@triton.jit
def nearby(batch, head, q_pos, kv_pos):
    return tl.abs(q_pos - kv_pos) < 64


def options_of_a_rank(name, rank):
    """Options by name, for a shard of TOKENS / 2 tokens; `blocks` of 128 tokens are one here."""
    some = {
        "window": {"window": (9, 3)},
        "softcap": {"softcap": 5.0},
        "sinks": {"sinks": torch.ones(HEADS, requires_grad=True)},
        "slopes": {"alibi_slopes": torch.ones(HEADS, requires_grad=True)},
        "segment_ids": {"segment_ids": torch.full((BATCH, TOKENS // 2), rank, dtype=torch.int32)},
        "cu_seqlens": {"cu_seqlens": (0, 50, 50, TOKENS)},
        "dropout": {"dropout_p": 0.1},
        "mask": {"mask": nearby},
        "block mask": {"mask": masks.block_mask(nearby, q_len=TOKENS)},
        "return_lse": {"return_lse": True},
    }
    if name == "all":
        return {k: v for key in some if key not in ("cu_seqlens", "mask") for k, v in some[key].items()}
    return some.get(name, {})


VIEWS = ("aten::as_strided", "aten::slice", "aten::squeeze", "aten::view")  # move nothing


def passes_of_a_layer(ctx, exchange, name):
    """Kernels launched, and how often each operation of PyTorch took in as much as half of a rank's q."""
    launched = []
    launch = _config.launch

    def counting(kernel, *args, **kwargs):
        launched.append(kernel.__name__.strip("_"))
        return launch(kernel, *args, **kwargs)

    q, k, v = (torch.randn(BATCH, TOKENS // 2, HEADS, 64, requires_grad=True) for _ in range(3))
    options = options_of_a_rank(name, ctx.rank)
    given = [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    _config.launch = counting
    try:
        with (
            UlyssesGroup(ctx.group, exchange=exchange) as group,
            torch.autograd.profiler.profile(record_shapes=True) as profile,
        ):
            out = ulysses_attention(q, k, v, group, attention="triton", **options)
            out, *lse = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad([out, *lse], (q, k, v, *given), [torch.ones_like(x) for x in (out, *lse)])
    finally:
        _config.launch = launch
    large = [e.name for e in profile.function_events if any(math.prod(s) >= q.numel() // 2 for s in e.input_shapes)]
    return launched, Counter(large)


SINGLE = ("window", "softcap", "sinks", "slopes", "segment_ids", "cu_seqlens", "dropout", "block mask")


@pytest.mark.parametrize(
    ("exchange", "names"),
    [
        ("shm", ("mask", "all")),
        ("torch", ("all",)),
        pytest.param("shm", SINGLE, marks=pytest.mark.slow),
    ],
    ids=["shm", "torch", "one by one"],
)
def test_no_option_adds_a_pass_over_rows(pool, exchange, names):
    """Seven kernels in a layer, forward and backward, whatever the options; what they add works on one number a row.

    Over shared memory six: attend writes the result where it belongs.
    """
    plain = pool.run(2, passes_of_a_layer, exchange, "none")
    kernels = ["pack", "attend_forward", "unpack", "pack_grad", "attend_dq", "attend_dkv", "unpack_grad"]
    if exchange == "shm":
        kernels.remove("unpack")
    for launched, _ in plain:
        assert [name.removesuffix("_kernel") for name in launched] == kernels
    for name in names:
        for (launched, large), (_, large_of_plain) in zip(
            pool.run(2, passes_of_a_layer, exchange, name), plain, strict=True
        ):
            assert [n.removesuffix("_kernel") for n in launched] == kernels, name
            assert not {n: c for n, c in (large - large_of_plain).items() if n not in VIEWS}, name
