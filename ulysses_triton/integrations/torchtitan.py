"""torchtitan: `apply(model, group)` lets its language models attend over sequences that are sharded over ranks.

Written for torchtitan 0.3.0. An attention layer of its models hands q, k and v `[B, L, heads, D]`, rotated already, to
the module `inner_attention`, which is what `apply` replaces by an `UlyssesAttention`. A forward pre-hook on the model
says where the rank's tokens lie: it counts positions through the whole sequence where there are none, and finds packed
documents, which begin where positions are 0, and hands them to the layers in the place of `attention_masks`.

Batches are cut into contiguous shards in rank order (`shard_sequence`); torchtitan's own context parallelism would cut
them so with `parallelism.context_parallel_load_balancer = None`.

Nothing here imports torchtitan: its classes are known by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..api import Attention, ulysses_attention
from ..errors import OptionError, ShapeError
from ..group import Groupish, UlyssesGroup, resolve, told_to_peers
from ..shard import gathered

STATE = "_ulysses_triton"  # the attribute under which a model keeps what `apply` did to it
COMMON = "torchtitan.models.common"
DECODER = f"{COMMON}.decoder.Decoder"
# Layers whose forward hands all that mixes tokens to inner_attention.
LAYERS = (f"{COMMON}.attention.GQAttention", "torchtitan.models.gpt_oss.model.Attention")
INNER = tuple(f"{COMMON}.attention.{name}" for name in ("FlexAttention", "VarlenAttention"))


class UlyssesAttention(nn.Module):
    """torchtitan's `inner_attention`, over the tokens of all ranks of `group`.

    Args:
        group: as for `ulysses_attention`.
        causal: whether tokens attend only to those before them, where the call does not say it (`is_causal`).
        window: as for `ulysses_attention`; None for none.
        attention: as for `ulysses_attention`.
    """

    def __init__(
        self,
        group: Groupish = None,
        *,
        causal: bool = True,
        window: tuple[int, int] | None = None,
        attention: Attention = "auto",
    ) -> None:
        super().__init__()
        self.group, self.causal, self.window, self.attention = resolve(group), causal, window, attention

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_masks: Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        is_causal: bool | None = None,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
        **unknown: Any,
    ) -> Tensor:
        """q `[B, L, Hq, D]`, k and v `[B, L, Hkv, D]` of the rank's own tokens -> `[B, L, Hq, Dv]`.

        Args:
            attention_masks: None, or int `[B, L]`: the document of each of the rank's tokens, as `segment_ids`. A mask
                for FlexAttention or varlen_attn is that of whole sequences on one rank, and is refused.
            enable_gqa: nothing; the heads say it.
            out_transform: called with the output and the LSE `[B, L, Hq]`; gpt-oss brings its sinks in by it.
        """
        with told_to_peers(self.group):
            if any(isinstance(x, DTensor) for x in (q, k, v)):
                raise OptionError(
                    "q, k and v are DTensors, as torchtitan makes them with tensor parallelism or full_dtensor; only "
                    "plain tensors are handled: leave those off"
                )
            if attention_masks is not None and not isinstance(attention_masks, Tensor):
                raise OptionError(
                    f"attention_masks is a {type(attention_masks).__name__}, which is not handled over shards; leave "
                    f"it out and pass positions to a model under apply, or pass the document of each token, int [B, L]"
                )
            names = [name for name, x in unknown.items() if x is not None and x is not False]
            if names:
                raise OptionError(f"attention is asked for {', '.join(names)}, which is not handled over shards")
        found = ulysses_attention(
            q, k, v, self.group, causal=self.causal if is_causal is None else is_causal, scale=scale,
            window=self.window, segment_ids=attention_masks, attention=self.attention,
            return_lse=out_transform is not None,
        )  # fmt: skip
        if out_transform is None:
            assert isinstance(found, Tensor)
            return found
        return out_transform(*found)


class _Applied(NamedTuple):
    """What `undo` puts back."""

    inner: dict[str, tuple[nn.Module, nn.Module]]  # by the number of the layer: what holds its attention, what it was
    hook: Any


def apply(model: nn.Module, group: Groupish = None, *, attention: Attention = "auto") -> None:
    """Let a torchtitan model attend over the whole sequence while every rank of `group` has its own part of it.

    Call it on every rank, on a built model, after whatever else torchtitan does to its modules. The model is then
    called with the rank's own tokens `[B, L]`, and positions `[B or 1, L]` in their documents, where those begin anew
    at 0, or without positions: then all of a sequence is one document. Shards are contiguous, in rank order, and equal.
    `get_attention_masks` gives None from then on, as documents need no masks. Outputs are the rank's tokens'.

    Args:
        model: a language model of torchtitan (or a pipeline's part of one) of dense, Qwen 3 or gpt-oss layers.
        group: the context-parallel ranks, as for `ulysses_attention`.
        attention: as for `ulysses_attention`; gpt-oss's sinks need a built-in one.

    Raises OptionError for a model of another kind, naming the layer, before anything is changed.
    """
    own = resolve(group)
    undo(model)
    forward = _defined_in(model, "forward")
    if forward != DECODER:
        raise OptionError(
            f"the forward of {type(model).__name__} is that of {forward}, only that of {DECODER} is known"
        )
    replaced = {name: (layer, _replacement(name, layer, model, own, attention)) for name, layer in _layers(model)}
    inner = {name: (layer, layer.inner_attention) for name, (layer, _) in replaced.items()}
    for layer, module in replaced.values():
        layer.inner_attention = module
    rows = min((layer.rope.cache.size(0) for layer, _ in replaced.values()), default=None)
    hook = model.register_forward_pre_hook(_Placing(own, rows), with_kwargs=True)
    object.__setattr__(model, STATE, _Applied(inner, hook))
    object.__setattr__(model, "get_attention_masks", _no_masks)


def undo(model: nn.Module) -> None:
    """Undo `apply`: the model attends as before. Nothing happens to one that it was not applied to."""
    applied = model.__dict__.pop(STATE, None)
    if applied is not None:
        applied.hook.remove()
        model.__dict__.pop("get_attention_masks")
        for layer, inner in applied.inner.values():
            layer.inner_attention = inner


class _Placing:
    """The hook: where the rank's tokens lie in the sequence and in its documents."""

    def __init__(self, group: UlyssesGroup, rows: int | None) -> None:
        self.group, self.rows = group, rows

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        given = dict(zip(("tokens", "positions", "attention_masks"), args, strict=False)) | kwargs
        batch, length = given["tokens"].shape[:2]
        positions = given.get("positions")
        with told_to_peers(self.group):
            if given.get("attention_masks") is not None:
                raise OptionError(
                    f"attention_masks is a {type(given['attention_masks']).__name__}, which is not handled over "
                    f"shards: leave it out, documents are found from positions"
                )
            _check_positions(positions, batch, length)
        if positions is None:
            start = self.group.rank * length
            given["positions"] = torch.arange(start, start + length, device=given["tokens"].device)[None]
            with told_to_peers(self.group):
                _check_rows(self.group.size * length - 1, self.rows)
            documents = None
        else:
            documents = self.group.memo.get(
                [positions], ("documents of positions from 0", batch), lambda: self.documents(positions, batch)
            )
        return (), given | {"attention_masks": documents}

    def documents(self, positions: Tensor, batch: int) -> Tensor | None:
        """int64 `[B, L]`, the document of each of this rank's tokens; None where rows are one document. Collective."""
        length = positions.size(1)
        whole = gathered(self.group, "positions", positions.long().T, (length,) * self.group.size).T
        _check_rows(int(whole.max()), self.rows)
        begins = whole == 0
        if not (begins[:, 1:] | (whole[:, 1:] == whole[:, :-1] + 1)).all():
            raise ShapeError(
                "positions neither go on by one nor begin anew at 0 from one token of the ranks' shards to the next: "
                "shards must be contiguous and in rank order (parallelism.context_parallel_load_balancer = None)"
            )
        ids = begins[:, 1:].cumsum(1)
        if not ids.any():
            return None
        ids = nn.functional.pad(ids, (1, 0))
        return ids.narrow(1, self.group.rank * length, length).expand(batch, length).contiguous()


def _check_positions(positions: Any, batch: int, length: int) -> None:
    if positions is None:
        return
    if not isinstance(positions, Tensor) or tuple(positions.shape) not in ((batch, length), (1, length)):
        found = list(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
        raise ShapeError(
            f"positions is {found}; expected those of this rank's own tokens, {[batch, length]} or {[1, length]}"
        )


def _check_rows(last: int, rows: int | None) -> None:
    if rows is not None and last >= rows:
        raise ShapeError(
            f"position {last} is beyond the model's rotary table of {rows} positions: raise its max_seq_len"
        )


def _no_masks(positions: Tensor) -> None:
    """In the place of a model's `get_attention_masks`, which makes masks of whole sequences."""


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The attention layers, by the number of their blocks."""
    for name, block in model.layers.items():
        layer: Any = getattr(block, "attention", None)
        known = layer is not None and _defined_in(layer, "forward") in LAYERS
        if not known or not any(_is(layer.inner_attention, kind) for kind in INNER):
            inner = getattr(layer, "inner_attention", None)
            raise OptionError(
                f"layer {name} ({type(block).__name__}) attends by {type(layer).__name__} and {type(inner).__name__}; "
                f"only {', '.join(LAYERS)} are handled, with FlexAttention or VarlenAttention"
            )
        yield name, layer


def _replacement(name: str, layer: Any, model: Any, group: UlyssesGroup, attention: Attention) -> UlyssesAttention:
    if _is(layer.inner_attention, INNER[1]):
        left, right = layer.inner_attention.window_size
    else:  # that of the mask which the model would make for this layer
        size = getattr(model.config.layers[int(name)].attention, "sliding_window_size", None)
        left, right = (-1 if size is None else size - 1), 0
    window = None if left < 0 and right <= 0 else (left, right)
    return UlyssesAttention(group, causal=right == 0, window=window, attention=attention)


def _is(module: nn.Module, kind: str) -> bool:
    return any(_name(base) == kind for base in type(module).__mro__)


def _defined_in(module: nn.Module, method: str) -> str:
    """The class that defines a module's method; FSDP2 and others make subclasses that do not."""
    return next(_name(base) for base in type(module).__mro__ if method in vars(base))


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
