"""The attention and mask functions that transformers calls, and what hooks tell them by way of arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from .. import masks
from ..api import Attention, ulysses_attention
from ..errors import GroupError, OptionError
from ..group import UlyssesGroup

NAME = "ulysses_triton"  # under which both are registered

# Keyword arguments that attention layers are handed and that change nothing here, or that the hook has read.
KNOWN = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "seq_idx", "shift_labels",
    "skip_logits", "ulysses_encoder_lens", "ulysses_lens", "use_cache",
}  # fmt: skip


class Part(NamedTuple):
    """What attention layers learn about the rank's part of the batch."""

    group: UlyssesGroup
    attention: Attention
    lens: tuple[int, ...] | None  # every rank's tokens; None when all are equal
    documents: Tensor | None  # int64 [B, L], -1 for padding
    cu_seqlens: tuple[Tensor, Tensor] | None  # of queries and keys, in the whole sequence
    encoder_lens: tuple[int, ...] | None = None  # every rank's tokens of the encoder's sequence
    encoder_real: Tensor | None = None  # int8 [B, Sk] of all ranks' such tokens, 0 for padding
    recompute: str | None = None  # "exchange": attention exchanges again in backward
    cross: bool = False  # this layer attends to the encoder's tokens
    cache: Any = None  # the ShardedCache of `generate`; without lens, every rank has all tokens that are new to it


@masks.register
@triton.jit
def ulysses_triton_padding(batch, head, q_pos, kv_pos, real, width):  # type: ignore[no-untyped-def]
    """Keys that are no padding. Tiles reach beyond the last of them."""
    n = tl.load(width)
    return tl.load(real + batch * n + tl.where(kv_pos < n, kv_pos, 0)) != 0


def _width(real: Tensor) -> Tensor:
    return torch.full((1,), real.size(1), device=real.device)


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
    if attention_mask is not None:
        unknown.append("a mask of its own")
    if key.size(2) != query.size(2) and not ulysses.cross:
        unknown.append("keys of another sequence")
    if unknown:
        error = OptionError(f"{said} attends with {', '.join(unknown)}, which is not handled over shards")
        if not torch.compiler.is_compiling():
            ulysses.group.refuse(error)
        raise error
    causal = is_causal if is_causal is not None else bool(module.is_causal)
    window = None if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
    if torch.is_autocast_enabled(query.device.type):  # rotary tables are fp32 there, and so are q and k
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    sinks = None if s_aux is None else s_aux.to(query.dtype)
    if ulysses.cache is not None:
        return ulysses.cache.kept.attend(
            module.layer_idx, q, k, v, lens=ulysses.lens, replicated=ulysses.lens is None, causal=causal, scale=scaling,
            window=window, softcap=softcap, sinks=sinks, segment_ids=ulysses.documents, attention=ulysses.attention,
        ), None  # fmt: skip
    options: dict[str, Any]
    if ulysses.cross:
        options = {"kv_lens": ulysses.encoder_lens}
        if ulysses.encoder_real is not None:
            options["mask"] = (ulysses_triton_padding, ulysses.encoder_real, _width(ulysses.encoder_real))
    else:
        cu_seqlens, cu_seqlens_k = ulysses.cu_seqlens or (None, None)
        options = {"segment_ids": ulysses.documents, "cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    out = ulysses_attention(
        q, k, v, ulysses.group, causal=causal, scale=scaling, window=window, softcap=softcap, sinks=sinks,
        dropout_p=dropout, lens=ulysses.lens, attention=ulysses.attention, recompute=ulysses.recompute, **options,
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
