"""Hugging Face transformers: `enable(model, group)` lets a model attend over sequences that are sharded over ranks.

Every rank calls the model with its own part of the batch; layers other than attention work on each token by itself.
Three things make attention right:

- a forward pre-hook on each model that holds attention layers (its *trunk*) finds the documents of the whole sequence
  from position_ids, attention_mask or cu_seq_lens_q, sets position_ids where the model would count them from 0 on every
  rank, and hands both to the layers as a keyword argument: arguments are what gradient checkpointing keeps;
- `attend`, registered with the attention interface, calls `ulysses_attention`;
- `mask`, registered with the mask interface, builds nothing: it refuses what is no causal, sliding or padding mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..api import Attention, ulysses_attention
from ..errors import GroupError, OptionError, ShapeError, UlyssesError
from ..group import Groupish, UlyssesGroup, resolve
from .documents import document_ids
from .models import counts_positions, models_in, outermost, parameters_of, trunks_of

NAME = "ulysses_triton"
PER_TOKEN = ("ForMaskedLM", "ForTokenClassification")  # heads that take labels as they are
STATE = "_ulysses_triton"  # the attribute under which a trunk keeps what `disable` needs

# Keyword arguments that attention layers are handed and that change nothing here, or that the hook has read.
KNOWN = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "seq_idx", "shift_labels",
    "ulysses_lens", "use_cache",
}  # fmt: skip


class Part(NamedTuple):
    """What attention layers learn about the rank's part of the batch."""

    group: UlyssesGroup
    attention: Attention
    lens: tuple[int, ...] | None  # every rank's tokens; None when all are equal
    documents: Tensor | None  # int64 [B, L], -1 for padding
    cu_seqlens: tuple[Tensor, Tensor] | None  # of queries and keys, in the whole sequence


def enable(model: nn.Module, group: Groupish = None, *, attention: Attention = "auto") -> None:
    """Let `model` attend over the whole sequence while every rank of `group` has its own part of it.

    Call it on every rank, on the model or on what wraps it (PEFT, DDP), before the first step. The model is then called
    with the rank's own tokens, shards in rank order as `shard_sequence` makes them:

    - `input_ids` or `inputs_embeds` `[B, L, ...]`. Shards that differ in length need `ulysses_lens=(L0, L1, ...)`,
      every rank's length, as a keyword argument of the model's call.
    - `position_ids` `[B or 1, L]`, positions in the whole sequence, or within its documents: they start anew where a
      packed document begins, wherever shards are cut. Without them tokens are counted through the whole sequence.
    - `attention_mask` `[B, L]`, 0 for padding, or None; a mask of pairs (4-D) is refused.
    - `cu_seq_lens_q` (and `_k`), for a batch of 1: offsets of the documents in the whole sequence, on every rank. They
      go before what position_ids say.
    - No `labels`, which the model would shift within its part: pass `shift_labels`, shifted before sharding (and
      labels, not read then), or compute the loss with `token_mean`.

    Outputs are the rank's tokens'. Dropout, gradient checkpointing and torch.compile stay as they are. Decoding with a
    cache and `generate` raise.

    Args:
        model: a transformers model whose layers attend through the attention interface, or a module that holds some.
        group: as for `ulysses_attention`: the sequence-parallel ranks.
        attention: as for `ulysses_attention`.

    Raises OptionError for a layer that would be wrong on a part of the sequence, naming it, before anything is changed.
    A forward pass in which no layer came to this library raises GroupError.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    own = resolve(group)
    trunks = trunks_of(model)
    disable(model)
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    for m in models_in(model).values():
        setattr(m, STATE, _Hooks(m, own, attention))
    for outer in outermost(model):
        outer.set_attn_implementation(NAME)
    for trunk in trunks.values():
        getattr(trunk, STATE).watch_trunk(trunk)


def disable(model: nn.Module) -> None:
    """Undo `enable`: the model attends as before. Nothing happens to one that is not enabled."""
    found = [(m, m.__dict__.pop(STATE)) for m in models_in(model).values() if STATE in m.__dict__]
    for m, hooks in found:  # inner models come after the outer ones, which set theirs, too
        hooks.remove(m)


class _Hooks:
    """What `enable` puts on one transformers model."""

    def __init__(self, model: Any, group: UlyssesGroup, attention: Attention) -> None:
        self.group, self.attention = group, attention
        self.said = type(model).__name__
        self.names = parameters_of(model)
        self.counts_positions = counts_positions(model)
        self.implementation = model.config._attn_implementation
        self.handles: list[Any] = []
        self.calls = 0  # of the group when a forward pass began
        if "labels" in self.names and group.size > 1 and not self.said.endswith(PER_TOKEN):
            self.handles.append(model.register_forward_pre_hook(self.check_labels, with_kwargs=True))
        if hasattr(model, "generate"):
            model.generate = _refuse_generation

    def watch_trunk(self, trunk: Any) -> None:
        self.handles.append(trunk.register_forward_pre_hook(self.before, with_kwargs=True))
        self.handles.append(trunk.register_forward_hook(self.after))

    def remove(self, model: Any) -> None:
        for handle in self.handles:
            handle.remove()
        model.__dict__.pop("generate", None)
        model.set_attn_implementation(self.implementation)

    def check_labels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if given.get("labels") is None or given.get("shift_labels") is not None:
            return
        self.fail(
            OptionError(
                f"{self.said} would shift labels within this rank's part and lose one at every cut; shift them before "
                f"sharding and pass shift_labels beside labels, or compute the loss with token_mean"
            )
        )

    def before(self, trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Tell the attention layers of documents and lengths, and the model of positions."""
        if trunk.config._attn_implementation != NAME:
            self.fail(
                GroupError(
                    f"{self.said} was enabled, but its attention is {trunk.config._attn_implementation!r} now, which "
                    f"sees only this rank's part; call enable again, or disable"
                )
            )
        given = dict(zip(self.names, args, strict=False)) | kwargs
        given |= self.told(given)
        if not torch.compiler.is_compiling():  # where the number would be a constant
            self.calls = self.group.latest[0]
        return (), given

    def after(self, trunk: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and self.group.latest[0] == self.calls:
            self.fail(GroupError(f"{self.said} made no call of ulysses_attention in this forward pass"))

    def told(self, given: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments to add."""
        embeds = given.get("inputs_embeds")
        tokens = given.get("input_ids") if embeds is None else embeds
        if tokens is None:
            self.fail(OptionError(f"{self.said} got neither input_ids nor inputs_embeds"))
        batch, length = tokens.shape[:2]
        lens = given.get("ulysses_lens")
        lens = None if lens is None else tuple(int(n) for n in lens)
        if lens is not None and (len(lens) != self.group.size or lens[self.group.rank] != length):
            self.fail(
                ShapeError(
                    f"ulysses_lens = {list(lens)} does not fit rank {self.group.rank} of {self.group.size}, which has "
                    f"{length} tokens"
                )
            )
        if not length:  # transformers' own masks and positions fail there
            self.fail(OptionError(f"rank {self.group.rank} has no tokens; every rank needs one at least"))
        if given.get("past_key_values") is not None or given.get("use_cache"):
            self.fail(OptionError(f"{self.said} was called with a cache; decoding over shards is not supported"))
        attention_mask = given.get("attention_mask")
        if attention_mask is not None and (
            not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, length)
        ):
            self.fail(
                ShapeError(
                    f"attention_mask is {_shape(attention_mask)}; expected that of this rank's own tokens, [B, L] = "
                    f"{[batch, length]}, 0 for padding"
                )
            )
        given_positions = given.get("position_ids")
        if given_positions is not None and given_positions.shape not in ((batch, length), (1, length)):
            self.fail(
                ShapeError(
                    f"position_ids is {_shape(given_positions)}; expected those of this rank's own tokens, [B, L] = "
                    f"{[batch, length]}, or [1, L]"
                )
            )
        if given_positions is None and not self.counts_positions:
            self.fail(
                OptionError(
                    f"{self.said} makes positions in a way of its own, on every rank as if its part were the whole; "
                    f"pass position_ids, this rank's part of those of the whole sequence"
                )
            )
        positions = given_positions if given_positions is not None else self.counted(tokens, lens)
        offsets = [given.get(f"cu_seq_lens_{side}") for side in "qk"]
        cu_seqlens = None if offsets[0] is None else (offsets[0], offsets[0] if offsets[1] is None else offsets[1])
        if cu_seqlens is not None and attention_mask is not None:
            self.fail(OptionError("both cu_seq_lens_q and attention_mask are given; pass one of them"))
        documents = None
        if cu_seqlens is None and (given_positions is not None or attention_mask is not None):
            documents = document_ids(self.group, positions, attention_mask, lens)
            documents = None if documents is None else documents.expand(batch, length).contiguous()
        part = Part(self.group, self.attention, lens, documents, cu_seqlens)
        return {"position_ids": positions, "use_cache": False, "ulysses": part}

    def counted(self, tokens: Tensor, lens: tuple[int, ...] | None) -> Tensor:
        """Positions `[1, L]` in the whole sequence."""
        length, rank = tokens.size(1), self.group.rank
        start = rank * length if lens is None else sum(lens[:rank])
        return torch.arange(start, start + length, device=tokens.device)[None]

    def fail(self, error: UlyssesError) -> NoReturn:
        """Raise, here and on the peers, which are on their way to an exchange."""
        if not torch.compiler.is_compiling():
            self.group.refuse(error)
        raise error


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    ulysses: Part | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q `[B, Hq, L, D]`, k and v `[B, Hkv, L, D]` -> (`[B, L, Hq, Dv]`, None)."""
    said = type(module).__name__
    if ulysses is None:
        raise GroupError(f"{said} was not told its group: call enable on a model that holds it")
    unknown = [name for name, x in kwargs.items() if name not in KNOWN and x is not None and x is not False]
    if attention_mask is not None or unknown:
        error = OptionError(
            f"{said} attends with {', '.join(unknown) or 'a mask of its own'}, which is not handled over shards"
        )
        if not torch.compiler.is_compiling():
            ulysses.group.refuse(error)
        raise error
    causal = is_causal if is_causal is not None else bool(module.is_causal)
    window = None if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
    if torch.is_autocast_enabled(query.device.type):  # rotary tables are fp32 there, and so are q and k
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    cu_seqlens, cu_seqlens_k = ulysses.cu_seqlens or (None, None)
    out = ulysses_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), ulysses.group, causal=causal, scale=scaling,
        window=window, softcap=softcap, sinks=None if s_aux is None else s_aux.to(query.dtype),
        segment_ids=ulysses.documents, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, dropout_p=dropout,
        lens=ulysses.lens, attention=ulysses.attention,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out, None


def mask(*args: Any, mask_function: Callable[..., Any], use_vmap: bool = False, **kwargs: Any) -> None:
    """The mask function: None, as `attend` knows what is attended; raises for a mask that it does not know.

    `use_vmap`: transformers says that the model put a mask function of its own into it.
    """
    # What functions close over cannot be traced; a mask of blocks is the outermost function then.
    traced = torch.compiler.is_compiling()
    names = [_name(mask_function), *["a function of its own"] * use_vmap] if traced else _parts(mask_function)
    for name in names:
        if name not in MASKS:
            raise OptionError(
                f"the model masks attention by {name}, which is not handled over shards; only causal and bidirectional "
                f"masks are, with sliding windows, packed documents and padding"
            )


# Of transformers.masking_utils: what masks may be made of.
MASKS = {
    "and_masks.<locals>.and_mask",
    "bidirectional_mask_function",
    "causal_mask_function",
    "packed_sequence_mask_function.<locals>.inner_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
    "sliding_window_bidirectional_overlay.<locals>.inner_mask",
    "sliding_window_overlay.<locals>.inner_mask",
}


def _name(function: Any) -> str:
    ours = function.__module__ == "transformers.masking_utils"
    return str(function.__qualname__) if ours else f"{function.__module__}.{function.__qualname__}"


def _parts(function: Any) -> Iterator[str]:
    """The names of a mask function and of all functions that it is made of."""
    yield _name(function)
    for cell in function.__closure__ or ():
        found = cell.cell_contents
        for inner in found if isinstance(found, tuple) else (found,):
            if callable(inner) and not isinstance(inner, Tensor):
                yield from _parts(inner)


def _refuse_generation(*args: Any, **kwargs: Any) -> NoReturn:
    raise OptionError("generate does not work over shards of a sequence; call disable(model) first, on every rank")


def _shape(x: object) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__
