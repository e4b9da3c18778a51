"""What rank 0 tells of a run: the progress display, the run directory and the closing summary."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from types import TracebackType

from . import data, plot, tokens
from .config import HuggingFaceConfig, TrainConfig
from .progress import open_progress, require_display
from .run_directory import RunDirectory, StepMetrics, require_same_text, require_unused

LAST_STEPS = 20  # the training loss at the end is a mean over so many: one sequence is easier than another


class Report:
    """Shows progress and keeps the run directory, made at the first step: a run that fails before leaves none.

    `resumed_after` is the step that a run goes on from in the directory it has, None for a new run.
    """

    def __init__(
        self, config: TrainConfig, text: tokens.Text, split: data.Split, *, resumed_after: int | None = None
    ) -> None:
        require_ready(config, text, resumed=resumed_after is not None)
        self._split, self._unit, self._vocabulary = split, config.unit, text.vocabulary
        self._device = config.device
        self._history: list[StepMetrics] = []
        self._directory: RunDirectory | None = None
        self._new_directory = lambda: RunDirectory.create(config, _describe(text, split, config.unit))
        if resumed_after is not None:
            self._directory, self._history = RunDirectory.reopen(config, resumed_after)
        self._seconds_before = self._history[-1].seconds if self._history else 0.0
        self._print("run directory", config.out)
        if resumed_after is not None:
            self._print("resumed", f"after step {resumed_after}" if resumed_after else "at the start: no checkpoint")
        unit = config.unit
        self._print(
            "text", f"{len(split.train):,} {unit}s to train on, {len(split.held_out):,} held out; {text.files:,} files"
        )
        self._print("kept as tokens", str(text.path))
        stages = (f"{stage.steps:,} of {stage.batch} x {stage.length:,} {unit}s" for stage in config.stages)
        self._print("steps", ", then ".join(stages))
        grid = f"{config.data_parallel} data x {config.sequence_ranks} sequence"
        self._print(
            "ranks",
            f"{config.ranks} ({grid}) on {config.device}, {config.dtype}, CPU threads of each: {config.threads}",
        )
        if isinstance(config.model, HuggingFaceConfig):
            self._print("model", f"{config.model.values['model_type']}, of {config.model.source}")
        elif config.model.zero_attention:
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

    def finish(self, held_out_loss: float | None, peaks: Sequence[int]) -> None:
        """Draw the plot, write `summary.json` and print the summary; `peaks` are every rank's, in bytes."""
        directory, losses = self._directory, [metrics.loss for metrics in self._history]
        assert directory is not None, "finish comes after a step"
        self.close()
        entropies = self._entropies()
        held_out = {} if held_out_loss is None else {"held_out_loss": held_out_loss}
        directory.summarise({**held_out, **entropies, "seconds": self._history[-1].seconds, "peak_bytes": list(peaks)})
        plot.plot_loss(
            {"training": self._history},
            directory.path / "loss.png",
            references={plot.REFERENCES[name]: value for name, value in (entropies | held_out).items()},
            unit=self._unit,
        )
        first, last = losses[0], losses[-LAST_STEPS:]
        self._print("training loss", f"{first:.3f} at step 1, {statistics.fmean(last):.3f} over the last {len(last)}")
        if held_out_loss is not None:
            self._print("held-out loss", f"{held_out_loss:.3f} nats per {self._unit}")
        comparison = f"{entropies[f'{self._unit}_entropy']:.3f} is the entropy of a {self._unit} of the text"
        if "bigram_entropy" in entropies:
            comparison += f", {entropies['bigram_entropy']:.3f} given the one before (bigram entropy)"
        self._print("for comparison", comparison)
        speed = statistics.median(metrics.tokens_per_second for metrics in self._history)
        self._print("speed", f"{speed:,.0f} tokens/s (median), {self._history[-1].seconds:.0f} s of training")
        sizes = ", ".join(f"{peak / 2**20:,.0f}" for peak in peaks)
        what = "allocated on its GPU" if self._device == "cuda" else "resident"
        self._print("peak memory", f"of each rank, {what}: {sizes} MiB")
        self._print(
            "written", f"{directory.path}/: {', '.join(sorted(file.name for file in directory.path.iterdir()))}"
        )

    def _entropies(self) -> dict[str, float]:
        """What models reach that know of each token only how frequent it is, or also the one before it."""
        if self._unit == "token":
            return {"token_entropy": data.token_entropy(self._split.train, self._vocabulary)}
        return dict(zip(("byte_entropy", "bigram_entropy"), data.byte_entropies(self._split.train), strict=True))

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


def require_ready(config: TrainConfig, text: tokens.Text, *, resumed: bool) -> None:
    """Raise OptionError if a report on this run could not be made: better now than after hours."""
    if resumed:
        require_same_text(config.out, text.sha256)
    else:
        require_unused(config.out)
    plot.require_matplotlib()
    require_display()


def _describe(text: tokens.Text, split: data.Split, unit: str) -> dict[str, object]:
    return {
        "files": text.files,
        "sha256": text.sha256,
        f"train_{unit}s": len(split.train),
        f"held_out_{unit}s": len(split.held_out),
    }
