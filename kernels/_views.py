"""What the kernels are given: views of rows, as plain values.

A kernel never sees a rank, a group or a buffer. It sees tensors, which say by their strides where a head of a token
lies. A *row* holds the heads of one token side by side; rows are ordered token-major, batch inside, so every view here
is `[tokens, B, heads, dim]` with a dense last dimension and ONE token stride.

Example: P = 2, B = 1, heads q0..q3, k0, k1, v0, v1 with D = Dv = 64. Rank 1 owns q2, q3, k1, v1, so its rows are
`q2 q3 k1 v1`, 256 elements. `QKVRows` for it has `q = rows[..., 0:128]` as `[L, 1, 2, 64]`, `k = rows[..., 128:192]`,
`v = rows[..., 192:256]`, `q_head = 2`, `kv_head = 1`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

HeadNumbers: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # some query heads and some kv heads of the model

CUT = 256  # queries: parts begin and end at multiples, which every tile divides


class QKVRows(NamedTuple):
    """The q, k and v heads (or their gradients) that one rank works on, for a range of tokens.

    `k` and `v` may cover other tokens than `q`: of another sequence (cross-attention), or because the rank works on
    some of my queries and needs all keys that they attend. As gradients, `k` and `v` may be fp32 where `q` is bf16 or
    fp16: partial sums of a kv head that several ranks worked on. Either side has no heads where it lies elsewhere.
    """

    q: Tensor  # [n, B, hq, D]
    k: Tensor  # [nk, B, hkv, D]
    v: Tensor  # [nk, B, hkv, Dv]
    q_head: int  # the model's query head that lies first
    kv_head: int  # the model's kv head that lies first
    q_token: int = 0  # the token of my shard that lies first in q
    kv_token: int = 0  # the same of k and v


class ORows(NamedTuple):
    """The output heads (or their gradients) of one rank for a range of tokens, with one number per token and head.

    `stat` is the LSE where O travels back and delta where dO travels in: fp32, fp64 for fp64 rows; None when absent.
    """

    o: Tensor  # [n, B, hq, Dv]
    stat: Tensor | None  # [n, B, hq]
    q_head: int
    token: int = 0  # the token of my shard that lies first


class Span(NamedTuple):
    """Where results for the tokens `start .. start + n` go: views of `n` tokens, in the order the kernel names them."""

    start: int
    views: tuple[Tensor | None, ...]  # each [n, B, heads, dim], or [n, B, heads] for the LSE


class Transform(NamedTuple):
    """What pack does to q and k on the way (unpack_grad applies its VJP): QK-norm first, then RoPE, both in fp32.

    QK-norm is `x * rsqrt(mean(x^2) + eps) * weight` over the head dim. RoPE turns channel pairs (x, y) of the first
    `rope_dim` channels into (x cos - y sin, y cos + x sin); pairs are (i, i + rope_dim/2), or (2i, 2i+1) when
    `interleaved`. cos and sin have one column per pair (`rope_dim/2`) or one per channel (`rope_dim`).
    """

    cos: Tensor | None = None  # [1 or B, L, rope_dim/2 or rope_dim], any float dtype
    sin: Tensor | None = None
    rope_dim: int = 0
    interleaved: bool = False
    q_norm: Tensor | None = None  # [D]
    k_norm: Tensor | None = None  # [D]
    eps: float = 1e-6


class HeadMap(NamedTuple):
    """Which heads of the model the local ones are, and which local kv head a local query head attends to.

    `group` is G = Hq / Hkv of the whole model, `first` the model's number of the first local query head. Its place
    inside its kv group is the `offset`; local head h attends to the local kv head `(h + offset) // group`. A rank with
    the query heads 2 and 3 of a model with G = 3 has offset 2: head 2 uses its first kv head, head 3 its second.
    """

    group: int
    first: int

    @property
    def offset(self) -> int:
        return self.first % self.group


class Documents(NamedTuple):
    """Which tokens belong together: queries attend the keys of their own document only. Made by `_documents`.

    Each side is int32 `[5, B, tokens]`, for every token: its document's first key, which tells documents apart
    (negative for padding and for queries without keys); the first token of that document on the other side; one past
    the last of them; the same again where they are one run of tokens, otherwise the first again; and the token's spot
    among the positions of the other side, which is not its own position where documents begin elsewhere there.
    """

    q: Tensor  # of every query, in terms of keys
    k: Tensor  # of every key, in terms of queries


class Dropout(NamedTuple):
    """Probability with which a pair is dropped, and the seed of the random numbers (`_dropout`)."""

    p: float
    seed: int  # 0 <= seed < 2^63


class Predicate(NamedTuple):
    """A user's mask: a `@triton.jit` function `(batch, head, q_pos, kv_pos, *captured) -> bool` of global indices."""

    function: Any
    captured: tuple[Tensor, ...] = ()


class Blocks(NamedTuple):
    """The blocks of 128 x 128 pairs that hold any attended pair, as lists for both directions. Made by `_blocks.lists`.

    Row r of `q_rows` belongs to query block r: its partial key blocks are `q_tiles[row[0] : row[1]]`, its full ones
    `q_tiles[row[1] : row[2]]`. Those of a key block are `k_tiles` likewise; there an entry is `head * n_q + query
    block`, with the local query head and the number of query blocks, ordered by head. Of a part (`Part`), blocks are
    counted in the whole sequence, and lists hold those of its queries only (`_blocks.within`).
    """

    q_rows: Tensor  # int32 [1 or B, 1 or hq, n_q, 3]
    q_tiles: Tensor  # int32 [entries]: key blocks, ascending in each part
    k_rows: Tensor  # int32 [1 or B, hkv, n_k, 3]
    k_tiles: Tensor  # int32 [entries]


class Part(NamedTuple):
    """Which queries the rows of q are, where they are not all: tokens `start .. start + len(q) - 1` of `seq`.

    Both ends lie on a multiple of `CUT` or at the end of the sequence. k and v hold the first `len(k)` of `kv_seq`
    keys, and no query here attends one behind them. Rows, results, LSE and delta are those of the part, counted from 0;
    masks, their tables and lists, ALiBi and dropout are those of the whole sequence. So are the tiles: every query gets
    the same bits as in one call. Forward alone, without lists, takes last queries that begin anywhere; their tiles
    begin there, too.
    """

    start: int
    seq: int  # S of the whole sequence
    kv_seq: int  # Sk of the whole sequence


class Options(NamedTuple):
    """Which attention it is: its scores, and the masks that say which pairs have one.

    Scores are `scale q k^T`, or with a softcap `softcap * tanh(scale q k^T / softcap)`; slopes then take
    `slope * |q_pos - kv_pos|` away. A sink is one more score per head, with no value behind it.
    """

    scale: float
    causal: bool  # query i attends the keys j <= i only
    heads: HeadMap
    window: tuple[int, int] | None = None  # (left, right): the keys i - left <= j <= i + right only; -1 for no bound
    softcap: float | None = None  # > 0
    documents: Documents | None = None
    sinks: Tensor | None = None  # [hq] fp32 (fp64 beside fp64), of the local heads
    slopes: Tensor | None = None  # [hq] likewise (ALiBi)
    dropout: Dropout | None = None
    predicate: Predicate | None = None
    blocks: Blocks | None = None  # the tiles left by all masks together; None for what the ranges of `_mask` leave
    part: Part | None = None  # None where q, k and v hold all tokens

    @property
    def bounds(self) -> tuple[int, int]:
        """(left, right) of the window and the causal mask together, -1 for no bound."""
        left, right = self.window or (-1, -1)
        return left, 0 if self.causal else right

    def queries(self, rows: int) -> range:
        """The queries that the `rows` rows of q are."""
        if self.part is None:
            return range(rows)
        first, stop = self.part.start, self.part.start + rows
        at_cuts = first % CUT == stop % CUT == 0
        assert at_cuts or stop == self.part.seq, f"a part of queries {first}..{stop}"
        return range(first, stop)

    def lengths(self, rows: int, keys: int) -> tuple[int, int]:
        """(S, Sk) of the whole sequence, where q has `rows` rows and k has `keys`."""
        return (rows, keys) if self.part is None else self.part[1:]

    @property
    def flags(self) -> tuple[str, ...]:
        """Sorted names of the options that are on: what launch configurations are looked up by."""
        on = {
            "alibi": self.slopes is not None,
            "blocks": self.blocks is not None,
            "causal": self.causal,
            "documents": self.documents is not None,
            "dropout": self.dropout is not None,
            "predicate": self.predicate is not None,
            "sinks": self.sinks is not None,
            "softcap": self.softcap is not None,
            "window": self.window is not None,
        }
        return tuple(name for name, is_on in on.items() if is_on)


class HeadGrads(NamedTuple):
    """Where the gradients of what is given per head go: `[hq]` fp32 (fp64 beside fp64); None for what is not asked."""

    sinks: Tensor | None = None
    slopes: Tensor | None = None
