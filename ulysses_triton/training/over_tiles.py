"""A function over tiles of tokens, with exact gradients: it holds what one tile needs, forward and backward.

    x [..., E], N tokens -> tiles [n, E] -> function -> one after another in y [..., E2], or added up to a loss

Backward computes every tile again, then its gradients. Those of parameters are added up over tiles in fp32 (fp64 for
fp64) and handed to autograd once: hooks that wait for a parameter's gradient (DDP, FSDP2, ZeRO-3) fire once, however
many tiles a rank has, none included. Sums in bf16 would lose bits with every tile; that is why this is not a
`torch.utils.checkpoint` of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from ..errors import OptionError


def over_tiles(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor], tile: int
) -> Tensor:
    """`function` of every tile of `inputs`, one result after another, or their sum where it gives 0-dim ones.

    Args:
        function: `(tile [n, E], or [n], of every input) -> [n, E2] or []`, called twice for every tile.
        inputs: the first is `[..., E]` and gets a gradient, the others are `[...]`.
        parameters: the other tensors whose gradients are wanted. `function` finds them by itself: in backward they are
            what they were, or were gathered again in place.
        tile: n of all tiles but the last.
    """
    if tile < 1:
        raise OptionError(f"tile = {tile}; it must be at least 1 token")
    return _OverTiles.apply(function, tile, len(inputs), *inputs, *parameters)


class _OverTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], tile: int, count: int, *tensors: Tensor) -> Tensor:
        inputs, ctx.parameters = tensors[:count], tensors[count:]
        ctx.save_for_backward(*inputs)
        ctx.function, ctx.tile, ctx.ambient = function, tile, _Ambient(inputs[0])
        return _joined((function(*parts) for parts in _tiles(inputs, tile)), inputs[0].shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        x_wanted, wanted = ctx.needs_input_grad[3], ctx.needs_input_grad[3 + len(inputs) :]
        leaves = [p for p, asked in zip(ctx.parameters, wanted, strict=True) if asked]
        grad_x = torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device=inputs[0].device) if x_wanted else None
        rows = None if grad_x is None else grad_x.flatten(0, -2)
        above = grad if grad.dim() == 0 else grad.flatten(0, -2)
        sums = [torch.zeros_like(p, dtype=_wide(p.dtype)) for p in leaves]
        begin = 0
        with ctx.ambient.again():
            for x, *others in _tiles(inputs, ctx.tile):
                part, end = x.detach().requires_grad_(x_wanted), begin + x.size(0)
                with torch.enable_grad():
                    y = ctx.function(part, *others)
                of_y = above if y.dim() == 0 else above[begin:end]
                found = list(torch.autograd.grad(y, [part] * x_wanted + leaves, of_y, allow_unused=True))
                if rows is not None:
                    of_x = found.pop(0)
                    rows[begin:end] = 0 if of_x is None else of_x
                for total, of_tile in zip(sums, found, strict=True):
                    if of_tile is not None:
                        total += of_tile
                del y, found  # before the next tile is computed
                begin = end
        totals = iter(sums)
        given = [next(totals).to(p.dtype) if asked else None for p, asked in zip(ctx.parameters, wanted, strict=True)]
        return (None, None, None, grad_x, *[None] * (len(inputs) - 1), *given)


class _Ambient:
    """What a recomputation has to find as it was: autocast, and the random states of the CPU and of x's device."""

    def __init__(self, x: Tensor) -> None:
        kind = x.device.type
        self.autocast = torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )
        self.cpu, (self.devices, self.states) = torch.get_rng_state(), get_device_states(x)

    @contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices), self.autocast:
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


def _tiles(inputs: Sequence[Tensor], tile: int) -> Iterator[tuple[Tensor, ...]]:
    """One tile at least, though it may be of no token, so that every parameter gets its gradient."""
    lead = inputs[0].dim() - 1
    return zip(*(x.flatten(0, lead - 1).split(tile) for x in inputs), strict=True)


def _joined(results: Iterator[Tensor], lead: torch.Size) -> Tensor:
    """Results one after another in one tensor `[*lead, ...]`, or the sum of 0-dim ones, holding one of them at a time.

    The tensor is no view, of which FSDP2 warns.
    """
    total: Tensor | None = None
    begin = 0
    for found in results:
        if found.dim() == 0:
            total = found if total is None else total + found
            continue
        if total is None:
            total = found.new_empty(*lead, found.size(-1))
        total.flatten(0, -2)[begin : begin + found.size(0)] = found
        begin += found.size(0)
        del found
    assert total is not None
    return total


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
