"""Wrong input of every kind, on all ranks or on one: the right error on every rank, and the group works afterwards."""

from __future__ import annotations

import time

import pytest
import torch
import triton
import triton.language as tl

from ulysses_triton import (
    DeviceError,
    DtypeError,
    ExchangeError,
    OptionError,
    ShapeError,
    UlyssesGroup,
    gather_sequence,
    masks,
    run_virtual,
    ulysses_attention,
    ulysses_qkv_attention,
)

RANKS = 3


@triton.jit
def not_registered(batch, head, q_pos, kv_pos):
    return kv_pos <= q_pos


@masks.register
@triton.jit
def causal_mask(batch, head, q_pos, kv_pos):
    return kv_pos <= q_pos


@masks.register
@triton.jit
def early(batch, head, q_pos, kv_pos, length_ptr):
    return kv_pos < tl.load(length_ptr)


@masks.register
@triton.jit
def unknown(batch, head, q_pos, kv_pos):
    return tl.sigmoid(kv_pos.to(tl.float32)) > 0.5


def one_of() -> dict:
    """A batch of 1."""
    return {n: torch.randn(1, 4, heads, 16) for n, heads in (("q", 6), ("k", 3), ("v", 3))}


def good() -> dict:
    q, k, v = (torch.randn(2, 4, heads, 16) for heads in (6, 3, 3))
    return {"q": q, "k": k, "v": v, "causal": True, "attention": "reference"}


# What is changed in a good call, the error of every rank, and what its message names.
WRONG: dict[str, tuple] = {
    "integer q": ({"q": torch.ones(2, 4, 6, 16, dtype=torch.int64)}, DtypeError, "int64|float32"),
    "integers": ({n: torch.ones(2, 4, 6, 16, dtype=torch.int32) for n in "qkv"}, DtypeError, "int32"),
    "bool": ({n: torch.ones(2, 4, 6, 16, dtype=torch.bool) for n in "qkv"}, DtypeError, "bool"),
    "complex": ({n: torch.ones(2, 4, 6, 16, dtype=torch.complex64) for n in "qkv"}, DtypeError, "complex64"),
    "fp8": ({n: torch.ones(2, 4, 6, 16).to(torch.float8_e4m3fn) for n in "qkv"}, DtypeError, "float8"),
    "k of another dtype": ({"k": torch.randn(2, 4, 3, 16).bfloat16()}, DtypeError, "bfloat16"),
    "no tensor": ({"q": [[1.0]]}, DtypeError, "q is a list"),
    "None": ({"v": None}, DtypeError, "v is a NoneType"),
    "q of 3 dims": ({"q": torch.randn(2, 4, 96)}, ShapeError, r"q has shape \[2, 4, 96\]"),
    "k of 3 dims": ({"k": torch.randn(2, 4, 48)}, ShapeError, r"k has shape \[2, 4, 48\]"),
    "batch": ({"k": torch.randn(1, 4, 3, 16)}, ShapeError, "batch size"),
    "k and v tokens": ({"v": torch.randn(2, 5, 3, 16)}, ShapeError, "k and v differ"),
    "head dims": ({"k": torch.randn(2, 4, 3, 24)}, ShapeError, "head dim"),
    "head dim 0": ({n: torch.randn(2, 4, 6, 0) for n in "qkv"}, ShapeError, "q and k have head dim 0; .* 1 to 256"),
    "huge head dim": ({"v": torch.randn(2, 4, 3, 257)}, ShapeError, "v have head dim 257; .* 1 to 256"),
    "heads and kv heads": ({n: torch.randn(2, 4, 4, 16) for n in "kv"}, ShapeError, "multiple"),
    "lens too short": ({"lens": [4, 4]}, ShapeError, "2 entries"),
    "lens of others": ({"lens": [5, 5, 5]}, ShapeError, r"lens\[\d\] is 5, but q has 4 tokens"),
    "kv_lens missing": (
        {"k": torch.randn(2, 7, 3, 16), "v": torch.randn(2, 7, 3, 16), "lens": [4, 4, 4]},
        ShapeError,
        "kv_lens",
    ),
    "kv_lens wrong": ({"kv_lens": [9, 9, 9]}, ShapeError, "kv_lens"),
    "attention name": ({"attention": "flash"}, OptionError, "flash"),
    "attention that is a word for callables": ({"attention": "callable"}, OptionError, "the callable itself"),
    "attention object": ({"attention": 3}, OptionError, "int"),
    "recompute": ({"recompute": "attention"}, OptionError, "recompute"),
    "aten with Dv != D": ({"v": torch.randn(2, 4, 3, 8), "attention": "aten"}, OptionError, "head dim 16 and v has 8"),
    "callable with LSE": ({"attention": torch.nn.Identity(), "return_lse": True}, OptionError, "return_lse"),
    "scale": ({"scale": float("inf")}, OptionError, "scale"),
    "window of one": ({"window": (3,)}, OptionError, "two ints"),
    "window of floats": ({"window": (3.0, 0)}, OptionError, "two ints"),
    "window number": ({"window": 3}, OptionError, "two ints"),
    "window below -1": ({"window": (-2, 0)}, OptionError, r"window = \(-2, 0\)"),
    "softcap 0": ({"softcap": 0.0}, OptionError, "softcap = 0.0"),
    "softcap below 0": ({"softcap": -1}, OptionError, "softcap = -1.0"),
    "softcap infinite": ({"softcap": float("inf")}, OptionError, "softcap = inf"),
    "softcap nan": ({"softcap": float("nan")}, OptionError, "softcap = nan"),
    "softcap text": ({"softcap": "30"}, OptionError, "softcap is a str"),
    "aten with a window": ({"window": (3, 0), "attention": "aten"}, OptionError, "does not know window"),
    "aten with softcap": ({"softcap": 30.0, "attention": "aten"}, OptionError, "does not know softcap"),
    "aten with sinks": ({"sinks": torch.ones(6), "attention": "aten"}, OptionError, "does not know sinks"),
    "sinks of some heads": ({"sinks": torch.ones(2)}, ShapeError, r"sinks has shape \[2\].*\[6\]"),
    "sinks of a list": ({"sinks": [1.0] * 6}, DtypeError, "sinks is a list"),
    "integer sinks": ({"sinks": torch.ones(6, dtype=torch.int64)}, DtypeError, "sinks has dtype torch.int64"),
    "slopes of a batch": ({"alibi_slopes": torch.ones(2, 6)}, ShapeError, r"alibi_slopes has shape \[2, 6\]"),
    "float segment_ids": ({"segment_ids": torch.zeros(2, 4)}, DtypeError, "segment_ids is torch.float32"),
    "segment_ids of a list": ({"segment_ids": [[0] * 4] * 2}, DtypeError, "segment_ids is list"),
    "segment_ids of all tokens": (
        {"segment_ids": torch.zeros(2, 12, dtype=torch.int32)},
        ShapeError,
        r"segment_ids has shape \[2, 12\]; expected this rank's own tokens",
    ),
    "segment_ids with other keys": (
        {"segment_ids": torch.zeros(2, 4, dtype=torch.int32), **{n: torch.randn(2, 7, 3, 16) for n in "kv"}},
        OptionError,
        "cu_seqlens and cu_seqlens_k",
    ),
    "cu_seqlens for a batch": ({"cu_seqlens": [0, 12]}, ShapeError, "batch of 1, q has 2"),
    "cu_seqlens and segment_ids": (
        {"cu_seqlens": [0, 12], "segment_ids": torch.zeros(2, 4, dtype=torch.int32)},
        OptionError,
        "pass one of them",
    ),
    "cu_seqlens of floats": ({"cu_seqlens": [0.0, 12.0]}, OptionError, "ints or a 1-D int32"),
    "cu_seqlens_k alone": ({"cu_seqlens_k": [0, 12]}, OptionError, "without cu_seqlens"),
    "cu_seqlens that end early": (one_of() | {"cu_seqlens": [0, 5, 9]}, ShapeError, "end at the 12 tokens"),
    "cu_seqlens from 1": (one_of() | {"cu_seqlens": [1, 12]}, ShapeError, "begin at 0"),
    "cu_seqlens that fall": (one_of() | {"cu_seqlens": torch.tensor([0, 9, 5, 12])}, ShapeError, "never fall"),
    "documents without keys": (
        one_of() | {"cu_seqlens": [0, 5, 12], "cu_seqlens_k": [0, 12]},
        ShapeError,
        "2 documents and cu_seqlens_k 1",
    ),
    "dropout_p of 1": ({"dropout_p": 1.0}, OptionError, "below 1"),
    "dropout_p text": ({"dropout_p": "0.1"}, OptionError, "dropout_p is a str"),
    "dropout_seed below 0": ({"dropout_p": 0.1, "dropout_seed": -1}, OptionError, "dropout_seed = -1"),
    "dropout_seed of a float": ({"dropout_p": 0.1, "dropout_seed": 1.5}, OptionError, "dropout_seed is a float"),
    "mask of a lambda": ({"mask": lambda b, h, q, k: q >= k}, OptionError, "expected a predicate"),
    "mask not registered": ({"mask": not_registered}, OptionError, "not registered"),
    "mask without its tensor": ({"mask": early}, OptionError, "0 captured tensors"),
    "mask with a number": ({"mask": (early, 3)}, OptionError, "only tensors are captured"),
    "mask the twin cannot run": ({"mask": unknown}, OptionError, "unknown"),
    "block mask of another length": (
        {"mask": masks.block_mask((early, torch.tensor([3])), q_len=16)},
        ShapeError,
        "16 queries and 16 keys; the whole sequence has 12 and 12",
    ),
    "block mask of another batch": (
        {"mask": masks.block_mask((early, torch.tensor([3])), q_len=12, batch=3)},
        ShapeError,
        "a batch of 3",
    ),
    "callable with dropout": ({"dropout_p": 0.1, "attention": torch.nn.Identity()}, OptionError, "dropout_p"),
    "meta device": ({n: torch.empty(2, 4, 6, 16, device="meta") for n in "qkv"}, DeviceError, "meta"),
    "two devices": ({"k": torch.empty(2, 4, 3, 16, device="meta")}, DeviceError, "meta"),
}

# A call that is good in itself, made by rank 1 alone: what every rank's ShapeError says.
DIFFERENT: dict[str, tuple] = {
    "causal": ({"causal": False}, "causal: rank 1 has False, ranks 0, 2 have True"),
    "dtype": ({n: t.bfloat16() for n, t in good().items() if n in "qkv"}, "dtype: rank 1 has bfloat16"),
    "tokens": ({n: torch.randn(2, 5, h, 16) for n, h in (("q", 6), ("k", 3), ("v", 3))}, "lens: rank 1 has 5 x 3"),
    "heads": ({n: torch.randn(2, 4, 12, 16) for n in "qkv"}, "heads: rank 1 has 12, ranks 0, 2 have 6"),
    "batch": ({n: torch.randn(1, 4, h, 16) for n, h in (("q", 6), ("k", 3), ("v", 3))}, "batch: rank 1 has 1"),
    "scale": ({"scale": 0.5}, "scale: rank 1 has 0.5"),
    "window": ({"window": (5, 5)}, "window: rank 1 has (5, 5), ranks 0, 2 have None"),
    "softcap": ({"softcap": 30}, "softcap: rank 1 has 30.0, ranks 0, 2 have None"),
    "sinks": ({"sinks": torch.ones(6)}, "sinks: rank 1 has True, ranks 0, 2 have False"),
    "dropout": ({"dropout_p": 0.2}, "dropout_p: rank 1 has 0.2, ranks 0, 2 have 0.0"),
    "documents": ({"segment_ids": torch.zeros(2, 4, dtype=torch.int32)}, "call: rank 1 has segment_ids"),
    "mask": ({"mask": causal_mask}, "predicate: rank 1 has causal_mask"),
    "lse": ({"return_lse": True}, "return_lse: rank 1 has True"),
    "recompute": ({"recompute": "exchange"}, "recompute: rank 1 has True"),
    "requires_grad": ({"q": torch.randn(2, 4, 6, 16, requires_grad=True)}, "grad: rank 1 has True"),
    "attention": ({"attention": "aten"}, "attention: rank 1 has aten, ranks 0, 2 have reference"),
    "keys of another length": ({n: torch.randn(2, 7, 3, 16) for n in "kv"}, "kv_lens: rank 1 has 7 x 3"),
}


def call(group, changes):
    arguments = good() | changes
    q, k, v = (arguments.pop(n) for n in "qkv")
    return ulysses_attention(q, k, v, group, **arguments)


def error_then_good_call(rank, group, changes, bad_ranks):
    """What the rank raises, after which the same group must still do its work."""
    try:
        call(group, changes if rank in bad_ranks else {})
    except Exception as error:
        found = type(error).__name__, str(error)
    else:
        found = "nothing", ""
    torch.manual_seed(0)
    return found, call(group, {})


def on_process(ctx, changes, bad_ranks):
    return error_then_good_call(ctx.rank, ctx.group, changes, bad_ranks)


def hold(answers, error, match, bad_ranks):
    import re

    for rank, ((kind, message), _) in enumerate(answers):
        assert kind == error.__name__, f"rank {rank} raised {kind}: {message}"
        assert re.search(match, message), message
        if rank not in bad_ranks:
            assert "rank 1 refused this call" in message
    assert all(torch.isfinite(again).all() for _, again in answers)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_on_every_rank(name):
    changes, error, match = WRONG[name]
    answers = run_virtual(
        RANKS, lambda group: error_then_good_call(group.rank, group, changes, range(RANKS)), timeout=10
    )
    hold(answers, error, match, range(RANKS))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_on_one_rank(name):
    changes, error, match = WRONG[name]
    answers = run_virtual(RANKS, lambda group: error_then_good_call(group.rank, group, changes, [1]), timeout=10)
    hold(answers, error, match, [1])


@pytest.mark.parametrize("name", DIFFERENT)
def test_calls_that_differ(name):
    changes, match = DIFFERENT[name]
    answers = run_virtual(RANKS, lambda group: error_then_good_call(group.rank, group, changes, [1]), timeout=10)
    for (kind, message), again in answers:
        assert kind == "ShapeError" and match in message, message
        assert torch.isfinite(again).all()


def all_kinds_on_a_process(ctx):
    """Every kind one after the other on one group, as one rank of a real process group."""
    found = {}
    for name, (changes, _, _) in WRONG.items():
        found[f"every rank: {name}"] = error_then_good_call(ctx.rank, ctx.group, changes, range(RANKS))
        found[f"one rank: {name}"] = error_then_good_call(ctx.rank, ctx.group, changes, [1])
    for name, (changes, _) in DIFFERENT.items():
        found[f"different: {name}"] = error_then_good_call(ctx.rank, ctx.group, changes, [1])
    return found


def test_every_kind_on_processes(pool):
    answers = pool.run(RANKS, all_kinds_on_a_process)
    for name, (_, error, match) in WRONG.items():
        hold([a[f"every rank: {name}"] for a in answers], error, match, range(RANKS))
        hold([a[f"one rank: {name}"] for a in answers], error, match, [1])
    for name, (_, match) in DIFFERENT.items():
        for answer in answers:
            (kind, message), again = answer[f"different: {name}"]
            assert kind == "ShapeError" and match in message, message
            assert torch.isfinite(again).all()


def made_with(ctx, options):
    """What making a group with this rank's own options ends in, how soon; and whether one without them works."""
    began = time.monotonic()
    try:
        UlyssesGroup(ctx.group, **options[ctx.rank]).close()
        error = "", ""
    except OptionError as found:
        error = type(found).__name__, str(found)
    seconds = time.monotonic() - began
    return *error, seconds, call(ctx.group, {})


@pytest.mark.parametrize(
    "name, values, others",
    [
        ("check", ("hash", "always"), {"exchange": "shm"}),
        ("check", ("hash", "always"), {"exchange": "torch"}),
        ("exchange", ("auto", "torch"), {}),
    ],
)
def test_ranks_that_make_their_group_otherwise(pool, name, values, others):
    options = [{name: values[rank == 1], **others} for rank in range(RANKS)]
    for kind, message, seconds, again in pool.run(RANKS, made_with, options):
        assert kind == "OptionError" and seconds < 30, message
        assert f"different {name}=: {[values[0], values[1], values[0]]} in rank order" in message
        assert torch.isfinite(again).all()


def test_a_cpu_tensor_on_a_group_that_carries_cuda_tensors():
    """Stands for a group over NCCL, which needs GPUs to be made; the check asks what the group's backends carry."""

    def work(group):
        group.devices = frozenset({"cuda"})
        with pytest.raises(DeviceError, match="q is on cpu.*carries tensors on cuda"):
            call(group, {})

    run_virtual(2, work, timeout=10)


def skip_a_call(rank, group):
    """Rank 1 leaves a layer out: its next call meets the others' first."""
    try:
        if rank != 1:
            call(group, {})
        call(group, {"causal": False})
    except ShapeError as error:
        return str(error), call(group, {})
    return "nothing", None


def test_a_call_that_one_rank_leaves_out():
    for message, again in run_virtual(RANKS, lambda group: skip_a_call(group.rank, group), timeout=10):
        assert "causal: rank 1 has False, ranks 0, 2 have True" in message
        assert torch.isfinite(again).all()


def forward_on_one_backward_on_the_others(rank, group):
    leaf = torch.randn(2, 4, 6, 16, requires_grad=True)
    out = call(group, {"q": leaf})
    try:
        call(group, {"q": leaf}) if rank == 1 else out.sum().backward()
    except ShapeError as error:
        return str(error)
    return "nothing"


def test_backward_against_forward():
    for message in run_virtual(RANKS, lambda g: forward_on_one_backward_on_the_others(g.rank, g), timeout=10):
        assert "call: rank 1 has attention, ranks 0, 2 have attention backward" in message


def always(ctx):
    with UlyssesGroup(ctx.group, check="always") as group:
        fine = call(group, {})
        before = group.counts["control"]
        try:
            call(group, {"causal": ctx.rank == 1})
        except ShapeError as error:
            return torch.isfinite(fine).all().item(), str(error), group.counts["control"] - before
    return None


def test_check_always_sends_the_signature_in_one_message(pool):
    for fine, message, control in pool.run(RANKS, always):
        assert fine and "causal: rank 1 has True, ranks 0, 2 have False" in message and control == 1


QKV_WRONG: dict[str, tuple] = {
    "channels": ({"heads": 5}, ShapeError, "do not divide"),
    "no heads": ({"heads": 0}, ShapeError, "heads"),
    "4 dims": ({"qkv": torch.randn(1, 4, 8, 16)}, ShapeError, "qkv has shape"),
    "norm shape": ({"q_norm": torch.ones(8)}, ShapeError, "q_norm has shape"),
    "integer norm": ({"k_norm": torch.ones(16, dtype=torch.int64)}, DtypeError, "k_norm has dtype"),
    "rope tokens": ({"rope": (torch.ones(12, 8), torch.ones(12, 8))}, ShapeError, "this rank's own L = 4"),
    "rope widths": ({"rope": (torch.ones(4, 8), torch.ones(4, 4))}, ShapeError, "one shape"),
    "rope too wide": ({"rope": (torch.ones(4, 32), torch.ones(4, 32))}, ShapeError, "columns"),
    "rope batch": ({"rope": (torch.ones(3, 4, 8), torch.ones(3, 4, 8))}, ShapeError, "leading 3"),
    "rope_dim": ({"rope": (torch.ones(4, 8), torch.ones(4, 8)), "rope_dim": 12}, ShapeError, "rope_dim"),
    "rope of a list": ({"rope": ([1.0], [1.0])}, DtypeError, "rope cos is a list"),
}


@pytest.mark.parametrize("bad_ranks", [(0, 1), (1,)], ids=["every rank", "one rank"])
@pytest.mark.parametrize("name", QKV_WRONG)
def test_wrong_fused_calls(name, bad_ranks):
    changes, error, match = QKV_WRONG[name]

    def work(group):
        arguments = {"qkv": torch.randn(1, 4, 8 * 16), "heads": 4, "kv_heads": 2}
        arguments |= changes if group.rank in bad_ranks else {}
        with pytest.raises(error, match=match):
            ulysses_qkv_attention(arguments.pop("qkv"), group, **arguments)

    run_virtual(2, work, timeout=10)


def test_a_callable_that_fails_or_returns_the_wrong_thing_on_one_rank():
    def wrong(q, k, v, **_):
        return q[..., :8]

    def failing(q, k, v, **_):
        raise ZeroDivisionError("in the user's code")

    def fine(q, k, v, **_):
        return q

    def work(group, bad, own_error, other_error):
        q = torch.randn(1, 4, 2, 16)
        with pytest.raises(own_error if group.rank == 1 else other_error):
            ulysses_attention(q, q, q, group, attention=bad if group.rank == 1 else fine)
        assert ulysses_attention(q, q, q, group, attention=fine).shape == q.shape

    run_virtual(2, lambda group: work(group, wrong, ShapeError, ShapeError), timeout=10)
    run_virtual(2, lambda group: work(group, failing, ZeroDivisionError, ExchangeError), timeout=10)


def test_gather_sequence_with_shapes_that_differ():
    def work(group):
        with pytest.raises(ShapeError, match="shape of a token: rank 1 has"):
            gather_sequence(torch.ones(1, 4, 3 + (group.rank == 1)), group)
        with pytest.raises(ShapeError, match="does not fit rank|refused"):
            gather_sequence(torch.ones(1, 4, 3), group, lens=[4, 3, 4] if group.rank == 1 else [4, 4, 4])

    run_virtual(RANKS, work, timeout=10)
