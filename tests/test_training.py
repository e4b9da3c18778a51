"""`ulysses-triton train`: what it trains on, that ranks do not change what it learns, and how it ends."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from training_command import TINY, finish, losses, read_metrics, start

from ulysses_triton import cli
from ulysses_triton.errors import ExchangeError, OptionError, ShapeError
from ulysses_triton.training import checkpoint, data, launch, plot, run_directory, tokens
from ulysses_triton.training.config import DEFAULT_STAGES, Stage, TrainConfig, learning_rate

# What is trained on


def numbered(length: int) -> torch.Tensor:
    return (torch.arange(length) % 251).to(torch.uint8)


def test_labels_are_the_bytes_that_follow() -> None:
    text, length = numbered(1000), 24
    windows = data.TrainingWindows(text, length, seed=0)
    inputs, labels = data.inputs_and_labels(windows.batch(0, windows.count))
    assert inputs.shape == labels.shape == (windows.count, length)
    assert torch.equal(labels, (inputs + 1) % 251)


def test_an_epoch_sees_every_window_once_in_an_order_the_seed_decides() -> None:
    text, length = numbered(250), 8
    windows, same, other = (data.TrainingWindows(text, length, seed) for seed in (3, 3, 4))
    first, second = windows.batch(0, windows.count), windows.batch(1, windows.count)
    expected = [index * length for index in range(windows.count)]
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == expected
    assert not torch.equal(first, second)
    assert torch.equal(second, same.batch(1, same.count))  # a step's batch does not depend on the steps before it
    assert not torch.equal(first, other.batch(0, other.count))


@pytest.mark.parametrize("size", [130, 1000, 20_011])
def test_no_training_window_touches_held_out_text(size: int) -> None:
    length = 64
    split = data.split_text(torch.zeros(size, dtype=torch.uint8), length)
    assert len(split.train) + len(split.held_out) == size
    assert len(split.held_out) >= max(length + 1, size // data.HELD_OUT_SHARE)
    split.held_out.fill_(1)
    windows = data.TrainingWindows(split.train, length, seed=0)
    assert windows.count >= 1
    assert windows.batch(0, 2 * windows.count).max() == 0
    held_out = data.held_out_windows(split.held_out, length, 8)
    assert held_out.min() == 1
    assert 1 <= len(held_out) <= 8
    assert held_out.shape[1] == length + 1


def test_text_is_the_files_of_folders_in_a_fixed_order_without_hidden_and_binary_ones(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in {"b.txt": b"bb", "sub/a": b"a", ".hidden": b"x", "binary": b"\0\1"}.items():
        (tmp_path / name).write_bytes(content)
    text = tokens.read_text([str(tmp_path), str(tmp_path / "binary")])
    assert bytes(text.content.tolist()) == b"bba\0\1"
    assert text.files == 3
    assert text.sha256 != tokens.read_text([str(tmp_path)]).sha256


def test_the_default_text_is_the_standard_library() -> None:
    files = data.standard_library_files()
    names = {file.name for file in files}
    assert {"argparse.py", "typing.py"} <= names
    assert not any({"site-packages", "test", "tests"} & set(file.parts[-3:-1]) for file in files)


def test_entropies_of_bytes_and_of_byte_pairs() -> None:
    unigram, bigram = data.byte_entropies(torch.tensor([0, 1, 2, 3] * (1 << 19) + [0], dtype=torch.uint8))
    assert unigram == pytest.approx(math.log(4), abs=1e-6)
    assert bigram == pytest.approx(0, abs=1e-6)


def test_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    config = TrainConfig(out="", ranks=1, stages=(Stage(60, 64, 1), Stage(40, 128, 1)), lr=1.0)
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


# Runs

UNEVEN = 257  # 129 tokens on rank 0, 128 on rank 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on two ranks, compared with one, at uneven lengths: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    stages = ("--stage", f"10x{UNEVEN}x2", "--stage", f"4x{2 * UNEVEN}x1")
    process = start("--ranks", 2, "--threads", 1, "--compare", "--out", folder, *stages)
    status, out, err = finish(process)
    assert status == 0, err
    return folder, out


def test_a_run_learns_and_leaves_readable_files(run: tuple[Path, str]) -> None:
    folder, out = run
    metrics = read_metrics(folder)
    assert tuple(metrics[0]) == run_directory.METRICS
    assert [row["step"] for row in metrics] == list(range(1, 15))
    assert 5 < metrics[0]["loss"] < 6.5
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1
    assert all(row["tokens_per_second"] > 0 for row in metrics)
    described = json.loads((folder / "config.json").read_text())
    assert described["ranks"] == 2
    assert described["stages"][0] == {"steps": 10, "length": UNEVEN, "batch": 2}
    assert described["versions"]["torch"] == torch.__version__
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    files = ["checkpoints", "compare.png", "config.json", "loss.png", "metrics.csv", "one-rank", "summary.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    for line in ("training loss", "held-out loss", "bigram entropy", "tokens/s"):
        assert out.count(line) == 2


def test_one_rank_and_two_have_the_same_losses(run: tuple[Path, str]) -> None:
    folder, out = run
    two, one = losses(folder), losses(folder / "one-rank")
    assert (two - one).abs().max() <= 1e-5
    held_out = [line for line in out.splitlines() if "held-out loss" in line]
    assert held_out[0] == held_out[1]
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "losses at most" in out


def test_under_torchrun_on_two_nodes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    launcher += ("--rdzv-endpoint", endpoint)
    arguments = ("--sequence-length", 256, "--steps", 2, "--out", tmp_path / "run")
    nodes = [start(*arguments, launcher=launcher) for _ in range(2)]
    ended = [finish(node) for node in nodes]
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert sum(out.count("held-out loss") for _, out, _ in ended) == 1
    assert len(read_metrics(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["ranks"] == 2
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None and found.step == 2


def default_run(out: Path, *arguments: object) -> dict[str, float]:
    status, _, err = finish(start("--device", "cpu", "--ranks", 4, "--out", out, *arguments, tiny=False), timeout=1500)
    assert status == 0, err
    return run_directory.read_summary(out)


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_with_attention_the_default_run_learns_what_bigrams_cannot_tell(tmp_path: Path) -> None:
    assert DEFAULT_STAGES[-1].length == 8192
    summary = default_run(tmp_path / "run")
    assert summary["held_out_loss"] <= 2.0 < summary["bigram_entropy"]


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_without_attention_the_same_run_does_not(tmp_path: Path) -> None:
    assert default_run(tmp_path / "run", "--zero-attention")["held_out_loss"] > 2.2


# Errors and ends


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--text", "/no/such/text"), "no such text file or folder: /no/such/text"),
        (("--sequence-length", "10000000"), "give more text or a shorter sequence"),
        (("--text", os.devnull), "no such text file"),
        (("--steps", "0"), "steps is 0"),
        (("--ranks", "0"), "ranks is 0"),
        (("--lr", "-1"), "learning rate is -1"),
        (("--kv-heads", "3"), "cannot share 3 key/value heads"),
        (("--head-dim", "5"), "head_dim is 5"),
        (("--sequence-length", "3"), "leaves some of 4 ranks without any"),
        (("--stage", "5x6"), "stage '5x6' is not STEPSxLENGTHxBATCH"),
        (("--stage", "5x512x2", "--steps", "3"), "describe a single stage"),
        (("--data-parallel", "3"), "4 ranks cannot form 3 equal data-parallel rows"),
        (("--data-parallel", "2"), "stage 80x8192x1: a batch of 1 cannot be shared evenly"),
        (("--checkpoint-every", "-1"), "checkpoint_every is -1"),
    ],
    ids=lambda value: "_".join(value).replace("/", "") if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(["train", *TINY, "--device", "cpu", "--ranks", "4", "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("ulysses-triton: error: ")
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_run_never_writes_over_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.csv").write_text("precious")
    assert cli.main(["train", "--out", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(OptionError, match="the text is empty"):
        tokens.read_text([str(tmp_path / "empty")])
    (tmp_path / "bare").mkdir()
    with pytest.raises(OptionError, match="no text files in the folder"):
        tokens.read_text([str(tmp_path / "bare")])


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"ulysses-triton\[train\]"):
        plot.require_matplotlib()


def test_what_the_op_refuses_reaches_the_user_as_one_line(tmp_path: Path) -> None:
    process = start("--head-dim", 258, "--ranks", 2, "--sequence-length", 64, "--out", tmp_path / "run")
    status, _, err = finish(process)
    assert status == 2
    assert err.startswith("ulysses-triton: error: ")
    assert "258" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def rank_processes(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_alive(pid: int) -> bool:
    try:
        return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", ["rank_killed", "interrupted", "command_killed"])
def test_however_it_ends_no_rank_is_left(how: str, tmp_path: Path) -> None:
    process = start("--ranks", 2, "--sequence-length", 256, "--steps", 100_000, "--out", tmp_path / "run")
    while not (tmp_path / "run").exists():  # it appears with the first step
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    ranks = rank_processes(process.pid)
    assert len(ranks) == 2
    if how == "rank_killed":
        os.kill(ranks[1], signal.SIGKILL)
    elif how == "interrupted":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C: everyone gets it
    else:
        process.kill()
    began = time.monotonic()
    status, _, err = finish(process, timeout=30)
    while any(map(is_alive, ranks)):
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    if how == "rank_killed":
        assert status == 1
        assert "rank 1 was killed by SIGKILL" in err
    elif how == "interrupted":
        assert status == 130
        assert "interrupted" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "metrics.csv"]
    assert read_metrics(tmp_path / "run")[0]["step"] == 1


def fail_on_rank_1(config: TrainConfig) -> None:
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("for a test")
    time.sleep(60)


def test_an_unforeseen_error_of_one_rank_ends_the_others() -> None:
    began = time.monotonic()
    with pytest.raises(launch.RankError, match="rank 1 failed with ZeroDivisionError: for a test") as caught:
        launch.run_on_own_ranks(fail_on_rank_1, TrainConfig(out="", ranks=2))
    assert "fail_on_rank_1" in str(caught.value.__cause__)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("failures", "expected", "message"),
    [
        pytest.param(
            [launch.Failure(0, kind="ExchangeError", message="rank 1 is silent"), launch.Failure(1, exit_status=-9)],
            launch.RankError,
            "rank 1 was killed by SIGKILL; the other ranks were stopped",
            id="a_killed_rank_before_its_peers",
        ),
        pytest.param(
            [
                launch.Failure(0, kind="RuntimeError", message="... Connection closed by peer ..."),
                launch.Failure(1, kind="ShapeError", message="mine"),
            ],
            ShapeError,
            "rank 1: mine",
            id="a_rank_that_raised_before_its_peers",
        ),
        pytest.param(
            [launch.Failure(rank, kind="ShapeError", message="all the same") for rank in (0, 1)],
            ShapeError,
            "all the same",
            id="what_all_ranks_say",
        ),
        pytest.param(
            [launch.Failure(1, kind="ExchangeError", message="silence")],
            launch.RankError,
            "rank 1 failed with ExchangeError: silence; the other ranks were stopped",
            id="only_lost_peers",
        ),
    ],
)
def test_the_error_raised_is_what_started_it(
    failures: list[launch.Failure], expected: type[Exception], message: str
) -> None:
    with pytest.raises(expected) as caught:
        launch.raise_root_cause(failures, ranks=2)
    assert str(caught.value) == message
    assert not isinstance(caught.value, ExchangeError)


def test_threads_are_shared_by_ranks() -> None:
    assert launch.cores_per_rank(1) >= 1
    assert launch.cores_per_rank(1_000_000) == 1
