"""What rank 0 tells of a run: the progress display, the run directory and the closing summary."""

from __future__ import annotations

import statistics
from types import TracebackType

from . import data, plot
from .config import TrainConfig
from .progress import open_progress, require_display
from .run_directory import RunDirectory, StepMetrics, require_unused

LAST_STEPS = 20  # the training loss at the end is a mean over so many: one sequence is easier than another


class Report:
    """Shows progress and keeps the run directory, made at the first step: a run that fails before leaves none."""

    def __init__(self, config: TrainConfig, text: data.Text, split: data.Split) -> None:
        require_ready(config)
        self._split = split
        self._history: list[StepMetrics] = []
        self._directory: RunDirectory | None = None
        self._new_directory = lambda: RunDirectory(config, _describe(config, text, split))
        self._print("run directory", config.out)
        self._print(
            "text", f"{len(split.train):,} bytes to train on, {len(split.held_out):,} held out; {text.files:,} files"
        )
        self._print("sequences", f"of {config.sequence_length:,} bytes, {config.batch} per step")
        self._print("ranks", f"{config.ranks} on {config.device}, CPU threads of each: {config.threads}")
        self._progress = open_progress(config.steps)

    def step(self, metrics: StepMetrics) -> None:
        self._history.append(metrics)
        if self._directory is None:
            self._directory = self._new_directory()
        self._directory.log(metrics)
        self._progress.show(metrics)

    def finish(self, held_out_loss: float) -> None:
        """Draw the plot and print the summary."""
        directory, losses = self._directory, [metrics.loss for metrics in self._history]
        assert directory is not None, "finish comes after a step"
        self.close()
        unigram, bigram = data.byte_entropies(self._split.train)
        plot.plot_loss(
            directory.path / "metrics.csv",
            directory.path / "loss.png",
            references={
                "entropy of a byte": unigram,
                "given the one before": bigram,
                "held out, at the end": held_out_loss,
            },
        )
        speed = statistics.median(metrics.tokens_per_second for metrics in self._history)
        first, last = losses[0], losses[-LAST_STEPS:]
        self._print("training loss", f"{first:.3f} at step 1, {statistics.fmean(last):.3f} over the last {len(last)}")
        self._print("held-out loss", f"{held_out_loss:.3f} nats per byte")
        self._print(
            "for comparison", f"{unigram:.3f} is the entropy of a byte of the text, {bigram:.3f} given the one before"
        )
        self._print("speed", f"{speed:,.0f} tokens/s (median), {self._history[-1].seconds:.0f} s of training")
        self._print("written", f"{directory.path}/: config.json, metrics.csv, loss.png")

    def _print(self, name: str, value: str) -> None:
        print(f"{name:<16}{value}", flush=True)

    def close(self) -> None:
        self._progress.close()
        if self._directory is not None:
            self._directory.close()

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def require_ready(config: TrainConfig) -> None:
    """Raise OptionError if a report on this run could not be made: better now than after hours."""
    require_unused(config.out)
    plot.require_matplotlib()
    require_display()


def _describe(config: TrainConfig, text: data.Text, split: data.Split) -> dict[str, object]:
    return {
        "paths": list(config.text) or "the standard library's source",
        "files": text.files,
        "sha256": text.sha256,
        "train_bytes": len(split.train),
        "held_out_bytes": len(split.held_out),
    }
