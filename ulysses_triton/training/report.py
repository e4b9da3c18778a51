"""What rank 0 tells of a run: the progress display, the run directory and the closing summary."""

from __future__ import annotations

import dataclasses
import statistics
from types import TracebackType

from . import data, plot
from .config import TrainConfig
from .progress import open_progress, require_display
from .run_directory import RunDirectory, StepMetrics, require_same_text, require_unused

LAST_STEPS = 20  # the training loss at the end is a mean over so many: one sequence is easier than another


class Report:
    """Shows progress and keeps the run directory, made at the first step: a run that fails before leaves none.

    `resumed_after` is the step that a run goes on from in the directory it has, None for a new run.
    """

    def __init__(
        self, config: TrainConfig, text: data.Text, split: data.Split, *, resumed_after: int | None = None
    ) -> None:
        require_ready(config, text, resumed=resumed_after is not None)
        self._split = split
        self._history: list[StepMetrics] = []
        self._directory: RunDirectory | None = None
        self._new_directory = lambda: RunDirectory.create(config, _describe(text, split))
        if resumed_after is not None:
            self._directory, self._history = RunDirectory.reopen(config, resumed_after)
        self._seconds_before = self._history[-1].seconds if self._history else 0.0
        self._print("run directory", config.out)
        if resumed_after is not None:
            self._print("resumed", f"after step {resumed_after}" if resumed_after else "at the start: no checkpoint")
        self._print(
            "text", f"{len(split.train):,} bytes to train on, {len(split.held_out):,} held out; {text.files:,} files"
        )
        stages = (f"{stage.steps:,} of {stage.batch} x {stage.length:,} bytes" for stage in config.stages)
        self._print("steps", ", then ".join(stages))
        grid = f"{config.data_parallel} data x {config.sequence_ranks} sequence"
        self._print(
            "ranks",
            f"{config.ranks} ({grid}) on {config.device}, {config.dtype}, CPU threads of each: {config.threads}",
        )
        if config.model.zero_attention:
            self._print("ablation", "attention's output is zero")
        self._progress = open_progress(config, after=resumed_after or 0)

    def step(self, metrics: StepMetrics) -> None:
        metrics = dataclasses.replace(metrics, seconds=metrics.seconds + self._seconds_before)
        self._history.append(metrics)
        if self._directory is None:
            self._directory = self._new_directory()
        self._directory.log(metrics)
        self._progress.show(metrics)

    def sync(self) -> None:
        """Force the metrics to disk: what a checkpoint says was done is in them."""
        assert self._directory is not None, "a checkpoint comes after a step"
        self._directory.sync()

    def finish(self, held_out_loss: float) -> None:
        """Draw the plot, write `summary.json` and print the summary."""
        directory, losses = self._directory, [metrics.loss for metrics in self._history]
        assert directory is not None, "finish comes after a step"
        self.close()
        unigram, bigram = data.byte_entropies(self._split.train)
        directory.summarise(
            {
                "held_out_loss": held_out_loss,
                "byte_entropy": unigram,
                "bigram_entropy": bigram,
                "seconds": self._history[-1].seconds,
            }
        )
        plot.plot_loss(
            {"training": self._history},
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
            "for comparison",
            f"{unigram:.3f} is the entropy of a byte of the text, {bigram:.3f} given the one before (bigram entropy)",
        )
        self._print("speed", f"{speed:,.0f} tokens/s (median), {self._history[-1].seconds:.0f} s of training")
        self._print(
            "written", f"{directory.path}/: {', '.join(sorted(file.name for file in directory.path.iterdir()))}"
        )

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


def require_ready(config: TrainConfig, text: data.Text, *, resumed: bool) -> None:
    """Raise OptionError if a report on this run could not be made: better now than after hours."""
    if resumed:
        require_same_text(config.out, text.sha256)
    else:
        require_unused(config.out)
    plot.require_matplotlib()
    require_display()


def _describe(text: data.Text, split: data.Split) -> dict[str, object]:
    return {
        "files": text.files,
        "sha256": text.sha256,
        "train_bytes": len(split.train),
        "held_out_bytes": len(split.held_out),
    }
