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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .. import UlyssesGroup
from .config import ModelConfig, TrainConfig
from .hugging_face import CausalModel
from .model import LanguageModel

Model = LanguageModel | CausalModel


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
        self.sequence = UlyssesGroup(grid["sequence"], chunks=config.chunks)
        self.row: int = grid.get_local_rank("data")
        self.rows = config.data_parallel
        on_gpu = config.device == "cuda"
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")

    def __enter__(self) -> Grid:
        return self

    def __exit__(self, *_: object) -> None:
        self.sequence.close()


def sharded_model(config: TrainConfig, grid: Grid) -> Model:
    """The model with the weights that `config.seed` decides, whatever the grid; each rank keeps its part of them.

    Rank 0 makes it whole, in the host's memory. The others hear of it layer by layer and never hold more than one.
    """
    torch.manual_seed(config.seed)
    with torch.device("cpu" if dist.get_rank() == 0 else "meta"):
        kind = LanguageModel if isinstance(config.model, ModelConfig) else CausalModel
        model = kind(config, grid.sequence)
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)  # RoPE tables stay fp32
    if config.dtype == "bf16":
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    inside: set[nn.Module] = set()
    for layer in model.layers:
        _hear_from_rank_0(layer.modules(), grid)
        inside.update(layer.modules())
        fully_shard(layer, mesh=grid.mesh, mp_policy=precision)
    _hear_from_rank_0((module for module in model.modules() if module not in inside), grid)
    fully_shard(model, mesh=grid.mesh, mp_policy=precision)
    assert isinstance(model, FSDPModule)
    model.set_reduce_scatter_unused_params(True)  # an expert may get tokens on some ranks only
    return model


def _hear_from_rank_0(modules: Iterable[nn.Module], grid: Grid) -> None:
    """Give `modules` rank 0's parameters and buffers, on the device; what they share, they still share."""
    heard: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the old ones, whose ids must not be used again
    for module in modules:
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in heard:
                    known = dist.get_rank() == 0
                    new = old.detach().to(grid.device) if known else torch.empty_like(old, device=grid.device)
                    dist.broadcast(new, src=0)
                    heard[id(old)] = old, nn.Parameter(new, old.requires_grad) if table is module._parameters else new
                table[name] = heard[id(old)][1]  # type: ignore[assignment]


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
