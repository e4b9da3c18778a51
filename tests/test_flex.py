"""Masks against PyTorch's own: FlexAttention with the same predicates, and where two sequences' masks are aligned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ulysses_triton import masks, run_virtual, ulysses_attention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # as it should be

B, S, HQ, HKV, D = 2, 200, 2, 1, 16


@masks.register
@triton.jit
def flex_prefix(batch, head, q_pos, kv_pos, lens):
    return (kv_pos <= q_pos) | (kv_pos < tl.load(lens + batch))


@masks.register
@triton.jit
def flex_documents(batch, head, q_pos, kv_pos, ids, tokens):
    n = tl.load(tokens)
    return tl.load(ids + batch * n + q_pos) == tl.load(ids + batch * n + kv_pos)


@masks.register
@triton.jit
def flex_window(batch, head, q_pos, kv_pos):
    return (kv_pos <= q_pos) & (q_pos - kv_pos < 40)


@masks.register
@triton.jit
def flex_by_head(batch, head, q_pos, kv_pos):
    return (kv_pos <= q_pos) & (q_pos - kv_pos < 32 * (head + 1))


@masks.register
@triton.jit
def bottom_right(batch, head, q_pos, kv_pos, shift):
    return kv_pos <= q_pos + tl.load(shift)


REACH = tl.constexpr(1)


@masks.register
@triton.jit
def bottom_right_window(batch, head, q_pos, kv_pos, shift):
    spot = q_pos + tl.load(shift)
    return (kv_pos >= spot - REACH) & (kv_pos <= spot + REACH)


LENS = torch.tensor([150, 30])
IDS = torch.stack([torch.arange(S) // 70, torch.arange(S) // 110])
SLOPES = torch.tensor([0.5, 0.0625])


@dataclass(frozen=True)
class Both:
    """A mask for us and the same mask_mod for FlexAttention; `batch` and `heads`: whether it depends on them."""

    ours: Any
    captured: tuple[Tensor, ...]
    theirs: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    batch: bool = False
    heads: bool = False
    options: tuple[tuple[str, Any], ...] = ()  # of ours, and the score_mod that is the same
    score: Callable[..., Tensor] | None = None

    @property
    def mask(self) -> Any:
        return (self.ours, *self.captured) if self.captured else self.ours

    @property
    def counts(self) -> tuple[int | None, int | None]:
        return B if self.batch else None, HQ if self.heads else None


CASES = {
    "prefix": Both(flex_prefix, (LENS,), lambda b, h, i, j: (j <= i) | (j < LENS[b]), batch=True),
    "documents": Both(
        flex_documents, (IDS, torch.tensor([S])), lambda b, h, i, j: IDS[b, i] == IDS[b, j], batch=True
    ),
    "window": Both(flex_window, (), lambda b, h, i, j: (j <= i) & (i - j < 40)),
    "by head": Both(flex_by_head, (), lambda b, h, i, j: (j <= i) & (i - j < 32 * (h + 1)), heads=True),
    "scores": Both(
        flex_window, (), lambda b, h, i, j: (j <= i) & (i - j < 40),
        options=(("softcap", 2.0), ("alibi_slopes", SLOPES)),
        score=lambda score, b, h, i, j: 2 * torch.tanh(score / 2) - SLOPES[h] * (i - j).abs(),
    ),
}  # fmt: skip


def inputs() -> tuple[Tensor, ...]:
    """q, k, v and the gradients of the output and the LSE, for the whole sequence."""
    random = torch.Generator().manual_seed(0)
    shapes = (B, S, HQ, D), (B, S, HKV, D), (B, S, HKV, D), (B, S, HQ, D), (B, S, HQ)
    return tuple(torch.randn(shape, generator=random) for shape in shapes)


@cache
def flex(name: str) -> list[Tensor]:
    """out, LSE, dq, dk and dv by FlexAttention in fp64; it has a backward for CPUs, too, but does not let it run."""
    case = CASES[name]
    q, k, v, dout, dlse = (x.double() for x in inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    blocks = create_block_mask(case.theirs, *case.counts, S, S, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
        out, aux = flex_attention(
            *(x.transpose(1, 2) for x in leaves),
            score_mod=case.score,
            block_mask=blocks,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
    assert aux.lse is not None
    out, lse = out.transpose(1, 2), aux.lse.transpose(1, 2)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (dout, dlse))]


def ours(group: Any, rank: int, size: int, case: Both, blocks: bool, attention: str) -> list[Tensor]:
    """The same of this rank's tokens."""
    part = slice(rank * (S // size), (rank + 1) * (S // size))
    q, k, v, dout, dlse = (x[:, part].contiguous() for x in inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask, (batch, heads) = case.mask, case.counts
    if blocks:
        mask = masks.block_mask(mask, batch=batch, heads=heads, q_len=S)
    out, lse = ulysses_attention(*leaves, group, mask=mask, attention=attention, return_lse=True, **dict(case.options))
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (dout, dlse))]


def on_process(ctx: Any, size: int, name: str, blocks: bool) -> list[Tensor]:
    return ours(ctx.group, ctx.rank, size, CASES[name], blocks, "reference")


def hold(results: list[list[Tensor]], expected: list[Tensor]) -> None:
    for name, parts, want in zip(("out", "lse", "dq", "dk", "dv"), zip(*results, strict=True), expected, strict=True):
        got = torch.cat(parts, 1).double()
        error = ((got - want).norm() / want.norm()).item()
        assert error < 2e-6, f"{name}: {error:.2g}"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("attention", "ranks", "blocks"),
    [("reference", 1, False), ("reference", 1, True), ("reference", 2, False), ("reference", 2, True)]
    + [("triton", 1, True), ("triton", 2, False)],
)
def test_masks_are_those_of_flex_attention(name: str, attention: str, ranks: int, blocks: bool) -> None:
    results = run_virtual(ranks, lambda group: ours(group, group.rank, ranks, CASES[name], blocks, attention))
    hold(results, flex(name))


@pytest.mark.parametrize("blocks", [False, True], ids=["predicate", "blocks"])
def test_masks_are_those_of_flex_attention_on_processes(pool: Any, blocks: bool) -> None:
    hold(pool.run(2, on_process, 2, "prefix", blocks), flex("prefix"))


@pytest.mark.parametrize("name", [name for name in CASES if name != "scores"])
def test_the_blocks_visited_are_those_of_flex_attention(name: str) -> None:
    case, tokens = CASES[name], 640
    ids = torch.stack([torch.arange(tokens) // 300, torch.arange(tokens) // 128])
    if name == "documents":
        case = Both(case.ours, (ids, torch.tensor([tokens])), lambda b, h, i, j: ids[b, i] == ids[b, j], batch=True)
    batch, heads = case.counts
    found = masks.block_mask(case.mask, batch=batch, heads=heads, q_len=tokens)
    theirs = create_block_mask(case.theirs, batch, heads, tokens, tokens, device="cpu", BLOCK_SIZE=128)
    assert theirs.full_kv_num_blocks is not None
    assert torch.equal((found.status == 1).sum(-1).int(), theirs.kv_num_blocks)
    assert torch.equal((found.status == 2).sum(-1).int(), theirs.full_kv_num_blocks)
    assert found.sparsity() == theirs.sparsity() / 100 > 0


# Fewer queries than keys: which key a causal query is aligned with. `x` is attended.

TOP_LEFT = """
x....
xx...
"""  # here, and in PyTorch's is_causal
BOTTOM_RIGHT = """
xxxx.
xxxxx
"""  # in flash-attn from 2.1 on
WINDOW_TOP_LEFT = """
xx...
xxx..
"""  # (1, 1) here
WINDOW_BOTTOM_RIGHT = """
..xxx
...xx
"""  # (1, 1) in flash-attn
TWO_DOCUMENTS = """
x....
...x.
...xx
"""  # causal, of queries 1 + 2 and keys 3 + 2: aligned at their beginnings


def attended(mask: str) -> Tensor:
    return torch.tensor([[c == "x" for c in line] for line in mask.split()])


ALIGNED: dict[str, tuple[str, dict[str, Any]]] = {
    "causal is top-left": (TOP_LEFT, {"causal": True}),
    "bottom-right by a predicate": (BOTTOM_RIGHT, {"mask": (bottom_right, torch.tensor([5 - 2]))}),
    "a window is top-left": (WINDOW_TOP_LEFT, {"window": (1, 1)}),
    "a window is bottom-right by a predicate": (
        WINDOW_BOTTOM_RIGHT,
        {"mask": (bottom_right_window, torch.tensor([5 - 2]))},
    ),
    "documents are top-left": (TWO_DOCUMENTS, {"causal": True, "cu_seqlens": [0, 1, 3], "cu_seqlens_k": [0, 3, 5]}),
}


@pytest.mark.parametrize("attention", ["reference", "triton"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ALIGNED)
def test_alignment(name: str, ranks: int, attention: str) -> None:
    picture, options = ALIGNED[name]
    kept = attended(picture)
    queries, keys = kept.shape
    q, k, v = torch.randn(1, queries, 2, 16), torch.randn(1, keys, 2, 16), torch.randn(1, keys, 2, 16)
    lens, kv_lens = ((n - n // ranks, n // ranks) if ranks == 2 else (n,) for n in (queries, keys))

    def call(group: Any) -> Tensor:
        mine = [x.split(n, 1)[group.rank] for x, n in ((q, lens), (k, kv_lens), (v, kv_lens))]
        out = ulysses_attention(*mine, group, lens=lens, kv_lens=kv_lens, attention=attention, **options)
        assert isinstance(out, Tensor)
        return out

    out = torch.cat(run_virtual(ranks, call), 1)
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), kept).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-6)
    if name == "causal is top-left":
        plain = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
        assert torch.allclose(out, plain.transpose(1, 2), atol=1e-6)
