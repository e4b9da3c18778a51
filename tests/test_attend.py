"""The attention kernels and their twins against fp64, and against each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import oracle
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from oracle import allowed, relative_error
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ulysses_triton.kernels import (
    _blocks,
    _config,
    _documents,
    _dropout,
    _mask,
    _options,
    _reference_attend,
    _rows,
    _scores,
    attend_backward,
    attend_forward,
    reference,
)
from ulysses_triton.kernels._views import Dropout, HeadGrads, HeadMap, Options, Part, Predicate, Span

KERNELS = (attend_forward.attend_forward, attend_backward.attend_backward)
TWINS = (reference.attend_forward, reference.attend_backward)
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One problem, and how its tensors lie in memory."""

    S: int = 70
    Sk: int = 70
    B: int = 1
    hq: int = 2
    group: int = 1
    offset: int = 0
    D: int = 64
    Dv: int = 64
    causal: bool = True
    dtype: torch.dtype = torch.float32
    scale: float = 0.2
    cuts: tuple[int, ...] = ()  # where a span of queries ends and the next begins
    key_cuts: tuple[int, ...] = ()
    aligned: bool = True
    partial: bool = False  # dk and dv in fp32
    window: tuple[int, int] | None = None
    softcap: float | None = None
    documents: str | None = None  # "runs" of tokens, also of none and of one; or "mixed", with padding in between
    sinks: bool = False
    slopes: bool = False
    dropout: float = 0.0
    predicate: str | None = None
    listed: bool = False  # tiles come from lists of blocks
    seed: int = 0

    @property
    def hkv(self) -> int:
        return (self.hq - 1 + self.offset) // self.group + 1

    @property
    def first_head(self) -> int:
        """The model's number of the first local query head."""
        return FIRST * self.group + self.offset

    def ids(self) -> tuple[Tensor, Tensor] | None:
        """The documents' numbers, `[B, S]` and `[B, Sk]`; the same where queries and keys are of one length."""
        if self.documents is None:
            return None
        g = torch.Generator().manual_seed(self.seed)
        q, k = (torch.randint(-1, 4, (self.B, n), generator=g) for n in (self.S, self.Sk))
        if self.documents == "runs":
            q, k = (x.clamp(min=0).sort(1).values * 7 for x in (q, k))
        return q, q if self.S == self.Sk else k

    def per_head(self) -> tuple[Tensor | None, Tensor | None]:
        """Sinks and slopes `[hq]`."""
        g = torch.Generator().manual_seed(self.seed + 1)
        sinks, slopes = torch.randn(self.hq, generator=g), torch.rand(self.hq, generator=g) / 8
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return sinks.to(wide) if self.sinks else None, slopes.to(wide) if self.slopes else None

    @property
    def options(self) -> Options:
        return self.options_of(None)

    def options_of(self, queries: range | None) -> Options:
        """Those of a call on some of the queries, or on all."""
        ids, (sinks, slopes) = self.ids(), self.per_head()
        found = Options(
            self.scale, self.causal, HeadMap(self.group, self.first_head), self.window, self.softcap,
            None if ids is None else _documents.documents(*ids), sinks, slopes,
            Dropout(self.dropout, SEED) if self.dropout else None,
            None if self.predicate is None else PREDICATES[self.predicate],
            part=None if queries is None else Part(queries.start, self.S, self.Sk),
        )  # fmt: skip
        if not self.listed:
            return found
        batch, heads = self.B, self.hq + found.heads.first
        status = found.predicate and _blocks.status(found.predicate, batch, heads, self.S, self.Sk, torch.device("cpu"))
        status = None if status is None else status[:, found.heads.first :]
        left = _blocks.combine(status, found, self.S, self.Sk)
        left = left if queries is None else _blocks.within(left, queries)
        return found._replace(blocks=_blocks.lists(left, found.heads, self.hq, self.hkv))

    @property
    def kept(self) -> Tensor:
        """`[B or 1, hq or 1, S, Sk]`"""
        kept = allowed(self.S, self.Sk, causal=self.causal, window=self.window, documents=self.ids())
        kept = kept.unsqueeze(1) if self.documents else kept[None, None]
        if self.predicate is None:
            return kept
        b, h = torch.arange(self.B)[:, None, None, None], torch.arange(self.hq)[:, None, None]
        i, j = torch.arange(self.S)[:, None], torch.arange(self.Sk)
        return kept & ASKED[self.predicate](b, h + self.first_head, i, j)


FIRST = 2  # kv groups of the model ahead of the local heads
SEED = (1 << 40) + (1 << 31) + 12345
LENGTHS = torch.tensor([11, 3])


@triton.jit
def prefix(batch, head, q_pos, kv_pos, lengths_ptr):
    return (kv_pos <= q_pos) | (kv_pos < tl.load(lengths_ptr + batch))


@triton.jit
def woven(batch, head, q_pos, kv_pos):
    return ((q_pos + kv_pos + head) % 3 != 0) & (kv_pos // 16 != 1)


PREDICATES = {"prefix": Predicate(prefix, (LENGTHS,)), "woven": Predicate(woven)}
ASKED = {
    "prefix": lambda b, h, i, j: (j <= i) | (j < LENGTHS[b]),
    "woven": lambda b, h, i, j: ((i + j + h) % 3 != 0) & (j // 16 != 1),
}


class Memory:
    """Hands out views of rows that lie in NaN, and tells whether anything was written beside them."""

    def __init__(self, aligned: bool) -> None:
        self.aligned = aligned
        self.views: list[tuple[Tensor, Tensor]] = []

    def rows(self, n: int, B: int, heads: int, dim: int, dtype: torch.dtype, *, batch_gap: int = 0) -> Tensor:
        """A view `[n, B, heads, dim]`; of its strides, only the batch's depends on `batch_gap`, and none on n."""
        first, gap, each = (16, 16, (dim + 7) // 8 * 8) if self.aligned else (3, 5, dim)
        row = heads * each + gap
        token = B * (row + 64) + gap
        buffer = torch.full((first + n * token + gap,), math.nan, dtype=dtype)
        view = buffer.as_strided((n, B, heads, dim), (token, row + batch_gap, each, 1), first)
        self.views.append((buffer, view))
        return view

    def random(self, generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
        view = self.rows(*shape, dtype)
        view.copy_(torch.randn(shape, generator=generator, dtype=torch.float64))
        return view

    def assert_gaps_untouched(self) -> None:
        for buffer, view in self.views:
            assert buffer.isnan().logical_not().sum() == view.numel() and not view.isnan().any()


def spans_of(
    memory: Memory, tokens: int, cuts: tuple[int, ...], B: int, *views: tuple[int, int, torch.dtype]
) -> list[Span]:  # fmt: skip
    """A span between each two cuts, with views of (heads, dim, dtype); those of dim 0 lose it, as the LSE does."""
    spans = []
    for i, (start, stop) in enumerate(pairwise((0, *cuts, tokens))):
        made = [memory.rows(stop - start, B, h, d or 1, dtype, batch_gap=8 * i) for h, d, dtype in views]
        spans.append(Span(start, tuple(v if d else v[..., 0] for v, (_, d, _) in zip(made, views, strict=True))))
    return spans


def joined(spans: list[Span], view: int) -> Tensor:
    return torch.cat([span.views[view] for span in spans])


@dataclass(frozen=True)
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    truth: dict[str, Tensor]
    lse: Tensor  # [hq, B, S], in the precision of the math
    delta: Tensor  # [S, B, hq], strided


def attention_fp64(
    case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output `[S, B, hq, Dv]` and LSE `[S, B, hq]` by autograd's rules."""
    kv_head = torch.tensor([(h + case.offset) // case.group for h in range(case.hq)])
    bias = None
    if slopes is not None:
        bias = -slopes[:, None, None] * oracle.distances(case.S, case.Sk, case.ids()).unsqueeze(1)
    stay = None
    if case.dropout:
        heads = range(case.first_head, case.first_head + case.hq)
        stay = oracle.stays(case.dropout, SEED, case.B, heads, case.S, case.Sk)
    out, lse = oracle.attention(
        *(x.transpose(0, 1) for x in (q, k[:, :, kv_head], v[:, :, kv_head])), kept=case.kept, scale=case.scale,
        softcap=case.softcap, sinks=sinks, bias=bias, stay=stay, p=case.dropout,
    )  # fmt: skip
    return out.transpose(0, 1), lse.transpose(0, 1)


def problem(case: Case, memory: Memory) -> Problem:
    g = torch.Generator().manual_seed(case.seed)
    q = memory.random(g, case.S, case.B, case.hq, case.D, dtype=case.dtype)
    k = memory.random(g, case.Sk, case.B, case.hkv, case.D, dtype=case.dtype)
    v = memory.random(g, case.Sk, case.B, case.hkv, case.Dv, dtype=case.dtype)
    do = memory.random(g, case.S, case.B, case.hq, case.Dv, dtype=case.dtype)
    stat_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    dlse = torch.randn(case.S, case.B, case.hq, generator=g, dtype=torch.float64)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    per_head = [None if x is None else x.double().requires_grad_() for x in case.per_head()]
    out, lse = attention_fp64(case, *leaves, *per_head)
    asked = dict(zip((*NAMES[2:], "dsinks", "dslopes"), (*leaves, *per_head), strict=True))
    asked = {name: leaf for name, leaf in asked.items() if leaf is not None}
    if case.Sk:
        finite = lse.masked_fill(lse == -math.inf, 0.0)
        grads = torch.autograd.grad((out * do.double()).sum() + (finite * dlse).sum(), list(asked.values()))
    else:
        grads = tuple(torch.zeros_like(x) for x in asked.values())
        dlse.zero_()
    delta = memory.rows(case.S, case.B, case.hq, 1, stat_dtype)[..., 0]
    delta.copy_((out.detach() * do.double()).sum(-1) - dlse)
    truth = {"out": out.detach(), "lse": lse.detach()} | dict(zip(asked, grads, strict=True))
    return Problem(q, k, v, do, truth, lse.detach().permute(2, 1, 0).to(stat_dtype).contiguous(), delta)


def run(launchers, case: Case, p: Problem, memory: Memory) -> dict[str, Tensor]:
    """Forward and backward; the LSE comes twice, and both must be the same numbers."""
    forward, backward = launchers
    sums = torch.float32 if case.partial else case.dtype
    out = spans_of(memory, case.S, case.cuts, case.B, (case.hq, case.Dv, case.dtype), (case.hq, 0, p.lse.dtype))
    dq = spans_of(memory, case.S, case.cuts, case.B, (case.hq, case.D, case.dtype))
    dkv = spans_of(memory, case.Sk, case.key_cuts, case.B, (case.hkv, case.D, sums), (case.hkv, case.Dv, sums))
    lse = torch.full_like(p.lse, math.nan)
    options = case.options
    heads = HeadGrads(*(None if x is None else torch.full_like(x, math.nan) for x in case.per_head()))
    forward(p.q, p.k, p.v, out, lse, options)
    backward(p.q, p.k, p.v, p.do, p.lse, p.delta, dq, dkv, options, heads)
    assert torch.equal(lse.permute(2, 1, 0), joined(out, 1))
    results = (joined(out, 0), joined(out, 1), joined(dq, 0), joined(dkv, 0), joined(dkv, 1))
    found = dict(zip(NAMES, results, strict=True)) | {"dsinks": heads.sinks, "dslopes": heads.slopes}
    return {name: result for name, result in found.items() if result is not None}


def achieved_by_torch(case: Case, p: Problem) -> dict[str, float]:
    """Relative errors of PyTorch's SDPA in the case's dtype, without what it lacks: softcap, sinks, our dropout.

    Of sinks and slopes, which it has no gradients for, the error may be that of dq.
    """
    case = replace(case, softcap=None, sinks=False, dropout=0.0)
    kv_head = torch.tensor([(h + case.offset) // case.group for h in range(case.hq)])
    leaves = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v)]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (leaves[0], leaves[1][:, :, kv_head], leaves[2][:, :, kv_head]))
    slopes = case.per_head()[1]
    mask = case.kept
    if slopes is not None:
        mask = -slopes[:, None, None] * oracle.distances(case.S, case.Sk, case.ids()).unsqueeze(1)
        mask = mask.masked_fill(~case.kept, -math.inf).to(case.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(case.B, case.hq, -1, -1), scale=case.scale)
    grads = torch.autograd.grad(out, leaves, p.do.permute(1, 2, 0, 3))
    exact = [x.double().requires_grad_() for x in (p.q, p.k, p.v)]
    out64, _ = attention_fp64(case, *exact, None, slopes if slopes is None else slopes.double())
    grads64 = torch.autograd.grad(out64, exact, p.do.double())
    pairs = zip((out.permute(2, 0, 1, 3), *grads), (out64, *grads64), strict=True)
    found = dict(zip(("out", "dq", "dk", "dv"), (relative_error(a, b.detach()) for a, b in pairs), strict=True))
    return found | dict.fromkeys(("dsinks", "dslopes"), found["dq"])


def assert_close(case: Case, p: Problem, results: dict[str, Tensor]) -> None:
    limits = {torch.float32: 2e-6, torch.float64: 1e-13}
    if case.dtype in limits:
        allowed = dict.fromkeys(results, limits[case.dtype])
    else:
        allowed = {name: 2 * error for name, error in achieved_by_torch(case, p).items()} | {"lse": 2e-6}
    for name, result in results.items():
        truth = p.truth[name]
        keyless = truth == -math.inf
        assert torch.equal(result == -math.inf, keyless), f"{name}: -inf where no key is attended, and nowhere else"
        error = relative_error(result[~keyless], truth[~keyless])
        assert error <= allowed[name], f"{name}: {error:.2e}, allowed {allowed[name]:.2e}"


CASES = {
    "dense": Case(causal=False),
    "causal": Case(),
    "whole tiles": Case(S=64, Sk=64),
    "more keys causal": Case(S=40, Sk=100),
    "more queries causal": Case(S=100, Sk=40),
    "more keys dense": Case(S=33, Sk=97, causal=False),
    "one token": Case(S=1, Sk=1),
    "one query many keys": Case(S=1, Sk=50, causal=False),
    "GQA batch 2": Case(S=40, Sk=40, B=2, hq=4, group=2),
    "MQA": Case(S=40, Sk=40, hq=3, group=3),
    "heads within groups": Case(S=40, Sk=40, hq=4, group=3, offset=2),
    "more group than heads": Case(S=40, Sk=40, hq=2, group=8, offset=5),
    "D 8": Case(D=8, Dv=8),
    "D 40 Dv 24": Case(D=40, Dv=24),
    "D 1 Dv 3": Case(D=1, Dv=3, group=2, scale=2.0),
    "D 33 Dv 17": Case(D=33, Dv=17, B=2, S=40, Sk=40, cuts=(10,), key_cuts=(20,)),
    "D 65 Dv 17 dense": Case(S=40, Sk=64, D=65, Dv=17, causal=False),
    "D 100": Case(S=40, Sk=40, D=100, Dv=100, hq=4, group=2),
    "D 33 Dv 50 unaligned": Case(S=40, Sk=40, D=33, Dv=50, aligned=False, window=(9, 9), causal=False),
    "D 80": Case(S=40, Sk=40, D=80, Dv=80),
    "D 128": Case(S=40, Sk=40, D=128, Dv=128),
    "D 192 Dv 128": Case(S=40, Sk=40, D=192, Dv=128),
    "spans straddle tiles": Case(cuts=(5, 5, 30, 50), key_cuts=(33, 64, 70), causal=False),
    "spans batch 2": Case(S=50, Sk=60, B=2, cuts=(0, 20), key_cuts=(10,)),
    "negative scale": Case(scale=-0.3),
    "scale 0": Case(scale=0.0),
    "unaligned": Case(aligned=False, B=2, S=40, Sk=40, cuts=(10,), key_cuts=(20,)),
    "window of the token itself": Case(window=(0, 0), causal=False),
    "window to the left": Case(S=150, Sk=150, window=(5, -1), causal=False),
    "window to the right": Case(S=150, Sk=150, window=(-1, 3), causal=False),
    "window causal": Case(S=150, Sk=150, window=(70, 9)),
    "window wider than S": Case(window=(1000, 2**31 - 1), causal=False),
    "window without bounds": Case(window=(-1, -1)),
    "window more queries": Case(S=150, Sk=40, window=(20, 7), causal=False),
    "window more keys": Case(S=40, Sk=150, window=(9, 40), causal=False, group=2, offset=1, key_cuts=(33,)),
    "softcap": Case(softcap=2.0),
    "softcap saturated": Case(softcap=0.2, causal=False),
    "softcap hardly bends": Case(softcap=1000.0),
    "softcap negative scale": Case(softcap=1.0, scale=-0.3),
    "softcap scale 0": Case(softcap=1.0, scale=0.0),
    "documents": Case(S=150, Sk=150, documents="runs"),
    "documents dense batch 2": Case(S=150, Sk=150, B=2, documents="runs", causal=False, group=2),
    "documents window": Case(S=150, Sk=150, B=2, documents="runs", window=(20, 9), causal=False),
    "documents of other keys": Case(S=100, Sk=150, B=2, documents="runs", causal=False),
    "documents of other keys causal": Case(S=150, Sk=100, B=2, documents="runs"),
    "documents mixed": Case(S=100, Sk=100, B=2, documents="mixed"),
    "documents mixed dense": Case(S=70, Sk=90, B=2, documents="mixed", causal=False, window=(30, -1)),
    "sinks": Case(sinks=True, hq=4, group=2, offset=1),
    "sinks and keyless rows": Case(S=100, Sk=40, sinks=True, window=(5, 0), B=2),
    "slopes": Case(slopes=True, hq=4, group=2, B=2),
    "slopes dense": Case(slopes=True, causal=False, S=40, Sk=90, softcap=3.0),
    "dropout": Case(dropout=0.3, hq=4, group=2, B=2),
    "dropout dense sinks": Case(dropout=0.6, causal=False, sinks=True, S=33, Sk=100),
    "prefix": Case(predicate="prefix", causal=False, B=2, S=150, Sk=150),
    "woven": Case(predicate="woven", causal=False, hq=4, group=2, S=90, Sk=150),
    "woven causal": Case(predicate="woven", hq=3, S=90, Sk=90),
    "woven window documents": Case(predicate="woven", window=(40, 3), documents="mixed", B=2, S=90, Sk=90),
    "listed prefix": Case(S=150, Sk=300, D=16, Dv=16, predicate="prefix", causal=False, B=2, listed=True),
    "listed woven": Case(
        S=300, Sk=150, D=16, Dv=16, predicate="woven", causal=False, hq=4, group=2, offset=1, listed=True
    ),
    "listed documents": Case(
        S=290, Sk=290, D=16, Dv=16, B=2, documents="runs", predicate="woven", listed=True, window=(150, 3), causal=False
    ),
    "listed without a predicate": Case(S=300, Sk=300, D=16, Dv=16, hq=2, group=2, documents="mixed", listed=True, B=2),
    "everything": Case(
        S=150,
        Sk=150,
        B=2,
        hq=4,
        group=2,
        offset=1,
        documents="runs",
        window=(60, 0),
        softcap=2.0,
        sinks=True,
        slopes=True,
        dropout=0.2,
        predicate="woven",
        cuts=(33,),
        key_cuts=(50,),
    ),
    "window softcap": Case(S=100, Sk=80, window=(33, 5), causal=False, softcap=3.0, hq=4, group=2),
}
LOW = {
    "causal": Case(),
    "dense": Case(causal=False, S=50, Sk=80),
    "GQA spans": Case(hq=4, group=2, cuts=(5, 50), key_cuts=(33,), S=60, Sk=60),
    "D 40 Dv 24": Case(D=40, Dv=24),
    "D 33 Dv 17 partial sums": Case(D=33, Dv=17, partial=True, S=40, Sk=40),
    "D 50 Dv 100": Case(D=50, Dv=100, S=40, Sk=40),
    "D 128": Case(D=128, Dv=128, S=40, Sk=40),
    "partial sums": Case(partial=True, S=40, Sk=40),
    "unaligned": Case(aligned=False, S=40, Sk=40),
    "window softcap": Case(window=(20, 0), softcap=3.0),
    "documents": Case(S=90, Sk=90, B=2, documents="runs"),
    "slopes": Case(slopes=True, causal=False),
    "sinks dropout": Case(sinks=True, dropout=0.2),
    "prefix": Case(predicate="prefix", causal=False),
}


@pytest.mark.parametrize("launchers", [KERNELS, TWINS], ids=["triton", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fp32(launchers, case: Case) -> None:
    memory = Memory(case.aligned)
    p = problem(case, memory)
    assert_close(case, p, run(launchers, case, p, memory))
    memory.assert_gaps_untouched()


@pytest.mark.parametrize("launchers", [KERNELS, TWINS], ids=["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", LOW.values(), ids=LOW)
def test_low_precision(launchers, dtype: torch.dtype, case: Case) -> None:
    case = replace(case, dtype=dtype)
    memory = Memory(case.aligned)
    p = problem(case, memory)
    results = run(launchers, case, p, memory)
    assert_close(case, p, results)
    memory.assert_gaps_untouched()


@pytest.mark.parametrize("case", [CASES["causal"], CASES["heads within groups"]], ids=["causal", "heads within groups"])
def test_reference_in_fp64(case: Case) -> None:
    case = replace(case, dtype=torch.float64)
    memory = Memory(True)
    p = problem(case, memory)
    assert_close(case, p, run(TWINS, case, p, memory))


@pytest.mark.parametrize("window", [None, (100, 0), (300, 20), (3, 300)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
def test_reference_over_several_blocks(causal: bool, window: tuple[int, int] | None) -> None:
    case = Case(
        S=600, Sk=530, D=16, Dv=16, hq=1, cuts=(250, 300), key_cuts=(400,), causal=causal, window=window, softcap=4.0
    )
    memory = Memory(True)
    p = problem(case, memory)
    assert_close(case, p, run(TWINS, case, p, memory))
    memory.assert_gaps_untouched()


@pytest.mark.parametrize("launchers", [KERNELS, TWINS], ids=["triton", "reference"])
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
def test_queries_without_keys(launchers, causal: bool) -> None:
    case = Case(S=40, Sk=0, causal=causal)
    memory = Memory(True)
    p = problem(case, memory)
    results = run(launchers, case, p, memory)
    assert (results["lse"] == -math.inf).all()
    assert all(results[name].count_nonzero() == 0 for name in ("out", "dq")) and len(results["dk"]) == 0


@pytest.mark.parametrize("launchers", [KERNELS, TWINS], ids=["triton", "reference"])
def test_keys_without_queries(launchers) -> None:
    case = Case(S=0, Sk=40)
    memory = Memory(True)
    results = run(launchers, case, problem(case, memory), memory)
    assert results["dk"].shape[0] == 40 and all(results[name].count_nonzero() == 0 for name in ("dk", "dv"))


@pytest.mark.parametrize("launchers", [KERNELS, TWINS], ids=["triton", "reference"])
def test_a_masked_row_in_backward(launchers) -> None:
    """A row whose LSE is -inf (later masks leave such rows) must not turn into NaN where nothing of it is kept."""
    case = Case(S=20, Sk=0, causal=False)
    memory = Memory(True)
    p = problem(case, memory)
    assert (p.lse == -math.inf).all()
    assert not run(launchers, case, p, memory)["dq"].isnan().any()


@pytest.mark.parametrize("dims", [(40, 24), (33, 50)], ids=str)
@pytest.mark.parametrize("launchers", [KERNELS, TWINS], ids=["triton", "reference"])
def test_results_do_not_depend_on_where_they_lie(launchers, dims: tuple[int, int]) -> None:
    """Bit for bit: strides, alignment, spans, and the heads that are worked on beside."""
    case = Case(S=70, Sk=70, hq=4, group=2, D=dims[0], Dv=dims[1], window=(40, 0), softcap=5.0)
    memory = Memory(True)
    p = problem(case, memory)
    whole = run(launchers, case, p, memory)
    elsewhere = replace(case, cuts=(7, 60), key_cuts=(32,), aligned=False)
    unaligned = Memory(False)
    moved = run(launchers, elsewhere, problem(elsewhere, unaligned), unaligned)
    assert all(torch.equal(whole[name], moved[name]) for name in NAMES)

    alone = replace(case, hq=2, group=2)
    q, do, delta = (x[:, :, 2:] for x in (p.q, p.do, p.delta))
    part = Problem(q, p.k[:, :, 1:], p.v[:, :, 1:], do, {}, p.lse[2:], delta)
    one_group = run(launchers, alone, part, memory)
    for name in NAMES:
        heads = slice(1, None) if name in ("dk", "dv") else slice(2, None)
        assert torch.equal(whole[name][:, :, heads], one_group[name]), name


@pytest.mark.parametrize("scale", [0.2, 0.0, -0.3], ids=str)
@pytest.mark.parametrize("dims", [(32, 16), (33, 50)], ids=str)
@pytest.mark.parametrize("launchers", [KERNELS, TWINS], ids=["triton", "reference"])
def test_query_heads_of_a_kv_head_in_several_calls(launchers, dims: tuple[int, int], scale: float) -> None:
    """dk and dv of the last call are those of all heads; everything else is the same bits as in one call."""
    case = Case(S=40, Sk=50, B=2, hq=3, group=3, D=dims[0], Dv=dims[1], scale=scale, key_cuts=(30,))
    memory = Memory(True)
    p = problem(case, memory)
    whole = run(launchers, case, p, memory)
    dq = spans_of(memory, case.S, (), case.B, (case.hq, case.D, case.dtype))
    dkv = spans_of(memory, case.Sk, case.key_cuts, case.B, (1, case.D, case.dtype), (1, case.Dv, case.dtype))
    sums = tuple(torch.full((1, case.B, case.Sk, n), math.nan) for n in dims)
    of_sums = [Span(0, tuple(x.permute(2, 1, 0, 3) for x in sums))]
    for heads, into, start in ((slice(0, 1), of_sums, None), (slice(1, 3), dkv, sums)):
        launchers[1](
            p.q[:, :, heads], p.k, p.v, p.do[:, :, heads], p.lse[heads], p.delta[:, :, heads],
            [Span(0, (dq[0].views[0][:, :, heads],))], into,
            case.options._replace(heads=HeadMap(3, FIRST * 3 + heads.start)), start=start,
        )  # fmt: skip
    found = {"dq": joined(dq, 0), "dk": joined(dkv, 0), "dv": joined(dkv, 1)}
    assert torch.equal(found["dq"], whole["dq"])
    for name in ("dk", "dv"):
        torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-5)
    memory.assert_gaps_untouched()


@given(
    S=st.integers(1, 80), Sk=st.integers(1, 80), hq=st.integers(1, 4), group=st.integers(1, 4),
    offset=st.integers(0, 3), D=st.sampled_from([1, 8, 24, 50, 64]), Dv=st.sampled_from([3, 8, 32]),
    causal=st.booleans(), window=st.none() | st.tuples(st.integers(-1, 90), st.integers(-1, 90)),
    softcap=st.sampled_from([None, 1.0, 20.0]), aligned=st.booleans(), data=st.data(),
)  # fmt: skip
def test_drawn_cases(S, Sk, hq, group, offset, D, Dv, causal, window, softcap, aligned, data) -> None:
    cuts = data.draw(st.lists(st.integers(0, S), max_size=3).map(sorted).map(tuple), "cuts")
    key_cuts = data.draw(st.lists(st.integers(0, Sk), max_size=3).map(sorted).map(tuple), "key_cuts")
    case = Case(
        S, Sk, 1, hq, group, offset % group, D, Dv, causal, cuts=cuts, key_cuts=key_cuts, aligned=aligned,
        window=window, softcap=softcap,
    )  # fmt: skip
    memory = Memory(aligned)
    p = problem(case, memory)
    for launchers in (KERNELS, TWINS):
        assert_close(case, p, run(launchers, case, p, memory))
    memory.assert_gaps_untouched()


def test_offsets_past_32_bits(tmp_path) -> None:
    """Tokens so far apart that their offsets do not fit in 32 bits, in a sparse file."""
    n, token = 5, 2**29
    elements = n * token + 64
    file = torch.from_file(str(tmp_path / "rows"), shared=True, size=elements, dtype=torch.float16)
    rows = file.as_strided((n, 1, 64), (token, 64, 1))
    rows.copy_(torch.randn(n, 1, 64))
    q, k, v, out = (rows[..., i : i + 16].unflatten(-1, (1, 16)) for i in (0, 16, 32, 48))
    near = torch.full((n, 1, 1, 16), math.nan, dtype=torch.float16)
    for target in (out, near):
        inputs = (q, k, v) if target is out else tuple(x.clone() for x in (q, k, v))
        attend_forward.attend_forward(*inputs, [Span(0, (target, None))], None, Options(0.25, True, HeadMap(1, 0)))
    assert torch.equal(out, near)


DESCRIBED = {
    "more keys causal": CASES["more keys causal"],
    "one token": CASES["one token"],
    "GQA batch 2": CASES["GQA batch 2"],
    "more group than heads": CASES["more group than heads"],
    "D 1 Dv 3": CASES["D 1 Dv 3"],
    "D 33 Dv 17": CASES["D 33 Dv 17"],
    "D 100": replace(CASES["D 100"], dtype=torch.bfloat16),
    "D 192 Dv 128 bf16": replace(CASES["D 192 Dv 128"], dtype=torch.bfloat16, partial=True),
    "negative scale": replace(CASES["negative scale"], dtype=torch.float16),
    "window more keys": CASES["window more keys"],
    "documents mixed": replace(CASES["documents mixed"], S=70, Sk=70),
    "woven in lists": replace(CASES["woven"], S=40, hq=2, listed=True),
    "everything": replace(CASES["everything"], S=60, Sk=60, B=1, hq=3),
    "unaligned": CASES["unaligned"],
}


@contextmanager
def with_tiles(**tiles: int) -> Iterator[None]:
    """Inside, all attention kernels are launched with these tiles."""
    with ExitStack() as stack:
        for kernel in ("attend_forward", "attend_dq", "attend_dkv"):
            stack.enter_context(_config.fixed(kernel, {"num_warps": 4, "num_stages": 1, **tiles}))
        yield


@pytest.mark.parametrize("case", DESCRIBED.values(), ids=DESCRIBED)
def test_descriptors_read_what_pointers_read(case: Case) -> None:
    """Bit for bit, whatever lies between the rows (NaN, here)."""
    memory = Memory(case.aligned)
    p = problem(case, memory)
    found = []
    for descriptors in (False, True):
        with with_tiles(BLOCK_M=32, BLOCK_N=64, descriptors=descriptors):
            found.append(run(KERNELS, case, p, memory))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(*pair) for pair in zip(found[0].values(), found[1].values(), strict=True))
    memory.assert_gaps_untouched()


def read_by(case: Case, **replaced: Tensor) -> list[set[type]]:
    """The types of the arguments that each kernel reads rows by, asked for descriptors."""
    memory = Memory(case.aligned)
    p = replace(problem(case, memory), **replaced)
    dq, dk, dv = (memory.rows(len(x), 1, x.size(2), x.size(3), x.dtype) for x in (p.q, p.k, p.v))
    with _config.capture("sm_90") as launches, with_tiles(BLOCK_M=64, BLOCK_N=32, descriptors=True):
        attend_forward.attend_forward(p.q, p.k, p.v, [Span(0, (torch.empty_like(p.do), None))], None, case.options)
        attend_backward.attend_backward(
            p.q, p.k, p.v, p.do, p.lse, p.delta, [Span(0, (dq,))], [Span(0, (dk, dv))], case.options
        )
    return [{type(x) for name, x in launch.args.items() if name in ROWS} for launch in launches]


ROWS = {"q_ptr", "k_ptr", "v_ptr", "do_ptr"}


def test_rows_that_descriptors_do_not_take_are_read_by_pointers() -> None:
    """Those that do not begin on 16 bytes, those of no tokens, and those that lie on top of each other."""
    case = Case(S=40, Sk=70, D=24, Dv=40, causal=False)
    one = torch.ones(1, 1, 1, 40)
    assert read_by(case) == [{TensorDescriptor}] * 3
    assert read_by(replace(case, aligned=False)) == [{Tensor}] * 3
    assert read_by(replace(case, Sk=0)) == [{Tensor}] * 2
    assert read_by(case, do=one.expand(40, 1, 2, 40)) == [{TensorDescriptor}, {Tensor}, {Tensor}]


def test_a_descriptor_has_the_sizes_and_strides_of_its_rows() -> None:
    memory = Memory(True)
    view = memory.rows(70, 3, 2, 33, torch.bfloat16)
    tiles = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1}
    found = _rows.launched({**tiles, "descriptors": True}, 8, q=(view, "BLOCK_M"))
    q = found.pop("q_ptr")
    assert found == tiles | _rows.named("q", _rows.in_units(view, 8))
    token, batch, head, _ = view.stride()
    assert (q.base is view, q.shape, q.strides) == (True, [3, 2, 70, 33], [batch, head, token, 1])
    assert q.block_shape == [1, 1, 64, 64]
    alone = _rows.launched({**tiles, "descriptors": True}, 8, q=(view[:1, :1, :1], "BLOCK_M"))["q_ptr"]
    assert alone.shape == [1, 1, 1, 33] and all(s > 0 and s % 8 == 0 for s in alone.strides[:3])


@pytest.mark.parametrize("dims", [(33, 17), (100, 1)], ids=str)
def test_rows_of_any_head_dim_are_read_in_units_of_8(dims: tuple[int, int]) -> None:
    """Heads of a row begin at multiples of 8 elements. The output may lie in a user's tensor, whose heads do not."""
    case = Case(D=dims[0], Dv=dims[1], dtype=torch.bfloat16)
    memory = Memory(True)
    p = problem(case, memory)
    with _config.capture("sm_90") as launches:
        out = torch.empty(case.S, 1, case.hq, case.Dv, dtype=case.dtype)
        attend_forward.attend_forward(p.q, p.k, p.v, [Span(0, (out, None))], None, case.options)
        dq, dk, dv = (memory.rows(len(x), 1, x.size(2), x.size(3), x.dtype) for x in (p.q, p.k, p.v))
        attend_backward.attend_backward(
            p.q, p.k, p.v, p.do, p.lse, p.delta, [Span(0, (dq,))], [Span(0, (dk, dv))], case.options
        )
    assert [launch.args["UNIT"] for launch in launches] == [8, 8, 8]
    assert launches[0].args["OUT_UNIT"] == 1


def test_span_tables_are_made_once() -> None:
    buffer = torch.zeros(10, 1, 2, 8)
    spans = [Span(0, (buffer[:4],)), Span(4, (buffer[4:],))]
    first, again = (_rows.span_table(list(spans), (8, 1), buffer.device) for _ in range(2))
    assert first.data_ptr() == again.data_ptr()
    assert first.tolist() == [[buffer.data_ptr(), 0, 0, 0, 0, 4], [buffer[4:].data_ptr(), 0, 0, 0, 4, 10]]


def test_nothing_is_launched_for_no_tokens() -> None:
    q, k = torch.empty(0, 1, 2, 16), torch.empty(5, 1, 2, 16)
    with _config.capture("sm_90") as launches:
        attend_forward.attend_forward(q, k, k, [], None, Options(1.0, True, HeadMap(1, 0)))
    assert launches == []


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, slope_ptr, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    y, slope = _scores.tanh(tl.load(x_ptr + o))
    tl.store(y_ptr + o, y)
    tl.store(slope_ptr + o, slope)


def test_tanh_keeps_its_digits() -> None:
    """Each value to a few units of fp32: near 0, where tanh cancels, and far out, where its slope does."""
    x = torch.cat([torch.logspace(-30, 1.2, 1023), torch.tensor([0.0])])
    x = torch.cat([x, -x, torch.linspace(-1, 1, 2044), torch.tensor([100.0, -100.0, 1e30, -1e30])])
    y, slope = torch.empty_like(x), torch.empty_like(x)
    _config.launch(
        _tanh_kernel, (1,), num_warps=4, num_stages=1, x_ptr=x, y_ptr=y, slope_ptr=slope, SIZE=len(x)
    )  # fmt: skip
    exact = x.double().tanh()
    torch.testing.assert_close(y.double(), exact, rtol=3e-7, atol=0.0)
    torch.testing.assert_close(slope.double(), x.double().cosh().pow(-2), rtol=1e-5, atol=1e-30)
    near = x.abs() < 4
    torch.testing.assert_close(slope[near].double(), x[near].double().cosh().pow(-2), rtol=1e-6, atol=0.0)


@triton.jit
def _tiles_kernel(
    ranges_ptr, key_ranges_ptr, place_ptr, i_b, B, S, Sk, n_heads, section, left, right, documents,
    HAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = (i_b, B, S, Sk, left, right, documents, ())
    for i in range(0, tl.cdiv(S, BLOCK_M)):
        full, full_end, begin, end, _ = _mask.tile_range(i * BLOCK_M, 0, m, (), HAS, BLOCK_M, BLOCK_N)
        tl.store(ranges_ptr + 4 * i, full)
        tl.store(ranges_ptr + 4 * i + 1, full_end)
        tl.store(ranges_ptr + 4 * i + 2, begin)
        tl.store(ranges_ptr + 4 * i + 3, end)
    for i in range(0, tl.cdiv(Sk, BLOCK_N)):
        full, full_end, begin, end, _ = _mask.tile_range_keys(i * BLOCK_N, 0, m, (), HAS, BLOCK_M, BLOCK_N)
        tl.store(key_ranges_ptr + 4 * i, full)
        tl.store(key_ranges_ptr + 4 * i + 1, full_end)
        tl.store(key_ranges_ptr + 4 * i + 2, begin)
        tl.store(key_ranges_ptr + 4 * i + 3, end)
    for i in range(0, tl.cdiv(S, BLOCK_M) * n_heads):
        i_tile, i_head = _mask.place(i, tl.cdiv(S, BLOCK_M), n_heads, section, True)
        tl.store(place_ptr + 2 * i, i_tile)
        tl.store(place_ptr + 2 * i + 1, i_head)


@triton.jit
def _keep_kernel(
    kept_ptr, i_b, B, S, Sk, left, right, documents, HAS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    o = tl.arange(0, SIZE)
    m = (i_b, B, S, Sk, left, right, documents, ())
    doc_m, spot_m = _mask.tokens(m, 0, o, S, HAS)
    doc_n, _ = _mask.tokens(m, 1, o, Sk, HAS)
    kept = _mask.keep(m, 0, o[:, None], o[None, :], spot_m[:, None], doc_m[:, None], doc_n[None, :], HAS, None)
    tl.store(kept_ptr + o[:, None] * SIZE + o[None, :], kept.to(tl.int32))


def mask_of(options: Options, S: int, Sk: int) -> dict:
    names = ("left", "right", "documents", "HAS")
    return {name: value for name, value in _options.arguments(options, S, Sk).items() if name in names}


def tiles_of(
    options: Options, S: int, Sk: int, M: int, N: int, heads: int = 1, section: int = 1, b: int = 0, B: int = 1
) -> tuple[Tensor, ...]:
    """Ranges of the query tiles and of the key tiles, `[tiles, 4]`, and (tile, head) of every program."""
    ranges, key_ranges = (torch.zeros(-(-n // block), 4, dtype=torch.int32) for n, block in ((S, M), (Sk, N)))
    placed = torch.zeros(len(ranges) * heads, 2, dtype=torch.int32)
    _config.launch(
        _tiles_kernel, (1,), num_warps=4, num_stages=1, ranges_ptr=ranges, key_ranges_ptr=key_ranges, place_ptr=placed,
        i_b=b, B=B, S=S, Sk=Sk, n_heads=heads, section=section, BLOCK_M=M, BLOCK_N=N, **mask_of(options, S, Sk),
    )  # fmt: skip
    return ranges, key_ranges, placed


@given(
    S=st.integers(1, 60), Sk=st.integers(1, 60), causal=st.booleans(), M=st.sampled_from([8, 16]),
    window=st.none() | st.tuples(*[st.integers(-1, 20) | st.integers(-1, 70)] * 2),
    N=st.sampled_from([8, 16]), heads=st.integers(1, 5), section=st.integers(1, 5),
    documents=st.sampled_from([None, "runs", "mixed"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_tiles_hold_what_is_kept(S, Sk, causal, window, M, N, heads, section, documents, seed) -> None:
    """Full tiles are kept whole, skipped ones hold nothing, and every tile of every head has one program."""
    case = Case(S, Sk, 2, 1, causal=causal, window=window, documents=documents, seed=seed)
    options = case.options
    ranges, key_ranges, placed = tiles_of(options, S, Sk, M, N, heads, section, 1, 2)
    kept = torch.zeros(64, 64, dtype=torch.int32)
    _config.launch(
        _keep_kernel, (1,), num_warps=4, num_stages=1, kept_ptr=kept, i_b=1, B=2, S=S, Sk=Sk, SIZE=64,
        **mask_of(options, S, Sk),
    )  # fmt: skip
    pairs = torch.nn.functional.pad(case.kept[-1, 0], (0, 64 - Sk, 0, 64 - S))
    assert torch.equal(kept[:S].bool(), pairs[:S])
    windowed = _options.flags(options).gaps
    exact = documents != "mixed"  # the tokens of a mixed document lie among others
    for i, found in enumerate(ranges.tolist()):
        check_ranges(pairs[i * M : min((i + 1) * M, S)], found, N, windowed, exact)
        assert found[0] == found[1] or found[1] % N == 0, "a full tile's keys are loaded without a mask"
        assert not exact or not pairs[i * M : (i + 1) * M, found[1] : found[1] + N].all(), (
            "a full tile is asked for every pair"
        )
    for i, found in enumerate(key_ranges.tolist()):
        check_ranges(pairs[:S, i * N : min((i + 1) * N, Sk)].T, found, M, windowed, exact)
    order = [tuple(p) for p in placed.tolist()]
    assert sorted(order) == [(t, h) for t in range(len(ranges)) for h in range(heads)]
    assert [t for t, h in order if h == 0] == list(range(len(ranges)))[::-1]


def partial_tiles(found: list[int], block: int, window: bool) -> list[int]:
    """Where the partial tiles lie, by the rule of `_mask.tile_at`."""
    full, full_end, begin, end = found
    return [i + full_end - full if window and i >= full else i for i in range(begin, end, block)]


def check_ranges(pairs: Tensor, found: list[int], block: int, window: bool, exact: bool) -> None:
    """`pairs [rows, columns]` of one tile of rows: each tile of columns once, full, partial, or skipped as empty.

    Of a window, no tile is visited in vain. A causal mask alone is coarser where a key tile reaches past the sequence.
    """
    full, full_end = found[:2]
    partial = partial_tiles(found, block, window)
    visited = [*partial, *range(full, full_end, block)]
    assert pairs[:, full:full_end].all() and len(visited) == len(set(visited))
    for start in range(0, pairs.shape[1], block):
        tile = pairs[:, start : start + block]
        assert start in visited or not tile.any(), "a tile that holds pairs is skipped"
        if window and exact and start in partial:
            assert tile.any(), "a tile that holds nothing is visited"
            assert tile.shape[1] < block or not tile.all(), "a full tile is asked for every pair"


def tiles_visited(options: Options, S: int, M: int, N: int) -> tuple[int, int]:
    """Tiles that the query kernels visit, and the kernel of dk and dv."""
    found = tiles_of(options, S, S, M, N)[:2]
    gaps = _options.flags(options).gaps
    return tuple(
        sum(len(partial_tiles(r, block, gaps)) + len(range(r[0], r[1], block)) for r in ranges.tolist())
        for ranges, block in zip(found, (N, M), strict=True)
    )


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
def test_work_of_documents_follows_the_sum_of_their_squares(causal: bool) -> None:
    """Tiles of 64 x 32 visited in 4,096 tokens: one document, 8 of 512, 32 of 128, and uneven ones."""
    S, M, N = 4096, 64, 32
    one = tiles_visited(Options(1.0, causal, HeadMap(1, 0)), S, M, N)
    lengths = {
        "1 x 4096": [4096], "8 x 512": [512] * 8, "32 x 128": [128] * 32,
        "uneven": [2500, 0, 1, 1000, 1, 250, 0, 344],
    }  # fmt: skip
    for name, documents in lengths.items():
        assert sum(documents) == S
        ids = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))[None]
        options = Options(1.0, causal, HeadMap(1, 0), documents=_documents.documents(ids))
        visited = tiles_visited(options, S, M, N)
        share = sum(n * n for n in documents) / S**2
        edges = sum(2 * n * (M + N) + (M + N) ** 2 for n in documents) / S**2  # tiles that reach over an edge
        print(f"{name}: {visited} of {one} tiles, sum of squares {share:.4f} of the square")
        for found, whole in zip(visited, one, strict=True):
            assert share * whole <= found + 1 and found <= (share + edges) * whole * (2 if causal else 1)
            assert name == "1 x 4096" or found < 0.55 * whole


def test_listed_tiles_are_what_is_visited_and_full_ones_are_not_asked() -> None:
    """By lists that say other than the predicate: what is listed as full is kept whole, what is not listed not read."""
    case = Case(S=256, Sk=256, D=16, Dv=16, hq=1, causal=False, predicate="woven")
    memory = Memory(True)
    p = problem(case, memory)
    status = torch.tensor([[[[2, 0], [1, 2]]]], dtype=torch.uint8)
    blocks = _blocks.lists(status, HeadMap(1, 2), 1, 1)
    options = case.options._replace(blocks=blocks)
    kept = status.repeat_interleave(128, 2).repeat_interleave(128, 3)
    kept = (kept == 2) | ((kept == 1) & case.kept)
    q, k, v = (x.double().transpose(0, 1) for x in (p.q, p.k, p.v))
    expected, _ = oracle.attention(q, k, v, kept=kept, scale=case.scale)
    for forward, _ in (KERNELS, TWINS)[:1]:
        out = memory.rows(256, 1, 1, 16, torch.float32)
        forward(p.q, p.k, p.v, [Span(0, (out, None))], None, options)
        assert relative_error(out.transpose(0, 1), expected) < 2e-6


def test_philox_is_that_of_its_authors() -> None:
    """The first word for a counter and key of zeros and of ones, after 7 rounds (Random123, kat_vectors)."""
    zero = torch.tensor(0)
    assert int(_dropout.words(0, zero, zero, zero, zero)) == 0x5F6FB709
    ones = torch.tensor(0xFFFFFFFF)
    assert int(_dropout.words(2**64 - 1, ones, ones, ones, ones)) == 0x5207DDC2


def test_dropout_drops_its_share() -> None:
    """Of a million pairs, within five standard deviations; neighbours in any index are independent."""
    batch, head = torch.arange(4).view(-1, 1, 1, 1), torch.arange(4).view(-1, 1, 1)
    words = _dropout.words(7, batch, head, torch.arange(256).view(-1, 1), torch.arange(256))
    for p in (0.1, 0.5, 0.9):
        dropped = (words < _dropout.threshold(p)).double()
        n = dropped.numel()
        assert abs(dropped.mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)
        for dim in range(4):
            a, b = dropped.narrow(dim, 1, dropped.size(dim) - 1), dropped.narrow(dim, 0, dropped.size(dim) - 1)
            assert abs(((a - p) * (b - p)).mean().item()) < 6 * p * (1 - p) / math.sqrt(a.numel())


def test_work_of_a_window_follows_the_window() -> None:
    """Tiles of queries x keys that are visited, by the forward (and dq) and by dk and dv."""
    S, M, N = 4096, 64, 32
    for window, columns in (((0, 0), 1), ((128, 0), 129), ((100, 60), 161)):
        ranges, key_ranges, _ = tiles_of(Options(1.0, False, HeadMap(1, 0), window), S, S, M, N)
        for found, rows, block in ((ranges, M, N), (key_ranges, N, M)):
            tiles = [len(partial_tiles(r, block, True)) + len(range(r[0], r[1], block)) for r in found.tolist()]
            assert max(tiles) <= (rows + columns - 2) // block + 2
    for start, _, keys in _reference_attend.query_blocks(S, S, Options(1.0, True, HeadMap(1, 0), (100, 60))):
        assert keys.stop - keys.start <= _reference_attend.BLOCK + 100 and keys.start >= start - 100
