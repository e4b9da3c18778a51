"""The loss and modules over tiles of tokens: plain PyTorch's numbers, on one process and under FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ulysses_triton import OptionError, ShapeError, token_mean
from ulysses_triton.training.config import ModelConfig
from ulysses_triton.training.model import SwiGLU
from ulysses_triton.training.over_tiles import over_tiles
from ulysses_triton.training.tiles import loss_sum, tile_tokens

E, V = 24, 70
CONFIG = ModelConfig(width=E, hidden=40)


def plain_loss(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = functional.linear(x, weight, bias)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def batch(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states [2, tokens, E] and labels, some of which do not count."""
    torch.manual_seed(seed)
    labels = torch.randint(V, (2, tokens))
    labels[:, ::5] = -100
    return torch.randn(2, tokens, E, dtype=torch.float64), labels


def results(function: Callable[..., Tensor], *tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The value, and the gradients of all tensors, in fp64."""
    own = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
    y = function(*own)
    (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y.detach().double()] + [x.grad.double() for x in own if x is not None]


def error(found: Tensor, expected: Tensor) -> float:
    scale = float(expected.norm())
    return float((found - expected).norm()) / scale if scale else float(found.norm())


def hold(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and error(one, other) <= bound


def hold_as_close(found: list[Tensor], plain: list[Tensor], truth: list[Tensor], floor: float) -> None:
    """At most twice the plain path's error, and a floor."""
    for one, its, exact in zip(found, plain, truth, strict=True):
        assert error(one, exact) <= 2 * error(its, exact) + floor


# ---- the loss


@pytest.mark.parametrize("tokens", [0, 3, 8, 21], ids="{} tokens".format)
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_the_loss_over_tiles_is_the_loss(tokens: int, softcap: float | None, biased: bool) -> None:
    x, labels = batch(tokens)
    weight, bias = torch.randn(V, E, dtype=torch.float64), torch.randn(V, dtype=torch.float64) if biased else None
    runs = {
        dtype: [
            results(lambda *own: plain_loss(own[0], labels, *own[1:], softcap), x, weight, bias, dtype=dtype),
            results(
                lambda *own: loss_sum(own[0], labels, *own[1:], softcap=softcap, tile=8), x, weight, bias, dtype=dtype
            ),
        ]
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    truth = runs[torch.float64][0]
    hold(runs[torch.float64][1], truth, 1e-13)
    hold(runs[torch.float32][1], runs[torch.float32][0], 1e-6)
    hold_as_close(runs[torch.float32][1], runs[torch.float32][0], truth, 1e-7)
    hold_as_close(runs[torch.bfloat16][1], runs[torch.bfloat16][0], truth, 1e-3)


def test_sums_over_many_tiles_of_bf16_lose_nothing() -> None:
    """512 tiles, of which each adds to the gradient of the weight; a sum in bf16 would be several times as far off."""
    x, labels = batch(1024)
    weight = torch.randn(V, E, dtype=torch.float64) / 4
    runs = [
        results(lambda *own: plain_loss(own[0], labels, own[1], None, None), x, weight, dtype=torch.bfloat16),
        results(lambda *own: loss_sum(own[0], labels, own[1], tile=4), x, weight, dtype=torch.bfloat16),
    ]
    truth = results(lambda *own: plain_loss(own[0], labels, own[1], None, None), x, weight, dtype=torch.float64)
    hold_as_close(runs[1], runs[0], truth, 0.0)


def test_the_loss_goes_with_token_mean_autocast_and_checkpoints() -> None:
    x, labels = batch(21)
    weight = torch.randn(V, E, dtype=torch.float64)
    count = (labels != -100).sum()

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return token_mean(plain_loss(x, labels, weight, None, None), count)

    def tiled(x: Tensor, weight: Tensor) -> Tensor:
        return token_mean(checkpoint(loss_sum, x, labels, weight, tile=8, use_reentrant=False), count)

    hold(results(tiled, x, weight, dtype=torch.float32), results(plain, x, weight, dtype=torch.float32), 1e-6)
    truth = results(plain, x, weight, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        low = [results(way, x, weight, dtype=torch.float32) for way in (tiled, plain)]
    assert 1e-4 < error(low[1][2], truth[2])  # it was low
    hold_as_close(*low, truth, 1e-4)


def test_no_more_logits_than_of_a_tile_are_made() -> None:
    x, labels = batch(512)
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.extend(y.numel() for y in (out if isinstance(out, tuple) else (out,)) if isinstance(y, Tensor))
            return out

    with Watch():
        results(lambda *own: loss_sum(own[0], labels, own[1], tile=64), x, torch.randn(V, E), dtype=torch.float32)
    assert max(seen) == x.numel() < 1024 * V


@pytest.mark.parametrize(
    ("shapes", "options", "said"),
    [
        (((2, 5, E), (2, 4), (V, E)), {}, r"labels \[2, 4\]"),
        (((2, 5, E), (2, 5), (V, E + 1)), {}, "expected"),
        (((2, 5, E), (2, 5), (V, E)), {"tile": 0}, "tile = 0"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: tuple[tuple[int, ...], ...], options: dict[str, Any], said: str) -> None:
    x, labels, weight = (torch.zeros(shape) for shape in shapes)
    with pytest.raises((OptionError, ShapeError), match=said):
        loss_sum(x, labels.long(), weight, **options)


# ---- modules


def swiglu(dtype: torch.dtype = torch.float32, frozen: bool = False) -> SwiGLU:
    torch.manual_seed(1)
    module = SwiGLU(CONFIG).to(dtype)
    module.gate_up.weight.requires_grad_(not frozen)
    return module


def step(module: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None, **options: Any) -> list[Tensor]:
    """Output and gradients, of the input and all parameters that are not frozen, in fp64."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = call(module, x, **options) if call else module(x)
    y.square().sum().backward()
    return [y.detach().double(), x.grad.double(), *(p.grad.double() for p in module.parameters() if p.requires_grad)]


@pytest.mark.parametrize("tokens", [0, 3, 8, 21], ids="{} tokens".format)
@pytest.mark.parametrize("call", [None, checkpoint], ids=["", "checkpoint"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_module_over_tiles_is_the_module(tokens: int, call: Any, frozen: bool) -> None:
    x, _ = batch(tokens)
    options = {"use_reentrant": False} if call else {}
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module = swiglu(dtype, frozen)
        plain = step(module, x.to(dtype))
        tiled = tile_tokens(module, 8)
        found[dtype] = plain, step(module, x.to(dtype), call, **options)
        tiled.remove()
        assert torch.equal(step(module, x.to(dtype))[0], plain[0]) and "forward" not in module.__dict__
    truth = found[torch.float64][0]
    hold(found[torch.float64][1], truth, 1e-13)
    hold(found[torch.float32][1], found[torch.float32][0], 1e-6)
    hold_as_close(found[torch.bfloat16][1], found[torch.bfloat16][0], truth, 1e-3)


def test_autocast_and_dropout_are_again_what_they_were() -> None:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(E, 40), nn.Dropout(0.5), nn.Linear(40, E))
    x = torch.randn(1, 20, E)
    tile_tokens(module, 8)
    module(x)  # the first call looks at the module and draws random numbers
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(module, x)
    after = torch.rand(1)
    torch.manual_seed(3)
    y = []
    x = x.requires_grad_()
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        for part in x.split(8, dim=1):
            y.append(module.forward.whole(part))
        torch.cat(y, dim=1).square().sum().backward()
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(torch.cat(y, dim=1).double(), found[0])
    hold(found[1:], [x.grad.double(), *(p.grad.double() for p in module.parameters())], 1e-2)


def test_lora_is_trained_beside_frozen_weights() -> None:
    import peft

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = swiglu()

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x)

    torch.manual_seed(4)
    net = peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules=["gate_up", "down"], init_lora_weights=False))
    x = torch.randn(2, 21, E)
    plain = step(net, x)
    tile_tokens(net.base_model.model.mlp, 8)
    assert len(plain) == 2 + 4
    hold(step(net, x), plain, 1e-6)


class Mixes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-2, keepdim=True)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Borrows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.borrowed = [nn.Parameter(torch.ones(E))]  # in no list of parameters

    def forward(self, x: Tensor) -> Tensor:
        return x * self.borrowed[0]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Mixes(), "Mixes .* the tokens beside it"),
        (Pair(), "Pair .* returned a tuple"),
        (Borrows(), r"Borrows .* a tensor \[24\] that needs a gradient"),
    ],
    ids=["mixes", "pair", "borrows"],
)
def test_a_module_that_does_not_fit_is_refused_by_name(module: nn.Module, said: str) -> None:
    tile_tokens(module, 8)
    with pytest.raises(OptionError, match=said):
        module(torch.randn(2, 21, E, requires_grad=True)).sum().backward()


def test_calls_that_do_not_fit_are_refused() -> None:
    module = swiglu()
    tile_tokens(module, 8)
    with pytest.raises(OptionError, match="over tiles already"):
        tile_tokens(module)
    with pytest.raises(OptionError, match="called with other things"):
        module(torch.randn(3, E), torch.randn(3, E))
    with pytest.raises(OptionError, match="tile = 0"):
        tile_tokens(swiglu(), 0)


def test_a_gradient_is_handed_over_once() -> None:
    module = swiglu()
    tile_tokens(module, 8)
    times: list[nn.Parameter] = []
    for p in module.parameters():
        p.register_post_accumulate_grad_hook(times.append)
    for tokens in (0, 3, 21):
        step(module, torch.randn(2, tokens, E))
        assert len(times) == 2
        times.clear()


def test_a_parameter_that_no_tile_uses_has_a_gradient_of_zeros() -> None:
    x, unused = torch.randn(5, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    over_tiles(lambda part: part * 2, (x,), (unused,), 2).sum().backward()
    assert torch.equal(unused.grad, torch.zeros(2)) and torch.equal(x.grad, torch.full((5, 3), 2.0))


# ---- sharded parameters


class Network(nn.Module):
    """What a model is to FSDP: a layer that is sharded by itself, and a head that the root holds."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = SwiGLU(CONFIG)
        self.head = nn.Linear(E, V)

    def forward(self, x: Tensor, labels: Tensor, tile: int | None) -> Tensor:
        x = x + self.mlp(x)
        if tile is None:
            return plain_loss(x, labels, self.head.weight, self.head.bias, 4.0)
        return loss_sum(x, labels, self.head.weight, self.head.bias, softcap=4.0, tile=tile)


def network() -> Network:
    torch.manual_seed(6)
    return Network()


LENS = (21, 0, 3, 40)  # different numbers of tiles, and none


def train_sharded(ctx: Any, bf16: bool, outer: bool, inner: bool) -> Any:
    net = network()
    if inner:
        fully_shard(net.mlp.down, mesh=_mesh(ctx))
    tile_tokens(net.mlp, 8)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else None
    options = {"mesh": _mesh(ctx)} | ({"mp_policy": policy} if policy else {})
    fully_shard(net.mlp, **options)
    fully_shard(net, **options)
    x, labels = batch(sum(LENS))
    mine = slice(sum(LENS[: ctx.rank]), sum(LENS[: ctx.rank + 1]))
    x, labels = x[:, mine].to(torch.bfloat16 if bf16 else torch.float32), labels[:, mine]
    made: list[int] = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda _: made.append(1))
    for _ in range(2):  # accumulated
        if outer:
            loss = checkpoint(net, x, labels, 8, use_reentrant=False)
        else:
            loss = net(x, labels, 8)
        token_mean(loss, (labels != -100).sum(), ctx.group).backward()
    assert all(isinstance(p, DTensor) for p in net.parameters())
    try:
        loss_sum(x, labels, net.head.weight, tile=8)
    except ShapeError as said:
        outside = str(said)
    return [p.grad.full_tensor().double() / 2 for p in net.parameters()], outside


def _mesh(ctx: Any) -> Any:
    return dist.device_mesh.DeviceMesh.from_group(ctx.group, "cpu")


@pytest.mark.parametrize("outer", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_gradients_under_fsdp_are_those_of_one_process(pool: Any, bf16: bool, outer: bool) -> None:
    truths = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        net = network().to(dtype)
        x, labels = batch(sum(LENS))
        net(x.to(dtype), labels, None).div((labels != -100).sum()).backward()
        truths[dtype] = [p.grad.double() for p in net.parameters()]
    for found, outside in pool.run(4, train_sharded, bf16, outer, False):
        assert "sharded weight" in outside
        if bf16:
            hold_as_close(found, truths[torch.bfloat16], truths[torch.float64], 1e-3)
        else:
            hold(found, truths[torch.float32], 1e-6)


def test_parts_that_fsdp_would_gather_for_every_tile_are_refused(pool: Any) -> None:
    for failure in pool.run(2, train_sharded, False, False, True, expect_errors=True):
        assert "fully_shard was called on modules inside it" in str(failure)
