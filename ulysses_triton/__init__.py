"""ulysses-triton: exact attention over sequences that are sharded across ranks."""

from . import masks
from .api import ulysses_attention, ulysses_qkv_attention
from .cache import UlyssesKVCache
from .errors import (
    DeviceError,
    DtypeError,
    ExchangeError,
    GroupError,
    OptionError,
    OutOfMemoryError,
    ShapeError,
    UlyssesError,
)
from .group import UlyssesGroup, run_virtual
from .reorder import from_striped, from_zigzag, to_striped, to_zigzag
from .shard import count_tokens, gather_sequence, shard_lens, shard_sequence, token_mean
from .tracing import trace

__version__ = "0.1.0"

__all__ = [
    "DeviceError",
    "DtypeError",
    "ExchangeError",
    "GroupError",
    "OptionError",
    "OutOfMemoryError",
    "ShapeError",
    "UlyssesError",
    "UlyssesGroup",
    "UlyssesKVCache",
    "count_tokens",
    "from_striped",
    "from_zigzag",
    "gather_sequence",
    "masks",
    "run_virtual",
    "shard_lens",
    "shard_sequence",
    "to_striped",
    "to_zigzag",
    "token_mean",
    "trace",
    "ulysses_attention",
    "ulysses_qkv_attention",
]
