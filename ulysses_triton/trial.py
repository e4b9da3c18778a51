"""One kernel of one problem with one configuration: the candidates, whether its results are right, and its launch.

Inputs are random rows as a rank holds them. What is right is what the kernel's twin gives in fp64 on the same device;
how far from it a result may be follows from what PyTorch reaches in the problem's dtype (`truth.allowed`). Outputs hold
NaN until the kernel writes them. Lengths and head counts are run-time values of the kernels: the binary that is checked
at one size is the one that is timed at another. Calls use several binaries of a kernel (`VARIANTS`): all are checked.
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
from .kernels._views import HeadGrads, Options, ORows, QKVRows, Span, Transform
from .kernels.attend_backward import attend_backward
from .kernels.attend_forward import attend_forward
from .kernels.pack import pack, pack_grad
from .kernels.unpack import unpack, unpack_grad
from .trial_options import Size, options

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
    "attend_forward": ("out", "lse", "span_lse"),
    "attend_dq": ("dq", "dsinks", "dslopes"),
    "attend_dkv": ("dk", "dv"),
    "pack": ("q", "k", "v"),
    "pack_grad": ("do", "delta"),
    "unpack": ("out", "lse"),
    "unpack_grad": ("dq", "dk", "dv", "dq_norm", "dk_norm"),
}
SUMS = ("lse", "span_lse", "delta", "dq_norm", "dk_norm")  # outputs in fp32, whatever the dtype


class Variant(NamedTuple):
    """In which form a kernel is asked for its results. Each is a binary of its own."""

    lse: bool = True  # forward keeps an LSE, for a backward
    span_lse: bool = False  # an LSE travels beside O
    partial: bool = False  # dk and dv are fp32, as sums that ranks share
    aligned: bool = True  # rows begin on 16 bytes


PLAIN = Variant()  # the one that is timed
VARIANTS: dict[str, tuple[Variant, ...]] = {
    **dict.fromkeys(OUTPUTS, (PLAIN, Variant(aligned=False))),
    "attend_forward": (PLAIN, Variant(lse=False), Variant(span_lse=True), Variant(aligned=False)),
    "attend_dkv": (PLAIN, Variant(partial=True), Variant(aligned=False)),
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

    @cached_property
    def options(self) -> Options:
        return options(
            self.key.flags, self.key.dims[0] ** -0.5, Size(self.tokens, self.heads, self.kv_heads, self.device)
        )

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
    def variants(self) -> tuple[Variant, ...]:
        return VARIANTS[self.key.kernel]

    def run(
        self, launchers: Launchers, dtype: torch.dtype | None = None, variant: Variant = PLAIN, *, cut: bool = False
    ) -> Results:  # fmt: skip
        """Run the kernel, or its twin in `dtype`, on these inputs; `cut`: attention's rows go to two spans."""
        x = {name: t.to(dtype or self.dtype) for name, t in self.inputs.items() if name != "stat"}
        x = x if variant.aligned else {name: _unaligned(t) for name, t in x.items()}
        x["stat"] = self.inputs["stat"].to(torch.promote_types(x["q"].dtype, torch.float32))
        return _attend(self, launchers, x, variant, cut) if self.attends else _move(self, launchers, x)


def _attend(problem: Problem, launchers: Launchers, x: dict[str, Tensor], variant: Variant, cut: bool) -> Results:
    q, k, v, do, stat = x.values()
    edges = [0, problem.tokens // 3, problem.tokens] if cut and problem.tokens > 2 else [0, problem.tokens]

    def empty(like: Tensor) -> Tensor:
        return _nan(like) if variant.aligned else _unaligned(_nan(like))

    def spans(*like: Tensor | None) -> list[Span]:
        return [
            Span(start, tuple(t if t is None else empty(t[start:stop]) for t in like))
            for start, stop in zip(edges, edges[1:], strict=False)
        ]  # fmt: skip

    if problem.key.kernel == "attend_forward":
        out = spans(do, stat if variant.span_lse else None)
        lse = _nan(stat.permute(2, 1, 0)) if variant.lse else None
        launchers.attend_forward(q, k, v, out, lse, problem.options)
        found = {"out": _parts(out, 0), "lse": [] if lse is None else [lse], "span_lse": _parts(out, 1)}
        return {name: parts for name, parts in found.items() if parts}
    (o,), (lse,) = (problem.forward[name] for name in ("out", "lse"))
    delta = (o.double() * do.double()).sum(-1).to(stat.dtype) - stat  # stat as the gradient of the LSE
    dq, dkv = spans(q), spans(*(t.to(stat.dtype) for t in (k, v))) if variant.partial else spans(k, v)
    per_head = (problem.options.sinks, problem.options.slopes)
    sums = HeadGrads(*(None if given is None else _nan(given.to(stat.dtype)) for given in per_head))
    launchers.attend_backward(q, k, v, do, lse.to(stat.dtype), delta, dq, dkv, problem.options, sums)
    of_heads = {f"d{name}": [t] for name, t in sums._asdict().items() if t is not None}
    return {"dq": _parts(dq, 0), "dk": _parts(dkv, 0), "dv": _parts(dkv, 1)} | of_heads


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


def _unaligned(rows: Tensor) -> Tensor:
    """A copy, of whose rows (all but the first two dimensions) the first begins, and each lies, one element further."""
    padded = rows.new_empty(*rows.shape[:2], rows.shape[2:].numel() + 1)
    return padded[..., 1:].unflatten(-1, rows.shape[2:]).copy_(rows)


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
    for variant in problem.variants:
        with _config.fixed(problem.key.kernel, tiles):
            found = problem.run(KERNELS, variant=variant, cut=True)
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

    most = Variant(span_lse=True)
    exact = {name: _whole(problem, parts) for name, parts in problem.run(TWINS, torch.float64, most).items()}
    if problem.attends:
        return exact, dict.fromkeys(exact, 0.0) | _errors_of_sdpa(problem)
    plain = {name: _whole(problem, parts) for name, parts in problem.run(TWINS).items()}
    return exact, {name: truth.relative_error(plain[name], exact[name]) for name in exact}


def _whole(problem: Problem, parts: list[Tensor]) -> Tensor:
    """The parts of a result along its tokens, or of the layout kernels along its heads, as one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 0 if problem.attends else 2)


def _errors_of_sdpa(problem: Problem) -> dict[str, float]:
    """Of PyTorch's own attention in this dtype, with the masks that it knows.

    Of sinks and slopes, which it has no gradients for, the error may be that of dq.
    """
    options = problem.options
    masks: dict[str, Any] = {"causal": options.causal, "window": options.window, "scale": options.scale}
    *qkv, do = (problem.inputs[name].transpose(0, 1).contiguous() for name in ("q", "k", "v", "do"))
    leaves = [x.requires_grad_() for x in qkv]
    out = truth.sdpa(leaves[0], leaves[1], leaves[2], **masks)
    grads = torch.autograd.grad(out, leaves, do)
    q, k, v = (x.detach() for x in qkv)
    exact = truth.attention(q, k, v, do, **masks)._asdict()
    found = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))
    errors = {name: truth.relative_error(x, exact[name]) for name, x in found.items()}
    return errors | dict.fromkeys(("dsinks", "dslopes"), errors["dq"])


# -- launches


class Prepared(NamedTuple):
    """A launch, and the memory that it writes to."""

    launch: _config.Launch
    results: Results

    def run(self) -> None:
        launch = self.launch
        _config.launch(launch.kernel, launch.grid, **launch.options, **launch.args)


def prepare(problem: Problem, tiles: Tiles, variant: Variant = PLAIN) -> Prepared:
    """The launch of the problem's kernel with these tiles, and of no other kernel."""
    kernel = problem.key.kernel
    if kernel in ("attend_dq", "attend_dkv"):
        _ = problem.forward  # a launch of its own, not to be recorded
    with _config.fixed(kernel, tiles), _config.capture(_config.architecture(problem.device)) as launches:
        results = problem.run(KERNELS, variant=variant)
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
