"""Ranks as threads of one process: for property tests, and for timing a whole layer on one GPU.

A `VirtualWorld` is what the ranks share; `member` is one rank's transport and control in one. With one rank it is how
a process without peers runs the same code.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class VirtualWorld:
    """`size` ranks in one process. `timeout`: seconds until a rank that waits gives up."""

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        self.size = size
        self.timeout = timeout
        self._changed = threading.Condition()
        self._rounds: dict[int, dict[int, Any]] = {}
        self._arrived = [0] * size
        self._words: dict[int, str] = {}
        self.closed: set[int] = set()

    def member(self, rank: int) -> VirtualMember:
        return VirtualMember(self, rank)

    def give(self, rank: int, number: int, item: Any) -> dict[int, Any]:
        """A rank's item for round `number` of a gathering in which every rank gives one; the round so far."""
        with self._changed:
            items = self._rounds.setdefault(number, {})
            items[rank] = item
            self._changed.notify_all()
            return items

    def take(self, number: int, items: dict[int, Any]) -> list[Any]:
        """All items of round `number`, once they are there."""
        with self._changed:
            self._wait(lambda: len(items) == self.size, lambda: set(range(self.size)) - set(items))
            self._rounds.pop(number, None)
            return [items[r] for r in range(self.size)]

    def arrive(self, rank: int, epoch: int) -> None:
        with self._changed:
            self._arrived[rank] = epoch
            self._changed.notify_all()

    def wait(self, epoch: int) -> None:
        with self._changed:
            self._wait(
                lambda: min(self._arrived) >= epoch,
                lambda: {r for r, arrived in enumerate(self._arrived) if arrived < epoch},
            )

    def tell(self, rank: int, text: str) -> None:
        with self._changed:
            self._words[rank] = text
            self._changed.notify_all()

    def hear(self, seconds: float) -> dict[int, str]:
        with self._changed:
            self._changed.wait_for(lambda: len(self._words.keys() | self.closed) == self.size, seconds)
            return dict(self._words)

    def leave(self, rank: int) -> None:
        """A rank has closed its group: nobody waits for it any more."""
        with self._changed:
            self.closed.add(rank)
            self._changed.notify_all()

    def _wait(self, done: Callable[[], bool], missing: Callable[[], set[int]]) -> None:
        """Until `done`; RuntimeError at the deadline, or soon after a missing rank failed or closed its group."""
        deadline = time.monotonic() + self.timeout
        while not done():
            left = deadline - time.monotonic()
            failed, closed = sorted(missing() & self._words.keys()), sorted(missing() & self.closed)
            if failed or closed or left <= 0:
                reason = f"no sign of them within {self.timeout:g} s"
                if failed or closed:
                    reason = f"rank {failed[0]} failed" if failed else f"rank {closed[0]} has closed the group"
                raise RuntimeError(f"waiting for ranks {sorted(missing())}: {reason}")
            self._changed.wait(left)


class VirtualMember:
    """One rank of a world: the transport and the control of its group."""

    def __init__(self, world: VirtualWorld, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.size = world.size
        self._round = 0

    def gather(self, payload: Any) -> list[Any]:
        return self.begin_gather(payload)()

    def begin_gather(self, payload: Any) -> Callable[[], list[Any]]:
        self._round += 1
        number, items = self._round, self.world.give(self.rank, self._round, payload)
        return lambda: self.world.take(number, items)

    def announce(self, buffers: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        return self.gather(list(buffers))

    def arrive(self, epoch: int) -> None:
        self.world.arrive(self.rank, epoch)

    def wait(self, epoch: int) -> None:
        self.world.wait(epoch)

    def tell(self, text: str) -> None:
        self.world.tell(self.rank, text)

    def hear(self, seconds: float) -> dict[int, str]:
        return self.world.hear(seconds)

    def closed(self) -> set[int]:
        return set(self.world.closed)

    def gone(self) -> set[int]:
        return set()

    def close(self) -> None:
        self.world.leave(self.rank)
