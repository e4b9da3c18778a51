"""One layer as a test case: drawn inputs for the whole sequence, every rank's part of them, and the truth.

`Case` says what is computed. `run` computes it on one rank of a group, `truth` in fp64 on one device, and `check` holds
all ranks' results against the truth at the tolerance of the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import oracle
import torch
from hypothesis import strategies as st
from torch import Tensor

from ulysses_triton import ulysses_attention, ulysses_qkv_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
TOLERANCE = {"fp32": 2e-6, "fp64": 1e-13}  # relative, by norm; bf16 and fp16 are held against PyTorch's own error
FLOOR = 2e-4  # for bf16 and fp16: what an error may always be
FEW = 2048  # elements


@dataclass(frozen=True)
class Case:
    """Whole-model numbers; `kv_lens` None for self-attention. `layout` is how q, k and v lie in memory."""

    lens: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int = 16
    value_dim: int = 16
    batch: int = 1
    dtype: str = "fp32"
    causal: bool = True
    kv_lens: tuple[int, ...] | None = None
    layout: str = "bshd"
    attention: str = "reference"
    recompute: str | None = None
    return_lse: bool = False
    scale: float | None = None
    window: tuple[int, int] | None = None
    softcap: float | None = None
    seed: int = 0
    fused: bool = False
    rope: int = 0
    interleaved: bool = False
    norm: bool = False

    @property
    def ranks(self) -> int:
        return len(self.lens)

    def on(self, ranks: int) -> Case:
        """The same whole sequence on another number of ranks."""
        return replace(
            self, lens=_split(sum(self.lens), ranks), kv_lens=self.kv_lens and _split(sum(self.kv_lens), ranks)
        )

    def __str__(self) -> str:
        return repr(self)


def _split(tokens: int, ranks: int) -> tuple[int, ...]:
    return tuple(tokens // ranks + (r < tokens % ranks) for r in range(ranks))


def whole_inputs(case: Case) -> dict[str, Tensor]:
    """Everything the layer takes, for the whole sequence, in the case's dtype, with the gradients that come back."""
    random = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    tokens, kv_tokens = sum(case.lens), sum(case.kv_lens or case.lens)
    found = {
        "q": draw(case.batch, tokens, case.heads, case.dim),
        "k": draw(case.batch, kv_tokens, case.kv_heads, case.dim),
        "v": draw(case.batch, kv_tokens, case.kv_heads, case.value_dim),
        "dout": draw(case.batch, tokens, case.heads, case.value_dim),
        "dlse": torch.randn((case.batch, tokens, case.heads), generator=random, dtype=torch.float64),
    }
    if case.rope:
        found["angles"] = torch.rand((tokens, case.rope // 2), generator=random, dtype=torch.float64) * 6
    if case.norm:
        found |= {name: (1 + draw(case.dim) / 4).to(dtype) for name in ("q_norm", "k_norm")}
    return found


def truth(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """out, lse and all gradients, by the oracle in fp64; or in another dtype, for the error PyTorch itself makes."""
    inputs = {name: t.to(dtype) if name != "angles" else t for name, t in whole_inputs(case).items()}
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if n in ("q", "k", "v", "q_norm", "k_norm")}
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # the transform rounds once, as ours does
    angles = inputs["angles"].to(wide) if case.rope else None
    norms = {n: leaves[n].to(wide) if case.norm else None for n in ("q_norm", "k_norm")}
    q, k = (
        oracle.rope(oracle.rms_norm(leaves[n].to(wide), norms[f"{n}_norm"], 1e-6), angles, case.interleaved).to(dtype)
        for n in ("q", "k")
    )
    out, lse = oracle.attention(
        q.to(wide), k.to(wide), leaves["v"].to(wide), causal=case.causal, scale=case.scale, window=case.window,
        softcap=case.softcap,
    )  # fmt: skip
    if dtype != torch.float64:
        repeat = case.heads // case.kv_heads
        parts = [q, k.repeat_interleave(repeat, 2), leaves["v"].repeat_interleave(repeat, 2)]
        width = max(case.dim, case.value_dim)  # of equal head dims: with others PyTorch takes them to fp32 in between
        parts = [torch.nn.functional.pad(t, (0, width - t.size(-1))) for t in parts]
        mask: dict[str, Any] = {"is_causal": case.causal}
        if case.window:
            mask = {"attn_mask": oracle.allowed(q.size(1), k.size(1), causal=case.causal, window=case.window)}
        out = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in parts), **mask, scale=case.dim**-0.5 if case.scale is None else case.scale
        ).transpose(1, 2)[..., : case.value_dim]
    total = (out * inputs["dout"]).sum()
    if case.return_lse:
        total = total + (lse * inputs["dlse"]).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {"out": out.detach(), "lse": lse.detach()}
    return found | {
        f"d{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), grads, strict=True)
    }


def run(case: Case, rank: int, group: Any) -> dict[str, Tensor]:
    """This rank's part of the layer: out, lse, and the gradients of its shards (of the norm weights: its share)."""
    inputs = whole_inputs(case)
    part = slice(sum(case.lens[:rank]), sum(case.lens[: rank + 1]))
    kv_lens = case.kv_lens or case.lens
    kv_part = slice(sum(kv_lens[:rank]), sum(kv_lens[: rank + 1]))
    shards = {n: inputs[n][:, part if n in ("q", "dout", "dlse") else kv_part] for n in ("q", "k", "v", "dout", "dlse")}
    uneven = len(set(case.lens)) > 1
    options: dict[str, Any] = {
        "causal": case.causal,
        "scale": case.scale,
        "window": case.window,
        "softcap": case.softcap,
        "lens": case.lens if uneven else None,
        "attention": case.attention,
        "recompute": case.recompute,
        "return_lse": case.return_lse,
    }
    norms = {n: inputs[n].clone().requires_grad_() for n in ("q_norm", "k_norm") if case.norm}
    if case.fused:
        qkv = torch.cat([shards[n].flatten(2) for n in ("q", "k", "v")], dim=-1)
        leaf = _laid_out(qkv, case.layout).requires_grad_()
        rope = None
        if case.rope:
            angles = inputs["angles"][part]
            rope = (angles.cos(), angles.sin())
            rope = rope if case.dtype == "fp64" else (rope[0].float(), rope[1].float())
        result = ulysses_qkv_attention(
            leaf, group, heads=case.heads, kv_heads=case.kv_heads, rope=rope, rope_interleaved=case.interleaved,
            rope_dim=case.rope or None, **norms, **options,
        )  # fmt: skip
        leaves = {"qkv": leaf} | norms
    else:
        if case.kv_lens is not None:
            options["kv_lens"] = case.kv_lens
            options["lens"] = case.lens
        leaves = {n: _laid_out(shards[n], case.layout).requires_grad_() for n in ("q", "k", "v")}
        result = ulysses_attention(*leaves.values(), group, **options)
    out, lse = result if case.return_lse else (result, torch.zeros(0))
    grads_out = (shards["dout"], shards["dlse"].to(lse.dtype)) if case.return_lse else (shards["dout"],)
    grads = torch.autograd.grad(result if case.return_lse else [result], list(leaves.values()), grads_out)
    found = {"out": out.detach(), "lse": lse.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    if case.fused:
        sizes = [case.heads * case.dim, case.kv_heads * case.dim, case.kv_heads * case.dim]
        parts = zip(("dq", "dk", "dv"), found.pop("dqkv").split(sizes, -1), strict=True)
        found |= {n: g.unflatten(-1, (-1, case.dim)) for n, g in parts}
    return found


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in other memory: contiguous, heads before tokens, or as a slice of something wider."""
    x = x.detach()
    if layout == "bhsd" and x.dim() == 4:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sbhd":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "slice":
        wide = torch.full((*x.shape[:-1], x.size(-1) + 5), float("nan"), dtype=x.dtype)
        wide[..., 3 : 3 + x.size(-1)] = x
        return wide[..., 3 : 3 + x.size(-1)]
    return x.clone()


def joined(case: Case, results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All ranks' parts as one: shards joined in rank order, shares of the norm weights' gradients added."""
    found = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        if name in ("dq_norm", "dk_norm"):
            found[name] = torch.stack([part.double() for part in parts]).sum(0)
        elif name == "lse" and not case.return_lse:
            continue
        else:
            found[name] = torch.cat(parts, dim=1)
    return found


def check(case: Case, results: list[dict[str, Tensor]]) -> None:
    """Hold all ranks' results against fp64: fp32 by a fixed tolerance, bf16 and fp16 by twice PyTorch's own error.

    In few elements it is luck which of two errors is larger, and dq and dk may nearly cancel; such results may also be
    off by one unit in the last place of numbers of the size that they are sums of. PyTorch has no softcap; as its slope
    is at most 1, the error may be that of the same attention without.
    """
    expected = truth(case)
    dtype = DTYPES[case.dtype]
    low = case.dtype in ("bf16", "fp16")
    uncapped = replace(case, softcap=None)
    peer, exact = (truth(uncapped, dtype), truth(uncapped) if case.softcap else expected) if low else ({}, {})
    summand = expected["dv"].norm() / max(1, expected["dv"].numel()) ** 0.5
    errors = {}
    for name, result in joined(case, results).items():
        want = expected[name]
        assert result.shape == want.shape, f"{name}: shape {list(result.shape)}, expected {list(want.shape)}"
        finite = torch.isfinite(want)
        assert torch.equal(result[~finite].double(), want[~finite]), f"{name}: not -inf where no key is attended"
        want = want[finite]
        size = max(want.norm().item(), (summand * want.numel() ** 0.5).item() if want.numel() < FEW else 0.0, 1e-30)
        error = (result[finite].double() - want).norm().item() / size
        allowed = TOLERANCE.get(case.dtype, FLOOR)
        if low:
            peer_error = (peer[name][finite].double() - exact[name][finite]).norm().item() / size
            allowed = max(2 * peer_error, torch.finfo(dtype).eps if want.numel() < FEW else FLOOR)
        if not error <= allowed:
            errors[name] = f"{error:.3g} > {allowed:.3g}"
    assert not errors, f"{errors} for {case}"


@st.composite
def cases(draw: st.DrawFn, ranks: int, attentions: tuple[str, ...], max_tokens: int = 40) -> Case:
    """Cases for a number of ranks: shapes, heads, dtypes, shards, strides and options."""
    attention = draw(st.sampled_from(attentions))
    per_rank = draw(st.integers(1, 3))
    heads = ranks * per_rank
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    dim = draw(st.sampled_from([1, 3, 8, 16, 24, 33, 40, 50, 64, 100]))
    even = draw(st.booleans())
    if even:
        lens = (draw(st.integers(1, max_tokens)),) * ranks
    else:
        lens = tuple(draw(st.lists(st.integers(0, max_tokens), min_size=ranks, max_size=ranks)))
        lens = lens if sum(lens) else (1, *lens[1:])
    fused = draw(st.booleans())
    cross = not fused and draw(st.booleans()) and attention != "callable"
    kv_lens = tuple(draw(st.lists(st.integers(0, max_tokens), min_size=ranks, max_size=ranks))) if cross else None
    if cross and not sum(kv_lens):
        kv_lens = (1, *kv_lens[1:])
    dtypes = ["fp32", "bf16", "fp16"] + ["fp64"] * (attention == "reference")
    return Case(
        lens=lens,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=dim if fused or attention == "aten" else draw(st.sampled_from([dim, 8, 17, 32])),
        batch=draw(st.integers(1, 2)),
        dtype=draw(st.sampled_from(dtypes)),
        causal=draw(st.booleans()),
        kv_lens=kv_lens,
        layout=draw(st.sampled_from(["bshd", "bhsd", "sbhd", "slice"])),
        attention=attention,
        recompute=draw(st.sampled_from([None, "exchange"])),
        return_lse=attention != "aten" and draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3])),
        window=None if attention == "aten" else draw(st.none() | st.tuples(*[st.integers(-1, max_tokens)] * 2)),
        softcap=None if attention == "aten" else draw(st.sampled_from([None, 1.5, 30.0])),
        seed=draw(st.integers(0, 2**16)),
        fused=fused,
        rope=draw(st.sampled_from([0, dim // 2 * 2, dim // 4 * 2])) if fused else 0,
        interleaved=draw(st.booleans()),
        norm=fused and dim > 1 and draw(st.booleans()),  # of one channel it is the sign, whose gradient is rounding
    )
