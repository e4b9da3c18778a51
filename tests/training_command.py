"""Runs of `ulysses-triton train` for tests: as a user starts them, and as tasks for ranks of our own."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ulysses_triton.kernels import _cache

_tokens = tempfile.TemporaryDirectory(prefix="ulysses-triton-tokens-")  # not in the cache of who runs the tests
os.environ.setdefault(_cache.FOLDER, _tokens.name)

ROOT = Path(__file__).parent.parent
TEXT = str(ROOT / "ulysses_triton" / "training")  # real text, and little of it
TINY = ("--width", "32", "--head-dim", "16", "--text", TEXT)


def environment() -> dict[str, str]:
    """A user's environment: kernels not interpreted, and the package importable from the source tree."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OMP_NUM_THREADS")}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def start(*arguments: object, launcher: tuple[str, ...] = (), tiny: bool = True) -> subprocess.Popen[str]:
    options = (*(TINY if tiny else ()), *map(str, arguments))
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "ulysses_triton.cli", "train", *options],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=take_interrupts,
    )


def take_interrupts() -> None:
    """As in a terminal: a suite that runs in the background was started with SIGINT ignored, and would hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def read_metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]


def losses(folder: Path) -> torch.Tensor:
    """The loss of every step, in full precision: fp32 [steps]."""
    return torch.tensor([row["loss"] for row in read_metrics(folder)], dtype=torch.float32)
