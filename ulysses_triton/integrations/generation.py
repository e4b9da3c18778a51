"""`generate` of transformers over the ranks of a group: every rank calls it with the whole prompt and gets all tokens.

    prompt  a b c d e f g h     prefill: every rank has a part, the layers attend as in training, and keys and values
    rank 0  a b c d             stay where their heads live (`UlyssesKVCache`)
    rank 1          e f g h i j decoding: every rank runs every step on the whole new tokens, of which it attends with
    rank 0                  i j its own heads

transformers' own loop runs on every rank. Here are a cache that it hands to the model, hooks around the model's forward
that shard a prefill and give every rank the last token's logits, and what keeps the ranks together: they begin with the
same arguments and random numbers, and compare the tokens of every step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..api import Attention
from ..cache import UlyssesKVCache
from ..errors import ExchangeError, OptionError, ShapeError, UlyssesError
from ..group import UlyssesGroup, told_to_peers
from ..shard import gathered, shard_lens, shard_sequence
from .attention import Part
from .data import INPUTS, brief

FEW = 4  # tokens: a prefill that would leave a rank with fewer runs whole on every rank
SHARDED = (*INPUTS, "position_ids")
MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
# What generate takes beside the options of a generation config.
TAKEN = {*INPUTS, "attention_mask", "past_key_values", "position_ids"}
CALLED = {
    "generation_config", "inputs", "logits_processor", "prefix_allowed_tokens_fn", "stopping_criteria", "streamer",
    "synced_gpus", "tokenizer",
}  # fmt: skip


class ShardedCache:
    """The keys and values of a sequence's tokens, each with the rank that has its head.

    To models it is transformers' `Cache`: its lengths are those of the whole sequence. Layers get what they add back as
    it is, and `attend` has it kept. After `generate(..., return_dict_in_generate=True)` it is `past_key_values` of the
    output; give it to the next `generate` to go on.
    """

    is_compileable = False
    is_sliding: tuple[bool, ...] = ()

    def __init__(self, group: UlyssesGroup, tokens: int) -> None:
        self.group = group
        self.kept = UlyssesKVCache(group, capacity=tokens)
        self.real: Tensor | None = None  # bool [B, S], False for padding; None where there is none
        self.part: Part | None = None  # while a model's forward runs, and after one that failed
        self.start = 0  # where this rank's new tokens begin then

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kept.length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.group.agree("reorder_cache", f"beam_idx={brief(beam_idx)}")
        self.kept.reorder(beam_idx)
        self.real = None if self.real is None else self.real[beam_idx]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.kept.repeat(repeats)
        self.real = None if self.real is None else self.real.repeat_interleave(repeats, dim=0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number."""
        tokens = self.get_seq_length() - abs(tokens_to_remove)
        self.kept.crop(tokens)
        self.real = None if self.real is None else self.real[:, :tokens]


class Generation:
    """`generate` of one model, and the hooks around its forward meanwhile."""

    def __init__(self, model: Any, group: UlyssesGroup, attention: Attention) -> None:
        self.model, self.group, self.attention = model, group, attention
        self.said = type(model).__name__
        self.running = False
        model.generate = self.generate
        model._prepare_cache_for_generation = self.prepare_cache
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for name in ("generate", "_prepare_cache_for_generation"):
            self.model.__dict__.pop(name, None)

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As the model's own, called with the same on every rank, which all get the same; a streamer on any of them."""
        given = {"inputs": inputs, "generation_config": generation_config} | kwargs
        with told_to_peers(self.group):
            self.check(given)
        self.group.agree("generate", _described(given | {"defaults": self.model.generation_config}))
        before, self.running = self.running, True
        try:
            with self.same_draws():
                found = type(self.model).generate(self.model, **given)
        except UlyssesError:  # of which the peers know
            raise
        except Exception as error:
            self.group.refuse(ExchangeError(f"generate failed with {type(error).__name__}: {error}"))
            raise
        finally:
            self.running = before
        tokens = found if isinstance(found, Tensor) else found.sequences
        self.group.agree("end of generate", f"tokens={brief(tokens)}")
        return found

    def check(self, given: Mapping[str, Any]) -> None:
        """Refuse what is known to be wrong before anything of transformers runs."""
        from transformers import GenerationConfig

        model = self.model
        if model.config.is_encoder_decoder:
            raise OptionError(f"generate of {self.said} is not handled over ranks: it has an encoder and a decoder")
        if callable(self.attention):
            raise OptionError("generate attends with the library's own attention: call enable without a callable")
        _check_cache_kind(given.get("cache_implementation"))
        known = TAKEN | CALLED | set(GenerationConfig().to_dict()) | set(model.generation_config.to_dict())
        others = [name for name, value in given.items() if name not in known and value is not None]
        if others:
            raise OptionError(f"generate over ranks does not take {', '.join(others)}; leave it out")
        cache = given.get("past_key_values")
        if cache is not None and (not isinstance(cache, ShardedCache) or cache.group is not self.group):
            raise OptionError(
                f"past_key_values is a {type(cache).__name__}; over ranks it must be what an earlier generate of this "
                f"model returned (return_dict_in_generate=True)"
            )
        if cache is not None and cache.part is not None:
            raise OptionError("the latest generate with these past_key_values failed half-way: begin anew without them")
        if model.training and any(map(_drops, model.modules())):
            raise OptionError("generate over ranks has no dropout, which this model would do: call model.eval()")

    def prepare_cache(
        self, config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, tokens: int
    ) -> None:  # fmt: skip
        """In place of transformers' own: called when all is known and nothing is computed."""
        with told_to_peers(self.group):
            _check_cache_kind(config.cache_implementation)
            for wrong, what in _unfit(config, mode):
                if wrong:
                    raise OptionError(f"generate over ranks does not take {what}")
            cache = model_kwargs.get("past_key_values")
            if cache is None:
                cache = model_kwargs["past_key_values"] = ShardedCache(self.group, tokens)
            _check_padding(model_kwargs.get("attention_mask"), cache)

    @contextmanager
    def same_draws(self) -> Iterator[None]:
        """Let every rank draw rank 0's random numbers, and have its own again afterwards."""
        device = self.model.device
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(cuda, enabled=self.group.rank > 0):
            torch.set_rng_state(self.from_rank(0, torch.get_rng_state().to(device), "random numbers").cpu())
            for own in cuda:
                state = self.from_rank(0, torch.cuda.get_rng_state(own).to(device), "random numbers")
                torch.cuda.set_rng_state(state.cpu(), own)
            yield

    @torch.compiler.disable
    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shard a prefill, and tell the layers how."""
        cache = kwargs.get("past_key_values")
        if not self.running or not isinstance(cache, ShardedCache):
            return None
        group, given = self.group, dict(kwargs)
        tokens = next(given[name] for name in INPUTS if given.get(name) is not None)
        past, new = cache.get_seq_length(), tokens.size(1)
        mask = given.pop("attention_mask", None)
        positions = given.get("position_ids")
        with told_to_peers(group):
            if mask is not None and mask.shape != (tokens.size(0), past + new):
                raise ShapeError(
                    f"attention_mask is {list(mask.shape)}; expected that of all tokens, {[tokens.size(0), past + new]}"
                )
            if positions is not None and positions.dim() != 2:
                raise ShapeError(f"position_ids is {list(positions.shape)}; over ranks it must be [batch, tokens]")
        group.agree("step of generate", f"tokens={brief(tokens)}")
        cache.real = None if mask is None else mask.bool()
        ids = None if mask is None else mask[:, past:].bool().long() - 1  # 0, and -1 for padding
        lens, cache.start = None, past
        if new >= FEW * group.size and group.size > 1:
            lens = shard_lens(new, group.size)
            cache.start += sum(lens[: group.rank])
            split = {name: given[name] for name in SHARDED if given.get(name) is not None}
            given |= {name: shard_sequence(x, group, lens=lens) for name, x in split.items()}
            ids = None if ids is None else shard_sequence(ids, group, lens=lens)
        cache.part = Part(group, self.attention, lens, ids, None, cache=cache)
        return args, given

    @torch.compiler.disable
    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The logits of the last token, on every rank: those of the last rank's part, or all have rank 0's."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, ShardedCache) or cache.part is None:
            return output
        rank = 0 if cache.part.lens is None else self.group.size - 1
        cache.part = None
        output.logits = self.from_rank(rank, output.logits[:, -1:], "logits")
        return output

    def from_rank(self, rank: int, x: Tensor, what: str) -> Tensor:
        """That rank's `x`, which has the same shape on all ranks."""
        if self.group.size == 1:
            return x
        lens = [int(other == rank) for other in range(self.group.size)]
        return gathered(self.group, what, x[None][: lens[self.group.rank]], lens)[0]


def _described(given: Mapping[str, Any]) -> str:
    """The same text for the same arguments. Functions and objects of the user's are only named."""

    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            return brief(value)
        if isinstance(value, ShardedCache):
            return f"a cache of {value.get_seq_length()} tokens"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(text, value))}]"
        if hasattr(value, "to_dict"):
            return hashlib.blake2b(repr(sorted(value.to_dict().items())).encode(), digest_size=6).hexdigest()
        return repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__

    return "; ".join(
        f"{name}={text(value)}" for name, value in sorted(given.items()) if value is not None and name != "streamer"
    )


def _unfit(config: Any, mode: Any) -> list[tuple[Any, str]]:
    """What of a generation config does not go with ranks: whether it is there, and its name."""
    return [
        (mode.value not in MODES, f"{mode.value.replace('_', ' ')}; only greedy, sampled and beam search"),
        (config.use_cache is False, "use_cache=False: it decodes with a cache"),
        (config.max_time is not None, "max_time, as each rank's clock would stop it at another token"),
        (config.guidance_scale not in (None, 1), "guidance_scale, which runs the model on another prompt"),
        (config.output_attentions, "output_attentions: no rank has all weights"),
        (config.output_hidden_states, "output_hidden_states, of which a rank has a part"),
    ]


def _check_cache_kind(kind: str | None) -> None:
    if kind not in (None, "dynamic"):
        raise OptionError(f"generate over ranks does not take cache_implementation={kind!r}: it has a cache of its own")


def _check_padding(mask: Tensor | None, cache: ShardedCache) -> None:
    """`mask` `[B, S]`, of the tokens in the cache and of those to come; None where nothing is padding."""
    if mask is not None and not mask[:, -1].all():
        raise OptionError("the attention_mask ends with padding; generate needs it on the left (padding_side='left')")
    if not cache.get_seq_length():
        return
    if mask is None or cache.real is None:
        differ = mask is not cache.real
    else:
        known = cache.real.to(mask.device)
        differ = not torch.equal(mask[:, : known.size(1)].bool(), known)
    if differ:
        raise OptionError(
            "the attention_mask does not fit the tokens in past_key_values: pass the one that they were generated "
            "with, followed by ones; or leave past_key_values out and begin anew"
        )


def _drops(module: nn.Module) -> bool:
    drops = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
    return isinstance(drops, float) and drops > 0
