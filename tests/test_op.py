"""The op as PyTorch sees it: schema, fake, autograd registration, what is saved, and when buffers are used again."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from layer import Case, run, truth, whole_inputs
from torch.library import opcheck

from ulysses_triton import GroupError, UlyssesGroup, masks, op, run_virtual, ulysses_attention, ulysses_qkv_attention
from ulysses_triton.call import Call
from ulysses_triton.exchange.pool import Pool, size_class
from ulysses_triton.kernels._documents import documents


def op_arguments(group, q, k, v, **given) -> Call:
    heads, kv_heads = (0, 0) if k is not None else (2, 1)
    plain = Call(
        q, k, v, cos=None, sin=None, q_norm=None, k_norm=None, sinks=None, slopes=None, weight=None, bias=None,
        out_weight=None, out_bias=None, q_documents=None, k_documents=None, blocks=None, seed=None, captured=[],
        group=group.name, heads=heads, kv_heads=kv_heads, lens=[], kv_lens=[], causal=True, scale=0.25, window=[],
        softcap=None, dropout_p=0.0, dropout_seed=None, predicate="", rope_interleaved=False, rope_dim=0,
        norm_eps=1e-6, attention="reference", chunks=1, cuts=[], recompute=False, return_lse=False, grad=True,
            abi=op.ABI,
    )  # fmt: skip
    return plain._replace(**given)


def every_option() -> dict:
    """For a batch of 2 with 6 tokens and 2 heads."""
    tables = documents(torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, -1, -1]]))
    return {
        "sinks": torch.randn(2, requires_grad=True), "slopes": torch.rand(2, requires_grad=True),
        "q_documents": tables.q, "k_documents": tables.k, "captured": [torch.tensor([3, 1])], "predicate": "beginning",
        "blocks": torch.ones(1, 1, 1, 1, dtype=torch.uint8), "dropout_p": 0.3, "seed": torch.tensor(5),
        "window": [4, 0], "softcap": 3.0,
    }  # fmt: skip


@masks.register
@triton.jit
def beginning(batch, head, q_pos, kv_pos, length_ptr):
    return kv_pos <= q_pos + tl.load(length_ptr + batch)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("recompute", [False, True], ids=["rows saved", "recompute"])
@pytest.mark.parametrize("dims", [(16, 16), (33, 17)], ids=["16", "33 and 17"])
def test_opcheck_of_the_op(recompute, return_lse, dims):
    q, k, v = (torch.randn(2, 6, 2, dim, requires_grad=True) for dim in (dims[0], *dims))
    with UlyssesGroup() as group:
        arguments = op_arguments(group, q, k, v, recompute=recompute, return_lse=return_lse)
        opcheck(torch.ops.ulysses_triton.attention.default, tuple(arguments), test_utils=CHECKS)


def test_opcheck_of_the_op_with_every_option():
    q, k, v = (torch.randn(2, 6, 2, 16, requires_grad=True) for _ in range(3))
    with UlyssesGroup() as group:
        arguments = op_arguments(group, q, k, v, return_lse=True, **every_option())
        opcheck(torch.ops.ulysses_triton.attention.default, tuple(arguments), test_utils=CHECKS)


def test_opcheck_of_the_op_on_a_fused_projection():
    qkv, weights = torch.randn(1, 6, 4 * 16, requires_grad=True), [torch.rand(16, requires_grad=True) for _ in range(2)]
    with UlyssesGroup() as group:
        arguments = op_arguments(group, qkv, None, None, q_norm=weights[0], k_norm=weights[1])
        opcheck(torch.ops.ulysses_triton.attention.default, tuple(arguments), test_utils=CHECKS)


def projections(*sides: str) -> dict[str, torch.Tensor]:
    """Around 2 query heads and a kv head of 16, from 24 channels and to 20."""
    sizes = {"in": {"weight": (64, 24), "bias": (64,)}, "out": {"out_weight": (20, 32), "out_bias": (20,)}}
    return {n: torch.randn(size, requires_grad=True) for side in sides for n, size in sizes[side].items()}


@pytest.mark.parametrize("recompute", [False, True], ids=["rows saved", "recompute"])
@pytest.mark.parametrize("sides", [("in",), ("out",), ("in", "out")], ids=" and ".join)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "QK-norm"])
def test_opcheck_of_the_op_with_projections(sides, recompute, norm):
    given = projections(*sides)
    given |= {n: torch.rand(16, requires_grad=True) for n in ("q_norm", "k_norm") if norm}
    x = torch.randn(2, 6, 24 if "in" in sides else 64, requires_grad=True)
    with UlyssesGroup() as group:
        arguments = op_arguments(group, x, None, None, chunks=2, recompute=recompute, return_lse=norm, **given)
        opcheck(torch.ops.ulysses_triton.attention.default, tuple(arguments), test_utils=CHECKS)


@pytest.mark.parametrize("asked", [True, False], ids=["all asked", "none asked"])
@pytest.mark.parametrize("sides", [("in",), ("out",), ("in", "out")], ids=" and ".join)
def test_opcheck_of_the_backward_op_with_projections(sides, asked):
    given = {name: t.detach() for name, t in projections(*sides).items()}
    with UlyssesGroup() as group:
        call = op_arguments(group, torch.randn(2, 6, 24 if "in" in sides else 64), None, None, **given)
        out, _, workspace = torch.ops.ulysses_triton.attention(*call)
        if "in" not in sides:
            call = call._replace(q=None)
        kept = None if "out" in sides else out
        every = [asked] * len(op.ASKED)
        arguments = (torch.randn_like(out), None, kept, workspace, True, 16, 6, every, *call)
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        opcheck(torch.ops.ulysses_triton.attention_backward.default, arguments, test_utils=checks)


@pytest.mark.parametrize("options", [False, True], ids=["plain", "every option"])
@pytest.mark.parametrize("fused", [False, True], ids=["q, k, v", "fused"])
def test_opcheck_of_the_backward_op(fused, options):
    with UlyssesGroup() as group:
        q, k, v = (torch.randn(2, 6, 2, 16) for _ in range(3))
        given = (torch.randn(2, 6, 4 * 16), None, None) if fused else (q, k, v)
        chosen = every_option() if options else {}
        chosen |= {name: chosen[name].detach() for name in ("sinks", "slopes") if options}
        call = op_arguments(group, *given, **chosen)
        out, _, rows = torch.ops.ulysses_triton.attention(*call)
        call = call._replace(heads=2, kv_heads=1 if fused else 2)
        call = call if fused else call._replace(q=None, k=None, v=None)
        asked = [options, True, *[False] * 4]
        arguments = (torch.randn_like(out), None, out, rows, fused, 16, 6, asked, *call)
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        opcheck(torch.ops.ulysses_triton.attention_backward.default, arguments, test_utils=checks)


@pytest.mark.parametrize("dim", [16, 33])
def test_opcheck_of_the_halves(dim):
    q, k, v = (torch.randn(2, 6, 2, dim, requires_grad=True) for _ in range(3))
    with UlyssesGroup() as group:
        arguments = op_arguments(group, q, k, v, attention="callable")
        opcheck(torch.ops.ulysses_triton.exchange_in.default, tuple(arguments), test_utils=CHECKS)
        out = torch.randn(6, 2, 2, dim, requires_grad=True)
        opcheck(
            torch.ops.ulysses_triton.exchange_out.default, (out, group.name, 2, 2, dim, [6], True), test_utils=CHECKS
        )


def test_fake_strides_are_the_real_ones():
    """Inductor plans with the fake's strides; a permuted result under a contiguous fake would be read wrongly."""
    q, k, v = (torch.randn(2, 6, 2, 16).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(3))
    with UlyssesGroup() as group:
        real = torch.ops.ulysses_triton.attention(*op_arguments(group, q, k, v, return_lse=True))
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            fake = torch.ops.ulysses_triton.attention(*op_arguments(group, q, k, v, return_lse=True))
    assert [(t.shape, t.stride(), t.dtype) for t in real] == [(t.shape, t.stride(), t.dtype) for t in fake]


# -- what is saved


def saved_bytes(case: Case, group) -> dict[str, int]:
    """Bytes of the storages autograd saves in forward: inputs apart, as they are references."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    start = sum(case.lens[: group.rank])
    part = slice(start, start + case.lens[group.rank])
    inputs = {name: whole_inputs(case)[name][:, part].contiguous() for name in "qkv"}
    options = {"attention": case.attention, "recompute": case.recompute, "causal": True, "lens": case.lens}
    if case.fused:
        qkv = torch.cat([t.flatten(2) for t in inputs.values()], -1).requires_grad_()
        weights = {n: torch.ones(case.dim, requires_grad=True) for n in ("q_norm", "k_norm") if case.norm}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = ulysses_qkv_attention(qkv, group, heads=case.heads, kv_heads=case.kv_heads, **weights, **options)
        given = [qkv, *weights.values()]
    else:
        given = [t.requires_grad_() for t in inputs.values()]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = ulysses_attention(*given, group, **options)
    found = {"out": storages.pop(out.untyped_storage().data_ptr(), 0)}
    found["inputs"] = sum(storages.pop(t.untyped_storage().data_ptr(), 0) for t in given)
    return found | {"workspace": sum(storages.values())}


@pytest.mark.parametrize("mode", ["plain", "QK-norm", "recompute", "aten"])
def test_bytes_saved_for_backward(mode):
    """Plain: received rows, O, LSE. QK-norm: the raw projection too, by reference. Recompute: inputs, O, LSE."""
    case = Case((24, 40), 4, 2, dim=32, value_dim=32, batch=2, dtype="bf16")
    changes = {
        "QK-norm": {"fused": True, "norm": True},
        "recompute": {"recompute": "exchange"},
        "aten": {"attention": "aten"},
    }
    case = replace(case, **changes.get(mode, {}))
    for rank, found in enumerate(run_virtual(2, lambda group: saved_bytes(case, group))):
        tokens, all_tokens = 2 * case.lens[rank], 2 * 64  # batch x tokens, of this rank and of all
        rows, lse = all_tokens * (2 + 1 + 1) * 32 * 2, all_tokens * 2 * 4  # 2 query heads, one k and one v head here
        output, inputs = tokens * 4 * 32 * 2, tokens * (4 + 2 + 2) * 32 * 2
        head_output = all_tokens * 2 * 32 * 2
        expected = {
            "plain": {"out": output, "inputs": 0, "workspace": rows + lse},
            "QK-norm": {"out": output, "inputs": inputs + 2 * 32 * 4, "workspace": rows + lse},
            "recompute": {"out": output, "inputs": inputs, "workspace": lse},
            "aten": {"out": 0, "inputs": 0, "workspace": rows + lse + head_output},
        }[mode]
        assert found == expected


def test_nothing_is_kept_without_gradients():
    q, k, v = (torch.randn(1, 600, 2, 64) for _ in range(3))
    with UlyssesGroup() as group:
        out = ulysses_attention(q, k, v, group, attention="reference")
        group.pool._settle()
        assert group.pool.held == size_class(out.untyped_storage().nbytes())
        with torch.no_grad():
            again = ulysses_attention(*(t.requires_grad_() for t in (q, k, v)), group, attention="reference")
        assert again.grad_fn is None
        del out, again
        group.pool._settle()
        assert group.pool.held == 0


# -- buffers


def test_a_buffer_returns_when_its_last_tensor_is_gone_and_not_before():
    pool = Pool()
    cpu = torch.device("cpu")
    first = pool.take((1000, 3), torch.float32, cpu)
    pointer, view = first.data_ptr(), first[5:].transpose(0, 1)
    assert first.is_contiguous() and not first._is_view() and pool.held == size_class(12000)
    del first
    gc.collect()
    assert pool.take((1000, 3), torch.float32, cpu).data_ptr() != pointer, "a view still holds it"
    del view
    assert pool.take((1500, 2), torch.float32, cpu).data_ptr() == pointer, "it is free now"


def test_the_pool_keeps_no_more_than_twice_what_was_needed_at_once():
    """And gives up the sizes that were not asked for the longest."""
    pool, cpu = Pool(), torch.device("cpu")
    sizes = range(1 << 16, 1 << 20, 1 << 16)
    for size in sizes:
        pool.take((size,), torch.uint8, cpu)
    pool._settle()
    assert size_class(1 << 20) < pool.free <= 2 * size_class(1 << 20)
    free = pool.free
    for _ in range(3):
        pool.take((sizes[-1],), torch.uint8, cpu)
        pool._settle()
        assert pool.free == free
    assert size_class(sizes[0]) not in pool._blocks and size_class(sizes[-2]) in pool._blocks


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 100_000, 2**20, 2**20 + 1, 10**9])
def test_size_classes_waste_at_most_an_eighth(size):
    assert size <= size_class(size) <= max(4096, size * 1.13 + 4096)
    assert size_class(size_class(size)) == size_class(size)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
def test_two_layers_keep_their_buffers_until_their_own_backward(order):
    """A buffer that went back too early would be filled by the other layer, and the gradients would be its."""
    cases = [Case((64, 64), 2, 2, dim=32, value_dim=32, batch=1, seed=seed, dtype="fp64") for seed in (1, 2)]

    def layers(group):
        graphs = []
        for case in cases:
            inputs = whole_inputs(case)
            part = slice(64 * group.rank, 64 * group.rank + 64)
            leaves = [inputs[n][:, part].clone().requires_grad_() for n in ("q", "k", "v")]
            graphs.append((ulysses_attention(*leaves, group, causal=True), leaves, inputs["dout"][:, part]))
            with torch.no_grad():  # frees its buffers at once, and asks for ones of the same size
                ulysses_attention(*(torch.randn_like(t) for t in leaves), group, causal=True)
        found = {}
        for which in order:
            out, leaves, dout = graphs[which]
            once = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            twice = torch.autograd.grad(out, leaves, dout)
            assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True)), "retain_graph"
            found[which] = once
        return found

    results = run_virtual(2, layers)
    for which, case in enumerate(cases):
        expected = truth(case)
        for i, name in enumerate(("dq", "dk", "dv")):
            got = torch.cat([result[which][i] for result in results], dim=1)
            torch.testing.assert_close(got, expected[name], rtol=1e-10, atol=1e-12)


def test_backward_frees_the_workspace_and_training_takes_no_new_memory():
    case = Case((300,), 4, 2, dim=32, value_dim=32)
    with UlyssesGroup() as group:
        for _ in range(3):
            run(case, 0, group)
        group.pool._settle()
        assert group.pool.held == 0
        free = group.pool.free
        for _ in range(3):
            run(case, 0, group)
        group.pool._settle()
        assert group.pool.free == free and group.pool.held == 0


def test_backward_of_backward_is_an_error():
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(ulysses_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd formula|does not require grad"):
        grad.sum().backward()


# -- the group as a value


def test_copies_share_the_group_and_pickles_are_refused():
    with UlyssesGroup() as group:
        assert copy.deepcopy(torch.nn.ModuleDict()) is not None and copy.deepcopy({"group": group})["group"] is group
        with pytest.raises(GroupError, match="pickled"):
            pickle.dumps(group)


def test_a_closed_group_says_so():
    with UlyssesGroup() as group:
        pass
    group.close()
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(GroupError, match="closed"):
        ulysses_attention(q, q, q, group)
    with pytest.raises(GroupError, match="closed"):
        group.check()


def test_explain_says_what_was_chosen():
    with UlyssesGroup() as group:
        q = torch.randn(1, 4, 2, 8)
        ulysses_attention(q, q, q, group, attention="reference")
        text = group.explain()
    assert "attention: reference (asked for)" in text and "query heads 0..1" in text and "exchange: virtual" in text
