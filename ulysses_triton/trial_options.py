"""The options of attention that configurations can be tuned for, with values that suit a problem of any size.

Each leaves pairs to attend and changes the result, so that a kernel which ignores it does not pass for right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .kernels import _blocks
from .kernels._documents import documents
from .kernels._views import Blocks, Documents, Dropout, HeadMap, Options, Predicate


class Size(NamedTuple):
    """Of a problem: `tokens` on both sides, `heads` query and `kv_heads` kv heads of one rank."""

    tokens: int
    heads: int
    kv_heads: int
    device: torch.device


def options(flags: Iterable[str], scale: float, size: Size) -> Options:
    """Attention with the options of these names."""
    found = Options(scale, False, HeadMap(size.heads // size.kv_heads, 0))
    for name in (name for name in FLAGS if name in flags):
        found = found._replace(**FLAGS[name](size, found))
    return found


def _documents(size: Size) -> Documents:
    """Five runs of tokens, the last of which ends in padding."""
    at = torch.arange(size.tokens, device=size.device)
    return documents((at * 5 // size.tokens).where(at < size.tokens - size.tokens // 16, -1)[None])


@triton.jit
def _near(batch, head, q_pos, kv_pos, width_ptr):  # type: ignore[no-untyped-def]
    """The first keys, and those around the query: whatever else is on, that takes pairs away."""
    width = tl.load(width_ptr + batch)
    return (kv_pos < width) | ((q_pos - kv_pos < width) & (kv_pos - q_pos < width))


def _predicate(size: Size) -> Predicate:
    width = max(2, size.tokens // 8)
    return Predicate(_near, (torch.tensor([width], dtype=torch.int32, device=size.device),))


def _lists(size: Size, options: Options) -> Blocks:
    """The blocks that all other options leave."""
    lengths, status = (size.tokens, size.tokens), None
    if options.predicate is not None:
        status = _blocks.status(options.predicate, 1, 1, *lengths, size.device)
    left = _blocks.combine(status, options, *lengths).to(size.device)
    return _blocks.lists(left, options.heads, size.heads, size.kv_heads)


FLAGS: dict[str, Callable[[Size, Options], dict[str, Any]]] = {  # fields of `Options`, given those of the flags before
    "alibi": lambda size, _: {"slopes": 0.5 ** torch.arange(1.0, size.heads + 1, device=size.device)},
    "causal": lambda size, _: {"causal": True},
    "documents": lambda size, _: {"documents": _documents(size)},
    "dropout": lambda size, _: {"dropout": Dropout(0.1, seed=(1 << 40) + 12345)},
    "predicate": lambda size, _: {"predicate": _predicate(size)},
    "sinks": lambda size, _: {"sinks": torch.linspace(-1, 1, size.heads, device=size.device)},
    "softcap": lambda size, _: {"softcap": 2.0},
    "window": lambda size, _: {"window": (min(1024, max(8, size.tokens // 4)), 0)},
    "blocks": lambda size, options: {"blocks": _lists(size, options)},
}
