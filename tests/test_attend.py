"""The attention kernels and their twins against fp64, and against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from oracle import allowed, relative_error
from torch import Tensor

from ulysses_triton.kernels import _config, _mask, _rows, _softcap, attend_backward, attend_forward, reference
from ulysses_triton.kernels._views import HeadMap, Options, Span

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
    seed: int = 0

    @property
    def hkv(self) -> int:
        return (self.hq - 1 + self.offset) // self.group + 1

    @property
    def options(self) -> Options:
        return Options(self.scale, self.causal, HeadMap(self.group, self.offset), self.window, self.softcap)

    @property
    def kept(self) -> Tensor:
        return allowed(self.S, self.Sk, causal=self.causal, window=self.window)


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


def attention_fp64(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output `[S, B, hq, Dv]` and LSE `[S, B, hq]` by autograd's rules."""
    kv_head = torch.tensor([(h + case.offset) // case.group for h in range(case.hq)])
    scores = torch.einsum("ibhd,jbhd->ibhj", q, k[:, :, kv_head]) * case.scale
    if case.softcap is not None:
        scores = case.softcap * (scores / case.softcap).tanh()
    kept = case.kept[:, None, None]  # [S, 1, 1, Sk]
    keyless = ~kept.any(-1, keepdim=True)
    scores = scores.masked_fill(~kept, -math.inf).masked_fill(keyless, 0.0)  # numbers, for the sake of the gradient
    weights = scores.softmax(-1).masked_fill(keyless, 0.0)
    lse = scores.logsumexp(-1).masked_fill(keyless[..., 0], -math.inf)
    return torch.einsum("ibhj,jbhd->ibhd", weights, v[:, :, kv_head]), lse


def problem(case: Case, memory: Memory) -> Problem:
    g = torch.Generator().manual_seed(case.seed)
    q = memory.random(g, case.S, case.B, case.hq, case.D, dtype=case.dtype)
    k = memory.random(g, case.Sk, case.B, case.hkv, case.D, dtype=case.dtype)
    v = memory.random(g, case.Sk, case.B, case.hkv, case.Dv, dtype=case.dtype)
    do = memory.random(g, case.S, case.B, case.hq, case.Dv, dtype=case.dtype)
    stat_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    dlse = torch.randn(case.S, case.B, case.hq, generator=g, dtype=torch.float64)
    q64, k64, v64 = (x.double().requires_grad_() for x in (q, k, v))
    out, lse = attention_fp64(case, q64, k64, v64)
    if case.Sk:
        loss = (out * do.double()).sum() + (lse * dlse).sum()
        grads = torch.autograd.grad(loss, (q64, k64, v64))
    else:
        grads = tuple(torch.zeros_like(x) for x in (q64, k64, v64))
        dlse.zero_()
    delta = memory.rows(case.S, case.B, case.hq, 1, stat_dtype)[..., 0]
    delta.copy_((out.detach() * do.double()).sum(-1) - dlse)
    truth = dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=True))
    return Problem(q, k, v, do, truth, lse.detach().permute(2, 1, 0).to(stat_dtype).contiguous(), delta)


def run(launchers, case: Case, p: Problem, memory: Memory) -> dict[str, Tensor]:
    """Forward and backward; the LSE comes twice, and both must be the same numbers."""
    forward, backward = launchers
    sums = torch.float32 if case.partial else case.dtype
    out = spans_of(memory, case.S, case.cuts, case.B, (case.hq, case.Dv, case.dtype), (case.hq, 0, p.lse.dtype))
    dq = spans_of(memory, case.S, case.cuts, case.B, (case.hq, case.D, case.dtype))
    dkv = spans_of(memory, case.Sk, case.key_cuts, case.B, (case.hkv, case.D, sums), (case.hkv, case.Dv, sums))
    lse = torch.full_like(p.lse, math.nan)
    forward(p.q, p.k, p.v, out, lse, case.options)
    backward(p.q, p.k, p.v, p.do, p.lse, p.delta, dq, dkv, case.options)
    assert torch.equal(lse.permute(2, 1, 0), joined(out, 1))
    results = (joined(out, 0), joined(out, 1), joined(dq, 0), joined(dkv, 0), joined(dkv, 1))
    return dict(zip(NAMES, results, strict=True))


def achieved_by_torch(case: Case, p: Problem) -> dict[str, float]:
    """Relative errors of PyTorch's SDPA in the case's dtype, without what it cannot: the LSE's gradient, softcap."""
    case = replace(case, softcap=None)
    kv_head = torch.tensor([(h + case.offset) // case.group for h in range(case.hq)])
    leaves = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v)]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (leaves[0], leaves[1][:, :, kv_head], leaves[2][:, :, kv_head]))
    mask = {"attn_mask": case.kept} if case.window else {"is_causal": case.causal}
    out = F.scaled_dot_product_attention(q, k, v, **mask, scale=case.scale)
    grads = torch.autograd.grad(out, leaves, p.do.permute(1, 2, 0, 3))
    exact = [x.double().requires_grad_() for x in (p.q, p.k, p.v)]
    out64, _ = attention_fp64(case, *exact)
    grads64 = torch.autograd.grad(out64, exact, p.do.double())
    pairs = zip((out.permute(2, 0, 1, 3), *grads), (out64, *grads64), strict=True)
    return dict(zip(("out", "dq", "dk", "dv"), (relative_error(a, b.detach()) for a, b in pairs), strict=True))


def assert_close(case: Case, p: Problem, results: dict[str, Tensor]) -> None:
    limits = {torch.float32: 2e-6, torch.float64: 1e-13}
    if case.dtype in limits:
        allowed = dict.fromkeys(NAMES, limits[case.dtype])
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
    assert first is again
    assert first.tolist() == [[buffer.data_ptr(), 0, 0, 0, 0, 4], [buffer[4:].data_ptr(), 0, 0, 0, 4, 10]]


def test_nothing_is_launched_for_no_tokens() -> None:
    q, k = torch.empty(0, 1, 2, 16), torch.empty(5, 1, 2, 16)
    with _config.capture("sm_90") as launches:
        attend_forward.attend_forward(q, k, k, [], None, Options(1.0, True, HeadMap(1, 0)))
    assert launches == []


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, slope_ptr, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    y, slope = _softcap.tanh(tl.load(x_ptr + o))
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
    ranges_ptr, key_ranges_ptr, place_ptr, S, Sk, n_heads, section, left, right,
    IS_CAUSAL: tl.constexpr, IS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for i in range(0, tl.cdiv(S, BLOCK_M)):
        full, full_end, begin, end = _mask.tile_range(
            i * BLOCK_M, S, Sk, left, right, IS_CAUSAL, IS_WINDOW, BLOCK_M, BLOCK_N
        )
        tl.store(ranges_ptr + 4 * i, full)
        tl.store(ranges_ptr + 4 * i + 1, full_end)
        tl.store(ranges_ptr + 4 * i + 2, begin)
        tl.store(ranges_ptr + 4 * i + 3, end)
    for i in range(0, tl.cdiv(Sk, BLOCK_N)):
        full, full_end, begin, end = _mask.tile_range_keys(
            i * BLOCK_N, S, Sk, left, right, IS_CAUSAL, IS_WINDOW, BLOCK_M, BLOCK_N
        )
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
    kept_ptr, Sk, left, right, IS_CAUSAL: tl.constexpr, IS_WINDOW: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    o = tl.arange(0, SIZE)
    kept = _mask.keep(o[:, None], o[None, :], Sk, left, right, IS_CAUSAL, IS_WINDOW)
    tl.store(kept_ptr + o[:, None] * SIZE + o[None, :], kept.to(tl.int32))


def tiles_of(options: Options, S: int, Sk: int, M: int, N: int, heads: int = 1, section: int = 1) -> tuple[Tensor, ...]:
    """Ranges of the query tiles and of the key tiles, `[tiles, 4]`, and (tile, head) of every program."""
    ranges, key_ranges = (torch.zeros(-(-n // block), 4, dtype=torch.int32) for n, block in ((S, M), (Sk, N)))
    placed = torch.zeros(len(ranges) * heads, 2, dtype=torch.int32)
    _config.launch(
        _tiles_kernel, (1,), num_warps=4, num_stages=1, ranges_ptr=ranges, key_ranges_ptr=key_ranges, place_ptr=placed,
        S=S, Sk=Sk, n_heads=heads, section=section, BLOCK_M=M, BLOCK_N=N, **_mask.mask(options, S, Sk),
    )  # fmt: skip
    return ranges, key_ranges, placed


@given(
    S=st.integers(1, 60), Sk=st.integers(1, 60), causal=st.booleans(), M=st.sampled_from([8, 16]),
    window=st.none() | st.tuples(*[st.integers(-1, 20) | st.integers(-1, 70)] * 2),
    N=st.sampled_from([8, 16]), heads=st.integers(1, 5), section=st.integers(1, 5),
)  # fmt: skip
def test_tiles_hold_what_is_kept(S, Sk, causal, window, M, N, heads, section) -> None:
    """Full tiles are kept whole, skipped ones hold nothing, and every tile of every head has one program."""
    options = Options(1.0, causal, HeadMap(1, 0), window)
    ranges, key_ranges, placed = tiles_of(options, S, Sk, M, N, heads, section)
    kept = torch.zeros(64, 64, dtype=torch.int32)
    _config.launch(
        _keep_kernel, (1,), num_warps=4, num_stages=1, kept_ptr=kept, Sk=Sk, SIZE=64, **_mask.mask(options, S, Sk)
    )  # fmt: skip
    pairs = torch.nn.functional.pad(allowed(S, Sk, causal=causal, window=window), (0, 64 - Sk, 0, 64 - S))
    assert torch.equal(kept[:S].bool(), pairs[:S])
    windowed = _mask.mask(options, S, Sk)["IS_WINDOW"]
    for i, found in enumerate(ranges.tolist()):
        check_ranges(pairs[i * M : min((i + 1) * M, S)], found, N, windowed)
        assert found[0] == found[1] or found[1] % N == 0, "a full tile's keys are loaded without a mask"
        assert not pairs[i * M : (i + 1) * M, found[1] : found[1] + N].all(), "a full tile is asked for every pair"
    for i, found in enumerate(key_ranges.tolist()):
        check_ranges(pairs[:S, i * N : min((i + 1) * N, Sk)].T, found, M, windowed)
    order = [tuple(p) for p in placed.tolist()]
    assert sorted(order) == [(t, h) for t in range(len(ranges)) for h in range(heads)]
    assert [t for t, h in order if h == 0] == list(range(len(ranges)))[::-1]


def partial_tiles(found: list[int], block: int, window: bool) -> list[int]:
    """Where the partial tiles lie, by the rule of `_mask.partial_tile`."""
    full, full_end, begin, end = found
    return [i + full_end - full if window and i >= full else i for i in range(begin, end, block)]


def check_ranges(pairs: Tensor, found: list[int], block: int, window: bool) -> None:
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
        if window and start in partial:
            assert tile.any(), "a tile that holds nothing is visited"
            assert tile.shape[1] < block or not tile.all(), "a full tile is asked for every pair"


def test_work_of_a_window_follows_the_window() -> None:
    """Tiles of queries x keys that are visited, by the forward (and dq) and by dk and dv."""
    S, M, N = 4096, 64, 32
    for window, columns in (((0, 0), 1), ((128, 0), 129), ((100, 60), 161)):
        ranges, key_ranges, _ = tiles_of(Options(1.0, False, HeadMap(1, 0), window), S, S, M, N)
        for found, rows, block in ((ranges, M, N), (key_ranges, N, M)):
            tiles = [len(partial_tiles(r, block, True)) + len(range(r[0], r[1], block)) for r in found.tolist()]
            assert max(tiles) <= (rows + columns - 2) // block + 2
    for start, _, keys in reference._query_blocks(S, S, Options(1.0, True, HeadMap(1, 0), (100, 60))):
        assert keys.stop - keys.start <= reference.BLOCK + 100 and keys.start >= start - 100
