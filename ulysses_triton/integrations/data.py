"""Batches for ranks that share sequences: every rank reads the whole batch and keeps its shard of every sequence.

    input_ids     a b c d | e f g h        labels are shifted before they are cut: the label of d, the last token of
    shift_labels  b c d e | f g h -        rank 0, is e, which rank 0 does not hold
    position_ids  0 1 2 3 | 4 0 1 2        positions in the whole sequence, or in documents packed into it: efgh begins
                                           with the last token of one document

The words for batches are those of Hugging Face's models; nothing here imports their packages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ..errors import OptionError, ShapeError
from ..group import Groupish, UlyssesGroup, resolve, told_to_peers
from ..shard import IGNORE_INDEX, shard_lens, shard_sequence

INPUTS = ("input_ids", "inputs_embeds")  # the first of them that is there says how long the sequences are
# Where documents lie is in position_ids, too; these would have to be those of a shard, which other ranks cannot use.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

Loader = TypeVar("Loader")


def sequence_group(ranks: int, device: str = "cpu") -> UlyssesGroup:
    """A group of `ranks` consecutive ranks for each sequence: of all ranks of the job, as a grid data x sequence.

    Collective: every rank of the default process group calls it. `device` is the type of device that computes.
    Raises OptionError if `ranks` does not divide the ranks of the job.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if ranks < 1 or world % ranks:
        raise OptionError(f"{ranks} ranks for each sequence do not divide the {world} ranks of the job")
    if world == 1:
        return UlyssesGroup()
    grid = init_device_mesh(device, (world // ranks, ranks), mesh_dim_names=("data", "sequence"))
    return UlyssesGroup(grid["sequence"])


class SequenceShards:
    """Called with a whole batch, gives this rank's shard of it; collective over the group.

    A batch is a mapping as Hugging Face's models take it: `input_ids` `[B, S]` (or `inputs_embeds` `[B, S, E]`) and
    other tensors `[B, S, ...]`. In the result, each has this rank's part of S, as equal as parts can be, and there are

    - `shift_labels`, where the batch has `labels` without them: every token's next label, -100 for the last one;
    - `position_ids`: the batch's own, those of its documents (`cu_seq_lens_q`), or else 0 to S - 1.

    - `ulysses_lens`, every rank's tokens, where the ranks do not divide S.

    Documents are in position_ids, which begin anew with each; cu_seq_lens_q and its kin are left out. What is no tensor
    stays as it is.

    Raises ShapeError on every rank of the group if a tensor has other tokens, if there are fewer tokens than ranks, or
    if the ranks got different batches.
    """

    def __init__(self, group: Groupish = None) -> None:
        self.group = resolve(group)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        ranks = self.group.size
        with told_to_peers(self.group):
            whole = whole_batch(batch)
            tensors = {name: value for name, value in whole.items() if isinstance(value, Tensor)}
            lens = shard_lens(tensors["position_ids"].size(1), ranks)
            if lens[-1] == 0:
                raise ShapeError(f"sequences of {sum(lens)} tokens cannot be sharded over {ranks} ranks: pad them")
        if ranks > 1:
            self.group.agree("batch", "; ".join(f"{name}={brief(value)}" for name, value in sorted(tensors.items())))
        if lens[0] != lens[-1]:
            whole["ulysses_lens"] = lens
        return whole | {name: shard_sequence(value, self.group) for name, value in tensors.items()}


def whole_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch` with what its shards need: all tensors are `[B, S, ...]`, labels are shifted, tokens have positions."""
    inputs = next((batch[name] for name in INPUTS if batch.get(name) is not None), None)
    if inputs is None:
        raise OptionError(f"the batch has neither {' nor '.join(INPUTS)}, only {', '.join(batch)}")
    whole = {name: value for name, value in batch.items() if name not in PACKING}
    if whole.get("position_ids") is None:
        whole["position_ids"] = _positions(inputs, batch.get("cu_seq_lens_q"))
    if whole.get("labels") is not None and "shift_labels" not in whole:
        ended = torch.nn.functional.pad(whole["labels"], (0, 1), value=IGNORE_INDEX)
        whole["shift_labels"] = ended[:, 1:].contiguous()
    for name, value in whole.items():
        if isinstance(value, Tensor) and (
            value.dim() < 2 or value.size(1) != inputs.size(1) or value.size(0) not in (1, inputs.size(0))
        ):
            raise ShapeError(
                f"{name} has shape {list(value.shape)}; a sequence can only be sharded with tensors [batch, tokens, "
                f"...], here {list(inputs.shape[:2])}: leave {name} out, or bring it to that shape"
            )
    return whole


def share_batches(loader: Loader, group: UlyssesGroup) -> Loader:
    """Let the ranks of a sequence read the same batches from a data loader that accelerate prepared; returns it.

    accelerate gives every rank batches of its own. After this, ranks that share sequences have the same ones.
    Raises OptionError for a loader that splits its data in another way.
    """
    if group.size == 1:
        return loader
    places = (getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None))
    place: Any = next((place for place in places if hasattr(place, "process_index")), None)
    world, rank = dist.get_world_size(), dist.get_rank()
    if place is None or (place.num_processes, place.process_index) != (world, rank):
        raise OptionError(
            f"{type(loader).__name__} does not split batches over ranks in a way that can be changed; let accelerate "
            "prepare a loader of a data set with a length, or of an IterableDataset with dispatch_batches=False and "
            "fewer shards than ranks"
        )
    place.num_processes, place.process_index = world // group.size, rank // group.size
    if place.num_processes == 1 and hasattr(place, "even_batches"):
        place.even_batches = False  # there are no other rows whose number of sequences a last batch must match
    return loader


def _positions(inputs: Tensor, offsets: Tensor | None) -> Tensor:
    """`[B, S]`: every token's position in its sequence, or in its document of a batch of one."""
    batch, tokens = inputs.shape[:2]
    positions = torch.arange(tokens, device=inputs.device)
    if offsets is not None:
        if batch != 1:
            raise ShapeError(f"cu_seq_lens_q goes with a batch of 1, this one has {batch} sequences: pass position_ids")
        lengths = offsets.to(inputs.device).diff()
        positions = positions - torch.repeat_interleave(offsets[:-1].to(inputs.device), lengths, output_size=tokens)
    return positions.expand(batch, tokens)


def brief(value: Tensor) -> str:
    """The same text for equal tensors, and for others another; short enough to send."""
    plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{list(value.shape)} {value.dtype} {hashlib.blake2b(plain.numpy().data, digest_size=6).hexdigest()}"
