"""A layer that projects: against F.linear, single-device attention and F.linear in fp64, outputs and all gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import fake_nccl
import fake_symm
import layer
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_triton import (
    DtypeError,
    OptionError,
    ShapeError,
    UlyssesGroup,
    projection,
    run_virtual,
    trace,
    ulysses_qkv_attention,
)
from ulysses_triton.projection import split_qkv
from ulysses_triton.timeline import Timeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
LEAVES = ("x", "weight", "bias", "out_weight", "out_bias", "q_norm", "k_norm", "sinks")
TOLERANCE = {"fp32": 5e-6, "fp64": 1e-12}  # relative, by norm


@dataclass(frozen=True)
class Case:
    """`given` are the tensors beside the first one; without "weight" that is qkv."""

    lens: tuple[int, ...]
    heads: int
    kv_heads: int
    given: tuple[str, ...] = ("weight", "bias", "out_weight", "out_bias")
    dim: int = 16
    features: int = 24
    out_features: int = 20
    batch: int = 2
    dtype: str = "fp32"
    attention: Any = "reference"
    rope: bool = False
    recompute: str | None = None
    return_lse: bool = False
    chunks: int = 1

    @property
    def ranks(self) -> int:
        return len(self.lens)

    @property
    def uncut(self) -> Case:
        return replace(self, lens=(sum(self.lens),), chunks=1)


def drawn(case: Case) -> dict[str, Tensor]:
    """All leaves for the whole sequence, and the gradients of out and lse."""
    random = torch.Generator().manual_seed(len(case.lens) + case.heads)
    rows, tokens = (case.heads + 2 * case.kv_heads) * case.dim, sum(case.lens)
    sizes = {
        "x": (case.batch, tokens, case.features if "weight" in case.given else rows),
        "weight": (rows, case.features),
        "bias": (rows,),
        "out_weight": (case.out_features, case.heads * case.dim),
        "out_bias": (case.out_features,),
        "q_norm": (case.dim,),
        "k_norm": (case.dim,),
        "sinks": (case.heads,),
    }
    ends = (case.out_features,) if "out_weight" in case.given else (case.heads, case.dim)
    grads = {"dout": (case.batch, tokens, *ends), "dlse": (case.batch, tokens, case.heads)}
    found = {}
    for name, size in {**sizes, **grads}.items():
        if name in ("x", "dout", "dlse") or name in case.given:
            value = torch.randn(size, generator=random, dtype=torch.float64)
            value = value / size[-1] ** 0.5 if name.endswith("weight") else value
            found[name] = (1 + value / 4 if name.endswith("norm") else value).to(DTYPES[case.dtype])
    return found


def angles(case: Case) -> Tensor:
    return torch.arange(sum(case.lens), dtype=torch.float64)[:, None] / 10 ** torch.arange(case.dim // 2)


def on_one_device(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The truth in fp64; or by PyTorch in another dtype, for the error that it makes itself."""
    inputs = {name: t.to(dtype) for name, t in drawn(case).items()}
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if name in LEAVES}
    get = leaves.get
    qkv = leaves["x"] if "weight" not in case.given else F.linear(leaves["x"], leaves["weight"], get("bias"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = split_qkv(qkv, case.heads, case.kv_heads)
    turn = angles(case).to(wide) if case.rope else None
    q, k = (
        oracle.rope(oracle.rms_norm(t.to(wide), w if w is None else w.to(wide), 1e-6), turn, False).to(dtype)
        for t, w in ((q, get("q_norm")), (k, get("k_norm")))
    )
    kept = oracle.allowed(q.size(1), k.size(1), causal=True)
    sinks = get("sinks")
    out, lse = oracle.attention(
        q.to(wide), k.to(wide), v.to(wide), kept=kept, sinks=sinks if sinks is None else sinks.to(wide)
    )
    out = out.to(dtype)
    if "out_weight" in case.given:
        out = F.linear(out.flatten(2), leaves["out_weight"], get("out_bias"))
    total = (out * inputs["dout"]).sum() + (case.return_lse * lse * inputs["dlse"]).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, grads, strict=True))


def on_a_rank(case: Case, rank: int, group: Any) -> dict[str, Tensor]:
    inputs = drawn(case)
    part = slice(sum(case.lens[:rank]), sum(case.lens[: rank + 1]))
    for name in ("x", "dout", "dlse"):
        inputs[name] = inputs[name][:, part]
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items() if name in LEAVES}
    turn = angles(case)[part]
    turn = turn if case.dtype == "fp64" else turn.float()
    options = {name: t for name, t in leaves.items() if name != "x"}
    if case.recompute or case.return_lse:
        options |= {"recompute": case.recompute, "return_lse": case.return_lse}
    result = ulysses_qkv_attention(
        leaves["x"], group, heads=case.heads, kv_heads=case.kv_heads, causal=True, attention=case.attention,
        rope=(turn.cos(), turn.sin()) if case.rope else None, lens=case.lens if len(set(case.lens)) > 1 else None,
        **options,
    )  # fmt: skip
    results = result if case.return_lse else (result,)
    dout = [inputs[name].to(t.dtype) for name, t in zip(("dout", "dlse"), results, strict=False)]
    grads = torch.autograd.grad(results, list(leaves.values()), dout)
    found = dict(zip(("out", "lse"), (t.detach() for t in results), strict=False))
    return found | dict(zip(leaves, grads, strict=True))


def check(case: Case, results: list[dict[str, Tensor]]) -> None:
    truth = on_one_device(case, torch.float64)
    peer = on_one_device(case, DTYPES[case.dtype]) if case.dtype == "bf16" else {}
    for name in results[0]:
        parts = [result[name] for result in results]
        assert all(part.dtype == DTYPES[case.dtype] or name == "lse" for part in parts)
        whole = torch.cat(parts, 1) if name in ("x", "out", "lse") else sum(part.double() for part in parts)
        assert whole.shape == truth[name].shape, name
        error = oracle.relative_error(whole, truth[name])
        if case.dtype == "bf16":
            assert error <= 2 * oracle.relative_error(peer[name], truth[name]) + layer.FLOOR, name
        else:
            assert error <= TOLERANCE[case.dtype], name


def virtually(case: Case) -> list[dict[str, Tensor]]:
    return run_virtual(case.ranks, lambda group: on_a_rank(case, group.rank, group), chunks=case.chunks)


def on_a_process(ctx: Any, case: Case, exchange: str = "torch") -> dict[str, Tensor]:
    with UlyssesGroup(ctx.group, exchange=exchange, chunks=case.chunks) as group:
        return on_a_rank(case, ctx.rank, group)


EVERYTHING = ("weight", "bias", "out_weight", "out_bias", "q_norm", "k_norm", "sinks")
CASES = {
    "plain": Case((7, 7), 4, 4),
    "fp64": Case((7, 7), 4, 4, dtype="fp64"),
    "grouped": Case((9, 9), 12, 6),
    "grouped, all": Case((8, 8), 12, 4, EVERYTHING, rope=True, return_lse=True),
    "one kv head": Case((5, 5), 12, 1, EVERYTHING, rope=True),
    "kv heads in other chunks": Case((5, 5), 6, 3, return_lse=True),
    "uneven": Case((11, 3), 6, 2, EVERYTHING, rope=True, return_lse=True),
    "a rank without tokens": Case((6, 0), 6, 6, return_lse=True),
    "without biases": Case((6, 6), 6, 3, ("weight", "out_weight")),
    "only in": Case((6, 6), 6, 3, ("weight", "bias", "q_norm"), return_lse=True),
    "only out": Case((6, 6), 6, 3, ("out_weight", "out_bias", "k_norm"), return_lse=True),
    "bf16": Case((16, 20), 6, 3, EVERYTHING, dtype="bf16", rope=True, features=64, out_features=48),
    "bf16, one kv head": Case((16, 20), 6, 1, dtype="bf16", features=64, out_features=48),
    "odd head dim": Case((6, 6), 6, 2, EVERYTHING, dim=18, rope=True),
}
ON_EVERY = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@pytest.mark.parametrize("recompute", [None, "exchange"], ids=["kept", "recompute"])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@ON_EVERY
def test_virtual_ranks_equal_one_device(case, chunks, recompute):
    case = replace(case, chunks=chunks, recompute=recompute)
    check(case, virtually(case))
    check(case.uncut, virtually(replace(case.uncut, chunks=chunks)))


@pytest.mark.parametrize("chunks", [1, 2])
@ON_EVERY
def test_three_virtual_ranks_equal_one_device(case, chunks):
    total = sum(case.lens)
    case = replace(case, lens=(4, total - 5, 1), heads=2 * case.heads if case.heads % 3 else case.heads, chunks=chunks)
    case = case if case.heads % 3 == 0 else replace(case, heads=6, kv_heads=6)
    check(case, virtually(case))


@pytest.mark.parametrize("exchange", ["torch", "shm"])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@ON_EVERY
def test_processes_equal_one_device(pool, case, chunks, exchange):
    case = replace(case, chunks=chunks)
    check(case, pool.run(2, on_a_process, case, exchange))


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("recompute", [None, "exchange"], ids=["kept", "recompute"])
@pytest.mark.parametrize("attention", ["aten", "triton"])
def test_other_kernels(pool, attention, recompute, chunks):
    given = EVERYTHING[:6] if attention == "aten" else EVERYTHING
    case = Case((9, 6), 4, 2, given, attention=attention, rope=True, recompute=recompute, chunks=chunks)
    check(case, virtually(case))
    check(case, pool.run(2, on_a_process, case))


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("recompute", [None, "exchange"], ids=["kept", "recompute"])
@pytest.mark.parametrize("run", [fake_nccl.run, partial(fake_symm.run, step=8192)], ids=["nccl", "symm"])
def test_fakes_of_the_exchanges_of_gpus(run, recompute, chunks):
    """Several layers, as later ones use the buffers of the first ones."""
    case = Case((7, 5), 6, 3, EVERYTHING, rope=True, return_lse=True, recompute=recompute)

    def layers(group: UlyssesGroup) -> list[dict[str, Tensor]]:
        group.chunks = chunks
        return [on_a_rank(case, group.rank, group) for _ in range(3)]

    for results in zip(*run(2, layers), strict=True):
        check(case, list(results))


def plain(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, sinks: Tensor | None = None) -> Tensor:
    return oracle.attention(q, k, v, kept=oracle.allowed(q.size(1), k.size(1), causal=causal), sinks=sinks)[0]


@pytest.mark.parametrize("given", [EVERYTHING, ("weight",), ("out_weight", "out_bias")], ids=["all", "in", "out"])
def test_a_callable_is_projected_around(given):
    case = Case((5, 7), 4, 2, given, attention=plain, chunks=2)
    check(case, virtually(case))


def test_strided_inputs():
    case = Case((6, 6), 4, 2, dtype="fp64")

    def work(group: UlyssesGroup) -> list[Tensor]:
        inputs = drawn(case)
        x = inputs["x"][:, 6 * group.rank : 6 * group.rank + 6]
        options = {"weight": inputs["weight"].t().contiguous().t(), "out_weight": inputs["out_weight"][:, :]}
        found = []
        for given in (x.contiguous(), x.transpose(0, 1).contiguous().transpose(0, 1), F.pad(x, (1, 2))[..., 1:-2]):
            leaf = given.detach().requires_grad_()
            out = ulysses_qkv_attention(leaf, group, heads=4, kv_heads=2, **options)
            dout = torch.ones((), dtype=out.dtype).expand_as(out)
            found += [out.detach(), *torch.autograd.grad(out, leaf, dout)]
        return found

    for found in run_virtual(2, work, chunks=2):
        for i in (2, 4):
            torch.testing.assert_close(found[i : i + 2], found[:2])


# -- what is computed and kept


@pytest.mark.parametrize("frozen", LEAVES[:5])
def test_only_gradients_that_are_asked_for_are_made(frozen):
    case = Case((8,), 4, 2)
    with UlyssesGroup(chunks=2) as group:
        leaves = {n: t.requires_grad_(n != frozen) for n, t in drawn(case).items() if n in LEAVES}
        options = {name: t for name, t in leaves.items() if name != "x"}
        out = ulysses_qkv_attention(leaves["x"], group, heads=4, kv_heads=2, causal=True, **options)
        out.backward(drawn(case)["dout"])
    truth = on_one_device(case, torch.float64)
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name == frozen)
        assert name == frozen or oracle.relative_error(leaf.grad, truth[name]) < TOLERANCE["fp32"]


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "QK-norm"])
def test_x_and_o_are_kept_and_qkv_is_not(norm):
    tokens, heads, kv_heads, dim = 40, 4, 2, 32
    given = {"weight": (256, 64), "out_weight": (64, 128)} | ({"q_norm": (32,), "k_norm": (32,)} if norm else {})
    weights = {name: torch.randn(size, requires_grad=True) for name, size in given.items()}
    x, storages = torch.randn(1, tokens, 64, requires_grad=True), {}

    def note(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with UlyssesGroup() as group, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = ulysses_qkv_attention(x, group, heads=heads, kv_heads=kv_heads, attention="reference", **weights)
        for t in (x, *weights.values()):
            storages.pop(t.untyped_storage().data_ptr(), None)
        assert out.untyped_storage().data_ptr() not in storages
    rows, lse, o = (heads + 2 * kv_heads) * dim * 4, heads * 4, heads * dim * 4
    assert sum(storages.values()) == tokens * (rows + lse + o)


# -- mistakes


def refused(kind: type[Exception], match: str, **changes: Any) -> None:
    """On both ranks, though only rank 1 gives what is wrong."""
    inputs = {"x": torch.randn(1, 4, 24), "weight": torch.randn(128, 24), "out_weight": torch.randn(20, 64)}

    def work(group: UlyssesGroup) -> None:
        given = inputs | (changes if group.rank else {})
        x = given.pop("x")
        with pytest.raises(kind, match=match):
            ulysses_qkv_attention(x, group, heads=4, kv_heads=2, **given)

    run_virtual(2, work)


def test_mistakes_are_refused_on_every_rank():
    refused(ShapeError, r"weight has shape \[128, 23\].*E = 24", weight=torch.randn(128, 23))
    refused(ShapeError, "weight has shape", weight=torch.randn(128))
    refused(ShapeError, "weight has shape", weight=torch.randn(()))
    refused(ShapeError, "the projected x has 127 channels", weight=torch.randn(127, 24))
    refused(ShapeError, r"x has shape \[4, 24\]|q has shape \[4, 24\]", x=torch.randn(4, 24))
    refused(ShapeError, r"bias has shape \[5\]", bias=torch.randn(5))
    refused(ShapeError, "out_weight has shape.*4 x 16 = 64", out_weight=torch.randn(20, 48))
    refused(ShapeError, r"out_bias has shape \[64\]", out_bias=torch.randn(64))
    refused(DtypeError, "x has dtype torch.float32 and weight has torch.float16", weight=torch.randn(128, 24).half())
    refused(DtypeError, "out_bias has torch.float64", out_bias=torch.randn(20).double())
    refused(DtypeError, "weight is a list", weight=[1.0])
    refused(OptionError, "bias is given without weight", x=torch.randn(1, 4, 128), weight=None, bias=torch.randn(128))
    refused(OptionError, "out_bias is given without out_weight", out_weight=None, out_bias=torch.randn(20))
    refused(ShapeError, "weight has shape", attention=plain, weight=torch.randn(128, 23))


def test_ranks_that_project_differently_are_told():
    refused(ShapeError, "out_features: rank 0 has 20, rank 1 has 21", out_weight=torch.randn(21, 64))
    refused(ShapeError, "bias: rank 0 has False, rank 1 has True", bias=torch.randn(128))
    refused(ShapeError, "features: rank 0 has 24, rank 1 has None", x=torch.randn(1, 4, 128), weight=None)


# -- overlap

TRAVEL, PRODUCT = 0.2, 0.1  # seconds: of rows, and of a projection


class Slow:
    """An exchange whose rows take TRAVEL from the start of their hop."""

    def __init__(self, exchange: Any) -> None:
        self.exchange, self.name, self.one_sided = exchange, exchange.name, exchange.one_sided

    def open(self, *args: Any) -> Any:
        return SlowHop(self.exchange.open(*args))

    def close(self) -> None:
        self.exchange.close()


class SlowHop:
    def __init__(self, hop: Any) -> None:
        self.hop, self.blocks, self.peers = hop, hop.blocks, hop.peers

    def start(self) -> None:
        self.hop.start()
        self.until = time.perf_counter() + TRAVEL

    def finish(self) -> None:
        self.hop.finish()
        time.sleep(max(0.0, self.until - time.perf_counter()))


def slowly(group: UlyssesGroup, rank: int) -> None:
    group.exchange = Slow(group.exchange)
    on_a_rank(Case((8, 8), 8, 8), rank, group)


def traced_on_a_process(ctx: Any, chunks: int) -> Timeline:
    with slow_products(), UlyssesGroup(ctx.group, exchange="torch", chunks=chunks) as group, trace() as t:
        slowly(group, ctx.rank)
    return t


@contextmanager
def slow_products() -> Iterator[None]:
    slow = {name: mock.Mock(side_effect=_delayed(getattr(projection, name))) for name in ("qkv", "fold")}
    with mock.patch.multiple(projection, **slow):
        yield


def _delayed(function: Callable[..., Any]) -> Callable[..., Any]:
    def late(*args: Any, **options: Any) -> Any:
        time.sleep(PRODUCT)
        return function(*args, **options)

    return late


@pytest.mark.parametrize("one_sided", [True, False], ids=["one-sided", "collective"])
def test_projections_run_while_rows_travel(pool, one_sided):
    """A chunk's projection under the rows of the one before, that of its output under those of the next."""
    chunks = 3
    if one_sided:
        with slow_products(), trace() as t:
            run_virtual(2, lambda group: slowly(group, group.rank), chunks=chunks)
        found = [t.of(rank) for rank in range(2)]
    else:
        found = pool.run(2, traced_on_a_process, chunks)
    for rank in found:
        events = {(e.step, e.chunk): e for e in rank.events}
        hidden = [(("project", c + 1), ("exchange_in", c)) for c in range(chunks - 1)]
        hidden += [(("project_out", c), ("exchange_out", c + 1)) for c in range(chunks - 1)]
        for product, exchange in hidden:
            inside, around = events[product], events[exchange]
            assert around.start <= inside.start and inside.end <= around.end
            assert around.seconds >= TRAVEL and around.exposed <= TRAVEL - PRODUCT / 2, "waits for what is left"
        weights, first = events["project_out_weight_grad", 0], events["exchange_grad_in", 0]
        assert first.start <= weights.start and weights.end <= first.end
