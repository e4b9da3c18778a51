"""One kernel of one problem with one configuration: the candidates, whether its results are right, and its launch.

Inputs are random rows as a rank holds them. What is right is what the kernel's twin gives in fp64 on the same device;
how far from it a result may be follows from what PyTorch reaches in the problem's dtype (`truth.allowed`). Outputs hold
NaN until the kernel writes them. Lengths and head counts are run-time values of the kernels: the binary that is checked
at one size is the one that is timed at another. Of attention there are two that calls use, and both are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import truth
from .kernels import _config, reference
from .kernels._cache import BLOCK, Key, Tiles
from .kernels._views import HeadMap, Options, ORows, QKVRows, Span, Transform
from .kernels.attend_backward import attend_backward
from .kernels.attend_forward import attend_forward
from .kernels.pack import pack, pack_grad
from .kernels.unpack import unpack, unpack_grad

RANKS = 2  # whose heads the layout kernels move
FLOATS = (16, 256)  # what a thread holds of accumulators and scores, about: at least, and at most to fit its registers

Results = dict[str, list[Tensor]]  # what a kernel writes, by name; in parts where it is cut along the tokens or heads


class Launchers(NamedTuple):
    """The kernels' launchers, or their twins."""

    attend_forward: Callable[..., None]
    attend_backward: Callable[..., None]
    pack: Callable[..., None]
    pack_grad: Callable[..., None]
    unpack: Callable[..., None]
    unpack_grad: Callable[..., tuple[Tensor | None, Tensor | None]]


KERNELS = Launchers(attend_forward, attend_backward, pack, pack_grad, unpack, unpack_grad)
TWINS = Launchers(*(getattr(reference, name) for name in Launchers._fields))
OUTPUTS = {  # that are checked of each kernel; the two backward kernels have one launcher
    "attend_forward": ("out", "lse"),
    "attend_dq": ("dq",),
    "attend_dkv": ("dk", "dv"),
    "pack": ("q", "k", "v"),
    "pack_grad": ("do", "delta"),
    "unpack": ("out", "lse"),
    "unpack_grad": ("dq", "dk", "dv", "dq_norm", "dk_norm"),
}
SUMS = ("lse", "delta", "dq_norm", "dk_norm")  # outputs in fp32, whatever the dtype
FLAGS: dict[str, Callable[[Problem], dict[str, Any]]] = {  # the options that can be tuned for: fields of `Options`
    "causal": lambda problem: {"causal": True},
    "softcap": lambda problem: {"softcap": 2.0},
    "window": lambda problem: {"window": (min(1024, max(8, problem.tokens // 4)), 0)},
}


@dataclass(frozen=True)
class Problem:
    """What a kernel works on: `heads` query and `kv_heads` kv heads of one rank, `tokens` of each."""

    key: Key
    tokens: int
    heads: int
    kv_heads: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.key.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def attends(self) -> bool:
        return self.key.kernel.startswith("attend")

    @property
    def options(self) -> Options:
        given: dict[str, Any] = {"causal": False}
        for flag in self.key.flags:
            given |= FLAGS[flag](self)
        return Options(scale=self.key.dims[0] ** -0.5, heads=HeadMap(self.heads // self.kv_heads, 0), **given)

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """q, k, v and dO as views `[tokens, 1, heads, dim]` of rows, and `stat` `[tokens, 1, heads]` in fp32."""
        random = torch.Generator(self.device).manual_seed(0)

        def rows(*heads: tuple[int, int]) -> Iterator[Tensor]:
            sizes = [h * dim for h, dim in heads]
            row = torch.randn(self.tokens, 1, sum(sizes), generator=random, device=self.device).to(self.dtype)
            for (h, dim), part in zip(heads, row.split(sizes, -1), strict=True):
                yield part.unflatten(-1, (h, dim))

        (D, Dv), ranks = self.key.dims, 1 if self.attends else RANKS
        hq, hkv = self.heads * ranks, self.kv_heads * ranks
        found = dict(zip(("q", "k", "v"), rows((hq, D), (hkv, D), (hkv, Dv)), strict=True))
        (do,) = rows((hq, Dv))
        return found | {"do": do, "stat": torch.randn(self.tokens, 1, hq, generator=random, device=self.device)}

    @cached_property
    def forward(self) -> Results:
        """What the kernel's own forward gives for backward to start from, or the twin's in fp64, if that is quick."""
        before = Problem(
            self.key._replace(kernel="attend_forward"), self.tokens, self.heads, self.kv_heads, self.device
        )
        return before.run(TWINS, torch.float64) if self.tokens <= 2048 else before.run(KERNELS)

    @property
    def variants(self) -> tuple[bool, ...]:
        """What `other` may be for this kernel."""
        return (False, True) if self.key.kernel in ("attend_forward", "attend_dkv") else (False,)

    def run(
        self, launchers: Launchers, dtype: torch.dtype | None = None, *, cut: bool = False, other: bool = False
    ) -> Results:  # fmt: skip
        """Run the kernel, or its twin in `dtype`, on these inputs.

        `cut`: attention's rows go to two spans. `other`: attention as it is when nothing needs its gradient, without an
        LSE, and its backward with dk and dv in fp32, as sums that ranks share.
        """
        x = {name: t.to(dtype or self.dtype) for name, t in self.inputs.items() if name != "stat"}
        x["stat"] = self.inputs["stat"].to(torch.promote_types(x["q"].dtype, torch.float32))
        return _attend(self, launchers, x, cut, other) if self.attends else _move(self, launchers, x)


def _attend(problem: Problem, launchers: Launchers, x: dict[str, Tensor], cut: bool, other: bool) -> Results:
    q, k, v, do, stat = x.values()
    edges = [0, problem.tokens // 3, problem.tokens] if cut and problem.tokens > 2 else [0, problem.tokens]

    def spans(*like: Tensor) -> list[Span]:
        return [
            Span(start, tuple(_nan(t[start:stop]) for t in like))
            for start, stop in zip(edges, edges[1:], strict=False)
        ]  # fmt: skip

    if problem.key.kernel == "attend_forward":
        out, lse = spans(do), None if other else _nan(stat.permute(2, 1, 0))
        launchers.attend_forward(q, k, v, [Span(s.start, (*s.views, None)) for s in out], lse, problem.options)
        return {"out": _parts(out, 0)} | ({} if lse is None else {"lse": [lse]})
    (o,), (lse,) = problem.forward.values()
    delta = (o.double() * do.double()).sum(-1).to(stat.dtype)
    dq, dkv = spans(q), spans(*(t.to(stat.dtype) for t in (k, v))) if other else spans(k, v)
    launchers.attend_backward(q, k, v, do, lse.to(stat.dtype), delta, dq, dkv, problem.options)
    return {"dq": _parts(dq, 0), "dk": _parts(dkv, 0), "dv": _parts(dkv, 1)}


def _parts(spans: list[Span], view: int) -> list[Tensor]:
    return [part for span in spans if (part := span.views[view]) is not None]


def _move(problem: Problem, launchers: Launchers, x: dict[str, Tensor]) -> Results:
    """The layout kernels, with RoPE and QK-norm where there is such."""
    (D, _), tokens, device = problem.key.dims, problem.tokens, problem.device
    q, k, v, do, stat = (t.transpose(0, 1) for t in x.values())  # [1, L, heads, dim]
    angles = torch.arange(tokens, device=device)[:, None] * torch.logspace(0, -4, D // 2, device=device)  # [L, D / 2]
    weight = torch.linspace(0.5, 1.5, D, device=device).to(problem.dtype).to(q.dtype)
    transform = Transform(angles.cos()[None], angles.sin()[None], D, False, weight, weight)
    parts = {name: list(t.chunk(RANKS, 2)) for name, t in x.items()}  # [L, 1, heads of a rank, dim]
    empty = {name: [_nan(t) for t in of_ranks] for name, of_ranks in parts.items()}

    def qkv_rows(of: dict[str, list[Tensor]]) -> list[QKVRows]:
        each = zip(of["q"], of["k"], of["v"], strict=True)
        return [QKVRows(*rows, i * problem.heads, i * problem.kv_heads) for i, rows in enumerate(each)]

    def o_rows(of: dict[str, list[Tensor]]) -> list[ORows]:
        return [ORows(o, s, i * problem.heads) for i, (o, s) in enumerate(zip(of["do"], of["stat"], strict=True))]

    if problem.key.kernel == "pack":
        launchers.pack(q, k, v, qkv_rows(empty), transform)
        return {name: empty[name] for name in ("q", "k", "v")}
    if problem.key.kernel == "pack_grad":
        launchers.pack_grad(do, do, None, o_rows(empty))
        return {"do": empty["do"], "delta": empty["stat"]}
    if problem.key.kernel == "unpack":
        out, lse = _nan(do), _nan(stat)
        launchers.unpack(o_rows(parts), out, lse)
        return {"out": [out], "lse": [lse]}
    made = _nan(q), _nan(k), _nan(v)
    norms = launchers.unpack_grad(qkv_rows(parts), q, k, *made, transform)
    found = zip(OUTPUTS["unpack_grad"], (*made, *norms), strict=True)
    return {name: [t] for name, t in found if t is not None}


def _nan(like: Tensor) -> Tensor:
    return torch.full(like.shape, torch.nan, dtype=like.dtype, device=like.device)


# -- the gate


class Error(NamedTuple):
    """A relative error, and what it may be."""

    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


def gate(problem: Problem, tiles: Tiles) -> dict[str, Error]:
    """Every result of the problem's kernel with these tiles, held against fp64."""
    exact, peer = _expected(problem)
    errors: dict[str, Error] = {}
    for other in problem.variants:
        with _config.fixed(problem.key.kernel, tiles):
            found = problem.run(KERNELS, cut=True, other=other)
        for name in (name for name in OUTPUTS[problem.key.kernel] if name in found):
            result = _whole(problem, found[name])
            allowed = truth.allowed(torch.float32 if name in SUMS else problem.dtype, peer[name])
            worst(errors, name, Error(truth.relative_error(result, exact[name]), allowed))
    return errors


def worst(errors: dict[str, Error], name: str, found: Error) -> None:
    """Keep of each name the error that comes nearest to what is allowed, or furthest beyond it."""
    if name not in errors or found.error / found.allowed > errors[name].error / errors[name].allowed:
        errors[name] = found


@lru_cache(maxsize=8)
def _expected(problem: Problem) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The results in fp64, and the errors of PyTorch in the problem's dtype."""

    exact = {name: _whole(problem, parts) for name, parts in problem.run(TWINS, torch.float64).items()}
    if problem.attends:
        return exact, dict.fromkeys(exact, 0.0) | _errors_of_sdpa(problem)
    plain = {name: _whole(problem, parts) for name, parts in problem.run(TWINS).items()}
    return exact, {name: truth.relative_error(plain[name], exact[name]) for name in exact}


def _whole(problem: Problem, parts: list[Tensor]) -> Tensor:
    """The parts of a result along its tokens, or of the layout kernels along its heads, as one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 0 if problem.attends else 2)


def _errors_of_sdpa(problem: Problem) -> dict[str, float]:
    """Of PyTorch's own attention in this dtype, with the masks that it knows."""
    options = problem.options
    masks: dict[str, Any] = {"causal": options.causal, "window": options.window, "scale": options.scale}
    *qkv, do = (problem.inputs[name].transpose(0, 1).contiguous() for name in ("q", "k", "v", "do"))
    leaves = [x.requires_grad_() for x in qkv]
    out = truth.sdpa(leaves[0], leaves[1], leaves[2], **masks)
    grads = torch.autograd.grad(out, leaves, do)
    q, k, v = (x.detach() for x in qkv)
    exact = truth.attention(q, k, v, do, **masks)._asdict()
    found = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))
    return {name: truth.relative_error(x, exact[name]) for name, x in found.items()}


# -- launches


class Prepared(NamedTuple):
    """A launch, and the memory that it writes to."""

    launch: _config.Launch
    results: Results

    def run(self) -> None:
        launch = self.launch
        _config.launch(launch.kernel, launch.grid, **launch.options, **launch.args)


def prepare(problem: Problem, tiles: Tiles, *, other: bool = False) -> Prepared:
    """The launch of the problem's kernel with these tiles, and of no other kernel."""
    kernel = problem.key.kernel
    if kernel in ("attend_dq", "attend_dkv"):
        _ = problem.forward  # a launch of its own, not to be recorded
    with _config.fixed(kernel, tiles), _config.capture(_config.architecture(problem.device)) as launches:
        results = problem.run(KERNELS, other=other)
    (launch,) = [x for x in launches if x.kernel.__name__.strip("_") == f"{kernel}_kernel"]
    return Prepared(launch, results)


def candidates(
    key: Key, first: Tiles, stages: tuple[int, ...] = (1, 2, 3), descriptors: tuple[bool, ...] = (False,)
) -> list[Tiles]:
    """Configurations to try, beginning with the one of the tables; all that is certain to spill is left out.

    Attention is tried with rows loaded by TMA or by pointers, as `descriptors` says.
    """
    found = [first]
    steps = [16 << i for i in range(4)]
    assert steps[-1] == BLOCK
    for warps in (4, 8):
        least, most = (n * 32 * warps for n in FLOATS)
        if not key.kernel.startswith("attend"):
            tokens = [T for T in steps if least <= T * max(key.dims) <= most]
            found += [{"BLOCK_T": T, "num_warps": warps, "num_stages": 1} for T in tokens]
            continue
        held, walked = ("BLOCK_N", "BLOCK_M") if key.kernel == "attend_dkv" else ("BLOCK_M", "BLOCK_N")
        width = {"attend_forward": key.dims[1], "attend_dq": key.dims[0], "attend_dkv": sum(key.dims)}[key.kernel]
        scores = 1 if key.kernel == "attend_forward" else 2
        for rows in steps:
            for n in steps:
                if n <= rows and least <= rows * (width + scores * n) <= most:
                    blocks = {held: rows, walked: n}
                    each = [{**blocks, "num_warps": warps, "num_stages": s} for s in stages]
                    found += [tiles | {"descriptors": True} if d else tiles for tiles in each for d in descriptors]
    return [tiles for i, tiles in enumerate(found) if tiles not in found[:i]]
