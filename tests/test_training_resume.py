"""A run that was killed goes on from its last whole checkpoint as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from training_command import TEXT, losses, read_metrics

from ulysses_triton import cli
from ulysses_triton.training import checkpoint, launch, loop, run_directory
from ulysses_triton.training.config import ModelConfig, Stage, TrainConfig, from_json

EVERY = 4
BASE = TrainConfig(
    out="",
    ranks=2,
    text=(TEXT,),
    stages=(Stage(6, 256, 2), Stage(5, 385, 2)),
    checkpoint_every=EVERY,
    model=ModelConfig(width=32, head_dim=16, hidden=96),
)
STEPS = BASE.steps


def die_at_call(count: int, owner: Any, name: str, *, rank: int) -> None:
    """Let `rank` be killed in place of its call number `count` of `owner.name`."""
    original, calls = getattr(owner, name), 0

    def act_or_die(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, act_or_die)


def die_in_step_7(config: TrainConfig) -> None:
    """Between backward and update."""
    die_at_call(7, loop, "clip_gradients", rank=1)
    loop.run(config)


def go_on_and_die_writing_shards(config: TrainConfig) -> None:
    """Of step 8: rank 0 writes its own."""
    die_at_call(1, dcp.FileSystemWriter, "write_data", rank=1)
    loop.resume(config)


def go_on_and_die_before_completing(config: TrainConfig) -> None:
    """When all shards of step 8 are on disk."""
    die_at_call(1, checkpoint, "_complete_and_rename", rank=0)
    loop.resume(config)


@pytest.fixture(scope="module", autouse=True)
def compiled_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # ranks inherit the environment
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    launch.run_on_own_ranks(loop.run, dataclasses.replace(BASE, out=str(folder)))
    return folder


def held_out(folder: Path) -> float:
    return run_directory.read_summary(folder)["held_out_loss"]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed in a step, and twice again while it wrote the checkpoint of step 8."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    config = dataclasses.replace(BASE, out=str(folder))
    with pytest.raises(launch.RankError, match="rank 1 was killed by SIGKILL"):
        launch.run_on_own_ranks(die_in_step_7, config)
    assert checkpoints(folder) == ["step-000004"]
    assert len(losses(folder)) == 6  # more than the checkpoint knows of: what follows it is trained again
    for task, rank in ((go_on_and_die_writing_shards, 1), (go_on_and_die_before_completing, 0)):
        with pytest.raises(launch.RankError, match=f"rank {rank} was killed by SIGKILL"):
            launch.run_on_own_ranks(task, config)
        assert checkpoints(folder) == [".step-000008.partial", "step-000004"]
        assert len(losses(folder)) == 8
    return folder


def test_after_kill_9_the_losses_are_those_of_an_undisturbed_run(
    killed: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    assert cli.main(["train", "--resume", str(out), "--threads", "1"]) == 0
    assert torch.equal(losses(out), losses(undisturbed))
    assert held_out(out) == held_out(undisturbed)
    assert [row["step"] for row in read_metrics(out)] == list(range(1, STEPS + 1))
    assert checkpoints(out) == ["step-000008", "step-000011"]
    resumed = json.loads((out / "config.json").read_text())["resumed"]
    assert [start["after_step"] for start in resumed] == [4, 4, 4]


@pytest.mark.parametrize("grid", [("--ranks", "1"), ("--ranks", "4", "--data-parallel", "2")], ids=["1", "2x2"])
def test_another_number_of_ranks_goes_on_within_rounding(
    grid: tuple[str, ...], killed: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    assert cli.main(["train", "--resume", str(out), "--threads", "1", *grid]) == 0
    one, other = losses(undisturbed), losses(out)
    assert torch.equal(one[:4], other[:4])
    assert 0 < (one[4:] - other[4:]).abs().max() <= 1e-5
    assert held_out(out) == pytest.approx(held_out(undisturbed), abs=1e-5)


def remove_marker(folder: Path) -> None:
    (folder / "complete.json").unlink()


def cut_marker(folder: Path) -> None:
    (folder / "complete.json").write_text('{"step": 11, "by')


def remove_shards(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def cut_shards(folder: Path) -> None:
    os.truncate(folder / "__0_0.distcp", 100)


def never_renamed(folder: Path) -> None:
    folder.rename(folder.with_name(f".{folder.name}.partial"))


@pytest.mark.parametrize("damage", [remove_marker, cut_marker, remove_shards, cut_shards, never_renamed])
def test_a_checkpoint_that_is_not_whole_is_never_loaded(damage: Any, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None and found.step == STEPS
    damage(found.path)
    older = checkpoint.newest(tmp_path / "run")
    assert older is not None and older.step == 8
    damage(older.path)
    assert checkpoint.newest(tmp_path / "run") is None


def test_the_configuration_comes_back_from_its_file(undisturbed: Path) -> None:
    assert from_json(run_directory.read_description(str(undisturbed))) == dataclasses.replace(
        BASE, out=str(undisturbed)
    )


def test_a_line_cut_short_and_lines_after_the_checkpoint_are_dropped(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open("a") as stream:
        stream.write("12,3.")
    config = dataclasses.replace(BASE, out=str(tmp_path / "run"))
    directory, kept = run_directory.RunDirectory.reopen(config, 8)
    directory.close()
    assert [metrics.step for metrics in kept] == list(range(1, 9))
    assert torch.equal(losses(tmp_path / "run"), losses(undisturbed)[:8])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lr", "1", "--zero-attention"), "--lr, --zero-attention: a resumed run keeps the options"),
        (("--stage", "5x256x2"), "--stage: a resumed run keeps the options"),
        (("--data-parallel", "3"), "2 ranks cannot form 3 equal data-parallel rows"),
    ],
    ids=["options", "stages", "rows"],
)
def test_what_cannot_change_is_refused(
    arguments: tuple[str, ...], said: str, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (undisturbed / "metrics.csv").read_bytes()
    assert cli.main(["train", "--resume", str(undisturbed), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert (undisturbed / "metrics.csv").read_bytes() == before


def test_another_text_is_refused(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    described = run_directory.read_description(str(tmp_path / "run"))
    described["text"] = [__file__]
    (tmp_path / "run" / "config.json").write_text(json.dumps(described))
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert "the text is not the one" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err
