"""The exchange that any process group can carry, and control messages over gloo.

`torch.distributed.all_to_all_single`, one per message, on the group that was given. The control messages have gloo
connections of their own over the same ranks, so that they never wait behind data and carry their own deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..placement import Message
from .pool import Pool


class TorchHop:
    peers = None

    def __init__(
        self, exchange: TorchExchange, messages: Sequence[Message], receive: Sequence[Tensor], send: Sequence[Tensor]
    ) -> None:
        self._exchange = exchange
        self._messages = messages
        self._receive = receive
        self._send = send
        self._works: list[dist.Work] = []
        self.blocks = [torch.split(buffer, list(m.send)) for buffer, m in zip(send, messages, strict=True)]

    def start(self) -> None:
        for message, receive, send in zip(self._messages, self._receive, self._send, strict=True):
            work = dist.all_to_all_single(
                receive,
                send,
                list(message.receive),
                list(message.send),
                group=self._exchange.group,
                async_op=True,
            )
            self._works.append(work)

    def finish(self) -> None:
        for work, receive in zip(self._works, self._receive, strict=True):
            if receive.device.type == "cpu":
                work.wait(self._exchange.timeout)
            else:
                work.wait()  # only orders the streams; the process group's own watchdog has the deadline


class TorchExchange:
    """Collective hops over a process group."""

    name = "torch"
    one_sided = False

    def __init__(self, group: dist.ProcessGroup, pool: Pool, timeout: timedelta) -> None:
        self.group = group
        self.timeout = timeout
        self._pool = pool

    def open(self, messages: Sequence[Message], receive: Sequence[Tensor], send: Sequence[Tensor | None]) -> TorchHop:
        buffers = [
            self._pool.take((sum(message.send),), into.dtype, into.device) if mine is None else mine
            for message, into, mine in zip(messages, receive, send, strict=True)
        ]
        return TorchHop(self, messages, receive, buffers)

    def close(self) -> None:
        pass


class GlooControl:
    """Control messages of the ranks of `group` over a gloo backend of their own (every rank of `group` makes one).

    The backend is made directly, not by `new_group`: the name that `new_group` gives depends on how many groups each
    rank happens to be in, so ranks can miss each other, and a group made again can meet the old one's addresses.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta) -> None:
        self.rank = group.rank()
        self.size = group.size()
        store = dist.PrefixStore(f"ulysses_triton/{group.group_name}", dist.distributed_c10d._get_default_store())
        generation = store.add(f"made by {self.rank}", 1)  # the same on every rank, as making one is collective
        self._store = dist.PrefixStore(str(generation), store)
        self._gloo: dist.ProcessGroupGloo | None = dist.ProcessGroupGloo(self._store, self.rank, self.size, timeout)

    def gather(self, payload: bytes) -> list[bytes]:
        return self.begin_gather(payload)()

    def begin_gather(self, payload: bytes) -> Callable[[], list[bytes]]:
        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        assert self._gloo is not None, "closed"
        work = self._gloo.allgather([every], [mine])  # type: ignore[attr-defined]

        def finish() -> list[bytes]:
            work.wait()
            return [part.numpy().tobytes() for part in every]

        return finish

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

    def close(self) -> None:
        self._gloo = None  # the connections close with it
