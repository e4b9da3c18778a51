"""Training on any grid of ranks is the training of one rank: losses, gradients, and what each rank holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_command import TEXT, losses

from ulysses_triton.errors import OptionError
from ulysses_triton.training import launch, loop, run_directory
from ulysses_triton.training.config import ModelConfig, Stage, TrainConfig
from ulysses_triton.training.model import LanguageModel
from ulysses_triton.training.sharded import Grid

STEPS = 20
BASE = TrainConfig(
    out="",
    ranks=1,
    text=(TEXT,),
    stages=(Stage(STEPS, 256, 4),),
    checkpoint_every=0,
    model=ModelConfig(width=64, head_dim=16, hidden=192),
)
VARIANTS: dict[str, dict[str, Any]] = {  # those of one number of ranks share their processes
    "1": {},
    "2": {"ranks": 2},
    "2_data": {"ranks": 2, "data_parallel": 2},
    "2_accumulated": {"ranks": 2, "accumulate": 2},
    "2_recomputed": {"ranks": 2, "checkpoint_activations": True},
    "2_bf16": {"ranks": 2, "dtype": "bf16"},
    "4": {"ranks": 4},
    "2x2": {"ranks": 4, "data_parallel": 2},
}
EXACT = [name for name in VARIANTS if name not in ("1", "2_bf16")]


def variant(name: str, folder: Path) -> TrainConfig:
    return dataclasses.replace(BASE, out=str(folder / name), **VARIANTS[name])


def train_all_variants(config: TrainConfig) -> None:
    """Every variant of `config.ranks` ranks, one after another, under `config.out`; a task for ranks."""
    plain_clip, plain_model = loop.clip_gradients, loop.sharded_model
    for name, options in VARIANTS.items():
        if options.get("ranks", 1) == config.ranks:
            watch = Watch(Path(config.out, f"{name}.{dist.get_rank()}.pt"), plain_clip, plain_model)
            loop.clip_gradients, loop.sharded_model = watch.clip, watch.model
            loop.run(variant(name, Path(config.out)))


class Watch:
    """Writes what a rank holds of the model, and the whole gradients of the first and the last step, to a file."""

    def __init__(self, file: Path, clip: Callable[..., float], model: Callable[..., LanguageModel]) -> None:
        self.file, self._clip, self._model = file, clip, model
        self._steps, self._record = 0, {}

    def model(self, config: TrainConfig, grid: Grid) -> LanguageModel:
        model = self._model(config, grid)
        parameters = list(model.parameters())
        self._record["fsdp_modules"] = sum(isinstance(module, FSDPModule) for module in model.modules())
        self._record["dtensors"] = all(isinstance(parameter, DTensor) for parameter in parameters)
        self._record["dtypes"] = {parameter.dtype for parameter in parameters}
        self._record["whole"] = sum(parameter.numel() for parameter in parameters)
        self._record["local"] = sum(parameter.to_local().numel() for parameter in parameters)
        return model

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float, grid: Grid) -> float:
        parameters = list(parameters)
        self._steps += 1
        if self._steps in (1, STEPS):
            self._record[self._steps] = [parameter.grad.full_tensor().clone() for parameter in parameters]
        if self._steps == STEPS:
            torch.save(self._record, self.file)
        return self._clip(parameters, max_norm, grid)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # ranks inherit the environment
        for ranks in (1, 2, 4):
            config = dataclasses.replace(BASE, ranks=ranks, out=str(folder))
            launch.run_on_own_ranks(train_all_variants, config)
    return folder


def record(folder: Path, name: str, rank: int = 0) -> dict[Any, Any]:
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=False)


@pytest.mark.parametrize("name", EXACT)
def test_losses_are_those_of_one_rank(trained: Path, name: str) -> None:
    one, other = losses(trained / "1"), losses(trained / name)
    assert len(one) == STEPS
    assert one[-1] < one[0] - 1
    assert (one - other).abs().max() <= 1e-5


@pytest.mark.parametrize(("step", "bound"), [(1, 1e-6), (STEPS, 2e-5)])
@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_those_of_one_rank(trained: Path, name: str, step: int, bound: float) -> None:
    one, other = record(trained, "1")[step], record(trained, name)[step]
    assert all(gradient.norm() > 0 for gradient in one)
    difference = torch.stack([(mine - its).norm() for mine, its in zip(one, other, strict=True)])
    assert difference.norm() <= bound * torch.stack([gradient.norm() for gradient in one]).norm()


@pytest.mark.parametrize("name", EXACT)
def test_the_norm_in_the_metrics_is_that_of_the_whole_gradient(trained: Path, name: str) -> None:
    metrics = run_directory.read_metrics(trained / name)
    for step in (1, STEPS):
        norm = torch.stack([gradient.double().norm() for gradient in record(trained, name)[step]]).norm()
        assert metrics[step - 1].gradient_norm == pytest.approx(norm.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["2", "4", "2x2"])
def test_every_rank_holds_only_its_part_of_the_parameters(trained: Path, name: str) -> None:
    ranks = VARIANTS[name]["ranks"]
    records = [record(trained, name, rank) for rank in range(ranks)]
    for its in records:
        assert its["fsdp_modules"] == BASE.model.layers + 1
        assert its["dtensors"]
        assert its["local"] == its["whole"] / ranks
    assert sum(its["local"] for its in records) == records[0]["whole"]


def test_bf16_computes_in_bf16_and_learns_as_fp32_does(trained: Path) -> None:
    assert record(trained, "2_bf16")["dtypes"] == {torch.float32}  # the masters
    one, low = losses(trained / "1"), losses(trained / "2_bf16")
    assert 0 < (one - low).abs().max() < 1e-2


def test_recomputed_activations_change_no_bit(trained: Path) -> None:
    assert torch.equal(losses(trained / "2"), losses(trained / "2_recomputed"))
    for step in (1, STEPS):
        for kept, again in zip(record(trained, "2")[step], record(trained, "2_recomputed")[step], strict=True):
            assert torch.equal(kept, again)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data_parallel": 3}, "4 ranks cannot form 3 equal data-parallel rows"),
        ({"data_parallel": 2, "accumulate": 4}, "stage 20x256x4: a batch of 4 cannot be shared evenly"),
        ({"dtype": "fp16"}, "dtype is 'fp16'"),
    ],
    ids=["rows", "batch", "dtype"],
)
def test_what_does_not_divide_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        dataclasses.replace(BASE, ranks=4, **options)
