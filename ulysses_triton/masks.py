"""Masks of the user's: predicates, registered by name, and block masks made from them.

    @masks.register
    @triton.jit
    def prefix(batch, head, q_pos, kv_pos, lens):
        return (kv_pos <= q_pos) | (kv_pos < tl.load(lens + batch))

A predicate gets positions in the whole sequence and says which pairs are attended; its captured tensors follow the four
indices, in the kernel as pointers. Its Python body is also what runs without a GPU (`kernels/_predicate`), so keep to
expressions: no `if` on tensors, constants from outside as `tl.constexpr`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from .errors import OptionError
from .kernels import _blocks, _predicate
from .kernels._views import Predicate

Function = TypeVar("Function", bound=Any)

_registered: dict[str, Any] = {}
_captures: dict[str, int] = {}  # how many tensors each of them takes


def _is_jitted(x: Any) -> bool:
    return isinstance(x, JITFunction | InterpretedFunction)


def register(fn: Function) -> Function:
    """Let `fn` be used as a mask, by its name, which must be free; above `@triton.jit` as a decorator."""
    if not _is_jitted(fn):
        raise OptionError(f"masks.register got {fn!r}, which is no @triton.jit function; write @triton.jit below it")
    name = fn.fn.__name__
    parameters = inspect.signature(fn.fn).parameters
    if len(parameters) < 4:
        raise OptionError(
            f"the mask predicate {name} takes ({', '.join(parameters)}); a predicate takes "
            f"(batch, head, q_pos, kv_pos, *captured)"
        )
    if _registered.setdefault(name, fn) is not fn:
        raise OptionError(f"a mask predicate named {name} is registered already; rename one of them")
    _captures[name] = len(parameters) - 4
    return fn


def ask(predicate: Predicate) -> None:
    """Raise OptionError for a predicate whose twin does not run: it is asked for the first pair."""
    first = torch.zeros(1, 1, dtype=torch.int64, device=predicate.captured[0].device if predicate.captured else None)
    try:
        _predicate.evaluate(predicate, 0, 0, first, first)
    except TypeError as error:
        raise OptionError(str(error)) from error


def by_name(name: str) -> Any:
    """The registered `@triton.jit` function."""
    if name not in _registered:
        raise OptionError(f"no mask predicate is named {name}; register it on every rank with masks.register")
    return _registered[name]


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """A predicate, and for every block of 128 x 128 pairs whether it leaves none (0), some (1) or all (2) of them."""

    predicate: Predicate
    name: str
    status: Tensor  # uint8 [batch or 1, heads or 1, query blocks, key blocks]
    batch: int | None  # None: the same for all
    heads: int | None
    q_len: int
    kv_len: int

    def sparsity(self) -> float:
        """Share of the blocks that are empty, and so cost nothing."""
        return (self.status == _blocks.EMPTY).double().mean().item()

    def __repr__(self) -> str:
        return (
            f"BlockMask({self.name}, batch={self.batch}, heads={self.heads}, q_len={self.q_len}, "
            f"kv_len={self.kv_len}, {self.sparsity():.0%} empty)"
        )


def block_mask(
    mask: Any, *, batch: int | None = None, heads: int | None = None, q_len: int, kv_len: int | None = None,
    device: torch.device | str = "cpu",
) -> BlockMask:  # fmt: skip
    """Evaluate a predicate, or `(predicate, *tensors)`, on all pairs of `q_len` queries and `kv_len` keys, by block.

    Without `batch` or `heads` the predicate must not depend on them: it is asked for number 0 only. `kv_len` is `q_len`
    unless given. All lengths are in tokens of the whole sequence. It runs in PyTorch on `device`, once.
    """
    name, captured, status = parse(mask)
    if status is not None:
        raise OptionError(f"block_mask got a block mask, {mask!r}; give it a predicate, or (predicate, *tensors)")
    kv_len = q_len if kv_len is None else kv_len
    counts = {"batch": 1 if batch is None else batch, "heads": 1 if heads is None else heads, "q_len": q_len}
    for what, count in (counts | {"kv_len": kv_len}).items():
        if not isinstance(count, int) or count < 1:
            raise OptionError(f"block_mask got {what}={count!r}; it must be an integer of at least 1")
    predicate = Predicate(by_name(name), captured)
    try:
        status = _blocks.status(predicate, counts["batch"], counts["heads"], q_len, kv_len, torch.device(device))
    except TypeError as error:
        raise OptionError(str(error)) from error
    return BlockMask(predicate, name, status, batch, heads, q_len, kv_len)


def parse(mask: Any) -> tuple[str, tuple[Tensor, ...], Tensor | None]:
    """What a `mask` argument names: the predicate's name, its captured tensors and a block mask's status."""
    if isinstance(mask, BlockMask):
        return mask.name, mask.predicate.captured, mask.status
    function, *captured = mask if isinstance(mask, Sequence) and len(mask) else (mask,)
    if not _is_jitted(function):
        raise OptionError(
            f"mask is {mask!r}; expected a predicate under @masks.register and @triton.jit, (predicate, *tensors), or "
            f"a masks.block_mask of one"
        )
    name = function.fn.__name__
    if name not in _registered or _registered[name] is not function:
        raise OptionError(f"the mask predicate {name} is not registered: call masks.register({name}) on every rank")
    for i, x in enumerate(captured):
        if not isinstance(x, Tensor):
            raise OptionError(f"captured value {i} of the mask predicate {name} is {x!r}; only tensors are captured")
        if not x.is_contiguous():
            raise OptionError(
                f"captured tensor {i} of the mask predicate {name} has strides {x.stride()}; the predicate gets a "
                f"pointer to it: pass it .contiguous()"
            )
    if len(captured) != _captures[name]:
        raise OptionError(
            f"the mask predicate {name} is given {len(captured)} captured tensors and takes {_captures[name]}; pass "
            f"(predicate, *tensors) with one for each parameter after the fourth"
        )
    return name, tuple(captured), None
