"""The protocols of an exchange: what the engine asks of whoever carries the rows.

A *hop* is one all-to-all: `open` says where every block has to be written, the engine's kernels write there, `start`
says that they have, and after `finish` everything meant for this rank lies in its receive buffers.

A *collective* exchange gives blocks of a send buffer and moves them. A *one-sided* one gives blocks of the peers'
receive buffers and moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..messages import Message


class Hop(Protocol):
    """One all-to-all under way. Tensors are flat."""

    @property
    def blocks(self) -> Sequence[Sequence[Tensor]]:
        """Per message, per destination rank: where that rank's block is written, `message.send[rank]` elements."""

    @property
    def peers(self) -> Sequence[Sequence[Tensor]] | None:
        """One-sided only: per message, per rank: that rank's whole receive buffer."""

    def start(self) -> None:
        """All blocks are written: let them travel, or tell the peers. It may have to wait, as `finish` does."""

    def finish(self) -> None:
        """Wait, to the deadline at most, until everything for this rank has arrived.

        Raises RuntimeError when it does not.
        """


class Exchange(Protocol):
    """A carrier of hops between the ranks of one group."""

    name: str
    one_sided: bool

    def open(self, messages: Sequence[Message], receive: Sequence[Tensor], send: Sequence[Tensor | None]) -> Hop:
        """Begin a hop that will fill `receive`, one flat tensor per message (all ranks call this in the same order).

        `send` offers send buffers, one per message, or None for one of the exchange's own; a one-sided exchange needs
        none and leaves them alone.
        """

    def close(self) -> None:
        """Give everything back. Idempotent."""


@runtime_checkable
class Watched(Protocol):
    """An exchange whose hops go on while nobody on the host waits, so that it finds out by itself when they do not."""

    where: Callable[[], str]  # what the group is doing, for messages

    def defers(self, device: str) -> bool:
        """Whether ranks that differ in rows on such a device can be told later: then hops hang, and do not crash."""

    def failure(self) -> str | None:
        """Why it cannot be used any more, if it found so."""

    def abort(self, why: str) -> None:
        """End what is under way, which peers may never complete, and refuse more. Rows not yet there become NaN."""


class Control(Protocol):
    """Small messages between the ranks of one group, apart from the data, each with a deadline."""

    rank: int
    size: int

    def gather(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order; all have the same length. Raises RuntimeError at the deadline."""

    def begin_gather(self, payload: bytes) -> Callable[[], list[bytes]]:
        """`gather` in two halves: give the payload now, wait for the others' by calling what is returned."""

    def tell(self, text: str) -> None:
        """Leave a last word that peers can read though nobody waits for it."""

    def hear(self, seconds: float) -> dict[int, str]:
        """The last words of the ranks that left one, waiting for the others' at most so long."""

    def closed(self) -> set[int]:
        """The ranks that have closed their group, as far as is known."""

    def gone(self) -> set[int]:
        """The ranks that are known to have ended without a word."""

    def close(self) -> None:
        """Give everything back. Idempotent."""
