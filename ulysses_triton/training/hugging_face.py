"""A causal language model of transformers, made from a configuration alone, as the training command trains it.

    --model hf:path/to/config.json --set num_hidden_layers=2,hidden_size=128

Weights are random. Losses that a model adds to that of its labels, as mixtures of experts do to balance their experts,
are not added: a configuration that asks for them is refused.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import OptionError
from ..group import UlyssesGroup
from ..integrations.memory import save_memory
from ..integrations.models import is_attention, trunks_of
from ..integrations.transformers import enable
from .config import HuggingFaceConfig, TrainConfig
from .model import cross_entropy_sum

PREFIX = "hf:"
_BETWEEN = re.compile(r",(?=\s*\w+\s*=)")  # a value may have commas of its own: layer_types=["a", "b"]

Found = TypeVar("Found")


def transformers() -> Any:
    """The package. Raises OptionError if it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise OptionError("--model and --tokenizer need transformers: pip install 'ulysses-triton[hf]'") from error


def local_first(name: str, load: Callable[..., Found]) -> Found:
    """What `load(local_files_only=...)` finds under `name` on this machine, or else on the Hugging Face hub.

    Raises OptionError if it is in neither place.
    """
    try:
        return load(local_files_only=True)
    except (OSError, ValueError) as error:
        here = error
    try:
        if Path(name).exists():  # it is there, and not what it should be
            raise here
        return load(local_files_only=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(
            f"{name} is no file or folder that can be read, nor in Hugging Face's cache, nor on its hub as far as this "
            f"machine can see: {reason}"
        ) from error


def read_config(source: str, overrides: Sequence[str] = ()) -> HuggingFaceConfig:
    """The configuration at `source`: a config.json, a folder with one, or a name on the Hugging Face hub.

    `overrides` are texts such as "num_hidden_layers=2,hidden_size=128"; values are JSON, or else plain text. With fewer
    layers, `layer_types` is cut, too. Raises OptionError for what transformers cannot make a causal model of, and for a
    model with a layer that would be wrong on a shard.
    """
    values, _ = local_first(source, lambda **where: transformers().PreTrainedConfig.get_config_dict(source, **where))
    values = {name: value for name, value in values.items() if name != "_commit_hash"}
    if not values:
        raise OptionError(f"there is no config.json in {source}")
    if "model_type" not in values:
        raise OptionError(f"the config.json of {source} names no model_type, so transformers cannot tell what it is of")
    made = _made(HuggingFaceConfig(source, values))
    given = dict(_override(text) for texts in overrides for text in _BETWEEN.split(texts))
    for name in given:
        if name not in values and not hasattr(made, name):
            raise OptionError(f"--set {name}: a {type(made).__name__} has no such value, nor has {source}")
    layers = given.get("num_hidden_layers")
    if isinstance(layers, int) and "layer_types" not in given and values.get("layer_types"):
        given["layer_types"] = values["layer_types"][:layers]
    config = HuggingFaceConfig(source, values | given)
    with torch.device("meta"):
        trunks_of(_model(config))
    return config


def vocabulary(config: HuggingFaceConfig) -> int:
    """How many tokens the model knows."""
    return int(_made(config).get_text_config().vocab_size)


class CausalModel(nn.Module):
    """A causal model of transformers that attends over the shards of `group`; tokens in, the sum of their losses out.

    Raises OptionError for a model that cannot be made, is not causal, or has a layer that would be wrong on a shard.
    """

    def __init__(self, config: TrainConfig, group: UlyssesGroup) -> None:
        assert isinstance(config.model, HuggingFaceConfig)
        super().__init__()
        self.inner = _model(config.model)
        enable(self.inner, group, recompute=config.recompute)
        if config.checkpoint_activations or config.offload:
            if not self.inner.supports_gradient_checkpointing:
                raise OptionError(f"{type(self.inner).__name__} cannot checkpoint activations; leave the option out")
            self.inner.gradient_checkpointing_enable({"use_reentrant": False})
        save_memory(self.inner, tile=config.tile, offload=config.offload)
        self.tile = config.tile
        self.placed = "position_ids" in inspect.signature(self.inner.forward).parameters

    @property
    def layers(self) -> list[nn.Module]:
        """Those whose parameters are gathered together, and no others beside them."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [layer for layer in self.inner.modules() if isinstance(layer, GradientCheckpointingLayer)]

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor, lens: Sequence[int] | None = None
    ) -> torch.Tensor:
        """The sum of the losses of `tokens` [B, L] with their `labels` [B, L], as `LanguageModel` does."""
        given: dict[str, Any] = {"input_ids": tokens, "use_cache": False, "ulysses_lens": lens}
        if self.placed:
            given["position_ids"] = positions[None]
        if self.tile is not None and self.training:  # labels are shifted already, and their losses are to be added up
            loss: torch.Tensor = self.inner(**given, labels=labels, shift_labels=labels, num_items_in_batch=1).loss
            return loss
        return cross_entropy_sum(self.inner(**given).logits, labels)


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise OptionError(f"--set {text!r} is not NAME=VALUE, such as num_hidden_layers=2")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()


def _made(config: HuggingFaceConfig) -> Any:
    """transformers' own configuration object: a new one, as models write into theirs."""
    known, kind = transformers().CONFIG_MAPPING, config.values["model_type"]
    if kind not in known:
        raise OptionError(
            f"{config.source} is of model_type {kind!r}, which this version of transformers does not know"
        )
    return _asked(config, lambda: known[kind].from_dict(json.loads(json.dumps(config.values))))


def _asked(config: HuggingFaceConfig, make: Callable[[], Found]) -> Found:
    """What `make` makes of a configuration: whatever transformers raises, the configuration asked for it."""
    try:
        return make()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise OptionError(
            f"transformers cannot make a model of {config.source} as it is set: {type(error).__name__}: {reason}"
        ) from error


def _model(config: HuggingFaceConfig) -> Any:
    """The model, in fp32 whatever it was saved in. Raises OptionError if it is none that can be trained here."""
    made, auto = _made(config), transformers().AutoModelForCausalLM
    if type(made) not in auto._model_mapping:
        raise OptionError(f"{config.source} is a {type(made).__name__}, of which there is no causal language model")
    if getattr(made.get_text_config(), "output_router_logits", False):
        raise OptionError(
            f"{config.source} asks for a loss that balances experts (output_router_logits), which is not added over "
            "shards; --set output_router_logits=false"
        )
    model = _asked(config, lambda: auto.from_config(made, dtype=torch.float32))
    for name, layer in model.named_modules():
        if is_attention(layer) and not getattr(layer, "is_causal", True):
            raise OptionError(
                f"{name} ({type(layer).__name__}) sees the tokens that it should foretell; only causal models can be "
                "trained to foretell them (--set is_decoder=true, where the model has that)"
            )
    return model
