"""The ranks of a run as a grid, and the model sharded over all of them.

    ranks 0 1 2 3 with `data_parallel=2`       data
                                         row 0: 0 1   share the sequences of the first half of a batch
                                         row 1: 2 3   share those of the second half
                                                ^^^ sequence

Attention exchanges along a row. Parameters, gradients and optimizer state are cut into as many parts as there are ranks
in the whole grid, and gradients are averaged over it (ZeRO stage 3, Rajbhandari et al. 2020, by PyTorch's FSDP2): to
FSDP a sequence shard is one more part of the data.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .. import UlyssesGroup
from .config import TrainConfig
from .model import Block, LanguageModel


class Grid:
    """This rank's place among data x sequence ranks: all ranks of the default process group.

    `mesh` and `everyone` are all of them in one dimension, `sequence` is the row that shares this rank's sequences.
    A context manager; making one is collective.
    """

    def __init__(self, config: TrainConfig) -> None:
        shape = (config.data_parallel, config.sequence_ranks)
        grid = init_device_mesh(config.device, shape, mesh_dim_names=("data", "sequence"))
        self.mesh: DeviceMesh = grid._flatten("ranks")
        self.everyone: dist.ProcessGroup = self.mesh.get_group()
        self.sequence = UlyssesGroup(grid["sequence"])
        self.row: int = grid.get_local_rank("data")
        self.rows = config.data_parallel
        on_gpu = config.device == "cuda"
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")

    def __enter__(self) -> Grid:
        return self

    def __exit__(self, *_: object) -> None:
        self.sequence.close()


def sharded_model(config: TrainConfig, grid: Grid) -> LanguageModel:
    """The model with the weights that `config.seed` decides, whatever the grid; each rank keeps its part of them."""
    torch.manual_seed(config.seed)
    model = LanguageModel(config.model).to(grid.device)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)  # machines may differ in the last bit of a random number
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)  # RoPE tables stay fp32
    if config.dtype == "bf16":
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in model.blocks:
        assert isinstance(block, Block)
        block.recompute = config.checkpoint_activations
        fully_shard(block, mesh=grid.mesh, mp_policy=precision)
    fully_shard(model, mesh=grid.mesh, mp_policy=precision)
    return model


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, grid: Grid) -> float:
    """Scale all gradients so that their norm over the whole model is at most `max_norm`; one collective.

    Returns the norm they had before.
    """
    parts = [parameter.grad.to_local() for parameter in parameters if isinstance(parameter.grad, DTensor)]
    squares = torch.stack([part.double().square().sum() for part in parts]).sum()
    dist.all_reduce(squares, group=grid.everyone)
    norm = squares.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for part in parts:
        part.mul_(scale.to(part.dtype))
    return norm.item()
