"""Prefill and decoding: keys and values of a sequence that goes on stay where their heads live.

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
from typing import Any

import torch
from torch import Tensor

from . import executor, layout
from .api import check_numbers, check_tensors
from .cache_layer import CacheLayer
from .call import TENSORS, Call, describe
from .cuts import Piece
from .errors import OptionError, ShapeError
from .executor import Inputs
from .group import Groupish, UlyssesGroup, resolve, told_to_peers
from .kernels._config import fingerprint
from .kernels._documents import documents
from .kernels._views import Documents, Span
from .local import Local, choose
from .memo import Memo
from .packed import check as check_packing
from .pieces import piece_options
from .placement import Share, place
from .shard import gathered
from .spec import Problem

ATTENTIONS = ("auto", "triton", "aten", "reference")
# What a call over a cache does not have; "callable" is for whole heads, however the ranks divide them.
_UNUSED: dict[str, Any] = dict.fromkeys(Call._fields[:TENSORS]) | {
    "captured": [], "heads": 0, "kv_heads": 0, "kv_lens": [], "dropout_p": 0.0, "dropout_seed": None, "predicate": "",
    "rope_interleaved": False, "rope_dim": 0, "norm_eps": 0.0, "attention": "callable", "chunks": 1, "cuts": [],
    "recompute": False, "return_lse": False, "grad": False, "abi": 0,
}  # fmt: skip


class UlyssesKVCache:
    """The keys and values of every layer of a model, for the tokens that it has seen.

        cache = UlyssesKVCache(group, capacity=40_000)
        with torch.no_grad():
            out = cache.attend(layer, q, k, v)  # the prompt, sharded: [B, L, Hq, Dv]
            out = cache.attend(layer, q, k, v, replicated=True)  # a token that every rank has: [B, 1, Hq, Dv]

    Args:
        group: as for `ulysses_attention`.
        capacity: tokens that a layer takes memory for when it is first seen. Buffers that are full grow by half.

    No method but `attend` is collective, but all ranks make the same calls: the next `attend` raises where they hold
    different lengths or batches.
    """

    def __init__(self, group: Groupish = None, *, capacity: int = 0) -> None:
        if not _is_count(capacity):
            raise OptionError(f"capacity = {capacity!r}; it must be a number of tokens, at least 0")
        self._group = resolve(group)
        self._capacity = capacity
        self._layers: dict[int, CacheLayer] = {}
        self._memo = Memo(kept=1)  # of segment ids, for the next layers: their tables are large

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
        """Append new tokens to a layer, and attend with them over all that it then holds, as if one device held it.

        Args:
            layer: its number, from 0; it begins with its first call.
            q: `[B, n, Hq, D]` of the new tokens: of this rank's part of them, in rank order, or with `replicated` of
                all. What depends on positions, such as RoPE, is applied already. Not differentiable.
            k: `[B, n, Hkv, D]`.
            v: `[B, n, Hkv, Dv]`.
            lens: every rank's n, when they differ: `(1, 0, 0, 0)` for a token that rank 0 alone has.
            replicated: every rank passes all new tokens, and gets the output of all; that saves the exchange in.
            causal: token i of the whole sequence attends to tokens `0..i`; otherwise the new ones attend to all.
            segment_ids: int `[B, n]`, as q: the document of each token, as for `ulysses_attention`; negative for
                padding. All calls of a layer have them, or none. Pass the same tensor to all layers: what follows from
                it is made once.
            attention: "auto"; "triton" or "aten" (PyTorch's kernel) to insist on one.

        Scale, window, softcap, sinks and slopes are as for `ulysses_attention`: a window and ALiBi count positions in
        the whole sequence, and what is per head is that of the whole model.

        Returns:
            `[B, n, Hq, Dv]`.

        Raises:
            ShapeError, DtypeError, DeviceError, OptionError, OutOfMemoryError: on every rank, also when only one
            rank's call is wrong; the cache is what it was. ExchangeError: as `ulysses_attention`.
        """
        group = self._group
        with told_to_peers(group):
            per_head = {"sinks": sinks, "alibi_slopes": alibi_slopes}
            tensors = {"q": q, "k": k, "v": v} | {name: x for name, x in per_head.items() if x is not None}
            check_tensors(group, **tensors)
            check_numbers(window, softcap=softcap, scale=scale)
            _check_options(layer, lens, replicated, attention, tensors)
            given = {
                "q": q, "k": k, "v": v, "sinks": sinks, "slopes": alibi_slopes, "group": group.name,
                "lens": list(lens or ()), "causal": bool(causal), "window": list(window or ()), "softcap": softcap,
                "scale": float(max((*q.shape[-1:], 1)) ** -0.5 if scale is None else scale),
            }  # fmt: skip
            problem, inputs = describe(group, Call(**_UNUSED | given))
            check_packing(segment_ids, None, None, q.shape, True)
            share, packed = place(problem).shares[group.rank], segment_ids is not None
            known = self._layers.get(layer) or CacheLayer.empty(problem, share, q, self._capacity)
            known.check(f"layer {layer}", problem, q, segment_ids)
            past, new = known.length, problem.lens[0] if replicated else problem.seq
            known = known.with_room(past + new)
            whole = replace(
                problem, lens=(past + new,), kv_lens=(past + new,), documents=packed, attention=attention,
                causal=problem.causal and new != 1,  # behind the last token there are none
            )  # fmt: skip
            local = _choose(whole, past)
        ids, tables = self._segments(known, segment_ids, problem, replicated)
        tuning = fingerprint(problem.device) if local.name == "triton" else ""
        told = f"layer={layer}; tokens held={past}; replicated={bool(replicated)}; kernel={local.name}"
        group.agree("attend", f"{told}; {replace(problem, documents=packed, tuning=tuning).signature}")
        with group.call(), torch.autocast(problem.device, enabled=False):
            rows = _own_heads(inputs, share) if replicated else _exchanged_in(problem, group, inputs)
            o = q.new_empty(new, problem.batch, share.q_heads, problem.value_dim)
            if o.numel():
                known.write(rows[1:])
                piece = Piece(*share, past, past + new, holder=0, last=True)
                options = piece_options(whole, inputs._replace(documents=tables), piece, past + new)
                local.attend_forward(rows[0], *known.first(past + new), [Span(0, (o, None))], None, options)
            sent = o.repeat(group.size, 1, 1, 1) if replicated else o  # to each rank its tokens' output: or that of all
            out = executor.exchange_out(problem, group, inputs, sent)
        group.note(local, place(problem))
        self._layers[layer] = known._replace(length=past + new, ids=ids)
        return out

    def length(self, layer: int = 0) -> int:
        """How many tokens of the whole sequence a layer holds; 0 for one that it has not seen."""
        return self._layers[layer].length if layer in self._layers else 0

    @property
    def bytes(self) -> int:
        """What this rank's keys and values take, with the memory reserved for more."""
        return sum(x.nbytes for known in self._layers.values() for x in (known.k, known.v))

    def crop(self, length: int) -> None:
        """Let go of all tokens but the first `length` of every layer. Their memory stays reserved."""
        if not _is_count(length):
            raise OptionError(f"length = {length!r}; it must be a number of tokens, at least 0")
        self._change(lambda known: known._replace(length=min(length, known.length)), lambda ids: ids[:, :length])

    def reorder(self, index: Tensor) -> None:
        """Let entry i of the batch be what entry `index[i]` was, as beam search asks for.

        `index` is int `[new B]`, equal on all ranks; entries may go, and be there more than once.
        """
        if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            what = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise OptionError(f"index is {what}; it must be a 1-D int32 or int64 tensor")
        batch = min((known.batch for known in self._layers.values()), default=None)
        if batch is not None and not (len(index) and 0 <= int(index.min()) and int(index.max()) < batch):
            raise ShapeError(f"index = {index.tolist()}; it must name some of the {batch} entries of the batch, from 0")
        self._change(lambda known: known.reordered(index), lambda ids: ids.index_select(0, index.to(ids.device)))

    def repeat(self, times: int) -> None:
        """Let every entry of the batch be there `times` times in a row: for as many beams or samples."""
        if not _is_count(times) or times == 0:
            raise OptionError(f"times = {times!r}; it must be a number, at least 1")
        if self._layers:
            batch = min(known.batch for known in self._layers.values())
            self.reorder(torch.arange(batch).repeat_interleave(times))

    def reset(self) -> None:
        """Let go of everything, memory too."""
        self._layers.clear()
        self._memo.clear()

    def _change(self, layer: Callable[[CacheLayer], CacheLayer], ids: Callable[[Tensor], Tensor]) -> None:
        """Change all layers, or none; those that share ids share them afterwards."""
        old = {id(known.ids): known.ids for known in self._layers.values() if known.ids is not None}
        new = {name: ids(tensor) for name, tensor in old.items()}
        self._layers = {n: layer(known)._replace(ids=new.get(id(known.ids))) for n, known in self._layers.items()}

    def _segments(
        self, known: CacheLayer, segment_ids: Tensor | None, problem: Problem, replicated: bool
    ) -> tuple[Tensor | None, Documents | None]:  # fmt: skip
        """The document of every token, int64 `[B, past + new]`, and its tables, where there are documents.

        The same for the next layer that holds the same and is given the same tensor.
        """
        if segment_ids is None:
            return None, None
        before = () if known.ids is None else (known.ids,)
        device = known.k.device

        def make() -> tuple[Tensor, Documents]:
            new = segment_ids.to(device, torch.int64)
            if not replicated:
                new = gathered(self._group, "segment_ids", new.T, problem.lens).T
            ids = torch.cat((*before, new), 1)
            return ids, documents(ids)

        return self._memo.get((segment_ids, *before), (problem.lens, replicated, device), make)


def _check_options(
    layer: object, lens: object, replicated: bool, attention: object, tensors: dict[str, Tensor]
) -> None:  # fmt: skip
    if not _is_count(layer):
        raise OptionError(f"layer = {layer!r}; it must be the number of a layer, from 0")
    if lens is not None and not (isinstance(lens, Sequence) and all(map(_is_count, lens))):
        raise OptionError(f"lens = {lens!r}; it must hold every rank's number of new tokens")
    if lens is not None and replicated:
        raise OptionError(
            "lens goes with new tokens that are sharded; with replicated=True every rank has all: drop it"
        )
    if attention not in ATTENTIONS:
        raise OptionError(f'attention = {attention!r}; over a cache it must be "auto", "triton" or "aten"')
    needing = [name for name, x in tensors.items() if x.requires_grad]
    if needing and torch.is_grad_enabled():
        raise OptionError(
            f"{', '.join(needing)} require grad, and attention over a cache has no backward: call it under "
            "torch.no_grad(), or use ulysses_attention"
        )


def _choose(whole: Problem, past: int) -> Local:
    """What attends with the last tokens of a sequence, behind `past` others."""
    local = choose(whole)
    if local.name == "aten" and whole.causal and past:  # its causal mask begins at the first query it is given
        if whole.attention == "aten":
            raise OptionError(
                'attention="aten" takes the first tokens of a sequence, and then one at a time; use attention="auto"'
            )
        return choose(replace(whole, attention="reference"))
    return local


def _exchanged_in(problem: Problem, group: UlyssesGroup, inputs: Inputs) -> Sequence[Tensor]:
    """q, k and v `[tokens, B, heads, dim]` of all ranks' new tokens, of this rank's heads."""
    views = layout.views_of_rows(problem, group.rank, executor.exchange_in(problem, group, inputs))[0]
    return [views[name] for name in ("q", "k", "v") if name in views]  # q alone on a rank without heads


def _own_heads(inputs: Inputs, share: Share) -> Sequence[Tensor]:
    """The same of new tokens that every rank has."""
    q, k, v = (x.transpose(0, 1) for x in inputs[:3])
    kv_heads = slice(share.kv_start, share.kv_stop)
    return q[:, :, share.q_start : share.q_stop], k[:, :, kv_heads], v[:, :, kv_heads]


def _is_count(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0
