"""An all-to-all in two hops, for ranks on several nodes: first inside every node, then between the nodes.

There are `nodes` nodes of `each` ranks; rank `o * each + i` is number i of node o. One all-to-all over all ranks sends
`each` messages over the network for every other node. In two hops it is one:

1. Inside a node, number i gives number j what it has for the ranks of number j: one all-to-all for every node.
2. Between the nodes, number j of one gives number j of another what all ranks of its node have for that rank.

Nothing is copied in between. Blocks for one node's ranks lie side by side, so they are sent as they lie; the first hop
receives them where the second one sends from, in the order of the ranks; so they arrive in that order, too.

Example: 2 nodes of 2. Rank 0 has blocks for ranks 0 1 | 2 3. Inside node 0 it keeps those for 0 and 2, and gives rank 1
those for 1 and 3. Then it sends rank 2 the blocks 0>2 1>2 as one message, and receives 2>0 3>0 as one.

Both hops are over collective exchanges of fewer ranks, whatever carries those. The price is that a block moves inside a
node once more, which pays for small ones only (`cost.two_hops_below`); larger ones may take one hop over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..messages import Message
from .base import Exchange, Hop


class TwoHop:
    peers = None

    def __init__(
        self,
        exchange: TwoHopExchange,
        messages: Sequence[Message],
        receive: Sequence[Tensor],
        send: Sequence[Tensor | None],
    ) -> None:
        self._exchange, self._device = exchange, receive[0].device
        nodes, each = range(exchange.nodes), exchange.each
        self._second = exchange.outer.open([exchange.between_nodes(m) for m in messages], receive, [None] * len(send))
        parts: list[Tensor | None] = []
        for message, mine in zip(messages, send, strict=True):
            sizes = [sum(message.send[o * each : (o + 1) * each]) for o in nodes]
            parts += [None] * len(nodes) if mine is None else torch.split(mine, sizes)
        self._first = exchange.inner.open(
            [exchange.inside(m, o) for m in messages for o in nodes],
            [block for blocks in self._second.blocks for block in blocks],
            parts,
        )
        self.blocks = [
            [block for o in nodes for block in self._first.blocks[m * len(nodes) + o]] for m in range(len(messages))
        ]

    def start(self) -> None:
        """The first hop, and the start of the second: on the CPU this waits for the ranks of the node."""
        exchange = self._exchange
        with exchange.beside(self._device):
            with _on(f"the hop inside node {exchange.node}, ranks {exchange.mates}"):
                self._first.start()
                self._first.finish()
            with _on(f"the hop between nodes, ranks {exchange.twins}"):
                self._second.start()

    def finish(self) -> None:
        with _on(f"the hop between nodes, ranks {self._exchange.twins}"):
            self._second.finish()


class TwoHopExchange:
    """Hops over `inner`, the ranks of this rank's node, and `outer`, the ranks of its number, one of each node."""

    name = "two_hop"
    one_sided = False

    def __init__(self, rank: int, nodes: int, each: int, inner: Exchange, outer: Exchange) -> None:
        self.nodes, self.each = nodes, each
        self.inner, self.outer = inner, outer
        self.node, self.number = divmod(rank, each)
        self.mates = list(range(self.node * each, (self.node + 1) * each))
        self.twins = list(range(self.number, nodes * each, each))
        self._direct: Exchange | None = None
        self._least = 0.0
        self._stream: torch.cuda.Stream | None = None

    def take_one_hop(self, direct: Exchange, least: float) -> None:
        """From now on over `direct`, an exchange of all ranks, where blocks have `least` bytes or more on average."""
        self._direct, self._least = direct, least

    def open(self, messages: Sequence[Message], receive: Sequence[Tensor], send: Sequence[Tensor | None]) -> Hop:
        if self._direct is not None and self._typical(messages, receive[0].dtype) >= self._least:
            return self._direct.open(messages, receive, send)
        return TwoHop(self, messages, receive, send)

    def close(self) -> None:
        for exchange in (self.inner, self.outer, self._direct):
            if exchange is not None:
                exchange.close()

    def inside(self, message: Message, node: int) -> Message:
        """Of the ranks of my node: what they have for those of `node`, each for that of its number."""
        first, target = self.node * self.each, node * self.each
        return _seen_by(self.number, self.each, lambda i, j: message.between(first + i, target + j))

    def between_nodes(self, message: Message) -> Message:
        """Of the ranks of my number: what all ranks of a node have for each of them."""

        def between(source: int, destination: int) -> int:
            first = source * self.each
            rank = destination * self.each + self.number
            return sum(message.between(first + i, rank) for i in range(self.each))

        return _seen_by(self.node, self.nodes, between)

    @contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        """On CUDA, on a stream behind the caller's: the second hop waits for the first one, the caller for neither."""
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield

    def _typical(self, messages: Sequence[Message], dtype: torch.dtype) -> float:
        """Bytes from a rank to its twin on the next node, mean over all ranks: the same number on each of them."""
        ranks = self.nodes * self.each
        elements = sum(m.between(rank, (rank + self.each) % ranks) for m in messages for rank in range(ranks))
        return elements * dtype.itemsize / ranks


def _seen_by(rank: int, ranks: int, between: Callable[[int, int], int]) -> Message:
    """The message of a rank of some; collective exchanges do not ask where blocks land."""
    return Message(
        send=tuple(between(rank, other) for other in range(ranks)),
        receive=tuple(between(other, rank) for other in range(ranks)),
        land=(),
        between=between,
    )


@contextmanager
def _on(hop: str) -> Iterator[None]:
    """Say which of the two hops it was that failed."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{hop}: {error}") from error
