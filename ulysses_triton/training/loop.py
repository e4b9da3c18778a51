"""One rank's part of a training run.

Parameters are sharded over all ranks, every sequence over the ranks of one row of the grid (`sharded`). The data of a
step depends on the step alone, so a run that goes on from a checkpoint sees what it would have seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from .. import shard_lens, shard_sequence, token_mean
from ..errors import GroupError, OptionError, UlyssesError
from ..shard import IGNORE_INDEX
from . import checkpoint, data, hugging_face, tokens
from .config import HuggingFaceConfig, TrainConfig, learning_rate
from .report import Report
from .run_directory import StepMetrics
from .sharded import Grid, Model, clip_gradients, sharded_model

BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0

Result = TypeVar("Result")


def run(config: TrainConfig) -> None:
    """Train as this rank of the default process group, of `config.ranks` ranks; rank 0 prints and writes.

    Raises UlyssesError if ranks differ in text or options, if the loss is no longer finite, or if not all ranks see
    the folder of the checkpoints.
    """
    _run(config, resumed=False)


def resume(config: TrainConfig) -> None:
    """As `run`, going on from the newest complete checkpoint in `config.out`; from the start if there is none."""
    _run(config, resumed=True)


def _run(config: TrainConfig, *, resumed: bool) -> None:
    torch.set_num_threads(config.threads)
    text, split = _read_once_on_each_machine(config)
    _require_equal_on_all_ranks(text.sha256, "the text is not the same on all ranks")
    _require_equal_on_all_ranks(
        repr(dataclasses.replace(config, out="", threads=1)), "the options are not the same on all ranks"
    )
    directory, found = _from_rank_0(
        lambda: (Path(config.out).absolute(), checkpoint.newest(Path(config.out).absolute()) if resumed else None)
    )
    after = found.step if found else 0
    with contextlib.ExitStack() as stack:
        report = None
        if dist.get_rank() == 0:
            report = stack.enter_context(Report(config, text, split, resumed_after=after if resumed else None))
        grid = stack.enter_context(Grid(config))
        model = sharded_model(config, grid)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=BETAS, fused=True)
        if found:
            checkpoint.load(found, model, optimizer)
        for metrics in train(model, optimizer, split.train, config, grid, after=after):
            if report:
                report.step(metrics)
            if config.is_checkpointed(metrics.step):
                if report:
                    report.sync()
                checkpoint.save(directory, metrics.step, model, optimizer, keep=config.keep)
        held_out_loss = evaluate(model, split.held_out, config, grid) if config.held_out else None
        peaks = _on_all_ranks(_peak_bytes(grid))
        if report:
            report.finish(held_out_loss, peaks)


def read(config: TrainConfig) -> tuple[tokens.Text, data.Split]:
    """The text of a run, cut in two. Raises OptionError if it cannot be read, is too short, or not the model's."""
    text = tokens.read_text(config.text, config.column, config.tokenizer)
    model = config.model
    known = hugging_face.vocabulary(model) if isinstance(model, HuggingFaceConfig) else model.vocabulary
    if known < text.vocabulary:
        raise OptionError(
            f"the model knows {known:,} tokens and the text has up to {text.vocabulary:,} "
            f"({'bytes' if config.tokenizer is None else f'of the tokenizer {config.tokenizer}'}); give it as many "
            "(--set vocab_size=...) or another tokenizer"
        )
    return text, data.split_text(text.content, config.longest, held_out=config.held_out > 0)


def train(
    model: Model,
    optimizer: torch.optim.Optimizer,
    text: torch.Tensor,
    config: TrainConfig,
    grid: Grid,
    *,
    after: int = 0,
) -> Iterator[StepMetrics]:
    """Make the updates that follow on the first `after`, on windows of `text`, yielding what each measured.

    All ranks see the same loss.
    """
    sources = [
        data.TrainingWindows(text, stage.length, config.seed * len(config.stages) + number)
        for number, stage in enumerate(config.stages)
    ]
    began = before = time.perf_counter()
    for step in range(after + 1, config.steps + 1):
        number, index = config.at(step)
        stage = config.stages[number]
        rate = learning_rate(step, config)
        for settings in optimizer.param_groups:
            settings["lr"] = rate
        optimizer.zero_grad()
        torch.manual_seed(
            (config.seed * 1_000_003 + step) * config.ranks + dist.get_rank()
        )  # of dropout, if there is any
        value = 0.0
        windows = sources[number].batch(index, stage.batch)
        for micro_batch in windows.chunk(grid.rows)[grid.row].chunk(config.accumulate):
            inputs, labels = data.inputs_and_labels(micro_batch)
            loss = shard_loss(model, inputs, labels, grid, total_tokens=stage.batch * stage.length)
            loss.backward()  # and FSDP adds the averaged gradient to this rank's part: no rank ever keeps a whole one
            value += loss.item()
        if not math.isfinite(value):
            raise UlyssesError(f"the loss is {value} at step {step}; a smaller --lr may help")
        norm = clip_gradients(model.parameters(), MAX_GRADIENT_NORM, grid)
        optimizer.step()
        now = time.perf_counter()
        yield StepMetrics(step, value, norm, rate, stage.batch * stage.length / (now - before), now - began)
        before = time.perf_counter()


@torch.no_grad()
def evaluate(model: Model, text: torch.Tensor, config: TrainConfig, grid: Grid) -> float:
    """Mean loss in nats per token over fixed windows of `text`, as long as the last stage's; sharded as in training.

    A row whose turn it is when there are no windows left works on the first one again, and counts none of it.
    """
    model.eval()
    windows = data.held_out_windows(text, config.stages[-1].length, config.held_out)
    inputs, labels = data.inputs_and_labels(windows)
    total = 0.0
    for start in range(0, len(windows), grid.rows):
        index = start + grid.row
        mine, targets = inputs[:1], torch.full_like(labels[:1], IGNORE_INDEX)
        if index < len(windows):
            mine, targets = inputs[index : index + 1], labels[index : index + 1]
        total += shard_loss(model, mine, targets, grid, total_tokens=labels.numel()).item()
    model.train()
    return total


def shard_loss(
    model: Model, inputs: torch.Tensor, labels: torch.Tensor, grid: Grid, *, total_tokens: int
) -> torch.Tensor:
    """The loss over `labels` of all rows of the grid, divided by `total_tokens`; this rank computes its shard's part.

    `inputs` and `labels` [B, S] are this row's. The value is the same on all ranks; gradients are to be averaged over
    all of them. Losses of parts that together have `total_tokens` labels add up to their mean.
    """
    length = inputs.size(1)
    lens = shard_lens(length, grid.sequence.size)
    positions = shard_sequence(torch.arange(length, device=grid.device), grid.sequence, dim=0, lens=lens)
    shard_labels = shard_sequence(labels, grid.sequence, lens=lens).to(grid.device)
    shard_inputs = shard_sequence(inputs, grid.sequence, lens=lens).to(grid.device)
    loss_sum = model(shard_inputs, shard_labels, positions, lens)
    count = (shard_labels != IGNORE_INDEX).sum()
    return token_mean(loss_sum, count, grid.everyone, total_tokens=total_tokens)


def _read_once_on_each_machine(config: TrainConfig) -> tuple[tokens.Text, data.Split]:
    """As `read`; the first rank of a machine makes the file that the others map. Its error is the error of all."""
    error: UlyssesError | None = None
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            read(config)
    except UlyssesError as found:
        error = found
    for known in _on_all_ranks(error):
        if known is not None:
            raise known
    return read(config)


def _peak_bytes(grid: Grid) -> int:
    """The most memory that this rank has had: of the GPU, allocated by PyTorch; on a CPU, resident."""
    if grid.device.type == "cuda":
        return torch.cuda.max_memory_allocated(grid.device)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _on_all_ranks(value: Result) -> list[Result]:
    values: list[Result | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return cast(list[Result], values)


def _from_rank_0(make: Callable[[], Result]) -> Result:
    """What `make()` gives on rank 0; machines may differ in working directories and clocks."""
    values: list[Result | None] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return cast(Result, values[0])


def _require_equal_on_all_ranks(value: str, otherwise: str) -> None:
    values = _on_all_ranks(value)
    different = [rank for rank, other in enumerate(values) if other != values[0]]
    if different:
        raise GroupError(f"{otherwise}: rank 0 has others than ranks {different}")
