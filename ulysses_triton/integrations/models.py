"""What of a transformers model is sharded, and what in it this library cannot shard.

Everything here reads the model once, at `enable`, and raises an OptionError that names the layer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn

from ..errors import OptionError

LAYER_TYPES = ("full_attention", "sliding_attention")
# Heads that look at each token by itself. Others pool over tokens, or search for one, of which a rank has a part.
HEADS = re.compile(
    r"(?<!PreTrained)Model$|(En|De)coder(Wrapper)?$|LMHeadModel$"
    r"|For(CausalLM|ConditionalGeneration|MaskedLM|TokenClassification)$"
)
IMAGES = "transformers.models.vit.modeling_vit.ViTModel"
# What an attention layer calls the other sequence that it attends to.
CROSS = {"key_value_states", "encoder_hidden_states"}
# Layers that mix tokens by other means than the attention interface.
MIXERS = re.compile(
    r"Mamba|DeltaNet|R[Ww][Kk][Vv]|Recurrent|R[Gg]L[Rr][Uu]|SSM|SSD|Retention|Hyena|Lightning|ShortConv|LinearAtt"
)


@cache
def _source(forward: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):
        return ""


def source_of(module: nn.Module) -> str:
    """The source of a layer's forward, empty where there is none to read."""
    return _source(type(module).forward)


def is_attention(module: nn.Module) -> bool:
    """Whether a layer attends through transformers' attention interface."""
    return "ALL_ATTENTION_FUNCTIONS" in source_of(module)


def trunks_of(model: nn.Module) -> dict[str, Any]:
    """By name, the models that hold attention layers themselves, not in a model inside them: where tokens come in.

    Raises OptionError for whatever in `model` would be wrong on a part of the sequence.
    """
    models = models_in(model)
    if not models:
        raise OptionError(f"{type(model).__name__} holds no transformers model; pass one, or what wraps one")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise OptionError(
            "the model adds virtual tokens (PEFT prompt learning), which every rank would add to its part"
        )
    for name, found in models.items():
        _check_layer_types(name, found)
    towers = [name for name, found in models.items() if takes_images(found)]
    for name, module in model.named_modules():
        _check_mixing(name, module, pools=any(_holds(tower, name) for tower in towers))
    for name, found in models.items():
        _check_model(name, found)
    trunks: dict[str, Any] = {}
    for name, module in model.named_modules():
        if is_attention(module):
            inside = max((m for m in models if _holds(m, name)), key=len)
            _check_attention(name, module, models[inside])
            trunks[inside] = models[inside]
    if not trunks:
        raise OptionError(f"{type(model).__name__} has no layer that attends through transformers' attention interface")
    for name, trunk in trunks.items():
        _check_trunk(name, trunk)
    for name, found in models.items():
        if not sees_whole(found):
            _check_head(name, found)
    return trunks


def takes_images(model: nn.Module) -> bool:
    """Whether a model makes patches of whole images (ViT): every rank gets those, and its layers attend in shards."""
    return any(f"{kind.__module__}.{kind.__name__}" == IMAGES for kind in type(model).__mro__)


def sees_whole(model: nn.Module) -> bool:
    """Whether all that a model's own head sees is the output of such towers, which is whole on every rank."""
    towers = [module for module in model.modules() if takes_images(module)]
    inside = {id(layer) for tower in towers for layer in tower.modules()}
    return bool(towers) and all(id(layer) in inside for layer in model.modules() if is_attention(layer))


def models_in(model: nn.Module) -> dict[str, Any]:
    """All transformers models in `model`, by name, outer ones first."""
    from transformers import PreTrainedModel

    return {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}


def outermost(model: nn.Module) -> Iterator[Any]:
    """The transformers models that are in no other."""
    found: list[str] = []
    for name, module in models_in(model).items():
        if not any(_holds(outer, name) for outer in found):
            found.append(name)
            yield module


def parameters_of(trunk: nn.Module) -> tuple[str, ...]:
    """The names of forward's parameters, in order."""
    return tuple(inspect.signature(trunk.forward).parameters)


def counts_positions(trunk: nn.Module) -> bool:
    """Whether positions that are not given are counted from 0, one per token, also where an embedding does it."""
    counted = r"position_ids = (torch\.arange\(|self\.position_ids\[:, )"
    return any(re.search(counted, source_of(layer)) for layer in (trunk, *trunk.children()))


def position_embedding(trunk: nn.Module) -> nn.Module | None:
    """The layer that embeds positions `[L]`, in a trunk that counts them itself and takes none (BART's two)."""
    found = getattr(trunk, "embed_positions", None)
    if not isinstance(found, nn.Module) or "self.embed_positions(" not in source_of(trunk):
        return None
    return found if "position_ids = position_ids.unsqueeze(0)" in source_of(found) else None


def cross_layers(trunk: nn.Module) -> Iterator[nn.Module]:
    """Attention layers that may attend to another sequence."""
    for module in trunk.modules():
        if is_attention(module) and CROSS & set(parameters_of(module)):
            yield module


def _holds(outer: str, name: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _said(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _check_layer_types(name: str, model: Any) -> None:
    for number, kind in enumerate(getattr(model.config, "layer_types", None) or ()):
        if kind not in LAYER_TYPES:
            raise OptionError(
                f"layer {number} of {_said(name, model)} is {kind!r}; only {' and '.join(LAYER_TYPES)} are handled"
            )


def _check_model(name: str, model: Any) -> None:
    said = _said(name, model)
    if not model._supports_flash_attn:
        raise OptionError(f"{said} says that its attention is more than flash attention does, so it is not handled")
    for option in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(model.config, option, 0):
            raise OptionError(f"{said} skips layers at random ({option}), on every rank others; set it to 0")


def _check_head(name: str, model: Any) -> None:
    from transformers import PreTrainedModel

    said = _said(name, model)
    kinds = [kind for kind in type(model).__mro__ if issubclass(kind, PreTrainedModel)]
    if not any(HEADS.search(kind.__name__) for kind in kinds):
        raise OptionError(
            f"{said} has a head that may look at other tokens than its own, of which a rank has only a part; "
            f"enable the model under the head, gather its output with gather_sequence, and call the head on that"
        )


def _check_attention(name: str, module: nn.Module, model: Any) -> None:
    said = _said(name, module)
    source = source_of(module)
    slides = getattr(model.config, "sliding_window", None) is not None
    if slides and getattr(model.config, "use_sliding_window", True) and "sliding_window" not in source:
        raise OptionError(f"{said} has a sliding window that its attention call does not name, so it is not handled")
    if "Cross" in type(module).__name__ and not CROSS & set(parameters_of(module)):
        raise OptionError(f"{said} attends to another sequence, by a name that is not known, so it is not handled")
    if not isinstance(getattr(module, "is_causal", None), bool):
        raise OptionError(f"{said} does not say whether it is causal (is_causal), so it is not handled")


def _check_mixing(name: str, module: nn.Module, pools: bool) -> None:
    """Raise for a layer that mixes tokens in another way than by the attention interface; some may pool."""
    from transformers import PreTrainedModel

    if is_attention(module) or isinstance(module, PreTrainedModel):  # those are named after what they hold
        return
    said, kind = _said(name, module), type(module)
    own = {key.split(".")[0] for key, _ in module.named_parameters(recurse=False)}
    projects = own or any(isinstance(child, nn.Linear) for child in module.children())
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if isinstance(module, conv):
        mixes = module.kernel_size != module.stride and any(n > 1 for n in module.kernel_size)
    else:
        mixes = isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) or MIXERS.search(kind.__name__) is not None
        mixes = mixes or ("Attention" in kind.__name__ and bool(projects))
    if "Pooler" in kind.__name__ and not pools:
        raise OptionError(
            f"{said} pools over tokens of which a rank has only a part: build the model without "
            f"(add_pooling_layer=False), gather its output with gather_sequence, and pool that"
        )
    if mixes:
        raise OptionError(
            f"{said} mixes tokens by other means than transformers' attention interface, so it would see only its "
            f"rank's part of the sequence; this layer is not handled"
        )


def _check_trunk(name: str, trunk: Any) -> None:
    said = _said(name, trunk)
    signature = inspect.signature(trunk.forward)
    if not any(p.kind == inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        raise OptionError(f"the forward of {said} takes no **kwargs, which its attention layers would be told by")
    placed = "position_ids" in signature.parameters or position_embedding(trunk) is not None or takes_images(trunk)
    if not placed:
        raise OptionError(f"the forward of {said} takes no position_ids, so a rank cannot say where its part begins")
