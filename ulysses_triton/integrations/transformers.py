"""Hugging Face transformers: `enable(model, group)` lets a model attend over sequences that are sharded over ranks.

Every rank calls the model with its own part of the batch; layers other than attention work on each token by itself.
Three things make attention right:

- a forward pre-hook on each model that holds attention layers (its *trunk*) finds the documents of the whole sequence
  from position_ids, attention_mask or cu_seq_lens_q, sets position_ids where the model would count them from 0 on every
  rank, and hands both to the layers as a keyword argument: arguments are what gradient checkpointing keeps;
- `attend`, registered with the attention interface, calls `ulysses_attention`;
- `mask`, registered with the mask interface, builds nothing: it refuses what is no causal, sliding or padding mask.

`generate` of an enabled model is that of `generation`.
"""

from __future__ import annotations

from torch import nn

from ..api import Attention
from ..group import Groupish, resolve
from .attention import NAME, attend, mask
from .hooks import STATE, Hooks
from .models import models_in, outermost, trunks_of


def enable(
    model: nn.Module, group: Groupish = None, *, attention: Attention = "auto", recompute: str | None = None
) -> None:
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

    An encoder-decoder gets the rank's part of both sequences: `input_ids` and `attention_mask` of the encoder's, with
    `ulysses_encoder_lens` where shards differ, and `decoder_input_ids`, shifted before sharding, with
    `decoder_attention_mask` and `ulysses_lens`. Documents packed into either are refused.

    ViT gets whole images, alike on every rank. It shards their patches itself, and its output is whole on every rank;
    the gradient is the mean of what the ranks find.

    Outputs are the rank's tokens'. Dropout, gradient checkpointing and torch.compile stay as they are.

    `generate` is called with the same arguments on every rank: the whole prompt, padded on the left, and returns the
    same on every rank. It shards the prompt and keeps keys and values where their heads live; rank 0's random numbers
    are drawn by all. Greedy, sampled and beam search work, `past_key_values` of an earlier `generate`
    (return_dict_in_generate=True) is continued, and what does not work raises. A streamer may be one rank's only.

    Args:
        model: a transformers model whose layers attend through the attention interface, or a module that holds some.
        group: as for `ulysses_attention`: the sequence-parallel ranks.
        attention: as for `ulysses_attention`.
        recompute: as for `ulysses_attention`.

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
        setattr(m, STATE, Hooks(m, own, attention, recompute))
    for outer in outermost(model):
        outer.set_attn_implementation(NAME)
    for trunk in trunks.values():
        getattr(trunk, STATE).watch_trunk(trunk)


def disable(model: nn.Module) -> None:
    """Undo `enable`: the model attends as before. Nothing happens to one that is not enabled."""
    found = [(m, m.__dict__.pop(STATE)) for m in models_in(model).values() if STATE in m.__dict__]
    for m, hooks in found:  # inner models come after the outer ones, which set theirs, too
        hooks.remove(m)
