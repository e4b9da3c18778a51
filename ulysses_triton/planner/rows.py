"""What a rank's rows hold in one layer: bytes of each exchange, and how often kv heads travel.

The closed form of what `placement` lays out head by head, for ranks with shards of equal length; tests hold the two
together. Example: 32 query and 8 kv heads of 128 on 16 ranks: each kv head goes to two ranks, so a token's row has
32 + 2 x 16 heads on the way in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .models import Model
from .setup import Setup


@dataclass(frozen=True)
class Rows:
    """Bytes of all rows that a rank sends, of its own tokens to all ranks and itself; it receives as many."""

    qkv: float
    out: float
    grad_out: float
    grad_qkv: float

    @classmethod
    def of(cls, model: Model, setup: Setup) -> Rows:
        copies = kv_copies(model, setup.sequence_ranks)
        token = setup.tokens * setup.item
        stat = max(1, 4 // setup.item)  # elements that a number in fp32 takes
        shared = stat if copies > model.kv_heads else 1  # dk and dv of a head that ranks share are summed in fp32
        kv = 2 * copies * model.head_dim
        return cls(
            qkv=token * (model.q_width + kv),
            out=token * model.q_width,
            grad_out=token * (model.q_width + model.heads * stat),
            grad_qkv=token * (model.q_width + kv * shared),
        )


def kv_copies(model: Model, ranks: int) -> int:
    """How many kv heads all ranks together hold, where query heads are cut evenly, in order.

    Ranks' borders and kv heads' borders divide the query heads into this many parts.
    """
    return ranks + model.kv_heads - math.gcd(ranks, model.kv_heads)


def travelling(bytes_: float, ranks: int) -> float:
    """Those of a rank's rows that go to others."""
    return bytes_ * (ranks - 1) / ranks
