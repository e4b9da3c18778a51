"""Less memory for very long sequences: a transformers model's MLPs and loss over tiles, its checkpoints in host memory.

The loss is the model's own code, tile by tile: a forward pass in which the trunk is given (it returns the tile's hidden
states) and the head is called without the hooks around it, which gather its parameters once for all tiles. So scaled
and capped logits are what the model makes of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import OptionError
from ..shard import IGNORE_INDEX
from ..training.offload import HostOffload
from ..training.over_tiles import over_tiles
from ..training.tiles import TILE, Replaced, require_gathered_whole, require_own, tile_tokens
from .models import is_attention, outermost, parameters_of

STATE = "_ulysses_triton_memory"  # the attribute under which a model keeps what undoes `save_memory`


def save_memory(model: nn.Module, *, tile: int | None = TILE, loss: bool = True, offload: bool = False) -> None:
    """Let a transformers model hold less at once, with the same loss and gradients; `restore_memory` undoes it.

    Call it on the model, or on what wraps it (PEFT), before FSDP2 or DeepSpeed; with ZeRO-3, import deepspeed before.

    Args:
        tile: tokens (batch x length) that MLPs and the loss are computed for at once; None for all.
        loss: whether the loss of a causal LM is computed over tiles, too: in training, `model(..., labels=...)` then
            returns a loss but no logits.
        offload: keep the checkpoints of layers in host memory; turns gradient checkpointing on.

    Raises OptionError for a model that does not fit, naming it: without MLPs that are modules of its layers, without a
    head beside its trunk, with a loss or a forward that another library put there. An MLP that mixes tokens or returns
    router logits raises in the first step.
    """
    restore_memory(model)
    undo: list[Callable[[], None]] = []
    setattr(model, STATE, undo)
    try:
        for own in outermost(model):
            if tile is not None:
                undo += [tile_tokens(mlp, tile).remove for mlp in mlps_of(own)]
                if loss and own.get_output_embeddings() is not None:
                    undo.append(TiledLoss(own, tile).remove)
            if offload:
                undo.append(Offloaded(own).remove)
    except BaseException:
        restore_memory(model)
        raise


def restore_memory(model: nn.Module) -> None:
    """Undo `save_memory`. Nothing happens to a model without."""
    for remove in reversed(model.__dict__.pop(STATE, [])):
        remove()


def mlps_of(model: nn.Module) -> list[nn.Module]:
    """The MLPs of a model's layers: modules of a layer with two projections or more, beside its attention."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    found = [
        child
        for layer in layers
        for child in layer.children()
        if not any(map(is_attention, child.modules()))
        and sum(len(getattr(p, "ds_shape", p.shape)) > 1 for p in child.parameters()) > 1  # ds_shape: under ZeRO-3
    ]
    if not found:
        raise OptionError(
            f"{type(model).__name__} has no MLP as a module of its layers, so none can go over tiles; pass tile=None"
        )
    return found


class TiledLoss(Replaced):
    """The forward of a causal LM that, in training with labels, computes the loss over tiles and returns no logits."""

    def __init__(self, model: Any, tile: int) -> None:
        from transformers.loss.loss_utils import ForCausalLMLoss

        head, said = model.get_output_embeddings(), type(model).__name__
        names = {id(child): name for name, child in model.named_children()}
        if id(head) not in names or id(model.base_model) not in names:
            raise OptionError(f"{said} does not hold its head and its trunk side by side; pass loss=False")
        if "forward" in model.__dict__ or model.loss_function is not ForCausalLMLoss:
            raise OptionError(f"{said} has a forward or a loss of another library; pass loss=False")
        self.tile, self.head, self.trunk = tile, names[id(head)], names[id(model.base_model)]
        self.followed = False
        super().__init__(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.module
        given = dict(zip(parameters_of(model), args, strict=False)) | kwargs
        if given.get("labels") is None or not model.training:
            return self.whole(**given)
        wrong = [name for name in ("ignore_index", "logits_to_keep", "output_router_logits") if given.get(name)]
        wrong += ["output_router_logits"] * bool(getattr(model.config.get_text_config(), "output_router_logits", False))
        wrong += ["return_dict=False"] * (given.get("return_dict") is False)
        if wrong:
            raise OptionError(f"the loss of {type(model).__name__} over tiles does not take {', '.join(wrong)}")
        labels, targets = given.pop("labels"), given.pop("shift_labels", None)
        items = given.pop("num_items_in_batch", None)
        if targets is None:
            targets = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
        losses: list[Tensor] = []

        def head(hidden: Tensor) -> Tensor:
            losses.append(self._sum(hidden, targets.to(hidden.device)))
            return hidden.new_zeros(hidden.size(0), 0, 1)  # as logits of no token

        front = _stand_in(model, {self.head: _Calls(head)})
        output = type(model).forward(front, **given)
        (loss,) = losses
        count = (targets != IGNORE_INDEX).sum() if items is None else torch.as_tensor(items)
        kept = {name: value for name, value in output.items() if name != "logits"}
        return type(output)(loss=loss / count.to(loss.device), **kept)

    def _sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The sum of the tokens' losses, inside one call of the head."""
        model: Any = self.module
        module = getattr(model, self.head)
        tail = _stand_in(model, {self.trunk: _Calls(_given), self.head: _Calls(module.forward)})

        def of_tile(x: Tensor, labels: Tensor) -> Tensor:
            batch = {"labels": labels[None], "shift_labels": labels[None], "num_items_in_batch": 1}
            loss: Tensor = type(model).forward(tail, inputs_embeds=x[None], **batch).loss
            if torch.is_grad_enabled() and not self.followed:
                require_own(loss, [x, *module.parameters()], model)
                self.followed = True
            return loss

        own = [p for p in module.parameters() if p.requires_grad]
        with _forward_of(module, lambda x: over_tiles(of_tile, (x, targets), own, self.tile)):
            require_gathered_whole(module)
            total: Tensor = module(hidden)
        return total


class Offloaded:
    """HostOffload between a model's layers and `torch.utils.checkpoint`, also where that is turned on again later."""

    def __init__(self, model: Any) -> None:
        self.model, self.offload = model, HostOffload()
        self.own = model._set_gradient_checkpointing
        self.was_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        functools.update_wrapper(self, self.own)  # transformers asks for the signature
        model._set_gradient_checkpointing = self
        if self.was_on:
            self._put(self.offload.checkpoint)
        else:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.own(*args, **kwargs)
        self._put(self.offload.checkpoint)

    def remove(self) -> None:
        del self.model._set_gradient_checkpointing
        self._put(checkpoint)
        if not self.was_on:
            disable = getattr(self.model, "activation_checkpointing_disable", None)
            (disable or self.model.gradient_checkpointing_disable)()

    def _put(self, function: Callable[..., Any]) -> None:
        """Have layers call `function`, with the options that they have."""
        for module in self.model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                options = getattr(module._gradient_checkpointing_func, "keywords", {})
                module._gradient_checkpointing_func = functools.partial(function, **options)


class _Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _given(inputs_embeds: Tensor, **_: Any) -> Any:
    """The outputs of a trunk whose hidden states are there already; others are None."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _stand_in(model: nn.Module, instead: dict[str, nn.Module]) -> Any:
    """The same model with some of its modules replaced; the model stays what it is."""
    found = object.__new__(type(model))
    found.__dict__.update(model.__dict__, _modules=model._modules | instead)
    return found


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Another forward for a moment."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
