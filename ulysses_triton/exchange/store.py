"""What ranks leave for each other in the process group's store: addresses, verdicts, last words."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from ..errors import ExchangeError
from .within import within

_STORE_SECONDS = 0.3  # in which a store answers


def meeting_point(group: dist.ProcessGroup) -> dist.Store:
    """An empty store for the ranks of `group`, another one each time (every rank of `group` makes it).

    It follows from the group's name and from how often this was called for it, and not from the other groups a rank
    happens to be in: a group made again never meets what the one before it has left.
    """
    store = dist.PrefixStore(f"ulysses_triton/{group.group_name}", dist.distributed_c10d._get_default_store())
    generation = store.add(f"made by {group.rank()}", 1)  # the same on every rank, as making one is collective
    return dist.PrefixStore(str(generation), store)


def share(store: dist.Store, what: str, group: dist.ProcessGroup, text: str, timeout: timedelta) -> list[str]:
    """Every rank's `text` on `what`, in rank order. Raises ExchangeError at the deadline."""
    keys = [f"{what} of {rank}" for rank in range(group.size())]
    store.set(keys[group.rank()], text)
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise ExchangeError(
            f"making a group over {group.group_name!r}: no sign of ranks {absent} within "
            f"{timeout.total_seconds():g} s; every rank of the process group must make it"
        ) from error
    return [store.get(key).decode() for key in keys]


class LastWords:
    """The half of a `Control` that works when all connections are broken.

    A store whose host is gone, or stopped and so silent, is not asked again.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._silent = False
        self._told = False

    def tell(self, text: str) -> None:
        self._told = True
        self._ask(lambda: self._store.set(f"word of {self.rank}", text))

    def hear(self, seconds: float) -> dict[int, str]:
        words: dict[int, str] = {}
        deadline = time.monotonic() + seconds

        def listen() -> None:
            while True:
                for rank in set(range(self.size)) - set(words):
                    if self._store.check([f"word of {rank}"]):
                        words[rank] = self._store.get(f"word of {rank}").decode()
                if len(words) == self.size or time.monotonic() >= deadline:
                    break
                time.sleep(0.02)

        self._ask(listen, seconds)
        return dict(words)

    def closed(self) -> set[int]:
        found: set[int] = set()
        self._ask(lambda: found.update(r for r in range(self.size) if self._store.check([f"closed by {r}"])))
        return set(found)

    def gone(self) -> set[int]:
        return set()

    def _say_closed(self) -> None:
        if not self._told:
            self._ask(lambda: self._store.set(f"closed by {self.rank}", ""))

    def _ask(self, question: Callable[[], None], seconds: float = 0.0) -> None:
        if self._silent:
            return
        try:
            within(seconds + _STORE_SECONDS, question, "the store did not answer")
        except RuntimeError:
            self._silent = True
