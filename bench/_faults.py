"""What can happen to one rank of three, and what the others see of it: for `bench.faults` and for the tests."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_triton import ShapeError, UlyssesError, UlyssesGroup, ulysses_attention

RANKS = 3
LOST = 1  # the rank that it happens to

ENDS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
FAULTS = {
    "killed": "is killed",
    "stopped": "is stopped (SIGSTOP)",
    "killed inside": "is killed between two steps of a call",
    "stopped inside": "is stopped between two steps of a call",
    "fails inside": "fails between two steps of a call, as by lack of memory",
    "raises in a callable": "raises in the user's attention",
    "raises between calls": "raises between two layers, inside `with UlyssesGroup`",
    "another shape": "calls with another shape",
    "one call fewer": "leaves a call out",
    "closes early": "closes its group early",
    "stays away": "makes no call any more",
}


class Seen(NamedTuple):
    """By one rank: the error ("" for none), how long it took, and the error of the call after it."""

    kind: str
    message: str
    seconds: float
    again: str


def goes_on(fault: str, when: str) -> bool:
    """Whether all ranks find it before anything moves, so that the group goes on."""
    return fault in ("another shape", "one call fewer") or (fault, when) == ("raises in a callable", "forward")


def layer(group: UlyssesGroup, tokens: int = 4, attention: Any = "reference") -> Tensor:
    q = torch.randn(1, tokens, 6, 16, requires_grad=True)
    return ulysses_attention(q, q, q, group, causal=True, attention=attention)


def happen(group: UlyssesGroup, fault: str, when: str) -> Seen:
    """Go through a fault in the `when`, "forward" or "backward", of a layer; every rank of the group does it."""
    lost = group.rank == LOST
    attention: Any = "reference"
    if fault == "raises in a callable":

        def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
            out = q + k + v
            if lost and when == "backward":
                out.register_hook(_divide)
            elif lost and armed:
                _divide()
            return out

    armed = False
    outs = {tokens: layer(group, tokens, attention) for tokens in (4, 5)}
    armed = True

    def call(tokens: int = 4, backward: bool = when == "backward") -> Any:
        return outs[tokens].sum().backward() if backward else layer(group, tokens, attention)

    started = time.monotonic()
    error: BaseException | None = None
    try:
        if not lost:
            call()
            group.check()  # over NCCL, which nobody awaits, an error is found here
        elif fault in ENDS:
            os.kill(os.getpid(), ENDS[fault])
        elif fault.endswith("inside"):
            _break(group, fault)
            call()
        elif fault == "raises between calls" or (fault == "raises in a callable" and when == "backward"):
            with group:
                call() if "callable" in fault else _divide()
        elif fault == "another shape":
            call(tokens=5)
        elif fault == "one call fewer":
            call(backward=when == "forward")
        elif fault == "closes early":
            group.close()
        elif fault == "stays away":
            time.sleep(group.timeout.total_seconds() + 2)
            group.check()
        else:
            call()
    except (UlyssesError, ArithmeticError, MemoryError) as found:
        error = found
    seconds = time.monotonic() - started
    again = ""
    armed = False
    try:
        layer(group)
    except UlyssesError as found:
        again = str(found)
    return Seen(type(error).__name__ if error else "", str(error or ""), seconds, again)


def _break(group: UlyssesGroup, fault: str) -> None:
    """What happens to this rank in its next call, once that has been agreed on."""

    def broken(*_: Any) -> None:
        if fault == "fails inside":
            raise MemoryError("no room")
        os.kill(os.getpid(), ENDS[fault.split()[0]])

    group.exchange.open = broken  # type: ignore[method-assign, assignment]


def _divide(*_: Any) -> None:
    raise ZeroDivisionError("in the user's code")


def on_process(rank: int, exchange: str, fault: str, when: str, chunks: int, seconds: float) -> tuple[Seen, bool]:
    """What this rank of a world of three saw, and whether a new group, of the survivors alone, works."""
    dist.barrier()
    ranks = dist.new_group(range(RANKS))
    options: dict[str, Any] = {"exchange": exchange, "timeout": timedelta(seconds=seconds)}
    group = UlyssesGroup(ranks, chunks=chunks, **options)
    seen = happen(group, fault, when)
    with suppress(ShapeError):
        group.close()
    # In as many groups as the others: torch names a group by their number.
    survivors = dist.new_group(
        [LOST] if rank == LOST else [r for r in range(RANKS) if r != LOST], use_local_synchronization=True
    )
    options["timeout"] = timedelta(seconds=30)
    with UlyssesGroup(survivors, **(options if rank != LOST else {})) as made:
        works = bool(torch.isfinite(layer(made)).all())
    return seen, works
