"""One layer as a case: its inputs for the whole sequence, the op on a rank's shard of them, and what it should give.

`exact` is the layer on one device in fp64, `peer` the same by PyTorch's own attention in the case's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import truth
from .api import ulysses_attention, ulysses_qkv_attention
from .errors import OptionError
from .group import UlyssesGroup
from .local import choose
from .placement import place
from .shard import shard_lens
from .spec import Problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
EPS = 1e-6  # of QK-norm
DROPOUT_SEED = (5 << 40) + (3 << 31) + 12345  # with something in both of its words
PER_HEAD = ("dsinks", "dslopes")  # of which `exact` has every query's part, [B, R, Hq]
SHARES = ("dq_norm", "dk_norm", *PER_HEAD)  # results whose sum over the ranks is the gradient


@dataclass(frozen=True)
class Case:
    """One layer, in whole-model numbers."""

    tokens: int = 2048
    batch: int = 1
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    value_dim: int = 64
    dtype: str = "fp32"
    causal: bool = True
    window: tuple[int, int] | None = None
    softcap: float | None = None
    documents: int = 0  # packed into each sequence; 0: it is one text
    sinks: bool = False
    alibi: bool = False
    dropout: float = 0.0
    uneven: bool = False
    recompute: bool = False
    attention: str = "auto"
    rope: bool = False
    qk_norm: bool = False
    ranks: int = 1
    seed: int = 0

    @property
    def fused(self) -> bool:
        """Whether it goes through `ulysses_qkv_attention`."""
        return self.rope or self.qk_norm

    @property
    def lens(self) -> tuple[int, ...]:
        """Shard lengths; uneven ones are in the proportions 1 : 2 : 3 ..."""
        if not self.uneven:
            return shard_lens(self.tokens, self.ranks)
        cuts = [self.tokens * r * (r + 1) // (self.ranks * (self.ranks + 1)) for r in range(self.ranks + 1)]
        return tuple(b - a for a, b in zip(cuts, cuts[1:], strict=False))

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def wide(self) -> torch.dtype:
        """Of what is small and kept in full precision."""
        return torch.float64 if self.dtype == "fp64" else torch.float32

    @property
    def options(self) -> tuple[str, ...]:
        """What it has that PyTorch's attention has no fast kernel for."""
        said = {
            f"window {self.window}": self.window is not None,
            f"softcap {self.softcap}": self.softcap is not None,
            f"{self.documents} documents": self.documents > 0,
            "sinks": self.sinks,
            "ALiBi": self.alibi,
            f"dropout {self.dropout}": self.dropout > 0,
        }
        return tuple(text for text, given in said.items() if given)

    def offsets(self, b: int) -> list[int]:
        """Where a sequence's documents begin, and its end: of random lengths, in the middle one of 0 and one of 1."""
        random = torch.Generator().manual_seed(self.seed + b)
        cuts = torch.randint(self.tokens, (self.documents - 3,), generator=random).sort().values.tolist()
        middle = len(cuts) // 2
        cuts = [0, *cuts, self.tokens - 1]  # of all tokens but one
        at = cuts[middle]
        return [*cuts[: middle + 1], at, *(cut + 1 for cut in cuts[middle:])]

    def shard(self, rank: int) -> slice:
        """The tokens of a rank."""
        return slice(sum(self.lens[:rank]), sum(self.lens[: rank + 1]))

    def check(self, device: str) -> None:
        """Raise the error of the first thing that is wrong with this layer on a device type."""
        for name in ("tokens", "batch", "heads", "kv_heads", "head_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name.replace('_', '-')} {getattr(self, name)}; it must be at least 1")
        if self.documents and self.documents < 3:
            raise OptionError(f"--documents {self.documents}; it must be at least 3: one is empty, one a single token")
        if self.fused and self.value_dim != self.head_dim:
            raise OptionError("--rope and --qk-norm need equal --head-dim and --value-dim: q, k and v are one tensor")
        found = self.problem(device)
        found.check()
        place(found)
        choose(found)

    def problem(self, device: str) -> Problem:
        """What this layer asks for, with gradients, of tensors on a device type."""
        return Problem(
            batch=self.batch, lens=self.lens, kv_lens=self.lens, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.head_dim, value_dim=self.value_dim, dtype=str(self.torch_dtype).removeprefix("torch."),
            device=device, causal=self.causal, scale=self.scale, window=self.window, softcap=self.softcap,
            documents=self.documents > 0, sinks=self.sinks, slopes=self.alibi, dropout_p=self.dropout,
            rope_dim=self.head_dim if self.rope else 0, q_norm=self.qk_norm, k_norm=self.qk_norm,
            attention=self.attention, recompute=self.recompute, grad=True,
        )  # fmt: skip

    def __str__(self) -> str:
        lens = f"{self.lens[0]} each" if len(set(self.lens)) == 1 else f"in shards of {', '.join(map(str, self.lens))}"
        dims = f"{self.head_dim}" if self.head_dim == self.value_dim else f"{self.head_dim} and {self.value_dim}"
        marks = ["causal" if self.causal else "not causal"]
        marks += [*self.options, *["QK-norm"] * self.qk_norm, *["RoPE"] * self.rope, *["recompute"] * self.recompute]
        return (
            f"{self.tokens} tokens on {self.ranks} rank{'s' * (self.ranks > 1)}, {lens}; batch {self.batch}; "
            f"{self.heads} query and {self.kv_heads} kv heads of {dims}; {self.dtype}; {', '.join(marks)}"
        )


class Inputs(NamedTuple):
    """The whole sequence; equal on every rank."""

    q: Tensor  # [B, S, Hq, D]
    k: Tensor  # [B, S, Hkv, D]
    v: Tensor  # [B, S, Hkv, Dv]
    dout: Tensor  # [B, S, Hq, Dv]
    angles: Tensor | None  # [S, D / 2]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    ids: Tensor | None = None  # [B, S], the document of every token
    sinks: Tensor | None = None  # [Hq], like the slopes in fp32; in fp64 beside fp64
    slopes: Tensor | None = None  # [Hq]

    def zero_but(self, rows: Tensor) -> Inputs:
        """With a gradient of the output in these rows only."""
        kept = torch.zeros_like(self.dout)
        kept[:, rows] = self.dout[:, rows]
        return self._replace(dout=kept)


def draw(case: Case, device: torch.device) -> Inputs:
    random = torch.Generator(device).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).to(case.torch_dtype)

    def angles() -> Tensor:
        return torch.rand(case.tokens, case.head_dim // 2, generator=random, device=device) * 6

    B, S, D, Dv = case.batch, case.tokens, case.head_dim, case.value_dim
    q, k = normal(B, S, case.heads, D), normal(B, S, case.kv_heads, D)
    v, dout = normal(B, S, case.kv_heads, Dv), normal(B, S, case.heads, Dv)
    weights = [1 + normal(D) / 4 if case.qk_norm else None for _ in range(2)]
    found = Inputs(q, k, v, dout, angles() if case.rope else None, *weights)
    if case.documents:
        lengths = torch.tensor([case.offsets(b) for b in range(B)]).diff()
        numbers = torch.arange(case.documents)
        found = found._replace(ids=torch.stack([numbers.repeat_interleave(n) for n in lengths]).to(device))
    if case.sinks:
        found = found._replace(sinks=normal(case.heads).to(case.wide))
    if case.alibi:
        exponents = torch.arange(1, case.heads + 1, device=device, dtype=case.wide) * (-8 / case.heads)
        found = found._replace(slopes=exponents.exp2())
    return found


Results = dict[str, Tensor]


class Layer:
    """The op on one rank's shard, from inputs to gradients."""

    def __init__(self, case: Case, inputs: Inputs, group: UlyssesGroup) -> None:
        self.case, self.group = case, group
        part = case.shard(group.rank)
        shards = [x[:, part] for x in inputs[:3]]
        if case.fused:
            shards = [torch.cat([x.flatten(2) for x in shards], -1)]
        weights = {"q_norm": inputs.q_norm, "k_norm": inputs.k_norm, "sinks": inputs.sinks, "slopes": inputs.slopes}
        self.weights = {n: w.clone().requires_grad_() for n, w in weights.items() if w is not None}
        self.leaves = [x.clone().requires_grad_() for x in shards]
        self.dout = inputs.dout[:, part].contiguous()
        angles = None if inputs.angles is None else inputs.angles[part].double()
        self.rope = None if angles is None else (angles.cos().to(case.wide), angles.sin().to(case.wide))
        packed = case.documents > 0
        self.options: dict[str, Any] = {
            "causal": case.causal,
            "window": case.window,
            "softcap": case.softcap,
            "sinks": self.weights.get("sinks"),
            "alibi_slopes": self.weights.get("slopes"),
            "cu_seqlens": case.offsets(0) if packed and case.batch == 1 else None,
            "segment_ids": inputs.ids[:, part] if inputs.ids is not None and case.batch > 1 else None,
            "dropout_p": case.dropout,
            "dropout_seed": DROPOUT_SEED if case.dropout else None,
            "lens": case.lens if len(set(case.lens)) > 1 else None,
            "attention": case.attention,
            "recompute": "exchange" if case.recompute else None,
        }

    def forward(self) -> Tensor:
        case = self.case
        if case.fused:
            out = ulysses_qkv_attention(
                self.leaves[0], self.group, heads=case.heads, kv_heads=case.kv_heads, rope=self.rope, norm_eps=EPS,
                q_norm=self.weights.get("q_norm"), k_norm=self.weights.get("k_norm"), **self.options,
            )  # fmt: skip
        else:
            q, k, v = self.leaves
            out = ulysses_attention(q, k, v, self.group, **self.options)
        assert isinstance(out, Tensor)
        return out

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [*self.leaves, *self.weights.values()], self.dout)

    def results(self) -> Results:
        """out and all gradients of this rank's shard; of what is not sharded (SHARES), this rank's share."""
        case = self.case
        out = self.forward()
        grads = self.backward(out)
        qkv = grads[: len(self.leaves)]
        if case.fused:
            sizes = [case.heads * case.head_dim, case.kv_heads * case.head_dim, case.kv_heads * case.value_dim]
            qkv = tuple(g.unflatten(-1, (-1, case.head_dim)) for g in qkv[0].split(sizes, -1))
        named = zip(("dq", "dk", "dv"), qkv, strict=True)
        shares = zip((f"d{n}" for n in self.weights), grads[len(self.leaves) :], strict=True)
        return {"out": out.detach(), **dict(named), **dict(shares)}


def _moved(inputs: Inputs, rows: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves (q of the rows, k, v, norm weights) in `dtype`, and q and k after norm and RoPE."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (inputs.q[:, rows], inputs.k, inputs.v))
    weights = [None if w is None else w.to(dtype).requires_grad_() for w in (inputs.q_norm, inputs.k_norm)]
    angles = inputs.angles
    moved = [
        truth.rotate(truth.rms_norm(q, weights[0], EPS), None if angles is None else angles[rows]),
        truth.rotate(truth.rms_norm(k, weights[1], EPS), angles),
    ]
    return [q, k, v, *(w for w in weights if w is not None)], moved


def exact(case: Case, inputs: Inputs, rows: Tensor) -> Results:
    """In fp64: out and dq of the rows, and the gradients of the rest of the layer for these rows' dout."""
    leaves, moved = _moved(inputs, rows, torch.float64)
    q, k = (x.detach() for x in moved)
    found = truth.attention(
        q, k, inputs.v, inputs.dout[:, rows], causal=case.causal, scale=case.scale, window=case.window,
        softcap=case.softcap, documents=inputs.ids, sinks=inputs.sinks if case.sinks else None,
        slopes=inputs.slopes if case.alibi else None,
        dropout=(case.dropout, DROPOUT_SEED) if case.dropout else None, rows=rows,
    )  # fmt: skip
    grads = [found.dq, found.dk]
    if case.fused:
        grads = list(torch.autograd.grad(moved, leaves[:2] + leaves[3:], grads))
    named = {"out": found.out, "dq": grads[0], "dk": grads[1], "dv": found.dv}
    named |= dict(zip(("dq_norm", "dk_norm"), grads[2:], strict=False))
    per_head = {"dsinks": found.dsinks, "dslopes": found.dslopes}
    asked = {"dsinks": case.sinks, "dslopes": case.alibi}
    return named | {name: grad for name, grad in per_head.items() if asked[name]}


def comparable(case: Case) -> Case:
    """The case without what PyTorch's attention cannot do, or only with more rounding (a bias, in the case's dtype)."""
    return replace(case, softcap=None, sinks=False, alibi=False, dropout=0.0)


def peer(case: Case, inputs: Inputs) -> Results:
    """The whole layer, of a `comparable` case, by PyTorch's own attention in its dtype.

    Norm and RoPE are in fp32, rounded once, as ours.
    """
    everything = torch.arange(case.tokens, device=inputs.q.device)
    leaves, moved = _moved(inputs, everything, torch.float32 if case.fused else case.torch_dtype)
    q, k, v = (x.to(case.torch_dtype) for x in (*moved, leaves[2]))
    out = truth.sdpa(q, k, v, causal=case.causal, scale=case.scale, window=case.window, documents=inputs.ids)
    grads = (g.to(case.torch_dtype) for g in torch.autograd.grad(out, leaves, inputs.dout))
    names = ("dq", "dk", "dv", "dq_norm", "dk_norm")
    return {"out": out.detach(), **dict(zip(names, grads, strict=False))}
