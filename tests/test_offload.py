"""Checkpoints in host memory: the same bits, and what is where when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ulysses_triton import OptionError, UlyssesError
from ulysses_triton.training.offload import IN_FLIGHT, HostOffload

LAYERS, WIDTH, TOKENS = 6, 16, 64
BYTES = TOKENS * WIDTH * 4


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 32), nn.SiLU(), nn.Linear(32, WIDTH)) for _ in range(LAYERS))


def forward(stack: nn.ModuleList, x: Tensor, call: Callable[..., Tensor], **options: Any) -> Tensor:
    for layer in stack:
        x = x + call(layer, x, **options)
    return x


def gradients(stack: nn.ModuleList, x: Tensor, loss: Tensor, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x, *stack.parameters()], **options))


def start() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(TOKENS, WIDTH, requires_grad=True)


def plain() -> list[Tensor]:
    stack, x = layers(), start()
    return gradients(stack, x, forward(stack, x * 1, checkpoint, use_reentrant=False).square().sum())


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gradients_are_the_same_bits_and_buffers_go() -> None:
    offload, stack, x = HostOffload(min_bytes=1), layers(), start()
    for _ in range(3):
        loss = forward(stack, x * 1, offload.checkpoint).square().sum()
        assert offload.host_bytes == LAYERS * BYTES
        found = gradients(stack, x, loss)
        assert equal(found, plain())
        del loss
        assert offload.host_bytes == 0 and not offload._leaving


def test_two_graphs_at_once_and_a_graph_used_twice() -> None:
    offload, stack, x = HostOffload(min_bytes=1), layers(), start()
    first, second = (forward(stack, x * 1, offload.checkpoint).square().sum() for _ in range(2))
    assert equal(gradients(stack, x, first), plain())
    assert equal(gradients(stack, x, second, retain_graph=True), plain())
    assert equal(gradients(stack, x, second), plain())


def test_the_layer_before_is_on_its_way_while_a_layer_is_computed_again() -> None:
    offload, stack, x = HostOffload(min_bytes=1), layers(), start()
    copies: list[Any] = []
    there: list[list[int]] = []

    def watched(layer: nn.Module, y: Tensor) -> Tensor:
        if len(copies) == LAYERS:  # the last layer, and then all of them again: which checkpoints are on the device
            there.append([i for i, copy in enumerate(copies) if copy.x is not None])
        return layer(y)

    pack = offload._pack
    offload._pack = lambda x, layer: copies.append(pack(x, layer)) or copies[-1]  # type: ignore[method-assign]
    y = x * 1
    for layer in stack:
        y = y + offload.checkpoint(watched, layer, y)
        assert [i for i, copy in enumerate(copies) if copy.x is not None] == list(range(len(copies)))[-IN_FLIGHT:]
    y.sum().backward()
    # The last two never left; from then on one is ahead of the one in use.
    assert there == [[4, 5], [4], [3], [2], [1], [0], []]


def test_what_is_saved_twice_is_copied_once_until_it_is_changed() -> None:
    offload, stack, x = HostOffload(min_bytes=1), layers(), start()
    y = x * 1
    total = offload.checkpoint(stack[0], y) + offload.checkpoint(stack[1], y)
    assert offload.host_bytes == BYTES
    half = offload.checkpoint(stack[2], y[: TOKENS // 2])
    assert offload.host_bytes == BYTES * 3 // 2
    found = gradients(stack[:3], x, total.sum() + half.sum())
    y = x * 1
    expected = stack[0](y).sum() + stack[1](y).sum() + stack[2](y[: TOKENS // 2]).sum()
    assert equal(found, gradients(stack[:3], x, expected))


def test_small_tensors_and_parameters_stay() -> None:
    offload = HostOffload(min_bytes=BYTES + 1)
    weight, x = nn.Parameter(torch.randn(TOKENS * 2, WIDTH)), start()
    y = offload.checkpoint(lambda x, weight: (x @ weight.T).sin(), x * 1, weight)
    assert offload.host_bytes == 0
    y.sum().backward()


def test_an_input_that_is_overwritten_too_soon_is_an_error() -> None:
    offload, stack, x = HostOffload(min_bytes=1), layers(), start()
    y = x * 1
    out = offload.checkpoint(stack[0], y)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(UlyssesError, match="was written to"):
        out.sum().backward()


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match="use_reentrant"):
        HostOffload().checkpoint(torch.sin, torch.ones(2), use_reentrant=True)
    with pytest.raises(OptionError, match="min_bytes"):
        HostOffload(min_bytes=-1)


def test_without_gradients_nothing_is_copied() -> None:
    offload, stack = HostOffload(min_bytes=1), layers()
    with torch.no_grad():
        forward(stack, start(), offload.checkpoint)
    assert offload.host_bytes == 0
