"""What `enable` puts on a transformers model: hooks that read a call's arguments and add what attention has to know."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..api import Attention
from ..errors import GroupError, OptionError, ShapeError, UlyssesError
from ..group import UlyssesGroup
from ..shard import gather_sequence, shard_lens, shard_sequence
from .attention import NAME, Part
from .data import INPUTS
from .documents import document_ids, real_tokens
from .generation import Generation
from .models import (
    CROSS,
    counts_positions,
    cross_layers,
    parameters_of,
    position_embedding,
    sees_whole,
    takes_images,
)

STATE = "_ulysses_triton"  # the attribute under which a model keeps its Hooks
PER_TOKEN = ("ForMaskedLM", "ForTokenClassification")  # heads that take labels as they are


class Hooks:
    """What `enable` puts on one transformers model."""

    def __init__(self, model: Any, group: UlyssesGroup, attention: Attention, recompute: str | None) -> None:
        self.group, self.attention, self.recompute = group, attention, recompute
        self.said = type(model).__name__
        self.names = parameters_of(model)
        self.counts_positions = counts_positions(model)
        self.encodes = getattr(model.config, "is_encoder_decoder", False) and "encoder_hidden_states" not in self.names
        self.implementation = model.config._attn_implementation
        self.handles: list[Any] = []
        self.calls = 0  # of the group when a forward pass began
        self.start = 0  # where this rank's tokens begin, in the latest forward pass
        self.images = takes_images(model)
        self.lens: tuple[int, ...] = ()  # of an image's patches, likewise
        self.generation = Generation(model, group, attention) if hasattr(model, "generate") else None
        if not sees_whole(model):
            self.handles.append(model.register_forward_pre_hook(self.check_call, with_kwargs=True))

    def watch_trunk(self, trunk: Any) -> None:
        self.handles.append(trunk.register_forward_pre_hook(self.before, with_kwargs=True))
        self.handles.append(trunk.register_forward_hook(self.after))
        if takes_images(trunk):
            self.handles.append(trunk.embeddings.register_forward_hook(self.shard))
            self.handles.append(trunk.layernorm.register_forward_pre_hook(self.gather))
        embedding = position_embedding(trunk)
        if embedding is not None:
            self.handles.append(embedding.register_forward_pre_hook(self.place, with_kwargs=True))
        for layer in cross_layers(trunk):
            self.handles.append(
                layer.register_forward_pre_hook(partial(self.cross, parameters_of(layer)), with_kwargs=True)
            )

    def remove(self, model: Any) -> None:
        for handle in self.handles:
            handle.remove()
        if self.generation is not None:
            self.generation.remove()
        model.set_attn_implementation(self.implementation)

    def check_call(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Refuse what the model would derive from this rank's tokens alone, and keep it from making a cache."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        shifts = given.get("labels") is not None and given.get("shift_labels") is None
        if "decoder_input_ids" in self.names:
            if all(given.get(name) is None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
                self.fail(
                    OptionError(
                        f"{self.said} would make the decoder's inputs of this rank's part, and miss one token at every "
                        f"cut; shift the whole sequence, shard that and pass decoder_input_ids"
                    )
                )
        elif shifts and self.group.size > 1 and not self.said.endswith(PER_TOKEN):
            self.fail(
                OptionError(
                    f"{self.said} would shift labels within this rank's part and lose one at every cut; shift them "
                    f"before sharding and pass shift_labels beside labels, or compute the loss with token_mean"
                )
            )
        cache = given.get("past_key_values")
        if getattr(cache, "part", None) is not None:  # in generate
            return (), given
        if cache is not None or given.get("use_cache"):
            self.fail(OptionError(f"{self.said} was called with a cache; only generate of an enabled model has one"))
        return (), given | ({"use_cache": False} if "use_cache" in self.names else {})

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
        if getattr(given.get("past_key_values"), "part", None) is not None:
            given |= self.told_of_cache(given)
        else:
            given |= self.told_of_patches(trunk, given) if self.images else self.told(given)
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
        lens = self.lens_of("ulysses_encoder_lens" if self.encodes else "ulysses_lens", given, length)
        attention_mask = self.shaped("attention_mask", given, ((batch, length),))
        placed = self.shaped("position_ids", given, ((batch, length), (1, length)))
        if placed is not None and "position_ids" not in self.names:
            self.fail(OptionError(f"{self.said} was given position_ids, which it does not take"))
        if placed is None and not self.counts_positions:
            self.fail(
                OptionError(
                    f"{self.said} makes positions in a way of its own, on every rank as if its part were the whole; "
                    f"pass position_ids, this rank's part of those of the whole sequence"
                )
            )
        self.start = self.group.rank * length if lens is None else sum(lens[: self.group.rank])
        positions = placed
        if positions is None:
            positions = torch.arange(self.start, self.start + length, device=tokens.device)[None]
        offsets = [given.get(f"cu_seq_lens_{side}") for side in "qk"]
        cu_seqlens = None if offsets[0] is None else (offsets[0], offsets[0] if offsets[1] is None else offsets[1])
        if cu_seqlens is not None and attention_mask is not None:
            self.fail(OptionError("both cu_seq_lens_q and attention_mask are given; pass one of them"))
        documents = None
        if cu_seqlens is None and (placed is not None or attention_mask is not None):
            documents = document_ids(self.group, positions, attention_mask, lens)
            documents = None if documents is None else documents.expand(batch, length).contiguous()
        part = Part(self.group, self.attention, lens, documents, cu_seqlens, recompute=self.recompute)
        encoded = given.get("encoder_hidden_states")
        if self.encodes or encoded is not None:
            if placed is not None or cu_seqlens is not None:  # of which sequence?
                self.fail(
                    OptionError(
                        f"{self.said} got position_ids or cu_seq_lens_q: packing for a decoder of another "
                        f"sequence is not handled; pass attention_mask"
                    )
                )
        if encoded is not None:
            part = self.with_encoder(part, given, encoded)
        added = {"use_cache": False} if "use_cache" in self.names else {}
        return added | ({"position_ids": positions} if "position_ids" in self.names else {}) | {"ulysses": part}

    def told_of_cache(self, given: dict[str, Any]) -> dict[str, Any]:
        """The same in `generate`, which has looked at the call."""
        cache = given["past_key_values"]
        self.start = cache.start
        placed = {}
        if "position_ids" in self.names and given.get("position_ids") is None:
            tokens = next(given[name] for name in INPUTS if given.get(name) is not None)
            placed["position_ids"] = torch.arange(self.start, self.start + tokens.size(1), device=tokens.device)[None]
        return placed | {"ulysses": cache.part}

    def told_of_patches(self, trunk: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The same for whole images, whose patches are sharded between the embeddings and the last norm."""
        if torch.compiler.is_compiling() or given.get("attention_mask") is not None:
            self.fail(OptionError(f"{self.said} is handled neither compiled nor with an attention_mask"))
        tokens = trunk.embeddings.position_embeddings.size(1)
        if given.get("interpolate_pos_encoding"):
            edge = trunk.embeddings.patch_embeddings.patch_size
            height, width = given["pixel_values"].shape[-2:]
            tokens = (height // edge[0]) * (width // edge[1]) + 1
        self.lens = shard_lens(tokens, self.group.size)
        if min(self.lens) < 1:
            self.fail(OptionError(f"an image makes {tokens} tokens, fewer than the {self.group.size} ranks"))
        return {"ulysses": Part(self.group, self.attention, self.lens, None, None, recompute=self.recompute)}

    def shard(self, embeddings: nn.Module, args: tuple[Any, ...], whole: Tensor) -> Tensor:
        return shard_sequence(whole, self.group, lens=self.lens)

    def gather(self, norm: nn.Module, args: tuple[Any, ...]) -> Tensor:
        return gather_sequence(args[0], self.group, lens=self.lens)

    def with_encoder(self, part: Part, given: dict[str, Any], encoded: Tensor) -> Part:
        """With the encoder's tokens, of which the rank has a part, too."""
        shape = (encoded.size(0), encoded.size(1))
        lens = self.lens_of("ulysses_encoder_lens", given, encoded.size(1)) or (encoded.size(1),) * self.group.size
        mask = self.shaped("encoder_attention_mask", given, (shape,))
        real = None if mask is None else real_tokens(self.group, mask, lens)
        return part._replace(encoder_lens=lens, encoder_real=real)

    def lens_of(self, name: str, given: dict[str, Any], length: int) -> tuple[int, ...] | None:
        """Every rank's tokens where the call says them."""
        rank, size = self.group.rank, self.group.size
        lens = None if given.get(name) is None else tuple(int(n) for n in given[name])
        if lens is not None and (len(lens) != size or lens[rank] != length):
            self.fail(
                ShapeError(f"{name} = {list(lens)} does not fit rank {rank} of {size}, which has {length} tokens")
            )
        if not length:  # transformers' own masks and positions fail there
            self.fail(OptionError(f"rank {rank} has no tokens; every rank needs one at least"))
        return lens

    def shaped(self, name: str, given: dict[str, Any], shapes: tuple[tuple[int, int], ...]) -> Tensor | None:
        """An argument of the rank's own tokens."""
        x: Tensor | None = given.get(name)
        if x is not None and (not isinstance(x, Tensor) or tuple(x.shape) not in shapes):
            found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            expected = " or ".join(str(list(shape)) for shape in shapes)
            self.fail(ShapeError(f"{name} is {found}; expected that of this rank's own tokens, {expected}"))
        return x

    def place(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Where the rank's tokens are, for an embedding of positions that counts from 0."""
        length = args[0].size(1)
        return args, kwargs | {"position_ids": torch.arange(self.start, self.start + length, device=args[0].device)}

    @staticmethod
    def cross(
        names: tuple[str, ...], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Tell a layer that it attends to the encoder's tokens."""
        given = dict(zip(names, args, strict=False)) | kwargs
        if any(given.get(name) is not None for name in CROSS):
            given["ulysses"] = given["ulysses"]._replace(cross=True)
        return (), given

    def fail(self, error: UlyssesError) -> NoReturn:
        """Raise, here and on the peers, which are on their way to an exchange."""
        if not torch.compiler.is_compiling():
            self.group.refuse(error)
        raise error
