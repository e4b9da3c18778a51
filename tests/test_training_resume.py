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


def kill_own_process(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_step(config: TrainConfig) -> None:
    """Rank 1 dies in step 7, between backward and update."""
    clip, calls = loop.clip_gradients, 0

    def clip_or_die(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 7 and dist.get_rank() == 1:
            kill_own_process()
        clip(*arguments)

    loop.clip_gradients = clip_or_die
    loop.run(config)


def die_writing_shards(config: TrainConfig) -> None:
    """Rank 1 dies before its shards of the second checkpoint are on disk; rank 0's are."""
    _from_the_second_on(dcp.FileSystemWriter, "write_data", rank=1)
    loop.run(config)


def die_before_completing(config: TrainConfig) -> None:
    """Rank 0 dies when all shards of the second checkpoint are on disk, before it says so."""
    _from_the_second_on(checkpoint, "_complete_and_rename", rank=0)
    loop.run(config)


def _from_the_second_on(owner: Any, name: str, rank: int) -> None:
    original, calls = getattr(owner, name), 0

    def act_or_die(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and dist.get_rank() == rank:
            kill_own_process()
        return original(*arguments, **options)

    setattr(owner, name, act_or_die)


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


@pytest.mark.parametrize(
    ("task", "last_words", "left"),
    [
        (die_in_a_step, "rank 1 was killed by SIGKILL", []),
        (die_writing_shards, "rank 1 was killed by SIGKILL", [".step-000008.partial"]),
        (die_before_completing, "rank 0 was killed by SIGKILL", [".step-000008.partial"]),
    ],
    ids=["in_a_step", "writing_shards", "before_completing"],
)
def test_after_kill_9_the_losses_are_those_of_an_undisturbed_run(
    task: Any, last_words: str, left: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(launch.RankError, match=last_words):
        launch.run_on_own_ranks(task, dataclasses.replace(BASE, out=str(out)))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [*left, "step-000004"]
    assert len(losses(out)) >= 6  # more than the checkpoint knows of: what follows it is trained again
    assert cli.main(["train", "--resume", str(out), "--threads", "1"]) == 0
    assert torch.equal(losses(out), losses(undisturbed))
    assert held_out(out) == held_out(undisturbed)
    assert [row["step"] for row in read_metrics(out)] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000008", "step-000011"]
    assert json.loads((out / "config.json").read_text())["resumed"][0]["after_step"] == 4


@pytest.mark.parametrize("grid", [("--ranks", "1"), ("--ranks", "4", "--data-parallel", "2")], ids=["1", "2x2"])
def test_another_number_of_ranks_goes_on_within_rounding(
    grid: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "checkpoints" / "step-000011")
    assert cli.main(["train", "--resume", str(out), "--threads", "1", *grid]) == 0
    one, other = losses(undisturbed), losses(out)
    assert torch.equal(one[:8], other[:8])
    assert 0 < (one[8:] - other[8:]).abs().max() <= 1e-5
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
        (("--ranks", "3"), "3 query heads"),
    ],
    ids=["options", "stages", "ranks"],
)
def test_what_cannot_change_is_refused(
    arguments: tuple[str, ...], said: str, undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (undisturbed / "metrics.csv").read_bytes()
    assert cli.main(["train", "--resume", str(undisturbed), *arguments]) == 2
    assert said in capfd.readouterr().err
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
