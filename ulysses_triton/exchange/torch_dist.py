"""The exchange that any process group can carry, and control messages over gloo.

`torch.distributed.all_to_all_single`, one per message, on the group that was given. The control messages have gloo
connections of their own over the same ranks, so that they never wait behind data and carry their own deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..messages import Message
from .pool import Pool
from .store import LastWords, meeting_point

_NEWS_SECONDS = 0.25  # between two times of asking for news; less than failing ranks listen for each other's last words


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
                self._exchange.wait(work)
            else:
                work.wait()  # only orders the streams; the process group's own watchdog has the deadline


class TorchExchange:
    """Collective hops over a process group.

    `news` is asked now and then while a hop is awaited on the CPU: a text ends it. It is for groups that are parts of a
    larger one, where a rank can wait for one that waits for one that failed.
    """

    name = "torch"
    one_sided = False

    def __init__(
        self, group: dist.ProcessGroup, pool: Pool, timeout: timedelta, news: Callable[[], str | None] | None = None
    ) -> None:
        self.group = group
        self.timeout = timeout
        self._pool = pool
        self._news = news

    def open(self, messages: Sequence[Message], receive: Sequence[Tensor], send: Sequence[Tensor | None]) -> TorchHop:
        buffers = [
            self._pool.take((sum(message.send),), into.dtype, into.device) if mine is None else mine
            for message, into, mine in zip(messages, receive, send, strict=True)
        ]
        return TorchHop(self, messages, receive, buffers)

    def wait(self, work: dist.Work) -> None:
        """Until `work` is done, to the deadline at most."""
        if self._news is None:
            work.wait(self.timeout)
            return
        deadline = time.monotonic() + self.timeout.total_seconds()
        while True:
            left = deadline - time.monotonic()
            try:
                work.wait(timedelta(seconds=max(min(left, _NEWS_SECONDS), 0.001)))  # 0 is no limit
                return
            except RuntimeError:
                if work.is_completed() or left <= _NEWS_SECONDS:
                    raise
            text = self._news()
            if text is not None:
                raise RuntimeError(text)

    def close(self) -> None:
        pass


class GlooControl(LastWords):
    """Control messages of the ranks of `group` over a gloo backend of their own (every rank of `group` makes one).

    The backend is made directly, not by `new_group`: the name that `new_group` gives depends on how many groups each
    rank happens to be in, so ranks can miss each other, and a group made again can meet the old one's addresses.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta) -> None:
        store = meeting_point(group)
        super().__init__(store, group.rank(), group.size())
        self._gloo: dist.ProcessGroupGloo | None = dist.ProcessGroupGloo(store, self.rank, self.size, timeout)

    def gather(self, payload: bytes) -> list[bytes]:
        return self.begin_gather(payload)()

    def begin_gather(self, payload: bytes) -> Callable[[], list[bytes]]:
        mine = torch.frombuffer(bytearray(payload * self.size), dtype=torch.uint8)
        every = torch.empty_like(mine)
        assert self._gloo is not None, "closed"
        # In half the time of gloo's all-gather.
        work = self._gloo.alltoall_base(every, mine, [], [])  # type: ignore[attr-defined]

        def finish() -> list[bytes]:
            work.wait()
            return [part.numpy().tobytes() for part in every.chunk(self.size)]

        return finish

    def close(self) -> None:
        if self._gloo is not None:
            self._say_closed()
        self._gloo = None  # the connections close with it
