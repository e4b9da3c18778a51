"""The one-sided protocol: ranks write straight into each other's buffers, and nothing is moved afterwards.

*Announce*: every rank says where it wants to receive, and learns where its peers do. *Arrive*: a rank tells every peer
that all it had to write there is written, also when that was nothing. A rank may read its buffers once every peer has
arrived. Arrivals are counted by epochs that only rise, so a rank that is a hop ahead confuses nobody.

What differs between carriers is the `Transport`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..messages import Message


class Transport(Protocol):
    """How buffers become visible to peers, and how arrivals are told."""

    rank: int
    size: int

    def announce(self, buffers: Sequence[Tensor]) -> Sequence[Sequence[Tensor]]:
        """Offer my buffers to be written; every rank's, as tensors this rank can write to. A deadline applies."""

    def arrive(self, epoch: int) -> None:
        """Everything this rank writes in `epoch` is written."""

    def wait(self, epoch: int) -> None:
        """Until every rank has arrived at `epoch`. Raises RuntimeError at the deadline."""

    def close(self) -> None:
        """Give everything back. Idempotent."""


class OneSidedHop:
    def __init__(self, exchange: OneSidedExchange, messages: Sequence[Message], receive: Sequence[Tensor]) -> None:
        self._exchange = exchange
        announced = exchange.transport.announce(receive)
        self.peers = [[rank[m] for rank in announced] for m in range(len(messages))]
        self.blocks = [
            [peer.view(-1)[at : at + n] for peer, at, n in zip(peers, message.land, message.send, strict=True)]
            for peers, message in zip(self.peers, messages, strict=True)
        ]

    def start(self) -> None:
        self._exchange.epoch += 1  # of the start: hops start in one order on all ranks, opened hops may overlap
        self._epoch = self._exchange.epoch
        self._exchange.transport.arrive(self._epoch)

    def finish(self) -> None:
        self._exchange.transport.wait(self._epoch)


class OneSidedExchange:
    """Hops over a transport."""

    one_sided = True

    def __init__(self, name: str, transport: Transport) -> None:
        self.name = name
        self.transport = transport
        self.epoch = 0

    def open(
        self, messages: Sequence[Message], receive: Sequence[Tensor], send: Sequence[Tensor | None]
    ) -> OneSidedHop:
        return OneSidedHop(self, messages, receive)

    def close(self) -> None:
        self.transport.close()
