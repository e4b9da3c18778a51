"""One layer as a test case: drawn inputs for the whole sequence, every rank's part of them, and the truth.

`Case` says what is computed. `run` computes it on one rank of a group, `truth` in fp64 on one device, and `check` holds
all ranks' results against the truth at the tolerance of the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import oracle
import torch
import triton
import triton.language as tl
from hypothesis import strategies as st
from torch import Tensor

from ulysses_triton import masks, ulysses_attention, ulysses_qkv_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
TOLERANCE = {"fp32": 2e-6, "fp64": 1e-13}  # relative, by norm; bf16 and fp16 are held against PyTorch's own error
FLOOR = 2e-4  # for bf16 and fp16: what an error may always be
FEW = 2048  # elements
SEED = (1 << 40) + (1 << 31) + 12345  # of dropout
LEAVES = ("q", "k", "v", "q_norm", "k_norm", "sinks", "slopes")
SHARES = ("dq_norm", "dk_norm", "dsinks", "dslopes")  # whose sum over the ranks is the gradient


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
    documents: str | None = None  # "runs" or "mixed" segment ids, "offsets" for cu_seqlens
    sinks: bool = False
    slopes: bool = False
    dropout: float = 0.0
    mask: str | None = None  # of MASKS; "... blocks" for a block mask of it
    seed: int = 0
    fused: bool = False
    rope: int = 0
    interleaved: bool = False
    norm: bool = False
    chunks: int = 1  # asked of the group

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


@masks.register
@triton.jit
def ahead(batch, head, q_pos, kv_pos, lengths_ptr):
    """Prefix LM: a prefix that all see, of a length per batch and head."""
    return (kv_pos <= q_pos) | (kv_pos < tl.load(lengths_ptr + batch * 3 + head % 3))


@masks.register
@triton.jit
def gapped(batch, head, q_pos, kv_pos):
    return (q_pos - kv_pos) % 3 != 1


LENGTHS = torch.tensor([4, 9, 0, 30, 1, 17])
MASKS = {"ahead": (ahead, LENGTHS), "gapped": gapped}
ASKED = {
    "ahead": lambda b, h, i, j: (j <= i) | (j < LENGTHS[b * 3 + h % 3]),
    "gapped": lambda b, h, i, j: torch.fmod(i - j, 3) != 1,
}


def _mask(case: Case, name: str) -> Any:
    mask = MASKS[name.split()[0]]
    if "blocks" not in name:
        return mask
    lengths = {"q_len": sum(case.lens), "kv_len": sum(case.kv_lens or case.lens)}
    return masks.block_mask(mask, batch=case.batch, heads=case.heads, **lengths)


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
    if case.sinks:
        found["sinks"] = draw(case.heads)
    if case.slopes:
        found["slopes"] = draw(case.heads).abs() / 8
    return found


def ids_of(case: Case) -> tuple[Tensor, Tensor] | None:
    """The documents' numbers of all queries and keys, [B, S] and [B, Sk]."""
    if case.documents is None:
        return None
    random = torch.Generator().manual_seed(case.seed)
    tokens, kv_tokens = sum(case.lens), sum(case.kv_lens or case.lens)
    q, k = (torch.randint(-1, 4, (case.batch, n), generator=random) for n in (tokens, kv_tokens))
    if case.documents != "mixed":
        q, k = (x.clamp(min=0).sort(1).values for x in (q, k))
    return q, q if case.kv_lens is None else k


def offsets_of(ids: Tensor) -> list[int]:
    """cu_seqlens of ids 0..3 in order."""
    return [0, *torch.bincount(ids[0], minlength=4).cumsum(0).tolist()]


def truth(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """out, lse and all gradients, by the oracle in fp64; or in another dtype, for the error PyTorch itself makes."""
    inputs = {name: t.to(dtype) if name != "angles" else t for name, t in whole_inputs(case).items()}
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if n in LEAVES}
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # the transform rounds once, as ours does
    angles = inputs["angles"].to(wide) if case.rope else None
    norms = {n: leaves[n].to(wide) if case.norm else None for n in ("q_norm", "k_norm")}
    q, k = (
        oracle.rope(oracle.rms_norm(leaves[n].to(wide), norms[f"{n}_norm"], 1e-6), angles, case.interleaved).to(dtype)
        for n in ("q", "k")
    )
    ids, sizes = ids_of(case), (q.size(1), k.size(1))
    kept = oracle.allowed(*sizes, causal=case.causal, window=case.window, documents=ids)
    kept = kept.unsqueeze(-3)  # [1, S, Sk] or [B, 1, S, Sk]
    if case.mask:
        b, h = torch.arange(case.batch)[:, None, None, None], torch.arange(case.heads)[:, None, None]
        i, j = torch.arange(sizes[0])[:, None], torch.arange(sizes[1])
        kept = kept & ASKED[case.mask.split()[0]](b, h, i, j)
    kept = kept.expand(case.batch, case.heads, *sizes)
    bias = stay = None
    if case.slopes:
        bias = -leaves["slopes"].to(wide)[:, None, None] * oracle.distances(*sizes, ids).unsqueeze(1)
    if case.dropout:
        stay = oracle.stays(case.dropout, SEED, case.batch, range(case.heads), *sizes)
    out, lse = oracle.attention(
        q.to(wide), k.to(wide), leaves["v"].to(wide), kept=kept, scale=case.scale, softcap=case.softcap,
        sinks=leaves["sinks"].to(wide) if case.sinks else None, bias=bias, stay=stay, p=case.dropout,
    )  # fmt: skip
    if dtype != torch.float64:
        repeat = case.heads // case.kv_heads
        parts = [q, k.repeat_interleave(repeat, 2), leaves["v"].repeat_interleave(repeat, 2)]
        width = max(case.dim, case.value_dim)  # of equal head dims: with others PyTorch takes them to fp32 in between
        parts = [torch.nn.functional.pad(t, (0, width - t.size(-1))) for t in parts]
        mask = kept if bias is None else bias.masked_fill(~kept, -torch.inf).to(dtype)
        scale = case.dim**-0.5 if case.scale is None else case.scale
        out = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in parts), attn_mask=mask, scale=scale
        ).transpose(1, 2)[..., : case.value_dim]
    total = (out * inputs["dout"]).sum()
    if case.return_lse:
        total = total + (lse.masked_fill(lse == -torch.inf, 0.0) * inputs["dlse"]).sum()
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
        "dropout_p": case.dropout,
        "dropout_seed": SEED if case.dropout else None,
        "mask": _mask(case, case.mask) if case.mask else None,
    }
    ids = ids_of(case)
    if ids is not None and case.documents == "offsets":
        options["cu_seqlens"] = offsets_of(ids[0])
        if case.kv_lens is not None:
            options["cu_seqlens_k"] = offsets_of(ids[1])
    elif ids is not None:
        options["segment_ids"] = ids[0][:, part]
    per_head = {n: inputs[n].clone().requires_grad_() for n in ("sinks", "slopes") if n in inputs}
    options |= {{"slopes": "alibi_slopes"}.get(n, n): t for n, t in per_head.items()}
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
        leaves = {"qkv": leaf} | norms | per_head
    else:
        if case.kv_lens is not None:
            options["kv_lens"] = case.kv_lens
            options["lens"] = case.lens
        leaves = {n: _laid_out(shards[n], case.layout).requires_grad_() for n in ("q", "k", "v")}
        result = ulysses_attention(*leaves.values(), group, **options)
        leaves |= per_head
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
        if name in SHARES:
            found[name] = torch.stack([part.double() for part in parts]).sum(0)
        elif name == "lse" and not case.return_lse:
            continue
        else:
            found[name] = torch.cat(parts, dim=1)
    return found


def check(case: Case, results: list[dict[str, Tensor]]) -> None:
    """Hold all ranks' results against fp64: fp32 by a fixed tolerance, bf16 and fp16 by twice PyTorch's own error.

    In few elements it is luck which of two errors is larger, and dq and dk may nearly cancel; such results may also be
    off by one unit in the last place of numbers of the size that they are sums of. So may those that cancel almost
    wholly, as dq does where each query attends one key. PyTorch has no softcap; as its slope is at most 1, the error
    may be that of the same attention without. It has neither sinks nor our dropout, nor gradients of sinks and slopes:
    their errors may be those of dq.
    """
    expected = truth(case)
    dtype = DTYPES[case.dtype]
    low = case.dtype in ("bf16", "fp16")
    uncapped = replace(case, softcap=None, sinks=False, dropout=0.0)
    peer, exact = (truth(uncapped, dtype), truth(uncapped) if case.softcap else expected) if low else ({}, {})
    summand = expected["dv"].norm() / max(1, expected["dv"].numel()) ** 0.5
    errors = {}
    for name, result in joined(case, results).items():
        want = expected[name]
        assert result.shape == want.shape, f"{name}: shape {list(result.shape)}, expected {list(want.shape)}"
        finite = torch.isfinite(want)
        assert torch.equal(result[~finite].double(), want[~finite]), f"{name}: not -inf where no key is attended"
        want = want[finite]
        nearly_zero = (summand * want.numel() ** 0.5).item() * (1.0 if want.numel() < FEW else 0.01)
        size = max(want.norm().item(), nearly_zero, 1e-30)
        error = (result[finite].double() - want).norm().item() / size
        allowed = TOLERANCE.get(case.dtype, FLOOR)
        if name in SHARES and sum(case.lens) > 100:  # sums over all tokens, of which most may cancel
            allowed *= 10
        if low:
            held = name if name in peer and name not in ("dsinks", "dslopes") else "dq"
            peer_error = (peer[held].double() - exact[held])[exact[held].isfinite()].norm().item()
            peer_error /= size if held == name and uncapped == case else max(exact[held].norm().item(), 1e-30)
            few = torch.finfo(dtype).eps * (2 if name in SHARES else 1)  # shares are rounded, then added
            allowed = max(2 * peer_error, few if want.numel() < FEW else FLOOR)
        if not error <= allowed:
            errors[name] = f"{error:.3g} > {allowed:.3g}"
    assert not errors, f"{errors} for {case}"


def masking(attention: str, cross: bool, batch: int) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the options that aten does not know."""
    documents = ["runs", "mixed"] * (not cross) + ["offsets"] * (batch == 1)
    each = {
        "documents": st.sampled_from([None, None, *documents]),
        "sinks": st.booleans(),
        "slopes": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.0, 0.4]),
        "mask": st.sampled_from([None, None, "ahead", "gapped", "ahead blocks", "gapped blocks"]),
    }
    if attention == "callable":  # which gets neither, and documents as they were given
        del each["dropout"], each["mask"]
    return st.fixed_dictionaries(each)


@st.composite
def cases(draw: st.DrawFn, ranks: int, attentions: tuple[str, ...], max_tokens: int = 40) -> Case:
    """Cases for a number of ranks: shapes, heads, dtypes, shards, strides and options."""
    attention = draw(st.sampled_from(attentions))
    per_rank = draw(st.integers(1, 4))
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
    batch = draw(st.integers(1, 2))
    options = draw(masking(attention, cross, batch)) if attention != "aten" else {}
    return Case(
        lens=lens,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=dim if fused or attention == "aten" else draw(st.sampled_from([dim, 8, 17, 32])),
        batch=batch,
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
        **options,
        seed=draw(st.integers(0, 2**16)),
        fused=fused,
        rope=draw(st.sampled_from([0, dim // 2 * 2, dim // 4 * 2])) if fused else 0,
        interleaved=draw(st.booleans()),
        norm=fused and dim > 1 and draw(st.booleans()),  # of one channel it is the sign, whose gradient is rounding
        chunks=draw(st.sampled_from([1, 2, 3, 4])),
    )
