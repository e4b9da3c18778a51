"""The CPU twin of a mask predicate: its Python body, run on PyTorch tensors.

A predicate is a `@triton.jit` function `(batch, head, q_pos, kv_pos, *captured) -> bool`. The function under the
decorator runs here with stand-ins: indices are `Value`s, tensors whose operators do what compiled Triton does; captured
tensors are `Pointer`s into the flattened tensor; and what it reads from its surroundings is replaced where it belongs
to Triton: `tl` (under whatever name) by `_LANGUAGE`, constants by their values, jitted helpers by their own twins.

Where Python, PyTorch and Triton disagree, this follows the compiled kernel: on integers `//` and `%` truncate toward
zero, as in C: -3 // 2 is -1 and -3 % 2 is -1; `/` of integers is fp32; a global must be a `tl.constexpr`. What it does
not know raises a TypeError that says so: nothing is guessed.

Example: `kv_pos < tl.load(lens_ptr + batch)` with lens = [5, 9] captured, batch = [[0], [1]] and kv_pos = [4, 6]: the
address is Pointer(lens, [[0], [1]]), the load gathers [[5], [9]], and the result is [[True, False], [True, True]].
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from functools import cache, reduce
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._views import Predicate

Number = bool | int | float

_NAMES = ("int8", "int16", "int32", "int64", "uint8", "float16", "bfloat16", "float32", "float64")
_DTYPES = {getattr(tl, name): getattr(torch, name) for name in _NAMES} | {tl.int1: torch.bool}


def evaluate(predicate: Predicate, batch: Tensor | int, head: Tensor | int, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    """What the predicate says, as bools in the common shape of the four indices, all on one device."""
    function = predicate.function.fn
    indices = [torch.as_tensor(x, device=q_pos.device) for x in (batch, head, q_pos, kv_pos)]
    shape = torch.broadcast_shapes(*(x.shape for x in indices))
    try:
        pointers = [Pointer(i, x.flatten()) for i, x in enumerate(predicate.captured)]
        result = twin(function)(*map(Value, indices), *pointers)
        found = result if isinstance(result, Value) else Value(torch.tensor(result, device=q_pos.device))
        if found.tensor.dtype != torch.bool:
            raise TypeError(f"it returns {found.tensor.dtype} instead of bool: end it with a comparison")
    except Exception as error:
        raise TypeError(
            f"the mask predicate {function.__name__} cannot run in PyTorch: {error}. Predicates may use operators, "
            f".to(dtype), jitted helpers, globals that are tl.constexpr, and of Triton "
            f"{', '.join(sorted(_FUNCTIONS))}; for `if`, `and`, `or`, `not` write tl.where, &, |, ~"
        ) from error
    return found.tensor.expand(shape)


@cache
def twin(function: FunctionType) -> FunctionType:
    """The function with stand-ins for what it reads from its surroundings."""
    code = function.__code__
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    scope: dict[str, Any] = {"__builtins__": {"range": range}}  # `min` of blocks, say, differs even within Triton
    scope |= {n: _stand_in(n, function.__globals__[n]) for n in names if n in function.__globals__}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    closure = tuple(CellType(_stand_in(n, cell.cell_contents)) for n, cell in cells)
    return FunctionType(code, scope, function.__name__, function.__defaults__, closure)


def _stand_in(name: str, value: Any) -> Any:
    """For what a predicate finds under a name outside of it."""
    if value is triton:
        return Namespace("triton", {"language": _LANGUAGE})
    if value is tl or value is tl.math:
        return _LANGUAGE
    if isinstance(value, tl.constexpr):
        return value.value
    if isinstance(value, tl.dtype | ModuleType):
        return value
    inner = getattr(value, "fn", value)  # of a jitted function
    if getattr(inner, "__module__", "").startswith("triton.language"):
        return getattr(_LANGUAGE, inner.__name__)
    if inner is not value:
        return twin(inner)
    raise TypeError(f"it reads {name} = {value!r} from outside; write {name} = tl.constexpr(...) there")


def _tensors(*values: Value | Number) -> list[Tensor]:
    """All in one dtype. Other than PyTorch, Triton lets scalars that are not Python numbers count like blocks."""
    for x in values:
        if not isinstance(x, Value | Number):
            raise TypeError(f"it computes with {x!r}")
    tensors = [x.tensor for x in values if isinstance(x, Value)]
    device = tensors[0].device if tensors else None
    numbers = [x for x in values if not isinstance(x, Value)]
    if not tensors or all(x.dtype == torch.bool for x in tensors):
        tensors += [torch.tensor(x, dtype=torch.int32 if type(x) is int else None) for x in numbers]
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    if not dtype.is_floating_point and any(isinstance(x, float) for x in numbers):
        dtype = torch.float32
    return [x.tensor.to(dtype) if isinstance(x, Value) else torch.tensor(x, dtype=dtype, device=device) for x in values]


def _arithmetic(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def checked(x: Tensor, y: Tensor) -> Tensor:
        if x.dtype == torch.bool:
            raise TypeError("it computes with two bools: cast one, x.to(tl.int32)")
        return compute(x, y)

    return checked


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else x.to(torch.float32) / y.to(torch.float32)


def _quotient(x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        raise TypeError("it uses // on floats, which Triton does not have")
    return torch.div(x, y, rounding_mode="trunc")


def _operator(compute: Callable[[Tensor, Tensor], Tensor], reflected: bool = False) -> Callable[[Any, Any], Any]:
    def method(self: Value, other: Any) -> Value:
        return Value(compute(*_tensors(*((other, self) if reflected else (self, other)))))

    return method


def _operators(compute: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable[[Any, Any], Any], ...]:
    return _operator(compute), _operator(compute, reflected=True)


class Value:
    """A tensor with the operators of Triton's."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    _add, __radd__ = _operators(_arithmetic(torch.add))
    __sub__, __rsub__ = _operators(_arithmetic(torch.sub))
    __mul__, __rmul__ = _operators(_arithmetic(torch.mul))
    __truediv__, __rtruediv__ = _operators(_arithmetic(_divide))
    __floordiv__, __rfloordiv__ = _operators(_arithmetic(_quotient))
    __mod__, __rmod__ = _operators(_arithmetic(torch.fmod))
    __and__, __rand__ = _operators(torch.bitwise_and)
    __or__, __ror__ = _operators(torch.bitwise_or)
    __xor__, __rxor__ = _operators(torch.bitwise_xor)
    __lshift__, __rlshift__ = _operators(torch.bitwise_left_shift)
    __rshift__, __rrshift__ = _operators(torch.bitwise_right_shift)
    __lt__, __le__, __gt__, __ge__, __eq__, __ne__ = map(
        _operator, (torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne)
    )

    def __add__(self, other: Any) -> Any:
        return other + self if isinstance(other, Pointer) else self._add(other)

    def __neg__(self) -> Value:
        return Value(-self.tensor)

    def __invert__(self) -> Value:
        return Value(~self.tensor)

    def __bool__(self) -> bool:
        raise TypeError("it asks for the truth of a tensor, by `if`, `and`, `or`, `not`, `in` or a chained comparison")

    def to(self, dtype: tl.dtype) -> Value:
        if dtype not in _DTYPES:
            raise TypeError(f"it casts to {dtype}")
        return Value(self.tensor.to(_DTYPES[dtype]))

    def __getattr__(self, name: str) -> Any:
        raise TypeError(f"it uses .{name} of a tensor")


class Pointer:
    """Elements of a captured tensor, by their indices."""

    def __init__(self, number: int, flat: Tensor, index: Value | int = 0):
        self.number, self.flat, self.index = number, flat, index

    def __add__(self, other: Any) -> Pointer:
        if isinstance(other, Pointer):
            raise TypeError(f"it adds {other!r}, not yet loaded, to {self!r}")
        return Pointer(self.number, self.flat, self.index + other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return self + -other

    def __eq__(self, other: Any) -> bool:
        raise TypeError(f"it compares {self!r}, which it has to tl.load first")

    def __repr__(self) -> str:
        return f"captured tensor {self.number}"


class Namespace:
    """A module of which only some names are known."""

    def __init__(self, name: str, known: dict[str, Any]):
        self.__name__ = name
        self.__dict__ |= known

    def __getattr__(self, name: str) -> Any:
        raise TypeError(f"it uses {self.__name__}.{name}")


def _load(
    pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "", eviction_policy: str = "",
    volatile: bool = False,
) -> Value:  # fmt: skip
    """`tl.load`; where the mask is false it reads nothing and gives `other`, or zero."""
    if not isinstance(pointer, Pointer):
        raise TypeError("it loads from something else than a captured tensor plus an index")
    flat = pointer.flat
    wanted, index = (
        x.tensor if isinstance(x, Value) else torch.tensor(x, device=flat.device)
        for x in (True if mask is None else mask, pointer.index)
    )
    if index.is_floating_point():
        raise TypeError(f"it loads from captured tensor {pointer.number} at an index that is no integer")
    beyond = wanted & ((index < 0) | (index >= len(flat)))
    if beyond.any():
        where = index.expand(beyond.shape)[beyond][0].item()
        raise TypeError(
            f"it loads element {where} of captured tensor {pointer.number}, which has {len(flat)}; give tl.load a mask"
        )
    found = flat[index.long().where(wanted, 0)] if len(flat) else flat.new_zeros(index.shape)
    if mask is not None:
        instead = other if isinstance(other, Value) else Value(torch.tensor(other or 0, device=flat.device))
        found = torch.where(wanted, found, instead.tensor.to(flat.dtype))
    return Value(found)


def _where(condition: Value | bool, x: Value | Number, y: Value | Number) -> Value:
    (chosen,) = _tensors(condition)
    one, other = _tensors(x, y)
    return Value(torch.where(chosen != 0, one, other))


def _minimum(x: Value | Number, y: Value | Number) -> Value:
    return Value(torch.minimum(*_tensors(x, y)))


def _maximum(x: Value | Number, y: Value | Number) -> Value:
    return Value(torch.maximum(*_tensors(x, y)))


def _abs(x: Value | Number) -> Value:
    return Value(torch.abs(*_tensors(x)))


def _of_floats(name: str) -> Callable[[Value | Number], Value]:
    def function(x: Value | Number) -> Value:
        (tensor,) = _tensors(x)
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"it takes tl.{name} of {tensor.dtype}: cast it first, x.to(tl.float32)")
        return Value(getattr(torch, name)(tensor))

    return function


_FLOATS = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "floor", "ceil")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "load": _load,
    "where": _where,
    "minimum": _minimum,
    "maximum": _maximum,
    "abs": _abs,
    "cdiv": lambda x, y: (x + y - 1) // y,
    "static_range": range,
    **{name: _of_floats(name) for name in _FLOATS},
}
_DTYPE_NAMES = {name: getattr(tl, name) for name in (*_NAMES, "int1")}
_LANGUAGE = Namespace("tl", {**_FUNCTIONS, **_DTYPE_NAMES, "math": Namespace("tl.math", _FUNCTIONS)})
