"""The steps of one layer, as data: what is done in which order, and where.

A pure function of what the call needs; the executor acts on it and nothing else decides an order. The order of the
exchanges is the same on all ranks. Steps on the compute stream run one after the other. An exchange is under way from
its place in the order until a step that waits for it: with C chunks, rows of one travel while another is attended to.

With C = 3:

    pack 0, in 0 | pack 1, in 1, attend 0, out 0 | pack 2, in 2, attend 1, out 1 | attend 2, out 2 | unpack
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeAlias

Which: TypeAlias = tuple[str, int]  # a step, by its name and chunk


class Step(NamedTuple):
    """One step: `name` is the executor's, `stream` is where it runs, `after` are the steps that it waits for.

    A step that is made once for all chunks has the number 0.
    """

    name: str
    stream: str  # "compute" or "exchange"
    chunk: int = 0
    after: tuple[Which, ...] = ()

    @property
    def which(self) -> Which:
        return self.name, self.chunk


def _then(first: str, second: str, chunk: int = 0) -> tuple[Step, Step]:
    """A step that computes and the exchange of what it wrote."""
    return Step(first, "compute", chunk), Step(second, "exchange", chunk, ((first, chunk),))


@cache
def forward(one_sided: bool, chunks: int = 1) -> tuple[Step, ...]:
    """pack, exchange in, attend, exchange out, unpack.

    One-sided without unpack, as attend wrote the result, and with one exchange out, which tells that all is written.
    """
    steps = list(_then("pack", "exchange_in"))
    for c in range(chunks):
        if c + 1 < chunks:
            steps += _then("pack", "exchange_in", c + 1)
        steps.append(Step("attend", "compute", c, (("exchange_in", c),)))
        if not one_sided:
            steps.append(Step("exchange_out", "exchange", c, (("attend", c),)))
    if one_sided:
        return (*steps, Step("exchange_out", "exchange", 0, _all("attend", chunks)))
    return (*steps, Step("unpack", "compute", 0, _all("exchange_out", chunks)))


@cache
def backward(recompute: bool, chunks: int = 1) -> tuple[Step, ...]:
    """The mirror of forward; with `recompute` the received rows are exchanged again first."""

    def inward(c: int) -> tuple[Step, ...]:
        again = _then("pack", "exchange_in", c) if recompute else ()
        return (*again, *_then("pack_grad", "exchange_grad_in", c))

    steps = list(inward(0))
    for c in range(chunks):
        if c + 1 < chunks:
            steps += inward(c + 1)
        received = (("exchange_grad_in", c), ("exchange_in", c))[: 1 + recompute]
        steps.append(Step("attend_backward", "compute", c, received))
        steps.append(Step("exchange_grad_out", "exchange", c, (("attend_backward", c),)))
    return (*steps, Step("unpack_grad", "compute", 0, _all("exchange_grad_out", chunks)))


def _all(name: str, chunks: int) -> tuple[Which, ...]:
    return tuple((name, c) for c in range(chunks))


# The halves of a layer whose attention is the user's own callable, and their backwards.
IN = _then("pack", "exchange_in")
OUT_BACKWARD = _then("pack_grad", "exchange_grad_in")
IN_BACKWARD = (Step("exchange_grad_out", "exchange"), Step("unpack_grad", "compute", 0, (("exchange_grad_out", 0),)))


def out(one_sided: bool) -> tuple[Step, ...]:
    """The outbound half; where ranks write into each other's memory nothing is unpacked."""
    exchange, unpack = Step("exchange_out", "exchange"), Step("unpack", "compute", 0, (("exchange_out", 0),))
    return (exchange,) if one_sided else (exchange, unpack)
