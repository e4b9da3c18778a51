"""What a run shows while it goes: a tqdm bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import IO, Any, Protocol

from ..errors import OptionError
from .config import TrainConfig
from .run_directory import StepMetrics

SECONDS_BETWEEN_LINES = 5.0


class Progress(Protocol):
    def show(self, metrics: StepMetrics) -> None: ...

    def close(self) -> None: ...


def open_progress(config: TrainConfig, *, after: int = 0, stream: IO[str] | None = None) -> Progress:
    """The display that fits `stream` (standard error by default), of a run that has made `after` steps."""
    stream = stream or sys.stderr
    return _Bar(config.steps, after, stream) if stream.isatty() else _Lines(config, stream)


def require_display(stream: IO[str] | None = None) -> None:
    """Raise OptionError before a run starts if its display would lack a package."""
    if (stream or sys.stderr).isatty() and importlib.util.find_spec("tqdm") is None:
        raise OptionError("the progress bar needs tqdm: pip install 'ulysses-triton[train]'")


class _Bar:
    def __init__(self, steps: int, after: int, stream: IO[str]) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(total=steps, initial=after, file=stream, unit="step", dynamic_ncols=True)

    def show(self, metrics: StepMetrics) -> None:
        self._bar.set_postfix_str(_loss_and_speed(metrics), refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


class _Lines:
    def __init__(self, config: TrainConfig, stream: IO[str]) -> None:
        self._config, self._stream = config, stream
        self._last = -SECONDS_BETWEEN_LINES

    def show(self, metrics: StepMetrics) -> None:
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES and metrics.step < self._config.steps:
            return
        self._last = now
        left = self._config.tokens_after(metrics.step) / metrics.tokens_per_second
        line = f"step {metrics.step}/{self._config.steps}  {_loss_and_speed(metrics)}  {left:.0f} s left"
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        pass


def _loss_and_speed(metrics: StepMetrics) -> str:
    return f"loss {metrics.loss:.3f}  {metrics.tokens_per_second:,.0f} tokens/s"
