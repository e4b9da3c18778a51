"""torch.compile: whole graphs, with and without activation checkpointing, dynamic shapes, and the on-disk cache."""

from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import triton
import triton.language as tl
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ulysses_triton import UlyssesGroup, executor, masks, op, ulysses_attention, ulysses_qkv_attention
from ulysses_triton.call import SCHEMA

ROOT = Path(__file__).parent.parent
HEADS, KV_HEADS, DIM = 4, 2, 16


@pytest.fixture(autouse=True)
def fresh_compiler(tmp_path, monkeypatch):
    """No graph of an earlier test or version, neither in memory nor on disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()


class Block(nn.Module):
    """A transformer layer's attention half, through either entry point."""

    def __init__(self, group, *, fused: bool, attention: str = "reference") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.group, self.fused, self.attention = group, fused, attention
        self.norm = nn.RMSNorm(32)
        self.qkv = nn.Linear(32, (HEADS + 2 * KV_HEADS) * DIM)
        self.out = nn.Linear(HEADS * DIM, 32)
        self.q_norm = nn.Parameter(torch.ones(DIM))

    def forward(self, x: torch.Tensor, **given) -> torch.Tensor:
        qkv = self.qkv(self.norm(x))
        if self.fused:
            options = {"heads": HEADS, "kv_heads": KV_HEADS, "q_norm": self.q_norm, "k_norm": self.q_norm}
            attended = ulysses_qkv_attention(qkv, self.group, causal=True, attention=self.attention, **options, **given)
        else:
            q, k, v = op.split_qkv(qkv, HEADS, KV_HEADS)
            attended = ulysses_attention(q, k, v, self.group, causal=True, attention=self.attention, **given)
        return x + self.out(attended.flatten(2)).tanh()


class Model(nn.Module):
    def __init__(self, group, *, checkpointing: bool = False, context_fn=None, **options) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(group, **options) for _ in range(2))
        self.checkpointing = checkpointing
        self.options = {"context_fn": context_fn} if context_fn else {}

    def forward(self, x: torch.Tensor, **given) -> torch.Tensor:
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=False, **self.options, **given)
                if self.checkpointing
                else block(x, **given)
            )
        return x


def gradients(model, run, x, **given):
    x = x.clone().requires_grad_()
    out = run(x, **given)
    wanted = [
        x,
        *(t for t in given.values() if isinstance(t, torch.Tensor) and t.requires_grad),
        *(p for n, p in model.named_parameters() if model.blocks[0].fused or "q_norm" not in n),
    ]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]


def hold_compiled(group, backend, fused, checkpointing, batch=2):
    model = Model(group, fused=fused, checkpointing=checkpointing)
    x = torch.randn(batch, 12, 32, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for got, expected in zip(gradients(model, compiled, x), gradients(model, model, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("fused", [False, True], ids=["q, k, v", "fused"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_model_is_one_graph(backend, fused, checkpointing):
    with UlyssesGroup() as group:
        hold_compiled(group, backend, fused, checkpointing)


@masks.register
@triton.jit
def every_other(batch, head, q_pos, kv_pos, step_ptr):
    return (q_pos - kv_pos) % tl.load(step_ptr) == 0


OPTIONS = {
    "segment_ids": lambda: {"segment_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]] * 2)},
    "cu_seqlens": lambda: {"cu_seqlens": torch.tensor([0, 5, 5, 12])},
    "cu_seqlens as ints": lambda: {"cu_seqlens": (0, 5, 5, 12)},
    "sinks and slopes": lambda: {
        "sinks": torch.randn(HEADS, requires_grad=True), "alibi_slopes": torch.rand(HEADS, requires_grad=True)
    },
    "dropout with a seed": lambda: {"dropout_p": 0.3, "dropout_seed": 11},
    "predicate": lambda: {"mask": (every_other, torch.tensor([2]))},
    "block mask": lambda: {"mask": masks.block_mask((every_other, torch.tensor([3])), q_len=12)},
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_in_the_graph(name, checkpointing):
    given = OPTIONS[name]()
    x = torch.randn(1 if "cu_seqlens" in name else 2, 12, 32, generator=torch.Generator().manual_seed(1))
    with UlyssesGroup() as group:
        model = Model(group, fused=False, checkpointing=checkpointing)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        pairs = zip(gradients(model, compiled, x, **given), gradients(model, model, x, **given), strict=True)
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_drawn_dropout_is_the_same_when_activations_are_computed_again(compiled):
    """Under checkpointing the seed is drawn twice: a gradient of other drops than the loss's would not be one."""
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(1))
    with UlyssesGroup() as group:
        found = []
        for checkpointing in (False, True):
            model = Model(group, fused=False, checkpointing=checkpointing)
            run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
            torch.manual_seed(5)
            found.append(gradients(model, run, x, dropout_p=0.5))
            torch.manual_seed(6)
            other = gradients(model, run, x, dropout_p=0.5)
            assert not torch.equal(other[0], found[-1][0])
        for plain, again in zip(*found, strict=True):
            torch.testing.assert_close(plain, again)


def test_chunks_are_in_the_graph():
    with UlyssesGroup(chunks=3) as group:
        hold_compiled(group, "inductor", fused=True, checkpointing=True)


class Projected(Block):
    """The same block in one call with its projections."""

    def forward(self, x: torch.Tensor, **given) -> torch.Tensor:
        options = {"heads": HEADS, "kv_heads": KV_HEADS, "q_norm": self.q_norm, "k_norm": self.q_norm}
        options |= {"weight": self.qkv.weight, "bias": self.qkv.bias}
        options |= {"out_weight": self.out.weight, "out_bias": self.out.bias}
        return (
            x
            + ulysses_qkv_attention(
                self.norm(x), self.group, causal=True, attention=self.attention, **options, **given
            ).tanh()
        )


@pytest.mark.parametrize(("checkpointing", "dynamic"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_projections_are_in_the_graph(backend, checkpointing, dynamic):
    with UlyssesGroup(chunks=2) as group:
        model, apart = (Model(group, fused=True, checkpointing=checkpointing) for _ in range(2))
        for i, block in enumerate(model.blocks):
            model.blocks[i] = Projected(group, fused=True)
            model.blocks[i].load_state_dict(block.state_dict())
        x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
        for got, expected in zip(gradients(model, compiled, x), gradients(apart, apart, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_default_group_is_found_while_tracing(backend):
    hold_compiled(None, backend, fused=True, checkpointing=False)


def compiled_on_a_process(ctx, backend, checkpointing, cache):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/{ctx.rank}"
    torch._dynamo.reset()
    hold_compiled(ctx.group, backend, True, checkpointing)
    with UlyssesGroup(ctx.group) as group:
        torch._dynamo.reset()
        hold_compiled(group, backend, False, checkpointing)
    return True


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_model_is_one_graph_on_two_processes(pool, checkpointing, tmp_path):
    assert pool.run(2, compiled_on_a_process, "aot_eager", checkpointing, str(tmp_path)) == [True, True]


@pytest.mark.slow
def test_inductor_on_two_processes(pool, tmp_path):
    assert pool.run(2, compiled_on_a_process, "inductor", False, str(tmp_path)) == [True, True]


def save_the_op(ctx, function, *args, **kwargs):
    ours = function == torch.ops.ulysses_triton.attention.default
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("selective", [False, True], ids=["recompute all", "save the op"])
def test_a_selective_policy_runs_the_forward_of_the_op_once(monkeypatch, compiled, selective):
    calls, original = [], executor.forward
    monkeypatch.setattr(executor, "forward", lambda *args: calls.append(1) or original(*args))
    context_fn = partial(create_selective_checkpoint_contexts, save_the_op) if selective else None
    with UlyssesGroup() as group:
        model = Model(group, fused=False, checkpointing=True, context_fn=context_fn)
        x = torch.randn(1, 10, 32)
        expected = gradients(model, Model.forward.__get__(model), x)
        calls.clear()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        got = gradients(model, run, x)
    assert len(calls) == (2 if selective else 4), "two layers"
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [1, 4])
def test_dynamic_shapes_need_no_other_graph(chunks):
    with UlyssesGroup(chunks=chunks) as group:
        model = Model(group, fused=False)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        graphs = set()
        for tokens in (12, 19, 40):
            x = torch.randn(3, tokens, 32)
            for got, expected in zip(gradients(model, compiled, x), gradients(model, model, x), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            graphs.add(counter.frame_count)
        assert len(graphs) == 1, "the first shape's graphs serve the others"


FLOATS = {"scale": 0.3, "softcap": 3.0, "dropout_p": 0.5, "norm_eps": 1e-3}


@pytest.mark.parametrize("given", [{}, FLOATS], ids=["defaults", "floats"])
@pytest.mark.parametrize("fused", [False, True], ids=["q, k, v", "qkv"])
def test_checkpointed_layers_share_floats_in_a_graph_of_dynamic_shapes(fused, given):
    """Two layers of one number: the graph of the second cannot use what the first one made of it."""
    given = {name: value for name, value in given.items() if fused or name != "norm_eps"}
    with UlyssesGroup() as group:
        model = Model(group, fused=fused, checkpointing=True)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        for tokens in (12, 19):
            x, found = torch.randn(3, tokens, 32), []
            for run in (compiled, model):
                torch.manual_seed(5)
                found.append(gradients(model, run, x, **given))
            for got, expected in zip(*found, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# -- the on-disk cache of compiled graphs

CACHED = """
import sys, torch
from ulysses_triton import UlyssesGroup, op, ulysses_attention
abi, factor = int(sys.argv[1]), float(sys.argv[2])
op.ABI = abi
original = op.executor.backward
backward = op._backward
def changed(ctx, dout, dlse, rows):
    return backward(ctx, dout * factor, dlse, rows)
op.attention.register_autograd(changed, setup_context=op._setup_context)
q = torch.ones(1, 8, 2, 16, requires_grad=True)
v = torch.arange(256.0).view(1, 8, 2, 16).requires_grad_()
with UlyssesGroup() as group:
    out = torch.compile(lambda v: ulysses_attention(q, q, v, group, attention="reference").sin())(v)
    print(torch.autograd.grad(out.sum(), v)[0].norm().item())
"""


def test_a_new_abi_never_meets_the_backward_of_an_old_one(tmp_path):
    """A later version of the op, here one with twice the gradient, in the cache directory of an earlier one."""

    def norm(abi: int, factor: float) -> float:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-c", CACHED, str(abi), str(factor)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    first = norm(abi=1, factor=1.0)
    assert norm(abi=1, factor=1.0) == first
    assert norm(abi=2, factor=2.0) == pytest.approx(2 * first, rel=1e-6)


# What the backward of each ABI is: its source, the schemas, and the layout of the workspace.
FINGERPRINTS = {1: "3b995de24b784f88"}


def test_a_changed_backward_has_a_new_abi():
    """When this fails, bump `op.ABI` if a released version had the old one, and write the new fingerprint here."""
    sources = [op._setup_context, op._backward, op.attention_backward._init_fn, op.like_inputs, executor.workspace]
    sources += [op.input_grads, op.around_grads]
    text = SCHEMA + "".join(inspect.getsource(source) for source in sources)
    assert FINGERPRINTS[op.ABI] == hashlib.sha256(text.encode()).hexdigest()[:16]
    for name in ("attention", "attention_backward"):
        schema = getattr(torch.ops.ulysses_triton, name).default._schema
        assert schema.arguments[-1].name == "abi"
