"""Decoders by their numbers: presets, and any that has a Transformers config.json.

Example: Llama-3-8B has 128256 x 4096 weights in its embedding and as many in its head, and in each of 32 layers
4096 x (32 + 2 x 8) x 128 for q, k and v, 4096 x 4096 behind attention, 3 x 4096 x 14336 in its MLP and 2 x 4096 in
norms: 8.03e9 in all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError


@dataclass(frozen=True)
class Model:
    """A decoder. `intermediate` channels in the MLP, with a gate (SwiGLU, three matrices) or without (two).

    With `experts` to choose from, these are the channels of all experts that a token goes to, and `idle` those of the
    others; every layer has them. `windowed` of the layers attend to the `window` newest tokens only. Biases are left
    out but those of q, k and v.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    gated: bool = True
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    windowed: int = 0
    experts: int = 0
    idle: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"model {self.name}: {name} is {value!r}; it must be a whole number of at least 1")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise OptionError(f"model {self.name}: window is {self.window!r}; it must be at least 1 token, or None")
        if self.heads % self.kv_heads:
            raise OptionError(
                f"model {self.name}: {self.heads} query heads cannot share {self.kv_heads} kv heads evenly; heads must "
                "be a multiple of kv_heads"
            )

    @property
    def q_width(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of all key heads; values have as many."""
        return self.kv_heads * self.head_dim

    @property
    def mlp_products(self) -> int:
        """Weights of a layer's MLP that a token is multiplied with, and those that choose its experts."""
        return self.hidden * ((2 + self.gated) * self.intermediate + self.experts)

    @property
    def layer_products(self) -> int:
        """Weights of a layer that every token is multiplied with."""
        return self.hidden * (2 * self.q_width + 2 * self.kv_width) + self.mlp_products

    @property
    def layer_parameters(self) -> int:
        bias = (self.q_width + 2 * self.kv_width) * self.qkv_bias
        idle = (2 + self.gated) * self.hidden * self.idle
        return self.layer_products + idle + bias + 2 * self.hidden + 2 * self.head_dim * self.qk_norm

    @property
    def head_parameters(self) -> int:
        """Weights of the head, or of the embedding that it shares."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + (2 - self.tied) * self.head_parameters + self.hidden


PRESETS = {
    model.name: model
    for model in (
        Model("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        Model("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        Model("llama-3-405b", 126, 16384, 128, 8, 128, 53248, 128256),
        Model("mistral-7b", 32, 4096, 32, 8, 128, 14336, 32768),
        Model("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064, qkv_bias=True),
        Model("qwen3-4b", 36, 2560, 32, 8, 128, 9728, 151936, tied=True, qk_norm=True),
        Model("mixtral-8x7b", 32, 4096, 32, 8, 128, 2 * 14336, 32000, experts=8, idle=6 * 14336),
        Model("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 8 * 768, 151936, qk_norm=True, experts=128, idle=120 * 768),
        Model("qwen3-32b", 64, 5120, 64, 8, 128, 25600, 151936, qk_norm=True),
        Model("gpt-7b", 32, 4096, 32, 32, 128, 16384, 50304, gated=False, tied=True),
        Model("ulysses-tiny", 2, 128, 4, 2, 32, 384, 256, qk_norm=True),  # what `ulysses-triton train` trains
    )
}

_UNGATED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "starcoder2", "gpt_bigcode")
_QKV_BIAS = ("qwen2", "qwen2_moe")
_QK_NORM = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")  # kinds whose weights are counted as transformers has them
_EVERYWHERE = {"decoder_sparse_step": 1, "mlp_only_layers": []}  # what these say where all layers have experts
_NAMES = {  # ours, and what configurations call it
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head"),
    "vocabulary": ("vocab_size",),
}


def find(name: str) -> Model:
    """The preset of that name, or the model of that config.json (or of the folder it lies in)."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise OptionError(
            f"there is no model {name!r}: give the path of a Transformers config.json, or one of {', '.join(PRESETS)}"
        )
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OptionError(f"{path} is no JSON file that can be read: {error}") from error
    if not isinstance(values, dict):
        raise OptionError(f"{path} holds {type(values).__name__}, not the object that a model's config.json holds")
    return from_config(values, path.parent.name or str(path))


def from_config(values: Mapping[str, Any], name: str) -> Model:
    """The model that a Transformers configuration describes; OptionError for what is no decoder of equal layers."""
    if isinstance(values.get("text_config"), dict):  # of a model that also takes images: its decoder
        values = {**values["text_config"], "architectures": values.get("architectures")}
    _check_decoder(values, name)
    found: dict[str, Any] = {ours: _first(values, theirs, name) for ours, theirs in _NAMES.items()}
    kind = values.get("model_type", "")
    kv_heads = 1 if values.get("multi_query") else values.get("num_key_value_heads") or found["heads"]
    window, windowed = _windows(values, name, found["layers"])
    return Model(
        name,
        **found,
        kv_heads=kv_heads,
        head_dim=values.get("head_dim") or found["hidden"] // found["heads"],
        **_mlp(values, name, found["hidden"]),
        gated=kind not in _UNGATED,
        tied=bool(values.get("tie_word_embeddings", kind in ("gpt2", "gemma", "gemma2", "gemma3", "gemma3_text"))),
        qkv_bias=bool(values.get("attention_bias", kind in _QKV_BIAS)),
        qk_norm=kind in _QK_NORM,
        window=window,
        windowed=windowed,
    )


def _first(values: Mapping[str, Any], names: tuple[str, ...], model: str) -> int:
    found = next((values[name] for name in names if values.get(name) is not None), None)
    if found is None:
        raise OptionError(f"the configuration of {model} lacks {' or '.join(names)}: is it that of a language model?")
    if not isinstance(found, int) or found < 1:
        raise OptionError(f"the configuration of {model} has {found!r} for {' or '.join(names)}; it must be at least 1")
    return found


def _check_decoder(values: Mapping[str, Any], name: str) -> None:
    architectures = values.get("architectures") or []
    decoder = any(end in a for a in architectures for end in ("CausalLM", "LMHead", "ConditionalGeneration"))
    if values.get("is_encoder_decoder") or (architectures and not decoder):
        raise OptionError(
            f"{name} is {', '.join(architectures) or 'an encoder with a decoder'}, no decoder-only language model; the "
            "plan's memory and time hold for those alone"
        )
    if values.get("kv_lora_rank"):
        raise OptionError(f"{name} has latent attention (kv_lora_rank); plans know heads of queries, keys and values")


def _mlp(values: Mapping[str, Any], name: str, hidden: int) -> dict[str, int]:
    """Channels of an MLP, or of a token's experts and of the others."""
    channels = values.get("intermediate_size") or values.get("n_inner") or 4 * hidden
    key = next((key for key in _EXPERTS if (values.get(key) or 0) > 1), None)
    if key is None:
        return {"intermediate": channels}
    if values.get("model_type") not in _WITH_EXPERTS:
        raise OptionError(f"{name} has experts ({key} = {values[key]}); plans know those of {', '.join(_WITH_EXPERTS)}")
    for said, everywhere in _EVERYWHERE.items():
        if values.get(said) not in (everywhere, None):
            raise OptionError(
                f"{name} has experts in some layers and not in others ({said} = {values[said]}); plans know layers "
                "that are alike"
            )
    experts, chosen = values[key], _first(values, ("num_experts_per_tok",), name)
    if chosen > experts:
        raise OptionError(
            f"{name} sends a token to {chosen} of {experts} experts; num_experts_per_tok is at most {key}"
        )
    each = values.get("moe_intermediate_size") or channels
    shared = values.get("shared_expert_intermediate_size") or 0
    return {"intermediate": chosen * each + shared, "experts": experts, "idle": (experts - chosen) * each}


def _windows(values: Mapping[str, Any], name: str, layers: int) -> tuple[int | None, int]:
    """The window of attention, and in how many layers it holds."""
    window = values.get("sliding_window")
    kinds = values.get("layer_types")
    if kinds is not None:
        other = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if other:
            raise OptionError(f"{name} has layers of {', '.join(other)}; plans know full and sliding attention")
        windowed = kinds.count("sliding_attention")
    else:
        windowed = layers if window and values.get("use_sliding_window", True) else 0
    return (window, windowed) if window and windowed else (None, 0)
