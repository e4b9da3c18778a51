"""The errors this library raises: each says what was given, what was expected and what to do.

All are `UlyssesError`; each is also the built-in error that PyTorch users would catch in its place.
"""

from __future__ import annotations


class UlyssesError(Exception):
    """Base of every error this library raises on purpose."""


class ShapeError(UlyssesError, ValueError):
    """Tensors, shard lengths or head counts that do not fit each other, on one rank or between ranks."""


class DtypeError(UlyssesError, TypeError):
    """A dtype that the op does not take, or dtypes that differ where they must agree."""


class DeviceError(UlyssesError, ValueError):
    """A tensor on a device that the group cannot carry."""


class OptionError(UlyssesError, ValueError):
    """An option with a value it cannot have, or options that exclude each other."""


class GroupError(UlyssesError, RuntimeError):
    """A group that is closed, broken, unknown or not what the call needs."""


class OutOfMemoryError(UlyssesError, MemoryError):
    """A buffer that there is no memory for."""


class ExchangeError(UlyssesError, RuntimeError):
    """A peer that died, stopped or went another way, found at the deadline or earlier."""
