"""What an exchange with a stream of its own asks of a CUDA device: order between streams, and nothing of the host.

The host never waits here and asks nothing about events, so all of it can be captured into a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.poison import poison


class CudaStream:
    """A stream of high priority on one device, beside the stream that the caller is on.

    `status` is [poison, number of the latest hop whose stream came so far], as `kernels.poison` has it; the host may
    read and write it at any time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.status: Tensor = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        self._stream = torch.cuda.Stream(device, priority=-1)
        self.handle: int = self._stream.cuda_stream

    def bind(self) -> None:
        """Make the device this thread's own, with its context: what NCCL asks of the thread that connects."""
        torch.cuda.set_device(self.device)
        torch.cuda.synchronize(self.device)

    def capturing(self) -> bool:
        """Whether the caller's stream is being captured into a graph."""
        return torch.cuda.is_current_stream_capturing()

    def follow(self) -> None:
        """What comes next on this stream waits for all that the caller's stream has been given."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, into: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)

    def poison(self, rows: Tensor, number: int) -> None:
        """`kernels.poison` over `rows`."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            poison(self.status, rows, number)

    def mark(self) -> Any:
        """An event behind all that this stream has been given."""
        return self._stream.record_event()

    def join(self, event: Any) -> None:
        """What comes next on the caller's stream waits for `event`."""
        torch.cuda.current_stream(self.device).wait_event(event)
