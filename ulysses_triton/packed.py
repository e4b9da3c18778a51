"""Documents packed into one sequence: from what users give to the tables that kernels take, once per batch of tokens.

Every rank needs the numbers of all tokens, so segment ids are gathered; offsets (`cu_seqlens`) are known everywhere,
and are compared instead. The tables are kept for the next layers that are given the same tensor (`Memo`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import DtypeError, OptionError, ShapeError
from .group import UlyssesGroup, by_name, told_to_peers
from .kernels._documents import documents
from .shard import gathered

Offsets = Tensor | Sequence[int]
Tables = tuple[Tensor, Tensor]  # int32 [5, B, S] of the queries and [5, B, Sk] of the keys: kernels' `Documents`


@torch.library.custom_op("ulysses_triton::documents", mutates_args=())
def tables(
    segment_ids: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, group: str, lens: Sequence[int],
    kv_lens: Sequence[int], device: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The tables on `device` of ids `[B, L]` of this rank's tokens, or of offsets in the whole sequence, `[n + 1]`.

    An op, for traced code; the copies are there since a compiled graph may use its buffers again.
    """
    found = kept_tables(by_name(group), segment_ids, cu_seqlens, cu_seqlens_k, lens, kv_lens, torch.device(device))
    return found[0].clone(), found[1].clone()


@tables.register_fake
def _(
    segment_ids: Tensor | None, cu_seqlens: Any, cu_seqlens_k: Any, group: str, lens: Sequence[int],
    kv_lens: Sequence[int], device: str,
) -> Tables:  # fmt: skip
    batch = 1 if segment_ids is None else segment_ids.size(0)
    q_side, k_side = (torch.empty((5, batch, sum(n)), dtype=torch.int32, device=device) for n in (lens, kv_lens))
    return q_side, k_side


def kept_tables(
    group: UlyssesGroup, segment_ids: Tensor | None, cu_seqlens: Offsets | None, cu_seqlens_k: Offsets | None,
    lens: Sequence[int], kv_lens: Sequence[int], device: torch.device,
) -> Tables:  # fmt: skip
    """As `tables`, the same tensors again for the same tensors (or ints) given. Collective where they are new."""
    given = [x for x in (segment_ids, cu_seqlens, cu_seqlens_k) if x is not None]
    numbers = tuple(None if isinstance(x, Tensor) else tuple(x) for x in given)
    key = ("documents", segment_ids is None, numbers, tuple(lens), tuple(kv_lens), device)

    def make() -> Tables:
        if segment_ids is not None:
            return documents(gathered(group, "segment_ids", segment_ids.to(device, torch.int64).T, lens).T.contiguous())
        assert cu_seqlens is not None
        offsets = [x.tolist() if isinstance(x, Tensor) else list(x) for x in given]
        with told_to_peers(group):
            _check_offsets(offsets, (sum(lens), sum(kv_lens)))
        group.agree("documents", "; ".join(f"cu_seqlens{'_k' * i}={_brief(x)}" for i, x in enumerate(offsets)))
        ids = [_numbers(found).to(device) for found in offsets]
        return documents(*ids)

    return group.memo.get([x for x in given if isinstance(x, Tensor)], key, make)


def check(segment_ids: object, cu_seqlens: object, cu_seqlens_k: object, shape: Sequence[int], same_keys: bool) -> None:
    """Raise for what is wrong with how documents are given, for a q of `shape` [B, L, ...]."""
    batch, tokens = shape[:2]
    if segment_ids is not None and cu_seqlens is not None:
        raise OptionError("both segment_ids and cu_seqlens are given; they say the same, pass one of them")
    if cu_seqlens_k is not None and cu_seqlens is None:
        raise OptionError("cu_seqlens_k is given without cu_seqlens")
    if segment_ids is not None:
        if not isinstance(segment_ids, Tensor) or segment_ids.dtype not in (torch.int32, torch.int64):
            what = segment_ids.dtype if isinstance(segment_ids, Tensor) else type(segment_ids).__name__
            raise DtypeError(f"segment_ids is {what}; it must be an int32 or int64 tensor")
        if segment_ids.shape != (batch, tokens):
            raise ShapeError(
                f"segment_ids has shape {list(segment_ids.shape)}; expected this rank's own tokens, [B, L] = "
                f"{[batch, tokens]}"
            )
        if not same_keys:
            raise OptionError(
                "segment_ids number tokens that are queries and keys alike, but k has other lengths: pass cu_seqlens "
                "and cu_seqlens_k"
            )
    if cu_seqlens is None:
        return
    for name, value in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if value is not None and not _is_offsets(value):
            raise OptionError(f"{name} = {value!r}; it must be ints or a 1-D int32 or int64 tensor of offsets")
    if batch != 1:
        raise ShapeError(
            f"cu_seqlens goes with a batch of 1, q has {batch}: pass segment_ids [B, L] for larger batches"
        )
    if cu_seqlens_k is None and not same_keys:
        raise OptionError("k has other lengths than q: pass cu_seqlens_k beside cu_seqlens")


def _is_offsets(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 and len(value) > 0 and value.dtype in (torch.int32, torch.int64)
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) for n in value)


def _check_offsets(offsets: Sequence[Sequence[int]], tokens: Sequence[int]) -> None:
    for name, found, end in zip(("cu_seqlens", "cu_seqlens_k"), offsets, tokens, strict=False):
        if found[0] != 0 or found[-1] != end or any(a > b for a, b in zip(found, found[1:], strict=False)):
            raise ShapeError(
                f"{name} = {_brief(found)}; offsets begin at 0, never fall and end at the {end} tokens of the whole "
                "sequence (padding may be a last document)"
            )
    if len({len(found) for found in offsets}) > 1:
        raise ShapeError(
            f"cu_seqlens has {len(offsets[0]) - 1} documents and cu_seqlens_k {len(offsets[1]) - 1}: every document "
            "needs its queries and its keys, if only none of them"
        )


def _brief(found: Sequence[int]) -> str:
    """The same text for the same offsets, and for others another; short enough to send."""
    if len(found) <= 12:
        return str(list(found))
    digest = hashlib.blake2b(str(list(found)).encode(), digest_size=6).hexdigest()
    return f"{list(found[:8])} ... {found[-1]} ({len(found)} offsets, digest {digest})"


def _numbers(found: Sequence[int]) -> Tensor:
    """`[1, S]`: the number of every token's document."""
    lengths = torch.tensor(found).diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
