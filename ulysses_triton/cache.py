"""Keys and values of a sequence that goes on, kept where their heads live: prefill and decoding.

A rank keeps k and v of its own kv heads, for all tokens so far. New tokens are exchanged in as in every layer, their k
and v are appended, and their queries, the last ones of the sequence, attend over all that is kept.

Worked example: 2 ranks, the heads q0..q3, k0, k1, v0, v1, and 10 tokens kept. Of 3 new ones rank 0 has two. Rank 1
receives q2, q3, k1 and v1 of all three, writes k1 and v1 behind the 10 that it keeps, attends with the queries 10..12
over the keys 0..12, and sends what it finds for the tokens 10 and 11 to rank 0. Where every rank has all new tokens
nothing goes in: a rank takes its heads out of them, and sends its output for all three to everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import executor, layout
from .api import check_numbers, check_tensors
from .call import TENSORS, Call, describe
from .cuts import Piece
from .errors import DeviceError, DtypeError, OptionError, OutOfMemoryError, ShapeError
from .executor import Inputs
from .group import Groupish, UlyssesGroup, resolve, told_to_peers
from .kernels._config import fingerprint
from .kernels._documents import documents
from .kernels._views import Documents, Span
from .local import Local, choose
from .packed import check as check_packing
from .pieces import piece_options
from .placement import Share, place
from .shard import gathered
from .spec import Problem

ATTENTIONS = ("auto", "triton", "aten", "reference")
_GROWTH = 1.5  # of buffers that are full: what is copied stays linear in the tokens
_UNUSED: dict[str, Any] = dict.fromkeys(Call._fields[:TENSORS]) | {
    "captured": [], "heads": 0, "kv_heads": 0, "kv_lens": [], "dropout_p": 0.0, "dropout_seed": None, "predicate": "",
    "rope_interleaved": False, "rope_dim": 0, "norm_eps": 0.0, "attention": "callable", "chunks": 1, "cuts": [],
    "recompute": False, "return_lse": False, "grad": False, "abi": 0,
}  # fmt: skip


class UlyssesKVCache:
    """The keys and values of every layer of a model, for the tokens that it has seen.

        cache = UlyssesKVCache(group, capacity=40_000)
        with torch.no_grad():
            out = cache.attend(layer, q, k, v)  # the prompt, sharded: [B, L, Hq, D]
            out = cache.attend(layer, q, k, v, replicated=True)  # a token that every rank has: [B, 1, Hq, D]

    Args:
        group: as for `ulysses_attention`.
        capacity: tokens that a layer takes memory for when it is first seen. Buffers that are full grow by half.

    Making one is not collective, and neither is any method but `attend`; all ranks make the same calls. The next
    `attend` raises where ranks hold different lengths or batches.
    """

    def __init__(self, group: Groupish = None, *, capacity: int = 0) -> None:
        if not _is_count(capacity):
            raise OptionError(f"capacity = {capacity!r}; it must be a number of tokens, at least 0")
        self._group = resolve(group)
        self._capacity = capacity
        self._layers: dict[int, _Kept] = {}

    @torch.compiler.disable
    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        lens: Sequence[int] | None = None,
        replicated: bool = False,
        causal: bool = True,
        scale: float | None = None,
        window: tuple[int, int] | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        segment_ids: Tensor | None = None,
        attention: str = "auto",
    ) -> Tensor:
        """Append new tokens to a layer and attend with them over all that it then holds, as if one device held it.

        Args:
            layer: its number, any from 0.
            q: `[B, n, Hq, D]` of the new tokens; of this rank's part of them, in rank order, or with `replicated` of
                all. Anything that depends on positions, such as RoPE, is applied already. Not differentiable.
            k: `[B, n, Hkv, D]`.
            v: `[B, n, Hkv, Dv]`.
            lens: every rank's n, when they differ: `(1, 0, 0, 0)` for a token that rank 0 alone has.
            replicated: every rank has all new tokens, and gets the output of all: they save the exchange in.
            causal: token i of the whole sequence attends to tokens `0..i`; otherwise the new ones attend to all.
            segment_ids: int `[B, n]`, as q, the document of each token, negative for padding, which gets zeros and is
                attended by none. Either all calls of a layer have them or none. Pass the same tensor to all layers:
                what follows from it is made once.
            attention: "auto"; "triton" or "aten" (PyTorch's kernel) to insist on one.

        Scale, window, softcap, sinks and slopes are as for `ulysses_attention`: positions, as those of the window, are
        in the whole sequence, and what is per head is that of the whole model.

        Returns:
            `[B, n, Hq, Dv]`.

        Raises:
            ShapeError, DtypeError, DeviceError, OptionError, OutOfMemoryError: on every rank, also when only one
            rank's call is wrong; the cache is what it was. ExchangeError: as `ulysses_attention`.
        """
        group = self._group
        with told_to_peers(group):
            check_tensors(group, q=q, k=k, v=v)
            per_head = {"sinks": sinks, "alibi_slopes": alibi_slopes}
            check_tensors(group, **{name: tensor for name, tensor in per_head.items() if tensor is not None})
            check_numbers(window, softcap=softcap, scale=scale)
            _check_options(layer, lens, replicated, attention, (q, k, v, sinks, alibi_slopes))
            given = {
                "q": q, "k": k, "v": v, "sinks": sinks, "slopes": alibi_slopes, "group": group.name,
                "lens": list(lens or ()), "causal": causal, "window": list(window or ()), "softcap": softcap,
                "scale": float(max(q.shape[-1:] + (1,)) ** -0.5 if scale is None else scale),
            }  # fmt: skip
            moved, inputs = describe(group, Call(**_UNUSED | given))
            check_packing(segment_ids, None, None, q.shape, True)
            share = place(moved).shares[group.rank]
            kept = self._layers.get(layer) or _nothing(moved, share, q, self._capacity)
            _check_kept(layer, kept, moved, q, segment_ids)
            past, tokens = kept.length, moved.lens[0] if replicated else moved.seq
            kept = kept.with_room(past + tokens)
            attended = replace(
                moved,
                lens=(past + tokens,),
                kv_lens=(past + tokens,),
                attention=attention,
                causal=causal and tokens != 1,
                documents=segment_ids is not None,
            )  # fmt: skip  (no token comes after the last one)
            local = _choose(attended, past)
        ids, tables = (None, None) if segment_ids is None else self._segments(kept, segment_ids, moved, replicated)
        tuning = fingerprint(moved.device) if local.name == "triton" else ""
        asked = replace(moved, documents=segment_ids is not None, tuning=tuning)
        told = f"layer={layer}; tokens held={past}; replicated={bool(replicated)}; attention by={local.name}"
        group.agree("attention over a cache", f"{told}; {asked.signature}")
        with group.call():
            mine = _own_heads(inputs, share) if replicated else _exchanged(moved, group, inputs)
            kept.append(mine[1:], tokens)
            piece = Piece(*share, past, past + tokens, 0, True)
            options = piece_options(attended, inputs._replace(documents=tables), piece, past + tokens)
            o = q.new_empty(tokens, moved.batch, share.q_heads, moved.value_dim)
            if o.numel():
                local.attend_forward(mine[0], *kept.first(past + tokens), [Span(0, (o, None))], None, options)
            o = o.repeat(group.size, 1, 1, 1) if replicated else o  # every rank's part are all tokens
            out = executor.exchange_out(moved, group, inputs, o)
        group.note(local, place(moved))
        self._layers[layer] = kept._replace(length=past + tokens, ids=ids)
        return out

    def length(self, layer: int = 0) -> int:
        """How many tokens of the whole sequence a layer holds; 0 for one that it has not seen."""
        kept = self._layers.get(layer)
        return 0 if kept is None else kept.length

    @property
    def bytes(self) -> int:
        """What this rank's keys and values take, with the memory reserved for more."""
        return sum(x.nbytes for kept in self._layers.values() for x in (kept.k, kept.v))

    def crop(self, length: int) -> None:
        """Let go of all tokens but the first `length` of every layer; the memory is kept for those to come."""
        if not _is_count(length):
            raise OptionError(f"length = {length!r}; it must be a number of tokens, at least 0")
        self._change(lambda kept: kept._replace(length=min(length, kept.length)), lambda ids: ids[:, :length])

    def reorder(self, index: Tensor) -> None:
        """Let entry i of the batch be what entry `index[i]` was: int `[new B]`, the same on every rank."""
        if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            given = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise OptionError(f"index is {given}; it must be an int32 or int64 tensor [B]: an entry of the batch each")
        batch = min((kept.k.size(1) for kept in self._layers.values()), default=0)
        if self._layers and (len(index) == 0 or int(index.min()) < 0 or int(index.max()) >= batch):
            raise ShapeError(f"index is {index.tolist()}; expected entries of a batch of {batch}")
        self._change(lambda kept: kept.reordered(index), lambda ids: ids.index_select(0, index.to(ids.device)))

    def repeat(self, times: int) -> None:
        """Let every entry of the batch be there `times` times in a row, as for beams."""
        if not _is_count(times) or times == 0:
            raise OptionError(f"times = {times!r}; it must be a number of at least 1")
        for batch in {kept.k.size(1) for kept in self._layers.values()}:
            self.reorder(torch.arange(batch).repeat_interleave(times))

    def reset(self) -> None:
        """Let go of everything, with the memory."""
        self._layers.clear()

    def _change(self, kept: Callable[[_Kept], _Kept], ids: Callable[[Tensor], Tensor]) -> None:
        """Change every layer; ids that layers share are shared afterwards, too, as their tables are."""
        old = {id(x.ids): x.ids for x in self._layers.values() if x.ids is not None}
        new = {name: ids(tensor) for name, tensor in old.items()}
        self._layers = {n: kept(x)._replace(ids=new.get(id(x.ids))) for n, x in self._layers.items()}

    def _segments(
        self, kept: _Kept, segment_ids: Tensor, problem: Problem, replicated: bool
    ) -> tuple[Tensor, Documents]:  # fmt: skip
        """The document of every token `[B, past + new]`, and what kernels ask of them: the same for the next layers."""
        group, device = self._group, kept.k.device

        def make() -> tuple[Tensor, Documents]:
            new = segment_ids.to(device, torch.int64)
            if not replicated:
                new = gathered(group, "segment_ids", new.T, problem.lens).T
            ids = torch.cat([*([] if kept.ids is None else [kept.ids]), new], 1)
            return ids, documents(ids)

        known = [segment_ids] if kept.ids is None else [segment_ids, kept.ids]
        return group.memo.get(known, ("cached", problem.lens, replicated, device), make)


class _Kept(NamedTuple):
    """What a rank keeps of a layer: k and v of its kv heads, for the first `length` tokens of the buffers."""

    k: Tensor  # [capacity, B, hkv, D]
    v: Tensor  # [capacity, B, hkv, Dv]
    heads: tuple[int, int]  # Hq and Hkv of the model, which say whose heads these are
    length: int = 0
    ids: Tensor | None = None  # [B, length]

    def with_room(self, tokens: int) -> _Kept:
        """The same in buffers for so many tokens."""
        if tokens <= len(self.k):
            return self
        capacity = max(tokens, int(len(self.k) * _GROWTH))
        found = self._replace(k=_empty(self.k, capacity), v=_empty(self.v, capacity))
        found.append(self.first(self.length), self.length, 0)
        return found

    def append(self, kv: Sequence[Tensor], tokens: int, at: int | None = None) -> None:
        """Write k and v of `tokens` tokens behind those kept, which they do not belong to yet."""
        at = self.length if at is None else at
        for buffer, rows in zip((self.k, self.v), kv, strict=True):
            buffer[at : at + tokens].copy_(rows)

    def first(self, tokens: int) -> tuple[Tensor, Tensor]:
        return self.k[:tokens], self.v[:tokens]

    def reordered(self, index: Tensor) -> _Kept:
        k, v = (_empty(x, len(x), len(index)) for x in (self.k, self.v))
        for new, old in zip((k, v), self.first(self.length), strict=True):
            torch.index_select(old, 1, index.to(old.device), out=new[: self.length])
        return self._replace(k=k, v=v)


def _nothing(problem: Problem, share: Share, q: Tensor, capacity: int) -> _Kept:
    k, v = (
        _empty(q.new_empty(0, problem.batch, share.kv_heads, dim), capacity)
        for dim in (problem.head_dim, problem.value_dim)
    )
    return _Kept(k, v, (problem.heads, problem.kv_heads))


def _empty(like: Tensor, capacity: int, batch: int | None = None) -> Tensor:
    """A buffer `[capacity, batch, heads, dim]`, which can be written inside and outside of inference mode."""
    shape = (capacity, like.size(1) if batch is None else batch, *like.shape[2:])
    try:
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=like.dtype, device=like.device)
    except RuntimeError as error:  # so is torch.OutOfMemoryError
        raise OutOfMemoryError(
            f"no memory for {list(shape)} {like.dtype} keys or values of a layer on {like.device}: use more ranks (up "
            "to one for each kv head), a lower capacity or a smaller batch"
        ) from error


def _check_options(
    layer: object, lens: object, replicated: bool, attention: object, tensors: Sequence[Tensor | None]
) -> None:  # fmt: skip
    if not _is_count(layer):
        raise OptionError(f"layer = {layer!r}; it must be the number of a layer, at least 0")
    if lens is not None and replicated:
        raise OptionError("lens is given with replicated=True: every rank has all new tokens then; leave lens out")
    if attention not in ATTENTIONS:
        names = ", ".join(f'"{name}"' for name in ATTENTIONS[:3])
        raise OptionError(f"attention = {attention!r}; over a cache it must be one of {names}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise OptionError(
            "a tensor requires grad, and attention over a cache has no backward: call it under torch.no_grad(), or "
            "train with ulysses_attention"
        )


def _check_kept(layer: int, kept: _Kept, problem: Problem, q: Tensor, segment_ids: Tensor | None) -> None:
    """Raise where a call does not fit what its layer holds."""
    k = kept.k
    found = (
        (ShapeError, "a batch of", k.size(1), problem.batch),
        (ShapeError, "(query, kv) heads", kept.heads, (problem.heads, problem.kv_heads)),
        (ShapeError, "head dims of k and v", (k.size(3), kept.v.size(3)), (problem.head_dim, problem.value_dim)),
        (DtypeError, "dtype", k.dtype, q.dtype),
        (DeviceError, "device", k.device, q.device),
    )
    for error, name, held, given in found:
        if held != given:
            raise error(
                f"layer {layer} of the cache has {name} {held}, this call {given}: use another cache, or "
                "reset() this one, or reorder() it for another batch"
            )
    if kept.length and (kept.ids is None) != (segment_ids is None):
        held_ids, given_ids = (("no " * (x is None)) + "segment_ids" for x in (kept.ids, segment_ids))
        raise OptionError(
            f"layer {layer} of the cache holds {kept.length} tokens with {held_ids}, this call has {given_ids}: give "
            "them with every call or with none"
        )


def _choose(problem: Problem, past: int) -> Local:
    """The local attention for new tokens behind `past` others."""
    local = choose(problem)
    if local.name != "aten" or not (problem.causal and past):
        return local
    if problem.attention == "aten":
        raise OptionError(
            'attention="aten" does not know which tokens came before: it takes the first tokens of a sequence, or one '
            'at a time; use attention="auto"'
        )
    return choose(replace(problem, attention="reference"))


def _exchanged(problem: Problem, group: UlyssesGroup, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `[tokens, B, heads, dim]` of all ranks' new tokens and this rank's heads."""
    views = layout.views_of_rows(problem, group.rank, executor.exchange_in(problem, group, inputs))[0]
    q = views["q"]
    nothing = (q[..., :0, :], q.new_empty(*q.shape[:2], 0, problem.value_dim))
    return (q, views["k"], views["v"]) if "k" in views else (q, *nothing)


def _own_heads(inputs: Inputs, share: Share) -> tuple[Tensor, Tensor, Tensor]:
    """The same of new tokens that every rank has."""
    q_heads, kv_heads = slice(share.q_start, share.q_stop), slice(share.kv_start, share.kv_stop)
    q, k, v = (x.transpose(0, 1) for x in inputs[:3])
    return q[:, :, q_heads], k[:, :, kv_heads], v[:, :, kv_heads]


def _is_count(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0
