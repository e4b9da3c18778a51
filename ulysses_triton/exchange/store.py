"""What ranks leave for each other in the process group's store: addresses, verdicts, last words."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from ..errors import ExchangeError


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
    """The half of a `Control` that works when all connections are broken."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._store = store

    def tell(self, text: str) -> None:
        with suppress(RuntimeError):  # the store's host may be gone with the rank that died
            self._store.set(f"word of {self.rank}", text)

    def hear(self, seconds: float) -> dict[int, str]:
        words: dict[int, str] = {}
        deadline = time.monotonic() + seconds
        with suppress(RuntimeError):
            while True:
                for rank in set(range(self.size)) - set(words):
                    if self._store.check([f"word of {rank}"]):
                        words[rank] = self._store.get(f"word of {rank}").decode()
                if len(words) == self.size or time.monotonic() >= deadline:
                    break
                time.sleep(0.02)
        return words
