"""The steps of one layer, as data: what is done in which order, and where.

A pure function of what the call needs; the executor acts on it and nothing else decides an order. The order of the
exchanges is the same on all ranks.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple


class Step(NamedTuple):
    """One step: `name` is the executor's, `stream` is where it runs, `after` are the steps that it waits for."""

    name: str
    stream: str  # "compute" or "exchange"
    after: tuple[str, ...] = ()


@cache
def forward(one_sided: bool) -> tuple[Step, ...]:
    """pack, exchange in, attend, exchange out, unpack; one-sided without unpack, as attend wrote the result."""
    steps = (
        Step("pack", "compute"),
        Step("exchange_in", "exchange", ("pack",)),
        Step("attend", "compute", ("exchange_in",)),
        Step("exchange_out", "exchange", ("attend",)),
    )
    return steps if one_sided else (*steps, Step("unpack", "compute", ("exchange_out",)))


@cache
def backward(recompute: bool) -> tuple[Step, ...]:
    """The mirror of forward; with `recompute` the received rows are exchanged again first."""
    again = (Step("pack", "compute"), Step("exchange_in", "exchange", ("pack",))) if recompute else ()
    return (
        *again,
        Step("pack_grad", "compute"),
        Step("exchange_grad_in", "exchange", ("pack_grad",)),
        Step("attend_backward", "compute", ("exchange_grad_in", "exchange_in")[: 1 + recompute]),
        Step("exchange_grad_out", "exchange", ("attend_backward",)),
        Step("unpack_grad", "compute", ("exchange_grad_out",)),
    )


# The halves of a layer whose attention is the user's own callable, and their backwards.
IN = (Step("pack", "compute"), Step("exchange_in", "exchange", ("pack",)))
OUT = (Step("exchange_out", "exchange"), Step("unpack", "compute", ("exchange_out",)))
OUT_BACKWARD = (Step("pack_grad", "compute"), Step("exchange_grad_in", "exchange", ("pack_grad",)))
IN_BACKWARD = (Step("exchange_grad_out", "exchange"), Step("unpack_grad", "compute", ("exchange_grad_out",)))
