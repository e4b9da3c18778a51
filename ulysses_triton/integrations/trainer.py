"""Hugging Face's Trainer, and TRL's that derive from it, on sequences that are sharded over ranks.

    class MyTrainer(SequenceParallelMixin, SFTTrainer):
        pass

    MyTrainer(model, args, train_dataset=..., sequence_ranks=4).train()  # under torchrun or accelerate launch

The ranks of the job are a grid, data x sequence. Batches go to the rows of the grid, every rank keeps its shard of its
row's sequences (`data`), and attention exchanges along the row (`transformers`). Everything else stays the Trainer's:
to it, and to DDP, FSDP2 or DeepSpeed under it, a shard is one more part of the data. It counts the labels that all
ranks have in all accumulation steps and weights every one alike, so the loss is the mean over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import OptionError
from ..shard import gather_sequence, shard_lens
from .data import INPUTS, SequenceShards, sequence_group, share_batches
from .memory import save_memory
from .models import models_in
from .transformers import enable


class SequenceParallelMixin:
    """Goes in front of a Trainer class. Takes its arguments, and how many ranks share a sequence.

    Args:
        sequence_ranks: how many consecutive ranks share every sequence; it divides the ranks of the job, and the other
            factor is the number of ranks with data of their own: `per_device_train_batch_size` is for those.
        tile: tokens that MLPs and, in training, the loss are computed for at once (`save_memory`); None for all. The
            loss stays that of a trainer that brings one of its own, as TRL's SFTTrainer does.
        offload: keep the checkpoints of layers in host memory; turns gradient checkpointing on.

    The data collator stays as it is; batches may be padded or packed (`SequenceShards`). Evaluation is sharded like
    training, `compute_metrics` gets the logits and labels of whole sequences, and checkpoints are the Trainer's.

    Raises OptionError for what would make the loss another one: models without the loss of causal language models, a
    loss function of the user, label smoothing, a loss that balances experts, other parallelism within a sequence.
    """

    def __init__(
        self, *args: Any, sequence_ranks: int, tile: int | None = None, offload: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        for wrong, what in _unfit(trainer):
            if wrong:
                raise OptionError(f"a Trainer with sequence_ranks={sequence_ranks} does not take {what}")
        self.sequence = sequence_group(sequence_ranks, trainer.args.device.type)
        self.shards = SequenceShards(self.sequence)
        self.saving: dict[str, Any] = {"tile": tile, "offload": offload}
        self._prepare_model(trainer.model)

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        model = super().call_model_init(*args, **kwargs)  # type: ignore[misc]
        if hasattr(self, "saving"):  # a model for training, in place of the one of __init__
            self._prepare_model(model)
        return model

    def _prepare_model(self, model: Any) -> None:
        enable(model, self.sequence)
        own_loss = any("forward" in found.__dict__ for found in models_in(model).values())
        save_memory(model, loss=not own_loss, **self.saving)

    # ---- data

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return share_batches(super()._get_dataloader(*args, **kwargs), self.sequence)  # type: ignore[misc]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        # Labels are counted in here, of shards whose labels were shifted before.
        return super().get_batch_samples(map(self.shards, epoch_iterator), num_batches, device)  # type: ignore[misc]

    def get_total_train_batch_size(self, args: Any) -> int:
        return int(super().get_total_train_batch_size(args)) // self.sequence.size  # type: ignore[misc]

    # ---- loss and evaluation

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if num_items_in_batch is None:  # TRL's evaluation; each rank's mean would weight its shard like any other
            trainer: Any = self
            num_items_in_batch = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        with _sums_of_all_ranks(self.accelerator):  # type: ignore[attr-defined]
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """As without shards: the loss of this row's sequences, and their whole logits and labels."""
        trainer: Any = self
        inputs = trainer._prepare_inputs(inputs)
        loss, logits, labels = super().prediction_step(model, self.shards(inputs), *args, **kwargs)  # type: ignore[misc]
        if loss is not None and self.sequence.size > 1:
            dist.all_reduce(loss, group=self.sequence.process_group)
            loss = loss / self.sequence.size
        tokens = next(inputs[name] for name in INPUTS if inputs.get(name) is not None).size(1)
        return loss, self._whole(logits, tokens), None if labels is None else inputs["labels"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = self._gather_rows  # the Trainer sets it back at the end of the loop
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _whole(self, logits: Any, tokens: int) -> Any:
        """Whole sequences of a model's outputs, of every tensor that has this rank's tokens."""
        if isinstance(logits, tuple | list):
            return type(logits)(self._whole(part, tokens) for part in logits)
        lens = shard_lens(tokens, self.sequence.size)
        if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.size(1) != lens[self.sequence.rank]:
            return logits
        return gather_sequence(logits, self.sequence, lens=lens)

    def _gather_rows(self, found: Any) -> Any:
        """One of every row's equal results, in the order of rows, without those of samples that fill the last batch."""
        if isinstance(found, tuple | list):
            return type(found)(self._gather_rows(part) for part in found)
        accelerator = self.accelerator  # type: ignore[attr-defined]
        gathered = accelerator.gather(found)
        rows = gathered.view(-1, self.sequence.size, *found.shape)[:, 0].flatten(0, 1)
        state = accelerator.gradient_state
        return rows[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else rows


@contextmanager
def _sums_of_all_ranks(accelerator: Any) -> Iterator[None]:
    """Keep `gather_for_metrics` from leaving out ranks for samples that the last batch of an epoch lacks.

    TRL gathers a sum of every rank by it; each is that of a shard.
    """
    accelerator.gather_for_metrics = accelerator.gather
    try:
        yield
    finally:
        del accelerator.gather_for_metrics


def _unfit(trainer: Any) -> list[tuple[Any, str]]:
    """What does not go with shards: whether it is there, and its name."""
    args, found = trainer.args, trainer.accelerator.parallelism_config
    config = trainer.model.config.get_text_config()
    return [
        (not trainer._loss_shifts_labels, f"{type(trainer.model).__name__}, whose loss is not that of a causal LM"),
        (not trainer.model_accepts_loss_kwargs, "a model that does not take num_items_in_batch"),
        (trainer.compute_loss_func is not None, "compute_loss_func"),
        (trainer.label_smoother is not None, "label_smoothing_factor"),
        (getattr(config, "output_router_logits", False), "a loss that balances experts (output_router_logits)"),
        (args.world_size > 1 and not args.average_tokens_across_devices, "average_tokens_across_devices=False"),
        (args.eval_use_gather_object, "eval_use_gather_object"),
        (trainer.get_tp_size() > 1, "tensor parallelism"),
        (found is not None and found.cp_size * found.sp_size > 1, "cp_size or sp_size of a ParallelismConfig"),
    ]
