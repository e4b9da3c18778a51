"""What a call asks for, as a frozen value: pure Python, equal on every rank.

A `Problem` is made from a call's tensors and options on every rank. All ranks' problems must be equal; `signature`
writes one as text that ranks can compare, and `check` raises for what no number of ranks could compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

from .errors import DtypeError, OptionError, ShapeError

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
ATTENTIONS = ("auto", "triton", "aten", "reference", "callable")
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Problem:
    """Attention over one sharded sequence, whole-model numbers. `lens` are all ranks' shard lengths, in tokens."""

    batch: int
    lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    device: str
    causal: bool
    scale: float
    window: tuple[int, int] | None = None
    softcap: float | None = None
    documents: bool = False
    sinks: bool = False
    slopes: bool = False
    dropout_p: float = 0.0
    predicate: str = ""  # a registered name
    captured: tuple[str, ...] = ()  # dtype and shape of each tensor
    blocks: tuple[int, ...] = ()  # shape of a block mask
    rope_dim: int = 0
    rope_interleaved: bool = False
    q_norm: bool = False
    k_norm: bool = False
    norm_eps: float = 1e-6
    attention: str = "auto"
    recompute: bool = False
    return_lse: bool = False
    grad: bool = False
    features: int | None = None  # channels of x, where it is projected to q, k and v
    bias: bool = False  # of that projection
    out_features: int | None = None  # channels of the output, where it is projected
    out_bias: bool = False
    chunks: int = 1  # that a rank's heads go in, at most its query heads
    cuts: tuple[int, ...] = ()  # where the ranks' work ends, if documents or blocks weigh on it (`placement.cuts`)
    tuning: str = ""  # of the launch configurations in force, where kernels attend: the rank's own

    @property
    def seq(self) -> int:
        return sum(self.lens)

    @property
    def kv_seq(self) -> int:
        return sum(self.kv_lens)

    @property
    def ranks(self) -> int:
        return len(self.lens)

    @property
    def cross(self) -> bool:
        """Whether keys have their own lengths, so that q travels apart from k and v."""
        return self.kv_lens != self.lens

    @property
    def bounds(self) -> tuple[int, int]:
        """(left, right) of the window and the causal mask together, -1 for no bound."""
        left, right = self.window or (-1, -1)
        return left, 0 if self.causal else right

    @property
    def item_size(self) -> int:
        return ITEM_SIZES[self.dtype]

    @property
    def stat_width(self) -> int:
        """Elements that one LSE or delta takes in a row: fp32 for all dtypes, fp64 for fp64."""
        return max(1, 4 // self.item_size)

    @property
    def result_size(self) -> int:
        """Bytes of one output, of a token and head, with its LSE if that is asked for."""
        return self.batch * self.item_size * (self.value_dim + self.stat_width * self.return_lse)

    @property
    def concrete(self) -> bool:
        """Whether all sizes are numbers; in a graph traced with dynamic shapes they are symbols, which do not hash."""
        sizes: tuple[int, ...] = (self.batch, self.heads, self.kv_heads, self.head_dim, self.value_dim)
        sizes += tuple(n for n in (self.features, self.out_features) if n is not None)
        return all(isinstance(n, int) for n in (*self.lens, *self.kv_lens, *(self.window or ()), *sizes))

    def as_numbers(self) -> Problem:
        """With numbers in place of all symbols: a graph that is being traced is then for these sizes alone."""
        lens, kv_lens = (tuple(int(n) for n in given) for given in (self.lens, self.kv_lens))
        sizes = ("batch", "heads", "kv_heads", "head_dim", "value_dim", "features", "out_features", "chunks")
        numbers = {name: None if getattr(self, name) is None else int(getattr(self, name)) for name in sizes}
        window = None if self.window is None else (int(self.window[0]), int(self.window[1]))
        return replace(self, lens=lens, kv_lens=kv_lens, window=window, **numbers)  # type: ignore[arg-type]

    @property
    def sends_delta(self) -> bool:
        """Whether delta travels with dO; PyTorch's kernel makes its own from O, and so may a user's callable."""
        return self.attention not in ("aten", "callable")

    @property
    def sends_output(self) -> bool:
        """Whether O travels with dO: what PyTorch's kernel needs of it is not kept where rows are exchanged again."""
        return self.attention == "aten" and self.recompute

    @property
    def projects(self) -> bool:
        """Whether q, k and v are projected from x in the layer."""
        return self.features is not None

    @property
    def projects_out(self) -> bool:
        """Whether the output is projected in the layer."""
        return self.out_features is not None

    @property
    def needs_raw(self) -> bool:
        """Whether backward reads q and k as they were ahead of QK-norm."""
        return self.q_norm or self.k_norm

    @cached_property
    def signature(self) -> str:
        """`name=value` pairs, the same text on every rank whose call is the same."""
        return "; ".join(f"{f.name}={_text(f.name, getattr(self, f.name))}" for f in fields(self))

    def check(self) -> None:
        """Raise the `UlyssesError` of the first thing that is wrong with this problem by itself."""
        if self.dtype not in ITEM_SIZES:
            raise DtypeError(f"q has dtype {self.dtype}; attention takes float32, bfloat16, float16 or float64")
        if self.batch < 1:
            raise ShapeError(f"q has batch size {self.batch}; it must be at least 1")
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ShapeError(
                f"{self.heads} query heads cannot share {self.kv_heads} kv heads: the number of query heads must be a "
                "positive multiple of the number of kv heads"
            )
        for name, dim in (("q and k", self.head_dim), ("v", self.value_dim)):
            if not 1 <= dim <= MAX_HEAD_DIM:
                raise ShapeError(f"{name} have head dim {dim}; it must be from 1 to {MAX_HEAD_DIM}")
        for name, lens in (("lens", self.lens), ("kv_lens", self.kv_lens)):
            if len(lens) != self.ranks or any(n < 0 for n in lens):
                raise ShapeError(f"{name} = {list(lens)} must hold one length >= 0 for each of the {self.ranks} ranks")
        if self.attention not in ATTENTIONS:
            raise OptionError(f'attention = {self.attention!r}; it must be "auto", "triton", "aten" or a callable')
        if not math.isfinite(self.scale):
            raise OptionError(f"scale = {self.scale}; it must be a finite number")
        if self.window is not None and any(n < -1 for n in self.window):
            raise OptionError(f"window = {self.window}; (left, right) count tokens from 0, or are -1 for no bound")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise OptionError(f"softcap = {self.softcap}; it must be a finite number above 0, or None")
        if not 0 <= self.dropout_p < 1:
            raise OptionError(f"dropout_p = {self.dropout_p}; it must be at least 0 and below 1")
        if self.rope_dim % 2 or not 0 <= self.rope_dim <= self.head_dim:
            raise OptionError(
                f"rope_dim = {self.rope_dim}; it must be even and at most the head dim, which is {self.head_dim}"
            )


def _text(name: str, value: object) -> str:
    if name.endswith("lens") and isinstance(value, tuple) and len(set(value)) == 1:
        return f"{value[0]} x {len(value)}"
    return str(value)


def differences(signatures: Sequence[str]) -> str:
    """Who differs in what, over the ranks' signatures: `causal: rank 2 has False, ranks 0, 1 have True`."""
    parsed = [dict(pair.partition("=")[::2] for pair in text.split("; ")) for text in signatures]
    lines = []
    for key in dict.fromkeys(key for pairs in parsed for key in pairs):
        ranks: dict[str, list[int]] = {}
        for rank, pairs in enumerate(parsed):
            ranks.setdefault(pairs.get(key, "nothing"), []).append(rank)
        if len(ranks) > 1:
            by_size = sorted(ranks.items(), key=lambda item: (len(item[1]), item[1]))
            remedy = _REMEDIES.get(key, "")
            lines.append(f"{key}: " + ", ".join(f"{_ranks(who)} {value}" for value, who in by_size) + remedy)
    return "; ".join(lines)


_REMEDIES = {
    "tuning": " (launch configurations; `ulysses-triton tune` under torchrun gives all hosts the same, and so does one "
    "folder for all in ULYSSES_TRITON_CACHE)",
    "chunks": " (of UlyssesGroup; 'auto' follows from the GPU and what `ulysses-triton tune --chunks` kept for it: "
    "give a number where ranks have different ones)",
}


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks))
    return f"rank {names} has" if len(ranks) == 1 else f"ranks {names} have"
