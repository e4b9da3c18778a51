"""One rank's part of a training run.

Parameters are replicated: every rank holds all of them, works on its shard of each sequence, and the gradients are
averaged in one all-reduce per step. Clipping and the update then see the same numbers on every rank, so the replicas
stay equal.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from .. import UlyssesGroup, shard_lens, shard_sequence, token_mean
from ..errors import GroupError, UlyssesError
from . import data
from .config import TrainConfig, learning_rate
from .model import LanguageModel
from .report import Report
from .run_directory import StepMetrics

BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
HELD_OUT_WINDOWS = 8


def run(config: TrainConfig) -> None:
    """Train as this rank of the default process group, of `config.ranks` ranks; rank 0 prints and writes.

    Raises UlyssesError if the text differs between ranks, the loss is no longer finite or the replicas drifted apart.
    """
    torch.set_num_threads(config.threads)
    text = data.read_text(config.text)
    _require_equal_on_all_ranks(text.sha256, "the text is not the same on all ranks")
    split = data.split_text(text.content, config.sequence_length)
    with contextlib.ExitStack() as stack:
        report = stack.enter_context(Report(config, text, split)) if dist.get_rank() == 0 else None
        with UlyssesGroup() as group:
            model = _replicated_model(config, _device(config))
            for metrics in train(model, split.train, config, group):
                if report:
                    report.step(metrics)
            held_out_loss = evaluate(model, split.held_out, config, group)
            _require_equal_on_all_ranks(_digest(model), "the ranks' parameters are no longer equal")
        if report:
            report.finish(held_out_loss)


def train(model: LanguageModel, text: torch.Tensor, config: TrainConfig, group: UlyssesGroup) -> Iterator[StepMetrics]:
    """Make `config.steps` updates on windows of `text`, yielding what each measured; all ranks see the same loss."""
    windows = data.TrainingWindows(text, config.sequence_length, config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=BETAS, fused=True)
    gradients = FlatGradients(model)
    began = before = time.perf_counter()
    for step in range(1, config.steps + 1):
        rate = learning_rate(step, config)
        for settings in optimizer.param_groups:
            settings["lr"] = rate
        gradients.zero()
        loss = batch_loss(model, windows.batch(step - 1, config.batch), config, group)
        loss.backward()
        gradients.average()
        gradients.clip(MAX_GRADIENT_NORM)
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise UlyssesError(f"the loss is {value} at step {step}; a smaller --lr may help")
        now = time.perf_counter()
        tokens = config.batch * config.sequence_length
        yield StepMetrics(step, value, rate, tokens / (now - before), now - began)
        before = time.perf_counter()


@torch.no_grad()
def evaluate(model: LanguageModel, text: torch.Tensor, config: TrainConfig, group: UlyssesGroup) -> float:
    """Mean loss in nats per byte over a few fixed windows of `text`, sharded as in training."""
    windows = data.held_out_windows(text, config.sequence_length, HELD_OUT_WINDOWS)
    losses = [batch_loss(model, batch, config, group).item() * len(batch) for batch in windows.split(config.batch)]
    return sum(losses) / len(windows)


def batch_loss(model: LanguageModel, windows: torch.Tensor, config: TrainConfig, group: UlyssesGroup) -> torch.Tensor:
    """The loss over all labels of `windows` [B, S + 1], of which this rank computes its shard.

    The value is the mean over all ranks' labels; the gradients are to be averaged over the ranks.
    """
    device = model.head.weight.device
    lens = shard_lens(config.sequence_length, config.ranks)
    inputs, labels = data.inputs_and_labels(windows.to(device))
    positions = shard_sequence(torch.arange(config.sequence_length, device=device), group, dim=0, lens=lens)
    shard_labels = shard_sequence(labels, group, lens=lens)
    logits = model(shard_sequence(inputs, group, lens=lens), positions, group, lens)
    loss_sum = functional.cross_entropy(logits.float().flatten(0, 1), shard_labels.flatten(), reduction="sum")
    return token_mean(loss_sum, shard_labels.numel(), group, total_tokens=labels.numel())


class FlatGradients:
    """All gradients of a model as views of one buffer, which backward accumulates into and one all-reduce averages."""

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        self._buffer = parameters[0].new_zeros(sum(parameter.numel() for parameter in parameters))
        parts = self._buffer.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def zero(self) -> None:
        self._buffer.zero_()

    def average(self) -> None:
        dist.all_reduce(self._buffer)
        self._buffer /= dist.get_world_size()

    def clip(self, max_norm: float) -> None:
        """Scale all gradients so that their norm over the whole model is at most `max_norm`."""
        norm = torch.linalg.vector_norm(self._buffer)
        self._buffer *= (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _device(config: TrainConfig) -> torch.device:
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if config.device == "cuda" else torch.device("cpu")


def _replicated_model(config: TrainConfig, device: torch.device) -> LanguageModel:
    torch.manual_seed(config.seed)
    model = LanguageModel(config.model).to(device)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    return model


def _digest(model: nn.Module) -> str:
    joined = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).cpu()
    return hashlib.sha256(bytes(joined.untyped_storage())).hexdigest()


def _require_equal_on_all_ranks(value: str, otherwise: str) -> None:
    values: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    different = [rank for rank, other in enumerate(values) if other != values[0]]
    if different:
        raise GroupError(f"{otherwise}: rank 0 has other contents than ranks {different}")
