"""The steps of one layer, as data: what is done in which order, and where.

A pure function of what the call needs; the executor acts on it and nothing else decides an order. The order of the
exchanges is the same on all ranks. Steps on the compute stream run one after the other. An exchange is under way from
its place in the order until a step that waits for it: with C chunks, rows of one travel while another is attended to.

With C = 3:

    pack 0, in 0 | pack 1, in 1, attend 0, out 0 | pack 2, in 2, attend 1, out 1 | attend 2, out 2 | unpack

Where the layer projects, a chunk is projected ahead of its pack, while rows of the one before travel, and its output is
projected (collective: unpacked and projected) once the next chunk's is under way. With C = 2:

    project 0, pack 0, in 0 | project 1, pack 1, in 1, attend 0, out 0
    | attend 1, out 1, unpack 0, project_out 0 | unpack 1, project_out 1

Where rows are exchanged again in backward, for the sake of memory, a chunk is unpacked once the next one's results are
under way, and so are its gradients: no more than a few chunks' rows are there at once, however many there are. With
C = 3:

    pack 0, in 0 | pack 1, in 1, attend 0, out 0 | pack 2, in 2, attend 1, out 1, unpack 0 | attend 2, out 2, unpack 1
    | unpack 2
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeAlias

from .spec import Problem

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


def of(problem: Problem, one_sided: bool) -> tuple[Step, ...]:
    """The steps of a problem's layer."""
    return forward(one_sided, problem.chunks, problem.projects, problem.projects_out, problem.recompute)


def of_backward(problem: Problem) -> tuple[Step, ...]:
    """The steps of its backward."""
    p = problem
    return backward(p.recompute, p.chunks, p.projects, p.projects_out, p.needs_raw)


@cache
def forward(
    one_sided: bool, chunks: int = 1, project: bool = False, project_out: bool = False, recompute: bool = False
) -> tuple[Step, ...]:  # fmt: skip
    """pack, exchange in, attend, exchange out, unpack; with `recompute` every chunk is unpacked by itself.

    One-sided without unpack, as attend wrote the result, and with one exchange out, which tells that all is written;
    where the output is projected, one for each chunk.
    """
    by_chunk = project_out or (recompute and not one_sided)

    def inward(c: int) -> tuple[Step, ...]:
        first = (Step("project", "compute", c),) if project else ()
        return (*first, *_then("pack", "exchange_in", c))

    def outward(c: int) -> tuple[Step, ...]:
        names = ["unpack"] * (not one_sided) + ["project_out"] * project_out
        return tuple(Step(name, "compute", c, (("exchange_out", c),) * (n == 0)) for n, name in enumerate(names))

    steps = list(inward(0))
    for c in range(chunks):
        if c + 1 < chunks:
            steps += inward(c + 1)
        steps.append(Step("attend", "compute", c, (("exchange_in", c),)))
        if project_out or not one_sided:
            steps.append(Step("exchange_out", "exchange", c, (("attend", c),)))
        if by_chunk and c > 0:
            steps += outward(c - 1)
    if by_chunk:
        return (*steps, *outward(chunks - 1))
    if one_sided:
        return (*steps, Step("exchange_out", "exchange", 0, _all("attend", chunks)))
    return (*steps, Step("unpack", "compute", 0, _all("exchange_out", chunks)))


@cache
def backward(
    recompute: bool, chunks: int = 1, project: bool = False, project_out: bool = False, raw: bool = False
) -> tuple[Step, ...]:  # fmt: skip
    """The mirror of forward; with `recompute` a chunk's received rows are exchanged again first.

    The gradient of the output projection's weight is made under the first exchange. What `raw` needs, q and k as they
    were projected, is made under the last one, or first where it is exchanged again.
    """
    raw = raw and project
    again = (Step("project_raw", "compute"),) if raw else ()

    def inward(c: int) -> tuple[Step, ...]:
        steps: tuple[Step, ...] = ()
        if recompute and project and not raw:
            steps += (Step("project", "compute", c),)
        if recompute:
            steps += _then("pack", "exchange_in", c)
        if project_out:
            steps += (Step("project_out_grad", "compute", c),)
        return (*steps, *_then("pack_grad", "exchange_grad_in", c))

    steps = [*(again if recompute else ()), *inward(0)]
    if project_out:
        steps.append(Step("project_out_weight_grad", "compute"))
    for c in range(chunks):
        if c + 1 < chunks:
            steps += inward(c + 1)
        received = (("exchange_grad_in", c), ("exchange_in", c))[: 1 + recompute]
        steps.append(Step("attend_backward", "compute", c, received))
        steps.append(Step("exchange_grad_out", "exchange", c, (("attend_backward", c),)))
        if recompute and c > 0:
            steps.append(Step("unpack_grad", "compute", c - 1, (("exchange_grad_out", c - 1),)))
    if recompute:
        steps.append(Step("unpack_grad", "compute", chunks - 1, (("exchange_grad_out", chunks - 1),)))
    else:
        steps += [*again, Step("unpack_grad", "compute", 0, _all("exchange_grad_out", chunks))]
    return (*steps, Step("project_grad", "compute")) if project else tuple(steps)


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
