"""Hugging Face's Trainer and TRL's SFTTrainer on shards of sequences learn what one process without them learns.

The runs are those of `hugging_face_runs`, in a process of their own; the reference is the stock class on one process,
with attention of PyTorch's.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_command import environment

STEPS, FEW, LAYERS, ACCUMULATE = 20, 8, 2, 2
REFERENCES = {  # of every run on ranks: what one process does with the same data
    "loop_4": "loop_1",
    "loop_2x2": "loop_1",
    "accelerate_2x2": "accelerate_1",
    "accelerate_stream_2x2": "accelerate_1",
    "trainer_4": "trainer_1_short",
    "trainer_2x2": "trainer_1",
    "fsdp_4": "trainer_1",
    "fsdp_2x2": "trainer_1",
    "tiled_fsdp_2x2": "trainer_1",
    "tiled_sft_4": "sft_padded_1",
    "sft_bfd_4": "sft_bfd_1",
    "sft_bfd_2x2": "sft_bfd_1",
    "sft_wrapped_4": "sft_wrapped_1",
    "sft_padding_free_4": "sft_padding_free_1",
    "sft_padded_4": "sft_padded_1",
}
SELDOM = ("accelerate_2x2", "trainer_4", "fsdp_2x2", "tiled_fsdp_2x2", "sft_bfd_2x2", "sft_wrapped_4")  # slow tests
OFTEN = [name for name in REFERENCES if name not in SELDOM]


def of_runs(*prefixes: str, but: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """A test of all runs whose names begin so."""
    names = [name for name in REFERENCES if name.startswith(prefixes) and not name.startswith(but or "-")]
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in names]
    )


every_run = of_runs("")
every_trainer = of_runs("", but=("loop", "accelerate"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [*OFTEN, *(REFERENCES[name] for name in OFTEN), "fsdp_4_resumed", "refused"]
    return run(tmp_path_factory.mktemp("runs"), *names)


@pytest.fixture(scope="module")
def zero_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: `make peers` installs it, `make VENV=.venv-peers test-slow` runs this")
    return run(
        tmp_path_factory.mktemp("zero"),
        "trainer_1",
        "zero_4",
        "zero_4_resumed",
        "zero_2x2",
        "zero2_2x2",
        "zero_tiled_4",
    )


def run(folder: Path, *names: str) -> Path:
    script = Path(__file__).with_name("hugging_face_runs.py")
    found = subprocess.run(
        [sys.executable, str(script), str(folder), *names], text=True, timeout=280,
        env=environment() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-4000:]
    return folder


def record(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    if not (folder / f"{name}.{rank}.pt").exists():  # what slow tests ask for
        run(folder, *SELDOM, *(REFERENCES[name] for name in SELDOM))
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=False)


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [record(folder, name, rank) for rank in range(4)]


def steps_of(name: str) -> int:
    return FEW if name in ("sft_wrapped_4", "sft_padding_free_4", "sft_padded_4", "tiled_sft_4") else STEPS


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@every_run
def test_losses_are_those_of_one_process(runs: Path, name: str) -> None:
    reference = record(runs, REFERENCES[name])["losses"]
    assert len(reference) == steps_of(name)
    assert reference[-1] < reference[0] - 0.03 * steps_of(name)
    for its in records(runs, name):
        assert apart(its["losses"], reference) <= 1e-5


@every_trainer
def test_gradient_norms_are_those_of_one_process(runs: Path, name: str) -> None:
    assert apart(record(runs, name)["grad_norms"], record(runs, REFERENCES[name])["grad_norms"]) <= 1e-4


@every_run
def test_every_step_attends_over_shards(runs: Path, name: str) -> None:
    for its in records(runs, name):
        assert len(its["calls"]) == steps_of(name)
        twice = name.startswith(("sft_bfd", "tiled"))  # TRL checkpoints activations if not told otherwise
        assert set(its["calls"]) <= {LAYERS * (1 + twice), LAYERS * ACCUMULATE * (1 + twice)}  # an epoch may end early


@every_trainer
def test_evaluation_attends_over_shards(runs: Path, name: str) -> None:
    for its in records(runs, name):
        assert len(its["calls_in_evaluation"]) == 2
        assert all(calls >= LAYERS for calls in its["calls_in_evaluation"])


@every_trainer
def test_evaluation_finds_what_one_process_finds(runs: Path, name: str) -> None:
    """The loss, and what compute_metrics makes of the logits and labels of whole sequences."""
    reference = record(runs, REFERENCES[name])["evaluations"]
    assert len(reference) == 2
    for its, expected in zip(record(runs, name)["evaluations"], reference, strict=True):
        assert set(its) == set(expected)
        assert {"eval_right", "eval_counted"} <= set(its) or "eval_mean_token_accuracy" in its
        assert its == pytest.approx(expected, abs=1e-5)


@of_runs("sft", "tiled_sft")
def test_tokens_are_counted_as_one_process_counts_them(runs: Path, name: str) -> None:
    reference = record(runs, REFERENCES[name])["metrics"]
    assert len(reference[0]) == 3
    for its, expected in zip(record(runs, name)["metrics"], reference, strict=True):
        assert its == pytest.approx(expected, abs=1e-5)


@of_runs("loop", "fsdp", "tiled_fsdp", "sft_bfd_2x2")
def test_parameters_are_sharded_over_all_ranks(runs: Path, name: str) -> None:
    for its in records(runs, name):
        assert its["fsdp_modules"] > LAYERS
        assert its["dtensors"]
        assert its["mesh"] == [4]


@pytest.mark.parametrize("name", ["loop_4", "loop_2x2"])
def test_shards_of_the_plain_loop_differ_in_length(runs: Path, name: str) -> None:
    first, *_, last = records(runs, name)
    assert sum(first["lengths"]) != sum(last["lengths"])


def test_ranks_hold_different_numbers_of_targets(runs: Path) -> None:
    """Otherwise the mean of every rank's mean would do."""
    targets = [its["targets"] for its in records(runs, "loop_2x2")]
    assert all(len(set(step)) > 1 for step in zip(*targets, strict=True))


def test_a_run_goes_on_from_a_checkpoint(runs: Path) -> None:
    whole = record(runs, "fsdp_4")["losses"]
    for its in records(runs, "fsdp_4_resumed"):
        assert len(its["calls"]) == STEPS // 2
        assert its["losses"] == whole


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("smoothing", "label_smoothing_factor"),
        ("loss", "compute_loss_func"),
        ("local", "average_tokens_across_devices=False"),
        ("encoder", "whose loss is not that of a causal LM"),
        ("experts", "output_router_logits"),
        ("ranks", "3 ranks for each sequence do not divide"),
    ],
)
def test_what_would_make_another_loss_is_refused(runs: Path, options: str, said: str) -> None:
    assert all(said in its[options] for its in records(runs, "refused"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero_4", "zero_2x2", "zero2_2x2", "zero_tiled_4"])
def test_zero_learns_what_one_process_learns(zero_runs: Path, name: str) -> None:
    reference = record(zero_runs, "trainer_1")
    for its in records(zero_runs, name):
        assert its["zero_stage"] == (2 if name.startswith("zero2") else 3)
        assert its["zero_stage"] == 2 or its["local"] == its["whole"] / 4
        assert its["calls"] == [LAYERS * ACCUMULATE * (1 + ("tiled" in name))] * STEPS
        assert apart(its["losses"], reference["losses"]) <= 1e-5
        assert apart(its["grad_norms"], reference["grad_norms"]) <= 1e-4
    for its, expected in zip(record(zero_runs, name)["evaluations"], reference["evaluations"], strict=True):
        assert its == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_run_under_zero_3_goes_on_from_a_checkpoint(zero_runs: Path) -> None:
    whole = record(zero_runs, "zero_4")["losses"]
    for its in records(zero_runs, "zero_4_resumed"):
        assert len(its["calls"]) == STEPS // 2
        assert apart(its["losses"], whole) <= 1e-6
