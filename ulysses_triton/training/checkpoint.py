"""Checkpoints of a run: written by all ranks together, loaded by any number of ranks, and whole or not there.

    checkpoints/
        .step-000200.partial/      being written, or left by a killed run; never loaded, removed at the next save
        step-000100/
            .metadata, __0_0.distcp, __1_0.distcp, ...      torch.distributed.checkpoint: each rank's shards
            complete.json                                   the step, and the size of every other file

Ranks write into the partial folder. Once all are done, rank 0 adds `complete.json`, forces everything to disk and
renames the folder, which happens as a whole. A folder that was damaged later, by a copy or a deletion cut short, shows
by its sizes and counts as not there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..errors import GroupError

FOLDER = "checkpoints"
_COMPLETE = "complete.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `path` holds the state after `step` updates."""

    step: int
    path: Path


def newest(run: Path) -> Checkpoint | None:
    """The complete checkpoint with the most steps under the run directory `run`, or None."""
    return max(_complete(run), key=lambda found: found.step, default=None)


def save(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int) -> None:
    """Write the state after `step` updates and remove all but the newest `keep` checkpoints; every rank calls it.

    When it returns, the checkpoint is complete and on disk. Raises GroupError on every rank if not all see rank 0's
    folder, as happens on several machines without a shared file system.
    """
    final = run / FOLDER / f"step-{step:06d}"
    partial = final.with_name(f".{final.name}.partial")
    if dist.get_rank() == 0:
        for stale in (run / FOLDER).glob(".step-*.partial"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    _require_seen_by_all(partial)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial)
    dist.barrier()
    if dist.get_rank() == 0:
        _complete_and_rename(partial, final, step)
        for old in sorted(_complete(run), key=lambda found: found.step)[:-keep]:
            shutil.rmtree(old.path)
    dist.barrier()


def load(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make `model` and `optimizer` what they were when `checkpoint` was written; every rank calls it.

    The number of ranks may be another one. Raises GroupError on every rank if not all see the checkpoint.
    """
    _require_seen_by_all(checkpoint.path)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=checkpoint.path)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def _complete(run: Path) -> Iterator[Checkpoint]:
    for path in (run / FOLDER).glob("step-*"):
        name = _NAME.fullmatch(path.name)
        if name and _is_complete(path):
            yield Checkpoint(int(name[1]), path)


def _is_complete(path: Path) -> bool:
    try:
        sizes = json.loads((path / _COMPLETE).read_text())["bytes"]
        return bool(sizes) and all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _complete_and_rename(partial: Path, final: Path, step: int) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    with (partial / _COMPLETE).open("w") as stream:
        json.dump({"step": step, "bytes": sizes}, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    _sync_folder(partial)
    if final.exists():
        shutil.rmtree(final)  # damaged, or this run would have gone on from it
    partial.rename(final)
    _sync_folder(final.parent)


def _sync_folder(path: Path) -> None:
    """Force the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_seen_by_all(path: Path) -> None:
    dist.barrier()  # rank 0 may have been making it
    seen: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, path.is_dir())
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if not blind:
        return
    raise GroupError(
        f"ranks {blind} do not see {path}: checkpoints need a run directory on a file system that all machines share "
        "(--out), or --checkpoint-every 0"
    )
