"""The loss, and modules that work on every token by itself, over tiles of tokens (`over_tiles`).

Around a module that goes over tiles, the hooks of FSDP2 and ZeRO-3 see one call: its parameters are gathered once.
PyTorch's `linear_cross_entropy` is chunked, too, but its loss of bf16 is bf16, and it knows no softcap.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import OptionError, ShapeError
from ..shard import IGNORE_INDEX
from .over_tiles import over_tiles

TILE = 4096  # tokens


def loss_sum(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    tile: int = TILE,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The sum of the tokens' cross entropies, from what a model's head is given; made for `token_mean`.

    Logits are `hidden weight^T + bias`, with a softcap `softcap * tanh(logits / softcap)` (Gemma 2); there are never
    more of them than of one tile. Call it inside the forward of the module that holds `weight`: FSDP2 and ZeRO-3 gather
    parameters around that.

    Args:
        hidden: `[..., E]`.
        labels: int64 `[...]`, shifted before sharding.
        weight: `[V, E]`.
        bias: `[V]`.
        tile: tokens whose logits are computed at once.
        ignore_index: the label that does not count.

    Returns a 0-dim tensor, fp32 (fp64 of fp64). Raises ShapeError when shapes do not fit.
    """
    sharded = isinstance(weight, DTensor) or hasattr(weight, "ds_id") and weight.numel() == 0
    if sharded or hidden.shape[:-1] != labels.shape or weight.shape[1:] != hidden.shape[-1:]:
        raise ShapeError(
            f"hidden {list(hidden.shape)}, labels {list(labels.shape)} and {'sharded ' * sharded}weight "
            f"{list(weight.shape)} do not fit; expected [..., E], [...] and [V, E], and a weight that is whole, which "
            "FSDP2 and ZeRO-3 make it inside the forward of its module"
        )

    def of_tile(x: Tensor, targets: Tensor) -> Tensor:
        logits = functional.linear(x, weight, bias)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        wide = logits.double() if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(wide, targets, reduction="sum", ignore_index=ignore_index)

    own = [weight] if bias is None else [weight, bias]
    return over_tiles(of_tile, (hidden, labels), own, tile)


def tile_tokens(module: nn.Module, tile: int = TILE) -> Tiled:
    """Let `module`, which works on every token by itself, go over tiles of tokens; `remove()` of the result undoes it.

    The module takes one tensor `[..., E]` and returns one `[..., E2]`. Its forward is replaced, so the hooks around it
    (FSDP2's, ZeRO-3's) see one call. With ZeRO-3 do this before `deepspeed.initialize`, so that DeepSpeed gathers all
    parameters of the module at once. A parameter that no tile uses gets a gradient of zeros.

    The first call raises OptionError for a module that does not fit: it is tried on four tokens, together and apart.
    """
    if isinstance(module.forward, Tiled):
        raise OptionError(f"{type(module).__name__} goes over tiles already; call remove() first")
    if tile < 1:
        raise OptionError(f"tile = {tile}; it must be at least 1 token")
    return Tiled(module, tile)


class Replaced:
    """A forward in place of a module's own (`whole`), to be called instead, until `remove()`."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.whole = module, module.forward
        self._before = module.__dict__.get("forward")  # of another library, on this module alone
        functools.update_wrapper(self, self.whole)  # libraries ask for the signature
        module.forward = self

    def remove(self) -> None:
        """Give the module its own forward back."""
        del self.module.forward
        if self._before is not None:
            self.module.forward = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Tiled(Replaced):
    """A forward that goes over tiles."""

    def __init__(self, module: nn.Module, tile: int) -> None:
        super().__init__(module)
        self.tile = tile
        self.known = False  # to work on every token by itself
        self.followed = False  # backward, once
        if "deepspeed" in sys.modules:
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(module, True)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        given = (*args, *kwargs.values())
        if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].dim() < 2:
            raise _refusal(self.module, "it was called with other things than one tensor of tokens [..., E]")
        x: Tensor = given[0]
        if not self.known and type(x) is Tensor and not torch.compiler.is_compiling():
            self._try(x)
        own = [p for p in self.module.parameters() if p.requires_grad]
        lead = (1,) * (x.dim() - 2)
        return over_tiles(lambda part: self._tile(part, lead), (x,), own, self.tile)

    def _tile(self, x: Tensor, lead: tuple[int, ...]) -> Tensor:
        """The module on the tokens x [n, E], which it sees with `lead` dimensions in front."""
        y = self.whole(x.view(*lead, *x.shape))
        if not isinstance(y, Tensor) or y.shape[:-1] != (*lead, x.size(0)):
            found = list(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise _refusal(self.module, f"for tokens {[*lead, *x.shape]} it returned {found}, not as many tokens")
        if torch.is_grad_enabled() and not self.followed:
            require_own(y, [x, *self.module.parameters()], self.module)
            self.followed = True
        return y.reshape(x.size(0), y.size(-1))

    def _try(self, x: Tensor) -> None:
        """Raise for a module that mixes tokens, or whose parts FSDP or ZeRO-3 would gather once per tile."""
        require_gathered_whole(self.module)
        some = torch.randn(4, x.size(-1), generator=torch.Generator().manual_seed(0)).to(x)
        lead = (1,) * (x.dim() - 2)
        # Selective checkpointing counts the operations that its mode sees, and these are done once only.
        with torch.no_grad(), _disable_current_modes(), _in_eval_mode(self.module):
            together = self._tile(some, lead)
            apart = torch.cat([self._tile(part, lead) for part in some.split([1, 3])])
        allowed = torch.finfo(together.dtype).eps ** 0.5 * together.abs().max()
        if not bool((together - apart).abs().max() <= allowed):
            raise _refusal(self.module, "what it makes of a token depends on the tokens beside it")
        self.known = True


def require_gathered_whole(module: nn.Module) -> None:
    """Raise OptionError where parts of a module are gathered by themselves: once per tile, of which ranks have more or
    fewer."""
    inner = [m for m in module.modules() if m is not module]
    if any(isinstance(m, FSDPModule) for m in inner):
        raise _refusal(
            module,
            "fully_shard was called on modules inside it, which would be gathered once per tile; call it on the whole "
            "module, or on what holds it",
        )
    of_parts = [p for m in inner for p in m.parameters(recurse=False)]
    if any(hasattr(p, "ds_id") for p in of_parts) and not getattr(module, "_z3_leaf", False):
        raise _refusal(
            module,
            "ZeRO-3 would gather the modules inside it once per tile; import deepspeed and set up tiles before "
            f"deepspeed.initialize, or call deepspeed.utils.set_z3_leaf_modules for {type(module).__name__} before it",
        )


def require_own(y: Tensor, known: Iterable[Tensor], module: nn.Module) -> None:
    """Raise OptionError where y follows from tensors, of which only `known` ones would get their gradients."""
    own = set(map(id, known))
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        if hasattr(node, "variable") and id(node.variable) not in own:
            shape = list(node.variable.shape)
            raise _refusal(module, f"it uses a tensor {shape} that needs a gradient and is no parameter of it")


def _refusal(module: nn.Module, why: str) -> OptionError:
    return OptionError(f"{type(module).__name__} cannot go over tiles: {why}")


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout and the like."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
